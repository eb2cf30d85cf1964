"""Recipes, protocols and presets as a stranger may write them: right, or one line that names the place."""

from __future__ import annotations

import copy
import datetime
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from genarm.data.presets import read_presets
from genarm.errors import ConfigError
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.lab.evaluation.world import WorldSettings
from genarm.lab.judges.protocol import load_protocol

RECIPE: dict[str, Any] = {
    "seed": 1,
    "reference": "base",
    "prompts": {
        "data": "p.jsonl",
        "count": 4,
        "split": "train",
        "column": "q",
        "template": "{}",
    },
    "sampling": {"max_new_tokens": 8, "temperature": 0.5, "batch_size": 2, "interleave": True},
    "training": {"model": "m", "data": "d.jsonl", "lora": True, "learning_rate": 1e-3, "max_steps": 3},
    "train": [{"name": "arm", "kind": "arm", "beta": 0.1}, {"name": "gold", "kind": "trajectory", "epochs": 1.0}],
    "pairs": [{"name": "sums", "task": "mathematics", "data": "d.jsonl", "held_out": 0.25, "count": 9}],
    "methods": [
        {"kind": "sample", "name": "base", "model": "m", "sampling": {"temperature": 0.7, "batch_size": 1}},
        {"kind": "genarm", "name": "guided", "base": "m", "rewards": {"a": "x"}, "weights": [{"a": 1.0}, {"a": 0.5}]},
        {"kind": "best-of-n", "name": "best", "family": "f", "base": "m", "rewards": {"a": "x"}, "n": 4},
        {"kind": "transfer-q", "base": "m", "policy": "p", "rewards": {"a": "x"}, "top_k": 2, "temperature": 0.3},
        {"kind": "proxy-tuning", "base": "m", "tuned": "t", "untuned": "u", "weight": 1.5},
    ],
    "judges": [
        {"name": "truth", "kind": "function", "source": "m:f"},
        {"name": "j", "kind": "llm", "source": "pairwise", "settings": {"model": "x"}},
    ],
    "comparisons": [["best", "base"]],
    "gaps": [{"bottom": "base", "top": "best", "methods": ["proxy-tuning"], "judge": "truth"}],
    "fronts": ["truth"],
    "claims": [
        {"what": "level", "first": "best", "second": "base", "judge": "truth", "margin": 0.1},
        {"what": "gap", "first": "proxy-tuning", "second": "best", "judge": "truth", "share": 0.5},
        {"what": "front", "first": "guided", "second": "f", "equal_kl": True},
    ],
    "sizes": {"m": 1e9},
}

WRONG: tuple[Any, ...] = (
    *("5", "", 3, 0, -1, 2.5, -0.5, math.nan, math.inf, True, 10**30),
    *([], ["a"], [3], [[]], {}, {"a": "b"}, {"a": {}}, [{}], datetime.date(2026, 1, 1)),
)


