"""`run_demo`: the demonstration from an empty folder to a guided model, in the order of a user's own project.

The output folder gets `base/` (the frozen model), `pairs/` (preferences), `arms/` (a reward per objective),
`guided/` (base and rewards as one model), `replies.jsonl`, `trade-off.png` and, last of all, `results.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import genarm
from genarm.errors import ConfigError, DataError
from genarm.files import check_output, write_text
from genarm.lab.demo.base import BaseSettings, train_base
from genarm.lab.demo.pairs import judge, sample_duels, write_pairs
from genarm.lab.demo.show import Stages, both_line, legend, next_commands, side_by_side, sweep_table
from genarm.lab.demo.sweep import NO_WEIGHTS, Measured, Series, Weights, draw_trade_off, measure
from genarm.lab.demo.world import OBJECTIVES, Split, split_requests
from genarm.lab.machine import one_thread
from genarm.model.compose import compose
from genarm.statistics import finite
from genarm.training.config import TrainConfig
from genarm.training.run import TrainResult, train

HELPFUL: Weights = (2.0, 0.0)
BALANCED: Weights = (1.2, 0.8)
HARMLESS: Weights = (0.0, 2.0)
MIXES: tuple[Weights, ...] = (HELPFUL, (1.6, 0.4), BALANCED, (0.8, 1.2), (0.4, 1.6), HARMLESS)
STRENGTHS: tuple[Weights, ...] = (NO_WEIGHTS, (0.3, 0.2), (0.6, 0.4), BALANCED)
GRID: tuple[Weights, ...] = tuple(dict.fromkeys((*STRENGTHS, *MIXES)))

SHARPENED = 1 / 3
"""Rewards that have learnt nothing, with weights that add up to 2, give the base at temperature 1 / (1 + 2)."""

SHOWN = 4
"""Requests whose replies are printed side by side."""

RESULTS = "results.json"

DESCRIPTIONS = {
    "helpful": "prefers replies whose steps solve the problem",
    "harmless": "prefers replies without dangerous steps: gentle ones, cautions, or a refusal",
}


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """All that the figures depend on.

    Attributes:
        seed: of everything that is drawn.
        base: the base model and its training.
        pairs, held_out_pairs: pairs of replies for training, and for measuring an ARM's accuracy.
        sharpness: of the judge; see `genarm.lab.demo.world.preference`.
        beta, learning_rate, lora_rank, batch_size: of the ARMs' training.
        requests: held-out requests to which every setting of the weights replies.
    """

    seed: int
    base: BaseSettings = field(default_factory=BaseSettings)
    pairs: int = 2400
    held_out_pairs: int = 300
    sharpness: float = 1.5
    beta: float = 0.1
    learning_rate: float = 3e-3
    lora_rank: int = 16
    batch_size: int = 32
    requests: int = 200

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 or more")
        assert min(self.pairs, self.held_out_pairs, self.requests) > 1


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What was measured: the sweep (base first), and the base at a lower temperature."""

    points: tuple[Measured, ...]
    sharpened: Measured
    rewards: Mapping[str, TrainResult]

    def at(self, weights: Weights) -> Measured:
        """The point of the sweep with these weights."""
        return next(point for point in self.points if point.weights == weights)


def run_demo(output: Path, settings: DemoSettings, console: Console) -> DemoResult:
    """Run the whole demonstration into the new folder `output`; if it fails, the folder is removed.

    Raises:
        DataError: `output` exists and is not an empty folder, or cannot be made.
    """
    split = split_requests(settings.seed)
    stages = Stages(console, count=5)
    with _new_output(output) as folder, one_thread():
        with stages.stage("A base model", _WHY_BASE):
            size = train_base(folder / "base", split.train, settings=settings.base, seed=settings.seed, console=console)
            console.print(f"wrote {output / 'base'}: a Llama with {size:,} parameters", highlight=False)
        with stages.stage("Preferences", _WHY_PAIRS):
            _make_pairs(folder, split, settings, console)
        with stages.stage("Two rewards", _WHY_REWARDS):
            rewards = {name: _train_reward(folder, name, settings, console) for name in OBJECTIVES}
        with stages.stage("A guided model", _WHY_GUIDED):
            model, tokenizer = _compose(folder)
            console.print(f"wrote {output / 'guided'}", highlight=False)
        with stages.stage("What the weights do", _WHY_SWEEP):
            result = _sweep(model, tokenizer, split, settings, rewards, console)
            _show(result, split, console)
            _write(folder, result, split, settings)
    _print_end(output, result, split, console)
    return result


