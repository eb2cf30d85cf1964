"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from genarm.errors import DataError


def check_output(path: Path, *, option: str = "--output", folder: bool = False) -> None:
    """Find out, before any work is done, whether an output can be written at `path`; nothing is left behind.

    Args:
        path: a file (or a folder, if `folder`) that is there already, or shall be made with all folders above it.
        option: what names it on the command line.
        folder: whether it is a folder.

    Raises:
        DataError: it cannot be made or written to, or something of another kind is there.
    """
    made: list[Path] = []
    inside = path if folder else path.parent
    try:
        if path.exists() and path.is_dir() != folder:
            other = "a file; name a folder" if folder else "a folder; name a file in it"
            raise DataError(f"{option} {path} is {other}")
        if path.exists() and not (folder or path.is_file()):
            raise DataError(f"{option} {path} is a device or a pipe; name a file")
        for above in reversed([inside, *inside.parents]):
            if not above.exists():
                above.mkdir()
                made.append(above)
        # Long enough for the names of what is written beside it.
        handle, probe = tempfile.mkstemp(dir=inside, prefix="." if folder else f".{path.name}.settings.json.")
        os.close(handle)
        os.unlink(probe)
        if path.is_file():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    except OSError as error:
        raise DataError(f"cannot write {option} {path}: {error.strerror}; name another place") from error
    finally:
        for above in reversed(made):
            with suppress(OSError):
                above.rmdir()


def no_folder(reference: str) -> str:
    """That there is no folder `reference`, in words, with a folder beside it whose name is close, if there is one."""
    path = Path(reference).expanduser()
    try:
        names = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        names = []
    close = get_close_matches(path.name, names, n=1)
    hint = f" (did you mean {str(path.parent / close[0])!r}?)" if close else ""
    return f"there is no folder {reference!r} here{hint}"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part (raises DataError)."""
    try:
        _write_text(path, text)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep colleagues out
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_new_folder(path: Path) -> None:
    """As `check_output` of a folder that is not there yet, or is empty (raises DataError)."""
    check_output(path, folder=True)
    if path.is_dir() and any(path.iterdir()):
        raise DataError(f"{path} already exists and is not empty; choose another --output or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes the name `path` when the block ends well.

    Raises:
        DataError: as `check_new_folder`; nothing is ever overwritten.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
