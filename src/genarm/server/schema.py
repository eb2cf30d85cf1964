"""What clients may ask, field by field. Types are strict; what OpenAI's API has and this server lacks is refused."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from genarm.engine.options import MOST_WISHES
from genarm.model.wishes import check_wish
from genarm.server.neutral import CacheHint, NeutralChatFields, NeutralFields, NeutralTextFields, Only
from genarm.text.prompts import Reading, check_end, text_of

_MOST_CHOICES = 128
_MOST_STOPS = 16
_LONGEST_STOP = 1_000
"""Characters; each is looked for at every token of every reply."""
_MOST_STOP_IDS = 128
_SEED = 2**63
_MOST_TEMPLATE_ARGS = 10_000
MOST_TOP = 20
"""The most runner-up tokens that a request may ask for."""


_MOST_MESSAGES = 2**14
_MOST_PARTS = 2**10
_MOST_WEIGHTS = 2**8
_MOST_BIASES = 2**13
LONGEST_WISH = 4_000
"""The most characters of a wish."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Refuse the first field that there is none of; pydantic would collect them all, however many."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                near = get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.75)
                context = {"key": key, "near": near[0] if near else ""}
                raise PydanticCustomError("extra_forbidden", "Extra inputs are not permitted", context)
        return data


def _at_most(most: int, words: str) -> BeforeValidator:
    """For a list or an object: pydantic looks at every item, and keeps every complaint, before it counts them."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"has {len(value)} {words}; this server takes up to {most}")
        return value

    return BeforeValidator(check)


def _one_message(words: str) -> WrapValidator:
    """For a union: say what it may be in one sentence, not each alternative's complaint."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"must be {words}") from error

    return WrapValidator(check)


_Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Stop: TypeAlias = Annotated[
    _Text | Annotated[list[_Text], Field(max_length=_MOST_STOPS, fail_fast=True)],
    _one_message(
        f"a text or a list of up to {_MOST_STOPS} texts, none of them empty or longer than {_LONGEST_STOP} characters"
    ),
]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
PromptIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompts: TypeAlias = Annotated[
    str
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | PromptIds
    | Annotated[list[PromptIds], Field(min_length=1, fail_fast=True)],
    _one_message("a text, a list of texts, a list of token ids, or a list of such lists; none of them empty"),
]
Bias: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    _at_most(_MOST_BIASES, "entries"),
]


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="accepted; nothing is obfuscated")
    continuous_usage_stats: Literal[False] | None = Field(default=None, description="vLLM's; usage comes at the end")


class RequestWish(_Strict):
    """A reward in words: what the base says more with this system text than without it."""

    text: str = Field(max_length=LONGEST_WISH)
    weight: float = Field(default=1.0, description="1 is the base with the text; below 0 the opposite is wished for")

    @field_validator("text")
    @classmethod
    def _said(cls, text: str) -> str:
        check_wish(text)
        return text


