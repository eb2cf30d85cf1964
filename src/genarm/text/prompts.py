"""From prompts and responses to token ids: one way for training, scoring and decoding.

A prompt is plain text, or a conversation: a list of messages {"role": …, "content": …}. A conversation goes
through the tokenizer's chat template; plain text is encoded as it is. The split between prompt and response
is the one decoding sees: the prompt's ids are those of the prompt alone, and the response's ids follow them, up to
the first that ends decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache, partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError, meta, nodes

from genarm.errors import ConfigError, ConversationError, DataError, GenarmError, kind_at, kind_of
from genarm.text.detokenizer import decode
from genarm.text.left_out import check_said, check_written, says
from genarm.text.plain import plain

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message]

OWN_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("tools", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""What `apply_chat_template` is given by us or has for itself, so no template argument can be called so."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How prompts become token ids, beyond what the tokenizer's own files say.

    Attributes:
        template_args: further arguments of the chat template, such as {"enable_thinking": False}; text that is no
            conversation has no template, so they have no part in it.
        plain_user_text: what a prompt says is ordinary text: a control token's string in it (`<|im_end|>`) is not that
            token. Otherwise it is, as with transformers and others. Of an assistant's turns, marks that are no special
            tokens (`<think>`) stay what the model made of them.

    Raises:
        ConfigError: a name that no argument can have.
    """

    template_args: Mapping[str, Any] = field(default_factory=dict)
    plain_user_text: bool = False

    def __post_init__(self) -> None:
        for name in self.template_args:
            if name in OWN_ARGUMENTS:
                raise ConfigError(f"the template argument {name!r} is decided here already; leave it out")
            if not (isinstance(name, str) and name.isidentifier()):
                raise ConfigError(f"{name!r:.80} cannot be the name of a template argument; it must be an identifier")


USUAL = Reading()
"""As the tokenizer's files say."""


