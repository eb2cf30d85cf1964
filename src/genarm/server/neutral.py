"""Fields of OpenAI's API and of vLLM's that ask for what this server does not do.

At the values below they ask for nothing, and clients send them. Any other value is refused by name: a field that is
accepted and ignored would look as if it worked.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema


class Only:
    """A field that may be null or one of a few values."""

    def __init__(self, why: str, *values: Any) -> None:
        """Say `why` where it is anything else."""
        self.why = why
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values), "description": f"only where it asks for nothing: {self.why}"}

    def _check(self, value: Any) -> Any:
        for allowed in self.values:
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return allowed
        shown = " or ".join(json.dumps(allowed) for allowed in self.values[1:])
        otherwise = f", or send {shown}" if shown else ""
        raise PydanticCustomError("unsupported", "{message}", {"message": f"{self.why}; leave it out{otherwise}"})


_NO_TOOLS = "this server calls no tools or functions"
_FREE = "replies are free text, of no given form"
_ONE_WAY = "replies are drawn token by token, with no search"
_TEXT_ONLY = "only text is understood and written"
_NO_REASONING = "reasoning is not told apart from the reply; how much a model reasons is its chat template's matter"
_TEMPLATES = 'it belongs to the chat template, as in chat_template_kwargs: {"enable_thinking": false}'
_NOTHING_SPECIAL = "replies are texts without special tokens"
_OTHER_WAYS = "answers have no such part"
_WHOLE = "a prompt that is too long is refused, never cut"
_THEIRS = "it belongs to vLLM's own server"
_MARKED = "nothing is watermarked"
_BANS = "ban or allow tokens with logit_bias"
Label: TypeAlias = str | None
"""A label or hint of the client's own, which changes no reply: accepted and not used."""
CacheHint: TypeAlias = Annotated[Any, Field(description="of a cache; accepted and not used")]


class NeutralFields(BaseModel):
    """Of both ways to ask."""

    # OpenAI's
    response_format: Annotated[Any, Only(_FREE, {"type": "text"})] = None
    # vLLM's
    use_beam_search: Annotated[Any, Only(_ONE_WAY, False)] = None
    length_penalty: Annotated[Any, Only(_ONE_WAY, 1)] = None
    skip_special_tokens: Annotated[Any, Only(_NOTHING_SPECIAL, True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(_NOTHING_SPECIAL, True, False)] = None
    include_stop_str_in_output: Annotated[Any, Only("a reply ends before the text that stops it", False)] = None
    truncate_prompt_tokens: Annotated[Any, Only(_WHOLE)] = None
    truncation_side: Annotated[Any, Only(_WHOLE, "left", "right")] = None
    allowed_token_ids: Annotated[Any, Only(_BANS)] = None
    bad_words: Annotated[Any, Only(_BANS, [])] = None
    structured_outputs: Annotated[Any, Only(_FREE)] = None
    guided_json: Annotated[Any, Only(_FREE)] = None
    guided_regex: Annotated[Any, Only(_FREE)] = None
    guided_choice: Annotated[Any, Only(_FREE)] = None
    guided_grammar: Annotated[Any, Only(_FREE)] = None
    prompt_logprobs: Annotated[Any, Only("the prompt's log-probabilities come with echo of /v1/completions")] = None
    logprob_token_ids: Annotated[Any, Only("log-probabilities are those of the likeliest tokens", [])] = None
    return_tokens_as_token_ids: Annotated[Any, Only(_OTHER_WAYS, False)] = None
    return_token_ids: Annotated[Any, Only(_OTHER_WAYS, False)] = None
    return_token_offsets: Annotated[Any, Only(_OTHER_WAYS, False)] = None
    routed_experts_prompt_start: Annotated[Any, Only(_OTHER_WAYS, 0)] = None
    priority: Annotated[Any, Only("requests run in the order of their arrival", 0)] = None
    request_id: Annotated[Any, Only("requests are named by the server, in the header X-Request-Id")] = None
    session_id: Label = None
    chat_id: Label = None
    metadata: dict[str, Any] | None = None
    stream_interval: Annotated[Any, Only("every token is sent as it comes", 1)] = None
    repetition_detection: Annotated[Any, Only("no reply is ended for repeating itself; see repetition_penalty")] = None
    thinking_token_budget: Annotated[Any, Only(_NO_REASONING, -1)] = None
    watermarking: Annotated[Any, Only(_MARKED, False)] = None
    mm_payload: Annotated[Any, Only(_TEXT_ONLY, "tensors", "none")] = None
    return_mm_kwargs: Annotated[Any, Only(_TEXT_ONLY, False)] = None
    cache_salt: Annotated[Any, Only("what the engine keeps of prompts is shared by all requests")] = None
    kv_transfer_params: Annotated[Any, Only(_THEIRS)] = None
    ec_transfer_params: Annotated[Any, Only(_THEIRS)] = None
    vllm_xargs: Annotated[Any, Only(f"{_THEIRS}; here weights are the field reward_weights", {})] = None


class NeutralChatFields(NeutralFields):
    """Of conversations."""

    # OpenAI's
    tools: Annotated[Any, Only(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, Only(_NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(_NO_TOOLS, True, False)] = None
    functions: Annotated[Any, Only(_NO_TOOLS, [])] = None
    function_call: Annotated[Any, Only(_NO_TOOLS, "none", "auto")] = None
    modalities: Annotated[Any, Only(_TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, Only(_TEXT_ONLY)] = None
    store: Annotated[Any, Only("nothing is stored", False)] = None
    service_tier: Annotated[Any, Only("there is one tier", "auto", "default")] = None
    reasoning_effort: Annotated[Any, Only(_NO_REASONING, "none")] = None
    verbosity: Annotated[Any, Only("how long replies are is the model's matter; see max_tokens", "medium")] = None
    prediction: Annotated[Any, Only("nothing is predicted")] = None
    moderation: Annotated[Any, Only("nothing is moderated")] = None
    web_search_options: Annotated[Any, Only("the web is not searched")] = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_options: CacheHint = None
    prompt_cache_retention: Label = None
    enable_thinking: Annotated[Any, Only(_TEMPLATES)] = None
    thinking: Annotated[Any, Only(_TEMPLATES)] = None
    # vLLM's
    include_reasoning: Annotated[Any, Only(_NO_REASONING, True, False)] = None
    echo: Annotated[Any, Only("the last message is not repeated", False)] = None
    add_special_tokens: Annotated[Any, Only("special tokens are the chat template's matter", False)] = None
    documents: Annotated[Any, Only("there is no retrieval; put documents into a message", [])] = None
    chat_template: Annotated[Any, Only("the chat template is the model's own")] = None
    media_io_kwargs: Annotated[Any, Only(_TEXT_ONLY, {})] = None
    mm_processor_kwargs: Annotated[Any, Only(_TEXT_ONLY, {})] = None
    return_prompt_text: Annotated[Any, Only(_OTHER_WAYS, False)] = None


class NeutralTextFields(NeutralFields):
    """Of completions."""

    add_special_tokens: Annotated[Any, Only("a text begins with the tokenizer's special tokens", True)] = None
    prompt_embeds: Annotated[Any, Only("prompts are texts or token ids")] = None
