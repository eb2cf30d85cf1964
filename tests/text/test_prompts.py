"""Prompts and responses as token ids, against what the tokenizers themselves say."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from builders.templates import THINKING
from builders.tiny import SHARED, save_member, tiny_model, tiny_tokenizer
from genarm.data.columns import read_messages
from genarm.errors import ConfigError, ConversationError, DataError
from genarm.lab.accuracy.pairs import Limits, encode, read_pairs
from genarm.lab.accuracy.report import command
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.evaluation.prompts import read_questions
from genarm.lab.evaluation.recipe import PromptSpec
from genarm.server.schema import Message
from genarm.text.detokenizer import token_texts
from genarm.text.prompts import (
    OWN_ARGUMENTS,
    Reading,
    as_conversation,
    encode_pair,
    encode_prompt,
    plain_message,
    read_template_args,
)
from genarm.training.config import TrainConfig, make_config, to_toml, training_differences
from genarm.training.data import load_pairs
from genarm.training.prompts import load_prompts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, as byte-level BPE is for text it has not seen."""
    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def test_a_conversation_goes_through_the_template() -> None:
    tokenizer = tiny_tokenizer()
    prompt, response = encode_pair(tokenizer, as_conversation("w1 w2", system="w9"), "w3 w4")
    assert tokenizer.decode(prompt) == "<system> w9 <end> <user> w1 w2 <end> <assistant>"
    assert tokenizer.decode(response) == "w3 w4 <end>"
    assert prompt == encode_prompt(tokenizer, as_conversation("w1 w2", system="w9"))


TRIMS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
"""As Llama 3's does."""


@pytest.mark.parametrize("template", [TRIMS, TRIMS.replace(" | trim", "")])
@pytest.mark.parametrize("said", ["", "e", "n", "The end", "\n a  b", "Hello<|end|>", "<|assistant|>\n\n"])
@pytest.mark.parametrize("plain", [False, True])
def test_an_assistants_message_is_continued_where_it_stops(template: str, said: str, plain: bool) -> None:
    """Against transformers' own; it takes the template's own line breaks for those of an empty message."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    messages = [*as_conversation("e n"), {"role": "assistant", "content": said}]
    expected = "<|user|>\n\ne n<|end|>\n<|assistant|>\n\n"
    if said.strip() == said != "":
        expected = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    else:
        expected += said.lstrip() if template == TRIMS else said
    ids = encode_prompt(tokenizer, messages, Reading(plain_user_text=plain), continued=True)
    assert tokenizer.decode(ids) == expected
    typed = plain and ("<|" in said)
    assert (ids == tokenizer(expected).input_ids) != typed


def test_after_an_assistants_message_nothing_is_guessed(tmp_path: Path) -> None:
    """Whoever reads a conversation: another turn of the assistant only where somebody asks for one."""
    tokenizer = tiny_tokenizer()
    messages = [*as_conversation("w1"), {"role": "assistant", "content": "w2"}]
    source = tmp_path / "q.jsonl"
    source.write_text(json.dumps({"said": messages}) + "\n", encoding="utf-8")
    spec = PromptSpec(data=str(source), count=1, column="said")
    for read in (
        lambda: encode_prompt(tokenizer, messages),
        lambda: encode_pair(tokenizer, messages, "w3"),
        lambda: read_questions(spec, str(source), tokenizer, 50),
    ):
        with pytest.raises(ConversationError, match=r"ends with a message of the assistant; it must end with one to"):
            read()
    begun = encode_prompt(tokenizer, messages, continued=False)
    assert tokenizer.decode(begun) == "<user> w1 <end> <assistant> w2 <end> <assistant>"
    with pytest.raises(ConversationError, match=r"only an assistant's message can be continued, .* of the user"):
        encode_prompt(tokenizer, messages[:1], continued=True)


def test_a_message_that_the_template_changes_is_not_continued() -> None:
    """Reasoning that the template leaves out of earlier turns, say."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'].split('=')[-1] }}{% endfor %}"
    messages = [*as_conversation("w1"), {"role": "assistant", "content": "w2=w3"}]
    with pytest.raises(ConversationError, match="does more with the last message than write it down"):
        encode_prompt(tokenizer, messages, continued=True)


