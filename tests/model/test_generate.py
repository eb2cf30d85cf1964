"""Everything that sits on `generate`, against the same thing done by hand on the combined distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)

from builders.tiny import tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.errors import UnsupportedError, WeightsError

LENGTH = 12


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, seed=0)


@pytest.fixture(scope="module")
def model(base: PreTrainedModel) -> GuidedForCausalLM:
    arms = {"helpful": tiny_model("llama", seed=1, hidden=16), "harmless": tiny_model("qwen2", seed=2)}
    guided = GuidedForCausalLM.from_members(base, arms, weights={"helpful": 1.0, "harmless": 0.5})
    guided.generation_config.eos_token_id = None
    return guided


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(6, 46, (2, 6))


def greedy_by_hand(model: GuidedForCausalLM, ids: torch.Tensor, steps: int, **options: Any) -> torch.Tensor:
    for _ in range(steps):
        following = model(ids, use_cache=False, **options).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return ids


def test_greedy(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    expected = greedy_by_hand(model, ids, LENGTH)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=LENGTH), expected)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=LENGTH, use_cache=False), expected)


def test_static_cache(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    result = model.generate(ids, do_sample=False, max_new_tokens=LENGTH, cache_implementation="static")
    assert torch.equal(result, greedy_by_hand(model, ids, LENGTH))


def test_left_padded_batch(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    for cache in (None, "static"):
        both = model.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH, cache_implementation=cache
        )
        assert torch.equal(both[0], greedy_by_hand(model, ids[:1], LENGTH)[0])
        assert torch.equal(both[1, 3:], greedy_by_hand(model, ids[1:, 3:], LENGTH)[0])


@pytest.mark.parametrize("cache", [None, "static"])
def test_beam_search_finds_what_exhaustive_search_finds(model: GuidedForCausalLM, cache: str | None) -> None:
    """With as many beams as there are ids, two steps of beam search see every continuation."""
    ids = torch.tensor([[7, 8, 9]])
    size = model.config.vocab_size
    first = model(ids).logits[0, -1]
    longer = torch.cat([ids.repeat(size, 1), torch.arange(size)[:, None]], dim=1)
    second = model(longer).logits[:, -1]
    best = (first[:, None] + second).flatten().argmax()
    result = model.generate(
        ids, do_sample=False, num_beams=size, max_new_tokens=2, cache_implementation=cache, early_stopping=True
    )
    assert result[0, 3:].tolist() == [int(best) // size, int(best) % size]


def test_beam_search_keeps_each_rows_weights(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    weights = torch.tensor([[0.0, 2.0], [1.5, -0.5]])
    options: dict[str, Any] = {"do_sample": False, "num_beams": 3, "max_new_tokens": LENGTH}
    both = model.generate(ids, reward_weights=weights, **options)
    for i in range(2):
        alone = model.generate(ids[i : i + 1], reward_weights=weights[i : i + 1], **options)
        assert torch.equal(both[i], alone[0])


def test_several_returned_sequences_share_their_rows_weights(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    weights = torch.tensor([[40.0, 40.0], [0.0, 0.0]])  # a weight so large that sampling is greedy
    result = model.generate(ids, reward_weights=weights, do_sample=True, num_return_sequences=4, max_new_tokens=6)
    assert result.shape[0] == 8
    assert len({tuple(row.tolist()) for row in result[:4]}) == 1
    assert len({tuple(row.tolist()) for row in result[4:]}) > 1


def test_sampling_follows_the_combined_distribution(model: GuidedForCausalLM) -> None:
    ids, n = torch.tensor([[7, 8, 9]]), 4000
    expected = model(ids).logits[0, -1].exp()
    torch.manual_seed(0)
    drawn = model.generate(ids.repeat(n, 1), do_sample=True, max_new_tokens=1, top_k=0)[:, -1]
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    common = expected * n >= 5  # the usual condition for a chi-square statistic
    statistic = ((counts - expected * n) ** 2 / (expected * n))[common].sum()
    assert counts[~common].sum() <= 5 * (~common).sum()
    assert statistic < common.sum() + 5 * (2 * common.sum()).sqrt()


def test_assisted_decoding_changes_nothing(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    expected = greedy_by_hand(model, ids[:1], LENGTH)
    for assistant in (tiny_model("llama", seed=1, hidden=16), model.base, model.members[2].model):
        result = model.generate(ids[:1], assistant_model=assistant, do_sample=False, max_new_tokens=LENGTH)
        assert torch.equal(result, expected)
    looked_up = model.generate(ids[:1], prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=LENGTH)
    assert torch.equal(looked_up, expected)


def test_a_guided_model_can_be_the_assistant(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    expected = model.base.generate(ids[:1], do_sample=False, max_new_tokens=LENGTH, eos_token_id=None)
    result = model.base.generate(
        ids[:1], assistant_model=model, do_sample=False, max_new_tokens=LENGTH, eos_token_id=None
    )
    assert torch.equal(result, expected)


@pytest.mark.slow
def test_assisted_sampling_leaves_the_distribution_unchanged() -> None:
    """Two sampled tokens, 3,000 seeds, against exact enumeration."""
    base, arm = tiny_model(seed=0, vocab_size=8, spread=0.6), tiny_model(seed=1, vocab_size=8, spread=0.6)
    model = GuidedForCausalLM.from_members(base, {"r": arm})
    model.generation_config.eos_token_id = None
    ids, n = torch.tensor([[5, 6, 7]]), 3000
    first = model(ids).logits[0, -1]
    longer = torch.cat([ids.repeat(8, 1), torch.arange(8)[:, None]], dim=1)
    expected = (first[:, None] + model(longer).logits[:, -1]).exp().flatten()
    counts = torch.zeros(64)
    for seed in range(n):
        torch.manual_seed(seed)
        drawn = model.generate(ids, assistant_model=arm, do_sample=True, top_k=0, max_new_tokens=2)[0, 3:]
        counts[int(drawn[0]) * 8 + int(drawn[1])] += 1
    common = expected * n >= 5
    statistic = ((counts - expected * n) ** 2 / (expected * n))[common].sum()
    assert statistic < common.sum() + 5 * (2 * common.sum()).sqrt()


def test_penalties_come_after_the_combination(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    """Penalising the members before they are combined once cost a project most of its reward."""
    seen: list[torch.Tensor] = []

    class Record(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores.clone())
            return scores

    combined = model(ids).logits[:, -1]
    model.generate(
        ids,
        do_sample=False,
        max_new_tokens=1,
        repetition_penalty=2.5,
        logits_processor=LogitsProcessorList([Record()]),
    )
    penalised = combined.scatter(1, ids, combined.gather(1, ids) * 2.5)  # log-probs are negative: times, not over
    torch.testing.assert_close(seen[0], penalised, atol=1e-5, rtol=1e-5)


def test_streamer_and_pipeline(model: GuidedForCausalLM) -> None:
    tokenizer = tiny_tokenizer()
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    expected = tokenizer.decode(greedy_by_hand(model, inputs.input_ids, 5)[0, 3:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(inputs.input_ids, streamer=streamer, do_sample=False, max_new_tokens=5)
    assert "".join(streamer).split() == expected.split()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = write("w1 w2 w3", do_sample=False, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    plain = tokenizer.decode(greedy_by_hand(model, inputs.input_ids, 5)[0, 3:], skip_special_tokens=True)
    assert text.split() == plain.split()


def test_loss_is_the_cross_entropy_of_the_combination(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_logits_to_keep(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 3])).logits, whole[:, [1, 3]])


def test_a_reward_of_weight_zero_is_not_run(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    calls: list[str] = []
    hooks = [
        member.model.register_forward_hook(lambda *_, name=member.name: calls.append(name)) for member in model.members
    ]
    try:
        model.generate(ids, reward_weights={"helpful": 0}, do_sample=False, max_new_tokens=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls.count("base") == calls.count("harmless") == 3
    assert "helpful" not in calls


def test_a_skipped_reward_cannot_join_a_cache(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    cache = model(ids, reward_weights={"helpful": 0}).past_key_values
    with pytest.raises(UnsupportedError, match="'helpful' was not run for the 6 tokens"):
        model(ids[:, :1], past_key_values=cache, reward_weights={"helpful": 1})
    assert set(cache.members) == {"base", "harmless"}  # and the refused call left the cache as it was
    # and the other way round, after it had been running
    cache = model(ids).past_key_values
    model(ids[:, :1], past_key_values=cache, reward_weights={"helpful": 0})
    with pytest.raises(UnsupportedError, match="'helpful'"):
        model(ids[:, :1], past_key_values=cache)


def test_a_conversation_goes_on_with_its_cache(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    first = model.generate(ids, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    more = torch.cat([first.sequences, ids[:, :2]], dim=1)
    again = model.generate(more, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=5)
    assert torch.equal(again, greedy_by_hand(model, more, 5))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kind": 1.0}, "no reward is named 'kind'; this model has: helpful, harmless"),
        ({"helpful": float("nan")}, "must be a finite number"),
        ({"helpful": True}, "must be a finite number"),
        ({"helpful": "2"}, "must be a finite number"),
        ([1.0, 2.0], "give a mapping"),
        (torch.ones(2), r"shape \(2,\); expected \[batch, rewards\] = \[2, 2\]"),
        (torch.ones(3, 2), r"shape \(3, 2\)"),
        (torch.full((2, 2), float("inf")), "NaN or infinity"),
    ],
)
def test_bad_weights_are_refused(model: GuidedForCausalLM, ids: torch.Tensor, weights: Any, message: str) -> None:
    for call in (model, model.generate):
        with pytest.raises(WeightsError, match=message):
            call(ids, reward_weights=weights)


def test_a_mapping_leaves_the_other_weights_alone(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    expected = model(ids, reward_weights=torch.tensor([[2.0, 0.5]] * 2)).logits
    assert torch.equal(model(ids, reward_weights={"helpful": 2}).logits, expected)


def test_what_cannot_work_says_so(model: GuidedForCausalLM, ids: torch.Tensor) -> None:
    for options, message in (
        ({"output_attentions": True}, "model.base"),
        ({"output_hidden_states": True}, "model.base"),
        ({"past_key_values": DynamicCache()}, "needs a GuidedCache"),
        ({"return_dict": False}, "CausalLMOutputWithPast"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            model(ids, **options)
    with pytest.raises(UnsupportedError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(UnsupportedError, match="resized"):
        model.resize_token_embeddings(100)
