"""What `genarm bench serve` measured, as JSON and as Markdown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genarm.files import write_text
from genarm.lab.bench.report import Circumstances, spread_of, table
from genarm.lab.bench.serve import Round, ServeResult, percentile
from genarm.lab.bench.settings import ServeSettings


def write_serve_report(folder: Path, result: ServeResult, circumstances: Circumstances) -> None:
    """`serve.json`, with all that was measured, and `serve.md`."""
    record = json.dumps(as_json(result, circumstances), indent=2, ensure_ascii=False)
    write_text(folder / "serve.json", record + "\n")
    write_text(folder / "serve.md", as_markdown(result, circumstances))


def as_json(result: ServeResult, circumstances: Circumstances) -> dict[str, Any]:
    """Everything, single gaps included."""
    return {
        "date": circumstances.date.isoformat(),
        "code": circumstances.code,
        "command": command(result.settings),
        "machine": asdict(circumstances.machine),
        **asdict(result),
    }


def command(settings: ServeSettings) -> str:
    """A command line that measures the same, every option said."""
    words = ["genarm", "bench", "serve", settings.folder]
    for name, value in asdict(settings).items():
        if name == "folder" or value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def as_markdown(result: ServeResult, circumstances: Circumstances) -> str:
    """The table, how to read it, and what it was measured on."""
    settings, machine = result.settings, circumstances.machine
    head = (
        "replies at once",
        "first token, ms",
        "p99",
        "per token, ms",
        "between events, p99",
        "tokens/s",
    )
    rows = [(str(level), *_row(rounds)) for level, rounds in result.rounds.items()]
    device = f"{machine.accelerator}; " if machine.accelerator else ""
    parts = [
        table(head, rows),
        f"Medians of {settings.rounds} rounds [smallest to largest]; in a round every client asks {settings.requests} "
        f"times, for {settings.tokens} tokens after a prompt of 32. The first token is counted from the request, the "
        "time per token from the first token on; p99 are over all replies and events. The clients share the machine "
        "with the server.",
        f"{'; '.join(result.server)}. {circumstances.date.isoformat()}, {circumstances.code}. "
        f"{device}{machine.processor}, {machine.cores} cores; Python {machine.python}, torch {machine.torch}, "
        f"transformers {machine.transformers}. Command: `{command(settings)}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(rounds: Sequence[Round]) -> Sequence[str]:
    firsts = [percentile([reply.first for reply in of.replies], 50) for of in rounds]
    rates = [percentile([reply.per_token for reply in of.replies], 50) for of in rounds]
    every = [reply for of in rounds for reply in of.replies]
    return (
        spread_of(firsts, scale=1e3, digits=1),
        f"{1e3 * percentile([reply.first for reply in every], 99):.1f}",
        spread_of(rates, scale=1e3, digits=2),
        f"{1e3 * percentile([gap for reply in every for gap in reply.gaps], 99):.1f}",
        spread_of([of.tokens_per_second for of in rounds], digits=1),
    )
