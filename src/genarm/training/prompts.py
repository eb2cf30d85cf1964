"""Prompts alone, for a policy that draws its replies itself."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from genarm.data.formats.base import Preference
from genarm.data.preferences import PreferenceSet
from genarm.data.prompts import to_prompts
from genarm.data.sources import Rows, load_rows, read_text
from genarm.data.tokens import TokenReport
from genarm.errors import ConversationError, DataError
from genarm.text.prompts import Prompt, check_reading, encode_prompt
from genarm.training.config import TrainConfig
from genarm.training.data import HELD_OUT, TRAINING, Ids, TrainData, held_out_source, split_off

Read = TypeVar("Read")
TOO_LONG = "the prompt is too long"


@dataclass(frozen=True, kw_only=True)
class PromptReport(TokenReport):
    """What became of the rows that give prompts."""

    def lines(self) -> list[tuple[str, int]]:
        """Each count with its label."""
        cut = [("prompts cut from the left", self.cut_prompts)] if self.cut_prompts else []
        dropped = [(f"dropped: {reason}", count) for reason, count in self.dropped.items()]
        return [("rows", self.rows), *dropped, ("prompts kept", self.kept), *cut, ("tokens", self.tokens)]


def load_prompts(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[Ids]:
    """Distinct prompts to reply to, of preference pairs or of rows with a prompt alone, in tokens.

    A prompt of the latter is taken as in the former.
    """

    def encode(prompt: Prompt) -> list[Ids]:
        return [encode_prompt(tokenizer, prompt, config.reading)]

    read = load_readings(config, tokenizer, encode, cut=True)
    first = {
        name: [ids for (ids,) in items] for name, items in ((TRAINING, read.training), (HELD_OUT, read.held_out or ()))
    }
    return TrainData(
        training=first[TRAINING],
        held_out=None if read.held_out is None else first[HELD_OUT],
        reports=read.reports,
        formats=read.formats,
        leaked=read.leaked,
    )


def load_readings(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Prompt], Sequence[Ids]],
    *,
    cut: bool,
) -> TrainData[Sequence[Ids]]:
    """As `load_prompts`, each prompt as it is read in one way or several, as `encode` says.

    One that is longer than --max-prompt-tokens is cut from the left, or left out where `cut` is false.
    """
    check_reading(tokenizer, config.reading)
    chat = bool(tokenizer.chat_template) and not config.raw
    sources = {TRAINING: _read_prompts(config.data, config.split, config, chat)}
    if config.eval_data is not None or config.eval_split is not None:
        source, split = held_out_source(config)
        sources[HELD_OUT] = _read_prompts(source, split, config, chat)
    elif config.eval_fraction > 0:
        whole = sources[TRAINING]
        kept, held_back = split_off(whole, config)
        sources[TRAINING] = dataclasses.replace(whole, pairs=kept)
        sources[HELD_OUT] = dataclasses.replace(whole, pairs=held_back, malformed={})
    assert config.max_prompt_tokens is not None
    sets = {
        name: _encode_prompts(encode, source, config, f"{name} prompts", cut=cut) for name, source in sources.items()
    }
    trained = {pair.prompt_key for pair in sources[TRAINING].pairs}
    held_out = {pair.prompt_key for pair in sources[HELD_OUT].pairs} if HELD_OUT in sources else set()
    return TrainData(
        training=sets[TRAINING][0],
        held_out=sets[HELD_OUT][0] if HELD_OUT in sets else None,
        reports={name: report for name, (_, report) in sets.items()},
        formats={name: source.description for name, source in sources.items()},
        leaked=len(held_out & trained),
    )


def _read_prompts(source: str, split: str, config: TrainConfig, chat: bool) -> PreferenceSet:
    path = Path(source)
    rows: Rows
    if path.is_file() and path.name.lower().removesuffix(".gz").endswith(".txt"):
        # Not splitlines(): a form feed or U+2028 is a prompt's own, here as for `genarm generate`.
        rows = [{"prompt": line.rstrip("\r")} for line in read_text(path).split("\n") if line.strip()]
    else:
        rows = load_rows(source, split=split)
    return to_prompts(rows, source=source, objective=config.objective, chat=chat)


def _encode_prompts(
    encode: Callable[[Prompt], Sequence[Ids]], source: PreferenceSet, config: TrainConfig, what: str, *, cut: bool
) -> tuple[list[Sequence[Ids]], TokenReport]:
    longest = config.max_prompt_tokens
    assert longest is not None
    dropped: Counter[str] = Counter(source.malformed)
    kept: list[Sequence[Ids]] = []
    cuts = 0
    for prompt in _distinct(source.pairs, dropped):
        try:
            readings = encode(prompt)
        except ConversationError as error:  # such as: roles must alternate
            dropped[str(error)] += 1
            continue
        too_long = any(len(ids) > longest for ids in readings)
        if too_long and not cut:
            dropped[TOO_LONG] += 1
            continue
        cuts += too_long
        kept.append([ids[-longest:] for ids in readings])
    if not kept:
        raise DataError(f"{source.source} gives no {what}: {dict(dropped)}; expected rows with a prompt")
    report = PromptReport(
        rows=len(kept) + dropped.total(),
        kept=len(kept),
        dropped=dict(dropped),
        cut_prompts=cuts,
        tokens=sum(len(ids) for readings in kept for ids in readings),
    )
    return kept, report


def _distinct(pairs: Iterable[Preference], dropped: Counter[str]) -> Iterable[Prompt]:
    seen: set[str] = set()
    for pair in pairs:
        if pair.prompt_key in seen:
            dropped["the prompt has come before"] += 1
            continue
        seen.add(pair.prompt_key)
        yield pair.prompt
