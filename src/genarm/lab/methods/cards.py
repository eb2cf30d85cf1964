"""CARDS (arXiv 2406.16306): rejection sampling, segment by segment.

1. A segment is drawn from the base, until its next-token entropy is at least `entropy`, or the reply ends.
2. It is accepted with probability min(1, exp((r − r_t) / β)), where r is the reward of [x, y_<t, segment] and
   r_t = min(goal, r_0 + t · (goal − r_0) / n), with t tokens of the reply up to the segment's end out of n at most.
   It rises from r_0 = (1 − α) · r(x) + α · goal, α = 1/2 as in the authors' code.
3. A rejected segment is drawn again. When all `tries` are used up, the one with the highest reward is kept.

The rows of a batch go side by side, each at its own segment and try: every forward of the base reads one token of
every row. Caches go back to the segment's start when it is rejected.

Shapes: B rows, V ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genarm.engine.noise import Purpose, key, uniform
from genarm.errors import ConfigError
from genarm.lab.methods.interface import Kind, Meter, MethodSpec, tally
from genarm.lab.methods.loop import enough_memory, pick
from genarm.lab.methods.rewards import Guidance, RewardGuided, WeightedPrefix
from genarm.lab.prefix import Ids, Prefix, next_logits, require_movable
from genarm.lab.replies import SampledReply, make_reply
from genarm.model.config import BASE
from genarm.sampling import derive_seed

ALPHA = 0.5


class Cards(RewardGuided):
    """Segments of the base, accepted by Σ_i w_i r_i against a rising threshold."""

    title = "CARDS"
    greedy = False

    def __init__(self, guidance: Guidance, *, entropy: float, beta: float, goal: float, tries: int) -> None:
        """As `RewardGuided`, whose length is n, with the numbers of the method.

        Args:
            guidance: base, rewards and weights.
            entropy: in nats, of the base at temperature 1, from which on a segment ends.
            beta: β; the smaller, the less of what is below the threshold is accepted.
            goal: the threshold at the end.
            tries: how often a segment is drawn at the most.

        Raises:
            ConfigError: a setting out of range.
            WeightsError, VocabularyError, UnsupportedError: as `RewardGuided`.
        """
        super().__init__(guidance)
        if not (math.isfinite(entropy) and entropy >= 0 and math.isfinite(goal)):
            raise ConfigError(f"entropy and goal of CARDS are {entropy} and {goal}; they must be finite, entropy ≥ 0")
        if not (math.isfinite(beta) and beta > 0 and tries >= 1):
            raise ConfigError(f"beta and tries of CARDS are {beta} and {tries}; they must be above 0 and at least 1")
        self.entropy = entropy
        self.beta = beta
        self.goal = goal
        self.tries = tries
        require_movable([self.base, *(reward.trunk for reward in self.rewards.models)], self.title)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Ids], *, seed: int, meter: Meter) -> list[SampledReply]:
        """A reply to each prompt."""
        with enough_memory(len(prompts)):
            run = _Run(self, prompts, seed, meter)
            while run.going:
                run.step()
        return [make_reply(self.tokenizer, row.kept, self.stops) for row in run.rows]

    def log_probs(self, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> None:
        """None: the density of a segment sums over all ways to be rejected before it."""

    def threshold(self, start: float, tokens: int) -> float:
        """r_t after `tokens` tokens, from the reward `start` of the prompt alone."""
        first = (1 - ALPHA) * start + ALPHA * self.goal
        return min(self.goal, first + tokens * (self.goal - first) / self.sampling.max_new_tokens)

    def acceptance(self, reward: float, threshold: float) -> float:
        """min(1, exp((r − r_t) / β))."""
        return math.exp(min(0.0, (reward - threshold) / self.beta))


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A segment that was drawn; `base`, `rewards` (one row each) and `logits_V` are what would be gone on with."""

    tokens: tuple[int, ...]
    score: float
    base: Prefix | None
    rewards: WeightedPrefix
    logits_V: Tensor


@dataclass(kw_only=True)
class _Row:
    """One reply: what is kept of it, and the segment that is being drawn."""

    seed: int
    start: float
    begin_V: Tensor
    kept: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    drawn: int = 0
    tries: int = 0
    best: _Tried | None = None
    done: bool = False

    def keep(self, tokens: Sequence[int], logits_V: Tensor, *, done: bool) -> None:
        """Accept a segment."""
        self.kept += tokens
        self.segment = []
        self.tries = 0
        self.best = None
        self.begin_V = logits_V
        self.done = done


