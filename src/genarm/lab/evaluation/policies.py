"""Policy accuracy: in which held-out pairs the policy that a reward makes raises the preferred response the more.

A training tells what the reward alone ranks. What guides is the sum with the base, normalised token by token, which
may rank otherwise (`genarm.lab.accuracy` scores both).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from genarm.files import write_text
from genarm.lab.accuracy.run import measure
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.evaluation.recipe import Recipe, TrainSpec
from genarm.lab.methods.models import Models
from genarm.provenance import claim, data_record
from genarm.statistics import Proportion
from genarm.training.config import make_config
from genarm.training.data import held_out_source

_NOT_HERE = ("product", "distil")
"""Losses whose training measures the policy itself, at the weight that it is trained for, or learns from no pairs."""


def policy_accuracies(recipe: Recipe, models: Models, console: Console) -> dict[str, Proportion]:
    """{reward trained for the run: policy accuracy at weight 1}, of ARMs that guide by themselves.

    The pairs are those that its training held out of its own data, where the recipe names them. What is measured
    already is read from `accuracy/NAME.json`.
    """
    bases = {reward: spec.base for spec in reversed(recipe.methods) if (reward := spec.only_trained)}
    found = {}
    for spec in recipe.train:
        named = {"eval_data", "eval_split"} & spec.settings.keys()
        if spec.name in bases and named and spec.settings.get("loss") not in _NOT_HERE:
            found[spec.name] = _policy_accuracy(spec, bases[spec.name], models, console)
    return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def _policy_accuracy(spec: TrainSpec, base: str, models: Models, console: Console) -> Proportion | None:
    path = models.folder / "accuracy" / f"{spec.name}.json"
    reward = f"@train/{spec.name}"
    settings = _settings(spec, reward, base, models)
    used = {name: getattr(settings, name) for name in _READING}
    record = {"reward": models.record(reward), "base": models.record(base), "pairs": data_record(settings.data), **used}
    claim(path, record)
    if not path.exists():
        console.print(f"policy accuracy of {spec.name}", highlight=False, markup=False)
        rows = [row for row in measure(settings, Console(quiet=True)).measured if row.kind == "policy"]
        write_text(path, json.dumps([asdict(row.figures.overall.right) for row in rows]) + "\n")
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Proportion(**kept[0]) if kept else None


_READING = ("split", "objective", "raw", "max_prompt_tokens", "max_response_tokens", "template_arg")


def _settings(spec: TrainSpec, reward: str, base: str, models: Models) -> AccuracySettings:
    """Pairs as the training read them."""
    resolved = {key: models.resolve(value) if isinstance(value, str) else value for key, value in spec.settings.items()}
    config = make_config({**resolved, "output": Path(models.resolve(reward))})
    data, split = held_out_source(config)
    return AccuracySettings(
        models=(models.resolve(reward),),
        base=models.resolve(base),
        data=data,
        split=split,
        objective=config.objective,
        raw=config.raw,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        template_arg=config.template_arg,
        dtype=models.dtype,
        device=models.device,
    )
