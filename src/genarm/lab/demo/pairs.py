"""Preference pairs: two replies of a model to one request, and a noisy judge for each objective."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.files import write_text
from genarm.lab.demo.world import Request, preference, true_score, write_reply
from genarm.lab.replies import sample_replies
from genarm.sampling import Sampling, derive_seed
from genarm.text.prompts import as_conversation, encode_prompt

MAX_NEW_TOKENS = 64
"""Longer than the longest reply of the crowd."""

BATCH = 500


class Duel(NamedTuple):
    """Two different replies to one request."""

    request: Request
    first: str
    second: str


def progress(starts: range, what: str, console: Console) -> Iterator[int]:
    """`starts` with a bar while they are used, where there is a terminal to show it."""
    yield from track(starts, what, console=console, transient=True, disable=not console.is_terminal)


def sample_duels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    count: int,
    *,
    seed: int,
    console: Console,
) -> list[Duel]:
    """`count` requests, drawn with replacement, with two replies each by `model`; equal replies are dropped."""
    chosen = random.Random(f"duels {seed}").choices(requests, k=count)
    prompts = [encode_prompt(tokenizer, as_conversation(request.text)) for request in chosen for _ in range(2)]
    replies: list[str] = []
    starts = range(0, len(prompts), BATCH)
    for number, start in enumerate(progress(starts, "sampling replies", console)):
        batch = sample_replies(
            model,
            tokenizer,
            prompts[start : start + BATCH],
            Sampling(max_new_tokens=MAX_NEW_TOKENS),
            seed=derive_seed(seed, number),
        )
        replies += [reply.text for reply in batch]
    duels = map(Duel, chosen, replies[::2], replies[1::2])
    return [duel for duel in duels if duel.first != duel.second]


def write_duels(requests: Sequence[Request], count: int, *, seed: int) -> list[Duel]:
    """The same with replies by the crowd."""
    rng = random.Random(f"written duels {seed}")
    duels = [Duel(r, write_reply(rng, r), write_reply(rng, r)) for r in rng.choices(requests, k=count)]
    return [duel for duel in duels if duel.first != duel.second]


def judge(duels: Sequence[Duel], objective: str, *, sharpness: float, seed: int) -> Iterator[dict[str, object]]:
    """Each duel as a pair in TRL's conversational format, chosen by Bradley–Terry on the true scores."""
    rng = random.Random(f"judge {objective} {seed}")
    for request, first, second in duels:
        scores = [true_score(objective, request.text, reply) for reply in (first, second)]
        wins = rng.random() < preference(*scores, sharpness=sharpness)
        chosen, rejected = (first, second) if wins else (second, first)
        yield {
            "prompt": [{"role": "user", "content": request.text}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def write_pairs(path: Path, pairs: Iterator[dict[str, object]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
