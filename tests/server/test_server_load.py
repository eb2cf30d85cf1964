"""Many clients at once, clients that go away, a full queue, and an engine that fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from starlette.requests import ClientDisconnect

from builders.serving import CHAT, Running, events, running
from genarm.engine import Request
from genarm.engine.reply_text import TextStream
from genarm.sampling import Sampling
from genarm.server.admission import Admission
from genarm.server.errors import ApiError

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(autouse=True)
def _at_full_pace(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").pace.seconds = 0.0


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": CHAT, "max_tokens": 100, "seed": 1, "logit_bias": {"1": -100}, **fields}


# --- together and alone ---------------------------------------------------------------------------------------------


def random_request(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """Anything that is allowed."""
    words = " ".join(f"w{generator.randrange(40)}" for _ in range(generator.randint(1, 12)))
    fields: dict[str, Any] = {
        "model": generator.choice(["tiny", "tiny@cautious", "tiny@helpful=-1", "tiny@plain"]),
        "max_tokens": generator.randint(1, 30),
        "seed": generator.randrange(-100, 2**40),
        "temperature": generator.choice([0, 0.7, 1, 1.5]),
        "top_p": generator.choice([1, 1, 0.8]),
        "presence_penalty": generator.choice([0, 0, 1]),
        "n": generator.choice([1, 1, 1, 2]),
        "stop": generator.choice([None, None, "w1", ["w3", "w2 w"]]),
        "return_rewards": generator.choice([False, False, True]),
        "stream": generator.choice([False, True]),
    }
    if generator.random() < 0.5:
        fields |= {"messages": [{"role": "user", "content": words}], "logprobs": generator.choice([False, True])}
        return CHATS, fields
    fields |= {"prompt": words, "logprobs": generator.choice([None, 2]), "echo": generator.choice([False, True])}
    return TEXTS, fields


def said(response: httpx2.Response) -> list[tuple[str, str, list[str]]]:
    """Text, end and labelled tokens of each choice, whether it came whole or in pieces."""
    assert response.status_code == 200, response.text
    streamed = response.headers["content-type"].startswith("text/event-stream")
    parts = events(response) if streamed else [response.json()]
    assert not streamed or parts.pop() == "[DONE]", parts
    choices: dict[int, tuple[list[str], list[str], list[str]]] = {}
    for part in parts:
        for choice in part["choices"]:
            texts, ends, tokens = choices.setdefault(choice["index"], ([], [], []))
            source = choice.get("message") or choice.get("delta")
            texts.append(choice["text"] if source is None else source.get("content", ""))
            ends.append(choice["finish_reason"] or "")
            logprobs = choice["logprobs"] or {}
            tokens += logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content", [])]
            tokens += [entry["token"] for entry in choice.get("rewards", [])]
    return [("".join(t), "".join(e), sorted(k)) for _, (t, e, k) in sorted(choices.items())]


def check_mixture(server: Running, seed: int, count: int) -> None:
    generator = random.Random(seed)
    asked = [random_request(generator) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda item: said(server.post(*item)), asked))
    for (path, fields), together in zip(asked, found, strict=True):
        alone = said(server.post(path, {**fields, "stream": not fields["stream"]}))
        assert together == alone, (path, fields)
    assert server.idle()


@pytest.mark.parametrize("seed", [0, 1])
def test_sixteen_mixed_requests_each_equal_their_lone_run(server: Running, seed: int) -> None:
    check_mixture(server, seed, 16)


# --- clients that go away -------------------------------------------------------------------------------------------


def generated(server: Running) -> float:
    return float(server.service.metrics.registry.get_sample_value("genarm_generated_tokens_total") or 0.0)


def open_stream(server: Running, stack: contextlib.ExitStack, path: str = CHATS, **fields: Any) -> Iterator[str]:
    """Lines of a stream that has begun."""
    client = stack.enter_context(server.http())
    asked = body(stream=True, **fields)
    return stack.enter_context(client.stream("POST", path, json=asked)).iter_lines()


def raw_request(server: Running, fields: dict[str, Any], path: str = CHATS) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(fields).encode()
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_that_is_left_frees_its_slots(server: Running, n: int) -> None:
    server.pace.seconds = 0.02
    before = generated(server)
    with contextlib.ExitStack() as stack:
        lines = open_stream(server, stack, n=n)
        for _ in range(12):
            next(lines)
    assert server.idle(1.0)
    assert generated(server) - before < 60 * n  # of 100 each


@pytest.mark.parametrize("path", [CHATS, TEXTS])
def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_slot(server: Running, path: str) -> None:
    server.pace.seconds = 0.02
    fields = (
        body() if path == CHATS else {"model": "tiny", "prompt": "w1", "max_tokens": 100, "logit_bias": {"1": -100}}
    )
    before = generated(server)
    connection = raw_request(server, fields, path)
    until = time.monotonic() + 5
    while generated(server) - before < 3 and time.monotonic() < until:
        time.sleep(0.01)
    connection.close()
    assert server.idle(1.0)
    assert 3 <= generated(server) - before < 60


def test_a_client_that_leaves_the_queue_never_runs(server: Running) -> None:
    def now() -> tuple[int, int, int]:
        load = server.backend.load()
        return load.running, load.waiting, server.service.admission.inside

    server.pace.seconds = 0.03
    with contextlib.ExitStack() as stack:
        streams = [open_stream(server, stack, seed=i) for i in range(4)]
        wait_until(lambda: now() == (4, 0, 4))
        waiting = [raw_request(server, body(stream=stream)) for stream in (True, False)]
        wait_until(lambda: now() == (4, 2, 6))
        for connection in waiting:
            connection.close()
        wait_until(lambda: now() == (4, 0, 4), 1.5)
        assert [next(lines)[:5] for lines in streams] == ["data:"] * 4
    assert server.idle()


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending to it takes for ever, as it does once the buffers between are full."""
    import genarm.server.job as job

    async def events_of(running_job: job.Job) -> AsyncGenerator[str]:
        async for _ in running_job.events():
            yield "data: x\n\n"

    async def main(server: Running) -> float:
        request = Request(prompt=[7, 8], sampling=Sampling(max_new_tokens=100), ignore_eos=True)
        mine = job.Job(server.service, asyncio.get_running_loop().time())
        mine.enter(1)
        await mine.begin([request])
        stream = job.JobResponse(mine, events_of(mine), headers={})
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 3:
                await asyncio.Event().wait()

        began = time.monotonic()
        with pytest.raises(ClientDisconnect):
            await stream.stream_response(send)
        assert len(sent) == 4
        return time.monotonic() - began

    monkeypatch.setattr(job, "SLOW_READER", 0.2)
    with running(timeout=0.2) as server:
        assert 0.3 <= asyncio.run(main(server)) < 5
        assert server.idle()


