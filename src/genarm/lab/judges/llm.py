"""An LLM as the judge: pairs of answers in both orders, or single answers by a rubric.

A pair is shown twice, each answer first once. The pair's outcome is the sign of the two preferences' sum: a win and a
tie are a win, a win and a loss (a judge that goes by the place) are a tie. A reply that cannot be read in either order
leaves the pair without an outcome, and so does a question that failed; both are counted.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from genarm.errors import ConfigError
from genarm.lab.judges.cache import ReplyCache, cache_key
from genarm.lab.judges.client import ChatClient, Completion, Failure
from genarm.lab.judges.parsing import Preference, SingleScore
from genarm.lab.judges.protocol import Protocol
from genarm.lab.judges.settings import ClientSettings
from genarm.statistics import Outcome
from genarm.text.prompts import Message, Prompt

Reply: TypeAlias = Completion | Failure
Messages: TypeAlias = list[Message]
_T = TypeVar("_T")

_CHARACTERS_PER_TOKEN = 4
_OUTCOMES: dict[int, Outcome] = {1: "win", 0: "tie", -1: "lose"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt; outcomes are those of `first`.

    Attributes:
        prompt, first, second: of them.
        row, number: what the prompt comes from and its place there, from 0, where that is known.
    """

    prompt: Prompt
    first: str
    second: str
    row: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to a prompt."""

    prompt: Prompt
    response: str


Item: TypeAlias = Pair | Answer


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge said about a pair.

    Attributes:
        replies: with the pair's first answer shown first, and shown second.
        preferences: what they say about the pair's first answer, wherever it was shown: 1 better, -1 worse; None where
            the reply cannot be read or there is none.
    """

    replies: tuple[Reply, Reply]
    preferences: tuple[Preference | None, Preference | None]

    @property
    def failed(self) -> bool:
        """Whether a question got no reply."""
        return any(isinstance(reply, Failure) for reply in self.replies)

    @property
    def outcome(self) -> Outcome | None:
        """Of the pair's first answer; None where a reply is missing or cannot be read."""
        one, other = self.preferences
        if one is None or other is None:
            return None
        return _OUTCOMES[(one + other > 0) - (one + other < 0)]

    def record(self) -> dict[str, Any]:
        """What a row of JSON says about it, every reply included."""
        orders = [
            {
                "reply": None if isinstance(reply, Failure) else reply.text,
                "failure": reply.reason if isinstance(reply, Failure) else None,
                "outcome": None if preference is None else _OUTCOMES[preference],
            }
            for reply, preference in zip(self.replies, self.preferences, strict=True)
        ]
        return {"outcome": self.outcome, "orders": orders}


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the judge said about one answer; `value` is None where its reply cannot be read or there is none."""

    reply: Reply
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a judgement went.

    Attributes:
        items: pairs or answers.
        unparsed: those with a reply that cannot be read, and none that failed.
        failed: those with a question that got no reply, and `failure`, the first reason.
        inconsistent: pairs whose two orders were both read and disagree; of these, `for_first` speak on the whole for
            the answer shown first, and `for_second` for the one shown second.
        prompt_tokens, completion_tokens: as the endpoint counted them, for all replies together.
    """

    items: int
    unparsed: int
    failed: int
    failure: str | None
    inconsistent: int = 0
    for_first: int = 0
    for_second: int = 0
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a judgement will take: `calls` beside `cached` replies, tokens, and the price of these (None: unknown).

    `prompt_tokens` are counted, or taken as a quarter of the characters; `completion_tokens` are the most there can be.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None


