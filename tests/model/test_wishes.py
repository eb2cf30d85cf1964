"""Rewards in words: what must hold exactly, in transformers' forward and `generate` and in the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from builders.engines import TOKENIZER, idle, lora
from builders.tiny import DEVICE, save_member, tiny_lora, tiny_model
from genarm import Engine, EngineOptions, GuidedForCausalLM, Request, Sampling, compose
from genarm.errors import ConfigError, DataError, UnsupportedError, WeightsError
from genarm.model.config import MemberSpec, RewardSpec
from genarm.model.wishes import Wish, with_wish

WISHES = {"warm": "w1 w2 w3 w4", "terse": "w30"}
PROMPTS: list[Any] = [
    [{"role": "user", "content": "w5 w6"}],
    [{"role": "system", "content": "w9 w8"}, {"role": "user", "content": "w7 w8 w9 w10 w11"}],
    "w12 w13 w14",
]
GREEDY = Sampling(max_new_tokens=8, temperature=0)


def wished(weights: Mapping[str, float] | None = None, seed: int = 0) -> GuidedForCausalLM:
    """A base with two wishes and an ARM of its own."""
    rewards = {"arm": tiny_model(seed=5, hidden=16, layers=1)}
    model = GuidedForCausalLM.from_members(tiny_model(seed=seed), rewards, wishes=WISHES, weights=weights)
    model.generation_config.eos_token_id = None
    return model


def read(prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(TOKENIZER(prompt).input_ids)
    return list(TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


@torch.no_grad()
def says(model: Any, ids: list[int]) -> torch.Tensor:
    """A model's own log-probs after the last token."""
    return model(torch.tensor([ids], device=DEVICE)).logits[0, -1].log_softmax(-1).cpu()  # type: ignore[no-any-return]


def by_hand(model: GuidedForCausalLM, prompt: Any, reply: list[int], weights: Mapping[str, float]) -> torch.Tensor:
    """The combination at the token after `reply`, every stream in a forward of its own."""
    base = says(model.base, read(prompt) + reply)
    total = base + weights.get("arm", 0.0) * says(model.members[1].model, read(prompt) + reply)
    for name, text in WISHES.items():
        part = says(model.base, read(with_wish(prompt, text)) + reply) - base
        total = total + weights.get(name, 0.0) * part
    return total.log_softmax(-1)


def test_a_wish_is_the_system_message_or_joins_it_or_stands_before_the_text() -> None:
    user = {"role": "user", "content": "Hi"}
    assert with_wish([user], "Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    assert with_wish([{"role": "system", "content": "You are Ada."}, user], "Be brief.") == [
        {"role": "system", "content": "You are Ada.\n\nBe brief."},
        user,
    ]
    assert with_wish("Once", "Be brief.") == "Be brief.\n\nOnce"
    parts: Any = [{"role": "system", "content": [{"type": "text", "text": "You are Ada."}]}, user]
    assert with_wish(parts, "Be brief.")[0]["content"] == "You are Ada.\n\nBe brief."


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_0_and_1_are_the_base_and_the_prompted_base(prompt: Any) -> None:
    model = wished()
    inputs = model.encode(prompt, tokenizer=TOKENIZER)
    nothing = dict.fromkeys(("arm", *WISHES), 0.0)
    with torch.no_grad():
        base = model(**inputs, reward_weights=nothing).logits[0, -1].cpu()
        torch.testing.assert_close(base, says(model.base, read(prompt)), atol=1e-5, rtol=1e-5)
        for name, text in WISHES.items():
            found = model(**inputs, reward_weights={**nothing, name: 1.0}).logits[0, -1].cpu()
            prompted = says(model.base, read(with_wish(prompt, text)))
            torch.testing.assert_close(found, prompted, atol=1e-5, rtol=1e-5)


