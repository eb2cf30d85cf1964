"""The demo's world as a source of models and preferences: what a tiny recipe uses in place of downloads.

Written into the run's `world/`: `base` and, where wanted, `strong` (model folders); `prompts.jsonl`, held-out requests;
and pairs for each objective (helpful, harmless, and their sum, overall) on three sets of requests that have none in
common: `OBJECTIVE.jsonl` to train on, `OBJECTIVE-gold.jsonl` for a gold reward model, `OBJECTIVE-held-out.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm.data.tables import FORBID, read_table
from genarm.errors import ConfigError
from genarm.files import new_folder, write_text
from genarm.lab.demo.base import BaseSettings, train_base
from genarm.lab.demo.pairs import judge, sample_duels, write_duels, write_pairs
from genarm.lab.demo.world import OBJECTIVES, Request, split_requests
from genarm.text.prompts import as_conversation


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What is made of the world.

    Attributes:
        seed: of the split, the models and the pairs.
        pairs: pairs of replies per half.
        held_out_phrasings: of each topic's phrasings, those kept for measuring.
        sharpness: of the preferences (Bradley–Terry).
        base, strong: shapes and training of the models; no strong one if None.
        writer: who writes the replies of the pairs: one of the two models, or the crowd that they learnt from.
    """

    __pydantic_config__ = FORBID

    seed: int
    pairs: PositiveInt = 2400
    held_out_phrasings: PositiveInt = 2
    sharpness: PositiveFloat = 1.5
    base: BaseSettings = field(default_factory=BaseSettings)
    strong: BaseSettings | None = None
    writer: str = "base"

    @classmethod
    def from_table(cls, table: Mapping[str, Any], seed: int) -> WorldSettings:
        """From a recipe's table (raises ConfigError)."""
        settings: WorldSettings = read_table(cls, {"seed": seed, **table}, "world")
        return settings

    def __post_init__(self) -> None:
        writers = ("base", "crowd", *(["strong"] if self.strong else []))
        if self.writer not in writers:
            raise ConfigError(f"the world's writer is {self.writer!r}; it must be one of {', '.join(writers)}")


def make_world(folder: Path, settings: WorldSettings, console: Console) -> None:
    """Write everything into the new folder `folder`; it appears when it is whole."""
    split = split_requests(settings.seed, held_out_phrasings=settings.held_out_phrasings)
    with new_folder(folder) as new:
        train_base(new / "base", split.train, settings=settings.base, seed=settings.seed, console=console)
        if settings.strong is not None:
            train_base(new / "strong", split.train, settings=settings.strong, seed=settings.seed + 1, console=console)
        prompts = [{"prompt": as_conversation(request.text)} for request in split.held_out]
        write_text(new / "prompts.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in prompts))
        half = len(split.train) // 2
        parts = {"": split.train[:half], "-gold": split.train[half:], "-held-out": split.held_out}
        for number, (suffix, requests) in enumerate(parts.items()):
            count = settings.pairs if suffix != "-held-out" else max(100, settings.pairs // 8)
            _write_pairs(new, suffix, requests, count, settings, number, console)


def _write_pairs(
    folder: Path,
    suffix: str,
    requests: tuple[Request, ...],
    count: int,
    settings: WorldSettings,
    number: int,
    console: Console,
) -> None:
    seed = 3 * settings.seed + number
    if settings.writer == "crowd":
        duels = write_duels(requests, count, seed=seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / settings.writer)
        tokenizer = AutoTokenizer.from_pretrained(folder / settings.writer)
        duels = sample_duels(model, tokenizer, requests, count, seed=seed, console=console)
    for objective in (*OBJECTIVES, "overall"):
        pairs = judge(duels, objective, sharpness=settings.sharpness, seed=seed)
        write_pairs(folder / f"{objective}{suffix}.jsonl", pairs)
