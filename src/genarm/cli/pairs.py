"""Make preference pairs from a wish: sample responses to each prompt, score them, keep the best against the worst.

Prompts are read as by `genarm generate`. Responses and their scores stay beside the output as they come, and the same
command goes on where an interrupted run stopped; the pairs are the same either way. `genarm train --data` reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.batch.plan import Plan
from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import goes_on, progress, quiet_libraries, say
from genarm.cli.options import DraftOptions, ModelOptions, PromptOptions, TemplateOptions
from genarm.engine import EngineOptions
from genarm.errors import ConfigError
from genarm.lab.pairs.select import Selection
from genarm.model.placement import Loading
from genarm.sampling import Sampling

if TYPE_CHECKING:
    from genarm.batch.requests import BatchRequest
    from genarm.lab.judges.interface import Scorer
    from genarm.lab.pairs.run import Counts

SUMMARY = "make preference pairs from anything that can score a response"

_PLAN = Plan(sampling=Sampling(), num_samples=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm pairs`."""
    model = "what responds: a guided folder, another causal LM's folder, or a hub id (ID@REVISION)"
    add_options(parser, ModelOptions, only=["folder"], folder={"positional": False, "option": "--model", "help": model})
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='FILE.txt, one per line; or FILE.jsonl, objects with "prompt" (text, or a list of messages) and whatever '
        "the score needs",
    )
    parser.add_argument(
        "--score",
        required=True,
        metavar="KIND=VALUE",
        help="function=MODULE:FUNCTION, called with (prompt, response) or (prompt, response, row); reward=FOLDER, of "
        "genarm train --kind trajectory; judge=RUBRIC.txt, by an LLM; last-number=KEY, 1 if the last number is that of "
        "the row's KEY; tests=KEY, 1 if the code passes the row's unit tests in the sandbox",
    )
    parser.add_argument(
        "--judge-url", metavar="URL", help="an OpenAI-compatible endpoint; OpenAI's own by default, with OPENAI_API_KEY"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the judge, as the endpoint calls it")
    samples = {"option": "--samples", "help": "how many responses to each prompt"}
    add_options(parser, _PLAN, only=["num_samples"], num_samples=samples)
    add_options(parser, Selection)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file for the pairs")
    add_options(parser, PromptOptions, TemplateOptions, Sampling)
    at_once = {"help": "how many responses to decode at once"}
    add_options(parser, _PLAN, only=["seed", "batch_size"], batch_size=at_once)
    add_options(parser, Loading, EngineOptions, DraftOptions)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then sample, score and select."""
    from genarm.batch.requests import read_requests
    from genarm.files import check_output

    check_output(arguments.output)
    if arguments.num_samples < 2:
        raise ConfigError(f"--samples is {arguments.num_samples}; a pair needs at least 2")
    selection = settings_from(arguments, Selection)
    requests = read_requests(arguments.prompts)
    with quiet_libraries():
        from genarm.cli.session import open_session
        from genarm.lab.pairs.run import PairSettings, make_pairs

        plan = settings_from(arguments, _PLAN, sampling=settings_from(arguments, Sampling))
        session = open_session(arguments)
        jobs = session.jobs(requests, plan)
        conversations = [session.files.conversation(r.prompt, system=session.system, raw=False) for r in requests]
        scorer = make_score(arguments, requests, replies=Path(f"{arguments.output}.replies"))
        settings = PairSettings(sampling=session.settings(requests, plan), score=scorer.record, selection=selection)
        with goes_on(arguments.output), progress() as advance:
            counts = make_pairs(
                arguments.output,
                jobs,
                conversations,
                plan,
                settings,
                scorer,
                open_engine=lambda streams, context: session.engine(streams=streams, context=context),
                advance=advance,
            )
    say(_summary(arguments.output, counts))
    return 0


def make_score(arguments: argparse.Namespace, requests: Sequence[BatchRequest], *, replies: Path) -> Scorer:
    """What `--score` means, checked against the rows; a judge's replies go into the folder `replies`."""
    from genarm.lab.judges.interface import ScorerOptions
    from genarm.lab.judges.kinds import make_scorer
    from genarm.lab.judges.unit_tests import UnitTestScorer

    options = settings_from(arguments, ScorerOptions, replies=replies)
    scorer = make_scorer(arguments.score, options)
    scorer.check([{"prompt": request.prompt, "id": request.id, **request.carried} for request in requests])
    if isinstance(scorer, UnitTestScorer):
        _warn_of_sandbox()
    return scorer


def _warn_of_sandbox() -> None:
    """Say on stderr what generated code could reach on this machine (raises UnsupportedError where it cannot run)."""
    from genarm.lab.tasks.code import passed
    from genarm.lab.tasks.sandbox import run_code

    outcome = run_code("")
    passed(outcome)
    open_to = sorted({"network", "processes", "files", "keys"} - outcome.contained)
    if open_to:
        say(
            f"warning: on this machine the sandbox keeps generated code within its limits, but not from: "
            f"{', '.join(open_to)}; use a container or a virtual machine for models you do not trust",
            stderr=True,
        )


def _summary(output: Path, counts: Counts) -> str:
    dropped: dict[str, int] = {
        "tied pairs": counts.ties,
        "empty responses": counts.empty,
        "identical responses": counts.identical,
        "responses without a score": counts.unscored,
        "prompts with fewer than two different responses": counts.lone,
    }
    lines = [
        f"{output}: {counts.pairs} pairs from {counts.prompts_used} of {counts.prompts} prompts "
        f"({counts.responses} responses)",
        f"dropped: {', '.join(f'{count} {what}' for what, count in dropped.items())}",
        f"mean score: {counts.mean_score_chosen:.3f} chosen, {counts.mean_score_rejected:.3f} rejected",
    ]
    if counts.cut:
        lines.append(
            f"{counts.cut} responses were cut at --max-new-tokens; training takes a cut for an end, so raise it if "
            "these are many"
        )
    return "\n".join(lines)
