"""What a finished run leaves for people: the model card, the plots and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genarm.data.tokens import TokenReport
from genarm.statistics import Proportion
from genarm.train.config import TrainConfig, to_toml

LogEntry = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """All that the card tells: settings, data (name → what became of its rows), figures, log."""

    config: TrainConfig
    formats: Mapping[str, str]
    data: Mapping[str, TokenReport]
    metrics: Mapping[str, float]
    log: Sequence[LogEntry]


def accuracies(metrics: Mapping[str, float]) -> dict[str, Proportion]:
    """Held-out accuracy, over all pairs and by which response is the longer, as label → proportion."""
    groups = {
        "all": "",
        "chosen longer": "_chosen_longer",
        "rejected longer": "_rejected_longer",
        "equal length": "_equal_length",
    }
    return {
        label: Proportion(
            count=round(metrics[f"eval_accuracy{suffix}"] * metrics[f"eval_pairs{suffix}"]),
            n=int(metrics[f"eval_pairs{suffix}"]),
            rate=metrics[f"eval_accuracy{suffix}"],
            low=metrics[f"eval_accuracy{suffix}_low"],
            high=metrics[f"eval_accuracy{suffix}_high"],
        )
        for label, suffix in groups.items()
        if f"eval_accuracy{suffix}" in metrics
    }


def write_log(path: Path, log: Sequence[LogEntry]) -> None:
    """One JSON object per line, in the order of the steps."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")


def write_plots(folder: Path, log: Sequence[LogEntry]) -> None:
    """`loss.png` and `accuracy.png`: training and held-out figures by optimizer step."""
    for figure, label in (("loss", "loss"), ("accuracy", "pair accuracy")):
        _plot(folder / f"{figure}.png", log, figure, label)


def model_card(report: RunReport) -> str:
    """The README.md of the result, with metadata that the hub reads."""
    name = report.config.output.name
    return "\n".join(
        [
            _front_matter(report.config),
            f"# {name}: an autoregressive reward model",
            "",
            f"A {'LoRA adapter on' if report.config.lora else 'fine-tuned'} `{report.config.model}`, trained on "
            f"preference pairs with the GenARM loss ([arXiv 2410.08193](https://arxiv.org/abs/2410.08193)). Its "
            "log-probabilities are token-level rewards: they steer a frozen language model with the same tokenizer "
            "while it decodes. It is not meant to be sampled from alone.",
            "",
            "## Use",
            "",
            "```bash",
            f"genarm compose --base BASE --reward {name}={report.config.output} --output guided",
            'genarm generate guided --prompt "…"',
            "```",
            "",
            "## Held-out accuracy",
            "",
            *_accuracy_section(report.metrics),
            "",
            "![loss](loss.png) ![accuracy](accuracy.png)",
            "",
            "## Data",
            "",
            *_data_section(report),
            "",
            "## Settings",
            "",
            "```toml",
            to_toml(report.config).rstrip(),
            "```",
            "",
        ]
    )


def _front_matter(config: TrainConfig) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="peft" if config.lora else "transformers",
        pipeline_tag="text-generation",
        tags=["genarm", "reward-model", "autoregressive-reward-model"],
        # The hub refuses cards whose base model or data set is a path.
        base_model=None if Path(config.model).exists() else config.model,
        datasets=None if Path(config.data).exists() else ["/".join(config.data.split("/")[:2])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _accuracy_section(metrics: Mapping[str, float]) -> list[str]:
    found = accuracies(metrics)
    if not found:
        return ["No pairs were held out."]
    rows = [
        f"| {label} | {accuracy.n} | {accuracy.rate:.3f} | {accuracy.low:.3f} to {accuracy.high:.3f} |"
        for label, accuracy in found.items()
    ]
    return [
        "Share of held-out pairs whose chosen response has the higher summed log-probability; tokens of the "
        "response and its end-of-turn token count, without normalisation by length. The lower rows show how far "
        "the length of a response alone sways it.",
        "",
        "| pairs | n | accuracy | 95% interval |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Held-out loss {metrics['eval_loss']:.4f}, margin {metrics['eval_margin']:+.2f} nats.",
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
