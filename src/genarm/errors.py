"""The one exception tree of the project.

    GenarmError (ValueError)
    ├── ConfigError       an option or a configuration file does not hold together
    ├── DataError         a data set, a prompt file or an output file is not what it should be
    │   └── ConversationError  a chat template refuses a conversation
    ├── MemberError       a base or a reward cannot be found, loaded or combined
    │   └── VocabularyError   the tokenizers of two members really differ
    ├── WeightsError      reward weights that name no reward, or are not finite numbers
    │   └── BudgetError       a bound on nats per token that is none
    ├── UnsupportedError  something that a guided model cannot do
    └── MissingExtraError an optional dependency is not installed

    EngineFailure (RuntimeError)  no mistake of the caller: the engine was closed, or a step of it failed

Each message says what was got, what is allowed and what to do. The command line prints it on one line.
"""

from __future__ import annotations

from collections.abc import Mapping


class GenarmError(ValueError):
    """A mistake that the caller can mend."""


class ConfigError(GenarmError):
    """An option or a configuration file does not hold together."""


class DataError(GenarmError):
    """A data set, a prompt file or an output file is not what it should be."""


class ConversationError(DataError):
    """A chat template refuses a conversation: a system message, say, or two turns of one side."""


class MemberError(GenarmError):
    """A base or a reward cannot be found, loaded or combined with the others."""


class VocabularyError(MemberError):
    """The tokenizers of two members differ on tokens that both know."""


class WeightsError(GenarmError):
    """Reward weights that name no reward, have the wrong shape or are not finite."""


class BudgetError(WeightsError):
    """A bound on how far a token's distribution may be from the base's that is no number of nats."""


class UnsupportedError(GenarmError):
    """Something that a guided model cannot do."""


class MissingExtraError(GenarmError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'genarm[{extra}]'")


def kind_of(value: object) -> str:
    """What `value` is, in JSON's words where it has some, for messages."""
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    kinds = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    name = type(value).__name__
    return kinds.get(type(value), f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}")


def kind_at(record: Mapping[str, object], key: str) -> str:
    """What `record` has under `key`, for messages: as `kind_of`, or that there is nothing."""
    return kind_of(record[key]) if key in record else "missing"


class EngineFailure(RuntimeError):  # noqa: N818 (not the caller's error)
    """The decoding engine was closed, or a step of it failed; what was running has ended."""
