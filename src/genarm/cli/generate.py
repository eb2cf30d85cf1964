"""Answer prompts with a guided model, or with any other causal LM.

Prompts go through the tokenizer's chat template where it has one. With --output, rows are written one by one, in
order, and the same command goes on where an interrupted run stopped; the finished file is the same either way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genarm.cli.options import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_reading_options,
    add_sampling_options,
    draft_files,
    open_console,
    open_engine,
    quiet_libraries,
    reading_of,
    sampling_of,
    say,
    say_json,
    settings_of,
    weights_of,
)

if TYPE_CHECKING:
    from genarm.batch.output import Settings
    from genarm.batch.run import BatchJob, Plan
    from genarm.model.references import ModelFiles

SUMMARY = "answer prompts from the command line or a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm generate`."""
    add_model_options(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help='prompts: FILE.txt, one per line; or FILE.jsonl, objects with "prompt" (text, or a list of messages) and, '
        'if wanted, "id" and "reward_weights"; other keys are carried through; either may end in .gz, and - is stdin',
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--output", type=Path, metavar="FILE", help="write rows to this JSONL file, resumable")
    form.add_argument("--json", action="store_true", help="print rows as JSONL instead of text")
    add_prompt_options(parser)
    add_reading_options(parser)
    parser.add_argument("--raw", action="store_true", help="send prompts as plain text, without the chat template")
    add_sampling_options(parser, max_new_tokens=128)
    parser.add_argument("--num-samples", type=int, metavar="N", default=1, help="how many replies to each prompt")
    parser.add_argument("--batch-size", type=int, metavar="B", default=8, help="how many replies to decode at once")
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then load the model and decode."""
    from genarm.batch.requests import read_requests, requests_of
    from genarm.files import check_output

    if arguments.output is not None:
        check_output(arguments.output)
    requests = requests_of(arguments.prompt) if arguments.prompt else read_requests(arguments.input)
    with quiet_libraries():
        from genarm.batch.run import Plan, make_jobs
        from genarm.model.references import find_device, open_files

        plan = Plan(
            sampling=sampling_of(arguments),
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            num_samples=arguments.num_samples,
        )
        find_device(arguments.device)
        files = open_files(
            arguments.folder, trust_remote_code=arguments.trust_remote_code, reading=reading_of(arguments)
        )
        draft = draft_files(arguments)
        weights = weights_of(arguments, files)
        jobs = make_jobs(files, requests, plan, weights=weights, system=arguments.system, raw=arguments.raw)
        settings = settings_of(arguments, files, requests, plan, weights, draft=draft, raw=arguments.raw)
        return _decode(arguments, files, draft, jobs, plan, settings)


def _decode(
    arguments: argparse.Namespace,
    files: ModelFiles,
    draft: ModelFiles | None,
    jobs: list[BatchJob],
    plan: Plan,
    settings: Settings,
) -> int:
    from genarm.batch.output import begin
    from genarm.batch.run import context_of, decode

    output: Path | None = arguments.output
    done = len(begin(output, settings)) if output else 0
    if done == len(jobs):
        say(f"{output} is complete: {done} of {done} rows", stderr=True)
        return 0
    if done:
        say(f"resuming {output} at {done} of {len(jobs)} rows", stderr=True)
    engine = open_engine(
        arguments, files, draft, streams=min(plan.batch_size, len(jobs) - done), context=context_of(jobs, plan)
    )
    if output:
        say(engine.describe(), stderr=True)
    emit = _writer(output, as_json=arguments.json, alone=len(jobs) == 1)
    with _progress(len(jobs), done, shown=output is not None or not sys.stdout.isatty()) as advance, engine:
        try:
            for row in decode(engine, jobs[done:], plan, settings=settings.digest):
                emit(row)
                done += 1
                advance(row)
        except KeyboardInterrupt:
            if output:
                say(f"stopped; the same command goes on with {output}", stderr=True)
            raise
    if output:
        say(f"{output}: {done} rows", stderr=True)
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


@contextmanager
def _progress(total: int, done: int, *, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr (in a log, a line a minute); yields what to call with each row."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from genarm.terminal import Bar

    console = open_console(stderr=True)
    columns = (
        TextColumn("replies"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, shown=shown) as bar:
        task = bar.add_task("replies", total=total, completed=done, speed="")
        tokens = 0

        def advance(row: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += row["tokens"]
            seconds = bar.tasks[0].elapsed or 0
            speed = f"{tokens / seconds:.0f} tokens/s" if seconds else ""
            bar.update(task, advance=1, speed=speed)

        yield advance
