"""A whole comparison, small: from recipe to report, after a kill as without one."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from builders.shrunk import BASE, shrunk, shrunk_real
from builders.tiny import SHARED
from genarm.cli.main import main
from genarm.errors import DataError
from genarm.lab.demo.world import overall
from genarm.lab.evaluation.answers import answering, read_answers
from genarm.lab.evaluation.recipe import Recipe, slug
from genarm.lab.evaluation.recipe_file import load_recipe, scales
from genarm.lab.evaluation.run import RunOptions, evaluate
from genarm.lab.evaluation.world import WorldSettings, make_world
from genarm.lab.methods.kinds import METHODS

pytest.importorskip("trl")

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
EXPERIMENTS = [FOLDER / f"{name}.toml" for name in ("hh-rlhf", "weak-to-strong", "pku-pareto")]
SCALES = [(path, scale) for path in sorted(FOLDER.glob("*.toml")) for scale in scales(path)]
LONG = ("hh-rlhf", "pku-pareto", "weak-to-strong", "code")
"""Recipes whose real scale takes long, however little there is of it."""
QUIET = Console(quiet=True)


def options(output: Path) -> RunOptions:
    return RunOptions(output=output, command="genarm eval recipe.toml", device="cpu")


def test_world(tmp_path: Path) -> None:
    table = {"pairs": 40, "base": BASE, "strong": {**BASE, "hidden": 64}, "writer": "crowd"}
    settings = WorldSettings.from_table(table, seed=3)
    make_world(tmp_path / "world", settings, QUIET)
    sizes = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "world" / name).num_parameters() for name in ("base", "strong")
    ]
    assert sizes[0] < sizes[1]
    prompts = {
        suffix: {
            json.loads(line)["prompt"][0]["content"]
            for line in (tmp_path / "world" / f"overall{suffix}.jsonl").read_text().splitlines()
        }
        for suffix in ("", "-gold", "-held-out")
    }
    assert not prompts[""] & prompts["-gold"]
    assert not (prompts[""] | prompts["-gold"]) & prompts["-held-out"]
    rows = [json.loads(line) for line in (tmp_path / "world" / "overall.jsonl").read_text().splitlines()]
    margins = [
        overall(row["prompt"][0]["content"], row["chosen"][0]["content"])
        - overall(row["prompt"][0]["content"], row["rejected"][0]["content"])
        for row in rows
    ]
    assert sum(margin > 0 for margin in margins) > sum(margin < 0 for margin in margins)


def command(folder: Path) -> list[str]:
    return ["eval", str(folder / "recipe.toml"), "--output", str(folder / "run"), "--device", "cpu"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Recipe, Path]]:
    """Runs a tiny recipe as a user would run it, shrunk, but each only once: the recipe, and the folder of both."""
    done: dict[Path, tuple[Recipe, Path]] = {}

    def run(path: Path) -> tuple[Recipe, Path]:
        if path not in done:
            folder = tmp_path_factory.mktemp(path.stem)
            recipe = shrunk(path, folder / "recipe.toml")
            assert main(command(folder)) == 0
            done[path] = recipe, folder
        return done[path]

    return run


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_tiny_recipes_smoke(path: Path, ran: Callable[[Path], tuple[Recipe, Path]]) -> None:
    """Every tiny recipe comes to its end, and a second call finds nothing to do."""
    recipe, folder = ran(path)
    run = folder / "run"
    report = (run / "report.html").read_text()
    results = json.loads((run / "results.json").read_text())
    assert {spec.name for spec in recipe.methods} == {row["name"] for row in results["rows"]}
    for spec in recipe.methods:
        assert f">{html.escape(spec.name)}</" in report
    answers = {file.name: file.read_bytes() for file in (run / "answers").iterdir()}
    replies = {name: rows for name, rows in answers.items() if name.endswith(".jsonl")}
    assert len(replies) == len(recipe.methods)
    assert set(answers) == set(replies) | {f"{name}.settings.json" for name in replies}
    for rows in replies.values():
        assert [json.loads(line)["index"] for line in rows.splitlines()] == list(range(6))
    assert main(command(folder)) == 0
    assert {file.name: file.read_bytes() for file in (run / "answers").iterdir()} == answers
    assert (run / "report.html").read_text() == report


@pytest.mark.parametrize("name", ["gsm8k", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_real_recipes_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe of a real model comes to its end, on models and pairs that are there already."""
    if not SHARED.exists():
        pytest.skip(f"needs {SHARED}")
    monkeypatch.chdir(FOLDER.parent)  # where its judges are
    models = SHARED / "models"
    recipe = shrunk_real(
        FOLDER / f"{name}.toml", tmp_path / "recipe.toml", whole=models / "lm-medium", small=models / "lm-small"
    )
    folder = tmp_path / "run"
    assert (
        main(["eval", str(tmp_path / "recipe.toml"), "--scale", "real", "--output", str(folder), "--device", "cpu"])
        == 0
    )
    results = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [spec.name for spec in recipe.methods]


