"""From combined log-probabilities to tokens: pure functions of tensors, settings and keys.

Order, the same everywhere, and transformers' own: (1) combination, (2) logit bias, repetition, presence and frequency
penalties, ids that must not end the reply yet, (3) temperature, (4) top-k, (5) top-p, (6) min-p, (7) the draw. Steps 2
to 6 are `shape`, step 7 is `draw`; `acceptance` and `residual` are what speculation adds, after Leviathan et al. 2023
(arXiv 2211.17192), algorithm 1.

Shapes: P positions (of several requests together), V ids of the base's vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genarm.engine.noise import log_exponentials
from genarm.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Place:
    """One position to sample at.

    Attributes:
        sampling: the request's settings.
        counts: how often the reply has each token so far.
        prompt: the tokens of its prompt, where there is a repetition penalty.
        banned: tokens that must not come here.
    """

    sampling: Sampling
    counts: Mapping[int, int] = field(default_factory=Counter)
    prompt: Collection[int] = ()
    banned: Collection[int] = ()


_COLD = 1e-6
_MOST = 1e37
"""Temperatures beyond this, or below its reciprocal, are no float32 numbers; they change nothing any more."""


def shape(log_probs_PV: Tensor, places: Sequence[Place]) -> Tensor:
    """Steps 2 to 6: the distribution that is sampled from.

    Args:
        log_probs_PV: combined, float32; left as it is.
        places: one per position.

    Returns:
        Normalised float32 log-probs [P, V], −inf where a token is cut. At temperature 0 the most likely token
        has everything.
    """
    settings = [place.sampling for place in places]
    if all(place.sampling.plain and not place.banned for place in places):
        return log_probs_PV
    device = log_probs_PV.device
    shaped_PV = _penalised(log_probs_PV, places)
    if any(s.temperature != 1 for s in settings):
        if any(0 < s.temperature < _COLD for s in settings):
            shaped_PV = shaped_PV - shaped_PV.amax(dim=-1, keepdim=True)  # the likeliest token must not become −inf
        divisors = [[min(max(s.temperature or 1.0, 1 / _MOST), _MOST)] for s in settings]
        shaped_PV = shaped_PV / torch.tensor(divisors, dtype=torch.float32).to(device)
    greedy = [i for i, s in enumerate(settings) if s.temperature == 0]
    if greedy:
        if shaped_PV is log_probs_PV:
            shaped_PV = log_probs_PV.clone()
        rows = torch.tensor(greedy, device=device)
        best_G = shaped_PV[rows].argmax(dim=-1)
        shaped_PV[rows] = -torch.inf
        shaped_PV[rows, best_G] = 0.0
    cut = [i for i, s in enumerate(settings) if s.cuts and s.temperature != 0]
    if cut:
        if shaped_PV is log_probs_PV:
            shaped_PV = log_probs_PV.clone()
        rows = torch.tensor(cut, device=device)
        shaped_PV[rows] = _truncated(shaped_PV[rows], [settings[i] for i in cut])
    return shaped_PV if len(greedy) == len(settings) else torch.log_softmax(shaped_PV, dim=-1)


def draw(shaped_PV: Tensor, settings: Sequence[Sampling], keys: Sequence[int]) -> Tensor:
    """Step 7: one token id per position, [P]; `keys` name the random numbers."""
    if all(s.temperature == 0 for s in settings):
        return shaped_PV.argmax(dim=-1)
    return (shaped_PV - log_exponentials(keys, shaped_PV.shape[-1], shaped_PV.device)).argmax(dim=-1)


def acceptance(target_PV: Tensor, draft_PV: Tensor, drafts_P: Tensor) -> Tensor:
    """min(1, p(d) / q(d)) for each drafted token d, [P]: how likely it may stay."""
    at_P1 = drafts_P[:, None]
    return (target_PV.gather(-1, at_P1) - draft_PV.gather(-1, at_P1))[:, 0].exp().clamp_(max=1.0)


def residual(target_PV: Tensor, draft_PV: Tensor) -> Tensor:
    """Log of the normalised max(p − q, 0): where a rejected draft's replacement comes from."""
    rest_PV = (target_PV.exp() - draft_PV.exp()).clamp_(min=0.0)
    total_P1 = rest_PV.sum(dim=-1, keepdim=True)
    # p = q up to rounding leaves nothing over; a rejection is then itself a matter of rounding, and p is right.
    return torch.where(total_P1 > 0, (rest_PV / total_P1).log(), target_PV)


