"""What a server asks of the engine beyond replies: numbers of prompts, a thread of its own, requests that go wrong."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from builders.engines import KINDS, LENGTH, PROMPTS, TOKENIZER, full, greedy, idle, make_model, options, weights_of
from builders.tiny import DEVICE, VOCAB_SIZE, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, Request, ScoredPrompt
from genarm.engine.reply_text import TextStream
from genarm.errors import ConfigError, DataError
from genarm.sampling import Sampling


def scored(engine: Engine, requests: Sequence[Request]) -> list[tuple[ScoredPrompt, Completion]]:
    streams = [engine.stream(request) for request in requests]
    found = []
    for stream in streams:
        completion = stream.result()
        assert stream.prompt is not None
        found.append((stream.prompt, completion))
    return found


def check_prompt(
    model: GuidedForCausalLM, ids: Sequence[int], weights: Mapping[str, float], prompt: ScoredPrompt, top: int
) -> None:
    """Against one uncached forward of the guided model over the prompt."""
    nothing = dict.fromkeys(model.reward_names, 0.0)

    def forward(weights: Mapping[str, float]) -> torch.Tensor:
        return model(torch.tensor([ids], device=DEVICE), reward_weights=weights, use_cache=False).logits[0, :-1].cpu()

    guided, base = forward(weights), forward(nothing)
    assert [token.id for token in prompt.tokens] == list(ids[1:])

    def same(found: list[float], log_probs: torch.Tensor) -> None:
        expected = log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)

    same([token.log_prob for token in prompt.tokens], guided)
    same([token.base for token in prompt.tokens], base)
    for name in (n for n in model.reward_names if weights[n]):
        alone = (forward({**nothing, name: 1.0}) - base).log_softmax(-1)
        same([token.rewards[name] for token in prompt.tokens], alone)
    for row, token in zip(guided, prompt.tokens, strict=True):
        values, best = row.topk(top)
        assert [i for i, _ in token.top] == best.tolist()
        torch.testing.assert_close(torch.tensor([v for _, v in token.top]), values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("changes", [{}, {"chunk": 7}, {"chunk": 1, "speculate": 3, "adapt": False}])
def test_numbers_of_a_prompt_are_those_of_the_guided_model(kind: str, changes: dict[str, Any]) -> None:
    model = make_model("llama", kind)
    requests = [greedy(ids, weights_of(model, i), prompt_log_probs=i) for i, ids in enumerate(PROMPTS)]
    usual = [greedy(ids, weights_of(model, i)) for i, ids in enumerate(PROMPTS)]
    with Engine(model, TOKENIZER, options(**changes)) as engine:
        expected = [completion.token_ids for completion in engine.generate(usual)]
        for i, (prompt, completion) in enumerate(scored(engine, requests)):
            check_prompt(model, PROMPTS[i], weights_of(model, i), prompt, top=i)
            assert completion.token_ids == expected[i]
            assert completion.reused_tokens == 0  # every token of the prompt has been run
        assert idle(engine)


def test_numbers_of_a_prompt_beside_a_draft_model() -> None:
    model = make_model("llama", "two loras")
    with Engine(model, TOKENIZER, options(speculate=3, adapt=False), draft=full("gpt2", 9)) as engine:
        requests = [greedy(ids, weights_of(model, i), prompt_log_probs=2) for i, ids in enumerate(PROMPTS)]
        for i, (prompt, completion) in enumerate(scored(engine, requests)):
            check_prompt(model, PROMPTS[i], weights_of(model, i), prompt, top=2)
            assert completion.drafted > 0


@pytest.mark.parametrize("chunk", [3, 256])
def test_a_request_without_a_reply(chunk: int) -> None:
    """It ends with the prompt's numbers, may fill the whole context, and leaves its rows to others."""
    model = make_model("llama", "full and lora")
    whole = [7 + i % 30 for i in range(64)]
    ids = [*PROMPTS, whole]
    weights = [weights_of(model, i % 4) for i in range(len(ids))]
    with Engine(model, TOKENIZER, options(streams=2, chunk=chunk)) as engine:
        requests = [greedy(p, w, prompt_log_probs=1, reply=False) for p, w in zip(ids, weights, strict=True)]
        decoding = engine.stream(greedy(PROMPTS[0], weights[0]))
        for i, (prompt, completion) in enumerate(scored(engine, requests)):
            check_prompt(model, ids[i], weights[i], prompt, top=1)
            assert (completion.tokens, completion.text, completion.ending) == ((), "", "length")
            assert completion.prompt_tokens == len(ids[i])
        expected = model.generate(
            torch.tensor([PROMPTS[0]], device=DEVICE), do_sample=False, max_new_tokens=LENGTH, reward_weights=weights[0]
        )
        assert [*PROMPTS[0], *decoding.result().token_ids] == expected[0].tolist()
        assert idle(engine)
        silent = engine.stream(greedy(PROMPTS[0], reply=False))
        assert silent.result().tokens == ()
        assert silent.prompt is None


