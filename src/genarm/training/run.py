"""`train`: one training run from settings to a finished folder.

In order: look at the output folder, fill in the settings, read and tokenise the data, load the model, train,
evaluate, write the result. Nothing is written before everything that can be refused has been.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from genarm.data.tokens import example_lines, report_table
from genarm.errors import ConfigError, MemberError
from genarm.files import check_output
from genarm.provenance import AT, Record, content_of, model_record
from genarm.terminal import PlainConsole
from genarm.training.arguments import training_options
from genarm.training.config import TrainConfig
from genarm.training.data import TrainData
from genarm.training.kinds import Kind, Setup, kind_of
from genarm.training.loading import load_tokenizer, resolve
from genarm.training.output import Checkpoint, RunFolder
from genarm.training.progress import ProgressDisplay
from genarm.training.report import RunReport, model_card, write_log, write_plots
from genarm.training.sharding import (
    check_gathered,
    check_joined,
    check_launch,
    parameter_counts,
    prepare_to_load,
    sum_in_float32,
)
from genarm.training.trainer import ArmTrainer

# What an entry of the training's log has beside figures of the weights.
_NO_FIGURES = frozenset({"grad_norm", "learning_rate", "epoch", "step", "tokens_per_second"})


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: its folder, its figures (as in metrics.json) and its number of optimizer steps."""

    output: Path
    metrics: dict[str, float]
    steps: int
    resumed_from: int | None = None


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train what `config` says, by default an autoregressive reward model, and write it to `config.output`.

    With `resume`, continue from the newest complete checkpoint there; the result has the same weights as that of a
    run that was never interrupted. A finished run is returned as it is.

    Raises:
        GenarmError: any setting, data or model that does not serve; a loss that is not finite.
        MissingExtraError: a kind of training whose trainer is not installed.
    """
    kind = kind_of(config)
    kind.require()
    check_launch(config)
    process = _join_processes()
    check_joined(process)
    console = _console(console, process)
    folder = RunFolder(path=Path(os.path.abspath(config.output)))
    if process.is_main_process:
        check_output(folder.path, folder=True)
    folder.check(resume=resume)
    config = resolve(config)
    folder.check_settings(config)
    tokenizer = load_tokenizer(config)
    data = kind.load(config, tokenizer)
    inputs = _inputs(config, kind, data)
    folder.check_inputs(inputs)
    finished = folder.metrics()
    if finished is not None:
        console.print(f"{folder.path} is finished already: nothing to resume", markup=False, soft_wrap=True)
        return TrainResult(output=folder.path, metrics=finished, steps=int(finished["steps"]))
    checkpoint = folder.newest_checkpoint(process.num_processes)
    if resume:
        console.print(_resume_message(folder.path, checkpoint), highlight=False, markup=False, soft_wrap=True)

    console.print(report_table(data.reports))
    for line in [f"{name}: {text}" for name, text in data.formats.items()]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in ["the first of training, as the model reads it:", *example_lines(tokenizer, data.training[0])]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for note in [*data.notes, *([kind.leak(data.leaked)] if data.leaked else [])]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    trainer = _make_trainer(config, kind, tokenizer, data, folder, console, resuming=checkpoint is not None)
    console.print(_model_line(config, trainer), highlight=False, markup=False, soft_wrap=True)
    if process.num_processes == 1 and process.device.type == "cuda" and (gpus := torch.cuda.device_count()) > 1:
        all_of_them = f"accelerate launch --num_processes {gpus} -m genarm train …"
        console.print(f"note: one of {gpus} GPUs is used; all are with: {all_of_them}", highlight=False, markup=False)

    if isinstance(trainer, ArmTrainer):
        try:
            for note in trainer.check_reading():
                console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        except MemberError:
            with suppress(OSError):  # the trainer has made its folder already; what is not empty stays
                Path(trainer.args.output_dir or "").rmdir()
                folder.path.rmdir()
            raise

    process.wait_for_everyone()  # nobody looks at the folder any more
    with folder.alone() if process.is_main_process else nullcontext():
        if process.is_main_process:
            folder.begin(config, inputs)
            kind.keep(config, data)
        seconds = _train(trainer, checkpoint)
        metrics = _final_metrics(trainer.state, seconds, best=config.early_stopping is not None)
        report = RunReport(
            config=config,
            formats=data.formats,
            data=data.reports,
            metrics=metrics,
            log=trainer.state.log_history,
        )
        _write_result(trainer, kind, tokenizer, folder, report)
        for line in kind.summary(metrics):
            console.print(line, highlight=False, markup=False)
        for line in [f"wrote {folder.path}", *kind.closing(config)]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return TrainResult(
            output=folder.path,
            metrics=metrics,
            steps=int(metrics["steps"]),
            resumed_from=checkpoint.step if checkpoint else None,
        )


def _inputs(config: TrainConfig, kind: Kind, data: TrainData[Any]) -> Record:
    """What the run starts and learns from, by content: tokens are compared, wherever they were read."""
    held_out = config.eval_data or config.data
    return {
        "model": model_record(config.model, config.revision),
        "rewards": kind.learns_from(config),
        "training data": {AT: config.data, "tokens": content_of(data.training)},
        "held-out data": {AT: held_out, "tokens": content_of(data.held_out or ())},
    }


def _join_processes() -> PartialState:
    """The state of this process among those of `accelerate launch` or `torchrun`, on CPUs as well.

    accelerate forms a group of CPU processes only when told that they are on CPUs.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def _console(console: Console | None, process: PartialState) -> Console:
    if not process.is_main_process:
        return Console(quiet=True)
    return console or PlainConsole(highlight=True)


