"""From messages and texts to token ids, and from token ids to the strings that log-probabilities are labelled with."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from genarm.detokenizer import Detokenizer, TokenText, TokenTexts, decode, token_texts
from genarm.errors import DataError
from genarm.prompts import USUAL, Prompt, Reading, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts:
    """A tokenizer for many tasks of one event loop.

    Encoding happens in a thread of its own, on a tokenizer of its own: it may take long, and one that is encoding
    must not be touched from elsewhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading = USUAL) -> None:
        self._reading = reading
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genarm-tokenizer")
        self._decoder = copy.deepcopy(tokenizer)
        self._tokens = TokenTexts(self._decoder)

    @property
    def chats(self) -> bool:
        """Whether there is a template for conversations."""
        return bool(self._tokenizer.chat_template)

    async def encode(self, prompt: Prompt, template_args: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a text or a conversation; `template_args` go over the server's own.

        Raises:
            ConfigError: an argument that the chat template does not have.
            DataError: no tokens, or a conversation that the template does not take.
        """
        if not isinstance(prompt, str) and not self.chats:
            raise DataError("this model has no chat template, so it takes no conversations; use /v1/completions")
        given = {**self._reading.template_args, **(template_args or {})}
        reading = replace(self._reading, template_args=given)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, encode_prompt, self._tokenizer, prompt, reading
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt given as token ids."""
        return decode(self._decoder, ids, special=True)

    def token(self, token_id: int, *, first: bool = False) -> TokenText:
        """One token as it stands in a text; at the beginning of a text it has no space before it."""
        return self._tokens.of(token_id, first=first)

    def begin(self, before: Sequence[int]) -> Detokenizer:
        """What follows `before`, to be told where its tokens stand in its text."""
        return Detokenizer(self._decoder, before, special=False)

    async def offsets(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where in `text` each of its tokens begins.

        One within a character begins with that; what the tokenizer puts before a text (BOS) begins with the text.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._offsets, text, tuple(ids))

    def _offsets(self, text: str, ids: Sequence[int]) -> list[int]:
        put = 0  # before the text, as BOS is
        while put < len(ids) and self._tokens.is_special(ids[put]) and not text.startswith(self.token(ids[put]).text):
            put += 1
        ends = list(accumulate(len(piece) for piece in token_texts(self._tokenizer, ids[put:])))
        return [min(at, len(text)) for at in [*[0] * put, 0, *ends][: len(ids)]]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
