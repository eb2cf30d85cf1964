"""Files that are either whole or not there, and JSONL files of rows that a killed run goes on with."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from genarm.errors import DataError, MemberError

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two runs apart there
    fcntl = None  # type: ignore[assignment]


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


def refuse_file(reference: str) -> None:
    """Refuse a file where a model's folder is wanted (raises MemberError)."""
    path = Path(reference).expanduser()
    if path.is_file():
        beside = (path.parent / "config.json").is_file() or (path.parent / "adapter_config.json").is_file()
        hint = f" (did you mean {str(path.parent)!r}?)" if beside else ""
        raise MemberError(
            f"{reference!r} is a file{hint}; give a model's folder, with config.json and weights in safetensors"
        )


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
        _replace(temporary, path)
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


# --- one run at a time --------------------------------------------------------------------------------------------

_HELD: dict[Path, int] = {}
"""Files whose locks this process has, open."""
_TRIES = 10


@contextmanager
def only_run(path: Path, noted: Path) -> Iterator[None]:
    """Keep other processes from the output `path` in the meantime, by a lock on `noted`, the file of its settings.

    The lock ends with the process, however that ends. Within one process it may be taken again. Where the file system
    has no locks, or `noted` cannot be opened, there is none. A `noted` that is still empty in the end is removed.

    Raises:
        DataError: another process has it.
    """
    key = noted.absolute()
    handle = None if key in _HELD else _locked(key, path)
    if handle is None:
        yield
        return
    _HELD[key] = handle
    try:
        yield
    finally:
        handle = _HELD.pop(key)
        with suppress(OSError):
            if os.fstat(handle).st_size == 0:
                key.unlink()
        os.close(handle)


def _locked(noted: Path, path: Path) -> int | None:
    """`noted`, made if need be, opened and locked; None where that cannot be (raises DataError: another has it)."""
    for _ in range(_TRIES):
        try:
            noted.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(noted, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # whoever writes there says it better
            return None
        if not _lock(handle):
            os.close(handle)
            raise DataError(f"another run is writing {path}; wait until it has ended, or choose another --output")
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(noted)):
                return handle
        os.close(handle)  # another run has put a new file there, or taken it away, between opening and locking
    return None


def _lock(handle: int) -> bool:
    """Lock an open file; False where another process has it locked, True where there are no locks."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems have none
            pass
    return True


def _replace(temporary: str, path: Path) -> None:
    """`os.replace`; where this process has the lock of `path`, the new file is locked before it is there."""
    key = path.absolute()
    if key not in _HELD:
        os.replace(temporary, path)
        return
    handle = os.open(temporary, os.O_RDWR)
    _lock(handle)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.close(handle)
        raise
    os.close(_HELD[key])
    _HELD[key] = handle


def _let_go() -> None:
    """Close what a forked child has of its parent's, lest a lock outlive the parent."""
    for handle in _HELD.values():
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


# --- rows: appended whole, and a torn last line is cut off ---------------------------------------------------------


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
