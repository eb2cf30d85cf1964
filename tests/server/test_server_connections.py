"""Connections that live on: requests in a row, cut anywhere, among clients that send rubbish, leave or do not read."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import h11
import httpx2
import pytest

from builders.serving import Running, events, running
from genarm.server.listen import _Parser

TEXTS = "/v1/completions"
FORM = "Content-Type: application/json"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(queue=500, send_buffer=8192) as found:
        yield found


def head(method: str, path: str, *more: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *more, "", ""]).encode()


def request(generator: random.Random, fields: dict[str, Any], *more: str, version: str = "1.1") -> bytes:
    """By length or in chunks, with any of the heads that clients are known to send."""
    content = json.dumps(fields).encode()
    more += generator.choice(
        [
            (),
            (),
            ("Expect: 100-continue",),
            ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
            ("X-Long: " + "x" * 30_000,),
        ]
        if version == "1.1" and not more
        else [()]
    )
    if version == "1.1" and generator.random() < 0.3:
        size = generator.randint(1, 60)
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return head("POST", TEXTS, FORM, "Transfer-Encoding: chunked", *more) + chunks + b"0\r\n\r\n"
    return head("POST", TEXTS, FORM, f"Content-Length: {len(content)}", *more, version=version) + content


# --- what bytes mean ------------------------------------------------------------------------------------------------


def meaning(pieces: list[bytes]) -> list[str]:
    """What a parser makes of bytes that come so: requests with their bodies, or that they are none."""
    parser, found = _Parser(), []
    for piece in pieces:
        parser.receive_data(piece)
        while (event := parser.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Request):
                found.append(event.target.decode() + " ")
            elif isinstance(event, h11.Data):
                found[-1] += bytes(event.data).decode()
            if event is h11.PAUSED or isinstance(event, h11.EndOfMessage):
                if parser.our_state is h11.SEND_RESPONSE:
                    parser.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                    parser.send(h11.EndOfMessage())
                if parser.our_state is not h11.DONE:
                    break
                parser.start_next_cycle()
    return found


def test_bytes_mean_the_same_however_they_are_cut() -> None:
    """With line breaks before and between requests, as old clients send them, and bytes after the last one."""
    first = head("POST", "/1", "Content-Length: 2") + b"ab\r\n\r\n"
    second = head("POST", "/2", "Transfer-Encoding: chunked") + b"1\r\nc\r\n2\r\nde\r\n0\r\n\r\n\r\n"
    last = head("POST", "/3", "Content-Length: 1", "Connection: close") + b"f" + b"\r\nGET / nonsense"
    sent = b"\r\n" + first + second + last
    expected = ["/1 ab", "/2 cde", "/3 f"]
    assert meaning([sent]) == expected
    assert meaning([sent[i : i + 1] for i in range(len(sent))]) == expected
    for cut in range(1, len(sent)):
        assert meaning([sent[:cut], sent[cut:]]) == expected, cut


@pytest.mark.parametrize("size", [30_000, 40_000])
@pytest.mark.parametrize("step", [100, 10**6])
def test_a_long_head_is_allowed_or_not_by_its_length_alone(size: int, step: int) -> None:
    sent = head("GET", "/", "X: " + "x" * size)
    pieces = [sent[at : at + step] for at in range(0, len(sent), step)]
    if size < 2**15:
        assert meaning(pieces) == ["/ "]
    else:
        with pytest.raises(h11.RemoteProtocolError, match="more than 32768 bytes"):
            meaning(pieces)


# --- a crowd --------------------------------------------------------------------------------------------------------

RUBBISH = [
    b"\x00\x01garbage\r\n\r\n",
    b"GET  /x HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    head("GET", "/health", "Host: other"),
    head("POST", TEXTS, "Content-Length: 3", "Content-Length: 4") + b"{}  ",
    head("POST", TEXTS, "Content-Length: x") + b"{}",
    head("POST", TEXTS, "Transfer-Encoding: gzip") + b"{}",
    head("POST", TEXTS, FORM, "Transfer-Encoding: chunked") + b"zz\r\n",
    head("POST", TEXTS, FORM, "Transfer-Encoding: chunked") + b"2\r\n{}XX0\r\n\r\n",
]
Answer = tuple[int, dict[str, str], bytes]


async def answer(reader: asyncio.StreamReader) -> Answer:
    """Read by the letter: nothing but what the answer's own head says belongs to it."""
    status = 100
    while status == 100:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
        status = int(lines[0].split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    if "content-length" in headers:
        return status, headers, await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        return status, headers, await reader.read()
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    assert await reader.readexactly(2) == b"\r\n"
    return status, headers, body


def said(got: Answer) -> list[tuple[str, str]]:
    """Text and end of each choice."""
    status, headers, body = got
    assert status == 200, body
    response = httpx2.Response(status, headers={"content-type": headers["content-type"]}, content=body)
    streamed = headers["content-type"].startswith("text/event-stream")
    parts = events(response) if streamed else [response.json()]
    assert not streamed or parts.pop() == "[DONE]"
    choices: dict[int, list[str]] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        found = choices.setdefault(choice["index"], ["", ""])
        found[0] += choice["text"]
        found[1] += choice["finish_reason"] or ""
    return [(text, end) for _, (text, end) in sorted(choices.items())]


class Client:
    """Does a few things in turn that a seed decides."""

    def __init__(self, server: Running, seed: int, known: list[tuple[dict[str, Any], Any]]) -> None:
        self.port = int(server.url.rsplit(":", 1)[1])
        self.generator = random.Random(seed)
        self.known = known
        self.ids: list[str] = []

    async def run(self) -> None:
        deeds = [self.asks, self.asks, self.asks, self.asks_last, self.sends_rubbish, self.is_refused, self.leaves]
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        for _ in range(3):
            if not await self.generator.choice(deeds)():
                self.generator.choice([self.writer.close, self.writer.transport.abort])()
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        self.writer.close()

    async def send(self, data: bytes) -> None:
        """In one piece or in many, with pauses."""
        size = self.generator.choice([len(data), 4000, 300])
        while data:
            cut = self.generator.randint(1, size)
            self.writer.write(data[:cut])
            data = data[cut:]
            await asyncio.sleep(self.generator.choice([0, 0, 0.002]))
        await self.writer.drain()

    async def expect(self, wanted: Any) -> None:
        """The answer of one of ours, or a status."""
        got = await asyncio.wait_for(answer(self.reader), 60)
        if isinstance(wanted, int):
            assert got[0] == wanted, got
        else:
            assert said(got) == wanted
        self.ids += [got[1]["x-request-id"]] if "x-request-id" in got[1] else []

    async def asks(self) -> bool:
        """Some requests at once, good and bad ones; the connection goes on."""
        data, wanted = b"", []
        for _ in range(self.generator.randint(1, 4)):
            bad: list[tuple[dict[str, Any], Any]] = [({"model": "other", "prompt": "w1"}, 404), ({}, 400)]
            fields, expected = self.generator.choice([*self.known, *bad])
            data += request(self.generator, fields) + self.generator.choice([b"", b"\r\n"])
            wanted.append(expected)
        sending = asyncio.create_task(self.send(data))
        await asyncio.sleep(self.generator.choice([0, 0.2]))  # and takes nothing meanwhile
        for expected in wanted:
            await self.expect(expected)
        await sending
        return True

    async def asks_last(self) -> bool:
        """A request after which nothing counts."""
        fields, expected = self.generator.choice(self.known)
        version, more = self.generator.choice([("1.0", ()), ("1.1", ("Connection: close",))])
        await self.send(request(self.generator, fields, *more, version=version))
        if more:
            await self.send(self.generator.choice([b"\r\n", b"x", request(self.generator, fields)]))
        await self.expect(expected)
        return False

    async def sends_rubbish(self) -> bool:
        fields, expected = self.generator.choice(self.known)
        await self.send(request(self.generator, fields) + self.generator.choice(RUBBISH))
        await self.expect(expected)
        await self.expect(400)
        return False

    async def is_refused(self) -> bool:
        """Before the body has come, which still has to pass before the next request."""
        fields, expected = self.generator.choice(self.known)
        size = 9 * 2**20
        sent = head("POST", TEXTS, FORM, f"Content-Length: {size}") + bytes(size) + request(self.generator, fields)
        self.writer.write(sent)
        await self.expect(413)
        await self.expect(expected)
        return True

    async def leaves(self) -> bool:
        """Amid a request, or amid its answer, of which it takes nothing."""
        long = {"model": "tiny", "prompt": "w1", "max_tokens": 100, "n": 2, "stream": True, "return_rewards": True}
        data = request(self.generator, long) * 2
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await self.send(data[: self.generator.choice([len(data), self.generator.randrange(len(data))])])
        await asyncio.sleep(0.1)
        return False


def test_every_request_of_a_crowd_gets_its_own_answer(server: Running) -> None:
    generator = random.Random(0)
    known = []
    for seed in range(8):
        fields = {
            "model": generator.choice(["tiny", "tiny@cautious", "tiny@helpful=-1"]),
            "prompt": f"w{seed} w1",
            "max_tokens": generator.randint(3, 12),
            "seed": seed,
            "n": generator.choice([1, 2]),
            "stream": generator.choice([False, True]),
        }
        alone = server.post(TEXTS, {**fields, "stream": not fields["stream"]})
        known.append((fields, said((200, dict(alone.headers), alone.content))))
    assert len({str(expected) for _, expected in known}) == len(known)
    clients = [Client(server, seed, known) for seed in range(24)]

    async def crowd() -> None:
        await asyncio.gather(*(client.run() for client in clients))

    asyncio.run(crowd())
    ids = [each for client in clients for each in client.ids]
    assert len(ids) > 60
    assert len(set(ids)) == len(ids)
    assert server.idle()


@pytest.mark.parametrize("body", [0, 300_000])
def test_a_flood_of_requests_waits_outside(server: Running, monkeypatch: pytest.MonkeyPatch, body: int) -> None:
    """Of what a client sends ahead a connection holds one piece, however many requests it was given answers to."""
    held: list[int] = []
    usual = _Parser.receive_data

    def receive_data(self: _Parser, data: bytes) -> None:
        usual(self, data)
        held.append(self.waiting)

    monkeypatch.setattr(_Parser, "receive_data", receive_data)
    fields: dict[str, Any] = {"model": "tiny", "prompt": "w1", "max_tokens": 1}
    one = request(random.Random(0), fields, "X-Pad: 0")
    other = head("POST", TEXTS, FORM, f"Content-Length: {body}") + b" " * body  # an error, which is quick
    count = 60
    flood = one * (2_000_000 // len(one)) if not body else (one + other) * (count // 2)

    async def main() -> list[int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        writer.write(flood)
        found = [(await asyncio.wait_for(answer(reader), 60))[0] for _ in range(count)]
        writer.transport.abort()
        return found

    assert asyncio.run(main()) == ([200] * count if not body else [200, 400] * (count // 2))
    assert sum(held) > 0
    assert max(held) <= 2**18 + 2**15  # as much as asyncio reads at once, and what a head may have
    assert server.idle()


def test_what_is_no_request_is_told_to_its_client(server: Running) -> None:
    async def main() -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        writer.write(head("GET", "/health", "X: " + "x" * 40_000))
        return await answer(reader)

    status, headers, body = asyncio.run(main())
    assert (status, headers["connection"]) == (400, "close")
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_http"
    assert error["message"] == "this is no HTTP request: its head, or a line of it, has more than 32768 bytes"
