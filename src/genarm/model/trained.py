"""What `genarm train` has written down of a reward, for whoever puts it together with a base."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from genarm.model.config import THE_BASE, MemberSpec
from genarm.model.loading import HubOptions
from genarm.provenance import difference, model_record, plain

TRAIN_SETTINGS = "train_config.toml"
"""What `genarm train` leaves in an ARM's folder: the settings of the training."""
TRAIN_INPUTS = "inputs.json"
"""Likewise: the content of the model and the data that the training began with."""
TRAIN_FIGURES = "metrics.json"
"""Likewise: the figures of a finished run."""


def training_of(member: MemberSpec, hub: HubOptions) -> dict[str, Any]:
    """The settings by which `genarm train` made a reward; none where something else did."""
    where, revision = files_of(member)
    with contextlib.suppress(tomllib.TOMLDecodeError, UnicodeDecodeError):  # another tool's file of that name
        return tomllib.loads(file_of(str(where), TRAIN_SETTINGS, revision, hub) or "")
    return {}


def figures_of(member: MemberSpec, hub: HubOptions) -> dict[str, float]:
    """What `genarm train` has measured of a reward, by name; nothing where something else made it."""
    where, revision = files_of(member)
    with contextlib.suppress(ValueError):
        found = json.loads(file_of(str(where), TRAIN_FIGURES, revision, hub) or "{}")
        return {k: float(v) for k, v in found.items() if isinstance(v, int | float)} if isinstance(found, dict) else {}
    return {}


def files_of(member: MemberSpec) -> tuple[str | None, str | None]:
    """Where a member's own files are, and at which revision: its adapter's, where it is one."""
    return (member.adapter, member.adapter_revision) if member.adapter else (member.model, member.revision)


def said_of_start(
    name: str, where: str, trained: Mapping[str, Any], reference: MemberSpec | None, hub: HubOptions
) -> str:
    """That a reward is a difference to the model that it was trained from, and whether that is still the same."""
    which = "the base" if reference == THE_BASE else str(trained.get("model"))
    line = (
        f"{name} ({where}) was trained by --loss {trained.get('loss')} as a difference to its own start, so its "
        f"reference is {which}, as of a --tuned reward"
    )
    inputs = json.loads(file_of(where, TRAIN_INPUTS, None, hub) or "{}") if Path(where).is_dir() else {}
    before, model = inputs.get("record", {}).get("model"), str(trained.get("model"))
    if before is not None and Path(model).is_dir() and difference(before, plain(model_record(model))):
        line += f"; but {model} has changed since then: give what it was trained from as --reference {name}=MODEL"
    return line


def trained_through(name: str, trained: Mapping[str, Any], base: MemberSpec, weight: float) -> list[str]:
    """In what a reward that was trained through a base at some weights is used otherwise."""
    through, served = trained.get("through"), trained.get("through_weight")
    if through is None or served is None:
        return []
    notes = []
    # The base is where its folder really lies, and what was given to train through may be a link to it.
    where = str(Path(through).expanduser().resolve()) if Path(through).expanduser().is_dir() else through
    if where not in (base.model, f"{base.model}@{base.revision}"):
        notes.append(f"{name} was trained through {through}, and guides another base here")
    low, _, high = str(served).partition("-")
    if not float(low) <= weight <= float(high or low):
        notes.append(f"{name} was trained for the weight {served} and has {weight:g} here; give {name}=PATH:{low}")
    return notes


def file_of(where: str, name: str, revision: str | None, hub: HubOptions) -> str | None:
    """The text of a file of a model or an adapter, here or on the hub; None where there is no such file."""
    path = Path(where) / name
    if not Path(where).is_dir():
        options = {key: value for key, value in hub.common().items() if value is not None}
        try:
            path = Path(hf_hub_download(where, name, revision=revision, **options))
        except (OSError, ValueError):
            return None
    return path.read_text(encoding="utf-8") if path.is_file() else None