def read_template_args(given: Sequence[str]) -> dict[str, Any]:
    """{name: value} of arguments in the form NAME=VALUE; a value is JSON where it can be read so, else text.

    Raises:
        ConfigError: one without a name or an equals sign, or a name that is given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--template-arg is {text!r:.80}; write NAME=VALUE, as in enable_thinking=false")
        if name.strip() in found:
            raise ConfigError(f"--template-arg gives {name.strip()} twice; give it once")
        try:
            found[name.strip()] = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError):
            found[name.strip()] = value
    return found


def check_reading(tokenizer: PreTrainedTokenizerBase, reading: Reading) -> None:
    """Refuse template arguments that nothing would read: they would do nothing, and nobody would be told.

    Raises:
        ConfigError: there is no chat template, or it has no such argument.
    """
    if not reading.template_args:
        return
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it takes no template arguments; leave "
            f"out {', '.join(reading.template_args)}"
        )
    names = _variables(tokenizer.get_chat_template()) - _GIVEN
    unknown = [name for name in reading.template_args if name not in names]
    if unknown:
        close = get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"those it reads are: {', '.join(sorted(names)) or 'none'}"
        raise ConfigError(f"the chat template has no argument {unknown[0]!r}; {hint}")


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def as_conversation(prompt: str, system: str | None = None) -> list[Message]:
    """One user turn, after an optional system message."""
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]


def check_end(messages: Sequence[Message], *, continued: bool | None = None) -> None:
    """Refuse a conversation that ends with nothing to answer; see `encode_prompt` (raises ConversationError)."""
    last = messages[-1]["role"] if messages else "nobody"
    if last == "assistant" and continued is None:
        raise ConversationError(
            "the conversation ends with a message of the assistant; it must end with one to answer, such as the user's "
            "(genarm serve continues an assistant's message where continue_final_message is true)"
        )
    if last != "assistant" and continued:
        raise ConversationError(f"only an assistant's message can be continued, and the last one is of the {last}")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reading: Reading = USUAL, *, continued: bool | None = None
) -> list[int]:
    """Ids of `prompt`, ready for a response to follow.

    A conversation ends with the template's generation prompt; plain text begins with the tokenizer's own
    special tokens (BOS, where it has one) and never ends with EOS.

    Args:
        tokenizer: the model's.
        prompt: text or messages.
        reading: how it is read.
        continued: what to do with a conversation that ends with an assistant's message: True continues it, where it
            stops; False begins another turn after it; None refuses it.

    Raises:
        DataError: a conversation for a tokenizer without a chat template, or a prompt of no tokens.
        ConfigError: an argument that the template does not have.
        UnsupportedError: `plain_user_text` with a tokenizer that cannot keep it apart.
        ConversationError: the chat template refuses the conversation, or it ends with nothing to answer.
    """
    if isinstance(prompt, str):
        typed = reading.plain_user_text and plain(tokenizer).has_control(prompt)
        ids = plain(tokenizer).encode([(prompt, False)], special=True) if typed else list(tokenizer(prompt).input_ids)
        if ids and ids[-1] == tokenizer.eos_token_id and (typed or not prompt.endswith(str(tokenizer.eos_token))):
            ids.pop()  # some tokenizers close every text with EOS; a response must be able to follow
    else:
        check_end(prompt, continued=continued)
        render = _render_open if continued else partial(_render, add_generation_prompt=True)
        text = render(tokenizer, prompt, reading)
        check_said(prompt, text)
        read_so = (reading.template_args, bool(continued))
        check_written(tokenizer, prompt, text, lambda told: render(tokenizer, told, reading), read_so)
        parts = _parts(tokenizer, prompt, reading, text, render) if reading.plain_user_text else None
        if parts is None:
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        else:
            ids = plain(tokenizer).encode(parts, special=False)
    if not ids:
        raise DataError("the prompt is empty: it has no tokens; give at least one character")
    return ids


def plain_message(message: Any) -> Any:
    """A message as files and clients have it, in its plain form, {"role": text, "content": text}.

    OpenAI's list of text parts becomes their text, an assistant's null content no text, and keys whose value asks for
    nothing (null, an empty list or object) are left out. What is no message stays as it is, for the caller to refuse.

    Raises:
        ConversationError: a list of parts with more in it than text.
    """
    if not isinstance(message, Mapping):
        return message
    plain = {key: value for key, value in message.items() if key == "content" or value not in (None, [], {})}
    if isinstance(plain.get("content"), list):
        plain["content"] = text_of(plain["content"])
    elif "content" in plain and plain["content"] is None and plain.get("role") == "assistant":
        plain["content"] = plain["content"] if "tool_calls" in plain else ""
    return plain


def text_of(content: Any) -> str:
    """What a message says: its content where that is text, or the texts of its parts, {"type": "text", "text": …}.

    Of a part, keys that ask for nothing are left out, and so are hints on what to keep in a cache.

    Raises:
        ConversationError: it is neither, or a part has more than text; the message names the first thing too many.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConversationError(f"the content is {kind_of(content)}; {_CONTENT}")
    return "".join(map(_part, content))


