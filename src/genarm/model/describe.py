"""What a folder is and what is in it, by its configurations, cards and headers: no weights are read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from safetensors import safe_open

from genarm.errors import GenarmError, MemberError
from genarm.model.adapter_files import ADAPTER_WEIGHTS, host_of, read_adapter_config
from genarm.model.assembly import local_folder, output_rows
from genarm.model.compose import is_adapter, spec_of
from genarm.model.config import BASE, THE_BASE, GuidedConfig, MemberSpec, RewardSpec
from genarm.model.contract import refusing
from genarm.model.loading import HubOptions, load_model, load_plain_config, locate
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.references import ModelFiles, open_files
from genarm.model.trained import TRAIN_SETTINGS, figures_of, file_of, files_of, training_of
from genarm.model.vocabulary import read_vocabulary, unknown_tokens

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8"}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a model or an adapter, by the headers of its files.

    Attributes:
        parameters: how many; of a quantised model, those of its configuration.
        dtype: of the files; several where they differ.
        on_disk: bytes of the files.
        in_memory: bytes once loaded in the dtype that the guided folder or the files ask for; None where a
            quantisation at loading decides.
    """

    parameters: int
    dtype: str
    on_disk: int
    in_memory: int | None


@dataclass(frozen=True, kw_only=True)
class MemberFacts:
    """A member of a guided folder, or a model or adapter by itself.

    Attributes:
        name: the member's.
        kind: "model", "adapter" or "wish".
        model: where the model is that it is or goes on (as ID@REVISION in the latter case); None for the base's.
        adapter: where its adapter is.
        revision: of the adapter if it is one, or else of the model, on the hub.
        weight: its default weight; None for what is no reward.
        description: a line about what it prefers.
        reference: the name of the member that it is a difference to.
        wish: the system text that it reads.
        weights: its own; None for a wish, and where they are not on this machine.
        licence: as the card says it, or the first line of a licence file; None where neither is found.
        trained: the settings of `genarm train`, where that made it, and `figures` of what it measured.
        unknown: the base's special tokens that it cannot judge.
        problem: why its files cannot be read.
    """

    name: str
    kind: str
    model: str | None = None
    adapter: str | None = None
    revision: str | None = None
    weight: float | None = None
    description: str = ""
    reference: str | None = None
    wish: str | None = None
    weights: Weights | None = None
    licence: str | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """A folder, or what a hub id stands for.

    Attributes:
        reference: as it was given.
        kind: "guided folder", "adapter" or "model".
        members: the base first; of what is no guided folder, the thing itself.
        vocabulary: how many ids the base has.
        context: the most tokens of a prompt and its response together, where the members say.
        files: the model as a whole; None for an adapter.
        outline: the model without its weights, where its members fit.
        problem: why they do not.
    """

    reference: str
    kind: str
    members: tuple[MemberFacts, ...]
    vocabulary: int | None = None
    context: int | None = None
    files: ModelFiles | None = None
    outline: Any = None
    problem: str | None = None


def describe(reference: str, *, trust_remote_code: bool = False) -> Description:
    """What is at a path or a hub id (ID@REVISION).

    Raises:
        MemberError: there is nothing, or nothing that says what it is.
        ConfigError: the configuration of a guided folder does not hold together.
    """
    hub = HubOptions(trust_remote_code=trust_remote_code)
    spec = spec_of(reference)
    assert spec.model is not None
    if is_adapter(spec.model, spec.revision, hub):
        host = read_adapter_config(spec.model, {**hub.common(), "revision": spec.revision}, name=reference)
        adapter = MemberSpec(model=host_of(host), adapter=spec.model, adapter_revision=spec.revision)
        return Description(reference=reference, kind="adapter", members=(_facts(reference, adapter, None, hub),))
    place = Path(spec.model)
    if (place / TRAIN_SETTINGS).exists() and not (place / "config.json").exists():
        raise MemberError(
            f"{reference} holds a run of genarm train that is not finished; repeat its command with --resume"
        )
    files = open_files(reference, trust_remote_code=trust_remote_code)
    outline, problem = None, None
    try:
        outline = files.outline()
    except GenarmError as error:
        problem = str(error)
    return Description(
        reference=reference,
        kind="guided folder" if files.guided else "model",
        members=_members(files, outline) if files.guided else (_facts(reference, spec, None, hub),),
        vocabulary=getattr(files.config.get_text_config(), "vocab_size", None),
        context=files.context,
        files=files,
        outline=outline,
        problem=problem,
    )


def _members(files: ModelFiles, outline: Any) -> tuple[MemberFacts, ...]:
    config, hub = files.config, files.hub
    assert isinstance(config, GuidedConfig)
    folder = local_folder(files.reference, files.revision, hub)
    rewards = {reward.name: reward for reward in config.reward_specs}
    unknown: dict[str, list[str]] = {}
    if isinstance(outline, GuidedForCausalLM):
        base = read_vocabulary(files.tokenizer, size=output_rows(outline.base), label=BASE)
        for member, alignment in zip(outline.members[1:], outline.alignments, strict=True):
            unknown[member.name] = unknown_tokens(alignment, base)
    found = []
    for name, spec in config.member_specs.items():
        facts = _facts(name, spec, folder, hub)
        if reward := rewards.get(name):
            facts = replace(
                facts,
                weight=reward.weight,
                description=reward.description,
                reference=_reference_of(reward, config),
            )
        found.append(replace(facts, unknown=tuple(unknown.get(name, ()))))
    return tuple(found)


