"""The figures for the terminal and for a Markdown file."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from genarm.lab.evaluation.figures import Figures
from genarm.lab.evaluation.results import Results
from genarm.lab.evaluation.sheets import Sheet, sheets


def table(figures: Figures) -> RenderableType:
    """All sheets for the terminal."""
    return Group(*(part for sheet in sheets(figures) for part in _printed(sheet)))


def markdown(results: Results, figures: Figures) -> str:
    """All sheets with what they are of, and how they were made, for a file."""
    parts = [f"# {_inline(f'{figures.title} ({figures.scale})')}", _inline(circumstances(results))]
    for sheet in sheets(figures):
        lines = [sheet.head, [":---"] * sheet.words + ["---:"] * (len(sheet.head) - sheet.words), *sheet.rows]
        parts += [f"## {_inline(sheet.title)}", "\n".join(f"| {' | '.join(map(_inline, cells))} |" for cells in lines)]
        parts += [_inline(sheet.note)] if sheet.note else []
    parts += [f"- {_inline(note)}" for note in results.notes]
    parts.append(f"```bash\n{results.command}\n```")
    return "\n\n".join(parts) + "\n"


def circumstances(results: Results) -> str:
    """When, on what and with which settings, in a sentence."""
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.settings.items())
    versions = ", ".join(f"{name} {value}" for name, value in results.versions.items())
    return f"{results.date}; {results.machine}; {settings}; {versions}."


def _printed(sheet: Sheet) -> Iterable[RenderableType]:
    printed = Table(title=Text(sheet.title, style="bold"), title_justify="left")
    for number, name in enumerate(sheet.head):
        printed.add_column(Text(name), justify="left" if number < sheet.words else "right", overflow="fold")
    for row in sheet.rows:
        printed.add_row(*map(Text, row))
    yield Text()
    yield printed
    if sheet.note:
        yield Text(sheet.note, style="dim")


def _inline(text: str) -> str:
    """`text` as words of a line of Markdown, whatever is in it."""
    for sign in "\\`*_|<":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
