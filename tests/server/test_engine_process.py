"""The engine in a process of its own, beside one in this process: the same events, errors and ends."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builders import engines_elsewhere as engines
from builders.engines_elsewhere import BAD_WORD, make_engine
from builders.processes import children
from builders.serving import CHAT, CONTEXT
from genarm import errors
from genarm.engine import Completion, Engine, Request, Token
from genarm.errors import EngineFailure, GenarmError, MemberError
from genarm.model.wishes import Wish
from genarm.sampling import Sampling
from genarm.server.backend import ProcessBackend
from genarm.server.engine_process import EngineProcess

IDS = {"warm": 0.0}
"""Weights of requests in token ids, in which a wish has no place."""
LONG = Request(prompt=[3, 4], weights=IDS, sampling=Sampling(max_new_tokens=100), ignore_eos=True)

REQUESTS = {
    "ids": Request(prompt=[3, 4, 5], weights=IDS, sampling=Sampling(max_new_tokens=9), seed=1),
    "text": Request(prompt="w1 w2", sampling=Sampling(max_new_tokens=9, temperature=0.7), seed=2, ignore_eos=True),
    "a conversation": Request(prompt=CHAT, sampling=Sampling(max_new_tokens=5), top_log_probs=3),
    "weights and a bound": Request(
        prompt=[5], weights={"harmless": -0.5, **IDS}, max_kl=0.2, sampling=Sampling(max_new_tokens=6), seed=3
    ),
    "the prompt's numbers": Request(
        prompt=[3, 4, 5], weights=IDS, prompt_log_probs=2, sampling=Sampling(max_new_tokens=3)
    ),
    "the prompt's numbers alone": Request(prompt=[3, 4, 5], weights=IDS, prompt_log_probs=0, reply=False),
    "a wish of its own": Request(
        prompt="w1 w2", wishes=[Wish(text="w5 w6", weight=1.5)], sampling=Sampling(max_new_tokens=6), seed=4
    ),
    "a stop": Request(prompt=[6], weights=IDS, stop=["w1", "w2", "w3"], sampling=Sampling(max_new_tokens=30), seed=5),
    "greedy and biased": Request(
        prompt=[6],
        weights=IDS,
        sampling=Sampling(max_new_tokens=7, temperature=0, logit_bias={9: 3.0}),
        stop_token_ids=[11],
    ),
}

WRONG = {
    "an empty prompt": Request(prompt=[]),
    "too long": Request(prompt=[3] * CONTEXT),
    "an id that is none": Request(prompt=[10**6]),
    "an unknown reward": Request(prompt=[3], weights={"funny": 1.0}),
    "a weight that is no number": Request(prompt=[3], weights={"harmless": float("nan")}),
    "a negative seed": Request(prompt=[3], seed=-1),
    "too many wishes": Request(prompt="w1", wishes=[Wish(text="w5", weight=1.0)] * 3),
    "a bias of no token": Request(prompt=[3], sampling=Sampling(logit_bias={10**6: 1.0})),
}


@pytest.fixture(scope="module")
def remote() -> Iterator[EngineProcess]:
    engine = EngineProcess(make_engine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def local() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def drawn(engine: Any, request: Request) -> tuple[list[Token], Any, Completion]:
    stream = engine.stream(request)
    return list(stream), stream.prompt, stream.completion


def gone(pid: int, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8"):
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", REQUESTS)
def test_the_same_events(kind: str, remote: EngineProcess, local: Engine) -> None:
    """Tokens with all their numbers, the prompt's, and the whole reply, are those of an engine in this process."""
    tokens, prompt, completion = drawn(remote, REQUESTS[kind])
    assert (tokens, prompt, completion) == drawn(local, REQUESTS[kind])
    assert completion.tokens == tuple(tokens)


def test_many_at_once_in_an_event_loop(remote: EngineProcess, local: Engine) -> None:
    """More than there are streams, in one loop: each reply is that of its request."""
    asked = [*REQUESTS.values()] * 3

    async def read(request: Request) -> tuple[list[Token], Completion | None]:
        stream = remote.stream(request)
        return [token async for token in stream], stream.completion

    async def read_all() -> list[tuple[list[Token], Completion | None]]:
        return await asyncio.gather(*map(read, asked))

    for (tokens, completion), request in zip(asyncio.run(read_all()), asked, strict=True):
        alone, _, whole = drawn(local, request)
        assert [token.id for token in tokens] == [token.id for token in alone]
        assert completion is not None
        assert (completion.text, completion.ending) == (whole.text, whole.ending)


@pytest.mark.parametrize("kind", WRONG)
def test_the_same_errors(kind: str, remote: EngineProcess, local: Engine) -> None:
    with pytest.raises(GenarmError) as here:
        local.stream(WRONG[kind])
    with pytest.raises(type(here.value)) as there:
        remote.stream(WRONG[kind])
    assert type(there.value) is type(here.value)
    assert str(there.value) == str(here.value)


