"""Vocabularies of two members, aligned by token string.

The base decides what an id means. A reward may be combined with it when every token that both know has the same
id. What may differ: special and added tokens that only one of them has, and rows of an output layer that stand
for no token (padding to a round size). Those ids are listed as *unknown* to the reward: it cannot judge them, so
they are never produced while its weight is not 0. In a prompt it reads such an id as whatever its own embedding has
there, and as id 0 where that ends before; `compose` says so. Any other difference is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genarm.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 3  # differing tokens named in a message


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the ids of one member mean.

    `size` counts the rows of the output layer; `tokens` maps id to string (None: no tokenizer was found);
    `added` are ids of special and added tokens; `eos` ends a response.
    """

    label: str
    size: int
    tokens: Mapping[int, str] | None
    added: frozenset[int] = frozenset()
    eos: int | None = None


def embedding_rows(model: PreTrainedModel) -> int:
    """How many ids a model can read, which need not be as many as it can say."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def readable(ids: Tensor, rows: int) -> Tensor:
    """Ids that an embedding of `rows` rows can look up: those past its end (the base's own tokens, say) become 0."""
    return ids.masked_fill(ids >= rows, 0)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a reward's ids relate to the base's: ids in `unknown` cannot be judged by the reward."""

    base_size: int
    reward_size: int
    unknown: tuple[int, ...] = ()

    def mask(self) -> Tensor | None:
        """Bool [V_base], true where the reward cannot judge; None where it can judge everything."""
        if not self.unknown:
            return None
        mask_V = torch.zeros(self.base_size, dtype=torch.bool)
        mask_V[list(self.unknown)] = True
        return mask_V

    def fit(self, log_probs_BTV: Tensor) -> Tensor:
        """A reward's log-probs cut or zero-padded to the base's ids; `mask` says which of them count."""
        if self.reward_size >= self.base_size:
            return log_probs_BTV[..., : self.base_size]
        return torch.nn.functional.pad(log_probs_BTV, (0, self.base_size - self.reward_size))


def read_vocabulary(tokenizer: PreTrainedTokenizerBase | None, *, size: int, label: str) -> Vocabulary:
    """The vocabulary of a member whose output layer has `size` rows."""
    if tokenizer is None:
        return Vocabulary(label=label, size=size, tokens=None)
    added = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    return Vocabulary(label=label, size=size, tokens=tokens, added=added, eos=tokenizer.eos_token_id)


def align(base: Vocabulary, reward: Vocabulary) -> Alignment:
    """Compare two vocabularies token by token.

    Raises:
        VocabularyError: a token both know has two ids, one of them has an ordinary token that the other lacks,
            the base's EOS is unknown to the reward, or sizes differ and there is no tokenizer to align by.
    """
    if base.tokens is None or reward.tokens is None:
        if base.size != reward.size:
            raise VocabularyError(
                f"{base.label} has {base.size} token ids and {reward.label} has {reward.size}, and without both "
                "tokenizers they cannot be aligned by token; put the tokenizer files beside each model"
            )
        return Alignment(base_size=base.size, reward_size=reward.size)
    unknown = tuple(i for i in range(base.size) if i >= reward.size or base.tokens.get(i) != reward.tokens.get(i))
    _refuse_real_differences(base, reward, unknown)
    return Alignment(base_size=base.size, reward_size=reward.size, unknown=unknown)


def _refuse_real_differences(base: Vocabulary, reward: Vocabulary, unknown: tuple[int, ...]) -> None:
    assert base.tokens is not None
    assert reward.tokens is not None
    reward_ids = {token: i for i, token in reward.tokens.items()}
    moved = [i for i, token in base.tokens.items() if reward_ids.get(token, i) != i]
    only_base = [i for i in unknown if i in base.tokens and i not in base.added]
    only_reward = [i for i, token in reward.tokens.items() if i not in reward.added and base.tokens.get(i) != token]
    wrong = sorted({*moved, *only_base, *only_reward})
    if wrong:
        raise VocabularyError(
            f"{base.label} and {reward.label} have different vocabularies ({len(wrong)} ids differ): "
            f"{_describe(base, reward, wrong)}; a reward must be trained with the base's tokenizer"
        )
    if base.eos is not None and base.eos in unknown:
        raise VocabularyError(
            f"{reward.label} does not know the token that ends a response of {base.label} "
            f"({_describe(base, reward, [base.eos])}); train the reward with the base's tokenizer"
        )


def _describe(base: Vocabulary, reward: Vocabulary, ids: list[int]) -> str:
    assert base.tokens is not None
    assert reward.tokens is not None
    shown = [f"id {i} is {base.tokens.get(i)!r} against {reward.tokens.get(i)!r}" for i in ids[:_SHOWN]]
    return ", ".join(shown)


def unknown_tokens(alignment: Alignment, base: Vocabulary) -> list[str]:
    """The base's tokens (padding rows left out) that the reward cannot judge, for a report."""
    tokens = base.tokens or {}
    return [tokens[i] for i in alignment.unknown if i in tokens]


def unknown_note(label: str, tokens: Sequence[str]) -> str:
    """What a user should know of a reward that does not know some of the base's special tokens."""
    return (
        f"{label} does not know {len(tokens)} of the base's special tokens ({shown(tokens)}): they are never produced "
        "while its weight is not 0, and in a prompt it reads another token in their place"
    )


def shown(tokens: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(map(repr, tokens[:5])) + (" …" if len(tokens) > 5 else "")
