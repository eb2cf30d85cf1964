"""The sandbox's own process: gives up rights one by one, then becomes the program.

`genarm.lab.tasks.sandbox` starts this file by its path; it needs the standard library alone. In order:

1. new namespaces where the kernel allows them: no network, no foreign processes, a file system of its own
2. a small root of Python and the system's libraries, all read-only, with an empty folder in `/tmp` to work in
3. another user if this one is root (it ends here where there is none to become), no way back to more rights, death
   together with the parent
4. no system calls that reach keyrings, or memory that no limit counts
5. limits on time, memory, files and processes, then the program

Lines of JSON on the status pipe say what was taken away ("contained"), then how the program ended ("signal", "exit",
"cpu" seconds) and what it reported ("status", "reason") through a pipe of its own, if anything.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_BIND, MS_REC, MS_PRIVATE = 2, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_READ_ONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER = 1, 22, 38, 2
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
"""What a Python needs of the system; nothing of it is secret."""

WORK = "/tmp/work"
"""Where the program begins; empty, even where Python lies in `/tmp`."""

REFUSED = {
    "x86_64": (0xC000003E, (29, 30, 64, 68, 240, 248, 249, 250, 319, 447)),
    "aarch64": (0xC00000B7, (194, 196, 190, 186, 180, 217, 218, 219, 279, 447)),
}
"""{machine: its number for the kernel, and those of shmget, shmat, semget, msgget, mq_open, add_key, request_key,
keyctl, memfd_create and memfd_secret}. Numbers from `FOREIGN_CALLS` on are another form of calls, and refused too."""
FOREIGN_CALLS = 0x40000000

FILES = 4096
"""The most files and folders that a program may make in its own file system."""

FIRST_USER, NOBODY = 200_000, 65534
"""Users from the first number on belong to nobody; each sandbox of root takes one of its own, so that they cannot meet.
Where there are no such numbers (in some containers), all of them are the system's own nobody."""

ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that the program sees. A fixed hash seed makes the order of sets, and so the outcome, repeatable."""

STATUSES = ("passed", "failed", "memory")

PROGRAM = """
import json, os, sys, types

def main(code_fd, report_fd):
    own = os.getpid()
    with open(code_fd, encoding="utf-8") as file:
        code = file.read()
    del sys.argv[1:]
    # Not "__main__": what a reply would do as a script, asking for input, say, is no part of what its tests are about.
    module = sys.modules["__main__"] = sys.modules["program"] = types.ModuleType("program")
    status, reason = "passed", ""
    try:
        exec(compile(code, "program.py", "exec"), module.__dict__)
    except MemoryError:
        status, reason = "memory", "it ran out of memory"
    except SystemExit as error:
        status, reason = "failed", f"it exited ({error.code}) before its tests were over"
    except BaseException as error:
        lines, place = [], error.__traceback__
        while place is not None:
            if place.tb_frame.f_code.co_filename == "program.py":
                lines.append(place.tb_lineno)
            place = place.tb_next
        where = f" in line {lines[0]}" if lines else ""
        said = str(error)[:200]
        status, reason = "failed", f"{type(error).__name__}{where}" + (f": {said}" if said else "")
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    if os.getpid() == own:
        os.write(report_fd, json.dumps([status, reason]).encode())
    os._exit(0)

main(int(sys.argv[1]), int(sys.argv[2]))
"""


def main(settings: dict[str, Any]) -> None:
    """Run the program that the file descriptor `code` holds; see `genarm.lab.tasks.sandbox.run_code`."""
    die_with_parent()
    users = (FIRST_USER + os.getpid(), NOBODY)
    contained = new_namespaces()
    if contained and (init := os.fork()):  # only a child is inside the new process namespace, as its process 1
        os.close(settings["status"])
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xFF)
    if contained and hide_files(os.getcwd(), settings["prefixes"], settings["disk"]):
        contained.append("files")
    if os.geteuid() == 0:
        if not any(drop_root(user, settings["python"], certain="files" in contained) for user in users):
            # Root could undo all of the above, and its processes are never counted.
            say(
                settings["status"],
                broken=f"root's code would not be contained, and nobody else may start {sys.executable}",
            )
            os._exit(1)
        contained.append("user")
    with suppress(OSError, AttributeError):
        libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent()
    if refuse_calls():
        contained.append("keys")
    say(settings["status"], contained=contained)
    limits = {name: tuple(value) for name, value in settings["limits"].items()}
    if not {"processes", "user"} & set(contained):  # then all of this user's processes count
        limits["NPROC"] = (limits["NPROC"][0] + own_threads(),) * 2
    report, own_end = os.pipe()
    program = os.fork()
    if not program:
        become(settings, limits, own_end)
    _, status, usage = os.wait4(program, 0)
    code = os.waitstatus_to_exitcode(status)
    ended = {"signal": max(-code, 0), "exit": max(code, 0), "cpu": usage.ru_utime + usage.ru_stime}
    say(settings["status"], **ended, **reported(report))
    os._exit(0)


def reported(pipe: int) -> dict[str, str]:
    """What the program wrote, if it is what `PROGRAM` writes."""
    os.set_blocking(pipe, False)  # a child of the program may still hold the other end
    try:
        status, reason = json.loads(os.read(pipe, 4096))
        return {"status": status, "reason": str(reason)} if status in STATUSES else {}
    except (OSError, ValueError, TypeError):
        return {}


def libc(name: str, *arguments: object) -> None:
    """Call a function of the C library (raises OSError where it fails, AttributeError where it is missing)."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def die_with_parent() -> None:
    """Be killed when the parent is; a new process and a new user both need to say so again."""
    with suppress(OSError, AttributeError):
        libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def say(pipe: int, **what: object) -> None:
    """A line on the status pipe."""
    os.write(pipe, (json.dumps(what) + "\n").encode())


