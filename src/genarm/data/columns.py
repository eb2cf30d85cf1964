"""What the columns of a preference row mean: the prompt and what comes before it, and what is not read at all.

Nothing that an answer may depend on is left out in silence. A column is read, or its text is refused by name, or it
is by its name or content no part of a conversation (ids, scores, models, …); those are told to the user.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, TypeGuard

from genarm.errors import ConversationError, DataError, kind_at
from genarm.text.prompts import Message, text_of

Row = Mapping[str, Any]

# Under which names a prompt comes, and what is said before it.
PROMPTS = ("prompt", "question", "instruction", "query", "input")
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"

# What would have to go through a chat template or an encoder, and does not: a row that has it is set aside.
_UNREAD = frozenset({"tools", "functions", "documents", "images", "image", "videos", "video", "audios", "audio"})

_KNOWN = frozenset({*PROMPTS, *SYSTEMS, HISTORY, *_UNREAD})

# A column with one of these words in its name says something about a conversation and is no part of one.
_ABOUT = frozenset(
    re.findall(
        r"\S+",
        """
    id ids idx index uid uuid qid hash sha256 source sources origin dataset subset split domain category
    categories topic type task tag tags lang language languages model models score scores rating ratings rank
    ranking reward rewards margin label labels labeling labelling judge annotator annotators annotation annotations
    rationale rationales critique critiques feedback comment comments explanation preference preferences generation
    generations response responses completion completions messages conversation conversations raw all original
    full meta metadata info date time timestamp url link status order seed license harm severity safe toxicity
    tokens length count version author answer answers reference references solution target gold
    """,
    )
)

# Of a message, a key of nothing but these words says something about it. Any other may be what a template would show
# (a name, what was thought), however short it is.
_ABOUT_MESSAGES = frozenset(
    re.findall(
        r"\S+",
        """
    id ids identifier idx index uuid hash hashed number turn message parent source model version type category tags
    domain lang language score scores rating ratings rank reward label labels weight loss mask train trained state
    status header country ip redacted toxic toxicity moderation openai detoxify harm severity safe
    annotator annotators author date time timestamp created updated at
    token tokens length count logprob logprobs finish reason stop cache control meta metadata info
    """,
    )
)

# Of scripts that write sentences without spaces (Thai to Khmer, kana, Han), more letters than names tend to have.
_LETTERS = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_WORDS = re.compile(rf"\S\s+\S|(?:{_LETTERS}[^{_LETTERS[1:]}*){{6}}")

# Of JSON, and of Python's and numpy's way to write lists.
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"]""")
_ROLE = re.compile(r"""['"](role|from)['"]\s*:\s*['"](system|developer|user|assistant|tool|human|gpt)['"]""")


class MalformedError(ValueError):
    """A row that does not fit its data set's format; the message is a short reason, the same for all rows alike."""


def prompt_of(row: Row) -> Any:
    """What is asked, under whichever name; None where there is nothing.

    Raises:
        MalformedError: two columns that could both be the prompt say different things.
    """
    given = {name: row[name] for name in PROMPTS if not _is_empty(row.get(name))}
    if not given:
        return None
    first, *others = given
    for other in others:
        if not _repeats(given[other], given[first]):
            raise MalformedError(f"'{first}' and '{other}' could both be the prompt; join them in one column 'prompt'")
    return given[first]


def context_of(row: Row) -> list[Message]:
    """The system message and the earlier turns that the row gives beside its prompt.

    Raises:
        MalformedError: they are not of a form that is understood, or the row has what cannot be read (tools, images).
    """
    for name in _UNREAD:
        if not _is_empty(row.get(name)):
            raise MalformedError(f"the row has '{name}', which training does not read")
    systems = [row[name] for name in SYSTEMS if not _is_empty(row.get(name))]
    if any(not isinstance(system, str) for system in systems) or len(set(systems)) > 1:
        raise MalformedError("the system message is no text, or there are two of them")
    turns: list[Message] = [{"role": "system", "content": system} for system in systems[:1]]
    return [*turns, *_history(row.get(HISTORY))]