def _reference_of(reward: RewardSpec, config: GuidedConfig) -> str | None:
    """The name of the member that a reward is a difference to."""
    if reward.reference is None:
        return None
    names = {repr(spec): name for name, spec in reversed(config.member_specs.items())}
    return BASE if reward.reference == THE_BASE else names[repr(reward.reference)]


def _facts(name: str, spec: MemberSpec, folder: Path | None, hub: HubOptions) -> MemberFacts:
    kind = "wish" if spec.wish is not None else "adapter" if spec.adapter is not None else "model"
    revision = files_of(spec)[1]
    facts = MemberFacts(
        name=name,
        kind=kind,
        model=spec.model if kind == "model" else spec.model_reference,
        adapter=spec.adapter,
        revision=revision,
        wish=spec.wish,
    )
    where = files_of(spec)[0]
    if where is None:  # a wish of the base
        return facts
    try:
        at = locate(where, folder)
        model = None if spec.model is None or kind == "adapter" else locate(spec.model, folder)
        moved = replace(spec, model=model or spec.model, adapter=at if kind == "adapter" else None)
        return replace(
            facts,
            weights=_weights(moved, hub, name=name),
            licence=licence_of(at, revision, hub),
            trained=training_of(moved, hub),
            figures=figures_of(moved, hub),
        )
    except GenarmError as error:
        return replace(facts, problem=str(error))


# --- weights --------------------------------------------------------------------------------------------------


def _weights(spec: MemberSpec, hub: HubOptions, *, name: str) -> Weights | None:
    """Of a member at a place that holds from anywhere (raises MemberError where its files cannot be read)."""
    where, revision = files_of(spec)
    headers = _headers(str(where), revision, name=name)
    if headers is None:
        return None
    numbers, on_disk = headers
    config = None if spec.adapter is not None else load_plain_config(spec, None, hub, name=name)
    dtype = ", ".join(sorted(numbers))
    parameters = sum(numbers.values())
    if spec.quantization_config is not None:
        return Weights(parameters=parameters, dtype=dtype, on_disk=on_disk, in_memory=None)
    if (method := getattr(config, "quantization_config", None)) is not None:
        outline = load_model(spec, None, hub, None, name=name)
        parameters = sum(parameter.numel() for parameter in outline.parameters())
        said = method.get("quant_method", "quantised") if isinstance(method, dict) else "quantised"
        return Weights(parameters=parameters, dtype=f"{said} ({dtype})", on_disk=on_disk, in_memory=on_disk)
    wanted = spec.dtype or str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    each = _BYTES.get(wanted)
    in_memory = parameters * each if each else sum(n * _BYTES.get(kind, 1) for kind, n in numbers.items())
    return Weights(parameters=parameters, dtype=dtype, on_disk=on_disk, in_memory=in_memory)


def _headers(where: str, revision: str | None, *, name: str) -> tuple[dict[str, int], int] | None:
    """{dtype: how many numbers} of a model's or an adapter's files, and their bytes; None where they cannot be had."""
    with refusing(f"cannot read the weights of {name!r} at {where!r}"):
        if not Path(where).is_dir():
            cached = try_to_load_from_cache(where, "config.json", revision=revision)
            if not isinstance(cached, str):
                return _headers_on_hub(where, revision)
            where = str(Path(cached).parent)
        files = [Path(where) / ADAPTER_WEIGHTS]
        if not files[0].exists():
            found = sorted(Path(where).glob("*.safetensors"))
            files = [file for file in found if file.name.startswith("model")] or found
        if not files:
            raise MemberError(f"{name!r} at {where!r} has no safetensors file; save the model again")
        numbers: dict[str, int] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    own = tensors.get_slice(key)
                    dtype = _DTYPES.get(own.get_dtype(), own.get_dtype().lower())
                    numbers[dtype] = numbers.get(dtype, 0) + math.prod(own.get_shape())
    return numbers, sum(file.stat().st_size for file in files)


def _headers_on_hub(where: str, revision: str | None) -> tuple[dict[str, int], int] | None:
    try:
        found = HfApi().get_safetensors_metadata(where, revision=revision)
    except Exception:  # offline, an adapter, or a repository without such files
        return None
    numbers = {_DTYPES.get(kind, kind.lower()): count for kind, count in found.parameter_count.items()}
    return numbers, sum(count * _BYTES.get(kind, 1) for kind, count in numbers.items())


# --- licences -------------------------------------------------------------------------------------------------


def licence_of(where: str, revision: str | None, hub: HubOptions) -> str | None:
    """The licence that a model's card names, or else the first line of its licence file; None where neither is there.

    Args:
        where: a folder or a hub id, at `revision`.
        hub: how to reach the hub.
    """
    with contextlib.suppress(Exception):  # whatever a card's YAML holds
        if text := file_of(where, "README.md", revision, hub):
            data = ModelCard(text, ignore_metadata_errors=True).data
            named = data.get("license_name") or data.get("license")
            if isinstance(named, str) and named.strip():
                return named.strip()
    for name in _LICENCE_FILES:
        for line in (file_of(where, name, revision, hub) or "").splitlines():
            if line.strip():
                return f"{line.strip()[:80]} ({name})"
    return None
