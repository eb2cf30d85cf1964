"""What clients get, field by field; fields that were not asked for are left out."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

FinishReason: TypeAlias = Literal["stop", "length"]


class _Reply(BaseModel):
    def as_json(self) -> str:
        """The fields that were set."""
        return self.model_dump_json(exclude_unset=True)

    def as_event(self) -> str:
        """One event of a stream."""
        return f"data: {self.as_json()}\n\n"


class _Whole(_Reply):
    choices: list[Any]

    def as_bytes(self) -> bytes:
        """The fields that were set; choice by choice, so that other threads have their turn in a long answer."""
        choices = ",".join(choice.as_json() for choice in self.choices)
        without = self.model_copy(update={"choices": []}).as_json()
        return without.replace('"choices":[]', f'"choices":[{choices}]', 1).encode()


class Usage(_Reply):
    """How many tokens were read and drawn, and how many nats all replies together went from the base."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    kl: float | None = None


class TopLogprob(_Reply):
    """One of the likeliest tokens at a place."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A drawn token, with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Reply):
    """Of the guided distribution, before penalties and temperature."""

    content: list[TokenLogprob]


class TextLogprobs(_Reply):
    """The same in the older form; a prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class RewardShare(_Reply):
    """What one reward says of a token; `contribution` = weight · logprob."""

    logprob: float
    weight: float
    contribution: float


class TokenShares(_Reply):
    """What everyone says of a token; `logprob` is the guided distribution's."""

    token: str
    bytes: list[int]
    logprob: float | None
    base_logprob: float | None
    rewards: dict[str, RewardShare]


class ChatMessage(_Reply):
    """The reply."""

    role: Literal["assistant"]
    content: str


class ChatChoice(_Reply):
    """One of `n` replies."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    rewards: list[TokenShares] = []


class ChatCompletion(_Whole):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(_Reply):
    """What is new of a reply."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(_Reply):
    """A piece of one of `n` replies."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    rewards: list[TokenShares] = []


class ChatChunk(_Reply):
    """One event of a streamed answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(_Reply):
    """One of the replies, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    rewards: list[TokenShares] = []


class TextCompletion(_Whole):
    """The answer of /v1/completions, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(_Reply):
    """A name to ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(_Reply):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Reward(_Reply):
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


class Preset(_Reply):
    """Weights and a budget by a name; the model NAME@PRESET has them."""

    name: str
    weights: dict[str, float]
    max_kl: float | None


class WishLimits(_Reply):
    """What wishes of its own a request may have: how many, how long, and with which weights."""

    most: int
    characters: int
    minimum: float
    maximum: float


class Rewards(_Reply):
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


class Health(_Reply):
    """The answer of /health and /ready."""

    status: Literal["ok", "starting again", "failed"]
