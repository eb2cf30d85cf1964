"""Test-time alignment: train autoregressive reward models and steer any frozen causal LM with them.

After `import genarm`, a guided model folder is a causal LM to transformers:
`AutoModelForCausalLM.from_pretrained(folder)`. The names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from genarm.model.auto import register as _register

if TYPE_CHECKING:
    from genarm.engine.engine import Engine
    from genarm.engine.options import EngineOptions
    from genarm.engine.request import Completion, Request, Token
    from genarm.errors import GenarmError
    from genarm.model.compose import compose
    from genarm.model.config import GuidedConfig
    from genarm.model.modeling import GuidedForCausalLM
    from genarm.model.token_rewards import TokenRewards
    from genarm.sampling import Sampling
    from genarm.training.config import TrainConfig
    from genarm.training.run import train
    from genarm.training.trainer import ArmTrainer

__version__ = "0.1.0"

_HOMES = {
    "ArmTrainer": "genarm.training.trainer",
    "Completion": "genarm.engine.request",
    "Engine": "genarm.engine.engine",
    "EngineOptions": "genarm.engine.options",
    "GenarmError": "genarm.errors",
    "GuidedConfig": "genarm.model.config",
    "GuidedForCausalLM": "genarm.model.modeling",
    "Request": "genarm.engine.request",
    "Sampling": "genarm.sampling",
    "Token": "genarm.engine.request",
    "TokenRewards": "genarm.model.token_rewards",
    "TrainConfig": "genarm.training.config",
    "compose": "genarm.model.compose",
    "train": "genarm.training.run",
}

__all__ = [
    "ArmTrainer",
    "Completion",
    "Engine",
    "EngineOptions",
    "GenarmError",
    "GuidedConfig",
    "GuidedForCausalLM",
    "Request",
    "Sampling",
    "Token",
    "TokenRewards",
    "TrainConfig",
    "__version__",
    "compose",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genarm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


_register()
