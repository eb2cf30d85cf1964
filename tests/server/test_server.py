"""The server as OpenAI's own client sees it, against the transformers guided model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from builders.serving import CHAT, CONTEXT, PRESETS, TOKENIZER, Running, events, running
from genarm.engine import Request
from genarm.sampling import Sampling, derive_seed

PROMPT = "w1 w2 w3 w4"
IDS = TOKENIZER(PROMPT).input_ids
CHAT_IDS = TOKENIZER("<user> w1 w2 <end> <assistant>").input_ids
BAN = {str(i): -100.0 for i in range(6)}
"""Of special tokens, so that replies are as long as they may be."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def forward(server: Running, ids: Sequence[int], weights: Mapping[str, float]) -> torch.Tensor:
    """Guided log-probs [T, V] by transformers, without a cache."""
    with torch.no_grad():
        return server.model(torch.tensor([list(ids)]), reward_weights=weights, use_cache=False).logits[0]


def greedy(server: Running, ids: Sequence[int], weights: Mapping[str, float], length: int) -> list[int]:
    """By transformers' generate; special tokens are never drawn."""
    output = server.model.generate(
        torch.tensor([list(ids)]),
        do_sample=False,
        max_new_tokens=length,
        reward_weights=weights,
        suppress_tokens=list(range(6)),
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


def ask(server: Running, **fields: Any) -> dict[str, Any]:
    """A chat completion."""
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "seed": 1, "logit_bias": BAN, **fields}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def complete(server: Running, **fields: Any) -> dict[str, Any]:
    """A completion."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 1, "logit_bias": BAN, **fields}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def text(answer: Mapping[str, Any], index: int = 0) -> str:
    choice = answer["choices"][index]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


# --- OpenAI's client ------------------------------------------------------------------------------------------------


def test_openai_client(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny", "tiny@cautious", "tiny@plain"]
    assert client.models.retrieve("tiny@harmless=2").id == "tiny@harmless=2"
    chat = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_completion_tokens=10,
        temperature=0,
        logit_bias={k: int(v) for k, v in BAN.items()},
        extra_body={"reward_weights": {"harmless": 2}, "return_rewards": True},
    )
    weights = {"harmless": 2.0, "helpful": 0.5}
    expected = greedy(server, CHAT_IDS, weights, 10)
    assert chat.choices[0].message.content == TOKENIZER.decode(expected)
    assert (chat.choices[0].finish_reason, chat.choices[0].index, chat.object) == ("length", 0, "chat.completion")
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (5, 10, 15)
    assert chat.id == f"chatcmpl-{chat._request_id}"
    done = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=10, temperature=0, logit_bias={k: int(v) for k, v in BAN.items()}
    )
    expected = greedy(server, IDS, server.model.default_weights, 10)
    assert done.choices[0].text == " " + TOKENIZER.decode(expected)
    # what a client sends back of a reply is taken as it is
    again = client.chat.completions.create(
        model="tiny",
        messages=[*CHAT, chat.choices[0].message.model_dump(), {"role": "user", "content": "w3"}],
        max_tokens=2,
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens == 5 + 10 + 1 + 4


def test_openai_client_streams(server: Running) -> None:
    client = server.openai()
    settings: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**settings)
    pieces = ["", ""]
    ends: dict[int, str | None] = {}
    usage = None
    with client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            assert chunk.object == "chat.completion.chunk"
            for choice in chunk.choices:
                pieces[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ends[choice.index] = choice.finish_reason
            usage = chunk.usage or usage
    assert pieces == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


# --- streams are the answer in pieces -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1.5, "stop": ["w3"]},
        {"logprobs": True, "top_logprobs": 3, "return_rewards": True},
        {"logprobs": True, "n": 2, "stop": ["w1", "w2 "], "max_tokens": 30, "logit_bias": None},
        {"return_rewards": True, "stream_options": {"include_usage": True}},
    ],
)
def test_chat_streams_equal_whole_answers(server: Running, fields: dict[str, Any]) -> None:
    whole = ask(server, **{k: v for k, v in fields.items() if k != "stream_options"})
    with server.http() as client:
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "seed": 1, "logit_bias": BAN, **fields}
        response = client.post("/v1/chat/completions", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert last == "[DONE]"
    count = len(whole["choices"])
    choices: list[dict[str, Any]] = [{"message": {"content": ""}, "content": [], "rewards": []} for _ in range(count)]
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices[piece["index"]]
            choice["message"]["content"] += piece["delta"].get("content", "")
            choice["message"]["role"] = piece["delta"].get("role", choice["message"].get("role"))
            choice["content"] += (piece["logprobs"] or {"content": []})["content"]
            choice["rewards"] += piece.get("rewards", [])
            choice["finish_reason"] = piece["finish_reason"]
    for found, expected in zip(choices, whole["choices"], strict=True):
        assert found["message"] == expected["message"]
        assert found["finish_reason"] == expected["finish_reason"]
        assert_close(found["content"], (expected["logprobs"] or {"content": []})["content"])
        assert_close(found["rewards"], expected.get("rewards", []))
        assert bool(found["rewards"]) == bool(fields.get("return_rewards"))
    if "stream_options" in fields:
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-1]["choices"] == []
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "prompt": [PROMPT, "w9", "w8 w7"]},
        {"logprobs": 3, "echo": True, "return_rewards": True},
        {"logprobs": 0, "echo": True, "max_tokens": 0, "prompt": [PROMPT, "w9"]},
        {"echo": True, "stop": "w3", "stream_options": {"include_usage": True}},
        {"logprobs": 2, "prompt": [IDS, [7, 8]]},
    ],
)
def test_completion_streams_equal_whole_answers(server: Running, fields: dict[str, Any]) -> None:
    whole = complete(server, **{k: v for k, v in fields.items() if k != "stream_options"})
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 1, "logit_bias": BAN, **fields}
    *chunks, last = events(server.post("/v1/completions", {**body, "stream": True}))
    assert last == "[DONE]"
    for i, expected in enumerate(whole["choices"]):
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == i]
        assert "".join(piece["text"] for piece in pieces) == expected["text"]
        assert pieces[-1]["finish_reason"] == expected["finish_reason"]
        joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            for name, values in (piece["logprobs"] or {}).items():
                joined[name] += values
        assert_close(joined, expected["logprobs"] or {key: [] for key in joined})
        rewards = [reward for piece in pieces for reward in piece.get("rewards", [])]
        assert_close(rewards, expected.get("rewards", []))
    if "stream_options" in fields:
        assert chunks[-1]["usage"] == whole["usage"]


def assert_close(found: Any, expected: Any) -> None:
    """The same, numbers up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


