"""Transcripts of Anthropic's HH data: a whole dialogue in each response."""

from __future__ import annotations

import re

from genarm.data.columns import MalformedError, Row
from genarm.data.formats.base import Format, Preference, Said, Seen, from_messages, text_in
from genarm.text.prompts import Message

_TURN = re.compile(r"\n\n(Human|Assistant):")


def holds_transcripts(seen: Seen) -> bool:
    """Whether all that was said begins with a human's turn and has one of the assistant."""
    said = seen.prompts or [row[name] for row in seen.answered for name in ("chosen", "rejected")]
    return seen.has("chosen", "rejected") and not seen.messages and bool(said) and all(map(_is_transcript, said))


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def _read(row: Row, said: Said) -> Preference:
    chosen, rejected = (f"{said.prompt or ''}{text_in(row, name)}" for name in ("chosen", "rejected"))
    if said.chat:
        return from_messages(said.context, _turns(chosen), _turns(rejected))
    return _from_plain_transcripts(chosen, rejected)


def _from_plain_transcripts(chosen: str, rejected: str) -> Preference:
    """As text: the prompt runs to the last 'Assistant:' at a line's start, and the response keeps its leading space."""
    marker = "\n\nAssistant:"
    prompt, _, response = chosen.rpartition(marker)
    prompt_rejected, _, response_rejected = rejected.rpartition(marker)
    if prompt != prompt_rejected:
        raise MalformedError("chosen and rejected answer different prompts")
    return Preference(prompt=prompt + marker, chosen=response, rejected=response_rejected)


def _turns(transcript: str) -> list[Message]:
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = _TURN.split("\n\n" + transcript.lstrip())
    return [
        {"role": roles[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


TRANSCRIPTS = Format(
    description="Anthropic HH transcripts (chosen, rejected: '\\n\\nHuman: … \\n\\nAssistant: …')",
    recognises=holds_transcripts,
    read=_read,
)
