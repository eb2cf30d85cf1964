"""The trainer of an ARM that has the effect of a wish.

Shapes: as in `trainers`; the two "responses of a pair" are two replies of the wished-for model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from genarm.training.collator import collate
from genarm.training.losses.replies import WishedReplies
from genarm.training.losses.through import divergence_from, guided_log_probs
from genarm.training.losses.trainers import ThroughTrainer, as_it_is
from genarm.training.responses import over_vocabulary, summed


def collate_wished(items: Sequence[WishedReplies]) -> dict[str, Any]:
    """A batch of replies after the prompt, and under "wished" after the prompt as the wish reads it."""
    return {**collate(items), "wished": collate([item.with_wish for item in items])}


class DistilTrainer(ThroughTrainer):
    """The loss is KL(wished-for policy ‖ guided policy), a mean over the tokens of replies of the former."""

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        """As `ThroughTrainer`."""
        super().__init__(model, *args, **options)
        self.data_collator = collate_wished

    def divergences(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(KL from the guided policy, KL from the base, tokens) of each sequence [S], the first two summed."""
        streams = self.streams(model, batch)
        wished = self.frozen_states(self.through.base, model, batch["wished"])
        states = streams.trained
        weight_S = self.weights(model, states.count // 2).repeat(2)
        given = dataclasses.replace(states, hidden_ND=weight_S[states.sequences_N, None], head=as_it_is)

        def target(weight_C1: Tensor, base_CV: Tensor, wished_CV: Tensor) -> Tensor:
            base_CV = base_CV.log_softmax(-1)
            return guided_log_probs(base_CV, wished_CV.log_softmax(-1) - base_CV, weight_C1, self.unknown_V)

        def guided(
            _: Tensor,
            own_CV: Tensor,
            weight_C1: Tensor,
            wished_CV: Tensor,
            base_CV: Tensor,
            start_CV: Tensor | None = None,
        ) -> Tensor:
            policy_CV = guided_log_probs(base_CV.log_softmax(-1), self.rho(own_CV, start_CV), weight_C1, self.unknown_V)
            return divergence_from(target(weight_C1, base_CV, wished_CV), policy_CV)

        def unguided(_: Tensor, base_CV: Tensor, weight_C1: Tensor, wished_CV: Tensor) -> Tensor:
            return divergence_from(target(weight_C1, base_CV, wished_CV), base_CV.log_softmax(-1))

        first, *others = streams.all
        values_N = over_vocabulary(guided, first, given, wished, *others)
        with torch.no_grad():
            base_N = over_vocabulary(unguided, streams.base, given, wished) if not model.training else values_N.detach()
        return summed(values_N, states), summed(base_N, states), summed(torch.ones_like(base_N), states)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The divergence of one batch, nats per token; see `transformers.Trainer.compute_loss`."""
        sums_S, _, tokens_S = self.divergences(model, inputs)
        loss = sums_S.sum() / tokens_S.sum()
        if model.training:
            none = sums_S[:0].detach()  # there are no pairs
            self._add_to_sums(none, none, inputs["input_ids"].numel())
        return (loss, {"divergence": sums_S}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """(no loss, summed divergences [B, 2] of the guided policy and of the base, tokens [B])."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            guided_S, base_S, tokens_S = self.divergences(model, batch)
        per_item = [values_S.view(2, -1).sum(0) for values_S in (guided_S, base_S, tokens_S)]
        return None, torch.stack(per_item[:2], dim=1), per_item[2]

    def _pair_metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        sums_B2, tokens = np.asarray(evaluation.predictions), float(np.asarray(evaluation.label_ids).sum())
        guided, base = (sums_B2.sum(0, dtype=np.float64) / tokens).tolist()
        return {"loss": guided, "kl_base": base, "tokens": tokens}
