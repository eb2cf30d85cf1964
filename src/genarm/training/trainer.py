"""`ArmTrainer`: transformers' Trainer with the ARM loss, and evaluation by pair accuracy.

Shapes: B pairs, 2B sequences (chosen first), T positions, R response positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from genarm.data.tokens import TokenPair
from genarm.errors import GenarmError
from genarm.statistics import proportion
from genarm.training.collator import collate
from genarm.training.loss import arm_loss
from genarm.training.reader import WAYS, Batch, ModelReader, Way, sample
from genarm.training.responses import ResponseStates, summed, token_log_probs

# What the trainer adds to each entry of the log, beside the loss, as means over pairs since the last entry.
TRAIN_METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")

logger = logging.getLogger(__name__)


class CheckedTrainer(Trainer):
    """Stops a run whose loss is no number before that can spoil a checkpoint."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        check_loss(loss, self.state.global_step + 1)
        return loss


class PairTrainer(CheckedTrainer):
    """Learns from pairs, and is evaluated by their accuracy."""

    def rewards(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """r(x, y) of both responses of each pair: float32 [2, B], chosen then rejected."""
        raise NotImplementedError

    def lengths(self, batch: Batch) -> torch.Tensor:
        """Tokens of both responses of each pair [2, B]; the prompt may count as well: only differences matter."""
        raise NotImplementedError

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """(no loss, rewards [B, 2], lengths [B, 2]): `pair_metrics` makes every figure from these."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            rewards_B2 = self.rewards(model, batch).T.contiguous()
        return None, rewards_B2, self.lengths(batch).to(rewards_B2.device).T.contiguous()


class ArmTrainer(PairTrainer):
    """Trains a causal LM (or a PEFT adapter on one) as an autoregressive reward model.

    The loss is −log σ(β · (r(x, y⁺) − r(x, y⁻))) with r(x, y) = Σ_t log π(y_t | x, y_<t) (GenARM, section 4.2).
    Rewards and margins in the logs are in nats, not multiplied by β. `ways` are the ways to read pairs, of which a
    model's first one that is right is taken.
    """

    ways: Sequence[Way] = WAYS

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        beta: float,
        train_pairs: list[TokenPair],
        eval_pairs: list[TokenPair] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.beta = beta
        self._readers: WeakKeyDictionary[nn.Module, ModelReader] = WeakKeyDictionary()
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs or None,
            compute_metrics=self._pair_metrics,
            callbacks=callbacks,
        )
        # Our loss is a mean over the pairs of a batch, so the Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._bf16_autocast = self.accelerator.native_amp and args.bf16
        if self._bf16_autocast:
            # accelerate would turn the logits into a float32 copy as they leave the model: we enter autocast
            # ourselves (below), and the loss reads them as they are.
            self.accelerator.native_amp = False
        self._sums = torch.zeros(len(TRAIN_METRICS) + 2, dtype=torch.float64)
        self._clock = time.perf_counter()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """bfloat16 for the matrix products of the forward; weights, loss and gradients stay float32."""
        return torch.autocast(
            self.args.device.type, torch.bfloat16, enabled=self._bf16_autocast, cache_enabled=cache_enabled
        )

    def check_reading(self) -> list[str]:
        """Find out how the model can read pairs, before it is trained; returns what there is to say of it.

        Raises:
            MemberError: what the model says of a text depends on the texts beside it.
        """
        model: Any = self.model
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return []  # the weights are not there yet: it is found out in the first forward
        with self.compute_loss_context_manager():
            return self._read_by(model, model)[1]

    def rewards(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """r(x, y) of both responses of each pair: float32 [2, B], chosen then rejected."""
        states = self.states(model, batch)
        return summed(token_log_probs(states), states).view(2, -1)

    def lengths(self, batch: Batch) -> torch.Tensor:
        """Tokens of both responses of each pair: [2, B]."""
        return torch.tensor(batch["lengths"]).T[1:]

    def states(self, model: nn.Module, batch: Batch) -> ResponseStates:
        """What `model` says before each token of the responses of `batch`.

        Any causal LM will do (a frozen base, a reference, the trained model with its adapter switched off): the
        positions are the same for all, and in the same order.
        """
        reader, notes = self._read_by(self.accelerator.unwrap_model(model), model)
        for note in notes:
            logger.warning(note)
        return reader.states(model, batch)

    def _read_by(self, plain: nn.Module, model: nn.Module) -> tuple[ModelReader, list[str]]:
        """The reader of a model, and what there is to say of it the first time."""
        if plain in self._readers:
            return self._readers[plain], []
        # An output layer whose weights are in pieces can be called in the whole model's forward alone.
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        reader = ModelReader(plain, [way for way in self.ways if whole or not way.split])
        data: Any = self.train_dataset
        notes = reader.check(model, self._prepare_inputs(collate(sample(data))))
        self._readers[plain] = reader
        return reader, notes

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; models are left with the attention that they came with."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for reader in self._readers.values():
                reader.leave()

    def loss(self, chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
        """The loss of B pairs, a scalar, from the rewards of their responses."""
        return arm_loss(chosen_B, rejected_B, self.beta)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The ARM loss of one batch of pairs; see `transformers.Trainer.compute_loss`."""
        chosen_B, rejected_B = self.rewards(model, inputs)
        loss = self.loss(chosen_B, rejected_B)
        if model.training:
            self._add_to_sums(chosen_B.detach(), rejected_B.detach(), inputs["input_ids"].numel())
        return (loss, {"rewards": torch.stack([chosen_B, rejected_B])}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy, margin, rewards and tokens/s to the entries of the training loss."""
        check_numbers(logs, self.state.global_step)
        if "loss" in logs:
            logs.update(self._drain_sums())
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class, with the time it takes kept out of the training's tokens/s."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._clock += time.perf_counter() - start
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The Trainer takes a step for the best only if its folder is there, and with FSDP makes the folder after that.
        (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}").mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    def _add_to_sums(self, chosen_B: torch.Tensor, rejected_B: torch.Tensor, tokens: int) -> None:
        pairs = torch.ones_like(chosen_B)
        per_pair = torch.stack([chosen_B > rejected_B, chosen_B - rejected_B, chosen_B, rejected_B, pairs])
        sums = torch.cat([per_pair.double().sum(-1), per_pair.new_tensor([tokens], dtype=torch.float64)])
        self._sums = self._sums.to(sums.device) + sums

    def _drain_sums(self) -> dict[str, float]:
        *sums, pairs, tokens = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._sums = torch.zeros_like(self._sums)
        means = {name: value / pairs for name, value in zip(TRAIN_METRICS, sums, strict=True)} if pairs else {}
        return {**means, "tokens_per_second": tokens / seconds}

    def _pair_metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        return pair_metrics(np.asarray(evaluation.predictions), np.asarray(evaluation.label_ids), beta=self.beta)


def pair_metrics(rewards_B2: np.ndarray, lengths_B2: np.ndarray, *, beta: float) -> dict[str, float]:
    """Loss, margin and accuracy of B held-out pairs, from rewards and response lengths (chosen, rejected).

    A pair counts as right when its chosen response has the higher reward (a tie is wrong). Accuracies come with
    their 95% Wilson interval, over all pairs and over those whose chosen response is the longer, the shorter or as
    long: summed log-probabilities favour short responses, and the split shows by how much.
    """
    margin_B = (rewards_B2[:, 0] - rewards_B2[:, 1]).astype(np.float64)
    difference_B = lengths_B2[:, 0] - lengths_B2[:, 1]
    with np.errstate(invalid="ignore"):  # a model of NaNs is refused by name, when this is logged
        loss_B = np.logaddexp(0.0, -beta * margin_B)
    metrics = {
        "loss": float(loss_B.mean()),
        "margin": float(margin_B.mean()),
        "chosen_reward": float(rewards_B2[:, 0].mean()),
        "rejected_reward": float(rewards_B2[:, 1].mean()),
    }
    groups = {
        "": np.ones_like(difference_B, dtype=bool),
        "_chosen_longer": difference_B > 0,
        "_rejected_longer": difference_B < 0,
        "_equal_length": difference_B == 0,
    }
    for suffix, group_B in groups.items():
        n = int(group_B.sum())
        metrics[f"pairs{suffix}"] = n
        if n:
            accuracy = proportion(int((margin_B[group_B] > 0).sum()), n)
            metrics[f"accuracy{suffix}"] = accuracy.rate
            metrics[f"accuracy{suffix}_low"] = accuracy.low
            metrics[f"accuracy{suffix}_high"] = accuracy.high
    return metrics


def check_loss(loss: torch.Tensor, step: int) -> None:
    """Stop a run whose loss is no number.

    Raises:
        GenarmError: training has diverged.
    """
    if not torch.isfinite(loss):
        raise _diverged("loss", float(loss), step)


def check_numbers(logs: Mapping[str, float], step: int) -> None:
    """Stop a run with an entry of the log that is no number.

    Raises:
        GenarmError: training has diverged, or the model was broken before it.
    """
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm"), ("eval_loss", "held-out loss")):
        if not math.isfinite(logs.get(name, 0.0)):
            raise _diverged(words, logs[name], step)


def _diverged(what: str, value: float, step: int) -> GenarmError:
    if step == 0:
        return GenarmError(f"the {what} is {value} before the first step: the weights of the model are broken")
    return GenarmError(
        f"the {what} is {value} at step {step}: training has diverged; try a lower --learning-rate or --beta, "
        "a longer --warmup, or --max-grad-norm 1"
    )
