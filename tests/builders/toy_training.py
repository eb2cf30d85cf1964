"""A toy preference that a tiny model learns in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from builders.tiny import save_member, tiny_model
from genarm.training.config import TrainConfig
from genarm.training.run import TrainResult, train

GOOD, BAD = [f"w{i}" for i in range(10)], [f"w{i}" for i in range(10, 20)]


def toy_preferences(n: int, seed: int) -> list[dict[str, Any]]:
    """Good words are preferred to bad ones; length and prompt say nothing."""
    rng = random.Random(seed)

    def text(words: list[str]) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 4)))

    return [
        {
            "prompt": [{"role": "user", "content": text([f"w{i}" for i in range(20, 40)])}],
            "chosen": [{"role": "assistant", "content": text(GOOD)}],
            "rejected": [{"role": "assistant", "content": text(BAD)}],
        }
        for _ in range(n)
    ]


def write_toy(folder: Path, *, family: str = "llama", n: int = 96, spread: float = 0.05) -> dict[str, Any]:
    """A tiny model and toy data in `folder`; returns the settings of a short run on them."""
    save_member(tiny_model(family, spread=spread), folder / "model")
    for name, count, seed in (("train", n, 0), ("test", 60, 1)):
        rows = toy_preferences(count, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "test.jsonl"),
        "output": folder / "arm",
        "batch_size": 8,
        "accumulation": 1,
        "max_prompt_tokens": 16,
        "max_response_tokens": 16,
        "learning_rate": 5e-3,
        "eval_steps": 6,
    }


def run(settings: dict[str, Any], **changes: Any) -> TrainResult:
    return train(TrainConfig(**{**settings, **changes}), console=Console(quiet=True))