def read_messages(row: Row, column: str) -> list[Message]:
    """The messages in `column`; parts of text are joined.

    Raises:
        MalformedError: there are none, or one has more than a role and text.
    """
    value = row.get(column)
    if not is_messages(value):
        raise MalformedError(f"'{column}' is {kind_at(row, column)}, expected a list of messages")
    return [_message(message, column) for message in value]


def refuse_written_messages(text: str, column: str) -> None:
    """Refuse messages that somebody wrote down as text, as tables in CSV hold them (raises MalformedError)."""
    if _WRITTEN.match(text) and _ROLE.search(text):
        raise MalformedError(
            f"'{column}' holds messages written as text, as a CSV file has them; save the data as JSON lines or Parquet"
        )


def is_messages(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether `value` is a list of objects that is not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def unread_columns(row: Row, read: Collection[str], *, source: str) -> list[str]:
    """The columns of `row` that nothing reads, `read` aside.

    Raises:
        DataError: one of them holds text that an answer may depend on.
    """
    found = [name for name in row if name not in read and name not in _KNOWN]
    for name in found:
        if not _is_about(name) and _holds_text(row[name]):
            raise DataError(
                f"{source}: the column {name!r} holds text that nothing would read; if answers depend on it, put it "
                "into the column 'prompt' or 'system', and if not, take it away"
            )
    return found


def _history(value: Any) -> list[Message]:
    if _is_empty(value):
        return []
    if is_messages(value):
        return [_message(message, HISTORY) for message in value]
    pairs: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(text, str) for text in p) for p in pairs):
        raise MalformedError(f"'{HISTORY}' is neither messages nor a list of [question, answer]")
    said = zip(("user", "assistant") * len(pairs), chain.from_iterable(pairs), strict=True)
    return [{"role": role, "content": text} for role, text in said]


def _message(message: Mapping[str, Any], column: str) -> Message:
    role, content = message.get("role"), message.get("content")
    for key, value in message.items():
        told = key in ("role", "content") or _is_empty(value) or value is False
        if not told and not _ABOUT_MESSAGES.issuperset(_words(key) or [key]):
            raise MalformedError(
                f"a message of '{column}' has '{key}', which training does not read; take the key away, or make it "
                "part of the content"
            )
    if not isinstance(role, str):
        raise MalformedError(f"a message of '{column}' has a role that is {kind_at(message, 'role')}, expected a text")
    try:
        return {"role": role, "content": text_of(content)}
    except ConversationError as error:
        raise MalformedError(f"a message of '{column}': {error}") from error


def _is_empty(value: object) -> bool:
    return value is None or value in ([], {}, "[]", "{}") or (isinstance(value, str) and not value.strip())


def _repeats(other: Any, asked: Any) -> bool:
    """Whether `asked` says all of `other`: as it is, in messages or lines of it, or behind or before a mark.

    Anywhere else a short text would be found by chance: an "a" to be looked at is in nearly every instruction.
    """
    if other == asked:
        return True
    if is_messages(other):
        places = range(len(asked) - len(other) + 1) if is_messages(asked) else ()
        return any(asked[i : i + len(other)] == other for i in places)
    if not isinstance(other, str):
        return False
    texts = [_all_text(message.get("content")) for message in asked] if is_messages(asked) else [_all_text(asked)]
    place = re.compile(rf"(?:^|[:>\]])[ \t]*{re.escape(other.strip())}[ \t\r]*(?:$|[<\[])", re.MULTILINE)
    return any(map(place.search, texts))


def _is_about(name: str) -> bool:
    return not _ABOUT.isdisjoint(_words(name))


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+\d*|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _holds_text(value: object) -> bool:
    """Whether `value` has words in it, and not just a name or a number."""
    return bool(_WORDS.search(_all_text(value).strip()))


def _all_text(value: object) -> str:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return "\n".join(filter(None, map(_all_text, value)))
    return value if isinstance(value, str) else ""
