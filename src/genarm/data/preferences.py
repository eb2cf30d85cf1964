"""Preference pairs, whatever their format: every row becomes a prompt, a chosen and a rejected response.

The order of work: find the format from the columns and the first rows (`detect`, pure), then bring each row to
one form (`normalise`, pure). A row that does not fit is set aside with its reason, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import Any

from genarm.errors import ConfigError, DataError
from genarm.prompts import Message, Prompt, as_conversation

Row = Mapping[str, Any]

# How many rows are looked at to tell formats that share their columns apart.
DETECTION_ROWS = 100


class Format(Enum):
    """The formats that are understood; the value describes one to a reader."""

    STANDARD = "plain text (prompt, chosen, rejected: strings)"
    IMPLICIT_STANDARD = "plain text with implicit prompt (chosen, rejected: strings that begin alike)"
    CONVERSATIONAL = "conversations (prompt: messages; chosen, rejected: messages)"
    IMPLICIT_CONVERSATIONAL = "conversations with implicit prompt (chosen, rejected: messages that begin alike)"
    TRANSCRIPTS = "Anthropic HH transcripts (chosen, rejected: '\\n\\nHuman: … \\n\\nAssistant: …')"
    PKU = "PKU-SafeRLHF (prompt, response_0, response_1, better_response_id, safer_response_id)"
    ULTRAFEEDBACK = "UltraFeedback-binarized (prompt: string; chosen, rejected: messages)"


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One pair: `chosen` was preferred to `rejected` as the answer to `prompt`."""

    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def prompt_key(self) -> str:
        """The prompt as a string, equal exactly where prompts are equal."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\0".join(part for message in self.prompt for part in (message["role"], message["content"]))


@dataclass(frozen=True, kw_only=True)
class PreferenceSet:
    """The pairs of one source, and the rows that gave none: reason → count."""

    source: str
    format: Format
    pairs: Sequence[Preference]
    malformed: Mapping[str, int]


class _MalformedError(ValueError):
    """A row that does not fit its data set's format."""


def load_preferences(
    source: str, *, split: str = "train", objective: str | None = None, chat: bool = True
) -> PreferenceSet:
    """The pairs of `source`: a hub id, a folder, or a .jsonl, .json, .parquet or .csv file.

    `chat` says whether the tokenizer has a chat template: HH transcripts become conversations if it has, and stay
    plain text otherwise.

    Raises:
        DataError: the source cannot be read, its columns fit no format, or no row fits.
        ConfigError: `objective` is missing for PKU-SafeRLHF, or given for other data.
    """
    from genarm.data.sources import load_rows

    rows = load_rows(source, split=split)
    return to_preferences(rows, source=source, objective=objective, chat=chat)


def to_preferences(
    rows: Sequence[Row], *, source: str, objective: str | None = None, chat: bool = True
) -> PreferenceSet:
    """Pairs from rows already in memory; see `load_preferences`."""
    if len(rows) == 0:
        raise DataError(f"{source} has no rows; expected at least one preference pair")
    first = [rows[i] for i in range(min(len(rows), DETECTION_ROWS))]
    columns = list(dict.fromkeys(name for row in first for name in row))
    try:
        found = detect(columns, first)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    _check_objective(source, found, objective)
    pairs: list[Preference] = []
    malformed: Counter[str] = Counter()
    for row in rows:
        try:
            pairs.append(normalise(row, found, objective=objective, chat=chat))
        except _MalformedError as error:
            malformed[str(error)] += 1
    if not pairs:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in malformed.most_common(3))
        raise DataError(f"{source}: none of {len(rows)} rows gives a pair in the format {found.value}: {reasons}")
    return PreferenceSet(source=source, format=found, pairs=pairs, malformed=dict(malformed))


def detect(columns: Collection[str], rows: Sequence[Row]) -> Format:
    """The format of a data set with `columns` that begins with `rows`.

    Raises:
        DataError: no format has these columns; the message names both.
    """
    if {"prompt", "response_0", "response_1"} <= set(columns):
        return Format.PKU
    if not {"chosen", "rejected"} <= set(columns):
        raise _unknown_format(columns)
    samples = [row for row in rows if row.get("chosen") and row.get("rejected")]
    messages = any(_is_messages(row["chosen"]) and _is_messages(row["rejected"]) for row in samples)
    if "prompt" in columns:
        if not messages:
            return Format.STANDARD
        texts = any(isinstance(row.get("prompt"), str) for row in samples)
        return Format.ULTRAFEEDBACK if texts else Format.CONVERSATIONAL
    if messages:
        return Format.IMPLICIT_CONVERSATIONAL
    if samples and all(_is_transcript(row["chosen"]) and _is_transcript(row["rejected"]) for row in samples):
        return Format.TRANSCRIPTS
    return Format.IMPLICIT_STANDARD


