"""Cached rows under every operation against the model on the plain tokens, one row at a time."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from builders.rewards import alone
from builders.tiny import FAMILIES, tiny_model
from genarm.errors import UnsupportedError
from genarm.lab.prefix import Prefix, batches, next_logits, require_movable
from genarm.model.modeling import GuidedForCausalLM

PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [16]]


def check(prefix: Prefix, rows: list[list[int]], got: torch.Tensor) -> None:
    assert prefix.lengths == [len(row) for row in rows]
    expected = torch.stack([alone(prefix.model, row) for row in rows])
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_operations_in_any_order(family: str) -> None:
    """Each step changes the rows in some way and reads one more token; the window of `mistral` is 8."""
    model, rng = tiny_model(family), random.Random(family)
    prefix, rows = Prefix(model), [list(prompt) for prompt in PROMPTS]
    check(prefix, rows, next_logits(prefix, rows))
    seen = set()
    for _ in range(24):
        what = rng.choice(["select", "rewind", "replace", "ragged", "fork"])
        seen.add(what)
        some = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 4))]
        if what == "select":
            prefix.select(some)
            rows = [list(rows[i]) for i in some]
        elif what == "rewind":
            counts = [rng.randint(0, min(3, len(row) - 1)) for row in rows]
            prefix.rewind(counts)
            rows = [row[: len(row) - count] for row, count in zip(rows, counts, strict=True)]
        elif what == "replace":
            target = rng.randrange(len(rows))
            other = prefix.fork(some[:1])
            tail = [rng.randrange(6, 40) for _ in range(rng.randint(1, 4))]
            for token in tail:
                next_logits(other, [[token]])
            prefix.replace([target], other)
            rows[target] = rows[some[0]] + tail
        elif what == "ragged":
            chunks = [[rng.randrange(6, 40) for _ in range(rng.randint(1, 4))] for _ in rows]
            prefix.extend(chunks)
            rows = [row + chunk for row, chunk in zip(rows, chunks, strict=True)]
        else:
            twin = prefix.fork(some)
            copies = [rows[i] + [9] for i in some]
            check(twin, copies, next_logits(twin, [[9]] * len(some)))
        tokens = [rng.randrange(6, 40) for _ in rows]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        check(prefix, rows, next_logits(prefix, [[token] for token in tokens]))
    assert len(seen) == 5


def test_padding_goes_when_its_row_has_gone() -> None:
    prefix = Prefix(tiny_model())
    prefix.extend(PROMPTS)
    prefix.select([0, 2])
    layer = prefix._layers()[0]
    assert layer.keys.shape[2] == 3


def test_counts_rows_and_positions_without_padding() -> None:
    counted: list[tuple[int, int]] = []
    prefix = Prefix(tiny_model(), count=lambda rows, positions: counted.append((rows, positions)))
    prefix.extend(PROMPTS)
    prefix.select([1, 1])
    prefix.extend([[6], [7, 8]])
    assert counted == [(3, 10), (2, 3)]


def test_positions_stay_within_the_context() -> None:
    """A model with learned positions has none beyond its context, padding on the right included."""
    model = tiny_model("gpt2")
    prefix = Prefix(model)
    rows = [[7] * 126, [8]]
    prefix.extend(rows)
    prefix.extend([[9], [10, 11, 12, 13]])
    rows = [[*rows[0], 9], [8, 10, 11, 12, 13]]
    check(prefix, [[*row, 5] for row in rows], next_logits(prefix, [[5], [5]]))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_guided_models_have_their_own_cache(family: str) -> None:
    base, arm = tiny_model(family), tiny_model(family, seed=1)
    model = GuidedForCausalLM.from_members(base, {"good": arm})
    prefix, rows = Prefix(model, options={"reward_weights": {"good": 0.5}}), [list(prompt) for prompt in PROMPTS]
    prefix.extend(rows)
    prefix.select([2, 1, 1])
    twin = prefix.fork([0, 1])
    got = next_logits(prefix, [[20], [21], [22]])
    rows = [rows[2] + [20], rows[1] + [21], rows[1] + [22]]
    for row, logits in zip(rows, got, strict=True):
        expected = (alone(base, row).log_softmax(-1) + 0.5 * alone(arm, row).log_softmax(-1)).log_softmax(-1)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    again = next_logits(twin, [[20], [21]])
    torch.testing.assert_close(again, got[:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedError, match=r"CARDS takes tokens back, .* GuidedForCausalLM cannot"):
        require_movable([base, model], "CARDS")


def test_models_with_a_state_can_be_read_but_not_taken_back() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 46, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    kinds = ["conv", "full_attention"]
    config = AutoConfig.for_model("lfm2", intermediate_size=32, num_hidden_layers=2, layer_types=kinds, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    prefix = Prefix(model)
    next_logits(prefix, [[7, 8], [9, 10]])
    got = next_logits(prefix, [[11], [12]])
    check(prefix, [[7, 8, 11], [9, 10, 12]], got)
    with pytest.raises(UnsupportedError, match="Lfm2ForCausalLM cannot"):
        require_movable([model], "CARDS")
    bare = AutoConfig.for_model("mamba", vocab_size=46, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="MambaForCausalLM has no cache of keys and values"):
        Prefix(AutoModelForCausalLM.from_config(bare))


def test_batches_are_of_like_length_and_bounded() -> None:
    lengths = [3, 50, 4, 49, 200, 1]
    parts = list(batches(lengths, tokens=100))
    assert sorted(i for part in parts for i in part) == list(range(6))
    assert parts[0] == [4]  # longer than the bound: alone
    assert parts[1] == [1, 3]
    assert all(len(part) * max(lengths[i] for i in part) <= 100 for part in parts[1:])
