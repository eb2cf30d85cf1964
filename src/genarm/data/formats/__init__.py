"""The formats of preference data, a file for each family; the first that recognises a data set reads it."""

from __future__ import annotations

from genarm.data.formats.base import Format
from genarm.data.formats.conversations import CONVERSATIONAL, IMPLICIT_CONVERSATIONAL, ULTRAFEEDBACK
from genarm.data.formats.pku import PKU
from genarm.data.formats.prompts_alone import PROMPTS_ALONE
from genarm.data.formats.text import IMPLICIT_STANDARD, STANDARD
from genarm.data.formats.transcripts import TRANSCRIPTS

FORMATS: list[Format] = [
    PKU,
    STANDARD,
    IMPLICIT_STANDARD,
    CONVERSATIONAL,
    IMPLICIT_CONVERSATIONAL,
    TRANSCRIPTS,
    ULTRAFEEDBACK,
    PROMPTS_ALONE,
]
"""A new one is a name here, or `FORMATS.insert(0, …)` elsewhere."""
