"""What a run trains on and what it holds out: pairs in tokens, or prompts alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from transformers import PreTrainedTokenizerBase

from genarm.data.preferences import Preference, PreferenceSet, load_preferences
from genarm.data.prompts import to_prompts
from genarm.data.sources import load_rows
from genarm.data.tokens import TokenPair, TokenReport, split_by_prompt, tokenize
from genarm.errors import ConversationError, DataError
from genarm.prompts import Prompt, check_reading, encode_prompt
from genarm.train.config import TrainConfig
from genarm.train.loading import decoding_ends

Item = TypeVar("Item")
Ids: TypeAlias = list[int]

TRAINING, HELD_OUT = "training", "held out"


@dataclass(frozen=True, kw_only=True)
class TrainData(Generic[Item]):
    """Items to train on and items held out; name → what became of the rows, and where they came from."""

    training: Sequence[Item]
    held_out: Sequence[Item] | None
    reports: Mapping[str, TokenReport]
    formats: Mapping[str, str]
    leaked: int  # held-out items whose prompt is also trained on


@dataclass(frozen=True, kw_only=True)
class PromptReport(TokenReport):
    """What became of the rows that give prompts."""

    def lines(self) -> list[tuple[str, int]]:
        """Each count with its label."""
        cut = [("prompts cut from the left", self.cut_prompts)] if self.cut_prompts else []
        dropped = [(f"dropped: {reason}", count) for reason, count in self.dropped.items()]
        return [("rows", self.rows), *dropped, ("prompts kept", self.kept), *cut, ("tokens", self.tokens)]


def load_pairs(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[TokenPair]:
    """Training and held-out pairs, the latter from evaluation data if named, else from the training data."""
    check_reading(tokenizer, config.reading)
    chat = bool(tokenizer.chat_template) and not config.raw
    training = load_preferences(config.data, split=config.split, objective=config.objective, chat=chat)
    sources: dict[str, tuple[PreferenceSet, Sequence[Preference]]] = {TRAINING: (training, training.pairs)}
    if config.eval_data is not None or config.eval_split is not None:
        source, split = _held_out_source(config)
        held_out = load_preferences(source, split=split, objective=config.objective, chat=chat)
        sources[HELD_OUT] = (held_out, held_out.pairs)
    elif config.eval_fraction > 0:
        kept, split_off = split_by_prompt(training, config.eval_fraction, config.seed)
        # The malformed rows are reported with the training pairs, so not twice.
        sources[TRAINING] = (training, kept)
        sources[HELD_OUT] = (dataclasses.replace(training, malformed={}), split_off)
    assert config.max_prompt_tokens is not None
    assert config.max_response_tokens is not None
    ends = decoding_ends(config, tokenizer)
    sets = {
        name: tokenize(
            tokenizer,
            pairs,
            ends=ends,
            reading=config.reading,
            max_prompt_tokens=config.max_prompt_tokens,
            max_response_tokens=config.max_response_tokens,
            malformed=source.malformed,
        )
        for name, (source, pairs) in sources.items()
    }
    trained = {pair.prompt_key for pair in sources[TRAINING][1]}
    return TrainData(
        training=sets[TRAINING].pairs,
        held_out=sets[HELD_OUT].pairs if HELD_OUT in sets else None,
        reports={name: found.report for name, found in sets.items()},
        formats={name: source.description for name, (source, _) in sources.items()},
        leaked=sum(pair.prompt_key in trained for pair in sources[HELD_OUT][1]) if HELD_OUT in sources else 0,
    )


def load_prompts(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[Ids]:
    """Distinct prompts to reply to, of preference pairs or of rows with a prompt alone.

    A prompt of the latter is taken as in the former.
    """
    check_reading(tokenizer, config.reading)
    chat = bool(tokenizer.chat_template) and not config.raw
    sources = {TRAINING: _read_prompts(config.data, config.split, config, chat)}
    if config.eval_data is not None or config.eval_split is not None:
        source, split = _held_out_source(config)
        sources[HELD_OUT] = _read_prompts(source, split, config, chat)
    elif config.eval_fraction > 0:
        whole = sources[TRAINING]
        kept, split_off = split_by_prompt(whole, config.eval_fraction, config.seed)
        sources[TRAINING] = dataclasses.replace(whole, pairs=kept)
        sources[HELD_OUT] = dataclasses.replace(whole, pairs=split_off, malformed={})
    assert config.max_prompt_tokens is not None
    sets = {name: _encode_prompts(tokenizer, source, config, f"{name} prompts") for name, source in sources.items()}
    trained = {pair.prompt_key for pair in sources[TRAINING].pairs}
    held_out = {pair.prompt_key for pair in sources[HELD_OUT].pairs} if HELD_OUT in sources else set()
    return TrainData(
        training=sets[TRAINING][0],
        held_out=sets[HELD_OUT][0] if HELD_OUT in sets else None,
        reports={name: report for name, (_, report) in sets.items()},
        formats={name: source.description for name, source in sources.items()},
        leaked=len(held_out & trained),
    )


def _held_out_source(config: TrainConfig) -> tuple[str, str]:
    source = config.eval_data or config.data
    whole = "train" if Path(source).is_file() else "test"
    return source, config.eval_split or whole


def _read_prompts(source: str, split: str, config: TrainConfig, chat: bool) -> PreferenceSet:
    return to_prompts(load_rows(source, split=split), source=source, objective=config.objective, chat=chat)


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, source: PreferenceSet, config: TrainConfig, what: str
) -> tuple[list[Ids], TokenReport]:
    longest = config.max_prompt_tokens
    assert longest is not None
    dropped: Counter[str] = Counter(source.malformed)
    kept: list[Ids] = []
    cut = 0
    for prompt in _distinct(source.pairs, dropped):
        try:
            ids = encode_prompt(tokenizer, prompt, config.reading)
        except ConversationError as error:  # such as: roles must alternate
            dropped[str(error)] += 1
            continue
        cut += len(ids) > longest
        kept.append(ids[-longest:])
    if not kept:
        raise DataError(f"{source.source} gives no {what}: {dict(dropped)}; expected rows with a prompt")
    report = PromptReport(
        rows=len(kept) + dropped.total(),
        kept=len(kept),
        dropped=dict(dropped),
        cut_prompts=cut,
        tokens=sum(map(len, kept)),
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
