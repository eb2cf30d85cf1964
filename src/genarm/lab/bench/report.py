"""The results as JSON and as Markdown."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genarm.files import write_text
from genarm.lab.bench.counting import DRAFTS
from genarm.lab.bench.decode import DecodeResult
from genarm.lab.bench.field import Speculated
from genarm.lab.bench.figures import Figure
from genarm.lab.bench.settings import DecodeSettings, ServeSettings, TrainSettings, VllmSettings
from genarm.lab.bench.timing import spread
from genarm.lab.machine import Machine

if TYPE_CHECKING:
    from genarm.lab.bench.serve import ServeResult
    from genarm.lab.bench.train import TrainResult
    from genarm.lab.bench.vllm import VllmResult


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """Where, when and with what."""

    machine: Machine
    date: datetime.date
    code: str

    def sentences(self, about: str, command: str, *, threads: int | None = None, more: str = "") -> str:
        """What was measured, `about`, on what and with which code; `more` stands after the versions."""
        machine = self.machine
        accelerator = f"{machine.accelerator}; " if machine.accelerator else ""
        of_torch = "" if threads is None else f", {threads} threads of torch"
        return (
            f"{about}. {self.date.isoformat()}, {self.code}. {accelerator}{machine.processor}, {machine.cores} "
            f"cores{of_torch}; Python {machine.python}, torch {machine.torch}, transformers {machine.transformers}"
            f"{more}. Command: `{command}`."
        )


def write_report(
    folder: Path,
    result: DecodeResult | VllmResult | ServeResult | TrainResult,
    circumstances: Circumstances,
    markdown: str,
) -> None:
    """`decode.json`, with all that was measured, raw figures included, and `decode.md`, or as the subject is called."""
    record: dict[str, Any] = {
        "date": circumstances.date.isoformat(),
        "code": circumstances.code,
        "command": command(result.settings),
        "machine": asdict(circumstances.machine),
        **asdict(result),
    }
    figures: Iterable[Figure] = getattr(result, "figures", ())
    if figures:
        record["figures"] = [{**asdict(f), **asdict(f.spread), "met": f.met} for f in figures]
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)  # paths as text
    write_text(folder / f"{result.settings.subject}.json", text + "\n")
    write_text(folder / f"{result.settings.subject}.md", markdown)


def command(settings: DecodeSettings | VllmSettings | ServeSettings | TrainSettings) -> str:
    """A command line that measures the same, every option said."""
    words = ["genarm", "bench", settings.subject, *([settings.folder] if isinstance(settings, ServeSettings) else [])]
    for name, value in asdict(settings).items():
        if name != "folder" and value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(words)


def as_markdown(result: DecodeResult, circumstances: Circumstances) -> str:
    """The table of figures, what they are made of, and what they were measured on."""
    timed = result.timed
    parts = [
        figures_table(result.figures),
        f"A figure is the median [smallest to largest] of its ratios in {result.settings.rounds} rounds; in every "
        "round each contestant runs once.",
        table(("batch 1", "ms per token"), ((name, spread_of(row, scale=1e3)) for name, row in timed.seconds.items())),
        table(
            ("streams, one LoRA ARM", "tokens/s"),
            ((str(n), spread_of(row, digits=1)) for n, row in timed.tokens_per_second.items()),
        ),
        table(
            ("acceptance wanted", "Σ min(p, q) of the pair", "accepted of drafts looked at", "base forwards per token"),
            map(_speculated_row, timed.speculated),
        ),
        *_bandwidth(result),
        *_real(result),
        circumstances.sentences(
            random_weights(result), command(result.settings), threads=circumstances.machine.threads
        ),
    ]
    return "\n\n".join(parts) + "\n"


def figures_table(figures: Iterable[Figure]) -> str:
    """The figures beside their targets."""
    return table(("figure", "measured", "target", "met"), map(_figure_row, figures))


def _figure_row(figure: Figure) -> Sequence[str]:
    met = {None: "–", True: "yes", False: "no"}[figure.met]
    return figure.name, spread_of(figure.values), str(figure.target or "–"), met


def _speculated_row(row: Speculated) -> Sequence[str]:
    return f"{row.wanted:.2f}", f"{row.made:.3f}", str(row.seen), f"{row.counts.passes_per_token:.3f}"


def _bandwidth(result: DecodeResult) -> Iterable[str]:
    bandwidth = result.timed.bandwidth
    if bandwidth is not None:
        yield (
            f"A token of the unguided base reads {bandwidth.bytes_per_token / 1e9:.2f} GB; copies in the device's "
            f"memory move {bandwidth.copied_per_second / 1e9:.0f} GB/s."
        )


def _real(result: DecodeResult) -> Iterable[str]:
    real = result.real
    if real is not None:
        yield table(
            ("real pair, w=1, T=1", "base forwards per token", "tokens", "drafted", "kept"),
            (
                (name, f"{of.passes_per_token:.3f}", str(of.tokens), str(of.drafted), str(of.accepted))
                for name, of in {
                    f"always {DRAFTS} drafts": real.drafting,
                    "as many drafts as pay": real.usual,
                    "no speculation": real.control,
                }.items()
            ),
        )
        yield (
            f"Base `{real.base}`, ARM `{real.arm}`, {real.prompts} prompts. Accepted of the drafts that were looked "
            f"at, drafting one at a time: {real.acceptance}."
        )


def random_weights(result: DecodeResult | VllmResult) -> str:
    """The models' sizes and dtype."""
    sizes = ", ".join(f"{name} {count:,} parameters" for name, count in result.parameters.items())
    return f"Random weights, {result.where.dtype}: {sizes}"


def spread_of(values: Sequence[float], *, scale: float = 1.0, digits: int = 3) -> str:
    """The median [smallest to largest]."""
    of = spread([value * scale for value in values])
    if of.n == 1:
        return f"{of.median:.{digits}f}"
    return f"{of.median:.{digits}f} [{of.low:.{digits}f} to {of.high:.{digits}f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
