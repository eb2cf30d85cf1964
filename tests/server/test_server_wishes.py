"""Wishes and budgets by the API: against requests with that system text, against transformers, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch

from builders.serving import CHAT, CONTEXT, TOKENIZER, Running, events, running
from builders.tiny import TEMPLATE

WISHES = {"warm": "w5 w6 w7", "terse": "w30"}
BAN = {str(i): -100.0 for i in range(6)}
NONE = {"harmless": 0, "helpful": 0, "warm": 0, "terse": 0}
SAID = [*CHAT, {"role": "assistant", "content": "w3 w4"}]
SYSTEM = {"role": "system", "content": "w9 w8"}
CHATS: list[tuple[list[Any], dict[str, Any]]] = [
    (CHAT, {}),
    ([SYSTEM, *CHAT], {}),
    (SAID, {"continue_final_message": True}),
    (SAID, {"add_generation_prompt": True}),
]
PRESETS = {"near": {"warm": 3.0, "max_kl": 0.05}, "far": {"warm": 3.0}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(wishes=WISHES, presets=PRESETS) as found:
        yield found
        assert found.idle()


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    """The same members without a wish of the model's."""
    with running() as found:
        yield found
        assert found.idle()


def ask(server: Running, path: str = "chat/completions", **fields: Any) -> dict[str, Any]:
    fixed = {"messages": CHAT} if path.startswith("chat") else {"prompt": "w1 w2 w3"}
    body = {"model": "tiny", "max_tokens": 10, "temperature": 0, "seed": 1, "logit_bias": BAN, **fixed, **fields}
    response = server.post(f"/v1/{path}", body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def text(answer: dict[str, Any], index: int = 0) -> str:
    choice = answer["choices"][index]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def with_system(messages: list[Any], wish: str) -> list[Any]:
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{wish}"}, *messages[1:]]
    return [{"role": "system", "content": wish}, *messages]


# --- what they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "fields"), CHATS)
def test_at_weight_1_a_wish_is_that_system_message_and_at_0_the_base(
    server: Running, plain: Running, messages: list[Any], fields: dict[str, Any]
) -> None:
    nothing = {"harmless": 0, "helpful": 0}
    base = ask(plain, messages=messages, reward_weights=nothing, **fields)
    for name, wish in WISHES.items():
        prompted = text(ask(plain, messages=with_system(messages, wish), reward_weights=nothing, **fields))
        own = ask(server, messages=messages, reward_weights={**NONE, name: 1}, **fields)
        asked = ask(plain, messages=messages, reward_weights=nothing, wishes=[{"text": wish}], **fields)
        assert text(own) == text(asked) == prompted != text(base)
        assert own["usage"] == asked["usage"]
        assert asked["usage"]["prompt_tokens"] == base["usage"]["prompt_tokens"]
    silent = [{"text": wish, "weight": 0} for wish in WISHES.values()]
    for found in (
        ask(server, messages=messages, reward_weights=NONE, **fields),
        ask(plain, messages=messages, reward_weights=nothing, wishes=silent, **fields),
    ):
        assert (text(found), found["usage"]) == (text(base), base["usage"])


@pytest.mark.parametrize("wish", WISHES.values())
def test_in_a_completion_a_wish_stands_before_the_text(plain: Running, wish: str) -> None:
    nothing = {"harmless": 0, "helpful": 0}
    prompts = ["w1 w2 w3", "w12"]
    before = [f"{wish}\n\n{prompt}" for prompt in prompts]
    prompted = ask(plain, "completions", prompt=before, reward_weights=nothing)
    wished = ask(plain, "completions", prompt=prompts, reward_weights=nothing, wishes=[{"text": wish, "weight": 1}])
    assert [text(wished, i) for i in range(2)] == [text(prompted, i) for i in range(2)]
    echo = ask(plain, "completions", wishes=[{"text": wish}], echo=True, logprobs=1, return_rewards=True)
    assert text(echo).startswith("w1 w2 w3")
    without = ask(plain, "completions", echo=True, logprobs=1)
    numbers = [answer["choices"][0]["logprobs"]["token_logprobs"][1:3] for answer in (echo, without)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)  # wishes say nothing of the prompt
    said = [list(token["rewards"]) for token in echo["choices"][0]["rewards"]]
    assert said[1:3] == [["harmless", "helpful"]] * 2
    assert said[3:] == [["harmless", "helpful", "wish 1"]] * 10


WEIGHTS = {"harmless": 0.5, "helpful": 0.0, "warm": 1.5, "terse": -0.7}


def guided(server: Running, reply: list[int], weights: dict[str, float]) -> torch.Tensor:
    """Log-probs at each token of a reply and after it, by transformers without a cache."""
    inputs = server.model.encode(CHAT, tokenizer=TOKENIZER)
    ids = torch.cat([inputs["input_ids"], torch.tensor([reply], dtype=torch.long)], dim=1)
    with torch.no_grad():
        out = server.model(ids, contexts=inputs["contexts"], reward_weights=weights, use_cache=False)
    return out.logits[0, inputs["input_ids"].shape[1] - 1 :].log_softmax(-1)


def test_replies_numbers_and_nats_are_those_of_transformers(server: Running) -> None:
    def nats() -> float:
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("genarm_kl_nats_total")))

    before = nats()
    answer = ask(server, reward_weights=WEIGHTS, logprobs=True, return_rewards=True)
    choice = answer["choices"][0]
    reply = TOKENIZER(text(answer)).input_ids
    shaped = guided(server, reply, WEIGHTS)[:-1]
    base = guided(server, reply, dict.fromkeys(NONE, 0.0))[:-1]
    allowed = shaped[:, 6:].argmax(-1) + 6  # special tokens are banned
    assert reply == allowed.tolist()
    assert len({*reply}) > 1
    for i, (token, content) in enumerate(zip(choice["rewards"], choice["logprobs"]["content"], strict=True)):
        assert content["logprob"] == pytest.approx(float(shaped[i, reply[i]]), abs=1e-4)
        assert token["base_logprob"] == pytest.approx(float(base[i, reply[i]]), abs=1e-4)
        assert [*token["rewards"]] == ["harmless", "warm", "terse"]
        for name, share in token["rewards"].items():
            alone = guided(server, reply, {**NONE, name: 1.0})[i]  # a wish at weight 1 is the prompted base
            said = alone - base[i] if name in WISHES else (alone - base[i]).log_softmax(-1)
            assert share["weight"] == WEIGHTS[name]
            assert share["logprob"] == pytest.approx(float(said[reply[i]]), abs=1e-4)
    kl = float((shaped.exp() * (shaped - base)).sum())
    assert answer["usage"]["kl"] == pytest.approx(kl, abs=1e-3)
    assert nats() - before == pytest.approx(kl, abs=1e-3)


