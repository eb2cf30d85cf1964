"""Bad input gets OpenAI's error body and status, says what is allowed, and touches nobody else."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from builders.serving import CHAT, CONTEXT, TOKENIZER, Running, events, running
from builders.tiny import VOCAB_SIZE
from genarm.data.presets import read_presets
from genarm.errors import ConfigError, GenarmError, WeightsError
from genarm.server.bodies import LARGEST_BODY
from genarm.server.errors import ApiError
from genarm.server.names import Names, RewardInfo, rewards_of
from genarm.server.security import read_keys


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


CONTENT = "messages.0.content"
SAID = [*CHAT, {"role": "assistant", "content": "w3"}]
CHATS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "gpt-4"}, 404, r"'gpt-4' does not exist; this server has tiny, tiny@cautious, tiny@plain", "model"),
    ({"model": "tiny@bold"}, 404, r"'tiny@bold' does not exist; .*tiny@cautious", "model"),
    ({"model": 7}, 400, r"model: Input should be a valid string \(got 7\)", "model"),
    ({"model": "tiny@kind=1"}, 400, "no reward is named 'kind'; this model has: harmless, helpful", "reward_weights"),
    ({"model": "tiny@harmless=x"}, 400, "cannot read the weight 'harmless=x'", "reward_weights"),
    ({"model": "tiny@harmless=nan"}, 400, "cannot read the weight 'harmless=nan'", "reward_weights"),
    ({"reward_weights": {"kind": 1}}, 400, "this model has: harmless, helpful", "reward_weights"),
    ({"reward_weights": {"helpful": 5.5}}, 400, r"'helpful' is 5.5; .* from -5 to 5", "reward_weights"),
    ({"reward_weights": {"helpful": "1"}}, 400, "valid number", "reward_weights.helpful"),
    ({"reward_weights": {"helpful": True}}, 400, "valid number", "reward_weights.helpful"),
    ({"reward_weights": [1, 2]}, 400, "valid dictionary", "reward_weights"),
    ({"stop": "x" * 1001}, 400, "none of them empty or longer than 1000 characters", "stop"),
    ({"stop": ["x", " " * 400_000]}, 400, "none of them empty or longer than 1000 characters", "stop"),
    ({"max_kl": -1}, 400, "greater than or equal to 0", "max_kl"),
    ({"max_kl": 1e39}, 400, r"max_kl is 1e\+39; it must be a number of nats per token", "max_kl"),
    ({"messages": []}, 400, "at least 1 item", "messages"),
    ({"messages": "hello"}, 400, "valid list", "messages"),
    ({"messages": [{"role": "user"}]}, 400, 'must be a text or a list of {"type": "text"', "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "'system', 'developer', 'user' or", "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "must be a text or a list", "messages.0.content"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
        400,
        "only its role and its text are read; leave it out, or send",
        "messages.0.tool_calls",
    ),
    (
        {"messages": [{"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}]},
        400,
        "only its role and its text are read; leave it out",
        "messages.0.reasoning_content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "type 'image_url'; .* only text",
        CONTENT,
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]},
        400,
        "type 'input_text'",
        CONTENT,
    ),
    (
        {"messages": [{"role": "user", "content": [{"text": "x", "image": "y"}]}]},
        400,
        "the key 'image'; it must",
        CONTENT,
    ),
    ({"messages": [{"role": "user", "content": [{"text": "x"}] * 1025}]}, 400, "1025 parts; .* up to 1024", CONTENT),
    ({"messages": [{"role": "user", "content": "x", "id": 3}]}, 400, "messages.0.id; leave it out", "messages.0.id"),
    ({"repeat_penalty": 1.1}, 400, "supplied: repeat_penalty; did you mean repetition_penalty?", "repeat_penalty"),
    ({"cache_prompt": True}, 400, "supplied: cache_prompt; leave it out", "cache_prompt"),
    ({"enable_thinking": False}, 400, 'as in chat_template_kwargs: {"enable_thinking": false}', "enable_thinking"),
    ({"guided_choice": ["a"]}, 400, "free text, of no given form", "guided_choice"),
    ({"metadata": "x"}, 400, "valid dictionary", "metadata"),
    ({"chat_template_kwargs": {"x": 1}}, 400, "no argument 'x'; those it reads are: none", None),
    ({"chat_template_kwargs": {"messages": []}}, 400, "'messages' is decided here", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": "y" * 10_000}}, 400, "at most 10000 characters", "chat_template_kwargs"),
    ({"chat_template_kwargs": [1]}, 400, "valid dictionary", "chat_template_kwargs"),
    ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    ({"max_tokens": 2.5}, 400, "valid integer", "max_tokens"),
    ({"max_tokens": "5"}, 400, "valid integer", "max_tokens"),
    (
        {"max_tokens": 124},
        400,
        f"maximum context length is {CONTEXT} tokens; the request has 5 in the messages and 124 for the reply",
        "messages",
    ),
    (
        {"messages": [{"role": "user", "content": "w1 " * 200}]},
        400,
        "the request has 203 in the messages. Shorten the messages.",
        "messages",
    ),
    ({"messages": SAID}, 400, "the last message is the assistant's; end with one to answer, or set continue_f", None),
    ({"messages": SAID, "add_generation_prompt": False}, 400, "only where continue_final_message is true", None),
    ({"add_generation_prompt": False}, 400, "only where continue_final_message is true", None),
    ({"continue_final_message": True}, 400, "only an assistant's message can be continued, .* of the user", None),
    (
        {"messages": SAID, "continue_final_message": True, "add_generation_prompt": True},
        400,
        "set one of them to false",
        None,
    ),
    (
        {"max_tokens": 3, "max_completion_tokens": 4},
        400,
        "max_tokens is 3 and max_completion_tokens is 4, and they",
        None,
    ),
    ({"temperature": 2.1}, 400, r"less than or equal to 2 \(got 2.1\)", "temperature"),
    ({"temperature": -0.1}, 400, "greater than or equal to 0", "temperature"),
    ({"top_p": 1.1}, 400, "less than or equal to 1", "top_p"),
    ({"presence_penalty": 3}, 400, "less than or equal to 2", "presence_penalty"),
    ({"frequency_penalty": -3}, 400, "greater than or equal to -2", "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, 400, "match pattern", "logit_bias.x.[key]"),
    ({"logit_bias": {"7": 101}}, 400, "less than or equal to 100", "logit_bias.7"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, 400, f"ids go from 0 to {VOCAB_SIZE - 1}", None),
    ({"n": 0}, 400, "greater than or equal to 1", "n"),
    ({"n": 128}, 400, "asks for 128 replies at once .* takes up to 68", "n"),
    ({"seed": 2**63}, 400, "less than", "seed"),
    ({"stop": ""}, 400, "none of them empty", "stop"),
    ({"stop": ["a", 1]}, 400, "a list of up to 16 texts", "stop"),
    ({"stop": ["a"] * 17}, 400, "a list of up to 16 texts", "stop"),
    ({"stream": "yes"}, 400, "valid boolean", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "only allowed when stream is true", None),
    ({"logprobs": 3}, 400, "valid boolean", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "less than or equal to 20", "top_logprobs"),
    ({"top_logprobs": 2}, 400, "only allowed when logprobs is true", None),
    ({"tool": []}, 400, "Unrecognized request argument supplied: tool", "tool"),
    (
        {"tools": [{"type": "function"}]},
        400,
        r"tools: this server calls no tools .* leave it out, or send \[\]",
        "tools",
    ),
    ({"tool_choice": "required"}, 400, 'leave it out, or send "none" or "auto"', "tool_choice"),
    ({"response_format": {"type": "json_object"}}, 400, 'free text, .* or send {"type": "text"}', "response_format"),
    ({"store": True}, 400, "nothing is stored; leave it out, or send false", "store"),
    ({"store": 0}, 400, "nothing is stored", "store"),
    ({"length_penalty": True}, 400, "with no search; leave it out, or send 1", "length_penalty"),
    ({"vllm_xargs": {"reward_weights": "a=1"}}, 400, "here weights are the field reward_weights", "vllm_xargs"),
    ({"top_k": -2}, 400, "greater than or equal to -1", "top_k"),
    ({"min_p": 1.5}, 400, "less than or equal to 1", "min_p"),
    ({"repetition_penalty": 0}, 400, r"greater than or equal to 0.01 \(got 0\)", "repetition_penalty"),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens is 9, and a reply may have up to 8 tokens", "min_tokens"),
    ({"stop_token_ids": [VOCAB_SIZE]}, 400, f"stop_token_ids names the token id {VOCAB_SIZE}; ids go from", None),
    ({"stop_token_ids": ["w1"]}, 400, "valid integer", "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 129}, 400, "at most 128 items", "stop_token_ids"),
]

COMPLETIONS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": ""}, 400, "the prompt is empty", None),
    ({"prompt": []}, 400, "a text, a list of texts", "prompt"),
    ({"prompt": [[]]}, 400, "none of them empty", "prompt"),
    ({"prompt": ["w1", 3]}, 400, "a text, a list of texts", "prompt"),
    ({"prompt": [1.5]}, 400, "a text, a list of texts", "prompt"),
    ({"prompt": [-1]}, 400, "a text, a list of texts", "prompt"),
    ({"prompt": [7, VOCAB_SIZE]}, 400, f"id {VOCAB_SIZE}; this model's ids go from 0 to {VOCAB_SIZE - 1}", None),
    (
        {"prompt": ["w1", "w2 " * 120]},
        400,
        "120 in the prompt and 16 for the reply. .* or lower max_tokens",
        "prompt",
    ),
    ({"max_tokens": -1}, 400, "greater than or equal to 0", "max_tokens"),
    ({"logprobs": 21}, 400, "less than or equal to 20", "logprobs"),
    ({"logprobs": True}, 400, "valid integer", "logprobs"),
    ({"best_of": 2}, 400, "must be 1 or n", "best_of"),
    ({"best_of": 3, "n": 2}, 400, "must be 1 or n", "best_of"),
    ({"suffix": "x"}, 400, "Input should be ''", "suffix"),
    ({"messages": CHAT}, 400, "Unrecognized request argument supplied: messages", "messages"),
]


def check_error(response: Any, status: int, message: str, param: str | None) -> None:
    import re

    assert response.status_code == status, response.text
    body = response.json()
    assert {*body} == {"error"}
    assert {*body["error"]} == {"message", "type", "param", "code"}
    assert re.search(message, body["error"]["message"]), body
    assert body["error"]["param"] == param
    assert body["error"]["type"] in ("invalid_request_error", "rate_limit_error", "server_error")


@pytest.mark.parametrize(("fields", "status", "message", "param"), CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chats(
    server: Running, fields: dict[str, Any], status: int, message: str, param: str | None, stream: bool
) -> None:
    if stream and "stream" in (*fields, *(k[:6] for k in fields)):
        return
    body = {"model": "tiny", "messages": CHAT, "stream": stream, **fields}
    check_error(server.post("/v1/chat/completions", body), status, message, param)
    assert server.service.admission.inside == 0


@pytest.mark.parametrize(("fields", "status", "message", "param"), COMPLETIONS)
def test_bad_completions(server: Running, fields: dict[str, Any], status: int, message: str, param: str | None) -> None:
    body = {"model": "tiny", "prompt": "w1", **fields}
    check_error(server.post("/v1/completions", body), status, message, param)
    assert server.service.admission.inside == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "The body is not JSON"),
        (b"", "The body is empty"),
        (b"null", "The body is None; send a JSON object"),
        (b"[1]", "The body is a list; send a JSON object"),
        (b'"x"', "The body is 'x'; send a JSON object"),
        (b"\xff\xfe", "not in UTF-8 .byte 0 is 0xff"),
        (b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', "not in UTF-8 .byte 29 is 0xed"),
        ('{"model": "tiny", "prompt": "w1"}'.encode("utf-16"), "not in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "tiny", "prompt": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, "nested too deeply"),
        (b'{"model": "tiny", "prompt": "w1", "seed": ' + b"1" * 5000 + b"}", "a number of 5000 characters"),
        (b'{"model": "tiny", "prompt": "w1", "seed": 1, "seed": 2}', "has the key 'seed' twice"),
        (b'{"model": "tiny", "prompt": "w1", "reward_weights": {"helpful": NaN}}', "finite number"),
        (b'{"model": "tiny", "prompt": "w1", "reward_weights": {"helpful": 1e999}}', "finite number"),
        (b'{"model": "tiny", "prompt": "w1", "temperature": -Infinity}', "finite number"),
        (b'{"model": "tiny", "prompt": "\\ud83d\\ude00 \\ud800"}', r"has \\ud800 alone, half of a character"),
        (b'{"model": "tiny", "prompt": "x", "\\uDC00": 1}', r"has \\udc00 alone"),
    ],
)
def test_bodies_that_are_no_request(server: Running, content: bytes, message: str) -> None:
    with server.http() as client:
        response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404)
    assert response.json()["error"]["message"]
    import re

    assert re.search(message, response.json()["error"]["message"]), response.text


def test_other_content_types_and_methods_and_paths(server: Running) -> None:
    with server.http() as client:
        plain = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
        check_error(plain, 400, "content type is 'text/plain'; send JSON", None)
        check_error(client.get("/v1/completions"), 405, "Method Not Allowed; the methods", None)
        check_error(client.post("/v1/embeddings", json={}), 404, "paths of this server", None)
        check_error(client.get("/v1/models/gpt-4"), 404, "'gpt-4' does not exist", "model")
        check_error(client.get("/v1/models/tiny@kind=2"), 400, "no reward is named 'kind'", "reward_weights")


def test_openai_client_errors(server: Running) -> None:
    client = server.openai()
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.completions.create(model="tiny", prompt="w1 " * 300)
    assert long.value.code == "context_length_exceeded"


def test_bodies_that_are_too_large(server: Running) -> None:
    big = b'{"model": "' + b"x" * LARGEST_BODY + b'"}'
    headers = {"Content-Type": "application/json"}
    with server.http() as client:
        check_error(client.post("/v1/completions", content=big, headers=headers), 413, f"up to {LARGEST_BODY}", None)

    def pieces() -> Iterator[bytes]:  # without a length that could be looked at first
        for start in range(0, len(big), 2**16):
            yield big[start : start + 2**16]

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for piece in pieces():
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        except OSError:
            pass  # it has answered already, and reads no more
        assert b" 413 " in connection.recv(1000)


def test_bad_requests_do_not_touch_running_ones(server: Running) -> None:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 60, "seed": 3, "logprobs": True}
    alone = server.post("/v1/chat/completions", body).json()["choices"]
    found: list[Any] = []
    server.pace.seconds = 0.005
    threads = [
        threading.Thread(target=lambda: found.append(server.post("/v1/chat/completions", body).json()["choices"]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for fields, status, _, _ in CHATS:
        assert server.post("/v1/chat/completions", {"model": "tiny", "messages": CHAT, **fields}).status_code == status
    for thread in threads:
        thread.join()
    server.pace.seconds = 0.0
    assert [choice[0]["message"] for choice in found] == [alone[0]["message"]] * 3
    assert server.idle()


def test_a_model_that_gives_nan_is_the_servers_fault(caplog: pytest.LogCaptureFixture) -> None:
    """The same answer in every way to ask, and to the operator; others are answered, and overflow is the client's."""
    poison = 13
    with running() as server:
        server.model.base.get_input_embeddings().weight.data[poison] = math.nan
        bad = {
            "/v1/completions": {"prompt": [poison, 8], "max_tokens": 4},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "w7"}], "max_tokens": 4},
        }
        assert TOKENIZER("w7").input_ids == [poison]
        for path, fields in bad.items():
            for more in ({}, {"n": 2}, {"logprobs": 1 if "prompt" in fields else True}, {"return_rewards": True}):
                body = {"model": "tiny", **fields, **more}
                check_error(
                    server.post(path, body),
                    500,
                    "the base and the reward 'helpful' gave NaN instead .*--dtype float32",
                    None,
                )
                streamed = server.post(path, {**body, "stream": True})
                assert streamed.status_code == 200
                last = events(streamed)[-1]
                assert last["error"].items() >= {"type": "server_error", "code": "model_failure"}.items()
                assert "gave NaN" in last["error"]["message"]
        body = {"model": "tiny", **bad["/v1/completions"], "echo": True, "logprobs": 1, "max_tokens": 0}
        check_error(server.post("/v1/completions", body), 500, "gave NaN instead", None)
        said = [record for record in caplog.records if "gave NaN" in record.getMessage()]
        assert len(said) == 17
        assert all(record.levelname == "ERROR" for record in said)
        with pytest.raises(openai.InternalServerError, match="gave NaN"):
            server.openai().completions.create(model="tiny", prompt=[poison])
        well = {"model": "tiny", "prompt": "w1", "max_tokens": 4, "logit_bias": {str(poison): -100}}
        assert server.post("/v1/completions", well).status_code == 200
        assert server.idle()


