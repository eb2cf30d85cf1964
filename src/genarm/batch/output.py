"""An output file that a killed run can go on with: whole rows, and beside them the record of what decides them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genarm.files import resume_rows
from genarm.provenance import Record, claim, digest, plain


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what the rows are; two runs with equal settings give equal rows.

    Attributes:
        model, draft: records of their content (`genarm.provenance.model_record`).
        prompts: how many rows of input, and `prompts_content`, a digest of what they say.
        reading: how prompts become token ids (`genarm.text.prompts.Reading`).
        wishes: {name: system text} of those that are not the folder's own.
        weights: the run's reward weights, complete.
        max_kl: the bound on nats per token from the base, if any.
        Others: as the command's options.
    """

    model: Mapping[str, Any]
    dtype: str
    device: str
    prompts: int
    prompts_content: str
    weights: Mapping[str, float]
    max_kl: float | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    num_samples: int
    speculate: int
    draft: Mapping[str, Any] | None
    system: str | None
    raw: bool
    reading: Mapping[str, Any]
    wishes: Mapping[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Record:
        """All of it, as JSON has it; of wishes only where there are any, as files made before there were go on."""
        record = plain(asdict(self))
        return record if self.wishes else {key: value for key, value in record.items() if key != "wishes"}

    @property
    def digest(self) -> str:
        """What each row names its settings by."""
        return digest(self.record)

    @property
    def rows(self) -> int:
        """How many rows the finished output has."""
        return self.prompts * self.num_samples


def begin(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """Make `path` ready to be appended to: a new file, or one cut back to its last whole row.

    Returns:
        The rows that it has already.

    Raises:
        DataError: the file was made with other settings (the first difference is named), or is not one of ours.
    """
    settled = claim(path, settings.record)
    rows = resume_rows(path, settled, count=settings.rows, samples=settings.num_samples)
    path.touch()
    return rows
