"""What a family of methods offers to someone who weighs several objectives: Pareto front, hypervolume, MIP.

Each method is a point; its coordinates are means over prompts, one for each objective. They are measured on two
scales: the judges' own scores, with the base's means as the reference point, and win + ½ tie against the base, with
½ as the reference point (as in GenARM, section 6.3).

The best of noisy points looks better than it is, so a hypervolume is a little too high where points differ by less
than their intervals. In a difference of two families most of that cancels.

Families that go farther from the base have more to gain, so they are compared at equal KL as well: with what both have
within the smaller of their largest distances. A point beyond it stands for what can be had of it there, by giving
the base's reply to some of the prompts: on the line to the base, as far along as the distance allows.

Shapes: N prompts, M methods of a family, O objectives, S resamples, K columns: M·O values and then O of the reference;
D columns: the distances of M methods and then that of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

import moocore
import numpy as np
from numpy.typing import NDArray

from genarm.lab.evaluation.results import Measured, Results
from genarm.statistics import Estimate, bootstrap, mean_difference, points

Scale: TypeAlias = Literal["mean score", "win rate"]
SCALES: tuple[Scale, ...] = ("mean score", "win rate")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method: its mean in each objective, and whether no other method of its family dominates it."""

    name: str
    values: Mapping[str, Estimate]
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A family.

    Attributes:
        family: its name.
        points: in the recipe's order.
        hypervolume: what its points dominate of the space beyond the reference point.
        mip: mean inner product of the preference (weights that add up to 1) and the means of the objectives; None
            where a method has no weight for each objective.
    """

    family: str
    points: tuple[Point, ...]
    hypervolume: Estimate
    mip: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Lead:
    """How much the hypervolume of `first` is above that of `second`, on the same resamples.

    Attributes:
        first, second: families.
        difference: of all that they have.
        at_equal_kl: of what they have within the same distance from the base; None where distances are not known.
        bounded: those of the two of which a distance is only a bound, so that they may be nearer.
    """

    first: str
    second: str
    difference: Estimate
    at_equal_kl: Estimate | None
    bounded: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Front:
    """All families on one scale; `reference` is the point that hypervolumes are relative to."""

    scale: Scale
    objectives: tuple[str, ...]
    reference: Mapping[str, float]
    curves: tuple[Curve, ...]
    leads: tuple[Lead, ...]


def make_fronts(results: Results, objectives: Sequence[str]) -> tuple[Front, ...]:
    """The fronts of every family but the base's, on each scale on which all of `objectives` are known."""
    return tuple(_front(results, tuple(objectives), scale) for scale in SCALES if _is_known(results, objectives, scale))


def hypervolume_lead(
    results: Results, objectives: Sequence[str], first: str, second: str, margin: float = 0.0
) -> Lead | None:
    """By how much the hypervolume of the family `first` is above 1 − `margin` times that of `second`.

    On the first of the two scales on which all of `objectives` are known; None if there is none.
    """
    scale = next((scale for scale in SCALES if _is_known(results, objectives, scale)), None)
    if scale is None:
        return None
    mine, theirs = (_Family.of(results, objectives, scale, family) for family in (first, second))
    return _lead(mine, theirs, margin)


def hypervolume(gains_SMO: NDArray[Any]) -> NDArray[Any]:
    """The volumes [S] between the origin and the M points of each resample, all objectives maximised."""
    gains_SMO = gains_SMO.clip(0)
    if gains_SMO.shape[-1] != 2:
        return np.array(
            [np.nan if np.isnan(g).any() else moocore.hypervolume(g, ref=0, maximise=True) for g in gains_SMO]
        )
    # Of two, by strips from the point that is farthest right: thousands of resamples at once.
    order_SM = np.argsort(-gains_SMO[..., 0], axis=1)
    x_SM, y_SM = (np.take_along_axis(gains_SMO[..., objective], order_SM, axis=1) for objective in (0, 1))
    widths_SM = -np.diff(x_SM, axis=1, append=0.0)
    volumes_S: NDArray[Any] = (widths_SM * np.maximum.accumulate(y_SM, axis=1)).sum(axis=1)
    return volumes_S


