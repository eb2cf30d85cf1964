"""All methods, by the names of their papers; policies by DPO, RLHF and MORL are `sample`d."""

from __future__ import annotations

from genarm.lab.methods import (
    args,
    best_of_n,
    cards,
    genarm,
    mod,
    prompted,
    proxy_tuning,
    sample,
    soup,
    transfer_q,
    tuned,
    wish,
)

_MODULES = (sample, prompted, genarm, wish, tuned, args, transfer_q, best_of_n, cards, mod, soup, proxy_tuning)

METHODS = {module.KIND.name: module.KIND for module in _MODULES}
"""A new one is a line here, or `METHODS[KIND.name] = KIND` elsewhere."""
