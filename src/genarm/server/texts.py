"""From messages and texts to token ids, and from token ids to the strings that log-probabilities are labelled with."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.convert_slow_tokenizer import bytes_to_unicode

from genarm.errors import DataError
from genarm.prompts import Prompt, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHORS = 2000


@dataclass(frozen=True)
class TokenText:
    """A token by itself: its bytes, and those as text, or as hexadecimal numbers where they are no whole characters."""

    text: str
    data: bytes


class Texts:
    """A tokenizer for many tasks of one event loop.

    Encoding happens in a thread of its own, on a tokenizer of its own: it may take long, and one that is encoding
    must not be touched from elsewhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genarm-tokenizer")
        self._decoder = copy.deepcopy(tokenizer)
        self._special = set(self._decoder.all_special_ids) | set(self._decoder.added_tokens_decoder)
        self._anchor = self._find_anchor()
        self._known: dict[tuple[int, bool], TokenText] = {}

    @property
    def chats(self) -> bool:
        """Whether there is a template for conversations."""
        return bool(self._tokenizer.chat_template)

    async def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a text or a conversation.

        Raises:
            DataError: no tokens, or a conversation that the template does not take.
        """
        if not isinstance(prompt, str) and not self.chats:
            raise DataError("this model has no chat template, so it takes no conversations; use /v1/completions")
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode_prompt, self._tokenizer, prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt given as token ids."""
        return str(self._decoder.decode(list(ids), clean_up_tokenization_spaces=False))

    def token(self, token_id: int, *, first: bool = False) -> TokenText:
        """One token as it stands in a text; at the beginning of a text it has no space before it."""
        key = (token_id, first)
        if key not in self._known:
            data = self._bytes(token_id, first)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._known[key] = TokenText(text, data)
        return self._known[key]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _bytes(self, token_id: int, first: bool) -> bytes:
        raw = self._decoder.convert_ids_to_tokens(token_id)
        if raw is None:  # a row that pads the output layer
            return b""
        raw = str(raw)
        if token_id in self._special:
            return raw.encode()
        before = [] if first or self._anchor is None else [self._anchor]
        text = self.decode([*before, token_id])[len(self.decode(before)) :] if before else self.decode([token_id])
        if "\ufffd" not in text:
            return text.encode()
        fallback = _FALLBACK.fullmatch(raw)  # part of a character: decoding alone cannot show it
        if fallback:
            return bytes([int(fallback[1], 16)])
        if all(character in _BYTE_LEVEL for character in raw):
            return bytes(_BYTE_LEVEL[character] for character in raw)
        return text.encode()

    def _find_anchor(self) -> int | None:
        """A word after which other tokens keep the spaces before them."""
        for token_id in range(min(_ANCHORS, len(self._decoder))):
            if token_id not in self._special and self.decode([token_id]).strip().isalpha():
                return token_id
        return next((i for i in range(len(self._decoder)) if i not in self._special), None)
