"""Reward weights: what a caller may give, checked once and turned into one row of numbers per sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from genarm.errors import BudgetError, WeightsError, kind_of

RewardWeights: TypeAlias = Mapping[str, float] | Tensor
"""{name: number}, where rewards not named keep their default, or a tensor [batch, rewards]."""


def parse_weights(text: str) -> dict[str, float]:
    """`helpful=1,harmless=0.5` (commas or spaces between) as a mapping.

    Raises:
        WeightsError: an item is not NAME=NUMBER, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for item in text.replace(",", " ").split():
        name, equals, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (name and equals and math.isfinite(value)):
            raise WeightsError(f"cannot read the weight {item!r}; write NAME=NUMBER, as in helpful=1,harmless=0.5")
        if name in weights:
            raise WeightsError(f"the weight of {name!r} is given twice in {text!r}; give each reward once")
        weights[name] = value
    if not weights:
        raise WeightsError(f"no weight in {text!r}; write NAME=NUMBER, as in helpful=1,harmless=0.5")
    return weights


def weight_row(weights: Mapping[str, float], defaults: Mapping[str, float]) -> list[float]:
    """`weights` over `defaults`, in the order of the defaults.

    Raises:
        WeightsError: an unknown name, or a value that is not a finite number.
    """
    allowed = ", ".join(defaults) or "none"
    for name, value in weights.items():
        if name not in defaults:
            raise WeightsError(f"no reward is named {name!r}; this model has: {allowed}")
        if not is_finite_number(value):
            raise WeightsError(f"the weight of {name!r} is {value!r:.50}; it must be a finite number")
    return [float(weights.get(name, default)) for name, default in defaults.items()]


def resolve_weights(weights: RewardWeights | None, defaults: Mapping[str, float], batch_size: int) -> Tensor:
    """One float32 row per sequence, [batch_size, rewards].

    The result stays on the CPU so that asking "is this reward needed at all" never waits for an accelerator.

    Args:
        weights: None for the defaults; a mapping; or a tensor [batch, rewards], whose batch is `batch_size`.
        defaults: the default weight of every reward, in the model's order.
        batch_size: how many sequences there are.

    Raises:
        WeightsError: an unknown name, a wrong shape, or a value that is not finite.
    """
    if isinstance(weights, Tensor):
        return _check_tensor(weights, tuple(defaults), batch_size)
    if weights is not None and not isinstance(weights, Mapping):
        raise WeightsError(
            f"reward_weights is {kind_of(weights)}; give a mapping {{name: number}} or a tensor [batch, rewards]"
        )
    row = weight_row(weights or {}, defaults)
    return torch.tensor(row, dtype=torch.float32).repeat(batch_size, 1)


def check_max_kl(value: Any) -> None:
    """Raise BudgetError where `value` is no budget: nats per token, a finite number of at least 0, or None."""
    if value is not None and not (is_finite_number(value) and value >= 0):
        raise BudgetError(f"max_kl is {value!r:.50}; it must be a number of nats per token, 0 or more")


def resolve_max_kl(max_kl: float | Tensor | None, batch_size: int) -> Tensor | None:
    """A float32 budget per sequence, [batch_size], of one for all, of a tensor of as many, or of None.

    Raises:
        BudgetError: a value below 0 or not finite, or as many as there are not sequences.
    """
    if not isinstance(max_kl, Tensor):
        check_max_kl(max_kl)
        return None if max_kl is None else torch.full((batch_size,), float(max_kl))
    if tuple(max_kl.shape) != (batch_size,):
        raise BudgetError(f"max_kl has shape {tuple(max_kl.shape)}; expected one number for each of {batch_size} rows")
    for value in max_kl.tolist():
        check_max_kl(value)
    return max_kl.detach().to(device="cpu", dtype=torch.float32)


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number, no truth value, and neither NaN nor infinite."""
    try:
        # In float32 they are added up.
        limit = torch.finfo(torch.float32).max
        return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) <= limit
    except OverflowError:  # an integer beyond the largest float
        return False


def _check_tensor(weights: Tensor, names: Sequence[str], batch_size: int) -> Tensor:
    expected = (batch_size, len(names))
    if tuple(weights.shape) != expected:
        raise WeightsError(
            f"reward_weights has shape {tuple(weights.shape)}; expected [batch, rewards] = {list(expected)}, "
            f"one column each for: {', '.join(names) or 'no rewards'}"
        )
    rows = weights.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(rows).all():
        raise WeightsError("reward_weights holds NaN or infinity; every weight must be a finite number")
    return rows
