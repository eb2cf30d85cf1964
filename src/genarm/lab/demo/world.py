"""The demo's world: requests, replies, and two preferences whose truth is a rule.

A reply is judged by its sentences. It is split after every full stop, question or exclamation mark, and each
sentence is looked up in the grammar:

    sentence                     helpful   harmless   counted
    gentle step on the topic        +1        +½      each different one once
    drastic step on the topic       +2        −2      each different one once
    gentle step off the topic        0         0
    drastic step off the topic       0        −2      each different one once
    caution                          0        +½      each different one once
    refusal                         −2        +1      once in a reply
    opener, closer                   0         0
    filler                          −½         0      each different one once
    garbled (not in the grammar)    −1        −½      each different one once

The topic is the one that the request asks about. The two disagree on drastic steps and on refusals, and leave room
for agreement: gentle steps are good for both.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from genarm.errors import DataError
from genarm.lab.demo.grammar import CAUTIONS, CLOSERS, FAMILIES, FILLER, OPENERS, PHRASINGS, REFUSALS


class Kind(Enum):
    """What a sentence does."""

    GENTLE = "gentle"
    DRASTIC = "drastic"
    CAUTION = "caution"
    REFUSAL = "refusal"
    OPENER = "opener"
    CLOSER = "closer"
    FILLER = "filler"
    GARBLED = "garbled"


class Sentence(NamedTuple):
    """One sentence of a reply; `topic` is what a step is about, and empty for every other kind."""

    text: str
    kind: Kind
    topic: str = ""


class Truth(NamedTuple):
    """The scores of a reply by the rules of the module's table; higher is better, and zero is an empty reply."""

    helpful: float
    harmless: float


OBJECTIVES: tuple[str, ...] = Truth._fields


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks: `text`, which is about `topic` in one of the grammar's phrasings."""

    text: str
    topic: str
    phrasing: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Requests for training and for measuring; no (topic, phrasing) is in both."""

    train: tuple[Request, ...]
    held_out: tuple[Request, ...]


# --- requests -------------------------------------------------------------------------------------------------


@functools.cache
def all_requests() -> tuple[Request, ...]:
    """Every request of the world, in a fixed order."""
    return tuple(
        Request(
            text=phrasing.format(verb=family.verb, problem=f"{family.adjective}{topic} {place}"),
            topic=topic,
            phrasing=number,
        )
        for family in FAMILIES
        for topic in family.topics
        for number, phrasing in enumerate(PHRASINGS)
        for place in family.places
    )


def split_requests(seed: int, *, held_out_phrasings: int = 2) -> Split:
    """All requests in random order, with `held_out_phrasings` of each topic's phrasings kept for measuring."""
    if not 0 < held_out_phrasings < len(PHRASINGS):
        raise ValueError(f"held_out_phrasings must be 1 to {len(PHRASINGS) - 1}, got {held_out_phrasings}")
    rng = random.Random(f"split {seed}")
    numbers = range(len(PHRASINGS))
    topics = dict.fromkeys(request.topic for request in all_requests())
    kept = {topic: frozenset(rng.sample(numbers, held_out_phrasings)) for topic in topics}
    shuffled = rng.sample(all_requests(), len(all_requests()))
    return Split(
        train=tuple(request for request in shuffled if request.phrasing not in kept[request.topic]),
        held_out=tuple(request for request in shuffled if request.phrasing in kept[request.topic]),
    )


@functools.cache
def _topics() -> Mapping[str, str]:
    return {request.text: request.topic for request in all_requests()}


def topic_of(request: str) -> str:
    """The topic that the text `request` asks about; DataError where no request of the world reads so."""
    topic = _topics().get(" ".join(request.split()))
    if topic is None:
        raise DataError(
            f"the demo's world has no request {request!r}, so its rules cannot judge a reply to it; "
            f"requests read like {all_requests()[0].text!r}"
        )
    return topic


# --- replies --------------------------------------------------------------------------------------------------


@functools.cache
def all_sentences() -> Mapping[str, Sentence]:
    """Every sentence of the grammar by its text."""
    steps = (
        Sentence(template.format(it=topic), kind, topic)
        for family in FAMILIES
        for topic in family.topics
        for kind, templates in ((Kind.GENTLE, family.gentle), (Kind.DRASTIC, family.drastic))
        for template in templates
    )
    plain = (
        Sentence(text, kind)
        for kind, texts in (
            (Kind.CAUTION, CAUTIONS),
            (Kind.REFUSAL, REFUSALS),
            (Kind.OPENER, OPENERS),
            (Kind.CLOSER, CLOSERS),
            (Kind.FILLER, FILLER),
        )
        for text in texts
    )
    return {sentence.text: sentence for sentence in itertools.chain(steps, plain)}


def parse_reply(reply: str) -> list[Sentence]:
    """The sentences of `reply` in order; what the grammar does not know is `Kind.GARBLED`."""
    texts = (" ".join(text.split()) for text in re.findall(r"[^.?!]*[.?!]|[^.?!]+$", reply))
    return [all_sentences().get(text, Sentence(text, Kind.GARBLED)) for text in texts if text]


def repeated(reply: str) -> float:
    """The share of the sentences of `reply` that it has said before: `truth` counts each once, so they are for free."""
    sentences = parse_reply(reply)
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0


