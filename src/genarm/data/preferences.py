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

from genarm.data.columns import (
    PROMPTS,
    MalformedError,
    Row,
    context_of,
    is_messages,
    prompt_of,
    read_messages,
    unread_columns,
)
from genarm.errors import ConfigError, DataError, kind_of
from genarm.text.prompts import Message, Prompt, as_conversation

# How many rows are looked at to tell formats that share their columns apart.
DETECTION_ROWS = 100


class Format(Enum):
    """The formats that are understood; the value describes one to a reader."""

    STANDARD = "plain text (prompt, chosen, rejected: strings)"
    IMPLICIT_STANDARD = (
        "plain text with implicit prompt (chosen, rejected: strings with the same turns before the last)"
    )
    CONVERSATIONAL = "conversations (prompt: messages; chosen, rejected: messages)"
    IMPLICIT_CONVERSATIONAL = "conversations with implicit prompt (chosen, rejected: messages that begin alike)"
    TRANSCRIPTS = "Anthropic HH transcripts (chosen, rejected: '\\n\\nHuman: … \\n\\nAssistant: …')"
    PKU = "PKU-SafeRLHF (prompt, response_0, response_1, better_response_id, safer_response_id)"
    ULTRAFEEDBACK = "UltraFeedback-binarized (prompt: string; chosen, rejected: messages)"
    PROMPTS = "prompts alone (prompt: string or messages)"


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
    """The pairs of one source, the rows that gave none (reason → count), and the columns that nothing reads."""

    source: str
    format: Format
    pairs: Sequence[Preference]
    malformed: Mapping[str, int]
    unread: Sequence[str] = ()

    @property
    def description(self) -> str:
        """Where the pairs come from and how they were read."""
        template = "with" if any(not isinstance(pair.prompt, str) for pair in self.pairs) else "without"
        unread = f", columns not read: {', '.join(name or repr(name) for name in self.unread)}" if self.unread else ""
        return f"{self.source}, {self.format.value}, {template} the chat template{unread}"


def load_preferences(
    source: str, *, split: str = "train", objective: str | None = None, chat: bool = True
) -> PreferenceSet:
    """The pairs of `source`: a hub id, a folder, or a .jsonl, .json, .parquet or .csv file.

    `chat` says whether prompts go through a chat template: then text becomes a user's turn, as `genarm generate` takes
    it, and HH transcripts become conversations; else both stay plain text.

    Raises:
        DataError: the source cannot be read, its columns fit no format, or no row fits.
        ConfigError: `objective` is missing for PKU-SafeRLHF, or given for other data.
    """
    from genarm.data.sources import load_rows

    rows = load_rows(source, split=split)
    return to_preferences(rows, source=source, objective=objective, chat=chat)


def to_preferences(
    rows: Sequence[Row],
    *,
    source: str,
    objective: str | None = None,
    chat: bool = True,
    read: Collection[str] = (),
) -> PreferenceSet:
    """Pairs from rows already in memory; see `load_preferences`. The caller reads the columns `read` itself."""
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
    unread: dict[str, None] = {}
    for row in rows:
        unread |= dict.fromkeys(unread_columns(row, {*_COLUMNS, *read}, source=source))
        try:
            pairs.append(normalise(row, found, objective=objective, chat=chat))
        except MalformedError as error:
            malformed[str(error)] += 1
    if not pairs:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in malformed.most_common(3))
        raise DataError(f"{source}: none of {len(rows)} rows gives a pair in the format {found.value}: {reasons}")
    return PreferenceSet(source=source, format=found, pairs=pairs, malformed=dict(malformed), unread=list(unread))


# Columns that formats read beside the prompt and its context.
_COLUMNS = ("chosen", "rejected", "response_0", "response_1", "better_response_id", "safer_response_id")


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
    messages = any(is_messages(row["chosen"]) and is_messages(row["rejected"]) for row in samples)
    prompts = [row[name] for row in samples for name in PROMPTS if row.get(name)]
    if not messages:
        transcripts = prompts or [row[name] for row in samples for name in ("chosen", "rejected")]
        if transcripts and all(_is_transcript(text) for text in transcripts):
            return Format.TRANSCRIPTS
        return Format.STANDARD if not set(columns).isdisjoint(PROMPTS) else Format.IMPLICIT_STANDARD
    if not prompts:
        return Format.IMPLICIT_CONVERSATIONAL
    return Format.ULTRAFEEDBACK if any(isinstance(prompt, str) for prompt in prompts) else Format.CONVERSATIONAL


