"""Members that vLLM compiles; in a file of its own, as it takes as long as many others."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from builders.guided_vllm import Asked, agree, ask, engine, folder, members, oracle


def test_compiled(tmp_path: Path) -> None:
    guided = folder(tmp_path, members(tmp_path), {"helpful": "lora", "arm": "small"})
    asked = [Asked(prompt=[7, 8, 9, 10]), Asked(prompt=list(range(6, 40)), weights={"helpful": -0.8}, tokens=30)]
    with engine(guided, enforce_eager=False) as llm:
        outputs = ask(llm, asked)
    model = oracle(guided)
    for request, output in zip(asked, outputs, strict=True):
        agree(model, request, output)
