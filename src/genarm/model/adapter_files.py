"""LoRA adapters as their files say them: `W + s·B·A` on layers of a model, and nothing else.

An adapter's configuration has some fifty fields, and every release of peft adds some. Those below are known: peft's
layers follow them, or they say nothing about values. Any other that is set is refused by its name, as it would change
what the adapter means. Which layers an adapter is on, at which rank and scale, is peft's to say, for vLLM too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from genarm.errors import MemberError
from genarm.model.adapters import adapter_layers
from genarm.model.contract import ADAPTER_FILE, check_finite, named_tensors, refusing, shown

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MERGE = "merge it into a full model (peft's merge_and_unload) and compose that instead"

# peft's layers follow them, and whoever has layers of its own (the engine, vLLM) asks peft's.
_HANDLED = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
# Where an adapter comes from and how it was trained. The last three are ms-swift's.
_ABOUT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "megatron_core", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
)
# Beginnings of A and B that leave the model's own weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_LOW_RANK = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter, read: `label` for messages, its settings, and its tensors by the names in the file."""

    label: str
    settings: LoraConfig
    tensors: dict[str, Tensor]


def read_adapter_config(where: str, options: Mapping[str, Any], *, name: str) -> LoraConfig:
    """The settings of a LoRA adapter; of "main", which is where a hub id leads anyway, there is no revision.

    Args:
        where: its folder or hub id.
        options: how to reach the hub, for `hf_hub_download`.
        name: the reward's.

    Raises:
        MemberError: not found, not readable, or more than a low-rank sum that can be switched on and off.
    """
    label = f"the adapter {where!r} of {name!r}"
    with refusing(f"cannot read {ADAPTER_FILE} of {label}"):
        record = json.loads(_find(where, ADAPTER_FILE, options).read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise MemberError(f"{ADAPTER_FILE} of {label} holds {record!r:.50}, and settings in braces are expected")
        check_settings(record, label=label)
        host = record.get("base_model_name_or_path")
        if not isinstance(host, str | None):
            raise MemberError(f"{ADAPTER_FILE} of {label} names the model {host!r:.50}; it must be a path or a hub id")
        revision = record.get("revision")
        if not isinstance(revision, str | None):
            raise MemberError(
                f"{ADAPTER_FILE} of {label} has the revision {revision!r:.50} of its model; it must be a text or null"
            )
        known = {key: value for key, value in record.items() if key in _HANDLED}
        return LoraConfig(
            **known,
            base_model_name_or_path=host,
            revision=None if revision in ("", "main") else revision,
            inference_mode=True,
        )


def host_of(settings: LoraConfig) -> str | None:
    """The model that an adapter was trained on, as a user writes it: a folder, or a hub id with its @revision."""
    host: str | None = settings.base_model_name_or_path
    if host is None or settings.revision is None or "@" in host:
        return host
    path = Path(host).expanduser()
    return host if path.is_absolute() or path.is_dir() else f"{host}@{settings.revision}"


def check_settings(record: Mapping[str, Any], *, label: str) -> None:
    """Refuse an adapter that is more than a low-rank sum.

    Args:
        record: the settings as peft writes them.
        label: what messages call the adapter.

    Raises:
        MemberError: names the field.
    """
    kind = getattr(record.get("peft_type"), "value", record.get("peft_type"))
    if kind != "LORA":
        raise MemberError(f"{label} is of type {kind}; only LORA adapters can guide")
    beginning = record.get("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        raise MemberError(
            f"{label} was made with init_lora_weights={beginning!r:.50}, so it belongs to a base whose weights peft "
            "changed for it; save it again as plain LoRA (path_initial_model_for_weight_conversion of peft's "
            "save_pretrained), or merge it into a full model (merge_and_unload) and compose that instead"
        )
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    for key, value in record.items():
        if key in (*_HANDLED, *_ABOUT, "init_lora_weights") or not value or value == defaults.get(key):
            continue
        if key == "bias" and value == "none":
            continue
        if key not in defaults:
            raise MemberError(
                f"{label} has the setting {key}={value!r:.50}, which the installed peft does not know; upgrade peft, "
                f"or {_MERGE}"
            )
        raise MemberError(
            f"{label} has the setting {key}={value!r:.50}, which is more than a low-rank sum beside the model it "
            f"shares; {_MERGE}"
        )


def read_adapter(where: str, options: Mapping[str, Any], *, name: str, values: bool = True) -> AdapterFiles:
    """The settings and the tensors of a LoRA adapter.

    Args:
        where, options, name: as for `read_adapter_config`.
        values: without them only the file's header is read, and the tensors are on the meta device.

    Raises:
        MemberError: as `read_adapter_config`; or the weights are no safetensors file, or not all finite numbers.
    """
    settings = read_adapter_config(where, options, name=name)
    label = f"the adapter {where!r} of {name!r}"
    with refusing(f"cannot read {ADAPTER_WEIGHTS} of {label}"):
        path = _find(where, ADAPTER_WEIGHTS, options)
        stored = load_file(path) if values else _header(path)
    # A model that torch.compile had wrapped leaves its mark in every name.
    tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in stored.items()}
    strange = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if strange or len(tensors) < len(stored):
        what = f"tensors that are no floating point numbers ({shown(strange)})" if strange else "a tensor twice"
        raise MemberError(f"{label} holds {what} in {ADAPTER_WEIGHTS}; save it again")
    check_finite(tensors, what=label)
    return AdapterFiles(label=label, settings=settings, tensors=tensors)


