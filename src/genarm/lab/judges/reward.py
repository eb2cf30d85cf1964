"""A classic reward model as the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from genarm.errors import MemberError
from genarm.lab.judges.interface import Item, Kind, RunModels, Scorer, ScorerOptions
from genarm.provenance import Record, model_record
from genarm.text.prompts import encode_pair, end_ids

if TYPE_CHECKING:
    from genarm.lab.trajectory import TrajectoryReward


@dataclass(frozen=True, kw_only=True)
class RewardScorer(Scorer):
    """Scores with a trajectory reward model, which reads prompt and response through its own tokenizer."""

    reference: str
    dtype: str
    device: str

    @property
    def record(self) -> dict[str, Any]:
        """The model and its precision."""
        return {"kind": "reward", "reward": model_record(self.reference), "dtype": self.dtype}

    @cached_property
    def _model(self) -> TrajectoryReward:
        from genarm.lab.trajectory import TrajectoryReward

        return TrajectoryReward.load(self.reference, dtype=self.dtype, device=self.device)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises DataError where the model's chat template refuses a conversation."""
        tokenizer = self._model.tokenizer
        ends = end_ids(None, tokenizer)
        encoded = [encode_pair(tokenizer, item.prompt, item.response, ends=ends) for item in items]
        prompts, replies = [ids for ids, _ in encoded], [ids for _, ids in encoded]
        return list(self._model.score(prompts, replies))


def _reward_scorer(reference: str, options: ScorerOptions) -> RewardScorer:
    from genarm.model.references import find_device, open_files

    files = open_files(reference)
    if not any("SequenceClassification" in name for name in files.config.architectures or ()):
        raise MemberError(
            f"{reference} is no trajectory reward model; give one that genarm train --kind trajectory has made"
        )
    return RewardScorer(reference=files.reference, dtype=options.dtype, device=find_device(options.device))


@dataclass(frozen=True, kw_only=True)
class RunScorer(Scorer):
    """Scores the ids that a comparison's methods read and drew, with a model of the run."""

    reference: str
    models: RunModels

    @property
    def record(self) -> Record:
        """The model."""
        return self.models.record(self.reference)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """r(x, y)."""
        ids = [item.ids for item in items if item.ids is not None]
        return list(self.models.reward(self.reference).score([x for x, _ in ids], [y for _, y in ids]))


KIND = Kind(
    name="reward",
    about="scores a reply by a classic reward model",
    form="FOLDER",
    scorer=_reward_scorer,
    scorer_of_run=lambda reference, models: RunScorer(reference=reference, models=models),
)
