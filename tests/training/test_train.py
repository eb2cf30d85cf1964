"""Training end to end on toy preferences: it learns, is exact, and leaves a whole result."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from builders.toy_training import run, toy_preferences, write_toy
from genarm.data.formats.base import Preference
from genarm.data.tokens import TokenPair, tokenize
from genarm.errors import ConfigError, GenarmError, MemberError, MissingExtraError
from genarm.training.arguments import one_gpu_each
from genarm.training.config import TrainConfig, make_config, to_toml
from genarm.training.data import evaluation_plan
from genarm.training.loading import load_model
from genarm.training.report import pair_text
from genarm.training.run import train
from genarm.training.trainer import ArmTrainer, pair_metrics


@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True)])
def test_learns_a_toy_preference(family: str, lora: bool, tmp_path: Path) -> None:
    settings = write_toy(tmp_path, family=family, n=240, spread=0.25 if lora else 0.05)
    lora_options = {"lora": True, "learning_rate": 2e-2, "beta": 0.5, "epochs": 2.0, "warmup": 0.1}
    result = run(settings, **(lora_options if lora else {}))
    log = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    before = next(entry for entry in log if "eval_accuracy" in entry)
    assert before["step"] == 0
    assert before["eval_accuracy"] < 0.8
    assert result.metrics["eval_accuracy_low"] > 0.75
    assert result.metrics["eval_loss"] < before["eval_loss"]
    assert result.steps == (60 if lora else 30)

    tokenizer = AutoTokenizer.from_pretrained(result.output)
    if lora:
        from peft import AutoPeftModelForCausalLM

        arm = AutoPeftModelForCausalLM.from_pretrained(result.output)
        saved = json.loads((result.output / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == settings["model"]
    else:
        arm = AutoModelForCausalLM.from_pretrained(result.output)
    # The saved model itself, asked without the trainer: one sequence at a time, logits by hand.
    right = 0
    for row in toy_preferences(60, seed=1):
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False) for side in ("chosen", "rejected")
        ]
        right += _log_prob(arm, tokenizer, texts[0]) > _log_prob(arm, tokenizer, texts[1])
    assert right / 60 == pytest.approx(result.metrics["eval_accuracy"])


@torch.no_grad()
def _log_prob(model: Any, tokenizer: Any, text: str) -> float:
    """Of the whole text: the prompt's share is the same for both responses."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(-1, ids[0, 1:, None]).sum())


def test_result_folder(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=24)
    result = run(settings, beta=0.2)
    files = {path.name for path in result.output.iterdir()}
    expected = {"README.md", "accuracy.png", "loss.png", "metrics.json", "metrics.jsonl", "train_config.toml"}
    assert expected | {"model.safetensors", "config.json", "tokenizer.json", "checkpoints"} <= files
    assert not [name for name in files if name.startswith(".") or Path(name).suffix in (".bin", ".pt", ".pth")]
    assert json.loads((result.output / "metrics.json").read_text()) == result.metrics
    assert all(path.stat().st_mode & 0o044 for path in result.output.iterdir())
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")

    saved = make_config({}, result.output / "train_config.toml")
    assert (saved.beta, saved.learning_rate, saved.max_prompt_tokens) == (0.2, 5e-3, 16)
    card = (result.output / "README.md").read_text()
    accuracy = result.metrics["eval_accuracy"]
    for text in (f"| all | 60 | {accuracy:.3f} |", "beta = 0.2", "genarm compose", "chosen longer", "pairs kept 24"):
        assert text in card
    groups = [result.metrics[f"eval_pairs_{g}"] for g in ("chosen_longer", "rejected_longer", "equal_length")]
    assert sum(groups) == result.metrics["eval_pairs"] == 60


def test_same_seed_same_weights(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=24)
    outputs = [run(settings, lora=True, output=tmp_path / f"arm{i}", seed=s).output for i, s in enumerate((3, 3, 4))]
    first, again, other = (load_file(output / "adapter_model.safetensors") for output in outputs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=16)
    shapes = {"one": (16, 1), "many": (4, 4)}
    weights = {}
    for name, (batch, accumulation) in shapes.items():
        options = {"batch_size": batch, "accumulation": accumulation, "learning_rate": 1e-3, "max_steps": 1}
        run(settings, output=tmp_path / name, warmup=0.0, **options)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(start["lm_head.weight"], weights["one"]["lm_head.weight"])
    for name, tensor in weights["one"].items():
        # Adam's first step is the sign of the gradient times the learning rate: very small gradients may differ.
        torch.testing.assert_close(tensor, weights["many"][name], atol=1e-5, rtol=0)


