"""The figures of `genarm bench decode` and `genarm bench vllm`: ratios, and what was aimed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from genarm.lab.bench.timing import Spread, ratios, spread

TRANSFORMERS = "unguided, transformers generate"
UNGUIDED = "unguided, this engine"
NAIVE = "one LoRA ARM, naive two-model loop"
LORA = "one LoRA ARM, this engine"
TWO_LORAS = "two LoRA ARMs, this engine"
TUNED = "one tuned LoRA less the base, this engine"
TWO_TUNED = "two tuned LoRAs less the base, this engine"
HEAD = "one head ARM, this engine"
TWO_HEADS = "two head ARMs, this engine"
WISH = "one wish, this engine"
TWO_WISHES = "two wishes, this engine"
FULL = "full ARM of 1/8, no speculation, this engine"


def speculating(agreement: float) -> str:
    """The contestant that drafts from an ARM with this agreement."""
    return f"full ARM of 1/8, speculation at {agreement:.0%} acceptance, this engine"


def at_streams(contestant: str, streams: int) -> str:
    """A contestant with so many streams at once."""
    return f"{contestant.removesuffix(', this engine')}, {streams} streams, this engine"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit, not to exceed or to reach."""

    limit: float
    at_most: bool

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:.2f}"

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: a value per round, or a single one; the target where there is one for this device and shape."""

    name: str
    values: Sequence[float]
    target: Target | None

    @property
    def spread(self) -> Spread:
        """Of the values."""
        return spread(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median is on the target's right side; None without a target."""
        return None if self.target is None else self.target.met(self.spread.median)


Targets: TypeAlias = Mapping[str, Target]


def _most(limit: float) -> Target:
    return Target(limit=limit, at_most=True)


def _least(limit: float) -> Target:
    return Target(limit=limit, at_most=False)


def time_over_unguided(contestant: str) -> str:
    """The figure of a contestant's time per token over the unguided base's."""
    return f"{contestant.removesuffix(', this engine')}: time per token over the unguided base"


def streams_over_one(streams: int) -> str:
    """The figure of the throughput at so many streams."""
    return f"one LoRA ARM, {streams} streams over 1: tokens/s"


OVER_NAIVE = "one LoRA ARM: speed over the naive two-model loop"
OVER_TRANSFORMERS = "unguided base: speed over transformers generate"
MEMORY = "two LoRA ARMs: memory for weights over the base's"
BANDWIDTH = "unguided base: share of the memory's copy bandwidth"
REAL = "real pair, w=1, T=1: forwards of the base per token"

_ANYWHERE: Targets = {REAL: _most(0.40)}
_UNTRAINED: Targets = {
    **{time_over_unguided(name): _most(1.15) for name in (TUNED, WISH)},
    **{time_over_unguided(name): _most(1.30) for name in (TWO_TUNED, TWO_WISHES)},
    **{time_over_unguided(name): _most(1.03) for name in (HEAD, at_streams(HEAD, 16))},
}
_THERE: Mapping[tuple[str, str, str], Targets] = {
    ("cpu", "200m", "bfloat16"): {
        time_over_unguided(LORA): _most(1.15),
        time_over_unguided(TWO_LORAS): _most(1.30),
        time_over_unguided(FULL): _most(1.20),
        time_over_unguided(speculating(0.8)): _most(0.60),
        OVER_NAIVE: _least(1.8),
        streams_over_one(16): _least(6.0),
        OVER_TRANSFORMERS: _least(1.0),
        MEMORY: _most(1.05),
        **_UNTRAINED,
    },
    ("cuda", "7b", "bfloat16"): {
        time_over_unguided(LORA): _most(1.10),
        BANDWIDTH: _least(0.70),
        **_UNTRAINED,
    },
}


def targets_for(*, device: str, base_shape: str, dtype: str) -> Targets:
    """Targets are set for a type of device, a shape of the base and a dtype; elsewhere there are few."""
    return {**_ANYWHERE, **_THERE.get((device, base_shape, dtype), {})}


