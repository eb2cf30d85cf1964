"""The engine's pure parts, each against a reference that is not its own code."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,
    PreTrainedTokenizerBase,
)

from builders.engines import shaped_by_transformers
from builders.tiny import SHARED, tiny_tokenizer
from genarm.engine.kv_cache import KVCache, LayerShape, Row
from genarm.engine.noise import Purpose, key, log_exponentials, uniform
from genarm.engine.reply_text import TextStream
from genarm.engine.sampler import Place, acceptance, draw, residual, shape
from genarm.engine.speculation import DraftLength, exponents, guess
from genarm.sampling import Sampling

ENOUGH = 1e-3
"""The smallest p-value that passes; seeds are fixed, so that a test that passes once passes always."""


def random_log_probs(rows: int, size: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, size, generator=generator) * spread).log_softmax(-1)


# --- sampler: the shaped distribution -------------------------------------------------------------------------------


SETTINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=3),
    Sampling(top_k=1),
    Sampling(top_k=1000),
    Sampling(top_p=0.6),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1),
    Sampling(temperature=2.0, top_k=5, top_p=0.95, presence_penalty=1.5),
    Sampling(presence_penalty=-1.0, frequency_penalty=0.5),
    Sampling(frequency_penalty=2.0, temperature=0),
    Sampling(logit_bias={3: -100, 5: 4.5}, temperature=0.9),
    Sampling(logit_bias={4: 100}, temperature=0),
    Sampling(logit_bias={7: 100, 8: 100}, frequency_penalty=1.0, top_k=2),
    Sampling(repetition_penalty=1.4),
    Sampling(repetition_penalty=0.5, temperature=0),
    Sampling(repetition_penalty=2.0, logit_bias={3: 30, 9: 20}, presence_penalty=0.5, temperature=1.5, top_k=7),
    Sampling(min_new_tokens=12),
    Sampling(min_new_tokens=12, temperature=0, logit_bias={5: 100}),
    Sampling(min_new_tokens=11, top_p=0.8, min_p=0.1),
]
COUNTS = Counter({0: 1, 3: 2, 4: 7, 11: 1})
SEEN = [4, 9, 9, 12, 41]
"""A prompt; the last of its ids is read and never said."""
ENDS = [5, 6]


@pytest.mark.parametrize("seed", range(4))
def test_shape_is_what_transformers_processors_give(seed: int) -> None:
    """All settings side by side in one call, each against its own lone reference."""
    log_probs_PV = random_log_probs(len(SETTINGS), 40, seed)
    before = log_probs_PV.clone()
    places = [
        Place(sampling=s, counts=COUNTS, prompt=SEEN, banned=ENDS if COUNTS.total() < s.min_new_tokens else ())
        for s in SETTINGS
    ]
    shaped_PV = shape(log_probs_PV, places)
    assert torch.equal(log_probs_PV, before)  # the members' words are reported later and must stay
    for row, sampling in enumerate(SETTINGS):
        expected = shaped_by_transformers(log_probs_PV[row], sampling, COUNTS, SEEN, ENDS)
        assert torch.equal(shaped_PV[row].isneginf(), expected.isneginf()), sampling
        torch.testing.assert_close(shaped_PV[row], expected, atol=2e-5, rtol=1e-5)
        alone = shape(log_probs_PV[row : row + 1], places[row : row + 1])
        torch.testing.assert_close(alone[0], shaped_PV[row], atol=1e-6, rtol=1e-6)


def test_tokens_as_likely_as_the_last_one_are_kept() -> None:
    """As with transformers; half precision has many of them."""
    log_probs = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]]).log_softmax(-1)
    for k in (1, 2, 4, 5):
        sampling = Sampling(top_k=k)
        found = shape(log_probs, [Place(sampling=sampling)])[0]
        assert torch.equal(found.isneginf(), shaped_by_transformers(log_probs[0], sampling, Counter()).isneginf())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            top_k=st.integers(0, 12),
            top_p=st.floats(0.05, 1.0),
            min_p=st.sampled_from([0.0, 0.05, 0.5]),
            presence_penalty=st.floats(-2, 2),
            frequency_penalty=st.sampled_from([0.0, 0.25]),
            repetition_penalty=st.sampled_from([1.0, 0.01, 100.0]),
            logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=2),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31),
)
def test_shaped_rows_are_distributions_that_keep_the_order(several: list[Sampling], seed: int) -> None:
    log_probs_PV = random_log_probs(len(several), 10, seed)
    shaped_PV = shape(log_probs_PV, [Place(sampling=s, counts=Counter({2: 3})) for s in several])
    torch.testing.assert_close(shaped_PV.exp().sum(-1), torch.ones(len(several)))
    for row, sampling in enumerate(several):
        kept = shaped_PV[row].isfinite()
        if sampling.top_k:
            assert len(shaped_PV[row][kept].unique()) <= sampling.top_k
        if not sampling.penalises:
            order = log_probs_PV[row].argsort(descending=True)
            assert kept[order].int().diff().le(0).all()  # the kept ones are the likeliest
            assert kept[order[0]]


def test_penalties_are_openais_formula() -> None:
    """mu[j] − c[j]·frequency − float(c[j] > 0)·presence, by hand."""
    log_probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.0})
    shaped = shape(log_probs, [Place(sampling=sampling, counts=Counter({0: 3, 1: 1}))])
    weights = torch.tensor([0.5 * math.exp(-0.5 - 0.75), 0.25 * math.exp(-0.5 - 0.25), 0.125, 0.125 * math.e])
    torch.testing.assert_close(shaped[0].exp(), weights / weights.sum())


# --- sampler: the draw, and what speculation adds -------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_p=0.9)])
def test_draws_are_distributed_as_the_probabilities(sampling: Sampling) -> None:
    n = 20_000
    log_probs = shape(random_log_probs(1, 9, seed=5, spread=1.0), [Place(sampling=sampling)])
    keys = [key(seed, 3, Purpose.TOKEN) for seed in range(n)]
    tokens = draw(log_probs.expand(n, -1), [sampling] * n, keys)
    expected = log_probs[0].double().softmax(-1) * n
    counts = torch.bincount(tokens, minlength=9)
    possible = expected > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > ENOUGH
    assert stats.chisquare(counts[possible]).pvalue < 1e-9  # and the test can tell: uniform they are not


def test_greedy_rows_draw_their_best_token_in_any_company() -> None:
    log_probs = random_log_probs(3, 30)
    several = [Sampling(temperature=0), Sampling(), Sampling(temperature=0)]
    shaped = shape(log_probs, [Place(sampling=s) for s in several])
    for seed in range(20):
        tokens = draw(shaped, several, [key(seed, i, Purpose.TOKEN) for i in range(3)])
        assert tokens[0] == log_probs[0].argmax()
        assert tokens[2] == log_probs[2].argmax()


def test_acceptance_and_residual_by_hand() -> None:
    target = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]]).log()
    draft = torch.tensor([[0.25, 0.6, 0.05, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()
    for drafted, expected in (([0, 0], [1.0, 1.0]), ([1, 3], [0.5, 1.0]), ([3, 2], [0.0, 1.0])):
        torch.testing.assert_close(acceptance(target, draft, torch.tensor(drafted)), torch.tensor(expected))
    rest = residual(target, draft)
    torch.testing.assert_close(rest[0].exp(), torch.tensor([0.25 / 0.4, 0.0, 0.15 / 0.4, 0.0]))
    torch.testing.assert_close(rest[1], target[1])  # nothing is left over where both are the same


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=4), Sampling(temperature=0)])
def test_drafting_then_accepting_or_replacing_is_the_target(sampling: Sampling) -> None:
    """q(d)·a(d) + P(refused)·residual(d) = p(d), exactly (Leviathan et al. 2023, appendix A)."""
    places = [Place(sampling=sampling)] * 6
    target, draft = (shape(random_log_probs(6, 12, seed), places) for seed in (1, 2))
    stays = torch.stack([acceptance(target, draft, torch.full((6,), d)) for d in range(12)], dim=1)
    stays = torch.where(draft.exp() > 0, stays, 0.0)  # never drafted
    accepted = draft.exp() * stays
    refused = 1 - accepted.sum(-1, keepdim=True)
    torch.testing.assert_close(accepted + refused * residual(target, draft).exp(), target.exp(), atol=1e-6, rtol=1e-5)


# --- noise ----------------------------------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_numbers_alone_and_in_company() -> None:
    keys = [key(seed, position, Purpose.TOKEN) for seed in (0, 1, 2**40) for position in range(5)]
    whole = log_exponentials(keys, 300, "cpu")
    assert torch.equal(whole, log_exponentials(keys, 300, torch.device("cpu")))
    for i, one in enumerate(keys):
        assert torch.equal(log_exponentials([one], 300, "cpu")[0], whole[i])
        assert uniform(one) == uniform(one)
    assert torch.equal(
        torch.cat([log_exponentials(keys[:7], 300, "cpu"), log_exponentials(keys[7:], 300, "cpu")]), whole
    )
    assert torch.equal(log_exponentials(keys, 100, "cpu"), whole[:, :100])  # a larger vocabulary changes nothing
    assert whole.isfinite().all()
    every = {key(seed, position, purpose) for seed in range(50) for position in range(50) for purpose in Purpose}
    assert len(every) == 50 * 50 * len(Purpose)


def test_noise_is_uniform_and_exponential() -> None:
    uniforms = [uniform(key(seed, 9, Purpose.ACCEPT)) for seed in range(20_000)]
    assert 0 <= min(uniforms) <= max(uniforms) < 1
    assert stats.kstest(uniforms, "uniform").pvalue > ENOUGH
    by_seed = log_exponentials([key(seed, 0, Purpose.TOKEN) for seed in range(20_000)], 2, "cpu").exp()
    assert stats.kstest(by_seed[:, 1].numpy(), "expon").pvalue > ENOUGH
    by_token = log_exponentials([key(0, 0, Purpose.TOKEN)], 50_000, "cpu").exp()
    assert stats.kstest(by_token[0].numpy(), "expon").pvalue > ENOUGH


def pairs_of_uniforms(kind: str, n: int) -> tuple[list[float], list[float]]:
    if kind in ("purposes", "accept"):
        other = Purpose.DRAFT if kind == "purposes" else Purpose.ACCEPT
        both = [(key(s, 4, Purpose.TOKEN), key(s, 4, other)) for s in range(n)]
    elif kind == "positions":
        both = [(key(s, 4, Purpose.TOKEN), key(s, 5, Purpose.TOKEN)) for s in range(n)]
    else:
        both = [(key(s, 4, Purpose.TOKEN), key(s + 1, 4, Purpose.TOKEN)) for s in range(n)]
    one, two = (log_exponentials([pair[i] for pair in both], 3, "cpu").exp().neg().expm1().neg() for i in (0, 1))
    if kind == "accept":
        return one[:, 2].tolist(), [uniform(second) for _, second in both]
    return one[:, 2].tolist(), two[:, 2].tolist()


@pytest.mark.parametrize("kind", ["purposes", "accept", "positions", "seeds"])
def test_noise_of_different_names_is_independent(kind: str) -> None:
    """A chi-square test of the joint distribution over 10 × 10 cells."""
    n = 20_000
    one, two = pairs_of_uniforms(kind, n)
    cells = Counter((int(a * 10), int(b * 10)) for a, b in zip(one, two, strict=True))
    counts = [cells[i, j] for i in range(10) for j in range(10)]
    assert sum(counts) == n
    assert stats.chisquare(counts).pvalue > ENOUGH


def test_noise_of_neighbouring_tokens_is_independent() -> None:
    values = log_exponentials([key(s, 0, Purpose.TOKEN) for s in range(200)], 200, "cpu").exp().neg().expm1().neg()
    for one, two in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:])):
        cells = (one * 10).long().clamp(max=9) * 10 + (two * 10).long().clamp(max=9)
        assert stats.chisquare(torch.bincount(cells.flatten(), minlength=100)).pvalue > ENOUGH


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerBase:
    folder = SHARED / "models" / "gpt2-tokenizer"
    if not folder.exists():
        pytest.skip("the GPT-2 tokenizer of ../shared is not here")
    return GPT2TokenizerFast.from_pretrained(folder)


@lru_cache
def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream, found = TextStream(tokenizer, stop), []
    for token in ids:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


TEXTS = [
    "Plain text, don't you think?  Two spaces, a\ttab\nand a line .",
    "emoji 🙂🙃 families 👩‍👩‍👧‍👦 flags 🇩🇪",
    "中文字符和日本語、한국어",
    "naïve café — “quotes” … ﷽",
    "a real replacement \ufffd character",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(byte_level: PreTrainedTokenizerBase, text: str) -> None:
    found = pieces(byte_level, byte_level(text).input_ids)
    assert "".join(found) == text
    for piece in found:
        assert "\ufffd" not in piece or "\ufffd" in text  # no half characters


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_text_of_any_ids(byte_level: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    anything = st.one_of(st.integers(0, 255), st.integers(0, len(byte_level) - 1))  # the first 256 are single bytes
    ids = data.draw(st.lists(anything, max_size=24))
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids, skip_special_tokens=True)
    text = data.draw(st.text(max_size=12))
    ids = byte_level(text).input_ids
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids, skip_special_tokens=True)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(259, 511), max_size=24), text=st.text(max_size=8))
def test_streamed_text_of_a_sentencepiece_tokenizer(ids: list[int], text: str) -> None:
    """Words with their leading spaces, and characters of several byte tokens."""
    folder = SHARED / "models" / "stories260k"
    if not folder.exists():
        pytest.skip("the models of ../shared are not here")
    tokenizer = open_tokenizer(folder)
    ids = [*ids, *tokenizer(text, add_special_tokens=False).input_ids]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_no_text() -> None:
    tokenizer = tiny_tokenizer()
    for ids in ([6, 2, 7, 1, 1, 8, 0], [2, 6, 7], [6, 1, 1, 1, 7], [0, 0]):
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="ab \n", max_size=30),
    stop=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=5), min_size=1, max_size=3),
    data=st.data(),
)
def test_stop_strings_cut_the_text_and_never_show(
    byte_level: PreTrainedTokenizerBase, text: str, stop: list[str], data: st.DataObject
) -> None:
    """Against decoding everything after every token; the cuts between tokens are anywhere."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    ids = [i for start, end in itertools.pairwise(cuts) for i in byte_level(text[start:end]).input_ids]
    expected, used = text, len(ids)
    for n in range(1, len(ids) + 1):
        known = byte_level.decode(ids[:n])
        found = [known.find(s) for s in stop if s in known]
        if found:
            expected, used = known[: min(found)], n
            break
    stream, shown = TextStream(byte_level, stop), ""
    for token in ids[:used]:
        assert not stream.stopped
        shown += stream.add(token)
        assert expected.startswith(shown)
    assert stream.stopped == any(s in byte_level.decode(ids) for s in stop)
    assert shown + stream.finish() == expected
    assert stream.finish() == ""


