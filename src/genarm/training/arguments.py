"""The Trainer's arguments, in transformers' words: one set for every kind of training."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from accelerate import PartialState
from transformers import TrainingArguments

from genarm.training.config import TrainConfig
from genarm.training.output import RunFolder

# Checkpoints of a run, and entries in its log, where the user does not say.
CHECKPOINTS = 5
LOG_ENTRIES = 200

# A number of steps that no run has: what is done so often is done at the end alone.
NEVER = 1 << 40

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def one_gpu_each(arguments: Arguments) -> Arguments:
    """`arguments` with one GPU for this process, however many there are.

    Of several, transformers would make one model each and split every tensor of a batch along its first axis; that of
    packed tokens is of rows, and that of their places is of pairs.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def training_options(config: TrainConfig, folder: RunFolder, *, evaluations: int, resuming: bool) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments`, and of its subclasses in trl.

    `evaluations` are how many there are, where the user does not say: the first before the first step, if there are
    several, and the last at the end.
    """
    eval_steps = config.eval_steps or (1 / (evaluations - 1) if evaluations > 2 else NEVER)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Later versions of transformers call it activation checkpointing, and warn about the old name.
    checkpointing = "activation" if "activation_checkpointing" in known else "gradient"
    return {
        f"{checkpointing}_checkpointing": config.gradient_checkpointing,
        f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
        "output_dir": str(folder.checkpoints),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.resolved_learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": config.warmup,  # below 1: a share of the steps
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.bf16,
        "use_cpu": PartialState().device.type == "cpu",  # bfloat16 there must be asked for
        "seed": config.seed,
        "logging_steps": 1 / LOG_ENTRIES,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluations else "no",
        "eval_steps": eval_steps,
        "eval_on_start": evaluations > 1 and not resuming,
        "save_strategy": "steps",
        "save_steps": config.save_steps or config.eval_steps or 1 / CHECKPOINTS,
        "save_total_limit": 2,
        "load_best_model_at_end": config.early_stopping is not None,
        "metric_for_best_model": "eval_loss" if config.early_stopping is not None else None,
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": PartialState().device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