def test_a_model_without_a_chat_template() -> None:
    with running(template=None) as server:
        response = server.post("/v1/chat/completions", {"model": "tiny", "messages": CHAT})
        check_error(response, 400, "no chat template, so it takes no conversations; use /v1/completions", None)
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "w1"}).status_code == 200


# --- keys, origins, logs --------------------------------------------------------------------------------------------


def test_api_keys() -> None:
    with running(keys=frozenset({"sk-one", "sk-two"})) as server, server.http() as client:
        for headers in (
            {},
            {"Authorization": "Bearer sk-three"},
            {"Authorization": "sk-one"},
            {"Authorization": "Basic sk-one"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer sk-one2"},
        ):
            for path in ("/v1/models", "/v1/rewards", "/v1/nothing"):
                response = client.get(path, headers=headers)
                check_error(response, 401, "Authorization: Bearer KEY", None)
                assert response.headers["www-authenticate"] == "Bearer"
            body = {"model": "tiny", "prompt": "w1"}
            check_error(client.post("/v1/completions", json=body, headers=headers), 401, "a valid API key", None)
        for key in ("sk-one", "sk-two"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/"):
            assert client.get(path).status_code == 200
        assert server.openai().models.list().data
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-x", max_retries=0).models.list()


def test_origins() -> None:
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    with running() as server, server.http() as client:
        closed = client.options("/v1/completions", headers=ask)
        assert "access-control-allow-origin" not in closed.headers
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=ask).headers
    with (
        running(origins=["https://example.org"], keys=frozenset({"k"})) as server,
        server.http() as client,
    ):
        open_ = client.options("/v1/completions", headers=ask)
        assert open_.status_code == 200
        assert open_.headers["access-control-allow-origin"] == "https://example.org"
        assert client.get("/v1/models", headers=ask).headers["access-control-allow-origin"] == "https://example.org"
        other = client.options("/v1/completions", headers={**ask, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_if_asked(log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="genarm"), running(log_prompts=log_prompts) as server:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "w33 w34"}], "max_tokens": 5, "seed": 1}
        reply = server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"]
        server.post("/v1/chat/completions", {**chat, "stream": True})
        server.post("/v1/completions", {"model": "tiny", "prompt": "w33 w34", "stream": True})
        server.post("/v1/completions", {"model": "tiny", "prompt": "w33 w34", "temperature": 7})
        server.post("/v1/completions", {"model": "tiny", "prompt": "w33 w34", "max_tokens": 500})
    mine = [record.getMessage() for record in caplog.records if record.name.startswith("genarm")]
    assert sum("/v1/" in line for line in mine) == 5
    assert any("w33" in line for line in mine) == log_prompts
    assert any(reply in line for line in mine) == log_prompts


