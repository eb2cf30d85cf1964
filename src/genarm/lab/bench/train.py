"""`run_train`: how fast, and in how much memory, an ARM is trained, beside trl's trainers on the same tokens.

Every contestant trains in a process of its own, where its peak memory is its own too; in a round each takes the same
steps on the same pairs, while the others wait.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from genarm.lab.bench.figures import Figure, train_figures
from genarm.lab.bench.settings import TrainSettings
from genarm.lab.bench.timing import take_turns
from genarm.lab.bench.train_process import CONTESTANTS, Job, Memory, Trained, training


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """All that was measured, and the figures that follow from it.

    Attributes:
        trained: what the contestants say of model and data; it is the same for all.
        seconds: {contestant: of a step, in each round}.
        memory: of each contestant.
    """

    settings: TrainSettings
    trained: Trained
    seconds: Mapping[str, Sequence[float]]
    memory: Mapping[str, Memory]
    figures: Sequence[Figure]


def run_train(settings: TrainSettings, console: Console) -> TrainResult:
    """Measure; `console` is told how far it has come.

    Raises:
        GenarmError: the model or the data do not serve.
    """
    with tempfile.TemporaryDirectory(prefix="genarm-bench-") as root, ExitStack() as stack:
        contestants = {}
        for number, name in enumerate(CONTESTANTS):
            console.print(f"loading: {name}")
            job = Job(settings=settings, contestant=name, output=Path(root, str(number)))
            contestants[name] = stack.enter_context(training(job))
        seconds = take_turns(
            {name: one.run for name, one in contestants.items()},
            settings.rounds,
            lambda number: console.print(f"round {number} of {settings.rounds}" if number else "warming up"),
        )
        memory = {name: one.memory for name, one in contestants.items()}
        trained = next(iter(contestants.values())).trained
    return TrainResult(
        settings=settings,
        trained=trained,
        seconds=seconds,
        memory=memory,
        figures=train_figures(seconds, {name: one.peak for name, one in memory.items()}),
    )