def _trainer(model: Any, pairs: list[TokenPair], folder: Path, **options: Any) -> ArmTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    return ArmTrainer(model, arguments, beta=0.1, train_pairs=pairs, eval_pairs=pairs)


def _token_pairs(n: int) -> list[TokenPair]:
    preferences = [
        Preference(prompt=row["prompt"], chosen=row["chosen"][0]["content"], rejected=row["rejected"][0]["content"])
        for row in toy_preferences(n, seed=2)
    ]
    return list(tokenize(tiny_tokenizer(), preferences, max_prompt_tokens=16, max_response_tokens=16).pairs)


def test_logits_are_never_copied_to_float32_under_bf16(tmp_path: Path) -> None:
    """accelerate's wrapper would do that on the way out of the model."""
    trainer = _trainer(tiny_model(), _token_pairs(16), tmp_path, bf16=True, max_steps=1)
    seen = []
    model_forward = trainer.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = model_forward(*args, **kwargs)
        seen.append(out.logits.dtype)
        return out

    trainer.model.forward = forward
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_and_bf16_change_little(lora: bool, tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=32), "lora": lora, "lora_dropout": 0.0, "schedule": "constant"}
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    plain = run(settings)
    checkpointed = run(settings, gradient_checkpointing=True, output=tmp_path / "checkpointed")
    exact = load_file(plain.output / name)
    for key, tensor in load_file(checkpointed.output / name).items():
        torch.testing.assert_close(tensor, exact[key])
    bf16 = run(settings, bf16=True, gradient_checkpointing=True, output=tmp_path / "bf16")
    assert bf16.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=0.02)
    assert {tensor.dtype for tensor in load_file(bf16.output / name).values()} == {torch.float32}


def test_evaluation_metrics_by_hand() -> None:
    rewards = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-4.0, -4.0], [-1.0, -9.0]]).numpy()
    lengths = torch.tensor([[3, 2], [2, 1], [1, 2], [2, 2]]).numpy()
    metrics = pair_metrics(rewards, lengths, beta=0.5)
    assert metrics["accuracy"] == 0.5  # the tie is wrong
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx((0.150, 0.850), abs=1e-3)  # Wilson
    assert metrics["margin"] == pytest.approx((1 - 2 + 0 + 8) / 4)
    assert metrics["loss"] == pytest.approx(
        torch.nn.functional.softplus(-0.5 * torch.tensor([1.0, -2.0, 0.0, 8.0])).mean().item()
    )
    by_length = {g: metrics[f"accuracy_{g}"] for g in ("chosen_longer", "rejected_longer", "equal_length")}
    assert by_length == {"chosen_longer": 0.5, "rejected_longer": 0.0, "equal_length": 1.0}
    assert "accuracy_equal_length" not in pair_metrics(rewards[:3], lengths[:3], beta=1.0)