def test_stop_strings_by_hand(byte_level: PreTrainedTokenizerBase) -> None:
    def reply(text: str, *stop: str) -> str:
        return "".join(pieces(byte_level, byte_level(text).input_ids, stop))

    assert reply("one two three", "two", "three") == "one "
    assert reply("one two three", "three", "two") == "one "
    assert reply("one two three", "e t") == "on"
    assert reply("one two thr", "three") == "one two thr"  # what was held back comes at the end
    assert reply("ok 🙂 then", "🙂") == "ok "
    assert reply("你好世界", "世") == "你好"
    assert reply("aaab", "aab") == "a"


def test_a_stop_string_that_is_found_only_at_the_end(byte_level: PreTrainedTokenizerBase) -> None:
    ids = byte_level("x🙂").input_ids[:-1]
    stream = TextStream(byte_level, ["\ufffd"])
    shown = "".join(stream.add(i) for i in ids)
    assert shown + stream.finish() == "x"
    assert stream.stopped


# --- KV cache -------------------------------------------------------------------------------------------------------


def make_cache(rows: int, capacity: int = 24) -> KVCache:
    layers = [
        LayerShape(heads=2, key_size=3, value_size=4, dtype=torch.float32, device=torch.device("cpu")),
        LayerShape(heads=1, key_size=2, value_size=2, dtype=torch.bfloat16, device=torch.device("cpu")),
    ]
    return KVCache(layers, rows=rows, capacity=capacity)


