"""Adapters of the output layer alone, which the engine tells from the base's hidden states, against transformers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from builders.engines import LENGTH, PROMPTS, TOKENIZER, WEIGHTS, full, greedy, idle, lora, options
from builders.families import tiny_family
from builders.tiny import DEVICE, FAMILIES, tiny_model
from genarm import GuidedForCausalLM
from genarm.engine import Engine, Request, device
from genarm.engine.graphs import DecodeGraphs
from genarm.model.wishes import Wish
from genarm.sampling import Sampling


def head(model: PreTrainedModel, name: str, seed: int, rank: int = 3, **more: Any) -> PeftModel:
    """A random adapter on the output layer of `model` itself."""
    torch.manual_seed(seed)
    layer = next(n for n, module in model.named_modules() if module is model.get_output_embeddings())
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=[layer], task_type="CAUSAL_LM", **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter and of tied layers
        adapted = PeftModel(model, config, adapter_name=name)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key and f".{name}." in key:
            torch.nn.init.normal_(parameter, std=0.5)
    return adapted


def guided(base: PreTrainedModel, **more: Any) -> GuidedForCausalLM:
    rewards = {"kind": head(base, "kind", 3), "brief": head(base, "brief", 4, rank=5), **more}
    model = GuidedForCausalLM.from_members(base, rewards, references={"kind": base})
    model.generation_config.eos_token_id = None
    return model


def replies(model: GuidedForCausalLM, weights: list[dict[str, float]]) -> list[list[int]]:
    found = []
    for prompt, row in zip(PROMPTS, weights, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=LENGTH, reward_weights=row, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one stream": {"streams": 1},
    "small chunks": {"chunk": 5},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("others", ["alone", "a lora", "a full model"])
def test_replies_are_those_of_generate(family: str, others: str) -> None:
    base = tiny_model(family, seed=0)
    makes: dict[str, Any] = {"alone": dict, "a lora": lambda: {"low": lora(base, "low", 5)}}
    model = guided(base, **makes.get(others, lambda: {"full": full(family, 1)})())
    weights = [dict(zip(model.reward_names, row, strict=False)) for row in WEIGHTS]
    expected = replies(model, weights)
    assert len({tuple(reply) for reply in expected}) == len(PROMPTS)
    requests = [greedy(prompt, row) for prompt, row in zip(PROMPTS, weights, strict=True)]
    speculation = {"speculation": {"speculate": 4, "adapt": False}} if others == "a full model" else {}
    for name, changes in {**VARIANTS, **speculation}.items():
        with Engine(model, TOKENIZER, options(**changes)) as engine:
            found = engine.generate(requests)
            assert [list(reply.token_ids) for reply in found] == expected, name
            assert "kind, brief: told from its hidden states" in engine.describe()
            assert idle(engine)
    assert replies(model, weights) == expected


def test_small_changes_of_a_model_in_half_precision() -> None:
    """What rounding does to its logits is more than what the adapter does."""
    base = tiny_model("llama", seed=0).to(torch.bfloat16)
    adapted = head(base, "kind", 3)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            parameter.data *= 1e-3
    model = GuidedForCausalLM.from_members(base, {"kind": adapted}, references={"kind": base})
    with Engine(model, TOKENIZER, options()) as engine:
        assert "kind: told from its hidden states" in engine.describe()


@pytest.mark.skipif(DEVICE != "cpu", reason="what a processor has is asked of models on one")
@pytest.mark.parametrize("fast", [True, False], ids=["fast bfloat16", "none"])
def test_half_precision_on_either_kind_of_processor(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float32 models of the same rounded weights; bfloat16 keeps 8 bits."""
    monkeypatch.setattr(device, "has_bfloat16", lambda: fast)
    base = tiny_model("llama", seed=0).to(torch.bfloat16)
    exact = copy.deepcopy(base).float()
    prompt, weights = PROMPTS[3], {"kind": 1.5, "brief": -0.5}
    with Engine(guided(base), TOKENIZER, options()) as engine:
        assert f"cpu, {'bfloat16' if fast else 'float32'}" in engine.describe()
        (reply,) = engine.generate([greedy(prompt, weights)])
    ids = torch.tensor([[*prompt, *reply.token_ids]])
    expected_TV = model_with(guided(exact), weights)(ids).logits[0].log_softmax(-1)[len(prompt) - 1 :]
    found = [token.log_prob for token in reply.tokens]
    assert found == pytest.approx(
        [float(row_V[token.id]) for row_V, token in zip(expected_TV, reply.tokens, strict=False)], abs=0.3
    )


