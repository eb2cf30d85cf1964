"""What loading a member promises: the model is what its files say, all of it and nothing else.

Every tensor of the model comes from the files (tied ones from the tensor they are tied to), every tensor of the files
has its place, shapes agree, every value is finite, no pickle is opened, and adapters leave the model that they are put
on as it was. Whatever breaks this is refused with one line that names the file and the tensor.

Values are looked at where torch can: in floating point, with what a quantised layer keeps beside its packed numbers
(scales). Packed numbers themselves are always finite; weights that are offloaded to a disk are not looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from genarm.errors import GenarmError, MemberError, kind_of

ADAPTER_FILE = "adapter_config.json"

_SMALL = 2**24  # parameters that do no harm in memory
_SHOWN = 3  # tensors named in a message
_REASON = 400  # characters of a library's own words


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Make one `MemberError`, beginning with `what`, of whatever a library raises over files that others wrote.

    Which exception a broken file ends in depends on the library and on where it is broken: those of json, safetensors
    and tokenizers have no class in common.
    """
    try:
        yield
    except GenarmError:
        raise
    except Exception as error:
        raise MemberError(f"{what}: {_reason(error)}") from error


def load_whole(
    auto_class: Any, where: str, *, what: str, new_head: str | None = None, **options: Any
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, held to the promise above.

    Args:
        auto_class: an Auto class of transformers.
        where: a folder or a hub id.
        what: what messages call the model.
        new_head: a module that the files need not have, as training makes it; the head that they have is left out.
        **options: for `from_pretrained`.

    Raises:
        MemberError: the files cannot be read or are not those of such a model; tensors are missing, left over, of
            another shape or not finite.
    """
    if (Path(where) / ADAPTER_FILE).exists():
        raise MemberError(
            f"{what} at {where!r} is an adapter, and a whole model is needed here; merge it into its model "
            "(peft's merge_and_unload) and give the result"
        )
    with refusing(f"cannot load {what} from {where!r}"):
        _check_size(auto_class, where, what, options)
        model, found = auto_class.from_pretrained(
            where, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise MemberError(f"{what} at {where!r} is an adapter, and a whole model is needed here; merge it first")
    problems = _problems(model, found, new_head)
    if problems:
        raise MemberError(
            f"{what} at {where!r} is not what its config.json says: {'; '.join(problems)}; the file was damaged, "
            "written for another model, or its config.json was changed: copy or save it again"
        )
    check_finite(named_tensors(model), what=f"{what} at {where!r}")
    result: PreTrainedModel = model
    return result


def load_empty(auto_class: Any, where: str, config: Any, *, what: str, **options: Any) -> PreTrainedModel:
    """The same model without its weights, on the meta device; of the files only the headers are read.

    Args:
        auto_class, where, what: as for `load_whole`.
        config: the model's configuration.
        **options: of `from_pretrained`; those that matter are dtype, quantization_config and trust_remote_code.

    Raises:
        MemberError: what `load_whole` refuses, as far as it shows without the values of weights.
    """
    with refusing(f"cannot load {what} from {where!r}"):
        _check_size(auto_class, where, what, options)
        if Path(where).is_dir() and not any(Path(where).glob("*.safetensors")):
            raise MemberError(f"{what} at {where!r} has no safetensors file; save the model again")
        dtype = options.get("dtype") or config.dtype or torch.float32
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(
                config, dtype=dtype, trust_remote_code=bool(options.get("trust_remote_code"))
            )
    return model


def _check_size(auto_class: Any, where: str, what: str, options: Mapping[str, Any]) -> None:
    """Refuse a folder whose config.json describes a far larger model than its files hold, before any memory is taken.

    Only that: quantised files, which are smaller than their model, and models of the hub are left to what comes after.
    """
    files = list(Path(where).glob("*.safetensors")) if Path(where).is_dir() else []
    trusted = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    config = AutoConfig.from_pretrained(where, **trusted) if files else None
    if config is None or options.get("quantization_config") or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in auto_class.from_config(config, **trusted).parameters())
    stored = sum(map(_stored, files))
    if needed > 2 * stored + _SMALL:
        raise MemberError(
            f"{what} at {where!r} is not what its config.json says: that describes {kind_of(config)} of "
            f"{needed:,} parameters, and the files hold {stored:,}; copy the folder again"
        )


def _stored(file: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118


def _problems(model: Any, found: Mapping[str, Any], new_head: str | None) -> list[str]:
    """What the loading of a model has left open, in words."""
    missing = [key for key in found["missing_keys"] if new_head is None or not key.startswith(f"{new_head}.")]
    buffers = {name for name, _ in model.named_buffers()}  # some were saved once and are computed now
    unexpected = [key for key in found["unexpected_keys"] if key not in buffers]
    if new_head is not None:
        unexpected = [key for key in unexpected if key.startswith(f"{model.base_model_prefix}.")]
    if getattr(model, "hf_quantizer", None) is not None:  # what a quantiser keeps beside a layer is its own matter
        modules = {name for name, _ in model.named_modules()}
        unexpected = [key for key in unexpected if key.rpartition(".")[0] not in modules]
    shapes = [
        f"{key} is {list(file)} in the file and {list(own)} in the model"
        for key, file, own in sorted(found["mismatched_keys"], key=lambda entry: str(entry[0]))
    ]
    return [
        *([f"the tensors {shown(missing)} are missing"] if missing else []),
        *([f"the tensors {shown(unexpected)} have no place in {kind_of(model)}"] if unexpected else []),
        *([f"shapes differ: {shown(shapes)}"] if shapes else []),
        *([_shortened("; ".join(found["error_msgs"]))] if found["error_msgs"] else []),
    ]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's own weights by their plain names, without the adapters that were put on it."""
    return {
        key.replace(".base_layer.", "."): value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and ".lora_" not in key
    }


def check_finite(tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Refuse NaN and infinity, which would spread from one weight to every reply (raises MemberError)."""
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise MemberError(
            f"{what} holds NaN or infinity in {shown(bad)}; its training diverged, the file is damaged, or its dtype "
            "is too narrow for its values: use a good checkpoint, or load it in bfloat16 or float32"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    tensor = tensor.detach()
    if tensor.element_size() == 1:  # float8, which torch cannot add up
        return bool(tensor.float().isfinite().all())
    # A sum needs no memory and no second pass, unless it overflows.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


@contextmanager
def unchanged(model: nn.Module, *, what: str) -> Iterator[None]:
    """Refuse what changes a bit of the model's own weights in this block (raises MemberError)."""
    before = _checksums(model)
    yield
    after = _checksums(model)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if changed:
        raise MemberError(
            f"{what} changes the model it goes on ({shown(changed)}), which others share; merge it into a full model "
            "(peft's merge_and_unload) and use that instead"
        )


def _checksums(model: nn.Module) -> dict[str, int]:
    """For each tensor the sum of its bits, read as integers."""
    return {name: _bits(tensor) for name, tensor in named_tensors(model).items() if not tensor.is_meta}


def _bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    wide = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
    return int(wide.sum(dtype=torch.int64))


def shown(names: Iterable[str]) -> str:
    """A few of `names`, and how many more there are."""
    found: Sequence[str] = sorted(names)
    rest = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _reason(error: Exception) -> str:
    text = str(error)
    if "size mismatch for" in text:  # torch lists every tensor
        text = re.sub(r"\.arm:\d+", "", text[text.index("size mismatch for") :].split("\n")[0])
    return _shortened(text) or type(error).__name__


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _REASON else f"{text[:_REASON]} …"
