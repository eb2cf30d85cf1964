"""A recipe's tiny scale, smaller still: everything in it, but less of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from genarm.lab.evaluation.recipe import Recipe
from genarm.lab.evaluation.recipe_file import load_recipe

BASE = {"replies": 400, "hidden": 32, "heads": 2, "batch_size": 16}


def shrunk(path: Path, target: Path, **changes: Any) -> Recipe:
    """The recipe's tiny scale at `target`, with everything in it but less of it."""
    content = tomllib.loads(path.read_text())
    tiny = content["tiny"]
    tiny["world"] = {**tiny["world"], "pairs": 60, "base": BASE}
    if "strong" in tiny["world"]:
        tiny["world"]["strong"] = {**BASE, "hidden": 64}
    tiny["prompts"]["count"] = 6
    tiny["sampling"] |= {"max_new_tokens": 12, "batch_size": 4}
    tiny["training"] |= {"batch_size": 8, "lora_rank": 2}
    # Of points that differ in their weights alone, the two ends.
    inner = [spec["name"] for spec in tiny["train"] if spec["kind"] == "rlhf"][1:-1]
    tiny["train"] = [spec for spec in tiny["train"] if spec["name"] not in inner]
    tiny["methods"] = [m for m in tiny["methods"] if m.get("model", "").removeprefix("@train/") not in inner]
    for method in tiny["methods"]:
        if isinstance(method.get("weights"), list):
            method["weights"] = [method["weights"][0], method["weights"][-1]]
    for spec in tiny["train"]:
        spec["max_steps"] = 2
        if spec["kind"] == "rlhf":
            spec["max_response_tokens"] = 8
    target.write_text(tomli_w.dumps({**content, "tiny": {**tiny, **changes}}))
    return load_recipe(target, "tiny")


def shrunk_real(path: Path, target: Path, *, whole: Path, small: Path) -> Recipe:
    """The recipe's real scale at `target`, with models that take no time, and of its rows and steps the fewest.

    `whole` stands for the real model, and `small` for its sibling.
    """
    text = path.read_text().replace('".real-model"', f'"{whole}"').replace('".real-sibling"', f'"{small}"')
    content = tomllib.loads(text.replace('"../shared/', f'"{path.resolve().parents[2]}/shared/'))
    real = content["real"]
    real.pop("sizes")
    real["prompts"]["count"] = 2
    real["sampling"] |= {"max_new_tokens": 4, "batch_size": 2}
    real["training"] |= {"max_prompt_tokens": 32, "max_response_tokens": 16, "eval_split": "train[:4]"}
    for pairs in real.get("pairs", []):
        pairs |= {"count": 10} if pairs["task"] == "code" else {}
    for spec in real["train"]:
        spec["max_steps"] = 1
        spec["batch_size"], spec["accumulation"] = 2, 1
    real["judges"] = [judge for judge in real["judges"] if judge["name"] != "sentiment"]  # of another package
    target.write_text(tomli_w.dumps({**content, "real": real}))
    return load_recipe(target, "real")
