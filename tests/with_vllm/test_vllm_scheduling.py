"""Whatever vLLM's scheduler does, every request gets what it would get alone, with its own weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from builders.guided_vllm import Asked, agree, ask, engine, folder, members, oracle

REWARDS = {"helpful": "lora", "arm": "small"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True},
    "no prefix caching": {"enable_prefix_caching": False},
    "chunked prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True},
    "preemption": {"num_gpu_blocks_override": 10, "max_num_seqs": 8, "disable_log_stats": False},
    "two at once": {"max_num_seqs": 2},
}


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guided")
    return folder(root, members(root), REWARDS)


def traffic(seed: int, count: int) -> list[Asked]:
    """Requests of all lengths; many begin alike, so that a prefix cache is used, with other weights as well."""
    chance = random.Random(seed)
    common = [chance.randrange(6, 46) for _ in range(64)]
    asked = []
    for _ in range(count):
        own = [chance.randrange(6, 46) for _ in range(chance.randrange(1, 20))]
        prompt = common[: chance.choice([0, 0, 33, 64])] + own
        weights = {
            name: chance.choice([0.0, 0.5, 1.0, -1.0, chance.uniform(-2, 2)])
            for name in REWARDS
            if chance.random() < 0.8
        }
        asked.append(Asked(prompt=prompt, weights=weights or None, tokens=chance.randrange(1, 30)))
    return asked


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_requests_that_come_and_go(guided: Path, schedule: str) -> None:
    asked = traffic(seed=len(schedule), count=24)
    chance = random.Random(1)
    finished: dict[str, Any] = {}
    with engine(guided, **SCHEDULES[schedule]) as llm:
        waiting = list(enumerate(asked))
        core = llm.llm_engine
        while waiting or core.has_unfinished_requests():
            for _ in range(min(len(waiting), chance.choice([0, 0, 1, 3]))):
                i, request = waiting.pop(0)
                core.add_request(str(i), {"prompt_token_ids": list(request.prompt)}, request.sampling)
            for output in core.step():
                if output.finished:
                    finished[output.request_id] = output
        if schedule == "preemption":
            counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
            assert counts["vllm:num_preemptions"] > 0
        if schedule == "prefix caching":
            assert sum(output.num_cached_tokens or 0 for output in finished.values()) > 0
    model = oracle(guided)
    assert len(finished) == len(asked)
    for i, request in enumerate(asked):
        agree(model, request, finished[str(i)])


def test_a_request_that_is_taken_back_leaves_its_row_to_others(guided: Path) -> None:
    asked = traffic(seed=5, count=8)
    with engine(guided, max_num_seqs=8) as llm:
        core = llm.llm_engine
        ids = [
            core.add_request(str(i), {"prompt_token_ids": list(request.prompt)}, request.sampling) or str(i)
            for i, request in enumerate(asked)
        ]
        finished: dict[str, Any] = {}
        for step in range(200):
            if step == 3:
                core.abort_request([ids[0], ids[3]])
            for output in core.step():
                if output.finished:
                    finished[output.request_id] = output
            if not core.has_unfinished_requests():
                break
        again = ask(llm, asked[:1])[0]
    model = oracle(guided)
    for i, request in enumerate(asked):
        if i not in (0, 3):
            agree(model, request, finished[str(i)])
    agree(model, asked[0], again)
