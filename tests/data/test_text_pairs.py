"""Pairs of plain text with a chat model: read as `genarm generate` reads text, in training and in accuracy alike."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from builders.tiny import save_member, tiny_model
from genarm.batch.requests import read_requests
from genarm.cli.main import main
from genarm.data.tokens import EXAMPLE_WIDTH, TokenPair, example_lines
from genarm.lab.accuracy.models import open_rewards
from genarm.lab.accuracy.pairs import encode, limits, read_pairs
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.model.references import open_files
from genarm.text.prompts import Prompt
from genarm.training.config import TrainConfig
from genarm.training.data import load_pairs
from genarm.training.prompts import load_prompts, load_readings

ROWS = [{"prompt": f"w{i} w9", "chosen": f"w{i} w3", "rejected": "w4"} for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    save_member(tiny_model(), root / "model")
    with (root / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return root


@pytest.mark.parametrize("raw", [False, True])
def test_text_is_read_as_generate_reads_it(folder: Path, raw: bool) -> None:
    files = open_files(str(folder / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lengths = {"max_prompt_tokens": 16, "max_response_tokens": 16}
    data = str(folder / "pairs.csv")
    config = TrainConfig(model=files.reference, data=data, output=folder / "arm", raw=raw, eval_fraction=0, **lengths)
    expected = []
    for row in ROWS:
        prompt = files.conversation(row["prompt"], system=None, raw=raw)
        expected.append([files.encode_pair(prompt, row[side]) for side in ("chosen", "rejected")])
    found = load_pairs(config, tokenizer)
    assert [_ids(pair) for pair in found.training] == expected
    assert [list(ids) for ids in load_prompts(config, tokenizer).training] == [pair[0][0] for pair in expected]
    assert ("without" if raw else "with") + " the chat template" in found.formats["training"]
    settings = AccuracySettings(models=(files.reference,), data=data, raw=raw, **lengths)
    reward = open_rewards(files.reference, trust_remote_code=False)
    encoded = encode(reward.tokenizer, read_pairs(settings), limits(settings, 128, model="m"), reward.ends)
    assert [_ids(pair) for pair in encoded.pairs] == expected


def test_lines_of_prompts_are_those_that_generate_reads(folder: Path, tmp_path: Path) -> None:
    marks = ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\r", " \t"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\r\n".join(["", *(f" w1{mark}w2" for mark in marks), "", " ", "w3\nw4"]).encode())
    config = TrainConfig(
        model=str(folder / "model"),
        data=str(file),
        output=tmp_path / "arm",
        raw=True,
        eval_fraction=0,
        max_prompt_tokens=9,
        max_response_tokens=9,
    )
    read: list[Prompt] = []

    def encode(prompt: Prompt) -> list[list[int]]:
        read.append(prompt)
        return [[6]]

    load_readings(config, AutoTokenizer.from_pretrained(folder / "model"), encode, cut=True)
    assert read == [request.prompt for request in read_requests(file)]
    assert len(read) == len(marks) + 2


def _ids(pair: TokenPair) -> list[tuple[list[int], list[int]]]:
    return [(list(pair.prompt_ids), list(reply)) for reply in (pair.chosen_ids, pair.rejected_ids)]


def test_the_first_pair_is_shown_before_anything_runs(folder: Path, capsys: Any) -> None:
    words = ["--model", str(folder / "model"), "--data", str(folder / "pairs.csv"), "--max-steps", "1"]
    words += ["--output", str(folder / "arm"), "--batch-size", "2", "--eval-fraction", "0"]
    assert main(["train", *words]) == 0
    shown = capsys.readouterr().out
    for line in (
        "pairs.csv, plain text (prompt, chosen, rejected: strings), with the chat template",
        "prompt: '<user> w0 w9 <end> <assistant>'",
        "chosen: 'w0 w3 <end>'",
        "rejected: 'w4 <end>'",
    ):
        assert line in shown
    assert "with the chat template" in (folder / "arm" / "README.md").read_text()
    assert main(["accuracy", str(folder / "arm"), "--data", str(folder / "pairs.csv"), "--raw"]) == 0
    shown = capsys.readouterr().err
    assert "without the chat template" in shown
    assert "prompt: 'w0 w9'" in shown


def test_long_examples_are_shortened_and_harmless(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    (line,) = example_lines(tokenizer, [6] * 5000)
    assert len(line) < EXAMPLE_WIDTH + 20
    tokenizer.add_tokens(["\x1b[2J\n"])
    assert example_lines(tokenizer, [len(tokenizer) - 1]) == [r"prompt: '\x1b[2J\n'"]
