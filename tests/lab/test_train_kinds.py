"""The baselines' training: each learns, by the loss that it should have, and leaves a folder that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from builders.toy_training import GOOD, toy_preferences, write_toy
from genarm.cli.main import main
from genarm.errors import ConfigError, DataError, GenarmError, MemberError, MissingExtraError, VocabularyError
from genarm.lab.training.rlhf import parse_rewards
from genarm.text.prompts import encode_pair
from genarm.training.config import TrainConfig, make_config
from genarm.training.run import TrainResult, train

pytest.importorskip("trl")

QUIET = Console(quiet=True)


def run(settings: dict[str, Any], **changes: Any) -> TrainResult:
    return train(TrainConfig(**{**settings, **changes}), console=QUIET)


def log_of(result: TrainResult) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]


def ids_of(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    prompt, chosen = encode_pair(tokenizer, row["prompt"], row["chosen"][0]["content"])
    return prompt, chosen, encode_pair(tokenizer, row["prompt"], row["rejected"][0]["content"])[1]


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π(response | prompt) of one sequence, by the chain rule."""
    log_probs = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return torch.stack([log_probs[len(prompt) + t - 1, token] for t, token in enumerate(response)]).sum()


# --- trajectory ----------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The head's value at the very last token of one unpadded sequence, without transformers' search for padding."""
    hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
    return model.score(hidden)[0, -1, 0]


@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_trajectory_reward_learns(family: str, lora: bool, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, family=family, n=240, spread=0.25), "kind": "trajectory"}
    result = run(settings, lora=lora, learning_rate=2e-2 if lora else 1e-2, bf16=lora)
    before = log_of(result)[0]
    assert before["step"] == 0
    assert result.metrics["eval_accuracy_low"] > 0.8
    assert result.metrics["eval_loss"] < before["eval_loss"]
    assert result.metrics["eval_pairs"] == 60

    model = AutoModelForSequenceClassification.from_pretrained(result.output)
    assert type(model).__name__.endswith("ForSequenceClassification")  # merged: nothing of peft is left
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    right = 0
    for row in toy_preferences(60, seed=1):
        prompt, chosen, rejected = ids_of(tokenizer, row)
        right += bool(score(model, prompt, chosen) > score(model, prompt, rejected))
    assert right / 60 == pytest.approx(result.metrics["eval_accuracy"], abs=0.02 if lora else 1e-9)
    card = (result.output / "README.md").read_text()
    for text in ("a trajectory-level reward model", "AutoModelForSequenceClassification", 'kind = "trajectory"'):
        assert text in card
    assert "beta" not in card


