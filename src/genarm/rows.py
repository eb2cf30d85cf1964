"""JSONL files of rows that a killed run goes on with: rows are appended whole, and a torn last line is cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genarm.errors import DataError


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add `rows` to the end of the file at `path` (made if need be), and have them on the disk before returning.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error


def resume_rows(path: Path, settings: str, *, count: int | None = None, samples: int = 1) -> list[dict[str, Any]]:
    """The whole rows of an unfinished file, each with `settings` under the key "settings"; a torn last line is cut off.

    Args:
        path: the file; nothing is there before the first row is written.
        settings: digest of everything that decides what the rows are.
        count: how many rows the finished file has, if their places are to be checked: "index" and "sample" of row n.
        samples: rows of one index.

    Raises:
        DataError: a row of other settings or in another's place, or a line that is no row, nor the beginning of one at
            the file's end.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parse(line)
            if row is None and (end + len(line) < size or not line.startswith(b"{")):
                raise DataError(f"{path}, line {number} is no row of a run; remove it, or choose another --output")
            if row is None:
                break
            if count is not None and (
                number > count or (row.get("index"), row.get("sample")) != divmod(number - 1, samples)
            ):
                raise DataError(
                    f"{path}, line {number} is not row {number - 1} of this run; the file was changed since: choose "
                    "another --output or remove it"
                )
            if row.get("settings") != settings:
                raise DataError(
                    f"{path}, line {number} was made with other settings; use the same settings to go on with it, "
                    "remove it, or choose another --output"
                )
            rows.append(row)
            end += len(line)
    os.truncate(path, end)
    return rows


def keep_rows(path: Path, count: int) -> None:
    """Cut the file back to its first `count` lines."""
    with path.open("rb") as file:
        end = sum(len(line) for _, line in zip(range(count), file, strict=False))
    os.truncate(path, end)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
