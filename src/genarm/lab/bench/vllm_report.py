"""What `genarm bench vllm` measured, as Markdown."""

from __future__ import annotations

from genarm.lab.bench.decode import PROMPT_TOKENS
from genarm.lab.bench.report import Circumstances, command, figures_table, random_weights, spread_of, table
from genarm.lab.bench.vllm import VllmResult


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
    first = next(iter(result.engines.values()))
    runners = sorted({facts.runner for facts in result.engines.values()})
    how = "eager" if result.settings.eager else "compiled"
    vllm = f", vLLM {first.version} ({how}, model runner {' and '.join(runners)}, on {first.device})"
    return circumstances.sentences(random_weights(result), command(result.settings), threads=first.threads, more=vllm)