def test_first_trajectory_loss_is_bradley_terry(tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=8), "kind": "trajectory", "eval_fraction": 0.0}
    del settings["eval_data"]
    result = run(settings, max_steps=1, warmup=0.5)  # a first step of the warm-up has learning rate 0
    (entry,) = [entry for entry in log_of(result) if "loss" in entry]
    assert entry["learning_rate"] == 0
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(result.output), tiny_tokenizer()
    rows = [ids_of(tokenizer, row) for row in toy_preferences(8, seed=0)]
    margins = torch.stack([score(model, prompt, y) - score(model, prompt, n) for prompt, y, n in rows])
    assert entry["loss"] == pytest.approx(float(torch.log1p(torch.exp(-margins)).mean()), abs=1e-5)
    assert entry["margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
    chosen = torch.stack([score(model, prompt, y) for prompt, y, _ in rows]).mean()
    assert entry["chosen_reward"] == pytest.approx(float(chosen), abs=1e-5)


# --- DPO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_dpo_learns_and_reports_its_implicit_rewards(lora: bool, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=240, spread=0.25), "kind": "dpo", "lora": lora}
    result = run(settings, learning_rate=5e-3 if lora else 1e-3, beta=0.2)
    entries = log_of(result)
    assert entries[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-4)  # the policy starts as its reference
    assert result.metrics["eval_accuracy_low"] > 0.7

    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    if lora:
        from peft import PeftModel

        policy: Any = PeftModel.from_pretrained(base, result.output)
        base = AutoModelForCausalLM.from_pretrained(settings["model"])
        assert not [key for key in load_file(result.output / "adapter_model.safetensors") if "ref" in key]
    else:
        policy = AutoModelForCausalLM.from_pretrained(result.output)
    rows = [ids_of(tiny_tokenizer(), row) for row in toy_preferences(60, seed=1)]
    margins = torch.stack(
        [
            log_prob(policy, x, y) - log_prob(base, x, y) - log_prob(policy, x, n) + log_prob(base, x, n)
            for x, y, n in rows
        ]
    )
    assert result.metrics["eval_margin"] == pytest.approx(float(margins.mean()), abs=1e-3)
    assert result.metrics["eval_accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    assert result.metrics["eval_loss"] == pytest.approx(float(torch.log1p(torch.exp(-0.2 * margins)).mean()), abs=1e-4)


def test_second_dpo_loss_matches_the_formula(tmp_path: Path) -> None:
    """The loss that trl trains on, at the weights after one step: a checkpoint of the same run has them."""
    settings = {**write_toy(tmp_path, n=8), "kind": "dpo", "eval_fraction": 0.0, "save_steps": 1, "epochs": 2.0}
    del settings["eval_data"]
    result = run(settings, warmup=0.0, schedule="constant")
    loss = [entry for entry in log_of(result) if "loss" in entry][1]
    policy = AutoModelForCausalLM.from_pretrained(result.output / "checkpoints" / "checkpoint-1")
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    rows = [ids_of(tiny_tokenizer(), row) for row in toy_preferences(8, seed=0)]
    margins = torch.stack(
        [
            log_prob(policy, x, y) - log_prob(base, x, y) - log_prob(policy, x, n) + log_prob(base, x, n)
            for x, y, n in rows
        ]
    )
    assert abs(float(margins.mean())) > 0.1
    assert loss["loss"] == pytest.approx(float(torch.log1p(torch.exp(-0.1 * margins)).mean()), abs=1e-5)
    assert loss["margin"] == pytest.approx(float(margins.mean()), rel=1e-4)  # in nats, not times β


# --- RLHF ----------------------------------------------------------------------------------------------------


def save_reward(folder: Path, tokenizer: Any = None) -> Path:
    """A trajectory reward that is +1 where the last token is a good word, −1 for another and 0 for the end."""
    tokenizer = tokenizer or tiny_tokenizer()
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    good = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in GOOD])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding = model.model.embed_tokens.weight
        embedding[:, 1] = 1.0  # RMSNorm makes rows (±1, 1, 0, 0) · √2, and the head reads the first
        embedding[:, 0] = -1.0
        embedding[good, 0] = 1.0
        embedding[tokenizer.eos_token_id, 0] = 0.0
        model.score.weight[0, 0] = 2**-0.5
    return save_member(model, folder, tokenizer)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward(tmp_path_factory.mktemp("reward"))


def test_reward_of_the_tests(reward: Path) -> None:
    from genarm.lab.training.rewards import load_rewards

    tokenizer = tiny_tokenizer()
    (found,) = load_rewards(f"good={reward}:2", tokenizer)
    replies = [tokenizer.convert_tokens_to_ids(words) for words in (["w30", "w3"], ["w3", "w30"], ["w3", "<end>"])]
    assert found.score([[9, 9], [7], [8, 8, 8]], replies) == pytest.approx([1.0, -1.0, 0.0], abs=1e-3)
    assert (found.name, found.weight) == ("good", 2.0)


RLHF: dict[str, Any] = {"kind": "rlhf", "max_response_tokens": 3, "batch_size": 32, "learning_rate": 1e-2}


@pytest.mark.parametrize("lora", [False, True])
def test_rlhf_raises_the_reward(lora: bool, reward: Path, tmp_path: Path) -> None:
    spread = 0.25 if lora else 0.05
    settings = {**write_toy(tmp_path, n=200, spread=spread), **RLHF, "rewards": f"good={reward}", "lora": lora}
    result = run(settings, epochs=2.0 if lora else 1.0)
    before = next(entry for entry in log_of(result) if "eval_reward" in entry)
    assert before["step"] == 0
    assert before["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["eval_reward_low"] > before["eval_reward_high"] + 0.3
    assert result.metrics["eval_kl"] > 0.1
    assert result.metrics["eval_reward/good"] == pytest.approx(result.metrics["eval_reward"], abs=1e-5)
    assert result.metrics["train_reward"] > before["eval_reward"]
    files = {path.name for path in result.output.iterdir()}
    assert {"reward.png", "kl.png", "README.md"} <= files
    assert {"adapter_model.safetensors", "model.safetensors"} & files == {
        "adapter_model.safetensors" if lora else "model.safetensors"
    }
    card = (result.output / "README.md").read_text()
    assert "a policy by reinforcement learning" in card
    assert f"| good | {result.metrics['eval_reward/good']:+.3f} |" in card


def test_several_rewards_are_added_up_with_their_weights(reward: Path, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=40), **RLHF, "rewards": f"one={reward}:2,two={reward}:-0.5"}
    result = run(settings, max_steps=1)
    entry = next(entry for entry in log_of(result) if "loss" in entry)
    assert entry["reward/one"] == pytest.approx(entry["reward/two"])
    assert entry["reward"] == pytest.approx(1.5 * entry["reward/one"], abs=1e-5)
    assert result.metrics["eval_reward"] == pytest.approx(1.5 * result.metrics["eval_reward/two"], abs=1e-5)


