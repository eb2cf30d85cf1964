"""Recipes: every one of ours reads, and every mistake is named."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from genarm.errors import ConfigError
from genarm.lab.evaluation.recipe import Recipe
from genarm.lab.evaluation.recipe_file import load_recipe, scales
from genarm.lab.evaluation.run import kl_bound

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))

MINIMAL: dict[str, Any] = {
    "prompts": {"data": "prompts.jsonl", "count": 4},
    "reference": "base",
    "methods": [
        {"kind": "sample", "name": "base", "model": "m"},
        {"kind": "genarm", "name": "guided", "base": "m", "rewards": {"a": "arm", "b": "arm2"}, "weights": {"b": 0.5}},
    ],
    "judges": [{"name": "truth", "kind": "function", "source": "m:f"}],
}


def read(tmp_path: Path, **changes: Any) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps({"title": "T", "tiny": {**MINIMAL, **changes}}))
    return load_recipe(path, "tiny")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_in_every_scale(path: Path) -> None:
    assert "paper" in scales(path)
    for scale in scales(path):
        recipe = load_recipe(path, scale)
        trained = {f"@train/{spec.name}" for spec in recipe.train}
        used = {ref for spec in recipe.methods for ref in (*spec.roles.values(), *spec.named.values())}
        used |= {judge.source for judge in recipe.judges if judge.kind == "reward"}
        assert {ref for ref in used if ref.startswith("@train/")} <= trained
        assert recipe.methods[0].kind == "sample"  # the base comes first


def test_a_grid_of_weights_is_a_row_each(tmp_path: Path) -> None:
    grid = [{"a": 1, "b": 0}, {"a": 0.5}]
    methods = [MINIMAL["methods"][0], {**MINIMAL["methods"][1], "weights": grid}]
    _, first, second = read(tmp_path, methods=methods).methods
    assert (first.name, second.name) == ("guided (a 1, b 0)", "guided (a 0.5, b 1)")
    assert first.family == second.family == "guided"
    assert second.weights == {"a": 0.5, "b": 1.0}


def read_like(tmp_path: Path, other: dict[str, Any], like: object = "tiny") -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps({"tiny": MINIMAL, "other": {"like": like, **other}, "third": {"like": "other"}}))
    return load_recipe(path, "other")


def test_a_misspelt_training_is_not_one_more(tmp_path: Path) -> None:
    train = [{"name": "gold", "kind": "trajectory", "model": "m", "data": "d.jsonl"}]
    path = tmp_path / "recipe.toml"
    changed = {"like": "tiny", "train": [{"name": "glod", "max_steps": 9}]}
    path.write_text(tomli_w.dumps({"tiny": {**MINIMAL, "train": train}, "other": changed}))
    with pytest.raises(ConfigError, match="'glod' is none of 'gold', or changed twice; a new entry needs a kind"):
        load_recipe(path, "other")


def test_a_scale_says_what_it_changes_in_another(tmp_path: Path) -> None:
    mine = {"kind": "sample", "name": "mine", "model": "m3"}
    methods = [{"name": "guided", "weights": {"a": 2}, "family": "f"}, mine]
    changed = read_like(tmp_path, {"seed": 5, "prompts": {"count": 9}, "methods": methods, "judges": []})
    whole = {**MINIMAL, "seed": 5, "prompts": {"data": "prompts.jsonl", "count": 9}, "judges": []}
    guided = {**MINIMAL["methods"][1], "weights": {"a": 2, "b": 0.5}, "family": "f"}
    expected = read(tmp_path, **{**whole, "methods": [MINIMAL["methods"][0], guided, mine]})
    assert replace(changed, scale="tiny", title="T") == expected


@pytest.mark.parametrize(
    ("like", "other", "message"),
    [
        ("large", {}, "like is 'large'; it must be a scale that is complete in itself: tiny"),
        (["tiny"], {}, r"like is \['tiny'\]; it must be"),
        ("other", {}, "like is 'other'; it must be"),
        ("third", {}, "like is 'third'; it must be"),  # which is like this one
        (
            "tiny",
            {"methods": [{"name": "guided"}, {"name": "guided"}]},
            "'guided' is none of 'base', 'guided', or changed",
        ),
        ("tiny", {"methods": [{"name": "guide", "weights": {"a": 2}}]}, "'guide' is none of 'base', 'guided'"),
        ("tiny", {"methods": [{"name": "guided", "top_k": 3}]}, "'guided' has the unknown key 'top_k'"),
        ("tiny", {"prompts": 4}, "prompts"),
    ],
)
def test_a_scale_like_another_is_checked_as_a_whole(
    tmp_path: Path, like: object, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_like(tmp_path, other, like)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [{"kind": "magic"}]}, "has the kind 'magic'; it must be one of sample, prompted, genarm"),
        ({"methods": [{"kind": "genarm", "name": "g"}]}, "'g' of kind genarm lacks base, rewards"),
        ({"methods": [{**MINIMAL["methods"][0], "top_k": 3}]}, "method 'base' has the unknown key 'top_k'"),
        ({"methods": [*MINIMAL["methods"], MINIMAL["methods"][0]]}, "the method 'base' has no file name of its own"),
        (
            {"methods": [MINIMAL["methods"][0], {**MINIMAL["methods"][1], "weights": {"c": 1}}]},
            "the weights of method 'guided' has the unknown key 'c'; allowed are a, b",
        ),
        (
            {"methods": [*MINIMAL["methods"], {**MINIMAL["methods"][0], "name": "guided)"}]},
            "the method 'guided' has no file name of its own; give it another name",
        ),
        ({"reference": "DPO"}, "there is no method 'DPO'; the recipe has base, guided"),
        ({"comparisons": [["base", "DPO"]]}, "there is no method 'DPO'"),
        ({"fronts": ["helpful"]}, "there is no judge 'helpful'; the recipe has truth"),
        ({"judges": [{"name": "j", "kind": "oracle", "source": "x"}]}, "judges.0.kind is 'oracle'; it must be 'funct"),
        ({"judges": [{"name": "j", "kind": "llm"}]}, "recipe.judges.0 lacks 'source'; allowed are name, kind, source"),
        ({"prompts": {"data": "x", "count": 1}}, "prompts.count is 1; it must be greater than or equal to 2"),
        ({"prompts": {"data": "x", "number": 4}}, "prompts has the unknown key 'number'"),
        ({"seed": -1}, "seed is -1; it must be greater than or equal to 0"),
        ({"speed": 1}, "recipe has the unknown key 'speed'; allowed are prompts, methods"),
        ({"train": [{"kind": "arm"}]}, "train.0.name is None; it must be a string"),
        ({"sampling": "greedy"}, "sampling is 'greedy'; it must be a table"),
        ({"claims": [{"what": "better", "first": "base", "second": "guided"}]}, "what is 'better'; it must be 'above'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.toml'}, scale tiny: ")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"template": "Say: {}"}, "a template, which goes with a column"),
        ({"template": "Say:", "column": "prompt"}, "it needs a {} for the prompt"),
        ({"column": "prompt", "objective": "better"}, "a column and an objective"),
    ],
)
def test_what_would_do_nothing_with_prompts_is_refused(prompts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, prompts={**MINIMAL["prompts"], **prompts})


@pytest.mark.parametrize("kind", ["args", "transfer-q"])
def test_a_temperature_is_given_where_it_counts(kind: str, tmp_path: Path) -> None:
    roles = {"base": "m", **({"policy": "p"} if kind == "transfer-q" else {})}
    method = {"kind": kind, "name": "x", **roles, "rewards": {"a": "r"}}

    def drawn(**more: Any) -> float:
        recipe = read(tmp_path, methods=[*MINIMAL["methods"], {**method, **more}])
        return recipe.draw(recipe.method("x")).temperature

    assert (drawn(), drawn(temperature=0.01)) == (0.7, 0.01)
    with pytest.raises(ConfigError, match=r"give it as temperature = 0\.01 beside the kind"):
        drawn(sampling={"temperature": 0.01})
    with pytest.raises(ConfigError, match="interleave, which is for all methods"):
        drawn(sampling={"interleave": True})


def test_a_bound_is_from_the_base_only_where_the_base_is_sampled(tmp_path: Path) -> None:
    """Best-of-1 at another temperature is that temperature, however far from the base that is."""
    best = {"kind": "best-of-n", "base": "m", "rewards": {"a": "r"}, "n": 4}
    cooled = {**best, "name": "cooled", "sampling": {"temperature": 0.5}}
    recipe = read(tmp_path, methods=[*MINIMAL["methods"], {**best, "name": "plain"}, cooled])
    found = [kl_bound(recipe, recipe.method(name)) for name in ("plain", "cooled", "base")]
    assert found == [pytest.approx(math.log(4) - 3 / 4), None, None]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*nothing\.toml: No such file"):
        load_recipe(tmp_path / "nothing.toml", "tiny")
    broken = tmp_path / "broken.toml"
    broken.write_text("title = ")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_recipe(broken, "tiny")
    with pytest.raises(ConfigError, match="has no scale 'huge'; it has tiny, real, gpu, paper"):
        load_recipe(next(path for path in RECIPES if path.stem == "hh-rlhf"), "huge")
