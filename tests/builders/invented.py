"""Invented results of comparisons, for the tests of figures and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genarm.lab.evaluation.recipe import Claim, Gap, PromptSpec, Recipe, SamplingSpec
from genarm.lab.evaluation.results import Cost, Measured, Results, Trained, Verdicts
from genarm.lab.judges.kinds import JudgeSpec
from genarm.lab.methods.interface import MethodSpec

BATCH = 100


def measured(name: str, scores: Mapping[str, Sequence[float]], n: int, **changes: Any) -> Measured:
    """A method whose replies are ten tokens long, at one forward and 10 ms a token."""
    given: dict[str, Any] = {
        "family": name,
        "weights": {},
        "replies": tuple(f"{name} says {i}" for i in range(n)),
        "tokens": (10,) * n,
        "kl": None,
        "kl_bound": None,
        **changes,
    }
    given.setdefault("cost", cost(given["tokens"]))
    return Measured(name=name, scores={judge: tuple(values) for judge, values in scores.items()}, **given)


def cost(tokens: Sequence[int], *, seconds_per_token: float = 0.01, **forwards: int) -> Cost:
    """Of replies of these lengths; forwards per token by member."""
    per_token = forwards or {"base": 1}
    return Cost(
        seconds=tuple(sum(tokens[i : i + BATCH]) * seconds_per_token for i in range(0, len(tokens), BATCH)),
        tokens=sum(tokens),
        forwards={member: count * sum(tokens) for member, count in per_token.items()},
        positions={member: 2 * count * sum(tokens) for member, count in per_token.items()},
    )


def results(*rows: Measured, reference: str | None = None, **changes: Any) -> Results:
    """One run of these methods."""
    n = len(rows[0].replies)
    given: dict[str, Any] = {
        "title": "Invented",
        "scale": "tiny",
        "command": "genarm eval recipes/invented.toml --output out",
        "date": "2026-01-02",
        "versions": {"code": "1234567", "torch": "2.13.0"},
        "machine": "a processor, 2 cores",
        "settings": {"seed": 1, "prompts": n, "max_new_tokens": 16, "batch_size": BATCH},
        "prompts": tuple(f"question {i}" for i in range(n)),
        "verdicts": (),
    }
    return Results(measured=rows, reference=reference or rows[0].name, **{**given, **changes})


def recipe(of: Results, judges: Sequence[str], **changes: Any) -> Recipe:
    """The recipe that would have given `of`."""
    return Recipe(
        title=of.title,
        scale=of.scale,
        seed=1,
        prompts=PromptSpec(data="prompts.jsonl", count=len(of.prompts)),
        sampling=SamplingSpec(batch_size=BATCH),
        methods=tuple(MethodSpec(kind="sample", name=row.name, family=row.family) for row in of.measured),
        judges=tuple(JudgeSpec(name=name, kind="function", source="m:f") for name in judges),
        reference=of.reference,
        **changes,
    )


def one_preference() -> tuple[Results, Recipe]:
    """Six methods, a judge that scores and one that only compares; 250 prompts."""
    n, rng = 250, np.random.default_rng(0)
    prompt = rng.normal(size=n)
    levels = {"base": 0.0, "GenARM": 0.9, "ARGS": 0.35, "Transfer-Q": 0.8, "Best-of-4": 0.6, "DPO": 1.0}
    tokens = {name: tuple(rng.integers(8, 13, size=n).tolist()) for name in levels}
    costs = {
        "GenARM": cost(tokens["GenARM"], seconds_per_token=0.019, base=1, reward=1),
        "ARGS": cost(tokens["ARGS"], seconds_per_token=0.05, base=1, reward=10),
        "Transfer-Q": cost(tokens["Transfer-Q"], seconds_per_token=0.9, base=1, policy=200, reward=10),
        "Best-of-4": cost(tokens["Best-of-4"], seconds_per_token=0.03, base=4, reward=1),
    }
    kls = {"base": 0.0, "GenARM": 4.0, "DPO": 5.5}
    rows = tuple(
        measured(
            name,
            {"truth": np.round((prompt + rng.normal(size=n) + level) * 2) / 2},
            n,
            tokens=tokens[name],
            cost=costs.get(name, cost(tokens[name])),
            kl=tuple(rng.normal(kls[name], kls[name] / 2, size=n)) if name in kls else None,
            kl_bound=0.64 if name == "Best-of-4" else None,
        )
        for name, level in levels.items()
    )
    verdicts = tuple(
        Verdicts(
            judge="GPT-4",
            first=name,
            second="DPO",
            outcomes=tuple(rng.choice(np.array(["win", "tie", "lose", None], dtype=object), p=p, size=n)),
        )
        for name, p in {
            "base": [0.1, 0.1, 0.78, 0.02],
            "GenARM": [0.47, 0.07, 0.44, 0.02],
            "ARGS": [0.24, 0.05, 0.69, 0.02],
            "Transfer-Q": [0.3, 0.06, 0.62, 0.02],
            "Best-of-4": [0.35, 0.1, 0.53, 0.02],
        }.items()
    )
    of = results(
        *rows,
        reference="DPO",
        title="HH-RLHF: every method on one preference",
        verdicts=verdicts,
        trained=(
            Trained(
                name="arm",
                kind="arm",
                loss="arm",
                metrics={
                    "eval_loss": 0.693,
                    "eval_accuracy": 0.8,
                    "eval_pairs": 200.0,
                    "eval_accuracy_low": 0.74,
                    "eval_accuracy_high": 0.85,
                    "train_seconds": 61.2,
                },
            ),
            Trained(name="rlhf", kind="rlhf", metrics={"eval_reward": 0.5, "eval_kl": 3.0, "train_seconds": 90.0}),
        ),
        published=(
            {"first": "GenARM", "second": "DPO", "win": 48.33, "tie": 7.33, "lose": 44.33},
            {"first": "CARDS", "second": "DPO", "win": 30.0, "tie": 10.0, "lose": 60.0},
            {"what": "raw win rate in %", "base": "70B", "GenARM": 82.1},
        ),
        notes=("GPT-4: 25 of 1250 replies could not be parsed.",),
    )
    claims = (
        Claim(what="above", first="GenARM", second="ARGS", judge="truth"),
        Claim(what="cheaper", first="GenARM", second="Transfer-Q"),
        Claim(what="level", first="GenARM", second="DPO", judge="truth", margin=0.25),
        Claim(what="above", first="GenARM", second="Transfer-Q", judge="truth"),
        Claim(what="above", first="ARGS", second="DPO", judge="GPT-4"),
        Claim(what="gap", first="GenARM", second="DPO", judge="truth", share=0.7),
    )
    return of, recipe(
        of,
        ["truth", "GPT-4"],
        comparisons=(("GenARM", "DPO"), ("GenARM", "ARGS")),
        gaps=(Gap(bottom="base", top="DPO", methods=("GenARM", "ARGS"), judge="truth"),),
        claims=claims,
        published=of.published,
    )


def several_objectives(count: int = 2, n: int = 200) -> tuple[Results, Recipe]:
    """Two families on arcs, the first one outside, in two or three objectives."""
    rng = np.random.default_rng(count)
    objectives = ("helpful", "harmless", "short")[:count]
    if count == 2:
        weights = np.array([(1 - t, t) for t in np.linspace(0, 1, 5)])
    else:
        weights = np.array(
            [(1, 0, 0), (0.5, 0.5, 0), (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1), (0.5, 0, 0.5), (0.34, 0.33, 0.33)]
        )
    prompt = rng.normal(size=(n, count))
    rows = [measured("base", {o: prompt[:, k] for k, o in enumerate(objectives)}, n)]
    for family, radius in (("GenARM", 1.2), ("Rewarded Soups", 0.8)):
        for weight in weights:
            level = radius * (weight / np.linalg.norm(weight) * 1.3 - 0.15)
            values = prompt + rng.normal(scale=0.5, size=(n, count)) + level
            label = ", ".join(f"{o} {w:g}" for o, w in zip(objectives, weight, strict=True))
            rows.append(
                measured(
                    f"{family} ({label})",
                    {o: values[:, k] for k, o in enumerate(objectives)},
                    n,
                    family=family,
                    weights=dict(zip(objectives, map(float, weight), strict=True)),
                    kl=tuple(rng.normal(radius * 4, 1, size=n)),
                )
            )
    of = results(
        *rows,
        title="PKU-Pareto: helpfulness against harmlessness",
        published=({"family": "GenARM", "hypervolume": 0.0748}, {"family": "MORL", "hypervolume": 0.0666}),
    )
    claims = (
        Claim(what="front", first="GenARM", second="Rewarded Soups"),
        Claim(what="front", first="Rewarded Soups", second="GenARM", margin=0.1),
    )
    return of, recipe(of, objectives, fronts=objectives, claims=claims, published=of.published)