def test_reading_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two  # theirs\n")
    monkeypatch.delenv("GENARM_API_KEYS", raising=False)
    assert read_keys(None) == frozenset()
    assert read_keys(file) == {"one", "two"}
    monkeypatch.setenv("GENARM_API_KEYS", "three, four,")
    assert read_keys(None) == {"three", "four"}
    assert read_keys(file) == {"one", "two", "three", "four"}
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no API key"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        read_keys(tmp_path / "missing")
    monkeypatch.setenv("GENARM_API_KEYS", "schlüssel")
    with pytest.raises(ConfigError, match="outside ASCII"):
        read_keys(None)


# --- names and presets ----------------------------------------------------------------------------------------------

REWARDS = (RewardInfo(name="kind", default=1.0, description=""), RewardInfo(name="brief", default=-2.0, description=""))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "a@b"}, ConfigError, "another --served-name"),
        ({"model": ""}, ConfigError, "another --served-name"),
        ({"largest": 0.0}, ConfigError, "--max-weight is 0"),
        ({"largest": 1.5}, WeightsError, "'brief' is -2; .* from -1.5 to 1.5; raise --max-weight"),
        ({"presets": {"a b": {}}}, ConfigError, "a preset cannot be named 'a b'"),
        ({"presets": {"x": {"odd": 1}}}, ConfigError, "the preset 'x': no reward is named 'odd'"),
        ({"presets": {"x": {"kind": 9}}}, ConfigError, "the preset 'x': .* 'kind' is 9"),
        ({"presets": {"x": {"max_kl": -1}}}, ConfigError, "the preset 'x': max_kl is -1; it must be a number of nats"),
        ({"presets": {"x": {"kind": "1"}}}, ConfigError, "the preset 'x': .* must be a finite number"),
    ],
)
def test_names_that_do_not_hold_together(changes: dict[str, Any], kind: type[GenarmError], message: str) -> None:
    with pytest.raises(kind, match=message):
        Names(**{"model": "m", "rewards": REWARDS, "largest": 5.0, **changes})


