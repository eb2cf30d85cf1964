"""Alignment of vocabularies by token string."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from builders.tiny import SHARED, SPECIAL, VOCAB_SIZE, WORDS, save_member, tiny_model, tiny_tokenizer
from genarm import Engine, EngineOptions, GuidedForCausalLM, Request, Sampling, compose
from genarm.errors import VocabularyError
from genarm.model.vocabulary import Alignment, Vocabulary, align, read_vocabulary


def vocabulary(tokenizer: PreTrainedTokenizerFast, label: str = "m", size: int | None = None) -> Vocabulary:
    return read_vocabulary(tokenizer, size=len(tokenizer) if size is None else size, label=label)


def test_equal_vocabularies() -> None:
    assert align(vocabulary(tiny_tokenizer()), vocabulary(tiny_tokenizer())).unknown == ()


def test_a_reward_with_an_extra_special_token() -> None:
    """32000 against 32001: the reward was trained after somebody added a padding token."""
    base, reward = vocabulary(tiny_tokenizer()), vocabulary(tiny_tokenizer(extra=("[PAD]",)))
    assert reward.size == base.size + 1
    alignment = align(base, reward)
    assert alignment.unknown == ()
    log_probs = torch.randn(1, 1, reward.size)
    assert torch.equal(alignment.fit(log_probs), log_probs[..., : base.size])


def test_a_base_with_an_extra_special_token() -> None:
    base, reward = vocabulary(tiny_tokenizer(extra=("[PAD]",))), vocabulary(tiny_tokenizer())
    alignment = align(base, reward)
    assert alignment.unknown == (VOCAB_SIZE,)


def test_padding_rows_of_different_sizes() -> None:
    base, reward = vocabulary(tiny_tokenizer(), size=64), vocabulary(tiny_tokenizer(), size=56)
    assert align(base, reward).unknown == tuple(range(56, 64))
    assert align(reward, base).unknown == ()


def test_a_special_token_in_the_bases_padding_row_is_not_luck() -> None:
    """Sizes agree, and yet the reward's last row is a token while the base's is padding."""
    base = vocabulary(tiny_tokenizer(), size=VOCAB_SIZE + 1)
    assert align(base, vocabulary(tiny_tokenizer(extra=("[PAD]",)))).unknown == (VOCAB_SIZE,)


def test_different_specials_at_one_id() -> None:
    base, reward = vocabulary(tiny_tokenizer(extra=("<a>",))), vocabulary(tiny_tokenizer(extra=("<b>",)))
    assert align(base, reward).unknown == (VOCAB_SIZE,)


def test_permuted_words_are_refused_by_name() -> None:
    swapped = [WORDS[1], WORDS[0], *WORDS[2:]]
    base = vocabulary(tiny_tokenizer(), "base (b)")
    reward = vocabulary(tiny_tokenizer(words=swapped), "kind (k)")
    with pytest.raises(VocabularyError, match=r"base \(b\) and kind \(k\).*2 ids differ.*id 6 is 'w0' against 'w1'"):
        align(base, reward)


def test_a_special_token_with_two_ids_is_refused() -> None:
    base, reward = vocabulary(tiny_tokenizer(extra=("<a>", "<b>"))), vocabulary(tiny_tokenizer(extra=("<b>", "<a>")))
    with pytest.raises(VocabularyError, match="'<a>' against '<b>'"):
        align(base, reward)


@pytest.mark.parametrize("side", ["base", "reward"])
def test_an_ordinary_word_only_one_has_is_refused(side: str) -> None:
    short, long = vocabulary(tiny_tokenizer()), vocabulary(tiny_tokenizer(words=[*WORDS, "extra"]))
    with pytest.raises(VocabularyError, match="'extra'"):
        align(*((long, short) if side == "base" else (short, long)))


def test_a_reward_that_cannot_end_a_response_is_refused() -> None:
    base = tiny_tokenizer(extra=("<stop>",))
    base.eos_token = "<stop>"
    with pytest.raises(VocabularyError, match="ends a response"):
        align(vocabulary(base), vocabulary(tiny_tokenizer()))


def test_without_tokenizers_only_sizes_can_agree() -> None:
    blind = read_vocabulary(None, size=10, label="blind")
    assert align(blind, read_vocabulary(None, size=10, label="other")) == Alignment(base_size=10, reward_size=10)
    with pytest.raises(VocabularyError, match="blind has 10 token ids and other has 11"):
        align(blind, read_vocabulary(None, size=11, label="other"))


def test_a_token_the_reward_does_not_know_is_never_produced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the whole: the base's extra token has probability 0 while the reward weighs, and its own while not."""
    large = tiny_tokenizer(extra=("[PAD]",))
    base = tiny_model(seed=0, vocab_size=VOCAB_SIZE + 1)
    reward = tiny_model(seed=1)
    save_member(base, tmp_path / "base", large)
    save_member(reward, tmp_path / "reward")
    report = compose(tmp_path / "base", {"kind": tmp_path / "reward"}, tmp_path / "guided")
    (note,) = report.notes
    assert "does not know 1 of the base's special tokens ('[PAD]')" in note
    assert "every prompt has" not in note
    GuidedForCausalLM.from_members(base, {"kind": reward}, tokenizers={"base": large, "kind": tiny_tokenizer()})
    assert "'kind' does not know 1 of the base's special tokens ('[PAD]')" in caplog.text
    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided")
    ids = torch.tensor([[VOCAB_SIZE, 7, 8], [9, 10, 11]])
    for weight in (1.0, -1.0):
        rows = model(ids, reward_weights=torch.tensor([[weight], [0.0]])).logits
        assert torch.isneginf(rows[0, :, VOCAB_SIZE]).all()
        torch.testing.assert_close(rows.exp().sum(-1), torch.ones(2, 3))
        assert torch.equal(rows[1], base(ids).logits.log_softmax(-1)[1])
    shared = base(ids[1:]).logits[..., :-1].log_softmax(-1) + reward(ids[1:]).logits.log_softmax(-1)
    torch.testing.assert_close(model(ids[1:]).logits[..., :-1], shared.log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("embedding", "head"), [(VOCAB_SIZE, VOCAB_SIZE), (VOCAB_SIZE + 7, VOCAB_SIZE)])
