"""One request never harms another: hostile settings, members that give NaN, and how many run at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from builders.engines import lora
from builders.tiny import DEVICE, VOCAB_SIZE, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, EngineOptions, Request
from genarm.errors import GenarmError, MemberError, WeightsError
from genarm.sampling import Sampling

TOKENIZER = tiny_tokenizer()
POISON = 13
"""The id that makes the poisoned members say NaN."""


def poisoned(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, which says NaN from POISON on."""
    embedding: Any = model.get_input_embeddings()
    embedding.weight.data[POISON] = math.nan
    return model


def options(**changes: Any) -> EngineOptions:
    return EngineOptions(**{"streams": 8, "context": 64, "speculate": 0, "chunk": 12, **changes})


def ask(prompt: list[int], weights: Mapping[str, float] | None = None, **sampling: Any) -> Request:
    how = Sampling(**{"max_new_tokens": 10, "temperature": 0.8, **sampling})
    return Request(prompt=prompt, weights=weights or {}, sampling=how, seed=sum(prompt), ignore_eos=True)


def outcomes(engine: Engine, requests: list[Request]) -> list[Completion | Exception]:
    """Of requests that run side by side."""
    found: list[Completion | Exception] = []
    streams = []
    for request in requests:
        try:
            streams.append(engine.stream(request))
        except GenarmError as error:
            streams.append(error)
    for stream in streams:
        if isinstance(stream, Exception):
            found.append(stream)
            continue
        try:
            found.append(stream.result())
        except GenarmError as error:
            found.append(error)
    return found


def alone(model: PreTrainedModel, request: Request, **changes: Any) -> Completion:
    with Engine(model, TOKENIZER, options(**changes)) as engine:
        return engine.generate([request])[0]


GOOD = [[7, 8, 9], [*range(20, 45)], [44, 12]]


@pytest.mark.parametrize("speculate", [0, 3])
def test_nan_ends_its_own_request_and_leaves_nothing_behind(speculate: int) -> None:
    """In the base, and in a reward of its own; whoever comes into those rows later sees nothing of it."""
    full = tiny_model("llama", seed=1, hidden=16, layers=1)
    for where in ("the base", "the reward 'full'"):
        base, arm = tiny_model(seed=0), copy.deepcopy(full)
        model = GuidedForCausalLM.from_members(base, {"full": arm})
        poisoned(base if where == "the base" else arm)  # weights that are not finite from the start are refused
        changes = {"speculate": speculate, "adapt": False, "streams": 3}
        no_poison = {"logit_bias": {POISON: -100.0}}
        good = [ask(prompt, {"full": 0.5}, **no_poison) for prompt in GOOD]
        expected = [alone(model, request, **changes).token_ids for request in good]
        with Engine(model, TOKENIZER, options(**changes)) as engine:
            for bad in ([POISON, 8], [*range(6, 40)], [9, POISON, 7]):
                *found, broken = outcomes(engine, [*good, ask(bad, {"full": 0.5}, **no_poison)])
                assert [c.token_ids for c in found if isinstance(c, Completion)] == expected
                assert isinstance(broken, MemberError)
                assert where in str(broken)
                assert "NaN" in str(broken)
            # Cut off in the middle of a prompt that nobody has looked at yet.
            streams = [engine.stream(ask([POISON, *range(6, 40)], {"full": 0.5})) for _ in range(3)]
            engine.advance()
            for stream in streams:
                stream.cancel()
            assert [c.token_ids for c in engine.generate(good)] == expected


def test_adapters_that_overflow_are_nobody_elses_matter() -> None:
    """Columns of one adapter in the shared product are infinite for every token; the other members do not see them."""
    base = tiny_model(seed=0)
    rewards = {"one": lora(base, "one", 3), "loud": lora(base, "loud", 4)}
    for name, parameter in rewards["loud"].named_parameters():
        if ".loud." in name and "lora_A" in name:
            parameter.data.fill_(3e38)
    clean = tiny_model(seed=0)
    others = GuidedForCausalLM.from_members(clean, {"one": lora(clean, "one", 3)})
    expected = [alone(others, ask(prompt, {"one": 0.7})).token_ids for prompt in GOOD]
    model = GuidedForCausalLM.from_members(base, rewards)
    with Engine(model, TOKENIZER, options()) as engine:
        good = [ask(prompt, {"one": 0.7, "loud": 0.0}) for prompt in GOOD]
        *found, broken = outcomes(engine, [*good, ask([9, 9], {"one": 0.7, "loud": 0.1})])
    assert [c.token_ids for c in found if isinstance(c, Completion)] == expected
    assert isinstance(broken, MemberError)
    assert "the reward 'loud' gave NaN" in str(broken)


