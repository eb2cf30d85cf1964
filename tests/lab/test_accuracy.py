"""`genarm accuracy`: scores against the chain rule of each model by itself, figures against known answers."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from builders.tiny import SHARED, TEMPLATE, VOCAB_SIZE, WORDS, save_member, tiny_lora, tiny_model, tiny_tokenizer
from builders.toy_training import write_toy
from genarm.cli import accuracy
from genarm.cli.arguments import settings_from
from genarm.errors import BudgetError, ConfigError, DataError, GenarmError, MemberError, VocabularyError, WeightsError
from genarm.lab.accuracy import models as accuracy_models
from genarm.lab.accuracy.figures import Scores, correlation, difference, figures, mean_of
from genarm.lab.accuracy.models import LogProbReward
from genarm.lab.accuracy.report import command, print_result
from genarm.lab.accuracy.run import AccuracyResult, measure
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.model.compose import compose
from genarm.model.modeling import GuidedForCausalLM
from genarm.statistics import proportion
from genarm.text.prompts import encode_pair
from genarm.training.config import TrainConfig
from genarm.training.loading import resolve
from genarm.training.run import train

# (prompt, chosen, rejected, category): chosen longer in rows 0 and 2, rejected in 1 and 3, as long in 4 and 5.
ROWS = [
    ("w1 w2", "w3 w4 w5 w6", "w7", "chat"),
    ("w1 w2 w3 w8 w9", "w9", "w7 w8 w4", "chat"),
    ("w4", "w30 w31 w32", "w33 w34", "safety"),
    ("w5 w6", "w10 w11", "w12 w13 w14 w15 w16", "safety"),
    ("w7 w7", "w20 w21", "w22 w23", "safety"),
    ("w8", "w24", "w25", None),
]
WISH = "w20 w21 w22"


def write_pairs(path: Path, rows: list[tuple[str, str, str, Any]]) -> Path:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    records = [
        {"prompt": turn("user", x), "chosen": turn("assistant", y), "rejected": turn("assistant", n), "subset": subset}
        for x, y, n, subset in rows
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_trajectory(folder: Path, *, seed: int, zero: bool = False) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.25},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_labels": 1},
    )
    model = AutoModelForSequenceClassification.from_config(config)
    if zero:
        torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every kind, and the pairs."""
    root = tmp_path_factory.mktemp("accuracy")
    base, arm = tiny_model(seed=0), tiny_model("gpt2", seed=1)
    save_member(base, root / "base")
    save_member(arm, root / "arm")
    tiny_lora(base, root / "lora", seed=2, base_path=str(root / "base"))
    compose(root / "base", {"full": root / "arm", "light": root / "lora"}, root / "guided", weights={"light": 0.5})
    save_member(tiny_model(seed=9), root / "untuned")
    compose(
        root / "base",
        {"full": root / "arm"},
        root / "mixed",
        tuned={"near": root / "lora", "far": root / "arm"},
        references={"far": root / "untuned"},
        wishes={"wish": WISH},
        weights={"full": 0.3, "near": -0.7, "far": 0.5, "wish": 1.5},
    )
    save_trajectory(root / "trajectory", seed=3)
    uniform = tiny_model(seed=4)
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    save_member(uniform, root / "uniform")
    write_pairs(root / "pairs.jsonl", ROWS)
    return root


def settings_of(root: Path, *models: str, **changes: Any) -> AccuracySettings:
    where = tuple(str(root / model) for model in models)
    return AccuracySettings(**{"models": where, "data": str(root / "pairs.jsonl"), "dtype": "float32", **changes})


def run(root: Path, *models: str, **changes: Any) -> AccuracyResult:
    return measure(settings_of(root, *models, **changes), Console(quiet=True))


