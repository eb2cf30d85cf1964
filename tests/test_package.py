"""The package's own promises: its names, its imports, its files."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import genarm
from genarm.errors import DataError
from genarm.files import new_folder, write_text


def test_public_names_are_sorted_and_there() -> None:
    assert genarm.__all__ == sorted(genarm.__all__)
    for name in genarm.__all__:
        assert getattr(genarm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Guided'; it has"):
        _ = genarm.Guided


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, genarm; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_written_text_is_whole_or_not_there(tmp_path: Path) -> None:
    """A reader that looks all the time sees one of the two texts, never a part."""
    path, texts = tmp_path / "file", ["a" * 200_000, "b" * 100_000]
    write_text(path, texts[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_text(path, texts[i % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(DataError, match="already exists"), new_folder(tmp_path / "out"):
        pass
