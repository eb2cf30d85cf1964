"""The demo from start to end: a reduced one here, and the command itself among the slow tests."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import genarm
from genarm.cli.main import main
from genarm.errors import ConfigError, DataError
from genarm.lab.demo.base import BaseSettings
from genarm.lab.demo.run import BALANCED, GRID, HARMLESS, HELPFUL, DemoResult, DemoSettings, _new_output, run_demo
from genarm.lab.demo.show import both_line, sweep_table
from genarm.lab.demo.sweep import NO_WEIGHTS, Measured, measure
from genarm.lab.demo.world import OBJECTIVES, Truth, repeated, split_requests, truth

REDUCED = DemoSettings(
    seed=0,
    base=BaseSettings(layers=2, hidden=96, replies=4500),
    pairs=1200,
    held_out_pairs=60,
    requests=64,
)
LIMIT = 180
"""Seconds that the whole command may take. It computes on one core, so its processor time is about what it takes on a
quiet machine; time on the wall would depend on what else is running."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult, str]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(record=True, width=120, file=io.StringIO())
    result = run_demo(folder, REDUCED, console)
    return folder, result, console.export_text()


def test_each_weight_raises_its_own_score(demo):
    _, result, _ = demo
    base = result.at(NO_WEIGHTS)
    for weights, objective in ((HELPFUL, "helpful"), (HARMLESS, "harmless")):
        assert result.at(weights).mean(objective).low > base.mean(objective).high
    assert result.at(HELPFUL).mean("helpful").low > result.at(HARMLESS).mean("helpful").high
    assert result.at(HARMLESS).mean("harmless").low > result.at(HELPFUL).mean("harmless").high


def test_files_and_figures_agree(demo):
    folder, result, text = demo
    figures = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert figures["settings"]["seed"] == 0
    assert [tuple(point["weights"].values()) for point in figures["points"]] == [*GRID, NO_WEIGHTS]
    rows = [json.loads(line) for line in (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == REDUCED.requests * (len(GRID) + 1)
    for point in figures["points"]:
        scores = [truth(row["request"], row["reply"]) for row in rows if row["setting"] == point["label"]]
        for objective in OBJECTIVES:
            values = [getattr(score, objective) for score in scores]
            assert point[objective]["n"] == len(values) == REDUCED.requests
            assert point[objective]["value"] == pytest.approx(sum(values) / len(values))
        rows_of = [row["reply"] for row in rows if row["setting"] == point["label"]]
        assert point["repeated"]["value"] == pytest.approx(sum(map(repeated, rows_of)) / len(rows_of))
        gain = result.at(HELPFUL).gain(result.at(NO_WEIGHTS), "helpful").value
    assert gain == pytest.approx(figures["points"][GRID.index(HELPFUL)]["gain_over_base"]["helpful"]["value"])
    assert (folder / "trade-off.png").read_bytes().startswith(b"\x89PNG")
    for expected in (
        "helpful=1.2,harmless=0.8",
        "said before",
        f"n={REDUCED.requests}",
        "genarm generate",
        "genarm chat",
        "s so far",
    ):
        assert expected in text


def test_nothing_measured_was_trained_on(demo):
    folder, _, _ = demo
    measured = {request.text for request in split_requests(0).held_out}
    for objective in OBJECTIVES:
        asked = {
            part: {json.loads(line)["prompt"][0]["content"] for line in path.read_text(encoding="utf-8").splitlines()}
            for part in ("", "-held-out")
            for path in [folder / "pairs" / f"{objective}{part}.jsonl"]
        }
        assert not asked[""] & measured
        assert asked["-held-out"] <= measured


def test_the_guided_folder_is_left_to_use(demo, tmp_path):
    """It has its members inside, so it works elsewhere, and gives the replies that were measured."""
    folder, result, _ = demo
    moved = tmp_path / "moved"
    (folder / "guided").rename(moved)
    try:
        model = AutoModelForCausalLM.from_pretrained(moved)
        tokenizer = AutoTokenizer.from_pretrained(moved)
    finally:
        moved.rename(folder / "guided")
    assert isinstance(model, genarm.GuidedForCausalLM)
    assert tuple(model.default_weights.items()) == tuple(zip(OBJECTIVES, BALANCED, strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        requests = split_requests(0).held_out[: REDUCED.requests]
        again = measure(model, tokenizer, requests, GRID, seed=0, console=Console(quiet=True))
    finally:
        torch.set_num_threads(threads)
    assert [point.replies for point in again] == [point.replies for point in result.points]


def test_a_demo_is_never_overwritten(demo, tmp_path, capsys):
    folder, _, _ = demo
    before = (folder / "results.json").read_bytes()
    with pytest.raises(DataError, match=r"holds a finished demo; choose another --output or remove it"):
        run_demo(folder, REDUCED, Console(quiet=True))
    assert (folder / "results.json").read_bytes() == before
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_interrupted_demo_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with _new_output(tmp_path / "out") as folder:
            (folder / "base").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "out").exists()


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="--seed is -1"):
        DemoSettings(seed=-1)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_is_quick_and_deterministic(tmp_path):
    written = []
    for name in ("one", "two"):
        before = _processor_seconds()
        command = [sys.executable, "-m", "genarm", "demo", "--output", name]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert _processor_seconds() - before < LIMIT
        written.append([(tmp_path / name / file).read_bytes() for file in ("results.json", "replies.jsonl")])
    assert written[0] == written[1]
    points = json.loads(written[0][0])["points"]
    balanced = next(p for p in points if tuple(p["weights"].values()) == BALANCED)
    assert all(gain["low"] > 0 for gain in balanced["gain_over_base"].values())


def test_scores_that_are_all_alike_have_no_interval_in_words():
    points = [
        Measured(label=name, weights=(0.0, weight), replies=("a", "b"), scores=(Truth(weight, 1.0),) * 2)
        for name, weight in (("base", 0.0), ("guided", 1.0))
    ]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(sweep_table(points, points[0]), both_line(points[1], points[0]))
    said = console.export_text()
    assert "+1.00 (all alike)" in said
    assert "guided is not better than the base in both beyond doubt: helpful +1.00 (all alike)" in said
    assert "nan" not in said
