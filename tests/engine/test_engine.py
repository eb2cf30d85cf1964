"""The engine against `GuidedForCausalLM`: the same tokens, the same numbers, and how requests behave."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from builders.engines import (
    KINDS,
    LENGTH,
    PROMPTS,
    TOKENIZER,
    VARIANTS,
    WEIGHTS,
    full,
    greedy,
    idle,
    lora,
    make_model,
    options,
    weights_of,
)
from builders.families import tiny_family
from builders.tiny import DEVICE, FAMILIES, VOCAB_SIZE, save_member, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, Request, device
from genarm.engine.attention import Pass
from genarm.engine.graphs import DecodeGraphs, Waits
from genarm.engine.norms import _FusedNorm
from genarm.engine.trunk import Trunk
from genarm.errors import ConfigError, DataError, EngineFailure, GenarmError, UnsupportedError, WeightsError
from genarm.sampling import Sampling


def generated(
    model: PreTrainedModel, weights: Sequence[Mapping[str, float]] | None = None, **options: Any
) -> list[list[int]]:
    """Greedy replies to PROMPTS by transformers, as one left-padded batch."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS], device=DEVICE)
    if weights is not None:
        assert isinstance(model, GuidedForCausalLM)
        options["reward_weights"] = torch.tensor([[row[name] for name in model.reward_names] for row in weights])
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0, **options
    )
    return output[:, longest:].tolist()


def token_ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


# --- the same tokens ------------------------------------------------------------------------------------------------

