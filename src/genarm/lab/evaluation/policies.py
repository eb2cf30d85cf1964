"""Policy accuracy: in which held-out pairs the policy that a reward makes raises the preferred response the more.

A training tells what the reward alone ranks. What guides is the sum with the base, normalised token by token, which
may rank otherwise (`genarm.lab.accuracy` scores both).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console

from genarm.errors import VocabularyError
from genarm.files import write_text
from genarm.lab.accuracy.run import measure
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.evaluation.recipe import Recipe
from genarm.lab.methods.models import Models
from genarm.provenance import claim, data_record
from genarm.statistics import Proportion
from genarm.training.config import TrainConfig
from genarm.training.data import held_out_source

_NOT_HERE = ("product", "distil")
"""Losses whose training measures the policy itself, at the weight that it is trained for, or learns from no pairs."""


_READING = ("split", "objective", "raw", "max_prompt_tokens", "max_response_tokens", "template_arg")
"""What of the settings decides how pairs are read."""


def policy_accuracies(
    recipe: Recipe, configs: Mapping[str, TrainConfig], models: Models, console: Console
) -> dict[str, Proportion]:
    """{reward trained for the run: policy accuracy at weight 1}, of ARMs that guide by themselves.

    The pairs are those that the recipe names for evaluation, read as in training by `configs`. What is measured already
    is read from `accuracy/NAME.json`; a reward whose policy cannot be scored on pairs is left out, and `console` told.
    """
    bases = {reward: spec.base for spec in reversed(recipe.methods) if (reward := spec.only_trained)}
    found = {}
    for name, config in configs.items():
        named = config.eval_data is not None or config.eval_split is not None
        if name in bases and named and config.loss not in _NOT_HERE:
            try:
                found[name] = _policy_accuracy(name, config, bases[name], models, console)
            except VocabularyError as error:  # guiding may do with an ARM that does not know all of the base's ids
                line = f"the policy accuracy of {name} is not measured: {error}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def _policy_accuracy(name: str, config: TrainConfig, base: str, models: Models, console: Console) -> Proportion | None:
    path = models.folder / "accuracy" / f"{name}.json"
    reward = f"@train/{name}"
    settings = _settings(config, models.resolve(reward), models.resolve(base), models)
    used = {key: getattr(settings, key) for key in _READING}
    record = {"reward": models.record(reward), "base": models.record(base), "pairs": data_record(settings.data), **used}
    claim(path, record)
    if not path.exists():
        console.print(f"policy accuracy of {name}", highlight=False, markup=False)
        rows = [row for row in measure(settings, console).measured if row.kind == "policy"]
        write_text(path, json.dumps([asdict(row.figures.overall.right) for row in rows]) + "\n")
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Proportion(**kept[0]) if kept else None


def _settings(config: TrainConfig, reward: str, base: str, models: Models) -> AccuracySettings:
    """Pairs as the training read them."""
    data, split = held_out_source(config)
    return AccuracySettings(
        models=(reward,),
        base=base,
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
