"""Rows from a hub data set, a folder or a file.

Text files are read here, line by line, so that a mistake is reported with its file, line and column; everything
else is left to the `datasets` library.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genarm.errors import DataError

Rows = Sequence[Mapping[str, Any]]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def load_rows(source: str, *, split: str) -> Rows:
    """The rows of `source`, of which `split` may take a slice: `train`, `test[:500]`, `train[10%:]`.

    A name with two slashes or more is a hub data set and a folder inside it
    (`Anthropic/hh-rlhf/helpful-base`). A file is one split, named train.

    Raises:
        DataError: there is no such source or split, or a file is broken (named with line and column).
    """
    path = Path(source)
    if path.is_file():
        return _slice(_read_file(path), split, source)
    if path.is_dir():
        return _from_library(source, split)
    if path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."):
        raise DataError(f"there is no file or folder {source}; check --data")
    return _from_library(source, split)


def _read_file(path: Path) -> Rows:
    match path.suffix:
        case ".jsonl":
            return _read_jsonl(path, _read_text(path))
        case ".json":
            return _read_json(path)
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            return _read_parquet(path)
    raise DataError(f"{path} has an unknown ending; expected one of {', '.join(SUFFIXES)}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected a text file in UTF-8") from error


def _read_jsonl(path: Path, text: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken(path, number, error.colno, error.msg) from error
        if not isinstance(row, dict):
            raise _broken(path, number, 1, f"a {type(row).__name__} instead of an object")
        rows.append(row)
    return rows


def _read_json(path: Path) -> Rows:
    """A list of objects, or JSON lines under the ending .json."""
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _read_jsonl(path, text)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, error.lineno, error.colno, error.msg) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: element {number} of the list is a {type(row).__name__}; expected an object")
    return rows


def _broken(path: Path, line: int, column: int, problem: str) -> DataError:
    return DataError(
        f"{path}, line {line}, column {column}: {problem}; "
        'expected one JSON object per line, such as {"prompt": …, "chosen": …, "rejected": …}'
    )


def _read_csv(path: Path) -> Rows:
    """Every value is a string; a row with too few or too many values is refused."""
    lines = csv.reader(_read_text(path).splitlines(keepends=True), strict=True)
    rows: list[dict[str, str]] = []
    try:
        header = next(lines, [])
        for values in lines:
            if values and len(values) != len(header):
                raise DataError(
                    f"{path}, line {lines.line_num}: {len(values)} values, expected {len(header)} "
                    f"({', '.join(header)}); put quotes around values with commas or line breaks"
                )
            if values:
                rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}; expected comma-separated values") from error
    return rows


def _read_parquet(path: Path) -> Rows:
    import pyarrow.lib  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: Rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}; expected a Parquet file") from error
    return rows


def _slice(rows: Rows, split: str, source: str) -> Rows:
    if split == "train":
        return rows
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source} is one file, whose only split is train, and {split!r} does not name a part of it ({error}); "
            "use train or a slice such as train[:100]"
        ) from error
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _find_broken_file(folder: Path) -> None:
    """Raise our own error, with file, line and column, if one of the folder's text files is the broken one."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".jsonl", ".json", ".csv"):
            _read_file(path)


def _from_library(source: str, split: str) -> Rows:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    owner_and_name, folder = source, None
    if not Path(source).is_dir() and source.count("/") >= 2:
        owner, name, folder = source.split("/", 2)
        owner_and_name = f"{owner}/{name}"
    try:
        data = load_dataset(owner_and_name, data_dir=folder, split=split)
    except DatasetNotFoundError as error:
        raise DataError(f"there is no data set {source!r}, neither as a path nor on the hub: {error}") from error
    except DatasetGenerationError as error:
        _find_broken_file(Path(source))
        raise DataError(f"{source} is broken: {error.__cause__ or error}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"cannot load the split {split!r} of {source}: {error}") from error
    assert isinstance(data, Dataset)
    return data
