"""Replies that were paid for, on disk: a run that was interrupted, or is repeated, asks only what is missing.

Every process appends to a file of its own in the folder, so that two of them can run at once, and a line that a kill
has torn is the last of its file. A reply belongs to the model's name, the messages and the sampling; where the model
is served plays no part.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genarm.errors import DataError
from genarm.files import append_rows
from genarm.lab.judges.client import Completion
from genarm.text.prompts import Message

_PATTERN = "replies-*.jsonl"


def cache_key(model: str, messages: Sequence[Message], sampling: Mapping[str, Any]) -> str:
    """What a reply is filed under: equal questions to one model have equal keys."""
    record = {"model": model, "messages": [dict(message) for message in messages], "sampling": dict(sampling)}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The replies in a folder, read when this is made; new ones are on the disk when `put` returns.

    Raises:
        DataError: the folder cannot be read or written, or a line that is not torn is no reply.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Path | None = None
        self._replies: dict[str, Completion] = {}
        try:
            for path in sorted(folder.glob(_PATTERN)):
                self._read(path)
        except OSError as error:
            raise DataError(f"cannot read the replies in {folder}: {error}") from error

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Completion | None:
        """The reply that is filed under `key`."""
        return self._replies.get(key)

    def put(self, key: str, reply: Completion) -> None:
        """File a reply."""
        self._replies[key] = reply
        try:
            if self._file is None:
                self._file = self._new_file()
        except OSError as error:
            raise DataError(f"cannot write replies to {self.folder}: {error}") from error
        append_rows(self._file, [{"key": key, **asdict(reply)}])

    def _new_file(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Names sort by age, so that the first of two replies to one question stays the one that counts.
        prefix = f"replies-{time.time_ns():020d}-"
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=prefix, suffix=".jsonl")
        os.close(handle)
        return Path(name)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
            try:
                row = json.loads(line)
                self._replies.setdefault(row.pop("key"), Completion(**row))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise DataError(
                    f"{path}, line {number} is no reply of a judge; remove that line or the file"
                ) from error