# --- a full house ---------------------------------------------------------------------------------------------------


def test_a_full_queue() -> None:
    with running(streams=1, queue=1) as server, contextlib.ExitStack() as stack:
        server.pace.seconds = 0.01
        first, second = (open_stream(server, stack, seed=i) for i in range(2))
        next(first), next(second)
        for fields in ({}, {"stream": True}):
            response = server.post(CHATS, body(**fields))
            assert response.status_code == 429
            assert 1 <= int(response.headers["retry-after"]) <= 60
            error = response.json()["error"]
            assert error["message"].startswith("the server is full: 2 replies run or wait, and it takes 2 at most")
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        with pytest.raises(openai.RateLimitError, match="server is full"):
            server.openai().completions.create(model="tiny", prompt="w1")
        assert server.post(CHATS, body(n=3)).status_code == 400  # more than there will ever be room for
        with server.http() as client:
            metrics = client.get("/metrics").text
            assert "genarm_running 1.0" in metrics
            assert "genarm_queue 1.0" in metrics
        server.pace.seconds = 0.0
        assert [list(lines)[-2] for lines in (first, second)] == ["data: [DONE]"] * 2
        assert server.post(CHATS, body(max_tokens=1)).status_code == 200


def test_admission_counts_and_estimates() -> None:
    admission = Admission(streams=2, queue=2)
    tickets = [admission.enter(1), admission.enter(3)]
    with pytest.raises(ApiError, match="4 replies run or wait") as full:
        admission.enter(2)
    assert full.value.headers() == {"Retry-After": "5"}  # two more, on two streams, at a first guess of 5 s
    tickets[1].close()
    assert admission.inside == 1
    with pytest.raises(ApiError) as full:
        admission.enter(4)
    assert full.value.headers() == {"Retry-After": "3"}  # what was broken off does not count
    for ticket in tickets:
        ticket.close()
        ticket.close()
        ticket.give_back()
    assert admission.inside == 0
    for _ in range(100):
        admission.enter(1).give_back()  # in no time
    admission.enter(4)
    with pytest.raises(ApiError) as full:
        admission.enter(1)
    assert full.value.headers() == {"Retry-After": "1"}


