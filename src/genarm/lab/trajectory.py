"""Trajectory rewards: classic reward models, a scalar head on the last token of prompt and reply.

A score is read at the last token that is not padding by its id, as transformers and the training do. A reply may end
with that id (GPT-2 has one token for everything): then the token before it counts.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from genarm.errors import MemberError, VocabularyError
from genarm.lab.prefix import Counter, Ids, Prefix, batches, padded, uncounted
from genarm.model.contract import load_whole, refusing

# Tokens scored in one forward, padding included.
TOKENS = 1 << 14


def is_classifier(config: Any) -> bool:
    """Whether a model of this configuration gives a score, as a trajectory reward does, and no next token."""
    architectures = getattr(config, "architectures", None) or ()
    return any(name.endswith("ForSequenceClassification") for name in architectures)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrajectoryReward:
    """A frozen reward model.

    Attributes:
        model: an `AutoModelForSequenceClassification` with one label, a linear head `score` and a padding token.
        tokenizer: its own.
        label: what messages call it.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    label: str = "the reward model"

    def __post_init__(self) -> None:
        config = self.model.config.get_text_config()
        pad_id = config.pad_token_id
        head = getattr(self.model, "score", None)
        one_score = isinstance(head, nn.Linear) and head.out_features == 1
        if not one_score or pad_id is None or not 0 <= pad_id < self.rows:
            raise MemberError(
                f"{self.label} is no trajectory reward model with one score and a padding token; train one with "
                "genarm train --kind trajectory"
            )
        self.model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        reference: str,
        *,
        name: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
    ) -> TrajectoryReward:
        """Load a reward model.

        Args:
            reference: its folder, or a hub id.
            name: what messages call it.
            dtype: "auto" (the checkpoint's own), or another.
            device: a device map of transformers; None for the CPU.

        Raises:
            MemberError: there is no such model, or it is no trajectory reward model, whole and with finite weights.
        """
        label = f"the reward {name}" if name else "the reward model"
        with refusing(f"cannot load {label} from {reference}"):
            tokenizer = AutoTokenizer.from_pretrained(reference)
        try:
            model = load_whole(
                AutoModelForSequenceClassification, reference, what=label, dtype=dtype, device_map=device
            )
        except MemberError as error:
            raise MemberError(f"{error}; a trajectory reward comes from genarm train --kind trajectory") from error
        return cls(model=model, tokenizer=tokenizer, label=f"{label} in {reference}")

    @property
    def trunk(self) -> PreTrainedModel:
        """The model below the head."""
        trunk: PreTrainedModel = self.model.base_model
        return trunk

    @property
    def passes(self) -> int:
        """Forwards that a score takes."""
        return 1

    @property
    def pad_id(self) -> int:
        """The id that is not read."""
        return int(self.model.config.get_text_config().pad_token_id)

    @property
    def rows(self) -> int:
        """How many ids its embedding knows."""
        return int(self.model.get_input_embeddings().num_embeddings)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a policy with another vocabulary (raises VocabularyError)."""
        if self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise VocabularyError(
                f"{self.label} has other tokens than the policy; train it on a model of the same family"
            )

    @torch.no_grad()
    def score(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[float]:
        """r(x, y) of each reply to its prompt; end-of-turn tokens count as they are."""
        rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
        scores_B = torch.empty(len(rows))
        for part in batches([len(row) for row in rows], tokens=TOKENS):
            ids_BT = padded([rows[i] for i in part], self.pad_id, left=False).to(self.model.device)
            lengths_B1 = torch.tensor([[len(rows[i])] for i in part], device=ids_BT.device)
            mask_BT = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B1).long()
            logits = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            scores_B[part] = logits.squeeze(-1).float().cpu()
        return scores_B.tolist()

    def prefix(self, count: Counter = uncounted) -> ScoredPrefix:
        """Rows to be scored again and again as they grow, with a cache."""
        return ScoredPrefix(self, count)


class ScoredPrefix:
    """What a reward has read, a row for each prompt; `extend` with the prompts comes first."""

    def __init__(self, reward: TrajectoryReward, count: Counter) -> None:
        self._head = reward.model.score
        self._pad_id = reward.pad_id
        self._prefix = Prefix(reward.trunk, count=count)
        # The score before the last chunks and after each of their tokens, [B, T + 1], which `rewind` goes back to.
        self._scores_BT = torch.empty(0, 1)
        self._sizes: list[int] = []

    @property
    def scores(self) -> Tensor:
        """r of each row up to its end, float32 [B] on the CPU."""
        return self._scores_BT[:, -1]

    @torch.no_grad()
    def extend(self, chunks: Sequence[Ids]) -> Tensor:
        """Read one more chunk of tokens in each row; returns `scores`."""
        first = not self._prefix.lengths
        before_B = torch.zeros(len(chunks)) if first else self.scores
        hidden_BTD = self._prefix.extend(chunks).last_hidden_state
        scores_BT = self._head(hidden_BTD)[..., 0].float().cpu()
        ids_BT = padded(chunks, self._pad_id, left=first)
        # Where the token is padding by its id, the score is that of the last one before it that is not.
        counts_BT = F.pad(ids_BT != self._pad_id, (1, 0), value=True)
        sources_BT = torch.arange(counts_BT.shape[1]).where(counts_BT, 0).cummax(dim=1).values
        self._scores_BT = torch.cat([before_B[:, None], scores_BT], dim=1).gather(1, sources_BT)
        self._sizes = [0 if first else len(chunk) for chunk in chunks]
        return self.scores

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may come several times."""
        self._prefix.select(rows)
        self._scores_BT = self._scores_BT[torch.tensor(rows, dtype=torch.long)]
        self._sizes = [self._sizes[row] for row in rows]

    def fork(self, rows: Sequence[int]) -> ScoredPrefix:
        """These rows as a prefix of their own; this one stays as it is."""
        twin = copy.copy(self)
        twin._prefix = self._prefix.fork(range(len(self._prefix.lengths)))
        twin.select(rows)
        return twin

    def replace(self, rows: Sequence[int], other: ScoredPrefix) -> None:
        """Put the rows of `other` in the place of `rows`; the last chunks of all can no longer be taken back."""
        self._prefix.replace(rows, other._prefix)
        scores_B = self.scores.clone()
        scores_B[torch.tensor(rows, dtype=torch.long)] = other.scores
        self._scores_BT, self._sizes = scores_B[:, None], [0] * len(scores_B)

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget this many last tokens of each row, of its last chunk at the most."""
        if not any(counts):
            return
        assert all(count <= size for count, size in zip(counts, self._sizes, strict=True))
        self._prefix.rewind(counts)
        ends = [size - count for count, size in zip(counts, self._sizes, strict=True)]
        self._scores_BT = self._scores_BT.gather(1, torch.tensor(ends)[:, None])
        self._sizes = [0] * len(ends)
