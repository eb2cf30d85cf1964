"""Members over several processes: tensor parallel and pipeline parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from builders.guided_vllm import Asked, agree, ask, engine, folder, members, oracle

REWARDS = {"helpful": "lora", "harmless": "lora2", "brief": "small_lora"}


@pytest.fixture(autouse=True)
def own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        # In eager mode the CPU build has no room for what a stage receives, for any model; compiled it has.
        pytest.param({"pipeline_parallel_size": 2, "enforce_eager": False}, marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline"],
)
def test_two_processes(tmp_path: Path, options: dict[str, Any]) -> None:
    rewards = REWARDS if "tensor_parallel_size" in options else {"helpful": "lora", "harmless": "lora2"}
    guided = folder(tmp_path, members(tmp_path), rewards)
    asked = [
        Asked(prompt=[7, 8, 9, 10]),
        Asked(prompt=list(range(6, 40)), weights={"helpful": -0.8, "harmless": 0.0}),
        Asked(prompt=[12], weights=dict.fromkeys(rewards, 0.0)),
        Asked(prompt=[13, 14, 15], weights=dict.fromkeys(rewards, 0.5)),
    ]
    with engine(guided, **options) as llm:
        outputs = ask(llm, asked)
    model = oracle(guided)
    for request, output in zip(asked, outputs, strict=True):
        agree(model, request, output)
