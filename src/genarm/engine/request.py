"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, TypeAlias

from genarm.engine.options import MOST_WISHES
from genarm.errors import ConfigError
from genarm.model.weights import check_max_kl
from genarm.model.wishes import Wish
from genarm.sampling import Sampling
from genarm.text.prompts import USUAL, Prompt, Reading

Ending: TypeAlias = Literal["stop", "length", "cancelled"]

_MOST_TOP = 100


def wish_name(index: int) -> str:
    """What the wish of a request that comes so many places after its first is called; no reward can have this name."""
    return f"wish {index + 1}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One reply to draw.

    Attributes:
        prompt: text as it is, a conversation for the chat template, or token ids.
        weights: {reward: w} over the model's defaults. A reward of weight 0 is not run.
        max_kl: the most nats that a token's distribution may be from the base's; where the weights would lead farther,
            all of them are scaled down for that token. None sets no bound.
        wishes: rewards in words that only this request has, up to four; in replies they are called "wish 1" and so on.
        contexts: {wish: token ids of the prompt as that wish reads it}, needed where `prompt` is token ids and the wish
            has a weight; of a text or a conversation they are made here.
        sampling: how tokens are drawn.
        seed: of everything random in this request; the same request gives the same reply in any company.
        stop: texts that end the reply, which then ends before them.
        stop_token_ids: ids that end the reply, beside the model's own; the last one is a token of it, without text.
        ignore_eos: the model's own ids do not end the reply.
        top_log_probs: how many of the likeliest tokens to report with each token.
        prompt_log_probs: how many of the likeliest tokens to report with each token of the prompt; None leaves the
            prompt's numbers out. With them nothing of the prompt is taken over from earlier requests.
        reply: False ends the request after its prompt, whose numbers are then all that comes of it.
        reading: how `prompt` becomes token ids, where it is text or a conversation.
        continues: the reply is a continuation of the prompt's text, so that its first word keeps the space before it.
    """

    prompt: Prompt | Sequence[int]
    weights: Mapping[str, float] = field(default_factory=dict)
    max_kl: float | None = None
    wishes: Sequence[Wish] = ()
    contexts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    top_log_probs: int = 0
    prompt_log_probs: int | None = None
    reply: bool = True
    continues: bool = False
    reading: Reading = USUAL

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop is {self.stop!r}; it must be a list of texts, none of them empty")
        check_max_kl(self.max_kl)
        if len(self.wishes) > MOST_WISHES or not all(isinstance(wish, Wish) for wish in self.wishes):
            raise ConfigError(f"wishes is {self.wishes!r:.80}; it must be a list of up to {MOST_WISHES} Wish")
        for name in ("top_log_probs", "prompt_log_probs"):
            count = getattr(self, name) or 0
            if not isinstance(count, Integral) or not 0 <= int(count) <= _MOST_TOP:
                raise ConfigError(f"{name} is {count!r:.50}; it must be from 0 to {_MOST_TOP}")

    def ends(self, usual: frozenset[int]) -> frozenset[int]:
        """The ids that end this reply, where those of the model are `usual`."""
        return (frozenset() if self.ignore_eos else usual) | frozenset(self.stop_token_ids)

    def check_ids(self, size: int) -> None:
        """Raise ConfigError where an id is named that no reply can have: ids go from 0 to `size` - 1."""
        for name, ids in (("logit_bias", self.sampling.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not isinstance(token, Integral) or not 0 <= token < size:
                    raise ConfigError(f"{name} names the token id {token!r}; ids go from 0 to {size - 1}")


Asked: TypeAlias = Request | Prompt | Sequence[int]
"""One reply to draw: all of it, or the prompt alone."""


def to_requests(
    asked: Asked | Sequence[Asked],
    sampling: Sampling | None = None,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> tuple[list[Request], bool]:
    """The requests that are meant by the arguments of `Engine.generate`, and whether it is one alone.

    Raises:
        ConfigError: what is asked has none of the forms, or there are settings beside a request, which has its own.
    """
    alone = isinstance(asked, Request) or _is_prompt(asked)
    given = bool(sampling or weights or seed or stop)
    requests: list[Request] = []
    for index, item in enumerate([asked] if alone or not isinstance(asked, Sequence) else asked):
        if isinstance(item, Request):
            if given:
                raise ConfigError("a Request has sampling, weights, seed and stop of its own; give them there")
            requests.append(item)
            continue
        if not _is_prompt(item):
            raise ConfigError(
                f"cannot read {item!r:.80} as a prompt; give a text, a conversation (a list of messages with role and "
                "content), a list of token ids, or a Request"
            )
        prompt: Any = item
        how = sampling or Sampling()
        requests.append(Request(prompt=prompt, weights=weights or {}, sampling=how, seed=seed + index, stop=stop))
    return requests, alone


def _is_prompt(item: object) -> bool:
    """Whether it is a text, a conversation or token ids."""
    if isinstance(item, str):
        return True
    return isinstance(item, Sequence) and bool(item) and all(isinstance(part, Mapping | Integral) for part in item)


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a reply, or of a prompt, where `text` is empty.

    Attributes:
        id: of the base's vocabulary.
        text: what became final with it; may be empty, and may hold text of earlier tokens.
        log_prob: log π(token), of the combined distribution before penalties and temperature.
        base: log π_base(token); None where what decodes does not say.
        rewards: {reward: log π_i(token)} of the rewards that ran, less their reference's log π(token) where they have
            one; w_i times it is that reward's contribution.
        top: (id, log_prob) of the likeliest tokens, best first, as many as were asked for.
        kl: KL(π ‖ π_base) of the distribution that `log_prob` is of, in nats; None where what decodes does not say, or
            the base rules out a token that the combination does not.
        offset: where in the reply's text it begins, in characters; a character that is not complete yet does not count.
    """

    id: int
    text: str
    log_prob: float
    base: float | None
    rewards: Mapping[str, float]
    top: tuple[tuple[int, float], ...] = ()
    kl: float | None = None
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class ScoredPrompt:
    """The numbers of a prompt's tokens from the second one on; there is nothing to predict the first one from."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A reply that has ended.

    Attributes:
        text: all of it, without special tokens and without what a stop string cut.
        tokens: in order, the one that ended it included.
        ending: "stop" (end of turn or a stop string), "length" or "cancelled".
        prompt_tokens: how many tokens the prompt has.
        reused_tokens: how many of them the base did not have to run again.
        drafted, accepted: tokens drafted for it, and how many of those stayed.
    """

    text: str
    tokens: tuple[Token, ...]
    ending: Ending
    prompt_tokens: int
    reused_tokens: int
    drafted: int
    accepted: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of `tokens`."""
        return tuple(token.id for token in self.tokens)

    @property
    def kl(self) -> float | None:
        """How far the reply went from the base: the sum of its tokens' KL in nats; None where one is not known."""
        said = [token.kl for token in self.tokens if token.kl is not None]
        return math.fsum(said) if len(said) == len(self.tokens) else None
