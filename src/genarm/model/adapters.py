"""Switching the LoRA adapters that share one model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of `model` that carry adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def switched(layers: Sequence[BaseTunerLayer], adapter: str | None) -> Iterator[None]:
    """Run a model, whose adapter layers these are, with one adapter alone or with none.

    Afterwards it is its plain self again. peft's public `set_adapter` walks every parameter to set
    `requires_grad`; members are frozen once and for all, so the two fields that peft's forward reads are set
    directly: this happens for every token.
    """
    switch(layers, adapter)
    try:
        yield
    finally:
        switch(layers, None)


def switch(layers: Sequence[BaseTunerLayer], adapter: str | None) -> None:
    """Make `adapter` the only one that runs, or none."""
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
