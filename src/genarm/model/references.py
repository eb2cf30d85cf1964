"""Open a model for the shell: first what its files say (quick), then its weights.

A mistake in the options, the prompts or an output file is found with the files alone, before a large model is
loaded. A guided folder and an ordinary causal LM are opened in the same way; the latter has no rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genarm.errors import ConfigError, DataError, MemberError, WeightsError
from genarm.files import no_folder, refuse_file
from genarm.model.assembly import load_guided
from genarm.model.config import GuidedConfig, MemberSpec
from genarm.model.contract import ADAPTER_FILE
from genarm.model.loading import HubOptions, load_generation_config, load_model, load_model_config, load_tokenizer
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.options import LoadOptions
from genarm.model.weights import weight_row
from genarm.model.wishes import encode_wishes
from genarm.text.prompts import (
    USUAL,
    Prompt,
    Reading,
    as_conversation,
    check_reading,
    encode_pair,
    encode_prompt,
    end_ids,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A causal LM as its files describe it.

    Attributes:
        reference: absolute path of its folder, or hub id, as `revision` of it.
        config: its configuration, a `GuidedConfig` for a guided folder.
        tokenizer: its tokenizer; of a guided folder, the base's.
        hub: how to reach the hub.
        reading: how prompts become token ids.
        without: the same before wishes were added.
    """

    reference: str
    revision: str | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    hub: HubOptions
    reading: Reading = USUAL
    without: ModelFiles | None = None

    def with_wishes(self, wishes: Mapping[str, str]) -> ModelFiles:
        """The model with rewards in words, {name: system text}, which any causal LM can have.

        Raises:
            ConfigError: a name that is taken or cannot be one, or an empty text.
        """
        if not wishes:
            return self
        if taken := sorted({*wishes} & {*self.default_weights}):
            raise ConfigError(f"{self.reference} has a reward {taken[0]!r} already; name the wish otherwise")
        own = self.config
        if not isinstance(own, GuidedConfig):
            own = GuidedConfig.of(MemberSpec(model=self.reference, revision=self.revision), (), [own])
        return replace(self, config=own.with_wishes(wishes, [1.0] * len(wishes)), without=self)

    @property
    def added_wishes(self) -> dict[str, str]:
        """Wishes that are not the folder's own."""
        return {} if self.without is None else {n: t for n, t in self.wishes.items() if n not in self.without.wishes}

    @property
    def wishes(self) -> dict[str, str]:
        """{reward: system text} of the rewards that are wishes."""
        return self.config.wishes if isinstance(self.config, GuidedConfig) else {}

    @property
    def guided(self) -> bool:
        """Whether it has rewards."""
        return isinstance(self.config, GuidedConfig)

    @property
    def default_weights(self) -> dict[str, float]:
        """{reward: weight} of a guided folder; nothing for another model."""
        return self.config.default_weights if isinstance(self.config, GuidedConfig) else {}

    @property
    def context(self) -> int | None:
        """The most tokens that a prompt and its response may have together, where the model says."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def generation_config(self) -> GenerationConfig:
        """What its files say of generating; its configuration where there is no generation_config.json.

        Raises:
            MemberError: that file cannot be read.
        """
        return load_generation_config(self.reference, self.revision, self.hub, self.config)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a reply."""
        return tuple(end_ids(self.generation_config, self.tokenizer))

    def weights(self, given: Mapping[str, float], defaults: Mapping[str, float] | None = None) -> dict[str, float]:
        """`given` over `defaults` (the folder's own if None), in the order of the rewards.

        Raises:
            WeightsError: an unknown name, a value that is not finite, or any weight where there are no rewards.
        """
        if given and not self.guided:
            raise WeightsError(
                f"{self.reference} is not a guided model, so it takes no reward weights; leave them out, give it a "
                "--wish, or make a guided folder with genarm compose"
            )
        defaults = self.default_weights if defaults is None else defaults
        return dict(zip(defaults, weight_row(given, defaults), strict=True))

    def conversation(self, prompt: Prompt, *, system: str | None, raw: bool) -> Prompt:
        """`prompt` as the model will read it: text becomes a user's turn where there is a chat template.

        `system` goes before a prompt that has no system message; `raw` leaves text as it is.

        Raises:
            DataError: a conversation or a system message without a chat template, or in raw text.
        """
        template = bool(self.tokenizer.chat_template) and not raw
        if not template:
            if system is not None or not isinstance(prompt, str):
                what = "a system message" if system is not None else "a conversation"
                why = "--raw sends plain text" if raw else f"{self.reference} has no chat template"
                raise DataError(f"{what} needs a chat template, and {why}; give the prompt as plain text alone")
            return prompt
        if isinstance(prompt, str):
            return as_conversation(prompt, system)
        if system is not None and prompt[0]["role"] != "system":
            return [{"role": "system", "content": system}, *prompt]
        return prompt

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of `prompt`, ready for a response.

        Raises:
            DataError: no tokens, no chat template, or a chat template that refuses the conversation.
        """
        return encode_prompt(self.tokenizer, prompt, self.reading)

    def contexts(self, prompt: Prompt, weights: Mapping[str, float]) -> dict[str, list[int]]:
        """Ids of `prompt` as each wish with a weight reads it (raises DataError, as `encode`)."""
        weighty = {name: text for name, text in self.wishes.items() if weights[name] != 0}
        return encode_wishes(self.tokenizer, prompt, weighty, self.reading)

    def encode_pair(self, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
        """Ids of `prompt` and of `response`, its end of turn included (raises DataError, as `encode`)."""
        return encode_pair(self.tokenizer, prompt, response, self.reading, ends=self.end_ids)

    def load(self, *, dtype: str = "auto", device: str | None = None) -> PreTrainedModel:
        """The model itself, in inference mode.

        Args:
            dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
            device: "cpu", "cuda", "cuda:1", …, "auto" to spread it over all GPUs; None for the first GPU if any.

        Raises:
            ConfigError: there is no such device.
            MemberError: a member cannot be loaded.
        """
        if self.without is not None:
            model, wishes = self.without.load(dtype=dtype, device=device), self.added_wishes
            if isinstance(model, GuidedForCausalLM):
                return model.with_wishes(wishes)
            return GuidedForCausalLM.from_members(model, {}, wishes=wishes)
        options: dict[str, Any] = {"dtype": dtype, "device_map": find_device(device)}
        if not self.guided:
            spec = MemberSpec(model=self.reference, revision=self.revision)
            return load_model(spec, None, self.hub, options, name="the model")
        return GuidedForCausalLM.from_pretrained(
            self.reference,
            revision=self.revision,
            trust_remote_code=self.hub.trust_remote_code,
            **options,
        )

    def outline(self) -> PreTrainedModel:
        """The model without its weights, on the meta device; of its members only configurations and headers are read.

        Raises:
            GenarmError: what `load` refuses, as far as it shows without the values of weights.
        """
        if not self.guided:
            spec = MemberSpec(model=self.reference, revision=self.revision)
            return load_model(spec, None, self.hub, None, name="the model")
        options = LoadOptions(hub=self.hub, members=None, config={})
        return GuidedForCausalLM(*load_guided(self.reference, config=None, revision=self.revision, options=options))


def open_files(reference: str, *, trust_remote_code: bool = False, reading: Reading = USUAL) -> ModelFiles:
    """Read a model's configuration and tokenizer.

    Args:
        reference: a guided folder, another causal LM's folder, or a hub id (ID@REVISION).
        trust_remote_code: allow models with code of their own.
        reading: how prompts become token ids.

    Raises:
        MemberError: there is no such model, or it lacks a tokenizer.
        ConfigError: template arguments that the chat template does not have.
    """
    hub = HubOptions(trust_remote_code=trust_remote_code)
    where, revision = _find(reference)
    spec = MemberSpec(model=where, revision=revision)
    config = load_model_config(spec, None, hub, name="the model")
    tokenizer = load_tokenizer(where, None, hub, revision)
    if tokenizer is None:
        raise MemberError(f"{reference} has no tokenizer files; put the tokenizer beside the model")
    check_reading(tokenizer, reading)
    return ModelFiles(reference=where, revision=revision, config=config, tokenizer=tokenizer, hub=hub, reading=reading)


def _find(reference: str) -> tuple[str, str | None]:
    """An existing folder's absolute path, or a hub id with its revision."""
    path = Path(reference).expanduser()
    refuse_file(reference)
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path.resolve()), None
        problem = "has no config.json"
        if (path / ADAPTER_FILE).exists():
            problem = "is a LoRA adapter, which is no model by itself"
        raise MemberError(
            f"the folder {reference} {problem}; give a guided folder (genarm compose writes one) or another causal "
            "language model"
        )
    name, _, revision = reference.partition("@")
    is_path = path.is_absolute() or reference.startswith((".", "~")) or path.exists()
    if is_path or name.count("/") != 1:
        raise MemberError(
            f"{no_folder(reference)}; give a guided folder (genarm compose writes one), another causal "
            "language model's folder, or a hub id such as ORG/NAME"
        )
    return name, revision or None