def test_a_requests_own_wishes_are_as_those_of_the_model(server: Running, plain: Running) -> None:
    """Replies, numbers and nats, with rewards beside them, drawn and streamed."""
    fields: dict[str, Any] = {"temperature": 0.8, "n": 2, "logprobs": True, "return_rewards": True}
    folder = ask(server, reward_weights=WEIGHTS, **fields)
    wishes = [{"text": WISHES[name], "weight": WEIGHTS[name]} for name in ("warm", "terse")]
    rewards = {name: WEIGHTS[name] for name in ("harmless", "helpful")}
    fields |= {"reward_weights": rewards, "wishes": wishes}
    own = ask(plain, **fields)
    names = {"harmless": "harmless", "wish 1": "warm", "wish 2": "terse"}
    for one, other in zip(own["choices"], folder["choices"], strict=True):
        assert one["message"] == other["message"]
        for mine, theirs in zip(one["rewards"], other["rewards"], strict=True):
            assert [*mine["rewards"]] == [*names]
            for name, share in mine["rewards"].items():
                assert share == pytest.approx(theirs["rewards"][names[name]], abs=1e-4)
    assert own["usage"]["kl"] == pytest.approx(folder["usage"]["kl"], abs=1e-3)
    body = {"model": "tiny", "max_tokens": 10, "seed": 1, "logit_bias": BAN, "messages": CHAT, **fields}
    streamed = ["", ""]
    for chunk in events(plain.post("/v1/chat/completions", {**body, "stream": True}))[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == [text(own, i) for i in range(2)]
    extra = {name: body.pop(name) for name in ("wishes", "reward_weights", "return_rewards")}
    client = plain.openai().chat.completions.create(**body, extra_body=extra)
    assert client.choices[0].message.content == text(own)
    most = ask(plain, wishes=[{"text": f"w{i}", "weight": 0.5} for i in range(4)], return_rewards=True)
    assert [*most["choices"][0]["rewards"][0]["rewards"]][-4:] == [f"wish {i}" for i in range(1, 5)]


def test_a_reply_has_the_room_that_the_longest_reading_leaves(server: Running, plain: Running) -> None:
    base = ask(plain, max_tokens=None)["usage"]
    assert base["total_tokens"] == CONTEXT
    wish = " ".join(["w5"] * 20)
    extra = 20 + 2  # and <system> … <end>
    room = CONTEXT - base["prompt_tokens"] - extra
    wished = ask(plain, max_tokens=None, wishes=[{"text": "w1"}, {"text": wish}])["usage"]
    assert (wished["prompt_tokens"], wished["completion_tokens"]) == (base["prompt_tokens"], room)
    ask(plain, max_tokens=room, wishes=[{"text": wish}])
    refused = plain.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": CHAT, "max_tokens": room + 1, "wishes": [{"text": wish}]},
    )
    said = f"the request has {base['prompt_tokens'] + extra} in the messages with the wish 'wish 1' and {room + 1} for"
    assert said in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "messages"
    long = {"model": "tiny", "prompt": "w1 " * 120, "max_tokens": 7, "reward_weights": NONE}
    assert server.post("/v1/completions", long).status_code == 200
    answer = server.post("/v1/completions", {**long, "reward_weights": {**NONE, "warm": 1}})
    assert "123 in the prompt with the wish 'warm' and 7" in answer.json()["error"]["message"]


