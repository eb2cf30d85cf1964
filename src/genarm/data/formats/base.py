"""What a format of preference data is: how it is recognised, and how a row of it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from genarm.data.columns import PROMPTS, MalformedError, Row, is_messages, read_messages, refuse_written_messages
from genarm.errors import kind_at, kind_of
from genarm.text.prompts import Message, Prompt, as_conversation


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


@dataclass(frozen=True)
class Seen:
    """What a data set shows of itself: the names of its columns, and its first rows."""

    columns: Collection[str]
    rows: Sequence[Row]

    def has(self, *columns: str) -> bool:
        """Whether all of these are there."""
        return set(columns) <= set(self.columns)

    @cached_property
    def answered(self) -> list[Row]:
        """The rows in which neither chosen nor rejected is empty."""
        return [row for row in self.rows if row.get("chosen") and row.get("rejected")]

    @cached_property
    def messages(self) -> bool:
        """Whether responses are messages."""
        return any(is_messages(row["chosen"]) and is_messages(row["rejected"]) for row in self.answered)

    @cached_property
    def prompts(self) -> list[Any]:
        """The prompts of answered rows, under whichever name."""
        return [row[name] for row in self.answered for name in PROMPTS if row.get(name)]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a row says beside its responses.

    Attributes:
        prompt: what is asked, as the row has it; None where it has none.
        context: the system message and the earlier turns.
        objective: which label counts, of data that is labelled twice.
        chat: whether prompts go through a chat template.
    """

    prompt: Any
    context: list[Message]
    objective: str | None
    chat: bool

    def asked(self) -> str | list[Message]:
        """The prompt after its context, as a conversation where there is a chat template to go through."""
        return asked_of(self.prompt, self.context, chat=self.chat)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        description: of it, with its columns, to a reader.
        recognises: whether a data set is in it; the first format that says so is taken.
        read: the pair of one row (raises MalformedError, whose message is a short reason, the same for all rows alike).
        columns: those that it reads beside the prompt and its context.
        objectives: what --objective may be, where pairs are labelled several times.
    """

    description: str
    recognises: Callable[[Seen], bool]
    read: Callable[[Row, Said], Preference]
    columns: tuple[str, ...] = ("chosen", "rejected")
    objectives: tuple[str, ...] = ()


def asked_of(prompt: Any, context: list[Message], *, chat: bool) -> str | list[Message]:
    """The prompt of a row, as a conversation where there is a chat template to go through."""
    if isinstance(prompt, str):
        refuse_written_messages(prompt, "prompt")
        return [*context, *as_conversation(prompt)] if chat else prompt
    if not is_messages(prompt):
        raise MalformedError(
            f"'prompt' is {'missing' if prompt is None else kind_of(prompt)}, expected text or messages"
        )
    messages = read_messages({"prompt": prompt}, "prompt")
    if not chat:
        raise MalformedError("messages need a chat template")
    return joined(context, messages)


def text_in(row: Row, column: str) -> str:
    """The text in a column (raises MalformedError if there is none)."""
    value = row.get(column)
    if not isinstance(value, str):
        raise MalformedError(f"'{column}' is {kind_at(row, column)}, expected a text")
    refuse_written_messages(value, column)
    return value


def from_messages(given: list[Message], chosen: list[Message], rejected: list[Message]) -> Preference:
    """`given` is the explicit prompt; turns before the responses repeat it or continue it."""
    *before, reply = chosen
    *before_rejected, reply_rejected = rejected
    if before != before_rejected:
        raise MalformedError("chosen and rejected answer different prompts")
    if {reply["role"], reply_rejected["role"]} != {"assistant"}:
        raise MalformedError("chosen or rejected does not end with an assistant message")
    prompt = joined(given, before)
    return Preference(prompt=answerable(prompt), chosen=reply["content"], rejected=reply_rejected["content"])


def answerable(prompt: Prompt) -> Prompt:
    """`prompt`, which must end with something to answer (raises MalformedError)."""
    if isinstance(prompt, str):
        return prompt
    if all(message["role"] == "system" for message in prompt):
        raise MalformedError("there is no prompt before the response")
    if prompt[-1]["role"] == "assistant":
        raise MalformedError("the prompt ends with a turn of the assistant; it must end with one to answer")
    return prompt


def joined(first: list[Message], then: list[Message]) -> list[Message]:
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
            return joined([m for m in first if m["role"] != "system"], then)
        raise MalformedError(
            "the prompt, and what comes before the response in chosen and rejected, contradict each other"
        )
    return [*first, *then]
