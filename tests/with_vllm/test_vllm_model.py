"""A guided folder inside vLLM gives the tokens and log-probs of the transformers guided model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention

from builders.guided_vllm import TOLERANCE, Asked, agree, ask, engine, folder, inner_model, members, oracle
from builders.tiny import VOCAB_SIZE, save_member, tiny_model, tiny_tokenizer
from genarm import compose

FAMILIES = {
    "llama": [
        {"arm": "small"},
        {"helpful": "lora"},
        {"helpful": "lora", "harmless": "lora2"},
        {"brief": "small_lora", "kind": "small_lora2"},
        {"helpful": "lora", "arm": "small", "brief": "small_lora"},
        {"kind": "head", "brief": "head2"},
        {"helpful": "lora", "kind": "head", "arm": "small"},
    ],
    "qwen2": [{"helpful": "lora", "arm": "small"}, {"kind": "head"}],
    "qwen3": [{"helpful": "lora"}],
    "mistral": [{"helpful": "lora", "arm": "small"}],  # one has a sliding window, the other has none
}
CASES = [(family, rewards) for family, cases in FAMILIES.items() for rewards in cases]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Path]]]:
    roots = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    return {family: (root, members(root, family)) for family, root in roots.items()}


@pytest.mark.parametrize(
    ("family", "rewards"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_greedy_tokens_and_log_probs(places: Any, family: str, rewards: dict[str, str]) -> None:
    guided = folder(*places[family], rewards)
    first, *others = rewards
    asked = [
        Asked(prompt=[7, 8, 9, 10]),
        Asked(prompt=list(range(6, 40)), weights={first: -0.8}),
        Asked(prompt=[12], weights=dict.fromkeys(rewards, 0.0)),
        Asked(prompt=[13, 14, 15], weights={first: 1.5, **dict.fromkeys(others, 0.0)}, tokens=30),
        Asked(prompt=[13, 14, 15], weights=dict.fromkeys(rewards, 0.5)),
    ]
    with engine(guided) as llm:
        outputs = ask(llm, asked)
        scored = llm.generate(
            [{"prompt_token_ids": list(range(6, 40))}],
            SamplingParams(max_tokens=1, prompt_logprobs=2),
            use_tqdm=False,
        )[0]
    model = oracle(guided)
    for request, output in zip(asked, outputs, strict=True):
        agree(model, request, output)
    with torch.no_grad():
        expected_TV = model(torch.tensor([list(range(6, 40))])).logits[0]
    for t, entries in enumerate(scored.prompt_logprobs[1:]):
        for token, entry in entries.items():
            assert math.isclose(entry.logprob, expected_TV[t, token].item(), abs_tol=TOLERANCE)


def test_members_that_do_not_count_have_no_logits(places: Any) -> None:
    guided = folder(*places["llama"], {"helpful": "lora", "arm": "small", "brief": "small_lora"})
    calls: list[tuple[str, int]] = []
    with engine(guided) as llm:
        for trunk in inner_model(llm).members.trunks:
            usual = trunk.model.compute_logits

            def counted(rows: torch.Tensor, name: str = trunk.trunk.name, usual: Any = usual) -> torch.Tensor:
                calls.append((name, rows.shape[0]))
                return usual(rows)

            trunk.model.compute_logits = counted
        ask(llm, [Asked(prompt=[7, 8], weights={"helpful": 0, "arm": 0, "brief": 0}, tokens=2)])
        assert calls == [("base", 1)] * 2
        calls.clear()
        ask(llm, [Asked(prompt=[7, 8], weights={"arm": 0, "brief": 1}, tokens=2)])
        # One read of the base's output layer for its two members; two rows are quicker twice.
        assert calls == [("base", 4), ("arm", 1)] * 2


def test_heads_add_nothing_to_what_the_layers_run(places: Any) -> None:
    guided = folder(*places["llama"], {"kind": "head", "brief": "head2"})
    with engine(guided) as llm:
        model = inner_model(llm).members.trunks[0].model
        rows: list[int] = []
        model.model.embed_tokens.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
        ask(llm, [Asked(prompt=[7, 8, 9], tokens=2) for _ in range(3)])
    assert rows == [9, 3]


def test_a_token_that_goes_through_twice_is_kept_once(places: Any) -> None:
    guided = folder(*places["llama"], {"helpful": "lora"})  # its two members make two rows of a token
    prompt, tokens = [7, 8, 9, 10], 12
    with engine(guided) as llm:
        model = inner_model(llm).members.trunks[0].model
        cache = next(layer for layer in model.modules() if isinstance(layer, Attention)).kv_cache.zero_()
        rows: list[int] = []
        model.model.embed_tokens.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
        ask(llm, [Asked(prompt=prompt, tokens=tokens)])
        values = cache.unflatten(3, (2, -1)).flatten(2, 3).chunk(2, dim=2)[1]  # [blocks, heads, positions, head size]
        kept = values.ne(0).any(dim=3).any(dim=1)
    assert rows == [2 * len(prompt)] + [4] * (tokens - 1)
    assert kept.sum() == len(prompt) + tokens - 1


def test_weights_of_zero_give_the_base(places: Any) -> None:
    root, members_ = places["llama"]
    guided = folder(root, members_, {"helpful": "lora", "harmless": "lora2"})
    asked = Asked(prompt=[7, 8, 9, 10], weights={"helpful": 0, "harmless": 0}, tokens=20)
    with engine(guided) as llm:
        output = ask(llm, [asked])[0].outputs[0]
    with engine(members_["base"]) as llm:
        plain = ask(llm, [Asked(prompt=asked.prompt, tokens=20)])[0].outputs[0]
    assert output.token_ids == plain.token_ids
    for own, base in zip(output.logprobs, plain.logprobs, strict=True):
        for token, entry in own.items():
            assert math.isclose(entry.logprob, base[token].logprob, abs_tol=1e-5)


def test_penalties_act_on_the_combination(places: Any) -> None:
    guided = folder(*places["llama"], {"helpful": "lora", "arm": "small"})
    weights = {"helpful": 1.2, "arm": -0.4}
    kinds: list[dict[str, float]] = [{"repetition_penalty": 1.7}, {"frequency_penalty": 0.9, "presence_penalty": 0.6}]
    asked = [Asked(prompt=[7, 8, 9], weights=weights, tokens=25, options=options) for options in kinds]
    with engine(guided) as llm:
        got = [list(output.outputs[0].token_ids) for output in ask(llm, asked)]
    model = oracle(guided)
    for request, options, reply in zip(asked, kinds, got, strict=True):
        ids: list[int] = list(request.prompt)
        with torch.no_grad():
            for _ in range(request.tokens):
                scores = model(torch.tensor([ids]), reward_weights=weights).logits[0, -1].clone()
                if "repetition_penalty" in options:  # of the prompt too; log-probs are never positive
                    scores[list(set(ids))] *= options["repetition_penalty"]
                else:
                    own = torch.tensor(ids[len(request.prompt) :], dtype=torch.long)
                    counts = torch.bincount(own, minlength=len(scores))
                    scores -= options["frequency_penalty"] * counts + options["presence_penalty"] * (counts > 0)
                ids.append(int(scores.argmax()))
        assert reply == ids[len(request.prompt) :]


def test_a_reward_that_lacks_some_of_the_bases_tokens(tmp_path: Path) -> None:
    base = tiny_model("llama", seed=1, hidden=64, head_dim=32, vocab_size=VOCAB_SIZE + 2)
    arm = tiny_model("llama", seed=2, hidden=64, head_dim=32)
    save_member(base, tmp_path / "base", tiny_tokenizer(("<extra>", "<more>")))
    save_member(arm, tmp_path / "arm")
    compose(tmp_path / "base", {"arm": tmp_path / "arm"}, tmp_path / "guided")
    asked = [Asked(prompt=[7, VOCAB_SIZE, 9], weights={"arm": w}, tokens=20) for w in (0.0, 1.0)]
    with engine(tmp_path / "guided") as llm:
        outputs = ask(llm, asked)
    model = oracle(tmp_path / "guided")
    for request, output in zip(asked, outputs, strict=True):
        agree(model, request, output)
    assert all(token < VOCAB_SIZE for token in outputs[1].outputs[0].token_ids)


def test_tuned_rewards_and_budgets(places: Any) -> None:
    """An ARM, a tuned adapter less the base, and a small tuned model less its untuned self, all in one batch."""
    root, found = places["llama"]
    guided = root / "tuned"
    compose(
        found["base"],
        {"arm": found["lora"]},
        guided,
        tuned={"t": found["lora2"], "s": found["small_lora"]},
        references={"s": found["small"]},
    )
    rows = [
        ({"arm": 0.5, "t": 1.5, "s": -0.7}, None),
        ({"arm": 0.0, "t": 1.0, "s": 0.0}, None),
        ({"arm": 2.0, "t": 2.0, "s": 2.0}, 0.05),
        ({"arm": 0.0, "t": 0.0, "s": 3.0}, 0.4),
        ({"arm": 0.0, "t": 0.0, "s": 0.0}, 0.1),
    ]
    asked = [Asked(prompt=[7, 8 + i], weights=weights, max_kl=most) for i, (weights, most) in enumerate(rows)]
    with engine(guided) as llm:
        outputs = ask(llm, asked)
        as_text = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args={"max_kl": "0.05"})
        llm.generate([{"prompt_token_ids": [7, 8]}], as_text, use_tqdm=False)
        for wrong in (-1, "much", math.inf):
            params = SamplingParams(max_tokens=2, extra_args={"max_kl": wrong})
            with pytest.raises(VLLMValidationError, match="max_kl is"):
                llm.generate([{"prompt_token_ids": [7, 8]}], params, use_tqdm=False)
    model = oracle(guided)
    for request, output in zip(asked, outputs, strict=True):
        agree(model, request, output)


# --- weights of a request ---------------------------------------------------------------------------------------------


def test_ways_to_write_weights(places: Any) -> None:
    guided = folder(*places["llama"], {"helpful": "lora", "harmless": "lora2"})
    weights = {"helpful": 0.25, "harmless": -1.0}
    forms = [weights, json.dumps(weights), "helpful=0.25,harmless=-1", "harmless=-1 helpful=0.25"]
    params = [
        SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, extra_args={"reward_weights": form})
        for form in forms
    ]
    with engine(guided) as llm:
        outputs = llm.generate([{"prompt_token_ids": [7, 8]}] * len(forms), params, use_tqdm=False)
    model = oracle(guided)
    for output in outputs:
        agree(model, Asked(prompt=[7, 8], weights=weights, tokens=8), output)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kind": 1.0}, "no reward is named 'kind'; this model has: helpful"),
        ({"helpful": math.nan}, "must be a finite number"),
        ({"helpful": "much"}, "must be a finite number"),
        ("helpful", "write NAME=NUMBER"),
        ("{helpful: 1}", "no JSON"),
        ([1.0], "give a mapping"),
    ],
)
def test_wrong_weights_are_refused_and_others_go_on(guided_engine: Any, weights: Any, message: str) -> None:
    params = SamplingParams(max_tokens=2, extra_args={"reward_weights": weights})
    with pytest.raises(VLLMValidationError, match=message):
        guided_engine.generate([{"prompt_token_ids": [7, 8]}], params, use_tqdm=False)
    assert len(ask(guided_engine, [Asked(prompt=[7, 8], tokens=3)])[0].outputs[0].token_ids) == 3


def test_log_probs_of_a_prompt_with_other_weights_are_refused(guided_engine: Any) -> None:
    for weights, fits in (({"helpful": 0.7}, True), ({"helpful": 0.6}, False)):
        params = SamplingParams(max_tokens=1, prompt_logprobs=1, extra_args={"reward_weights": weights})
        if fits:  # what the folder says anyway
            guided_engine.generate([{"prompt_token_ids": [7, 8]}], params, use_tqdm=False)
            continue
        with pytest.raises(VLLMValidationError, match="default weights only"):
            guided_engine.generate([{"prompt_token_ids": [7, 8]}], params, use_tqdm=False)


@pytest.fixture(scope="module")
def guided_engine(places: Any) -> Any:
    with engine(folder(*places["llama"], {"helpful": "lora"})) as llm:
        yield llm


# --- folders that vLLM cannot run -------------------------------------------------------------------------------------


def test_what_cannot_be_run_is_refused_before_anything_is_loaded(places: Any, tmp_path: Path) -> None:
    root, members_ = places["llama"]
    guided = folder(root, members_, {"helpful": "lora"})
    for options, message in (
        ({"enable_lora": True}, "leave --enable-lora out"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"max_model_len": 4096}, "max_model_len"),
    ):
        with pytest.raises(ValueError, match=message), engine(guided, **options):
            pass
    settings = {"base": {"device_map": "auto"}}
    compose(members_["base"], {"helpful": members_["lora"]}, tmp_path / "placed", settings=settings)
    with pytest.raises(ValueError, match="device_map"), engine(tmp_path / "placed"):
        pass


def test_an_adapter_that_does_not_fit_vllms_layers(places: Any, tmp_path: Path) -> None:
    _, members_ = places["llama"]
    base = AutoModelForCausalLM.from_pretrained(members_["base"])
    dora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    get_peft_model(base, dora).save_pretrained(tmp_path / "adapter")
    compose(members_["base"], {"helpful": tmp_path / "adapter"}, tmp_path / "guided")
    with pytest.raises(ValueError, match="DoRA, biases or embeddings"), engine(tmp_path / "guided"):
        pass
