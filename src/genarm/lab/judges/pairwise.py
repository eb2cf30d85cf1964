"""An LLM as the judge of two replies, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.lab.judges.cache import ReplyCache
from genarm.lab.judges.comparing import Compared, Comparer
from genarm.lab.judges.interface import Kind
from genarm.lab.judges.llm import Pair, Summary, judge_pairs, summarise
from genarm.lab.judges.protocol import load_protocol

if TYPE_CHECKING:
    from genarm.lab.judges.kinds import JudgeSpec


class Pairwise(Comparer):
    """Asks what the protocol says."""

    orders = 2

    def model(self, judge: JudgeSpec) -> str | None:
        """The protocol's."""
        return load_protocol(judge.source).model

    def asked(self, judge: JudgeSpec) -> tuple[str, int]:
        """The protocol itself, and its limit."""
        return judge.source, load_protocol(judge.source).reply_limit

    def compare(
        self, judge: JudgeSpec, pairs: Sequence[Pair], where: Path, name: str, on_reply: Callable[[], None]
    ) -> Compared:
        """Replies are kept in `replies/`, for all pairs together."""
        settings, _ = self.endpoint(judge)
        settings.find_key()
        judged = judge_pairs(pairs, load_protocol(judge.source), settings, ReplyCache(where / "replies"), on_reply)
        return Compared(
            outcomes=[verdict.outcome for verdict in judged],
            rows=[{"index": i, **verdict.record()} for i, verdict in enumerate(judged)],
            note=_note(summarise(judged)),
        )


def _note(summary: Summary) -> str:
    if not summary.unparsed + summary.failed + summary.inconsistent:
        return ""
    lost = f"{summary.unparsed} replies could not be read, {summary.failed} calls failed"
    bias = f"{summary.inconsistent} verdicts changed with the order ({summary.for_first} for the answer shown first)"
    return f"{lost}, {bias}, of {summary.items}"


KIND = Kind(name="llm", about="compares two replies by an LLM behind an endpoint, in both orders", comparer=Pairwise())
