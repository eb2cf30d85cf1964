"""`run_vllm`: everything `genarm bench vllm` measures, from settings to a result.

Order: (1) models of random weights, written where vLLM can open them; (2) one engine of vLLM per contestant, each in a
process of its own, started one after the other; (3) rounds in which each contestant runs once at each number of
streams, while the others rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from genarm.errors import ConfigError, EngineFailure, MissingExtraError
from genarm.lab.bench import figures
from genarm.lab.bench.contestants import Task, make_task
from genarm.lab.bench.decode import PROMPT_TOKENS, Where, choose_where
from genarm.lab.bench.figures import Figure, vllm_ratios
from genarm.lab.bench.settings import VllmSettings
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.timing import Contestant, take_turns
from genarm.lab.bench.vllm_engine import EngineFacts, EngineSettings, RemoteEngine, Steps, remote_engine
from genarm.lab.bench.vllm_models import Entry, write_entries
from genarm.lab.machine import give_back
from genarm.vllm import check_version, vllm_version

_PAGE = 128
"""Positions that vLLM gives a request at once, or fewer."""
_GPU_SHARE = 0.9
"""Of a GPU's memory, for all contestants together."""
_BATCHED = 2048
"""Tokens of a step, or as many as all prompts have."""

Rates = Mapping[int, Mapping[str, Sequence[float]]]
"""{streams: {contestant: tokens per second in each round}}."""


@dataclass(frozen=True, kw_only=True)
class VllmResult:
    """All that was measured, and the figures that follow from it."""

    settings: VllmSettings
    where: Where
    parameters: Mapping[str, int]
    engines: Mapping[str, EngineFacts]
    tokens_per_second: Rates
    figures: Sequence[Figure]


def run_vllm(settings: VllmSettings, console: Console) -> VllmResult:
    """Measure; `console` is told how far it has come.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnsupportedError: it is a version that the plug-in does not know.
        ConfigError: vLLM cannot run the models here, for want of memory say.
    """
    if vllm_version() is None:
        raise MissingExtraError("vllm", "vllm")
    check_version()
    where = choose_where(None, settings.dtype)
    shapes = SHAPES[settings.base_shape]
    try:
        with tempfile.TemporaryDirectory(prefix="genarm-bench-") as root:
            engines, rates = _time(settings, where, Path(root), console)
    except EngineFailure as failure:
        raise ConfigError(f"{failure}; --eager does without compiling, and a smaller --base-shape takes less") from None
    targets = figures.vllm_targets(settings.base_shape)
    return VllmResult(
        settings=settings,
        where=where,
        parameters={"base": shapes.base.parameters, "full ARM": shapes.arm.parameters},
        engines=engines,
        tokens_per_second=rates,
        figures=[Figure(name=n, values=row, target=targets.get(n)) for n, row in vllm_ratios(rates).items()],
    )


def _time(
    settings: VllmSettings, where: Where, root: Path, console: Console
) -> tuple[Mapping[str, EngineFacts], Rates]:
    shapes = SHAPES[settings.base_shape]
    console.print("making the models")
    entries = write_entries(shapes, dtype=where.torch_dtype, seed=settings.seed, root=root)
    give_back()  # vLLM may need it
    streams = sorted(set(settings.streams))
    task = make_task(
        prompts=(settings.rounds + 1) * max(streams),
        prompt_tokens=PROMPT_TOKENS,
        tokens=settings.tokens,
        vocabulary=shapes.base.vocabulary,
        seed=settings.seed,
    )
    with ExitStack() as stack:
        engines: dict[str, RemoteEngine] = {}
        for name, entry in entries.items():
            console.print(f"starting vLLM: {name}")
            options = _options(settings, where, entry, task, share=_GPU_SHARE / len(entries), root=root)
            engines[name] = stack.enter_context(remote_engine(name, options))
        values = take_turns(
            {_key(n, name): decoding(engine, task, n) for n in streams for name, engine in engines.items()},
            settings.rounds,
            lambda number: console.print(f"round {number} of {settings.rounds}" if number else "warming up"),
        )
    facts = {name: engine.facts for name, engine in engines.items()}
    return facts, {n: {name: values[_key(n, name)] for name in engines} for n in streams}


def _options(
    settings: VllmSettings, where: Where, entry: Entry, task: Task, *, share: float, root: Path
) -> EngineSettings:
    streams = max(settings.streams)
    pages = -(-task.positions // _PAGE) + 1
    return EngineSettings(
        model=str(entry.folder),
        device=where.device,
        dtype=where.dtype,
        eager=settings.eager,
        positions=task.positions,
        streams=streams,
        batched_tokens=max(_BATCHED, streams * task.prompt_tokens),  # all begin in one step
        cache_bytes=entry.cache_bytes((streams + 1) * pages * _PAGE, where.torch_dtype.itemsize),
        memory_share=share,
        files=str(root / "compiled"),
        log=str(root / f"{entry.folder.name}.log"),
    )


def _key(streams: int, contestant: str) -> str:
    return f"{streams}: {contestant}"


def decoding(engine: RemoteEngine, task: Task, streams: int) -> Contestant:
    """Tokens per second of so many streams while all of them decode: the steps with prompts are left out."""

    def run(number: int) -> float:
        prompts = [task.prompt(number * streams + i) for i in range(streams)]
        return decode_rate(engine.run(prompts, task.tokens), streams)

    return run


def decode_rate(steps: Steps, streams: int) -> float:
    """Tokens per second after the step that gave the streams their first tokens."""
    # All prompts go through in one step, which gives each stream its first token (`batched_tokens`).
    full = next(i for i, (_, made) in enumerate(steps) if made >= streams)
    (began, before), (ended, after) = steps[full], steps[-1]
    return (after - before) / (ended - began)
