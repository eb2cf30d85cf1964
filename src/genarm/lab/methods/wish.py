"""Rewards in words: log π_base + Σ_i w_i (log π_base with a system text − log π_base)."""

from __future__ import annotations

from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Sample
from genarm.model.modeling import GuidedForCausalLM

KIND = Kind(
    name="wish",
    roles=("base",),
    named="wishes",
    settings={"max_kl": None},
    build=lambda parts: Sample(
        GuidedForCausalLM.from_members(parts.model("base"), {}, wishes=parts.spec.named),
        parts.tokenizer,
        parts.sampling,
        weights=parts.spec.weights,
        reader=parts.reader,
        **parts.spec.numbers,
    ),
    forwards=lambda spec, tokens: tally((spec.base, tokens * (1 + len(spec.used)))),
    total=lambda *_: 1.0,
)