_WHY_BASE = (
    "Any causal LM can be the base. For a demo without downloads, a small one learns from scratch how a mixed crowd "
    "replies to everyday problems: eager, careful, rambling and confused people. It stays frozen from here on."
)
_WHY_PAIRS = (
    "The base replies twice to each request, and a noisy judge of each objective prefers one reply. Here the judges "
    "follow known rules (genarm.lab.demo.world), so that the end result can be measured against the truth."
)
_WHY_REWARDS = (
    "An autoregressive reward model is a small LM whose log-probabilities score every next token. One is trained "
    "for each objective, here as LoRA adapters, which share the base's weights."
)
_WHY_GUIDED = (
    "Base and rewards become one folder that loads like any causal LM. At every token it adds up log-probabilities: "
    "log π_base + w_helpful · log π_helpful + w_harmless · log π_harmless."
)
_WHY_SWEEP = (
    "The weights are chosen per request, when it is answered, and nothing is trained again. The same held-out "
    "requests are answered under many weights, all mixed in the same batches."
)
_ABOUT_CONTROL = (
    "Green: better than the base beyond doubt. The base at temperature ⅓ is a control: adding up log-probabilities "
    "also sharpens the distribution, and this is what sharpening alone does. So strongly guided replies repeat "
    "themselves; sentences that a reply has said before count for nothing."
)


@contextmanager
def _new_output(output: Path) -> Iterator[Path]:
    """The absolute path of a new folder that goes again if the block fails.

    The work is done in place, not beside it, because adapters remember the path of the model they belong to.
    """
    check_output(output, folder=True)
    if output.is_dir() and any(output.iterdir()):
        what = "holds a finished demo" if (output / RESULTS).is_file() else "exists and is not an empty folder"
        raise DataError(f"{output} {what}; choose another --output or remove it")
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield output.resolve()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise


def _make_pairs(folder: Path, split: Split, settings: DemoSettings, console: Console) -> None:
    """`pairs/OBJECTIVE.jsonl` on training requests and `pairs/OBJECTIVE-held-out.jsonl` on the others."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    parts = {"": (split.train, settings.pairs), "-held-out": (split.held_out, settings.held_out_pairs)}
    for number, (suffix, (requests, count)) in enumerate(parts.items()):
        seed = 2 * settings.seed + number
        duels = sample_duels(base, tokenizer, requests, count, seed=seed, console=console)
        for objective in OBJECTIVES:
            pairs = judge(duels, objective, sharpness=settings.sharpness, seed=seed)
            write_pairs(folder / "pairs" / f"{objective}{suffix}.jsonl", pairs)


def _train_reward(folder: Path, objective: str, settings: DemoSettings, console: Console) -> TrainResult:
    config = TrainConfig(
        model=str(folder / "base"),
        data=str(folder / "pairs" / f"{objective}.jsonl"),
        eval_data=str(folder / "pairs" / f"{objective}-held-out.jsonl"),
        output=folder / "arms" / objective,
        lora=True,
        lora_rank=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=0.0,
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        accumulation=1,
        eval_steps=max(1, settings.pairs // settings.batch_size * 2 // 3),  # once on the way, and at both ends
        seed=settings.seed,
    )
    console.print(f"[bold]{objective}[/bold]: {DESCRIPTIONS[objective]}", highlight=False)
    return train(config, console=console)


def _compose(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Write `guided/` with copies of its members, so that it can be moved, and load it as users do."""
    compose(
        folder / "base",
        {name: folder / "arms" / name for name in OBJECTIVES},
        folder / "guided",
        weights=dict(zip(OBJECTIVES, BALANCED, strict=True)),
        descriptions=DESCRIPTIONS,
        bundle=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "guided")
    return model, AutoTokenizer.from_pretrained(folder / "guided")


