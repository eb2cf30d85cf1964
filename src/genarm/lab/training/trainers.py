"""What the baselines' trainers share, around those of trl.

A baseline's class has trl's trainer in the middle: `class X(PairBaseline, RewardTrainer, TranslatedLog)`. What stands
before trl's class goes ahead of it, what stands after it gets what it passes on: `TranslatedLog.log` sees the figures
that trl adds to the log, and writes down those that all kinds have in common.

Shapes: B sequences (of pairs: chosen ones, then rejected ones), T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, EvalPrediction, Trainer

from genarm.errors import ConfigError, GenarmError
from genarm.training.arguments import one_gpu_each
from genarm.training.config import TrainConfig
from genarm.training.kinds import Setup
from genarm.training.loading import adapter_config, load_weights
from genarm.training.loss import response_log_probs
from genarm.training.reader import Batch
from genarm.training.trainer import CheckedTrainer, PairTrainer, check_numbers, pair_metrics

Made = TypeVar("Made")


class Baseline(CheckedTrainer):
    """Goes ahead of a trainer of trl: no telemetry, no card of its own, and no step on a loss that is no number."""

    def _send_telemetry(self) -> None:
        """Tell nobody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run writes its own."""


class PairBaseline(PairTrainer, Baseline):
    """A baseline that learns from pairs."""

    beta: float

    def lengths(self, batch: Batch) -> torch.Tensor:
        """See `PairTrainer.lengths`."""
        mask_ST: torch.Tensor = batch["attention_mask"]
        return mask_ST.sum(-1).view(2, -1)


class TranslatedLog(Trainer):
    """Comes after a trainer of trl: its log in our words."""

    _clock: float | None = None
    _tokens = 0.0

    def translated(self, logs: Mapping[str, float]) -> dict[str, float]:
        """The figures of an entry of trl's log of the training, under our names."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep what all kinds log, and the translated figures."""
        check_numbers(logs, self.state.global_step)
        if "loss" in logs:
            kept: dict[str, float] = {n: logs[n] for n in ("loss", "grad_norm", "learning_rate") if n in logs}
            logs = {**kept, **self.translated(logs), **self._speed(logs["num_tokens"])}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, with the clock of tokens/s started."""
        self._clock = time.perf_counter()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class, with the time it takes kept out of the training's tokens/s."""
        start = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._clock = (self._clock or start) + time.perf_counter() - start
        return metrics

    def _speed(self, tokens: float) -> dict[str, float]:
        now = time.perf_counter()
        speed = (tokens - self._tokens) / (now - (self._clock or now - 1))
        self._clock, self._tokens = now, tokens
        return {"tokens_per_second": speed}


def pair_metrics_of(beta: float) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer whose predictions are rewards [B, 2] and whose labels are lengths [B, 2]."""

    def compute(evaluation: EvalPrediction) -> dict[str, float]:
        return pair_metrics(np.asarray(evaluation.predictions), np.asarray(evaluation.label_ids), beta=beta)

    return compute


def make(build: Callable[[], Made], config: TrainConfig) -> Made:
    """What `build` makes, with a refusal by trl or peft as one of ours.

    Raises:
        ConfigError: trl or peft do not take the settings.
    """
    try:
        return build()
    except GenarmError:
        raise
    except ValueError as error:
        targets = f"--lora-targets {config.lora_targets}: " if config.lora else ""
        raise ConfigError(f"--kind {config.kind} cannot be trained with these settings: {targets}{error}") from error


def make_policy(
    setup: Setup,
    trainer: Callable[..., Made],
    arguments: Callable[..., Any],
    dataset: Callable[[Sequence[Any]], Dataset],
    options: Mapping[str, Any],
    **more: Any,
) -> Made:
    """The trainer of a policy that is held near the model that it starts from, without dropout.

    Args:
        setup: settings, tokenizer, data and callbacks.
        trainer: its class.
        arguments: the class of its arguments, and `options`, those that it has beside all policies'.
        dataset: makes a data set of items.
        options: see `arguments`.
        more: of the trainer itself.

    Raises:
        GenarmError: the model or the settings do not serve.
    """
    config, data = setup.config, setup.data
    model = load_weights(config, setup.tokenizer, AutoModelForCausalLM)

    def build() -> Made:
        return trainer(
            model=model,
            args=one_gpu_each(
                arguments(
                    **setup.options,
                    **_reference_options(config),
                    beta=config.resolved_beta,
                    disable_dropout=True,
                    **options,
                )
            ),
            train_dataset=dataset(data.training),
            eval_dataset=dataset(data.held_out) if data.held_out else None,
            processing_class=copy.deepcopy(setup.tokenizer),  # trl may give it a padding token
            callbacks=setup.callbacks,
            peft_config=adapter_config(model, config, "CAUSAL_LM") if config.lora else None,
            **more,
        )

    made: Any = make(build, config)
    for parameter in made.model.parameters():  # float32 as for an ARM: trl makes them bfloat16 on 4-bit weights
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made


def _reference_options(config: TrainConfig) -> dict[str, Any]:
    """How trl is to load the frozen copy of a model whose weights are all trained, where it needs one."""
    revision = {"model_init_kwargs": {"revision": config.revision}} if config.revision and not config.lora else {}
    return {"trust_remote_code": config.trust_remote_code, **revision}


@contextmanager
def reference(trainer: Any) -> Iterator[nn.Module]:
    """The frozen model that a policy started from: its copy, or the policy with its adapter switched off."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    with policy.disable_adapter():
        yield policy


def sequence_log_probs(
    model: nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor, response_mask_BT: torch.Tensor
) -> torch.Tensor:
    """log π(response | prompt) of right-padded sequences that begin with a prompt: float32 [B]."""
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    # A prompt has one token at least, so nothing of a response wraps around.
    return response_log_probs(logits_BTV, ids_BT.roll(-1, dims=1), response_mask_BT.roll(-1, dims=1))
