"""Prompts from the command line, a text file or a JSONL file, checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from genarm.data.sources import read_text, unique_keys
from genarm.errors import ConversationError, DataError, WeightsError, kind_of
from genarm.model.weights import check_max_kl
from genarm.provenance import content_of
from genarm.sampling import Sampling
from genarm.text.prompts import Prompt, check_end, plain_message

ROW_KEYS = (
    "index",
    "id",
    "sample",
    "prompt",
    "response",
    "finish_reason",
    "tokens",
    "kl",
    "seed",
    "weights",
    "max_kl",
    "settings",
)
"""Keys of every output row, in order; what else an input row has comes after them."""

_INPUT_KEYS = ("prompt", "id", "reward_weights", "max_kl")
# What a reply would depend on, by its name, in rows of other tools; other keys are carried along.
_SETTINGS = frozenset(
    {
        *("system", "system_prompt", "history", "messages", "tools", "functions", "documents", "images", "image"),
        *(field.name for field in fields(Sampling)),
        *("max_tokens", "max_completion_tokens", "stop", "n", "chat_template_kwargs", "template_args"),
        *("wish", "wishes"),
    }
)
_EXPECTED = 'expected an object like {"prompt": "…", "id": "…", "reward_weights": {"helpful": 1}}'


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A prompt to answer.

    Attributes:
        prompt: text, or a conversation that ends with a message to answer.
        where: where it was read, for messages.
        id: the caller's name for it.
        reward_weights: weights for this prompt alone, over those of the run.
        max_kl: the bound on nats per token for this prompt alone, in place of the run's.
        carried: other keys of the input row, which go into the output row.
    """

    prompt: Prompt
    where: str
    id: str | int | None = None
    reward_weights: Mapping[str, Any] = field(default_factory=dict)
    max_kl: Any = None
    carried: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prompt(self.prompt, self.where)
        if isinstance(self.id, bool) or not isinstance(self.id, str | int | None):
            raise DataError(f"{self.where}: id is {self.id!r}; it must be a string or an integer")
        if not isinstance(self.reward_weights, Mapping):
            raise DataError(
                f"{self.where}: reward_weights is {self.reward_weights!r}; expected an object of numbers, such as "
                '{"helpful": 1}'
            )
        try:
            check_max_kl(self.max_kl)
        except WeightsError as error:
            raise DataError(f"{self.where}: {error}") from error
        if "weights" in self.carried:
            raise DataError(
                f"{self.where}: the key 'weights' decides nothing; write 'reward_weights' to weigh the rewards of this "
                "prompt, or rename the key"
            )
        given = (key for key, value in self.carried.items() if value not in (None, "", [], {}))
        ignored = next((key for key in given if key in _SETTINGS), None)
        if ignored is not None:
            raise DataError(
                f"{self.where}: the key {ignored!r} decides nothing here; make it part of the prompt (a list of "
                "messages takes a system message and earlier turns), give it to the command, or rename the key"
            )
        clash = sorted(set(self.carried) & set(ROW_KEYS))
        if clash:
            raise DataError(
                f"{self.where}: the key {clash[0]!r} would clash with one that every output row has "
                f"({', '.join(ROW_KEYS)}); rename it"
            )


def requests_of(prompts: Sequence[str]) -> tuple[BatchRequest, ...]:
    """The prompts of the command line."""
    return tuple(
        BatchRequest(prompt=prompt, where=f"--prompt {number}") for number, prompt in enumerate(prompts, start=1)
    )


def read_requests(path: Path) -> tuple[BatchRequest, ...]:
    """The prompts of a file: `.txt`, one on each line that is not blank, or `.jsonl`, one object on each line.

    Either may be compressed (`.gz`). `-` is stdin, whose lines are objects where the first begins with a brace.

    Raises:
        DataError: the file cannot be read, has another ending or no prompt, or a line is broken (it is named).
    """
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl")) and str(path) != "-":
        got = "is a folder" if path.is_dir() else "is neither .txt nor .jsonl"
        raise DataError(
            f"{path} {got}; write the prompts to a file .txt (one per line) or .jsonl (an object per line, such as "
            '{"prompt": "…"}), either compressed with .gz if wanted, or give - for stdin'
        )
    text = read_text(path)
    # Not splitlines(): a JSON string may hold a bare line separator such as U+2028.
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no prompt; put at least one line into it")
    objects = name.endswith(".jsonl") or (str(path) == "-" and text.lstrip().startswith("{"))
    if not objects:
        return tuple(BatchRequest(prompt=line.rstrip("\r"), where=where) for where, line in lines)
    return tuple(_request(line, where) for where, line in lines)


def content(requests: Sequence[BatchRequest]) -> str:
    """A digest of what the requests say, wherever they were read."""
    return content_of({key: value for key, value in asdict(r).items() if key != "where"} for r in requests)


def _request(line: str, where: str) -> BatchRequest:
    try:
        row = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: {error.msg}; {_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}; {_EXPECTED}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {kind_of(row)}; {_EXPECTED}")
    if "prompt" not in row:
        raise DataError(f"{where}: there is no key 'prompt' among {', '.join(map(repr, row))}; {_EXPECTED}")
    prompt = row["prompt"]
    try:
        prompt = [plain_message(message) for message in prompt] if isinstance(prompt, list) else prompt
    except ConversationError as error:
        raise DataError(f"{where}: {error}") from error
    return BatchRequest(
        prompt=prompt,
        where=where,
        id=row.get("id"),
        reward_weights=row.get("reward_weights", {}),
        max_kl=row.get("max_kl"),
        carried={key: value for key, value in row.items() if key not in _INPUT_KEYS},
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def check_prompt(prompt: Any, where: str) -> None:
    """Refuse what is neither text nor a conversation to answer (raises DataError, naming `where`)."""
    if isinstance(prompt, str):
        _check_text(prompt, where)
        if not prompt.strip():
            raise DataError(f"{where}: the prompt is empty; give at least one word")
        return
    if not isinstance(prompt, list) or not prompt:
        raise DataError(
            f"{where}: prompt is {prompt!r}; expected text, or a list of messages with 'role' and 'content'"
        )
    for message in prompt:
        if not (
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(value, str) for value in message.values())
        ):
            raise DataError(
                f"{where}: {message!r:.200} is no message; expected {{'role': text, 'content': text}} and nothing "
                "else, where content may be a list of {'type': 'text', 'text': …}; only text is understood"
            )
        _check_text(message["content"], where)
    if prompt[-1]["role"] == "system":
        raise DataError(
            f"{where}: the conversation ends with a message of the system; it must end with one to answer, such as the "
            "user's"
        )
    try:
        check_end(prompt)
    except ConversationError as error:
        raise DataError(f"{where}: {error}") from error


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text is not valid Unicode ({error.reason}); save it as UTF-8") from error
