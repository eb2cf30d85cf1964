"""A guided folder holds a copy of this file: `trust_remote_code=True` finds the installed genarm by it."""

from genarm.model.config import GuidedConfig
from genarm.model.modeling import GuidedForCausalLM

__all__ = ["GuidedConfig", "GuidedForCausalLM"]
