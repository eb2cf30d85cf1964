"""ARGS (arXiv 2402.01694): each token by its base logit and by what a trajectory reward says of the text up to it."""

from __future__ import annotations

from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.rewards import Guidance
from genarm.lab.methods.search import Search


class Args(Search):
    """Among the base's `top_k` likeliest tokens v: z(v) + Σ_i w_i r_i([x, y_<t, v]).

    One forward of the base and k of each reward per token, the k in one batch, beside one of each for the prompt;
    a reply stops at EOS.
    """

    title = "ARGS"


KIND = Kind(
    name="args",
    roles=("base",),
    named="rewards",
    settings={"top_k": 10, "temperature": 0.7},
    build=lambda parts: Args(Guidance.of(parts), **parts.spec.numbers),
    forwards=lambda spec, tokens: tally(
        (spec.base, tokens), *((reward, tokens * (1 + spec.numbers["top_k"])) for reward in spec.named.values())
    ),
    total=lambda *_: 1.0,
)
