"""The engine on a GPU: decode steps replayed as CUDA graphs say what the model's own forward says."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from builders.engines import LENGTH, TOKENIZER, full, greedy, lora, options
from builders.families import tiny_family
from builders.tiny import save_member, tiny_model
from genarm import GuidedForCausalLM, compose
from genarm.engine import Engine, graphs
from genarm.errors import UnsupportedError
from genarm.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LONG = 560
"""Tokens of a reply that passes two of the lengths that graphs are captured for."""


def guided_on_gpu(dtype: torch.dtype = torch.float32) -> GuidedForCausalLM:
    base = tiny_model("llama", seed=0, spread=0.1, dtype=dtype).to("cuda")
    arm = tiny_model("llama", seed=1, hidden=16, layers=1, spread=0.2, dtype=dtype)
    for model in (base, arm):
        model.config.max_position_embeddings = 1024  # rotary: nothing is as long as that
    model = GuidedForCausalLM.from_members(base, {"full": arm.to("cuda"), "one": lora(base, "one", 3).to("cuda")})
    model.generation_config.eos_token_id = None
    return model


def check(model: GuidedForCausalLM, prompt: list[int], reply: tuple[int, ...], weights: dict[str, float]) -> None:
    """Each token is the likeliest by one uncached forward over all of it, but for ties by rounding."""
    ids_1T = torch.tensor([[*prompt, *reply]], device="cuda")
    with torch.no_grad():
        logits_TV = model(ids_1T, reward_weights=weights, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen_T = logits_TV.gather(-1, torch.tensor(reply, device="cuda")[:, None])[:, 0]
    assert float((logits_TV.max(-1).values - chosen_T).max()) < 1e-3


@pytest.mark.parametrize("speculate", [0, 3])
def test_replies_beyond_several_captured_lengths(speculate: int) -> None:
    """Many rows beginning and ending at different times, each with weights of its own, graphs replayed between them."""
    model = guided_on_gpu()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, 46, (n,), generator=generator).tolist() for n in (3, 40, 9, 1, 25, 7, 18, 30, 5, 2, 12)]
    weights = [{"full": 0.3 * i - 1, "one": 1 - 0.2 * i} for i in range(len(prompts))]
    lengths = [LONG if i % 4 == 0 else 30 * i for i in range(1, len(prompts) + 1)]
    requests = [
        greedy(prompt, w, sampling=Sampling(max_new_tokens=n, temperature=0))
        for prompt, w, n in zip(prompts, weights, lengths, strict=True)
    ]
    with Engine(model, TOKENIZER, options(streams=9, context=640, speculate=speculate, adapt=False)) as engine:
        assert engine.describe().count("replayed as CUDA graphs") == 2
        completions = engine.generate(requests)
        again = engine.generate(requests)
        captured = [trunk._graphs for trunk in engine._built.members.trunks]
        sizes = [size for of in captured if of is not None for size in of.captured]
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]
    assert {span for _, _, span in sizes} == {256, 512, 640}
    assert (max(queries for _, queries, _ in sizes) > 1) == (speculate > 0)
    for prompt, completion, w, n in zip(prompts, completions, weights, lengths, strict=True):
        assert len(completion.token_ids) == n
        check(model, prompt, completion.token_ids, w)


def test_half_precision_stays_near_the_models_own_forward() -> None:
    model = guided_on_gpu(torch.bfloat16)
    with Engine(model, TOKENIZER, options(streams=3, context=128)) as engine:
        completions = engine.generate([greedy([7, 8, 9], {"full": w, "one": -w}) for w in (0.0, 0.5, 1.0)])
    for completion, weight in zip(completions, (0.0, 0.5, 1.0), strict=True):
        ids_1T = torch.tensor([[7, 8, 9, *completion.token_ids]], device="cuda")
        with torch.no_grad():
            logits = model(ids_1T, reward_weights={"full": weight, "one": -weight}, use_cache=False).logits
        expected_T = logits[0, 2:-1].gather(-1, ids_1T[0, 3:, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor([t.log_prob for t in completion.tokens]), expected_T, atol=0.1, rtol=0)


def test_engines_of_two_threads_capture_side_by_side() -> None:
    """A capture holds no other thread's work, and is disturbed by none."""
    models = [guided_on_gpu(), guided_on_gpu()]
    found: dict[int, list[tuple[int, ...]]] = {}

    def decode(number: int) -> None:
        with Engine(models[number], TOKENIZER, options(streams=4, context=128)) as engine:
            requests = [greedy([7 + number, 8 + i], {"full": 0.5, "one": 0.5}) for i in range(6)]
            found[number] = [c.token_ids for c in engine.generate(requests)]

    threads = [threading.Thread(target=decode, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, model in enumerate(models):
        for i, reply in enumerate(found[number]):
            check(model, [7 + number, 8 + i], reply, {"full": 0.5, "one": 0.5})


def test_a_folder_is_opened_on_the_gpu_by_default(tmp_path: Path) -> None:
    base = save_member(tiny_model(seed=0).cpu(), tmp_path / "base")
    arm = save_member(full("llama", 1).cpu(), tmp_path / "arm")
    compose(base, {"arm": arm}, tmp_path / "guided")
    with Engine.from_pretrained(tmp_path / "guided", options()) as engine:
        assert {trunk.device.type for trunk in engine._built.members.trunks} == {"cuda"}
        reply = engine.generate([greedy([7, 8, 9], {"arm": 1.0})])[0]
    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided", dtype=torch.float32).to("cuda")
    check(model, [7, 8, 9], reply.token_ids, {"arm": 1.0})


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_model_that_waits_for_the_device_runs_launch_by_launch(
    foreseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are given to experts by their number; a capture that fails on it leaves nothing behind."""
    if not foreseen:
        monkeypatch.setattr(graphs, "_waits", lambda *_: False)
    model = tiny_family("mixtral")
    with Engine(model, TOKENIZER, options(streams=3)) as engine:
        assert "replayed" not in engine.describe()
        replies = [c.token_ids for c in engine.generate([greedy([7, 8, i]) for i in range(9, 14)])]
    for i, reply in enumerate(replies):
        ids_1T = torch.tensor([[7, 8, 9 + i, *reply]], device="cuda")
        with torch.no_grad():
            logits_TV = tiny_family("mixtral")(ids_1T, use_cache=False).logits[0, 2:-1]
        assert logits_TV.argmax(-1).tolist() == list(reply)
    del engine, model
    gc.collect()
    assert torch.rand(4, device="cuda").unique().numel() == 4
    test_engines_of_two_threads_capture_side_by_side()


def test_memory_that_does_not_suffice_is_named() -> None:
    base = tiny_model(seed=0).to("cuda")
    base.config.max_position_embeddings = 10**9
    with pytest.raises(UnsupportedError, match="there is no memory for the keys and values of 4 streams of 900000000"):
        Engine(base, TOKENIZER, options(context=900_000_000))
    with Engine(base, TOKENIZER, options()) as engine:  # and what was allotted is free again
        assert len(engine.generate([greedy([7, 8])])[0].token_ids) == LENGTH
