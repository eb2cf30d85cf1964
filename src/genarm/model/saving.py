"""Writing the members of a guided model into its folder."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from transformers import PreTrainedModel

from genarm.errors import UnsupportedError
from genarm.files import write_text
from genarm.model.config import GuidedConfig, MemberSpec
from genarm.model.contract import named_tensors

if TYPE_CHECKING:
    from genarm.model.loading import Member
    from genarm.model.modeling import GuidedForCausalLM


def save_guided(
    model: GuidedForCausalLM,
    folder: Path,
    *,
    is_main_process: bool = True,
    max_shard_size: int | str | None = None,
    safe_serialization: bool = True,
    **others: Any,
) -> None:
    """`GuidedForCausalLM.save_pretrained`, but for the upload; see there."""
    given = [name for name, value in others.items() if value is not None]
    if given or not safe_serialization:
        raise UnsupportedError(
            f"save_pretrained of a guided model does not take {(given or ['safe_serialization=False'])[0]!r}: members "
            "are frozen and saved as they are, in safetensors"
        )
    if not is_main_process:
        return
    specs = model.config.member_specs
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    for member in model.members:
        _write_member(member, specs[member.name], model.folder, folder, sharding)
    model.generation_config.save_pretrained(folder)
    _portable(model.config, model.folder).save_pretrained(folder)


def write_default_weights(folder: Path, weights: Mapping[str, float]) -> None:
    """Make `weights` the default ones of the guided folder `folder`; nothing else in it changes.

    Raises:
        DataError: its config.json cannot be written.
    """
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for reward in record["rewards"]:
        reward["weight"] = weights[reward["name"]]
    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def push_guided(
    model: GuidedForCausalLM,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
) -> str:
    """`GuidedForCausalLM.push_to_hub`; see there."""
    config = _portable(model.config, model.folder)
    specs = config.member_specs.values()
    local = [r for spec in specs for r in (spec.model, spec.adapter) if r is not None and os.path.isabs(r)]
    if local:
        raise UnsupportedError(
            f"this guided model refers to {local[0]!r}, a folder of this machine that nobody else can read; compose it "
            "with --bundle (or with hub ids) and push that"
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        # transformers' own upload looks one folder deep only; members lie deeper.
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a guided model",
            commit_description=commit_description,
            create_pr=create_pr,
        )
    return str(commit)


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
    """Whether a reference leads into the guided folder, so that saving must carry the files along."""
    if source is None:
        return reference.startswith("./")
    place = (source / reference).resolve()
    return place.is_dir() and place.is_relative_to(source)


def _portable(config: GuidedConfig, source: Path | None) -> GuidedConfig:
    """The configuration for another folder: a relative reference to a place outside of `source` becomes absolute."""

    def move(reference: str | None) -> str | None:
        if reference is None or source is None or _is_inside(reference, source):
            return reference
        place = source / reference
        return str(place.resolve()) if place.is_dir() else reference

    def moved(spec: MemberSpec) -> MemberSpec:
        return replace(spec, model=move(spec.model), adapter=move(spec.adapter))

    twin = copy.deepcopy(config)
    twin.base = moved(config.base_spec).to_dict()
    twin.rewards = [reward.moved(moved).to_dict() for reward in config.reward_specs]
    return twin


def write_model(model: PreTrainedModel, folder: Path, **sharding: Any) -> None:
    """A model's own weights, without the adapters that others have put on it."""
    model.save_pretrained(folder, state_dict=named_tensors(model), **sharding)


def write_adapter(peft: PeftModel, name: str, folder: Path) -> None:
    """One LoRA adapter, in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    settings: Any = copy.copy(peft.peft_config[name])
    settings.init_lora_weights = True  # A and B go on the model as it is now, whatever they began from
    settings.alpha_pattern = _alphas(peft, name)
    settings.save_pretrained(str(folder))


def _alphas(peft: PeftModel, name: str) -> dict[str, float]:
    """The `alpha_pattern` that the layers have now: peft can scale an adapter in memory."""
    settings: Any = peft.peft_config[name]
    given: dict[str, float] = settings.alpha_pattern or {}
    found, as_given = {}, True
    for layer, module in peft.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            rank = module.r[name]
            found[layer] = module.scaling[name] * (math.sqrt(rank) if settings.use_rslora else rank)
            usual = given.get(get_pattern_key([*given], layer), settings.lora_alpha)
            as_given &= math.isclose(found[layer], usual, rel_tol=1e-9)
    return given if as_given else found
