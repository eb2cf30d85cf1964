"""One forward of a guided model: which members run, on what, and the sum of what they say.

Shapes: B rows, T positions, V ids of the base's vocabulary, R rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from genarm.errors import UnsupportedError, kind_of
from genarm.model.adapters import running
from genarm.model.cache import GuidedCache
from genarm.model.combine import Coefficients, coefficients, combine, log_probs, within_budget
from genarm.model.config import GuidedConfig
from genarm.model.generation import last_positions
from genarm.model.loading import Member
from genarm.model.vocabulary import Alignment, embedding_rows, readable
from genarm.model.wishes import Contexts, WishedForward, padded, positions

# What `generate` hands on from its own arguments and what tokenizers make: plain models that do not know it ignore it.
_IGNORED = ("tokenizer", "assistant_tokenizer", "cache_position", "token_type_ids")


class GuidedForward(nn.Module):
    """The parts of `GuidedForCausalLM.forward`."""

    config: GuidedConfig
    members: tuple[Member, ...]
    alignments: tuple[Alignment, ...]
    references: tuple[int | None, ...]
    _arguments: list[frozenset[str]]

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base. Its own forward is the unguided model."""
        return self.members[0].model

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names of the rewards, in the order of the columns of a weights tensor."""
        return tuple(self.config.default_weights)

    def coefficients(self, weights_BR: Tensor) -> Coefficients:
        """What weights [B, R] mean for the base and the other members."""
        return coefficients(weights_BR, self.references, len(self.members) - 1)

    def _combined(
        self,
        weights_BR: Tensor,
        max_kl_B: Tensor | None,
        cache: GuidedCache | None,
        wished: WishedForward | None,
        **inputs: Any,
    ) -> Tensor:
        """Normalised log-probs [B, T', V] at the positions that are kept."""
        given = self.coefficients(weights_BR)
        silent = self.coefficients(self._without_wishes(weights_BR)) if wished is not None and wished.before else given
        active = [i for i in range(len(self.members) - 1) if given.needs(i) or silent.needs(i)]
        if wished is not None and not wished.reads:
            active = [i for i in active if self.members[i + 1].wish is None]
        running_members = [0, *(i + 1 for i in active)]
        # All caches are opened before anything runs: they must agree on the tokens seen so far.
        caches = [self._member_cache(i, cache, wished) for i in running_members]
        said: dict[int, Tensor] = {}
        for i, own in zip(running_members, caches, strict=True):
            name = self.members[i].name
            arguments = inputs if wished is None or self.members[i].wish is None else wished.inputs(name)
            said[i] = self._member_log_probs(i, cache=own, **arguments).to(self.base.device)
        if wished is None or not wished.before:
            return self._sum([*said.values()], active, given, max_kl_B)
        guided_BTV = torch.empty_like(said[0])
        for places, part in ((wished.before, silent), (wished.after, given)):
            if places:
                streams = [i for i in active if part.needs(i)]
                # Wishes have said something after the prompt only.
                here = [said[i] if self.members[i].wish else said[i][:, places] for i in (0, *(i + 1 for i in streams))]
                guided_BTV[:, places] = self._sum(here, streams, part, max_kl_B)
        return guided_BTV

    def _sum(
        self, said: Sequence[Tensor], streams: Sequence[int], given: Coefficients, max_kl_B: Tensor | None
    ) -> Tensor:
        """The combination of the base's log-probs, the first of `said`, and of those of `streams`."""
        base_BTV, *others = said
        unknown = [mask if mask is None else mask.to(base_BTV.device) for mask in map(self._unknown, streams)]
        guided_BTV = combine(base_BTV, others, given.take(streams).to(base_BTV.device), unknown)
        return guided_BTV if max_kl_B is None else within_budget(base_BTV, guided_BTV, max_kl_B.to(base_BTV.device))

    def said_of(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        contexts: Sequence[Mapping[str, Sequence[int]]],
        weights_BR: Tensor,
        max_kl_B: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What is said of the tokens of responses that are there already, in one forward of every member.

        Args:
            prompts: B token ids of prompts, and `responses` those of what follows them, one token at least.
            contexts: of each prompt, {wish: its token ids as that wish reads it}, for every wish of this model.
            weights_BR: reward weights; a reward runs whatever its weight is.
            max_kl_B: as in `GuidedForCausalLM.forward`.

        Returns:
            {member: float32 log-probs [B, T]} in the order of the members and, last, "guided"; 0 after a response.
        """
        targets_BT, real_BT = (part.to(self.base.device) for part in padded(responses, 0, left=False))
        columns = targets_BT.shape[1]
        members: list[Tensor] = []
        for index, member in enumerate(self.members):
            own = [context.get(member.name, prompt) for context, prompt in zip(contexts, prompts, strict=True)]
            ids, mask = (part.to(targets_BT) for part in padded(own, 0))
            mask_BT = torch.cat([mask, real_BT], dim=1)
            plain = bool(mask_BT.all())
            log_probs_BTV = self._member_log_probs(
                index,
                input_ids=torch.cat([ids, targets_BT], dim=1),
                attention_mask=None if plain else mask_BT,
                position_ids=None if plain else positions(mask_BT),
                cache=None,
                logits_to_keep=columns + 1,
            )
            members.append(log_probs_BTV[:, :-1].to(self.base.device))
        guided_BTV = self._sum(members, range(len(members) - 1), self.coefficients(weights_BR), max_kl_B)
        names = [*(member.name for member in self.members), "guided"]
        return {
            name: said.gather(-1, targets_BT[..., None])[..., 0].masked_fill(real_BT == 0, 0.0)
            for name, said in zip(names, [*members, guided_BTV], strict=True)
        }

    # --- wishes -------------------------------------------------------------------------------------------------

    def _without_wishes(self, weights_BR: Tensor) -> Tensor:
        """The same weights, those of wishes 0."""
        return weights_BR.masked_fill(torch.tensor([name in self.config.wishes for name in self.reward_names]), 0.0)

    def _wished(
        self,
        weights_BR: Tensor,
        contexts: Contexts | None,
        cache: GuidedCache | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> WishedForward | None:
        """How wishes take part in a forward; None where none has a weight."""
        weighty = (weights_BR != 0).any(dim=0).tolist()
        wishes = [name for name, w in zip(self.reward_names, weighty, strict=True) if w and name in self.config.wishes]
        if not wishes:
            return None
        if contexts is None or not {*wishes} <= {*contexts.ids}:
            raise UnsupportedError(
                f"the wish {wishes[0]!r} has a weight, so the prompt must be read with its words, too: make the inputs "
                "from text or messages with model.encode(prompts), or set its weight to 0"
            )
        columns = range(input_ids.shape[1])
        kept = logits_to_keep.tolist() if isinstance(logits_to_keep, Tensor) else columns[-logits_to_keep:]
        return WishedForward(
            contexts=contexts,
            input_ids=input_ids,
            attention_mask=attention_mask,
            seen=0 if cache is None else cache.get_seq_length(),
            kept=[*kept],
        )

    def _member_cache(self, index: int, cache: GuidedCache | None, wished: WishedForward | None) -> Cache | None:
        member = self.members[index]
        if cache is None:
            return None
        if wished is None or member.wish is None:
            return cache.member(member.name, member.model)
        cache.extra[member.name] = wished.contexts.extra(member.name)
        return cache.member(member.name, member.model, wished.already(member.name))

    # --- one member ---------------------------------------------------------------------------------------------

    def _others(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Further arguments for members, without those that plain models ignore (raises UnsupportedError)."""
        others = {name: value for name, value in kwargs.items() if value is not None}
        if others.pop("output_router_logits", False):
            raise UnsupportedError(
                "a guided model has no router logits of its own; run a member instead: model.base(…)"
            )
        for name in others:
            if name not in _IGNORED and not any(_takes(arguments, name) for arguments in self._arguments):
                raise UnsupportedError(f"neither a guided model's forward nor its members' take {name!r}; leave it out")
        return others

    def _unknown(self, stream: int) -> Tensor | None:
        mask: Tensor | None = getattr(self, f"unknown_{stream}")
        return mask

    def _member_log_probs(
        self,
        index: int,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int | Tensor,
        others: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """Float32 log-probs [B, T', V] of member `index` (0 is the base) over the base's vocabulary."""
        member = self.members[index]
        alignment = self.alignments[index - 1] if index else None
        device = member.model.device
        inputs: dict[str, Any] = {
            "input_ids": readable(input_ids, embedding_rows(member.model)) if index else input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        takes = self._arguments[index]
        arguments = {k: v.to(device) for k, v in inputs.items() if v is not None and k in takes}
        arguments |= {k: v.to(device) if isinstance(v, Tensor) else v for k, v in others.items() if _takes(takes, k)}
        if "logits_to_keep" in takes:
            arguments["logits_to_keep"] = last_positions(logits_to_keep, input_ids)
        with running(member.model, member.adapter):
            output = member.model(
                **arguments,
                past_key_values=cache,
                use_cache=cache is not None,
                return_dict=True,
            )
        logits_BTV = output.logits if "logits_to_keep" in takes else _keep(output.logits, logits_to_keep)
        log_probs_BTV = log_probs(logits_BTV)
        return log_probs_BTV if alignment is None else alignment.fit(log_probs_BTV)

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> GuidedCache | None:
        if past_key_values is None:
            return GuidedCache() if (self.config.use_cache if use_cache is None else use_cache) else None
        if not isinstance(past_key_values, GuidedCache):
            raise UnsupportedError(
                f"past_key_values is {kind_of(past_key_values)}; a guided model needs a GuidedCache, a cache "
                "per member: pass None for a new one, or the past_key_values an earlier call returned"
            )
        return past_key_values


def _takes(arguments: frozenset[str], name: str) -> bool:
    """Whether a forward with these arguments makes use of `name`."""
    return name in arguments or ("kwargs" in arguments and name in TransformersKwargs.__optional_keys__)


def _keep(logits_BTV: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return logits_BTV[:, -logits_to_keep:] if logits_to_keep else logits_BTV
    return logits_BTV[:, logits_to_keep]