def places(value: Any, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where `value` has something, at any depth."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*above, key)
        yield from places(item, *above, key)


def changed(table: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    found: Any = copy.deepcopy(table)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return found  # type: ignore[no-any-return]


def mutations(table: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any, dict[str, Any]]]:
    """Each value replaced by every wrong one; then each table with a key too many, and each without one."""
    for place in places(table):
        for value in WRONG:
            yield place, value, changed(table, place, value)
        missing = copy.deepcopy(table)
        inner: Any = missing
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        yield place, "nothing", missing
        yield place, "too much", changed(table, (*place[:-1], "speed"), 3) if isinstance(place[-1], str) else table


def same_kind(before: Any, now: Any) -> bool:
    """Whether `now` could stand for `before`: a number may be whole, but no text or truth value."""
    if type(before) is float:
        return type(now) in (int, float)
    return type(before) is type(now)


def test_every_mistake_in_a_recipe_is_one_line(tmp_path: Path) -> None:
    """A value of another type is refused; what is accepted is of the right one. Never anything but a ConfigError."""
    path = tmp_path / "r.toml"

    def load(table: dict[str, Any]) -> None:
        path.write_text(tomli_w.dumps({"tiny": table}))
        load_recipe(path, "tiny")

    load(RECIPE)
    refused = 0
    for place, value, table in mutations(RECIPE):
        before: Any = RECIPE
        for key in place:
            before = before[key]
        try:
            load(table)
        except ConfigError as error:
            refused += 1
            assert str(error).startswith(f"{path}, scale tiny: "), (place, value)
            assert "\n" not in str(error), (place, value)
        else:
            free = place[:2] in (("judges", 1), ("methods", 1), ("methods", 0)) and place[-1] in FREE
            assert value in ("nothing", "too much") or same_kind(before, value) or free, (place, value)
    assert refused > 1000


FREE = ("settings", "model", "weights", 0, 1)
"""An LLM's settings are looked at when the run begins; one table of weights may stand for a list of one."""


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("prompts", "count"), "5", "recipe.prompts.count is '5'; it must be an integer"),
        (("methods",), ["a"], "recipe.methods.0 is 'a'; it must be a table"),
        (("sampling", "temperature"), "hot", "recipe.sampling.temperature is 'hot'; it must be a number"),
        (("sampling", "temperature"), -1, "temperature is -1; it must be greater than or equal to 0"),
        (("prompts", "number"), 4, "recipe.prompts has the unknown key 'number'; allowed are data, count, split"),
        (("methods", 2, "n"), 2.5, "method 'best': n is 2.5; it must be an integer"),
        (("methods", 2, "n"), 0, "method 'best': n is 0; it must be greater than 0"),
        (("methods", 1, "weights"), [{"a": "heavy"}], "weights.0.a is 'heavy'; it must be a number"),
        (("methods", 0, "sampling"), {"temperature": "hot"}, "method 'base': sampling.temperature is 'hot'"),
        (("methods", 1, "rewards"), {"a": 3}, "method 'guided': rewards.a is 3; it must be a string"),
        (("train", 0, "name"), "../../x", "train.0.name is '../../x'"),
        (("pairs", 0, "name"), "/tmp/x", "recipe.pairs.0.name is '/tmp/x'"),
        (("train", 0, "beta"), "small", "train.0 (arm): --beta must be float or nothing, got 'small'"),
        (("train", 0, "speed"), 3, "train.0 (arm): unknown setting speed"),
        (("comparisons",), [["best"]], "recipe.comparisons.0"),
        (("judges", 0, "settings"), {"model": "x"}, "a judge of the kind function has no settings"),
        (("judges", 0, "kind"), "oracle", "recipe.judges.0.kind is 'oracle'; it must be 'function', 'reward'"),
    ],
)
def test_what_is_said(place: tuple[str | int, ...], value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps({"tiny": changed(RECIPE, place, value)}))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, "tiny")
    assert message in str(caught.value)


def test_every_mistake_in_a_world_is_one_line() -> None:
    world = {"pairs": 40, "sharpness": 1.5, "base": {"hidden": 32, "learning_rate": 0.1}, "writer": "crowd"}
    WorldSettings.from_table(world, 0)
    for place, value, table in mutations(world):
        try:
            WorldSettings.from_table(table, 0)
        except ConfigError as error:
            assert str(error).startswith("world") or type(value) is datetime.date, (place, value)
            assert "\n" not in str(error)


def test_every_mistake_in_a_protocol_is_one_line(tmp_path: Path) -> None:
    protocols: list[dict[str, Any]] = [
        {
            "model": "m",
            "system": "s",
            "template": "{prompt} {first} {second} {rubric}",
            "rubric": "r",
            "parser": {"kind": "two-scores", "line": "last", "low": 0.5, "high": 7},
            "sampling": {"max_tokens": 9, "temperature": 0.5, "seed": 3},
        },
        {
            "template": "{prompt} {first} {second}",
            "parser": {"kind": "verdict", "first": "[A]", "second": "[B]", "tie": "[C]"},
            "sampling": {"max_completion_tokens": 9},
        },
    ]
    path = tmp_path / "own.toml"
    for protocol in protocols:
        for place, value, table in ((("model",), "m", protocol), *mutations(protocol)):
            path.write_text(tomli_w.dumps(table))
            try:
                read = load_protocol(path)
                read.messages("p", "a", "b")
                read.parser("7 3")
                assert read.reply_limit > 0
            except ConfigError as error:
                assert "\n" not in str(error), (place, value)


def test_every_mistake_in_presets_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "presets.toml"
    presets = {"kind": {"helpful": 1.5, "harmless": 2}, "neutral": {}}
    for place, value, table in mutations(presets):
        path.write_text(tomli_w.dumps(table))
        try:
            found = read_presets(tmp_path, path)
        except ConfigError as error:
            assert "\n" not in str(error), (place, value)
            assert str(error).startswith(f"presets in {path}") or type(value) is datetime.date, (place, value)
        else:
            assert all(type(weight) in (int, float) for weights in found.values() for weight in weights.values())
    (tmp_path / "presets.json").write_text(json.dumps(presets))
