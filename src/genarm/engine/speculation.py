"""What to draft from, and how far.

Drafts come from the small members: the ARMs with a trunk of their own, or a draft model named for it. The combined
distribution is π_base · Π π_i^{w_i}; a small ARM trained from the base's family is close to the base, so its power
1 + w is a better guess of the product than the ARM itself, at no extra forward. Whatever the guess, the output's
distribution is exactly the combined one: a bad guess costs time only.

Shapes: P positions, V ids of the base's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MEMORY = 0.9
"""How much of the acceptance estimate each new observation leaves."""
_FIRST_GUESS = 0.7
_LOOK_AGAIN = 32
"""Tokens after which a request that has stopped drafting tries once more."""


def exponents(weights: Mapping[int, float], draft: int | None) -> dict[int, float]:
    """The power of each drafting member in the guess.

    Args:
        weights: {member: w} of the ARMs that draft; not 0.
        draft: the member that stands in for the base, if there is one; otherwise the ARMs do, in proportion to |w|.

    Returns:
        {member: power}; for positive weights w_i · (1 + 1/Σw), which for one ARM is 1 + w.
    """
    if draft is not None:
        return {draft: 1.0, **weights}
    total = sum(abs(w) for w in weights.values())
    return {member: w + abs(w) / total for member, w in weights.items()}


def guess(members: Sequence[Tensor], powers_PM: Tensor, unknown: Sequence[Tensor | None] = ()) -> Tensor:
    """The product of members' distributions, each to its power; ids that one of them does not know are left out.

    Args:
        members: log-probs [P, V] of each.
        powers_PM: a column per member; 0 where it has no part.
        unknown: for each member a bool mask [V] of the ids that it does not know, or None.

    Returns:
        Normalised log-probs [P, V]. They must be: verification compares them with the target's.
    """
    total_PV = members[0] * powers_PM[:, :1]
    for i, member_PV in enumerate(members[1:], start=1):
        total_PV.addcmul_(powers_PM[:, i : i + 1], member_PV)
    for i, mask_V in enumerate(unknown):
        if mask_V is not None:
            total_PV.masked_fill_(mask_V & (powers_PM[:, i : i + 1] != 0), -torch.inf)
    return torch.log_softmax(total_PV, dim=-1)


class DraftLength:
    """How many tokens to draft for one request, by the acceptance it has seen.

    Everything here depends on the request alone, never on its company or on a clock: the same request with the same
    seed gives the same tokens.
    """

    def __init__(self, *, most: int, cost: float, overhead: float = 0.0, adapt: bool) -> None:
        """Start with an ordinary guess.

        Args:
            most: the most tokens drafted at once.
            cost: of the drafting members' forward of one token, in forwards of the base.
            overhead: of drafting one token besides, likewise.
            adapt: False drafts `most` tokens always.
        """
        self.most = most
        self.cost = cost
        self.overhead = overhead
        self.adapt = adapt
        self.acceptance = _FIRST_GUESS
        self._idle = 0

    def next(self) -> int:
        """The number that promises most tokens for its cost; 0 where drafting does not pay."""
        if not self.adapt:
            return self.most
        best = max(range(self.most + 1), key=lambda k: _tokens(self.acceptance, k) / _price(k, self))
        if best == 0:
            self._idle += 1
            if self._idle >= _LOOK_AGAIN:
                self._idle = 0
                return min(1, self.most)
        return best

    def saw(self, acceptances: Sequence[float]) -> None:
        """Take in the acceptance probability of each drafted token that was looked at."""
        for value in acceptances:
            self.acceptance = _MEMORY * self.acceptance + (1 - _MEMORY) * value


_VERIFY = 0.03
"""Cost of one more token in the base's forward, which reads its weights once for all of them."""


def _tokens(acceptance: float, k: int) -> float:
    """Expected tokens of a step with `k` drafts: 1 + a + … + a^k."""
    return math.fsum(acceptance**j for j in range(k + 1))


def _price(k: int, length: DraftLength) -> float:
    """Forwards of the base that a step costs; after k acceptances the drafting members run once more."""
    return 1 + (_VERIFY + length.overhead) * k + length.cost * (k + length.acceptance**k if k else 1)
