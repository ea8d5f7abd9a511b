"""Which pictures a step sees, over random buckets."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.training.draws import batch_indices
from lora_pipeline.training.order import Order

pools = st.lists(st.tuples(st.sampled_from(["64x64", "48x80", "80x48"]), st.integers(1, 3)), min_size=1, max_size=9)
sizes = st.integers(1, 5)


def order(pool: list[tuple[str, int]], batch_size: int, seed: int = 0) -> Order:
    shapes, repeats = zip(*pool, strict=True)
    return Order(shapes, repeats, batch_size, seed, "tuning", "instances")


@given(pools, sizes)
def test_every_batch_has_one_shape_and_every_picture_comes_as_often_as_it_is_repeated(
    pool: list[tuple[str, int]], batch_size: int
) -> None:
    steps = sum(times for _, times in pool)  # whole cycles, after which all is even
    drawn = [order(pool, batch_size).pictures(step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in drawn)
    assert all(len({pool[index][0] for index in batch}) == 1 for batch in drawn)
    visits = Counter(index for batch in drawn for index in batch)
    assert visits == {index: batch_size * times for index, (_, times) in enumerate(pool)}


@given(pools, sizes)
def test_within_a_cycle_no_picture_gets_far_ahead(pool: list[tuple[str, int]], batch_size: int) -> None:
    buckets = Counter(shape for shape, times in pool for _ in range(times))
    cycle = sum(buckets.values()) // math.gcd(*buckets.values())
    visits = Counter(index for step in range(cycle) for index in order(pool, batch_size).pictures(step))
    expected = batch_size / math.gcd(*buckets.values())
    for index, (_, times) in enumerate(pool):
        assert times * math.floor(expected) <= visits[index] <= times * math.ceil(expected)


@given(pools, sizes, st.integers(0, 200))
def test_any_step_is_reached_without_those_before(pool: list[tuple[str, int]], batch_size: int, step: int) -> None:
    walked = order(pool, batch_size)
    for each in range(step):
        walked.pictures(each)
    assert walked.pictures(step) == order(pool, batch_size).pictures(step)


@given(st.integers(1, 9), sizes, st.integers(0, 50))
def test_pictures_of_one_size_are_drawn_as_without_buckets(count: int, batch_size: int, step: int) -> None:
    drawn = order([("64x64", 1)] * count, batch_size, seed=3).pictures(step)
    assert drawn == batch_indices(count, batch_size, step, 3, "tuning", "instances")


def test_seeds_decide_whose_turn_it_is() -> None:
    pool = [("64x64", 1)] * 5 + [("48x80", 1)] * 4
    turns = {tuple(order(pool, 1, seed).pictures(step)[0] < 5 for step in range(9)) for seed in range(5)}
    assert len(turns) > 1
