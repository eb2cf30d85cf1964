"""`genarm bench vllm` from start to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from builders.guided_vllm import oracle
from genarm.cli.main import main
from genarm.lab.bench.contestants import make_task
from genarm.lab.bench.decode import Where
from genarm.lab.bench.figures import VLLM_CONTESTANTS, VLLM_LORA, VLLM_PLAIN, over_plain
from genarm.lab.bench.settings import VllmSettings
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.vllm import _options, decoding
from genarm.lab.bench.vllm_engine import remote_engine
from genarm.lab.bench.vllm_models import write_entries


@pytest.mark.slow
def test_a_contestant_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Its replies are those of transformers; its rate is taken from the steps that it tells."""
    settings = VllmSettings(base_shape="tiny", dtype="float32", eager=True, tokens=8, streams=(1, 3))
    entry = write_entries(SHAPES["tiny"], dtype=torch.float32, seed=0, root=tmp_path)[VLLM_LORA]
    task = make_task(prompts=6, prompt_tokens=32, tokens=8, vocabulary=SHAPES["tiny"].base.vocabulary, seed=0)
    where = Where(device="cpu", dtype="float32")
    options = _options(settings, where, entry, task, share=0.5, root=tmp_path)
    with remote_engine(VLLM_LORA, options) as engine:
        steps = engine.run(task.prompts[:3], 8)
        assert decoding(engine, task, 3)(1) > 0
        replies = engine.replies(task.prompts[:2], 8)
    assert (engine.facts.device, steps[-1][1]) == ("cpu", 3 * 8)
    model = oracle(entry.folder)
    for prompt, reply in zip(task.prompts, replies, strict=False):
        guided = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
        assert guided[0, len(prompt) :].tolist() == list(reply)


@pytest.mark.slow
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
