"""Make preference pairs from a wish: sample responses to each prompt, score them, keep the best against the worst.

Prompts are read as by `genarm generate`. Responses and their scores stay beside the output as they come, and the same
command goes on where an interrupted run stopped; the pairs are the same either way. `genarm train --data` reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.cli.options import (
    add_device_options,
    add_engine_options,
    add_prompt_options,
    add_sampling_options,
    add_template_option,
    draft_files,
    open_console,
    open_engine,
    quiet_libraries,
    reading_of,
    sampling_of,
    say,
    settings_of,
    weights_of,
)

if TYPE_CHECKING:
    from genarm.batch.requests import BatchRequest
    from genarm.engine import Engine
    from genarm.lab.pairs.run import Advance, Counts
    from genarm.lab.pairs.scorers import Scorer

SUMMARY = "make preference pairs from anything that can score a response"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm pairs`."""
    parser.add_argument(
        "--model",
        dest="folder",
        required=True,
        metavar="FOLDER",
        help="what responds: a guided folder, another causal LM's folder, or a hub id (ID@REVISION)",
    )
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
    parser.add_argument("--samples", type=int, metavar="N", default=8, help="how many responses to each prompt")
    parser.add_argument(
        "--select",
        choices=("extremes", "all"),
        default="extremes",
        help="the best response against the worst, or every two that are far enough apart",
    )
    parser.add_argument(
        "--margin", type=float, metavar="M", default=0.0, help="a pair's scores must be more than this apart"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file for the pairs")
    add_prompt_options(parser)
    add_template_option(parser)
    add_sampling_options(parser, max_new_tokens=128)
    parser.add_argument("--batch-size", type=int, metavar="B", default=8, help="how many responses to decode at once")
    add_device_options(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow models with code of their own")
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then sample, score and select."""
    from genarm.batch.requests import read_requests
    from genarm.errors import ConfigError
    from genarm.files import check_output
    from genarm.lab.pairs.select import Selection

    check_output(arguments.output)
    if arguments.samples < 2:
        raise ConfigError(f"--samples is {arguments.samples}; a pair needs at least 2")
    selection = Selection(which=arguments.select, margin=arguments.margin)
    requests = read_requests(arguments.prompts)
    with quiet_libraries():
        from genarm.batch.run import Plan, make_jobs
        from genarm.lab.pairs.run import PairSettings, make_pairs
        from genarm.model.references import open_files

        plan = Plan(
            sampling=sampling_of(arguments),
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            num_samples=arguments.samples,
        )
        files = open_files(
            arguments.folder, trust_remote_code=arguments.trust_remote_code, reading=reading_of(arguments)
        )
        draft = draft_files(arguments)
        jobs = make_jobs(files, requests, plan, weights=weights_of(arguments, files), system=arguments.system)
        conversations = [files.conversation(r.prompt, system=arguments.system, raw=False) for r in requests]
        scorer = _scorer(arguments, requests)
        settings = PairSettings(
            sampling=settings_of(
                arguments, files, requests, plan, weights_of(arguments, files), draft=draft, raw=False
            ),
            score=scorer.record,
            selection=selection,
        )

        def engine(streams: int, context: int) -> Engine:
            return open_engine(arguments, files, draft, streams=streams, context=context)

        with _progress() as advance, _goes_on(arguments.output):
            counts = make_pairs(
                arguments.output,
                jobs,
                conversations,
                plan,
                settings,
                scorer,
                open_engine=engine,
                advance=advance,
            )
    say(_summary(arguments.output, counts))
    return 0


def _scorer(arguments: argparse.Namespace, requests: Sequence[BatchRequest]) -> Scorer:
    """What `--score` means, checked against the rows."""
    from genarm.lab.pairs.scorers import ScorerOptions, UnitTestScorer, make_scorer

    options = ScorerOptions(
        replies=Path(f"{arguments.output}.replies"),
        judge_url=arguments.judge_url,
        judge_model=arguments.judge_model,
        dtype=arguments.dtype,
        device=arguments.device,
    )
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


@contextmanager
def _goes_on(output: Path) -> Iterator[None]:
    """Say after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on with {output}", stderr=True)
        raise


@contextmanager
def _progress() -> Iterator[Advance]:
    """A bar for each stage on stderr (in a log, a line a minute)."""
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

    from genarm.terminal import Bar

    console = open_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance


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