def command_line(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    return accuracy.run(parser.parse_args([str(word) for word in words]))


# --- scores against the chain rule ----------------------------------------------------------------------------------


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    """log π(response | prompt) of one sequence without padding, from transformers' own forward."""
    return float(said_of(model, prompt, response)[range(len(response)), response].sum())


def said_of(model: Any, prompt: list[int], response: list[int]) -> Any:
    """Its distributions [T, V] at the tokens of the response, in float64."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


@torch.no_grad()
def guided_gain(
    base: Any, parts: dict[Any, float], prompt: list[int], response: list[int], wished: list[int] | None = None
) -> float:
    """Σ_t log π_guided − log π_base, normalised over the vocabulary at each token; the model `None` is the base that
    reads the wish."""
    plain_TV = said_of(base, prompt, response)
    mixed_TV = plain_TV.clone()
    for model, weight in parts.items():
        mixed_TV += weight * (
            said_of(base, wished or [], response) if model is None else said_of(model, prompt, response)
        )
    gain_TV = mixed_TV.log_softmax(-1) - plain_TV
    return float(gain_TV[range(len(response)), response].sum())


@torch.no_grad()
def head_score(model: Any, prompt: list[int], response: list[int]) -> float:
    hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
    return float(model.score(hidden)[0, -1, 0])


def reference(score: Callable[[list[int], list[int]], float], side: int) -> list[float]:
    tokenizer = tiny_tokenizer()
    prompts = [[{"role": "user", "content": row[0]}] for row in ROWS]
    return [score(*encode_pair(tokenizer, x, row[side])) for x, row in zip(prompts, ROWS, strict=True)]


def scorers(root: Path) -> dict[str, Callable[[list[int], list[int]], float]]:
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    arm = AutoModelForCausalLM.from_pretrained(root / "arm")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "lora")
    trajectory = AutoModelForSequenceClassification.from_pretrained(root / "trajectory")
    return {
        "base": lambda x, y: log_prob(base, x, y),
        "arm": lambda x, y: log_prob(arm, x, y),
        "lora": lambda x, y: log_prob(lora, x, y),
        "guided:full": lambda x, y: log_prob(arm, x, y),
        "guided:light": lambda x, y: log_prob(lora, x, y),
        "trajectory": lambda x, y: head_score(trajectory, x, y),
        "arm − base": lambda x, y: log_prob(arm, x, y) - log_prob(base, x, y),
        "lora − base": lambda x, y: log_prob(lora, x, y) - log_prob(base, x, y),
        "guided:full − base": lambda x, y: log_prob(arm, x, y) - log_prob(base, x, y),
        "guided:light − base": lambda x, y: log_prob(lora, x, y) - log_prob(base, x, y),
        "guided": lambda x, y: guided_gain(base, {arm: 1.0, lora: 0.5}, x, y),
        "base guided by arm": lambda x, y: guided_gain(base, {arm: 1.0}, x, y),
        "base guided by lora": lambda x, y: guided_gain(base, {lora: 1.0}, x, y),
    }


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_equal_each_model_asked_by_itself(root: Path, batch_size: int) -> None:
    models = ("arm", "lora", "guided", "trajectory")
    result = run(root, *models, base=str(root / "base"), batch_size=batch_size)
    expected = scorers(root)
    assert [measured.name for measured in result.measured] == [name for name in expected if name != "base"]
    kinds = ["arm"] * 4 + ["trajectory"] + ["implicit"] * 4 + ["policy"] * 3
    assert [measured.kind for measured in result.measured] == kinds
    for measured in result.measured:
        score, found = expected[measured.name], measured.scores
        sides = reference(score, 1), reference(score, 2)
        assert found.chosen_B.tolist() == pytest.approx(sides[0], abs=2e-4), measured.name
        assert found.rejected_B.tolist() == pytest.approx(sides[1], abs=2e-4), measured.name
        right = [y > n for y, n in zip(*sides, strict=True)]
        assert measured.figures.overall.right.count == sum(right)
        assert (measured.weights is None) == (measured.kind != "policy")
        # Responses are one token per word here, and the end of the turn counts.
        assert found.chosen_length_B.tolist() == [len(row[1].split()) + 1 for row in ROWS]


def test_differences_and_wishes_are_scored_as_what_they_are_and_the_policy_is_their_mixture(root: Path) -> None:
    """Against sums over transformers' own forwards of each member, with other weights than the folder's for some."""
    base, arm, untuned = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("base", "arm", "untuned"))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "lora")
    tokenizer = tiny_tokenizer()

    def conversation(row: Any) -> list[int]:
        messages = [{"role": "system", "content": WISH}, {"role": "user", "content": row[0]}]
        return encode_pair(tokenizer, messages, "w1")[0]

    contexts = {
        tuple(encode_pair(tokenizer, [{"role": "user", "content": r[0]}], "w1")[0]): conversation(r) for r in ROWS
    }
    expected: dict[str, Callable[[list[int], list[int]], float]] = {
        "mixed:full": lambda x, y: log_prob(arm, x, y),
        "mixed:near": lambda x, y: log_prob(lora, x, y) - log_prob(base, x, y),
        "mixed:far": lambda x, y: log_prob(arm, x, y) - log_prob(untuned, x, y),
        "mixed:wish": lambda x, y: log_prob(base, contexts[tuple(x)], y) - log_prob(base, x, y),
        "mixed": lambda x, y: guided_gain(
            base,
            # full 0.3 and far 0.5 are one model; near −0.7 and the wish 2 leave the base with 1 + 0.7 − 2
            {arm: 0.3 + 0.5, untuned: -0.5, lora: -0.7, base: 0.7 - 2.0, None: 2.0},
            x,
            y,
            contexts[tuple(x)],
        ),
    }
    result = run(root, "mixed", weights="wish=2", batch_size=5)
    assert {m.name: m.kind for m in result.measured} == dict(
        zip(expected, ["arm", "tuned", "tuned", "wish", "policy"], strict=True)
    )
    assert result.measured[-1].weights == {"full": 0.3, "near": -0.7, "far": 0.5, "wish": 2.0}
    for measured in result.measured:
        score = expected[measured.name]
        assert measured.scores.chosen_B.tolist() == pytest.approx(reference(score, 1), abs=1e-3), measured.name
        assert measured.scores.rejected_B.tolist() == pytest.approx(reference(score, 2), abs=1e-3), measured.name


def test_a_policy_is_what_genarm_score_says_of_it_within_its_budget_too(root: Path) -> None:
    model = GuidedForCausalLM.from_pretrained(root / "mixed", dtype="float32")
    for max_kl in (None, 0.05):
        policy = run(root, "mixed", max_kl=max_kl).measured[-1]
        for row, found in zip(ROWS, policy.scores.chosen_B, strict=True):
            said = model.token_rewards([{"role": "user", "content": row[0]}], row[1], max_kl=max_kl).totals
            assert found == pytest.approx(said["guided"] - said["base"], abs=1e-4)
        assert policy.max_kl == max_kl


def test_without_weights_the_policy_is_the_base(root: Path) -> None:
    policy = run(root, "mixed", weights="full=0,near=0,far=0,wish=0").measured[-1]
    assert not policy.scores.margin_B.any()
    assert (policy.figures.overall.right.count, policy.figures.overall.ties) == (0, len(ROWS))


@pytest.mark.parametrize("name", ["wish", "near"])
def test_a_difference_to_the_base_at_weight_1_is_the_policy_itself(root: Path, name: str) -> None:
    """log Z = 0: the prompted base, or the tuned model."""
    weights = ",".join(f"{other}={float(other == name)}" for other in ("full", "near", "far", "wish"))
    by_name = {measured.name: measured.scores for measured in run(root, "mixed", weights=weights).measured}
    policy, reward = by_name["mixed"], by_name[f"mixed:{name}"]
    for one, other in ((policy.chosen_B, reward.chosen_B), (policy.rejected_B, reward.rejected_B)):
        assert one.tolist() == pytest.approx(other.tolist(), abs=1e-4)


def test_an_arm_that_was_trained_as_a_difference_to_its_start_is_scored_as_one(root: Path, tmp_path: Path) -> None:
    """By what genarm train notes beside an adapter and a whole model; alone, and guiding its start or another base."""
    for name in ("lora", "arm"):
        shutil.copytree(root / name, tmp_path / name)
        (tmp_path / name / "train_config.toml").write_text(f'start = "zero"\nmodel = "{root / "untuned"}"\n')
    base, arm, untuned = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("base", "arm", "untuned"))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "lora")
    expected = {
        "lora": lambda x, y: log_prob(lora, x, y) - log_prob(base, x, y),
        "arm": lambda x, y: log_prob(arm, x, y) - log_prob(untuned, x, y),
        "base guided by lora": lambda x, y: log_prob(lora, x, y) - log_prob(base, x, y),  # log Z = 0
        "base guided by arm": lambda x, y: guided_gain(base, {arm: 1.0, untuned: -1.0}, x, y),
    }
    models = (str(tmp_path / "lora"), str(tmp_path / "arm"))
    result = run(root, *models, base=str(root / "base"))
    assert {m.name: m.kind for m in result.measured} == dict(
        zip(expected, ["tuned", "tuned", "policy", "policy"], strict=True)
    )
    for measured in result.measured:
        assert measured.scores.chosen_B.tolist() == pytest.approx(reference(expected[measured.name], 1), abs=1e-3)
    alone = run(root, *models).measured
    assert [m.scores.margin_B.tolist() for m in alone] == [
        pytest.approx(m.scores.margin_B.tolist(), abs=1e-3) for m in result.measured[:2]
    ]


def test_few_distributions_at_once_say_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(root, "mixed").measured
    monkeypatch.setattr(accuracy_models, "_ENTRIES", 1)
    for one, other in zip(whole, run(root, "mixed").measured, strict=True):
        assert one.scores.margin_B.tolist() == pytest.approx(other.scores.margin_B.tolist(), abs=1e-4)


def test_a_prompt_that_must_be_cut_has_no_wish_before_it(root: Path) -> None:
    prompts = [len(encode_pair(tiny_tokenizer(), [{"role": "user", "content": r[0]}], "w1")[0]) for r in ROWS]
    (*_, policy) = run(root, "mixed", max_prompt_tokens=max(prompts) - 1, max_response_tokens=16).measured
    assert policy.report.dropped == {"no room for the words of a wish before the prompt": prompts.count(max(prompts))}
    assert policy.report.cut_prompts == 0


def test_an_adapter_reads_pairs_by_the_template_that_it_was_trained_with(root: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"w39 w39 {TEMPLATE}"
    shutil.copytree(root / "lora", tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    found = run(tmp_path, "lora", data=str(root / "pairs.jsonl")).measured[0].scores.chosen_B[0]
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "lora")
    prompt, chosen = encode_pair(tokenizer, [{"role": "user", "content": ROWS[0][0]}], ROWS[0][1])
    assert found == pytest.approx(log_prob(lora, prompt, chosen), abs=1e-4)
    assert abs(found - reference(lambda x, y: log_prob(lora, x, y), 1)[0]) > 1e-2


def test_order_of_the_pairs_changes_no_score(root: Path, tmp_path: Path) -> None:
    turned = write_pairs(tmp_path / "turned.jsonl", ROWS[::-1])
    for name in ("arm", "trajectory"):
        one = run(root, name, batch_size=3).measured[0].scores
        other = run(root, name, data=str(turned), batch_size=3).measured[0].scores
        assert one.margin_B.tolist() == pytest.approx(other.margin_B[::-1].tolist(), abs=1e-4)


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("mamba", False)])
def test_pairs_are_read_as_in_training(
    family: str,
    packed: bool,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each prompt once where the family can be read so; else in so many words, padded, and the same scores."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    few = {"num_attention_heads": 4} if packed else {"state_size": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **few, initializer_range=0.3)).eval()
    save_member(model, tmp_path / family)
    usual, read = torch.nn.Embedding.forward, list[int]()

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        read.append(ids.numel())
        return usual(self, ids)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Embedding, "forward", forward)
        found = run(tmp_path, family, data=str(root / "pairs.jsonl"), batch_size=12).measured[0].scores
    sides = [reference(lambda x, y: log_prob(model, x, y), side) for side in (1, 2)]
    assert found.chosen_B.tolist() == pytest.approx(sides[0], abs=1e-4)
    assert found.rejected_B.tolist() == pytest.approx(sides[1], abs=1e-4)
    pairs = [
        [encode_pair(tiny_tokenizer(), [{"role": "user", "content": x}], reply) for reply in replies]
        for x, *replies, _ in ROWS
    ]
    once = sum(len(prompt) + len(chosen) + len(rejected) for (prompt, chosen), (_, rejected) in pairs)
    longest = max(len(prompt) + len(reply) for pair in pairs for prompt, reply in pair)
    assert read[-1] == (once if packed else 2 * len(ROWS) * longest)
    assert ("pairs are not packed" in caplog.text) != packed


def test_accuracy_is_what_training_reports(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=48)
    trained = train(TrainConfig(**{**settings, "lora": True, "learning_rate": 1e-2}), console=Console(quiet=True))
    limits = {"max_prompt_tokens": 16, "max_response_tokens": 16}
    (measured,) = run(tmp_path, "arm", data=settings["eval_data"], **limits).measured
    for suffix, found in {
        "": measured.figures.overall,
        "_chosen_longer": measured.figures.lengths["chosen longer"],
        "_rejected_longer": measured.figures.lengths["rejected longer"],
        "_equal_length": measured.figures.lengths["same length"],
    }.items():
        assert found.right.rate == pytest.approx(trained.metrics[f"eval_accuracy{suffix}"])
        assert found.right.n == trained.metrics[f"eval_pairs{suffix}"]
        assert found.right.low == pytest.approx(trained.metrics[f"eval_accuracy{suffix}_low"])
    assert measured.figures.margin == pytest.approx(trained.metrics["eval_margin"], abs=1e-4)


# --- models whose figures are known ---------------------------------------------------------------------------------


def test_a_uniform_arm_knows_length_alone(root: Path) -> None:
    """Every token costs log V: the shorter response always wins, and per token all is a tie."""
    (measured,) = run(root, "uniform").measured
    found = measured.figures
    assert measured.scores.chosen_B.tolist() == pytest.approx(
        [-(len(row[1].split()) + 1) * math.log(VOCAB_SIZE) for row in ROWS]
    )
    counts = {name: (of.right.count, of.right.n, of.ties) for name, of in found.lengths.items()}
    assert counts == {"chosen longer": (0, 2, 0), "rejected longer": (2, 2, 0), "same length": (0, 2, 2)}
    assert (found.overall.right.count, found.overall.right.n, found.overall.ties) == (2, 6, 2)
    assert found.balanced is not None
    assert found.balanced.value == 0.5
    assert found.length_correlation is not None
    assert found.length_correlation.value == pytest.approx(-1)


def test_a_constant_trajectory_reward_ties_and_is_never_right(root: Path, tmp_path: Path) -> None:
    save_trajectory(tmp_path / "constant", seed=0, zero=True)
    (measured,) = run(tmp_path, "constant", data=str(root / "pairs.jsonl")).measured
    assert (measured.figures.overall.right.count, measured.figures.overall.ties) == (0, 6)
    assert measured.figures.length_correlation is None
    assert measured.per_token is None


def test_the_base_has_no_implicit_reward_over_itself(root: Path) -> None:
    result = run(root, "base", "arm", base=str(root / "base"))
    assert [m.name for m in result.measured] == ["base", "arm", "arm − base", "base guided by arm"]


def test_what_a_guided_model_says_of_its_members_is_not_asked_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ARMs and the base are scored with the policies, unless their pairs are in other tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"w39 {TEMPLATE}"
    shutil.copytree(root / "lora", tmp_path / "templated")
    tokenizer.save_pretrained(tmp_path / "templated")
    usual, counted = LogProbReward.score, Counter[str]()

    def score(self: LogProbReward, pairs: Any, contexts: Any, batch_size: int) -> Any:
        counted[self.name] += 2 * len(pairs)
        return usual(self, pairs, contexts, batch_size)

    monkeypatch.setattr(LogProbReward, "score", score)
    base = str(root / "base")
    for models, scored in [
        ((root / "base", root / "arm", root / "guided"), {}),
        ((root / "arm", tmp_path / "templated"), {"templated": 12, "base": 12}),
    ]:
        counted.clear()
        result = run(root, *map(str, models), base=base)
        assert counted == scored
    by_name = {measured.name: measured.scores for measured in result.measured}
    for name in ("arm", "templated"):
        of_base = by_name[name].chosen_B - by_name[f"{name} − base"].chosen_B
        own = tokenizer if name == "templated" else tiny_tokenizer()
        plain = AutoModelForCausalLM.from_pretrained(root / "base")
        expected = [log_prob(plain, *encode_pair(own, [{"role": "user", "content": r[0]}], r[1])) for r in ROWS]
        assert of_base.tolist() == pytest.approx(expected, abs=1e-4)


# --- figures --------------------------------------------------------------------------------------------------------


def scores_of(margins: list[float], longer: list[int], rows: list[int] | None = None) -> Scores:
    n = len(margins)
    return Scores(
        rows=np.array(range(n) if rows is None else rows),
        chosen_B=np.array(margins, dtype=float),
        rejected_B=np.zeros(n),
        chosen_length_B=np.array(longer) + 10,
        rejected_length_B=np.full(n, 10),
    )


def test_groups_ties_and_both_ways_of_averaging() -> None:
    scores = scores_of([1, 2, -1, 0, 3, -2, 0], [2, 1, 1, 1, -3, -1, 0])
    found = figures(scores, ["a", "a", "a", "a", "b", "c", "c"])
    assert (found.overall.right.count, found.overall.right.n, found.overall.ties) == (3, 7, 2)
    assert found.overall.right == proportion(3, 7)
    assert {name: (of.right.count, of.right.n, of.ties) for name, of in found.categories.items()} == {
        **{"a": (2, 4, 1), "b": (1, 1, 0), "c": (0, 2, 1)}
    }
    assert found.macro is not None
    assert found.macro.value == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found.balanced is not None
    assert found.balanced.value == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert found.lengths["same length"].ties == 1
    assert found.margin == pytest.approx(3 / 7)
    assert figures(scores, None).macro is None


def test_one_half_is_no_balance() -> None:
    assert figures(scores_of([1, -1], [1, 2]), None).balanced is None
    assert figures(scores_of([1, -1], [0, 0]), None).lengths["chosen longer"].right.n == 0


def test_per_token_scores_are_divided_by_their_own_length() -> None:
    scores = Scores(
        rows=np.arange(2),
        chosen_B=np.array([-6.0, -3.0]),
        rejected_B=np.array([-4.0, -1.0]),
        chosen_length_B=np.array([6, 3]),
        rejected_length_B=np.array([2, 1]),
    )
    assert scores.per_token().margin_B.tolist() == [1.0, 0.0]
    assert scores.margin_B.tolist() == [-2.0, -2.0]


def test_mean_of_proportions() -> None:
    one = proportion(30, 40)
    found = mean_of([one])
    assert (found.value, found.low, found.high) == pytest.approx((one.rate, one.low, one.high))
    # Against resampling: a resampled proportion is binomial.
    rng = np.random.default_rng(0)
    parts = [(120, 200), (70, 100), (260, 400)]
    drawn = np.mean([rng.binomial(n, count / n, 40_000) / n for count, n in parts], axis=0)
    found = mean_of([proportion(count, n) for count, n in parts])
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=4e-3)
    assert 0 <= mean_of([proportion(0, 3), proportion(0, 2)]).low < 1e-12


def test_correlation_with_length() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=300)
    y = 0.5 * x + rng.normal(size=300)
    found = correlation(x, y)
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    half = 1.959964 / math.sqrt(297)
    centre = math.atanh(found.value)
    assert (found.low, found.high) == pytest.approx((math.tanh(centre - half), math.tanh(centre + half)), abs=1e-6)
    assert correlation(x[:3], y[:3]) is None
    assert correlation(np.ones(9), y[:9]) is None
    longer = rng.integers(-5, 6, size=60)
    margins = rng.normal(size=60)
    of = figures(scores_of(margins.tolist(), longer.tolist()), None).length_correlation
    assert of is not None
    assert of.value == pytest.approx(pearsonr(margins, longer).statistic)


def test_paired_difference_against_resampled_pairs() -> None:
    rng = np.random.default_rng(2)
    common, own = rng.random(600) < 0.5, rng.random((2, 600))
    right_1, right_2 = (np.where(common, own[0] < 0.6, own[k] < 0.6 + 0.1 * k) for k in (0, 1))
    first, second = (scores_of(np.where(right, 1.0, -1.0).tolist(), [0] * 600) for right in (right_1, right_2))
    found = difference(("one", first), ("two", second))
    assert found is not None
    assert (found.only_first, found.only_second) == ((right_1 & ~right_2).sum(), (~right_1 & right_2).sum())
    each = right_2.astype(float) - right_1
    drawn = each[rng.integers(0, 600, (10_000, 600))].mean(-1)
    assert found.accuracy.value == pytest.approx(each.mean())
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=3e-3)
    n, k = found.only_first + found.only_second, min(found.only_first, found.only_second)
    assert found.p_value == pytest.approx(min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n))


def both_right(both: int, one: int, other: int, neither: int) -> tuple[Scores, Scores]:
    """Pairs that both rewards have right, the first alone, the second alone, and neither."""
    first = [1.0] * (both + one) + [-1.0] * (other + neither)
    second = [1.0] * both + [-1.0] * one + [1.0] * other + [-1.0] * neither
    return scores_of(first, [0] * len(first)), scores_of(second, [0] * len(first))


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((6, 0, 0, 6), -0.2425, 0.2425), ((50, 0, 0, 50), -0.0370, 0.0370), ((0, 0, 0, 1), -0.7935, 0.7935)],
)
def test_rewards_that_agree_everywhere_still_have_an_interval(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    first, second = both_right(*cells)
    found = difference(("one", first), ("two", second))
    assert found is not None
    assert (found.accuracy.value, found.accuracy.low, found.accuracy.high) == pytest.approx((0, low, high), abs=1e-4)


@pytest.mark.parametrize(
    "cells", [(36, 12, 2, 0), (99, 1, 0, 0), (43, 0, 1, 0), (3, 0, 9, 0), (10, 4, 4, 2), (0, 5, 0, 0)]
)
def test_paired_interval_is_what_the_score_test_does_not_refuse(cells: tuple[int, int, int, int]) -> None:
    """Against the likelihood under each difference, maximised by trying everything."""
    n, one, other = sum(cells), cells[1], cells[2]
    found = difference(*zip(("one", "two"), both_right(*cells), strict=True))  # type: ignore[arg-type]
    assert found is not None
    p = np.linspace(0, 1, 20_001)
    accepted = []
    for tried in np.linspace(-1, 1, 1001):
        q = p + tried  # p: the first alone; q: the second alone
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [
                np.where(k == 0, 0.0, k * np.log(x)) for k, x in ((one, p), (other, q), (n - one - other, 1 - p - q))
            ]
        possible = (q >= 0) & (p + q <= 1)
        likely = np.where(possible, np.nan_to_num(sum(parts), nan=-np.inf), -np.inf)
        if not possible.any() or np.isneginf(likely.max()):
            continue
        best = p[likely.argmax()]
        variance = n * (2 * best + tried - tried**2)
        if (other - one - n * tried) ** 2 <= 1.959964**2 * variance + 1e-9:
            accepted.append(tried)
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((min(accepted), max(accepted)), abs=4e-3)
    back = difference(*zip(("two", "one"), reversed(both_right(*cells)), strict=True))  # type: ignore[arg-type]
    assert back is not None
    assert (-back.accuracy.high, -back.accuracy.low) == pytest.approx((found.accuracy.low, found.accuracy.high))


def test_paired_interval_covers_the_truth() -> None:
    """Exactly, by all outcomes of 12 pairs: where rewards hardly ever differ too."""
    n = 12
    for p, q in ((0.0, 0.0), (0.02, 0.01), (0.1, 0.1), (0.3, 0.1)):
        covered = 0.0
        for one in range(n + 1):
            for other in range(n + 1 - one):
                rest = n - one - other
                ways = math.comb(n, one) * math.comb(n - one, other)
                found = difference(*zip(("1", "2"), both_right(rest, one, other, 0), strict=True))  # type: ignore[arg-type]
                assert found is not None
                if found.accuracy.low - 1e-9 <= q - p <= found.accuracy.high + 1e-9:
                    covered += ways * p**one * q**other * (1 - p - q) ** rest
        assert covered > 0.93


def test_difference_is_on_common_pairs_and_a_tie_is_not_right() -> None:
    first = scores_of([1, 1, -1, 0], [0] * 4, rows=[0, 1, 2, 5])
    second = scores_of([-1, 1, 1], [0] * 3, rows=[1, 5, 7])
    found = difference(("one", first), ("two", second))
    assert found is not None
    assert (found.n, found.only_first, found.only_second, found.accuracy.value) == (2, 1, 1, 0)
    assert found.p_value == 1
    assert difference(("one", first), ("two", scores_of([1], [0], rows=[9]))) is None
    same = difference(("one", first), ("two", first))
    assert same is not None
    assert (same.accuracy.value, same.p_value) == (0, 1)


# --- data -----------------------------------------------------------------------------------------------------------


def test_categories_of_the_data(root: Path) -> None:
    found = run(root, "arm", category="subset").measured[0].figures
    assert {name: of.right.n for name, of in found.categories.items()} == {"(none)": 1, "chat": 2, "safety": 3}
    assert found.macro is not None
    assert found.macro.value == pytest.approx(np.mean([of.right.rate for of in found.categories.values()]))


def test_long_pairs_are_cut_and_useless_ones_dropped(root: Path, tmp_path: Path) -> None:
    more = [*ROWS, ("w1", "w2", "w2", "chat"), ("w1", "", "w2", "chat"), ("w1", "w2 w3 w4 w5", "w2 w3 w4 w6", "chat")]
    data = str(write_pairs(tmp_path / "more.jsonl", more))
    result = run(root, "arm", data=data, max_prompt_tokens=4, max_response_tokens=3)
    (measured,) = result.measured
    report = measured.report
    assert (result.rows, report.kept, measured.figures.overall.right.n) == (9, 6, 6)
    assert sorted(report.dropped.values()) == [1, 1, 1]
    assert (report.cut_prompts, report.cut_chosen, report.cut_rejected) == (4, 2, 2)
    assert measured.scores.rows.tolist() == [0, 1, 2, 3, 4, 5]
    # The first response, cut, has three of its words and no end.
    model = AutoModelForCausalLM.from_pretrained(root / "arm")
    prompt, chosen = encode_pair(tiny_tokenizer(), [{"role": "user", "content": ROWS[0][0]}], ROWS[0][1])
    assert measured.scores.chosen_B[0] == pytest.approx(log_prob(model, prompt[-4:], chosen[:3]), abs=1e-4)


def test_what_does_not_fit_the_context_is_cut_by_default(root: Path, tmp_path: Path) -> None:
    long = " ".join(WORDS) + " "
    data = str(write_pairs(tmp_path / "long.jsonl", [(long * 3, long * 3, "w1", "chat")]))
    (measured,) = run(root, "arm", data=data).measured
    assert (measured.limit.prompt, measured.limit.response) == (64, 64)
    assert (measured.report.cut_prompts, measured.report.cut_chosen) == (1, 1)


def test_texts_are_not_read_together_with_those_that_would_rescale_them(root: Path, tmp_path: Path) -> None:
    """Beyond 24 positions a longrope model reads every text of the batch otherwise."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = AutoConfig.for_model(
        "phi3",
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 96},
        **{"original_max_position_embeddings": 24, "rope_parameters": rope, "initializer_range": 0.3},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    save_member(model, tmp_path / "far")
    data = str(write_pairs(tmp_path / "pairs.jsonl", [*ROWS, ("w1", " ".join(["w2"] * 40), "w3", None)]))
    found = run(tmp_path, "far", data=data).measured[0].scores.rejected_B  # cut to what fits by itself
    expected = reference(lambda x, y: log_prob(model, x, y), 2)
    assert found[: len(ROWS)].tolist() == pytest.approx(expected, abs=1e-4)
    longer = {"data": data, "max_prompt_tokens": 24, "max_response_tokens": 24}
    with pytest.raises(ConfigError, match="into the 24 tokens of context that far has for texts read together"):
        run(tmp_path, "far", **longer)
    with pytest.raises(ConfigError, match=r"into the 24 tokens of context that .*far has for texts read together"):
        resolve(TrainConfig(model=str(tmp_path / "far"), output=tmp_path / "arm", **longer))
    compose(root / "base", {"far": tmp_path / "far"}, tmp_path / "guided")
    with pytest.raises(ConfigError, match="'far' of guided has 24 positions for texts read together; lower"):
        run(tmp_path, "guided", data=data)