SMALL = {
    "reference": "base",
    "train": [],
    "methods": [
        {"kind": "sample", "name": "base", "model": "@world/base"},
        {"kind": "sample", "name": "cold", "model": "@world/base", "sampling": {"temperature": 0.5}},
    ],
    "judges": [{"name": "truth", "kind": "function", "source": "genarm.lab.demo.world:overall"}],
    "comparisons": [],
    "claims": [],
    "gaps": [],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe with two methods and nothing trained, and its run, to be copied."""
    folder = tmp_path_factory.mktemp("small")
    recipe = shrunk(EXPERIMENTS[0], folder / "recipe.toml", **SMALL)
    evaluate(recipe, options(folder / "run"), QUIET)
    return recipe, folder / "run"


def test_killed_and_gone_on_with(small: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Whatever is left of a run, the report is that of an unbroken one, but for the time that it took."""
    recipe, whole = small
    shutil.copytree(whole, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "killed")
    file = tmp_path / "killed" / "answers" / "base.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:17])  # a whole batch, a row of the next, and a torn one
    (tmp_path / "killed" / "answers" / "cold.jsonl").unlink()
    shutil.rmtree(tmp_path / "killed" / "judgements")
    for name in ("report.html", "results.json", "results.md"):
        (tmp_path / "killed" / name).unlink()
    evaluate(recipe, options(tmp_path / "killed"), QUIET)

    def rows(folder: str, name: str) -> list[dict[str, Any]]:
        text = (tmp_path / folder / "answers" / name).read_text()
        found = [json.loads(line) for line in text.splitlines()]
        for row in found:
            row.get("batch_cost", {}).pop("seconds", None)
        return found

    for name in ("base.jsonl", "cold.jsonl"):
        assert rows("killed", name) == rows("whole", name)
    scores = [json.loads((tmp_path / f / "results.json").read_text())["rows"] for f in ("whole", "killed")]
    assert [row["scores"] for row in scores[0]] == [row["scores"] for row in scores[1]]


@pytest.mark.parametrize(("score", "said"), [("0", True), ("len(response)", False)])
def test_a_judge_that_tells_nothing_apart_is_named(
    score: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero for every reply is more often a judge that cannot read them than a fact, and looks like one in a table."""
    module = f"judge_that_gives_{'zero' if said else 'lengths'}"
    (tmp_path / f"{module}.py").write_text(f"def judged(prompt, response, row):\n    return {score}\n")
    monkeypatch.syspath_prepend(tmp_path)
    judges = [{"name": "mine", "kind": "function", "source": f"{module}:judged"}]
    recipe = shrunk(EXPERIMENTS[0], tmp_path / "recipe.toml", **{**SMALL, "judges": judges})
    evaluate(recipe, options(tmp_path / "run"), QUIET)
    assert ("mine gave 0 to all" in (tmp_path / "run" / "results.md").read_text(encoding="utf-8")) == said


def test_changed_settings_are_never_mixed(small: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, whole = small
    shutil.copytree(whole, tmp_path / "run")
    methods = SMALL["methods"]
    assert isinstance(methods, list)
    warm = {"kind": "sample", "name": "warm", "model": "@world/base", "sampling": {"temperature": 0.7}}
    more = [*methods, warm]
    before = (tmp_path / "run" / "answers" / "base.jsonl").read_bytes()
    evaluate(
        shrunk(EXPERIMENTS[0], tmp_path / "more.toml", **{**SMALL, "methods": more}), options(tmp_path / "run"), QUIET
    )
    assert (tmp_path / "run" / "answers" / "base.jsonl").read_bytes() == before  # a method may come later

    colder = [methods[0], {**methods[1], "sampling": {"temperature": 0.4}}]
    changed = shrunk(EXPERIMENTS[0], tmp_path / "colder.toml", **{**SMALL, "methods": colder})
    with pytest.raises(
        DataError,
        match=r"cold.jsonl was made with other settings: temperature of sampling of method was 0.5 and is 0.4",
    ):
        evaluate(changed, options(tmp_path / "run"), QUIET)
    with pytest.raises(DataError, match="run was made with other settings: seed was 11 and is 5; go on with"):
        evaluate(shrunk(EXPERIMENTS[0], tmp_path / "s.toml", **{**SMALL, "seed": 5}), options(tmp_path / "run"), QUIET)
    with pytest.raises(DataError, match="dtype was 'auto' and is 'bfloat16'"):
        evaluate(recipe, dataclasses.replace(options(tmp_path / "run"), dtype="bfloat16"), QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"already has content and no recipe\.json in it"):
        evaluate(recipe, options(tmp_path / "other"), QUIET)


def test_a_method_that_dies_loses_its_batch_alone(tmp_path: Path) -> None:
    from genarm.lab.evaluation.prompts import Question
    from genarm.lab.methods.interface import Meter
    from genarm.lab.replies import SampledReply

    class Dying:
        calls = 0

        def answer(self, prompts: Any, *, seed: int, meter: Meter) -> list[SampledReply]:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            meter.add("base", forwards=2 * len(prompts), positions=5)
            return [SampledReply(text=f"{seed}", token_ids=(1, 2), finish_reason="stop") for _ in prompts]

        def log_probs(self, prompts: Any, replies: Any) -> None:
            return None

    questions = [Question(prompt=str(i), text=str(i), ids=(i,)) for i in range(7)]
    shared: dict[str, Any] = {"batch_size": 2, "at_once": 2, "seed": 1, "settings": "s"}

    def run(method: Any) -> list[int]:
        return list(answering(tmp_path / "a.jsonl", lambda: (method, None), questions, **shared))  # type: ignore[arg-type, return-value]

    with pytest.raises(KeyboardInterrupt):
        run(Dying())
    assert run(Dying()) == [4, 2, 1]
    found = read_answers(tmp_path / "a.jsonl", "s")
    assert len(found.replies) == 7
    assert found.cost.forwards == {"base": 14}
    assert found.cost.tokens == 14
    assert len(found.cost.seconds) == 4
    assert found.kl is None


@pytest.mark.parametrize(("path", "scale"), SCALES, ids=lambda part: getattr(part, "stem", part))
def test_plans(path: Path, scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(path), "--scale", scale, "--plan", "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    recipe = load_recipe(path, scale)
    for spec in recipe.methods:
        assert spec.name in out
    assert "decoding takes" in out
    assert re.search(r"\b0 s\b", out) is None
    for size in recipe.sizes.values():
        assert (f"{size / 1e9:.3g} G" if size >= 1e9 else f"{size / 1e6:.3g} M") in out
    assert not (tmp_path / "run").exists()


def test_forwards_of_a_plan_are_the_most_that_a_method_does(ran: Callable[[Path], tuple[Recipe, Path]]) -> None:
    recipe, folder = ran(EXPERIMENTS[0])
    for spec in recipe.methods:
        tokens = recipe.draw(spec).max_new_tokens
        planned = sum(METHODS[spec.kind].forwards(spec, tokens).values()) * recipe.prompts.count
        lines = (folder / "run" / "answers" / f"{slug(spec.name)}.jsonl").read_text().splitlines()
        counts = [json.loads(line).get("batch_cost", {"counts": {}})["counts"] for line in lines]
        done = sum(count["forwards"] for each in counts for count in each.values())
        assert 0 < done <= planned


def test_wrong_inputs(small: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path / "none.toml")]) == 2
    assert "cannot read the recipe" in capsys.readouterr().err
    assert main(["eval", str(EXPERIMENTS[0]), "--scale", "huge"]) == 2
    assert "it has tiny, real, gpu, paper" in capsys.readouterr().err
    too_many = {**SMALL, "prompts": {"data": "@world/prompts.jsonl", "count": 99999}}
    shrunk(EXPERIMENTS[0], tmp_path / "recipe.toml", **too_many)
    shutil.copytree(small[1], tmp_path / "run")
    assert main(command(tmp_path)) == 2
    assert "lower prompts.count" in capsys.readouterr().err
