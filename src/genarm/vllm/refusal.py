"""What a guided folder is to a vLLM that this plug-in does not support: one line that says so."""

from __future__ import annotations

from typing import Any, NoReturn

from genarm.model.config import GuidedConfig
from genarm.vllm import check_version


class RefusedConfig(GuidedConfig):
    """Cannot be read."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NoReturn:  # noqa: ARG003 (as transformers calls it)
        """Raises UnsupportedError."""
        check_version()
        raise AssertionError("this vLLM is supported")
