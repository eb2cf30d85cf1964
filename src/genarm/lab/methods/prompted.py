"""The base with a system text, asked for what it is to be steered to: what every steering is to be compared with."""

from __future__ import annotations

from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Sample

KIND = Kind(
    name="prompted",
    roles=("base",),
    system=True,
    build=lambda parts: Sample(
        parts.model("base"), parts.tokenizer, parts.sampling, system=parts.spec.system, reader=parts.reader
    ),
    forwards=lambda spec, tokens: tally((spec.base, tokens)),
    total=lambda *_: 1.0,
)
