"""What ends a reply and when, and penalties over the prompt: the engine against transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from builders.engines import PROMPTS, TOKENIZER, VARIANTS, options
from builders.tiny import DEVICE, VOCAB_SIZE, tiny_model
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, Request
from genarm.errors import ConfigError, UnsupportedError
from genarm.lab.replies import sample_replies
from genarm.sampling import Sampling

END = 1
WEIGHTS = {"arm": 0.8}
LENGTH = 20


@pytest.fixture(scope="module")
def model() -> GuidedForCausalLM:
    base, arm = tiny_model(seed=0), tiny_model(seed=1, layers=1, hidden=16)
    return GuidedForCausalLM.from_members(base, {"arm": arm}, weights=WEIGHTS)


@pytest.fixture(scope="module", params=VARIANTS)
def engine(model: GuidedForCausalLM, request: pytest.FixtureRequest) -> Any:
    with Engine(model, TOKENIZER, options(**VARIANTS[request.param])) as made:
        yield made


def ask(engine: Engine, sampling: Sampling, **fields: Any) -> list[Completion]:
    return engine.generate([Request(prompt=prompt, sampling=sampling, **fields) for prompt in PROMPTS])


def generated(model: GuidedForCausalLM, **settings: Any) -> list[tuple[int, ...]]:
    """Greedy replies to each prompt alone, by transformers."""
    return [
        tuple(
            model.generate(
                torch.tensor([prompt], device=DEVICE),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=DEVICE),
                do_sample=False,
                max_new_tokens=LENGTH,
                pad_token_id=0,
                **settings,
            )[0, len(prompt) :].tolist()
        )
        for prompt in PROMPTS
    ]


def ids(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


SAME: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.3}, {}, {"repetition_penalty": 1.3, "eos_token_id": END}),
    ({"repetition_penalty": 0.8}, {"ignore_eos": True}, {"repetition_penalty": 0.8, "eos_token_id": None}),
    (
        {"min_new_tokens": 7, "logit_bias": {END: 12.0}},
        {},
        {"min_new_tokens": 7, "sequence_bias": {(END,): 12.0}, "eos_token_id": END},
    ),
    (
        {"min_new_tokens": 5, "logit_bias": {9: 60.0, END: 20.0}, "repetition_penalty": 1.2},
        {"stop_token_ids": [9, 10], "ignore_eos": True},
        {
            "min_new_tokens": 5,
            "sequence_bias": {(9,): 60.0, (END,): 20.0},
            "repetition_penalty": 1.2,
            "eos_token_id": [9, 10],
        },
    ),
]


@pytest.mark.parametrize(("sampling", "fields", "settings"), SAME)
def test_greedy_replies_are_those_of_generate(
    engine: Engine, sampling: dict[str, Any], fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The penalty counts the prompt; the ids that end the reply, and no others, wait for the least number."""
    assert isinstance(engine.model, GuidedForCausalLM)
    found = ask(engine, Sampling(max_new_tokens=LENGTH, temperature=0, **sampling), **fields)
    assert ids(found) == generated(engine.model, **settings)
    if "min_new_tokens" in sampling:
        assert {len(c.tokens) for c in found} == {sampling["min_new_tokens"] + 1}


def test_stop_ids(engine: Engine) -> None:
    """The reply ends with the first of them, which is its last token and no text."""
    free = Sampling(max_new_tokens=LENGTH, temperature=0.9)
    for i, whole in enumerate(ask(engine, free, ignore_eos=True, seed=3)):
        assert (len(whole.tokens), whole.ending) == (LENGTH, "length")
        stop = whole.token_ids[6]
        cut = ask(engine, free, ignore_eos=True, seed=3, stop_token_ids=[stop, 0])[i]
        first = min(whole.token_ids.index(t) for t in (stop, 0) if t in whole.token_ids)
        assert (cut.token_ids, cut.ending) == (whole.token_ids[: first + 1], "stop")
        assert cut.text == TOKENIZER.decode(whole.token_ids[:first], skip_special_tokens=True)
    both = ask(engine, Sampling(max_new_tokens=9, logit_bias={END: 100}), stop_token_ids=[20])
    assert ids(both) == [(END,)] * len(PROMPTS)  # beside the model's own


def test_stop_texts_wait_too(engine: Engine) -> None:
    free = Sampling(max_new_tokens=LENGTH, temperature=0, logit_bias={20: 100})
    word = str(TOKENIZER.decode([20]))
    for least, length in ((0, 1), (1, 2), (7, 8)):
        sampling = Sampling(max_new_tokens=LENGTH, temperature=0, logit_bias={20: 100}, min_new_tokens=least)
        for found in ask(engine, sampling, stop=[word]):
            assert (len(found.tokens), found.ending) == (length, "stop")
            assert found.text.split() == [word] * least
    assert all(found.ending == "length" for found in ask(engine, free, stop=["never"]))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=LENGTH, temperature=0, repetition_penalty=1.3, min_new_tokens=6, logit_bias={END: 9.0}),
        Sampling(max_new_tokens=LENGTH, temperature=0, repetition_penalty=1.1, top_k=3),
    ],
)
def test_settings_in_the_words_of_transformers(engine: Engine, sampling: Sampling) -> None:
    expected = sample_replies(engine.model, TOKENIZER, PROMPTS, sampling, seed=0)
    assert ids(ask(engine, sampling)) == [reply.token_ids for reply in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be from 0.01 to 100"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; it must be from 0 to max_new_tokens, 128"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5; it must be from 0 to max_new_tokens, 4"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_what_transformers_does_not_know_is_refused(model: GuidedForCausalLM) -> None:
    with pytest.raises(UnsupportedError, match="decode with genarm's engine"):
        sample_replies(model, TOKENIZER, [[7]], Sampling(presence_penalty=1.0), seed=0)


def test_ids_that_the_model_reads_and_never_says() -> None:
    """Its embedding has more rows than its head: such an id is read, and named where it is to be said or to end."""
    model = tiny_model(seed=0, vocab_size=VOCAB_SIZE + 8)
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE, bias=False, device=DEVICE)
    beyond = VOCAB_SIZE + 3
    with Engine(model, TOKENIZER, options()) as engine:
        penalised = Sampling(max_new_tokens=6, repetition_penalty=1.5)
        assert len(engine.generate([Request(prompt=[7, beyond], sampling=penalised, ignore_eos=True)])[0].tokens) == 6
        for request in (
            Request(prompt=[7], sampling=Sampling(max_new_tokens=6, logit_bias={beyond: 1.0})),
            Request(prompt=[7], sampling=Sampling(max_new_tokens=6), stop_token_ids=[beyond]),
        ):
            with pytest.raises(ConfigError, match=f"the token id {beyond}; ids go from 0 to {VOCAB_SIZE - 1}"):
                engine.stream(request)
        assert len(engine.generate([Request(prompt=[7], sampling=penalised, ignore_eos=True)])[0].tokens) == 6
