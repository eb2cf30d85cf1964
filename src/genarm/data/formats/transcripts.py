"""Transcripts of Anthropic's HH data: a whole dialogue in each response, or in the prompt and each response."""

from __future__ import annotations

import re

from genarm.data.columns import MalformedError, Row
from genarm.data.formats.base import Format, Preference, Said, Seen, from_messages, joined, text_in
from genarm.text.prompts import Message, as_conversation

_TURN = re.compile(r"\n\n(Human|Assistant):")
_OWN_TURN = re.compile(r"(?:\s*\n\n)?(?:Human|Assistant):")
_OPEN_TURN = re.compile(r"\n\nAssistant:\s*\Z")
_HUMAN = re.compile(r"(?:\A\s*|\n\n)Human:")

_NO_TRANSCRIPT = "chosen or rejected, after the prompt, is no transcript: '\\n\\nHuman: … \\n\\nAssistant: …'"


def holds_transcripts(seen: Seen) -> bool:
    """Whether all prompts or all responses begin with a human's turn and have one of the assistant."""
    responses = [row[name] for row in seen.answered for name in ("chosen", "rejected")]
    found = any(said and all(map(is_transcript, said)) for said in (seen.prompts, responses))
    return seen.has("chosen", "rejected") and not seen.messages and found


def is_transcript(value: object) -> bool:
    """Whether `value` is text that begins with a human's turn and has one of the assistant."""
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def _read(row: Row, said: Said) -> Preference:
    chosen, rejected = (_whole(said.prompt, text_in(row, name)) for name in ("chosen", "rejected"))
    if said.chat:
        return from_messages(said.context, _turns(chosen), _turns(rejected))
    return _from_plain_transcripts(chosen, rejected)


def _whole(prompt: object, response: str) -> str:
    """The dialogue up to the end of `response`, which goes on with the last turn of `prompt`, or has turns of its own.

    These repeat the prompt, or come after it (raises MalformedError where they do neither).
    """
    if prompt is None:
        return response
    asked = text_in({"prompt": prompt}, "prompt")
    if not _OWN_TURN.match(response):
        return asked + response
    asked = _OPEN_TURN.sub("", asked)
    given = _turns(asked) if _HUMAN.search(asked) else as_conversation(asked)
    before = _turns(response)[:-1]
    return response if joined(given, before) == before else f"{asked.rstrip()}\n\n{response.lstrip()}"


def _from_plain_transcripts(chosen: str, rejected: str) -> Preference:
    """As text: the prompt runs to the last 'Assistant:' at a line's start, and the response keeps its leading space."""
    (prompt, response), (prompt_rejected, response_rejected) = map(_parted, (chosen, rejected))
    if prompt != prompt_rejected:
        raise MalformedError("chosen and rejected answer different prompts")
    return Preference(prompt=prompt, chosen=response, rejected=response_rejected)


def _parted(transcript: str) -> tuple[str, str]:
    before, marker, response = transcript.rpartition("\n\nAssistant:")
    if not _HUMAN.search(before):
        raise MalformedError(_NO_TRANSCRIPT)
    if _TURN.search(response):
        raise MalformedError("chosen or rejected does not end with an assistant message")
    return before + marker, response


def _turns(transcript: str) -> list[Message]:
    roles = {"Human": "user", "Assistant": "assistant"}
    head, *parts = _TURN.split("\n\n" + transcript.lstrip())
    if not parts:
        raise MalformedError(_NO_TRANSCRIPT)
    if head.strip():
        raise MalformedError("there is text before the first turn of a transcript; put it into a column 'system'")
    return [
        {"role": roles[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


TRANSCRIPTS = Format(
    description="Anthropic HH transcripts (chosen, rejected: '\\n\\nHuman: … \\n\\nAssistant: …')",
    recognises=holds_transcripts,
    read=_read,
)
