"""Random numbers by name: each is a function of a request's seed, a position and a purpose, and of nothing else.

A request therefore draws the same numbers alone, in any company, in any order and on any device. Hashing takes the
place of a generator's state: a 32-bit mixer ("lowbias32") over the token ids, and again with the key.

Shapes: P positions, V ids of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is drawn for; two purposes at one position are independent."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2


def key(seed: int, position: int, purpose: Purpose) -> int:
    """A 64-bit key; seeds of any size are welcome."""
    digest = hashlib.blake2b(f"{seed}/{position}/{int(purpose)}".encode(), digest_size=8)
    return int.from_bytes(digest.digest())


def uniform(key: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (key >> 11) / (1 << 53)


def log_exponentials(keys: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    """Logarithms of independent standard exponential variates.

    Args:
        keys: one per position.
        size: V.
        device: where to compute them; the numbers are the same everywhere up to the last bits of `log`.

    Returns:
        Float32 [P, V]. With `log_probs_PV` normalised, argmax(log_probs − this) is distributed as the
        probabilities (an exponential race, the Gumbel-max trick in another guise).
    """
    keys_P1 = torch.tensor([_signed(k >> 32) for k in keys], dtype=torch.int32)[:, None].to(device, non_blocking=True)
    bits_PV = _mix(_mixed_ids(size, torch.device(device)) ^ keys_P1)
    # Small variates decide a race, so they must be exact: −log(1 − u) for u in (0, 1), never −log(u).
    u_PV = bits_PV.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    return u_PV.neg_().log1p_().neg_().log_()


@cache
def _mixed_ids(size: int, device: torch.device) -> Tensor:
    """[V] distinct 32-bit numbers without a pattern, one per token id."""
    return _mix(torch.arange(size, dtype=torch.int32, device=device))


def _mix(x: Tensor) -> Tensor:
    """In 32 bits, where multiplication wraps; `&` makes the shifts logical. `x` is left as it is."""
    x = x ^ (x >> 16).bitwise_and_(0xFFFF)
    x.mul_(_signed(0x7FEB352D))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(bits: int) -> int:
    """The int32 with these 32 bits."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits
