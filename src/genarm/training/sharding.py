"""Weights in pieces over processes: PyTorch's FSDP, or DeepSpeed's ZeRO, through accelerate.

Whoever launches the processes chooses them (`accelerate launch --config_file recipes/accelerate/fsdp.yaml …`), not an
option of ours. What a run has to do about them is here, in the order in which it does.
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from safetensors import safe_open
from torch import nn
from transformers import Trainer

from genarm.errors import ConfigError, GenarmError
from genarm.training.config import TrainConfig
from genarm.training.kinds import kind_of

_FSDP, _DEEPSPEED = "FSDP", "DeepSpeed"


def check_launch(config: TrainConfig) -> None:
    """Refuse what the launcher asks for and this run cannot do, before the processes join.

    Raises:
        ConfigError: DeepSpeed is not installed, or the settings do not go with weights in pieces.
    """
    asked = _asked()
    if asked is None:
        return
    if asked == _DEEPSPEED and find_spec("deepspeed") is None:
        raise ConfigError("the launch asks for DeepSpeed, which is not installed: pip install deepspeed, or use FSDP")
    if not kind_of(config).split_weights:
        raise ConfigError(
            f"the launch asks for {asked}, which is for ARMs by the paper's loss, and the settings say "
            f"{f'--loss {config.loss}' if config.loss else f'--kind {config.kind}'}; "
            "launch with plain processes (accelerate launch --multi_gpu)"
        )
    if config.head:
        raise ConfigError(
            f"the launch asks for {asked}, and a head needs its output layer whole; leave out --head, or launch with "
            "plain processes (accelerate launch --multi_gpu)"
        )
    if config.load_in_4bit:
        raise ConfigError(
            f"the launch asks for {asked}, and 4-bit weights are not split; leave out --load-in-4bit, or launch with "
            "plain processes (accelerate launch --multi_gpu): each then holds all of them"
        )
    if asked == _FSDP and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        # accelerate 1.15 recomputes with other dropout (preserve_rng_state=False), and its wrapper changes the names
        # of layers, so that peft finds no adapter to save.
        raise ConfigError(
            "fsdp_activation_checkpointing in the launch's configuration spoils dropout and LoRA; set it to false and "
            "give --gradient-checkpointing, which does the same"
        )


def check_joined(process: PartialState) -> None:
    """Refuse processes that would not share the weights although they were asked to.

    accelerate splits weights over GPUs alone. Elsewhere it would silently give each process all of them.

    Raises:
        ConfigError: FSDP or DeepSpeed on CPUs, or without a launcher.
    """
    asked = _asked()
    if asked is None:
        return
    if process.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        raise ConfigError(
            f"the launch asks for {asked}, and accelerate splits weights only over GPUs that its launcher started "
            "processes for: every process here would hold them all; launch without it, or where there are GPUs"
        )


def sum_in_float32(trainer: Trainer) -> None:
    """Let FSDP add up gradients in float32 where it computes in bfloat16, as processes without it do."""
    plugin = _fsdp_plugin(trainer)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def prepare_to_load(trainer: Trainer) -> None:
    """Split the weights of a trainer that will not train, so that a checkpoint in pieces can be loaded into it.

    Raises:
        ConfigError: with DeepSpeed, whose checkpoints have the whole weights too.
    """
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "all steps are done and only the result is left to write, which DeepSpeed cannot do from a checkpoint; "
            "run this once with --resume and without accelerate launch"
        )
    if _fsdp_plugin(trainer) is not None:
        trainer.create_optimizer()  # accelerate prepares no model alone
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Write the weights as one model or adapter, however they are split; called by every process."""
    if _fsdp_plugin(trainer) is None:
        trainer.save_model(str(folder))
        return
    # `save_model` would write nothing where checkpoints are in pieces.
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        for name, source in getattr(model, "all_tied_weights_keys", {}).items():
            if name in weights and source in weights:
                weights[name] = weights[source]  # one tensor again, so that it is written once
        model.save_pretrained(folder, state_dict=weights)


def check_gathered(folder: Path) -> None:
    """Refuse a result without weights, which some ways of launching would leave.

    Raises:
        GenarmError: no weights in `folder`.
    """
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            if weights.keys():
                return
    raise GenarmError(
        "the weights were not gathered from the processes, so there is no result; the checkpoints are whole: with "
        "DeepSpeed, set zero3_save_16bit_model to true and give --resume"
    )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; DeepSpeed leaves its own count on those that it has taken apart."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def _asked() -> str | None:
    """What the launcher asks for, by accelerate's environment variables."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return _DEEPSPEED
    return _FSDP if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def _fsdp_plugin(trainer: Trainer) -> Any:
    return trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
