"""Losses beside the paper's: against full tables in float64, against enumeration, and from training to composing."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from builders.tiny import VOCAB_SIZE, save_member, tiny_lora, tiny_model, tiny_tokenizer
from builders.toy_training import run, write_toy
from genarm.cli.main import main
from genarm.data.tokens import TokenPair
from genarm.errors import ConfigError, DataError, GenarmError, MemberError, VocabularyError
from genarm.model.compose import compose
from genarm.model.vocabulary import Alignment
from genarm.training.config import TrainConfig, make_config
from genarm.training.losses.distil_trainer import DistilTrainer
from genarm.training.losses.frozen import Frozen, Through
from genarm.training.losses.replies import WishedReplies
from genarm.training.losses.through import divergence_from, guided_rewards, reward_log_probs
from genarm.training.losses.trainers import ProductTrainer, ReferenceTrainer
from genarm.training.run import train
from genarm.training.trainer import ArmTrainer

BETA = 0.3
PAIRS = [
    TokenPair(prompt_ids=[2, 9, 11, 1, 3], chosen_ids=[7, 8, 1], rejected_ids=[20, 1]),  # type: ignore[arg-type]
    TokenPair(prompt_ids=[2, 30, 1, 3], chosen_ids=[12, 1], rejected_ids=[13, 14, 15, 16, 1]),  # type: ignore[arg-type]
]
REPLIES = [
    WishedReplies(
        prompt_ids=pair.prompt_ids,
        wished_ids=[4, 33, 1, *pair.prompt_ids],  # type: ignore[arg-type]
        chosen_ids=pair.chosen_ids,
        rejected_ids=pair.rejected_ids,
    )
    for pair in PAIRS
]


# --- the arithmetic -------------------------------------------------------------------------------------------------


def test_guided_rewards_against_sums_by_hand() -> None:
    torch.manual_seed(0)
    base, own, start = 2 * torch.randn(3, 4, 6, dtype=torch.float64)
    labels, weight, unknown = (
        torch.tensor([0, 3, 5, 2]),
        torch.tensor([1.0, 0.5, 2.0, 1.0]),
        torch.tensor([0, 1, 0, 0, 0, 0]),
    )
    got = guided_rewards(labels, base, reward_log_probs(own, start), weight, unknown.bool())

    def probs(logits_V: Tensor) -> list[float]:
        shares = [math.exp(x) for x in logits_V.tolist()]
        return [share / sum(shares) for share in shares]

    for c in range(4):
        b, r, s = probs(base[c]), probs(own[c]), probs(start[c])
        w = weight[c].item()
        product = [0.0 if unknown[v] else b[v] * (r[v] / s[v]) ** w for v in range(6)]
        guided = product[labels[c]] / sum(product)
        assert got[c].item() == pytest.approx(math.log(guided / b[labels[c]]) / w, abs=1e-12)


def test_divergence_leaves_out_what_the_target_rules_out() -> None:
    target = torch.tensor([[0.5, 0.5, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert divergence_from(target, other).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


# --- each loss as its trainer computes it, against whole tables, a sequence at a time --------------------------------


def _tables(model: Any, prompt: Any, response: Any) -> Tensor:
    """Log-probs [T, V] before each token of the response, with the gradient of the model."""
    logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def _trainer(cls: Any, model: Any, folder: Path, items: list[Any], **options: Any) -> Any:
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=2, report_to="none", use_cpu=True)
    return cls(model, arguments, beta=BETA, train_pairs=items, **options)


def _adapted(folder: Path) -> Any:
    from peft import PeftModel

    base = tiny_model(seed=1)
    tiny_lora(base, folder / "lora", seed=3, base_path="x")
    return PeftModel.from_pretrained(base, folder / "lora", is_trainable=True)


def _gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _compare(trainer: Any, model: Any, items: list[Any], expected: Tensor) -> None:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(items))
    loss.backward()
    ours = _gradients(model)
    expected.backward()
    theirs = _gradients(model)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_reference_loss_and_gradients(lora: bool, tmp_path: Path) -> None:
    model = _adapted(tmp_path) if lora else tiny_model(seed=2)
    below = tiny_model(seed=1)
    trainer = _trainer(ReferenceTrainer, model, tmp_path, PAIRS, start=Frozen() if lora else Frozen(model=below))

    def reward(pair: TokenPair, response: Any) -> Tensor:
        gain = _tables(model, pair.prompt_ids, response) - _tables(below, pair.prompt_ids, response).detach()
        return gain.gather(-1, torch.tensor(response)[:, None]).sum()

    margins = torch.stack([reward(p, p.chosen_ids) - reward(p, p.rejected_ids) for p in PAIRS])
    _compare(trainer, model, PAIRS, -(BETA * margins).sigmoid().log().mean())


# (adapter, start at zero, base, weight): a base of its own, or the model as it starts
PRODUCTS = [(True, True, True, 2.0), (True, False, False, 1.0), (False, True, True, 0.5), (False, False, True, 1.0)]


def _through(lora: bool, zero: bool, other: bool, weight: float, folder: Path) -> tuple[Any, dict[str, Any], Any, Any]:
    """(trained model, options of its trainer, the base and the start as plain models)."""
    model = _adapted(folder) if lora else tiny_model(seed=2)
    below, base = tiny_model(seed=1), tiny_model(seed=7, hidden=48, vocab_size=VOCAB_SIZE + 2) if other else None
    start = Frozen() if lora else Frozen(model=below)
    unknown = (VOCAB_SIZE, VOCAB_SIZE + 1)
    aligned = Alignment(base_size=VOCAB_SIZE + 2, reward_size=VOCAB_SIZE, unknown=unknown) if other else None
    through = Through(base=start if base is None else Frozen(model=base), alignment=aligned, low=weight, high=weight)
    return model, {"start": start if zero else None, "through": through}, base or below, below if zero else None


def _guided(model: Any, base: Any, start: Any, prompt: Any, response: Any, weight: float) -> tuple[Tensor, Tensor]:
    """(log π_guided, log π_b) [T, V] over the ids that both know, the padding of the base having no part in it."""
    reward = _tables(model, prompt, response)
    if start is not None:
        reward = reward - _tables(start, prompt, response).detach()
    base_TV = _tables(base, prompt, response).detach()
    total = base_TV[:, :VOCAB_SIZE] + weight * reward
    return total - total.exp().sum(-1, keepdim=True).log(), base_TV[:, :VOCAB_SIZE]


@pytest.mark.parametrize(("lora", "zero", "other", "weight"), PRODUCTS)
def test_product_loss_and_gradients(lora: bool, zero: bool, other: bool, weight: float, tmp_path: Path) -> None:
    model, options, base, start = _through(lora, zero, other, weight, tmp_path)
    trainer = _trainer(ProductTrainer, model, tmp_path, PAIRS, **options)

    def reward(pair: TokenPair, response: Any) -> Tensor:
        guided, plain = _guided(model, base, start, pair.prompt_ids, response, weight)
        return (guided - plain).gather(-1, torch.tensor(response)[:, None]).sum()

    margins = torch.stack([reward(p, p.chosen_ids) - reward(p, p.rejected_ids) for p in PAIRS])
    # −E log σ(β · margin of log π_guided/π_b) with β = β_r / w.
    _compare(trainer, model, PAIRS, -(BETA / weight * margins).sigmoid().log().mean())


@pytest.mark.parametrize(("lora", "zero", "other", "weight"), PRODUCTS)
def test_distillation_loss_and_gradients(lora: bool, zero: bool, other: bool, weight: float, tmp_path: Path) -> None:
    model, options, base, start = _through(lora, zero, other, weight, tmp_path)
    trainer = _trainer(DistilTrainer, model, tmp_path, REPLIES, **options)
    divergences: list[Tensor] = []
    for item, response in itertools.product(REPLIES, ("chosen_ids", "rejected_ids")):
        ids = getattr(item, response)
        guided, plain = _guided(model, base, start, item.prompt_ids, ids, weight)
        wished = _tables(base, item.wished_ids, ids).detach()[:, :VOCAB_SIZE]
        target = (plain + weight * (wished - plain)).log_softmax(-1)
        divergences.append((target.exp() * (target - guided)).sum(-1))
    _compare(trainer, model, REPLIES, torch.cat(divergences).mean())


def test_weights_come_from_the_range_and_both_responses_of_a_pair_have_one(tmp_path: Path) -> None:
    model = tiny_model(seed=2)
    through = Through(base=Frozen(model=tiny_model(seed=7)), alignment=None, low=0.5, high=2.0)
    trainer = _trainer(ProductTrainer, model, tmp_path, PAIRS, start=None, through=through)
    model.train()
    drawn = torch.cat([trainer.weights(model, 2) for _ in range(200)])
    assert 0.5 <= drawn.min() < 0.6
    assert 1.9 < drawn.max() <= 2.0
    model.eval()
    assert trainer.weights(model, 2).tolist() == [1.25, 1.25]


@pytest.mark.parametrize(("weight", "zero"), [(1.0, False), (2.0, True)])
def test_the_minimum_is_the_optimum_of_the_regularised_problem(weight: float, zero: bool) -> None:
    """Tables of all conditionals, 5 tokens, 3 steps: π_guided reaches π_b · exp(r/β) / Z over whole responses."""
    V, L, beta = 5, 3, 0.5
    responses = torch.tensor(list(itertools.product(range(V), repeat=L)))
    labels = responses.T.reshape(-1)
    torch.manual_seed(0)
    reward_N = torch.randn(len(responses), dtype=torch.float64)
    rows = [(responses[:, :t] * V ** torch.arange(t - 1, -1, -1)).sum(-1) for t in range(L)]

    def along(tables: list[Tensor]) -> Tensor:
        """The conditionals [L·N, V] that each response meets."""
        return torch.cat([part[row] for part, row in zip(tables, rows, strict=True)])

    base, reward, start = ([torch.randn(V**t, V, dtype=torch.float64) for t in range(L)] for _ in range(3))
    parameters = [part.requires_grad_() for part in reward]
    optimiser = torch.optim.LBFGS(parameters, max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def gains() -> Tensor:
        """(log π_guided − log π_b) / w of each response."""
        rho = reward_log_probs(along(reward), along(start) if zero else None)
        weights = torch.full((len(labels),), weight, dtype=torch.float64)
        return guided_rewards(labels, along(base), rho, weights, None).view(L, -1).sum(0)

    def loss() -> Tensor:
        optimiser.zero_grad()
        margins_NN, wins_NN = gains()[:, None] - gains(), torch.sigmoid(reward_N[:, None] - reward_N)
        found = torch.nn.functional.binary_cross_entropy_with_logits(beta * weight * margins_NN, wins_NN)
        found.backward()
        return found

    optimiser.step(loss)
    with torch.no_grad():
        base_N = along(base).log_softmax(-1).gather(-1, labels[:, None]).view(L, -1).sum(0)
        guided_N, optimum_N = base_N + weight * gains(), (base_N + reward_N / beta).log_softmax(0)
        assert guided_N.exp().sum().item() == pytest.approx(1)
        before, after = ((p.exp() * (p - optimum_N)).sum().item() for p in (base_N, guided_N))
    assert after < 0.01 * before


# --- from training to composing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    settings = write_toy(folder, n=32, spread=0.2)
    save_member(tiny_model(seed=5, hidden=48), folder / "base")
    (folder / "prompts.txt").write_text("\n".join(f"w{a} w{b}" for a in range(8) for b in range(5)))
    return {**settings, "base": str(folder / "base"), "prompts": str(folder / "prompts.txt")}


def _settings(toy: dict[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    plain = {name: value for name, value in toy.items() if name not in ("base", "prompts")}
    if changes.get("loss") == "distil":
        plain = {name: value for name, value in plain.items() if name not in ("data", "eval_data")}
        changes = {"wish": "w5 w6 w7", "prompts": toy["prompts"], "eval_fraction": 0.2, **changes}
    return {**plain, "output": output, **changes}


LOSSES: dict[str, dict[str, Any]] = {
    "reference": {"loss": "reference", "epochs": 2.0},
    "reference, adapter": {"loss": "reference", "lora": True, "lora_dropout": 0.1, "epochs": 2.0},
    "product": {"loss": "product", "through": "base", "through_weight": "0.5-2", "lora": True, "epochs": 2.0},
    "product from a model": {"loss": "product", "start": "model", "through_weight": "2", "epochs": 2.0},
    "distil": {"loss": "distil", "epochs": 4.0},
}


def _losses(*quick: str) -> Any:
    marks = {name: () if name in quick else pytest.mark.slow for name in LOSSES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def _changes(name: str, toy: dict[str, Any]) -> dict[str, Any]:
    found = dict(LOSSES[name])
    return {**found, "through": toy["base"]} if "through" in found else found


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


@_losses("reference", "product")
def test_a_resumed_run_has_the_same_weights(
    name: str, toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = _changes(name, toy)
    run(_settings(toy, tmp_path / "unbroken", **changes, eval_steps=3))
    calls, step = itertools.count(1), ArmTrainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ArmTrainer, "training_step", broken)
    settings = _settings(toy, tmp_path / "broken", **changes, eval_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    torch.manual_seed(99)
    result = train(TrainConfig(**settings), resume=True, console=Console(quiet=True))
    assert result.resumed_from == 3
    unbroken, resumed = _weights(tmp_path / "unbroken"), _weights(tmp_path / "broken")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


@torch.no_grad()
def _log_probs(model: Any, ids: list[int]) -> Tensor:
    found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_card_says_composes_as_it_was_trained(
    name: str, toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The guided model of the card's command is π_b · ρ^w / Z of the trained weights, from plain forwards."""
    changes = _changes(name, toy)
    result = run(_settings(toy, tmp_path / "arm", **{**changes, "eval_steps": 100}))
    card = (result.output / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("genarm compose"))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    base_path = changes.get("through", toy["model"])
    assert f"--base {base_path} " in command
    guided = AutoModelForCausalLM.from_pretrained(tmp_path / "guided")
    plain = {path: AutoModelForCausalLM.from_pretrained(path) for path in (toy["model"], base_path)}
    if changes.get("lora"):
        from peft import AutoPeftModelForCausalLM

        trained = AutoPeftModelForCausalLM.from_pretrained(result.output)
    else:
        trained = AutoModelForCausalLM.from_pretrained(result.output)
    weight = guided.default_weights["arm"]
    assert weight == (2.0 if changes.get("through_weight") == "2" else 1.0)
    ids = [2, 9, 11, 1, 3, 7, 8]
    reward = _log_probs(trained, ids)
    if changes.get("start") != "model":
        reward = reward - _log_probs(plain[toy["model"]], ids)
    expected = (_log_probs(plain[base_path], ids) + weight * reward).log_softmax(-1)
    torch.testing.assert_close(_log_probs(guided, ids), expected, atol=2e-5, rtol=0)
    if changes["loss"] == "reference":  # over its own start, the trained model itself
        torch.testing.assert_close(_log_probs(guided, ids), _log_probs(trained, ids), atol=2e-5, rtol=0)
        again = compose(base_path, {}, tmp_path / "tuned", tuned={"arm": str(result.output)})
        assert again.config.rewards == guided.config.rewards
        assert "difference to its own start, so its reference is the base" in again.notes[0]
        assert again.notes[0] in "".join(capsys.readouterr())


