"""What clients get, field by field; fields that were not asked for are left out.

Dictionaries with types: every token of every stream makes a dozen of them, and building and checking objects for them
took longer than all else that was done for a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypeAlias

from pydantic_core import to_json
from typing_extensions import TypedDict

FinishReason: TypeAlias = Literal["stop", "length"]


def as_json(reply: Any) -> bytes:
    """A reply, or a part of one."""
    return to_json(reply, inf_nan_mode="null")


def as_event(reply: Mapping[str, Any]) -> bytes:
    """One event of a stream: a piece of an answer, or the error that ends it."""
    return b"data: %b\n\n" % as_json(reply)


def as_answer(reply: TextCompletion | ChatCompletion) -> bytes:
    """All of an answer; written choice by choice, so that other threads have their turn in a long one."""
    choices = b",".join(as_json(choice) for choice in reply["choices"])
    return as_json({**reply, "choices": []}).replace(b'"choices":[]', b'"choices":[%b]' % choices, 1)


class Usage(TypedDict):
    """How many tokens were read and drawn, and how many nats all replies together went from the base."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    kl: NotRequired[float]


class TopLogprob(TypedDict):
    """One of the likeliest tokens at a place."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A drawn token, with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of the guided distribution, before penalties and temperature."""

    content: list[TokenLogprob]


class TextLogprobs(TypedDict):
    """The same in the older form; a prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class RewardShare(TypedDict):
    """What one reward says of a token; `contribution` = weight · logprob."""

    logprob: float
    weight: float
    contribution: float


class TokenShares(TypedDict):
    """What everyone says of a token; `logprob` is the guided distribution's."""

    token: str
    bytes: list[int]
    logprob: float | None
    base_logprob: float | None
    rewards: dict[str, RewardShare]


class ChatMessage(TypedDict):
    """The reply."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One of `n` replies."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    rewards: NotRequired[list[TokenShares]]


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """What is new of a reply."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """A piece of one of `n` replies."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    rewards: NotRequired[list[TokenShares]]


class ChatChunk(TypedDict):
    """One event of a streamed answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class TextChoice(TypedDict):
    """One of the replies, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    rewards: NotRequired[list[TokenShares]]


class TextCompletion(TypedDict):
    """The answer of /v1/completions, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    """A name to ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(TypedDict):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Reward(TypedDict):
    """A reward and the weights it takes.

    A `difference` is what a model says more than its reference; `wish` is the text of one that is a wish.
    """

    id: str
    default_weight: float
    minimum: float
    maximum: float
    description: str
    difference: bool
    wish: str | None


class Preset(TypedDict):
    """Weights and a budget by a name; the model NAME@PRESET has them."""

    name: str
    weights: dict[str, float]
    max_kl: float | None


class WishLimits(TypedDict):
    """What wishes of its own a request may have: how many, how long, and with which weights."""

    most: int
    characters: int
    minimum: float
    maximum: float


class Rewards(TypedDict):
    """The answer of /v1/rewards.

    `return_rewards` says whether requests may ask for what the rewards say; `request_wishes` is null where they may
    have no wishes of their own.
    """

    object: Literal["list"]
    model: str
    data: list[Reward]
    presets: list[Preset]
    return_rewards: bool
    request_wishes: WishLimits | None


class Health(TypedDict):
    """The answer of /health and /ready."""

    status: Literal["ok", "starting again", "failed"]
