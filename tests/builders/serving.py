"""A real server on a free port, in a thread of this process, over a tiny guided model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import torch
from peft import LoraConfig, PeftModel

from builders.tiny import TEMPLATE, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Engine, EngineOptions
from genarm.server.admission import Admission
from genarm.server.app import build_app
from genarm.server.backend import EngineBackend
from genarm.server.job import Service
from genarm.server.listen import Server, bind
from genarm.server.metrics import Metrics
from genarm.server.names import Names, RewardInfo
from genarm.server.texts import Texts

TOKENIZER = tiny_tokenizer()
CONTEXT = 128
PRESETS = {"cautious": {"harmless": 2.0, "helpful": -0.5}, "plain": {"harmless": 0.0, "helpful": 0.0}}
CHAT: list[Any] = [{"role": "user", "content": "w1 w2"}]


def guided_model(wishes: Mapping[str, str] | None = None) -> GuidedForCausalLM:
    """A base, a full ARM and a LoRA ARM; wishes have the weight 1."""
    base = tiny_model("llama", seed=0, layers=3)
    torch.manual_seed(2)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = PeftModel(base, lora, adapter_name="helpful")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, which would make the adapter the base
            torch.nn.init.normal_(parameter, std=0.2)
    arm = tiny_model("llama", seed=1, layers=1, hidden=16)
    return GuidedForCausalLM.from_members(
        base, {"harmless": arm, "helpful": adapted}, wishes=wishes, weights={"harmless": 1.0, "helpful": 0.5}
    )


@dataclass
class Pace:
    """What happens before each forward of the base and before an engine is made."""

    seconds: float = 0.0
    at_step: Callable[[], None] | None = None
    at_make: Callable[[], None] | None = None

    def hook(self, *_: Any) -> None:
        if self.at_step is not None:
            self.at_step()
        if self.seconds:
            time.sleep(self.seconds)


@dataclass
class Running:
    """A server that runs."""

    url: str
    service: Service
    backend: EngineBackend
    model: GuidedForCausalLM
    pace: Pace
    key: str = "none"
    made: list[Engine] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        """The one that runs now."""
        assert self.backend._engine is not None
        return self.backend._engine

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, **options)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        with self.http() as client:
            return client.post(path, json=dict(body))

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether every slot is free, now or soon."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            statistics = self.engine.statistics()
            rows = [len(trunk.kv_cache.rows) for trunk in self.engine._built.members.trunks]
            if (
                not statistics.running
                and not statistics.waiting
                and list(statistics.free_rows) == rows
                and not self.service.admission.inside
            ):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def running(
    *,
    queue: int = 64,
    streams: int = 4,
    timeout: float = 60.0,
    speculate: int = 3,
    keys: frozenset[str] = frozenset(),
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    send_buffer: int | None = None,
    presets: Mapping[str, Mapping[str, float]] = PRESETS,
    log_prompts: bool = False,
    template: str | None = TEMPLATE,
    wishes: Mapping[str, str] | None = None,
    request_wishes: bool = True,
) -> Iterator[Running]:
    """Serve until the block ends."""
    model, pace, made = guided_model(wishes), Pace(), []
    model.base.register_forward_pre_hook(pace.hook)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template

    def make() -> Engine:
        if pace.at_make is not None:
            pace.at_make()
        options = EngineOptions(streams=streams, context=CONTEXT, speculate=speculate)
        made.append(Engine(model, tokenizer, options))
        return made[-1]

    backend = EngineBackend(make)
    rewards = tuple(
        RewardInfo(
            name=name,
            default=weight,
            description=f"likes {name} words",
            difference=name in (wishes or {}),
            wish=(wishes or {}).get(name),
        )
        for name, weight in model.default_weights.items()
    )
    service = Service(
        backend=backend,
        texts=Texts(tokenizer),
        names=Names(model="tiny", rewards=rewards, largest=5.0, presets=presets),
        admission=Admission(streams=streams, queue=queue),
        metrics=Metrics(backend),
        timeout=timeout,
        log_prompts=log_prompts,
        request_wishes=request_wishes,
        started=1_700_000_000,
    )
    listener = bind("127.0.0.1", 0)
    if send_buffer is not None:  # of the connections, too
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Server(build_app(service, keys=keys, origins=origins, hosts=hosts), drain=timeout)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = listener.getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", service, backend, model, pace, next(iter(keys), "none"), made)
    finally:
        pace.at_step, pace.seconds = None, 0.0
        server.should_exit = True
        thread.join(30)
        backend.close()
        service.close()


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream; the last one is "[DONE]" where it went well."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
