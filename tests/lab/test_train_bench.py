"""`genarm bench train` from start to end on a tiny model, and what it makes of its measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.toy_training import write_toy
from genarm.cli.main import main
from genarm.lab.bench.figures import (
    TRAIN_CPO,
    TRAIN_DPO,
    TRAIN_PACKED,
    TRAIN_PADDED,
    TRAIN_REFERENCE,
    train_figures,
)


def test_figures() -> None:
    seconds = {TRAIN_PACKED: [1.0, 2.0], TRAIN_PADDED: [2.0, 4.0], TRAIN_CPO: [2.0, 3.0]}
    seconds |= {TRAIN_REFERENCE: [1.0, 2.0], TRAIN_DPO: [3.0, 8.0]}
    peaks = {TRAIN_PACKED: 6, TRAIN_PADDED: 8, TRAIN_CPO: 10, TRAIN_REFERENCE: 7, TRAIN_DPO: 12}
    figures = {figure.name: figure for figure in train_figures(seconds, peaks)}
    speed = figures["ARM, packed: speed over CPO, trl"]
    assert (list(speed.values), speed.met) == ([2.0, 1.5], False)
    memory = figures["ARM, packed: peak memory over CPO, trl"]
    assert (list(memory.values), memory.met) == ([0.6], True)
    assert list(figures["ARM with a reference, packed: speed over DPO, trl"].values) == [3.0, 4.0]


@pytest.mark.slow
def test_every_contestant_trains_on_the_same_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = write_toy(tmp_path, n=8)
    words = ["bench", "train", "--model", settings["model"], "--data", settings["data"], "--steps", "2"]
    assert main([*words, "--batch-size", "3", "--rounds", "2", "--lora", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "train.md").read_text(encoding="utf-8") == printed
    record = json.loads((tmp_path / "out" / "train.json").read_text(encoding="utf-8"))
    assert set(record["seconds"]) == {TRAIN_PACKED, TRAIN_PADDED, TRAIN_CPO, TRAIN_REFERENCE, TRAIN_DPO}
    assert all(len(row) == 2 and min(row) > 0 for row in record["seconds"].values())
    assert all(0 < memory["before"] <= memory["peak"] for memory in record["memory"].values())
    assert record["trained"]["tokens"] < record["trained"]["sequence_tokens"]
    assert "LoRA" in printed
    too_many = [*words, "--batch-size", "5", "--rounds", "1"]
    assert main(too_many) == 2
    assert "--data has 8 pairs, and a round takes 10; give fewer --steps" in capsys.readouterr().err
