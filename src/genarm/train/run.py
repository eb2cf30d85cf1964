"""`train_arm`: one training run from settings to a finished folder.

In order: look at the output folder, fill in the settings, read and tokenise the data, load the model, train,
evaluate, write the result. Nothing is written before everything that can be refused has been.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
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
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from genarm.data.preferences import Preference, PreferenceSet, load_preferences
from genarm.data.tokens import TokenSet, report_table, split_by_prompt, tokenize
from genarm.errors import ConfigError
from genarm.train.config import TrainConfig
from genarm.train.loading import load_model, load_tokenizer, resolve
from genarm.train.output import Checkpoint, RunFolder
from genarm.train.progress import ProgressDisplay
from genarm.train.report import RunReport, accuracies, model_card, write_log, write_plots
from genarm.train.trainer import TRAIN_METRICS, ArmTrainer

# Evaluations in a run, and entries in its log, where the user does not say.
EVALUATIONS = 5
LOG_ENTRIES = 200


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: its folder, its figures (as in metrics.json) and its number of optimizer steps."""

    output: Path
    metrics: dict[str, float]
    steps: int
    resumed_from: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Data:
    sets: Mapping[str, TokenSet]
    formats: Mapping[str, str]
    leaked: int  # held-out pairs whose prompt is also trained on

    @property
    def training(self) -> TokenSet:
        return self.sets["training"]

    @property
    def held_out(self) -> TokenSet | None:
        return self.sets.get("held out")


