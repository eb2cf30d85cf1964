"""Run Python code that nobody has read, with its tests, in a process that can do little harm.

What it protects against, on Linux where unprivileged namespaces are allowed (or genarm runs as root): endless loops,
memory and fork bombs, floods of output, full disks; reading or writing any file of the user (the program sees Python,
the system's libraries and an empty folder in memory, nothing else); reading the environment and its keys, or the
keyrings of the session; memory that no limit counts (shared memory of System V, message queues, files in memory);
signals to other processes; the network. `Outcome.contained` says which of these hold on this machine; where a container
or a security module forbids namespaces, what stays is a process group with limits and an empty environment, run as
another user if genarm is root's and that user can start this Python. Then the program can read and write what its user
can (the environment of genarm's own process too, if it is the same user), use the network, send signals to that user's
processes, and leave processes behind that left its group, until their processor time is used up. As root, a program
only runs where it can be made another user's: root would not be contained, and its processes are never counted.

What it never protects against: faults of the kernel; `processes` times `memory` being more than the machine has; and
code that sets out to fake a pass: program and tests share one process, so that a program which looks for the tests
can pass them without solving the task. Leaving early (`sys.exit(0)`, `os._exit(0)`) is no pass. For code from an
adversary use a virtual machine.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genarm.errors import ConfigError, UnsupportedError

Status = Literal["passed", "failed", "timed out", "memory", "error"]

JAIL = Path(__file__).with_name("jail.py")

_MIB = 2**20
_READ = 2**16
"""Bytes that are read at once, and the most that are kept."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: by the clock, for the whole group of processes.
        cpu_seconds: of processor time, for each process.
        memory: MiB of address space, for each process.
        disk: MiB that it may write: of a file, and of all its files where it has a file system of its own, which then
            has room for 4,096 of them.
        processes: processes and threads, one for the sandbox itself included.
        open_files: file descriptors of each process.
        output: characters of its output that are kept.
    """

    seconds: float = 20.0
    cpu_seconds: int = 10
    memory: int = 1024
    disk: int = 16
    processes: int = 32
    open_files: int = 64
    output: int = 4000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} of a sandbox is {value}; it must be above 0")

    @property
    def rlimits(self) -> dict[str, tuple[int, int]]:
        """{name of the system's limit: (soft, hard)}."""
        return {
            "CORE": (0, 0),
            "CPU": (self.cpu_seconds, self.cpu_seconds + 1),  # a signal at the first, the end at the second
            "AS": (self.memory * _MIB,) * 2,
            "FSIZE": (self.disk * _MIB,) * 2,
            "NPROC": (self.processes,) * 2,
            "NOFILE": (self.open_files,) * 2,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "error" where the sandbox could not run it at all.
        reason: in a few words; empty if it passed.
        output: what it printed, on both streams, up to the limit.
        contained: what it was kept from: "network", "processes", "files", "keys" (and memory that no limit counts), and
            "user" if genarm is root's.
    """

    status: Status
    reason: str
    output: str
    contained: frozenset[str]

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.status == "passed"


def run_code(code: str, limits: Limits | None = None) -> Outcome:
    """Run `code` (a program and its tests) in the sandbox; it passes if its last line is reached.

    Raises:
        UnsupportedError: this is no POSIX system.
    """
    if os.name != "posix":
        raise UnsupportedError("running generated code needs a POSIX system such as Linux; use one, or a container")
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="genarm-sandbox-", ignore_cleanup_errors=True) as folder, _Pipe() as status:
        with tempfile.TemporaryFile() as file:
            file.write(code.encode("utf-8", "replace"))
            file.seek(0)
            process = _start(folder, file.fileno(), status.write, limits)
        status.close_write()
        assert process.stdout is not None
        try:
            output, said, in_time = _listen(process.stdout.fileno(), status.read, limits)
        finally:
            # Before the leader is waited for: until then its number cannot become another group's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    return _outcome(output.decode("utf-8", "replace")[: limits.output], said, in_time, limits)


class _Pipe:
    """A pipe whose ends are closed with the block."""

    def __enter__(self) -> _Pipe:
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}
        return self

    def close_write(self) -> None:
        """Close the writing end here, so that the reading end sees the others' end."""
        os.close(self.write)
        self._open.discard(self.write)

    def __exit__(self, *_: object) -> None:
        for end in self._open:
            os.close(end)


def _start(folder: str, code: int, status: int, limits: Limits) -> subprocess.Popen[bytes]:
    named = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    settings = {
        "code": code,
        "status": status,
        "python": sys.executable,
        "prefixes": sorted({*named, *map(os.path.realpath, named)}),
        "disk": limits.disk,
        "limits": limits.rlimits,
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(JAIL), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        cwd=folder,
        start_new_session=True,
        pass_fds=(code, status),
    )


def _listen(output: int, status: int, limits: Limits) -> tuple[bytes, bytes, bool]:
    """What was printed and said until the status pipe ends, and whether it ended in time.

    A flood is read and thrown away, so that the program is not held up by a full pipe.
    """
    deadline = time.monotonic() + limits.seconds
    heard = {output: b"", status: b""}
    with selectors.DefaultSelector() as selector:
        for source in heard:
            os.set_blocking(source, False)
            selector.register(source, selectors.EVENT_READ)
        while status in selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            in_time = time.monotonic() < deadline
            for key, _ in ready:
                data = os.read(key.fd, _READ)
                heard[key.fd] = (heard[key.fd] + data)[:_READ]
                if not data:
                    selector.unregister(key.fd)
            if not in_time:
                return heard[output], heard[status], False
    with suppress(BlockingIOError):  # the last words may have come after the last look
        heard[output] += os.read(output, _READ)
    return heard[output], heard[status], True


def _outcome(output: str, said: bytes, in_time: bool, limits: Limits) -> Outcome:
    record: dict[str, Any] = {}
    for line in said.splitlines():
        record |= json.loads(line)
    status, reason = _judge(record, in_time, limits)
    if status == "error" and output:
        reason = f"{reason}: {output}"
    return Outcome(status=status, reason=reason, output=output, contained=frozenset(record.get("contained", ())))


def _judge(said: dict[str, Any], in_time: bool, limits: Limits) -> tuple[Status, str]:
    if "status" in said:
        return said["status"], said["reason"]
    if "broken" in said or ("contained" not in said and in_time):
        return "error", f"the sandbox could not start ({said.get('broken', 'its own process ended')})"
    if not in_time:
        return "timed out", f"it was stopped after {limits.seconds:g} s"
    if "signal" not in said:
        return "failed", "it ended the process that watched it"
    number = said["signal"]
    if number == signal.SIGXCPU or (number == signal.SIGKILL and said["cpu"] >= limits.cpu_seconds):
        return "timed out", f"it used {limits.cpu_seconds} s of processor time"
    if number:
        return "failed", f"it was ended by signal {number} ({signal.strsignal(number)})"
    return "failed", f"it exited ({said['exit']}) before its tests were over"