def test_kl_penalty_holds_the_policy_back(reward: Path, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=200, spread=0.05), **RLHF, "rewards": f"good={reward}"}
    free, held = (run(settings, beta=beta, output=tmp_path / str(beta)).metrics for beta in (0.01, 3.0))
    assert held["eval_kl"] < 0.3 * free["eval_kl"]
    assert held["eval_reward"] < free["eval_reward"]


def test_prompts_alone_will_do(reward: Path, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=8), **RLHF, "rewards": f"good={reward}", "batch_size": 8}
    del settings["eval_data"]
    prompts = [row["prompt"] for row in toy_preferences(8, seed=5)]
    rows = [{"prompt": prompt} for prompt in [*prompts, prompts[0], "w1 w2", None]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(settings, max_steps=1, eval_fraction=0.2)
    card = (result.output / "README.md").read_text()
    assert "dropped: 'prompt' is missing, expected text or messages 1" in card
    assert "the prompt has come before 1" in card
    assert result.metrics["eval_prompts"] == 2


def test_rlhf_refusals(reward: Path, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=8), **RLHF, "batch_size": 8}
    other = save_reward(tmp_path / "other", tiny_tokenizer(words=[f"v{i}" for i in range(40)]))
    cases: list[tuple[type[GenarmError], str, dict[str, Any]]] = [
        (MemberError, "cannot load the reward good", {"rewards": f"good={tmp_path / 'nothing'}"}),
        (
            MemberError,
            "score.weight are missing.*a trajectory reward comes from",
            {"rewards": f"good={settings['model']}"},
        ),
        (VocabularyError, "has other tokens than the policy", {"rewards": f"good={other}"}),
        (ConfigError, "8 prompts only; lower --batch-size", {"rewards": f"good={reward}", "batch_size": 64}),
        (DataError, "fit no preference format", {"rewards": f"good={reward}", "data": str(tmp_path / "x.csv")}),
    ]
    (tmp_path / "x.csv").write_text("word\nwhy\n")
    for kind, message, changes in cases:
        with pytest.raises(kind, match=message):
            run(settings, **changes)
        assert not (tmp_path / "arm").exists()


