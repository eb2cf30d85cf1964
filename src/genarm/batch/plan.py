"""How a batch of requests is decoded; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from genarm.errors import ConfigError
from genarm.sampling import Sampling, check_seed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the jobs are decoded.

    Attributes:
        sampling: how each reply is drawn.
        seed: of the run.
        num_samples: replies to each request.
        batch_size: replies decoded at once.
    """

    sampling: Sampling
    seed: int = field(default=0, metadata={"metavar": "S", "help": "of everything random"})
    num_samples: int = field(default=1, metadata={"help": "how many replies to each prompt"})
    batch_size: int = field(default=8, metadata={"metavar": "B", "help": "how many replies to decode at once"})

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_samples"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        check_seed(self.seed)
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                f"--num-samples is {self.num_samples} and --temperature 0, which would give the same reply "
                f"{self.num_samples} times; use a temperature above 0"
            )
