"""From preference pairs to token ids, with an account of everything that was dropped or cut.

Lengths are in tokens. A prompt is cut from the left, so that what is nearest to the response stays; a response is
cut from the right and then has no token that ends it, since the cut is not where its author stopped.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from genarm.data.formats.base import Preference
from genarm.data.preferences import PreferenceSet
from genarm.errors import ConfigError, ConversationError, DataError
from genarm.text.prompts import USUAL, Reading, encode_pair, end_ids

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

IDENTICAL = "chosen and rejected are identical"
IDENTICAL_CUT = "chosen and rejected are identical once cut"
EMPTY = "a response is empty"
EMPTY_PROMPT = "the prompt has no tokens"

# Characters of each text of an example.
EXAMPLE_WIDTH = 400

# Lengths that are used where neither the user nor a short context asks for others.
DEFAULT_TOKENS = 512


def fit_lengths(prompt: int | None, response: int | None, context: int | None, *, model: str) -> tuple[int, int]:
    """The most tokens of a prompt and of a response: as given, or so that both fit into the model's context.

    Raises:
        ConfigError: those given do not fit.
    """
    if context is None:
        return prompt or DEFAULT_TOKENS, response or DEFAULT_TOKENS
    if prompt is None:
        prompt = min(DEFAULT_TOKENS, context - response if response else context // 2)
    if response is None:
        response = min(DEFAULT_TOKENS, context - prompt)
    if prompt < 1 or response < 1 or prompt + response > context:
        raise ConfigError(
            f"prompts of {prompt} and responses of {response} tokens do not fit into the {context} tokens of context "
            f"that {model} has for texts read together; lower --max-prompt-tokens or --max-response-tokens"
        )
    return prompt, response


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Token ids of one pair; responses include the token that ends them unless they were cut."""

    prompt_ids: array[int]
    chosen_ids: array[int]
    rejected_ids: array[int]

    @property
    def parts(self) -> dict[str, Sequence[int]]:
        """Its token ids by what they are, for a reader."""
        return {"prompt": self.prompt_ids, "chosen": self.chosen_ids, "rejected": self.rejected_ids}

    @property
    def width(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """What became of the rows of one data set. `dropped` maps a reason to a number of rows."""

    rows: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    cut_prompts: int = 0
    cut_chosen: int = 0
    cut_rejected: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        assert self.rows == self.kept + sum(self.dropped.values()), "every row is kept or dropped for a reason"

    def lines(self) -> list[tuple[str, int]]:
        """Each count with its label, zeros left out except for the rows and the pairs kept."""
        cuts = [
            ("prompts cut from the left", self.cut_prompts),
            ("chosen responses cut from the right", self.cut_chosen),
            ("rejected responses cut from the right", self.cut_rejected),
        ]
        dropped = [(f"dropped: {reason}", count) for reason, count in self.dropped.items()]
        return [
            ("rows", self.rows),
            *dropped,
            ("pairs kept", self.kept),
            *[(label, count) for label, count in cuts if count],
            ("tokens", self.tokens),
        ]


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Tokenised pairs and their report."""

    pairs: Sequence[TokenPair]
    report: TokenReport


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    preferences: Iterable[Preference],
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    malformed: Mapping[str, int] | None = None,
    ends: Sequence[int] | None = None,
    reading: Reading = USUAL,
) -> TokenSet:
    """Token ids of each pair that is worth training on; `malformed` rows join the report's dropped ones.

    `ends` are the ids that end a response, as for `genarm.text.prompts.encode_pair`.

    Raises:
        DataError: nothing is left, or a conversation meets a tokenizer without a chat template.
    """
    counts: Counter[str] = Counter(malformed or {})
    cuts: Counter[str] = Counter()
    kept: list[TokenPair] = []
    ends = end_ids(None, tokenizer) if ends is None else ends
    for preference in preferences:
        outcome = encode_preference(tokenizer, preference, max_prompt_tokens, max_response_tokens, cuts, ends, reading)
        if isinstance(outcome, TokenPair):
            kept.append(outcome)
        else:
            counts[outcome] += 1
    report = TokenReport(
        rows=len(kept) + counts.total(),
        kept=len(kept),
        dropped=dict(counts),
        cut_prompts=cuts["prompt"],
        cut_chosen=cuts["chosen"],
        cut_rejected=cuts["rejected"],
        tokens=sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in kept),
    )
    if not kept:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in counts.items()) or "there were no rows"
        raise DataError(f"no pair is left to use: {reasons}; check the data and the --max-…-tokens")
    return TokenSet(pairs=kept, report=report)


def split_by_prompt(
    preferences: PreferenceSet, fraction: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """(training, held out): about `fraction` of the distinct prompts, with all their pairs.

    Either side has one prompt at least.

    Raises:
        DataError: there is only one prompt, so that nothing could be held out.
    """
    keys = list(dict.fromkeys(pair.prompt_key for pair in preferences.pairs))
    if len(keys) < 2:
        raise DataError(
            f"{preferences.source} has one prompt only, so none can be held out for evaluation; "
            "give --eval-data, or --eval-fraction 0"
        )
    random.Random(seed).shuffle(keys)
    held_out = set(keys[: min(max(1, round(fraction * len(keys))), len(keys) - 1)])
    return (
        [pair for pair in preferences.pairs if pair.prompt_key not in held_out],
        [pair for pair in preferences.pairs if pair.prompt_key in held_out],
    )


def report_table(reports: Mapping[str, TokenReport]) -> Table:
    """One column per data set, one row per count."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    labels = dict.fromkeys(label for report in reports.values() for label, _ in report.lines())
    for label in sorted(labels, key=_line_order):
        counts = [dict(report.lines()).get(label, 0) for report in reports.values()]
        table.add_row(label, *(f"{count:,}" for count in counts))
    return table


def example_lines(tokenizer: PreTrainedTokenizerBase, item: TokenPair | Sequence[int]) -> list[str]:
    """A pair, or a prompt alone, as the model reads it: special tokens and line breaks are visible."""
    parts = item.parts if isinstance(item, TokenPair) else {"prompt": item}
    lines = []
    for name, ids in parts.items():
        text = repr(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        shown = text if len(text) <= EXAMPLE_WIDTH else f"{text[: EXAMPLE_WIDTH // 2]} … {text[-EXAMPLE_WIDTH // 2 :]}"
        lines.append(f"{name}: {shown}")
    return lines


def _line_order(label: str) -> int:
    order = ("rows", "dropped", "pairs", "prompts", "chosen", "rejected", "tokens")
    return order.index(label.split()[0].rstrip(":"))


def encode_preference(
    tokenizer: PreTrainedTokenizerBase,
    preference: Preference,
    max_prompt_tokens: int,
    max_response_tokens: int,
    cuts: Counter[str],
    ends: Sequence[int] | None = None,
    reading: Reading = USUAL,
) -> TokenPair | str:
    """The pair in tokens, or the reason to drop it. Only pairs that are kept count as cut."""
    if not preference.chosen.strip() or not preference.rejected.strip():
        return EMPTY
    if isinstance(preference.prompt, str) and not tokenizer(preference.prompt).input_ids:
        return EMPTY_PROMPT  # with a BOS token, an empty prompt is one that can be answered
    if preference.chosen == preference.rejected:
        return IDENTICAL
    try:
        prompt_ids, chosen_ids = encode_pair(tokenizer, preference.prompt, preference.chosen, reading, ends=ends)
        _, rejected_ids = encode_pair(tokenizer, preference.prompt, preference.rejected, reading, ends=ends)
    except ConversationError as error:  # such as: roles must alternate
        return str(error)
    if chosen_ids[:max_response_tokens] == rejected_ids[:max_response_tokens]:
        return IDENTICAL if chosen_ids == rejected_ids else IDENTICAL_CUT
    cuts["prompt"] += len(prompt_ids) > max_prompt_tokens
    cuts["chosen"] += len(chosen_ids) > max_response_tokens
    cuts["rejected"] += len(rejected_ids) > max_response_tokens
    return TokenPair(
        prompt_ids=array("i", prompt_ids[-max_prompt_tokens:]),
        chosen_ids=array("i", chosen_ids[:max_response_tokens]),
        rejected_ids=array("i", rejected_ids[:max_response_tokens]),
    )
