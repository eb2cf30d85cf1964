"""Preference pairs, whatever their format: every row becomes a prompt, a chosen and a rejected response.

The order of work: find the format from the columns and the first rows (`detect`, pure), then bring each row to
one form (`normalise`, pure). A row that does not fit is set aside with its reason, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from genarm.data.columns import MalformedError, Row, context_of, prompt_of, unread_columns
from genarm.data.formats import FORMATS
from genarm.data.formats.base import Format, Preference, Said, Seen
from genarm.errors import ConfigError, DataError

# How many rows are looked at to tell formats that share their columns apart.
DETECTION_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class PreferenceSet:
    """The pairs of one source, the rows that gave none (reason → count), and the columns that nothing reads."""

    source: str
    format: Format
    pairs: Sequence[Preference]
    malformed: Mapping[str, int]
    unread: Sequence[str] = ()

    @property
    def description(self) -> str:
        """Where the pairs come from and how they were read."""
        template = "with" if any(not isinstance(pair.prompt, str) for pair in self.pairs) else "without"
        unread = f", columns not read: {', '.join(name or repr(name) for name in self.unread)}" if self.unread else ""
        return f"{self.source}, {self.format.description}, {template} the chat template{unread}"


def load_preferences(
    source: str, *, split: str = "train", objective: str | None = None, chat: bool = True
) -> PreferenceSet:
    """The pairs of `source`: a hub id, a folder, or a .jsonl, .json, .parquet or .csv file.

    `chat` says whether prompts go through a chat template: then text becomes a user's turn, as `genarm generate` takes
    it, and HH transcripts become conversations; else both stay plain text.

    Raises:
        DataError: the source cannot be read, its columns fit no format, or no row fits.
        ConfigError: `objective` is missing for PKU-SafeRLHF, or given for other data.
    """
    from genarm.data.sources import load_rows

    rows = load_rows(source, split=split)
    return to_preferences(rows, source=source, objective=objective, chat=chat)


def to_preferences(
    rows: Sequence[Row],
    *,
    source: str,
    objective: str | None = None,
    chat: bool = True,
    read: Collection[str] = (),
) -> PreferenceSet:
    """Pairs from rows already in memory; see `load_preferences`. The caller reads the columns `read` itself."""
    if len(rows) == 0:
        raise DataError(f"{source} has no rows; expected at least one preference pair")
    first = [rows[i] for i in range(min(len(rows), DETECTION_ROWS))]
    columns = list(dict.fromkeys(name for row in first for name in row))
    try:
        found = detect(columns, first)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    _check_objective(source, found, objective)
    columns_read = {column for format_ in FORMATS for column in format_.columns}
    result = read_rows(rows, found, source=source, objective=objective, chat=chat, read={*columns_read, *read})
    if not result.pairs:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in Counter(result.malformed).most_common(3))
        raise DataError(f"{source}: none of {len(rows)} rows gives a pair in the format {found.description}: {reasons}")
    return result


def read_rows(
    rows: Sequence[Row],
    found: Format,
    *,
    source: str,
    objective: str | None = None,
    chat: bool = True,
    read: Collection[str] = (),
) -> PreferenceSet:
    """The pairs of rows in a format that is known, perhaps none; `read` are the columns that something reads."""
    pairs: list[Preference] = []
    malformed: Counter[str] = Counter()
    unread: dict[str, None] = {}
    for row in rows:
        unread |= dict.fromkeys(unread_columns(row, read, source=source))
        try:
            pairs.append(normalise(row, found, objective=objective, chat=chat))
        except MalformedError as error:
            malformed[str(error)] += 1
    return PreferenceSet(source=source, format=found, pairs=pairs, malformed=dict(malformed), unread=list(unread))


def detect(columns: Collection[str], rows: Sequence[Row]) -> Format:
    """The format of a data set with `columns` that begins with `rows`.

    Raises:
        DataError: no format has these columns; the message names both.
    """
    seen = Seen(columns, rows)
    for format_ in FORMATS:
        if format_.recognises(seen):
            return format_
    formats = "; ".join(format_.description for format_ in FORMATS)
    raise DataError(
        f"the columns {', '.join(sorted(columns)) or '(none)'} fit no preference format; "
        f"rename them to those of one of: {formats}"
    )


def normalise(row: Row, found: Format, *, objective: str | None = None, chat: bool = True) -> Preference:
    """The pair that `row` holds in format `found`.

    Raises:
        ValueError: the row does not fit; the message is a short reason, the same for all rows alike.
    """
    said = Said(prompt=prompt_of(row), context=context_of(row), objective=objective, chat=chat)
    if said.context and not chat:
        raise MalformedError("a system message or a history needs a chat template; put it into the prompt's own text")
    return found.read(row, said)


def _check_objective(source: str, found: Format, objective: str | None) -> None:
    if found.objectives and objective is None:
        choices = " or ".join(f"--objective {name}" for name in found.objectives)
        raise ConfigError(
            f"{source} is in the format {found.description}, which labels each pair twice; say which label counts with "
            f"{choices}"
        )
    if objective is not None and not found.objectives:
        raise ConfigError(
            f"--objective {objective} is for PKU-SafeRLHF only, and {source} holds {found.description}; leave "
            "--objective out"
        )