def new_namespaces() -> list[str]:
    """Leave the network and the processes of the machine; an ordinary user needs a user namespace for that."""
    user, group = os.geteuid(), os.getegid()
    try:
        everywhere = NEW_MOUNTS | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
        libc("unshare", everywhere | (NEW_USER if user else 0))
        if user:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
    except (OSError, AttributeError):
        return []
    return ["network", "processes"]


def refuse_calls() -> bool:
    """Have the kernel refuse `REFUSED` to this process and all that it starts; False where it does not.

    Keyrings come from the caller's session, whoever the program becomes. Shared memory of System V, message queues and
    files in memory outlive what maps them, and no limit on a process counts them.
    """
    if (known := REFUSED.get(os.uname().machine)) is None or sys.byteorder != "little":
        return False
    machine, calls = known
    tests = [(JUMP_AT_LEAST, FOREIGN_CALLS), *((JUMP_EQUAL, call) for call in calls)]
    program = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 0, len(tests) + 2, machine), (LOAD, 0, 0, 0)]
    program += [(code, len(tests) - number, 0, value) for number, (code, value) in enumerate(tests)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(lines)))
    try:
        libc("prctl", PR_SET_SECCOMP, FILTER, filter_, 0, 0)
    except (OSError, AttributeError):
        return False
    return True


def hide_files(root: str, prefixes: Iterable[str], mebibytes: int) -> bool:
    """Make `root` the root directory, with `SYSTEM` and `prefixes` of Python in it; False where that is forbidden."""
    options = f"mode=1777,size={mebibytes}m,nr_inodes={FILES}".encode()
    try:
        libc("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
        libc("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID, b"mode=755,size=1m")
        # Before anything is shown: Python itself may lie in /tmp.
        os.mkdir(f"{root}/tmp")
        libc("mount", b"tmpfs", f"{root}/tmp".encode(), b"tmpfs", MS_NOSUID, options)
        shown: list[str] = []
        for path in (*SYSTEM, *DEVICES, *sorted(prefixes, key=len)):
            if not any(path == p or path.startswith(f"{p}/") for p in shown):
                _show(path, root)
                shown.append(path)
        _set_mounts(root, AT_RECURSIVE, on=MOUNT_READ_ONLY)
        _set_mounts(f"{root}/tmp", 0, off=MOUNT_READ_ONLY)
        os.chroot(root)
        os.mkdir(WORK)
        os.chdir(WORK)
    except OSError:
        return False
    return True


def _set_mounts(path: str, flags: int, *, on: int = 0, off: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
    libc("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes))


def _show(path: str, root: str) -> None:
    """Put `path` into `root` under its own name, if it exists."""
    there = root + path
    if os.path.islink(path) and path in SYSTEM:
        os.symlink(os.readlink(path), there)
        return
    if os.path.isdir(path):
        os.makedirs(there, exist_ok=True)
    elif os.path.exists(path):
        os.makedirs(os.path.dirname(there), exist_ok=True)
        os.close(os.open(there, os.O_CREAT))
    else:
        return
    libc("mount", path.encode(), there.encode(), None, MS_BIND | MS_REC, None)


def drop_root(user: int, python: str, *, certain: bool) -> bool:
    """Become `user`, unless that user could not start Python (as where it lies in root's home)."""
    if not certain and not _can_run(user, python):
        return False
    try:
        _become_user(user)
    except OSError:
        return False
    return True


def _become_user(user: int) -> None:
    os.chown(".", user, user)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def _can_run(user: int, python: str) -> bool:
    child = os.fork()
    if not child:
        with suppress(OSError):
            _become_user(user)
            os._exit(0 if os.access(python, os.X_OK) and os.access(os.__file__, os.R_OK) else 1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def own_threads() -> int:
    """Threads of this user on the machine, all of which count where no namespace or user separates the sandbox."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError):
            if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def become(settings: dict[str, Any], limits: dict[str, tuple[int, int]], report: int) -> None:
    """Limit this process and replace it by the program; never returns."""
    try:
        die_with_parent()
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        for name, (soft, hard) in limits.items():
            most = resource.getrlimit(number := getattr(resource, f"RLIMIT_{name}"))[1]
            within = [value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard)]
            resource.setrlimit(number, (within[0], within[1]))
        os.set_inheritable(settings["status"], False)
        os.set_inheritable(report, True)
        python, code = settings["python"], str(settings["code"])
        # -s and -P are what -I means, except that -I would also ignore the hash seed in our own environment.
        os.execve(python, [python, "-s", "-P", "-X", "utf8", "-c", PROGRAM, code, str(report)], ENVIRONMENT)
    except BaseException as error:
        say(settings["status"], broken=f"{type(error).__name__}: {error}")
        os._exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
