"""`run_serve`: what clients of `genarm serve` see, at so many replies at once.

A server is started as a process of its own; this process plays the clients. Every client asks again as soon as it has
its reply. Prompts are random ids, so that no request begins as an earlier one did, and end of text is ruled out, so
that replies have the same length.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import httpx2
from rich.console import Console

from genarm.errors import MemberError
from genarm.lab.bench.settings import LEAST_SERVED_TOKENS, ServeSettings
from genarm.lab.bench.timing import take_turns
from genarm.model.references import ModelFiles, find_device, open_files

PROMPT_TOKENS = 32
_GRACE = 30.0
"""Seconds for the server to end."""
_PATIENCE = 600.0
"""Seconds to wait for an answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply as its client saw it.

    Attributes:
        first: seconds to the first event with text.
        gaps: seconds between two events with text.
        tokens: that it has.
        seconds: to the end.
    """

    first: float
    gaps: Sequence[float]
    tokens: int
    seconds: float

    @property
    def per_token(self) -> float:
        """Seconds per token after the first one."""
        return (self.seconds - self.first) / (self.tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Round:
    """All replies of one round at one concurrency, and the seconds that they took together."""

    replies: Sequence[Reply]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all clients together."""
        return sum(reply.tokens for reply in self.replies) / self.seconds


@dataclass(frozen=True, kw_only=True)
class ServeResult:
    """What was measured: {replies at once: rounds}, and what the server said of itself."""

    settings: ServeSettings
    device: str
    rounds: Mapping[int, Sequence[Round]]
    server: Sequence[str]


def run_serve(settings: ServeSettings, console: Console) -> ServeResult:
    """Measure; `console` is told how far it has come.

    Raises:
        ConfigError: no such device.
        MemberError: no such model, or one that cannot be served.
    """
    device = find_device(settings.device)
    files = open_files(settings.folder, trust_remote_code=settings.trust_remote_code)
    levels = sorted(set(settings.concurrency))
    found: dict[int, list[Round]] = {level: [] for level in levels}
    console.print("starting the server")
    with _server(settings, max(levels)) as (url, said):
        clients = _Clients(settings, files, url)

        def measured(level: int) -> Any:
            def contestant(number: int) -> float:
                result = asyncio.run(clients.round(level, number))
                if number:
                    found[level].append(result)
                return result.tokens_per_second

            return contestant

        take_turns(
            {str(level): measured(level) for level in levels},
            settings.rounds,
            lambda number: console.print(f"round {number} of {settings.rounds}" if number else "warming up"),
        )
    return ServeResult(settings=settings, device=device, rounds=found, server=said)


class _Clients:
    """Those who ask."""

    def __init__(self, settings: ServeSettings, files: ModelFiles, url: str) -> None:
        self._settings = settings
        self._url = url
        special = set(files.tokenizer.all_special_ids)
        self._ids = [i for i in range(len(files.tokenizer)) if i not in special]
        self._ends = list(files.end_ids)
        self._model = ""

    async def round(self, level: int, number: int) -> Round:
        """`level` clients, one after another as many requests as the settings say."""
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=self._url, timeout=_PATIENCE, limits=limits) as http:
            self._model = self._model or (await http.get("/v1/models")).json()["data"][0]["id"]
            began = time.perf_counter()
            replies = await asyncio.gather(*(self._client(http, (level, number, i)) for i in range(level)))
            seconds = time.perf_counter() - began
        return Round(replies=[reply for some in replies for reply in some], seconds=seconds)

    async def _client(self, http: httpx2.AsyncClient, name: tuple[int, int, int]) -> list[Reply]:
        generator = random.Random(f"{self._settings.seed}/{name}")
        return [await self._reply(http, generator) for _ in range(self._settings.requests)]

    async def _reply(self, http: httpx2.AsyncClient, generator: random.Random) -> Reply:
        asked = {
            "model": self._model,
            "prompt": generator.choices(self._ids, k=PROMPT_TOKENS),
            "max_tokens": self._settings.tokens,
            "logit_bias": {str(end): -100 for end in self._ends},
            "seed": generator.randrange(2**40),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, stamps, tokens = time.perf_counter(), [], 0
        async with http.stream("POST", "/v1/completions", json=asked) as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise MemberError(f"the server could not answer: {event['error']['message']}")
                if event["choices"] and event["choices"][0]["text"]:
                    stamps.append(time.perf_counter())
                tokens = event["usage"]["completion_tokens"] if event["usage"] else tokens
        if len(stamps) < LEAST_SERVED_TOKENS:
            raise MemberError(
                f"a reply of {tokens} tokens came in {len(stamps)} pieces of text; there is no rate in it"
            )
        gaps = [later - earlier for earlier, later in pairwise(stamps)]
        return Reply(first=stamps[0] - began, gaps=gaps, tokens=tokens, seconds=stamps[-1] - began)


@contextmanager
def _server(settings: ServeSettings, streams: int) -> Iterator[tuple[str, list[str]]]:
    """A server's URL, and what it printed before that."""
    command = [sys.executable, "-m", "genarm", "serve", settings.folder, "--engine", "genarm"]
    command += ["--port", "0", "--streams", str(streams)]
    command += ["--context", str(PROMPT_TOKENS + settings.tokens), "--speculate", str(settings.speculate)]
    command += ["--dtype", settings.dtype, *(["--trust-remote-code"] if settings.trust_remote_code else [])]
    for name in ("device", "draft"):
        value = getattr(settings, name)
        command += [] if value is None else [f"--{name}", value]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _started(process, log)
        finally:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(process: subprocess.Popen[str], log: IO[str]) -> tuple[str, list[str]]:
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line.rstrip())
        if " is served at " in line:
            return said[-1].split()[-1], said[:-1]
    log.seek(0)
    reason = (log.read().strip().splitlines() or ["it says nothing"])[-1]
    raise MemberError(f"the server did not start: {reason}")


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation between the values."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
