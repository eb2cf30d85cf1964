"""Members from specs: find the files, load each model once, put the adapters on.

Two rewards that are adapters on one model share that model; adapters on the base share the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from genarm.errors import MemberError
from genarm.model.config import BASE, GuidedConfig, MemberSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_FILE = "adapter_config.json"

_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, HfHubHTTPError, HFValidationError)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How to reach the hub; the same for every member."""

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    trust_remote_code: bool = False

    def common(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` takes."""
        return {
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "force_download": self.force_download,
        }


@dataclass(frozen=True, kw_only=True)
class Member:
    """A loaded member: a causal LM, and the LoRA adapter to switch on while it runs (None: no adapter).

    `peft` holds the adapter's settings and weights; several members may share `model`.
    """

    name: str
    model: PreTrainedModel
    peft: PeftModel | None = None
    adapter: str | None = None


def locate(reference: str, folder: Path | None) -> str:
    """What `from_pretrained` should be given for a reference written in a guided folder.

    A path relative to the folder wins, then an absolute path; anything else is a hub id.

    Raises:
        MemberError: it looks like a path and there is no such folder.
    """
    if folder is not None and (folder / reference).is_dir():
        return str((folder / reference).resolve())
    path = Path(reference).expanduser()
    if path.is_absolute() or reference.startswith(("./", "../", "~")):
        if not path.is_absolute() or not path.is_dir():
            where = f" (relative to {folder})" if folder is not None and not path.is_absolute() else ""
            raise MemberError(
                f"the member folder {reference!r}{where} does not exist; move it back, compose the guided model again, "
                "or use `genarm compose --bundle` so that the folder carries its members"
            )
        return str(path)
    return reference


def load_members(
    config: GuidedConfig, folder: Path | None, hub: HubOptions, model_options: Mapping[str, Any]
) -> list[Member]:
    """The base first, then the rewards in order.

    Args:
        config: names the members.
        folder: where relative references start.
        hub: how to reach the hub.
        model_options: arguments for every member's `from_pretrained` (dtype, device_map, …), over which a
            member's own spec wins.

    Raises:
        MemberError: a member is not there, is no causal LM, or an adapter does not fit its model.
    """
    base_spec = config.base_spec
    models: dict[str, PreTrainedModel] = {}
    adapted: dict[int, PeftModel] = {}

    def model_of(spec: MemberSpec, name: str) -> PreTrainedModel:
        key = repr((spec.model, spec.revision, spec.dtype, spec.device_map, spec.quantization_config))
        if key not in models:
            models[key] = load_model(spec, folder, hub, model_options, name=name)
        return models[key]

    members = [Member(name=BASE, model=model_of(base_spec, BASE))]
    for reward in config.reward_specs:
        spec = reward.member
        model = members[0].model if spec.model is None else model_of(spec, reward.name)
        if spec.adapter is None:
            members.append(Member(name=reward.name, model=model))
            continue
        adapted[id(model)] = add_adapter(model, adapted.get(id(model)), spec, folder, hub, name=reward.name)
        members.append(Member(name=reward.name, model=model, peft=adapted[id(model)], adapter=reward.name))
    return members


def load_model(
    spec: MemberSpec, folder: Path | None, hub: HubOptions, options: Mapping[str, Any], *, name: str
) -> PreTrainedModel:
    """One member's causal LM, in inference mode (raises MemberError)."""
    assert spec.model is not None
    where = locate(spec.model, folder)
    own = {key: getattr(spec, key) for key in ("dtype", "device_map", "quantization_config")}
    merged = {**options, **{key: value for key, value in own.items() if value is not None}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where,
            revision=spec.revision or "main",
            trust_remote_code=hub.trust_remote_code,
            use_safetensors=True,
            **hub.common(),
            **merged,
        )
    except _LOAD_ERRORS as error:
        raise MemberError(f"cannot load {name!r} from {where!r}: {error}") from error
    return model.eval().requires_grad_(False)


def add_adapter(
    model: PreTrainedModel,
    peft: PeftModel | None,
    spec: MemberSpec,
    folder: Path | None,
    hub: HubOptions,
    *,
    name: str,
) -> PeftModel:
    """Put the LoRA adapter of `spec` on `model` under `name`; `peft` wraps earlier adapters on that model.

    Raises:
        MemberError: the adapter is not a plain LoRA, is not there, or does not fit the model.
    """
    assert spec.adapter is not None
    where = locate(spec.adapter, folder)
    options = {**hub.common(), "revision": spec.adapter_revision}
    try:
        settings = read_adapter_config(where, options, name=name)
        if peft is None:
            peft = PeftModel(model, settings, adapter_name=name)
        result = peft.load_adapter(where, adapter_name=name, is_trainable=False, use_safetensors=True, **options)
    except MemberError:
        raise
    except (*_LOAD_ERRORS, TypeError) as error:
        raise MemberError(f"the adapter {where!r} of reward {name!r} does not fit its model: {error}") from error
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}." in key]
    if result.unexpected_keys or missing:
        example = (list(result.unexpected_keys) + missing)[0]
        raise MemberError(
            f"the adapter {where!r} of reward {name!r} does not fit its model: {len(result.unexpected_keys)} of its "
            f"tensors have no place there and {len(missing)} are missing (first: {example}); it was trained on "
            f"{settings.base_model_name_or_path!r}"
        )
    model.eval().requires_grad_(False)
    return peft


def read_adapter_config(where: str, options: Mapping[str, Any], *, name: str) -> PeftConfig:
    """The settings of a LoRA adapter.

    Raises:
        MemberError: not found, or a kind that cannot be switched on and off beside others.
    """
    try:
        settings = PeftConfig.from_pretrained(where, **options)
    except _LOAD_ERRORS as error:
        raise MemberError(f"cannot read the adapter {where!r} of reward {name!r}: {error}") from error
    kind = getattr(settings.peft_type, "value", settings.peft_type)
    if kind != "LORA":
        raise MemberError(f"the adapter {where!r} of reward {name!r} is of type {kind}; only LORA adapters can guide")
    extra = [f for f in ("modules_to_save", "trainable_token_indices") if getattr(settings, f, None)]
    if extra or getattr(settings, "bias", "none") != "none":
        raise MemberError(
            f"the adapter {where!r} of reward {name!r} also trains {', '.join(extra) or 'biases'}, which would change "
            "the model it shares; merge it into a full model (peft's merge_and_unload) and compose that instead"
        )
    return settings


def load_tokenizer(
    reference: str, folder: Path | None, hub: HubOptions, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """A member's tokenizer, or None where its files hold none."""
    where = locate(reference, folder)
    if Path(where).is_dir() and not any(Path(where).glob("*token*")) and not (Path(where) / "vocab.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(
            where, revision=revision or "main", trust_remote_code=hub.trust_remote_code, **hub.common()
        )
    except _LOAD_ERRORS as error:
        raise MemberError(f"cannot load the tokenizer of {where!r}: {error}") from error


def load_model_config(spec: MemberSpec, folder: Path | None, hub: HubOptions, *, name: str) -> Any:
    """A member's configuration, without its weights (raises MemberError)."""
    assert spec.model is not None
    where = locate(spec.model, folder)
    try:
        return AutoConfig.from_pretrained(
            where, revision=spec.revision or "main", trust_remote_code=hub.trust_remote_code, **hub.common()
        )
    except _LOAD_ERRORS as error:
        raise MemberError(f"cannot read the configuration of {name!r} at {where!r}: {error}") from error
