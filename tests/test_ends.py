"""A response ends where decoding ends: the same ids in training, scoring and decoding, whatever the template writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from genarm.engine import Engine, EngineOptions, Request
from genarm.errors import ConversationError
from genarm.lab.accuracy.models import open_rewards
from genarm.lab.accuracy.pairs import encode, limits, read_pairs
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.replies import sample_replies
from genarm.model.compose import compose
from genarm.model.references import open_files
from genarm.sampling import Sampling, stop_ids
from genarm.text.prompts import as_conversation, encode_pair, encode_prompt, end_ids
from genarm.training.config import TrainConfig
from genarm.training.data import load_pairs
from genarm.training.loading import load_weights

EXTRA = ("<turn>", "<eot>", "<call>")

# Templates by how they close a turn: name → (what follows the text, what of it a response keeps). EOS is <end>.
TAILS = {
    "eos": ("<end>", "<end>"),
    "eos and a newline (ChatML)": ("<end>\n", "<end>"),
    "another token and a newline (Gemma)": ("<eot>\n", "<eot>"),
    "another token, then EOS (Phi-3)": ("<eot>\n<end>", "<eot>"),
    "EOS, then text": ("<end> w0", "<end>"),
    "nothing": ("", "<end>"),
    "text alone": ("\n w9", "w9 <end>"),
}


def tokenizer_with(tail: str) -> PreTrainedTokenizerBase:
    """<end> is EOS, and every turn is closed by `tail`."""
    tokenizer = tiny_tokenizer(extra=EXTRA)
    tokenizer.chat_template = (
        "{% for m in messages %}<turn> <{{ m['role'] }}> {{ m['content'] | trim }} " + tail + " {% endfor %}"
        "{% if add_generation_prompt %}<turn> <assistant> {% endif %}"
    )
    return tokenizer


def write_gemma(folder: Path, *, ends: list[int] | int = 1) -> Path:
    """A model whose turns end with <eot> while its files name EOS (and `ends`) alone."""
    tokenizer = tokenizer_with("<eot>\n")
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return save_member(model, folder, tokenizer)


@pytest.mark.parametrize("name", TAILS)
def test_a_response_ends_at_the_first_token_that_ends_decoding(name: str) -> None:
    tail, kept = TAILS[name]
    tokenizer = tokenizer_with(tail)
    prompt, response = encode_pair(tokenizer, as_conversation("w1"), "w2 w3")
    assert prompt == encode_prompt(tokenizer, as_conversation("w1"))
    assert tokenizer.decode(response) == f"w2 w3 {kept}"
    ends = end_ids(None, tokenizer)
    assert [token in ends for token in response] == [False] * (len(response) - 1) + [True]


def test_a_token_that_a_generation_config_names_ends_a_response_too() -> None:
    tokenizer = tokenizer_with("<call> <end>")
    call = tokenizer.convert_tokens_to_ids("<call>")
    tokenizer.chat_template = tokenizer.chat_template.replace("<call> <end>", "<call> {{ '<end>' }}")
    ends = end_ids(GenerationConfig(eos_token_id=[call, 1]), tokenizer)
    assert tokenizer.decode(encode_pair(tokenizer, as_conversation("w1"), "w2", ends=ends)[1]) == "w2 <call>"
    assert tokenizer.decode(encode_pair(tokenizer, "w1", "w2", ends=ends)[1]) == "w2 <end>"
    tokenizer.eos_token = None
    assert tokenizer.decode(encode_pair(tokenizer, "w1", "w2", ends=[call])[1]) == "w2 <call>"


def test_a_response_that_goes_on_after_its_end_is_refused() -> None:
    tokenizer = tokenizer_with("<eot>\n")
    for prompt in ("w1", as_conversation("w1")):
        with pytest.raises(ConversationError, match="decoding would end at <eot> inside it"):
            encode_pair(tokenizer, prompt, "w2 <eot> w3")
        for closed in ("w2 <eot>", "w2 <eot> <end>", "w2 <eot>\n"):
            assert tokenizer.decode(encode_pair(tokenizer, prompt, closed)[1]) == "w2 <eot>"
    # A template without a generation prompt closes the user's turn only once a reply follows.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index > 1 %}<end> {% endif %}{{ m['content'] }} {% endfor %}"
    )
    with pytest.raises(ConversationError, match="decoding would end at <end> at its beginning"):
        encode_pair(tokenizer, as_conversation("w1"), "w2")


@pytest.mark.parametrize("ends", [1, [1, 48]])
def test_all_parts_know_the_same_ends(ends: list[int] | int, tmp_path: Path) -> None:
    folder = write_gemma(tmp_path / "model", ends=ends)
    reward = write_gemma(tmp_path / "reward")
    compose(folder, {"a": reward}, tmp_path / "guided")
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": f"w{i}"}],
                    "chosen": [{"role": "assistant", "content": "w2 w3"}],
                    "rejected": [{"role": "assistant", "content": "w4"}],
                }
            )
            + "\n"
            for i in range(4)
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eot = tokenizer.convert_tokens_to_ids("<eot>")
    expected = sorted({1, eot, *(ends if isinstance(ends, list) else [])})
    config = TrainConfig(
        model=str(folder),
        data=str(tmp_path / "pairs.jsonl"),
        output=tmp_path / "arm",
        max_prompt_tokens=16,
        max_response_tokens=16,
    )
    plain = AutoModelForCausalLM.from_pretrained(folder)
    guided = AutoModelForCausalLM.from_pretrained(tmp_path / "guided")
    assert list(open_files(str(folder)).end_ids) == expected
    assert list(open_files(str(tmp_path / "guided")).end_ids) == expected
    assert stop_ids(plain, tokenizer) == stop_ids(guided, tokenizer) == expected
    assert guided.generation_config.eos_token_id == expected  # transformers' own `generate`
    assert load_weights(config, tokenizer, AutoModelForCausalLM).generation_config.eos_token_id == expected
    # Decoding: the only likely token ends the reply.
    ids = encode_prompt(tokenizer, as_conversation("w1"))
    for end in expected:
        sampling = Sampling(max_new_tokens=3, temperature=0, logit_bias={end: 100.0})
        with Engine(AutoModelForCausalLM.from_pretrained(folder), tokenizer, EngineOptions(streams=1)) as engine:
            (reply,) = engine.generate([Request(prompt=ids, sampling=sampling)])
        assert ([t.id for t in reply.tokens], reply.ending) == ([end], "stop")
    # Training and accuracy.
    pairs = load_pairs(config, tokenizer).training
    assert all(tokenizer.decode(pair.chosen_ids) == "w2 w3 <eot>" for pair in pairs)
    settings = AccuracySettings(models=(str(folder),), data=config.data)
    files = open_rewards(str(folder), trust_remote_code=False)
    found = encode(files.tokenizer, read_pairs(settings), limits(settings, 128, model="m"), files.ends)
    assert [pair.chosen_ids for pair in found.pairs[:1]] == [pairs[0].chosen_ids]
    assert guided.token_rewards(as_conversation("w1"), "w2 w3").token_ids == tuple(pairs[0].chosen_ids)
    assert sample_replies(guided, tokenizer, [ids], Sampling(max_new_tokens=60), seed=0)[0].token_ids[-1] in expected