# Chat templates that do not write down all that they are given.
_USER = "{% for m in messages %}{% if m['role'] == 'user' %}<user> "
_REPLY = " {% elif m['role'] == 'assistant' %}<assistant> "
_REST = " <end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
_SAID = "{{ m['content'] }}"
_TWO = _USER + _SAID + _REPLY + "{{ m['content'].split('</think>')[-1] }}" + _REST


@pytest.mark.parametrize("user", [_SAID, "{{ m['content'] | replace('w3', 'w4') }}", "", "{{ loop.index }}"])
@pytest.mark.parametrize("reply", ["{{ m['content'] | trim }}", "{{ m['content'].split('</think>')[-1] }}"])
def test_what_a_template_leaves_out_is_refused(user: str, reply: str) -> None:
    """Every word that is said is read, or the conversation is refused; what an assistant thought earlier may go."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _USER + user + _REPLY + reply + _REST
    said = {"role": "user", "content": " w1\n w3 "}
    thought = "w5 </think> w6"
    for role in ("system", "developer", "human", "tool"):
        with pytest.raises(ConversationError, match=f"leaves out or changes the message of the role '{role}'"):
            encode_prompt(tokenizer, [{"role": role, "content": "w7"}, said])
    if user != _SAID:
        with pytest.raises(ConversationError, match="of the role 'user', so the model would not read it; use another"):
            encode_prompt(tokenizer, [said])
        return
    earlier = [said, {"role": "assistant", "content": thought}, said]
    assert "w6" in tokenizer.decode(encode_prompt(tokenizer, earlier))
    if "trim" in reply:
        assert tokenizer.decode(encode_pair(tokenizer, earlier, f" {thought}")[1]).startswith("w5")
    else:
        with pytest.raises(ConversationError, match="does not write the response down as it is"):
            encode_pair(tokenizer, earlier, thought)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("template", "messages", "role"),
    [
        (_TWO, [said("user", "w1 w2 w3"), said("assistant", "w4"), said("tool", "w2")], "tool"),
        (_TWO, [said("system", "w2 w3"), said("user", "w1 w2 w3")], "system"),
        (_TWO, [said("User", "w1"), said("user", "w1 w2")], "User"),
        (
            _TWO,
            [said("system", "w1"), said("user", "w1"), said("assistant", "w5 </think> w6"), said("user", "w7")],
            "system",
        ),
        ("{{ messages[-1]['content'] }}", [said("user", "w1"), said("assistant", "w2"), said("user", "w1 w3")], "user"),
        (
            "{{ messages[0]['content'] }} {{ messages[-1]['content'] }}",
            [said(r, "w1") for r in ("user", "assistant", "user")],
            "assistant",
        ),
    ],
)
def test_what_a_template_leaves_out_is_noticed_where_another_message_has_its_text(
    template: str, messages: list[dict[str, str]], role: str
) -> None:
    """Also once the same messages without the one that is lost have been read."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encode_prompt(tokenizer, [messages[-1] if messages[-1]["role"] == "user" else said("user", "w1")])
    for _ in range(2):
        with pytest.raises(ConversationError, match=f"leaves out or changes the message of the role '{role}'"):
            encode_prompt(tokenizer, messages)


