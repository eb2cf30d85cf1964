"""`train`: a training run of any kind, an ARM's or that of what it is compared with."""

from __future__ import annotations

from rich.console import Console

from genarm.lab.training.trainers import require_trl
from genarm.training import run as arm
from genarm.training.config import TrainConfig
from genarm.training.data import load_pairs
from genarm.training.kinds import ARM
from genarm.training.run import Kind, TrainResult, run_training


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train what `config` says, a reward model or a policy; otherwise as `genarm.training.run.train`.

    Raises:
        GenarmError: any setting, data or model that does not serve; a loss that is not finite.
        MissingExtraError: a baseline without trl.
    """
    if config.kind == ARM:
        return arm.train(config, resume=resume, console=console)
    require_trl()
    return run_training(config, _kind(config), resume=resume, console=console)


def _kind(config: TrainConfig) -> Kind:
    """These modules import trl, so each is imported where it is asked for."""
    match config.kind:
        case "trajectory":
            from genarm.lab.training import trajectory

            if config.lora:
                return Kind(load=load_pairs, make_trainer=trajectory.make_trainer, save=trajectory.save_merged)
            return Kind(load=load_pairs, make_trainer=trajectory.make_trainer)
        case "dpo":
            from genarm.lab.training import dpo

            return Kind(load=load_pairs, make_trainer=dpo.make_trainer)
    from genarm.lab.training import prompts, rlhf

    return Kind(load=prompts.load_prompts, make_trainer=rlhf.make_trainer)