def test_a_short_base_shortens_what_both_read(root: Path, tmp_path: Path) -> None:
    short = tiny_model(seed=5)
    short.config.max_position_embeddings = 40
    save_member(short, tmp_path / "short")
    arm, trajectory, implicit, _ = run(root, "arm", "trajectory", base=str(tmp_path / "short")).measured
    assert (arm.limit.prompt, implicit.limit.response, trajectory.limit.prompt) == (20, 20, 64)


def test_models_with_other_vocabularies_are_compared_on_the_pairs_of_both(root: Path, tmp_path: Path) -> None:
    """A model that knows ten words reads the last pairs as unknown words on both sides, and has to drop them."""
    small = tiny_tokenizer(words=WORDS[:20])
    save_member(tiny_model(seed=6, vocab_size=len(small)), tmp_path / "small", small)
    result = run(tmp_path, "small", str(root / "arm"), data=str(root / "pairs.jsonl"))
    one, two = result.measured
    assert one.scores.rows.tolist() == [0, 1, 2, 3]
    assert two.scores.rows.tolist() == [0, 1, 2, 3, 4, 5]
    (of,) = result.differences
    assert of.n == 4
    right = [(m.scores.margin_B[:4] > 0).mean() for m in (one, two)]
    assert of.accuracy.value == pytest.approx(right[1] - right[0])