def preference(weights: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...] | None:
    """The weights of the objectives scaled to the sum 1; None where one is missing, or they have no positive sum."""
    if any(objective not in weights for objective in objectives):
        return None
    total = sum(weights[objective] for objective in objectives)
    return tuple(weights[objective] / total for objective in objectives) if total > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What is known of a family, prompt by prompt; the last O columns are the reference point's, the base's values.

    `within` is what the values can be, where that is known, and so is `kls_ND`.
    """

    methods: tuple[Measured, ...]
    objectives: tuple[str, ...]
    rows_NK: NDArray[Any]
    within: tuple[float, float] | None
    kls_ND: NDArray[Any] | None

    @classmethod
    def of(cls, results: Results, objectives: Sequence[str], scale: Scale, name: str) -> _Family:
        methods = tuple(row for row in results.measured if row.family == name)
        rows = [*methods, results.measured[0]]
        columns = [_values(results, objective, scale, row.name) for row in rows for objective in objectives]
        distances = [row.distances for row in rows]
        return cls(
            methods=methods,
            objectives=tuple(objectives),
            rows_NK=np.array(columns, dtype=np.float64).T,
            within=(0.0, 1.0) if scale == "win rate" else None,
            kls_ND=None if None in distances else np.array(distances, dtype=np.float64).T,
        )

    @property
    def name(self) -> str:
        """The family's."""
        return self.methods[0].family

    @property
    def bounded(self) -> bool:
        """Whether the distance of any method is a bound."""
        return any(method.kl is None for method in self.methods)

    def by_method(self, means_SK: NDArray[Any]) -> NDArray[Any]:
        """(S, M, O)."""
        means_SMO: NDArray[Any] = means_SK.reshape(len(means_SK), -1, len(self.objectives))[:, :-1]
        return means_SMO

    def hypervolumes(self, means_SK: NDArray[Any], shares_SM: NDArray[Any] | float = 1.0) -> NDArray[Any]:
        """(S, 1), of points that are such a share of the way from the reference point to themselves."""
        gains_SMO = self.by_method(means_SK) - means_SK[:, None, -len(self.objectives) :]
        return hypervolume(gains_SMO * np.asarray(shares_SM)[..., None])[:, None]

    def curve(self) -> Curve:
        (volume,) = bootstrap(self.hypervolumes, self.rows_NK)
        return Curve(family=self.name, points=self._points(), hypervolume=volume, mip=self._mip())

    def _points(self) -> tuple[Point, ...]:
        count = len(self.objectives)
        none = (0.0,) * len(self.rows_NK)
        values = [mean_difference(column_N, none, within=self.within) for column_N in self.rows_NK.T[:-count].tolist()]
        rows = [values[i * count : (i + 1) * count] for i in range(len(self.methods))]
        best = moocore.is_nondominated([[e.value for e in row] for row in rows], maximise=True, keep_weakly=True)
        return tuple(
            Point(name=method.name, values=dict(zip(self.objectives, row, strict=True)), on_front=bool(on_front))
            for method, row, on_front in zip(self.methods, rows, best, strict=True)
        )

    def _mip(self) -> Estimate | None:
        preferences = [preference(method.weights, self.objectives) for method in self.methods]
        if None in preferences:
            return None
        preferences_MO = np.array(preferences)
        return bootstrap(
            lambda means_SK: (self.by_method(means_SK) * preferences_MO).sum(-1).mean(-1, keepdims=True), self.rows_NK
        )[0]


def _front(results: Results, objectives: tuple[str, ...], scale: Scale) -> Front:
    base = results.measured[0]
    names = dict.fromkeys(row.family for row in results.measured if row.family != base.family)
    families = {name: _Family.of(results, objectives, scale, name) for name in names}
    several = [name for name, family in families.items() if len(family.methods) > 1]
    return Front(
        scale=scale,
        objectives=objectives,
        reference={o: float(np.nanmean(np.array(_values(results, o, scale, base.name)))) for o in objectives},
        curves=tuple(family.curve() for family in families.values()),
        leads=tuple(_lead(families[first], families[second]) for first, second in combinations(several, 2)),
    )


def _lead(first: _Family, second: _Family, margin: float = 0.0) -> Lead:
    width, end = first.rows_NK.shape[1], first.rows_NK.shape[1] + second.rows_NK.shape[1]
    kls = None if first.kls_ND is None or second.kls_ND is None else (first.kls_ND, second.kls_ND)

    def difference(means_SK: NDArray[Any]) -> NDArray[Any]:
        shares: tuple[NDArray[Any] | float, ...] = (1.0, 1.0)
        if means_SK.shape[1] > end:
            shares = _shares(*np.split(means_SK[:, end:], [len(first.methods) + 1], axis=1))
        mine = first.hypervolumes(means_SK[:, :width], shares[0])
        return mine - (1 - margin) * second.hypervolumes(means_SK[:, width:end], shares[1])

    values = (first.rows_NK, second.rows_NK)
    return Lead(
        first=first.name,
        second=second.name,
        difference=bootstrap(difference, np.hstack(values))[0],
        at_equal_kl=None if kls is None else bootstrap(difference, np.hstack([*values, *kls]))[0],
        bounded=tuple(family.name for family in (first, second) if family.bounded),
    )


def _shares(first_SD: NDArray[Any], second_SD: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """How far along the way from the base to each method [S, M] the distance goes that both families reach."""
    away = [kls_SD[:, :-1] - kls_SD[:, -1:] for kls_SD in (first_SD, second_SD)]
    reach_S1 = np.minimum(*(away_SM.max(axis=1, keepdims=True) for away_SM in away))
    mine, theirs = (np.where(a > reach_S1, (reach_S1 / np.maximum(a, 1e-12)).clip(0), 1.0) for a in away)
    return mine, theirs


def _is_known(results: Results, objectives: Sequence[str], scale: Scale) -> bool:
    values = (_values(results, objective, scale, row.name) for objective in objectives for row in results.measured)
    return all(value is not None for value in values)


def _values(results: Results, objective: str, scale: Scale, name: str) -> tuple[float, ...] | None:
    """A method's values in one objective, prompt by prompt; None where they are not known."""
    if scale == "mean score":
        return results.row(name).scores.get(objective)
    base = results.measured[0].name
    if name == base:
        return (0.5,) * len(results.prompts)
    outcomes = results.outcomes(objective, name, base)
    return None if outcomes is None else points(outcomes)
