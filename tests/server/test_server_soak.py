"""Sixty-four clients for minutes, many of whom go away: every complete reply is its lone run, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoModelForCausalLM

from builders.processes import serving
from builders.tiny import SHARED, tiny_lora
from genarm import compose

CLIENTS = 64
WORDS = [
    "please",
    "tell",
    "me",
    "how",
    "to",
    "make",
    "good",
    "tea",
    "for",
    "a",
    "friend",
    "who",
    "is",
    "ill",
    "and",
    "not",
]


@dataclass
class Seen:
    """What the clients saw."""

    replies: dict[int, set[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def made_up(generator: random.Random) -> dict[str, Any]:
    question = " ".join(generator.choices(WORDS, k=generator.randint(1, 40)))
    return {
        "model": "guided",
        "messages": [{"role": "user", "content": question}],
        "reward_weights": {"odd": generator.choice([0, 0.5, 1, -0.5])},
        "max_tokens": generator.randint(1, 60),
        "temperature": generator.choice([0, 0.8, 1.2]),
        "seed": generator.randrange(2**40),
        "stop": generator.choice([None, None, "."]),
        "logprobs": generator.random() < 0.3,
    }


async def client(http: httpx2.AsyncClient, asked: list[dict[str, Any]], seed: int, until: float, seen: Seen) -> None:
    generator = random.Random(seed)
    while time.monotonic() < until:
        index = generator.randrange(len(asked))
        leave = generator.choice([None, None, None, 0, 1, 5, 20])
        began = last = time.perf_counter()
        pieces: list[str] = []
        ended = "left"
        async with http.stream("POST", "/v1/chat/completions", json={**asked[index], "stream": True}) as stream:
            assert stream.status_code == 200, await stream.aread()
            async for line in stream.aiter_lines():
                if not line:
                    continue
                if line == "data: [DONE]":
                    ended = "complete"
                    break
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                if piece:
                    now = time.perf_counter()
                    (seen.gaps if pieces else seen.first).append(now - (last if pieces else began))
                    last = now
                    pieces.append(piece)
                if len(pieces) == leave:
                    break
        seen.ends[ended] += 1
        if ended == "complete":
            seen.replies.setdefault(index, set()).add("".join(pieces))


async def crowd(url: str, asked: list[dict[str, Any]], seconds: float, seen: Seen) -> None:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(http, asked, seed, until, seen) for seed in range(CLIENTS)))


def resident(pid: int) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def gauge(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def percentiles(values: list[float]) -> str:
    ordered = sorted(values)
    at = {p: ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 90, 99)}
    return ", ".join(f"p{p} {1000 * value:.1f} ms" for p, value in at.items())


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models" / "lm-tiny").exists(), reason="needs shared/models/lm-tiny")
@pytest.mark.parametrize("seconds", [120.0])
def test_a_crowd(tmp_path: Path, seconds: float) -> None:
    path = SHARED / "models" / "lm-tiny"
    tiny_lora(AutoModelForCausalLM.from_pretrained(path), tmp_path / "odd", seed=3, base_path=str(path))
    compose(path, {"odd": tmp_path / "odd"}, tmp_path / "guided")
    generator = random.Random(0)
    asked = [made_up(generator) for _ in range(150)]
    with serving(tmp_path / "guided", "--streams", "16", "--queue", "100") as (process, url, _):
        warm, seen = Seen(), Seen()
        asyncio.run(crowd(url, asked, seconds / 4, warm))
        before = resident(process.pid)
        asyncio.run(crowd(url, asked, seconds, seen))
        time.sleep(1)
        after = resident(process.pid)
        assert gauge(url, "genarm_running") == gauge(url, "genarm_queue") == 0
        with httpx2.Client(base_url=url, timeout=60) as http:
            for index, replies in seen.replies.items():
                alone = http.post("/v1/chat/completions", json=asked[index]).json()["choices"][0]["message"]["content"]
                assert replies == {alone}
        assert seen.ends["complete"] > 100
        assert seen.ends["left"] > 100
        assert after - before < 30, "MiB more after the crowd than before it"
        tokens = gauge(url, "genarm_generated_tokens_total")
    print(f"\n{dict(seen.ends)}, {tokens:.0f} tokens, memory {before:.0f} MiB before and {after:.0f} MiB after")
    print(f"time to first token: {percentiles(seen.first)}\nbetween tokens: {percentiles(seen.gaps)}")
