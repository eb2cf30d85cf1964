"""Compare methods on one table, as a recipe says: train what they need, answer, judge, and write a report.

A recipe has several scales. `tiny` runs on two CPU cores without a network, `real` there on a real chat model, `gpu`
the same with more data on a GPU; `paper` has the published settings, for a GPU machine that reaches the Hugging Face
hub. The output folder gets report.html, results.md, results.json and every answer and judgement as JSONL; the same
command goes on where an interrupted run stopped, and methods or judges that are added to the recipe later are added to
the same folder. Most recipes need the extra `baselines`.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import open_console, quiet_libraries
from genarm.model.placement import Placement

SUMMARY = "compare methods: quality with intervals, cost and trade-offs, from one recipe"


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Placement):
    """Which comparison, where it goes and what it runs on."""

    recipe: Path = field(
        metadata={"positional": True, "metavar": "RECIPE", "help": "a TOML file, such as recipes/hh-rlhf.toml"}
    )
    scale: str = field(default="tiny", metadata={"help": "which part of the recipe: tiny, real, gpu, paper"})
    output: Path | None = field(
        default=None,
        metadata={
            "metavar": "DIR",
            "help": "folder of the run (default: genarm-eval/RECIPE-SCALE, with the --seed if given)",
        },
    )
    seed: int | None = field(
        default=None, metadata={"metavar": "S", "help": "of everything random, in place of the recipe's"}
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "run nothing; show models, bytes, forwards, calls of judges and the time that they take at least"
        },
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm eval`."""
    add_options(parser, EvalOptions)


def run(arguments: argparse.Namespace) -> int:
    """Read the recipe, then run it or show its plan."""
    from genarm.lab.evaluation.recipe_file import load_recipe

    options = settings_from(arguments, EvalOptions)
    recipe = load_recipe(options.recipe, options.scale, seed=options.seed)
    name = f"{options.recipe.stem}-{options.scale}" + ("" if options.seed is None else f"-{options.seed}")
    output = options.output or Path("genarm-eval", name)
    console = open_console()
    with quiet_libraries():
        if options.plan:
            from genarm.lab.evaluation.plan import make_plan, show
            from genarm.lab.methods.models import Models

            models = Models(folder=output.resolve(), dtype=options.dtype, device=options.device)
            console.print(show(make_plan(recipe, models, console)))
            return 0
        import datasets

        datasets.disable_progress_bars()
        from genarm.lab.evaluation.run import RunOptions, evaluate

        evaluate(
            recipe,
            RunOptions(output=output, command=_command(options), dtype=options.dtype, device=options.device),
            console,
        )
    return 0


def _command(options: EvalOptions) -> str:
    words = ["genarm", "eval", str(options.recipe), "--scale", options.scale]
    words += ["--seed", str(options.seed)] if options.seed is not None else []
    words += ["--dtype", options.dtype] if options.dtype != EvalOptions.dtype else []
    words += ["--device", options.device] if options.device else []
    return shlex.join(words)
