"""Prompts to reply to, from preference pairs or from rows with a prompt alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genarm.data.columns import PROMPTS
from genarm.data.formats.prompts_alone import PROMPTS_ALONE
from genarm.data.preferences import PreferenceSet, read_rows, to_preferences
from genarm.data.sources import Rows

_RESPONSES = frozenset({"chosen", "rejected", "response_0", "response_1"})


def to_prompts(rows: Rows, *, source: str, objective: str | None = None, chat: bool = True) -> PreferenceSet:
    """Prompts as pairs without responses, so that they are counted and split like pairs.

    A prompt that stands alone is taken as in pairs, with what its row says before it.

    Raises:
        DataError: rows that are neither pairs nor have prompts.
    """
    columns = set(rows[0]) if len(rows) else set()
    if columns.isdisjoint(PROMPTS) or columns & _RESPONSES:
        return to_preferences(rows, source=source, objective=objective, chat=chat)
    return read_rows(rows, PROMPTS_ALONE, source=source, chat=chat)


def is_prompt(value: Any) -> bool:
    """Whether `value` is text that is not empty, or a list of messages."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    return isinstance(value, str) and bool(value)