def test_names_of_a_model_without_rewards() -> None:
    names = Names(model="plain", rewards=(), largest=5.0)
    assert names.resolve("plain", None) == names.resolve("plain", {}) == {}
    with pytest.raises(WeightsError, match="this model has: none"):
        names.resolve("plain", {"kind": 1})
    with pytest.raises(ApiError, match="does not exist"):
        names.resolve("other", None)


def test_presets_from_the_folder_and_from_a_file(tmp_path: Path) -> None:
    assert read_presets(tmp_path, None) == {}
    (tmp_path / "presets.json").write_text(json.dumps({"a": {"kind": 1}, "b": {"kind": 2}}))
    file = tmp_path / "more.toml"
    file.write_text("[b]\nbrief = 0.5\n[c]\n")
    assert read_presets(tmp_path, None) == {"a": {"kind": 1}, "b": {"kind": 2}}
    assert read_presets(tmp_path, file) == {"a": {"kind": 1}, "b": {"brief": 0.5}, "c": {}}
    for content in ("[", "b = 1"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"more\.toml"):
            read_presets(tmp_path, file)
    with pytest.raises(ConfigError, match="cannot read the presets"):
        read_presets(tmp_path, tmp_path / "missing.toml")


def test_rewards_of_a_folder(server: Running) -> None:
    from genarm.model.config import GuidedConfig, MemberSpec, RewardSpec

    spec = RewardSpec(name="kind", weight=0.5, description="likes kindness", member=MemberSpec(model="arm"))
    config = GuidedConfig.of(MemberSpec(model="base"), [spec], [server.model.base.config] * 2)
    assert rewards_of(config) == (RewardInfo(name="kind", default=0.5, description="likes kindness"),)
    assert rewards_of(server.model.base.config) == ()
