"""A conversation with a model, its commands included, apart from any terminal.

`Chat.handle` takes one line and answers on a `Screen`. The conversation is what the user saw: an answer that was
stopped stays in it as far as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from genarm.engine import Engine, Request, Stream
from genarm.engine.options import MOST_WISHES
from genarm.errors import ConfigError, DataError, GenarmError, UnsupportedError
from genarm.model.config import GuidedConfig
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.references import ModelFiles
from genarm.model.weights import check_max_kl, parse_weights
from genarm.model.wishes import Wish
from genarm.sampling import Sampling, derive_seed
from genarm.text.prompts import Message, Prompt

if TYPE_CHECKING:
    from genarm.model.token_rewards import TokenRewards

HELP = """\
/weights              show the reward weights
/weights NAME=W …     change them from the next answer on; those not named stay as they are
/wish NAME=TEXT       a new reward in words, of weight 1: the model with the system message TEXT, less the model without
                      it; /weights NAME=2 then makes it count more; /wish lists them, /wish NAME=off takes one back
/kl E                 keep every token within E nats of the base from the next answer on; /kl shows the bound and how
                      far the last answer went, /kl off removes it
/compare [TEXT]       the base's and the guided model's answer to the last message, or to TEXT, side by side, and
                      the base's at the lower temperature that rewards which learnt nothing would amount to
/tokens               heat map of the last answer: which tokens each reward likes more than the base does
/system TEXT          set the system message from the next answer on; /system shows it, /system off removes it
/reset                begin a new conversation; weights, wishes and system message stay
/help                 this list
/quit or /exit        leave; so does Ctrl-D
Ctrl-C stops an answer. What was shown of it stays in the conversation.
A text of several lines that is pasted is one message, and no command whatever it begins with; to type one, begin
and end it with \"\"\". A message may begin with a slash if there is a space before it."""


@dataclass(frozen=True, kw_only=True)
class ChatReply:
    """What the model said, and whether it ended by itself, at the token limit or was stopped by the user.

    `kl` is how far it went from the base, in nats, of answers that were not stopped.
    """

    text: str
    ended: Literal["stop", "length", "interrupted"]
    weights: Mapping[str, float]
    max_kl: float | None = None
    kl: float | None = None


class Screen(Protocol):
    """Where a chat shows what happens."""

    def note(self, text: str) -> None:
        """A remark of the program."""

    def error(self, text: str) -> None:
        """Why a line could not be handled."""

    def piece(self, text: str) -> None:
        """The next piece of an answer."""

    def answered(self, answer: ChatReply) -> None:
        """The answer is complete; its pieces have all been shown."""

    def compared(self, base: ChatReply, guided: ChatReply, sharpened: tuple[float, ChatReply] | None) -> None:
        """Answers to show side by side; `sharpened` is the base's at a lower temperature, where there is one."""

    def heat(self, rewards: TokenRewards) -> None:
        """The rewards of each token of an answer."""