def _penalised(log_probs_PV: Tensor, places: Sequence[Place]) -> Tensor:
    """Step 2: biases, then the repetition penalty of transformers, OpenAI's penalties, and what is banned."""
    penalised_PV = _added(log_probs_PV, [place.sampling.logit_bias for place in places])
    penalised_PV = _repeated(penalised_PV, places)
    penalised_PV = _added(penalised_PV, [_openai_penalties(place) for place in places])
    return _added(penalised_PV, [dict.fromkeys(place.banned, -torch.inf) for place in places])


def _openai_penalties(place: Place) -> Mapping[int, float]:
    """−presence·[seen] − frequency·count, of generated tokens."""
    presence, frequency = place.sampling.presence_penalty, place.sampling.frequency_penalty
    if not (presence or frequency):
        return {}
    return {token: -presence - frequency * count for token, count in place.counts.items()}


def _added(log_probs_PV: Tensor, changes: Sequence[Mapping[int, float]]) -> Tensor:
    """A mapping of changes for each position, added."""
    rows = [row for row, change in enumerate(changes) for _ in change]
    if not rows:
        return log_probs_PV
    device = log_probs_PV.device
    ids = torch.tensor([token for change in changes for token in change], device=device)
    values = torch.tensor([value for change in changes for value in change.values()], device=device)
    where = (torch.tensor(rows, device=device), ids)
    return log_probs_PV.index_put(where, values.float(), accumulate=True)


def _repeated(log_probs_PV: Tensor, places: Sequence[Place]) -> Tensor:
    """The repetition penalty, of tokens of prompt and reply; a prompt may have ids that are never said."""
    size, device = log_probs_PV.shape[-1], log_probs_PV.device
    rows: list[int] = []
    ids: list[int] = []
    for row, place in enumerate(places):
        if place.sampling.repetition_penalty != 1:
            seen = [token for token in {*place.prompt, *place.counts} if token < size]
            rows += [row] * len(seen)
            ids += seen
    if not rows:
        return log_probs_PV
    where = (torch.tensor(rows, device=device), torch.tensor(ids, device=device))
    penalties = torch.tensor([place.sampling.repetition_penalty for place in places], device=device)[where[0]]
    found = log_probs_PV[where]
    return log_probs_PV.index_put(where, torch.where(found < 0, found * penalties, found / penalties))


def _truncated(logits_PV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Steps 4 to 6, with −inf where a token is cut; each cut looks at what the one before left."""
    device = logits_PV.device
    size = logits_PV.shape[-1]
    sorted_PV, order_PV = logits_PV.sort(dim=-1, descending=True, stable=True)
    top_k_P1 = torch.tensor([[min(s.top_k or size, size)] for s in settings]).to(device)
    top_p_P1 = torch.tensor([[s.top_p] for s in settings], dtype=torch.float32).to(device)
    min_p_P1 = torch.tensor([[s.min_p] for s in settings], dtype=torch.float32).to(device)
    last_P1 = sorted_PV.gather(-1, top_k_P1 - 1)
    sorted_PV = sorted_PV.masked_fill(sorted_PV < last_P1, -torch.inf)
    probs_PV = torch.softmax(sorted_PV, dim=-1)
    before_PV = probs_PV.cumsum(dim=-1) - probs_PV
    beyond_PV = (before_PV >= top_p_P1) & (top_p_P1 < 1)
    unlikely_PV = probs_PV < min_p_P1 * probs_PV[:, :1]
    beyond_PV[:, 0] = False
    sorted_PV = sorted_PV.masked_fill(beyond_PV | unlikely_PV, -torch.inf)
    return torch.empty_like(logits_PV).scatter_(-1, order_PV, sorted_PV)
