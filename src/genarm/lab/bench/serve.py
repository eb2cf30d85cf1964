"""`run_serve`: what clients of `genarm serve` see, at so many replies at once, beside what its engine makes alone.

A server is started as a process of its own; this process plays the clients. Every client asks again as soon as it has
its reply. Prompts are random ids, so that no request begins as an earlier one did, and end of text is ruled out, so
that replies have the same length. In turn with the clients, an engine in this process answers as many requests of that
kind at once.
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

from genarm.engine import Engine, EngineOptions, Request
from genarm.errors import MemberError
from genarm.lab.bench.settings import LEAST_SERVED_TOKENS, ServeSettings
from genarm.lab.bench.timing import Contestant, take_turns
from genarm.model.references import ModelFiles, find_device, open_files
from genarm.sampling import Sampling

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
    """What was measured.

    Attributes:
        rounds: {replies at once: rounds}.
        alone: {replies at once: tokens per second of the engine without a server, round by round}.
        server: what the server said of itself.
    """

    settings: ServeSettings
    device: str
    rounds: Mapping[int, Sequence[Round]]
    alone: Mapping[int, Sequence[float]]
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
        asking = _Asking(settings, files)
        clients = _Clients(asking, url)
        engine = _Alone(asking, max(levels))

        def measured(level: int) -> Contestant:
            def contestant(number: int) -> float:
                result = asyncio.run(clients.round(level, number))
                if number:
                    found[level].append(result)
                return result.tokens_per_second

            return contestant

        def alone(level: int) -> Contestant:
            return lambda number: engine.round(level, number)

        values = take_turns(
            {
                **{f"{level} served": measured(level) for level in levels},
                **{f"{level} alone": alone(level) for level in levels},
            },
            settings.rounds,
            lambda number: console.print(f"round {number} of {settings.rounds}" if number else "warming up"),
        )
    rates = {level: values[f"{level} alone"] for level in levels}
    return ServeResult(settings=settings, device=device, rounds=found, alone=rates, server=said)


class _Asking:
    """What is asked, by clients and of the engine alone."""

    def __init__(self, settings: ServeSettings, files: ModelFiles) -> None:
        self.settings = settings
        special = set(files.tokenizer.all_special_ids)
        self._ids = [i for i in range(len(files.tokenizer)) if i not in special]
        self.bias = dict.fromkeys(files.end_ids, -100.0)

    def prompts(self, name: tuple[str, int, int, int]) -> Iterator[tuple[list[int], int]]:
        """(ids, seed) of the requests that one client makes in a round."""
        generator = random.Random(f"{self.settings.seed}/{name}")
        for _ in range(self.settings.requests):
            yield generator.choices(self._ids, k=PROMPT_TOKENS), generator.randrange(2**40)


class _Alone:
    """The engine, without a server."""

    def __init__(self, asking: _Asking, streams: int) -> None:
        settings = asking.settings
        self._asking = asking
        self._sampling = Sampling(max_new_tokens=settings.tokens, logit_bias=asking.bias)
        options = EngineOptions(streams=streams, context=PROMPT_TOKENS + settings.tokens, speculate=settings.speculate)
        self._engine = Engine.from_pretrained(
            settings.folder,
            options,
            dtype=settings.dtype,
            device=settings.device,
            draft=settings.draft,
            trust_remote_code=settings.trust_remote_code,
        )

    def round(self, level: int, number: int) -> float:
        """Tokens per second at `level` replies at once; all of them end together, and so do the next ones."""
        clients = [self._asking.prompts(("alone", level, number, i)) for i in range(level)]
        tokens = 0
        began = time.perf_counter()
        for asked in zip(*clients, strict=True):
            replies = self._engine.generate(
                [
                    Request(
                        prompt=ids,
                        seed=seed,
                        sampling=self._sampling,
                        top_log_probs=int(self._asking.settings.explain),
                        continues=True,
                    )
                    for ids, seed in asked
                ]
            )
            tokens += sum(len(reply.tokens) for reply in replies)
        return tokens / (time.perf_counter() - began)


class _Clients:
    """Those who ask."""

    def __init__(self, asking: _Asking, url: str) -> None:
        self._asking = asking
        self._url = url
        self._model = ""

    async def round(self, level: int, number: int) -> Round:
        """`level` clients, one after another as many requests as the settings say."""
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=self._url, timeout=_PATIENCE, limits=limits) as http:
            self._model = self._model or (await http.get("/v1/models")).json()["data"][0]["id"]
            began = time.perf_counter()
            replies = await asyncio.gather(*(self._client(http, ("served", level, number, i)) for i in range(level)))
            seconds = time.perf_counter() - began
        return Round(replies=[reply for some in replies for reply in some], seconds=seconds)

    async def _client(self, http: httpx2.AsyncClient, name: tuple[str, int, int, int]) -> list[Reply]:
        return [await self._reply(http, ids, seed) for ids, seed in self._asking.prompts(name)]

    async def _reply(self, http: httpx2.AsyncClient, ids: Sequence[int], seed: int) -> Reply:
        asked = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": self._asking.settings.tokens,
            "logit_bias": {str(end): bias for end, bias in self._asking.bias.items()},
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"logprobs": 1, "return_rewards": True} if self._asking.settings.explain else {}),
        }
        began, stamps, tokens = time.perf_counter(), [], 0
        async with http.stream("POST", "/v1/completions", json=asked) as stream:
            if stream.is_error:
                raise _refused(json.loads(await stream.aread()))
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise _refused(event)
                if event["choices"] and event["choices"][0]["text"]:
                    stamps.append(time.perf_counter())
                tokens = event["usage"]["completion_tokens"] if event["usage"] else tokens
        if len(stamps) < LEAST_SERVED_TOKENS:
            raise MemberError(
                f"a reply of {tokens} tokens came in {len(stamps)} pieces of text; there is no rate in it"
            )
        gaps = [later - earlier for earlier, later in pairwise(stamps)]
        return Reply(first=stamps[0] - began, gaps=gaps, tokens=tokens, seconds=stamps[-1] - began)


def _refused(answer: Mapping[str, Any]) -> MemberError:
    return MemberError(f"the server could not answer: {answer['error']['message']}")


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