def put_on(model: PreTrainedModel, peft: PeftModel | None, files: AdapterFiles, adapter: str) -> PeftModel:
    """Put an adapter on `model`, which `peft` wraps for those before it.

    On a model on the meta device, only the adapter has values.

    Raises:
        MemberError: its tensors are not exactly those of its layers on this model, or it brings others that differ
            from the model's own.
    """
    low_rank = {key: tensor for key, tensor in files.tensors.items() if _LOW_RANK.search(key)}
    _check_others(model, {k: t for k, t in files.tensors.items() if k not in low_rank}, files.label)
    empty = model.device.type == "meta"
    with refusing(f"{files.label} does not fit its model"):
        if peft is None:
            peft = PeftModel(model, files.settings, adapter_name=adapter, low_cpu_mem_usage=empty)
        else:
            peft.add_adapter(adapter, files.settings, low_cpu_mem_usage=empty)
        _refuse_other_layers(peft, adapter, files.label)
        result: Any = set_peft_model_state_dict(peft, low_rank, adapter_name=adapter, low_cpu_mem_usage=empty)
    wrong = [
        f"{len(keys)} of its tensors {what} ({shown(key.replace(f'.{adapter}', '') for key in keys)})"
        for keys, what in (
            (result.unexpected_keys, "have no place there"),
            ([key for key in result.missing_keys if f".{adapter}." in f"{key}."], "are missing"),
        )
        if keys
    ]
    if wrong:
        raise MemberError(
            f"{files.label} does not fit its model: {' and '.join(wrong)}; it was trained on "
            f"{host_of(files.settings)!r}"
        )
    return peft


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What an adapter adds to a linear layer: `scale · up @ down`, with `down` [r, inputs] and `up` [outputs, r]."""

    down: Tensor
    up: Tensor
    scale: float


def low_rank_parts(config: Any, files: AdapterFiles) -> dict[str, LowRank]:
    """{layer: what the adapter adds to it}, as peft reads it on a model with the configuration `config`.

    Raises:
        MemberError: as `put_on`; or it is on something else than linear layers, or has parts of other kinds there.
    """
    with refusing(f"{files.label} does not fit its model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    put_on(model, None, files, "arm:0")
    parts: dict[str, LowRank] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (files.tensors.get(f"{_PREFIX}{name}.{part}.weight") for part in ("lora_A", "lora_B"))
            if down is None or up is None or layer.lora_variant or any(layer.lora_bias.values()):
                raise MemberError(
                    f"{files.label} is more on {name!r} than a low-rank product on a linear layer (DoRA, biases or "
                    f"embeddings, say), which cannot be shared here; {_MERGE}"
                )
            parts[name] = LowRank(down=down, up=up, scale=float(layer.scaling["arm:0"]))
    return parts


def _check_others(model: PreTrainedModel, others: Mapping[str, Tensor], label: str) -> None:
    """A tensor of the model itself (embeddings, often) may come along where it says what the model says."""
    if not others:
        return
    own = named_tensors(model)
    for key, tensor in others.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        mine = own.get(name)
        if mine is None or mine.is_meta or mine.shape != tensor.shape or not mine.equal(tensor.to(mine)):
            why = "differs from" if mine is not None and not mine.is_meta else "cannot be compared with"
            raise MemberError(
                f"{label} brings its own {name}, which is no low-rank part and {why} that of the model it shares; save "
                f"it without (save_embedding_layers=False) if it was not trained, or {_MERGE}"
            )


def _refuse_other_layers(peft: PeftModel, adapter: str, label: str) -> None:
    for layer in adapter_layers(peft):
        if isinstance(layer, ParamWrapper):
            raise MemberError(f"{label} adapts {layer.parameter_name} (of experts, say), which is no layer; {_MERGE}")
        scale = float(getattr(layer, "scaling", {}).get(adapter, 1))
        if not math.isfinite(scale):
            raise MemberError(f"{label} has the scale {scale}; correct lora_alpha in its {ADAPTER_FILE}")


def _header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file without their values."""
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: torch.empty(own.get_shape(), dtype=own[:0].dtype if own.get_shape() else None, device="meta")
            for key, own in slices.items()
        }


def _find(where: str, file: str, options: Mapping[str, Any]) -> Path:
    if not Path(where).is_dir():
        return Path(hf_hub_download(where, file, **{k: v for k, v in options.items() if v is not None}))
    path = Path(where) / file
    if not path.is_file():
        pickled = path.with_suffix(".bin").exists()
        raise MemberError(
            f"{where!r} has no {file}"
            + (", only a pickled .bin file, which may run code; save it again with peft's save_pretrained" * pickled)
        )
    return path