def test_opposite_wishes_cancel_and_budgets_hold() -> None:
    base = tiny_model(seed=0)
    model = GuidedForCausalLM.from_members(base, {}, wishes={"a": "w1 w2", "b": "w1 w2"})
    inputs = model.encode(PROMPTS[0], tokenizer=TOKENIZER)
    with torch.no_grad():
        found = model(**inputs, reward_weights={"a": 2.0, "b": -2.0}).logits[0, -1]
        alone = model(**inputs, reward_weights={"a": 0.0, "b": 0.0}).logits[0, -1]
        far = model(**inputs, reward_weights={"a": 3.0, "b": 0.0}, max_kl=0.1).logits[0, -1]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    assert float((far.exp() * (far - alone)).sum()) == pytest.approx(0.1, abs=1e-3)


WEIGHTS = {"arm": 0.5, "warm": 1.5, "terse": -0.7}


def replies_by_hand(model: GuidedForCausalLM, weights: Mapping[str, float]) -> list[list[int]]:
    replies = []
    for prompt in PROMPTS:
        reply: list[int] = []
        for _ in range(GREEDY.max_new_tokens):
            reply.append(int(by_hand(model, prompt, reply, weights).argmax()))
        replies.append(reply)
    return replies


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 1, "num_return_sequences": 1}],
    ids=["cache", "no cache", "chunks", "plain"],
)
def test_generate_follows_the_sum_of_streams_in_a_padded_batch(options: dict[str, Any]) -> None:
    model = wished()
    inputs = model.encode(PROMPTS, tokenizer=TOKENIZER)
    out = model.generate(**inputs, reward_weights=WEIGHTS, max_new_tokens=8, do_sample=False, **options)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == replies_by_hand(model, WEIGHTS)


