"""A real chat model through every door: SmolLM2-135M-Instruct, which `scripts/real-model .real-model` brings.

Tiny random models show that numbers are right; this one has a real template, a real vocabulary of bytes and words, tied
embeddings and 30 layers, and what it writes can be read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from builders.real import REAL, USES_REAL
from genarm import GuidedForCausalLM
from genarm.cli.main import main
from genarm.engine import Engine, EngineOptions, Request
from genarm.lab.evaluation.prompts import read_questions
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.sampling import Sampling

pytestmark = USES_REAL

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHARED = RECIPES.parents[1] / "shared"

QUESTIONS = {
    "How do I boil an egg?": "Put it in boiling water for eight minutes.",
    "What is the capital of France?": "The capital of France is Paris.",
    "Can you greet me in Japanese?": "こんにちは！お元気ですか。",
    "How do I keep a cat happy?": "Play with it every day and give it a quiet place to sleep 🐈.",
    "Why is the sky blue?": "The air scatters blue light more than red light.",
    "How can I sleep better?": "Go to bed at the same hour each night.",
    "What should I cook tonight?": "Fry some onions and rice, and add an egg.",
    "How do I say sorry?": "Say what you did, and that you will not do it again.",
}
WARM, CURT = "What a lovely question! {} I hope this helps you 😊!", "{}"
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Tell me about the sea in two sentences."}],
    [{"role": "system", "content": "You like emoji."}, {"role": "user", "content": "Write 🎉 and 你好 in one line."}],
    [
        {"role": "user", "content": "My name is Zoë."},
        {"role": "assistant", "content": "Hello Zoë!"},
        {"role": "user", "content": "What is my name?"},
    ],
]
WEIGHTS = [{"warm": 1.0, "curt": 0.0}, {"warm": 0.5, "curt": -0.5}, {"warm": 0.0, "curt": 0.0}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA ARMs of 8 steps on opposite preferences, and a guided folder of both."""
    root = tmp_path_factory.mktemp("real")
    for name, (chosen, rejected) in {"warm": (WARM, CURT), "curt": (CURT, WARM)}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": chosen.format(answer)}],
                "rejected": [{"role": "assistant", "content": rejected.format(answer)}],
            }
            for question, answer in QUESTIONS.items()
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["--lora", "--max-steps", "8", "--batch-size", "2", "--accumulation", "1", "--eval-fraction", "0"]
        data = ["--data", str(root / f"{name}.jsonl"), "--output", str(root / name)]
        assert main(["train", "--model", str(REAL), *data, *options, "--epochs", "2"]) == 0
    rewards = [f"--reward=warm={root / 'warm'}:1.0", f"--reward=curt={root / 'curt'}:0.0"]
    assert main(["compose", "--base", str(REAL), *rewards, "--output", str(root / "guided")]) == 0
    return root


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REAL)


@pytest.fixture(scope="module")
def model(root: Path) -> GuidedForCausalLM:
    return GuidedForCausalLM.from_pretrained(root / "guided", dtype="float32")


@pytest.fixture(scope="module")
def engine(root: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    """On a model of its own, since an engine takes its model over."""
    own = GuidedForCausalLM.from_pretrained(root / "guided", dtype="float32")
    with Engine(own, tokenizer, EngineOptions(streams=4, context=256)) as engine:
        yield engine


def ids_of(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]]) -> list[int]:
    text = str(tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False))
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_engine_and_generate_write_the_same_under_two_rewards(
    engine: Engine, model: GuidedForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Greedy, side by side, with weights of each conversation's own; at weight 0 it is the plain base."""
    base = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    sampling = Sampling(max_new_tokens=24, temperature=0)
    replies = engine.generate(
        [Request(prompt=c, weights=w, sampling=sampling) for c, w in zip(CHATS, WEIGHTS, strict=True)]
    )
    for chat, weights, reply in zip(CHATS, WEIGHTS, replies, strict=True):
        ids_BT = torch.tensor([ids_of(tokenizer, chat)])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids_BT)}
        guided = model.generate(ids_BT, reward_weights=weights, **options)[0, ids_BT.shape[1] :].tolist()
        assert list(reply.token_ids) == guided
        if not any(weights.values()):
            assert guided == base.generate(ids_BT, **options)[0, ids_BT.shape[1] :].tolist()
    assert len({reply.text for reply in replies}) == len(replies)


