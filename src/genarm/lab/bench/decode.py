"""`run_decode`: everything `genarm bench decode` measures, from settings to a result.

Order: (1) the real pair, if there is one, because its files may not be in order; (2) memory, on a model of its own;
(3) a base, its ARMs and counts of what speculation does; (4) an engine for each way to run them, and rounds in which
each contestant runs once.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import PreTrainedModel

from genarm.engine.device import has_bfloat16
from genarm.errors import ConfigError
from genarm.lab.bench import figures
from genarm.lab.bench.agreement import arm_that_agrees, make_pair
from genarm.lab.bench.contestants import Task, make_task
from genarm.lab.bench.counting import RealPair, count_real_pair
from genarm.lab.bench.field import Field, Speculated
from genarm.lab.bench.figures import Figure, timed_ratios
from genarm.lab.bench.memory import Weights, weigh
from genarm.lab.bench.models import bytes_per_token
from genarm.lab.bench.settings import DecodeSettings
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.timing import copy_bandwidth, take_turns
from genarm.model.references import find_device

PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Where:
    """What the models run on, and in which dtype."""

    device: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Bytes that a token of the unguided base reads, and bytes per second that a copy reads and writes."""

    bytes_per_token: float
    copied_per_second: float


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Times of the rounds, and counts with the same models.

    Attributes:
        seconds: {contestant: seconds per token in each round}.
        tokens_per_second: {streams: tokens per second in each round}.
        speculated: by ARM.
        bandwidth: on CUDA.
        engines: {contestant: what its engine says of itself}.
    """

    seconds: Mapping[str, Sequence[float]]
    tokens_per_second: Mapping[int, Sequence[float]]
    speculated: Sequence[Speculated]
    bandwidth: Bandwidth | None
    engines: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """All that was measured, and the figures that follow from it."""

    settings: DecodeSettings
    where: Where
    parameters: Mapping[str, int]
    timed: Timed
    weights: Weights
    real: RealPair | None
    figures: Sequence[Figure]


def run_decode(settings: DecodeSettings, console: Console) -> DecodeResult:
    """Measure; `console` is told how far it has come.

    Raises:
        ConfigError: no such device, an agreement that models of these shapes cannot have, too few tokens.
        GenarmError: what `count_real_pair` raises.
    """
    where = choose_where(settings.device, settings.dtype)
    shapes = SHAPES[settings.base_shape]
    real = _real(settings, where, console)
    gc.collect()  # models refer to themselves; the next ones may need their memory
    console.print(f"{settings.base_shape}, {where.dtype} on {where.device}: weighing an engine with two LoRA ARMs")
    weights = weigh(shapes.base, dtype=where.torch_dtype, device=where.device, seed=settings.seed)
    gc.collect()
    timed = _time(settings, where, console)
    return DecodeResult(
        settings=settings,
        where=where,
        parameters={"base": shapes.base.parameters, "full ARM": shapes.arm.parameters},
        timed=timed,
        weights=weights,
        real=real,
        figures=_figures(settings, where, timed, weights, real),
    )


def choose_where(device: str | None, dtype: str | None) -> Where:
    """The device that was asked for, or the first GPU if any, and the dtype, or bfloat16 where the device has it.

    Raises:
        ConfigError: there is no such device, or it is not one.
    """
    found = find_device(device)
    if found == "auto":
        raise ConfigError("--device is auto; everything is measured on one device: give cpu, cuda or cuda:1")
    usual = "bfloat16" if found != "cpu" or has_bfloat16() else "float32"
    return Where(device=found, dtype=dtype or usual)


def _time(settings: DecodeSettings, where: Where, console: Console) -> Timed:
    shapes = SHAPES[settings.base_shape]
    streams = sorted({1, *settings.streams})
    console.print("making the models")
    pair = make_pair(shapes, dtype=where.torch_dtype, device=where.device, seed=settings.seed)
    arms = {wanted: arm_that_agrees(pair, wanted) for wanted in sorted(set(settings.agreement))}
    task = make_task(
        prompts=max(settings.rounds + 1, *streams),
        prompt_tokens=PROMPT_TOKENS,
        tokens=settings.tokens,
        vocabulary=shapes.base.vocabulary,
        seed=settings.seed,
    )
    with ExitStack() as stack:
        models = {wanted: arm for wanted, (arm, _) in arms.items()}
        field = Field(pair=pair, arms=models, task=task, seed=settings.seed, stack=stack)
        # Before the others are there: an engine that is there for the counting alone needs memory as well.
        console.print("counting drafts")
        speculated = [field.speculated(wanted, made) for wanted, (_, made) in arms.items()]
        gc.collect()
        seconds = {**field.timed(), **field.crowded(streams[-1])}
        streamed = {str(n): run for n, run in field.streamed(streams).items()}
        values = take_turns(
            {**seconds, **streamed},
            settings.rounds,
            lambda number: console.print(f"round {number} of {settings.rounds}" if number else "warming up"),
        )
        return Timed(
            seconds={name: values[name] for name in seconds},
            tokens_per_second={n: values[str(n)] for n in streams},
            speculated=speculated,
            bandwidth=_bandwidth(pair.base, task),
            engines={name: engine.describe() for name, engine in field.engines.items()},
        )


def _bandwidth(base: PreTrainedModel, task: Task) -> Bandwidth | None:
    if base.device.type != "cuda":
        return None
    return Bandwidth(
        bytes_per_token=bytes_per_token(base, task.prompt_tokens + task.tokens / 2),
        copied_per_second=copy_bandwidth(base.device),
    )


def _real(settings: DecodeSettings, where: Where, console: Console) -> RealPair | None:
    if settings.real is None:
        return None
    console.print(f"counting drafts of {settings.real[1]} for {settings.real[0]}", markup=False)
    return count_real_pair(
        settings.real,
        settings.prompts,
        dtype=where.dtype,
        device=where.device,
        tokens=settings.tokens,
        seed=settings.seed,
    )


def _figures(
    settings: DecodeSettings, where: Where, timed: Timed, weights: Weights, real: RealPair | None
) -> list[Figure]:
    values = timed_ratios(timed.seconds, timed.tokens_per_second)
    values[figures.MEMORY] = [weights.engine / weights.base]
    if timed.bandwidth is not None:
        speeds = (timed.bandwidth.bytes_per_token / seconds for seconds in timed.seconds[figures.UNGUIDED])
        values[figures.BANDWIDTH] = [speed / timed.bandwidth.copied_per_second for speed in speeds]
    if real is not None:
        values[figures.REAL] = [real.drafting.passes_per_token]
    device = torch.device(where.device).type
    targets = figures.targets_for(device=device, base_shape=settings.base_shape, dtype=where.dtype)
    return [Figure(name=name, values=row, target=targets.get(name)) for name, row in values.items()]
