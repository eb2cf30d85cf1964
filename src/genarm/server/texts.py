"""From messages and texts to token ids, and from token ids to the strings that log-probabilities are labelled with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from genarm.errors import DataError
from genarm.server.workers import Worker, template_limit
from genarm.text.detokenizer import TokenText, TokenTexts, decode, token_texts
from genarm.text.prompts import USUAL, Prompt, Reading, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")

_SHORT = 2**14
_TEMPLATE_SECONDS = 2.0
_LEAST_LONGEST = 16


def characters(prompt: Prompt) -> int:
    """How long a text is, or what is said in a conversation."""
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)


class _Lane:
    """A thread with a tokenizer of its own: one that is encoding must not be touched from elsewhere."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.worker = Worker(f"genarm-tokenizer-{name}")
        self._tokenizer = tokenizer
        self._own: PreTrainedTokenizerBase | None = None

    async def run(self, work: Callable[[PreTrainedTokenizerBase], Result]) -> Result:
        return await self.worker.run(lambda: work(self._mine()))

    def warm(self) -> None:
        """Have the tokenizer copied before the first request."""
        self.worker.begin(self._mine)

    def _mine(self) -> PreTrainedTokenizerBase:
        if self._own is None:
            self._own = copy.deepcopy(self._tokenizer)
        return self._own


class Texts:
    """A tokenizer for many tasks of one event loop.

    Short texts, short conversations and long ones of either kind have a thread each, so that nobody with a few words
    waits for a book, or for a template that takes its time.

    Attributes:
        longest: characters of the longest token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading = USUAL) -> None:
        self._reading = reading
        self._tokenizer = copy.deepcopy(tokenizer)
        self.short, self.chat, self.long = (_Lane(self._tokenizer, name) for name in ("short", "chat", "long"))
        for lane in (self.short, self.chat):
            lane.warm()
        self.longest = max(_LEAST_LONGEST, *map(len, tokenizer.get_vocab()))
        self._decoder = copy.deepcopy(tokenizer)
        self._tokens = TokenTexts(self._decoder)

    @property
    def chats(self) -> bool:
        """Whether there is a template for conversations."""
        return bool(self._tokenizer.chat_template)

    async def encode(
        self, prompt: Prompt, template_args: Mapping[str, Any] | None = None, *, continued: bool | None = None
    ) -> list[int]:
        """Ids of a text or a conversation, as `encode_prompt` says; `template_args` go over the server's own.

        Raises:
            ConfigError: an argument that the chat template does not have.
            DataError: no tokens, or a conversation that the template does not take, or takes too long over.
        """
        if not isinstance(prompt, str) and not self.chats:
            raise DataError("this model has no chat template, so it takes no conversations; use /v1/completions")
        given = {**self._reading.template_args, **(template_args or {})}
        reading = replace(self._reading, template_args=given)

        def encode(tokenizer: PreTrainedTokenizerBase) -> list[int]:
            with template_limit(_TEMPLATE_SECONDS):
                return encode_prompt(tokenizer, prompt, reading, continued=continued)

        return await self._lane(prompt).run(encode)

    def _lane(self, prompt: Prompt) -> _Lane:
        if characters(prompt) > _SHORT:
            return self.long
        return self.short if isinstance(prompt, str) else self.chat

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt given as token ids."""
        return decode(self._decoder, ids, special=True)

    def token(self, token_id: int, *, first: bool = False) -> TokenText:
        """One token as it stands in a text; at the beginning of a text it has no space before it."""
        return self._tokens.of(token_id, first=first)

    async def offsets(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where in `text` each of its tokens begins.

        One within a character begins with that; what the tokenizer puts before a text (BOS) begins with the text.
        """
        return await self._lane(text).run(lambda tokenizer: self._offsets(tokenizer, text, ids))

    def _offsets(self, tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[int]:
        put = 0  # before the text, as BOS is
        while put < len(ids) and self._tokens.is_special(ids[put]) and not text.startswith(self.token(ids[put]).text):
            put += 1
        ends = list(accumulate(len(piece) for piece in token_texts(tokenizer, ids[put:])))
        return [min(at, len(text)) for at in [*[0] * put, 0, *ends][: len(ids)]]

    def close(self) -> None:
        """End the threads."""
        for lane in (self.short, self.chat, self.long):
            lane.worker.close()