class Chat:
    """A model, a conversation and the settings that its commands change.

    Attributes:
        history: the messages so far, without the system message.
        weights: {reward: weight} of the next answer.
        max_kl: the most nats per token from the base, or None.
        system: the system message, or None.
    """

    def __init__(
        self,
        engine: Engine,
        files: ModelFiles,
        screen: Screen,
        sampling: Sampling,
        *,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        max_kl: float | None = None,
        system: str | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            engine: of the model that `files` describe.
            files: the tokenizer and the rewards' names.
            screen: where everything is shown.
            sampling: how answers are drawn.
            seed: the same lines with the same seed give the same answers.
            weights: reward weights over the folder's own.
            max_kl: the most nats per token from the base.
            system: a system message.

        Raises:
            DataError: the tokenizer has no chat template.
            WeightsError: weights that the model does not take.
        """
        if not files.tokenizer.chat_template:
            raise DataError(
                f"{files.reference} has no chat template, so it cannot hold a conversation; use genarm generate --raw"
            )
        self.engine = engine
        self.files = files
        self.screen = screen
        self.sampling = sampling
        self.seed = seed
        self.weights = files.weights(weights or {})
        self.max_kl = max_kl
        self.system = system
        self.history: list[Message] = []
        self._given = files
        self._last: tuple[Prompt, ChatReply, ModelFiles] | None = None
        self._drawn = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/weights": self._weights,
            "/wish": self._wish,
            "/kl": self._kl,
            "/compare": self._compare,
            "/tokens": self._tokens,
            "/system": self._system,
            "/reset": self._reset,
            "/help": self._help,
        }

    def handle(self, line: str, *, message: bool = False) -> bool:
        """Answer a message or carry out a command; a line that cannot be handled is said on the screen.

        Args:
            line: what was typed; of one line or several.
            message: it is one for the model, whatever it begins with.

        Returns:
            Whether the conversation goes on.
        """
        if line.startswith("/") and not message:
            command, rest = (*line.split(maxsplit=1), "")[:2]
            if command in ("/quit", "/exit"):
                return False
            action = self._commands.get(command)
            if action is None:
                names = ", ".join([*self._commands, "/quit"])
                self.screen.error(f"there is no command {command!r}; there are {names}")
                return True
        else:
            action, rest = self._say, line
        if rest.strip() or action != self._say:
            try:
                action(rest.strip())
            except GenarmError as error:
                self.screen.error(str(error))
        return True

    def _say(self, text: str) -> None:
        messages: list[Message] = [*self.history, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        stream = self._begin(prompt, self.weights, self._next_seed())
        answer = replace(_read(stream, self.weights, on_text=self.screen.piece), max_kl=self.max_kl)
        self.screen.answered(answer)
        if not answer.text and answer.ended == "interrupted":
            return  # nothing was said: as if it had not been asked
        self._last = (prompt, answer, self.files)
        self.history = [*messages, {"role": "assistant", "content": answer.text}]

    def _begin(
        self, prompt: Prompt, weights: Mapping[str, float], seed: int, sampling: Sampling | None = None
    ) -> Stream:
        """Begin an answer to `prompt`."""
        contexts = self.files.contexts(prompt, weights)
        room = self._room(prompt, max(map(len, (self.files.encode(prompt), *contexts.values()))))
        sampling = sampling or self.sampling
        sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        own = _added(self.files, self.engine)
        return self.engine.stream(
            Request(
                prompt=prompt,
                weights={name: w for name, w in weights.items() if name not in own},
                wishes=[Wish(text=text, weight=weights[name]) for name, text in own.items()],
                max_kl=self.max_kl,
                sampling=sampling,
                seed=seed,
                reading=self.files.reading,
            )
        )

    def _prompt(self, messages: list[Message]) -> Prompt:
        return self.files.conversation(messages, system=self.system, raw=False)

    def _room(self, prompt: Prompt, tokens: int) -> int:
        room = self.engine.context - tokens
        if room >= 1:
            return room
        assert not isinstance(prompt, str)
        system = [turn for turn in prompt[:1] if turn["role"] == "system"]
        alone_tokens = len(self.files.encode([*system, prompt[-1]]))
        if alone_tokens < self.engine.context:
            raise DataError(
                f"the conversation has {tokens} tokens and there is room for {self.engine.context}; begin a new one "
                "with /reset"
            )
        most = self.files.context
        larger = most is None or most > self.engine.context
        start = f", or start genarm chat with a larger --context{f' (up to {most})' if most else ''}" if larger else ""
        raise DataError(
            f"this message alone has {alone_tokens} tokens as the model reads it, and there is room for "
            f"{self.engine.context}, its answer included; shorten it{start}"
        )

    def _next_seed(self) -> int:
        self._drawn += 1
        return derive_seed(self.seed, self._drawn - 1)

    # --- commands -----------------------------------------------------------------------------------------------

    def _weights(self, text: str) -> None:
        self._need_rewards()
        if text:
            self.weights = self.files.weights(parse_weights(text), self.weights)
        self.screen.note(describe_weights(self.weights))

    def _wish(self, text: str) -> None:
        if text:
            name, equals, words = text.partition("=")
            name, words = name.strip(), words.strip()
            if not (name and equals and words):
                raise ConfigError(f"cannot read {text!r:.80}; write /wish NAME=TEXT, or /wish NAME=off")
            wishes = {key: value for key, value in _added(self.files, self.engine).items() if key != name}
            if words != "off":
                wishes[name] = words
            elif len(wishes) == len(_added(self.files, self.engine)):
                raise ConfigError(f"no wish {name!r} was made here; /wish lists them")
            if len(wishes) > MOST_WISHES:
                raise ConfigError(f"there are {MOST_WISHES} wishes already; take one back with /wish NAME=off")
            self.files = self._given.with_wishes(wishes)
            kept = {key: w for key, w in self.weights.items() if key in self.files.default_weights}
            self.weights = self.files.weights(kept)
        listed = [f"{name}={self.weights[name]:g}: {words}" for name, words in self.files.wishes.items()]
        self.screen.note("\n".join(listed) or "no wishes; /wish NAME=TEXT makes one")

    def _kl(self, text: str) -> None:
        self._need_rewards()
        if text:
            self.max_kl = None if text == "off" else _budget(text)
        bound = "no bound" if self.max_kl is None else f"at most {self.max_kl:g} nats per token from the base"
        last = None if self._last is None else self._last[1].kl
        went = "" if last is None else f"; the last answer went {last:.2f} nats from the base"
        self.screen.note(f"{bound}{went}")

    def _compare(self, text: str) -> None:
        self._need_rewards()
        if text:
            messages: list[Message] = [*self.history, {"role": "user", "content": text}]
        elif self.history:
            messages = self.history[:-1]
        else:
            raise ConfigError("there is no message to compare answers to yet; say something, or use /compare TEXT")
        prompt = self._prompt(messages)
        seed = self._next_seed()  # the same for all, so that only what is compared differs
        none = dict.fromkeys(self.weights, 0.0)
        # Differences from a reference do not sharpen.
        arms = [w for w, reference in zip(self.weights.values(), self._references(), strict=True) if reference is None]
        total, temperature = sum(arms), self.sampling.temperature
        settings = [(none, self.sampling), (self.weights, self.sampling)]
        if total > 0 and temperature > 0:  # what rewards that learnt nothing would do by themselves
            temperature /= 1 + total
            settings.append((none, replace(self.sampling, temperature=temperature)))
        streams = [self._begin(prompt, weights, seed, sampling) for weights, sampling in settings]
        answers = [_read(stream, w, on_text=_unseen) for stream, (w, _) in zip(streams, settings, strict=True)]
        if any(answer.ended == "interrupted" for answer in answers):
            for stream in streams:
                stream.cancel()
            self.screen.note("comparison stopped")
            return
        base, guided, *sharpened = answers
        self.screen.compared(base, guided, (temperature, sharpened[0]) if sharpened else None)

    def _references(self) -> tuple[int | None, ...]:
        config = self.files.config
        assert isinstance(config, GuidedConfig)
        return config.references

    def _tokens(self, text: str) -> None:
        self._need_rewards()
        if text:
            raise ConfigError(f"/tokens takes nothing after it, got {text!r}; it shows the last answer")
        if self._last is None:
            raise ConfigError("there is no answer to show yet; say something first")
        prompt, answer, files = self._last
        if not answer.text:
            raise ConfigError("the last answer is empty; there are no tokens to show")
        model, own = self.engine.model, _added(files, self.engine)
        if not isinstance(model, GuidedForCausalLM):
            model = GuidedForCausalLM.from_members(model, {}, wishes=own)
        elif own:
            model = model.with_wishes(own)
        rewards = model.token_rewards(
            prompt,
            answer.text,
            tokenizer=self.files.tokenizer,
            reward_weights=answer.weights,
            max_kl=answer.max_kl,
            reading=self.files.reading,
        )
        if answer.ended != "stop":
            self.screen.note("the answer was cut, so the end-of-turn token below is not the model's own")
        self.screen.heat(rewards)

    def _system(self, text: str) -> None:
        if text:
            self.system = None if text == "off" else text
        self.screen.note("no system message" if self.system is None else f"system message: {self.system}")

    def _reset(self, text: str) -> None:
        if text:
            raise ConfigError(f"/reset takes nothing after it, got {text!r}")
        self.history, self._last = [], None
        self.screen.note("new conversation")

    def _help(self, _: str) -> None:
        self.screen.note(HELP)

    def _need_rewards(self) -> None:
        if not self.files.guided:
            raise UnsupportedError(
                f"{self.files.reference} is not a guided model, so it has no rewards; make one in words with /wish "
                "NAME=TEXT, or a guided folder with genarm compose"
            )


def _added(files: ModelFiles, engine: Engine) -> dict[str, str]:
    """{name: system text} of wishes that the engine's model does not have itself."""
    return {name: text for name, text in files.wishes.items() if name not in engine.default_weights}


def describe_weights(weights: Mapping[str, float]) -> str:
    """The weights in the form that `/weights` takes."""
    return " ".join(f"{name}={weight:g}" for name, weight in weights.items())


def _read(stream: Stream, weights: Mapping[str, float], *, on_text: Callable[[str], None]) -> ChatReply:
    """The answer that a stream brings; Ctrl-C (KeyboardInterrupt) ends it early."""
    pieces: list[str] = []
    try:
        for token in stream:
            pieces.append(token.text)
            if token.text:
                on_text(token.text)
    except KeyboardInterrupt:
        stream.cancel()
        return ChatReply(text="".join(pieces), ended="interrupted", weights=dict(weights))
    assert stream.completion is not None
    ended = stream.completion.ending
    return ChatReply(
        text=stream.completion.text,
        ended="interrupted" if ended == "cancelled" else ended,
        weights=dict(weights),
        kl=stream.completion.kl,
    )


def _budget(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"cannot read {text!r} as a number of nats; write /kl 0.3, or /kl off") from None
    check_max_kl(value)
    return value


def _unseen(_: str) -> None:
    """Answers to compare are shown when both are there."""