CASES = [*itertools.product(FAMILIES, ["full and lora", "two loras"])]
CASES += [("llama", kind) for kind in KINDS if ("llama", kind) not in CASES]
CASES += [("gpt2", "dora"), ("mistral", "three")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_greedy_tokens_are_those_of_generate(family: str, kind: str) -> None:
    """Prompts and replies beyond Mistral's window of 8, positive, negative and no weights side by side."""
    model = make_model(family, kind)
    weights = [weights_of(model, i) for i in range(len(PROMPTS))]
    expected = generated(model, weights)
    assert len({tuple(reply) for reply in expected}) == len(PROMPTS)
    requests = [greedy(prompt, w) for prompt, w in zip(PROMPTS, weights, strict=True)]
    can_draft = kind in ("full", "full and lora", "loras on a smaller model", "three")
    for name, changes in VARIANTS.items():
        with Engine(model, TOKENIZER, options(**changes)) as engine:
            completions = engine.generate(requests)
            assert token_ids(completions) == expected, name
            assert all(
                c.ending == "length" and c.prompt_tokens == len(p) for c, p in zip(completions, PROMPTS, strict=True)
            )
            assert (completions[0].drafted > 0) == (can_draft and name == "speculation") or name == "adaptive"
            if name == "plain":
                shared = "one after the other" if kind == "dora" else "in one forward"
                assert (shared in engine.describe()) == (kind != "full")
    # and the model is what it was
    assert generated(model, weights) == expected


@pytest.mark.parametrize(("family", "kind"), [("llama", "two loras"), ("llama", "three"), ("qwen2", "full and lora")])
def test_as_few_launches_as_on_a_gpu(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters ride in the layers' own products, with and without biases, and norms are one kernel."""
    monkeypatch.setattr("genarm.engine.trunk.launches_count", lambda _: True)
    test_greedy_tokens_are_those_of_generate(family, kind)
    model = make_model(family, kind)
    with Engine(model, TOKENIZER, options()) as engine:
        trunk = next(trunk for trunk in engine._built.members.trunks if trunk._adapters is not None)
        assert all(group.up_RO is not None for group in trunk._adapters._groups)  # type: ignore[union-attr]
        assert any(isinstance(module, _FusedNorm) for module in trunk.model.modules())
        with Engine(model, TOKENIZER, options()) as other:  # of the same model, beside it
            asked = [greedy(prompt, weights_of(model, i)) for i, prompt in enumerate(PROMPTS)]
            assert token_ids(other.generate(asked)) == token_ids(engine.generate(asked))


def test_two_engines_of_one_model() -> None:
    """The second must not take the adapters away from the first."""
    model = make_model("llama", "two loras")
    weights = [weights_of(model, i) for i in range(len(PROMPTS))]
    expected = generated(model, weights)
    requests = [greedy(prompt, w) for prompt, w in zip(PROMPTS, weights, strict=True)]
    with Engine(model, TOKENIZER, options()) as one, Engine(model, TOKENIZER, options()) as two:
        for engine in (one, two, one):
            assert token_ids(engine.generate(requests)) == expected


def test_a_copy_of_a_model_that_an_engine_has_used_is_independent() -> None:
    model = make_model("llama", "two loras")
    Engine(model, TOKENIZER, options()).close()
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    for name, parameter in twin.named_parameters():
        if "q_proj" in name:
            parameter.data.zero_()
    assert not torch.equal(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_rewards(family: str) -> None:
    model = tiny_model(family, seed=0)
    expected = generated(model)
    for changes in VARIANTS.values():
        with Engine(model, TOKENIZER, options(**changes)) as engine:
            completions = engine.generate([greedy(prompt) for prompt in PROMPTS])
            assert token_ids(completions) == expected
            assert generated(model) == expected
            assert all(token.rewards == {} and token.base == token.log_prob for token in completions[0].tokens)


@pytest.mark.parametrize("kind", ["full and lora", "two loras"])
def test_a_named_draft_model_changes_nothing(kind: str) -> None:
    model = make_model("llama", kind)
    weights = [weights_of(model, i) for i in range(len(PROMPTS))]
    expected = generated(model, weights)
    requests = [greedy(prompt, w) for prompt, w in zip(PROMPTS, weights, strict=True)]
    for draft in (full("gpt2", 9), tiny_model("llama", seed=0)):
        for adapt in (False, True):
            with Engine(model, TOKENIZER, options(speculate=3, adapt=adapt), draft=draft) as engine:
                completions = engine.generate(requests)
                assert token_ids(completions) == expected
                assert all(c.drafted > 0 for c in completions) or adapt
                assert {*completions[0].tokens[0].rewards} == {*model.reward_names}
    # A draft model that is the base is accepted always where nothing guides.
    with Engine(model, TOKENIZER, options(speculate=3, adapt=False), draft=tiny_model("llama", seed=0)) as engine:
        unguided = engine.generate([requests[1]])[0]
        assert unguided.accepted == unguided.drafted > 0
        assert engine.statistics().passes[0] <= 1 + -(-LENGTH // 4)


def test_a_draft_model_with_a_smaller_vocabulary_is_worth_having() -> None:
    """Ids that it lacks must not look likely to it."""
    base = tiny_model(seed=0, vocab_size=64)
    draft = tiny_model(seed=0, vocab_size=64)
    head = torch.nn.Linear(32, 56, bias=False, device=DEVICE)
    head.weight.data = draft.lm_head.weight.data[:56].clone()
    draft.lm_head = head
    with torch.no_grad():
        base.lm_head.weight[56:] = base.lm_head.weight[0]  # padding that greedy decoding never reaches
    request = greedy(PROMPTS[0])
    with Engine(base, TOKENIZER, options(speculate=3, adapt=False), draft=draft) as engine:
        completion = engine.generate([request])[0]
        assert completion.accepted > 0.8 * completion.drafted


def test_other_families_as_members() -> None:
    base = tiny_model("mistral", seed=0)
    rewards = {
        "a": tiny_model("gpt2", seed=1, hidden=16),
        "b": tiny_model("qwen3", seed=2),
        "c": tiny_model("gpt_neox", seed=3),
    }
    model = GuidedForCausalLM.from_members(base, rewards)
    weights = [dict(zip("abc", row, strict=True)) for row in WEIGHTS]
    expected = generated(model, weights)
    for changes in VARIANTS.values():
        with Engine(model, TOKENIZER, options(**changes)) as engine:
            requests = [greedy(prompt, w) for prompt, w in zip(PROMPTS, weights, strict=True)]
            assert token_ids(engine.generate(requests)) == expected


def test_a_model_that_is_its_own_reward() -> None:
    """Two members of one trunk without any adapter."""
    base = tiny_model(seed=0)
    model = GuidedForCausalLM.from_members(base, {"self": base})
    weights = [{"self": 1.0}, {"self": 0.0}, {"self": -2.0}, {"self": 0.5}]
    with Engine(model, TOKENIZER, options()) as engine:
        requests = [greedy(prompt, w) for prompt, w in zip(PROMPTS, weights, strict=True)]
        assert token_ids(engine.generate(requests)) == generated(model, weights)


def gemma(seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        max_position_embeddings=128,
        initializer_range=0.5,
        attn_logit_softcapping=0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(DEVICE)


def test_gemma_with_squashed_scores_and_alternating_windows() -> None:
    base, arm = gemma(0), gemma(1)
    ids = torch.tensor([PROMPTS[1]], device=DEVICE)
    loose = gemma(0)
    for layer in loose.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(base(ids).logits, loose(ids).logits, atol=1e-2)  # squashing matters here
    model = GuidedForCausalLM.from_members(base, {"r": arm, "one": lora(base, "one", 3)})
    weights = [dict(zip(("r", "one"), row, strict=False)) for row in WEIGHTS]
    expected = generated(model, weights)
    requests = [greedy(prompt, w) for prompt, w in zip(PROMPTS, weights, strict=True)]
    for changes in VARIANTS.values():
        with Engine(model, TOKENIZER, options(**changes)) as engine:
            assert token_ids(engine.generate(requests)) == expected
    assert generated(model, weights) == expected  # the model still works as before


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_models_that_the_engine_cannot_run_are_refused_and_left_alone(family: str) -> None:
    torch.manual_seed(0)
    shape = {"n_head": 4} if family == "bloom" else {}
    config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, **shape)
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    before = model(ids).logits
    with pytest.raises(UnsupportedError, match=r"cannot run an? \w+ForCausalLM.*use GuidedForCausalLM\.generate"):
        Engine(model, TOKENIZER, options())
    assert torch.equal(model(ids).logits, before)
    if family == "mamba":  # no guided model can be made of it
        with pytest.raises(UnsupportedError, match="'r' is a MambaForCausalLM, which keeps no keys and values"):
            GuidedForCausalLM.from_members(tiny_model(), {"r": model})
    else:
        arm = GuidedForCausalLM.from_members(tiny_model(), {"r": model})
        with pytest.raises(UnsupportedError, match="cannot run"):
            Engine(arm, TOKENIZER, options())
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("fast", [True, False], ids=["fast bfloat16", "none"])
def test_half_precision(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float32 models of the same rounded weights; bfloat16 keeps 8 bits. On either kind of processor."""
    monkeypatch.setattr(device, "has_bfloat16", lambda: fast)
    base, arm = [tiny_model(seed=seed).bfloat16() for seed in (0, 1)]
    exact_base = copy.deepcopy(base).float()
    exact = GuidedForCausalLM.from_members(
        exact_base, {"r": copy.deepcopy(arm).float(), "one": lora(exact_base, "one", 3)}
    )
    model = GuidedForCausalLM.from_members(base, {"r": arm, "one": lora(base, "one", 3)})
    for speculate in (0, 2):
        with Engine(model, TOKENIZER, options(speculate=speculate, adapt=False)) as engine:
            completion = engine.generate([greedy(PROMPTS[0])])[0]
        check_numbers(exact, PROMPTS[0], completion, {}, tolerance=0.3)


def test_a_quantised_base_with_an_adapter(tmp_path: Path) -> None:
    """bitsandbytes' layers are neither fused nor converted, and adapters are added to what they return."""
    pytest.importorskip("bitsandbytes")
    path = save_member(tiny_model(seed=0, hidden=128, intermediate_size=128), tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantised, dtype=torch.float32)
    model = GuidedForCausalLM.from_members(base, {"one": lora(base, "one", 3)})
    expected = generated(model)
    with Engine(model, TOKENIZER, options()) as engine:
        assert token_ids(engine.generate([greedy(prompt) for prompt in PROMPTS])) == expected


# --- the same numbers -----------------------------------------------------------------------------------------------


def check_numbers(
    model: GuidedForCausalLM,
    prompt: Sequence[int],
    completion: Completion,
    weights: Mapping[str, float],
    *,
    tolerance: float = 1e-4,
    arms: Mapping[str, PreTrainedModel] | None = None,
) -> None:
    """Each token's numbers against one uncached forward over prompt and reply."""
    whole = torch.tensor([[*prompt, *completion.token_ids]], device=DEVICE)
    nothing = dict.fromkeys(model.reward_names, 0.0)

    def forward(weights: Mapping[str, float]) -> torch.Tensor:
        return model(whole, reward_weights=weights, use_cache=False).logits[0, len(prompt) - 1 : -1].cpu()

    guided, base = forward(weights), forward(nothing)
    at = torch.tensor(completion.token_ids)[:, None]

    def same(found: Sequence[float], log_probs: torch.Tensor) -> None:
        expected = log_probs.gather(-1, at)[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=tolerance, rtol=tolerance)

    same([t.log_prob for t in completion.tokens], guided)
    same([t.base for t in completion.tokens], base)
    running = {n for n in model.reward_names if {**model.default_weights, **weights}[n] != 0}
    for name in running:
        # log π_i is what a weight of one adds to the base, up to a constant
        alone = (forward({**nothing, name: 1.0}) - base).log_softmax(-1)
        if arms is not None:
            alone = arms[name](whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1).cpu()
        same([t.rewards[name] for t in completion.tokens], alone)
    assert all({*t.rewards} == running for t in completion.tokens)
    for place, token in enumerate(completion.tokens):
        values, ids = guided[place].topk(len(token.top))
        assert [i for i, _ in token.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([v for _, v in token.top]), values, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("speculate", [0, 3])
def test_numbers_of_every_token(kind: str, speculate: int) -> None:
    model = make_model("llama", kind)
    sampling = Sampling(max_new_tokens=16, temperature=0.8, top_p=0.9, presence_penalty=0.5)
    requests = [
        greedy(prompt, weights_of(model, i), sampling=sampling, seed=i, top_log_probs=3 * i)
        for i, prompt in enumerate(PROMPTS)
    ]
    with Engine(model, TOKENIZER, options(speculate=speculate, adapt=False)) as engine:
        completions = engine.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        check_numbers(model, request.prompt, completion, request.weights)  # type: ignore[arg-type] # ids
        assert all(len(token.top) == request.top_log_probs for token in completion.tokens)


def test_numbers_are_those_of_token_rewards() -> None:
    model = make_model("qwen2", "three")
    request = Request(
        prompt=[{"role": "user", "content": "w1 w2"}],
        weights={"one": 0.5, "two": -0.5},
        sampling=Sampling(max_new_tokens=12, logit_bias=dict.fromkeys(range(6), -100.0)),
    )
    with Engine(model, TOKENIZER, options(speculate=2, adapt=False)) as engine:
        completion = engine.generate([request])[0]
    # token_rewards closes the response with <end>, which is not ours
    scores = model.token_rewards(request.prompt, completion.text, tokenizer=TOKENIZER, reward_weights=request.weights)  # type: ignore[arg-type]
    assert scores.token_ids[:-1] == completion.token_ids
    for found, expected in (
        ([t.log_prob for t in completion.tokens], scores.guided),
        ([t.base for t in completion.tokens], scores.base),
        *(([t.rewards[n] for t in completion.tokens], scores.rewards[n]) for n in model.reward_names),
    ):
        assert found == pytest.approx(expected[:-1], abs=1e-4)


@pytest.mark.parametrize("larger", ["base", "reward"])
@pytest.mark.parametrize("speculate", [0, 3])
def test_vocabularies_of_different_sizes(larger: str, speculate: int) -> None:
    """What a reward cannot judge is never produced while it weighs, drafted or not; without it, it may be."""
    extended = tiny_tokenizer(extra=("[PAD]",))
    sizes = (VOCAB_SIZE + 1, VOCAB_SIZE) if larger == "base" else (VOCAB_SIZE, VOCAB_SIZE + 1)
    tokenizers = (extended, TOKENIZER) if larger == "base" else (TOKENIZER, extended)
    base, arm = tiny_model(seed=0, vocab_size=sizes[0]), tiny_model(seed=1, vocab_size=sizes[1])
    with torch.no_grad():  # the extra row would be the likeliest
        for model in (base, arm):
            if model.config.vocab_size > VOCAB_SIZE:
                model.lm_head.weight[VOCAB_SIZE] = 1.5 * model.lm_head.weight[:VOCAB_SIZE].abs().max(0).values
    guided = GuidedForCausalLM.from_members(
        base, {"r": arm}, tokenizers=dict(zip(("base", "r"), tokenizers, strict=True))
    )
    prompts = [[7, 8, 9], [10, VOCAB_SIZE, 12] if larger == "base" else [10, 11, 12]]
    sampling = Sampling(max_new_tokens=30)
    requests = [
        greedy(p, {"r": w}, sampling=sampling, seed=s) for p in prompts for w in (0.0, 1.0, -0.5) for s in (0, 1)
    ]
    with Engine(guided, tokenizers[0], options(speculate=speculate, adapt=False)) as engine:
        completions = engine.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        arms = {"r": arm} if larger == "reward" else None  # log π_i counts the ids that only the reward has
        check_numbers(guided, request.prompt, completion, request.weights, arms=arms)  # type: ignore[arg-type] # ids
        if request.weights["r"]:
            assert VOCAB_SIZE not in completion.token_ids
    if larger == "base":
        assert any(VOCAB_SIZE in c.token_ids for c in completions)


# --- prefix reuse ---------------------------------------------------------------------------------------------------


def reply(model: GuidedForCausalLM, request: Request, **changes: Any) -> Completion:
    """Of a fresh engine."""
    with Engine(model, TOKENIZER, options(**changes)) as engine:
        return engine.generate([request])[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"chunk": 3}, {"speculate": 3, "adapt": False}])
def test_the_second_turn_goes_on_where_the_first_ended(family: str, changes: dict[str, Any]) -> None:
    model = make_model(family, "three")
    with Engine(model, TOKENIZER, options(**changes)) as engine:
        first = greedy(PROMPTS[3], weights_of(model, 0))
        turn = engine.generate([first])[0]
        assert turn.reused_tokens == 0
        second = greedy(
            [*PROMPTS[3], *turn.token_ids, 9, 10, 11],
            weights_of(model, 0),
            sampling=Sampling(max_new_tokens=8, temperature=0),
        )
        # in the company of others, one of which shares a part of the beginning
        others = [greedy(PROMPTS[0]), greedy([*PROMPTS[3][:6], 33, 34], weights_of(model, 2))]
        found = engine.generate([second, *others])
        assert found[0].reused_tokens >= len(PROMPTS[3]) + LENGTH - 1
        assert found[2].reused_tokens == 6
        for request, completion in zip((second, *others), found, strict=True):
            assert completion.token_ids == reply(model, request).token_ids


def test_a_shared_system_prompt_is_run_once() -> None:
    model = make_model("llama", "full and lora")
    system = PROMPTS[1]
    requests = [greedy([*system, 40 + i], weights_of(model, i % 4), seed=i) for i in range(5)]
    with Engine(model, TOKENIZER, options(streams=2)) as engine:
        found = engine.generate(requests)
        assert all(c.reused_tokens == len(system) for c in found[2:])
        again = engine.generate(requests[-1:])[0]
        assert again.reused_tokens == len(system)  # all but the last token, which must be run
    for request, completion in zip(requests, found, strict=True):
        assert completion.token_ids == reply(model, request).token_ids
    assert again.token_ids == found[-1].token_ids


@pytest.mark.parametrize("changes", [{}, {"chunk": 4}, {"speculate": 3, "adapt": False}])
def test_a_reward_that_joins_at_a_later_turn(changes: dict[str, Any]) -> None:
    """The base goes on, while the reward, which has seen nothing yet, runs everything."""
    model = make_model("llama", "full and lora")
    off, on = {"full": 0.0, "one": 1.0}, {"full": 1.5, "one": -1.0}
    with Engine(model, TOKENIZER, options(**changes)) as engine:
        turn = engine.generate([greedy(PROMPTS[0], off)])[0]
        second = greedy([*PROMPTS[0], *turn.token_ids, 9, 10], on, sampling=Sampling(max_new_tokens=16, temperature=0))
        found = engine.generate([second])[0]
        assert found.reused_tokens >= len(PROMPTS[0]) + LENGTH - 1
    assert found.token_ids == reply(model, second).token_ids
    check_numbers(model, second.prompt, found, on)  # type: ignore[arg-type] # ids


# --- CUDA graphs, run eagerly on their static inputs ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full and lora", "loras on a smaller model", "three"])
@pytest.mark.parametrize("family", ["mistral", "gpt2"])
@pytest.mark.parametrize("speculate", [0, 2, 5])
def test_decode_graphs_give_the_same_tokens(kind: str, family: str, speculate: int) -> None:
    model = make_model(family, kind)
    requests = [
        greedy(PROMPTS[i % 4], weights_of(model, i % 4), sampling=Sampling(max_new_tokens=4 + 3 * i, temperature=0))
        for i in range(6)
    ]
    with Engine(model, TOKENIZER, options(speculate=speculate, adapt=False)) as engine:
        expected = token_ids(engine.generate(requests))
    with Engine(model, TOKENIZER, options(speculate=speculate, adapt=False)) as engine:
        trunks = engine._built.members.trunks
        for trunk in trunks:
            trunk._graphs = DecodeGraphs(trunk.kv_cache, trunk._logits)
        assert token_ids(engine.generate(requests)) == expected
        used = [trunk._graphs.captured for trunk in trunks if trunk._graphs is not None]
        assert all(used)
        assert (max(queries for _, queries, _ in used[0]) > 1) == (speculate > 0)


@torch.inference_mode()
def test_what_waits_for_the_device_is_seen() -> None:
    """A graph cannot hold it: experts that are given tokens by their number, a branch on a value, a place asked for."""
    x = torch.arange(6.0, device=DEVICE)
    waiting = (
        lambda: tiny_family("mixtral")(torch.tensor([[7]], device=DEVICE)),
        lambda: x[x > 2],
        lambda: 1 if x.max() > 2 else 0,
        lambda: x.max().item(),
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: x.index_put((x > 2,), x.new_zeros(())),
        lambda: torch.nn.functional.pad(x, (0, int(x[1]))),
    )
    for run in waiting:
        with Waits() as waits:
            run()
        assert waits.where
    seen: list[str | None] = []
    for family in FAMILIES:
        with Engine(tiny_model(family), TOKENIZER, options()) as engine:
            (trunk,) = engine._built.members.trunks

            def logits(plan: Pass, trunk: Trunk = trunk) -> torch.Tensor:
                with Waits() as waits:
                    said = trunk._logits(plan)
                seen.append(waits.where and f"{waits.where} of a {type(trunk.model).__name__}")
                return said

            trunk._graphs = DecodeGraphs(trunk.kv_cache, logits)
            engine.generate([greedy(PROMPTS[0], sampling=Sampling(max_new_tokens=4, temperature=0))])
    assert len(seen) > 3 * len(FAMILIES)
    assert {*seen} == {None}


# --- one request among many -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> GuidedForCausalLM:
    return make_model("llama", "full and lora")


def sampled(i: int, **changes: Any) -> Request:
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=5 + 3 * (i % 5)), "seed": i, "ignore_eos": True}
    return Request(
        prompt=PROMPTS[i % 4][:12], weights={"full": 0.5 * (i % 3), "one": 1.0 - i % 2}, **{**settings, **changes}
    )


@pytest.mark.parametrize("changes", [{}, {"speculate": 4, "adapt": False}, {"speculate": 4}, {"chunk": 7}])
def test_a_seed_gives_the_same_reply_alone_and_in_company(model: GuidedForCausalLM, changes: dict[str, Any]) -> None:
    requests = [sampled(i) for i in range(12)]
    with Engine(model, TOKENIZER, options(**changes)) as engine:
        together = token_ids(engine.generate(requests))
        backwards = token_ids(engine.generate(requests[::-1]))[::-1]
        alone = [token_ids(engine.generate([request]))[0] for request in requests]
    assert together == alone == backwards
    assert together[0] == list(reply(model, requests[0], **changes).token_ids)


def test_another_seed_gives_another_reply(model: GuidedForCausalLM) -> None:
    sampling = Sampling(max_new_tokens=20)
    with Engine(model, TOKENIZER, options()) as engine:
        found = engine.generate([sampled(0, seed=seed, sampling=sampling) for seed in (*range(10), 2**70)])
    assert len({c.token_ids for c in found}) == 11


def test_limits_stop_ids_and_stop_strings(model: GuidedForCausalLM) -> None:
    sampling = Sampling(max_new_tokens=40)
    with Engine(model, TOKENIZER, options()) as engine:
        requests = [sampled(i, sampling=sampling) for i in range(8)]
        whole = engine.generate(requests)
        assert all(len(c.tokens) == 40 and c.ending == "length" for c in whole)
        # an end-of-turn token ends the reply and is its last token, unless it is to be ignored
        for request, long in zip(requests, whole, strict=True):
            short = engine.generate([sampled(request.seed, sampling=sampling, ignore_eos=False)])[0]
            if 1 in long.token_ids:
                assert short.token_ids == long.token_ids[: long.token_ids.index(1) + 1]
                assert short.ending == "stop"
            else:
                assert (short.token_ids, short.ending) == (long.token_ids, "length")
        assert any(1 in c.token_ids for c in whole)
        # a stop string ends it before the string, across tokens too
        for request, long in zip(requests, whole, strict=True):
            words = long.text.split(" ")
            if len(words) < 8:
                continue
            for stop in (words[5], f"{words[4]} {words[5]}", f"{words[4][-1]} {words[5][0]}"):
                cut = engine.generate([sampled(request.seed, sampling=sampling, stop=["never", stop])])[0]
                assert cut.text == long.text[: long.text.index(stop)]
                assert cut.ending == "stop"
                assert cut.token_ids == long.token_ids[: len(cut.tokens)]
                assert len(cut.tokens) < 40
            assert engine.generate([sampled(request.seed, sampling=sampling, stop=["never"])])[0].text == long.text


def test_text_is_the_decoded_text(model: GuidedForCausalLM) -> None:
    with Engine(model, TOKENIZER, options(speculate=2, adapt=False)) as engine:
        for i in range(6):
            ban = Sampling(max_new_tokens=20, logit_bias=dict.fromkeys((0, 2, 3, 4), -100.0))
            stream = engine.stream(sampled(i, sampling=ban, ignore_eos=False))
            tokens = list(stream)
            assert stream.completion is not None
            assert "".join(token.text for token in tokens) == stream.completion.text
            assert tuple(tokens) == stream.completion.tokens
            assert stream.completion.text == TOKENIZER.decode([t.id for t in tokens], skip_special_tokens=True)


def test_prompts_of_every_kind(model: GuidedForCausalLM) -> None:
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=6, temperature=0), "ignore_eos": True}
    talk = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1 w2"}]
    with Engine(model, TOKENIZER, options()) as engine:
        by_text, by_ids, by_talk, by_talk_ids = engine.generate(
            [
                Request(prompt="w1 w2 w3", **settings),
                Request(prompt=TOKENIZER("w1 w2 w3").input_ids, **settings),
                Request(prompt=talk, **settings),
                Request(prompt=TOKENIZER("<system> w5 <end> <user> w1 w2 <end> <assistant>").input_ids, **settings),
            ]
        )
    assert by_text.token_ids == by_ids.token_ids
    assert by_talk.token_ids == by_talk_ids.token_ids


