"""Options that several verbs share: which model, and how prompts are read. Nothing is opened here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genarm.errors import ConfigError
from genarm.model.placement import Loading


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Loading):
    """The model, and how to load it."""

    folder: str = field(
        metadata={
            "metavar": "FOLDER",
            "positional": True,
            "help": "a guided folder, another causal LM's folder, or a hub id (ID@REVISION)",
        }
    )


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What goes with every prompt."""

    weights: str | None = field(
        default=None,
        metadata={
            "metavar": "NAME=W,…",
            "help": "reward weights, as in helpful=1,harmless=0.5; the folder's own for those not named",
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "metavar": "E",
            "help": "the most nats that a token's distribution may be from the base's; where the weights would lead "
            "farther they are scaled down for that token, so that large ones do not garble; by default no bound",
        },
    )
    system: str | None = field(
        default=None, metadata={"metavar": "TEXT", "help": "a system message before the conversation"}
    )


@dataclass(frozen=True, kw_only=True)
class WishOptions:
    """Rewards in words, beside those of the folder."""

    wish: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "NAME=TEXT",
            "help": "a reward in words that needs no training: the model as it replies with the system message TEXT, "
            "less itself without; weight 1 (the default) is the prompted model, 2 more of it, below 0 the opposite; "
            "NAME=@FILE reads the text from a file; repeatable, and any model will do",
        },
    )


def pairs(items: Sequence[str] | None, form: str) -> dict[str, str]:
    """{name: value} of items in the form NAME=VALUE (raises ConfigError, which shows `form`)."""
    found: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"cannot read {item!r}; write {form}")
        if name in found:
            raise ConfigError(f"{name!r} is given twice; give each name once ({form})")
        found[name] = value
    return found


def read_wishes(items: Sequence[str] | None) -> dict[str, str]:
    """{name: system text} of --wish (raises ConfigError: another form, or a file that cannot be read)."""
    wishes = pairs(items, "--wish NAME=TEXT")
    for name, text in wishes.items():
        if text.startswith("@"):
            try:
                wishes[name] = Path(text[1:]).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read the text of the wish {name!r}: {error}") from error
    return wishes


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """What the chat template is told."""

    template_arg: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "NAME=VALUE",
            "help": "an argument of the chat template, as in enable_thinking=false; JSON, or else text; repeatable",
        },
    )


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(TemplateOptions):
    """How prompts become token ids."""

    plain_user_text: bool = field(
        default=False,
        metadata={
            "help": "control tokens' strings in prompts, such as <|im_end|>, are ordinary text; otherwise they are "
            "those tokens"
        },
    )


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """What drafts, besides the members."""

    draft: str | None = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "a small causal LM with the base's vocabulary that drafts in the base's stead",
        },
    )


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How a guided folder goes to the hub."""

    private: bool = field(default=False, metadata={"help": "make the repository a private one, if it is new"})
    license: str | None = field(
        default=None,
        metadata={
            "metavar": "ID",
            "help": "the licence that the card names, such as apache-2.0; by default that of all members, if it is one",
        },
    )
