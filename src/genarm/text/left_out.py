"""Whether a chat template writes down all that is said: what it leaves out, the model would not read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from secrets import token_hex
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from genarm.errors import ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genarm.text.prompts import Message


def check_said(messages: Sequence[Message], text: str) -> None:
    """Refuse a conversation of which `text`, which a template made of it, leaves a message out (ConversationError).

    What an assistant said earlier a template may shorten on purpose: its thoughts, say.
    """
    for message in messages:
        if message["role"] != "assistant" and not says(text, message["content"]):
            raise _left_out(message)


def check_written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    render: Callable[[Sequence[Message]], str],
    read_so: object,
) -> None:
    """Refuse a conversation of which `text`, which `render` made of it, leaves out a message that others repeat.

    The template is given a secret word in each message's stead, once for all conversations of the same roles that are
    read alike. Where a word is missing, so is the message, if the rest is as in `text`; a template may look at what
    messages say.

    Args:
        tokenizer: whose template it is.
        messages: the conversation.
        text: what the template made of it.
        render: makes such a text.
        read_so: what else decides what `render` makes.

    Raises:
        ConversationError: a message is missing.
    """
    speaks = [bool((message.get("content") or "").strip()) for message in messages]
    others = [sorted((key, str(value)) for key, value in m.items() if key != "content") for m in messages]
    shape = hash((tokenizer.get_chat_template(), repr((speaks, others, read_so))))
    known = _written.setdefault(tokenizer, set())
    if shape in known:
        return
    words = {f"q{token_hex(16)}z": message for message, speaking in zip(messages, speaks, strict=True) if speaking}
    spare = iter(words)
    stand_ins = [{**m, "content": next(spare)} if speaking else m for m, speaking in zip(messages, speaks, strict=True)]
    try:
        shown = render(stand_ins)
    except ConversationError:  # a template that checks what messages say
        shown = "".join(words)
    lost = next((message for word, message in words.items() if word not in shown), None)
    if lost is None:
        if len(known) >= _MOST_SHAPES:
            known.clear()
        known.add(shape)
    elif _same_but(shown, words, text):
        raise _left_out(lost)


_written: WeakKeyDictionary[PreTrainedTokenizerBase, set[int]] = WeakKeyDictionary()
"""Conversations of which each message is written down: hashes of all of them but what they say."""
_MOST_SHAPES = 10_000


def _same_but(shown: str, words: Mapping[str, Message], text: str) -> bool:
    """Whether `text` is `shown` with messages for their words, spaces aside; of an assistant's, anything may stand."""
    parts = [""]
    for piece in re.split(f"({'|'.join(words)})", shown):
        if piece in words and words[piece]["role"] == "assistant":
            parts.append("")
        else:
            parts[-1] += "".join((words[piece]["content"] if piece in words else piece).split())
    rest = "".join(text.split())
    if len(parts) == 1 or not rest.startswith(parts[0]):
        return rest == parts[0]
    rest = rest.removeprefix(parts[0])
    for part in parts[1:-1]:
        _, found, rest = rest.partition(part) if part else ("", "found", rest)
        if not found:
            return False
    return rest.endswith(parts[-1])


def _left_out(message: Message) -> ConversationError:
    hint = "" if message["role"] in ("user", "assistant") else "put its text into the user's first, or "
    return ConversationError(
        f"the chat template leaves out or changes the message of the role {message['role']!r:.50}, so the model would "
        f"not read it; {hint}use another template"
    )


def says(text: str, said: str) -> bool:
    """Whether `text` has all of `said`; templates trim and break lines."""
    return said.strip() in text or "".join(said.split()) in "".join(text.split())
