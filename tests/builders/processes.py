"""The server in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "genarm", "serve", str(folder), "--device", "cpu", *options]


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its URL and the lines that it has printed until then."""
    # The log goes to a file: a pipe that nobody reads would be full some time, and the server would wait.
    log = folder.parent / "log"
    process = subprocess.Popen(
        command(folder, "--port", "0", *options),
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},  # tiny models on a busy machine
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "is served at" in line:
                break
        assert lines, log.read_text()
        yield process, lines[-1].split()[-1], lines
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read(lines: Iterator[str]) -> str:
    """Text of a stream of completions, to its end."""
    pieces = []
    for line in lines:
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            pieces.append(event["choices"][0]["text"])
        elif line == "data: [DONE]":
            return "".join(pieces)
    raise AssertionError(f"the stream ended after {len(pieces)} events")


def children(pid: int) -> list[int]:
    """Processes that have the engine, of the program `pid`."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                parent = int((each / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
                if parent == pid and "spawn_main" in (each / "cmdline").read_text(encoding="utf-8"):
                    found.append(int(each.name))
            except OSError:
                continue
    return found