def test_same_folder_names_are_told_apart(root: Path, tmp_path: Path) -> None:
    save_member(tiny_model(seed=7), tmp_path / "arm")
    compose(root / "base", {"full": root / "arm"}, tmp_path / "guided")
    models = (str(tmp_path / "arm"), str(tmp_path / "guided"))
    names = [measured.name for measured in run(root, "arm", "guided", *models).measured]
    one, other = root / "guided", tmp_path / "guided"
    rewards = [str(root / "arm"), f"{one}:full", f"{one}:light", str(tmp_path / "arm"), f"{other}:full"]
    assert names == [*rewards, str(one), str(other)]


# --- the command ----------------------------------------------------------------------------------------------------


def test_output_holds_every_figure_and_every_score(root: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "deep" / "result.json"
    models = (root / "arm", root / "trajectory")
    words = ("--data", root / "pairs.jsonl", "--category", "subset", "--dtype", "float32", "--output", output)
    assert command_line(*models, *words) == 0
    out, err = capsys.readouterr()
    assert f"wrote {output}" in err
    record = json.loads(output.read_text())
    settings = settings_of(root, "arm", "trajectory", category="subset")
    assert record["command"] == command(settings)
    assert {"date", "code", "machine", "settings", "format"} <= set(record)
    arm, trajectory = record["models"]
    assert (arm["name"], arm["kind"], trajectory["kind"], trajectory["per_token"]) == ("arm", "arm", "trajectory", None)
    assert arm["data"] == {**arm["data"], "rows": 6, "kept": 6, "dropped": {}}
    measured = run(root, "arm", "trajectory", category="subset").measured
    rate = measured[0].figures.overall.right
    assert arm["figures"]["overall"]["right"] == {**vars(rate)}
    assert (len(record["differences"]), record["differences"][0]["n"]) == (1, 6)
    rows = [json.loads(line) for line in (output.parent / record["scores"]).read_text().splitlines()]
    assert [(row["row"], row["category"]) for row in rows] == [
        (i, category or "(none)") for i, (*_, category) in enumerate(ROWS)
    ]
    assert [row["scores"]["arm"]["chosen"] for row in rows] == pytest.approx(measured[0].scores.chosen_B.tolist())
    assert rows[0]["scores"]["trajectory"]["rejected_tokens"] == 2
    for text in (f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]", "mean of the categories", "length-balanced"):
        assert text in out
    assert len(list(output.parent.iterdir())) == 2


def test_what_has_no_number_is_null_and_a_dash(root: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_pairs(tmp_path / "one.jsonl", ROWS[4:5])
    assert command_line(root / "arm", "--data", data, "--output", tmp_path / "r.json") == 0
    figures_ = json.loads((tmp_path / "r.json").read_text())["models"][0]["figures"]
    assert figures_["lengths"]["chosen longer"]["right"] == {
        "count": 0,
        "n": 0,
        "rate": None,
        "low": None,
        "high": None,
    }
    assert (figures_["balanced"], figures_["length_correlation"], figures_["macro"]) == (None, None, None)
    out = capsys.readouterr().out
    rows = {line[:33].strip(): line[33:].split() for line in out.splitlines()}
    assert rows["chosen longer"] == ["0", "–", "0", "–", "0"]
    assert (rows["length-balanced"], rows["correlation of margin and length"]) == (["–", "–"], ["–", "–"])


def test_the_command_written_down_measures_the_same(root: Path) -> None:
    changes = {
        "base": "b c",
        "weights": "a=1,b=-2",
        "max_kl": 0.5,
        "objective": "safer",
        "batch_size": 3,
        "trust_remote_code": True,
        "split": "test[:9]",
    }
    settings = settings_of(root, "arm", "lora", category="subset", max_prompt_tokens=9, device="cpu", **changes)
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    program, verb, *words = shlex.split(command(settings))
    assert (program, verb) == ("genarm", "accuracy")
    parsed = parser.parse_args(words)
    assert parsed.output is None
    assert settings_from(parsed, AccuracySettings) == settings


def test_names_from_the_data_cannot_steer_the_terminal(root: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "evil.jsonl", [(*row[:3], "\x1b[31m[bold]red") for row in ROWS])
    result = run(root, "arm", data=str(data), category="subset")
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        print_result(console, result)
    assert "\x1b" not in captured.get()
    assert "\ufffd[31m[bold]red" in captured.get()


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"models": ("nowhere",)}, MemberError, "there is no folder 'nowhere' here"),
        ({"models": ()}, ConfigError, "no model to measure"),
        ({"batch_size": 0}, ConfigError, "--batch-size must be at least 1, got 0"),
        ({"max_response_tokens": 0}, ConfigError, "--max-response-tokens must be at least 1"),
        ({"max_prompt_tokens": 100, "max_response_tokens": 100}, ConfigError, "128 tokens of context that arm has"),
        ({"category": "kind"}, DataError, "no column 'kind' for --category; its columns are prompt, chosen, rejected"),
        ({"category": "prompt"}, DataError, "row 1: 'prompt' is a list; a category must be text or a number"),
        ({"objective": "safer"}, ConfigError, "is for PKU-SafeRLHF only"),
        ({"data": "nowhere.jsonl"}, DataError, "there is no file or folder nowhere.jsonl"),
        ({"device": "mars"}, ConfigError, "cannot use the device 'mars'"),
        ({"weights": "full=1"}, ConfigError, "--weights is for guided policies; give a guided folder, or an ARM with"),
        ({"max_kl": 0.1}, ConfigError, "--max-kl is for guided policies"),
        ({"max_kl": -1}, BudgetError, "max_kl is -1; it must be a number of nats per token, 0 or more"),
    ],
)
def test_mistakes_are_named(root: Path, changes: Any, error: type[GenarmError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(root, "arm", **changes)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("half=1", "no reward is named 'half'; this model has: full, light"),
        ("full=much", "cannot read the weight 'full=much'"),
        ("", "no weight in ''"),
    ],
)
def test_weights_of_no_policy_are_refused(root: Path, weights: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        run(root, "guided", weights=weights)


def test_a_token_that_a_reward_does_not_know_is_named_before_anything_is_scored(root: Path, tmp_path: Path) -> None:
    """The base has a token more than the ARM, and a response has it."""
    more = tiny_tokenizer(extra=("<more>",))
    save_member(tiny_model(seed=3, vocab_size=VOCAB_SIZE + 1), tmp_path / "base", more)
    compose(tmp_path / "base", {"full": root / "arm"}, tmp_path / "guided")
    write_pairs(tmp_path / "pairs.jsonl", [("w1", "w2 <more>", "w3", "chat")])
    with pytest.raises(VocabularyError, match=rf"token id {VOCAB_SIZE}, which the reward 'full' of guided does not"):
        run(tmp_path, "guided")


def test_mistakes_of_the_base_are_named(root: Path, tmp_path: Path) -> None:
    words = [f"other{i}" for i in range(40)]
    save_member(tiny_model(seed=8), tmp_path / "other", tiny_tokenizer(words=words))
    for models, base, error, message in [
        (("arm",), root / "trajectory", MemberError, "must be one causal language model"),
        (("arm",), root / "guided", MemberError, "must be one causal language model"),
        (("trajectory",), root / "arm", MemberError, "none of the models is one beside it"),
        (("arm",), tmp_path / "other", VocabularyError, "other"),
    ]:
        with pytest.raises(error, match=message):
            run(root, *models, base=str(base))


def test_the_same_model_twice_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="is given twice; name each once"):
        run(root, "arm", "arm")


