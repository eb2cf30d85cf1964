"""GenARM (arXiv 2410.08193): log π_base + Σ_i w_i log π_i, the sampling of a guided model."""

from __future__ import annotations

from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Sample, total

KIND = Kind(
    name="genarm",
    roles=("base",),
    named="rewards",
    settings={"max_kl": None},
    build=lambda parts: Sample(
        parts.models.guided(parts.spec),
        parts.tokenizer,
        parts.sampling,
        weights=parts.spec.weights,
        **parts.spec.numbers,
    ),
    forwards=lambda spec, tokens: tally((spec.base, tokens), *((reward, tokens) for reward in spec.used)),
    total=lambda spec, models: total(models.composed(spec), spec.weights),
)
