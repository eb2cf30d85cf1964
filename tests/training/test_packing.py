"""Packed pairs against transformers' own forward and autograd, each sequence in a forward of its own."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genarm.data.tokens import TokenPair
from genarm.errors import MemberError
from genarm.training import packing
from genarm.training.collator import collate
from genarm.training.loss import arm_loss
from genarm.training.reader import ModelReader
from genarm.training.responses import ResponseStates, summed, token_log_probs
from genarm.training.trainer import ArmTrainer

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
HEADS: dict[str, Any] = {"head_dim": 8}
WINDOW: dict[str, Any] = {**HEADS, "sliding_window": 6}  # shorter than the pairs
KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, **KINDS, "query_pre_attn_scalar": 8},
    "gpt2": {},  # absolute positions, which begin again
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi": {},
    "cohere2": {**WINDOW, "logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "mixtral": {**HEADS, "num_local_experts": 4},
    "gpt_oss": {**WINDOW, **KINDS, "num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "llama4_text": {  # attention in chunks
        **HEADS,
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 1,
    },
}
FLOAT32_EXPERTS = ("mixtral", "gpt_oss")  # torch's product of many matrices has no float64
NOT_PACKED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 4}, "it takes no positions"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "it takes no positions"),  # ALiBi
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}, "its layers stop"),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}, "nats off"),
    "recurrent_gemma": ({"lru_width": 32, "block_types": ["recurrent", "attention"]}, "nats off"),
}


def _model(family: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **overrides})
    for name, value in vars(config).items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and scales of norms as well
    return model.train()


def _pairs(count: int = 3, seed: int = 0) -> list[TokenPair]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> array[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return array("q", torch.randint(2, VOCABULARY, (size,), generator=generator).tolist())

    return [TokenPair(prompt_ids=ids(3, 20), chosen_ids=ids(1, 15), rejected_ids=ids(2, 18)) for _ in range(count)]


def _rewards_one_by_one(model: nn.Module, pairs: list[TokenPair]) -> Tensor:
    rewards = []
    for ids in [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]:
        prompt = pairs[len(rewards) % len(pairs)].prompt_ids
        whole = torch.tensor([[*prompt, *ids]])
        log_probs_TV = model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
        rewards.append(log_probs_TV[len(prompt) - 1 : -1].gather(-1, whole[0, len(prompt) :, None]).sum())
    return torch.stack(rewards).view(2, -1)


def _rewards(states: ResponseStates) -> Tensor:
    return summed(token_log_probs(states), states).view(2, -1)


def _gradients(model: nn.Module, rewards_2B: Tensor) -> tuple[float, Tensor]:
    """The ARM loss, and its gradient in all parameters as one vector; those without one have zeros."""
    loss = arm_loss(*rewards_2B, 0.3)
    loss.backward()
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    model.zero_grad()
    return loss.item(), torch.cat(flat)


def _assert_same(model: nn.Module, reader: ModelReader, pairs: list[TokenPair]) -> None:
    loss, gradient = _gradients(model, _rewards(reader.states(model, collate(pairs))))
    reader.leave()
    expected, exact = _gradients(model, _rewards_one_by_one(model, pairs))
    # In float32 both sides round; float64 shows that it is rounding alone (where norms do not compute in float32).
    tolerance = 1e-5 if exact.dtype == torch.float32 else 1e-6
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert float((gradient - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in PACKED),
        *((family, torch.float64) for family in PACKED if family not in FLOAT32_EXPERTS),
    ],
)
@pytest.mark.parametrize("call", ["pair by pair", "side by side"])  # as on a CPU, and elsewhere
def test_packed_loss_and_gradients(family: str, dtype: torch.dtype, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_pair_by_pair", lambda device: call == "pair by pair")
    model, pairs = _model(family, **PACKED[family]).to(dtype), _pairs()
    reader = ModelReader(model)
    assert reader.check(model, collate(_pairs(2, seed=1))) == []
    _assert_same(model, reader, pairs)


def test_attention_is_told_the_positions_of_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention cuts a row where its positions begin again, also one that is a sequence by itself."""
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module: nn.Module, query: Tensor, *more: Any, position_ids: Tensor, **options: Any) -> Any:
        seen.append(position_ids.equal(torch.arange(query.shape[2]).expand(query.shape[0], -1)))
        return sdpa(module, query, *more, **options)

    model, ids = _model("llama"), array("q", range(2, 42))
    pairs = [TokenPair(prompt_ids=ids[:5], chosen_ids=ids[:1], rejected_ids=ids)]  # two groups of one
    reader = ModelReader(model)
    assert reader.check(model, collate(_pairs(2))) == []
    monkeypatch.setattr(packing, "_pair_by_pair", lambda device: False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    _rewards(reader.states(model, collate(pairs)))
    reader.leave()
    assert seen == [True] * 4  # two layers, two groups


@pytest.mark.parametrize("family", PACKED)
def test_half_precision_attends_in_float32_on_a_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a float32 model of the same rounded weights; bfloat16 keeps 8 bits."""
    model, pairs = _model(family, **PACKED[family]).to(torch.bfloat16), _pairs()
    attend = packing._attend_to_pairs
    seen: set[torch.dtype] = set()

    def noted(attention: Any, module: nn.Module, qkv: Any, *more: Any) -> Tensor:
        seen.update(tensor.dtype for tensor in qkv)
        return attend(attention, module, qkv, *more)

    monkeypatch.setattr(packing, "_attend_to_pairs", noted)
    reader = ModelReader(model)
    assert reader.check(model, collate(_pairs(2, seed=1))) == []
    _, gradient = _gradients(model, _rewards(reader.states(model, collate(pairs))))
    reader.leave()
    assert seen == {torch.float32}
    _, exact = _gradients(model.float(), _rewards_one_by_one(model, pairs))
    assert float((gradient - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("family", NOT_PACKED)
def test_families_that_cannot_say_so_and_are_right(family: str) -> None:
    options, reason = NOT_PACKED[family]
    model, pairs = _model(family, **options), _pairs()
    reader = ModelReader(model)
    (note,) = reader.check(model, collate(_pairs(2, seed=1)))
    assert note.startswith("pairs are not packed, which this model cannot read")
    assert reason in note
    _assert_same(model, reader, pairs)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_and_checkpointing(targets: str | list[str], checkpointing: bool) -> None:
    base = _model("mistral", **WINDOW)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    reader = ModelReader(model)
    assert reader.check(model, collate(_pairs(2))) == []
    _assert_same(model, reader, _pairs())
    with model.disable_adapter(), torch.no_grad():  # as a reference
        got = _rewards(reader.states(model, collate(_pairs())))
        torch.testing.assert_close(got, _rewards_one_by_one(model, _pairs()))
    assert not torch.allclose(got, _rewards_one_by_one(model, _pairs()))


def test_the_same_pairs_however_they_are_put_together() -> None:
    model, pairs = _model("llama"), _pairs(6)
    reader = ModelReader(model)
    reader.check(model, collate(pairs))
    with torch.no_grad():
        one = _rewards(reader.states(model, collate(pairs)))
        parts = [_rewards(reader.states(model, collate(part))) for part in ([pairs[3]], pairs[4:], pairs[:3])]
    torch.testing.assert_close(one, torch.cat([parts[2], parts[0], parts[1]], dim=1), rtol=1e-6, atol=1e-5)


def test_dropout_is_that_of_the_model(tmp_path: Path) -> None:
    """With dropout in attention and layers, the mean over many passes is the same, packed or not, and so is the spread.

    Which units go is drawn for each token: a prompt's are the same for both of its responses when they are packed.
    """
    model, pairs = _model("gpt2"), _pairs(2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    reader = ModelReader(model)
    assert reader.check(model, collate(pairs)) == []
    batch, n = collate(pairs), 120
    with torch.no_grad():
        packed = torch.stack([_rewards(reader.states(model, batch)) for _ in range(n)])
        reader.leave()
        alone = torch.stack([_rewards_one_by_one(model, pairs) for _ in range(n)])
    error = (packed.var(0) / n + alone.var(0) / n).sqrt()
    assert ((packed.mean(0) - alone.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(packed.std(0), alone.std(0), rtol=0.4, atol=0)
    assert float(packed.std(0).min()) > 0.1


def test_a_model_that_mixes_texts_is_refused() -> None:
    class Mixing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden - hidden.mean((0, 1))

    model = _model("llama")
    model.model.norm = Mixing()
    with pytest.raises(MemberError, match=r"depends on the texts beside it.* nats off; take a model of another"):
        ModelReader(model).check(model, collate(_pairs(2)))


def test_accumulation_and_a_model_left_as_it_was(tmp_path: Path) -> None:
    """The trainer's gradient over two batches is the mean of both; afterwards the model has its own attention."""
    model, pairs = _model("qwen2"), _pairs(6)
    _, exact = _gradients(model, _rewards_one_by_one(model, pairs))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    ArmTrainer(model, arguments, beta=0.3, train_pairs=pairs).train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(((before - after) - exact).norm() / exact.norm()) < 1e-4  # differences of weights round
    assert model.config._attn_implementation == "sdpa"
