"""Tuned models as rewards: log π_base + Σ_i w_i (log π_tuned,i − log π_untuned,i), the untuned one mostly the base.

With one that is compared with the base: DeRa (arXiv 2402.02992) for weights below 1, extrapolation above.
"""

from __future__ import annotations

from collections.abc import Mapping

from genarm.lab.methods.genarm import KIND as GENARM
from genarm.lab.methods.interface import Kind, MethodSpec, tally


def _forwards(spec: MethodSpec, tokens: int) -> Mapping[str, float]:
    used = {name: model for name, model in spec.named.items() if spec.weights[name]}
    others = {spec.references[name] for name in used if name in spec.references} - {spec.base, *used.values()}
    return tally(*((model, tokens) for model in (spec.base, *used.values(), *others)))


KIND = Kind(
    name="tuned",
    roles=("base",),
    named="tuned",
    settings={"max_kl": None},
    build=GENARM.build,
    forwards=_forwards,
    total=GENARM.total,
)
