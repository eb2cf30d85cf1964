"""What a training run shows while it runs: a bar (in a log, a line a minute), and a line per evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from genarm.terminal import Bar
from genarm.training.kinds import Kind

# Figures of the training beside the bar, of those that its kind has.
_FIGURES = {"loss": ".4f", "accuracy": ".3f", "margin": "+.2f", "reward": "+.3f", "kl": ".3f"}


class ProgressDisplay(TrainerCallback):
    """Shows loss, accuracy, margin and tokens/s; the main process alone."""

    def __init__(self, console: Console, kind: Kind) -> None:
        self.console = console
        self.kind = kind
        self.progress: Bar | None = None
        self.evaluating: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar, in the main process."""
        if not state.is_world_process_zero:
            return
        self.progress = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=False,
        )
        self.task = self.progress.add_task("training", total=state.max_steps, figures="")
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Advance the bar; log with every checkpoint, so that a resumed run logs what an unbroken one does."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
        control.should_log = control.should_log or control.should_save
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far an evaluation is, in a bar of its own."""
        if self.progress is not None:
            if self.evaluating is None:
                self.evaluating = self.progress.add_task("evaluating", total=len(kwargs["eval_dataloader"]), figures="")
            self.progress.advance(self.evaluating)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """New figures beside the bar."""
        if self.progress is not None and logs is not None and "loss" in logs:
            known = [f"{name} {logs[name]:{form}}" for name, form in _FIGURES.items() if name in logs]
            speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.task, figures="  ".join([*known, speed]))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line with the held-out figures."""
        if self.progress is not None and self.evaluating is not None:
            self.progress.remove_task(self.evaluating)
            self.evaluating = None
        if state.is_world_process_zero and metrics is not None:
            line = f"step {state.global_step:>5}  held-out {self.kind.evaluated(metrics)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        self.stop()

    def stop(self) -> None:
        """Take the bar down, also when training ends by an exception."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
