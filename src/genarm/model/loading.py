"""Members from specs: find the files, load each model once, put the adapters on.

Two rewards that are adapters on one model share that model; adapters on the base share the base. Users' names are for
messages: on a model, an adapter goes by a name that no user can write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from genarm.errors import MemberError
from genarm.files import no_folder, refuse_file
from genarm.model.adapter_files import put_on, read_adapter
from genarm.model.config import BASE, GuidedConfig, MemberSpec
from genarm.model.contract import load_empty, load_whole, refusing, unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    `peft` holds the adapter's settings and weights; several members may share `model`, and an adapter. `wish` is the
    system text that this one reads before every prompt, if any.
    """

    name: str
    model: PreTrainedModel
    peft: PeftModel | None = None
    adapter: str | None = None
    wish: str | None = None


def locate(reference: str, folder: Path | None) -> str:
    """What `from_pretrained` should be given for a reference written in a guided folder.

    A path relative to the folder wins, then an absolute path; anything else is a hub id.

    Raises:
        MemberError: it looks like a path and there is no such folder.
    """
    refuse_file(reference)
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
    config: GuidedConfig, folder: Path | None, hub: HubOptions, model_options: Mapping[str, Any] | None
) -> list[Member]:
    """The base first, then the rewards in order, then references that are none of them.

    Args:
        config: names the members.
        folder: where relative references start.
        hub: how to reach the hub.
        model_options: arguments for every member's `from_pretrained` (dtype, device_map, …), over which a
            member's own spec wins; None for members without their weights, on the meta device.

    Raises:
        MemberError: a member is not there, is no causal LM, or an adapter does not fit its model.
    """
    base_spec = config.base_spec
    models: dict[str, PreTrainedModel] = {}
    adapters: dict[int, dict[str, MemberSpec]] = {}

    def model_of(spec: MemberSpec, name: str) -> PreTrainedModel:
        key = repr((spec.model, spec.revision, spec.dtype, spec.device_map, spec.quantization_config))
        if key not in models:
            models[key] = load_model(spec, folder, hub, model_options, name=name)
        return models[key]

    members = [Member(name=BASE, model=model_of(base_spec, BASE))]
    for name, spec in [*config.member_specs.items()][1:]:
        model = members[0].model if spec.model is None else model_of(spec, name)
        adapter = None
        if spec.adapter is not None:
            own = adapters.setdefault(id(model), {})
            files = replace(spec, wish=None)
            at = next((i for i, other in enumerate(own.values()) if other == files), len(own))
            adapter = adapter_name(at)
            if at == len(own):
                own[name] = files
        members.append(Member(name=name, model=model, adapter=adapter, wish=spec.wish))
    pefts = {
        key: add_adapters(model, adapters[key], folder, hub)
        for key, model in {id(model): model for model in models.values()}.items()
        if key in adapters
    }
    return [m if m.adapter is None else replace(m, peft=pefts[id(m.model)]) for m in members]


def adapter_name(index: int) -> str:
    """What the adapter that was put on a model as the `index`-th is called there, whatever its reward's name is."""
    return f"arm:{index}"


def load_model(
    spec: MemberSpec, folder: Path | None, hub: HubOptions, options: Mapping[str, Any] | None, *, name: str
) -> PreTrainedModel:
    """One member's causal LM, in inference mode; without its weights where `options` is None (raises MemberError)."""
    assert spec.model is not None
    where = locate(spec.model, folder)
    own = {key: getattr(spec, key) for key in ("dtype", "device_map", "quantization_config")}
    merged = {**(options or {}), **{key: value for key, value in own.items() if value is not None}}
    config = load_plain_config(spec, folder, hub, name=name)
    if options is None:
        empty = load_empty(
            AutoModelForCausalLM, where, config, what=repr(name), trust_remote_code=hub.trust_remote_code, **merged
        )
        return empty.eval().requires_grad_(False)
    model = load_whole(
        AutoModelForCausalLM,
        where,
        what=repr(name),
        revision=spec.revision or "main",
        trust_remote_code=hub.trust_remote_code,
        **hub.common(),
        **merged,
    )
    return model.eval().requires_grad_(False)