# --- numbers --------------------------------------------------------------------------------------------------------


def test_chat_logprobs_and_rewards_are_those_of_the_guided_model(server: Running) -> None:
    """Of the guided distribution itself: bias, penalties and temperature do not show in them."""
    weights = {"harmless": 1.5, "helpful": -0.5}
    answer = ask(
        server,
        reward_weights=weights,
        logprobs=True,
        top_logprobs=4,
        return_rewards=True,
        temperature=0.7,
        presence_penalty=0.5,
    )
    choice = answer["choices"][0]
    ids = TOKENIZER.convert_tokens_to_ids([c["token"].strip() for c in choice["logprobs"]["content"]])
    assert TOKENIZER.decode(ids) == choice["message"]["content"]
    rows = slice(len(CHAT_IDS) - 1, -1)
    nothing = dict.fromkeys(weights, 0.0)
    guided = forward(server, [*CHAT_IDS, *ids], weights)[rows]
    base = forward(server, [*CHAT_IDS, *ids], nothing)[rows]
    alone = {n: (forward(server, [*CHAT_IDS, *ids], {**nothing, n: 1.0})[rows] - base).log_softmax(-1) for n in weights}
    for place, (content, reward) in enumerate(zip(choice["logprobs"]["content"], choice["rewards"], strict=True)):
        token = ids[place]
        assert content["logprob"] == pytest.approx(guided[place, token].item(), abs=1e-4)
        values, best = guided[place].topk(4)
        assert [t["logprob"] for t in content["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
        space = " " if place else ""
        names = [name if name.startswith("<") else space + name for name in TOKENIZER.convert_ids_to_tokens(best)]
        assert [t["token"] for t in content["top_logprobs"]] == names
        assert bytes(content["bytes"]).decode() == content["token"] == reward["token"]
        assert reward["logprob"] == content["logprob"]
        assert reward["base_logprob"] == pytest.approx(base[place, token].item(), abs=1e-4)
        for name, weight in weights.items():
            share = reward["rewards"][name]
            assert share["weight"] == weight
            assert share["logprob"] == pytest.approx(alone[name][place, token].item(), abs=1e-4)
            assert share["contribution"] == pytest.approx(weight * share["logprob"])


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_echo_with_logprobs(server: Running, max_tokens: int, prompt: Any) -> None:
    answer = complete(server, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0)
    choice = answer["choices"][0]
    reply = greedy(server, IDS, server.model.default_weights, max_tokens) if max_tokens else []
    whole = TOKENIZER.decode([*IDS, *reply])
    assert choice["text"] == whole
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == whole
    assert all(
        whole[at:].startswith(token) for at, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    )
    guided = forward(server, [*IDS, *reply], server.model.default_weights)[:-1]
    expected = guided.gather(-1, torch.tensor([*IDS[1:], *reply])[:, None])[:, 0].tolist()
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert logprobs["top_logprobs"][0] is None
    for row, top, token, own in zip(
        guided, logprobs["top_logprobs"][1:], logprobs["tokens"][1:], logprobs["token_logprobs"][1:], strict=True
    ):
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert top[token] == own
    assert answer["usage"].pop("kl") >= 0
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": max_tokens,
        "total_tokens": 4 + max_tokens,
    }
    assert choice["finish_reason"] == "length"


def test_numbers_that_json_does_not_have(server: Running) -> None:
    """A token that a mask or a very strong weight rules out has OpenAI's −9999."""
    from genarm.server.labels import _finite

    assert [_finite(x) for x in (-float("inf"), float("inf"), -1.5)] == [-9999.0, 9999.0, -1.5]
    answer = ask(server, reward_weights={"harmless": 5, "helpful": -5}, logprobs=True, top_logprobs=20)
    json.dumps(answer, allow_nan=False)


# --- parameters -----------------------------------------------------------------------------------------------------


def test_seeds_and_n(server: Running) -> None:
    """Reply i of a seed is the same with any n; without a seed, replies differ."""
    many, one = ask(server, n=4, max_tokens=16), ask(server, max_tokens=16)
    replies = [text(many, i) for i in range(4)]
    assert len(set(replies)) == 4
    assert text(one) == replies[0]
    assert [text(ask(server, n=4, max_tokens=16), i) for i in range(4)] == replies
    assert text(ask(server, seed=-3)) == text(ask(server, seed=-3)) != text(ask(server, seed=3))
    assert len({text(ask(server, seed=None, max_tokens=16)) for _ in range(3)}) == 3
    request = Request(
        prompt=CHAT_IDS,
        sampling=Sampling(max_new_tokens=16, logit_bias={int(k): v for k, v in BAN.items()}),
        seed=derive_seed(1, 2),
    )
    assert server.engine.generate([request])[0].text == replies[2]
    several = complete(server, prompt=["w9", PROMPT], n=2)
    assert [text(several, i) for i in (2, 3)] == [text(complete(server, n=2), i) for i in (0, 1)]


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    """Each against the engine's own reply with that setting."""
    usual_bias = {int(k): v for k, v in BAN.items()}
    usual: dict[str, Any] = {"max_new_tokens": 20, "logit_bias": usual_bias}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": 1e-9}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -1}, {"frequency_penalty": -1.0}),
        ({"top_k": 2}, {"top_k": 2}),
        ({"top_k": -1}, {}),
        ({"min_p": 0.3}, {"min_p": 0.3}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        (
            {"min_tokens": 8, "logit_bias": {**BAN, "1": 20}},
            {"logit_bias": {**usual_bias, 1: 20.0}, "min_new_tokens": 8},
        ),
        ({"logit_bias": {**BAN, "9": 100}}, {"logit_bias": {**usual_bias, 9: 100.0}}),
    ]
    seen = set()
    for asked, sampling in cases:
        request = Request(prompt=CHAT_IDS, sampling=Sampling(**{**usual, **sampling}), seed=derive_seed(1, 0))
        expected = server.engine.generate([request])[0].text
        assert text(ask(server, max_tokens=20, **asked)) == expected
        seen.add(expected)
    assert len(seen) == 11  # top_p of 0 is greedy, top_k of -1 keeps all
    assert text(ask(server, max_tokens=20, temperature=0)) == text(ask(server, max_tokens=20, top_p=0))


def test_stop_strings_and_limits(server: Running) -> None:
    whole = text(ask(server, max_tokens=20))
    words = whole.split()
    for stop in (words[4], [words[6], words[4]]):
        answer = ask(server, max_tokens=20, stop=stop)
        assert text(answer) == whole[: whole.index(words[4])]
        assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(text(complete(server, max_tokens=None)).split()) == 16  # OpenAI's own default
    long = ask(server, max_tokens=None)
    assert long["usage"]["total_tokens"] == CONTEXT
    assert long["choices"][0]["finish_reason"] == "length"
    assert ask(server, max_tokens=3, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    assert text(complete(server, max_tokens=0)) == ""
    for answer in (ask, complete):
        stopped = answer(server, max_tokens=20, stop_token_ids=[TOKENIZER.convert_tokens_to_ids(words[4])])
        if answer is ask:
            assert text(stopped) == whole[: whole.index(words[4])].rstrip()
            assert (stopped["choices"][0]["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", 5)
        going_on = answer(server, max_tokens=9, logit_bias={"1": 100}, ignore_eos=True)
        assert (going_on["choices"][0]["finish_reason"], going_on["usage"]["completion_tokens"]) == ("length", 9)
    ended = ask(server, logit_bias={"1": 100}, logprobs=True)
    assert (text(ended), ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert [c["token"] for c in ended["choices"][0]["logprobs"]["content"]] == ["<end>"]


def test_weights_by_field_alias_and_preset(server: Running) -> None:
    def reply(model: str, weights: Any = None) -> str:
        return text(ask(server, model=model, reward_weights=weights, temperature=0, max_tokens=12))

    def expected(**weights: float) -> str:
        return str(TOKENIZER.decode(greedy(server, CHAT_IDS, {"harmless": 1.0, "helpful": 0.5, **weights}, 12)))

    assert reply("tiny") == expected() == reply("tiny@") == reply("tiny", {})
    assert reply("tiny", {"helpful": -2}) == expected(helpful=-2.0) == reply("tiny@helpful=-2")
    assert reply("tiny@harmless=0,helpful=3") == expected(harmless=0.0, helpful=3.0)
    assert reply("tiny@cautious") == expected(**PRESETS["cautious"])
    assert reply("tiny@cautious", {"helpful": 1}) == expected(harmless=2.0, helpful=1.0)
    assert reply("tiny@plain") == expected(harmless=0.0, helpful=0.0)
    assert len({reply("tiny"), reply("tiny@helpful=-2"), reply("tiny@plain")}) == 3
    rewards = ask(server, model="tiny@plain", return_rewards=True)["choices"][0]["rewards"]
    assert all(token["rewards"] == {} and token["logprob"] == token["base_logprob"] for token in rewards)


def test_messages_of_every_kind(server: Running) -> None:
    def reply(*messages: Any) -> str:
        return text(ask(server, messages=list(messages), temperature=0))

    system = {"role": "system", "content": "w5"}
    assert reply(system, *CHAT) == reply({"role": "developer", "content": "w5"}, *CHAT)
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    assert reply({"role": "user", "content": parts, "name": "me"}) == reply(*CHAT) != reply(system, *CHAT)


def test_an_assistants_last_message(server: Running) -> None:
    """Continued, as vLLM's fields ask: the reply is what is added, as a completion of the same text. Or a new turn."""
    messages = [*CHAT, {"role": "assistant", "content": "w3 w4"}]
    asks = {
        "<user> w1 w2 <end><assistant> w3 w4": [
            {"continue_final_message": True, "add_generation_prompt": False},
            {"continue_final_message": True},
        ],
        "<user> w1 w2 <end><assistant> w3 w4 <end><assistant> ": [
            {"add_generation_prompt": True},
            {"add_generation_prompt": True, "continue_final_message": False},
        ],
    }
    for prompt, fields in asks.items():
        ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
        alone = complete(server, prompt=ids, temperature=0)
        for field in fields:
            found = ask(server, messages=messages, temperature=0, logprobs=True, **field)
            assert text(found).split() == text(alone).split()
            assert text(found).startswith(" ") == prompt.endswith("w4")  # it goes on with a text, or begins one
            assert found["usage"] == alone["usage"]
            assert "".join(token["token"] for token in found["choices"][0]["logprobs"]["content"]) == text(found)
            with server.openai().chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=8,
                seed=1,
                logit_bias=BAN,
                temperature=0,
                stream=True,
                extra_body=field,
            ) as stream:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text(found)


def test_prompts_of_every_kind(server: Running) -> None:
    by_text = text(complete(server, prompt=PROMPT))
    assert by_text == text(complete(server, prompt=IDS)) == text(complete(server, prompt=[PROMPT]))
    assert by_text == text(complete(server, prompt=[[7], IDS]), 1)


def test_fields_that_are_taken_and_not_used(server: Running) -> None:
    assert text(ask(server, user="me")) == text(ask(server))
    assert text(complete(server, best_of=1, suffix="", user="me", n=None)) == text(complete(server))


# --- other paths ----------------------------------------------------------------------------------------------------


def test_rewards(server: Running) -> None:
    with server.http() as client:
        answer = client.get("/v1/rewards").json()
    assert answer == {
        "object": "list",
        "model": "tiny",
        "data": [
            {
                "id": name,
                "default_weight": weight,
                "minimum": -5.0,
                "maximum": 5.0,
                "description": f"likes {name} words",
                "difference": False,
                "wish": None,
            }
            for name, weight in (("harmless", 1.0), ("helpful", 0.5))
        ],
        "presets": [{"name": name, "weights": weights, "max_kl": None} for name, weights in PRESETS.items()],
        "return_rewards": True,
        "request_wishes": {"most": 4, "characters": 4000, "minimum": -5.0, "maximum": 5.0},
    }


def test_health_and_metrics(server: Running) -> None:
    with server.http() as client:
        assert client.get("/health").json() == client.get("/ready").json() == {"status": "ok"}

        def read() -> dict[str, float]:
            response = client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            lines = [line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")]
            return {name: float(value) for name, value in lines}

        before = read()
        ask(server, max_tokens=10, n=2)
        client.post("/v1/chat/completions", json={})
        after = read()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["genarm_generated_tokens_total"] == 20
    assert grown["genarm_prompt_tokens_total"] == 10
    assert grown["genarm_time_to_first_token_seconds_count"] == 2
    assert grown["genarm_inter_token_seconds_count"] == 18
    assert grown["genarm_request_seconds_count"] == 2
    assert grown['genarm_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown['genarm_requests_total{path="/v1/chat/completions",status="400"}'] == 1
    assert after["genarm_running"] == after["genarm_queue"] == 0
    assert (after["genarm_streams"], after["genarm_ready"]) == (4, 1)
    assert after["genarm_drafted_tokens_total"] >= after["genarm_accepted_tokens_total"] > 0


def test_the_page_and_its_headers(server: Running) -> None:
    with server.http() as client:
        for path in ("/", "/assets/index.html", "/v1/models", "/nothing"):
            headers = client.get(path).headers
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        for path in ("/assets/../app.py", "/assets/%2e%2e/app.py", "/assets/nothing.js", "/docs", "/redoc"):
            assert client.get(path).status_code == 404


def test_the_document(server: Running) -> None:
    with server.http() as client:
        document = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/rewards", "/v1/models", "/metrics"} <= {*document["paths"]}
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    errors = {"400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert {"200", *errors} == {*responses}
    assert "HTTPValidationError" not in document["components"]["schemas"]