def train_arm(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train an autoregressive reward model as `config` says, and write it to `config.output`.

    With `resume`, continue from the newest complete checkpoint there; the result has the same weights as that of a
    run that was never interrupted. A finished run is returned as it is.

    Raises:
        GenarmError: any setting, data or model that does not serve; a loss that is not finite.
    """
    process = _join_processes()
    console = _console(console, process)
    folder = RunFolder(path=Path(os.path.abspath(config.output)))
    folder.check(resume=resume)
    config = resolve(config)
    folder.check_settings(config)
    finished = folder.metrics()
    if finished is not None:
        console.print(f"{folder.path} is finished already: nothing to resume", markup=False, soft_wrap=True)
        return TrainResult(output=folder.path, metrics=finished, steps=int(finished["steps"]))
    checkpoint = folder.newest_checkpoint(process.num_processes)
    if resume:
        console.print(_resume_message(folder.path, checkpoint), highlight=False, markup=False, soft_wrap=True)

    tokenizer = load_tokenizer(config)
    data = _load_data(config, tokenizer)
    console.print(report_table({name: found.report for name, found in data.sets.items()}))
    if data.leaked:
        console.print(
            f"note: {data.leaked} held-out pairs have a prompt that is trained on too, which flatters the held-out "
            "accuracy",
            highlight=False,
            soft_wrap=True,
        )
    trainer = _make_trainer(config, tokenizer, data, folder, console, resuming=checkpoint is not None)
    console.print(_model_line(config, trainer), highlight=False, markup=False, soft_wrap=True)

    process.wait_for_everyone()  # nobody looks at the folder any more
    if process.is_main_process:
        folder.begin(config)
    seconds = _train(trainer, checkpoint)
    metrics = _final_metrics(trainer.state, seconds, best=config.early_stopping is not None)
    report = RunReport(
        config=config,
        formats=data.formats,
        data={name: found.report for name, found in data.sets.items()},
        metrics=metrics,
        log=trainer.state.log_history,
    )
    _write_result(trainer, tokenizer, folder, report)
    _print_result(console, folder.path, metrics)
    return TrainResult(
        output=folder.path,
        metrics=metrics,
        steps=int(metrics["steps"]),
        resumed_from=checkpoint.step if checkpoint else None,
    )


def _join_processes() -> PartialState:
    """The state of this process among those of `accelerate launch` or `torchrun`, on CPUs as well.

    accelerate forms a group of CPU processes only when told that they are on CPUs.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def _console(console: Console | None, process: PartialState) -> Console:
    if not process.is_main_process:
        return Console(quiet=True)
    return console or Console()


def _resume_message(path: Path, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return f"no complete checkpoint in {path}: starting from the beginning"
    return f"resuming from step {checkpoint.step} ({checkpoint.path})"


def _load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> _Data:
    """Training and held-out pairs, the latter from evaluation data if named, else from the training data."""
    chat = bool(tokenizer.chat_template)
    training = load_preferences(config.data, split=config.split, objective=config.objective, chat=chat)
    sources: dict[str, tuple[PreferenceSet, Sequence[Preference]]] = {"training": (training, training.pairs)}
    if config.eval_data is not None or config.eval_split is not None:
        held_out = _load_held_out(config, chat)
        sources["held out"] = (held_out, held_out.pairs)
    elif config.eval_fraction > 0:
        kept, split_off = split_by_prompt(training, config.eval_fraction, config.seed)
        # The malformed rows are reported with the training pairs, so not twice.
        sources["training"] = (training, kept)
        sources["held out"] = (dataclasses.replace(training, malformed={}), split_off)
    assert config.max_prompt_tokens is not None
    assert config.max_response_tokens is not None
    sets = {
        name: tokenize(
            tokenizer,
            pairs,
            max_prompt_tokens=config.max_prompt_tokens,
            max_response_tokens=config.max_response_tokens,
            malformed=source.malformed,
        )
        for name, (source, pairs) in sources.items()
    }
    formats = {name: f"{source.source}, {source.format.value}" for name, (source, _) in sources.items()}
    trained = {pair.prompt_key for pair in sources["training"][1]}
    leaked = sum(pair.prompt_key in trained for pair in sources["held out"][1]) if "held out" in sources else 0
    return _Data(sets=sets, formats=formats, leaked=leaked)


def _load_held_out(config: TrainConfig, chat: bool) -> PreferenceSet:
    source = config.eval_data or config.data
    whole = "train" if Path(source).is_file() else "test"
    return load_preferences(source, split=config.eval_split or whole, objective=config.objective, chat=chat)


def _make_trainer(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    folder: RunFolder,
    console: Console,
    *,
    resuming: bool,
) -> ArmTrainer:
    callbacks: list[TrainerCallback] = [ProgressDisplay(console), *_trackers(config.report_to)]
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))
    arguments = _training_arguments(config, folder, evaluates=data.held_out is not None, resuming=resuming)
    set_seed(config.seed)  # an adapter's first weights are drawn while the model is made
    trainer = ArmTrainer(
        load_model(config, tokenizer),
        arguments,
        beta=config.beta,
        pad_id=_pad_id(tokenizer),
        train_pairs=list(data.training.pairs),
        eval_pairs=list(data.held_out.pairs) if data.held_out else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id serves: padding is masked in attention and loss alike."""
    found = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    return int(found[0])


def _trackers(report_to: str) -> list[TrainerCallback]:
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    try:
        return [tracker() for tracker in get_reporting_integration_callbacks(names)]
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--report-to {report_to}: {error}") from error


def _training_arguments(
    config: TrainConfig, folder: RunFolder, *, evaluates: bool, resuming: bool
) -> TrainingArguments:
    eval_steps = config.eval_steps or 1 / EVALUATIONS
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Later versions of transformers call it activation checkpointing, and warn about the old name.
    checkpointing = "activation" if "activation_checkpointing" in known else "gradient"
    options: dict[str, Any] = {
        f"{checkpointing}_checkpointing": config.gradient_checkpointing,
        f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
    }
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.resolved_learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup,  # below 1: a share of the steps
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=PartialState().device.type == "cpu",  # bfloat16 there must be asked for
        seed=config.seed,
        logging_steps=1 / LOG_ENTRIES,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=eval_steps,
        eval_on_start=evaluates and not resuming,
        save_strategy="steps",
        save_steps=config.save_steps or eval_steps,
        save_total_limit=2,
        load_best_model_at_end=config.early_stopping is not None,
        metric_for_best_model="eval_loss" if config.early_stopping is not None else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=PartialState().device.type == "cuda",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        **options,
    )


def _train(trainer: ArmTrainer, checkpoint: Checkpoint | None) -> float:
    """Train to the end; returns the seconds that this session took for it."""
    if checkpoint is not None and checkpoint.finished:
        # The run was cut off while its result was being written. `train` would take one step too many here.
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
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
            metrics |= {f"train_{name}": entry[name] for name in ("loss", *TRAIN_METRICS)}
        elif entry["step"] == step and "eval_loss" in entry:
            metrics |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return metrics


def _write_result(
    trainer: ArmTrainer, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, report: RunReport
) -> None:
    """Save through the Trainer, which knows how the weights are spread over processes."""
    process = PartialState()
    if process.is_main_process:
        folder.stage()
    process.wait_for_everyone()
    trainer.save_model(str(folder.staging))
    process.wait_for_everyone()
    if process.is_main_process:
        staging = folder.staging
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; train_config.toml says the same
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(report), encoding="utf-8")
        write_log(staging / "metrics.jsonl", report.log)
        write_plots(staging, report.log)
        folder.publish(report.metrics)
    process.wait_for_everyone()


def _model_line(config: TrainConfig, trainer: ArmTrainer) -> str:
    model = trainer.model
    assert model is not None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    how = f"LoRA rank {config.lora_rank}" if config.lora else "all weights"
    return f"model {config.model}: {how}, {trained:,} of {total:,} parameters are trained"


def _print_result(console: Console, path: Path, metrics: Mapping[str, float]) -> None:
    for label, accuracy in accuracies(metrics).items():
        console.print(f"held-out accuracy, {label}: {accuracy}", highlight=False, markup=False)
    console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
