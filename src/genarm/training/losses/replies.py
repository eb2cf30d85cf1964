"""What a wish is distilled from: replies that the base draws while it reads the wish."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from genarm.data.tokens import TokenPair
from genarm.engine import Engine, EngineOptions, Request
from genarm.errors import ConfigError, DataError
from genarm.files import write_text
from genarm.model.wishes import with_wish
from genarm.sampling import Sampling
from genarm.terminal import PlainConsole
from genarm.text.prompts import Prompt, encode_prompt
from genarm.training.config import TrainConfig
from genarm.training.data import Ids, TrainData
from genarm.training.losses.frozen import align_base, base_files, files_of_model
from genarm.training.prompts import load_readings

REPLIES = "replies.jsonl"
"""The replies that a run learns from, in token ids: a prompt as the wish reads it, and two replies to it, in a line."""

_STREAMS = 16


@dataclass(frozen=True, kw_only=True)
class WishedReplies(TokenPair):
    """A prompt, the same as the wish reads it, and two replies of the wished-for model, in token ids."""

    wished_ids: array[int]

    @property
    def parts(self) -> dict[str, Sequence[int]]:
        """Its token ids by what they are, for a reader."""
        replies = {"reply": self.chosen_ids, "another reply": self.rejected_ids}
        return {"prompt": self.prompt_ids, "prompt with the wish": self.wished_ids, **replies}

    @property
    def with_wish(self) -> TokenPair:
        """The replies after the prompt as the wish reads it."""
        return TokenPair(prompt_ids=self.wished_ids, chosen_ids=self.chosen_ids, rejected_ids=self.rejected_ids)


def load_replies(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[WishedReplies]:
    """Two replies of the wished-for model to each prompt: those that this run has drawn before, or new ones.

    Raises:
        DataError: there are no prompts, or those replies are to other prompts.
        ConfigError: several processes, each of which would draw its own.
        VocabularyError: the base reads other tokens than the model.
    """
    if PartialState().num_processes > 1:
        raise ConfigError("--loss distil draws replies, in one process alone; launch it without several")

    def encode(prompt: Prompt) -> Sequence[Ids]:
        return [
            encode_prompt(tokenizer, said, config.reading) for said in (prompt, with_wish(prompt, str(config.wish)))
        ]

    read = load_readings(config, tokenizer, encode, cut=False)
    asked = [readings for items in (read.training, read.held_out or ()) for readings in items]
    drawn = _kept(config.output, asked) or _draw(config, tokenizer, asked)
    made = [
        WishedReplies(
            prompt_ids=array("i", prompt),
            wished_ids=array("i", wished),
            chosen_ids=array("i", first),
            rejected_ids=array("i", second),
        )
        for (prompt, wished), (first, second) in zip(asked, drawn, strict=True)
    ]
    trained = len(read.training)
    return TrainData(
        training=made[:trained],
        held_out=None if read.held_out is None else made[trained:],
        reports=read.reports,
        formats=read.formats,
        leaked=read.leaked,
    )


def write_replies(folder: Path, data: TrainData[WishedReplies]) -> None:
    """Keep the replies in the folder of the run."""
    rows = [
        {"prompt": list(item.wished_ids), "replies": [list(item.chosen_ids), list(item.rejected_ids)]}
        for item in (*data.training, *(data.held_out or ()))
    ]
    write_text(folder / REPLIES, "".join(json.dumps(row) + "\n" for row in rows))


def _kept(folder: Path, asked: Sequence[Sequence[Ids]]) -> list[list[Ids]] | None:
    file = folder / REPLIES
    if not file.is_file():
        return None
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if [row["prompt"] for row in rows] != [list(wished) for _, wished in asked]:
        raise DataError(
            f"{file} has replies to other prompts, or to another wish; give what the run was begun with, or choose "
            "another --output"
        )
    return [row["replies"] for row in rows]


def _draw(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Sequence[Ids]]) -> list[list[Ids]]:
    other = base_files(config)
    if other is not None:
        align_base(other, tokenizer, config)
    files = other or files_of_model(config)
    most = config.max_response_tokens
    assert most is not None
    longest = max(len(wished) for _, wished in asked)
    PlainConsole(stderr=True).print(
        f"drawing {2 * len(asked):,} replies of {files.reference} with the wish", markup=False, soft_wrap=True
    )
    model = files.load(dtype="bfloat16" if config.bf16 else "auto", device=str(PartialState().device))
    engine = Engine(model, tokenizer, EngineOptions(streams=_STREAMS, context=longest + most, wishes=0))
    sampling = Sampling(max_new_tokens=most)
    requests = [
        Request(prompt=wished, sampling=sampling, seed=config.seed + 2 * number + copy)
        for number, (_, wished) in enumerate(asked)
        for copy in range(2)
    ]
    replies = [list(reply.token_ids) for reply in engine.generate(requests)]
    engine.close()
    del engine, model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [replies[at : at + 2] for at in range(0, len(replies), 2)]