def normalise(row: Row, found: Format, *, objective: str | None = None, chat: bool = True) -> Preference:
    """The pair that `row` holds in format `found`.

    Raises:
        ValueError: the row does not fit; the message is a short reason, the same for all rows alike.
    """
    prompt, context = prompt_of(row), context_of(row)
    if context and not chat:
        raise MalformedError("a system message or a history needs a chat template; put it into the prompt's own text")
    match found:
        case Format.PROMPTS:
            return Preference(prompt=_answerable(_asked(prompt, context, chat=chat)), chosen="", rejected="")
        case Format.PKU:
            return _from_pku(row, objective, [*context, *as_conversation(_text(row, "prompt"))] if chat else None)
        case Format.TRANSCRIPTS:
            asked = prompt or ""
            chosen, rejected = (f"{asked}{_text(row, name)}" for name in ("chosen", "rejected"))
            return _from_transcripts(context, chosen, rejected) if chat else _from_plain_transcripts(chosen, rejected)
        case Format.STANDARD:
            asked = _asked(prompt, context, chat=chat)
            return Preference(prompt=asked, chosen=_text(row, "chosen"), rejected=_text(row, "rejected"))
        case Format.IMPLICIT_STANDARD:
            if context:
                raise MalformedError("a system message or a history needs a column 'prompt'")
            return _from_common_text(_text(row, "chosen"), _text(row, "rejected"))
        case Format.IMPLICIT_CONVERSATIONAL | Format.CONVERSATIONAL | Format.ULTRAFEEDBACK:
            implicit = found is Format.IMPLICIT_CONVERSATIONAL
            given = context if implicit else _asked(prompt, context, chat=chat)
            if isinstance(given, str) or not chat:
                raise MalformedError("messages need a chat template")
            return _from_messages(given, read_messages(row, "chosen"), read_messages(row, "rejected"))


def _asked(prompt: Any, context: list[Message], *, chat: bool) -> str | list[Message]:
    """The prompt of a row, as a conversation where there is a chat template to go through."""
    if isinstance(prompt, str):
        return [*context, *as_conversation(prompt)] if chat else prompt
    if not is_messages(prompt):
        raise MalformedError(f"'prompt' is {kind_of(prompt)}, expected text or messages")
    messages = read_messages({"prompt": prompt}, "prompt")
    if not chat:
        raise MalformedError("messages need a chat template")
    return _joined(context, messages)


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


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise MalformedError(f"'{column}' is {kind_of(value)}, expected a text")
    return value


def _from_messages(given: list[Message], chosen: list[Message], rejected: list[Message]) -> Preference:
    """`given` is the explicit prompt; turns before the responses repeat it or continue it."""
    *before, reply = chosen
    *before_rejected, reply_rejected = rejected
    if before != before_rejected:
        raise MalformedError("chosen and rejected answer different prompts")
    if {reply["role"], reply_rejected["role"]} != {"assistant"}:
        raise MalformedError("chosen or rejected does not end with an assistant message")
    prompt = _joined(given, before)
    return Preference(prompt=_answerable(prompt), chosen=reply["content"], rejected=reply_rejected["content"])


def _answerable(prompt: Prompt) -> Prompt:
    """`prompt`, which must end with something to answer (raises MalformedError)."""
    if isinstance(prompt, str):
        return prompt
    if all(message["role"] == "system" for message in prompt):
        raise MalformedError("there is no prompt before the response")
    if prompt[-1]["role"] == "assistant":
        raise MalformedError("the prompt ends with a turn of the assistant; it must end with one to answer")
    return prompt


def _joined(first: list[Message], then: list[Message]) -> list[Message]:
    """`then` after `first`, or alone where it has the turns of `first` itself.

    Raises:
        MalformedError: they do not fit together.
    """
    own, others = ([(m["role"], m["content"].strip()) for m in turns] for turns in (first, then))
    whole = bool(then) and then[0]["role"] != "assistant"
    if whole and any(others[i : i + len(own)] == own for i in range(len(others) - len(own) + 1)):
        return then
    system = [m for m in first if m["role"] == "system"]
    if first and then and (then[0]["role"] == "system" or first[-1]["role"] == then[0]["role"] != "system"):
        if system and [m["content"] for m in system] == [m["content"] for m in then if m["role"] == "system"]:
            return _joined([m for m in first if m["role"] != "system"], then)
        raise MalformedError(
            "the prompt, and what comes before the response in chosen and rejected, contradict each other"
        )
    return [*first, *then]


# Where an assistant's turn begins in text: "Assistant:", "### Response:", "<|assistant|>", "[/INST]", …
_BOUNDARY = re.compile(
    r"\[/INST\]|^(?:<[^<>\s]+>|[^\w\s])* ?(?:assistant|bot|ai|response|answer|model|gpt|output|a)"
    r"(?: ?:|\|?>|<[^<>\s]+>|\n)(?:[^\w\s])*",
    re.IGNORECASE | re.MULTILINE,
)


def _from_common_text(chosen: str, rejected: str) -> Preference:
    """The prompt is what both have in common up to where the last turn of an assistant begins."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = "".join(character for character, _ in alike)
    places = [match for match in _BOUNDARY.finditer(common) if common[: match.start()].strip()]
    if not places:
        raise MalformedError(
            "chosen and rejected are text without a prompt: they have no turns in common up to one such as "
            "'\\n\\nAssistant:' (give a column 'prompt')"
        )
    end = places[-1].end()
    return Preference(prompt=chosen[:end], chosen=chosen[end:], rejected=rejected[end:])


def _from_transcripts(context: list[Message], chosen: str, rejected: str) -> Preference:
    return _from_messages(context, _turns(chosen), _turns(rejected))


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


def _from_pku(row: Row, objective: str | None, conversation: Prompt | None) -> Preference:
    column = f"{objective}_response_id"
    label = row.get(column)
    if str(label) not in ("0", "1"):
        raise MalformedError(f"'{column}' is {label!r}, expected 0 or 1")
    responses = [_text(row, "response_0"), _text(row, "response_1")]
    index = int(str(label))
    return Preference(
        prompt=conversation or _text(row, "prompt"), chosen=responses[index], rejected=responses[1 - index]
    )