def test_timeouts() -> None:
    with running(streams=1, timeout=1.0) as server:
        server.pace.seconds = 0.02
        whole = server.post(CHATS, body())
        assert whole.status_code == 504
        assert "took longer than 1 seconds" in whole.json()["error"]["message"]
        found = events(server.post(CHATS, body(stream=True)))
        assert found[-1]["error"]["code"] == "timeout"
        assert len(found) > 3
        assert server.idle(1.0)
        server.pace.seconds = 0.0
        assert server.post(CHATS, body(max_tokens=2)).status_code == 200


# --- failures -------------------------------------------------------------------------------------------------------


def test_an_exception_in_one_request_ends_that_one_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = TextStream.add

    def add(self: TextStream, token: int, **how: bool) -> str:
        if [search._stop for search in self._stops] == ["victim"] and self._shown._length > 9:
            raise ArithmeticError("a secret of the server")
        return usual(self, token, **how)

    expected = said(server.post(CHATS, body()))
    monkeypatch.setattr(TextStream, "add", add)
    server.pace.seconds = 0.005
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.post, CHATS, body()) for _ in range(2)]
        victims = [pool.submit(server.post, CHATS, body(stop="victim", stream=stream)) for stream in (False, True)]
    whole, streamed = (victim.result() for victim in victims)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "failure"
    assert events(streamed)[-1]["error"]["code"] == "failure"
    assert "secret" not in whole.text + streamed.text
    assert [said(other.result()) for other in others] == [expected] * 2
    assert server.backend.state == "ok"
    assert server.idle()


def fail_after(steps: int) -> Callable[[], None]:
    left = [steps]

    def at_step() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("on fire")

    return at_step


def test_an_engine_that_fails_is_started_again_once() -> None:
    go_on = threading.Event()
    with running(streams=2) as server:
        expected = said(server.post(CHATS, body()))
        server.pace.at_make = lambda: go_on.wait(30) and None
        server.pace.at_step, server.pace.seconds = fail_after(30), 0.002
        with ThreadPoolExecutor(4) as pool:  # two run and two wait
            asked = [pool.submit(server.post, CHATS, body(stream=i % 2 == 0, n=1 + i // 2)) for i in range(3)]
            answers = [one.result() for one in asked]
        for answer in answers:
            streamed = answer.headers["content-type"].startswith("text/event-stream")
            error = (events(answer)[-1] if streamed else answer.json())["error"]
            assert error["code"] == "engine_failure"
            assert "on fire" in error["message"]
            assert answer.status_code == (200 if streamed else 503)
        # it is being started again: not ready, and nothing is taken
        with server.http() as client:
            ready = client.get("/ready")
            assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
            assert "starting again" in ready.json()["error"]["message"]
            assert client.get("/health").status_code == 200
            assert "genarm_ready 0.0" in client.get("/metrics").text
        refused = server.post(CHATS, body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failure")
        assert server.service.admission.inside == 0
        server.pace.seconds = 0.0
        go_on.set()
        wait_until(lambda: server.backend.state == "ok")
        assert said(server.post(CHATS, body())) == expected
        assert len(server.made) == 2
        assert server.idle()
        # a second failure is the last one
        server.pace.at_step = fail_after(5)
        assert server.post(CHATS, body()).status_code == 503
        server.pace.at_step = None
        assert server.backend.state == "failed"
        assert server.post(CHATS, body()).status_code == 503
        with server.http() as client:
            assert client.get("/ready").status_code == 503
            assert "genarm_engine_restarts_total 1.0" in client.get("/metrics").text
        assert len(server.made) == 2


def test_an_engine_that_cannot_be_started_again() -> None:
    def at_make() -> None:
        raise RuntimeError("the disk is gone")

    with running() as server:
        server.pace.at_make, server.pace.at_step = at_make, fail_after(3)
        assert server.post(CHATS, body()).status_code == 503
        wait_until(lambda: server.backend.state == "failed")
        answer = server.post(CHATS, body())
        assert (answer.status_code, "the disk is gone" in answer.text) == (503, True)


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
