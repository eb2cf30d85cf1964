"""Messages, with a prompt of messages or text, or with the same turns before the responses."""

from __future__ import annotations

from genarm.data.columns import MalformedError, Row, read_messages
from genarm.data.formats.base import Format, Preference, Said, Seen, from_messages
from genarm.text.prompts import Message


def _is_messages(seen: Seen) -> bool:
    return seen.has("chosen", "rejected") and seen.messages


def _texts(seen: Seen) -> bool:
    return any(isinstance(prompt, str) for prompt in seen.prompts)


def _read(row: Row, said: Said) -> Preference:
    return _answered(row, said, said.asked())


def _read_implicit(row: Row, said: Said) -> Preference:
    # The first rows have no prompt of their own; a later one may.
    return _answered(row, said, said.context if said.prompt is None else said.asked())


def _answered(row: Row, said: Said, given: str | list[Message]) -> Preference:
    if isinstance(given, str) or not said.chat:
        raise MalformedError("messages need a chat template")
    return from_messages(given, read_messages(row, "chosen"), read_messages(row, "rejected"))


CONVERSATIONAL = Format(
    description="conversations (prompt: messages; chosen, rejected: messages)",
    recognises=lambda seen: _is_messages(seen) and bool(seen.prompts) and not _texts(seen),
    read=_read,
)
IMPLICIT_CONVERSATIONAL = Format(
    description="conversations with implicit prompt (chosen, rejected: messages that begin alike)",
    recognises=lambda seen: _is_messages(seen) and not seen.prompts,
    read=_read_implicit,
)
ULTRAFEEDBACK = Format(
    description="UltraFeedback-binarized (prompt: string; chosen, rejected: messages)",
    recognises=lambda seen: _is_messages(seen) and _texts(seen),
    read=_read,
)
