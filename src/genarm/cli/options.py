"""Options that several verbs share: which model, and how prompts are read. Nothing is opened here."""

from __future__ import annotations

from dataclasses import dataclass, field

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
