"""`genarm bench serve` on a tiny model: what it counts adds up, and its report says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders.tiny import save_member, tiny_model
from genarm.cli.main import main
from genarm.errors import ConfigError
from genarm.lab.bench.serve import Reply, Round, percentile
from genarm.lab.bench.settings import ServeSettings


def test_bench_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_member(tiny_model(), tmp_path / "base")
    output = tmp_path / "out"
    line = ["bench", "serve", str(tmp_path / "base"), "--device", "cpu", "--concurrency", "3", "1", "--tokens", "12"]
    assert main([*line, "--explain", "--requests", "2", "--rounds", "2", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed == (output / "serve.md").read_text()
    record = json.loads((output / "serve.json").read_text())
    assert {*record["rounds"]} == {"1", "3"}
    for level, rounds in record["rounds"].items():
        assert len(rounds) == 2
        for of in rounds:
            assert len(of["replies"]) == 2 * int(level)
            for reply in of["replies"]:
                assert reply["tokens"] == 12
                assert reply["first"] > 0
                assert reply["first"] + sum(reply["gaps"]) == pytest.approx(reply["seconds"])
                assert reply["seconds"] < of["seconds"]
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| 1 ", "| 3 "))]
    assert [row[0] for row in rows] == ["| 1", "| 3"]
    rates = [24 / of["seconds"] for of in record["rounds"]["1"]]
    assert rows[0][-3] == f"{sum(rates) / 2:.1f} [{min(rates):.1f} to {max(rates):.1f}]"
    alone = record["alone"]["1"]
    assert rows[0][-2] == f"{sum(alone) / 2:.1f} [{min(alone):.1f} to {max(alone):.1f}]"
    shares = [rate / own for rate, own in zip(rates, alone, strict=True)]
    assert rows[0][-1] == f"{sum(shares) / 2:.3f} [{min(shares):.3f} to {max(shares):.3f}] |"
    assert "Every event has log-probabilities and rewards." in printed
    assert "3 streams of 44 tokens" in printed
    assert "--concurrency 3 1 --tokens 12 --requests 2 --rounds 2" in printed


def test_figures_of_a_round() -> None:
    fast = Reply(first=0.5, gaps=[0.1, 0.1], tokens=3, seconds=0.7)
    slow = Reply(first=1.0, gaps=[1.0], tokens=3, seconds=2.0)  # two tokens in one event
    assert (fast.per_token, slow.per_token) == (pytest.approx(0.1), 0.5)
    assert Round(replies=[fast, slow], seconds=2.0).tokens_per_second == 3.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([float(i) for i in range(101)], 99) == 99.0
    assert percentile([4.0], 99) == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1}, "--tokens is 1; it must be at least 2"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"requests": 0}, "--requests is 0"),
        ({"concurrency": (1, 0)}, "--concurrency has 0"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeSettings(folder="x", **changes)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_server_refuses_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompts are ids, in which a wish has no place."""
    save_member(tiny_model(), tmp_path / "base")
    line = ["compose", "--base", str(tmp_path / "base"), "--wish", "a=w1", "--output", str(tmp_path / "guided")]
    assert main(line) == 0
    assert main(["bench", "serve", str(tmp_path / "guided"), "--device", "cpu", "--tokens", "4"]) == 2
    assert "the server could not answer" in (said := capsys.readouterr().err)
    assert "wish" in said


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_member(tiny_model(), tmp_path / "base")
    line = ["bench", "serve", str(tmp_path / "base"), "--device", "cpu", "--tokens", "200"]  # of 128 positions
    assert main(line) == 2
    assert (
        "the server did not start: genarm serve: error: the context is 232 tokens; it must be"
        in capsys.readouterr().err
    )
