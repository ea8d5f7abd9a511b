"""The options of a command line that say how much of each layer to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_pipeline.errors import ParamsError, UsageError

if TYPE_CHECKING:
    from lora_pipeline.adapters.ranks import RankRule


def rule_of(options: dict[str, float | None], max_rank: int | None) -> RankRule | None:
    """The rule that was asked for, if any.

    Args:
        options: By kind of rule, the value given for it.
        max_rank: A bound whatever the rule; a rule of its own where there is no other.

    Raises:
        UsageError: Two rules at once, or a value out of its range.
    """
    from lora_pipeline.adapters.ranks import RankRule

    given = [(kind, value) for kind, value in options.items() if value is not None]
    if len(given) > 1:
        both = " and ".join(f"--{kind}" for kind, _ in given)
        raise UsageError(both, "are several rules at once", "give one of them, and --max-rank if you like")
    if not given and max_rank is None:
        return None
    kind, value = given[0] if given else ("rank", float(max_rank or 0))
    try:
        return RankRule(kind, value, max_rank)  # type: ignore[arg-type]  # the options are named after the kinds
    except ParamsError as error:
        raise UsageError(f"--{error.where.replace('at_most', 'max-rank')}", error.problem, error.fix) from None
