"""An LLM as the judge of single responses, by a rubric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from genarm.errors import ConfigError, DataError
from genarm.lab.judges.cache import ReplyCache
from genarm.lab.judges.interface import Item, Kind, Scorer, ScorerOptions
from genarm.lab.judges.llm import Answer, score_responses, summarise
from genarm.lab.judges.parsing import SingleScore
from genarm.lab.judges.protocol import Protocol, load_protocol
from genarm.lab.judges.settings import OPENAI, ClientSettings


@dataclass(frozen=True, kw_only=True)
class JudgeScorer(Scorer):
    """Asks an LLM for a score by a rubric; a reply that cannot be read gives none."""

    protocol: Protocol
    settings: ClientSettings
    replies: Path

    @property
    def record(self) -> dict[str, Any]:
        """What is asked and of whom; where the model is served plays no part."""
        return {"kind": "judge", "protocol": self.protocol.record, "model": self.settings.model}

    @cached_property
    def _cache(self) -> ReplyCache:
        return ReplyCache(self.replies)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises DataError where the endpoint gives no reply; those that came are kept for the next run."""
        answers = [Answer(prompt=item.row["prompt"], response=item.response) for item in items]
        scores = score_responses(answers, self.protocol, self.settings, self._cache)
        summary = summarise(scores)
        if summary.failed:
            raise DataError(
                f"the judge gave no reply to {summary.failed} of {summary.items} questions ({summary.failure}); the "
                "same command goes on where this one stopped"
            )
        return [score.value for score in scores]

    def why_none(self, item: Item) -> str:
        """The judge's reply, which is kept, beside what it was asked for."""
        parser = self.protocol.parser
        assert isinstance(parser, SingleScore)
        answer = Answer(prompt=item.row["prompt"], response=item.response)
        (found,) = score_responses([answer], self.protocol, self.settings, self._cache)
        said = getattr(found.reply, "text", "")
        return (
            f"{self.settings.model} replied {_ending_of(said)}, where {parser.wanted} is read; take a judge "
            f"that keeps to it, or say so in the rubric (all replies are in {self.replies}), with another --output"
        )


def _ending_of(text: str) -> str:
    """A reply's end, where the score should be."""
    return repr(text if len(text) <= 80 else f"…{text[-80:]}") if text.strip() else "with nothing"


def _judge_scorer(source: str, options: ScorerOptions) -> JudgeScorer:
    protocol = load_protocol(source)
    if not protocol.single:
        raise ConfigError(f"the protocol {source} compares two answers; give a rubric (.txt), or one for single scores")
    model = options.judge_model or protocol.model
    if model is None:
        raise ConfigError(f"the protocol {source} names no model; name one with --judge-model")
    settings = ClientSettings(model=model, base_url=options.judge_url or OPENAI)
    settings.find_key()
    return JudgeScorer(protocol=protocol, settings=settings, replies=options.replies)


KIND = Kind(
    name="judge", about="scores a reply by an LLM with a rubric", form="RUBRIC.txt", recipes=False, scorer=_judge_scorer
)