@pytest.mark.parametrize("lora", [False, True])
def test_accuracy_takes_the_difference_that_was_trained(lora: bool, toy: dict[str, Any], tmp_path: Path) -> None:
    result = run(_settings(toy, tmp_path / "arm", loss="reference", lora=lora, max_steps=2))
    report = tmp_path / "accuracy.json"
    assert main(["accuracy", str(result.output), "--data", toy["eval_data"], "--output", str(report)]) == 0
    models = json.loads(report.read_text())["models"]
    assert [model["kind"] for model in models] == ["tuned"]
    assert models[0]["figures"]["overall"]["right"]["rate"] == pytest.approx(result.metrics["eval_accuracy"])


def test_losses_learn(toy: dict[str, Any], tmp_path: Path) -> None:
    for name in ("reference", "product"):
        metrics = run(_settings(toy, tmp_path / name, loss=name, epochs=3.0, eval_steps=100)).metrics
        assert metrics["eval_accuracy"] > 0.95
        assert ("eval_reward_accuracy" in metrics) == (name == "product")
    metrics = run(_settings(toy, tmp_path / "distil", loss="distil", epochs=12.0, eval_steps=100)).metrics
    assert metrics["eval_loss"] < 0.6 * metrics["eval_kl_base"]


def test_a_moved_or_changed_start_is_not_taken_for_the_old_one(toy: dict[str, Any], tmp_path: Path) -> None:
    start = save_member(tiny_model(seed=9, spread=0.2), tmp_path / "start")
    arm = run({**_settings(toy, tmp_path / "arm", loss="reference"), "model": str(start)}).output
    save_member(tiny_model(seed=10, spread=0.2), start)
    report = compose(toy["base"], {"a": str(arm)}, tmp_path / "changed")
    assert "has changed since then: give what it was trained from as --reference a=MODEL" in report.notes[0]
    start.rename(tmp_path / "elsewhere")
    with pytest.raises(MemberError, match=r"is a difference to the model .* say where it is now with --reference a="):
        compose(toy["base"], {"a": str(arm)}, tmp_path / "gone")
    moved = compose(toy["base"], {"a": str(arm)}, tmp_path / "moved", references={"a": str(tmp_path / "elsewhere")})
    assert moved.config.rewards is not None
    assert moved.config.rewards[0]["reference"] == {"model": str(tmp_path / "elsewhere")}


