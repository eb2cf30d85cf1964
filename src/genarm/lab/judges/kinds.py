"""All judges, and what a recipe says of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from genarm.data.tables import FORBID
from genarm.errors import ConfigError
from genarm.lab.judges import alpaca_eval, function, last_number, pairwise, reward, rubric, unit_tests
from genarm.lab.judges.interface import Scorer, ScorerOptions

_MODULES = (function, reward, rubric, last_number, unit_tests, pairwise, alpaca_eval)

JUDGES = {module.KIND.name: module.KIND for module in _MODULES}
"""A new one is a line here, or `JUDGES[KIND.name] = KIND` elsewhere."""


def _known(kind: str) -> str:
    names = [repr(name) for name, judge in JUDGES.items() if judge.recipes]
    if repr(kind) not in names:
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(names[:-1])} or {names[-1]}")
    return kind


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """Who scores the replies.

    Attributes:
        name: as the table shows it; for several objectives, the objective's.
        kind: a key of `JUDGES`.
        source: the function, the model, the column with the right answer, the LLM's protocol, or AlpacaEval's model.
        settings: of an LLM's endpoint: model, base_url, key_variable, …
    """

    __pydantic_config__ = FORBID

    name: str
    kind: Annotated[str, AfterValidator(_known)]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.settings and JUDGES[self.kind].comparer is None:
            raise ConfigError(f"a judge of the kind {self.kind} has no settings; leave them out")


def make_scorer(spec: str, options: ScorerOptions) -> Scorer:
    """The scorer that `spec`, KIND=VALUE, names.

    Raises:
        ConfigError: an unknown kind, or a value that names nothing; options of a judge without one.
        MemberError: the folder holds no reward model.
    """
    name, _, value = spec.partition("=")
    kind = JUDGES.get(name)
    if kind is None or kind.scorer is None or kind.form is None or not value:
        forms = ", ".join(f"{name}={kind.form}" for name, kind in JUDGES.items() if kind.form)
        raise ConfigError(f"--score is {spec!r}; it must be one of {forms}")
    if name != rubric.KIND.name and (options.judge_url or options.judge_model):
        raise ConfigError(
            f"--judge-url and --judge-model are for --score judge=…, and this is {spec!r}; leave them out"
        )
    return kind.scorer(value, options)
