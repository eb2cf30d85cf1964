"""What the kinds of training have in common that trl does."""

from __future__ import annotations

from importlib.util import find_spec

from genarm.errors import MissingExtraError
from genarm.training.kinds import Kind

NO_DROPOUT = "the policy is compared with its reference, and dropout would blur that"


class Baseline(Kind):
    """A kind that an ARM is compared with."""

    def require(self) -> None:
        """Needs trl (raises MissingExtraError)."""
        if find_spec("trl") is None:
            raise MissingExtraError("trl", "baselines")
