"""Pairs to score, each known by the number of its row, so that models which drop different rows can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from genarm.data.formats.base import Format
from genarm.data.preferences import normalise, to_preferences
from genarm.data.sources import Rows, load_rows
from genarm.data.tokens import TokenPair, TokenReport, encode_preference, fit_lengths
from genarm.errors import DataError, kind_of
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.model.wishes import encode_wishes
from genarm.text.prompts import USUAL, Reading, check_reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CATEGORY = "(none)"
NO_ROOM = "no room for the words of a wish before the prompt"


@dataclass(frozen=True, kw_only=True)
class PairData:
    """The rows of a data set of preferences, with the category of each where the settings name a column of them.

    `unread` are the columns that nothing reads; the rest is as in the settings.
    """

    rows: Rows
    format: Format
    objective: str | None
    raw: bool
    unread: tuple[str, ...]
    categories: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """Pairs in the tokens of one model.

    Attributes:
        rows: number of the row that each of `pairs` comes from, counted from 0.
        contexts: of each pair, {wish: token ids of its prompt as that wish reads it}.
        report: what was dropped and what was cut.
    """

    rows: tuple[int, ...]
    pairs: tuple[TokenPair, ...]
    contexts: tuple[Mapping[str, Sequence[int]], ...]
    report: TokenReport

    def part(self, first: int, last: int) -> EncodedPairs:
        """The pairs from number `first` up to before `last`."""
        part = slice(first, last)
        return replace(self, rows=self.rows[part], pairs=self.pairs[part], contexts=self.contexts[part])


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most tokens of a prompt and of a response, and of a prompt as a wish reads it, if there is a bound."""

    prompt: int
    response: int
    wished: int | None = None


def read_pairs(settings: AccuracySettings) -> PairData:
    """The data of `settings`.

    Raises:
        DataError: it cannot be read, holds no pairs, or no row has the category.
        ConfigError: the objective does not go with the data.
    """
    rows = load_rows(settings.data, split=settings.split)
    found = to_preferences(
        rows,
        source=settings.data,
        objective=settings.objective,
        chat=not settings.raw,
        read=() if settings.category is None else (settings.category,),
    )
    categories = None if settings.category is None else _categories(rows, settings.category, settings.data)
    return PairData(
        rows=rows,
        format=found.format,
        objective=settings.objective,
        raw=settings.raw,
        unread=tuple(found.unread),
        categories=categories,
    )


def limits(settings: AccuracySettings, context: int | None, *, model: str) -> Limits:
    """The lengths given, or those that training would choose for a model with `context` tokens.

    Raises:
        ConfigError: prompt and response do not fit into the context.
    """
    prompt, response = fit_lengths(settings.max_prompt_tokens, settings.max_response_tokens, context, model=model)
    return Limits(prompt=prompt, response=response, wished=None if context is None else context - response)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    data: PairData,
    limit: Limits,
    ends: Sequence[int],
    reading: Reading = USUAL,
    wishes: Mapping[str, str] = MappingProxyType({}),
) -> EncodedPairs:
    """The pairs of `data` in tokens, cut and dropped as in training; `ends` as for `genarm.text.prompts.encode_pair`.

    A prompt that would be cut is dropped where there are `wishes`, whose words stand at its beginning.

    Raises:
        DataError: nothing is left, or a conversation meets a tokenizer without a chat template.
    """
    check_reading(tokenizer, reading)
    chat = bool(tokenizer.chat_template) and not data.raw
    dropped: Counter[str] = Counter()
    cuts: Counter[str] = Counter()
    rows: list[int] = []
    pairs: list[TokenPair] = []
    contexts: list[Mapping[str, Sequence[int]]] = []
    for number, row in enumerate(data.rows):
        try:
            preference = normalise(row, data.format, objective=data.objective, chat=chat)
        except ValueError as error:
            dropped[str(error)] += 1
            continue
        own: Counter[str] = Counter()
        outcome = encode_preference(tokenizer, preference, limit.prompt, limit.response, own, ends, reading)
        context: Mapping[str, Sequence[int]] = {}
        if wishes and isinstance(outcome, TokenPair):
            context = encode_wishes(tokenizer, preference.prompt, wishes, reading)
            if own["prompt"] or (limit.wished and max(map(len, context.values())) > limit.wished):
                outcome = NO_ROOM
        if isinstance(outcome, TokenPair):
            rows.append(number)
            pairs.append(outcome)
            contexts.append(context)
            cuts += own
        else:
            dropped[outcome] += 1
    if not pairs:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in dropped.most_common(3))
        raise DataError(f"no pair is left to score: {reasons}; check the data and the --max-…-tokens")
    report = TokenReport(
        rows=len(data.rows),
        kept=len(pairs),
        dropped=dict(dropped),
        cut_prompts=cuts["prompt"],
        cut_chosen=cuts["chosen"],
        cut_rejected=cuts["rejected"],
        tokens=sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs),
    )
    return EncodedPairs(rows=tuple(rows), pairs=tuple(pairs), contexts=tuple(contexts), report=report)


def _categories(rows: Rows, key: str, source: str) -> tuple[str, ...]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if key not in columns:
        raise DataError(f"{source} has no column {key!r} for --category; its columns are {', '.join(columns)}")
    return tuple(_category(row.get(key), key, number, source) for number, row in enumerate(rows))


def _category(value: object, key: str, row: int, source: str) -> str:
    if value is None or value == "":
        return NO_CATEGORY
    if not isinstance(value, str | int | float):
        raise DataError(f"{source}, row {row + 1}: {key!r} is {kind_of(value)}; a category must be text or a number")
    return str(value)
