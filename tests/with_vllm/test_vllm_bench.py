"""`genarm bench vllm` from start to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from genarm.cli.main import main
from genarm.lab.bench.figures import VLLM_CONTESTANTS, VLLM_LORA, VLLM_PLAIN, over_plain


def test_everything_is_measured_in_every_round(tmp_path: Path, capfd: Any) -> None:
    words = ["--base-shape", "tiny", "--dtype", "float32", "--eager", "--tokens", "8", "--rounds", "1"]
    assert main(["bench", "vllm", *words, "--streams", "1", "3", "--output", str(tmp_path / "out")]) == 0
    captured = capfd.readouterr()
    assert captured.out == (tmp_path / "out" / "vllm.md").read_text(encoding="utf-8")  # and nothing of vLLM's
    assert "round 1 of 1" in captured.err
    record = json.loads((tmp_path / "out" / "vllm.json").read_text(encoding="utf-8"))
    assert list(record["engines"]) == list(VLLM_CONTESTANTS)
    rates = record["tokens_per_second"]
    assert list(rates) == ["1", "3"]
    assert all(len(row) == 1 and row[0] > 0 for rows in rates.values() for row in rows.values())
    figures = {figure["name"]: figure for figure in record["figures"]}
    assert figures[over_plain(VLLM_LORA, 3)]["values"] == [rates["3"][VLLM_LORA][0] / rates["3"][VLLM_PLAIN][0]]