def test_a_prompt_with_an_id_that_the_reward_lacks_is_read_alike_everywhere(embedding: int, head: int) -> None:
    """As what the reward's embedding has there, and as 0 past its end: in `forward` and in the engine."""
    base = tiny_model(seed=0, vocab_size=VOCAB_SIZE + 7)
    reward = tiny_model(seed=1, vocab_size=embedding)
    reward.lm_head = torch.nn.Linear(32, head, bias=False).requires_grad_(False)
    tokenizers = {"base": tiny_tokenizer(), "r": tiny_tokenizer()}
    model = GuidedForCausalLM.from_members(base, {"r": reward}, weights={"r": 0.7}, tokenizers=tokenizers)
    prompt = [8, VOCAB_SIZE + 2, 9, VOCAB_SIZE + 6, 10]
    with Engine(model, tokenizers["base"], EngineOptions(streams=1, context=64)) as engine:
        reply = engine.generate(Request(prompt=prompt, sampling=Sampling(max_new_tokens=4, temperature=0)))
    ids = torch.tensor([[*prompt, *(token.id for token in reply.tokens)]])
    own = reward(torch.where(ids < embedding, ids, 0)).logits.log_softmax(-1)
    own_BTV = (base(ids).logits.log_softmax(-1)[..., :VOCAB_SIZE] + 0.7 * own).log_softmax(-1)
    torch.testing.assert_close(model(ids).logits[..., :VOCAB_SIZE], own_BTV, atol=1e-5, rtol=1e-5)
    for place, token in enumerate(reply.tokens, start=len(prompt) - 1):
        assert token.rewards["r"] == pytest.approx(own[0, place, token.id].item(), abs=1e-4)
        assert token.id == own_BTV[0, place].argmax()


def test_tokens_of_every_prompt_that_a_reward_does_not_know_are_named(tmp_path: Path) -> None:
    """Its training has never shown it the base's chat template."""
    chat = tiny_tokenizer(extra=("<turn>",))
    chat.chat_template = f"<turn> {chat.chat_template}"
    save_member(tiny_model(seed=0, vocab_size=VOCAB_SIZE + 1), tmp_path / "base", chat)
    save_member(tiny_model(seed=1), tmp_path / "reward")
    notes = compose(tmp_path / "base", {"kind": tmp_path / "reward"}, tmp_path / "guided").notes
    assert any("every prompt has '<turn>', so train it with the base's tokenizer" in note for note in notes)


def test_real_tokenizers() -> None:
    folder = SHARED / "models"
    if not folder.exists():
        pytest.skip("the real models of ../shared are not here")
    small, stories = (AutoTokenizer.from_pretrained(folder / name) for name in ("lm-small", "stories260k"))
    assert align(vocabulary(small), vocabulary(AutoTokenizer.from_pretrained(folder / "lm-tiny"))).unknown == ()
    with pytest.raises(VocabularyError, match="different vocabularies"):
        align(vocabulary(small), vocabulary(stories))


def test_the_tiny_tokenizer_is_what_the_tests_believe() -> None:
    assert tiny_tokenizer().get_vocab() == {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
