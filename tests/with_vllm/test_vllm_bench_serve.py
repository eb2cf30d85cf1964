"""`vllm bench serve`, vLLM's own load on a server, pointed at ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from builders.serving import TOKENIZER, running


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_vllm_bench_serve(backend: str, path: str, tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    with running() as server:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", backend]
        command += ["--base-url", server.url, "--endpoint", path, "--model", "tiny"]
        command += ["--tokenizer", str(tmp_path / "tokenizer"), "--dataset-name", "random", "--ignore-eos"]
        command += [
            "--random-input-len",
            "8",
            "--random-output-len",
            "6",
            "--num-prompts",
            "5",
            "--max-concurrency",
            "2",
        ]
        command += ["--extra-body", json.dumps({"reward_weights": {"helpful": 2.0}})]
        command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert server.idle()
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (5, 0)
    assert found["total_output_tokens"] == 5 * 6