_CONTENT = 'it must be a text or a list of {"type": "text", "text": …}; only text is understood'
_HINTS = ("cache_control", "prompt_cache_breakpoint")


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        raise ConversationError(f"the content has {kind_of(part)} among its parts; {_CONTENT}")
    kind = part.get("type", "text")
    if kind != "text":
        raise ConversationError(f"the content has a part of the type {kind!r:.80}; {_CONTENT}")
    for key, value in part.items():
        if key not in ("type", "text", *_HINTS) and value not in (None, [], {}):
            raise ConversationError(f"the content has a part with the key {key!r:.80}; {_CONTENT}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ConversationError(f"the content has a part whose text is {kind_at(part, 'text')}; {_CONTENT}")
    return text


def check_prompt_ids(ids: Sequence[int], size: int) -> None:
    """Refuse a prompt without ids, or with one that a model of `size` ids does not have (raises DataError)."""
    if not ids:
        raise DataError("the prompt has no token ids; give at least one")
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise DataError(f"the prompt has the token id {wrong}; this model's ids go from 0 to {size - 1}")


def end_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a reply: those of a model's generation config, the tokenizer's EOS, the template's turn end."""
    named = None if config is None else config.eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, _turn_end(tokenizer)}
    return sorted(ids - {None})


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    reading: Reading = USUAL,
    *,
    ends: Collection[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Ids of `prompt` and of `response` after it, up to the first of `ends`, which is included.

    Both are encoded together where the prompt's own ids come out unchanged, as SentencePiece needs; otherwise
    (a token would straddle the boundary, which decoding can never produce) the response is encoded alone, or as it is
    behind a line break where only that makes the same text.

    Args:
        tokenizer: the model's.
        prompt: text or messages.
        response: its text.
        reading: how prompts are read.
        ends: the ids that end decoding, by `end_ids`; None for those that the tokenizer alone tells.

    Raises:
        DataError: as `encode_prompt`, or a chat template that changes the prompt when a response follows.
        ConversationError: as `encode_prompt`, or a response that goes on after a token that ends it.
    """
    ends = end_ids(None, tokenizer) if ends is None else ends
    prompt_ids = encode_prompt(tokenizer, prompt, reading)
    if isinstance(prompt, str):
        response_ids = _continuation(tokenizer, prompt_ids, prompt, response, special=True)
        return prompt_ids, _close(tokenizer, response, response_ids, ends)
    before = _render(tokenizer, prompt, reading, add_generation_prompt=True)
    reply: Message = {"role": "assistant", "content": response}
    whole = _render(tokenizer, [*prompt, reply], reading, add_generation_prompt=False)
    if not whole.startswith(before):
        raise DataError(
            "the chat template changes the prompt once a response follows: the text with the response does not "
            f"begin with the text that asks for it (…{before[-60:]!r} against …{whole[: len(before)][-60:]!r}); "
            "use a template whose generation prompt is a prefix of the assistant turn"
        )
    if not says(whole[len(before) :], response):
        raise ConversationError(
            "the chat template does not write the response down as it is (it leaves out what was thought, say), so "
            "that something else would be read; use another template, or text without one"
        )
    response_ids = _continuation(tokenizer, prompt_ids, before, whole[len(before) :], special=False)
    return prompt_ids, _close(tokenizer, response, response_ids, ends)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reading: Reading, **options: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it cannot format a conversation; "
            "use plain-text prompts, or a tokenizer with a chat template (training: --chat-template FILE)"
        )
    check_reading(tokenizer, reading)
    options = {**options, **reading.template_args}
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))
    except TemplateError as error:
        system = any(message["role"] == "system" for message in messages)
        hint = "; if that is for the system message, put its text into the user's first" if system else ""
        raise ConversationError(f"the chat template does not take this conversation: {error}{hint}") from error


def _render_open(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reading: Reading) -> str:
    """The conversation up to where its last message stops, so that a response goes on with it."""
    said, end = messages[-1]["content"], f"q{token_hex(16)}z"
    opened: Message = {**messages[-1], "content": said + end}
    text = _render(tokenizer, [*messages[:-1], opened], reading, add_generation_prompt=False)
    before, *after = text.split(end)
    if len(after) != 1 or not before.endswith(said.lstrip()):  # templates trim the beginning, at most
        raise ConversationError(
            "the chat template does more with the last message than write it down, so that it cannot be continued; end "
            "the conversation with a message to answer"
        )
    return before


def _parts(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    reading: Reading,
    text: str,
    render: Callable[[PreTrainedTokenizerBase, Sequence[Message], Reading], str],
) -> list[tuple[str, bool]] | None:
    """`text`, which `render` makes of `messages`, in parts, each with whether it is the template's own.

    None where nothing in the messages is like a control token. Otherwise what is, is found by its place: the template
    is given a secret word in its stead.
    """
    keeper = plain(tokenizer)
    typed: dict[str, str] = {}

    def hide(value: Any, ids: frozenset[int]) -> Any:
        if isinstance(value, Mapping):
            return {key: hide(item, ids) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [hide(item, ids) for item in value]
        if not isinstance(value, str) or not keeper.has_control(value, ids):
            return value
        word = f"q{token_hex(16)}z"
        typed[word] = value
        return word

    hidden = [
        hide(message, keeper.special if message["role"] == "assistant" else keeper.control) for message in messages
    ]
    arguments = hide(dict(reading.template_args), keeper.control)
    if not typed:
        return None
    shown = render(tokenizer, hidden, replace(reading, template_args=arguments))
    parts: list[tuple[str, bool]] = []
    rest = text
    pieces = re.split(f"({'|'.join(typed)})", shown)
    for own, word, following in zip(pieces[::2], [*pieces[1::2], ""], [*pieces[2::2], ""], strict=True):
        said = typed.get(word, "")
        kept = (said, said.strip(), said.rstrip(), said.lstrip())  # templates trim, and do no more where we can follow
        given = next((form for form in kept if rest.startswith(own + form + following)), None)
        if given is None:
            break
        parts += [(own, True), (given, False)]
        rest = rest[len(own) + len(given) :]
    if rest or len(parts) != len(pieces) + 1:
        raise ConversationError(
            "a message has the string of a control token in it, and the chat template does more with messages than "
            "write them down, so that it cannot be read as ordinary text; take it out of the message, or leave plain "
            "user text out"
        )
    return parts


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """Names that a chat template takes from outside: those that it reads before it sets them, if it ever does."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    first: dict[str, bool] = {}

    def walk(node: nodes.Node) -> None:
        if isinstance(node, nodes.Name):
            first.setdefault(node.name, node.ctx == "load")
        value_first = [node.node, node.target] if isinstance(node, nodes.Assign) else node.iter_child_nodes()
        for child in value_first:
            walk(child)

    walk(tree)
    return frozenset(name for name in meta.find_undeclared_variables(tree) if first[name])


_GIVEN = OWN_ARGUMENTS | {
    *("raise_exception", "strftime_now", "range", "dict", "namespace", "cycler", "joiner", "lipsum"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    "additional_special_tokens",
}
"""Names in templates that are no arguments of a user's."""


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], before: str, after: str, *, special: bool
) -> list[int]:
    together = list(tokenizer(before + after, add_special_tokens=special).input_ids)
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    alone = list(tokenizer(after, add_special_tokens=False).input_ids)

    def text(ids: list[int], *, special: bool = True) -> str:
        return decode(tokenizer, [*prompt_ids, *ids], special=special)

    written = text([]) + after
    if text(alone) in (before + after, written):
        return alone
    # Alone it may begin with a space of its own, which SentencePiece puts before every text: let that go elsewhere.
    anchor, behind = tokenizer([_ANCHOR, _ANCHOR + after], add_special_tokens=False).input_ids
    anchored = list(behind[len(anchor) :]) if behind[: len(anchor)] == anchor else alone
    if text(anchored) == written:
        return anchored
    made = decode(tokenizer, together, special=False)  # some tokenizers write other text than they were given
    return anchored if text(alone, special=False) != made == text(anchored, special=False) else alone


