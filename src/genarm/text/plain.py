"""Text that somebody typed, as ordinary text: a control token's string in it (`<|im_end|>`) is not that token.

The usual way to encode a text finds control tokens by their strings, wherever those come from. Here the tokenizer has
a twin whose control tokens have secret names. What is trusted, a chat template's own text, is given those names; in
all other text the usual names then mean nothing, and every merge across the borders is as it always was.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from genarm.errors import DataError, UnsupportedError, kind_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MARKS = ("<", "[")


@dataclass(frozen=True, eq=False)
class Plain:
    """A tokenizer that keeps typed text apart.

    Attributes:
        special: ids of special tokens but for the one of unknown words, which any text may have.
        control: those, and the ids of added tokens that look like marks (`<think>`).
    """

    special: frozenset[int]
    control: frozenset[int]
    _usual: PreTrainedTokenizerBase
    _twin: Tokenizer
    _names: dict[str, str]  # usual and secret ones
    _ids: dict[str, int]
    _found: re.Pattern[str]

    def has_control(self, text: str, ids: frozenset[int] | None = None) -> bool:
        """Whether the usual way to encode `text` finds control tokens in it, or those of `ids`."""
        found = self._usual(text, add_special_tokens=False).input_ids
        return not (self.control if ids is None else ids).isdisjoint(found)

    def encode(self, parts: Sequence[tuple[str, bool]], *, special: bool) -> list[int]:
        """Ids of the joined text of `parts`, each with whether it is trusted.

        Args:
            parts: in order; any of them may be empty.
            special: the tokenizer adds what it puts before and after a text.

        Raises:
            DataError: a control token came of text that is not trusted.
        """
        own: list[str] = []
        text = ""
        for part, trusted in parts:
            own += self._found.findall(part) if trusted else ()
            text += self._found.sub(lambda match: self._names[match[0]], part) if trusted else part
        encoding = self._twin.encode(text, add_special_tokens=special)
        typed = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        wanted = [i for i in map(self._ids.__getitem__, own) if i in self.control]
        if [i for i, added in typed if not added and i in self.control] != wanted:
            raise DataError("the text has a control token in it that this tokenizer cannot read as ordinary text")
        return list(encoding.ids)


_known: WeakKeyDictionary[PreTrainedTokenizerBase, Plain] = WeakKeyDictionary()


def plain(tokenizer: PreTrainedTokenizerBase) -> Plain:
    """The way of `tokenizer` to read typed text (raises UnsupportedError where it has none)."""
    if tokenizer not in _known:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"typed text cannot be kept apart from control tokens with {kind_of(tokenizer)}, only with "
                "tokenizers that have a tokenizer.json; leave plain user text out"
            )
        _known[tokenizer] = _make(tokenizer)
    return _known[tokenizer]


def _make(tokenizer: PreTrainedTokenizerBase) -> Plain:
    backend: Tokenizer = tokenizer.backend_tokenizer
    record = json.loads(backend.to_str())
    special = {token["id"]: token["content"] for token in record["added_tokens"] if token["special"]}
    marks = {
        token["id"]: token["content"]
        for token in record["added_tokens"]
        if token["content"].startswith(_MARKS) and not token["single_word"]
    }
    control = special | marks
    secret = secrets.token_hex(16)
    names = {content: f"q{secret}x{i}z" for i, content in control.items()}
    _rename(record, names)
    longest = sorted(names, key=len, reverse=True)
    unknown = {tokenizer.unk_token_id}
    return Plain(
        special=frozenset(special) - unknown,
        control=frozenset(control) - unknown,
        _usual=tokenizer,
        _twin=type(backend).from_str(json.dumps(record)),
        _names=names,
        _ids={content: i for i, content in control.items()},
        _found=re.compile("|".join(map(re.escape, longest)) or "(?!)"),
    )


def _rename(record: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens other names in a tokenizer.json; ids stay."""
    record["truncation"] = record["padding"] = None
    for token in record["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = record["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