class _Request(_Strict, NeutralFields):
    """What both ways to ask have in common."""

    model: str = Field(description="a name of /v1/models, NAME@PRESET, or NAME@REWARD=W,…")
    reward_weights: Annotated[dict[str, float], _at_most(_MOST_WEIGHTS, "weights")] | None = Field(
        default=None, description="{reward: weight} over the model's defaults; /v1/rewards lists them"
    )
    wishes: Annotated[list[RequestWish], Field(max_length=MOST_WISHES), _at_most(MOST_WISHES, "wishes")] | None = Field(
        default=None, description='rewards in words for this request alone; in replies they are "wish 1" and so on'
    )
    max_kl: float | None = Field(
        default=None,
        ge=0,
        description="the most nats that a token's distribution may be from the base's; where the weights would lead "
        "farther, they are scaled down for that token",
    )
    return_rewards: bool | None = Field(
        default=None, description="add what the base and each reward say of every token"
    )
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="0 and -1 keep all tokens")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="of tokens of the prompt, too; multiplies guided log-probabilities"
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Bias | None = None
    n: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-_SEED, lt=_SEED)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MOST_STOP_IDS, fail_fast=True)] | None = Field(
        default=None, description="end the reply, beside the model's own; without text"
    )
    min_tokens: int | None = Field(
        default=None, ge=0, description="up to so many tokens nothing of the model's or of stop ends the reply"
    )
    ignore_eos: bool | None = Field(default=None, description="the model's own end of turn does not end the reply")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="accepted and not used")

    @model_validator(mode="after")
    def _needs_stream(self) -> _Request:
        if self.wants_usage and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stops(self) -> list[str]:
        """As a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"] = "text"
    text: str
    prompt_cache_breakpoint: CacheHint = None
    cache_control: CacheHint = None


_Content: TypeAlias = Annotated[
    str | Annotated[list[TextPart], Field(max_length=_MOST_PARTS)],
    WrapValidator(lambda content, _: text_of(content)),  # as files are read; the types are for the document
    _at_most(_MOST_PARTS, "parts"),
]


_NOT_READ = "of a message only its role and its text are read"


class Message(_Strict):
    """A turn of a conversation. The fields that must be null are what OpenAI's client sends back with a reply."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content | None = Field(default=None, validate_default=True)
    name: str | None = None
    cache_control: CacheHint = None
    refusal: Annotated[Any, Only(_NOT_READ)] = None
    annotations: Annotated[Any, Only(_NOT_READ, [])] = None
    audio: Annotated[Any, Only(_NOT_READ)] = None
    function_call: Annotated[Any, Only(_NOT_READ)] = None
    tool_calls: Annotated[Any, Only(_NOT_READ, [])] = None
    tool_call_id: Annotated[Any, Only(_NOT_READ)] = None
    reasoning: Annotated[Any, Only(_NOT_READ)] = None
    reasoning_content: Annotated[Any, Only(_NOT_READ)] = None

    @field_validator("content", mode="before")
    @classmethod
    def _said(cls, content: Any, info: ValidationInfo) -> Any:
        """Only an assistant may say nothing, as it does where OpenAI's has called tools."""
        if content is None and info.data.get("role") != "assistant":
            raise PydanticCustomError("no_content", 'must be a text or a list of {"type": "text", "text": …}')
        return content

    @property
    def text(self) -> str:
        """All of it."""
        assert self.content is None or isinstance(self.content, str)
        return self.content or ""


class ChatRequest(_Request, NeutralChatFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), _at_most(_MOST_MESSAGES, "messages")]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    continue_final_message: bool | None = Field(
        default=None, description="the reply goes on with the last message, an assistant's; it is what is added"
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="true: a reply is a new turn, also after an assistant's message"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="arguments of the chat template, as in enable_thinking, over the server's own"
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_args(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            if len(json.dumps(given)) > _MOST_TEMPLATE_ARGS:
                raise ValueError(f"must be at most {_MOST_TEMPLATE_ARGS} characters of JSON")
            Reading(template_args=given)
        return given

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is {self.max_completion_tokens}, and they "
                "are two names of one limit; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _ends(self) -> ChatRequest:
        """A reply goes on with the last message, or is a turn after it; which one is never guessed."""
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message goes on with the last message and add_generation_prompt begins a new turn; set "
                "one of them to false"
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ValueError("add_generation_prompt can be false only where continue_final_message is true")
        if self.continued is None and self.messages[-1].role == "assistant":
            raise ValueError(
                "the last message is the assistant's; end with one to answer, or set continue_final_message to true to "
                "go on with it, or add_generation_prompt to true to begin a new turn after it"
            )
        if self.continued:
            check_end([{"role": m.role, "content": ""} for m in self.messages[-1:]], continued=True)
        return self

    @property
    def continued(self) -> bool | None:
        """What `encode_prompt` is to do with an assistant's last message."""
        if self.continue_final_message:
            return True
        return False if self.add_generation_prompt else None

    @property
    def replies(self) -> int:
        """How many are asked for."""
        return self.n or 1

    @property
    def limit(self) -> int | None:
        """The most tokens of a reply; None for all there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Request, NeutralTextFields):
    """The body of /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, description="16 if left out")
    echo: bool | None = Field(default=None, description="the prompt first, with its log-probabilities if any are asked")
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)
    best_of: int | None = Field(default=None, ge=1, description="only 1 or n: nothing is ranked")
    suffix: Literal[""] | None = Field(default=None, description="only empty: nothing is filled in")

    @field_validator("best_of")
    @classmethod
    def _unranked(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of not in (None, 1, info.data.get("n") or 1):
            raise ValueError("must be 1 or n, because replies are not ranked; ask for more replies with n")
        return best_of

    @property
    def replies(self) -> int:
        """How many are asked for, to all prompts."""
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
