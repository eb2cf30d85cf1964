"""Plain text, with a prompt or with the same turns before the responses."""

from __future__ import annotations

import re
from itertools import takewhile

from genarm.data.columns import PROMPTS, MalformedError, Row
from genarm.data.formats.base import Format, Preference, Said, Seen, text_in
from genarm.data.formats.transcripts import holds_transcripts, is_transcript


def _is_text(seen: Seen) -> bool:
    return seen.has("chosen", "rejected") and not seen.messages and not holds_transcripts(seen)


def _has_prompt(seen: Seen) -> bool:
    return not set(seen.columns).isdisjoint(PROMPTS)


def _read(row: Row, said: Said) -> Preference:
    asked = said.asked()
    chosen, rejected = (text_in(row, name) for name in ("chosen", "rejected"))
    if is_transcript(chosen) and is_transcript(rejected):
        raise MalformedError("chosen and rejected are whole transcripts, and other rows are a prompt's answers")
    return Preference(prompt=asked, chosen=chosen, rejected=rejected)


def _read_implicit(row: Row, said: Said) -> Preference:
    if said.prompt is not None:
        raise MalformedError("the row has a prompt, and the first rows have none; give all rows a column 'prompt'")
    if said.context:
        raise MalformedError("a system message or a history needs a column 'prompt'")
    return _from_common_text(text_in(row, "chosen"), text_in(row, "rejected"))


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


STANDARD = Format(
    description="plain text (prompt, chosen, rejected: strings)",
    recognises=lambda seen: _is_text(seen) and _has_prompt(seen),
    read=_read,
)
IMPLICIT_STANDARD = Format(
    description="plain text with implicit prompt (chosen, rejected: strings with the same turns before the last)",
    recognises=lambda seen: _is_text(seen) and not _has_prompt(seen),
    read=_read_implicit,
)
