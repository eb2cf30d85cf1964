"""What commands print, and what they keep off the terminal."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_NO_EDGE = 10_000


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep loading bars and advice meant for programmers off the terminal, unless the environment asks for them."""
    with warnings.catch_warnings():
        stay_quiet()
        yield


def stay_quiet() -> None:
    """The same for as long as the process lives."""
    from transformers.utils import logging as transformers_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        for name in ("bitsandbytes", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def open_console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error; a file or a pipe has no edge at which to fold a table."""
    from genarm.terminal import PlainConsole

    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=_NO_EDGE)


class Advance(Protocol):
    """What to call as work goes on."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say how much of a stage is done, and how much there is."""


@contextmanager
def progress(*, shown: bool = True) -> Iterator[Advance]:
    """A bar for each stage on stderr (in a log, a line a minute)."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from genarm.terminal import Bar

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[note]}"), TimeRemainingColumn()),
    )
    with Bar(*columns, console=open_console(stderr=True), shown=shown) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, completed=done, note=note)
            bar.update(tasks[stage], completed=done, note=note)

        yield advance


@contextmanager
def goes_on(output: Path | None) -> Iterator[None]:
    """Say after Ctrl-C that nothing is lost of what is written to `output`."""
    try:
        yield
    except KeyboardInterrupt:
        if output is not None:
            say(f"stopped; the same command goes on with {output}", stderr=True)
        raise


def say(text: str, *, end: str = "\n", stderr: bool = False) -> None:
    """Print a line for people: no control character in it, wherever its words come from, steers their terminal."""
    from genarm.terminal import printable

    print(printable(text), end=end, file=sys.stderr if stderr else sys.stdout, flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON, on one line without `indent`, with every control character in its escaped form."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    print(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


_CONTROL = re.compile("[\x7f-\x9f]")
"""Those that JSON has no need to escape."""
