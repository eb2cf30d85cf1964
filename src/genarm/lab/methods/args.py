"""ARGS (arXiv 2402.01694): each token by its base logit and by what a trajectory reward says of the text up to it."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.lab.methods.search import Search
from genarm.lab.trajectory import TrajectoryReward
from genarm.sampling import Sampling


class Args(Search):
    """Among the base's `top_k` likeliest tokens v: z(v) + Σ_i w_i r_i([x, y_<t, v]).

    One forward of the base and k of each reward per token, the k in one batch, beside one of each for the prompt;
    a reply stops at EOS.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        rewards: Mapping[str, TrajectoryReward],
        weights: Mapping[str, float],
        *,
        top_k: int,
    ) -> None:
        """As `Search`."""
        super().__init__(base, tokenizer, sampling, rewards, weights, top_k=top_k, name="ARGS")
