"""What a judge is: something that scores replies one by one, or compares two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from genarm.errors import DataError
from genarm.model.placement import Placement
from genarm.text.prompts import Prompt

if TYPE_CHECKING:
    from genarm.lab.judges.comparing import Comparer
    from genarm.lab.trajectory import TrajectoryReward
    from genarm.provenance import Record


@dataclass(frozen=True, kw_only=True)
class Item:
    """A response to score.

    Attributes:
        prompt: as the model read it.
        response: its reply.
        row: the row of the prompt file.
        ids: of prompt and reply, where they are known.
    """

    prompt: Prompt
    response: str
    row: Mapping[str, Any]
    ids: tuple[Sequence[int], Sequence[int]] | None = None

    @property
    def text(self) -> str:
        """The prompt as text; of a conversation, the last message."""
        return last_text(self.row["prompt"])


class Scorer(Protocol):
    """Scores responses; higher is better."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What decides the scores, for the settings beside the output."""
        ...

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows of the prompt file without what the score needs of them (raises DataError)."""
        return

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """The score of each item; None where there is none (a judge's reply that cannot be read)."""
        ...

    def why_none(self, item: Item) -> str:
        """Why `item` has no score, as none has, and what to change."""
        return "see what the score says of a response by itself"


@dataclass(frozen=True, kw_only=True)
class ScorerOptions(Placement):
    """How scorers reach their models.

    Attributes:
        replies: the folder where a judge's replies are kept.
        judge_url: of an OpenAI-compatible endpoint; None for OpenAI's.
        judge_model: as the endpoint calls it; None for the protocol's.
        dtype, device: of a reward model.
    """

    replies: Path
    judge_url: str | None = None
    judge_model: str | None = None


def last_text(prompt: Prompt) -> str:
    """`prompt` as text; of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


class RunModels(Protocol):
    """The models of a comparison, each loaded once."""

    folder: Path

    def reward(self, reference: str) -> TrajectoryReward:
        """A classic reward model."""
        ...

    def record(self, reference: str) -> Record:
        """A model by its content."""
        ...


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of judge: one that scores has a `scorer`, one that compares a `comparer`.

    Attributes:
        name: as recipes and --score have it.
        about: what it does, in words.
        form: what VALUE is in `--score NAME=VALUE`; None where it is not to be had there.
        recipes: whether recipes may have it.
        scorer: makes the scorer that VALUE names (raises ConfigError where it names none).
        scorer_of_run: the same with the models of a comparison, where these matter.
        comparer: compares.
    """

    name: str
    about: str
    form: str | None = None
    recipes: bool = True
    scorer: Callable[[str, ScorerOptions], Scorer] | None = None
    scorer_of_run: Callable[[str, RunModels], Scorer] | None = None
    comparer: Comparer | None = None

    def scores(self, source: str, models: RunModels) -> Scorer:
        """The scorer for a comparison with these models."""
        if self.scorer_of_run is not None:
            return self.scorer_of_run(source, models)
        assert self.scorer is not None
        return self.scorer(source, ScorerOptions(replies=models.folder))


def check_rows(rows: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], object]) -> None:
    """Refuse rows of which `read` raises DataError, with their number."""
    for number, row in enumerate(rows):
        try:
            read(row)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from error


def value_of(row: Mapping[str, Any], key: str) -> Any:
    """What the row has under `key` (raises DataError if nothing)."""
    if key not in row:
        raise DataError(f"there is no key {key!r} in the row, whose keys are {', '.join(row)}; name another")
    return row[key]
