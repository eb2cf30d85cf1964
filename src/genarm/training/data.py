"""What a run trains on and what it holds out; of an ARM, pairs in tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from genarm.data.formats.base import Preference
from genarm.data.preferences import PreferenceSet, load_preferences
from genarm.data.tokens import TokenPair, TokenReport, split_by_prompt, tokenize
from genarm.text.prompts import check_reading
from genarm.training.config import TrainConfig
from genarm.training.loading import decoding_ends

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


def load_pairs(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[TokenPair]:
    """Training and held-out pairs, the latter from evaluation data if named, else from the training data."""
    check_reading(tokenizer, config.reading)
    chat = bool(tokenizer.chat_template) and not config.raw
    training = load_preferences(config.data, split=config.split, objective=config.objective, chat=chat)
    sources: dict[str, tuple[PreferenceSet, Sequence[Preference]]] = {TRAINING: (training, training.pairs)}
    if config.eval_data is not None or config.eval_split is not None:
        source, split = held_out_source(config)
        held_out = load_preferences(source, split=split, objective=config.objective, chat=chat)
        sources[HELD_OUT] = (held_out, held_out.pairs)
    elif config.eval_fraction > 0:
        kept, held_back = split_off(training, config)
        # The malformed rows are reported with the training pairs, so not twice.
        sources[TRAINING] = (training, kept)
        sources[HELD_OUT] = (dataclasses.replace(training, malformed={}), held_back)
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


def split_off(whole: PreferenceSet, config: TrainConfig) -> tuple[list[Preference], list[Preference]]:
    """(training, held out) of data that names no pairs to evaluate on: --eval-fraction of its prompts.

    Evaluations of all that is held out take about a tenth of a run over all the rest. A run that --max-steps cuts short
    gets as much less of it, evenly spaced, but 32 pairs at least.
    """
    kept, held_out = split_by_prompt(whole, config.eval_fraction, config.seed)
    if config.max_steps is None or not kept:
        return kept, held_out
    trained = config.max_steps * config.batch_size * config.accumulation * PartialState().num_processes
    most = max(32, round(len(held_out) * trained / len(kept)))
    return kept, held_out[:: math.ceil(len(held_out) / most)]


def held_out_source(config: TrainConfig) -> tuple[str, str]:
    """Where evaluation data lies that was named, and its split."""
    source = config.eval_data or config.data
    whole = "train" if Path(source).is_file() else "test"
    return source, config.eval_split or whole