def test_a_reward_of_zero_has_told_no_pair_apart() -> None:
    lengths = torch.tensor([[3, 2], [2, 1]]).numpy()
    for rewards, said in ((torch.zeros(2, 2), "no pair is told apart yet"), (-torch.ones(2, 2), "accuracy 0.000")):
        metrics = pair_metrics(rewards.numpy(), lengths, beta=0.5)
        assert said in pair_text({f"eval_{name}": value for name, value in metrics.items()})


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=64)
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in toy_preferences(60, 1)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flipped))
    result = run(settings, early_stopping=2, eval_steps=1, epochs=3.0)
    assert result.steps < 24
    assert result.metrics["weights_of_step"] == result.steps - 2
    log = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    best = min(entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"] > 0)
    assert result.metrics["eval_loss"] == best


def test_held_out_prompts_are_split_off(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=40)
    del settings["eval_data"]
    assert run(settings, eval_fraction=0.25, max_steps=1).metrics["eval_pairs"] == pytest.approx(10, abs=2)
    without = run(settings, eval_fraction=0.0, max_steps=1, output=tmp_path / "none")
    assert not [name for name in without.metrics if name.startswith("eval")]
    assert "No pairs were held out" in (without.output / "README.md").read_text()


def test_a_short_run_is_not_mostly_evaluation(tmp_path: Path) -> None:
    """Evaluations are of a third of the pairs that are trained on, all together, unless they are asked for."""
    settings = write_toy(tmp_path, n=300)
    del settings["eval_steps"]
    short = {"batch_size": 10, "accumulation": 1, "max_steps": 12}
    console = Console(file=io.StringIO(), width=200)
    result = train(TrainConfig(**{**settings, **short}), console=console)
    assert result.metrics["eval_pairs"] == 40
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "note: 40 of the 60 held-out pairs are evaluated on, as the run is short; give --eval-steps" in text
    assert text.count("held-out loss") == 1
    asked = run(settings, **short, eval_steps=6, output=tmp_path / "asked")
    assert asked.metrics["eval_pairs"] == 60
    log = (asked.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if "eval_loss" in line] == [0, 6, 12]

    del settings["eval_data"]
    split = run(settings, eval_fraction=0.5, **{**short, "max_steps": 5}, output=tmp_path / "split")
    assert split.metrics["eval_pairs"] == pytest.approx(32, abs=2)  # fewer would say nothing


@pytest.mark.parametrize(
    ("trained", "held_out", "plan"),
    [
        (9500, 500, (500, 6)),
        (1600, 500, (500, 1)),
        (3000, 500, (500, 2)),
        (192, 500, (64, 1)),
        (20, 500, (32, 1)),
        (20, 5, (5, 1)),
        (200, 5, (5, 6)),
    ],
)
def test_evaluations_take_a_tenth_of_a_run(trained: int, held_out: int, plan: tuple[int, int]) -> None:
    pairs, evaluations = evaluation_plan(trained, held_out)
    assert (pairs, evaluations) == plan
    assert pairs * evaluations / 3 <= trained / 9 + 1 or (pairs, evaluations) == (min(32, held_out), 1)


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=24)
    model = tiny_model()
    model.lm_head.weight.data.fill_(3e38)  # finite, and its products are not
    save_member(model, tmp_path / "model")
    with pytest.raises(GenarmError, match=r"log-probs are nan: its weights are broken"):
        run(settings)
    assert not (tmp_path / "arm").exists()
    save_member(tiny_model(), tmp_path / "model")
    with pytest.raises(GenarmError, match=r"is nan at step \d: training has diverged"):
        run(settings, learning_rate=1e30, warmup=0.0, output=tmp_path / "second")
    assert not list((tmp_path / "second").glob("**/*.safetensors"))


def test_refusals_write_nothing(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=8)
    refused: list[tuple[type[GenarmError], str, dict[str, Any]]] = [
        (MemberError, "check --model", {"model": str(tmp_path / "nothing")}),
        (ConfigError, "do not fit into the 128 tokens", {"max_prompt_tokens": 100, "max_response_tokens": 100}),
        (ConfigError, "--lora-targets", {"lora": True, "lora_targets": "nothing"}),
        (ConfigError, "--report-to smoke", {"report_to": "smoke"}),
        (ConfigError, "cannot read --chat-template", {"chat_template": tmp_path / "none.jinja"}),
        (ConfigError, "leave --objective out", {"objective": "safer"}),
    ]
    for kind, message, changes in refused:
        with pytest.raises(kind, match=message):
            run(settings, **changes)
        assert not (tmp_path / "arm").exists()


def test_four_bits_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm.training.loading.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'genarm\[quantize\]'"):
        run(write_toy(tmp_path, n=8), lora=True, load_in_4bit=True)


def test_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = write_toy(tmp_path, n=16)
    save_member(tiny_model(hidden=64, intermediate_size=128), tmp_path / "model")  # 4-bit blocks are 64 wide
    result = run(settings, lora=True, load_in_4bit=True, bf16=True, gradient_checkpointing=True)
    adapter = load_file(result.output / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapter.values())
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # zero until trained