def find_device(device: str | None) -> str:
    """A device map for `from_pretrained` (raises ConfigError where there is no such device)."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "cpu" if accelerator is None else accelerator.type
    if device == "auto":
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        have = "cpu" if accelerator is None else f"cpu, {accelerator.type} and auto"
        raise ConfigError(f"cannot use the device {device!r}; torch has {have} on this machine") from error
    return device


def positions_together(config: PreTrainedConfig) -> int | None:
    """The most tokens of texts that a model reads in one batch, where it says.

    Beyond what they were first trained with, some families scale the positions of all texts of a batch by the longest
    of them, so that what is said of a short text would depend on what it is read with.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # Of all layers, or {kind of layer: its own}.
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    found = [getattr(text, "max_position_embeddings", None)]
    found += [
        kind.get("original_max_position_embeddings")
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((int(n) for n in found if n is not None and n > 0), default=None)  # XLNet has -1: no limit


def check_length(files: ModelFiles, prompt_tokens: int, max_new_tokens: int, *, where: str) -> None:
    """Refuse a prompt that leaves too little room for its response.

    Raises:
        DataError: they need more positions than the model has.
    """
    if files.context is not None and prompt_tokens + max_new_tokens > files.context:
        raise DataError(
            f"{where}: {prompt_tokens} prompt tokens and up to {max_new_tokens} new ones are "
            f"{prompt_tokens + max_new_tokens}, more than the {files.context} positions of the model; shorten the "
            "prompt or lower --max-new-tokens"
        )
