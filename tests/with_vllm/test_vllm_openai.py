"""vLLM's own server on a guided folder, with OpenAI's client: weights travel in `vllm_xargs`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM, compose

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

SHAPE: dict[str, Any] = {"hidden": 64, "num_key_value_heads": 2, "head_dim": 32}
OPTIONS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "128",
    "--block-size",
    "32",
    "--max-num-seqs",
    "4",
]
PROMPT = [7, 12, 9]
LENGTH = 10
PATIENCE = 240.0
"""Seconds for the server to start."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided folder: a base, a full ARM of another depth and a LoRA ARM."""
    root = tmp_path_factory.mktemp("openai")
    base, arm = tiny_model(seed=0, **SHAPE), tiny_model(seed=1, layers=1, **SHAPE)
    save_member(base, root / "base")
    save_member(arm, root / "arm")
    tiny_lora(base, root / "lora", seed=3, base_path=str(root / "base"))
    compose(root / "base", {"harmless": root / "arm", "helpful": root / "lora"}, root / "guided")
    return root / "guided"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    """Of `vllm serve FOLDER`; the CPU build has no such command, but the same module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(folder), "--served-model-name", "guided", *OPTIONS]
    log = (folder.parent / "log").open("w")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + PATIENCE
        while not _healthy(url):
            running = process.poll() is None and time.monotonic() < until
            assert running, (folder.parent / "log").read_text()
            time.sleep(0.3)
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.mark.parametrize("weights", [{}, {"helpful": 2.0}, {"harmless": 0.0, "helpful": 0.0}])
def test_streaming_with_weights(client: openai.OpenAI, folder: Path, weights: dict[str, float]) -> None:
    """A request's own weights, in OpenAI's client, against the same folder in transformers."""
    model = GuidedForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"reward_weights": weights} if weights else {}
    ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=LENGTH, **options)[0, len(PROMPT) :]
    extra = {"vllm_xargs": {"reward_weights": json.dumps(weights)}} if weights else {}
    stream = client.completions.create(
        model="guided", prompt=PROMPT, max_tokens=LENGTH, temperature=0, stream=True, extra_body=extra
    )
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text.strip() == tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_chats_too(client: openai.OpenAI) -> None:
    replies = [
        client.chat.completions.create(
            model="guided",
            messages=[{"role": "user", "content": "w1 w2"}],
            max_tokens=LENGTH,
            temperature=0,
            logit_bias={"1": -100},
            extra_body={"vllm_xargs": {"reward_weights": weights}},
        )
        for weights in ("helpful=3", "helpful=-1,harmless=0")
    ]
    texts = [reply.choices[0].message.content for reply in replies]
    assert texts[0]
    assert texts[1]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_xargs": {"reward_weights": json.dumps({"kind": 1})}}, "this model has: harmless, helpful"),
        ({"vllm_xargs": {"reward_weights": "kind=1"}}, "this model has: harmless, helpful"),
        ({"vllm_xargs": {"reward_weights": "{"}}, "no JSON"),
        ({"vllm_xargs": {"reward_weights": "helpful=nan"}}, "helpful=nan"),
        (
            {"vllm_xargs": {"reward_weights": json.dumps({"helpful": 2})}, "prompt_logprobs": 1},
            "default weights only",
        ),
        (
            {"vllm_xargs": {"reward_weights": json.dumps({"helpful": 2})}, "echo": True, "logprobs": 1},
            "default weights only",
        ),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    """With a 400 that says what is allowed; the server goes on."""
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(model="guided", prompt=PROMPT, max_tokens=2, extra_body=fields)
    assert client.completions.create(model="guided", prompt=PROMPT, max_tokens=2).choices[0].text is not None


def test_log_probs_of_the_prompt_have_the_default_weights(client: openai.OpenAI, folder: Path) -> None:
    model = GuidedForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answer = client.completions.create(model="guided", prompt=PROMPT, max_tokens=1, echo=True, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)
    mine = [float(log_probs[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert logprobs.token_logprobs[1 : len(PROMPT)] == pytest.approx(mine, abs=1e-4)
