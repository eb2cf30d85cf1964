"""What reaches the terminal: text of models, files and messages, and never a control character of theirs."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, ProgressColumn, TaskID
from rich.segment import Segment

LINE_EVERY = 60.0
"""Seconds between lines of progress where there is no terminal for a bar."""


def printable(text: str) -> str:
    """`text` with control characters, which could steer the reader's terminal, replaced; new lines and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


class PlainConsole(Console):
    """A console that prints texts as they are: no control characters in them, and no `:name:` that becomes an emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does; what it has itself to say to the terminal stays."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def rule(self, title: Any = "", **options: Any) -> None:
        """As rich does; what is no terminal has no edge to draw a line to, and gets the title alone."""
        if self.is_terminal:
            super().rule(title, **options)
        else:
            self.print(title)


class Bar(Progress):
    """A bar on a terminal; elsewhere, in a log, a line a minute."""

    def __init__(
        self, *columns: ProgressColumn | str, console: Console, transient: bool = True, shown: bool = True
    ) -> None:
        super().__init__(*columns, console=console, transient=transient, disable=not (shown and console.is_terminal))
        self._in_lines = shown and not console.is_terminal
        self._begun = self._said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As rich does, and a line where one is due."""
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich does, and a line where one is due."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if not self._in_lines or now - self._said < LINE_EVERY:
            return
        self._said = now
        task = self.tasks[self.task_ids.index(task_id)]
        total = "" if task.total is None else f" of {task.total:,.0f}"
        line = f"{task.description or 'done'}: {task.completed:,.0f}{total} after {(now - self._begun) / 60:.0f} min"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
