"""The decoding engine: many requests at once, guided, at nearly the base's speed.

`request` says what is asked and answered; `engine` takes requests; `step` makes one step for all of them; `trunk` runs
a model over the rows of its `arena` through `attention`; `lora` lets adapters share their model's weights;
`speculation` decides what to draft; `table`, `sampler` and `noise` turn log-probabilities into tokens.
"""

from genarm.engine.engine import Engine, EngineOptions, Statistics
from genarm.engine.request import Completion, Request, ScoredPrompt, Token
from genarm.engine.stream import Stream

__all__ = ["Completion", "Engine", "EngineOptions", "Request", "ScoredPrompt", "Statistics", "Stream", "Token"]
