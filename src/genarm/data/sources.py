"""Rows from a hub data set, a folder or a file.

Text files, also those of a folder, are read here, so that what they say is what is read (the `datasets` library takes
"None" in a CSV for nothing and "007" for 7) and a mistake is reported with its file, line and column. Everything else
is left to that library.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genarm.data.columns import PROMPTS
from genarm.errors import DataError, kind_of

Rows = Sequence[Mapping[str, Any]]

# Files of text, which may be compressed with gzip, and all that a single file may be.
_PLAIN = (".jsonl", ".json", ".csv", ".tsv")
TEXTS = (*_PLAIN, *(f"{ending}.gz" for ending in _PLAIN))
SUFFIXES = (*_PLAIN, ".parquet", *TEXTS[len(_PLAIN) :])


def load_rows(source: str, *, split: str) -> Rows:
    """The rows of `source`, of which `split` may take a slice: `train`, `test[:500]`, `train[10%:]`.

    A name with two slashes or more is a hub data set and a folder inside it
    (`Anthropic/hh-rlhf/helpful-base`). A file is one split, named train.

    Raises:
        DataError: there is no such source or split, or a file is broken (named with line and column).
    """
    path = Path(source)
    if path.is_file():
        return _slice({"train": _read_file(path)}, split, f"{source} is one file, whose only split is train")
    if path.is_dir():
        return _from_folder(path, split)
    if source == "-" or path.exists():
        raise DataError(f"{source} is no file that can be read twice; write its rows to a file and give that")
    if _ending(path) is not None or path.is_absolute() or source.startswith("."):
        raise DataError(f"there is no file or folder {source}; check --data")
    return _from_library(source, split)


def _ending(path: Path) -> str | None:
    """Which of `SUFFIXES` it has."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _read_file(path: Path) -> Rows:
    match _ending(path):
        case None:
            raise DataError(
                f"{path} has an unknown ending; expected one of {', '.join(SUFFIXES)}: rename the file to what it "
                "holds, or write its rows to one of these"
            )
        case ".parquet":
            return _read_parquet(path)
        case ".csv" | ".csv.gz":
            return _read_csv(path, read_text(path), ",")
        case ".tsv" | ".tsv.gz":
            return _read_csv(path, read_text(path), "\t")
        case ".jsonl" | ".jsonl.gz":
            return _read_jsonl(path, read_text(path))
    return _read_json(path, read_text(path))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, compressed where it ends in .gz, with its line ends as they are; `-` is stdin.

    Raises:
        DataError: it cannot be read, or is in another encoding.
    """
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {why}; expected a text file in UTF-8") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw:
        raise DataError(f"{path} is in UTF-16, or no text (it has zero bytes); save it as a text file in UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as a text file in UTF-8"
        ) from error


def _read_jsonl(path: Path, text: str) -> Rows:
    rows = []
    # Not splitlines(): a JSON string may hold a bare line separator such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(path, line, number)
        if not isinstance(row, dict):
            raise _broken(path, number, 1, f"{kind_of(row)} instead of an object")
        rows.append(row)
    return rows


def _read_json(path: Path, text: str) -> Rows:
    """A list of objects, or JSON lines under the ending .json."""
    if not text.lstrip().startswith("["):
        return _read_jsonl(path, text)
    rows: list[dict[str, Any]] = _parse(path, text, 1)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: element {number} of the list is {kind_of(row)}; expected an object")
    return rows


def _parse(path: Path, text: str, line: int) -> Any:
    """The value of `text`, which begins in `line`."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        if "\\ud" in text.lower():  # half of a character, which no text can hold
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _broken(path, line + error.lineno - 1, error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, line, 1, str(error)) from error
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for `json.loads` (raises ValueError where a key comes twice)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return found


def _broken(path: Path, line: int, column: int, problem: str) -> DataError:
    return DataError(
        f"{path}, line {line}, column {column}: {problem}; "
        'expected one JSON object per line, such as {"prompt": …, "chosen": …, "rejected": …}'
    )


_SEPARATORS = {",": "comma", "\t": "tab"}


def _read_csv(path: Path, text: str, separator: str) -> Rows:
    """Every value is a string; a row with too few or too many values is refused."""
    rows: list[dict[str, str]] = []
    name = _SEPARATORS[separator]
    # Not splitlines(): only line feeds and carriage returns end a line of a CSV file.
    with _long_fields():
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        try:
            header = next(lines, [])
            if len(header) == 1 and (other := next((mark for mark in ",;\t|" if mark in header[0]), None)):
                raise DataError(
                    f"{path}: its first line has no {name}s, so values seem to be separated by {other!r}; "
                    f"save it again as {name}-separated values"
                )
            if len(set(header)) < len(header):
                raise DataError(f"{path}: two columns have one name ({', '.join(header)}); rename one of them")
            for values in lines:
                if values and len(values) != len(header):
                    raise DataError(
                        f"{path}, line {lines.line_num}: {len(values)} values, expected {len(header)} "
                        f"({', '.join(header)}); put quotes around values with {name}s or line breaks"
                    )
                if values:
                    rows.append(dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.line_num}: {error}; expected {name}-separated values") from error
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a value have more than csv's usual 128 KiB."""
    usual = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(usual)


