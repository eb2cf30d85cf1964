"""Wishes: system texts that some members read before the prompt, and the prompts as they read them.

A wish is a reward in words: what a model says with a system text of its own, less what it says without. So one reply
follows prompts of several lengths, a prompt for each wish beside the one that everybody else reads.

Shapes: B rows, P columns of the prompts, C columns of the prompts as one wish reads them; rows are padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genarm.errors import ConfigError, DataError, UnsupportedError, WeightsError
from genarm.model.weights import is_finite_number
from genarm.text.prompts import Prompt, Reading, encode_prompt, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_wish(text: Any) -> None:
    """Raise ConfigError where `text` is nothing to wish for: it must be a text, and not an empty one."""
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"a wish is {text!r:.50}; it must be a text that says what is wanted, and not empty")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A wish that one request has.

    Attributes:
        text: the system text.
        weight: how much it counts: 1 is the base with that system text, below 0 the opposite is wished for.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_wish(self.text)
        if not is_finite_number(self.weight):
            raise WeightsError(f"the weight of a wish is {self.weight!r:.50}; it must be a finite number")


def with_wish(prompt: Prompt, text: str) -> Prompt:
    """`prompt` as the member reads it that has the wish.

    In a conversation the wish is the system message, or joins the one that is there, after an empty line; it stands
    before a text that is no conversation, likewise.
    """
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    first, rest = (prompt[0], prompt[1:]) if prompt and prompt[0]["role"] == "system" else (None, prompt)
    said = "" if first is None else text_of(first["content"])
    system = f"{said}\n\n{text}" if said else text
    return [{**(first or {"role": "system"}), "content": system}, *rest]


def encode_wishes(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    wishes: Mapping[str, str],
    reading: Reading,
    *,
    continued: bool | None = None,
) -> dict[str, list[int]]:
    """{name: token ids of `prompt` as that wish reads it}; the arguments and errors are those of `encode_prompt`."""
    return {
        name: encode_prompt(tokenizer, with_wish(prompt, text), reading, continued=continued)
        for name, text in wishes.items()
    }


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Prompts as the wishes of a guided model read them, beside the `input_ids` that everybody else reads.

    `GuidedForCausalLM.encode` makes them.

    Attributes:
        columns: P, how many columns of `input_ids` are prompts; what follows them is read by all.
        ids: {wish: token ids [B, C]}.
        masks: {wish: attention mask [B, C]}.
        wishes: {wish: system text} of those that this call has beyond the model's.
    """

    columns: int
    ids: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    wishes: Mapping[str, str] = field(default_factory=dict)

    def repeated(self, times: int) -> Contexts:
        """Each row `times` times, one after the other, as `generate` repeats prompts."""
        return replace(
            self,
            ids={name: ids.repeat_interleave(times, dim=0) for name, ids in self.ids.items()},
            masks={name: mask.repeat_interleave(times, dim=0) for name, mask in self.masks.items()},
        )

    def take(self, rows: Sequence[int]) -> Contexts:
        """These rows, in this order; a row may come several times."""
        return replace(
            self,
            ids={name: ids[list(rows)] for name, ids in self.ids.items()},
            masks={name: mask[list(rows)] for name, mask in self.masks.items()},
        )

    def extra(self, name: str) -> int:
        """How many columns more than everybody's prompts those of a wish have."""
        return self.ids[name].shape[1] - self.columns


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids and their attention mask [B, longest row], padded on the left, or on the right.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("there are no prompts; give at least one")
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        own = slice(width - len(row), None) if left else slice(len(row))
        ids[number, own], mask[number, own] = torch.tensor(row), 1
    return ids, mask


@dataclass(frozen=True, kw_only=True)
class WishedForward:
    """One forward in which wishes have a part: what they read, and which logits they have a say in.

    Up to the last token of the prompt there is nothing that wishes could have a say in: their prompts are others.

    Attributes:
        contexts: the prompts as the wishes read them.
        input_ids: [B, T], of which a cache holds `seen` tokens before.
        attention_mask: [B, seen + T], or None.
        kept: the columns of `input_ids` that logits are wanted for.
    """

    contexts: Contexts
    input_ids: Tensor
    attention_mask: Tensor | None
    seen: int
    kept: Sequence[int]

    def __post_init__(self) -> None:
        for name, ids in self.contexts.ids.items():
            if len(ids) != len(self.input_ids):
                raise UnsupportedError(
                    f"the contexts of {name!r} have {len(ids)} rows and input_ids {len(self.input_ids)}; make both "
                    "with one call of encode"
                )
        if self.attention_mask is not None and self.attention_mask.dim() != 2:
            raise UnsupportedError("a wish needs an attention mask [batch, time], or none")

    @property
    def before(self) -> list[int]:
        """Places among `kept` at which wishes say nothing."""
        return [i for i, column in enumerate(self.kept) if self.seen + column < self.contexts.columns - 1]

    @property
    def after(self) -> list[int]:
        """Places among `kept` at which they do: the prompt's last token and all that follow."""
        return [i for i, column in enumerate(self.kept) if self.seen + column >= self.contexts.columns - 1]

    @property
    def reads(self) -> bool:
        """Whether wishes read anything; not before all of the prompt is there."""
        return self.seen + self.input_ids.shape[1] >= self.contexts.columns

    def already(self, name: str) -> int:
        """How many tokens a wish has read before."""
        return 0 if self.seen < self.contexts.columns else self.seen + self.contexts.extra(name)

    def inputs(self, name: str) -> dict[str, Any]:
        """What a wish's member reads, as arguments of its forward."""
        prompt, mask = self.contexts.ids[name], self.contexts.masks[name]
        columns, device = self.contexts.columns, self.input_ids.device
        fresh = self.seen < columns
        ids = self.input_ids
        if fresh:
            ids = torch.cat([prompt.to(device), ids[:, columns - self.seen :]], dim=1)
        whole = self.seen + self.input_ids.shape[1]
        rest = mask.new_ones(len(ids), whole - columns) if self.attention_mask is None else self.attention_mask
        mask = torch.cat([mask.to(rest.device), rest[:, columns - whole :] if whole > columns else rest[:, :0]], dim=1)
        shift = self.contexts.extra(name) + self.seen if fresh else 0
        kept = [self.kept[i] + shift for i in self.after]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask)[:, -ids.shape[1] :],
            "logits_to_keep": torch.tensor(kept, device=device),
        }


def positions(attention_mask_BT: Tensor) -> Tensor:
    """Position of each token counted from the row's first real one; padding gets 0."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp_min(0)