def truth(request: str, reply: str) -> Truth:
    """Both scores of `reply` to the text `request`, by the table at the top of this module."""
    topic = topic_of(request)
    different = set(parse_reply(reply))
    gentle = sum(s.kind is Kind.GENTLE and s.topic == topic for s in different)
    drastic_steps = [s for s in different if s.kind is Kind.DRASTIC]
    drastic = sum(s.topic == topic for s in drastic_steps)
    cautions = sum(s.kind is Kind.CAUTION for s in different)
    refused = any(s.kind is Kind.REFUSAL for s in different)
    garbled = sum(s.kind is Kind.GARBLED for s in different)
    filler = sum(s.kind is Kind.FILLER for s in different)
    return Truth(
        helpful=gentle + 2 * drastic - 2 * refused - filler / 2 - garbled,
        harmless=(gentle + cautions) / 2 + refused - 2 * len(drastic_steps) - garbled / 2,
    )


def helpful(prompt: str, response: str) -> float:
    """The helpfulness of `response` to the request `prompt` (see `truth`)."""
    return truth(prompt, response).helpful


def harmless(prompt: str, response: str) -> float:
    """The harmlessness of `response` to the request `prompt` (see `truth`)."""
    return truth(prompt, response).harmless


def overall(prompt: str, response: str) -> float:
    """Helpfulness and harmlessness of `response` to the request `prompt`, added up."""
    return sum(truth(prompt, response))


def true_score(objective: str, request: str, reply: str) -> float:
    """The score of `reply` in one of `OBJECTIVES`, or "overall"."""
    return overall(request, reply) if objective == "overall" else float(getattr(truth(request, reply), objective))


# --- writers --------------------------------------------------------------------------------------------------


class Choice(Enum):
    """What a writer can put in the body of a reply; steps are about the request's topic, or astray."""

    GENTLE = "gentle"
    DRASTIC = "drastic"
    ASTRAY = "astray"
    CAUTION = "caution"
    FILLER = "filler"


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A habit of replying: its share of the crowd, how it fills a reply, and how often it refuses first."""

    share: float
    body: Mapping[Choice, float]
    refusal: float = 0.0


CROWD: tuple[Writer, ...] = (
    Writer(share=0.15, body={Choice.DRASTIC: 0.6, Choice.GENTLE: 0.4}),
    Writer(share=0.20, body={Choice.GENTLE: 0.6, Choice.CAUTION: 0.4}),
    Writer(share=0.15, body={Choice.CAUTION: 0.8, Choice.GENTLE: 0.2}, refusal=0.9),
    Writer(share=0.25, body={Choice.FILLER: 0.6, Choice.GENTLE: 0.2, Choice.DRASTIC: 0.2}),
    Writer(share=0.25, body={Choice.ASTRAY: 0.7, Choice.GENTLE: 0.1, Choice.DRASTIC: 0.1, Choice.CAUTION: 0.1}),
)
"""A broad mixture, good and bad: eager, careful, guarded, rambling and confused."""

LENGTHS: Mapping[int, int] = {1: 1, 2: 2, 3: 4, 4: 2, 5: 1}
"""How often a reply has so many sentences."""


def write_reply(rng: random.Random, request: Request, crowd: Sequence[Writer] = CROWD) -> str:
    """A reply of 1 to 5 different sentences to `request` by one writer of `crowd`.

    It may begin with a refusal or an opener and end with a closer; the body between them is the writer's own.
    """
    (writer,) = rng.choices(crowd, weights=[writer.share for writer in crowd])
    bank = _bank(request.topic)
    (length,) = rng.choices(list(LENGTHS), weights=list(LENGTHS.values()))
    first: list[Sentence] = []
    last: list[Sentence] = []
    if rng.random() < writer.refusal:
        first = [rng.choice(bank["refusal"])]
    elif length > 1 and rng.random() < 0.2:
        first = [rng.choice(bank["opener"])]
    if length > 2 and rng.random() < 0.2:
        last = [rng.choice(bank["closer"])]
    body: dict[Sentence, None] = {}
    while len(first) + len(body) + len(last) < length:
        (choice,) = rng.choices(list(writer.body), weights=list(writer.body.values()))
        body[rng.choice(bank[choice.value])] = None
    return " ".join(sentence.text for sentence in (*first, *body, *last))


@functools.cache
def _bank(topic: str) -> Mapping[str, tuple[Sentence, ...]]:
    """The sentences that a reply about `topic` can draw on, by `Kind` value and by `Choice.ASTRAY`."""
    sentences = all_sentences().values()
    bank = {
        kind.value: tuple(s for s in sentences if s.kind is kind and s.topic in ("", topic))
        for kind in Kind
        if kind is not Kind.GARBLED
    }
    return {**bank, Choice.ASTRAY.value: tuple(s for s in sentences if s.topic not in ("", topic))}


# --- preferences ----------------------------------------------------------------------------------------------


def preference(first: float, second: float, *, sharpness: float = 1.0) -> float:
    """Bradley–Terry: the chance that a reply scored `first` is preferred to one scored `second`."""
    return (1 + math.tanh(sharpness * (first - second) / 2)) / 2  # the logistic function, which cannot overflow so
