"""`genarm bench vllm` without vLLM: its settings, models, figures and report."""

from __future__ import annotations

import datetime
import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from genarm.cli.main import build_parser, main
from genarm.errors import EngineFailure
from genarm.lab.bench.decode import Where
from genarm.lab.bench.figures import (
    VLLM_CONTESTANTS,
    VLLM_FULL,
    VLLM_HEAD,
    VLLM_LORA,
    VLLM_MERGED,
    VLLM_PLAIN,
    VLLM_TWO_LORAS,
    Figure,
    over_plain,
    shared_over_merged,
    vllm_ratios,
    vllm_targets,
)
from genarm.lab.bench.report import Circumstances, command, write_report
from genarm.lab.bench.settings import VllmSettings
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.vllm import VllmResult, decode_rate
from genarm.lab.bench.vllm_engine import EngineFacts, EngineSettings, remote_engine
from genarm.lab.bench.vllm_models import write_entries
from genarm.lab.bench.vllm_report import as_markdown
from genarm.lab.machine import this_machine

TINY = SHAPES["tiny"]
RATES = {
    1: {
        VLLM_PLAIN: [10.0, 20.0, 40.0],
        VLLM_FULL: [9.0, 15.0, 36.0],
        VLLM_LORA: [8.0, 18.0, 36.0],
        VLLM_TWO_LORAS: [5.0, 10.0, 20.0],
        VLLM_MERGED: [4.0, 9.0, 12.0],
        VLLM_HEAD: [9.0, 19.0, 38.0],
    },
    16: {name: [100.0, 100.0, 50.0] for name in VLLM_CONTESTANTS},
}


@pytest.fixture
def result() -> VllmResult:
    facts = EngineFacts(version="0.32.0", device="cpu", threads=2, runner="V1", seconds_to_start=61.4)
    targets = vllm_targets("200m")
    return VllmResult(
        settings=VllmSettings(streams=(1, 16), rounds=3),
        where=Where(device="cpu", dtype="bfloat16"),
        parameters={"base": 800, "full ARM": 100},
        engines=dict.fromkeys(VLLM_CONTESTANTS, facts),
        tokens_per_second=RATES,
        figures=[Figure(name=n, values=row, target=targets.get(n)) for n, row in vllm_ratios(RATES).items()],
    )


def test_ratios_are_taken_round_by_round() -> None:
    found = vllm_ratios(RATES)
    assert found[over_plain(VLLM_FULL, 1)] == [0.9, 0.75, 0.9]
    assert found[over_plain(VLLM_LORA, 1)] == [0.8, 0.9, 0.9]
    assert found[over_plain(VLLM_MERGED, 16)] == [1.0, 1.0, 1.0]
    assert found[shared_over_merged(1)] == [2.0, 2.0, 3.0]
    assert len(found) == 5 * 2 + 2


def test_every_target_belongs_to_a_figure() -> None:
    targets = vllm_targets("200m")
    assert set(targets) <= set(vllm_ratios(RATES))
    assert {name: str(targets[over_plain(name, 1)]) for name in (VLLM_FULL, VLLM_LORA, VLLM_MERGED)} == {
        VLLM_FULL: "≥ 0.80",
        VLLM_LORA: "≥ 0.85",
        VLLM_MERGED: "≥ 0.45",
    }
    assert str(targets[over_plain(VLLM_FULL, 16)]) == "≥ 0.75"
    assert str(targets[over_plain(VLLM_HEAD, 16)]) == "≥ 0.95"
    assert vllm_targets("tiny") == {}


def test_the_step_with_the_prompts_is_left_out() -> None:
    steps = [(7.0, 3), (7.5, 6), (8.0, 9), (9.0, 12)]
    assert decode_rate(steps, 3) == 4.5