def test_prompts_without_a_request(model: GuidedForCausalLM) -> None:
    """The same replies as by requests; a list of prompts has seeds in a row."""
    settings: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=6),
        "weights": {model.reward_names[0]: 2.0},
        "stop": ["w39"],
    }
    talk = [{"role": "user", "content": "w1 w2"}]
    prompts: list[Any] = ["w1 w2 w3", talk, [7, 8, 9], "w1 w2 w3"]
    with Engine(model, TOKENIZER, options()) as engine:
        expected = engine.generate([Request(prompt=p, seed=5 + i, **settings) for i, p in enumerate(prompts)])
        assert token_ids(engine.generate(prompts, seed=5, **settings)) == token_ids(expected)
        alone = [engine.generate(prompt, seed=5 + i, **settings) for i, prompt in enumerate(prompts)]
        assert token_ids(alone) == token_ids(expected)
        assert engine.generate(Request(prompt="w1 w2 w3", seed=5, **settings)).text == expected[0].text
        assert engine.generate([]) == []
        wrong: Any
        for wrong in (None, 3, {"role": "user", "content": "w1"}, [None], [["w1", "w2"]], [[]], torch.tensor([7])):
            with pytest.raises(ConfigError, match="as a prompt; give a text, a conversation"):
                engine.generate(wrong)
        with pytest.raises(ConfigError, match="a Request has sampling, weights, seed and stop of its own"):
            engine.generate(Request(prompt="w1"), seed=1)


