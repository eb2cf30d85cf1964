"""Presets: named weights of a guided folder, for `genarm serve` and whoever asks it for MODEL@NAME.

A folder may have them in `presets.json`, and a server more in a TOML file: {name: {reward: weight}}, where "max_kl"
among the weights is the budget in nats per token.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat

from genarm.data.tables import read_table
from genarm.errors import ConfigError
from genarm.files import write_text

PRESETS_FILE = "presets.json"
BUDGET = "max_kl"
_PRESET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_preset_name(name: str) -> None:
    """Raise ConfigError where no preset can be named so."""
    if not _PRESET.fullmatch(name):
        raise ConfigError(f"a preset cannot be named {name!r}; use letters, digits, '_', '-' and '.'")


def read_presets(folder: Path, file: Path | None = None) -> dict[str, dict[str, float]]:
    """The presets of a model's folder, and those of a TOML file over them: a table of weights and "max_kl" for each.

    Raises:
        ConfigError: a file that is not there or not what it should be.
    """
    presets: dict[str, dict[str, float]] = {}
    inside = folder / PRESETS_FILE
    if inside.is_file():
        presets |= _parse(inside, json.loads)
    if file is not None:
        presets |= _parse(file, tomllib.loads)
    return presets


def write_preset(folder: Path, name: str, weights: Mapping[str, float], max_kl: float | None) -> Path:
    """Put a preset among those of a model's folder, in the place of one of its name; returns the file.

    Raises:
        ConfigError: the name, or a file there that is not what it should be.
        DataError: it cannot be written.
    """
    check_preset_name(name)
    budget = {} if max_kl is None else {BUDGET: max_kl}
    presets = {**read_presets(folder), name: {**weights, **budget}}
    write_text(folder / PRESETS_FILE, json.dumps(presets, indent=2, ensure_ascii=False) + "\n")
    return folder / PRESETS_FILE


def carry_presets(source: Path, target: Path, rewards: Collection[str]) -> list[str]:
    """Copy the presets of one folder to another that has `rewards`; returns the names of those that weigh others.

    Raises:
        ConfigError: those of `source` are not what they should be.
        DataError: they cannot be written.
    """
    presets = read_presets(source)
    kept = {name: weights for name, weights in presets.items() if {*weights} - {BUDGET} <= {*rewards}}
    if kept:
        write_text(target / PRESETS_FILE, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return [name for name in presets if name not in kept]


def _parse(path: Path, loads: Any) -> dict[str, dict[str, float]]:
    try:
        data = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the presets in {path}: {error}") from error
    presets: dict[str, dict[str, float]] = read_table(dict[str, dict[str, FiniteFloat]], data, f"presets in {path}")
    return presets
