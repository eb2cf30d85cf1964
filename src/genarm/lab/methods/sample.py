"""Sampling from one model: the base, prompted or not, a trained policy (DPO, RLHF, a soup), or a guided model.

Every method whose next token comes of models' log-probs alone is the sampling of a guided model: GenARM, wishes, tuned
models, proxy tuning and MOD differ in its rewards and their weights.

Shapes: B rows, T positions, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from genarm.errors import UnsupportedError
from genarm.lab.methods.interface import Kind, Meter, tally
from genarm.lab.methods.loop import Choices, check_sampling, decode, shared_ids
from genarm.lab.prefix import Ids, Prefix, batches, next_logits
from genarm.lab.replies import SampledReply, make_reply
from genarm.model.combine import divergence
from genarm.model.config import BASE, GuidedConfig
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.weights import check_max_kl, weight_row
from genarm.model.wishes import Contexts, padded
from genarm.sampling import Sampling, stop_ids

# Log-probs that one forward of `log_probs` may have, 256 MiB in float32.
LOGITS = 1 << 26

POLICY = {BASE: "policy"}
"""The name of a model that is not the base."""

Reader: TypeAlias = Callable[[Ids, str], Ids]
"""The ids of a prompt, which is known by its ids, as it is read with a system text."""


class Distance(NamedTuple):
    """Of a reply from the base: log π and log π_base of it, and Σ_t KL(π_t ‖ π_base,t) along it, in nats."""

    log_prob: float
    base_log_prob: float
    kl: float


class Sample:
    """Draws from one model with a temperature."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        weights: Mapping[str, float] | None = None,
        max_kl: float | None = None,
        system: str | None = None,
        reader: Reader | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Ready to draw.

        Args:
            model: a causal LM or a guided model.
            tokenizer: its tokenizer.
            sampling: length and temperature.
            weights: {reward: weight} of a guided model, over its defaults.
            max_kl: the most nats that a token's distribution may be from the base's.
            system: a text that the model reads with every prompt.
            reader: reads prompts with `system` and with the wishes of a guided model.
            names: {member: name} that its forwards are counted under, where it is not the member's own. Counted are
                the base, the rewards that have a weight and their references.

        Raises:
            WeightsError: weights that name no reward or are not finite, or a max_kl below 0.
            VocabularyError: a model knows fewer ids than the tokenizer has.
            UnsupportedError: `sampling` cuts or penalises tokens, or there are texts and no reader.
        """
        check_sampling(sampling, "sampling")
        check_max_kl(max_kl)
        self.model = model if isinstance(model, GuidedForCausalLM) else GuidedForCausalLM.from_members(model, {})
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.stops = stop_ids(self.model, tokenizer)
        self.known = shared_ids([self.model], tokenizer)
        row = weight_row(weights or {}, self.model.default_weights)
        self.options = {
            "reward_weights": dict(zip(self.model.reward_names, row, strict=True)),
            "max_kl": max_kl,
        }
        streams = self.model.coefficients(torch.tensor([row])).streams_BS[0]
        running = [m for m, c in zip(self.model.members[1:], streams.tolist(), strict=True) if c]
        self.members = tuple((names or {}).get(name, name) for name in (BASE, *(m.name for m in running)))
        self._system = system
        self._wishes = {member.name: member.wish for member in running if member.wish is not None}
        if reader is None and (self._wishes or system):
            raise UnsupportedError(
                f"the model has the wish {next(iter(self._wishes), '')!r}, whose words a method of this kind does not "
                'read; give its base to a method of the kind "wish", with the wishes in the recipe'
            )
        self._reader: Reader = reader or (lambda ids, _: ids)

    def answer(self, prompts: Sequence[Ids], *, seed: int, meter: Meter) -> list[SampledReply]:
        """A reply to each prompt."""
        return self.draw(prompts, copies=1, seed=seed, meter=meter)

    def draw(self, prompts: Sequence[Ids], *, copies: int, seed: int, meter: Meter) -> list[SampledReply]:
        """`copies` replies to each prompt, those to one prompt side by side; each prompt is read once."""
        drawn = decode(_Steps(self, meter), prompts, self.sampling, stops=self.stops, seed=seed, copies=copies)
        return [make_reply(self.tokenizer, reply.tokens, self.stops) for reply in drawn]

    def log_probs(self, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> list[float] | None:
        """log π(reply | prompt) at the temperature, in one uncached forward; None where the choice is greedy."""
        found = self.distances(self, prompts, replies)
        return None if found is None else [distance.log_prob for distance in found]

    @torch.no_grad()
    def distances(self, base: Sample, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> list[Distance] | None:
        """How far each reply, and the distributions along it, are from the base; None where the choice is greedy."""
        if self.sampling.temperature == 0:
            return None
        lengths = [len(prompt) + len(reply.token_ids) for prompt, reply in zip(prompts, replies, strict=True)]
        found = [Distance(0.0, 0.0, 0.0)] * len(replies)
        for part in batches(lengths, tokens=LOGITS // self.known):
            asked, said = [prompts[i] for i in part], [replies[i].token_ids for i in part]
            own = self._distributions(asked, said)
            of_base = own if base is self else base._distributions(asked, said)
            for i, own_TV, base_TV, ids in zip(part, own, of_base, said, strict=True):
                column_T1 = torch.tensor(ids, device=own_TV.device)[:, None]
                known = min(own_TV.shape[-1], base_TV.shape[-1])
                sums = (
                    own_TV.gather(-1, column_T1),
                    base_TV.gather(-1, column_T1),
                    divergence(own_TV[:, :known], base_TV[:, :known]),
                )
                found[i] = Distance(*(float(values.sum()) for values in sums))
        return found

    def read(self, prompts: Sequence[Ids]) -> Sequence[Ids]:
        """Prompts as the model reads them."""
        return prompts if self._system is None else [self._reader(ids, self._system) for ids in prompts]

    def contexts(self, prompts: Sequence[Ids]) -> Contexts | None:
        """Prompts as its wishes read them."""
        if not self._wishes:
            return None
        read = {name: padded([self._reader(ids, text) for ids in prompts], 0) for name, text in self._wishes.items()}
        return Contexts(
            columns=max(map(len, prompts)),
            ids={name: ids.to(self.model.device) for name, (ids, _) in read.items()},
            masks={name: mask.to(self.model.device) for name, (_, mask) in read.items()},
        )

    def _distributions(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[Tensor]:
        """Float32 log-probs [T, V] of the tokens of each reply, at the temperature."""
        asked_BP, asked_mask_BP = padded(self.read(prompts), 0)
        longest = max(map(len, replies))
        said_BT = torch.tensor([[*reply, *[0] * (longest - len(reply))] for reply in replies])
        said_mask_BT = torch.tensor([[1] * len(reply) + [0] * (longest - len(reply)) for reply in replies])
        output = self.model(
            torch.cat([asked_BP, said_BT], dim=1).to(self.model.device),
            torch.cat([asked_mask_BP, said_mask_BT], dim=1).to(self.model.device),
            contexts=self.contexts(prompts),
            logits_to_keep=longest + 1,  # each is of the token after it
            use_cache=False,
            **self.options,
        )
        log_probs_BTV = torch.log_softmax(output.logits[..., : self.known] / self.sampling.temperature, dim=-1)
        return [said_TV[: len(reply)] for said_TV, reply in zip(log_probs_BTV, replies, strict=True)]


class _Steps:
    """`Steps` over the whole vocabulary."""

    def __init__(self, sample: Sample, meter: Meter) -> None:
        self._sample = sample
        self._prefix = Prefix(sample.model, count=meter.counter(*sample.members), options=sample.options)
        self._meter = meter
        self._contexts: Contexts | None = None

    def start(self, prompts: Sequence[Ids]) -> Choices:
        self._contexts = self._sample.contexts(prompts)
        if self._contexts is not None:  # a wish's prompts are longer than those that are counted of all
            for name, mask in self._contexts.masks.items():
                self._meter.add(name, forwards=0, positions=int(mask.sum()) - sum(map(len, prompts)))
        return self._extend(self._sample.read(prompts))

    def advance(self, rows: Sequence[int], choices: Sequence[int]) -> Choices:
        self._prefix.select(rows)
        self._contexts = None if self._contexts is None else self._contexts.take(rows)
        return self._extend([[choice] for choice in choices])

    def _extend(self, chunks: Sequence[Ids]) -> Choices:
        self._prefix.options["contexts"] = self._contexts
        return Choices(scores_BC=next_logits(self._prefix, chunks)[:, : self._sample.known])


def total(config: PretrainedConfig | None, weights: Mapping[str, float]) -> float:
    """What the coefficients of a guided model's log-probs add up to at `weights`, over its own; 1 of any other model.

    Rewards that are differences, to a reference or to the same model without a wish, have none.
    """
    if not isinstance(config, GuidedConfig):
        return 1.0
    plain = [reward for reward in config.reward_specs if reward.reference is None and reward.member.wish is None]
    return 1.0 + sum(weights.get(reward.name, reward.weight) for reward in plain)


KIND = Kind(
    name="sample",
    roles=("model",),
    build=lambda parts: Sample(parts.model("model"), parts.tokenizer, parts.sampling, names=POLICY),
    forwards=lambda spec, tokens: tally((spec.base, tokens)),
    total=lambda spec, models: total(models.config(spec.roles["model"]), {}),
)
