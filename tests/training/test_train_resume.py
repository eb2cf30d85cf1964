"""Runs that are killed, for real, and resumed: the same weights to the last bit."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from builders.toy_training import run, write_toy
from genarm.errors import ConfigError
from genarm.training.config import TrainConfig, to_toml
from genarm.training.output import RunFolder
from genarm.training.run import train

# 24 pairs in batches of 4: 6 steps per epoch, 12 in all, a checkpoint after every 3.
OPTIONS: dict[str, Any] = {"lora": True, "lora_dropout": 0.1, "batch_size": 4, "epochs": 2.0, "eval_steps": 3}

# Dies by SIGKILL when `function` (module, class, name) is called for the nth time.
KILLER = """
import importlib, os, signal, sys
from pathlib import Path
from genarm.training.config import make_config
from genarm.training.run import train

config, module, owner, name, n = sys.argv[1:]
holder = getattr(importlib.import_module(module), owner)
original, calls = getattr(holder, name), 0

def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(n):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(holder, name, dying)
train(make_config({}, Path(config)))
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    settings = {**write_toy(folder, n=24), **OPTIONS}
    run(settings)
    return settings


def _killed(settings: dict[str, Any], output: Path, module: str, owner: str, name: str, n: int) -> TrainConfig:
    config = TrainConfig(**{**settings, "output": output})
    file = output.parent / f"{output.name}.toml"
    file.write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(file), module, owner, name, str(n)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return config


@pytest.mark.parametrize(
    ("where", "call", "resumed_from"),
    [
        ("in the middle of an epoch", ("genarm.training.trainer", "ArmTrainer", "training_step", 9), 6),
        ("before the first checkpoint", ("genarm.training.trainer", "ArmTrainer", "training_step", 2), None),
        ("while a checkpoint is written", ("genarm.training.trainer", "ArmTrainer", "_save_rng_state", 3), 6),
        ("while the result is written", ("genarm.training.output", "RunFolder", "publish", 1), 12),
    ],
)
def test_killed_and_resumed(
    where: str, call: tuple[str, str, str, int], resumed_from: int | None, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    config = _killed(unbroken, tmp_path / "arm", *call)
    assert not (config.output / "metrics.json").exists()
    with pytest.raises(ConfigError, match="holds an unfinished run; continue it with --resume"):
        train(config)
    console = Console(file=io.StringIO(), width=200)
    result = train(config, resume=True, console=console)
    assert result.resumed_from == resumed_from
    expected = f"resuming from step {resumed_from}" if resumed_from else "starting from the beginning"
    assert expected in console.file.getvalue()  # type: ignore[attr-defined]

    theirs = load_file(result.output / "adapter_model.safetensors")
    for name, tensor in load_file(unbroken["output"] / "adapter_model.safetensors").items():
        assert torch.equal(tensor, theirs[name]), name
    saved = json.loads((unbroken["output"] / "metrics.json").read_text())
    timed = ("seconds", "runtime", "per_second")
    for name, value in saved.items():
        assert name.endswith(timed) or result.metrics[name] == value, name
    assert not [path.name for path in result.output.iterdir() if path.name.startswith(".")]


def test_early_stopping_survives_a_kill(tmp_path: Path) -> None:
    """The patience already used up is part of what is resumed, and so is the end that it brought."""
    settings = {**write_toy(tmp_path, n=24), "batch_size": 4, "epochs": 5.0, "eval_steps": 1, "early_stopping": 3}
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flipped))
    whole = run(settings)
    assert whole.steps < 30
    for name, call in {
        "trained": ("genarm.training.trainer", "ArmTrainer", "training_step", whole.steps - 1),
        "stopped": ("genarm.training.output", "RunFolder", "publish", 1),
    }.items():
        config = _killed(settings, tmp_path / name, *call)
        result = train(config, resume=True, console=Console(quiet=True))
        assert result.steps == whole.steps
        assert result.metrics["weights_of_step"] == whole.metrics["weights_of_step"]
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole.output, result.output))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_finished_run_is_left_alone(unbroken: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken["output"].rglob("*")}
    with pytest.raises(ConfigError, match="holds a finished run; continue it with --resume, choose another --output"):
        run(unbroken)
    result = train(TrainConfig(**unbroken), resume=True, console=Console(quiet=True))
    assert result.steps == 12
    assert result.metrics["eval_pairs"] == 60
    assert {path: path.stat().st_mtime_ns for path in unbroken["output"].rglob("*")} == before


def test_other_settings_are_refused_by_name(unbroken: dict[str, Any]) -> None:
    config = TrainConfig(**{**unbroken, "beta": 0.5, "seed": 1, "report_to": "none"})
    with pytest.raises(ConfigError, match=r"--beta was 0\.05, is 0\.5; --seed was 0, is 1"):
        train(config, resume=True, console=Console(quiet=True))


def test_foreign_folders_are_refused(unbroken: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no training run"):
            train(TrainConfig(**{**unbroken, "output": tmp_path}), resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_incomplete_checkpoints_are_passed_over(unbroken: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    checkpoints = unbroken["output"] / "checkpoints"
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    folder = RunFolder(path=tmp_path)
    found = folder.newest_checkpoint(processes=1)
    assert found is not None
    assert (found.step, found.finished) == (12, True)
    (tmp_path / "checkpoints/checkpoint-12/trainer_state.json").write_text('{"global_step": 12, "log')
    found = folder.newest_checkpoint(processes=1)
    assert found is not None
    assert (found.step, found.finished) == (9, False)
    assert folder.newest_checkpoint(processes=2) is None  # the second process's random state is missing