def test_rows_of_a_batch_have_weights_of_their_own_and_beams_their_contexts() -> None:
    model = wished()
    inputs = model.encode(PROMPTS, tokenizer=TOKENIZER)
    rows = torch.tensor([[0.5, 1.5, -0.7], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    out = model.generate(**inputs, reward_weights=rows, max_new_tokens=8, do_sample=False, num_beams=3)
    for i, prompt in enumerate(PROMPTS):
        alone = model.encode(prompt, tokenizer=TOKENIZER)
        own = model.generate(**alone, reward_weights=rows[i : i + 1], max_new_tokens=8, do_sample=False, num_beams=3)
        assert out[i, -8:].tolist() == own[0, -8:].tolist()


def test_drafts_are_taken_back_from_wishes_too() -> None:
    model = wished()
    inputs = model.encode(PROMPTS[0], tokenizer=TOKENIZER)
    out = model.generate(
        **inputs, reward_weights=WEIGHTS, max_new_tokens=8, do_sample=False, assistant_model=tiny_model(seed=9)
    )
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == replies_by_hand(model, WEIGHTS)[0]


def test_a_forward_over_prompt_and_reply_has_the_wishes_from_the_prompts_end_on() -> None:
    model = wished()
    inputs = model.encode(PROMPTS[1], tokenizer=TOKENIZER)
    prompt = inputs["input_ids"].shape[1]
    reply = [20, 21, 22]
    ids = torch.cat([inputs["input_ids"], torch.tensor([reply], device=DEVICE)], dim=1)
    with torch.no_grad():
        whole = model(ids, contexts=inputs["contexts"], reward_weights=WEIGHTS).logits[0].cpu()
        silent = model(ids, reward_weights={**WEIGHTS, "warm": 0.0, "terse": 0.0}).logits[0].cpu()
        kept = model(ids, contexts=inputs["contexts"], reward_weights=WEIGHTS, logits_to_keep=5).logits[0].cpu()
    torch.testing.assert_close(whole[: prompt - 1], silent[: prompt - 1], atol=1e-5, rtol=1e-5)
    for i in range(len(reply) + 1):
        expected = by_hand(model, PROMPTS[1], reply[:i], WEIGHTS)
        torch.testing.assert_close(whole[prompt - 1 + i], expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(kept, whole[-5:], atol=1e-5, rtol=1e-5)


def test_token_ids_alone_are_refused_where_a_wish_has_a_weight() -> None:
    model = wished()
    ids = torch.tensor([[7, 8]], device=DEVICE)
    with pytest.raises(UnsupportedError, match=r"'warm' has a weight.*encode"):
        model.generate(ids, max_new_tokens=2)
    model.generate(ids, max_new_tokens=2, reward_weights={"warm": 0.0, "terse": 0.0})
    two = model.encode(PROMPTS[:2], tokenizer=TOKENIZER)
    with pytest.raises(UnsupportedError, match="have 2 rows and input_ids 1"):
        model(ids, contexts=two["contexts"])
    one = model.encode(PROMPTS[1], tokenizer=TOKENIZER)
    with pytest.raises(UnsupportedError, match="have 4 columns and the prompts of the contexts"):
        model.generate(one["input_ids"][:, :4], contexts=one["contexts"], max_new_tokens=2)


def test_further_wishes_share_the_members() -> None:
    model = wished()
    more = model.with_wishes({"loud": "w20 w21"}, weights={"loud": 2.0})
    assert more.reward_names == ("arm", "warm", "terse", "loud")
    assert more.base is model.base
    assert more.default_weights["loud"] == 2.0
    assert model.reward_names == ("arm", "warm", "terse")
    with pytest.raises(ConfigError, match="has a reward 'warm' already"):
        model.with_wishes({"warm": "w1"})
    with pytest.raises(WeightsError, match="no reward is named 'quiet'"):
        model.with_wishes({"loud": "w1"}, weights={"quiet": 1.0})


def test_wishes_of_one_call_are_as_wishes_of_the_model() -> None:
    model = wished()
    model.generation_config.max_new_tokens = 5
    given = {"arm": 0.0, "warm": 1.5, "terse": -0.7}
    expected = model.generate(**model.encode(PROMPTS, tokenizer=TOKENIZER), reward_weights=given, do_sample=False)
    plain = GuidedForCausalLM.from_members(model.base, {})
    plain.generation_config.max_new_tokens = 5
    inputs = plain.encode(PROMPTS, wishes={n: WISHES[n] for n in ("warm", "terse")}, tokenizer=TOKENIZER)
    weights = {"warm": 1.5, "terse": -0.7}
    assert plain.generate(**inputs, reward_weights=weights, do_sample=False).tolist() == expected.tolist()
    assert plain.reward_names == ()

    alone = plain.encode(
        PROMPTS, wishes={"warm": WISHES["warm"]}, tokenizer=TOKENIZER
    )  # the weight 1 where none is named
    prompted = model(**model.encode(PROMPTS, tokenizer=TOKENIZER), reward_weights={"arm": 0.0, "terse": 0.0}).logits
    torch.testing.assert_close(plain(**alone).logits[:, -1], prompted[:, -1])
    with pytest.raises(ConfigError, match="has a reward 'warm' already"):
        model.encode(PROMPTS, wishes={"warm": "w1"}, tokenizer=TOKENIZER)
    with pytest.raises(UnsupportedError, match="generate takes wishes by its inputs"):
        plain.generate(alone["input_ids"], wishes={"warm": "w1"})
    with pytest.raises(WeightsError, match="no reward is named 'terse'"):
        plain.generate(**alone, reward_weights=weights)


# --- the engine -----------------------------------------------------------------------------------------------------


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one stream": {"streams": 1},
    "small chunks": {"chunk": 3},
    "speculation": {"speculate": 3, "adapt": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_follows_the_sum_of_streams(variant: str) -> None:
    model = wished()
    expected = replies_by_hand(model, WEIGHTS)
    options = EngineOptions(**{"streams": 3, "context": 64, "speculate": 0, **VARIANTS[variant]})
    with Engine(model, TOKENIZER, options) as engine:
        requests = [Request(prompt=p, weights=WEIGHTS, sampling=GREEDY, ignore_eos=True) for p in PROMPTS]
        found = engine.generate(requests)
        assert [list(reply.token_ids) for reply in found] == expected
        again = engine.generate(requests)  # over rows that hold the beginnings
        assert [list(reply.token_ids) for reply in again] == expected
        assert idle(engine)
        ids = [
            Request(
                prompt=read(p),
                contexts={name: read(with_wish(p, text)) for name, text in WISHES.items()},
                weights=WEIGHTS,
                sampling=GREEDY,
                ignore_eos=True,
            )
            for p in PROMPTS
        ]
        assert [list(reply.token_ids) for reply in engine.generate(ids)] == expected
    first = by_hand(model, PROMPTS[0], [], WEIGHTS)
    base = says(model.base, read(PROMPTS[0]))
    token = found[0].tokens[0]
    assert token.log_prob == pytest.approx(float(first[token.id]), abs=1e-4)
    assert token.kl == pytest.approx(float((first.exp() * (first - base)).sum()), abs=1e-4)
    part = says(model.base, read(with_wish(PROMPTS[0], WISHES["warm"]))) - base
    assert token.rewards["warm"] == pytest.approx(float(part[token.id]), abs=1e-4)


@pytest.mark.parametrize("kind", ["guided", "plain"])
def test_wishes_of_a_request_are_as_wishes_of_the_model(kind: str) -> None:
    model = wished()
    plain = model if kind == "guided" else model.base
    mine = {"arm": 0.0, "warm": 0.0, "terse": 0.0}
    expected = replies_by_hand(model, {"warm": 1.5, "terse": -0.7})
    own = [Wish(text=WISHES["warm"], weight=1.5), Wish(text=WISHES["terse"], weight=-0.7)]
    with Engine(plain, TOKENIZER, EngineOptions(streams=2, context=64)) as engine:
        requests = [
            Request(prompt=p, weights=mine if kind == "guided" else {}, wishes=own, sampling=GREEDY, ignore_eos=True)
            for p in PROMPTS
        ]
        found = engine.generate(requests)
        assert [list(reply.token_ids) for reply in found] == expected
        assert [*found[0].tokens[0].rewards] == ["wish 1", "wish 2"]
        most = Request(prompt=PROMPTS[0], wishes=own * 2, sampling=GREEDY, weights=requests[0].weights)
        assert engine.generate(most).tokens
        assert idle(engine)


def test_the_numbers_of_a_prompt_are_those_without_wishes() -> None:
    model = wished()
    silent = {**WEIGHTS, "warm": 0.0, "terse": 0.0}
    for chunk in (3, 64):
        with Engine(model, TOKENIZER, EngineOptions(streams=2, context=64, chunk=chunk)) as engine:

            def scored(weights: Mapping[str, float], engine: Engine = engine) -> list[Any]:
                request = Request(prompt=PROMPTS[1], weights=weights, sampling=GREEDY, prompt_log_probs=2)
                stream = engine.stream(request)
                stream.result()
                assert stream.prompt is not None
                return list(stream.prompt.tokens)

            for with_wishes, without in zip(scored(WEIGHTS), scored(silent), strict=True):
                assert with_wishes.id == without.id
                assert with_wishes.log_prob == pytest.approx(without.log_prob, abs=1e-5)
                assert with_wishes.rewards.keys() == without.rewards.keys() == {"arm"}


def test_the_engine_refuses_what_a_wish_cannot_be_read_in() -> None:
    with Engine(wished(), TOKENIZER, EngineOptions(streams=2, context=16)) as engine:
        with pytest.raises(DataError, match="token ids, in which the words of the wish 'warm' have no place"):
            engine.generate(Request(prompt=[7, 8], sampling=GREEDY))
        with pytest.raises(DataError, match=r"with the wish 'warm'.*more than the 16 positions"):
            engine.generate(Request(prompt=PROMPTS[0], sampling=Sampling(max_new_tokens=11)))
        with pytest.raises(ConfigError, match="up to 4 Wish"):
            Request(prompt="w1", wishes=[Wish(text="w2")] * 5)
    with Engine(tiny_model(), TOKENIZER, EngineOptions(streams=1, context=32, wishes=1)) as engine:
        assert engine.generate(Request(prompt="w1", wishes=[Wish(text="w2")], sampling=GREEDY)).tokens
        assert len(engine._built.members.trunks[0].kv_cache.rows) == 2
        with pytest.raises(ConfigError, match="2 wishes and this engine takes up to 1"):
            engine.generate(Request(prompt="w1", wishes=[Wish(text="w2")] * 2, sampling=GREEDY))
    for text in ("", "  ", None):
        with pytest.raises(ConfigError, match="a wish is"):
            Wish(text=text)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="finite"):
        Wish(text="w1", weight=float("nan"))


def test_speculation_keeps_the_distribution_of_a_wished_for_model_within_a_budget() -> None:
    """The first two tokens of replies, the second one drafted, against their exact probabilities, by chi-square."""
    weights = {"arm": 0.6, "warm": 1.5, "terse": 0.0}
    model, prompt, budget = wished(), PROMPTS[0], 0.3

    def shares(reply: list[int]) -> torch.Tensor:
        inputs = model.encode(prompt, tokenizer=TOKENIZER)
        ids = torch.cat([inputs["input_ids"], torch.tensor([reply], dtype=torch.long, device=DEVICE)], dim=1)
        with torch.no_grad():
            out = model(ids, contexts=inputs["contexts"], reward_weights=weights, max_kl=budget, logits_to_keep=1)
        return out.logits[0, -1].exp().cpu()

    first = shares([])
    likeliest = first.topk(5).indices.tolist()
    known = {(a, b): float(first[a] * p) for a in likeliest for b, p in enumerate(shares([a]).tolist())}
    sampling = Sampling(max_new_tokens=3, temperature=1)
    with Engine(model, TOKENIZER, EngineOptions(streams=8, context=64, speculate=2, adapt=False)) as engine:
        requests = [
            Request(prompt=prompt, weights=weights, max_kl=budget, sampling=sampling, seed=seed, ignore_eos=True)
            for seed in range(700)
        ]
        replies = engine.generate(requests)
    assert sum(reply.drafted for reply in replies) > 500
    seen = Counter(tuple(reply.token_ids[:2]) for reply in replies)
    cells = [cell for cell in product(likeliest, range(len(first))) if known[cell] * len(replies) >= 5]
    observed = [seen[cell] for cell in cells]
    expected = [known[cell] * len(replies) for cell in cells]
    rest = len(replies) - sum(observed), len(replies) - sum(expected)
    assert stats.chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue > 1e-3


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_with_wishes_is_a_model_and_can_be_moved_and_extended(tmp_path: Path) -> None:
    base = tiny_model(seed=0)
    save_member(base, tmp_path / "base")
    tiny_lora(base, tmp_path / "one", seed=3, base_path=str(tmp_path / "base"))
    compose(tmp_path / "base", {}, tmp_path / "first", wishes=WISHES, weights={"warm": 2.0})
    report = compose(
        tmp_path / "first", {"one": tmp_path / "one"}, tmp_path / "second", wishes={"loud": "w3"}, bundle=True
    )
    assert not report.notes
    assert report.config.default_weights == {"warm": 2.0, "terse": 1.0, "loud": 1.0, "one": 1.0}
    model = GuidedForCausalLM.from_pretrained(tmp_path / "second")
    model.save_pretrained(tmp_path / "third")
    again = GuidedForCausalLM.from_pretrained(tmp_path / "third")
    assert again.config.wishes == {**WISHES, "loud": "w3"}
    made = GuidedForCausalLM.from_members(b := tiny_model(seed=0), {"one": lora(b, "one", 3)}, wishes=WISHES)
    made.save_pretrained(tmp_path / "fourth")
    assert GuidedForCausalLM.from_pretrained(tmp_path / "fourth").config.wishes == WISHES
    inputs = model.encode(PROMPTS, tokenizer=TOKENIZER)
    with torch.no_grad():
        one, other = (m(**inputs, logits_to_keep=1).logits for m in (model, again))
    assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="'a' is a wish, which the base reads"):
        compose(tmp_path / "base", {}, tmp_path / "x", wishes={"a": "w1"}, adapter_models={"a": str(tmp_path / "base")})
    with pytest.raises(ConfigError, match="two rewards are named 'a'"):
        compose(tmp_path / "base", {"a": tmp_path / "one"}, tmp_path / "x", wishes={"a": "w1"})
    with pytest.raises(ConfigError, match=r"at least one reward.*--wish"):
        compose(tmp_path / "base", {}, tmp_path / "x")


def test_a_wish_of_an_adapter_is_that_adapter_reading_it(tmp_path: Path) -> None:
    base = tiny_model(seed=0)
    save_member(base, tmp_path / "base")
    tiny_lora(base, tmp_path / "one", seed=3, base_path=str(tmp_path / "base"))
    compose(tmp_path / "base", {"one": tmp_path / "one"}, tmp_path / "guided")
    config = GuidedForCausalLM.from_pretrained(tmp_path / "guided").config
    adapter = config.reward_specs[0].member.adapter
    config.rewards = [RewardSpec(name="w", member=MemberSpec(adapter=adapter, wish="w1 w2")).to_dict(), *config.rewards]
    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided", config=config).to(DEVICE)
    prompt = PROMPTS[0]
    alone = GuidedForCausalLM.from_pretrained(tmp_path / "guided").to(DEVICE)

    @torch.no_grad()
    def adapted(ids: list[int]) -> torch.Tensor:
        base = says(alone.base, ids)
        both = alone(torch.tensor([ids], device=DEVICE), reward_weights={"one": 1.0}).logits[0, -1].cpu()
        return (both - base).log_softmax(-1)

    base_says, plain, wishing = (
        says(alone.base, read(prompt)),
        adapted(read(prompt)),
        adapted(read(with_wish(prompt, "w1 w2"))),
    )
    expected = (base_says + 0.5 * plain + 1.5 * (wishing - plain)).log_softmax(-1)
    weights = {"one": 0.5, "w": 1.5}
    with torch.no_grad():
        found = model(**model.encode(prompt, tokenizer=TOKENIZER), reward_weights=weights).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    greedy = model.generate(**model.encode(prompt, tokenizer=TOKENIZER), reward_weights=weights, max_new_tokens=6)
    with Engine(model, TOKENIZER, EngineOptions(streams=2, context=64)) as engine:
        reply = engine.generate(
            Request(prompt=prompt, weights=weights, sampling=Sampling(max_new_tokens=6, temperature=0))
        )
    assert list(reply.token_ids) == greedy[0, -len(reply.token_ids) :].tolist()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "w", "wish": ""}, "a wish is ''"),
        ({"name": "w", "wish": 3}, "a wish is 3"),
        ({"name": "w", "wish": "x", "reference": {"model": "y"}}, "compared with its member without it"),
        ({"name": "w", "model": "m", "reference": {"model": "y", "wish": "z"}}, "has a wish"),
    ],
)
def test_records_that_do_not_hold_together(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardSpec.parse(record)


def test_scores_show_what_each_wish_says_of_a_response() -> None:
    model = wished()
    scored = model.token_rewards(PROMPTS[0], "w20 w21", tokenizer=TOKENIZER, reward_weights=WEIGHTS)
    reply = [TOKENIZER.convert_tokens_to_ids(w) for w in ("w20", "w21")]
    for i in range(2):
        base = says(model.base, read(PROMPTS[0]) + reply[:i])
        warm = says(model.base, read(with_wish(PROMPTS[0], WISHES["warm"])) + reply[:i])
        assert scored.rewards["warm"][i] == pytest.approx(float(warm[reply[i]] - base[reply[i]]), abs=1e-4)
        expected = by_hand(model, PROMPTS[0], reply[:i], WEIGHTS)
        assert scored.guided[i] == pytest.approx(float(expected[reply[i]]), abs=1e-4)
    assert scored.differences == ("warm", "terse")
