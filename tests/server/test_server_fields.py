"""Fields of OpenAI's API and of vLLM's: each is taken, accepted where it asks for nothing, or refused by name."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import chat as openai_chat
from openai.types import completion_create_params as openai_text
from openai.types.chat import completion_create_params as openai_create
from pydantic import ValidationError

from builders.serving import CHAT, Running, running
from genarm.server.schema import ChatRequest, CompletionRequest, Message, StreamOptions, TextPart

BOTH_NEUTRAL: dict[str, list[Any]] = {
    "response_format": [{"type": "text"}],
    "use_beam_search": [False],
    "length_penalty": [1.0, 1],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "include_stop_str_in_output": [False],
    "bad_words": [[]],
    "stream_interval": [1],
    "priority": [0],
    "return_token_ids": [False],
    "vllm_xargs": [{}],
    "session_id": ["me"],
    "chat_id": ["c1"],
    "metadata": [{}, {"job": "1"}, {"features": {"web_search": False}}],
    "user": ["me"],
    "logit_bias": [{}],
    "stop": [[]],
    "stop_token_ids": [[]],
    "top_k": [0, -1],
    "min_p": [0],
    "repetition_penalty": [1.0, 1],
    "min_tokens": [0],
    "ignore_eos": [False],
    "stream_options": [{}, {"include_usage": False}, {"continuous_usage_stats": False}],
    "n": [1],
}
"""Values that ask for nothing, as clients send them."""
CHAT_NEUTRAL: dict[str, list[Any]] = {
    **BOTH_NEUTRAL,
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "store": [False],
    "service_tier": ["auto", "default"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "safety_identifier": ["me"],
    "prompt_cache_key": ["me"],
    "prompt_cache_options": [{"mode": "implicit"}],
    "prompt_cache_retention": ["24h"],
    "top_logprobs": [0],
    "logprobs": [False],
    "echo": [False],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "add_special_tokens": [False],
    "include_reasoning": [True],
    "documents": [[]],
}
TEXT_NEUTRAL: dict[str, list[Any]] = {
    **BOTH_NEUTRAL,
    "best_of": [1],
    "suffix": [""],
    "echo": [False],
    "add_special_tokens": [True],
}
NEEDED = {"model", "messages", "prompt", "temperature", "top_p", "seed", "stream"}
"""Fields whose null is no neutral value, or that the test itself gives."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def names(*kinds: Any) -> set[str]:
    """Fields of OpenAI's typed dictionaries."""
    return {name for kind in kinds for name in typing.get_type_hints(kind)}


def test_every_field_of_openais_client_is_known() -> None:
    """One that is new there is to be taken, accepted at what asks for nothing, or refused for a reason."""
    assert names(openai_create.CompletionCreateParamsStreaming) <= {*ChatRequest.model_fields}
    assert names(openai_text.CompletionCreateParamsStreaming) <= {*CompletionRequest.model_fields}
    assert names(openai_chat.ChatCompletionStreamOptionsParam) <= {*StreamOptions.model_fields}
    assert names(openai_chat.ChatCompletionContentPartTextParam) <= {*TextPart.model_fields}
    messages = names(
        openai_chat.ChatCompletionSystemMessageParam,
        openai_chat.ChatCompletionDeveloperMessageParam,
        openai_chat.ChatCompletionUserMessageParam,
        openai_chat.ChatCompletionAssistantMessageParam,
    )
    assert messages | {*openai_chat.ChatCompletionMessage.model_fields} <= {*Message.model_fields}


@pytest.mark.parametrize(
    ("kind", "fixed", "neutral"),
    [(ChatRequest, {"messages": CHAT}, CHAT_NEUTRAL), (CompletionRequest, {"prompt": "w1"}, TEXT_NEUTRAL)],
)
def test_what_asks_for_nothing_changes_nothing(
    server: Running, kind: Any, fixed: dict[str, Any], neutral: dict[str, list[Any]]
) -> None:
    """Every field as null, and at each neutral value: all of them at once, and each is valid alone."""
    path = "/v1/chat/completions" if kind is ChatRequest else "/v1/completions"
    body = {"model": "tiny", "seed": 3, "max_tokens": 12, **fixed}
    plain = server.post(path, body).json()
    nulls = dict.fromkeys({*kind.model_fields} - NEEDED - {"max_tokens"})
    together = {name: values[0] for name, values in neutral.items()}
    for fields in (nulls, together):
        answer = server.post(path, {**fields, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain["choices"]
    for name, values in neutral.items():
        for value in values:
            kind.model_validate({**body, name: value})


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_what_is_left_is_refused_by_name(kind: Any) -> None:
    """Every field that is only accepted at neutral values says so, with what to do."""
    properties = kind.model_json_schema()["properties"]
    only = [name for name, schema in properties.items() if "only where" in schema.get("description", "")]
    assert len(only) > 25
    fixed: dict[str, Any] = {"messages": CHAT} if kind is ChatRequest else {"prompt": "w1"}
    for name in only:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({"model": "tiny", **fixed, name: {"unheard": "of"}})
        assert any(e["loc"] == (name,) and "; leave it out" in e["msg"] for e in caught.value.errors()), name


def test_an_assistant_may_have_said_nothing(server: Running) -> None:
    """As in a conversation that OpenAI's client sends back; what came with a reply is taken back as it was."""
    silent = [{"content": ""}, {"content": None}, {}, {"content": None, "tool_calls": []}, {"content": []}]
    replies = set()
    for said in silent:
        messages = [*CHAT, {"role": "assistant", "refusal": None, "annotations": [], **said}, *CHAT]
        answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "temperature": 0})
        assert answer.status_code == 200, answer.text
        replies.add(answer.json()["choices"][0]["message"]["content"])
    assert len(replies) == 1


def test_what_a_client_says_of_caches_changes_nothing(server: Running) -> None:
    """Anthropic's mark, which proxies pass on; and a limit that is given twice is one limit."""
    mark = {"cache_control": {"type": "ephemeral"}}
    marked = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"], **mark}], **mark}]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    asked: list[dict[str, Any]] = [
        {"messages": CHAT},
        {"messages": marked},
        {"messages": CHAT, "max_completion_tokens": 5},
        {"messages": [{**marked[0], "cache_control": 1}]},
    ]
    found = [server.post("/v1/chat/completions", {**body, **fields}).json() for fields in asked]
    assert [(answer["choices"], answer["usage"]) for answer in found] == [(found[0]["choices"], found[0]["usage"])] * 4
    assert found[0]["usage"]["completion_tokens"] == 5


def test_a_ranking_of_as_many_replies_as_are_wanted_is_none(server: Running) -> None:
    body = {"model": "tiny", "prompt": "w1", "n": 3, "seed": 1}
    ranked, plain = (server.post("/v1/completions", {**body, **more}).json() for more in ({"best_of": 3}, {}))
    assert ranked["choices"] == plain["choices"]