@pytest.mark.parametrize("speculate", [0, 3])
def test_logit_bias(model: GuidedForCausalLM, speculate: int) -> None:
    with Engine(model, TOKENIZER, options(speculate=speculate, adapt=False)) as engine:
        usual = engine.generate([sampled(1, sampling=Sampling(max_new_tokens=30))])[0]
        banned = dict.fromkeys({*usual.token_ids}, -100.0)
        other = engine.generate([sampled(1, sampling=Sampling(max_new_tokens=30, logit_bias=banned))])[0]
        assert not {*other.token_ids} & {*usual.token_ids}
        for bias in ({17: 100.0}, {17: 100}):  # whole numbers too
            forced = engine.generate([sampled(1, sampling=Sampling(max_new_tokens=9, logit_bias=bias))])[0]
            assert forced.token_ids == (17,) * 9


def test_penalties_against_a_loop_by_hand(model: GuidedForCausalLM) -> None:
    weights = {"full": 0.5, "one": 1.0}
    sampling = Sampling(max_new_tokens=20, temperature=0, presence_penalty=1.0, frequency_penalty=0.5)
    ids = list(PROMPTS[0])
    for _ in range(20):
        scores = model(torch.tensor([ids], device=DEVICE), reward_weights=weights, use_cache=False).logits[0, -1].cpu()
        counts = torch.bincount(torch.tensor(ids[len(PROMPTS[0]) :], dtype=torch.long), minlength=len(scores))
        ids.append(int((scores - 0.5 * counts - 1.0 * (counts > 0)).argmax()))
    for changes in VARIANTS.values():
        found = reply(model, greedy(PROMPTS[0], weights, sampling=sampling), **changes)
        assert [*PROMPTS[0], *found.token_ids] == ids


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message", "make"),
    [
        (
            WeightsError,
            "no reward is named 'kind'; this model has: full, one",
            lambda: greedy([7], {"kind": 1}),
        ),
        (WeightsError, "must be a finite number", lambda: greedy([7], {"one": float("nan")})),
        (DataError, "give at least one", lambda: Request(prompt=[])),
        (DataError, "empty", lambda: Request(prompt="")),
        (DataError, f"id {VOCAB_SIZE}; .* from 0 to {VOCAB_SIZE - 1}", lambda: Request(prompt=[7, VOCAB_SIZE])),
        (DataError, f"id -1; .* from 0 to {VOCAB_SIZE - 1}", lambda: Request(prompt=[-1])),
        (
            ConfigError,
            f"stop_token_ids names the token id {VOCAB_SIZE}; ids",
            lambda: greedy([7], stop_token_ids=[VOCAB_SIZE]),
        ),
        (
            DataError,
            r"30 prompt tokens and up to 40 new ones are more than the 64 .* lower max_new_tokens to 34",
            lambda: greedy(PROMPTS[1], sampling=Sampling(max_new_tokens=40)),
        ),
        (
            DataError,
            r"64 prompt tokens .* lower max_new_tokens, or start it with a larger context",
            lambda: greedy([7] * 64),
        ),
        (
            ConfigError,
            f"token id {VOCAB_SIZE}; ids go from 0",
            lambda: greedy([7], sampling=Sampling(max_new_tokens=5, logit_bias={VOCAB_SIZE: 1.0})),
        ),
        (ConfigError, "-1; it must be 0 or more", lambda: Request(prompt=[7], seed=-1)),
        (ConfigError, "stop is 'x'", lambda: Request(prompt=[7], stop="x")),
        (ConfigError, "none of them empty", lambda: Request(prompt=[7], stop=["a", ""])),
        (ConfigError, "top_log_probs is 101", lambda: Request(prompt=[7], top_log_probs=101)),
        (ConfigError, "top_log_probs is -1", lambda: Request(prompt=[7], top_log_probs=-1)),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    model: GuidedForCausalLM, kind: type[GenarmError], message: str, make: Callable[[], Request]
) -> None:
    with Engine(model, TOKENIZER, options()) as engine:
        with pytest.raises(kind, match=message):
            engine.generate([greedy([7]), make()])
        with pytest.raises(kind, match=message):
            engine.stream(make())
        assert engine.statistics().steps == 0
        assert engine.statistics().waiting == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 129}, "the context is 129 tokens; it must be from 2 to 128"),
        ({"context": 1}, "from 2 to 128"),
        ({"streams": 0}, "streams is 0; it must be at least 1"),
        ({"speculate": -1}, "speculate is -1"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_options_are_refused(model: GuidedForCausalLM, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(model, TOKENIZER, options(**changes))


def test_a_draft_model_of_another_vocabulary_is_refused(model: GuidedForCausalLM) -> None:
    words = [f"v{i}" for i in range(40)]
    with pytest.raises(GenarmError, match="different vocabularies"):
        Engine(model, TOKENIZER, options(), draft=full("llama", 3), draft_tokenizer=tiny_tokenizer(words=words))


def test_a_context_as_long_as_it_gets(model: GuidedForCausalLM) -> None:
    """A prompt and a reply that fill all positions, drafts included."""
    for changes in ({}, {"speculate": 5, "adapt": False}):
        with Engine(model, TOKENIZER, options(context=None, streams=2, **changes)) as engine:
            assert engine.context == 128
            found = engine.generate([greedy([7] * 100, sampling=Sampling(max_new_tokens=28, temperature=0))])[0]
            assert len(found.tokens) == 28
            check_numbers(model, [7] * 100, found, {})


# --- ends that are not the request's own ----------------------------------------------------------------------------


def test_cancel(model: GuidedForCausalLM) -> None:
    long = Sampling(max_new_tokens=50)
    with Engine(model, TOKENIZER, options(streams=1)) as engine:
        whole = engine.generate([sampled(0, sampling=long)])[0]
        running = engine.stream(sampled(0, sampling=long))
        waiting = engine.stream(sampled(1, sampling=long))
        also_waiting = engine.stream(sampled(2))
        tokens = list(itertools.islice(running, 3))
        waiting.cancel()
        assert waiting.result().ending in ("cancelled", "length")
        running.cancel()
        running.cancel()
        ended = running.result()
        assert ended.token_ids[:3] == tuple(t.id for t in tokens)
        assert ended.token_ids == whole.token_ids[: len(ended.tokens)]
        assert ended.ending == ("cancelled" if len(ended.tokens) < 50 else "length")
        assert also_waiting.result().token_ids == reply(model, sampled(2)).token_ids
        running.cancel()  # too late, and harmless
        assert idle(engine)


def test_a_cancelled_request_that_waits_never_runs(model: GuidedForCausalLM) -> None:
    hold = threading.Event()
    with Engine(model, TOKENIZER, options(streams=1)) as engine:
        base = engine._built.members.trunks[0]
        hook = base.model.register_forward_pre_hook(lambda *_: hold.wait(10) and None)  # the engine stands still
        first, second = engine.stream(sampled(0)), engine.stream(sampled(1))
        second.cancel()
        first.cancel()
        hold.set()
        assert second.result() == Completion(
            text="",
            tokens=(),
            ending="cancelled",
            prompt_tokens=12,
            reused_tokens=0,
            drafted=0,
            accepted=0,
        )
        assert first.result().ending == "cancelled"
        hook.remove()
        assert idle(engine)


def test_with_blocks(model: GuidedForCausalLM) -> None:
    with Engine(model, TOKENIZER, options()) as engine:
        with engine.stream(sampled(0, sampling=Sampling(max_new_tokens=50))) as stream:
            next(iter(stream))
        assert stream.result().ending in ("cancelled", "length")
        assert idle(engine)
        running = engine.stream(sampled(0, sampling=Sampling(max_new_tokens=50)))
        next(iter(running))
    with pytest.raises(EngineFailure, match="closed"):
        running.result()
    with pytest.raises(EngineFailure, match="the engine is closed; make a new one"):
        engine.stream(sampled(0))
    engine.close()
    Engine(model, TOKENIZER, options()).close()  # one that never ran


def fail_once(monkeypatch: pytest.MonkeyPatch, trunk: Any, after: int) -> None:
    forward, calls = trunk.forward, itertools.count()

    def failing(*given: Any) -> Any:
        if next(calls) == after:
            raise RuntimeError("the device is on fire")
        return forward(*given)

    monkeypatch.setattr(trunk, "forward", failing)


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("speculate", [0, 2])
def test_a_step_that_fails(
    model: GuidedForCausalLM, monkeypatch: pytest.MonkeyPatch, member: int, after: int, speculate: int
) -> None:
    """Everything that ran ends with the failure, and the next request is served as if nothing had been."""
    expected = reply(model, sampled(4), speculate=speculate, adapt=False)
    with Engine(model, TOKENIZER, options(streams=2, speculate=speculate, adapt=False)) as engine:
        fail_once(monkeypatch, engine._built.members.trunks[member], after)
        streams = [engine.stream(sampled(4, sampling=Sampling(max_new_tokens=30))) for _ in range(2)]
        for stream in streams:
            with pytest.raises(EngineFailure, match="a step failed: RuntimeError: the device is on fire"):
                stream.result()
        assert idle(engine)
        found = engine.generate([sampled(4), sampled(5)])
        assert found[0].token_ids == expected.token_ids
        assert found[0].reused_tokens == 0
        assert idle(engine)


def test_a_failed_stream_fails_again_when_asked_again(
    model: GuidedForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, TOKENIZER, options()) as engine:
        fail_once(monkeypatch, engine._built.members.trunks[0], 1)
        stream = engine.stream(sampled(4))
        found: list[BaseException] = []

        def ask() -> None:
            for _ in range(2):
                try:
                    stream.result()
                except EngineFailure as error:
                    found.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2)
        assert len(found) == 2, "the second call waits for ever"


def test_statistics_and_description(model: GuidedForCausalLM) -> None:
    with Engine(model, TOKENIZER, options(streams=3, speculate=2)) as engine:
        assert engine.describe().startswith("3 streams of 64 tokens; drafts from full")
        assert f"base, one: {DEVICE}, float32, together in one forward" in engine.describe()
        engine.generate([greedy([7, 8])])
        statistics = engine.statistics()
        assert statistics.free_rows == (6, 3)
        arena_bytes = [
            (rows + 1) * 64 * layers * 2 * 2 * (hidden // 4) * 4 for rows, layers, hidden in ((6, 2, 32), (3, 1, 16))
        ]
        assert statistics.cache_bytes == sum(arena_bytes)
        assert statistics.steps > 0
    with Engine(model, TOKENIZER, options()) as engine:
        engine.generate([greedy([7, 8])])
        assert engine.statistics().passes == (LENGTH, LENGTH)  # a forward per token: the prompt's gives the first
        engine.generate([greedy([9, 8], {"full": 0.0})])
        assert engine.statistics().passes == (2 * LENGTH, LENGTH)  # a reward of weight 0 is not run


# --- asyncio --------------------------------------------------------------------------------------------------------


def test_asyncio_tasks(model: GuidedForCausalLM) -> None:
    requests = [sampled(i) for i in range(10)]

    async def follow(engine: Engine, request: Request, leave: int | None) -> list[int]:
        found = []
        with engine.stream(request) as stream:
            async for token in stream:
                found.append(token.id)
                if len(found) == leave:
                    break
        return found

    async def run(engine: Engine) -> None:
        before = len(asyncio.all_tasks())
        leaves = [None if i % 3 else 2 for i in range(len(requests))]
        found = await asyncio.gather(*(follow(engine, r, n) for r, n in zip(requests, leaves, strict=True)))
        for request, leave, ids in zip(requests, leaves, found, strict=True):
            assert ids == list(alone[request.seed].token_ids)[:leave]
        # a task that is cancelled while it waits for a token
        task = asyncio.create_task(follow(engine, sampled(0, sampling=Sampling(max_new_tokens=50)), None))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # the loop stays free while the engine works, and threads may wait beside it
        other, mine = await asyncio.gather(
            asyncio.to_thread(engine.generate, [requests[1]]), follow(engine, requests[2], None)
        )
        assert other[0].token_ids == alone[1].token_ids
        assert mine == list(alone[2].token_ids)
        assert len(asyncio.all_tasks()) == before

    with Engine(model, TOKENIZER, options()) as engine:
        alone = engine.generate(requests)
    with Engine(model, TOKENIZER, options(streams=3)) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 30))
        engine.generate([sampled(0)])  # whatever was cancelled has ended by now
        assert idle(engine)