def add_adapters(
    model: PreTrainedModel, specs: Mapping[str, MemberSpec], folder: Path | None, hub: HubOptions
) -> PeftModel:
    """Put the LoRA adapters of `specs`, by reward name, on `model`; `adapter_name` says what they are called there.

    Raises:
        MemberError: one is not a plain LoRA, is not there, or does not fit the model.
    """
    peft: PeftModel | None = None
    with unchanged(model, what=f"loading the adapters of {', '.join(specs)}"):
        for index, (name, spec) in enumerate(specs.items()):
            assert spec.adapter is not None
            options = {**hub.common(), "revision": spec.adapter_revision}
            values = model.device.type != "meta"
            files = read_adapter(locate(spec.adapter, folder), options, name=name, values=values)
            peft = put_on(model, peft, files, adapter_name(index))
    assert peft is not None
    model.eval().requires_grad_(False)
    return peft


def load_tokenizer(
    reference: str, folder: Path | None, hub: HubOptions, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """A member's tokenizer, or None where its files hold none."""
    where = locate(reference, folder)
    if Path(where).is_dir() and not any(Path(where).glob("*token*")) and not (Path(where) / "vocab.json").exists():
        return None
    with refusing(f"cannot load the tokenizer of {where!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, revision=revision or "main", trust_remote_code=hub.trust_remote_code, **hub.common()
        )
    return tokenizer


def load_model_config(spec: MemberSpec, folder: Path | None, hub: HubOptions, *, name: str) -> Any:
    """A member's configuration, without its weights (raises MemberError)."""
    assert spec.model is not None
    where = locate(spec.model, folder)
    absent = "" if Path(where).is_dir() else f"{no_folder(where)}, and as a hub id it fails: "
    with refusing(f"{absent}cannot read the configuration of {name!r} at {where!r}"):
        return AutoConfig.from_pretrained(
            where, revision=spec.revision or "main", trust_remote_code=hub.trust_remote_code, **hub.common()
        )


def load_plain_config(spec: MemberSpec, folder: Path | None, hub: HubOptions, *, name: str) -> Any:
    """As `load_model_config`, of a model that is not itself guided (raises MemberError)."""
    config = load_model_config(spec, folder, hub, name=name)
    if isinstance(config, GuidedConfig):
        raise MemberError(
            f"{name!r} at {spec.model!r} is a guided folder, and a member is one plain model or adapter; give one of "
            "its members, or start from the folder with `genarm compose --from`, which adds rewards to it"
        )
    return config


def load_generation_config(reference: str, revision: str | None, hub: HubOptions, config: Any) -> GenerationConfig:
    """What a model's generation_config.json says; its configuration `config` where there is no such file.

    Raises:
        MemberError: the file is there and cannot be read.
    """
    with refusing(f"cannot read generation_config.json of {reference!r}"):
        try:
            found = GenerationConfig.from_pretrained(reference, revision=revision or "main", **hub.common())
        except OSError as error:
            if "JSON" in str(error):
                raise
            return GenerationConfig.from_model_config(config)
        wrong = [f"{key} is {value!r:.50}" for key, value in found.to_dict().items() if not _may_be(key, value)]
        if wrong:
            raise MemberError(f"generation_config.json of {reference!r} does not hold together: {wrong[0]}")
        return found


def _may_be(key: str, value: Any) -> bool:
    """Whether a setting of generating has the type that it must have; transformers looks when it is used."""
    if key.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        return value is None or all(type(i) is int for i in ids)
    numbers = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_length", "max_new_tokens")
    return key not in numbers or value is None or (isinstance(value, int | float) and not isinstance(value, bool))
