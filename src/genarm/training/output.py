"""The folder of a run: what it holds already, which checkpoint to resume from, and the final result.

`train_config.toml` has the resolved settings, `inputs.json` the content of model and data; both are written when
training begins; `checkpoints/` holds the last few
of the Trainer's own; then come the files of the result (weights, tokenizer, card, plots, log); `metrics.json`, the
figures, is written last, so that a folder without it holds no finished result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genarm.errors import ConfigError, DataError
from genarm.files import write_text
from genarm.model.trained import TRAIN_FIGURES, TRAIN_INPUTS, TRAIN_SETTINGS
from genarm.provenance import Record, alone, check, note
from genarm.training.config import TrainConfig, make_config, to_toml, training_differences

CHECKPOINTS = "checkpoints"
_STAGING = ".result"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint of the Trainer; `finished` if no step of the run is left after it."""

    path: Path
    step: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The output folder at `path`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints."""
        return self.path / CHECKPOINTS

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that this run must not write into.

        Raises:
            ConfigError: it holds a run and `resume` is false, or something else than a run.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; choose another --output")
        has_run = (self.path / TRAIN_SETTINGS).is_file()
        if has_run and not resume:
            state = "a finished" if self.metrics() is not None else "an unfinished"
            raise ConfigError(
                f"{self.path} holds {state} run; continue it with --resume, choose another --output, or remove it"
            )
        if not has_run and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no training run; choose another --output")

    def check_settings(self, config: TrainConfig) -> None:
        """Refuse to resume with settings that would train something else.

        Raises:
            ConfigError: names every setting that differs from the saved one.
        """
        file = self.path / TRAIN_SETTINGS
        if not file.is_file():
            return
        differences = training_differences(make_config({}, file), config)
        if differences:
            raise ConfigError(
                f"cannot resume {self.path} with other settings: {'; '.join(differences)}; "
                "repeat the run's own settings, or choose another --output"
            )

    def check_inputs(self, record: Record) -> None:
        """Refuse to resume where the model or the data are no more what they were (raises DataError)."""
        if self.checkpoints.is_dir() or self.metrics() is not None:
            if not (self.path / TRAIN_INPUTS).is_file():
                raise DataError(
                    f"{self.path} has no {TRAIN_INPUTS}, so nothing says what its run was trained on (earlier versions "
                    f"wrote none); choose another --output, or remove {self.path}"
                )
            check(self.path / TRAIN_INPUTS, record, self.path)

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs from this folder while this one writes (raises DataError: another does)."""
        return alone(self.path, noted=self.path / TRAIN_SETTINGS)

    def begin(self, config: TrainConfig, record: Record) -> None:
        """Mark the folder as that of a run with these settings, made from what `record` says."""
        write_text(self.path / TRAIN_SETTINGS, to_toml(config))
        note(self.path / TRAIN_INPUTS, record)

    def metrics(self) -> dict[str, float] | None:
        """The figures of a finished run; None if it is not finished."""
        file = self.path / TRAIN_FIGURES
        found: dict[str, float] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return found

    def newest_checkpoint(self, processes: int) -> Checkpoint | None:
        """The complete checkpoint with the most steps; one that was cut off by a kill is passed over."""
        found = [_read_checkpoint(path, processes) for path in self.checkpoints.glob("checkpoint-*")]
        return max((c for c in found if c is not None), key=lambda c: c.step, default=None)

    def stage(self) -> Path:
        """An empty hidden folder for the result, beside its final place."""
        staging = self.path / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return staging

    @property
    def staging(self) -> Path:
        """Where `stage` puts the result."""
        return self.path / _STAGING

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Move the staged result to its place and say that it is whole."""
        for item in sorted(self.staging.iterdir()):
            target = self.path / item.name
            if target.is_dir():
                shutil.rmtree(target)
            if item.is_file():
                item.chmod(0o644)  # safetensors writes files that only their owner can read
            os.replace(item, target)
        self.staging.rmdir()
        write_text(self.path / TRAIN_FIGURES, json.dumps(metrics, indent=2) + "\n")


def _read_checkpoint(path: Path, processes: int) -> Checkpoint | None:
    """The Trainer writes its state last, after the random states of each process but for those of others."""
    try:
        state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if len(list(path.glob("rng_state*.pth"))) < processes:
        return None
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return Checkpoint(path=path, step=state["global_step"], finished=bool(control.get("should_training_stop", False)))