class _Run:
    """The replies to one batch of prompts; row i of caches and logits is that of `going[i]`."""

    def __init__(self, cards: Cards, prompts: Sequence[Ids], seed: int, meter: Meter) -> None:
        self._cards = cards
        self._base = Prefix(cards.base, count=meter.counter(BASE))
        self._rewards = cards.rewards.prefix(meter)
        self._logits_BV = self._read(prompts)
        starts = self._rewards.extend(prompts).tolist()
        self.rows = [
            _Row(seed=derive_seed(seed, i), start=start, begin_V=self._logits_BV[i].clone())
            for i, start in enumerate(starts)
        ]
        self.going = list(self.rows)

    def step(self) -> None:
        """One more token in every row."""
        self._draw(range(len(self.going)))
        while ended := [i for i, row in enumerate(self.going) if not row.done and self._ends_reply(row)]:
            self._judge(ended)
            self._draw([i for i in ended if not self.going[i].done])
        left = [i for i, row in enumerate(self.going) if not row.done]
        self.going = [self.going[i] for i in left]
        if not left:
            return
        self._base.select(left)
        self._rewards.select(left)
        self._logits_BV = self._read([[row.segment[-1]] for row in self.going])
        log_probs_BV = torch.log_softmax(self._logits_BV, dim=-1)
        entropies = torch.special.entr(log_probs_BV.exp()).sum(dim=-1).tolist()
        ended = [i for i, entropy in enumerate(entropies) if entropy >= self._cards.entropy]
        if ended:
            self._judge(ended)

    def _read(self, chunks: Sequence[Ids]) -> Tensor:
        return next_logits(self._base, chunks)[:, : self._cards.known]

    def _draw(self, rows: Sequence[int]) -> None:
        """The next token of these rows' segments, not yet read by the base."""
        if not rows:
            return
        keys = [key(self.going[i].seed, self.going[i].drawn, Purpose.TOKEN) for i in rows]
        tokens, _ = pick(self._logits_BV[list(rows)], self._cards.sampling, keys)
        for i, token in zip(rows, tokens, strict=True):
            self.going[i].segment.append(token)
            self.going[i].drawn += 1

    def _ends_reply(self, row: _Row) -> bool:
        full = len(row.kept) + len(row.segment) == self._cards.sampling.max_new_tokens
        return bool(row.segment) and (full or row.segment[-1] in self._cards.stops)

    def _judge(self, ended: Sequence[int]) -> None:
        """Accept, reject or replace the segments of these rows, which are complete."""
        trial = self._rewards.fork(ended)
        scores = trial.extend([self.going[i].segment for i in ended]).tolist()
        back = [0] * len(self.going)
        accepted: list[int] = []
        for place, (i, score) in enumerate(zip(ended, scores, strict=True)):
            row, ends_reply = self.going[i], self._ends_reply(self.going[i])
            row.tries += 1
            if self._accepts(row, score):
                row.keep(row.segment, self._logits_BV[i].clone(), done=ends_reply)
                accepted.append(place)
                continue
            if row.best is None or score > row.best.score:
                row.best = self._tried(i, score, trial.fork([place]))
            # The base has not read a token that ends the reply.
            back[i] = len(row.segment) - ends_reply
            row.segment = []
            self._logits_BV[i] = row.begin_V
        self._base.rewind(back)
        if accepted:
            self._rewards.replace([ended[place] for place in accepted], trial.fork(accepted))
        for i in ended:
            if self.going[i].tries == self._cards.tries:
                self._settle(i)

    def _accepts(self, row: _Row, score: float) -> bool:
        threshold = self._cards.threshold(row.start, len(row.kept) + len(row.segment))
        return uniform(key(row.seed, row.drawn, Purpose.ACCEPT)) < self._cards.acceptance(score, threshold)

    def _tried(self, i: int, score: float, rewards: WeightedPrefix) -> _Tried:
        row = self.going[i]
        return _Tried(
            tokens=tuple(row.segment),
            score=score,
            base=None if self._ends_reply(row) else self._base.fork([i]),
            rewards=rewards,
            logits_V=self._logits_BV[i].clone(),
        )

    def _settle(self, i: int) -> None:
        """Keep the best of a row's tries."""
        best = self.going[i].best
        assert best is not None
        if best.base is not None:
            self._base.replace([i], best.base)
            self._rewards.replace([i], best.rewards)
            self._logits_BV[i] = best.logits_V
        self.going[i].keep(best.tokens, best.logits_V, done=best.base is None)


def _forwards(spec: MethodSpec, tokens: int) -> Counter[str]:
    drawn = tokens * spec.numbers["tries"]
    return tally((spec.base, drawn), *((reward, 1 + drawn) for reward in spec.named.values()))


KIND = Kind(
    name="cards",
    roles=("base",),
    named="rewards",
    settings={"entropy": 3.0, "beta": 0.7, "goal": 0.0, "tries": 20},
    build=lambda parts: Cards(Guidance.of(parts), **parts.spec.numbers),
    forwards=_forwards,
)
