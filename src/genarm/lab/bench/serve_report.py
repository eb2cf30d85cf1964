"""What `genarm bench serve` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from genarm.lab.bench.report import Circumstances, command, spread_of, table
from genarm.lab.bench.serve import Round, ServeResult, percentile
from genarm.lab.bench.timing import ratios


def as_markdown(result: ServeResult, circumstances: Circumstances) -> str:
    """The table, how to read it, and what it was measured on."""
    settings = result.settings
    head = (
        "replies at once",
        "first token, ms",
        "p99",
        "per token, ms",
        "between events, p99",
        "tokens/s",
        "engine alone",
        "share of it",
    )
    rows = [(str(level), *_row(rounds, result.alone[level])) for level, rounds in result.rounds.items()]
    parts = [
        table(head, rows),
        f"Medians of {settings.rounds} rounds [smallest to largest]; in a round every client asks {settings.requests} "
        f"times, for {settings.tokens} tokens after a prompt of 32. The first token is counted from the request, the "
        "time per token from the first token on; p99 are over all replies and events. The clients share the machine "
        "with the server. The engine alone, in tokens/s, drew as many replies to prompts of that kind at once, without "
        "a server, in turn with it; the share is taken round by round."
        + (" Every event has log-probabilities and rewards." if settings.explain else ""),
        circumstances.sentences("; ".join(result.server), command(settings)),
    ]
    return "\n\n".join(parts) + "\n"


def _row(rounds: Sequence[Round], alone: Sequence[float]) -> Sequence[str]:
    firsts = [percentile([reply.first for reply in of.replies], 50) for of in rounds]
    rates = [percentile([reply.per_token for reply in of.replies], 50) for of in rounds]
    served = [of.tokens_per_second for of in rounds]
    every = [reply for of in rounds for reply in of.replies]
    return (
        spread_of(firsts, scale=1e3, digits=1),
        f"{1e3 * percentile([reply.first for reply in every], 99):.1f}",
        spread_of(rates, scale=1e3, digits=2),
        f"{1e3 * percentile([gap for reply in every for gap in reply.gaps], 99):.1f}",
        spread_of(served, digits=1),
        spread_of(alone, digits=1),
        spread_of(ratios(served, alone), digits=3),
    )
