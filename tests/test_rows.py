"""Files of rows: whatever a kill leaves behind, whole rows stay and nothing that is not ours is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genarm.errors import DataError
from genarm.files import append_rows, keep_rows, resume_rows

ROWS = [{"index": i, "text": "ä\u2028\n" * i, "settings": "s"} for i in range(4)]


def test_torn_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, ROWS[:2])
    append_rows(path, ROWS[2:])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        found = resume_rows(path, "s")
        assert found == ROWS[: len(found)]
        assert path.read_bytes() == b"".join(lines[: len(found)])
        assert end - len(path.read_bytes()) < max(map(len, lines))
        append_rows(path, ROWS[len(found) :])
        assert path.read_bytes() == whole


def test_kept_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS)
    keep_rows(path, 3)
    assert resume_rows(path, "s") == ROWS[:3]
    keep_rows(path, 0)
    assert resume_rows(path, "s") == []


def test_what_is_not_ours_stays_as_it_is(tmp_path: Path) -> None:
    assert resume_rows(tmp_path / "none.jsonl", "s") == []
    foreign = {
        "one line": (b"my notes", "line 1 is no row of a run"),
        "lines": (b'{"settings": "s"}\nmy notes\n{"settings": "s"}\n', "line 2 is no row of a run"),
        "list": (b"[1]\n", "line 1 is no row of a run"),
        "others": (json.dumps({"settings": "t"}).encode() + b"\n", "line 1 was made with other settings"),
    }
    for name, (content, message) in foreign.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            resume_rows(path, "s")
        assert path.read_bytes() == content