def test_another_base_or_weight_than_trained_through_is_said(toy: dict[str, Any], tmp_path: Path) -> None:
    arm = run(_settings(toy, tmp_path / "arm", loss="product", start="model", through_weight="2-3", max_steps=1)).output
    notes = compose(toy["base"], {"a": str(arm)}, tmp_path / "guided").notes
    assert f"a was trained through {toy['model']}, and guides another base here" in notes
    assert "a was trained for the weight 2-3 and has 1 here; give a=PATH:2" in notes
    notes = compose(toy["model"], {"a": str(arm)}, tmp_path / "as-trained", weights={"a": 2.5}).notes
    assert not notes
    (tmp_path / "link").symlink_to(toy["model"])
    linked = _settings(toy, tmp_path / "linked", loss="product", through=str(tmp_path / "link"), max_steps=1)
    arm = run({**linked, "start": "model", "through_weight": "1-3"}).output
    assert not compose(toy["model"], {"a": str(arm)}, tmp_path / "through-a-link").notes


def test_an_arm_still_has_no_reference(toy: dict[str, Any], tmp_path: Path) -> None:
    arm = run(_settings(toy, tmp_path / "arm", max_steps=1)).output
    assert 'loss = "arm"' in (arm / "train_config.toml").read_text()
    assert compose(toy["model"], {"a": str(arm)}, tmp_path / "guided").config.rewards == [
        {"name": "a", "weight": 1.0, "model": str(arm)}
    ]
    with pytest.raises(ConfigError, match="'a' is no tuned reward, so it has no reference"):
        compose(toy["model"], {"a": str(arm)}, tmp_path / "no", references={"a": toy["base"]})


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "--loss must be one of arm, reference, product, distil, got 'hinge'"),
        ({"kind": "dpo", "loss": "reference"}, "--loss is for --kind arm, not dpo"),
        ({"through": "b"}, "--through is for --loss product and distil, not arm"),
        ({"loss": "reference", "through": "b"}, "--through is for --loss product and distil, not --loss reference"),
        ({"loss": "reference", "start": "model"}, "--loss reference starts at zero"),
        ({"start": "zero"}, "--start is for --loss reference and product and distil, not arm"),
        ({"loss": "product", "start": "one"}, "--start must be one of zero, model, got 'one'"),
        ({"loss": "product", "through_weight": "a"}, "--through-weight is 'a'; give a weight above 0, or a range"),
        ({"loss": "product", "through_weight": "2-1"}, "--through-weight is '2-1'"),
        ({"loss": "product", "through_weight": "-1"}, "--through-weight is '-1'"),
        ({"loss": "product", "through_weight": "0"}, "--through-weight is '0'"),
        ({"loss": "product", "wish": "be nice"}, "--wish is for --loss distil, not --loss product"),
        ({"loss": "product", "prompts": "p"}, "--prompts is for --loss distil, not --loss product"),
        ({"loss": "distil", "wish": "be nice"}, "give --wish TEXT and --prompts FILE"),
        ({"loss": "distil", "wish": "be nice", "prompts": "p"}, "reads --prompts and no --data; leave that out"),
        ({"loss": "distil", "wish": " ", "prompts": "p"}, "--wish is empty; give a text"),
        ({"loss": "distil", "wish": "a", "prompts": "d", "beta": 0.1}, "--beta is for .* not --loss distil: a wish"),
    ],
)
def test_options_of_other_losses_are_refused(changes: dict[str, Any], message: str) -> None:
    import genarm.lab.training  # noqa: F401 (the other kinds)

    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"model": "m", "data": "d", "output": Path("o"), **changes})


