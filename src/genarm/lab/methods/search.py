"""Search for the next token among the base's likeliest: what ARGS and Transfer-Q have in common.

For the k tokens v with the highest base logits z(v): z(v) + Σ_i w_i r_i([x, y_<t, v, …]), greedy at temperature 0,
else drawn from the softmax at the temperature over the k. The rewards have read [x, y_<t] in their caches, so that
the k scores of every row are one batched forward over what comes after it; the chosen one's cache is gone on with.

Shapes: B rows, K candidates, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from genarm.errors import ConfigError
from genarm.lab.methods.interface import Meter
from genarm.lab.methods.loop import Choices, decode, replay
from genarm.lab.methods.rewards import Guidance, RewardGuided
from genarm.lab.prefix import Ids, Prefix, next_logits
from genarm.lab.replies import SampledReply, make_reply
from genarm.model.config import BASE


class Rollouts(Protocol):
    """How a reply could go on after each candidate."""

    def start(self, prompts: Sequence[Ids]) -> None:
        """The prompts, before anything else."""
        ...

    def run(self, rows: Sequence[int], candidates: Sequence[int]) -> list[list[int]]:
        """What comes after each candidate, which goes on from one of the last call's candidates.

        Args:
            rows: for each candidate, which of the last call's (at first, which of the prompts) it goes on from.
            candidates: one token each.
        """
        ...


class Search(RewardGuided):
    """ARGS, or with rollouts Transfer-Q."""

    def __init__(self, guidance: Guidance, *, top_k: int, others: Sequence[PreTrainedModel] = ()) -> None:
        """As `RewardGuided`, with the number of candidates.

        Raises:
            ConfigError: a top_k below 1.
            WeightsError, VocabularyError, UnsupportedError: as `RewardGuided`.
        """
        super().__init__(guidance, others=others)
        if top_k < 1:
            raise ConfigError(f"top_k of {self.title} is {top_k}; it must be at least 1")
        self.top_k = min(top_k, self.known)
        self._drawn: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def answer(self, prompts: Sequence[Ids], *, seed: int, meter: Meter) -> list[SampledReply]:
        """A reply to each prompt."""
        drawn = decode(self._steps(meter), prompts, self.sampling, stops=self.stops, seed=seed)
        replies = [make_reply(self.tokenizer, reply.tokens, self.stops) for reply in drawn]
        pairs = zip(prompts, replies, drawn, strict=True)
        self._drawn = {(tuple(prompt), reply.token_ids): own.log_prob for prompt, reply, own in pairs}
        return replies

    def log_probs(self, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> list[float] | None:
        """log π(reply | prompt) under the softmax over the k; None where the choice is greedy.

        Those of the last answers are known from the drawing; for others the search is done again along the reply,
        which costs as much as answering.
        """
        if self.sampling.temperature == 0:
            return None
        assert all(len(reply.token_ids) <= self.sampling.max_new_tokens for reply in replies)
        keys = [(tuple(prompt), reply.token_ids) for prompt, reply in zip(prompts, replies, strict=True)]
        unknown = [key for key in dict.fromkeys(keys) if key not in self._drawn]
        if not unknown:
            return [self._drawn[key] for key in keys]
        steps = self._steps(Meter())
        totals = replay(steps, [x for x, _ in unknown], [y for _, y in unknown], self.sampling.temperature)
        known = {**self._drawn, **dict(zip(unknown, totals, strict=True))}
        return [known[key] for key in keys]

    def _steps(self, meter: Meter) -> SearchSteps:
        return SearchSteps(self, meter, self._rollouts(meter))

    def _rollouts(self, meter: Meter) -> Rollouts | None:
        return None


class SearchSteps:
    """`Steps` among the K candidates."""

    def __init__(self, search: Search, meter: Meter, rollouts: Rollouts | None) -> None:
        self._base = Prefix(search.base, count=meter.counter(BASE))
        self._rewards = search.rewards.prefix(meter)
        self._rollouts = rollouts
        self._known = search.known
        self._top_k = search.top_k
        self._ids_BK: list[list[int]] = []
        self._tails: list[list[int]] = []

    def start(self, prompts: Sequence[Ids]) -> Choices:
        """Candidates for the first token."""
        self._rewards.extend(prompts)
        if self._rollouts is not None:
            self._rollouts.start(prompts)
        return self._choices(list(range(len(prompts))), next_logits(self._base, prompts))

    def advance(self, rows: Sequence[int], choices: Sequence[int]) -> Choices:
        """Candidates for the next token."""
        tokens = [self._ids_BK[row][choice] for row, choice in zip(rows, choices, strict=True)]
        chosen = [row * self._top_k + choice for row, choice in zip(rows, choices, strict=True)]
        self._base.select(rows)
        return self._choices(chosen, next_logits(self._base, [[token] for token in tokens]))

    def _choices(self, chosen: Sequence[int], logits_BV: Tensor) -> Choices:
        """The next candidates; `chosen` are the rows of rewards and rollouts that they come after."""
        top = logits_BV[:, : self._known].topk(self._top_k)
        self._ids_BK = top.indices.tolist()
        candidates = [token for ids in self._ids_BK for token in ids]
        # Of what the rewards read last, the chosen tokens stay and their rollouts go.
        self._rewards.select(chosen)
        self._rewards.rewind([len(self._tails[row]) if self._tails else 0 for row in chosen])
        self._rewards.select([row for row in range(len(chosen)) for _ in range(self._top_k)])
        self._tails = [[] for _ in candidates]
        if self._rollouts is not None:
            self._tails = self._rollouts.run([row for row in chosen for _ in range(self._top_k)], candidates)
        rewards_N = self._rewards.extend([[token, *tail] for token, tail in zip(candidates, self._tails, strict=True)])
        rewards_BK = rewards_N.view(-1, self._top_k).to(logits_BV.device)
        return Choices(scores_BC=top.values + rewards_BK, ids_BC=self._ids_BK)
