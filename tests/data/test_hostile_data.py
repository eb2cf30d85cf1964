"""Data files as strangers have them: every cell is read as Python's own csv and json read it, or refused in one line.

Each case is a file's bytes in one format with one damage; the oracle reads the same text with the standard library.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from genarm.data.preferences import load_preferences, to_preferences
from genarm.data.sources import load_rows
from genarm.errors import DataError

# Answers that a reader may take for something else.
CELLS = [
    *("None", "NA", "N/A", "null", "nan", "NaN", "True", "false", "007", "1e5", "1_000", "-0", "inf", "2020-01-01"),
    *("", " ", "a,b", 'a "b"', "a\nb", "a\r\nb", "a\rb", "a\u2028b", "a\u2029b", "a\u0085b", "a\x0cb", "a\x1cb"),
    *("\ufeffa", "é", "日本", "🙂", "x\u200by", "\\n", "\\", "'", '"', "#a", "=1+1", "a\tb", "x" * 200_000),
]
ROWS = [{"prompt": f"p{i}", "chosen": cell, "rejected": f"{cell}!"} for i, cell in enumerate(CELLS)]


def as_csv(rows: list[dict[str, str]], **options: Any) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_jsonl(rows: list[dict[str, str]], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


TEXTS = {
    "crlf.csv": as_csv(ROWS),
    "lf.csv": as_csv(ROWS, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "ascii.jsonl": as_jsonl(ROWS),
    "plain.jsonl": as_jsonl(ROWS, ensure_ascii=False),
    "crlf.jsonl": as_jsonl(ROWS, ensure_ascii=False).replace("\n", "\r\n"),
    "blank-lines.jsonl": as_jsonl(ROWS).replace("\n", "\n\n \n"),
    "no-last-line-end.jsonl": as_jsonl(ROWS).rstrip("\n"),
    "list.json": json.dumps(ROWS, ensure_ascii=False),
    "pretty.json": json.dumps(ROWS, indent=2),
    "lines.json": as_jsonl(ROWS),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("wrap", ["file", "bom", "gz", "folder", "folder of gz", "upper case"])
def test_what_a_file_says_is_what_is_read(name: str, wrap: str, tmp_path: Path) -> None:
    raw = TEXTS[name].encode("utf-8-sig" if wrap == "bom" else "utf-8")
    name = name.upper() if wrap == "upper case" else name
    if wrap.endswith("gz"):
        name, raw = f"{name}.gz", gzip.compress(raw)
    place = tmp_path / "folder" if wrap.startswith("folder") else tmp_path
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(raw)
    source = str(place if wrap.startswith("folder") else place / name)
    assert list(load_rows(source, split="train")) == ROWS
    assert list(load_rows(source, split="train[2:5]")) == ROWS[2:5]


def test_folders_of_other_formats(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    data.save_to_disk(tmp_path / "arrow")
    DatasetDict(train=data, test=data.select(range(2))).save_to_disk(tmp_path / "dict")
    for name in ("parquet", "parquet/train.parquet", "arrow", "dict"):
        assert list(load_rows(str(tmp_path / name), split="train")) == ROWS
    assert list(load_rows(str(tmp_path / "dict"), split="test")) == ROWS[:2]


LINE = as_jsonl(ROWS[:1]).strip()
TABLE = "prompt,chosen,rejected\na,b,c\n"

# name, bytes, what the refusal says
BROKEN: list[tuple[str, bytes, str]] = [
    *((f"a{ending}", text.encode("utf-16"), "UTF-16") for ending, text in ((".csv", TABLE), (".jsonl", LINE))),
    *((f"a{ending}", text.encode("utf-16-le"), "UTF-16") for ending, text in ((".csv", TABLE), (".jsonl", LINE))),
    ("a.csv", f"{TABLE}é,b,c\n".encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
    ("a.jsonl", f'{LINE}\n{{"prompt": "é"}}'.encode("cp1252"), "line 2: byte 0xe9 is not UTF-8"),
    ("a.csv", f"{TABLE}a,b\x00,c\n".encode(), "zero bytes"),
    ("a.csv", f'{TABLE}a,b,"c'.encode(), "unexpected end of data"),
    ("a.csv", f"{TABLE}a,b".encode(), "line 3: 2 values, expected 3"),
    ("a.csv", f'{TABLE}a,b,"c"d\n'.encode(), "line 3: "),
    ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "two columns have one name"),
    ("a.jsonl", f"{LINE}\n{LINE[:-9]}".encode(), "line 2, column "),
    ("a.jsonl", f"{LINE}{LINE}\n".encode(), "line 1, column "),
    ("a.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "the key 'prompt' comes twice"),
    ("a.jsonl", b'{"prompt": {"a": 1, "a": 2}}\n', "the key 'a' comes twice"),
    ("a.json", b'[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' comes twice"),
    ("a.json", json.dumps(ROWS[:3], indent=1).encode()[:-9], "line "),
    ("a.jsonl", rb'{"prompt": "\ud83d"}', "surrogates not allowed"),
    ("a.jsonl", b'{"prompt": "a\tb"}', "Invalid control character"),
    ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1"),
    ("a.jsonl", b'{"n": ' + b"1" * 5_000 + b"}", "line 1"),
    ("a.jsonl.gz", b"no gzip", "cannot read"),
    ("a.jsonl.gz", gzip.compress(LINE.encode())[:-9], "cannot read"),
    ("a.csv.gz", gzip.compress(TABLE.encode() * 99)[:40], "cannot read"),
    ("a.parquet", b"PAR1", "expected a Parquet file"),
    ("a.jsonl.xz", b"x", "unknown ending"),
]


@pytest.mark.parametrize(("name", "raw", "reason"), BROKEN, ids=[f"{i} {b[0]}" for i, b in enumerate(BROKEN)])
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_broken_is_refused_in_one_line(
    name: str, raw: bytes, reason: str, folder: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as error:
        load_rows(str(tmp_path if folder else tmp_path / name), split="train")
    assert "\n" not in str(error.value)
    if not folder or name.removesuffix(".gz").endswith(("csv", "json", "jsonl")):
        assert reason in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["train.jsonl", "extra.jsonl"], "extra.jsonl"),
        (["a.jsonl", "b.jsonl", "c.csv"], "c.csv"),
        (["train.json", "more.json"], "more.json"),
        (["train.jsonl", "sub/more.json"], "more.json"),
        (["train.csv", "more.json.gz"], "more.json.gz"),
        (["train.jsonl", "extra.ndjson"], "extra.ndjson"),
        (["train.jsonl", "extra.JSONL.xz"], "extra.JSONL.xz"),
    ],
)
@pytest.mark.parametrize("card", [None, "# Pairs\n", "---\nlicense: mit\n---\n", "---\nconfigs: []\n---\n"])
def test_a_file_of_a_folder_that_is_in_no_split_is_named(
    names: list[str], left: str, card: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TABLE if name.endswith("csv") else LINE)
    if "train.json" not in names:
        (tmp_path / "info.json").write_text("{}")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(DataError, match=f"{left} belongs to no split"):
        load_rows(str(tmp_path), split="train")


@pytest.mark.parametrize("text", [f"[{LINE}]", f"[\n {LINE},\n {LINE}]", LINE, f"{LINE}\n{LINE}\n", f"[{LINE}"])
def test_rows_in_json_are_told_from_notes(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINE)
    for number, notes in enumerate(
        ("{}", "[]", '["train", "test"]', '{\n "default": {"splits": {"train": {}}}\n}', "3")
    ):
        (tmp_path / f"notes-{number}.json").write_text(notes)
    assert load_rows(str(tmp_path), split="train") == ROWS[:1]
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=r"rows\.json belongs to no split"):
        load_rows(str(tmp_path), split="train")


def test_a_card_that_is_broken_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINE)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match=r"README\.md is no YAML: .*; mend it, or move it away$"):
        load_rows(str(tmp_path), split="train")


@pytest.mark.parametrize("said", ["data_files: train.jsonl", "data_dir: sub"])
def test_a_card_may_say_which_files_are_read(said: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("train.jsonl", "extra.jsonl", "sub/train.jsonl"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {said}\n---\n# Pairs\n")
    assert load_rows(str(tmp_path), split="train") == ROWS[:1]


def test_values_between_tabs_are_what_they_say(tmp_path: Path) -> None:
    """In a file and in a folder: no answer "None" is nothing, no number loses its zeros."""
    table = 'prompt\tchosen\nWhy?\tNone\n"a\tb"\t007\n, ;\tNA\n'
    expected = [("Why?", "None"), ("a\tb", "007"), (", ;", "NA")]
    (tmp_path / "train.tsv").write_text(table)
    for source in (tmp_path, tmp_path / "train.tsv"):
        assert [tuple(row.values()) for row in load_rows(str(source), split="train")] == expected
    (tmp_path / "train.tsv").rename(tmp_path / "notes.tsv")
    (tmp_path / "train.csv").write_text(TABLE)
    with pytest.raises(DataError, match=r"notes\.tsv belongs to no split"):
        load_rows(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.pdf", "has files such as a.pdf"),
        ("a.txt", "has files such as a.txt"),
        ("a.png", "has files such as a.png"),
        ("config.json", "is a model's folder"),
        (None, "doesn't contain any data files"),
    ],
)
def test_folders_of_something_else(name: str | None, said: str, tmp_path: Path) -> None:
    if name is not None:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=rf"{said}.*; expected a folder of rows in files of one kind \(\.jsonl, "):
        load_rows(str(tmp_path), split="train")


def test_what_cannot_be_read_twice_is_refused() -> None:
    with pytest.raises(DataError, match="- is no file that can be read twice"):
        load_rows("-", split="train")
    with pytest.raises(DataError, match="/dev/null is no file"):
        load_rows("/dev/null", split="train")


@pytest.mark.parametrize("written", [json.dumps, repr, lambda turns: repr(turns).replace("}, {", "}\n {")])
@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_messages_written_as_text_are_no_text(written: Any, column: str, tmp_path: Path) -> None:
    """As pandas writes a column of messages into a CSV, whichever library made it."""
    turns = [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}]
    row = {"prompt": "p", "chosen": '[{"a": 1}] is JSON', "rejected": "b", column: written(turns)}
    (tmp_path / "data.csv").write_text(as_csv([row]), encoding="utf-8")
    with pytest.raises(DataError, match=f"'{column}' holds messages written as text"):
        load_preferences(str(tmp_path / "data.csv"))


def test_null_is_told_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[null]")
    with pytest.raises(DataError, match="element 1 of the list is null"):
        load_rows(str(tmp_path / "data.json"), split="train")
    rows: list[dict[str, Any]] = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    found = to_preferences([*rows, {"prompt": "p", "chosen": "a"}, {**rows[0], "rejected": None}], source="x")
    assert found.malformed == {f"'rejected' is {what}, expected a text": 1 for what in ("missing", "null")}