def test_missing_settings_are_those_of_the_loss() -> None:
    with pytest.raises(ConfigError, match="--prompts and --output missing"):
        make_config({"model": "m", "loss": "distil"})
    with pytest.raises(ConfigError, match="--data missing"):
        make_config({"model": "m", "output": "o"})
    assert make_config(
        {"model": "m", "data": "d", "output": "o", "loss": "product", "through_weight": 2}
    ) == TrainConfig(model="m", data="d", output=Path("o"), loss="product", through_weight="2")


def _refused(error: type[GenarmError], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        run(settings)
    assert not Path(settings["output"]).exists()


def test_bases_that_do_not_serve(toy: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "arm"
    other = save_member(tiny_model(seed=1), tmp_path / "other", tiny_tokenizer(words=[f"x{i}" for i in range(40)]))
    shorter = tiny_model(seed=1)
    shorter.config.max_position_embeddings = 16
    short = save_member(shorter, tmp_path / "short")
    adapter = tiny_lora(tiny_model(), tmp_path / "adapter", seed=1, base_path=toy["model"])
    compose(toy["model"], {"a": toy["base"]}, tmp_path / "guided")
    for loss in ("product", "distil"):
        for base, error, message in (
            (tmp_path / "none", MemberError, "none"),
            (other, VocabularyError, "have different vocabularies"),
            (short, ConfigError, "has 16 positions"),
            (adapter, MemberError, "is a LoRA adapter"),
            (tmp_path / "guided", MemberError, "is a guided folder; give --through its base"),
        ):
            _refused(error, message, _settings(toy, output, loss=loss, through=str(base)))


def test_data_with_tokens_that_the_base_does_not_know(toy: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(extra=("<turn>",))
    tokenizer.chat_template = "<turn> " + tokenizer.chat_template
    model = save_member(tiny_model(seed=2, vocab_size=VOCAB_SIZE + 1), tmp_path / "model", tokenizer)
    settings = {**_settings(toy, tmp_path / "arm", loss="product", through=toy["base"]), "model": str(model)}
    _refused(VocabularyError, "the data hold '<turn>' .* which the base of --through does not know", settings)


def test_wishes_and_prompts_that_do_not_serve(toy: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "arm"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "w1"}\n')
    for changes, error, message in (
        ({"wish": f"@{tmp_path}/none"}, ConfigError, "cannot read the text of --wish"),
        ({"wish": f"@{empty}"}, ConfigError, "is empty; write into it what is wished for"),
        ({"prompts": str(tmp_path / "none.jsonl")}, DataError, "there is no file or folder .*none.jsonl"),
        ({"prompts": str(empty)}, DataError, "has no rows"),
        ({"prompts": str(rows)}, DataError, "text"),
        ({"wish": " ".join(["w1"] * 30)}, DataError, "the prompt is too long"),
    ):
        _refused(error, message, _settings(toy, output, loss="distil", **changes))


def test_a_resumed_distillation_keeps_its_replies_and_no_others(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(toy, tmp_path / "arm", loss="distil", max_steps=1)
    run(settings)
    prompts = Path(toy["prompts"])
    before = prompts.read_text()
    try:
        prompts.write_text(before.replace("w3 w3", "w9 w9"))
        with pytest.raises(DataError, match=r"replies.jsonl has replies to other prompts, or to another wish"):
            train(TrainConfig(**settings), resume=True, console=Console(quiet=True))
    finally:
        prompts.write_text(before)
