"""What a guided folder is to a vLLM that this plug-in was not tried with: one line that says so."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from genarm.errors import UnsupportedError
from genarm.model.config import GuidedConfig
from genarm.vllm import VERSIONS, check_version, vllm_version
from genarm.vllm.config import ServedConfig


class RefusedConfig(GuidedConfig):
    """Cannot be read."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NoReturn:  # noqa: ARG003 (as transformers calls it)
        """Raises UnsupportedError."""
        check_version()
        raise UnsupportedError(f"vLLM {vllm_version()} does not take the plug-in: install vllm=={VERSIONS[-1]}.*")


class UntriedConfig(ServedConfig):
    """Is read with a warning where nothing is missing."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As its parent's (raises UnsupportedError where something is missing)."""
        check_version()
        warnings.warn(untried(), stacklevel=2)
        return super().from_dict(config_dict, **kwargs)


def untried() -> str:
    """That the installed vLLM is newer than those that were tried."""
    return (
        f"vLLM {vllm_version()} is newer than those that guided models were tried with ({', '.join(VERSIONS)}); all "
        "that they need is there, and whether it still means the same, tokens show: compare some with genarm generate"
    )