def test_data_without_pairs_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(DataError, match="the columns text fit no preference format"):
        run(root, "arm", data=str(tmp_path / "text.jsonl"))
    data = write_pairs(tmp_path / "equal.jsonl", [("w1", "w2", "w2", "chat")])
    with pytest.raises(DataError, match="no pair is left to score: chosen and rejected are identical"):
        run(root, "arm", data=str(data))


def test_models_that_cannot_score_are_refused(root: Path, tmp_path: Path) -> None:
    data = str(root / "pairs.jsonl")
    tiny_model(seed=0).save_pretrained(tmp_path / "mute")
    with pytest.raises(MemberError, match="has no tokenizer files"):
        run(tmp_path, "mute", data=data)

    save_member(tiny_model(seed=0), tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MemberError, match="broken cannot score pairs: log-probs are nan: its weights are broken, or too"
    ):
        run(tmp_path, "broken", data=data)
    compose(root / "base", {"broken": tmp_path / "broken"}, tmp_path / "guided")
    with pytest.raises(MemberError, match="guided:broken gives scores that are no finite numbers"):
        run(tmp_path, "guided", data=data)

    save_member(tiny_model(seed=0, vocab_size=VOCAB_SIZE - 10), tmp_path / "few")
    with pytest.raises(VocabularyError, match="few knows 36 ids only"):
        run(tmp_path, "few", data=data)

    tiny_lora(tiny_model(seed=0), tmp_path / "lost", seed=0, base_path=str(tmp_path / "gone"))
    with pytest.raises(MemberError, match=r"goes on .*gone, which cannot be opened.*correct base_model_name_or_path"):
        run(tmp_path, "lost", data=data)


