"""The questions of a comparison: held-out prompts, encoded as the base reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from genarm.data.prompts import is_prompt, to_prompts
from genarm.data.sources import load_rows
from genarm.errors import DataError
from genarm.lab.evaluation.recipe import PromptSpec
from genarm.lab.judges.protocol import as_text
from genarm.model.wishes import encode_wishes, with_wish
from genarm.text.prompts import Prompt, Reading, as_conversation, check_reading, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genarm.lab.methods.sample import Reader


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as it is shown and judged, and its ids as the base reads it.

    Attributes:
        row: what it comes from, and `number` its place in the data, from 0; where that has a row for each prompt.
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None


def read_questions(
    spec: PromptSpec, source: str, tokenizer: PreTrainedTokenizerBase, room: int, texts: Collection[str] = ()
) -> list[Question]:
    """The first `spec.count` different prompts of `source` that fit into `room` tokens, with each of `texts`, too.

    Raises:
        DataError: the data cannot be read or has too few of them.
    """
    reading = Reading(template_args=spec.template_args)
    check_reading(tokenizer, reading)
    chat = bool(tokenizer.chat_template)
    found: dict[str, Question] = {}
    wishes = {text: text for text in texts}
    too_long = 0
    counted = re.fullmatch(r"[^\[]*(\[:[^:]*\])?", spec.split)  # a part that begins later has other numbers
    for number, (prompt, row) in enumerate(_prompts(spec, source, chat)):
        text = as_text(prompt)
        if text in found:
            continue
        ids = encode_prompt(tokenizer, prompt, reading)
        longest = max([len(ids), *map(len, encode_wishes(tokenizer, prompt, wishes, reading).values())])
        if longest > room:
            too_long += 1
            continue
        found[text] = Question(
            prompt=prompt, text=text, ids=tuple(ids), row=row, number=number if row and counted else None
        )
        if len(found) == spec.count:
            return list(found.values())
    raise DataError(
        f"{source} has {len(found)} different prompts of at most {room} tokens ({too_long} are longer), and the recipe "
        f"wants {spec.count}; lower prompts.count"
    )


def reader(spec: PromptSpec, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Reads the prompts of `questions`, by their ids, with a system text."""
    prompts = {question.ids: question.prompt for question in questions}
    reading = Reading(template_args=spec.template_args)
    return lambda ids, text: encode_prompt(tokenizer, with_wish(prompts[tuple(ids)], text), reading)


def _prompts(spec: PromptSpec, source: str, chat: bool) -> Iterator[tuple[Prompt, Mapping[str, Any]]]:
    rows = load_rows(source, split=spec.split)
    if spec.column is None:
        for pair in to_prompts(rows, source=source, objective=spec.objective, chat=chat).pairs:
            yield pair.prompt, {}
        return
    for number, row in enumerate(rows, start=1):
        value = row.get(spec.column)
        if value is None or not is_prompt(value):
            raise DataError(f"{source}, row {number}: {spec.column!r} is {value!r}; expected text or messages")
        if spec.template != "{}" and not isinstance(value, str):
            raise DataError(f"{source}, row {number}: {spec.column!r} has messages, and the template is for text")
        prompt: Prompt = spec.template.replace("{}", value) if isinstance(value, str) else value
        yield (as_conversation(prompt) if isinstance(prompt, str) and chat else prompt), row