_ANCHOR = "\n"


def _close(
    tokenizer: PreTrainedTokenizerBase, response: str, response_ids: list[int], ends: Collection[int]
) -> list[int]:
    """`response_ids` up to the first of `ends`, or with EOS added where it has none.

    Decoding stops there, so nothing that the template puts after it (a newline, EOS) belongs to the response.
    """
    place = next((i for i, token in enumerate(response_ids) if token in ends), None)
    if place is None:
        closing = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends, default=None)
        return response_ids if closing is None else [*response_ids, closing]
    texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in ends]
    first, *others = re.split("|".join(map(re.escape, texts)), response)
    if any(other.strip() for other in others) or (place == 0 and first.strip()):
        name = tokenizer.convert_ids_to_tokens(response_ids[place])
        where = "at its beginning" if place == 0 else "inside it"
        raise ConversationError(f"decoding would end at {name} {where}, before the response is over")
    return response_ids[: place + 1]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after what an assistant says, where there is one."""
    if not tokenizer.chat_template:
        return None
    said = "genarm"
    try:
        text = _render(tokenizer, [*as_conversation("?"), {"role": "assistant", "content": said}], USUAL)
    except GenarmError:  # it takes no such conversation; those that it takes are tried when they come
        return None
    _, found, after = text.rpartition(said)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ids = tokenizer(after, add_special_tokens=False).input_ids if found else []
    return next((i for i in ids if i in special), None)
