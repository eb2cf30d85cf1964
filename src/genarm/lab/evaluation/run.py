"""`evaluate`: one comparison from its recipe to the report, going on where an earlier run stopped.

In order: make the world (tiny recipes) and pairs (tasks), train the models, answer with every method, judge the
answers, draw up the report. Each step leaves a whole folder or whole rows behind, so that a run that is killed repeats
none of them:

    recipe.json           what everything here is made from, and on what; another run is refused
    world/  pairs/  train/  what is made and trained
    answers/NAME.jsonl    the replies of each method, with seeds, log-probabilities and cost
    judgements/JUDGE/     scores and verdicts, reply by reply
    report.html  results.md  results.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from genarm.files import check_output, write_text
from genarm.lab.evaluation.answers import Answers, answering, read_answers
from genarm.lab.evaluation.comparing import announce
from genarm.lab.evaluation.figures import Figures, figures, record
from genarm.lab.evaluation.judging import Judged, check_judges, judge_all
from genarm.lab.evaluation.policies import policy_accuracies
from genarm.lab.evaluation.prompts import Question, read_questions, reader
from genarm.lab.evaluation.provenance import answers_record, training_record
from genarm.lab.evaluation.recipe import Recipe, TrainSpec, slug
from genarm.lab.evaluation.report import report
from genarm.lab.evaluation.results import Measured, Results, Trained
from genarm.lab.evaluation.table import markdown, table
from genarm.lab.evaluation.tasks import held_out_file, make_pairs
from genarm.lab.evaluation.world import WorldSettings, make_world
from genarm.lab.machine import code_version, give_back, one_thread, this_machine
from genarm.lab.methods.interface import Method, MethodSpec, Parts
from genarm.lab.methods.kinds import METHODS
from genarm.lab.methods.models import Models
from genarm.lab.methods.sample import Sample
from genarm.model.placement import Placement
from genarm.model.references import find_device, positions_together
from genarm.model.trained import TRAIN_FIGURES
from genarm.provenance import alone, claim, data_record
from genarm.sampling import Sampling
from genarm.statistics import Proportion
from genarm.terminal import Bar
from genarm.training.config import TrainConfig, make_config
from genarm.training.run import train

RECIPE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class RunOptions(Placement):
    """Where and on what a comparison runs; a folder keeps to one dtype and device."""

    output: Path
    command: str


def evaluate(recipe: Recipe, options: RunOptions, console: Console) -> Figures:
    """Run `recipe` into `options.output` and return its figures.

    Raises:
        GenarmError: any mistake in the recipe, the models or the data; a folder that holds another run.
    """
    folder = options.output.resolve()
    announce(recipe, console)
    check_output(folder, folder=True)
    if recipe.world:
        WorldSettings.from_table(recipe.world, recipe.seed)
    circumstances = {"dtype": options.dtype, "device": find_device(options.device)}
    with alone(folder, noted=folder / RECIPE), one_thread() if recipe.world else nullcontext():
        claim(folder, {**recipe.foundation, **circumstances}, noted=folder / RECIPE)
        return _evaluate(recipe, options, folder, console)


def _evaluate(recipe: Recipe, options: RunOptions, folder: Path, console: Console) -> Figures:
    if recipe.world and not (folder / "world").exists():
        console.print(Text("World", style="bold"))
        make_world(folder / "world", WorldSettings.from_table(recipe.world, recipe.seed), console)
    models = Models(folder=folder, dtype=options.dtype, device=options.device)
    for pairs in recipe.pairs:
        made = held_out_file(folder / "pairs", pairs)
        claim(made, {"data": data_record(models.resolve(pairs.data))})
        if not made.exists():
            console.print(f"making the pairs {pairs.name} of {pairs.data}", highlight=False, markup=False)
            make_pairs(folder / "pairs", pairs, models.resolve(pairs.data), recipe.seed)
    questions = _questions(recipe, models)
    check_judges(recipe, questions, models)
    for number, spec in enumerate(recipe.train, start=1):
        claim(folder / "train" / spec.name, training_record(spec, models))
        if not (folder / "train" / spec.name / TRAIN_FIGURES).exists():
            console.print(Text(f"Training {spec.name} ({number} of {len(recipe.train)})", style="bold"))
            config = _train_config(spec, models, recipe.seed)
            train(config, resume=config.output.exists(), console=console)
            give_back()
    configs = {spec.name: _train_config(spec, models, recipe.seed) for spec in recipe.train}
    policies = policy_accuracies(recipe, configs, models, console)
    answers = _answer(folder, recipe, questions, models, console)
    console.print(Text("Judges", style="bold"))
    judged = judge_all(folder / "judgements", recipe, questions, answers, models, console)
    results = _results(recipe, options, models, questions, answers, judged, policies)
    return _write(folder, recipe, results, console)


def _write(folder: Path, recipe: Recipe, results: Results, console: Console) -> Figures:
    found = figures(results, recipe)
    write_text(folder / "results.json", json.dumps(record(found), indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "results.md", markdown(results, found))
    write_text(folder / "report.html", report(results, found))
    console.print(table(found))
    for note in results.notes:
        console.print(note, highlight=False, markup=False)
    console.print(f"wrote {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    return found


# --- training --------------------------------------------------------------------------------------------------


def _train_config(spec: TrainSpec, models: Models, seed: int) -> TrainConfig:
    """The settings of `genarm train` for one model."""
    given = {
        key: models.resolve(value) if isinstance(value, str) and key != "wish" else value  # "@FILE" is a text's file
        for key, value in spec.settings.items()
    }
    return make_config({"seed": seed, **given, "output": models.folder / "train" / spec.name})


def _trained(folder: Path, spec: TrainSpec, policy: Proportion | None) -> Trained:
    metrics = json.loads((folder / "train" / spec.name / TRAIN_FIGURES).read_text(encoding="utf-8"))
    kind = str(spec.settings.get("kind", "arm"))
    loss = str(spec.settings.get("loss", "arm")) if kind == "arm" else None
    return Trained(name=spec.name, kind=kind, metrics=metrics, loss=loss, policy=policy)


# --- answers ---------------------------------------------------------------------------------------------------


def _questions(recipe: Recipe, models: Models) -> list[Question]:
    base = models.files(recipe.methods[0].base)
    longest = max(recipe.draw(method).max_new_tokens for method in recipe.methods)
    room = (positions_together(base.config) or 10**9) - longest
    texts = {text for method in recipe.methods for text in method.texts}
    return read_questions(recipe.prompts, models.resolve(recipe.prompts.data), base.tokenizer, room, texts)


def _answer(
    folder: Path, recipe: Recipe, questions: Sequence[Question], models: Models, console: Console
) -> dict[str, Answers]:
    console.print(Text("Answers", style="bold"))
    paths = {spec.name: folder / "answers" / f"{slug(spec.name)}.jsonl" for spec in recipe.methods}
    settings = {
        spec.name: claim(paths[spec.name], answers_record(recipe, spec, models, questions)) for spec in recipe.methods
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=False) as progress:
        running: dict[TaskID, Iterator[int]] = {}
        for spec in recipe.methods:
            task = progress.add_task(spec.name, total=len(questions))
            running[task] = answering(
                paths[spec.name],
                lambda spec=spec: _method(spec, recipe, models, questions),  # type: ignore[misc]
                questions,
                batch_size=recipe.sampling.batch_size,
                at_once=recipe.draw(spec).batch_size,
                seed=recipe.seed,
                settings=settings[spec.name],
            )
        for task, rows in _in_turns(running) if recipe.sampling.interleave else _one_by_one(running):
            progress.advance(task, rows)
    return {spec.name: read_answers(paths[spec.name], settings[spec.name]) for spec in recipe.methods}


def _in_turns(running: dict[TaskID, Iterator[int]]) -> Iterator[tuple[TaskID, int]]:
    left = dict(running)
    while left:
        for task, rows in list(left.items()):
            count = next(rows, None)
            if count is None:
                del left[task]
            else:
                yield task, count


def _one_by_one(running: dict[TaskID, Iterator[int]]) -> Iterator[tuple[TaskID, int]]:
    for task, rows in running.items():
        for count in rows:
            yield task, count


def _method(spec: MethodSpec, recipe: Recipe, models: Models, questions: Sequence[Question]) -> tuple[Method, Sample]:
    """The method, and the model that it steers at temperature 1."""
    base = recipe.methods[0]
    if not recipe.sampling.interleave:
        models.keep((base, spec))
    tokenizer = models.files(base.base).tokenizer
    plain = Sample(models.policy(spec.roles.get("base", base.base)), tokenizer, Sampling())
    draw = recipe.draw(spec)
    sampling = Sampling(max_new_tokens=draw.max_new_tokens, temperature=draw.temperature)
    read = reader(recipe.prompts, questions, tokenizer)
    parts = Parts(spec=spec, models=models, tokenizer=tokenizer, sampling=sampling, reader=read)
    return METHODS[spec.kind].build(parts), plain


# --- results ---------------------------------------------------------------------------------------------------


def _results(
    recipe: Recipe,
    options: RunOptions,
    models: Models,
    questions: Sequence[Question],
    answers: dict[str, Answers],
    judged: Judged,
    policies: Mapping[str, Proportion],
) -> Results:
    measured = tuple(
        Measured(
            name=spec.name,
            family=spec.family,
            weights=spec.weights,
            replies=answers[spec.name].replies,
            tokens=tuple(len(ids) for ids in answers[spec.name].token_ids),
            scores=judged.scores[spec.name],
            kl=answers[spec.name].kl,
            kl_bound=kl_bound(recipe, spec),
            cost=answers[spec.name].cost,
            exponent=_exponent(recipe, spec, models),
            reward=spec.only_trained,
            steers_another=spec.roles.get("base", recipe.methods[0].base) != recipe.methods[0].base,
        )
        for spec in recipe.methods
    )
    trained = (note for spec in recipe.methods if spec.kind == "genarm" for note in models.notes(spec))
    return Results(
        title=recipe.title,
        scale=recipe.scale,
        command=options.command,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions=_versions(),
        machine=_machine(options.device),
        settings={"seed": recipe.seed, "prompts": len(questions), **asdict(recipe.sampling)},
        prompts=tuple(question.text for question in questions),
        reference=recipe.reference,
        measured=measured,
        verdicts=judged.verdicts,
        trained=tuple(_trained(models.folder, spec, policies.get(spec.name)) for spec in recipe.train),
        published=recipe.published,
        notes=(*dict.fromkeys(trained), *judged.notes),
    )


def kl_bound(recipe: Recipe, spec: MethodSpec) -> float | None:
    """What theory says of the distance from what it samples, where that is the base as distances are measured from."""
    return METHODS[spec.kind].kl_bound(spec) if recipe.draw(spec).temperature == 1 else None


def _exponent(recipe: Recipe, spec: MethodSpec, models: Models) -> float | None:
    total, temperature = METHODS[spec.kind].total(spec, models), recipe.draw(spec).temperature
    return None if total is None else total / temperature if temperature else math.inf


def _machine(device: str | None) -> str:
    machine = this_machine(find_device(None if device == "auto" else device))
    return f"{machine.accelerator or machine.processor}, {machine.cores} cores, torch's threads: {machine.threads}"


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "trl")
    return {"code": code_version(), **{name: version(name) for name in names if find_spec(name)}}
