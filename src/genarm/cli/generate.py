"""Answer prompts with a guided model, or with any other causal LM.

Prompts go through the tokenizer's chat template where it has one. With --output, rows are written one by one, in
order, and the same command goes on where an interrupted run stopped; the finished file is the same either way.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from genarm.batch.plan import Plan
from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import goes_on, progress, quiet_libraries, say, say_json
from genarm.cli.options import DraftOptions, ModelOptions, PromptOptions, ReadingOptions, WishOptions
from genarm.engine import EngineOptions
from genarm.sampling import Sampling

SUMMARY = "answer prompts from the command line or a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm generate`."""
    add_options(parser, ModelOptions)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help='prompts: FILE.txt, one per line; or FILE.jsonl, objects with "prompt" (text, or a list of messages) and, '
        'if wanted, "id", "reward_weights" and "max_kl"; other keys are carried through; either may end in .gz, and - '
        "is stdin",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--output", type=Path, metavar="FILE", help="write rows to this JSONL file, resumable")
    form.add_argument("--json", action="store_true", help="print rows as JSONL instead of text")
    add_options(parser, WishOptions, PromptOptions, ReadingOptions)
    parser.add_argument("--raw", action="store_true", help="send prompts as plain text, without the chat template")
    add_options(parser, Sampling, Plan, EngineOptions, DraftOptions)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then load the model and decode."""
    from genarm.batch.requests import read_requests, requests_of
    from genarm.files import check_output

    output: Path | None = arguments.output
    if output is not None:
        check_output(output)
    requests = requests_of(arguments.prompt) if arguments.prompt else read_requests(arguments.input)
    with quiet_libraries(), ExitStack() as stack:
        from genarm.batch.output import begin
        from genarm.batch.run import context_of, decode
        from genarm.cli.session import open_session
        from genarm.provenance import alone

        plan = settings_from(arguments, Plan, sampling=settings_from(arguments, Sampling))
        session = open_session(arguments)
        jobs = session.jobs(requests, plan)
        settings = session.settings(requests, plan)
        if output:
            stack.enter_context(alone(output))
        done = len(begin(output, settings)) if output else 0
        if done == len(jobs):
            say(f"{output} is complete: {done} of {done} rows", stderr=True)
            return 0
        if done:
            say(f"resuming {output} at {done} of {len(jobs)} rows", stderr=True)
        engine = session.engine(streams=min(plan.batch_size, len(jobs) - done), context=context_of(jobs, plan))
        if output:
            say(engine.describe(), stderr=True)
        emit = _writer(output, as_json=arguments.json, alone=len(jobs) == 1)
        with goes_on(output), progress(shown=output is not None or not sys.stdout.isatty()) as advance, engine:
            advance("replies", done, len(jobs))
            tokens, begun = 0, time.monotonic()
            for number, row in enumerate(decode(engine, jobs[done:], plan, settings=settings.digest), done + 1):
                emit(row)
                tokens += row["tokens"]
                seconds = max(time.monotonic() - begun, 0.001)
                advance("replies", number, len(jobs), f"{tokens / seconds:.0f} tokens/s")
    if output:
        say(f"{output}: {len(jobs)} rows", stderr=True)
    return 0


def _writer(output: Path | None, *, as_json: bool, alone: bool) -> Callable[[dict[str, Any]], None]:
    """What to do with a row."""
    from genarm.files import append_rows

    def write(row: dict[str, Any]) -> None:
        if output:
            append_rows(output, [row])
            return
        say_json(row) if as_json else say(_readable(row, alone=alone))

    return write


def _readable(row: dict[str, Any], *, alone: bool) -> str:
    """A response for people: by itself, or under its prompt where there are several."""
    if alone:
        return str(row["response"])
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    sample = f", reply {row['sample'] + 1}" if row["sample"] else ""
    return f"[{row['index']}{sample}] {prompt}\n{row['response']}\n"
