"""PKU-SafeRLHF: two responses, and two labels that say which one is better and which one safer."""

from __future__ import annotations

from genarm.data.columns import MalformedError, Row
from genarm.data.formats.base import Format, Preference, Said, text_in
from genarm.text.prompts import as_conversation


def _read(row: Row, said: Said) -> Preference:
    asked = text_in(row, "prompt")
    column = f"{said.objective}_response_id"
    label = row.get(column)
    if str(label) not in ("0", "1"):
        raise MalformedError(f"'{column}' is {label!r}, expected 0 or 1")
    responses = [text_in(row, "response_0"), text_in(row, "response_1")]
    index = int(str(label))
    return Preference(
        prompt=[*said.context, *as_conversation(asked)] if said.chat else asked,
        chosen=responses[index],
        rejected=responses[1 - index],
    )


PKU = Format(
    description="PKU-SafeRLHF (prompt, response_0, response_1, better_response_id, safer_response_id)",
    recognises=lambda seen: seen.has("prompt", "response_0", "response_1"),
    read=_read,
    columns=("response_0", "response_1", "better_response_id", "safer_response_id"),
    objectives=("better", "safer"),
)