def _resume_message(path: Path, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return f"no complete checkpoint in {path}: starting from the beginning"
    return f"resuming from step {checkpoint.step} ({checkpoint.path})"


def _make_trainer(
    config: TrainConfig,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainData[Any],
    folder: RunFolder,
    console: Console,
    *,
    resuming: bool,
) -> Trainer:
    callbacks: list[TrainerCallback] = [ProgressDisplay(console, kind), *_trackers(config.report_to)]
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))
    options = training_options(config, folder, evaluations=data.evaluations if data.held_out else 0, resuming=resuming)
    set_seed(config.seed)  # an adapter's first weights, or a head's, are drawn while the model is made
    trainer = kind.make_trainer(
        Setup(config=config, tokenizer=tokenizer, data=data, options=options, callbacks=callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    sum_in_float32(trainer)
    return trainer


def _trackers(report_to: str) -> list[TrainerCallback]:
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    try:
        return [tracker() for tracker in get_reporting_integration_callbacks(names)]
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--report-to {report_to}: {error}") from error


def _train(trainer: Trainer, checkpoint: Checkpoint | None) -> float:
    """Train to the end; returns the seconds that this session took for it."""
    if checkpoint is not None and checkpoint.finished:
        # The run was cut off while its result was being written. `train` would take one step too many here.
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        prepare_to_load(trainer)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        else:
            trainer._load_from_checkpoint(str(checkpoint.path))
        return 0.0
    display = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressDisplay))
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    finally:
        display.stop()
    return float(output.metrics["train_runtime"])


def _final_metrics(state: TrainerState, seconds: float, *, best: bool) -> dict[str, float]:
    """Figures of the final weights: those of the last step, or of the best one if `best`.

    Both have been evaluated on the way, so the log has them.
    """
    step = state.best_global_step if best and state.best_global_step else state.global_step
    metrics: dict[str, float] = {"steps": state.global_step, "weights_of_step": step, "train_seconds": seconds}
    for entry in state.log_history:
        if entry["step"] == step and "loss" in entry:
            metrics |= {f"train_{name}": value for name, value in entry.items() if name not in _NO_FIGURES}
        elif entry["step"] == step:
            metrics |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return metrics


def _write_result(
    trainer: Trainer, kind: Kind, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, report: RunReport
) -> None:
    """Gather the weights from the processes, and write them with all that is said about them."""
    process = PartialState()
    if process.is_main_process:
        folder.stage()
    process.wait_for_everyone()
    kind.save(report.config, trainer, folder.staging)
    process.wait_for_everyone()
    if process.is_main_process:
        staging = folder.staging
        check_gathered(staging)
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; train_config.toml says the same
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(report), encoding="utf-8")
        write_log(staging / "metrics.jsonl", report.log)
        write_plots(staging, kind.plots, report.log)
        folder.publish(report.metrics)
    process.wait_for_everyone()


def _model_line(config: TrainConfig, trainer: Trainer) -> str:
    model = trainer.model
    assert model is not None
    trained, total = parameter_counts(model)
    how = f"LoRA rank {config.lora_rank}" if config.lora else "all weights"
    how = f"head of rank {config.head}" if config.head else how
    return f"model {config.model}: {how}, {trained:,} of {total:,} parameters are trained"
