"""The machine that figures come from: what it is, with which code, and how much of it is taken."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Names and versions; `accelerator` is None where the CPU computes, `threads` are torch's."""

    processor: str
    cores: int
    threads: int
    accelerator: str | None
    python: str
    torch: str
    transformers: str


def this_machine(device: str) -> Machine:
    """The machine that runs this, computing on `device`."""
    place = torch.device(device)
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name(place) if place.type == "cuda" else None,
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_version() -> str:
    """The commit, "-dirty" after it where files have been changed; the package's version outside of a checkout."""
    here = Path(__file__).resolve()
    try:
        genarm = f"genarm {version('genarm')}"
    except PackageNotFoundError:  # run from its sources
        genarm = "genarm"
    try:
        tracked = ["git", "ls-files", "--error-unmatch", here.name]  # an environment may lie inside another checkout
        subprocess.run(tracked, cwd=here.parent, check=True, capture_output=True)
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(describe, cwd=here.parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return genarm
    return f"{genarm}, commit {done.stdout.strip()}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: tiny matrices gain little from a second, which on a busy machine costs minutes.

    Figures also come out the same on any number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def give_back() -> None:
    """Give memory that is free back to the machine, where the next model or another process may need it.

    torch keeps what is freed on a GPU, and glibc pieces of up to some megabytes: after a training on a CPU, about as
    much as the training took.
    """
    gc.collect()  # models refer to themselves
    torch.cuda.empty_cache()  # nothing where no GPU is used
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)
