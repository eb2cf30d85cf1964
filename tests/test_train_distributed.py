"""Two real processes under `accelerate launch`: one result, one voice, the same weights as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from genarm.train.config import TrainConfig, to_toml
from test_train import run, write_toy

# accelerate's `--cpu` starts a single process unless MPI is there. Without it, processes that see no GPU use CPUs.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def _launch(config: TrainConfig, port: int) -> subprocess.CompletedProcess[str]:
    file = config.output.parent / f"{config.output.name}.toml"
    file.write_text(to_toml(config))
    return subprocess.run(
        [*LAUNCH, "--main_process_port", str(port), "-m", "genarm", "train", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_toy(tmp_path_factory.mktemp("two"), n=32)


def test_two_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    """8 pairs a step in one process, 4 and 4 in two: the same pairs, hence the same gradient."""
    changes = {"output": tmp_path / "two", "batch_size": 4, "learning_rate": 1e-3}
    done = _launch(TrainConfig(**{**settings, **changes}), _free_port())
    assert done.returncode == 0, done.stderr
    one = run(settings, output=tmp_path / "one", learning_rate=1e-3)

    assert done.stdout.count("pairs kept") == 1  # the main process alone speaks
    assert done.stdout.count("wrote ") == 1
    assert "accuracy" in done.stdout
    assert (tmp_path / "two" / "metrics.json").exists()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=2e-4, rtol=0)
    start = load_file(Path(settings["model"]) / "model.safetensors")
    assert max((theirs[name] - start[name]).abs().max() for name in start) > 2e-3

    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["steps"] == one.steps == 4
    assert metrics["eval_pairs"] == 60  # padding rows of the last batch are not counted twice
    assert metrics["eval_accuracy"] == pytest.approx(one.metrics["eval_accuracy"], abs=0.04)
    assert metrics["eval_loss"] == pytest.approx(one.metrics["eval_loss"], rel=1e-2)
    assert metrics["train_margin"] == pytest.approx(one.metrics["train_margin"], abs=0.05)
