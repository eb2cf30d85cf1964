"""What a finished run leaves for people: the model card, the plots and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genarm.data.tokens import TokenReport
from genarm.statistics import Proportion
from genarm.training.config import TrainConfig, to_toml

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


def reward_text(metrics: Mapping[str, float]) -> str:
    """The mean reward of replies to held-out prompts with its interval, and their divergence from the model."""
    interval = ""
    if "eval_reward_low" in metrics:
        interval = f" [{metrics['eval_reward_low']:.3f}, {metrics['eval_reward_high']:.3f}]"
    return f"reward {metrics['eval_reward']:+.3f}{interval}  KL {metrics['eval_kl']:.3f} nats per reply"


def write_log(path: Path, log: Sequence[LogEntry]) -> None:
    """One JSON object per line, in the order of the steps."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")


def write_plots(folder: Path, kind: str, log: Sequence[LogEntry]) -> None:
    """Training and held-out figures by optimizer step: `loss.png` and `accuracy.png`, or `reward.png` and `kl.png`."""
    for figure, label in _plots(kind).items():
        _plot(folder / f"{figure}.png", log, figure, label)


def model_card(report: RunReport) -> str:
    """The README.md of the result, with metadata that the hub reads."""
    config = report.config
    held_out = _reward_section(report.metrics) if config.kind == "rlhf" else _accuracy_section(config, report.metrics)
    return "\n".join(
        [
            _front_matter(config),
            f"# {config.output.name}: {_TITLES[config.kind]}",
            "",
            _introduction(config),
            "",
            "## Use",
            "",
            *_use(config),
            "",
            f"## Held-out {'reward' if config.kind == 'rlhf' else 'accuracy'}",
            "",
            *held_out,
            "",
            " ".join(f"![{figure}]({figure}.png)" for figure in _plots(config.kind)),
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


_TITLES = {
    "arm": "an autoregressive reward model",
    "trajectory": "a trajectory-level reward model",
    "dpo": "a policy by direct preference optimisation",
    "rlhf": "a policy by reinforcement learning from rewards",
}
_TAGS = {
    "arm": ["reward-model", "autoregressive-reward-model"],
    "trajectory": ["reward-model"],
    "dpo": ["dpo"],
    "rlhf": ["rlhf"],
}


def _plots(kind: str) -> dict[str, str]:
    if kind == "rlhf":
        return {"reward": "mean reward", "kl": "KL from the start, nats per reply"}
    return {"loss": "loss", "accuracy": "pair accuracy"}


def _introduction(config: TrainConfig) -> str:
    adapter = "LoRA adapter on" if config.lora else "fine-tuned"
    match config.kind:
        case "trajectory":
            how = " through a LoRA adapter, merged into its weights," if config.lora else ""
            return (
                f"`{config.model}` with a scalar head on the last token, trained{how} on preference pairs with the "
                "Bradley–Terry loss. It scores whole responses; differences between scores of responses to the same "
                "prompt are what it means."
            )
        case "dpo":
            return (
                f"A {adapter} `{config.model}`, trained on preference pairs with the DPO loss "
                "([arXiv 2305.18290](https://arxiv.org/abs/2305.18290))."
            )
        case "rlhf":
            return (
                f"A {adapter} `{config.model}`, trained by RLOO ([arXiv 2402.14740](https://arxiv.org/abs/2402.14740)) "
                f"to raise the rewards `{config.rewards}` (name, model, weight), with a KL penalty towards the model "
                "that it started from."
            )
    return (
        f"A {adapter} `{config.model}`, trained on preference pairs with the GenARM loss "
        "([arXiv 2410.08193](https://arxiv.org/abs/2410.08193)). Its log-probabilities are token-level rewards: they "
        "steer a frozen language model with the same tokenizer while it decodes. It is not meant to be sampled from "
        "alone."
    )


def _use(config: TrainConfig) -> list[str]:
    name = config.output.name
    if config.kind == "arm":
        return [
            "```bash",
            f"genarm compose --base BASE --reward {name}={config.output} --output guided",
            'genarm generate guided --prompt "…"',
            "```",
        ]
    loader = "AutoModelForSequenceClassification" if config.kind == "trajectory" else "AutoModelForCausalLM"
    package = "transformers"
    if config.lora and config.kind != "trajectory":
        package, loader = "peft", "AutoPeftModelForCausalLM"
    return ["```python", f"from {package} import {loader}", "", f'model = {loader}.from_pretrained("{name}")', "```"]


def _front_matter(config: TrainConfig) -> str:
    from huggingface_hub import ModelCardData

    adapter = config.lora and config.kind != "trajectory"
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if config.kind == "trajectory" else "text-generation",
        tags=["genarm", *_TAGS[config.kind]],
        # The hub refuses cards whose base model or data set is a path.
        base_model=None if Path(config.model).exists() else config.model,
        datasets=None if Path(config.data).exists() else ["/".join(config.data.split("/")[:2])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _reward_section(metrics: Mapping[str, float]) -> list[str]:
    if "eval_reward" not in metrics:
        return ["No prompts were held out."]
    own = {name.removeprefix("eval_reward/"): v for name, v in metrics.items() if name.startswith("eval_reward/")}
    return [
        f"One reply to each of {metrics['eval_prompts']:.0f} held-out prompts, drawn at temperature 1: weighted "
        f"{reward_text(metrics)} (log π − log π_start).",
        "",
        "| reward | mean |",
        "|---|---|",
        *(f"| {name} | {value:+.3f} |" for name, value in own.items()),
    ]


_SCORES = {
    "arm": (
        "Share of held-out pairs whose chosen response has the higher summed log-probability; tokens of the "
        "response and its end-of-turn token count, without normalisation by length. The lower rows show how far "
        "the length of a response alone sways it."
    ),
    "trajectory": "Share of held-out pairs whose chosen response has the higher score, over all and by length.",
    "dpo": (
        "Share of held-out pairs whose chosen response has the higher implicit reward, log π − log π_start, over all "
        "and by length."
    ),
}


def _accuracy_section(config: TrainConfig, metrics: Mapping[str, float]) -> list[str]:
    found = accuracies(metrics)
    if not found:
        return ["No pairs were held out."]
    unit = "" if config.kind == "trajectory" else " nats"
    rows = [
        f"| {label} | {accuracy.n} | {accuracy.rate:.3f} | {accuracy.low:.3f} to {accuracy.high:.3f} |"
        for label, accuracy in found.items()
    ]
    return [
        _SCORES[config.kind],
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