def test_they_need_no_rows_and_no_forwards() -> None:
    base = tiny_model("llama", seed=0)
    model = guided(base)
    asked = [greedy(prompt, {"kind": 1.0, "brief": -0.5}) for prompt in PROMPTS]
    with Engine(base, TOKENIZER, options(wishes=0)) as plain, Engine(model, TOKENIZER, options(wishes=0)) as engine:
        plain.generate([greedy(prompt) for prompt in PROMPTS])
        engine.generate(asked)
        ours, theirs = engine.statistics(), plain.statistics()
        assert (ours.passes, ours.free_rows, ours.cache_bytes) == (theirs.passes, theirs.free_rows, theirs.cache_bytes)


def test_the_numbers_of_prompts_and_replies_are_the_members_own() -> None:
    base = tiny_model("llama", seed=0)
    model = guided(base)
    weights = {"kind": 1.5, "brief": -0.5}
    asked = Request(
        prompt=PROMPTS[3], weights=weights, prompt_log_probs=2, ignore_eos=True, sampling=greedy([6]).sampling
    )
    with Engine(model, TOKENIZER, options(chunk=4)) as engine, engine.stream(asked) as stream:
        reply = stream.result()
        assert stream.prompt is not None
        numbers = [*stream.prompt.tokens, *reply.tokens]
    ids = torch.tensor([[*PROMPTS[3], *reply.token_ids]])
    guided_TV, base_TV = (m(ids).logits[0].log_softmax(-1) for m in (model_with(model, weights), model.base))
    parts = {name: model(ids, reward_weights=alone(model, name)).logits[0] for name in model.reward_names}
    for i, token in enumerate(numbers):
        assert token.log_prob == pytest.approx(float(guided_TV[i, token.id]), abs=1e-4)
        assert token.base == pytest.approx(float(base_TV[i, token.id]), abs=1e-4)
        # At weight 1 the guided model is the tuned one where the base is the reference.
        assert token.rewards["kind"] == pytest.approx(
            float(parts["kind"][i, token.id] - base_TV[i, token.id]), abs=1e-4
        )


def model_with(model: GuidedForCausalLM, weights: dict[str, float]) -> Any:
    return lambda ids: model(ids, reward_weights=weights)


def alone(model: GuidedForCausalLM, name: str) -> dict[str, float]:
    return {other: float(other == name) for other in model.reward_names}


def test_beside_wishes_and_budgets() -> None:
    base = tiny_model("llama", seed=0)
    model = guided(base)
    prompt = "w1 w2 w3"
    given = {"kind": 1.0, "brief": 0.5}
    inputs = model.encode(prompt, wishes={"warm": "w8 w9 w10"}, tokenizer=TOKENIZER)
    out = model.generate(
        **inputs, reward_weights={**given, "warm": 2.0}, max_kl=0.3, do_sample=False, max_new_tokens=LENGTH
    )
    with Engine(model, TOKENIZER, options()) as engine:
        wish = Wish(text="w8 w9 w10", weight=2.0)
        asked = Request(
            prompt=prompt, weights=given, wishes=[wish], max_kl=0.3, ignore_eos=True, sampling=greedy([6]).sampling
        )
        assert list(engine.generate(asked).token_ids) == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_steps_of_graphs_carry_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded static steps that a GPU captures, run eagerly."""
    base = tiny_model("llama", seed=0)
    model = guided(base, low=lora(base, "low", 5))
    weights = [dict(zip(model.reward_names, row, strict=False)) for row in WEIGHTS]
    expected = replies(model, weights)
    with Engine(model, TOKENIZER, options()) as engine:
        trunk = engine._built.members.trunks[0]
        trunk._graphs = DecodeGraphs(trunk.kv_cache, trunk._logits)
        found = engine.generate([greedy(p, row) for p, row in zip(PROMPTS, weights, strict=True)])
        assert trunk._graphs.captured
    assert [list(reply.token_ids) for reply in found] == expected


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_models_that_do_more_to_their_logits_run_such_adapters_as_any_other(family: str) -> None:
    """A cap is no matter of the hidden states; a scale would be missed."""
    base = tiny_family(family)
    model = GuidedForCausalLM.from_members(base, {"kind": head(base, "kind", 3)}, references={"kind": base})
    ids = [5, 9, 12, 3, 7]
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    with Engine(model, TOKENIZER, options(context=32)) as engine:
        assert "told from its hidden states" not in engine.describe()
        asked = greedy(ids, sampling=Sampling(max_new_tokens=8, temperature=0))
        assert list(engine.generate(asked).token_ids) == out[0, len(ids) :].tolist()