def test_prompts_that_cannot_be_scored() -> None:
    base = tiny_model(seed=0, vocab_size=VOCAB_SIZE + 4)
    head = torch.nn.Linear(32, VOCAB_SIZE, bias=False, device=DEVICE)
    base.lm_head = head
    with Engine(base, TOKENIZER, options()) as engine:
        engine.generate([greedy([7, VOCAB_SIZE + 1])])
        with pytest.raises(DataError, match=f"never says the token id {VOCAB_SIZE + 1}"):
            engine.stream(greedy([7, VOCAB_SIZE + 1], prompt_log_probs=0))
        with pytest.raises(DataError, match="65 prompt tokens and up to 0 new ones are more than the 64"):
            engine.stream(greedy([7] * 65, prompt_log_probs=0, reply=False))
    with pytest.raises(ConfigError, match="prompt_log_probs is 101"):
        greedy([7], prompt_log_probs=101)


# --- text that goes on ----------------------------------------------------------------------------------------------


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    model = make_model("llama", "full")
    ban = Sampling(max_new_tokens=6, temperature=0, logit_bias=dict.fromkeys(range(6), -100.0))
    with Engine(model, TOKENIZER, options()) as engine:
        plain, continued = engine.generate(
            [Request(prompt="w1 w2", sampling=ban, continues=goes_on) for goes_on in (False, True)]
        )
    assert plain.token_ids == continued.token_ids
    assert continued.text == f" {plain.text}"
    assert "w1 w2" + continued.text == TOKENIZER.decode([*TOKENIZER("w1 w2").input_ids, *continued.token_ids])


def test_stop_strings_are_not_looked_for_in_the_prompt() -> None:
    text = TextStream(tiny_tokenizer(), ["w2 w3", "w5"], TOKENIZER("w1 w2 w5").input_ids)
    assert "".join([text.add(i) for i in TOKENIZER("w3 w4").input_ids]) + text.finish() == " w3 w4"
    assert not text.stopped


# --- a thread of its own --------------------------------------------------------------------------------------------


def test_an_engine_in_a_thread_of_its_own() -> None:
    """It is made where its steps are made, and closing it ends the thread."""
    seen: dict[str, int] = {}
    before = threading.active_count()

    def make() -> Engine:
        seen["made"] = threading.get_ident()
        model = make_model("llama", "full and lora")
        model.base.register_forward_pre_hook(lambda *_: seen.update(ran=threading.get_ident()))
        return Engine(model, TOKENIZER, options())

    with Engine.in_own_thread(make) as engine:
        found = engine.generate([greedy(ids) for ids in PROMPTS])
        assert seen["made"] == seen["ran"] != threading.get_ident()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with Engine(make_model("llama", "full and lora"), TOKENIZER, options()) as engine:
        assert [c.token_ids for c in engine.generate([greedy(ids) for ids in PROMPTS])] == [c.token_ids for c in found]


def test_what_goes_wrong_while_an_engine_is_made_is_raised_here() -> None:
    before = threading.active_count()

    def make() -> Engine:
        return Engine(make_model("llama", "full"), TOKENIZER, options(context=10_000))

    with pytest.raises(ConfigError, match="context is 10000"):
        Engine.in_own_thread(make)
    assert threading.active_count() == before


# --- ends -----------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_is_gone_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine stands still in a step, one of two running requests is cancelled."""
    reached, go_on = threading.Event(), threading.Event()
    model = make_model("llama", "full and lora")
    with Engine.in_own_thread(lambda: Engine(model, TOKENIZER, options(streams=2))) as engine:
        long = Sampling(max_new_tokens=50, temperature=0)
        other = engine.stream(greedy(PROMPTS[0], sampling=long))
        victim = engine.stream(greedy(PROMPTS[3], sampling=long))
        next(iter(victim))

        trunk = engine._built.members.trunks[0]
        usual = trunk._run

        def hold(*inputs: Any) -> Any:
            reached.set()
            go_on.wait(30)
            return usual(*inputs)

        monkeypatch.setattr(trunk, "_run", hold)
        assert reached.wait(30)
        steps = engine.statistics().steps
        victim.cancel()
        go_on.set()
        ended = victim.result()
        assert ended.ending == "cancelled"
        # A step gives a token at most: the one that stood still may have given the last one.
        assert len(ended.tokens) <= steps
        assert len(other.result().tokens) == 50
        assert idle(engine)


def test_an_exception_in_one_request_ends_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", "full and lora")
    with Engine(model, TOKENIZER, options(speculate=2, adapt=False)) as engine:
        expected = engine.generate([greedy(ids) for ids in PROMPTS])
        usual = TextStream.add

        def add(self: TextStream, token: int, **how: bool) -> str:
            if [search._stop for search in self._stops] == ["victim"] and self._shown._length:
                raise ArithmeticError("cannot be decoded")
            return usual(self, token, **how)

        monkeypatch.setattr(TextStream, "add", add)
        victim = engine.stream(greedy(PROMPTS[0], stop=["victim"]))
        found = engine.generate([greedy(ids) for ids in PROMPTS])
        with pytest.raises(ArithmeticError, match="cannot be decoded"):
            victim.result()
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert idle(engine)
