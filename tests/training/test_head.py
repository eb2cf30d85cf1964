"""Head ARMs: against the formula by hand, and from training to guiding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from builders.toy_training import run, write_toy
from genarm import Engine, GuidedForCausalLM, Request, compose
from genarm.data.tokens import TokenPair
from genarm.errors import ConfigError, MemberError
from genarm.sampling import Sampling
from genarm.training.config import TrainConfig
from genarm.training.head import add_head, unfold
from genarm.training.losses.frozen import Frozen, Through
from genarm.training.losses.trainers import ProductTrainer, ReferenceTrainer
from genarm.training.run import train
from genarm.training.trainer import ArmTrainer

BETA, RANK = 0.3, 3
PAIRS = [
    TokenPair(prompt_ids=[2, 9, 11, 1, 3], chosen_ids=[7, 8, 1], rejected_ids=[20, 1]),  # type: ignore[arg-type]
    TokenPair(prompt_ids=[2, 30, 1, 3], chosen_ids=[12, 1], rejected_ids=[13, 14, 15, 16, 1]),  # type: ignore[arg-type]
]


def headed(family: str = "llama") -> tuple[Any, Tensor, Tensor]:
    """A model with a head that is no longer zero, and the head's A [R, D] and B [D, R]."""
    model = add_head(tiny_model(family, seed=1), RANK, dropout=0.0)
    layer: Any = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    torch.manual_seed(2)
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def by_hand(plain: Any, a: Tensor, b: Tensor, pair: TokenPair, response: Any) -> tuple[Tensor, Tensor]:
    """Log-prob of a response as `E (h + B A h)` has it, and as `E h` has it."""
    ids = torch.tensor([[*pair.prompt_ids, *response]])
    h_TD = plain.model(ids, use_cache=False).last_hidden_state[0, len(pair.prompt_ids) - 1 : -1]
    e_VD = plain.get_output_embeddings().weight
    said = [(states @ e_VD.T).log_softmax(-1) for states in (h_TD + h_TD @ a.T @ b.T, h_TD)]
    return tuple(table.gather(-1, torch.tensor(response)[:, None]).sum() for table in said)  # type: ignore[return-value]


@pytest.mark.parametrize("loss", ["arm", "reference", "product"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_losses_and_gradients_are_those_of_the_formula(loss: str, family: str, tmp_path: Path) -> None:
    model, a, b = headed(family)
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "arm": (ArmTrainer, {}),
        "reference": (ReferenceTrainer, {"start": Frozen()}),
        "product": (
            ProductTrainer,
            {"start": (start := Frozen()), "through": Through(base=start, alignment=None, low=1.0, high=1.0)},
        ),
    }
    kind, options = made[loss]
    trainer = kind(model, arguments, beta=BETA, train_pairs=PAIRS, **options)
    trainer.model.train()
    found = trainer.compute_loss(trainer.model, trainer.data_collator(PAIRS))
    found.backward()
    ours = [a.grad.clone(), b.grad.clone()]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        n for n, p in model.named_parameters() if p is a or p is b
    ]
    model.zero_grad()

    plain = tiny_model(family, seed=1)
    margins = []
    for pair in PAIRS:
        chosen, rejected = (by_hand(plain, a, b, pair, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
        margin = chosen[0] - rejected[0]
        # Through the model itself at weight 1 the guided model is the head's: log Z is 0.
        margins.append(margin if loss == "arm" else margin - (chosen[1] - rejected[1]))
    expected = -torch.nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    for mine, theirs in zip(ours, (a.grad, b.grad), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_one_forward_below_the_output_layer_serves_both(tmp_path: Path) -> None:
    model, _, _ = headed()
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    trainer = ReferenceTrainer(model, arguments, beta=BETA, train_pairs=PAIRS, start=Frozen())
    trainer.check_reading()
    forwards: list[int] = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    trainer.compute_loss(trainer.model, trainer.data_collator(PAIRS)).backward()
    assert len(forwards) == 1


def test_from_pairs_to_a_guided_model(tmp_path: Path) -> None:
    settings = write_toy(tmp_path)
    result = run(settings, head=4, loss="reference", learning_rate=None, epochs=3)
    assert result.metrics["eval_accuracy"] > 0.9
    files = {file.name for file in result.output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "train_config.toml"} <= files
    tensors = load_file(result.output / "adapter_model.safetensors")
    assert sorted(key.rsplit(".", 2)[-2] for key in tensors) == ["lora_A", "lora_B"]  # nothing of the base's
    assert "head of rank 4 on" in (result.output / "README.md").read_text(encoding="utf-8")

    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(settings["model"]), result.output)
    compose(settings["model"], {"kind": result.output}, tmp_path / "guided")
    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided")
    ids = torch.tensor([[2, 30, 31, 1, 3]])
    torch.testing.assert_close(model(ids).logits, tuned(ids).logits.log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base(ids).logits.log_softmax(-1), model(ids).logits, atol=1e-2)
    with Engine(model, tiny_tokenizer()) as engine:
        assert "kind: told from its hidden states" in engine.describe()
        reply = engine.generate(Request(prompt=ids[0].tolist(), sampling=Sampling(max_new_tokens=4)))
        assert reply.tokens[0].log_prob == pytest.approx(float(model(ids).logits[0, -1, reply.tokens[0].id]), abs=1e-4)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=48), "head": 4, "loss": "reference", "save_steps": 2, "eval_steps": 2}
    whole = load_file(run(settings).output / "adapter_model.safetensors")
    cut = {**settings, "output": tmp_path / "cut"}

    class CutOffError(Exception):
        pass

    original = ReferenceTrainer.training_step
    steps = iter(range(100))

    def until_four(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if next(steps) == 4:
            raise CutOffError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceTrainer, "training_step", until_four)
        with pytest.raises(CutOffError):
            run(cut)
    result = train(TrainConfig(**cut), resume=True, console=Console(quiet=True))
    assert result.resumed_from == 4
    for name, tensor in load_file(result.output / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-7, rtol=0)


def test_what_is_saved_is_the_product_with_the_output_layer() -> None:
    model, _, b = headed()
    layer: Any = model.get_base_model().get_output_embeddings()
    before = model(torch.tensor([[5, 6, 7]])).logits
    unfold(model)
    torch.testing.assert_close(layer.lora_B["default"].weight.data, layer.base_layer.weight @ b)
    torch.testing.assert_close(model(torch.tensor([[5, 6, 7]])).logits, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": 0}, "--head must be at least 1"),
        ({"head": 4, "lora": True}, "give one of the two"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="m", data="d", output=Path("o"), **changes)


def test_a_head_needs_a_plain_output_layer(tmp_path: Path) -> None:
    model = tiny_model()
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(MemberError, match="needs a plain linear layer"):
        add_head(model, 4, 0.0)
    folder = save_member(tiny_model(), tmp_path / "m")
    assert folder.is_dir()
