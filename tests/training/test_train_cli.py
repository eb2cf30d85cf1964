"""`genarm train` as the shell sees it: options, files, messages, exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders.toy_training import write_toy
from genarm.cli.main import main
from genarm.training.config import TrainConfig, make_config


def test_the_form_that_scripts_rely_on(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=16)
    output = tmp_path / "arm"
    command = ["--model", settings["model"], "--data", settings["data"], "--eval-data", settings["eval_data"]]
    done = subprocess.run(
        [sys.executable, "-m", "genarm", "train", *command, "--output", str(output), "--lora", "--max-steps", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, no bars
    assert "pairs kept" in done.stdout
    assert f"wrote {output}" in done.stdout
    assert (output / "adapter_model.safetensors").exists()
    assert json.loads((output / "metrics.json").read_text())["steps"] == 2


def test_file_with_overrides(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=16)
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{settings["model"]}"\ndata = "{settings["data"]}"\noutput = "{tmp_path / "arm"}"\n'
        "beta = 0.5\nlearning_rate = 1e-3\nlora = true\nmax_steps = 3\neval_fraction = 0\n"
    )
    assert main(["train", "--config", str(file), "--lr", "2e-3", "--no-lora", "--max-steps", "1"]) == 0
    saved = make_config({}, tmp_path / "arm" / "train_config.toml")
    assert (saved.beta, saved.learning_rate, saved.lora, saved.max_steps) == (0.5, 2e-3, False, 1)


def test_every_setting_is_an_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in dataclasses.fields(TrainConfig):
        assert f"--{option.name.replace('_', '-')}" in text
        assert " ".join(option.metadata["help"].split())[:20] in text
    for part in ("(default: 0.05)", "--lr", "{cosine,linear,constant}", "--no-lora", "--resume", "--config"):
        assert part in text


def test_help_is_quick() -> None:
    """In processor time, which is the same on a busy machine."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "genarm", "train", "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 0.5 for _ in range(5))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--model and --data and --output missing"),
        (["--model", "m", "--data", "d", "--output", "o", "--beta", "-1"], "--beta must be a finite number above 0"),
        (["--config", "nowhere.toml"], "cannot read the configuration nowhere.toml"),
        (["--model", "MODEL", "--data", "gone.jsonl", "--output", "o"], "there is no file or folder gone.jsonl"),
        (["--model", "gone/", "--data", "d", "--output", "o"], "cannot load the model gone/"),
        (["--model", "MODEL", "--data", "broken.jsonl", "--output", "o"], "broken.jsonl, line 1, column 12:"),
        (["--model", "MODEL", "--data", "columns.csv", "--output", "o"], "the columns bad, good fit no preference"),
        (["--model", "MODEL", "--data", "train.jsonl", "--output", "full"], "full is not empty"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = write_toy(tmp_path, n=4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"chosen": }\n')
    (tmp_path / "columns.csv").write_text("good,bad\na,b\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    capsys.readouterr()
    assert main(["train", *[settings["model"] if a == "MODEL" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("genarm train: error: ")
    assert expected in error
    assert not (tmp_path / "o").exists()


def test_unknown_key_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("batchsize = 3\n")
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 2
    error = capsys.readouterr().err
    assert "unknown setting batchsize in" in error
    assert "batch_size" in error


@pytest.mark.parametrize("option", [["--schedule", "zigzag"], ["--batch-size", "many"], ["--modle", "m"]])
def test_argparse_refuses(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *option])
    assert stop.value.code == 2
