"""What is tuned, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from genarm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Where weights come from and where they go, each field as its help text says.

    Raises:
        ConfigError: a number out of range.
    """

    beta: float = field(
        default=0.1,
        metadata={
            "metavar": "B",
            "help": "what a nat of KL from the base costs, in log-odds of being preferred; half of it doubles all "
            "weights",
        },
    )
    scales: tuple[float, ...] = field(
        default=(0.5, 1.0, 1.5, 2.0, 3.0),
        metadata={
            "nargs": "+",
            "metavar": "X",
            "help": "the weights are tried X times as large, and 0 times",
        },
    )
    vary: str | None = field(
        default=None,
        metadata={
            "help": "only this reward's weight is scaled; the others stay as they are",
        },
    )
    budget: float | None = field(
        default=None,
        metadata={
            "metavar": "E",
            "help": "the best weights are looked for among those whose replies are at most E nats a token from the "
            "base, in the mean",
        },
    )
    output: Path | None = field(
        default=None,
        metadata={"metavar": "DIR", "help": "folder of what was measured (default: genarm-tune/FOLDER)"},
    )
    write: bool = field(default=False, metadata={"help": "make the weights that were found the folder's default ones"})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "put the weights that were found, and --max-kl, into the folder's presets.json under this name; "
            "genarm serve answers to MODEL@NAME"
        },
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"--beta is {self.beta:g}; it must be above 0")
        if any(not math.isfinite(scale) or scale < 0 for scale in self.scales):
            wrong = next(scale for scale in self.scales if not math.isfinite(scale) or scale < 0)
            raise ConfigError(f"--scales has {wrong:g}; each must be a number of at least 0")
        if not any(self.scales):
            raise ConfigError("--scales has no number above 0; give one at least")
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget >= 0):
            raise ConfigError(f"--budget is {self.budget:g}; it must be a number of nats of at least 0")
