"""The decoding loop that methods share: draw a token for every row, drop the rows that have ended, go on.

A method says what may come next and how good it finds it (`Steps`); a token is drawn from the softmax of those
scores at the temperature, with random numbers named by seed, row and position.

Shapes: B rows, C choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.engine.noise import Purpose, key
from genarm.engine.sampler import draw
from genarm.errors import UnsupportedError, VocabularyError
from genarm.lab.prefix import Ids
from genarm.sampling import Sampling, derive_seed


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What may come next.

    Attributes:
        scores_BC: float32; the softmax of them over the temperature is drawn from.
        ids_BC: the token of each choice; None where choices are the ids themselves.
    """

    scores_BC: Tensor
    ids_BC: Sequence[Ids] | None = None

    def token(self, row: int, choice: int) -> int:
        """The id of a choice."""
        return choice if self.ids_BC is None else self.ids_BC[row][choice]

    def find(self, row: int, token: int) -> int | None:
        """The choice that has this id, if any."""
        if self.ids_BC is None:
            return token
        return self.ids_BC[row].index(token) if token in self.ids_BC[row] else None


class Steps(Protocol):
    """A method token by token."""

    def start(self, prompts: Sequence[Ids]) -> Choices:
        """What may come first after each prompt."""
        ...

    def advance(self, rows: Sequence[int], choices: Sequence[int]) -> Choices:
        """What may come after these choices, each in one of the last step's rows; a row may be continued twice."""
        ...


@dataclass(kw_only=True)
class Drawn:
    """A reply's tokens, and the log-probability (nats) that they were drawn with; 0 where the choice was greedy."""

    tokens: list[int] = field(default_factory=list)
    log_prob: float = 0.0


@torch.no_grad()
def decode(
    steps: Steps, prompts: Sequence[Ids], sampling: Sampling, *, stops: Sequence[int], seed: int, copies: int = 1
) -> list[Drawn]:
    """`copies` replies to each prompt, those to one prompt side by side.

    Raises:
        UnsupportedError: the rows do not fit the device's memory.
    """
    with enough_memory(len(prompts)):
        return _decode(steps, prompts, sampling, stops, seed, copies)


def _decode(
    steps: Steps, prompts: Sequence[Ids], sampling: Sampling, stops: Sequence[int], seed: int, copies: int
) -> list[Drawn]:
    drawn = [Drawn() for _ in range(len(prompts) * copies)]
    seeds = [derive_seed(seed, i) for i in range(len(drawn))]
    going = list(range(len(drawn)))
    rows = [i // copies for i in going]
    choices = steps.start(prompts)
    for position in range(sampling.max_new_tokens):
        keys = [key(seeds[i], position, Purpose.TOKEN) for i in going]
        picked, log_probs = pick(choices.scores_BC[rows], sampling, keys)
        for i, row, choice, log_prob in zip(going, rows, picked, log_probs, strict=True):
            drawn[i].tokens.append(choices.token(row, choice))
            drawn[i].log_prob += log_prob
        kept = [n for n, i in enumerate(going) if drawn[i].tokens[-1] not in stops]
        if not kept or position + 1 == sampling.max_new_tokens:
            break
        choices = steps.advance([rows[n] for n in kept], [picked[n] for n in kept])
        going = [going[n] for n in kept]
        rows = list(range(len(going)))
    return drawn


def pick(scores_BC: Tensor, sampling: Sampling, keys: Sequence[int]) -> tuple[list[int], list[float]]:
    """A choice for each row, and its log-probability; the best one with 0 at temperature 0."""
    if sampling.temperature == 0:
        return scores_BC.argmax(dim=-1).tolist(), [0.0] * len(keys)
    log_probs_BC = torch.log_softmax(scores_BC / sampling.temperature, dim=-1)
    choices_B = draw(log_probs_BC, [sampling], keys)
    return choices_B.tolist(), log_probs_BC.gather(-1, choices_B[:, None])[:, 0].tolist()


@torch.no_grad()
def replay(steps: Steps, prompts: Sequence[Ids], replies: Sequence[Ids], temperature: float) -> list[float]:
    """log π(reply | prompt) in nats of replies that are not longer than the method's; −∞ where it never gives one."""
    totals = [0.0] * len(replies)
    going = list(range(len(replies)))
    choices = steps.start(prompts)
    for position in range(max(map(len, replies))):
        log_probs_BC = torch.log_softmax(choices.scores_BC / temperature, dim=-1)
        picked = [choices.find(row, replies[i][position]) for row, i in enumerate(going)]
        for row, (i, choice) in enumerate(zip(going, picked, strict=True)):
            totals[i] += -torch.inf if choice is None else float(log_probs_BC[row, choice])
        kept = [(row, c) for row, c in enumerate(picked) if c is not None and position + 1 < len(replies[going[row]])]
        if not kept:
            break
        choices = steps.advance([row for row, _ in kept], [choice for _, choice in kept])
        going = [going[row] for row, _ in kept]
    return totals


@contextmanager
def enough_memory(prompts: int) -> Iterator[None]:
    """Say what to do where the memory of the device does not suffice (raises UnsupportedError)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UnsupportedError(
            f"{prompts} prompts answered together do not fit the memory of the device; lower the batch size"
        ) from error


def check_sampling(sampling: Sampling, method: str, *, greedy: bool = True) -> None:
    """Refuse settings of `sampling` that mean nothing for a method (raises UnsupportedError)."""
    if sampling.cuts or sampling.penalises or sampling.min_new_tokens:
        raise UnsupportedError(
            f"{method} draws with a temperature alone; leave out cuts, penalties, biases and min_new_tokens"
        )
    if sampling.temperature == 0 and not greedy:
        raise UnsupportedError(f"{method} chooses among different draws; give a temperature above 0")


def shared_ids(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids all of `models` know; beyond the tokenizer's there are rows that stand for no token.

    Raises:
        VocabularyError: a model knows fewer ids than the tokenizer has.
    """
    sizes = []
    for model in models:
        embedding: Any = model.get_input_embeddings()
        sizes.append(int(embedding.num_embeddings))
    if min(sizes) < len(tokenizer):
        raise VocabularyError(
            f"the tokenizer has {len(tokenizer)} tokens, and the models know {', '.join(map(str, sizes))}; "
            "a method's models must share one tokenizer"
        )
    return min(sizes)