def test_qlora_has_the_same_gradients_after_an_evaluation(tmp_path: Path) -> None:
    """bitsandbytes has another product for evaluation on some CPUs, and that one has no gradient."""
    pytest.importorskip("bitsandbytes")
    save_member(tiny_model(hidden=64, intermediate_size=128), tmp_path / "model")
    settings = {**write_toy(tmp_path, n=4), "model": str(tmp_path / "model"), "lora": True, "load_in_4bit": True}
    config = TrainConfig(**settings, lora_dropout=0.0)
    torch.manual_seed(0)
    model = load_model(config, AutoTokenizer.from_pretrained(tmp_path / "model"))
    ids = torch.arange(2, 12)[None].to(model.device)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) == sum(p.requires_grad for p in model.parameters())
    assert sum(float(gradient.norm()) > 0 for gradient in before.values()) > 0
    torch.testing.assert_close(after, before)


def test_adapter_as_a_start_is_refused(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=8)
    arm = run(settings, lora=True, max_steps=1).output
    with pytest.raises(MemberError, match="is an adapter"):
        run(settings, model=str(arm), output=tmp_path / "second")


def test_prompts_trained_on_and_held_out_are_pointed_out(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=16)
    for data, expected in ((settings["data"], True), (None, False)):
        console = Console(file=io.StringIO(), width=200)
        output = tmp_path / f"out-{expected}"
        train(TrainConfig(**{**settings, "eval_data": data, "output": output, "max_steps": 1}), console=console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("16 held-out pairs have a prompt that is trained on too" in text) == expected
        assert ("note:" in text) == expected


def test_printed_summary(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    train(TrainConfig(**write_toy(tmp_path, n=16)), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("pairs kept", "all weights", "held-out loss", "held-out accuracy, chosen longer:", "wrote"):
        assert part in text
    assert "training ━" not in text  # a bar is for terminals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "--beta must be a finite number above 0, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "--batch-size must be int, got 2.5"),
        ({"lora": 1}, "--lora must be bool, got 1"),
        ({"eval_fraction": 1.0}, "--eval-fraction must be from 0 to below 1"),
        ({"schedule": "zigzag"}, "--schedule must be one of cosine, linear, constant, got 'zigzag'"),
        ({"load_in_4bit": True}, "add --lora"),
        ({"early_stopping": 1, "eval_fraction": 0}, "needs held-out pairs"),
        ({"early_stopping": 1, "eval_steps": 2, "save_steps": 3}, "multiple of --eval-steps"),
        ({"data": " "}, "--data is empty"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"model": "m", "data": "d", "output": Path("o"), **changes})


def test_toml_round_trip_and_overrides(tmp_path: Path) -> None:
    config = TrainConfig(model="m", data="d", output=Path("o"), lora=True, max_steps=3, beta=0.25)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    assert make_config({}, file) == config
    assert make_config({"beta": 0.5}, file).beta == 0.5
    assert tomllib.loads(to_toml(config))["max_steps"] == 3
    file.write_text("modle = 'm'\n")
    with pytest.raises(ConfigError, match=r"unknown setting modle in .*run\.toml; allowed are model, data, output"):
        make_config({}, file)
    file.write_text("model = \n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        make_config({}, file)
    with pytest.raises(ConfigError, match="--data and --output missing"):
        make_config({"model": "m"})


def test_a_model_that_cannot_read_packed_pairs_says_so(tmp_path: Path) -> None:
    settings = write_toy(tmp_path, n=8)
    tokenizer = tiny_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    save_member(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **shape)), tmp_path / "model", tokenizer)
    console = Console(file=io.StringIO(), width=200)
    train(make_config({**settings, "max_steps": 1}), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("note: pairs are not packed, which this model cannot read (it takes no positions): ") == 1


def test_one_gpu_for_each_process(tmp_path: Path) -> None:
    """Of several, transformers would split the batch by the first axis of each tensor."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    assert one_gpu_each(arguments).n_gpu == 0
    arguments._n_gpu = 4
    assert arguments.train_batch_size == 12
    assert (one_gpu_each(arguments).n_gpu, arguments.train_batch_size) == (1, 3)