def test_every_error_of_ours_keeps_its_words() -> None:
    """Whatever way an error is made, it comes back with its message, and with its class where that is possible."""
    from genarm.server.engine_process import _pickled

    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, GenarmError | EngineFailure):
            error = kind("serve", "fastapi") if kind is errors.MissingExtraError else kind("words")
            back = pickle.loads(_pickled(error))
            assert str(back) == str(error)
            assert isinstance(back, GenarmError) == isinstance(error, GenarmError)


def test_cancelled(remote: EngineProcess) -> None:
    """Its end comes, and its place is free; what has ended already is no matter."""
    stream = remote.stream(LONG)
    tokens = iter(stream)
    next(tokens)
    stream.cancel()
    left = len(list(tokens))
    assert stream.completion is not None
    assert stream.completion.ending == "cancelled"
    assert left < 100
    stream.cancel()
    drawn(remote, REQUESTS["ids"])
    until = time.monotonic() + 5
    while remote.statistics().running and time.monotonic() < until:
        time.sleep(0.01)
        drawn(remote, REQUESTS["ids"])
    assert not remote._replies


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (engines.refuse, MemberError, "there is no such model; look again"),
        (engines.refuse_for_an_extra, GenarmError, r"pip install 'genarm\[serve\]'"),
        (engines.be_killed, EngineFailure, "SIGKILL ended it, which is what a machine without memory left does"),
        (engines.leave, EngineFailure, "did not start: exit status 3"),
    ],
)
def test_an_engine_that_cannot_be_made(make: Callable[[], Engine], error: type[Exception], words: str) -> None:
    before = set(children(os.getpid()))
    with pytest.raises(error, match=words):
        EngineProcess(make)
    assert set(children(os.getpid())) <= before


def test_killed_and_started_again_once() -> None:
    """Replies end with a failure that says how the process ended; the next engine answers, and there is no third."""
    backend = ProcessBackend(functools.partial(make_engine, speculate=0))

    async def read(request: Request) -> list[Any]:
        return [event async for event in backend.submit(request)]

    async def read_and_kill(request: Request) -> None:
        reply = backend.submit(request)
        async for _ in reply:
            assert backend._engine is not None
            backend._engine._process.kill()

    try:
        for state in ("ok", "failed"):
            with pytest.raises(EngineFailure, match="SIGKILL ended it"):
                asyncio.run(read_and_kill(LONG))
            until = time.monotonic() + 60
            while backend.state == "starting again" and time.monotonic() < until:
                time.sleep(0.05)
            assert backend.state == state
            if state == "ok":
                assert isinstance(asyncio.run(read(REQUESTS["ids"]))[-1], Completion)
        with pytest.raises(EngineFailure, match="SIGKILL"):
            backend.submit(LONG)
    finally:
        backend.close()


def test_killed_while_it_had_nothing_to_do() -> None:
    """Nobody has to ask for it first: the state says so, and the next engine answers."""
    backend = ProcessBackend(functools.partial(make_engine, speculate=0))

    async def read(request: Request) -> list[Any]:
        return [event async for event in backend.submit(request)]

    try:
        assert backend._engine is not None
        backend._engine._process.kill()
        until = time.monotonic() + 60
        while (backend.restarts == 0 or backend.state != "ok") and time.monotonic() < until:
            time.sleep(0.05)
        assert (backend.restarts, backend.state) == (1, "ok")
        assert isinstance(asyncio.run(read(REQUESTS["ids"]))[-1], Completion)
    finally:
        backend.close()


def test_a_step_that_fails() -> None:
    """All that ran ends with its failure, whose words are the engine's."""
    engine = EngineProcess(engines.make_engine_that_fails)
    try:
        other = engine.stream(LONG)
        next(iter(other))
        with pytest.raises(EngineFailure, match="a step failed: RuntimeError: a bad word"):
            list(engine.stream(Request(prompt=[BAD_WORD], weights=IDS, sampling=Sampling(max_new_tokens=3))))
        with pytest.raises(EngineFailure, match="a bad word"):
            list(other)
    finally:
        engine.close()


def test_closed_while_it_runs() -> None:
    engine = EngineProcess(make_engine)
    stream = engine.stream(LONG)
    pid = engine._process.pid
    assert pid is not None
    engine.close()
    with pytest.raises(EngineFailure, match="the engine was closed"):
        list(stream)
    with pytest.raises(EngineFailure, match="the engine was closed"):
        engine.stream(LONG)
    assert gone(pid)
    engine.close()


PROGRAM = """
import signal, sys, time
from builders.engines_elsewhere import make_engine
from genarm.server.engine_process import EngineProcess
if __name__ == "__main__":
    engine = EngineProcess(make_engine)
    print(engine._process.pid, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "an end without close"])
def test_it_ends_with_its_program(end: str, tmp_path: Path) -> None:
    """However that ends; and neither Ctrl-C nor SIGTERM to the process itself ends it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    waits = end.startswith("SIG")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(program), "wait" if waits else "end"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        if waits:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
            assert not gone(pid, 0.5)
            process.send_signal(signal.Signals[end])
        process.wait(30)
        assert gone(pid)
