"""A recipe: what a comparison makes, trains, samples, judges and shows; `recipe_file` reads one.

Names of models and data that begin with `@` are parts of the run's own folder: `@world/base`, `@train/arm`; all others
are hub ids or paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, FiniteFloat, PositiveInt

from genarm.data.tables import FORBID
from genarm.lab.judges.kinds import JudgeSpec
from genarm.lab.methods.interface import MethodSpec

FileName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")]
"""The name of a file or a folder, and no path."""


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How every reply is drawn, unless its method draws in a way of its own.

    Attributes:
        max_new_tokens, temperature: as in `genarm.sampling`.
        batch_size: prompts answered together; a method's own may be less, where it needs more memory.
        interleave: whether all methods answer one batch before the next, so that a busy machine slows all of them
            alike; their models are then in memory together.
    """

    __pydantic_config__ = FORBID

    max_new_tokens: PositiveInt = 128
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    batch_size: PositiveInt = 64
    interleave: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Held-out prompts: of a preference set, or of rows with a `prompt`; the first `count` different ones.

    Attributes:
        data, split: as for training.
        count: how many; an interval needs at least 2.
        objective: of data that is labelled twice.
        column: where the prompts are, if not in preference pairs or under "prompt"; judges see the whole row then.
        template: what a prompt of text is put into, at {}.
        template_args: arguments of the chat template.
    """

    __pydantic_config__ = FORBID

    data: str
    count: Annotated[int, Field(ge=2)]
    split: str = "train"
    objective: str | None = None
    column: str | None = None
    template: str = "{}"
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PairSpec:
    """Pairs to make of a task's data into `pairs/NAME.jsonl` and `pairs/NAME-held-out.jsonl`.

    Attributes:
        name: of the files.
        task: "mathematics" (right and wrong solutions of GSM8K's form) or "code" (canonical and broken solutions).
        data: rows of the task.
        held_out: share of the problems whose pairs are not trained on.
        count: of code, the problems that are used.
    """

    __pydantic_config__ = FORBID

    name: FileName
    task: Literal["mathematics", "code"]
    data: str
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    count: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One model to train into `train/NAME`: the settings of `genarm train`."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Which share of the way from `bottom` to `top` the methods of a run cover, by a judge."""

    __pydantic_config__ = FORBID

    bottom: str
    top: str
    methods: tuple[str, ...]
    judge: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something a run should show; the report says whether it did, with the numbers.

    A claim holds where the whole 95% interval is above what is claimed, does not hold where none of it is, and is not
    shown in between. Quality is a judge's mean score, or win + ½ tie where the judge only compares.

    Attributes:
        what: "above": the quality of `first` is above that of `second`.
            "level": it is below it by less than `margin` (non-inferiority).
            "frontier": at equal KL from the base, averaged over what both reach, the quality of the family `first` is
            above that of `second`, or with a `margin`, below it by less.
            "front": the hypervolume of the family `first` is above 1 − `margin` times that of `second`; with no margin,
            the larger. With `equal_kl`, of what both have within the smaller of their largest KL.
            "cheaper": `first` takes fewer forwards per token than `second`, and fewer seconds in every batch.
            "gap": `first` covers at least `share` of the way to `second`, which is the top of one of the `gaps`.
        first, second: methods, or the families of a frontier or a front.
        judge: whose quality is meant; not for "front" and "cheaper".
        margin: how much worse counts as level: in units of the judge for "level" and "frontier", as a share for
            "front".
        share: for "gap".
        equal_kl: for "front".
    """

    __pydantic_config__ = FORBID

    what: Literal["above", "level", "frontier", "front", "cheaper", "gap"]
    first: str
    second: str
    judge: str = ""
    margin: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    share: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    equal_kl: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One scale of a recipe, complete and checked; `sizes` has parameters of models that a plan cannot look into."""

    title: str
    scale: str
    seed: int
    prompts: PromptSpec
    sampling: SamplingSpec
    methods: tuple[MethodSpec, ...]
    judges: tuple[JudgeSpec, ...]
    reference: str
    world: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[PairSpec, ...] = ()
    train: tuple[TrainSpec, ...] = ()
    comparisons: tuple[tuple[str, str], ...] = ()
    gaps: tuple[Gap, ...] = ()
    fronts: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)

    @property
    def foundation(self) -> Mapping[str, Any]:
        """What everything else is made from; a run's folder holds one."""
        return {
            "seed": self.seed,
            "world": dict(self.world),
            "pairs": {spec.name: asdict(spec) for spec in self.pairs},
            "train": {spec.name: dict(spec.settings) for spec in self.train},
        }

    def draw(self, method: MethodSpec) -> SamplingSpec:
        """How `method` draws, its own settings over the recipe's."""
        own: dict[str, Any] = {**method.sampling, **{k: v for k, v in method.settings.items() if k == "temperature"}}
        return replace(self.sampling, **own)

    def method(self, name: str) -> MethodSpec:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)


def slug(name: str) -> str:
    """The name of a method or judge as that of its file."""
    return "".join(c if c.isalnum() or c in ".-_=+" else "-" for c in name).strip("-")
