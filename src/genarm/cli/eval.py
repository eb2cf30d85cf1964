"""Compare methods on one table, as a recipe says: train what they need, answer, judge, and write a report.

A recipe has several scales. `tiny` runs on two CPU cores without a network; `paper` has the published settings, for a
GPU machine that reaches the Hugging Face hub. The output folder gets report.html, results.md, results.json and every
answer and judgement as JSONL; the same command goes on where an interrupted run stopped, and methods or judges that
are added to the recipe later are added to the same folder. Most recipes need the extra `baselines`.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from genarm.cli.arguments import add_options
from genarm.cli.console import open_console, quiet_libraries
from genarm.model.placement import Placement

SUMMARY = "compare methods: quality with intervals, cost and trade-offs, from one recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm eval`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, such as recipes/hh-rlhf.toml")
    parser.add_argument("--scale", metavar="NAME", default="tiny", help="which part of the recipe: tiny, paper, …")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: genarm-eval/RECIPE-SCALE, with the --seed if given)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of everything random, in place of the recipe's")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="run nothing; show models, bytes, forwards, calls of judges and the time that they take at least",
    )
    add_options(parser, Placement)


def run(arguments: argparse.Namespace) -> int:
    """Read the recipe, then run it or show its plan."""
    from genarm.lab.evaluation.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.scale, seed=arguments.seed)
    name = f"{arguments.recipe.stem}-{arguments.scale}" + ("" if arguments.seed is None else f"-{arguments.seed}")
    output = arguments.output or Path("genarm-eval", name)
    console = open_console()
    with quiet_libraries():
        if arguments.plan:
            from genarm.lab.evaluation.build import Models
            from genarm.lab.evaluation.plan import make_plan, show

            models = Models(folder=output.resolve(), dtype=arguments.dtype, device=arguments.device)
            console.print(show(make_plan(recipe, models, console)))
            return 0
        import datasets

        datasets.disable_progress_bars()
        from genarm.lab.evaluation.run import RunOptions, evaluate

        evaluate(
            recipe,
            RunOptions(output=output, command=_command(arguments), dtype=arguments.dtype, device=arguments.device),
            console,
        )
    return 0


def _command(arguments: argparse.Namespace) -> str:
    words = ["genarm", "eval", str(arguments.recipe), "--scale", arguments.scale]
    words += ["--seed", str(arguments.seed)] if arguments.seed is not None else []
    words += ["--dtype", arguments.dtype] if arguments.dtype != "auto" else []
    words += ["--device", arguments.device] if arguments.device else []
    return shlex.join(words)
