"""What a run trains on and what it holds out; of an ARM, pairs in tokens."""

from __future__ import annotations

import dataclasses
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

# Evaluations of a run where the user does not say, and the fewest pairs that an accuracy says something of.
EVALUATIONS = 6
LEAST_PAIRS = 32

# Evaluations of pairs that cost a tenth of a run: a forward and its backward take as long as three forwards.
PER_TRAINED = 1 / 3


@dataclass(frozen=True, kw_only=True)
class TrainData(Generic[Item]):
    """Items to train on and items held out; name → what became of the rows, and where they came from.

    `evaluations` are how many there are to be, the first before the first step if there are several; `notes` are for
    the user.
    """

    training: Sequence[Item]
    held_out: Sequence[Item] | None
    reports: Mapping[str, TokenReport]
    formats: Mapping[str, str]
    leaked: int  # held-out items whose prompt is also trained on
    evaluations: int = EVALUATIONS
    notes: Sequence[str] = ()


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
    found = sets[HELD_OUT].pairs if HELD_OUT in sets else ()
    evaluated, evaluations, notes = found, EVALUATIONS, []
    if found and config.eval_steps is None and config.early_stopping is None:
        count, evaluations = evaluation_plan(trained_items(config, len(sets[TRAINING].pairs)), len(found))
        evaluated = evenly(found, count)
    if len(evaluated) < len(found):
        notes.append(
            f"{len(evaluated)} of the {len(found)} held-out pairs are evaluated on, as the run is short; give "
            "--eval-steps to evaluate on all of them"
        )
    return TrainData(
        training=sets[TRAINING].pairs,
        held_out=evaluated if HELD_OUT in sets else None,
        reports={name: one.report for name, one in sets.items()},
        formats={name: source.description for name, (source, _) in sources.items()},
        leaked=sum(pair.prompt_key in trained for pair in sources[HELD_OUT][1]) if HELD_OUT in sources else 0,
        evaluations=evaluations,
        notes=notes,
    )


def evaluation_plan(trained: int, held_out: int) -> tuple[int, int]:
    """(pairs, evaluations) that take a tenth of a run's time at most: better fewer evaluations than fewer pairs.

    32 pairs are evaluated on once, however short the run.
    """
    most = round(trained * PER_TRAINED)
    pairs = min(held_out, max(LEAST_PAIRS, most))
    return pairs, max(1, min(EVALUATIONS, most // pairs))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, from all over."""
    return [items[i * len(items) // count] for i in range(count)]


def trained_items(config: TrainConfig, items: int) -> int:
    """How many items a run is trained on, those of every epoch counted."""
    if config.max_steps is None:
        return round(items * config.epochs)
    return config.max_steps * config.batch_size * config.accumulation * PartialState().num_processes


def split_off(whole: PreferenceSet, config: TrainConfig) -> tuple[list[Preference], list[Preference]]:
    """(training, held out) of data that names no pairs to evaluate on: --eval-fraction of its prompts.

    Evaluations of all that is held out take about a tenth of a run over all the rest. A run that --max-steps cuts short
    gets as much less of it, evenly spaced, but 32 pairs at least.
    """
    kept, held_out = split_by_prompt(whole, config.eval_fraction, config.seed)
    if config.max_steps is None or not kept:
        return kept, held_out
    most = max(LEAST_PAIRS, round(len(held_out) * trained_items(config, len(kept)) / len(kept)))
    return kept, evenly(held_out, min(most, len(held_out)))


def held_out_source(config: TrainConfig) -> tuple[str, str]:
    """Where evaluation data lies that was named, and its split."""
    source = config.eval_data or config.data
    whole = "train" if Path(source).is_file() else "test"
    return source, config.eval_split or whole
