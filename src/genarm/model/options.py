"""What `from_pretrained` of a guided model may be given, sorted by whom it concerns.

Whatever transformers' own `from_pretrained` knows and drops, or is given a value that asks for nothing, is dropped
here too; scripts and libraries pass such things to every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genarm.errors import UnsupportedError
from genarm.model.config import GuidedConfig
from genarm.model.loading import HubOptions

_HUB = ("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")
_MEMBERS = (
    *("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "attn_implementation"),
    *("experts_implementation", "disable_mmap"),
)
# Of no effect in transformers, about files that are never read here (pickles), or added by the Auto classes.
_DROPPED = (
    *("low_cpu_mem_usage", "mirror", "_fast_init", "from_tf", "from_flax", "offload_state_dict", "weights_only"),
    *("adapter_kwargs", "adapter_name", "_from_auto", "_from_pipeline", "_commit_hash", "code_revision"),
    *("tqdm_class", "allow_all_kernels", "fusion_config"),
)
# Known to transformers, and refused unless the value asks for nothing.
_REFUSED = (
    *("proxies", "ignore_mismatched_sizes", "quantization_config", "variant", "gguf_file", "tp_plan"),
    *("tp_size", "device_mesh", "distributed_config", "use_kernels", "kernel_config", "key_mapping"),
)
_OWN = ("subfolder", "generation_config", "output_loading_info")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Arguments of a guided model's `from_pretrained`.

    Attributes:
        hub: how to reach the hub.
        members: arguments for every member's `from_pretrained`; None for members without their weights.
        config: fields of the configuration that replace the folder's.
        subfolder: where the guided folder lies within what was named.
        generation_config: in place of the folder's.
        output_loading_info: whether what was missing in the files is returned as well.
    """

    hub: HubOptions
    members: Mapping[str, Any] | None
    config: Mapping[str, Any]
    subfolder: str = ""
    generation_config: Any = None
    output_loading_info: bool = False


def sort_options(options: Mapping[str, Any], config: GuidedConfig | None) -> LoadOptions:
    """The options by whom they concern; `config` is a configuration that was given, whose settings reach the members.

    Raises:
        UnsupportedError: an option that a guided model does not take.
    """
    known = (*_HUB, *_MEMBERS, *_REFUSED, *_OWN)
    given = {
        name: value for name, value in options.items() if name not in _DROPPED and not _nothing(name, value, known)
    }
    if given.pop("use_safetensors", True) is False:
        raise UnsupportedError("a guided model is read from safetensors alone; leave use_safetensors=False out")
    fields = {name: given.pop(name) for name in list(given) if name in _SETTABLE}
    unknown = sorted(set(given) - set(_HUB) - set(_MEMBERS) - set(_OWN))
    if unknown:
        raise UnsupportedError(
            f"from_pretrained of a guided model does not take {unknown[0]!r}; it takes {', '.join(_HUB)} and, for "
            f"every member, {', '.join(_MEMBERS)}; set others per member in the folder's config.json"
        )
    members = {name: given[name] for name in _MEMBERS if name in given}
    return LoadOptions(
        hub=HubOptions(**{name: given[name] for name in _HUB if name in given}),
        members={**_settings_of(config), **members},
        config=fields,
        **{name: given[name] for name in _OWN if name in given},
    )


_SETTABLE = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def _nothing(name: str, value: Any, known: tuple[str, ...]) -> bool:
    return value is None or (name in known and (value is False or value == "" or value == {}))


def _settings_of(config: GuidedConfig | None) -> dict[str, Any]:
    """What a configuration says of how to run a model; the Auto classes put it there."""
    if config is None:
        return {}
    config.check_shapes()
    found = {
        "dtype": config.dtype,
        "attn_implementation": config._attn_implementation,
        "experts_implementation": config._experts_implementation,
    }
    return {name: value for name, value in found.items() if value is not None}
