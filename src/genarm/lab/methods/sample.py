"""Sampling from one model, or from several whose logits are added up.

`Sample` draws from the base, a trained policy (DPO, RLHF, a soup), or a guided model with its reward weights (GenARM).

All are softmax(Σ_i c_i z_i / T) with one batched forward of each model per token; a model with c_i = 0 is not run.

Shapes: B rows, T positions, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.errors import WeightsError, kind_of
from genarm.lab.methods.interface import Kind, Meter, tally
from genarm.lab.methods.loop import Choices, check_sampling, decode, shared_ids
from genarm.lab.prefix import Ids, Prefix, batches, next_logits
from genarm.lab.replies import SampledReply, make_reply
from genarm.model.config import BASE
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.weights import weight_row
from genarm.sampling import Sampling, stop_ids

# Logits that one forward of `log_probs` may have, 256 MiB in float32.
LOGITS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Term:
    """One model of the sum.

    Attributes:
        model: a causal LM.
        factor: c_i.
        members: the names that its forwards are counted under.
        options: further arguments of its forward.
    """

    model: PreTrainedModel
    members: tuple[str, ...]
    factor: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


class Blend:
    """Draws from softmax(Σ_i c_i z_i / T)."""

    def __init__(
        self, terms: Sequence[Term], tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, name: str
    ) -> None:
        """Terms whose factor is 0 are left out.

        Args:
            terms: the models; the first one says what ends a reply.
            tokenizer: the models'.
            sampling: length and temperature.
            name: of the method, for messages.

        Raises:
            WeightsError: no term is left, or a factor is not finite.
            VocabularyError: a model knows fewer ids than the tokenizer has.
            UnsupportedError: `sampling` cuts or penalises tokens.
        """
        check_sampling(sampling, name)
        for term in terms:
            if not math.isfinite(term.factor):
                raise WeightsError(f"the weight of {term.members[0]} is {term.factor}; it must be a finite number")
        self.terms = tuple(term for term in terms if term.factor != 0)
        if not self.terms:
            raise WeightsError(f"every weight of {name} is 0; give at least one model a weight")
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.stops = stop_ids(terms[0].model, tokenizer)
        self._known = shared_ids([term.model for term in self.terms], tokenizer)

    def answer(self, prompts: Sequence[Ids], *, seed: int, meter: Meter) -> list[SampledReply]:
        """A reply to each prompt."""
        return self.draw(prompts, copies=1, seed=seed, meter=meter)

    def draw(self, prompts: Sequence[Ids], *, copies: int, seed: int, meter: Meter) -> list[SampledReply]:
        """`copies` replies to each prompt, those to one prompt side by side; each prompt is read once."""
        steps = _BlendSteps(self.terms, self._known, meter)
        drawn = decode(steps, prompts, self.sampling, stops=self.stops, seed=seed, copies=copies)
        return [make_reply(self.tokenizer, reply.tokens, self.stops) for reply in drawn]

    def log_probs(self, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> list[float] | None:
        """log π(reply | prompt) at the temperature, in one uncached forward; None where the choice is greedy."""
        if self.sampling.temperature == 0:
            return None
        lengths = [len(prompt) + len(reply.token_ids) for prompt, reply in zip(prompts, replies, strict=True)]
        totals = [0.0] * len(replies)
        for part in batches(lengths, tokens=LOGITS // self._known):
            scored = self._score([prompts[i] for i in part], [replies[i].token_ids for i in part])
            for i, total in zip(part, scored, strict=True):
                totals[i] = total
        return totals

    @torch.no_grad()
    def _score(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[float]:
        rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
        longest = max(map(len, replies))
        logits_BTV = _sum(
            [
                term.factor * Prefix(term.model, options=term.options).extend(rows, keep=longest + 1).logits.float()
                for term in self.terms
            ],
            self._known,
        )
        log_probs_BTV = torch.log_softmax(logits_BTV / self.sampling.temperature, dim=-1)
        # Rows end together at the right edge, and each logit is of the token after it.
        return [
            float(log_probs_TV[-len(reply) - 1 : -1].gather(-1, _column(reply, log_probs_TV)).sum())
            for log_probs_TV, reply in zip(log_probs_BTV, replies, strict=True)
        ]


class Sample(Blend):
    """Draws from one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        weights: Mapping[str, float] | None = None,
        members: tuple[str, ...] | None = None,
    ) -> None:
        """Ready to draw.

        Args:
            model: a causal LM or a guided model.
            tokenizer: its tokenizer.
            sampling: length and temperature.
            weights: {reward: weight} of a guided model, over its defaults.
            members: the names that its forwards are counted under; where not given, the base's, those of the rewards
                that have a weight and of their references.

        Raises:
            WeightsError: weights that name no reward, that are not finite, or of a model without rewards.
            VocabularyError, UnsupportedError: as `Blend`.
        """
        options: dict[str, Any] = {}
        running: tuple[str, ...] = (BASE,)
        if isinstance(model, GuidedForCausalLM):
            row = weight_row(weights or {}, model.default_weights)
            options["reward_weights"] = dict(zip(model.reward_names, row, strict=True))
            needed = model.coefficients(torch.tensor([row])).streams_BS[0] != 0
            running = (BASE, *(m.name for m, runs in zip(model.members[1:], needed.tolist(), strict=True) if runs))
        elif weights:
            raise WeightsError(f"{kind_of(model)} has no rewards, and there are weights of {', '.join(weights)}")
        super().__init__(
            [Term(model=model, members=members or running, options=options)], tokenizer, sampling, name="sampling"
        )


class _BlendSteps:
    """`Steps` over the whole vocabulary."""

    def __init__(self, terms: Sequence[Term], known: int, meter: Meter) -> None:
        self._factors = [term.factor for term in terms]
        self._prefixes = [
            Prefix(term.model, count=meter.counter(*term.members), options=term.options) for term in terms
        ]
        self._known = known

    def start(self, prompts: Sequence[Ids]) -> Choices:
        return self._extend(prompts)

    def advance(self, rows: Sequence[int], choices: Sequence[int]) -> Choices:
        for prefix in self._prefixes:
            prefix.select(rows)
        return self._extend([[choice] for choice in choices])

    def _extend(self, chunks: Sequence[Ids]) -> Choices:
        logits = [
            factor * next_logits(prefix, chunks) for factor, prefix in zip(self._factors, self._prefixes, strict=True)
        ]
        return Choices(scores_BC=_sum(logits, self._known))


def _sum(logits: Sequence[Tensor], known: int) -> Tensor:
    """Σ over the models, of the ids that all of them know."""
    total = logits[0][..., :known]
    for other in logits[1:]:
        total = total + other[..., :known].to(total.device)
    return total


def _column(ids: Ids, like: Tensor) -> Tensor:
    return torch.tensor(list(ids), device=like.device)[:, None]


KIND = Kind(
    name="sample",
    roles=("model",),
    build=lambda parts: Sample(parts.model("model"), parts.tokenizer, parts.sampling, members=("policy",)),
    forwards=lambda spec, tokens: tally((spec.base, tokens)),
)
