"""From prompts and responses to token ids: one way for training, scoring and decoding.

A prompt is plain text, or a conversation: a list of messages {"role": …, "content": …}. A conversation goes
through the tokenizer's chat template; plain text is encoded as it is. The split between prompt and response
is the one decoding sees: the prompt's ids are those of the prompt alone, and the response's ids follow them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from genarm.errors import ConversationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message]


def as_conversation(prompt: str, system: str | None = None) -> list[Message]:
    """One user turn, after an optional system message."""
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of `prompt`, ready for a response to follow.

    A conversation ends with the template's generation prompt; plain text begins with the tokenizer's own
    special tokens (BOS, where it has one) and never ends with EOS.

    Raises:
        DataError: a conversation for a tokenizer without a chat template, or a prompt of no tokens.
        ConversationError: the chat template refuses the conversation.
    """
    if isinstance(prompt, str):
        ids: list[int] = list(tokenizer(prompt).input_ids)
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids.pop()  # some tokenizers close every text with EOS; a response must be able to follow
    else:
        text = _render(tokenizer, prompt, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise DataError("the prompt is empty: it has no tokens; give at least one character")
    return ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
    """Ids of `prompt` and of `response` after it, the end-of-turn (EOS) token included.

    Both are encoded together where the prompt's own ids come out unchanged, as SentencePiece needs; otherwise
    (a token would straddle the boundary, which decoding can never produce) the response is encoded alone.

    Raises:
        DataError: as `encode_prompt`, or a chat template that changes the prompt when a response follows.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        response_ids = _continuation(tokenizer, prompt_ids, prompt, response, special=True)
        return prompt_ids, _close(tokenizer, response_ids)
    before = _render(tokenizer, prompt, add_generation_prompt=True)
    reply: Message = {"role": "assistant", "content": response}
    whole = _render(tokenizer, [*prompt, reply], add_generation_prompt=False)
    if not whole.startswith(before):
        raise DataError(
            "the chat template changes the prompt once a response follows: the text with the response does not "
            f"begin with the text that asks for it (…{before[-60:]!r} against …{whole[: len(before)][-60:]!r}); "
            "use a template whose generation prompt is a prefix of the assistant turn"
        )
    response_ids = _continuation(tokenizer, prompt_ids, before, whole[len(before) :], special=False)
    return prompt_ids, _close(tokenizer, response_ids)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text of `ids`: joined, the pieces are the text.

    Decoding token by token would lose the spaces before words (SentencePiece) and break characters that take
    several tokens; of such a character the last token has the text and the others have none.
    """
    pieces: list[str] = []
    shown = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = not text.endswith("\ufffd") or end == len(ids)
        pieces.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return tuple(pieces)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it cannot format a conversation; "
            "use plain-text prompts, or a tokenizer with a chat template (training: --chat-template FILE)"
        )
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))
    except TemplateError as error:
        raise ConversationError(f"the chat template does not take this conversation: {error}") from error


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], before: str, after: str, *, special: bool
) -> list[int]:
    together = list(tokenizer(before + after, add_special_tokens=special).input_ids)
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    return list(tokenizer(after, add_special_tokens=False).input_ids)


def _close(tokenizer: PreTrainedTokenizerBase, response_ids: list[int]) -> list[int]:
    """`response_ids` up to its last EOS, or with an EOS added where it has none.

    Templates differ in what they put after the end-of-turn token (a newline, nothing); decoding stops at EOS,
    so nothing after it belongs to the response.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        return response_ids
    if eos in response_ids:
        last = len(response_ids) - response_ids[::-1].index(eos)
        return response_ids[:last]
    return [*response_ids, eos]
