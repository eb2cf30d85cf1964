"""Trainers whose rewards are measured beside frozen models: the model as it starts, and a base that shall be guided.

Shapes: B pairs, S = 2B sequences (chosen first), N positions that predict a token of a response, C of them in a chunk,
V ids of the base's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from genarm.training.losses.frozen import Frozen, Through
from genarm.training.losses.through import guided_rewards, reward_log_probs
from genarm.training.reader import Batch
from genarm.training.responses import ResponseStates, over_vocabulary, summed, token_log_probs
from genarm.training.trainer import ArmTrainer, pair_metrics


class AnchoredTrainer(ArmTrainer):
    """An `ArmTrainer` with frozen models beside the one that it trains."""

    def __init__(self, model: Any, *args: Any, start: Frozen | None, **options: Any) -> None:
        """As `ArmTrainer`; `start` is the model as it starts, where the reward is a difference to it."""
        if start is not None:
            _without_dropout(model)
        self.start = start
        super().__init__(model, *args, **options)
        self.place(start)

    def place(self, frozen: Frozen | None) -> None:
        """Put a frozen model beside the trained one."""
        if frozen is not None and frozen.model is not None:
            frozen.model.to(self.args.device)  # type: ignore[arg-type]

    @property
    def frozen(self) -> list[Frozen]:
        """The models beside the trained one."""
        return [] if self.start is None else [self.start]

    def check_reading(self) -> list[str]:
        """As the base class, of the frozen models as well."""
        notes = super().check_reading()
        with self.compute_loss_context_manager():
            for model in (one.model for one in self.frozen if one.model is not None):
                notes += self._read_by(model, model)[1]
        return list(dict.fromkeys(notes))

    @torch.no_grad()
    def frozen_states(
        self, frozen: Frozen, trained: nn.Module, batch: Batch, beside: ResponseStates | None = None
    ) -> ResponseStates:
        """What a frozen model says before each token of the responses of `batch`.

        `beside` is what the trained model says of it, if that is known: the hidden states may be the same.
        """
        plain = self.accelerator.unwrap_model(trained)
        states = beside if frozen.is_below_head(plain) else None
        if states is not None and not isinstance(states.head, nn.Identity):
            return dataclasses.replace(states, head=partial(_head_of, frozen, plain, states.head))
        with frozen.running(plain) as model:
            states = self.states(model, batch)
        if frozen.adapted_head(plain) and not isinstance(states.head, nn.Identity):
            states = dataclasses.replace(states, head=partial(_head_of, frozen, plain, states.head))
        return states


class ReferenceTrainer(AnchoredTrainer):
    """The reward is log π − log π_start, which is 0 at the start."""

    def rewards(self, model: nn.Module, batch: Batch) -> Tensor:
        """r(x, y) of both responses of each pair: float32 [2, B], chosen then rejected."""
        assert self.start is not None
        states = self.states(model, batch)
        return differences(states, self.frozen_states(self.start, model, batch, states)).view(2, -1)


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What the trained model, the base and, for a difference, the start say of one batch."""

    trained: ResponseStates
    base: ResponseStates
    start: ResponseStates | None

    @property
    def all(self) -> list[ResponseStates]:
        """Those that there are, in this order."""
        return [one for one in (self.trained, self.base, self.start) if one is not None]


