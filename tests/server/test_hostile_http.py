"""Requests that are made to harm: each is refused or bounded, and nobody else waits for it."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.serving import CHAT, CONTEXT, Running, running
from builders.tiny import TEMPLATE
from genarm.server import listen, texts
from genarm.server.bodies import Held, parse
from genarm.server.errors import ApiError
from genarm.server.log import PlainFormatter, Unhurried
from genarm.server.schema import ChatRequest, CompletionRequest
from genarm.server.workers import Worker

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
QUICK = 3.0
"""Seconds that another client's small request may take on a busy machine; without limits it was 14 to 80."""
HI: dict[str, Any] = {"model": "tiny", "prompt": "w1", "max_tokens": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever is given to a tokenizer."""
    found: list[Any] = []
    usual = texts.Texts.encode

    async def encode(self: texts.Texts, prompt: Any, *rest: Any, **options: Any) -> list[int]:
        found.append(prompt)
        return await usual(self, prompt, *rest, **options)

    monkeypatch.setattr(texts.Texts, "encode", encode)
    return found


@contextlib.contextmanager
def nobody_waits(server: Running) -> Iterator[None]:
    """Another client asks all the time, and is answered at once."""
    over, slowest = threading.Event(), [0.0]

    def ask() -> None:
        with server.http() as client:
            while not over.is_set():
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest[0] = max(slowest[0], time.monotonic() - began)
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        asking.result()
    assert slowest[0] < QUICK


@contextlib.contextmanager
def held(worker: Worker) -> Iterator[None]:
    """A worker that is busy with something else."""
    go_on, busy = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        go_on.wait(60)

    worker.begin(wait)
    assert busy.wait(10)
    try:
        yield
    finally:
        go_on.set()


def connect(server: Running, receive: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    return connection


def head(path: str, content: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- large bodies ---------------------------------------------------------------------------------------------------


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": CHAT, **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({**HI, **fields}).encode()


LARGE: dict[str, tuple[str, bytes, int, str]] = {
    "prompts x n": (TEXTS, text(prompt=["w1"] * 5000, n=128), 400, "asks for 640000 replies at once"),
    "many prompts": (TEXTS, text(prompt=["w1"] * 300_000), 400, "asks for 300000 replies at once"),
    "bad messages": (CHATS, chat(messages=[{"role": "x"}] * 150_000), 400, "has 150000 messages; .* up to 16384"),
    "some bad messages": (CHATS, chat(messages=[{"role": "x"}] * 16_000), 400, "you must provide|Input should"),
    "bad parts": (CHATS, chat(messages=[{"role": "user", "content": [{}] * 150_000}]), 400, "has 150000 parts"),
    "bad prompts": (TEXTS, text(prompt=[None] * 500_000), 400, "a text, a list of texts"),
    "bad stops": (TEXTS, text(stop=[None] * 500_000), 400, "a text or a list of up to 16"),
    "unknown fields": (
        TEXTS,
        text(**{f"x{i}": 0 for i in range(200_000)}),
        400,
        "argument supplied: x0; leave it out$",
    ),
    "weights": (TEXTS, text(reward_weights={f"x{i}": "a" for i in range(200_000)}), 400, "200000 weights"),
    "biases": (TEXTS, text(logit_bias={f"x{i}": "a" for i in range(200_000)}), 400, "200000 entries"),
    "objects": (TEXTS, b"[" + b"{}," * 2_500_000 + b"{}]", 400, "commas and brackets, .* up to 1000000"),
    "ids": (TEXTS, text(prompt=[7] * 900_000), 400, f"maximum context length is {CONTEXT}"),
    "lists of ids": (TEXTS, text(prompt=[[7] * 3000] * 60), 400, f"maximum context length is {CONTEXT}"),
    "long text": (TEXTS, text(prompt="w1 " * 2_300_000), 400, "6900000 characters, and this server reads up to 2048"),
    "long chat": (
        CHATS,
        chat(messages=[{"role": "user", "content": "w1 " * 2_300_000}]),
        400,
        "messages has 6900000 characters",
    ),
    "escapes": (TEXTS, b'{"model": "' + rb"\ud83d\ude00" * 600_000 + b'"}', 400, "you must provide prompt"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_bodies_are_refused_and_nobody_waits(server: Running, name: str, encoded: list[Any]) -> None:
    path, content, status, message = LARGE[name]
    with server.http() as client, nobody_waits(server):
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert re.search(message, response.json()["error"]["message"]), response.text
    assert not encoded  # nothing was tokenised
    assert server.service.admission.inside == 0
    assert len(response.content) < 3000


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_memory_does_not_stay(server: Running) -> None:
    content = chat(messages=[{"role": "x"}] * 150_000)
    headers = {"Content-Type": "application/json"}
    with server.http() as client:
        assert client.post(CHATS, content=content, headers=headers).status_code == 400
        before = resident()
        for _ in range(4):
            assert client.post(CHATS, content=content, headers=headers).status_code == 400
    assert resident() - before < 100 * 2**20  # it was 785 MB each


def test_long_names_are_not_echoed(server: Running) -> None:
    name = "k" * 3_000_000
    bodies: list[dict[str, Any]] = [
        {name: 1},
        {"model": name},
        {"model": f"tiny@{name}"},
        {"model": f"tiny@{name}=1"},
        {"model": f"tiny@helpful={name}"},
        {"reward_weights": {name: 1}},
        {"logit_bias": {name: 1}},
        {"stop": [name, 1]},
        {"stream_options": {name: 1}},
        {"seed": name},
        {"temperature": "1" * 3_000_000},
    ]
    for body in bodies:
        response = server.post(TEXTS, {**HI, **body})
        assert response.status_code in (400, 404)
        assert len(response.content) < 5000
        assert json.loads(response.content)["error"]["message"]


def test_bodies_are_read_within_a_budget() -> None:
    from genarm.server.bodies import Budget

    budget = Budget(100_000)
    first, second, small = Held(budget), Held(budget), Held(budget)
    first.add(b"x" * 90_000)
    small.add(b"x" * 20_000)  # always
    with pytest.raises(ApiError, match="takes 100000 at once; try again later") as full:
        second.add(b"x" * 50_000)
    assert full.value.status == 429
    for body in (first, second, small, first):
        body.release()
    assert budget.held == 0


# --- what happens before a reply ------------------------------------------------------------------------------------


def test_places_are_taken_on_arrival_and_small_requests_pass_large_ones() -> None:
    large = {**HI, "prompt": "w1 " * 20_000}  # refused in the end, but that takes reading it
    with running(streams=1, queue=2) as server, ThreadPoolExecutor(16) as pool:
        with held(server.service.workers.reader):
            waiting = [pool.submit(server.post, TEXTS, large) for _ in range(2)]
            wait_until(lambda: server.service.admission.inside == 2)
            assert server.post(TEXTS, HI).status_code == 200
            waiting.append(pool.submit(server.post, TEXTS, large))
            wait_until(lambda: server.service.admission.inside == 3)
            refused = [pool.submit(server.post, TEXTS, large) for _ in range(9)]
            assert [answer.result().status_code for answer in refused] == [429] * 9
        assert [answer.result().status_code for answer in waiting] == [400] * 3
        assert server.idle()
        with held(server.service.texts.long.worker):
            lengthy = {**HI, "prompt": "w1 " * 20}
            assert server.post(TEXTS, lengthy).status_code == 200


def test_the_time_for_a_request_begins_when_it_arrives() -> None:
    with running(timeout=0.5) as server, held(server.service.texts.short.worker):
        for stream in (False, True):
            response = server.post(TEXTS, {**HI, "stream": stream})
            assert response.status_code == 504
            assert "took longer than 0.5 seconds" in response.text
        assert server.service.admission.inside == 0
        assert server.post(CHATS, {"model": "tiny", "messages": CHAT, "max_tokens": 1}).status_code == 200


def test_who_leaves_before_a_reply_begins_frees_its_place(server: Running) -> None:
    with held(server.service.texts.short.worker):
        content = text()
        connection = connect(server)
        connection.sendall(head(TEXTS, content) + content)
        wait_until(lambda: server.service.admission.inside == 1)
        connection.close()
        wait_until(lambda: server.service.admission.inside == 0)


def test_a_template_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if 'w39' in messages[0].content %}" + loop + "{% endif %}" + TEMPLATE
    monkeypatch.setattr(texts, "_TEMPLATE_SECONDS", 0.3)
    with running(template=template) as server, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(
            server.post, CHATS, {"model": "tiny", "messages": [{"role": "user", "content": "w39"}], "max_tokens": 1}
        )
        wait_until(lambda: server.service.admission.inside == 1)
        with nobody_waits(server):
            assert server.post(TEXTS, HI).status_code == 200
            answer = stuck.result()
        assert answer.status_code == 400
        assert "chat template was stopped after 0.3 s of computing on this conversation" in answer.text
        usual = server.post(CHATS, {"model": "tiny", "messages": CHAT, "max_tokens": 1})
        assert usual.status_code == 200


# --- clients that do not read ---------------------------------------------------------------------------------------


def test_a_stream_that_nobody_reads_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "SLOW_READER", 1.0)
    with running(streams=2, queue=2, send_buffer=4096) as server:
        fields = {"n": 4, "max_tokens": 100, "stream": True, "logprobs": 20, "return_rewards": True, "seed": 1}
        content = text(**fields, logit_bias={"1": -100})
        connection = connect(server, receive=4096)
        connection.sendall(head(TEXTS, content) + content)
        wait_until(lambda: server.service.admission.inside == 4)
        wait_until(lambda: server.service.admission.inside == 0)
        assert server.post(TEXTS, HI).status_code == 200
        time.sleep(2.5)  # longer than a client may take nothing
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(2**16):
                received += piece
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received
        connection.close()


def test_heads_that_do_not_end_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_KEEP_ALIVE", 0.5)
    with running() as server:
        connections = [connect(server) for _ in range(2)]
        connections[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connections[0].recv(1000)
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        for connection in connections:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1000) == b""


def test_what_is_no_request_is_told_to_the_operator(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Before an answer it gets one, amid an answer its connection is cut; nothing fails over it."""
    chunked = head(TEXTS, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    for sent, answer in ((b"GET /health\x00 HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"), (chunked + b"x\r\n", b"HTTP/1.1 400")):
        connection = connect(server)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b'{"status":"ok"}'):
            found += connection.recv(1000)
        connection.sendall(sent)
        assert connection.recv(1000).startswith(answer)
        connection.close()
    said = [record.getMessage() for record in caplog.records if "sent what is no request" in record.getMessage()]
    assert len(said) == 2
    assert "illegal" in said[0]
    assert "CLIENT: ERROR" in said[0]


def test_connections_that_only_wait_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_MOST_CONNECTIONS", 20)
    with running() as server:
        server.pace.seconds = 0.01
        content = text(stream=True, max_tokens=100, logit_bias={"1": -100})
        busy = connect(server)
        busy.sendall(head(TEXTS, content) + content)
        received = busy.recv(1000)
        waiting = [connect(server) for _ in range(100)]
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert server.post(TEXTS, HI).status_code == 200
        closed = 0
        for connection in waiting:
            connection.settimeout(0.01)
            try:
                closed += connection.recv(10) == b""
            except ConnectionResetError:
                closed += 1
            except TimeoutError:
                pass
            connection.close()
        assert closed >= 80
        server.pace.seconds = 0.0
        while piece := busy.recv(2**16):
            received += piece
            if b"[DONE]" in received:
                break
        assert b"[DONE]" in received  # a connection that has something to do is left alone
        busy.close()


# --- doors ----------------------------------------------------------------------------------------------------------


def test_names_of_the_host() -> None:
    with running(hosts=["GPU.example.org"]) as server, server.http() as client:
        port = server.url.rsplit(":", 1)[1]
        known = ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LocalHost.:1", "x.localhost")
        for name in (*known, "gpu.example.org", "gpu.example.org:80"):
            assert client.get("/v1/models", headers={"Host": name}).status_code == 200, name
        for name in (
            "evil.example",
            f"evil.example:{port}",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.1.2.3",
        ):
            for path in ("/v1/models", "/health", "/"):
                answer = client.get(path, headers={"Host": name})
                assert answer.status_code == 403, name
                assert f"does not answer to the host name '{name}'; start it with --allowed-host" in answer.text
            assert client.post(TEXTS, json=HI, headers={"Host": name}).status_code == 403
        assert server.openai().completions.create(**HI).choices
    with running() as server, server.http() as client:
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 200  # as with keys


def test_encodings_and_heads(server: Running) -> None:
    with server.http() as client:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        packed = client.post(TEXTS, content=gzip.compress(text()), headers=headers)
        assert (packed.status_code, packed.json()["error"]["code"]) == (415, "invalid_content_encoding")
        assert "encoded as 'gzip'; send it as it is" in packed.text
        for path in ("/health", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/", "/assets/page.css"):
            got, headed = client.get(path), client.head(path)
            assert (headed.status_code, headed.content) == (got.status_code, b""), path
            assert headed.headers["content-type"] == got.headers["content-type"]
        assert client.head(TEXTS).status_code == 405
        assert client.head("/v1/models/none").status_code == 404


def test_streams_that_end_in_an_error_count_as_one() -> None:
    with running(timeout=0.3) as server:
        server.pace.seconds = 0.02
        response = server.post(TEXTS, {**HI, "max_tokens": 100, "stream": True, "logit_bias": {"1": -100}})
        assert response.status_code == 200
        assert '"code":"timeout"' in response.text
        wait_until(
            lambda: (
                server.service.metrics.registry.get_sample_value(
                    "genarm_requests_total", {"path": TEXTS, "status": "504"}
                )
                == 1.0
            )
        )


# --- whatever bytes -------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=5,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "unknown", "\x00", "\ud800"})


def check_parsed(content: bytes) -> None:
    for form in (ChatRequest, CompletionRequest):
        refused: ApiError | None = None
        try:
            asked = parse(content, form)
        except ApiError as error:
            refused = error
        if refused is None:
            assert asked.replies >= 1
            assert asked.model_dump_json().encode()
        else:
            assert 400 <= refused.status < 500
            assert json.dumps(refused.body(), ensure_ascii=False).encode()


@settings(deadline=None, max_examples=120, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans())
def test_any_json_is_understood_or_refused(fields: dict[str, Any], ascii_only: bool) -> None:
    base = {"model": "tiny", "messages": CHAT} if "messages" in fields else {"model": "tiny", "prompt": "w1"}
    content = json.dumps({**base, **fields}, ensure_ascii=ascii_only)
    check_parsed(content.encode(errors="surrogatepass"))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.binary(max_size=40))
def test_any_bytes_are_refused(content: bytes) -> None:
    check_parsed(content)
    check_parsed(b'{"model": "' + content + b'", "prompt": "w1"}')


# --- the log --------------------------------------------------------------------------------------------------------


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    reading, writing = os.pipe()
    handler = Unhurried(writing, most=200_000)
    handler.setFormatter(PlainFormatter("%(message)s"))
    for i in range(10_000):
        handler.handle(logging.makeLogRecord({"msg": f"{i:099d}"}))
    threading.Thread(target=lambda: (handler.flush(), handler.flush(), os.close(writing)), daemon=True).start()
    with open(reading, "rb") as file:
        lines = file.read().decode().splitlines()
    assert len(lines) < 10_000
    due = 0
    for line in lines:
        if "lines of the log were left out" in line:
            due += int(line.split()[1])
        else:
            assert line == f"{due:099d}"
            due += 1
    assert due == 10_000


def test_nothing_in_the_log_speaks_to_a_terminal() -> None:
    form = PlainFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("\x1b]0;title\x07 from\na template\u202e")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "said %s", ("\x1b[2J\nERROR all is lost\r",), None)
        record.exc_info = (type(error), error, error.__traceback__)
    lines = form.format(record).split("\n")
    assert lines[0] == r"ERROR said \x1b[2J\nERROR all is lost\r"
    assert lines[1].startswith("Traceback")
    assert all(line.isprintable() for line in lines)
