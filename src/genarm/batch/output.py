"""An output file that a killed run can go on with: whole rows, and beside them the settings they were made with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genarm.errors import DataError
from genarm.files import write_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what the rows are; two runs with equal settings give equal rows.

    Attributes:
        model: folder or hub id, and `model_config`, the digest of its configuration.
        prompts: how many rows of input, and `prompts_digest` of their content.
        weights: the run's reward weights, complete.
        Others: as the command's options.
    """

    model: str
    model_config: str
    revision: str | None
    dtype: str
    device: str
    prompts: int
    prompts_digest: str
    weights: Mapping[str, float]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    num_samples: int
    speculate: int
    draft: str | None
    system: str | None
    raw: bool

    @property
    def digest(self) -> str:
        """What each row names its settings by."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def rows(self) -> int:
        """How many rows the finished output has."""
        return self.prompts * self.num_samples


def settings_file(path: Path) -> Path:
    """The file beside the output `path` that holds its settings."""
    return path.with_name(f"{path.name}.settings.json")


def begin(path: Path, settings: Settings) -> int:
    """Make `path` ready to be appended to: a new file, or one cut back to its last whole row.

    Returns:
        How many rows it has already.

    Raises:
        DataError: the file was made with other settings (the first difference is named), or is not one of ours.
    """
    with _write_errors(path):
        return _begin(path, settings)


def _begin(path: Path, settings: Settings) -> int:
    beside = settings_file(path)
    if path.is_dir():
        raise DataError(f"--output {path} is a folder; name a file in it")
    if not path.exists() or path.stat().st_size == 0:
        # Settings without rows are those of a run that died at once, or whose rows were removed to begin anew.
        write_text(beside, _record(settings))
        path.touch()
        return 0
    _check_same(path, beside, settings)
    offsets = _whole_rows(path, settings)
    os.truncate(path, offsets[-1])
    return len(offsets) - 1


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, and have it on the disk before returning."""
    with _write_errors(path), path.open("ab") as file:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write --output {path}: {error}") from error


def _record(settings: Settings) -> str:
    versions = {name: version(name) for name in ("genarm", "torch", "transformers")}
    record = {"digest": settings.digest, "settings": asdict(settings), "versions": versions}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _check_same(path: Path, beside: Path, settings: Settings) -> None:
    if not beside.exists():
        raise DataError(
            f"{path} already has content and no {beside.name} beside it, so it is no unfinished output of this "
            "command; choose another --output"
        )
    try:
        written = json.loads(beside.read_text(encoding="utf-8"))["settings"]
        if not isinstance(written, dict):
            raise TypeError("its settings are not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {beside}: {error}; choose another --output") from error
    now = json.loads(json.dumps(asdict(settings)))
    for name in now:
        if written.get(name) != now[name]:
            raise DataError(
                f"{path} was made with {name} {written.get(name)!r} and this run has {now[name]!r}; use the same "
                "settings to go on with it, or choose another --output"
            )


def _whole_rows(path: Path, settings: Settings) -> list[int]:
    """Where each whole row begins, then where the last one ends; a torn last line is left out.

    Raises:
        DataError: a line that this run cannot have written.
    """
    offsets = [0]
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file):
            end = offsets[-1] + len(line)
            if not _is_row(line, number, settings):
                if end == size:
                    break
                raise DataError(
                    f"{path}, line {number + 1} is not row {number} of this run; the file was changed since: choose "
                    "another --output or remove it"
                )
            offsets.append(end)
    if len(offsets) - 1 > settings.rows:
        raise DataError(
            f"{path} has {len(offsets) - 1} rows and this run makes {settings.rows}; choose another --output"
        )
    return offsets


def _is_row(line: bytes, number: int, settings: Settings) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    place = divmod(number, settings.num_samples)
    return (
        isinstance(row, dict)
        and (row.get("index"), row.get("sample")) == place
        and row.get("settings") == settings.digest
    )