def test_guided_numbers_are_the_product_of_the_members(root: Path, engine: Engine) -> None:
    """log π of every token against peft and transformers by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    sampling = Sampling(max_new_tokens=12, temperature=0)
    (reply,) = engine.generate([Request(prompt=CHATS[0], weights=WEIGHTS[1], sampling=sampling)])
    prompt = ids_of(tokenizer, CHATS[0])
    total_TV = logits_of(None, [*prompt, *reply.token_ids]).log_softmax(-1)
    for name, weight in WEIGHTS[1].items():
        total_TV = total_TV + weight * logits_of(root / name, [*prompt, *reply.token_ids]).log_softmax(-1)
    guided_TV = total_TV.log_softmax(-1)
    for i, token in enumerate(reply.tokens):
        assert token.log_prob == pytest.approx(float(guided_TV[len(prompt) - 1 + i, token.id]), abs=1e-4)


def logits_of(adapter: Path | None, ids: Sequence[int]) -> torch.Tensor:
    model: PreTrainedModel | PeftModel = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([list(ids)])).logits[0]


TEXTS = ["🎉🎊 a party 👩‍👩‍👧!", "你好，世界。再见", "if x != y:\n\treturn 'é' # naïve …", "  two  spaces 😀 and я"]


@pytest.mark.parametrize("text", TEXTS)
def test_streams_lose_nothing_of_broken_characters(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    """Replies drawn from the tokens of a text in any order are full of characters that never become whole."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    sampling = Sampling(max_new_tokens=40, logit_bias=dict.fromkeys(ids, 90.0), temperature=2.0)
    for seed in range(2):
        request = Request(prompt=CHATS[1], sampling=sampling, seed=seed, weights=WEIGHTS[2])
        pieces: list[str] = []
        tokens: list[int] = []
        for token in engine.stream(request):
            pieces.append(token.text)
            tokens.append(token.id)
        assert set(tokens) <= set(ids)
        assert "".join(pieces) == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_accuracy_is_the_sum_that_anybody_can_do(
    root: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rewards of `genarm accuracy` against Σ log π of the template's own text, and what eight steps have taught."""
    result = tmp_path / "accuracy.json"
    data = ["--data", str(root / "warm.jsonl"), "--dtype", "float32", "--output", str(result)]
    assert main(["accuracy", str(root / "warm"), str(root / "curt"), *data]) == 0
    scores = [json.loads(line)["scores"] for line in result.with_suffix(".pairs.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (root / "warm.jsonl").read_text().splitlines()]
    for row, found in list(zip(rows, scores, strict=True))[:3]:
        prompt = ids_of(tokenizer, row["prompt"])
        for side in ("chosen", "rejected"):
            whole = str(tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)).rstrip("\n")
            ids = list(tokenizer(whole, add_special_tokens=False).input_ids)
            assert ids[: len(prompt)] == prompt
            assert ids[-1] == tokenizer.eos_token_id
            log_probs_TV = logits_of(root / "warm", ids).log_softmax(-1)
            own = sum(float(log_probs_TV[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
            assert found["warm"][side] == pytest.approx(own, abs=1e-2)
            assert found["warm"][f"{side}_tokens"] == len(ids) - len(prompt)
    margins = {name: [s[name]["chosen"] - s[name]["rejected"] for s in scores] for name in ("warm", "curt")}
    assert all(warm > curt for warm, curt in zip(margins["warm"], margins["curt"], strict=True))


def test_a_round_trip_through_the_server(root: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """OpenAI's client gets the engine's replies, whole and in pieces, and offsets of a text that is full of bytes."""
    with serving(root / "guided") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for chat, weights in zip(CHATS, WEIGHTS, strict=True):
            asked: dict[str, Any] = {
                "model": "guided",
                "messages": chat,
                "temperature": 0,
                "max_tokens": 16,
                "extra_body": {"reward_weights": weights},
            }
            whole = client.chat.completions.create(**asked).choices[0].message.content
            pieces = [
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
            ]
            sampling = Sampling(max_new_tokens=16, temperature=0)
            (expected,) = engine.generate([Request(prompt=chat, weights=weights, sampling=sampling)])
            assert whole == "".join(pieces) == expected.text
        for text in TEXTS:
            echoed = client.completions.create(model="guided", prompt=text, max_tokens=1, logprobs=0, echo=True)
            logprobs = echoed.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.text_offset is not None
            ids = tokenizer(text, add_special_tokens=False).input_ids
            begins = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
            assert logprobs.text_offset[: len(ids)] == begins
            assert echoed.choices[0].text.startswith(text)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "genarm", "serve", str(folder), "--port", "0", "--dtype", "float32"]
    options = ["--device", "cpu", "--context", "256"]
    log = folder.parent / "log"
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "is served at" in line), None)
        assert line is not None, log.read_text()
        yield line.split()[-1]
    finally:
        process.kill()
        process.wait()


def test_the_template_says_where_a_reply_ends(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """A question with one answer: the reply is one turn, and its last token is the end of it."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    sampling = Sampling(max_new_tokens=40, temperature=0)
    (reply,) = engine.generate([Request(prompt=chat, weights=WEIGHTS[2], sampling=sampling)])
    assert "Paris" in reply.text
    assert "<|im_" not in reply.text
    assert reply.ending == "stop"
    assert reply.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}")
@pytest.mark.parametrize("name", ["hh-rlhf", "pku-pareto", "weak-to-strong"])
def test_the_data_has_the_prompts_that_a_recipe_wants(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tests that run these recipes want fewer."""
    prompts = load_recipe(RECIPES / f"{name}.toml", "real").prompts
    data = str(RECIPES.parent / prompts.data)
    assert len(read_questions(prompts, data, tokenizer, 8192)) == prompts.count
