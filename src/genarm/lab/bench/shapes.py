"""Shapes of the models that are measured: a base, and an ARM of about an eighth of its parameters.

Heads have a size that vLLM's attention knows on a CPU (32, 64, 128).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with its own output layer."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All of them: embedding and output layer, attention, MLP and norms."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden


@dataclass(frozen=True, kw_only=True)
class ShapePair:
    """A base and its ARM."""

    base: Shape
    arm: Shape


SHAPES: Mapping[str, ShapePair] = {
    "tiny": ShapePair(
        base=Shape(hidden=64, layers=6, heads=2, intermediate=128, vocabulary=256),
        arm=Shape(hidden=32, layers=2, heads=1, intermediate=56, vocabulary=256),
    ),
    "200m": ShapePair(
        base=Shape(hidden=1024, layers=12, heads=16, intermediate=2816, vocabulary=32_000),
        arm=Shape(hidden=320, layers=6, heads=5, intermediate=864, vocabulary=32_000),
    ),
    "7b": ShapePair(  # the base is that of Llama 2
        base=Shape(hidden=4096, layers=32, heads=32, intermediate=11_008, vocabulary=32_000),
        arm=Shape(hidden=2048, layers=14, heads=16, intermediate=5504, vocabulary=32_000),
    ),
}