def timed_ratios(
    seconds: Mapping[str, Sequence[float]], tokens_per_second: Mapping[int, Sequence[float]]
) -> dict[str, list[float]]:
    """{figure: ratio in each round} of everything that was timed.

    Args:
        seconds: {contestant: seconds per token in each round}.
        tokens_per_second: {streams: tokens per second in each round}, 1 among them.
    """
    unguided = seconds[UNGUIDED]
    of = {at_streams(HEAD, n): at_streams(UNGUIDED, n) for n in tokens_per_second}
    guided = [name for name in seconds if name not in (TRANSFORMERS, UNGUIDED, NAIVE, *of.values())]
    return {
        **{time_over_unguided(name): ratios(seconds[name], seconds[of.get(name, UNGUIDED)]) for name in guided},
        OVER_NAIVE: ratios(seconds[NAIVE], seconds[LORA]),
        **{
            streams_over_one(streams): ratios(row, tokens_per_second[1])
            for streams, row in tokens_per_second.items()
            if streams != 1
        },
        OVER_TRANSFORMERS: ratios(seconds[TRANSFORMERS], unguided),
    }


# --- inside vLLM ------------------------------------------------------------------------------------------------------

VLLM_PLAIN = "plain vLLM"
VLLM_FULL = "full ARM of 1/8"
VLLM_LORA = "one LoRA ARM, trunk shared"
VLLM_TWO_LORAS = "two LoRA ARMs, trunk shared"
VLLM_MERGED = "one LoRA ARM, merged into a model of its own"
VLLM_HEAD = "one head ARM"
VLLM_CONTESTANTS = (VLLM_PLAIN, VLLM_FULL, VLLM_LORA, VLLM_TWO_LORAS, VLLM_MERGED, VLLM_HEAD)


def over_plain(contestant: str, streams: int) -> str:
    """The figure of a contestant's tokens per second over plain vLLM's with the base."""
    return f"{contestant}, {_so_many(streams)}: tokens/s over plain vLLM"


def shared_over_merged(streams: int) -> str:
    """The figure of what sharing the trunk gains."""
    return f"one LoRA ARM, {_so_many(streams)}: tokens/s with the trunk shared over merged"


def _so_many(streams: int) -> str:
    return "1 stream" if streams == 1 else f"{streams} streams"


def vllm_targets(base_shape: str) -> Targets:
    """For models that have a size, wherever they run."""
    if base_shape == "tiny":
        return {}
    loras = {VLLM_LORA: 0.85, VLLM_MERGED: 0.45}
    return {
        over_plain(VLLM_FULL, 1): _least(0.80),
        over_plain(VLLM_FULL, 16): _least(0.75),
        over_plain(VLLM_HEAD, 16): _least(0.95),
        **{over_plain(name, n): _least(limit) for name, limit in loras.items() for n in (1, 16)},
    }


def vllm_ratios(rates: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """{figure: ratio in each round}, from {streams: {contestant: tokens per second in each round}}."""
    found = {
        over_plain(name, streams): ratios(rows[name], rows[VLLM_PLAIN])
        for name in VLLM_CONTESTANTS[1:]
        for streams, rows in rates.items()
    }
    gains = {shared_over_merged(n): ratios(rows[VLLM_LORA], rows[VLLM_MERGED]) for n, rows in rates.items()}
    return found | gains


# --- training ---------------------------------------------------------------------------------------------------------

TRAIN_PACKED = "ARM, packed"
TRAIN_PADDED = "ARM, padded rows"
TRAIN_CPO = "CPO, trl"
TRAIN_REFERENCE = "ARM with a reference, packed"
TRAIN_DPO = "DPO, trl"


def train_figures(seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int]) -> list[Figure]:
    """From {contestant: seconds per step in each round} and {contestant: bytes at most}."""
    figures = []
    for ours, other, faster, smaller in (
        (TRAIN_PACKED, TRAIN_CPO, _least(1.8), _most(0.6)),
        (TRAIN_REFERENCE, TRAIN_DPO, _least(2.5), None),
        (TRAIN_PACKED, TRAIN_PADDED, None, None),
    ):
        speed, share = ratios(seconds[other], seconds[ours]), peaks[ours] / peaks[other]
        figures += [
            Figure(name=f"{ours}: speed over {other}", values=speed, target=faster),
            Figure(name=f"{ours}: peak memory over {other}", values=[share], target=smaller),
        ]
    return figures
