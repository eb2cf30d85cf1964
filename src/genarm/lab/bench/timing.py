"""Times taken in turn, and ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

Contestant: TypeAlias = Callable[[int], float]
"""Runs round `number` and returns what it measured."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of `n` values, with the smallest and the largest."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round: what slows the machine down for a while slows both, and their ratio stays."""
    return [a / b for a, b in zip(above, below, strict=True)]


def take_turns(
    contestants: Mapping[str, Contestant], rounds: int, announce: Callable[[int], None]
) -> dict[str, list[float]]:
    """Let every contestant run once per round, in an order that moves on by one from round to round.

    Args:
        contestants: {name: what to run}; each runs once more before the first round, to warm up.
        rounds: at least 1.
        announce: called with the number of each round before it, 0 for the warm-up.

    Returns:
        {name: a value per round}.
    """
    names = list(contestants)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        announce(number)
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            value = contestants[name](number)
            if number:
                values[name].append(value)
    return values


def per_token(stamps: Sequence[float]) -> float:
    """Seconds per token of a reply by the times its tokens came at; what came before the first one is left out."""
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def clock(device: torch.device) -> float:
    """The time once everything begun on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device, *, size: int = 2**30, repeats: int = 5) -> float:
    """Bytes read and written per second by copies of `size` bytes, the fastest of `repeats`."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(repeats):
        began = clock(device)
        target.copy_(source)
        times.append(clock(device) - began)
    return 2 * size / min(times)
