"""Random traffic: every reply is what it would be alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from builders.tiny import tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, EngineOptions, Request
from genarm.sampling import Sampling

TOKENIZER = tiny_tokenizer()
CONTEXT = 64


@pytest.fixture(scope="module")
def model() -> GuidedForCausalLM:
    """A base of four layers, a full ARM that is cheap enough to draft from, and a LoRA ARM."""
    base = tiny_model("llama", seed=0, layers=4)
    arm = tiny_model("llama", seed=1, layers=1, hidden=16)
    torch.manual_seed(2)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel(base, settings, adapter_name="kind")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return GuidedForCausalLM.from_members(base, {"full": arm, "kind": adapted}, weights={"full": 1.0, "kind": 0.5})


def random_request(generator: random.Random, longest: int = 24) -> Request:
    """Anything that a client may ask; beginnings repeat, so that rows are reused."""
    beginning = [[6] * 20, [7, 8, 9, 10], []][generator.randrange(3)]
    prompt = [*beginning, *(generator.randrange(6, 46) for _ in range(generator.randint(1, 18)))]
    sampling = Sampling(
        max_new_tokens=generator.randint(1, longest),
        temperature=generator.choice([0.0, 0.5, 1.0, 1.0, 1.5]),
        top_k=generator.choice([0, 0, 5]),
        top_p=generator.choice([1.0, 1.0, 0.8]),
        min_p=generator.choice([0.0, 0.0, 0.05]),
        presence_penalty=generator.choice([0.0, 0.0, 1.0]),
        frequency_penalty=generator.choice([0.0, 0.0, -0.5]),
        logit_bias=generator.choice([{}, {}, {7: 2.0}]),
    )
    return Request(
        prompt=prompt,
        weights=generator.choice(
            [{}, {"full": 0.0}, {"kind": 0.0}, {"full": 2.0, "kind": -0.5}, {"full": 0, "kind": 0}]
        ),
        sampling=sampling,
        seed=generator.randrange(2**40),
        stop=generator.choice([[], [], ["w1"], [" w2", "w30 w"]]),
        ignore_eos=generator.random() < 0.5,
        top_log_probs=generator.choice([0, 0, 3]),
    )


def idle(engine: Engine) -> bool:
    statistics = engine.statistics()
    rows = [len(trunk.kv_cache.rows) for trunk in engine._built.members.trunks]
    return not statistics.waiting and not statistics.running and list(statistics.free_rows) == rows


# --- every stream is its lone run -----------------------------------------------------------------------------------


def follow(engine: Engine, request: Request, leave: int | None, pause: float) -> Completion:
    """Begin after a pause, perhaps give up after some tokens."""
    time.sleep(pause)
    with engine.stream(request) as stream:
        for count, _ in enumerate(stream, start=1):
            if count == leave:
                stream.cancel()
        return stream.result()


def check_traffic(model: GuidedForCausalLM, seed: int, count: int) -> None:
    generator = random.Random(seed)
    options = EngineOptions(
        streams=generator.choice([1, 2, 3]),
        context=CONTEXT,
        speculate=generator.choice([2, 6]),
        chunk=generator.choice([6, 25, 256]),
    )
    requests = [random_request(generator) for _ in range(count)]
    leaves = [generator.choice([None, None, 1, 4]) for _ in requests]
    pauses = [generator.choice([0, 0, 0.01, 0.03]) for _ in requests]
    found: dict[int, Completion] = {}

    def client(i: int) -> None:
        found[i] = follow(engine, requests[i], leaves[i], pauses[i])

    with Engine(model, TOKENIZER, options) as engine:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == count
        assert idle(engine)
    drafted = 0
    for i, request in enumerate(requests):
        with Engine(model, TOKENIZER, replace(options, streams=1)) as engine:
            alone = engine.generate([request])[0]
        completion = found[i]
        drafted += alone.drafted
        if completion.ending == "cancelled":
            assert completion.token_ids == alone.token_ids[: len(completion.tokens)]
            assert alone.text.startswith(completion.text)
            assert leaves[i] is not None
        else:
            assert (completion.token_ids, completion.text, completion.ending) == (
                alone.token_ids,
                alone.text,
                alone.ending,
            )
            assert (completion.drafted, completion.accepted) == (alone.drafted, alone.accepted)
            for one, other in zip(completion.tokens, alone.tokens, strict=True):
                assert one.text == other.text
                assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
                assert one.rewards == pytest.approx(other.rewards, abs=1e-4)
                assert len(one.top) == request.top_log_probs
    assert drafted > 0


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(model: GuidedForCausalLM, seed: int) -> None:
    check_traffic(model, seed, count=14)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_random_traffic_for_long(model: GuidedForCausalLM, seed: int) -> None:
    check_traffic(model, seed, count=24)


# --- nothing is left behind -----------------------------------------------------------------------------------------


def by_threads(engine: Engine, generator: random.Random, count: int, workers: int = 4) -> list[Completion]:
    jobs = [(random_request(generator, 8), generator.choice([None, None, 0, 1, 3])) for _ in range(count)]
    found: list[Completion] = []

    def work(mine: list[tuple[Request, int | None]]) -> None:
        for request, leave in mine:
            stream = engine.stream(request)
            if leave == 0:
                stream.cancel()
            for seen, _ in enumerate(stream, start=1):
                if seen == leave:
                    stream.cancel()
            found.append(stream.result())

    threads = [threading.Thread(target=work, args=(jobs[i::workers],)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return found


async def by_tasks(engine: Engine, generator: random.Random, count: int, at_once: int = 16) -> list[Completion]:
    gate = asyncio.Semaphore(at_once)
    found: list[Completion] = []

    async def task(request: Request, leave: int | None) -> None:
        async with gate:
            with engine.stream(request) as stream:
                seen = 0
                async for _ in stream:
                    seen += 1
                    if seen == leave:
                        stream.cancel()
                assert stream.completion is not None
                found.append(stream.completion)

    tasks = [
        asyncio.create_task(task(random_request(generator, 8), generator.choice([None, None, 1, 3])))
        for _ in range(count)
    ]
    for victim in tasks[::10]:  # clients that go away without a word
        asyncio.get_running_loop().call_later(generator.random() * 0.2, victim.cancel)
    await asyncio.gather(*tasks, return_exceptions=True)
    for one in tasks:
        if not one.cancelled():
            assert one.exception() is None
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return found


def settled(engine: Engine) -> bool:
    """Cancelled requests end at the next step, a moment after their clients have gone."""
    for _ in range(200):
        if idle(engine):
            return True
        time.sleep(0.01)
    return False


def traced_memory(_: Counter[str]) -> int:
    """After the burst that these endings came from."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def check_soak(model: GuidedForCausalLM, count: int) -> None:
    generator = random.Random(count)
    threads = threading.active_count()
    with Engine(model, TOKENIZER, EngineOptions(streams=4, context=CONTEXT, speculate=3, chunk=32)) as engine:

        def burst(size: int) -> Counter[str]:
            found = by_threads(engine, generator, size)
            found += asyncio.run(by_tasks(engine, generator, size))
            assert settled(engine)
            return Counter(completion.ending for completion in found)

        burst(25)  # whatever is made once is made now
        assert threading.active_count() == threads + 1  # the engine's own
        tracemalloc.start()
        try:
            before = traced_memory(burst(25))
            endings = burst(count // 2)
            after = traced_memory(endings)
        finally:
            tracemalloc.stop()
        assert endings.total() >= 0.9 * count
        assert {*endings} == {"cancelled", "length", "stop"}
        assert after - before < 100_000 + 40 * count, f"{(after - before) / count:.0f} bytes per request stay behind"
        assert threading.active_count() == threads + 1
        last = [random_request(generator) for _ in range(5)]
        found = engine.generate(last)  # and it still works
    assert threading.active_count() == threads
    with Engine(model, TOKENIZER, EngineOptions(streams=1, context=CONTEXT, speculate=3)) as fresh:
        assert [c.token_ids for c in found] == [c.token_ids for c in fresh.generate(last)]


def test_soak(model: GuidedForCausalLM) -> None:
    check_soak(model, 200)


@pytest.mark.slow
def test_soak_for_long(model: GuidedForCausalLM) -> None:
    check_soak(model, 2000)


def test_an_engine_that_is_gone_leaves_no_memory(model: GuidedForCausalLM) -> None:
    """Closed engines, and one that ran nothing and was never closed, are collected with their KV caches."""
    import weakref

    caches: list[weakref.ref[Any]] = []
    for close in (True, False):
        engine = Engine(model, TOKENIZER, EngineOptions(streams=2, context=CONTEXT))
        if close:
            engine.generate([random_request(random.Random(0))])
            engine.close()
        caches += [weakref.ref(trunk.kv_cache) for trunk in engine._built.members.trunks]
        del engine
    gc.collect()
    assert [kv_cache() for kv_cache in caches] == [None] * len(caches)
