"""Rows with a prompt and no responses, for what draws its own."""

from __future__ import annotations

from genarm.data.formats.base import Format, Preference, answerable

PROMPTS_ALONE = Format(
    description="prompts alone (prompt: string or messages)",
    recognises=lambda _: False,  # only where a prompt is all that is wanted
    read=lambda _, said: Preference(prompt=answerable(said.asked()), chosen="", rejected=""),
    columns=(),
)