def test_models_of_the_hub(root: Path, tmp_path: Path) -> None:
    """From the hub's cache, as a process without a network finds them."""
    for name in ("arm", "guided", "trajectory"):
        snapshot = tmp_path / "hub" / f"models--org--{name}" / "snapshots" / "0123abc"
        shutil.copytree(root / name, snapshot)
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        for revision in ("main", "v2"):
            (refs / revision).write_text("0123abc")
    program = """
import sys
from array import array
from genarm.data.tokens import TokenPair
from genarm.errors import UnsupportedError
from genarm.lab.accuracy.models import open_rewards
pair = TokenPair(prompt_ids=array("l", [6, 7]), chosen_ids=array("l", [8, 1]), rejected_ids=array("l", [9, 1]))
for reference in sys.argv[1:]:
    try:
        files = open_rewards(reference, trust_remote_code=False)
        _, scores = next(files.load(dtype="float32", device="cpu").score([pair], [{}], 2))
        print(files.name, files.context, *scores)
    except UnsupportedError as error:
        print(error)
"""
    references = ["org/arm", "org/arm@v2", "org/trajectory", "org/trajectory@v2", "org/guided"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command_ = [sys.executable, "-c", program, *references]
    done = subprocess.run(command_, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *("org/arm 128 org/arm", "org/arm@v2 128 org/arm@v2", "org/trajectory 128 org/trajectory"),
        "org/trajectory@v2 is a trajectory reward; of these only the main revision can be loaded",
        "org/guided 128 base full light guided",
    ]


def test_a_folder_is_no_output(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        command_line(root / "arm", "--data", root / "pairs.jsonl", "--output", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write --output"):
        command_line(root / "arm", "--data", root / "pairs.jsonl", "--output", tmp_path / "file" / "result.json")


@pytest.mark.skipif(not (SHARED / "models/lm-small").is_dir(), reason="the small models of ../shared are not there")
def test_untrained_log_probs_of_real_pairs_follow_length() -> None:
    data = str(SHARED / "data/pku-safer/test.jsonl")
    (measured,) = run(SHARED / "models", "lm-small", data=data, split="train[:60]", batch_size=20).measured
    assert measured.figures.length_correlation is not None
    assert measured.figures.length_correlation.high < -0.9
    assert measured.figures.lengths["rejected longer"].right.low > measured.figures.lengths["chosen longer"].right.high
    assert measured.per_token is not None
    assert measured.per_token.length_correlation is not None
    assert abs(measured.per_token.length_correlation.value) < 0.5