# --- all kinds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trajectory", "dpo", "rlhf"])
def test_stopped_and_resumed(kind: str, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between two checkpoints ends with the weights of one that did not."""
    settings: dict[str, Any] = {**write_toy(tmp_path, n=24), "kind": kind, "batch_size": 8, "epochs": 2.0}
    settings |= {"lora": True, "learning_rate": 1e-3, "eval_steps": 2, "max_response_tokens": 4, "max_steps": 6}
    settings |= {"rewards": f"good={reward}"} if kind == "rlhf" else {}
    whole = run(settings)

    from genarm.lab.training.trainers import Baseline

    step, calls = Baseline.training_step, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Baseline, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(settings, output=tmp_path / "second")
    again = train(TrainConfig(**{**settings, "output": tmp_path / "second"}), resume=True, console=QUIET)
    assert again.resumed_from == 2
    assert again.steps == whole.steps == 6
    name = "model.safetensors" if kind == "trajectory" else "adapter_model.safetensors"
    ours, theirs = (load_file(result.output / name) for result in (whole, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    figures = [
        {k: v for k, v in result.metrics.items() if not k.endswith(("seconds", "second", "runtime"))}
        for result in (whole, again)
    ]
    assert figures[0] == figures[1]
    assert not list(whole.output.glob("*.bin"))  # no pickles


def test_early_stopping_keeps_the_best_weights_of_a_baseline(tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=64), "kind": "trajectory"}
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in toy_preferences(60, 1)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flipped))
    result = run(settings, early_stopping=2, eval_steps=1, epochs=3.0)
    assert result.steps < 24
    assert result.metrics["weights_of_step"] == result.steps - 2


def test_trajectory_divergence_stops_the_run(tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=24), "kind": "trajectory"}
    model = tiny_model()
    model.model.norm.weight.data.fill_(3e38)  # finite, and its products are not
    save_member(model, tmp_path / "model")
    with pytest.raises(GenarmError, match="held-out loss is nan before the first step"):
        run(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ppo"}, "--kind must be one of arm, trajectory, dpo, rlhf, got 'ppo'"),
        ({"rewards": "a=b"}, "--rewards is for --kind rlhf, not arm; leave it out"),
        ({"kind": "dpo", "generations": 4}, "--generations is for --kind rlhf, not dpo"),
        ({"kind": "trajectory", "beta": 0.1}, "--beta is for --kind arm and dpo and rlhf, not trajectory: Bradley"),
        ({"kind": "trajectory", "lora": True, "load_in_4bit": True}, "--load-in-4bit is for .* not trajectory"),
        ({"kind": "dpo", "lora_dropout": 0.1}, "--lora-dropout is for --kind arm and trajectory, not dpo"),
        ({"kind": "rlhf", "rewards": "a=b", "early_stopping": 2}, "--early-stopping is for"),
        ({"kind": "rlhf"}, "--kind rlhf learns from reward models: give --rewards"),
        ({"kind": "rlhf", "rewards": "a=b", "generations": 1}, "--generations must be at least 2"),
        ({"kind": "rlhf", "rewards": "a=b", "generations": 5}, "= 32 replies, which is no multiple of the 5"),
        ({"kind": "rlhf", "rewards": "a"}, "cannot read 'a' in --rewards; write NAME=FOLDER"),
        ({"kind": "rlhf", "rewards": "a=b,a=c"}, "gives a name twice"),
        ({"kind": "rlhf", "rewards": "a=b:inf"}, "must be a finite number"),
    ],
)
def test_options_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"model": "m", "data": "d", "output": Path("o"), **changes})


def test_rewards_as_compose_spells_them() -> None:
    parsed = parse_rewards("a=x/y:0.5, b=c:d:-1,c=2,d=hub/id")
    assert [(s.name, s.folder, s.weight) for s in parsed] == [
        ("a", "x/y", 0.5),
        ("b", "c:d", -1.0),
        ("c", "2", 1.0),
        ("d", "hub/id", 1.0),
    ]


def test_defaults_depend_on_the_kind() -> None:
    def config(**changes: Any) -> TrainConfig:
        return TrainConfig(model="m", data="d", output=Path("o"), **changes)

    rlhf = {"kind": "rlhf", "rewards": "a=b"}
    kinds = [config(), config(kind="dpo"), config(**rlhf), config(kind="dpo", beta=0.3)]
    assert [c.resolved_beta for c in kinds] == [0.05, 0.1, 0.05, 0.3]
    assert [c.resolved_lora_dropout for c in kinds] == [0.05, 0.0, 0.0, 0.0]
    assert [config(lora=True).resolved_learning_rate, config(**rlhf).resolved_learning_rate] == [5e-4, 1e-6]


def test_trl_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm.lab.training.baseline.find_spec", lambda name: None)
    settings = {**write_toy(tmp_path, n=8)}
    with pytest.raises(MissingExtraError, match=r"trl is not installed; .* 'genarm\[baselines\]'"):
        run(settings, kind="dpo")
    assert run(settings, max_steps=1).steps == 1  # an ARM needs none


def test_command_line_and_file(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = write_toy(tmp_path, n=24)
    file = tmp_path / "run.toml"
    file.write_text(f'kind = "rlhf"\nrewards = "good={reward}:0.5"\nbatch_size = 8\nmax_response_tokens = 4\n')
    options = ["--model", settings["model"], "--data", settings["data"], "--output", str(tmp_path / "out")]
    assert main(["train", "--config", str(file), *options, "--max-steps", "1", "--generations", "2"]) == 0
    out = capsys.readouterr().out
    assert "prompts kept" in out
    assert "held-out reward" in out
    saved = make_config({}, tmp_path / "out" / "train_config.toml")
    assert (saved.kind, saved.rewards, saved.generations) == ("rlhf", f"good={reward}:0.5", 2)
    assert main(["train", *options, "--kind", "arm", "--rewards", "a=b"]) == 2
    assert "leave it out" in capsys.readouterr().err
