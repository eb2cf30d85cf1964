"""Best-of-N: of N samples, the one with the highest reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from genarm.errors import ConfigError
from genarm.lab.methods.interface import Kind, Meter, tally
from genarm.lab.methods.loop import check_sampling
from genarm.lab.methods.rewards import RewardOfReplies, WeightedScores
from genarm.lab.methods.sample import Sample
from genarm.lab.prefix import Ids
from genarm.lab.replies import SampledReply


class BestOfN:
    """argmax over N samples y of Σ_i w_i r_i(x, y); the first of equals.

    The base reads each prompt once for all N; each reward scores N replies to it.
    """

    def __init__(
        self, sample: Sample, rewards: Mapping[str, RewardOfReplies], weights: Mapping[str, float], *, n: int
    ) -> None:
        """Ready to answer.

        Args:
            sample: draws the samples.
            rewards: by name.
            weights: w_i by the same names; 1 where not given.
            n: N.

        Raises:
            ConfigError: an N below 1.
            UnsupportedError: samples at temperature 0, which are all the same.
            WeightsError, VocabularyError: weights or rewards that do not serve.
        """
        if n < 1:
            raise ConfigError(f"n of Best-of-N is {n}; it must be at least 1")
        check_sampling(sample.sampling, "Best-of-N", greedy=False)
        self.sample = sample
        self.rewards = WeightedScores(rewards, weights, sample.tokenizer)
        self.n = n

    def answer(self, prompts: Sequence[Ids], *, seed: int, meter: Meter) -> list[SampledReply]:
        """A reply to each prompt."""
        samples = self.sample.draw(prompts, copies=self.n, seed=seed, meter=meter)
        repeated = [prompt for prompt in prompts for _ in range(self.n)]
        scores = self.rewards.score(repeated, [reply.token_ids for reply in samples], meter)
        firsts = range(0, len(samples), self.n)
        return [samples[max(range(first, first + self.n), key=lambda i: scores[i])] for first in firsts]

    def log_probs(self, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> None:
        """None: the density sums over everything that N samples could have been; there is `kl_bound` instead."""

    @property
    def kl_bound(self) -> float:
        """KL(π ‖ base) in nats is at most this, as `kl_bound`."""
        return kl_bound(self.n)


def kl_bound(n: int) -> float:
    """log N − (N − 1)/N, an upper bound in nats on the divergence of Best-of-N from what it samples (2401.01879)."""
    return math.log(n) - (n - 1) / n


KIND = Kind(
    name="best-of-n",
    roles=("base",),
    named="rewards",
    settings={"n": 16},
    build=lambda parts: BestOfN(
        Sample(parts.model("base"), parts.tokenizer, parts.sampling),
        parts.rewards_of_replies,
        parts.spec.weights,
        **parts.spec.numbers,
    ),
    forwards=lambda spec, tokens: tally(
        (spec.base, tokens * spec.numbers["n"]), *((reward, spec.numbers["n"]) for reward in spec.named.values())
    ),
    kl_bound=lambda spec: kl_bound(spec.numbers["n"]),
)