# --- settings -------------------------------------------------------------------------------------------------------


Ready: TypeAlias = tuple[Engine, list[tuple[int, ...]]]
MIXED = [ask(prompt, {"full": 0.5, "one": -0.3}, max_new_tokens=5) for prompt in GOOD]


@pytest.fixture(scope="module")
def engines() -> list[Ready]:
    """With and without drafts, and what each replies to each of MIXED alone.

    Head, embedding and tokenizer differ: 48 rows, 50 rows, 46 ids.
    """
    made = []
    for speculate in (0, 3):
        base = tiny_model(seed=0, vocab_size=50)
        base.lm_head = torch.nn.Linear(32, 48, bias=False, device=DEVICE)
        torch.nn.init.normal_(base.lm_head.weight, std=0.5)
        base.config.vocab_size = 48
        arm = tiny_model(seed=1, hidden=16, layers=1, vocab_size=48)
        model = GuidedForCausalLM.from_members(base, {"full": arm, "one": lora(base, "one", 3)})
        engine = Engine(model, TOKENIZER, options(speculate=speculate, adapt=False))
        made.append((engine, [engine.generate([request])[0].token_ids for request in MIXED]))
    return made


ids = st.sampled_from([0, 5, 45, 46, 47, 48, 49, 50, 2**31, 2**70, -1])
extreme = st.sampled_from([0.0, 1.0, 1e-46, 1e-30, 1e30, 3e38, 1e39, 1e300, -1e30, -2.0, math.nan, math.inf])
HOSTILE = st.fixed_dictionaries(
    {"prompt": st.lists(ids, max_size=4) | st.just([7, 8, 9])},
    optional={
        "weights": st.dictionaries(st.sampled_from(["full", "one", "none"]), extreme),
        "seed": st.sampled_from([0, 1, 2**70, 10**5000, -1]),
        "stop": st.lists(st.sampled_from(["", "w1", "w3 w", "\ud800", "<end>"]), max_size=2),
        "top_log_probs": st.sampled_from([0, 1, 100, 101, 2.5]),
        "prompt_log_probs": st.sampled_from([None, 0, 100, 2.5]),
        "sampling": st.fixed_dictionaries(
            {},
            optional={
                "max_new_tokens": st.sampled_from([1, 3, 3.5, 2**70]),
                "temperature": st.sampled_from([0.0, 1e-46, 1e-30, 1.0, 1e30, 3e38, 1e300]),
                "top_k": st.sampled_from([0, 1, 47, 48, 49, 10**6, 2**70, 1.5]),
                "top_p": st.sampled_from([1e-300, 1e-46, 1e-9, 0.5, 1.0]),
                "min_p": st.sampled_from([0.0, 1e-300, 1.0]),
                "presence_penalty": st.sampled_from([-2.0, 2.0]),
                "frequency_penalty": st.sampled_from([-2.0, 2.0]),
                "logit_bias": st.dictionaries(ids | st.just(1.5), st.sampled_from([-100.0, 100.0, 0.5])),
            },
        ),
    },
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(hostile=st.lists(HOSTILE, min_size=1, max_size=3), speculate=st.booleans())
def test_hostile_settings_among_good_requests(
    engines: list[Ready], hostile: list[dict[str, Any]], speculate: bool
) -> None:
    """They are refused, or end with an error of their own, or give a reply; the others' tokens are their own."""
    engine, expected = engines[speculate]
    bad = []
    for fields in hostile:
        try:
            sampling = Sampling(**{"max_new_tokens": 3, **fields.get("sampling", {})})
            bad.append(Request(**{**fields, "sampling": sampling}))
        except GenarmError:
            pass
    found = outcomes(engine, [*bad, *MIXED])
    assert [c.token_ids for c in found[len(bad) :] if isinstance(c, Completion)] == expected
    for outcome in found[: len(bad)]:
        if isinstance(outcome, Completion):
            assert all(0 <= token.id < 48 and math.isfinite(token.log_prob) for token in outcome.tokens)


@pytest.mark.skipif(DEVICE != "cpu", reason="an index out of range on a GPU ends the process's use of it")
@pytest.mark.parametrize("speculate", [0, 3])
def test_what_no_check_foresaw_ends_its_own_request(engines: list[Ready], speculate: int) -> None:
    """A bias that changes after it was checked; everybody else decodes as if it had not been there, in all ways."""
    engine, expected = engines[bool(speculate)]
    good = [*MIXED]
    good[1] = Request(**{**vars(good[1]), "prompt_log_probs": 2})
    bad = ask([7, 8], logit_bias={5: 1.0})
    streams = [engine.stream(request) for request in (*good, bad)]
    bias: Any = bad.sampling.logit_bias
    bias[VOCAB_SIZE * 100] = 1.0
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        streams[-1].result()
    assert [stream.result().token_ids for stream in streams[:-1]] == expected
    scored = streams[1].prompt
    assert scored is not None
    assert len(scored.tokens) == len(GOOD[1]) - 1
    assert engine.statistics().running == 0


def test_weights_that_overflow_are_said_to() -> None:
    base = tiny_model(seed=0)
    model = GuidedForCausalLM.from_members(base, {"full": tiny_model(seed=1)})
    with Engine(model, TOKENIZER, options()) as engine:
        fine, broken = outcomes(engine, [ask([7], {"full": 1e30}), ask([7], {"full": 3e38})])
        assert isinstance(fine, Completion)
        assert isinstance(broken, WeightsError)
        assert "overflows" in str(broken)
        with pytest.raises(WeightsError, match="must be a finite number"):
            engine.stream(ask([7], {"full": 1e39}))


def test_tiny_temperatures_are_greedy() -> None:
    model = tiny_model(seed=0)
    greedy = alone(model, ask([7, 8], temperature=0.0)).token_ids
    for temperature in (1e-5, 1e-30, 1e-46):
        assert alone(model, ask([7, 8], temperature=temperature)).token_ids == greedy


def test_an_id_that_cannot_be_read_ends_its_request() -> None:
    """An output layer with more rows than the embedding: transformers' own generate has an IndexError here."""
    model = tiny_model(seed=0)
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE + 2, bias=True, device=DEVICE)
    torch.nn.init.constant_(model.lm_head.bias, 0.0)
    model.lm_head.bias.data[VOCAB_SIZE + 1] = 50.0
    with Engine(model, TOKENIZER, options()) as engine:
        broken, fine = outcomes(engine, [ask([7, 8]), ask([7, 8], logit_bias={VOCAB_SIZE + 1: -100.0})])
    assert isinstance(broken, MemberError)
    assert f"the token id {VOCAB_SIZE + 1}, which it cannot read" in str(broken)
    assert isinstance(fine, Completion)


# --- how many -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 2])
def test_streams_are_requests(streams: int) -> None:
    """Whatever members they need: an unguided request takes one row of the base's trunk, which has three a stream."""
    base = tiny_model(seed=0)
    model = GuidedForCausalLM.from_members(base, {"one": lora(base, "one", 3), "two": lora(base, "two", 4)})
    with Engine(model, TOKENIZER, options(streams=streams, wishes=0)) as engine:
        assert engine.statistics().free_rows == (3 * streams,)
        requests = [ask(prompt, {"one": w, "two": w}) for prompt in GOOD for w in (0.0, 0.5)]
        found = [engine.stream(request) for request in requests]
        most = 0
        while engine.statistics().running or engine.statistics().waiting:
            engine.advance()
            most = max(most, engine.statistics().running)
        assert most == streams
        assert all(len(stream.result().tokens) == 10 for stream in found)