def mark(member: int, ids: Sequence[int]) -> float:
    """What attention would store for the last of `ids`: it depends on the member and on all tokens so far."""
    return float(random.Random(repr((member, list(ids)))).randrange(256))  # exact in bfloat16


def write(kv_cache: KVCache, row: Row, ids: Sequence[int]) -> None:
    for token in ids:
        row.ids.append(token)
        for i, tensor in enumerate((*kv_cache.keys, *kv_cache.values)):
            tensor[row.index, :, len(row.ids) - 1] = mark(row.member, row.ids) + i


def check(kv_cache: KVCache, rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.index < kv_cache.active
        assert kv_cache.rows[row.index] is row
        expected = torch.tensor([mark(row.member, row.ids[: n + 1]) for n in range(len(row.ids))])
        for i, tensor in enumerate((*kv_cache.keys, *kv_cache.values)):
            stored = tensor[row.index, :, : len(row.ids)].float()
            assert torch.equal(stored, (expected + i).to(tensor.dtype).float()[None, :, None].expand_as(stored))


def shared_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("seed", range(12))
def test_kv_cache_under_random_use(seed: int) -> None:
    """Rows keep what they hold through every exchange, and each begins with the longest beginning that is known."""
    generator = random.Random(seed)
    kv_cache = make_cache(rows=generator.choice([1, 2, 5]))
    taken: list[Row] = []
    for _ in range(80):
        if taken and (not kv_cache.free or generator.random() < 0.4):
            row = taken.pop(generator.randrange(len(taken)))
            if generator.random() < 0.3:  # drafts that were not accepted
                del row.ids[generator.randrange(len(row.ids) + 1) :]
            kv_cache.give_back(row)
        else:
            member = generator.randrange(2)
            ids = [generator.randrange(2) for _ in range(generator.randint(1, 12))]
            longest = max(shared_beginning(row.ids, ids[:-1]) if row.member == member else 0 for row in kv_cache.rows)
            row = kv_cache.take(member, ids)
            assert all(row is not other for other in taken)
            assert (row.member, row.ids) == (member, ids[:longest])
            write(kv_cache, row, ids[longest:])
            write(kv_cache, row, [generator.randrange(2) for _ in range(generator.randint(0, 8))])
            taken.append(row)
        check(kv_cache, taken)
        assert kv_cache.active == len(taken)
        assert kv_cache.free == len(kv_cache.rows) - len(taken)


def test_a_beginning_is_taken_over_or_copied() -> None:
    kv_cache = make_cache(rows=3)
    first = kv_cache.take(0, [1, 2, 3, 4])
    write(kv_cache, first, [1, 2, 3, 4, 5])
    running = kv_cache.take(0, [1, 2, 3, 9])  # copied from a row that is in use
    assert running is not first
    assert running.ids == [1, 2, 3]
    check(kv_cache, [first, running])
    kv_cache.give_back(first)
    again = kv_cache.take(0, [1, 2, 3, 4, 5, 6])  # the next turn goes on in the same row
    assert again is first
    assert again.ids == [1, 2, 3, 4, 5]
    check(kv_cache, [running, again])
    assert kv_cache.take(1, [1, 2, 3, 4]).ids == []  # another member has seen something else


def test_the_whole_prompt_is_never_taken_over() -> None:
    kv_cache = make_cache(rows=2)
    row = kv_cache.take(0, [1, 2, 3])
    write(kv_cache, row, [1, 2, 3])
    kv_cache.give_back(row)
    assert kv_cache.take(0, [1, 2, 3]).ids == [1, 2]


def test_the_row_that_was_idle_longest_is_used_first() -> None:
    kv_cache = make_cache(rows=3)
    rows = [kv_cache.take(0, [10 * i + 10, 1]) for i in range(3)]
    for row in rows:
        write(kv_cache, row, [row.index * 10 + 10, 1])
    for row in (rows[1], rows[0], rows[2]):
        kv_cache.give_back(row)
    assert kv_cache.take(0, [99, 1]) is rows[1]
    assert kv_cache.take(0, [98, 1]) is rows[0]
    assert kv_cache.take(0, [97, 1]) is rows[2]
    with pytest.raises(AssertionError):
        kv_cache.take(0, [96, 1])


def test_memory_is_allotted_once_and_counted() -> None:
    kv_cache = make_cache(rows=3, capacity=10)
    per_position = 2 * (3 + 4) * 4 + 1 * (2 + 2) * 2
    assert kv_cache.bytes == (3 + 1) * 10 * per_position
    before = [t.data_ptr() for t in kv_cache.keys]
    row = kv_cache.take(0, [1, 2])
    write(kv_cache, row, [1, 2])
    kv_cache.forget()
    assert kv_cache.free == 3
    assert kv_cache.take(0, [1, 2]).ids == []
    assert [t.data_ptr() for t in kv_cache.keys] == before


# --- speculation ----------------------------------------------------------------------------------------------------


def test_exponents() -> None:
    assert exponents({1: 2.0}, None) == {1: 3.0}
    assert exponents({1: 0.25}, None) == {1: 1.25}
    powers = exponents({1: 0.5, 3: 1.5}, None)
    assert powers == {1: pytest.approx(0.5 * (1 + 1 / 2.0)), 3: pytest.approx(1.5 * (1 + 1 / 2.0))}
    assert sum(powers.values()) == pytest.approx(1 + 2.0)  # the base's one and the rewards' Σw
    assert exponents({1: 2.0, 2: -0.5}, 7) == {7: 1.0, 1: 2.0, 2: -0.5}


def test_guess_is_the_normalised_product_of_powers() -> None:
    one, two = random_log_probs(3, 8, 1), random_log_probs(3, 8, 2)
    powers = torch.tensor([[1.0, 0.0], [2.0, -0.5], [1.25, 3.0]])
    product = one.exp() ** powers[:, :1] * two.exp() ** powers[:, 1:]
    torch.testing.assert_close(guess([one, two], powers).exp(), product / product.sum(-1, keepdim=True))


def chosen(acceptance_seen: float, *, cost: float = 0.1, most: int = 8) -> int:
    length = DraftLength(most=most, cost=cost, adapt=True)
    for _ in range(200):
        length.saw([acceptance_seen])
    return length.next()


def test_draft_length_grows_with_acceptance() -> None:
    lengths = [chosen(a / 20) for a in range(21)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 8
    assert len(set(lengths)) > 4
    assert [chosen(0.8, cost=c) for c in (0.01, 0.1, 0.3, 1.0)] == sorted(
        (chosen(0.8, cost=c) for c in (0.01, 0.1, 0.3, 1.0)), reverse=True
    )
    assert chosen(1.0, most=3) == 3
    assert chosen(1.0, most=0) == 0


def test_draft_length_of_a_hopeless_draft_looks_again_later() -> None:
    length = DraftLength(most=8, cost=0.2, adapt=True)
    for _ in range(200):
        length.saw([0.0])
    tries = [length.next() for _ in range(200)]
    assert set(tries) == {0, 1}
    assert 2 <= sum(tries) <= 20
    for _ in range(60):  # the text has become easy
        length.saw([1.0])
    assert length.next() > 1


def test_draft_length_that_does_not_adapt() -> None:
    length = DraftLength(most=5, cost=0.9, adapt=False)
    for _ in range(100):
        length.saw([0.0])
    assert length.next() == 5
