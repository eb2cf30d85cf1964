"""What each member says about each token of a response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genarm.errors import MemberError, WeightsError


def check_numbers(said: Mapping[str, Tensor]) -> None:
    """Refuse NaN in the log-probs of a response, by member and, last, of all together.

    Raises:
        MemberError: a member's own are no numbers.
        WeightsError: only their sum is none.
    """
    silent = [name for name, values in said.items() if bool(values.isnan().any())]
    if silent and silent[0] != [*said][-1]:
        raise MemberError(
            f"{silent[0]!r} gives NaN instead of log-probabilities; its weights are broken, or too large for its "
            "dtype: try float32"
        )
    if silent:
        raise WeightsError("the sum of log-probabilities overflows with these reward weights; use smaller ones")


@dataclass(frozen=True, kw_only=True)
class TokenRewards:
    """Log-probabilities (natural logarithm, float32) of the T tokens of one response.

    Attributes:
        tokens: text of each token, `token_ids` their ids.
        base: log π_base(y_t | x, y_<t).
        rewards: for each reward i, log π_i(y_t | x, y_<t), the per-token reward, always ≤ 0; of a reward with a
            reference, less log π_reference, of either sign.
        guided: log π(y_t | x, y_<t) of the guided model, normalised.
        weights: w_i used for `guided` and `contributions`.
        differences: the rewards that have a reference.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    base: tuple[float, ...]
    rewards: dict[str, tuple[float, ...]]
    guided: tuple[float, ...]
    weights: dict[str, float]
    differences: tuple[str, ...] = ()

    @property
    def contributions(self) -> dict[str, tuple[float, ...]]:
        """w_i · log π_i(y_t | x, y_<t) for each reward."""
        return {name: tuple(self.weights[name] * v for v in values) for name, values in self.rewards.items()}

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the response: of the base, of each reward (r_i(x, y)) and of the guided model."""
        sums = {name: sum(values) for name, values in self.rewards.items()}
        return {"base": sum(self.base), **sums, "guided": sum(self.guided)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy, one record per token."""
        contributions = self.contributions
        return {
            "weights": self.weights,
            "totals": self.totals,
            "tokens": [
                {
                    "token": self.tokens[t],
                    "id": self.token_ids[t],
                    "base": self.base[t],
                    "rewards": {name: values[t] for name, values in self.rewards.items()},
                    "contributions": {name: values[t] for name, values in contributions.items()},
                    "guided": self.guided[t],
                }
                for t in range(len(self.tokens))
            ],
        }