def _read_parquet(path: Path) -> Rows:
    import pyarrow.lib  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: Rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}; expected a Parquet file") from error
    return rows


def _slice(splits: Mapping[str, Rows], split: str, what: str) -> Rows:
    """The part of `splits` that `split` names; `what` says what there is."""
    if split in splits:
        return splits[split]
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{what}, and {split!r} does not name a part of it ({error}); use one of these or a slice such as "
            "train[:100]"
        ) from error
    return [splits[part.splitname][i] for part in parts for i in range(part.from_, part.to)]


_FOLDER = f"a folder of rows in files of one kind ({', '.join(SUFFIXES)})"


def _from_folder(folder: Path, split: str) -> Rows:
    """The rows of a folder, whose files `datasets` sorts into splits by their names."""
    from datasets import DatasetDict, load_dataset_builder, load_from_disk
    from datasets.exceptions import DatasetsError
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():  # of `save_to_disk`
            saved = load_from_disk(str(folder))
            named = {str(k): v for k, v in saved.items()} if isinstance(saved, DatasetDict) else {"train": saved}
            return _slice(named, split, f"the folder {folder} has the splits {', '.join(named)}")
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            raise DataError(f"{folder} is a model's folder; expected {_FOLDER}")
        builder = load_dataset_builder(str(folder))
        data_files = builder.config.data_files or {}
    except (DatasetsError, ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"cannot read the folder {folder}: {error}; expected {_FOLDER}") from error
    except YAMLError as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"the metadata of {folder / 'README.md'} is no YAML: {why}; mend it, or move it away"
        ) from error
    splits = {str(name): [Path(file) for file in files] for name, files in data_files.items()}
    if not _card_says_files(folder / "README.md"):
        _check_complete(folder, splits)
    if any(_ending(path) not in TEXTS for files in splits.values() for path in files):
        if builder.__module__.rpartition(".")[2] not in (
            "json",
            "csv",
            "parquet",
            "arrow",
        ):  # texts, pictures, programs
            raise DataError(f"{folder} has files such as {next(iter(splits.values()))[0].name}; expected {_FOLDER}")
        return _from_library(str(folder), split)
    wanted = set(re.findall(r"(?:^|\+)\s*([^\s\[+]+)", split)) & set(splits)
    rows = {name: [row for path in splits[name] for row in _read_file(path)] for name in wanted}
    return _slice(rows, split, f"the folder {folder} has the splits {', '.join(splits)}")


# Also where only the `datasets` library reads them.
_OF_ROWS = re.compile(r"\.(json|jsonl|ndjson|csv|tsv|parquet|arrow)(\.(gz|xz|bz2|zst|lz4|zip))?$", re.IGNORECASE)


def _card_says_files(card: Path) -> bool:
    """Whether a folder's README says in its metadata which files belong to the data, so that others do not."""
    from huggingface_hub import metadata_load

    configs = (metadata_load(card) or {}).get("configs") if card.is_file() else None
    return any("data_files" in config or "data_dir" in config for config in configs or ())


def _check_complete(folder: Path, splits: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a folder with data in files that belong to no split: nobody would learn that they are not read."""
    taken = {path.resolve() for files in splits.values() for path in files}
    for path in sorted(folder.rglob("*")):
        data = path.is_file() and bool(_OF_ROWS.search(path.name)) and path.resolve() not in taken
        if data and (_ending(path) != ".json" or _holds_rows(path)):
            raise DataError(
                f"{path} belongs to no split of the folder {folder}, which has {', '.join(splits)}; move it away, or "
                "name it after its split, such as train-2.jsonl, all files in one format"
            )


def _holds_rows(path: Path) -> bool:
    """Whether a file of JSON has rows, and not notes on the data, as dataset_infos.json does."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):  # an object on each line, or broken: then it is not known to be notes
        return True
    if isinstance(value, list):
        return any(isinstance(row, dict) for row in value)
    return isinstance(value, dict) and not value.keys().isdisjoint((*PROMPTS, "chosen", "rejected"))


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
    except ConnectionError as error:
        raise DataError(
            f"there is no file or folder {source}, and as a data set of the hub it cannot be reached: {error}"
        ) from error
    except DatasetGenerationError as error:
        raise DataError(f"{source} is broken: {error.__cause__ or error}") from error
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"cannot load the split {split!r} of {source}: {error}") from error
    assert isinstance(data, Dataset)
    return data