def test_no_message_is_missed_that_says_nothing_or_whose_place_its_text_decides() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _TWO
    for empty in ("", " \n"):
        ids = encode_prompt(tokenizer, [said("system", empty), said("user", "w1")])
        assert tokenizer.decode(ids) == "<user> w1 <assistant>"
    for checks in ("{% if 'w' not in m['content'] %}{{ raise_exception('no word') }}{% endif %}", ""):
        tokenizer.chat_template = (
            "{% for m in messages %}"
            + checks
            + "{% if 'w' in m['content'] %}{{ m['content'] }} {% endif %}{% endfor %}"
        )
        assert tokenizer.decode(encode_prompt(tokenizer, [said("system", "w1"), said("user", "w2")])) == "w1 w2"


def test_a_conversation_of_known_roles_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What checks the template costs the first of many conversations alone."""
    tokenizer = tiny_tokenizer()
    rendered: list[Any] = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: (rendered.append(a), render(*a, **k))[1])
    for i in range(5):
        encode_prompt(tokenizer, [said("system", f"w{i}"), said("user", f"w{i}")])
    assert len(rendered) == 6
    tokenizer.chat_template = _TWO  # another template, another look at it
    with pytest.raises(ConversationError, match="of the role 'system'"):
        encode_prompt(tokenizer, [said("system", "w1"), said("user", "w1")])


def test_plain_text_ends_with_one_eos() -> None:
    tokenizer = tiny_tokenizer()
    for response in ("w3 w4", "w3 w4 <end>"):
        assert encode_pair(tokenizer, "w1 w2", response)[1] == tokenizer("w3 w4 <end>").input_ids


def test_what_the_template_puts_after_the_end_is_no_part_of_the_response() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> w0 {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    assert tokenizer.decode(encode_pair(tokenizer, as_conversation("w1"), "w2")[1]) == "w2 <end>"


def test_a_token_never_straddles_the_boundary() -> None:
    """Decoding sees the prompt's own ids, so a merge of its last and the response's first letters is impossible."""
    raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert tokenizer("ab").input_ids == [2]
    assert encode_pair(tokenizer, "a", "b") == ([0], [1])


def test_what_cannot_be_encoded_says_so() -> None:
    plain, chat = byte_tokenizer(), tiny_tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(plain, as_conversation("hello"))
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompt(plain, "")
    chat.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(ConversationError, match="does not take this conversation: no system message, please"):
        encode_prompt(chat, as_conversation("w1"))
    chat.chat_template = "{% for m in messages %}{{ loop.length }} {{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="changes the prompt once a response follows"):
        encode_pair(chat, as_conversation("w1"), "w2")


@pytest.mark.parametrize("text", ["plain words here", "naïve café – 日本語 🙂!", " leading and  double  spaces", "日"])
def test_pieces_join_to_the_text(text: str, tmp_path: Path) -> None:
    tokenizers: list[PreTrainedTokenizerBase] = [byte_tokenizer()]
    folder = SHARED / "models"
    if folder.exists():
        tokenizers += [AutoTokenizer.from_pretrained(folder / name) for name in ("lm-small", "stories260k")]
    for tokenizer in tokenizers:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        pieces = token_texts(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert not any("\ufffd" in piece for piece in pieces)


# --- template arguments ---------------------------------------------------------------------------------------------


def test_template_arguments_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    chat = as_conversation("w1")
    reading = Reading(template_args=read_template_args(["enable_thinking=false"]))
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False, return_dict=False)
    assert encode_prompt(tokenizer, chat, reading) == expected
    assert encode_prompt(tokenizer, chat, reading) == [*encode_prompt(tokenizer, chat), 6]
    assert encode_prompt(tokenizer, "w1", reading) == [7]


def test_template_arguments_are_json_or_text() -> None:
    found = read_template_args(["a=false", "b=2", 'c=["x", null]', "d=today", "e=a=b", "f=NaN", "g=", 'h="false"'])
    assert found == {"a": False, "b": 2, "c": ["x", None], "d": "today", "e": "a=b", "f": "NaN", "g": "", "h": "false"}


def test_template_arguments_that_would_do_nothing_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    chat = as_conversation("w1")
    with pytest.raises(ConfigError, match=r"no argument 'enable_thinkin'; did you mean enable_thinking\?"):
        encode_prompt(tokenizer, chat, Reading(template_args={"enable_thinkin": True}))
    with pytest.raises(ConfigError, match=r"no argument 'documents'; those it reads are: closed, enable_thinking"):
        encode_prompt(tokenizer, chat, Reading(template_args={"documents": []}))
    with pytest.raises(ConfigError, match="'tokenize' is decided here"):
        Reading(template_args={"tokenize": True})
    with pytest.raises(ConfigError, match="cannot be the name"):
        Reading(template_args={"a b": True})
    for wrong in ("enable_thinking", "=false"):
        with pytest.raises(ConfigError, match="write NAME=VALUE"):
            read_template_args([wrong])
    with pytest.raises(ConfigError, match="gives a twice"):
        read_template_args(["a=1", "a=2"])


GEMMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ role }} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}model {% endif %}"
)


def test_what_a_template_sets_for_itself_is_no_argument() -> None:
    """Gemma's `role`, say; what it sets where nobody has given it is one, as in Llama's."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GEMMA
    with pytest.raises(ConfigError, match=r"no argument 'role'; those it reads are: none"):
        encode_prompt(tokenizer, as_conversation("w1"), Reading(template_args={"role": "w9"}))
    with pytest.raises(ConversationError, match=r"System role not supported; if that is for the system message, put"):
        encode_prompt(tokenizer, as_conversation("w1", system="w2"))
    for reads in (
        "{% if not date is defined %}{% set date = 'w2' %}{% endif %}",
        "{% set date = date if date is defined else 'w2' %}",
    ):
        tokenizer.chat_template = reads + "{{ date }} {{ messages[0]['content'] }}"
        ids = encode_prompt(tokenizer, as_conversation("w1"), Reading(template_args={"date": "w9"}))
        assert tokenizer.decode(ids) == "w9 w1"