def judge_pairs(
    pairs: Sequence[Pair],
    protocol: Protocol,
    settings: ClientSettings,
    cache: ReplyCache,
    on_reply: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """The verdict on each pair, in order.

    Args:
        pairs: what to judge.
        protocol: one that compares two answers.
        settings: of the endpoint.
        cache: replies that are there already, and where new ones go.
        on_reply: called for each of the 2 · len(pairs) questions when it is settled.

    Raises:
        ConfigError: a protocol of the other kind; as `ChatClient.complete`.
        DataError: the cache cannot be written.
    """
    parser = protocol.parser
    if isinstance(parser, SingleScore):
        raise ConfigError(f"the protocol {protocol.name} scores single answers; comparing two needs one for pairs")
    replies = _ask(_questions(pairs, protocol), protocol, settings, cache, on_reply)
    verdicts = []
    for one, other in zip(replies[::2], replies[1::2], strict=True):
        straight = parser(one.text) if isinstance(one, Completion) else None
        swapped = parser(other.text) if isinstance(other, Completion) else None
        verdicts.append(Verdict(replies=(one, other), preferences=(straight, _turn(swapped))))
    return verdicts


def score_responses(
    answers: Sequence[Answer],
    protocol: Protocol,
    settings: ClientSettings,
    cache: ReplyCache,
    on_reply: Callable[[], None] = lambda: None,
) -> list[Score]:
    """The score of each answer, in order; arguments and errors as `judge_pairs`, the protocol being one for scores."""
    parser = protocol.parser
    if not isinstance(parser, SingleScore):
        raise ConfigError(
            f"the protocol {protocol.name} compares two answers; scoring single ones needs one for scores"
        )
    replies = _ask(_questions(answers, protocol), protocol, settings, cache, on_reply)
    return [
        Score(reply=reply, value=parser(reply.text) if isinstance(reply, Completion) else None) for reply in replies
    ]


def summarise(judged: Sequence[Verdict] | Sequence[Score]) -> Summary:
    """What to print beside the figures."""
    each = [judgement.replies if isinstance(judgement, Verdict) else (judgement.reply,) for judgement in judged]
    reasons = [next((r.reason for r in replies if isinstance(r, Failure)), None) for replies in each]
    results = [judgement.outcome if isinstance(judgement, Verdict) else judgement.value for judgement in judged]
    said = [reply for replies in each for reply in replies if isinstance(reply, Completion)]
    orders = [j.preferences for j in judged if isinstance(j, Verdict) and j.outcome is not None]
    # Both preferences are about the pair's first answer, which the second order shows in the second place.
    leaning = [(one or 0) - (other or 0) for one, other in orders]
    return Summary(
        items=len(judged),
        unparsed=sum(result is None and reason is None for result, reason in zip(results, reasons, strict=True)),
        failed=sum(reason is not None for reason in reasons),
        failure=next(filter(None, reasons), None),
        inconsistent=sum(lean != 0 for lean in leaning),
        for_first=sum(lean > 0 for lean in leaning),
        for_second=sum(lean < 0 for lean in leaning),
        prompt_tokens=sum(reply.prompt_tokens for reply in said),
        completion_tokens=sum(reply.completion_tokens for reply in said),
    )


def estimate(
    items: Sequence[Item],
    protocol: Protocol,
    *,
    model: str,
    cache: ReplyCache | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Estimate:
    """What judging `items` will take; nothing is asked.

    Args:
        items: pairs or answers, as the protocol needs them.
        protocol: how they are judged.
        model: who is asked.
        cache: replies that need no call.
        price_in, price_out: of a million tokens read and written.
        count_tokens: a tokenizer's count; a quarter of the characters without it.
    """
    questions = {cache_key(model, messages, protocol.sampling): messages for messages in _questions(items, protocol)}
    missing = [messages for key, messages in questions.items() if cache is None or cache.get(key) is None]
    count = count_tokens or (lambda text: math.ceil(len(text) / _CHARACTERS_PER_TOKEN))
    read = sum(count(message["content"]) for messages in missing for message in messages)
    written = len(missing) * protocol.reply_limit
    price = None if price_in is None or price_out is None else (read * price_in + written * price_out) / 1e6
    return Estimate(
        calls=len(missing),
        cached=len(questions) - len(missing),
        prompt_tokens=read,
        completion_tokens=written,
        price=price,
    )


def _questions(items: Sequence[Item], protocol: Protocol) -> Iterator[Messages]:
    """Two for each pair, one for each answer."""
    for item in items:
        if isinstance(item, Pair):
            yield protocol.messages(item.prompt, item.first, item.second)
            yield protocol.messages(item.prompt, item.second, item.first)
        else:
            yield protocol.messages(item.prompt, item.response)


def _turn(preference: Preference | None) -> Preference | None:
    """What a preference says once the two answers have changed places."""
    turned: dict[Preference, Preference] = {1: -1, 0: 0, -1: 1}
    return None if preference is None else turned[preference]


def _ask(
    questions: Iterator[Messages],
    protocol: Protocol,
    settings: ClientSettings,
    cache: ReplyCache,
    on_reply: Callable[[], None],
) -> list[Reply]:
    """A reply to each question; equal questions are asked once, and those in the cache not at all."""
    asked = [(cache_key(settings.model, messages, protocol.sampling), messages) for messages in questions]
    places: dict[str, int] = {}
    for key, _ in asked:
        places[key] = places.get(key, 0) + 1
    replies: dict[str, Reply] = {}
    missing: dict[str, Messages] = {}

    def settle(key: str, reply: Reply) -> None:
        replies[key] = reply
        for _ in range(places[key]):
            on_reply()

    for key, messages in asked:
        if key in replies or key in missing:
            continue
        known = cache.get(key)
        if known is None:
            missing[key] = messages
        else:
            settle(key, known)
    if missing:
        _run(_ask_missing(missing, protocol.sampling, settings, cache, settle))
    return [replies[key] for key, _ in asked]


async def _ask_missing(
    missing: Mapping[str, Messages],
    sampling: Mapping[str, Any],
    settings: ClientSettings,
    cache: ReplyCache,
    settle: Callable[[str, Reply], None],
) -> None:
    async with ChatClient(settings) as client:

        async def ask(key: str, messages: Messages) -> None:
            reply = await client.complete(messages, sampling)
            if isinstance(reply, Completion):
                cache.put(key, reply)
            settle(key, reply)

        try:
            async with asyncio.TaskGroup() as group:
                for key, messages in missing.items():
                    group.create_task(ask(key, messages))
        except ExceptionGroup as errors:  # the first one ended all others
            raise errors.exceptions[0] from None


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` to its end, in a thread of its own where this one has an event loop running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
