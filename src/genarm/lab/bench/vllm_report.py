"""What `genarm bench vllm` measured, as JSON and as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genarm.files import write_text
from genarm.lab.bench.decode import PROMPT_TOKENS
from genarm.lab.bench.report import Circumstances, command, figures_as_json, figures_table, spread_of, table
from genarm.lab.bench.vllm import VllmResult


def write_vllm_report(folder: Path, result: VllmResult, circumstances: Circumstances) -> None:
    """`vllm.json`, with all that was measured, and `vllm.md`."""
    record = json.dumps(as_json(result, circumstances), indent=2, ensure_ascii=False)
    write_text(folder / "vllm.json", record + "\n")
    write_text(folder / "vllm.md", as_markdown(result, circumstances))


def as_json(result: VllmResult, circumstances: Circumstances) -> dict[str, Any]:
    """Everything, each round included."""
    return {
        "date": circumstances.date.isoformat(),
        "code": circumstances.code,
        "command": command(result.settings),
        "machine": asdict(circumstances.machine),
        **asdict(result),
        "figures": figures_as_json(result.figures),
    }


def as_markdown(result: VllmResult, circumstances: Circumstances) -> str:
    """The table of figures, what they are made of, and what they were measured on."""
    rates = result.tokens_per_second
    head = ("tokens/s", *("1 stream" if n == 1 else f"{n} streams" for n in rates), "seconds to start")
    rows = [
        (
            name,
            *(spread_of(rates[n][name], digits=1) for n in rates),
            f"{facts.seconds_to_start:.0f}",
        )
        for name, facts in result.engines.items()
    ]
    settings = result.settings
    parts = [
        figures_table(result.figures),
        f"A figure is the median [smallest to largest] of its ratios in {settings.rounds} rounds; in every round each "
        "contestant runs once at each number of streams, while the others rest.",
        table(head, rows),
        f"Tokens of all streams together, from the first token of each on: the step that reads the prompts, of "
        f"{PROMPT_TOKENS} tokens each, is left out. Greedy, {settings.tokens} tokens a reply, end of text ignored. "
        "Every contestant has an engine of vLLM in a process of its own.",
        _circumstances(result, circumstances),
    ]
    return "\n\n".join(parts) + "\n"


def _circumstances(result: VllmResult, circumstances: Circumstances) -> str:
    machine = circumstances.machine
    sizes = ", ".join(f"{name} {count:,} parameters" for name, count in result.parameters.items())
    accelerator = f"{machine.accelerator}; " if machine.accelerator else ""
    first = next(iter(result.engines.values()))
    runners = sorted({facts.runner for facts in result.engines.values()})
    how = "eager" if result.settings.eager else "compiled"
    return (
        f"Random weights, {result.where.dtype}: {sizes}. {circumstances.date.isoformat()}, {circumstances.code}. "
        f"{accelerator}{machine.processor}, {machine.cores} cores, {first.threads} threads of torch; "
        f"Python {machine.python}, torch {machine.torch}, transformers {machine.transformers}, vLLM {first.version} "
        f"({how}, model runner {' and '.join(runners)}, on {first.device}). Command: `{command(result.settings)}`."
    )
