"""The decoding engine: many requests at once, guided, at nearly the base's speed.

`request` says what is asked and answered, `engine` takes requests, and each is a `request_state` until its `reply` is
whole. A `step` is: the `scheduler` says what every member reads, after `drafting`; the `members` run it; the
`log_prob_table`, `sampler` and `noise` turn log-probabilities into tokens. A `trunk` runs one model, and the members
that are adapters on it, over the rows of its `kv_cache` (which is the prefix cache too) through `attention`; `lora` and
`fused_linears` let them share one read of its weights. `proof` compares that with the model's own forward.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genarm.engine.engine import Engine, Statistics
    from genarm.engine.options import EngineOptions
    from genarm.engine.request import Completion, Request, ScoredPrompt, Token
    from genarm.engine.stream import Stream

_HOMES = {
    "Completion": "request",
    "Engine": "engine",
    "EngineOptions": "options",
    "Request": "request",
    "ScoredPrompt": "request",
    "Statistics": "engine",
    "Stream": "stream",
    "Token": "request",
}

__all__ = ["Completion", "Engine", "EngineOptions", "Request", "ScoredPrompt", "Statistics", "Stream", "Token"]


def __getattr__(name: str) -> Any:
    """Loaded when first used, so that the options can be read without the engine."""
    if name not in _HOMES:
        raise AttributeError(f"module 'genarm.engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"genarm.engine.{_HOMES[name]}"), name)
