"""One cache made of a cache per member."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from genarm.errors import UnsupportedError


class GuidedCache(Cache):
    """The key-value caches of the base and of the rewards that are in use, under the members' names.

    To `generate` it is one cache: `layers` lists the layers of all members, so that everything transformers does
    layer by layer (reorder for beams, crop for assisted decoding, select, repeat, reset) reaches every member.
    A reward whose weight is 0 is not run and has no entry; it cannot join later, because the tokens it did not
    see are gone.

    A member with a wish reads a longer prompt than the others: `extra` says by how many tokens.
    """

    def __init__(self, members: dict[str, Cache] | None = None, extra: Mapping[str, int] | None = None) -> None:
        # No super().__init__(): it would assign `layers`, which is computed here because a member's cache may
        # grow its own layers at the first forward.
        self.members: dict[str, Cache] = {} if members is None else members
        self.extra: dict[str, int] = dict(extra or {})
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """Layers of every member, base first."""
        return [layer for cache in self.members.values() for layer in cache.layers]

    @property
    def is_compileable(self) -> bool:
        """False: each member makes its own attention mask, so `generate` must not make one mask for all."""
        return False

    def member(self, name: str, model: PreTrainedModel, expected: int | None = None) -> Cache:
        """The cache of one member, made at its first use.

        Args:
            name: the member's.
            model: of the member.
            expected: how many tokens it should have seen; by default as many as the base.

        Raises:
            UnsupportedError: other members have already seen tokens that this one has not.
        """
        seen = self.get_seq_length()
        cache = self.members.get(name)
        if (seen if expected is None else expected) != (0 if cache is None else cache.get_seq_length()):
            raise UnsupportedError(
                f"reward {name!r} was not run for the {seen} tokens already in this cache (its weight was 0), so it "
                "cannot be switched on now; start from a new cache (past_key_values=None) with the new weights"
            )
        if cache is None:
            cache = self.members[name] = DynamicCache(config=model.config.get_text_config(decoder=True))
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of `input_ids` seen so far; members with a wish have seen `extra` ones beside them."""
        for cache in self.members.values():
            return int(cache.get_seq_length(layer_idx))
        return 0

    def crop(self, count: int) -> None:
        """As transformers', whose `count` is how many tokens to take away, or in older versions how many to keep."""
        for name, cache in self.members.items():
            cache.crop(count + self.extra.get(name, 0) if _KEEPS and count >= 0 else count)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Refused: a layer belongs to one member, and only that member's cache is updated."""
        raise UnsupportedError("a guided cache is updated through its members, never as a whole")


_KEEPS = "max_length" in inspect.signature(Cache.crop).parameters
