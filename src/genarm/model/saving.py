"""Writing the members of a guided model into its folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from genarm.errors import UnsupportedError
from genarm.model.config import BASE, MemberSpec

if TYPE_CHECKING:
    from genarm.model.loading import Member
    from genarm.model.modeling import GuidedForCausalLM

_HUB_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "private",
    "token",
    "create_pr",
    "revision",
    "commit_description",
    "tags",
)
_FULL_PRECISION_ONLY = ("max_shard_size",)


def save_guided(model: GuidedForCausalLM, folder: Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
    """`GuidedForCausalLM.save_pretrained`; see there."""
    sharding = {name: kwargs.pop(name) for name in _FULL_PRECISION_ONLY if name in kwargs}
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    is_main = kwargs.pop("is_main_process", True)
    kwargs.pop("safe_serialization", None)  # older callers pass it; safetensors is the only format anyway
    given = [name for name, value in kwargs.items() if value is not None]
    if given:
        raise UnsupportedError(
            f"save_pretrained of a guided model does not take {given[0]!r}: members are frozen and saved as they are"
        )
    if not is_main:
        return
    specs = {BASE: model.config.base_spec, **{r.name: r.member for r in model.config.reward_specs}}
    for member in model.members:
        _write_member(member, specs[member.name], model.folder, folder, sharding)
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)
    if push_to_hub:
        _push(folder, hub)


def _write_member(
    member: Member, spec: MemberSpec, source: Path | None, target: Path, sharding: dict[str, Any]
) -> None:
    for reference, is_adapter in ((spec.model, False), (spec.adapter, True)):
        if reference is None or not _is_inside(reference, source):
            continue
        destination = target / reference
        if source is not None and destination.resolve() == (source / reference).resolve():
            continue
        if source is not None:
            shutil.copytree(source / reference, destination, dirs_exist_ok=True)
        elif is_adapter:
            assert member.peft is not None
            assert member.adapter is not None
            write_adapter(member.peft, member.adapter, destination)
        else:
            write_model(member.model, destination, **sharding)


def _is_inside(reference: str, source: Path | None) -> bool:
    """Whether a reference is relative to the guided folder, so that saving must carry the files along."""
    if os.path.isabs(reference):
        return False
    return reference.startswith("./") if source is None else (source / reference).is_dir()


def write_model(model: PreTrainedModel, folder: Path, **sharding: Any) -> None:
    """A model's own weights, without the adapters that others have put on it."""
    state: dict[str, Tensor] = {
        key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if ".lora_" not in key
    }
    model.save_pretrained(folder, state_dict=state, **sharding)


def write_adapter(peft: PeftModel, name: str, folder: Path) -> None:
    """One LoRA adapter, in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(peft, adapter_name=name)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    peft.peft_config[name].save_pretrained(str(folder))


def _push(folder: Path, hub: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    repo_id = hub.pop("repo_id", None) or folder.name
    hub.pop("tags", None)
    api = HfApi(token=hub.pop("token", None))
    private = hub.pop("private", None)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, folder_path=folder, **{k: v for k, v in hub.items() if v is not None})