def test_the_report_says_all(result: VllmResult, tmp_path: Path) -> None:
    circumstances = Circumstances(
        machine=this_machine("cpu"), date=datetime.date(2026, 11, 25), code="genarm 0.1.0, commit 1234567"
    )
    write_report(tmp_path, result, circumstances, as_markdown(result, circumstances))
    page = (tmp_path / "vllm.md").read_text(encoding="utf-8")
    assert page == as_markdown(result, circumstances)
    record = json.loads((tmp_path / "vllm.json").read_text(encoding="utf-8"))
    for figure in record["figures"]:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {figure['name']} |"))
        assert f"| {figure['median']:.3f} [" in line
        assert line.endswith({None: "| – |", True: "| yes |", False: "| no |"}[figure["met"]])
    lora = f"| {over_plain(VLLM_LORA, 1)} | 0.900 [0.800 to 0.900] | ≥ 0.85 | yes |"
    assert lora in page
    assert f"| {VLLM_PLAIN} | 20.0 [10.0 to 40.0] | 100.0 [50.0 to 100.0] | 61 |" in page
    assert record["tokens_per_second"]["1"][VLLM_FULL] == [9.0, 15.0, 36.0]
    told = ("2026-11-25", "commit 1234567", "base 800 parameters", "vLLM 0.32.0 (compiled, model runner V1, on cpu)")
    for words in (*told, f"`{record['command']}`", f"torch {record['machine']['torch']}"):
        assert words in page


@pytest.mark.parametrize("eager", [True, False])
def test_the_command_that_is_noted_measures_the_same(eager: bool) -> None:
    settings = VllmSettings(dtype="float32", streams=(2, 8), rounds=3, tokens=24, eager=eager, seed=5)
    program, *words = shlex.split(command(settings))
    assert program == "genarm"
    arguments = build_parser().parse_args(words)
    given = {name: getattr(arguments, name) for name in VllmSettings.__dataclass_fields__}
    assert VllmSettings(**{**given, "streams": tuple(given["streams"])}) == settings


def test_entries_share_one_base_and_merging_is_right(tmp_path: Path) -> None:
    entries = write_entries(TINY, dtype=torch.float32, seed=0, root=tmp_path)
    assert tuple(entries) == VLLM_CONTESTANTS
    ids_BT = torch.arange(3, 30)[None]
    log_probs = {}
    with torch.no_grad():
        for name, entry in entries.items():
            model = AutoModelForCausalLM.from_pretrained(entry.folder, dtype=torch.float32)
            log_probs[name] = model(ids_BT).logits.log_softmax(-1)
    torch.testing.assert_close(log_probs[VLLM_LORA], log_probs[VLLM_MERGED], rtol=0, atol=2e-4)
    for name in (VLLM_FULL, VLLM_LORA, VLLM_TWO_LORAS, VLLM_HEAD):
        assert (log_probs[name] - log_probs[VLLM_PLAIN]).abs().max() > 0.01
    of = {name: entry.cache_bytes(10, 4) for name, entry in entries.items()}
    own = 10 * 4 * 2 * 64 * 6
    assert of == {
        VLLM_PLAIN: own,
        VLLM_FULL: own + 10 * 4 * 2 * 32 * 2,
        VLLM_LORA: 2 * own,
        VLLM_TWO_LORAS: 3 * own,
        VLLM_MERGED: 2 * own,
        VLLM_HEAD: own,
    }


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    settings = EngineSettings(
        model=str(tmp_path / "none"),
        device="cpu",
        dtype="float32",
        eager=True,
        positions=32,
        streams=1,
        batched_tokens=32,
        cache_bytes=2**20,
        memory_share=0.1,
        files=str(tmp_path / "files"),
        log=str(tmp_path / "log"),
    )
    with (
        pytest.raises(EngineFailure, match=r"vLLM with the base failed: \w+Error: "),  # no vLLM, or no such model
        remote_engine("the base", settings),
    ):
        pass
    assert "Traceback" in (tmp_path / "log").read_text()


MISTAKES = {
    "tokens": (["--tokens", "3"], "--tokens is 3; it must be from 8"),
    "rounds": (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
    "streams": (["--streams", "1", "0"], "--streams has 0; each must be at least 1"),
    "seed": (["--seed", "-1"], "--seed is -1"),
    "output": (["--output", str(Path(__file__).parent)], "already exists and is not empty"),
}


def said(words: list[str], capsys: Any) -> str:
    assert main(["bench", "vllm", "--base-shape", "tiny", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (line for line in captured.err.splitlines() if "error" in line)
    assert line.startswith("genarm bench: error: ")
    return line


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line(case: str, capsys: Any) -> None:
    words, message = MISTAKES[case]
    assert message in said(words, capsys)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(capsys: Any, tmp_path: Path) -> None:
    assert "pip install 'genarm[vllm]'" in said(["--output", str(tmp_path / "out")], capsys)
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm.vllm.vllm_version", lambda: "0.12.3")
    monkeypatch.setattr("genarm.lab.bench.vllm.vllm_version", lambda: "0.12.3")
    assert "vLLM 0.12.3 is installed" in said([], capsys)