def test_a_step_wakes_a_loop_once(model: GuidedForCausalLM) -> None:
    """However many streams it has tokens for."""
    calls = 0

    async def follow(engine: Engine, request: Request) -> list[int]:
        return [token.id async for token in engine.stream(request)]

    async def run(engine: Engine) -> tuple[int, list[list[int]]]:
        loop = asyncio.get_running_loop()
        usual = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> asyncio.Handle:
            nonlocal calls
            calls += 1
            return usual(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        before = engine.statistics().steps
        found = await asyncio.gather(*(follow(engine, request) for request in requests))
        return engine.statistics().steps - before, found

    requests = [sampled(i, sampling=Sampling(max_new_tokens=12)) for i in range(6)]
    with Engine(model, TOKENIZER, options(streams=6)) as engine:
        alone = token_ids(engine.generate(requests))
        steps, found = asyncio.run(asyncio.wait_for(run(engine), 30))
    assert found == [list(ids) for ids in alone]
    assert 12 <= calls <= steps + 1 < 6 * 12


def test_asyncio_failure(model: GuidedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(engine: Engine) -> None:
        with pytest.raises(EngineFailure, match="on fire"):
            async for _ in engine.stream(sampled(0)):
                pass

    with Engine(model, TOKENIZER, options()) as engine:
        fail_once(monkeypatch, engine._built.members.trunks[0], 2)
        asyncio.run(asyncio.wait_for(run(engine), 30))


def test_a_loop_that_is_gone_does_not_trouble_the_engine(model: GuidedForCausalLM) -> None:
    async def first_token(engine: Engine) -> None:
        async for _ in engine.stream(sampled(0, sampling=Sampling(max_new_tokens=50))):
            return

    with Engine(model, TOKENIZER, options(streams=1)) as engine:
        asyncio.run(first_token(engine))
        assert engine.generate([sampled(1)])[0].token_ids == reply(model, sampled(1)).token_ids


# --- from files -----------------------------------------------------------------------------------------------------


def test_from_pretrained(tmp_path: Path) -> None:
    from genarm import compose

    save_member(tiny_model(seed=0), tmp_path / "base")
    save_member(full("llama", 1), tmp_path / "arm")
    compose(tmp_path / "base", {"kind": tmp_path / "arm"}, tmp_path / "guided", weights={"kind": 0.5})
    request = greedy(PROMPTS[0])
    expected = reply(
        GuidedForCausalLM.from_members(tiny_model(seed=0), {"kind": full("llama", 1)}, weights={"kind": 0.5}), request
    )
    for draft in (None, str(tmp_path / "arm")):
        with Engine.from_pretrained(
            tmp_path / "guided", options(speculate=2, adapt=False), draft=draft, device="cpu"
        ) as engine:
            assert engine.generate([request])[0].token_ids == expected.token_ids
    with Engine.from_pretrained(tmp_path / "base", options(), device="cpu") as engine:
        assert token_ids(engine.generate([request])) == [generated(tiny_model(seed=0))[0]]