def normalise(row: Row, found: Format, *, objective: str | None = None, chat: bool = True) -> Preference:
    """The pair that `row` holds in format `found`.

    Raises:
        ValueError: the row does not fit; the message is a short reason, the same for all rows alike.
    """
    match found:
        case Format.PKU:
            return _from_pku(row, objective)
        case Format.TRANSCRIPTS:
            chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
            return _from_transcripts(chosen, rejected) if chat else _from_plain_transcripts(chosen, rejected)
        case Format.STANDARD:
            return Preference(prompt=_text(row, "prompt"), chosen=_text(row, "chosen"), rejected=_text(row, "rejected"))
        case Format.IMPLICIT_STANDARD:
            return _from_common_text(_text(row, "chosen"), _text(row, "rejected"))
        case Format.IMPLICIT_CONVERSATIONAL:
            return _from_messages([], _messages(row, "chosen"), _messages(row, "rejected"))
        case Format.CONVERSATIONAL | Format.ULTRAFEEDBACK:
            prompt = row.get("prompt")
            given = as_conversation(prompt) if isinstance(prompt, str) else _messages(row, "prompt")
            return _from_messages(given, _messages(row, "chosen"), _messages(row, "rejected"))


def _unknown_format(columns: Collection[str]) -> DataError:
    formats = "; ".join(format_.value for format_ in Format)
    return DataError(
        f"the columns {', '.join(sorted(columns)) or '(none)'} fit no preference format; "
        f"rename them to those of one of: {formats}"
    )


def _check_objective(source: str, found: Format, objective: str | None) -> None:
    if found is Format.PKU and objective is None:
        raise ConfigError(
            f"{source} is in the PKU-SafeRLHF format, which labels each pair twice; "
            "say which label counts with --objective better or --objective safer"
        )
    if found is not Format.PKU and objective is not None:
        raise ConfigError(
            f"--objective {objective} is for PKU-SafeRLHF only, and {source} holds {found.value}; leave --objective out"
        )


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise _MalformedError(f"'{column}' is {_kind(value)}, expected a string")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    value = row.get(column)
    if not _is_messages(value):
        raise _MalformedError(f"'{column}' is {_kind(value)}, expected a list of messages")
    messages: list[Message] = []
    for message in value or ():
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise _MalformedError(f"a message of '{column}' lacks a role or a content that are strings")
        messages.append({"role": role, "content": content})
    return messages


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _from_messages(given: Sequence[Message], chosen: list[Message], rejected: list[Message]) -> Preference:
    """`given` is the explicit prompt; turns before the responses repeat it or continue it."""
    *before, reply = chosen
    *before_rejected, reply_rejected = rejected
    if before != before_rejected:
        raise _MalformedError("chosen and rejected answer different prompts")
    if {reply["role"], reply_rejected["role"]} != {"assistant"}:
        raise _MalformedError("chosen or rejected does not end with an assistant message")
    repeats = before[: len(given)] == given or before[-len(given) :] == given
    # A prompt given as one string is the last user turn at most, so the turns themselves know better.
    prompt = before if before and (repeats or len(given) == 1) else [*given, *before]
    if not prompt:
        raise _MalformedError("there is no prompt before the response")
    return Preference(prompt=prompt, chosen=reply["content"], rejected=reply_rejected["content"])


def _from_common_text(chosen: str, rejected: str) -> Preference:
    """The prompt is what both begin with, up to a place where a new word begins in both."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = sum(1 for _ in equal)
    for end in range(common, 0, -1):
        if not chosen[end - 1].isspace() and chosen[end : end + 1].isspace() and rejected[end : end + 1].isspace():
            return Preference(prompt=chosen[:end], chosen=chosen[end:], rejected=rejected[end:])
    raise _MalformedError("chosen and rejected have no first words in common, so there is no prompt")


def _from_transcripts(chosen: str, rejected: str) -> Preference:
    return _from_messages([], _turns(chosen), _turns(rejected))


def _from_plain_transcripts(chosen: str, rejected: str) -> Preference:
    """As text: the prompt runs to the last 'Assistant:' at a line's start, and the response keeps its leading space."""
    marker = "\n\nAssistant:"
    prompt, _, response = chosen.rpartition(marker)
    prompt_rejected, _, response_rejected = rejected.rpartition(marker)
    if prompt != prompt_rejected:
        raise _MalformedError("chosen and rejected answer different prompts")
    return Preference(prompt=prompt + marker, chosen=response, rejected=response_rejected)


def _turns(transcript: str) -> list[Message]:
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = _TURN.split("\n\n" + transcript.lstrip())
    return [
        {"role": roles[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_pku(row: Row, objective: str | None) -> Preference:
    column = f"{objective}_response_id"
    label = row.get(column)
    if str(label) not in ("0", "1"):
        raise _MalformedError(f"'{column}' is {label!r}, expected 0 or 1")
    responses = [_text(row, "response_0"), _text(row, "response_1")]
    index = int(str(label))
    return Preference(
        prompt=as_conversation(_text(row, "prompt")), chosen=responses[index], rejected=responses[1 - index]
    )
