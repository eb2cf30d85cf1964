"""The guided model: a causal LM made of a frozen base and the rewards that steer it.

Read in the order a token travels: `generate` fixes the weights and makes a cache per member; `forward` runs the
base, then each reward that has a weight; `combine` adds their log-probabilities; the rest (penalties,
temperature, truncation, sampling) is transformers' own and comes after the combination.

Shapes: B rows, T positions, V ids of the base's vocabulary, R rewards.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from genarm.errors import MemberError, UnsupportedError, kind_of
from genarm.model.adapters import share_adapters
from genarm.model.assembly import add_wishes, gather_guided, load_guided
from genarm.model.config import GuidedConfig
from genarm.model.forward import GuidedForward
from genarm.model.generation import GuidedGeneration, forward_arguments
from genarm.model.loading import HubOptions, Member, load_generation_config, load_tokenizer
from genarm.model.options import sort_options
from genarm.model.saving import push_guided, save_guided
from genarm.model.token_rewards import TokenRewards, check_numbers
from genarm.model.vocabulary import Alignment
from genarm.model.weights import RewardWeights, resolve_max_kl, resolve_weights
from genarm.model.wishes import Contexts, encode_wishes, padded, positions
from genarm.text.detokenizer import token_texts
from genarm.text.prompts import USUAL, Prompt, Reading, encode_pair, encode_prompt, end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_PUSH_OPTIONS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr")


class GuidedForCausalLM(
    GuidedForward, GuidedGeneration, PreTrainedModel, GenerationMixin
):  # by this name transformers knows it
    """A causal LM whose next-token distribution is π ∝ π_base · Π_i π_i^{w_i} (GenARM, arXiv 2410.08193).

    A reward with a reference is a difference: π_i / π_reference takes the place of π_i. So is a wish: the base with a
    system text of its own, less the base; `encode` makes the inputs for a model with wishes.

    Make one with `from_pretrained(folder)`, a folder written by `compose`, or from models in memory with
    `from_members`. Members are frozen and in evaluation mode. Threads may share one instance, and instances may
    share members; a model runs for one thread at a time.
    """

    config_class = GuidedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    config: GuidedConfig

    def __init__(
        self,
        config: GuidedConfig,
        members: Sequence[Member] | None = None,
        alignments: Sequence[Alignment] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Put loaded members together; `from_pretrained` and `from_members` call this.

        Args:
            config: names the members.
            members: as the configuration's `member_specs` has them: the base, the rewards, further references.
            alignments: one per member but the base.
            folder: where relative references of the configuration start; None for members from memory.

        Raises:
            MemberError: the members are missing (a guided model is never made with random weights).
            UnsupportedError: a member without a cache of keys and values.
        """
        super().__init__(config)
        if members is None or alignments is None:
            raise MemberError(
                "a guided model is made of trained members, not from a configuration alone; use "
                "from_pretrained(folder) or GuidedForCausalLM.from_members(base, rewards)"
            )
        assert [m.name for m in members] == [*config.member_specs]
        assert len(alignments) == len(members) - 1
        unique = list({id(member.model): member.model for member in members}.values())
        self.models = nn.ModuleList(unique)
        self.members = tuple(members)
        self.alignments = tuple(alignments)
        self.folder = folder
        self.references = config.references
        for model in unique:
            share_adapters(model)
        self._arguments = [forward_arguments(member.model) for member in members]
        for member, arguments in zip(members, self._arguments, strict=True):
            if "past_key_values" not in arguments:
                raise UnsupportedError(
                    f"{member.name!r} is {kind_of(member.model)}, which keeps no keys and values of earlier "
                    "tokens (past_key_values); a guided model's members must, so take a model with attention layers"
                )
        for i, alignment in enumerate(alignments):
            self.register_buffer(f"unknown_{i}", alignment.mask(), persistent=False)
        self.generation_config = _generation_config(members[0].model)
        self.eval().requires_grad_(False)
        self._report()

    def _report(self) -> None:
        """Have the configuration say how the base is loaded and run."""
        base = self.base.config
        self.config.describe_base(base)
        self.config.dtype = self.base.dtype
        self.config._attn_implementation_internal = base._attn_implementation

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: GuidedConfig | str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a guided folder: a path, or a hub id (the folder is then downloaded).

        Args:
            pretrained_model_name_or_path: the folder.
            config: a `GuidedConfig`, or the path of one, to use instead of the folder's.
            revision: of the guided folder on the hub; members have revisions of their own.
            **kwargs: hub options (token, cache_dir, local_files_only, force_download, trust_remote_code); for every
                member that does not set its own, dtype, device_map, max_memory, offload_folder, attn_implementation
                and the like; use_cache and token ids for the configuration; subfolder, generation_config and
                output_loading_info as in transformers.

        Returns:
            The model, and what transformers calls loading info where that was asked for.

        Raises:
            ConfigError: the folder's config.json does not hold together.
            MemberError: a member cannot be found or does not fit.
            VocabularyError: two members have different vocabularies.
            UnsupportedError: an option that a guided model does not take.
        """
        options = sort_options(kwargs, config if isinstance(config, GuidedConfig) else None)
        config, members, alignments, folder = load_guided(
            pretrained_model_name_or_path, config=config, revision=revision, options=options
        )
        model = cls(config, members, alignments, folder)
        if options.generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(options.generation_config.to_dict())
        elif (folder / "generation_config.json").exists():
            model.generation_config = load_generation_config(str(folder), None, HubOptions(), config)
        # Members are refused where anything is missing in their files.
        return (model, {key: set() for key in _LOADING_INFO}) if options.output_loading_info else model

    @classmethod
    def from_members(
        cls,
        base: PreTrainedModel,
        rewards: Mapping[str, PreTrainedModel | PeftModel],
        *,
        references: Mapping[str, PreTrainedModel | PeftModel] | None = None,
        wishes: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
        tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None,
    ) -> GuidedForCausalLM:
        """A guided model of models in memory, which become frozen; their adapters run inside this model only.

        Args:
            base: any causal LM of transformers.
            rewards: {name: ARM}. A `PeftModel` stands for its active LoRA adapter, on the base object itself or on
                another model; several may wrap one model.
            references: {reward name: model} of rewards that are differences, such as a tuned model less its untuned
                self; the base object, the model under a reward's adapter, or another one.
            wishes: {name: system text} of rewards in words; they come after the others.
            weights: default weight of each reward (1.0 where not named).
            tokenizers: {"base" or reward name: tokenizer} to align vocabularies by token; needed where sizes differ.

        Raises:
            MemberError: two rewards are the same adapter on the same model.
            VocabularyError: two members have different vocabularies.
            WeightsError: a weight for a reward that is not there.
        """
        return cls(*gather_guided(base, rewards, references or {}, wishes or {}, weights or {}, tokenizers or {}))

    def with_wishes(
        self, wishes: Mapping[str, str], *, weights: Mapping[str, float] | None = None
    ) -> GuidedForCausalLM:
        """Another guided model, with further wishes; it shares this one's members, so that it costs nothing.

        Args:
            wishes: {name: system text}.
            weights: default weight of each (1.0 where not named).

        Raises:
            ConfigError: a name that is taken, or a wish that is no text.
            WeightsError: a weight for a wish that is not named.
        """
        more = type(self)(*add_wishes(self, wishes, weights or {}), self.folder)
        more.generation_config = copy.deepcopy(self.generation_config)
        return more

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write a guided folder.

        Members named by hub id or absolute path stay references; members inside this model's own folder, and
        members from memory, are written into the new folder.

        Args:
            save_directory: the new folder; it may hold a tokenizer already.
            push_to_hub: also upload it; the arguments of `push_to_hub` then go into `kwargs`, `repo_id` defaulting
                to the folder's name.
            **kwargs: `max_shard_size` for members from memory, `is_main_process`.

        Raises:
            UnsupportedError: an option that makes no sense for frozen members (state_dict, …).
        """
        hub = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs} if push_to_hub else {}
        save_guided(self, Path(save_directory), **kwargs)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", None) or Path(save_directory).name, **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload a guided folder to the hub.

        Args:
            repo_id: the repository, made where it does not exist.
            **kwargs: private, token, revision, commit_message, commit_description, create_pr, max_shard_size.

        Returns:
            The address of the commit.

        Raises:
            UnsupportedError: a member is a reference to a local folder.
        """
        return push_guided(self, repo_id, **kwargs)

    # --- what it is ---------------------------------------------------------------------------------------------

    @property
    def default_weights(self) -> dict[str, float]:
        """{name: weight} used where a call gives none."""
        return self.config.default_weights

    def get_input_embeddings(self) -> nn.Module:
        """The base's embedding; each reward has its own."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: the output is a combination, not one linear layer."""

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers': every member runs with it."""
        for member in self.members:
            member.model.set_attn_implementation(*args, **kwargs)
        self._report()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to do: a guided folder says itself what the Auto classes need."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise UnsupportedError("a guided model's vocabulary cannot be resized; resize and retrain its members instead")

    # --- running it ---------------------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        wishes: Mapping[str, str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reading: Reading = USUAL,
    ) -> dict[str, Any]:
        """The inputs of `generate` and `forward` for prompts, which each wish of this model reads in its own way.

        Args:
            prompts: text, or a list of messages for the chat template; or a list of either.
            wishes: {name: system text} of wishes that only these inputs have; they have the weight 1 where
                `reward_weights` does not name them.
            tokenizer: the base's; read from the guided folder where not given.
            reading: how prompts become token ids.

        Returns:
            `input_ids` and `attention_mask` [B, T], padded on the left, and `contexts`, where there are wishes.

        Raises:
            DataError: no prompts, or one without tokens.
            ConversationError: a conversation that the chat template refuses.
            ConfigError: a wish whose name is taken, or that is no text.
        """
        tokenizer = tokenizer or self._own_tokenizer()
        if wishes:
            inputs: dict[str, Any] = self.with_wishes(wishes).encode(prompts, tokenizer=tokenizer, reading=reading)
            return {**inputs, "contexts": replace(inputs["contexts"], wishes=dict(wishes))}
        alone = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
        given: Sequence[Any] = [prompts] if alone else prompts
        pad = tokenizer.pad_token_id or 0
        ids, mask = padded([encode_prompt(tokenizer, prompt, reading) for prompt in given], pad)
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if self.config.wishes:
            rows = [encode_wishes(tokenizer, prompt, self.config.wishes, reading) for prompt in given]
            read = {name: padded([row[name] for row in rows], pad) for name in self.config.wishes}
            inputs["contexts"] = Contexts(
                columns=ids.shape[1],
                ids={name: own.to(self.device) for name, (own, _) in read.items()},
                masks={name: own.to(self.device) for name, (_, own) in read.items()},
            )
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reward_weights: RewardWeights | None = None,
        max_kl: float | Tensor | None = None,
        contexts: Contexts | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Combined log-probabilities of the next token at each position.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T], 0 where padded; left padding keeps positions right.
            position_ids: [B, T]; from the mask where not given.
            past_key_values: a `GuidedCache` from an earlier call, or None.
            labels: [B, T] ids for a cross-entropy loss, −100 where ignored.
            use_cache: return a cache; by default as the configuration says.
            logits_to_keep: number of last positions (0: all), or their indices, to compute logits for.
            reward_weights: {name: number} or a tensor [B, R]; where not given, those of the `generate` call around
                this forward, or the defaults. A reward whose weight is 0 in every row is not run.
            max_kl: the most nats, KL(π ‖ π_base), that each position may be from the base, a number or a tensor [B];
                where the weights lead farther, all of them are scaled down there.
            contexts: the prompts as wishes read them, by `encode`; needed where a wish has a weight. Wishes have a say
                from the prompt's last token on; before it the other members speak alone.
            inputs_embeds, output_attentions, output_hidden_states: refused, as members differ in all three.
            **kwargs: what transformers passes to any model: it reaches the members that take it (token_type_ids,
                lengths of packed sequences), or the loss (num_items_in_batch, shift_labels).

        Returns:
            `logits`: normalised float32 log-probs [B, T, V]; `past_key_values`: a `GuidedCache`; `loss`.

        Raises:
            WeightsError, UnsupportedError.
        """
        if contexts is not None and contexts.wishes:
            given = (input_ids, attention_mask, position_ids, past_key_values, labels, use_cache, logits_to_keep)
            steered = (reward_weights, max_kl, replace(contexts, wishes={}))
            refused = (inputs_embeds, output_attentions, output_hidden_states)
            found: CausalLMOutputWithPast = self.with_wishes(contexts.wishes)(*given, *steered, *refused, **kwargs)
            return found
        for_loss = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        _refuse(inputs_embeds, output_attentions, output_hidden_states, kwargs.pop("return_dict", None))
        if input_ids is None:
            raise UnsupportedError("forward needs input_ids, a tensor of token ids [batch, time]")
        weights_BR = self._row_weights(reward_weights, input_ids.shape[0])
        max_kl_B = self._row_budgets(max_kl, input_ids.shape[0])
        cache = self._cache(past_key_values, use_cache)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask)[:, -input_ids.shape[1] :]
        logits = self._combined(
            weights_BR,
            max_kl_B,
            cache,
            self._wished(weights_BR, contexts, cache, input_ids, attention_mask, logits_to_keep),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            others=self._others(kwargs),
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    @torch.no_grad()
    def token_rewards(
        self,
        prompt: Prompt,
        response: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reward_weights: Mapping[str, float] | None = None,
        max_kl: float | None = None,
        reading: Reading = USUAL,
    ) -> TokenRewards:
        """What each member says about each token of `response`, its end-of-turn token included.

        Args:
            prompt: text, or a list of messages for the chat template.
            response: the response's text.
            tokenizer: the base's; read from the guided folder where not given.
            reward_weights: {name: number} over the defaults.
            max_kl: as in `forward`.
            reading: how the prompt becomes token ids.

        Raises:
            DataError: an empty prompt or response, or no chat template for a conversation.
            WeightsError: an unknown name or a value that is not finite.
        """
        tokenizer = tokenizer or self._own_tokenizer()
        contexts = encode_wishes(tokenizer, prompt, self.config.wishes, reading)
        weights_1R = resolve_weights(dict(reward_weights or {}), self.default_weights, 1)
        ends = end_ids(self.generation_config, tokenizer)
        prompt_ids, response_ids = encode_pair(tokenizer, prompt, response, reading, ends=ends)
        found = self.said_of([prompt_ids], [response_ids], [contexts], weights_1R, resolve_max_kl(max_kl, 1))
        check_numbers(found)
        said = [log_probs_1T[0] for log_probs_1T in found.values()]
        for i, reference in enumerate(self.references, start=1):
            said.append(said[i] if reference is None else said[i] - said[reference])
        base, total, *rewards = (tuple(values.tolist()) for values in (said[0], *said[len(self.members) :]))
        return TokenRewards(
            tokens=token_texts(tokenizer, response_ids),
            token_ids=tuple(response_ids),
            base=base,
            rewards=dict(zip(self.reward_names, rewards, strict=True)),
            guided=total,
            weights=dict(zip(self.reward_names, weights_1R[0].tolist(), strict=True)),
            differences=tuple(n for n, r in zip(self.reward_names, self.references, strict=True) if r is not None),
        )

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = None if self.folder is None else load_tokenizer(str(self.folder), None, HubOptions())
        if tokenizer is None:
            raise MemberError("this guided model has no tokenizer of its own; pass tokenizer=, the base's")
        return tokenizer


# --- small parts ----------------------------------------------------------------------------------------------------


def _refuse(
    inputs_embeds: Tensor | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
) -> None:
    if inputs_embeds is not None:
        raise UnsupportedError(
            "a guided model has no inputs_embeds: its members embed tokens differently; pass input_ids"
        )
    if output_attentions or output_hidden_states:
        raise UnsupportedError(
            "a guided model has no attentions or hidden states of its own; run a member instead: model.base(…)"
        )
    if return_dict is False:
        raise UnsupportedError("a guided model returns a CausalLMOutputWithPast only; leave return_dict out")


def _generation_config(base: PreTrainedModel) -> GenerationConfig:
    own = base.generation_config
    return GenerationConfig.from_dict(own.to_dict()) if own is not None else GenerationConfig()


AutoModelForCausalLM.register(GuidedConfig, GuidedForCausalLM, exist_ok=True)