def _sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    settings: DemoSettings,
    rewards: Mapping[str, TrainResult],
    console: Console,
) -> DemoResult:
    requests = split.held_out[: settings.requests]
    points = measure(model, tokenizer, requests, GRID, seed=settings.seed, console=console)
    (sharpened,) = measure(
        model,
        tokenizer,
        requests,
        (NO_WEIGHTS,),
        seed=settings.seed,
        temperature=SHARPENED,
        label="base, temperature ⅓",
        console=console,
    )
    return DemoResult(points=tuple(points), sharpened=sharpened, rewards=rewards)


# --- what is shown and written --------------------------------------------------------------------------------


def _show(result: DemoResult, split: Split, console: Console) -> None:
    base = result.at(NO_WEIGHTS)
    shown = [base, result.at(HELPFUL), result.at(BALANCED), result.at(HARMLESS)]
    console.print(side_by_side(split.held_out[:SHOWN], shown))
    console.print(legend())
    console.print(sweep_table([*result.points, result.sharpened], base))
    console.print(_ABOUT_CONTROL, style="dim", highlight=False)
    console.print(both_line(result.at(BALANCED), base), highlight=False)


def _write(folder: Path, result: DemoResult, split: Split, settings: DemoSettings) -> None:
    """The picture, every reply, and last the figures, which say that the folder is whole."""
    series = (
        Series(
            label="from helpful to harmless", colour="tab:blue", offset=(7, 7), points=[result.at(w) for w in MIXES]
        ),
        Series(
            label="from weak to strong", colour="tab:orange", offset=(8, -14), points=[result.at(w) for w in STRENGTHS]
        ),
    )
    draw_trade_off(folder / "trade-off.png", series, result.at(NO_WEIGHTS), result.sharpened)
    rows = (
        {"request": request.text, "setting": point.label, "reply": reply, **score._asdict()}
        for point in (*result.points, result.sharpened)
        for request, reply, score in zip(split.held_out, point.replies, point.scores, strict=False)
    )
    write_text(folder / "replies.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    figures = json.dumps(finite(_figures(result, settings)), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / RESULTS, figures + "\n")


def _figures(result: DemoResult, settings: DemoSettings) -> dict[str, Any]:
    """No date, duration or path: the same seed gives the same file."""
    base = result.at(NO_WEIGHTS)
    return {
        "genarm": genarm.__version__,
        "settings": asdict(settings),
        "rewards": {
            name: {k: v for k, v in reward.metrics.items() if k.startswith("eval_accuracy") or k == "eval_pairs"}
            for name, reward in result.rewards.items()
        },
        "points": [_point(point, base) for point in (*result.points, result.sharpened)],
    }


def _point(point: Measured, base: Measured) -> dict[str, Any]:
    return {
        "label": point.label,
        "weights": dict(zip(OBJECTIVES, point.weights, strict=True)),
        **{objective: asdict(point.mean(objective)) for objective in OBJECTIVES},
        "repeated": asdict(point.repeated),
        "gain_over_base": {objective: asdict(point.gain(base, objective)) for objective in OBJECTIVES},
    }


def _print_end(output: Path, result: DemoResult, split: Split, console: Console) -> None:
    console.print()
    console.rule("[bold]Next", align="left")
    console.print(f"The picture: {output / 'trade-off.png'}    The figures: {output / RESULTS}", highlight=False)
    console.print("The guided model is an ordinary folder. Try:", highlight=False)
    reply = result.at(BALANCED).replies[0]
    for command in next_commands(output, split.held_out[0].text, reply, (HELPFUL, HARMLESS)):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
