"""What a finished run leaves for people: the model card, the plots and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genarm.data.tokens import TokenReport
from genarm.statistics import Proportion
from genarm.training.config import TrainConfig, to_toml
from genarm.training.kinds import Kind, kind_of

LogEntry = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """All that the card tells: settings, data (name → what became of its rows), figures, log."""

    config: TrainConfig
    formats: Mapping[str, str]
    data: Mapping[str, TokenReport]
    metrics: Mapping[str, float]
    log: Sequence[LogEntry]


def accuracies(metrics: Mapping[str, float], name: str = "accuracy") -> dict[str, Proportion]:
    """Held-out accuracy, or a figure like it, over all pairs and by which response is longer: label → proportion."""
    groups = {
        "all": "",
        "chosen longer": "_chosen_longer",
        "rejected longer": "_rejected_longer",
        "equal length": "_equal_length",
    }
    return {
        label: Proportion(
            count=round(metrics[f"eval_{name}{suffix}"] * metrics[f"eval_pairs{suffix}"]),
            n=int(metrics[f"eval_pairs{suffix}"]),
            rate=metrics[f"eval_{name}{suffix}"],
            low=metrics[f"eval_{name}{suffix}_low"],
            high=metrics[f"eval_{name}{suffix}_high"],
        )
        for label, suffix in groups.items()
        if f"eval_{name}{suffix}" in metrics
    }


def write_log(path: Path, log: Sequence[LogEntry]) -> None:
    """One JSON object per line, in the order of the steps."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")


def write_plots(folder: Path, plots: Mapping[str, str], log: Sequence[LogEntry]) -> None:
    """Training and held-out figures by optimizer step, a picture for each of `plots`: `loss.png`, for example."""
    for figure, label in plots.items():
        _plot(folder / f"{figure}.png", log, figure, label)


def model_card(report: RunReport) -> str:
    """The README.md of the result, with metadata that the hub reads."""
    config, kind = report.config, kind_of(report.config)
    return "\n".join(
        [
            _front_matter(config, kind),
            f"# {config.output.name}: {kind.title}",
            "",
            kind.introduction(config),
            "",
            "## Use",
            "",
            *kind.use(config),
            "",
            *kind.held_out(report.metrics),
            "",
            " ".join(f"![{figure}]({figure}.png)" for figure in kind.plots),
            "",
            "## Data",
            "",
            *_data_section(report),
            "",
            "## Settings",
            "",
            "```toml",
            to_toml(config).rstrip(),
            "```",
            "",
        ]
    )


def _front_matter(config: TrainConfig, kind: Kind) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="peft" if config.adapter and not kind.merged else "transformers",
        pipeline_tag=kind.task,
        tags=["genarm", *kind.tags],
        # The hub refuses cards whose base model or data set is a path.
        base_model=None if Path(config.model).exists() else config.model,
        datasets=None if Path(config.data).exists() else ["/".join(config.data.split("/")[:2])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def pair_text(metrics: Mapping[str, float]) -> str:
    """The figures of one evaluation on held-out pairs, in a line."""
    if metrics.get("eval_chosen_reward") == metrics.get("eval_rejected_reward") == 0:  # a reward that starts at zero
        return f"loss {metrics['eval_loss']:.4f}  no pair is told apart yet"
    return (
        f"loss {metrics['eval_loss']:.4f}  accuracy {metrics['eval_accuracy']:.3f} "
        f"[{metrics['eval_accuracy_low']:.3f}, {metrics['eval_accuracy_high']:.3f}]  "
        f"margin {metrics['eval_margin']:+.2f}"
    )


def accuracy_section(metrics: Mapping[str, float], score: str, unit: str) -> list[str]:
    """The model card's section on held-out pairs: `score` says what was compared, `unit` is that of the margin."""
    found = accuracies(metrics)
    if not found:
        return ["## Held-out accuracy", "", "No pairs were held out."]
    rows = [
        f"| {label} | {accuracy.n} | {accuracy.rate:.3f} | {accuracy.low:.3f} to {accuracy.high:.3f} |"
        for label, accuracy in found.items()
    ]
    return [
        "## Held-out accuracy",
        "",
        score,
        "",
        "| pairs | n | accuracy | 95% interval |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Held-out loss {metrics['eval_loss']:.4f}, margin {metrics['eval_margin']:+.2f}{unit}.",
    ]


def _data_section(report: RunReport) -> list[str]:
    lines = []
    for name, tokens in report.data.items():
        counts = "; ".join(f"{label} {count:,}" for label, count in tokens.lines())
        lines.append(f"- {name}: `{report.formats[name]}`: {counts}.")
    return lines


def _plot(path: Path, log: Sequence[LogEntry], figure: str, label: str) -> None:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    canvas = Figure(figsize=(6, 4), layout="constrained")
    axes = canvas.add_subplot(xlabel="optimizer step", ylabel=label)
    training = [(entry["step"], entry[figure]) for entry in log if "loss" in entry and figure in entry]
    held_out = [entry for entry in log if f"eval_{figure}" in entry]
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.6, label="training")
    if held_out:
        steps, values = [e["step"] for e in held_out], [e[f"eval_{figure}"] for e in held_out]
        axes.plot(steps, values, color="tab:orange", marker="o", label="held out")
        if f"eval_{figure}_low" in held_out[0]:
            low, high = ([entry[f"eval_{figure}_{end}"] for entry in held_out] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color="tab:orange", alpha=0.2, label="95% interval")
    if figure == "accuracy":
        axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend()
    canvas.savefig(path, dpi=120)