# --- budgets --------------------------------------------------------------------------------------------------------


def test_a_preset_or_a_name_has_a_budget_that_the_request_may_replace(server: Running) -> None:
    weights = {"warm": 3.0}
    near, far = (ask(server, reward_weights=weights, max_kl=bound) for bound in (0.05, None))
    assert 0 < near["usage"]["kl"] <= 10 * 0.05 + 1e-3 < far["usage"]["kl"]
    for name, expected in {
        "tiny@near": near,
        "tiny@far": far,
        "tiny@warm=3": far,
        "tiny@warm=3,max_kl=0.05": near,
    }.items():
        found = ask(server, model=name)
        assert (found["choices"], found["usage"]) == (expected["choices"], expected["usage"])
    found = ask(server, model="tiny@near", max_kl=1000)
    assert (found["choices"], found["usage"]) == (far["choices"], far["usage"])
    zero = ask(server, model="tiny@max_kl=0")
    assert zero["usage"]["kl"] == 0
    assert text(zero) == text(ask(server, reward_weights=NONE))


def test_what_is_said_of_wishes_and_presets(server: Running) -> None:
    answer = httpx2.get(f"{server.url}/v1/rewards").json()
    listed = [(reward["id"], reward["wish"], reward["difference"]) for reward in answer["data"]]
    assert listed == [
        ("harmless", None, False),
        ("helpful", None, False),
        ("warm", WISHES["warm"], True),
        ("terse", WISHES["terse"], True),
    ]
    assert [(preset["name"], preset["weights"]["warm"], preset["max_kl"]) for preset in answer["presets"]] == [
        ("near", 3.0, 0.05),
        ("far", 3.0, None),
    ]
    form = httpx2.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        assert {"wishes", "max_kl"} <= {*form[name]["properties"]}


# --- what is refused ------------------------------------------------------------------------------------------------