class ThroughTrainer(AnchoredTrainer):
    """Has the guided policy π_b · ρ^w / Z in its loss, ρ = π_r or π_r/π_r0."""

    def __init__(self, model: Any, *args: Any, through: Through, **options: Any) -> None:
        """As `AnchoredTrainer`, and what it is trained through."""
        super().__init__(model, *args, **options)
        self.through = through
        self.place(through.base)
        mask_V = None if through.alignment is None else through.alignment.mask()
        self.unknown_V = None if mask_V is None else mask_V.to(self.args.device)

    @property
    def frozen(self) -> list[Frozen]:
        """The models beside the trained one."""
        return [*super().frozen, self.through.base]

    def streams(self, model: nn.Module, batch: Batch) -> Streams:
        """One forward of each model."""
        trained = self.states(model, batch)
        base = self.frozen_states(self.through.base, model, batch, trained)
        start = None
        if self.start is not None:
            start = base if self.start is self.through.base else self.frozen_states(self.start, model, batch, trained)
        return Streams(trained=trained, base=base, start=start)

    def rho(self, own_CV: Tensor, start_CV: Tensor | None) -> Tensor:
        """log ρ over the base's ids [C, V]."""
        found_CV = reward_log_probs(own_CV, start_CV)
        return found_CV if self.through.alignment is None else self.through.alignment.fit(found_CV)

    def weights(self, model: nn.Module, count: int) -> Tensor:
        """A weight for each of `count` pairs: drawn from the range in training, its middle in an evaluation."""
        low, high = self.through.low, self.through.high
        if not model.training or low == high:
            return torch.full((count,), (low + high) / 2, device=self.args.device)
        return torch.empty(count).uniform_(low, high).to(self.args.device)  # torch's state is resumed with the run


class ProductTrainer(ThroughTrainer):
    """The reward is what the guided policy says more than the base, over the weight: log ρ − log Z / w."""

    def rewards(self, model: nn.Module, batch: Batch) -> Tensor:
        """r(x, y) of both responses of each pair: float32 [2, B], chosen then rejected."""
        return self.guided(self.streams(model, batch), model)

    def guided(self, streams: Streams, model: nn.Module) -> Tensor:
        """Of `rewards`, from what the models say."""
        states = streams.trained
        weight_S = self.weights(model, states.count // 2).repeat(2)  # both responses of a pair at one weight
        given = dataclasses.replace(states, hidden_ND=weight_S[states.sequences_N, None], head=as_it_is)

        def values(
            labels_C: Tensor, own_CV: Tensor, weight_C1: Tensor, base_CV: Tensor, start_CV: Tensor | None = None
        ) -> Tensor:
            return guided_rewards(labels_C, base_CV, self.rho(own_CV, start_CV), weight_C1[:, 0], self.unknown_V)

        first, *others = streams.all
        return summed(over_vocabulary(values, first, given, *others), states).view(2, -1)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """(no loss, [B, 4]: of the guided policy, then of the ARM alone; lengths [B, 2])."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            streams = self.streams(model, batch)
            rewards_4B = torch.cat(
                [self.guided(streams, model), differences(streams.trained, streams.start).view(2, -1)]
            )
        return None, rewards_4B.T.contiguous(), self.lengths(batch).to(rewards_4B.device).T.contiguous()

    def _pair_metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        found_B4, lengths_B2 = np.asarray(evaluation.predictions), np.asarray(evaluation.label_ids)
        metrics = pair_metrics(found_B4[:, :2], lengths_B2, beta=self.beta)
        alone = pair_metrics(found_B4[:, 2:], lengths_B2, beta=self.beta)
        accuracy = {f"reward_{name}": value for name, value in alone.items() if name.startswith("accuracy")}
        return {**metrics, **accuracy}


def differences(trained: ResponseStates, start: ResponseStates | None) -> Tensor:
    """log π(y|x), less that of the start if there is one, of each sequence: float32 [S]."""
    values_N = token_log_probs(trained)
    if start is not None:
        with torch.no_grad():
            start_N = token_log_probs(start)
        values_N = values_N - start_N
    return summed(values_N, trained)


def _head_of(frozen: Frozen, trained: nn.Module, head: Callable[[Tensor], Tensor], hidden_CD: Tensor) -> Tensor:
    """The logits of a frozen model that shares the trained one's output layer, whatever adapts that: [C, V]."""
    with frozen.running(trained):
        return head(hidden_CD)


def as_it_is(hidden_ND: Tensor) -> Tensor:
    """A head for numbers that go along with positions."""
    return hidden_ND


def _without_dropout(model: nn.Module) -> None:
    """Switch the model's own dropout off: its start is read without, and the difference shall be of the weights."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
