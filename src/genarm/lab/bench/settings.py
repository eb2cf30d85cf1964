"""What `genarm bench decode` and `genarm bench vllm` measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genarm.errors import ConfigError
from genarm.lab.bench.shapes import SHAPES
from genarm.sampling import check_seed

_LEAST_TOKENS = 8
_MOST_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """All that the figures depend on, but for the machine.

    Attributes:
        base_shape: a name of `SHAPES`.
        dtype: of the weights; None for bfloat16 where the device has it, and float32 elsewhere.
        device: None for the first GPU, if any.
        tokens: of each reply.
        rounds: in which every contestant runs once.
        streams: at once, for the throughput; 1 is always among them.
        agreement: acceptance probabilities of drafts.
        real: folders or hub ids of a real base and ARM.
        prompts: a file of prompts for the real pair.
        seed: of everything random.
    """

    base_shape: str = "200m"
    dtype: str | None = None
    device: str | None = None
    tokens: int = 64
    rounds: int = 7
    streams: Sequence[int] = (1, 4, 16)
    agreement: Sequence[float] = (0.8,)
    real: tuple[str, str] | None = None
    prompts: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        for value in self.agreement:
            if not 0 < value < 1:
                raise ConfigError(f"--agreement has {value:g}; each must be above 0 and below 1")
        if self.prompts is not None and self.real is None:
            raise ConfigError("--prompts are for a real pair; give --real BASE ARM too, or leave them out")


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """All that the figures of `genarm bench vllm` depend on, but for the machine.

    Attributes:
        base_shape: a name of `SHAPES`.
        dtype: of the weights; None for bfloat16 where the device has it, and float32 elsewhere.
        tokens: of each reply.
        rounds: in which every contestant runs once at each number of streams.
        streams: at once.
        eager: without torch.compile and CUDA graphs, which vLLM uses by default.
        seed: of everything random.
    """

    base_shape: str = "200m"
    dtype: str | None = None
    tokens: int = 64
    rounds: int = 7
    streams: Sequence[int] = (1, 4, 16)
    eager: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)


def _check_common(settings: DecodeSettings | VllmSettings) -> None:
    check_seed(settings.seed)
    assert settings.base_shape in SHAPES
    if not _LEAST_TOKENS <= settings.tokens <= _MOST_TOKENS:
        raise ConfigError(f"--tokens is {settings.tokens}; it must be from {_LEAST_TOKENS} to {_MOST_TOKENS}")
    if settings.rounds < 1:
        raise ConfigError(f"--rounds is {settings.rounds}; it must be at least 1")
    if min(settings.streams) < 1:
        raise ConfigError(f"--streams has {min(settings.streams)}; each must be at least 1")