ONE = {"text": "w5"}
REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"wishes": [ONE] * 5}, "has 5 wishes; this server takes up to 4", "wishes"),
    ({"wishes": "w5"}, "valid list", "wishes"),
    ({"wishes": ["w5"]}, "valid dictionary|instance of", "wishes.0"),
    ({"wishes": [{}]}, "you must provide wishes.0.text", "wishes.0.text"),
    ({"wishes": [ONE, {"text": " \n"}]}, "a wish is ' .n'; it must be a text that says", "wishes.1.text"),
    ({"wishes": [{"text": 3}]}, "valid string", "wishes.0.text"),
    ({"wishes": [{"text": "w" * 4001}]}, "at most 4000 characters", "wishes.0.text"),
    ({"wishes": [{"text": "w5", "weight": "1"}]}, "valid number", "wishes.0.weight"),
    ({"wishes": [{"text": "w5", "weight": None}]}, "valid number", "wishes.0.weight"),
    ({"wishes": [{"text": "w5", "wieght": 1}]}, "wishes.0.wieght; did you mean weight", "wishes.0.wieght"),
    ({"wishes": [ONE, {"text": "w5", "weight": 6}]}, "weight of 'wish 2' is 6; .* from -5 to 5", "wishes"),
    ({"reward_weights": {"wish 1": 1}, "wishes": [ONE]}, "no reward is named 'wish 1'", "reward_weights"),
    ({"max_kl": -1}, "greater than or equal to 0", "max_kl"),
    ({"max_kl": "1"}, "valid number", "max_kl"),
    ({"max_kl": True}, "valid number", "max_kl"),
    ({"max_kl": 1e300}, "it must be a number of nats", "max_kl"),
    ({"model": "tiny@warm=1,max_kl=-0.5"}, "max_kl is -0.5; it must be a number of nats", "max_kl"),
    ({"model": "tiny@max_kl=x"}, "cannot read the weight 'max_kl=x'", "reward_weights"),
    ({"model": "tiny@bold"}, "'tiny@bold' does not exist", "model"),
]


def check(response: httpx2.Response, message: str, param: str | None) -> None:
    import re

    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400), error
    assert re.search(message, error["message"]), error
    assert error["param"] == param
    assert "\n" not in error["message"]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED)
def test_bad_wishes_and_budgets(server: Running, fields: dict[str, Any], message: str, param: str | None) -> None:
    for path, fixed in (("chat/completions", {"messages": CHAT}), ("completions", {"prompt": "w1"})):
        check(server.post(f"/v1/{path}", {"model": "tiny", **fixed, **fields}), message, param)


def test_token_ids_have_no_place_for_the_words_of_a_wish(server: Running, plain: Running) -> None:
    ids = TOKENIZER("w1 w2 w3").input_ids
    for prompt in (ids, [ids, ids]):
        mine = server.post("/v1/completions", {"model": "tiny", "prompt": prompt})
        check(
            mine, r'token ids, .* the wish \'warm\' .*send the prompt as text.*"reward_weights": {"warm": 0}', "prompt"
        )
        own = plain.post("/v1/completions", {"model": "tiny", "prompt": prompt, "wishes": [ONE]})
        check(own, "the wish 'wish 1' .* the weight 0 .in wishes", "prompt")
    silent = dict.fromkeys(WISHES, 0)
    found = ask(server, "completions", prompt=ids, reward_weights=silent)
    assert text(found) == text(ask(plain, "completions", prompt=ids, wishes=[{**ONE, "weight": 0}]))


@pytest.mark.parametrize("why", ["--no-request-wishes", "--engine genarm"])
def test_a_server_without_wishes_of_requests(why: str) -> None:
    with running(wishes=WISHES if "no" in why else None, request_wishes="no" not in why) as server:
        server.backend.wishes = "no" in why
        for path, fixed in (("chat/completions", {"messages": CHAT}), ("completions", {"prompt": "w1"})):
            body = {"model": "tiny", "max_tokens": 2, **fixed}
            check(server.post(f"/v1/{path}", {**body, "wishes": [ONE]}), f"not available: .*{why}", "wishes")
            assert server.post(f"/v1/{path}", {**body, "wishes": []}).status_code == 200  # those of the model hold
        assert httpx2.get(f"{server.url}/v1/rewards").json()["request_wishes"] is None
        assert server.idle()


def test_a_template_without_system_messages_refuses_the_wish_alone() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    with running(template=strict) as server:
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 2}
        check(
            server.post("/v1/chat/completions", {**body, "wishes": [ONE]}), "with the wish 'wish 1' .*no system", None
        )
        assert server.post("/v1/chat/completions", body).status_code == 200
        assert server.idle()


def test_wishes_are_logged_with_prompts_and_never_without(caplog: pytest.LogCaptureFixture) -> None:
    for log_prompts in (False, True):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="genarm"), running(log_prompts=log_prompts) as server:
            ask(server, wishes=[{"text": "w39 w38"}])
        assert any("w39 w38" in record.getMessage() for record in caplog.records) == log_prompts
