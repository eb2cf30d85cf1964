"""What one method costs as multiples of what another does, for each token of their replies."""

from __future__ import annotations

from dataclasses import dataclass

from genarm.lab.evaluation.results import Measured, Results


@dataclass(frozen=True, kw_only=True)
class Times:
    """How many times the forwards and the seconds per token of another method a method takes; NaN where undefined.

    Attributes:
        forwards: of all members together.
        seconds: of all replies together.
        fastest, slowest: the least and the greatest ratio of seconds in a batch. Both methods answered the same prompts
            in it, in turns where the recipe says so; what else the machine did may differ.
    """

    forwards: float
    seconds: float
    fastest: float
    slowest: float


def times(results: Results, first: str, second: str) -> Times:
    """What `first` costs in multiples of `second`."""
    size = int(results.settings["batch_size"])
    mine, theirs = results.row(first), results.row(second)
    ratios = [_ratio(a, b) for a, b in zip(_paces(mine, size), _paces(theirs, size), strict=True)]
    return Times(
        forwards=_ratio(mine.cost.forwards_per_token, theirs.cost.forwards_per_token),
        seconds=_ratio(mine.cost.seconds_per_token, theirs.cost.seconds_per_token),
        fastest=min(ratios),
        slowest=max(ratios),
    )


def _paces(row: Measured, size: int) -> list[float]:
    """Seconds per token of each batch."""
    tokens = [sum(row.tokens[start : start + size]) for start in range(0, len(row.tokens), size)]
    return [_ratio(seconds, count) for seconds, count in zip(row.cost.seconds, tokens, strict=True)]


def _ratio(first: float, second: float) -> float:
    return first / second if second else float("nan")
