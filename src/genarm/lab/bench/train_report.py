"""What `genarm bench train` measured, as Markdown."""

from __future__ import annotations

from genarm.lab.bench.report import Circumstances, command, figures_table, spread_of, table
from genarm.lab.bench.train import TrainResult

_GIB = 2**30


def as_markdown(result: TrainResult, circumstances: Circumstances) -> str:
    """The figures, what they are made of, and what they were measured on."""
    settings, trained = result.settings, result.trained
    rows = [
        (
            name,
            spread_of(seconds, digits=2),
            spread_of([trained.sequence_tokens / settings.steps / value for value in seconds], digits=0),
            f"{result.memory[name].peak / _GIB:.2f}",
            f"{(result.memory[name].peak - result.memory[name].before) / _GIB:.2f}",
        )
        for name, seconds in result.seconds.items()
    ]
    pairs = settings.steps * settings.batch_size
    share = trained.tokens / trained.sequence_tokens
    about = (
        f"{settings.model}, {'LoRA' if settings.lora else 'all weights'}: {trained.parameters:,} of "
        f"{trained.of_all:,} parameters, {'bfloat16' if settings.bf16 else 'float32'}"
    )
    parts = [
        figures_table(result.figures),
        f"A figure is the median [smallest to largest] of its ratios in {settings.rounds} rounds; in every round each "
        f"contestant takes {settings.steps} steps of {settings.batch_size} pairs, the first {pairs} of the data, in a "
        f"process of its own. Their sequences have {trained.sequence_tokens:,} tokens, {share:.0%} of which are left "
        "when each prompt counts once.",
        table(("", "seconds per step", "tokens of sequences per second", "peak GiB", "above the start"), rows),
        circumstances.sentences(about, command(settings), threads=trained.threads),
    ]
    return "\n\n".join(parts) + "\n"
