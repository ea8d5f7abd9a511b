from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lora_pipeline.rendering.sheet import contact_sheet


def pictures(count: int, side: int) -> np.ndarray:
    """Flat, each of its own red; the rest of a sheet is grey."""
    images = np.zeros((count, side, side, 3), dtype=np.uint8)
    images[..., 0] = 20 + 10 * np.arange(count, dtype=np.uint8)[:, None, None]
    return images


def area(sheet: Image.Image, red: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what has exactly this red."""
    rows, columns = np.nonzero((np.asarray(sheet) == (red, 0, 0)).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@pytest.mark.parametrize(("side", "shown"), [(64, 128), (48, 144), (128, 128), (200, 200), (1024, 384)])
def test_tiles_are_enlarged_by_whole_factors_to_128_and_reduced_to_384(side: int, shown: int) -> None:
    left, top, right, bottom = area(contact_sheet(pictures(1, side), ["a"], ["1"]), 20)
    assert (right - left, bottom - top) == (shown, shown)


def test_rows_run_down_and_columns_across_without_overlap() -> None:
    sheet = contact_sheet(pictures(6, 64), ["a", "b"], ["1", "2", "3"])
    corners = [area(sheet, 20 + 10 * index) for index in range(6)]
    assert [corner[0] for corner in corners[:3]] == [corner[0] for corner in corners[3:]]
    assert len({corner[1] for corner in corners[:3]}) == 1
    assert corners[0][2] <= corners[1][0]
    assert corners[0][3] <= corners[3][1]
    assert corners[5][2] <= sheet.width
    assert corners[5][3] <= sheet.height


def test_a_long_label_makes_room_for_itself_and_stays_beside_its_row() -> None:
    prompts = ["a very long prompt " * 20, "unbroken" * 20]
    sheet = contact_sheet(pictures(2, 64), prompts, ["1"])
    left, top, _, bottom = area(sheet, 20)
    dark = np.asarray(sheet.convert("L"))[:, :left] < 128
    ends = np.nonzero(dark.any(axis=1))[0]
    assert ends[0] >= top
    assert ends[-1] < sheet.height
    assert area(sheet, 30)[1] > bottom + 100  # the first label is higher than its picture
    assert not dark[:, -4:].any()


def test_the_same_pictures_give_the_same_sheet() -> None:
    first, second = (contact_sheet(pictures(2, 64), ["a"], ["1", "2"]).tobytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("rows", "columns"), [(["a"], ["1"]), ([], ["1"])])
def test_a_grid_that_does_not_fit_is_refused(rows: list[str], columns: list[str]) -> None:
    with pytest.raises(ValueError, match="2 images"):
        contact_sheet(pictures(2, 8), rows, columns)