def test_names_that_are_not_the_users_are_all_of_the_librarys() -> None:
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(own) - {"self", "kwargs", "documents"} <= OWN_ARGUMENTS


def test_messages_as_clients_send_them() -> None:
    """Text parts, and what asks for nothing; anything else is left for the reader to refuse."""
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2", "image_url": None}]
    for message, plain in [
        ({"role": "user", "content": parts}, {"role": "user", "content": "w1 w2"}),
        ({"role": "user", "content": "w1", "name": None, "tool_calls": []}, {"role": "user", "content": "w1"}),
        ({"role": "assistant", "content": None, "refusal": None}, {"role": "assistant", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
    ]:
        assert plain_message(message) == plain
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    nothing = [{"role": "user", "content": None}, {"role": "user"}, "w1", 3]
    for message in (called, *nothing):
        assert plain_message(message) == message


def by_files(parts: list[Any]) -> str:
    return str(plain_message({"role": "user", "content": parts})["content"])


def by_pairs(parts: list[Any]) -> str:
    return read_messages({"prompt": [{"role": "user", "content": parts}]}, "prompt")[0]["content"]


def by_server(parts: list[Any]) -> str:
    return Message.model_validate({"role": "user", "content": parts}).text


@pytest.mark.parametrize("read", [by_files, by_pairs, by_server])
def test_parts_are_text_wherever_they_are_read(read: Callable[[list[Any]], str]) -> None:
    """One rule for files, training data and the server; what is more than text is named."""
    for parts in (
        [],
        [{"type": "text", "text": "w1"}],
        [{"type": "text", "text": "w1", "image_url": None}, {"text": " w2"}],
        [{"type": "text", "text": "w1", "cache_control": {"type": "ephemeral"}}],
    ):
        assert read(parts) == "".join(part["text"] for part in parts)
    for part, problem in (
        ({"type": "input_text", "text": "w1"}, "has a part of the type 'input_text'"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "has a part of the type 'image_url'"),
        ({"type": ["text"], "text": "w1"}, r"has a part of the type \['text'\]"),
        ({"type": "text", "text": "w1", "image": "a.png"}, "has a part with the key 'image'"),
        ({"type": "text", "text": 3}, "has a part whose text is a number"),
        ({"type": "text"}, "has a part whose text is missing"),
        ("w1", "has a text among its parts"),
    ):
        with pytest.raises(ValueError, match=f'{problem}.*; it must be a text or a list of {{"type": "text"'):
            read([{"type": "text", "text": "w0"}, part])


def test_template_arguments_in_training_and_accuracy(tmp_path: Path) -> None:
    """Pairs and prompts are encoded as `generate` will with the same argument, and the settings keep it."""
    tokenizer = tiny_tokenizer()
    thought = "{{ 'w0 ' if m['role'] == 'assistant' and enable_thinking is defined and not enable_thinking else '' }}"
    tokenizer.chat_template = THINKING.replace("{{ m['content'] }}", thought + "{{ m['content'] }}")
    said = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "w2 w2"), ("rejected", "w3"))}
    pair = {"prompt": as_conversation("w1"), **said}
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(pair) + "\n")
    settings = {"model": str(save_member(tiny_model(), tmp_path / "model", tokenizer)), "data": str(data)}
    config = TrainConfig(
        **settings,
        output=tmp_path / "out",
        template_arg=["enable_thinking=false"],
        eval_fraction=0.0,
        max_prompt_tokens=20,
        max_response_tokens=20,
    )
    expected = encode_prompt(tokenizer, pair["prompt"], config.reading)
    assert expected != encode_prompt(tokenizer, pair["prompt"])
    assert list(load_pairs(config, tokenizer).training[0].prompt_ids) == expected
    assert load_prompts(config, tokenizer).training[0] == expected
    (tmp_path / "run.toml").write_text(to_toml(config))
    again = make_config({}, tmp_path / "run.toml")
    assert again.template_arg == config.template_arg == ("enable_thinking=false",)
    other = dataclasses.replace(config, template_arg=())
    assert training_differences(config, other) == ["--template-arg was ('enable_thinking=false',), is ()"]
    with pytest.raises(ConfigError, match="no argument 'x'"):
        load_pairs(dataclasses.replace(config, template_arg=("x=1",)), tokenizer)
    with pytest.raises(ConfigError, match="write NAME=VALUE"):
        dataclasses.replace(config, template_arg=("x",))
    accuracy = AccuracySettings(models=(settings["model"],), data=str(data), template_arg=config.template_arg)
    assert "--template-arg enable_thinking=false" in command(accuracy)
    encoded = encode(tokenizer, read_pairs(accuracy), Limits(prompt=20, response=20), [1], accuracy.reading)
    assert list(encoded.pairs[0].prompt_ids) == expected
    spec = PromptSpec(data=str(data), count=1, template_args={"enable_thinking": False})
    assert list(read_questions(spec, str(data), tokenizer, 20)[0].ids) == expected
    with pytest.raises(ConfigError, match="no argument 'x'"):
        read_questions(dataclasses.replace(spec, template_args={"x": 1}), str(data), tokenizer, 20)


@pytest.mark.parametrize(
    ("split", "numbers"), [("train", [0, 2]), ("train[:3]", [0, 2]), ("train[1:]", [None, None]), ("train[50%:]", None)]
)
def test_a_question_knows_its_place_in_the_data(split: str, numbers: list[int | None] | None, tmp_path: Path) -> None:
    """Rows that are left out count, and of a part that begins later nothing is known."""
    data = tmp_path / "rows.jsonl"
    asked = ["w1", "w1", "w2", "w3"]
    data.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in asked))
    spec = PromptSpec(data=str(data), count=2, split=split, column="instruction")
    found = read_questions(spec, str(data), tiny_tokenizer(), 20)
    assert [question.number for question in found] == (numbers or [None, None])
