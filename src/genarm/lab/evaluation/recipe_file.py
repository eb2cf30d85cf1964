"""Recipes from TOML files: read, and checked for everything that does not hold together.

A file has a section per scale (`paper`, `tiny`, …), beside a `title` and the published figures. A scale is complete in
itself, or says what it changes in another one: `like = "real"`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

import genarm.lab.training  # noqa: F401 (so that what an ARM is compared with is among the kinds)
from genarm.data.tables import FORBID, read_table
from genarm.errors import ConfigError
from genarm.lab.evaluation.recipe import (
    Claim,
    FileName,
    Gap,
    PairSpec,
    PromptSpec,
    Recipe,
    SamplingSpec,
    TrainSpec,
    slug,
)
from genarm.lab.judges.kinds import JUDGES, JudgeSpec
from genarm.lab.methods.interface import Kind, MethodSpec
from genarm.lab.methods.kinds import METHODS
from genarm.training.config import make_config


def scales(path: Path) -> tuple[str, ...]:
    """The scales that a recipe file has (raises ConfigError)."""
    return tuple(name for name, value in _read(path).items() if isinstance(value, dict))


def load_recipe(path: Path, scale: str, *, seed: int | None = None) -> Recipe:
    """One scale of the recipe at `path`, with another `seed` if given.

    Raises:
        ConfigError: the file cannot be read, lacks the scale, or something in it does not hold together.
    """
    content = _read(path)
    if not isinstance(content.get(scale), dict):
        raise ConfigError(f"{path} has no scale {scale!r}; it has {', '.join(scales(path))}")
    try:
        table = _complete(content, scale)
        table = table if seed is None else {**table, "seed": seed}
        title = read_table(str, content.get("title", path.stem), "title")
        return _recipe(title, scale, table, content.get("published", []))
    except ConfigError as error:
        raise ConfigError(f"{path}, scale {scale}: {error}") from error


def _complete(content: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """A scale with what it takes from the one that it is `like`, which is complete itself."""
    own = dict(content[scale])
    if "like" not in own:
        return own
    like = own.pop("like")
    other = content.get(like) if isinstance(like, str) else None
    if not isinstance(other, dict) or "like" in other:
        whole = [name for name, value in content.items() if isinstance(value, dict) and "like" not in value]
        raise ConfigError(f"like is {like!r}; it must be a scale that is complete in itself: {', '.join(whole)}")
    merged: dict[str, Any] = _merged(other, own)
    return merged


def _merged(other: Any, own: Any) -> Any:
    """`own` over `other`: tables key by key, lists of named tables name by name, anything else as a whole."""
    if isinstance(other, dict) and isinstance(own, dict):
        return {**other, **{key: _merged(other[key], value) if key in other else value for key, value in own.items()}}
    if _named(other) and _named(own):
        merged, left = list(other), [entry["name"] for entry in other]
        for entry in own:
            if entry["name"] in left:
                left[left.index(entry["name"])] = None
                place = next(i for i, there in enumerate(other) if there["name"] == entry["name"])
                merged[place] = _merged(other[place], entry)
            elif "kind" in entry or not all("kind" in there for there in other):
                merged.append(entry)
            else:  # a name that is misspelt would train one more model, and leave the one that was meant as it was
                known = ", ".join(repr(there["name"]) for there in other)
                raise ConfigError(f"{entry['name']!r} is none of {known}, or changed twice; a new entry needs a kind")
        return merged
    return own


def _named(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(row, dict) and "name" in row for row in value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; see the folder recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """A section of the file; see `genarm.lab.evaluation.recipe.Recipe`."""

    __pydantic_config__ = FORBID

    prompts: PromptSpec
    methods: Annotated[tuple[Mapping[str, Any], ...], Field(min_length=1)]
    judges: tuple[JudgeSpec, ...]
    reference: str
    seed: NonNegativeInt = 0
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    world: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[PairSpec, ...] = ()
    train: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    comparisons: tuple[tuple[str, str], ...] = ()
    gaps: tuple[Gap, ...] = ()
    fronts: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    sizes: Mapping[str, PositiveFloat] = field(default_factory=dict)


_OF_FAMILIES = ("frontier", "front")
"""Claims about families."""

_Weights: TypeAlias = Mapping[str, FiniteFloat]
_Text: TypeAlias = Annotated[str, Field(pattern=r"\S")]
"""What a model reads, or where it is."""


def _recipe(title: str, scale: str, table: Mapping[str, Any], published: object) -> Recipe:
    read: _Scale = read_table(_Scale, table, "recipe")
    whole = {item.name: getattr(read, item.name) for item in fields(read) if item.name != "training"}
    methods = (spec for number, entry in enumerate(read.methods) for spec in _methods(entry, f"methods.{number}"))
    train = tuple(_train(entry, read, f"train.{number}") for number, entry in enumerate(read.train))
    shown = read_table(tuple[Mapping[str, str | FiniteFloat], ...], published, "published")
    recipe = Recipe(title=title, scale=scale, published=shown, **{**whole, "methods": tuple(methods), "train": train})
    _check(recipe)
    return recipe


def _train(entry: Mapping[str, Any], scale: _Scale, where: str) -> TrainSpec:
    """The settings are tried out, so that a mistake in the last one is not found after the others' training."""
    name = read_table(FileName, entry.get("name"), f"{where}.name")
    settings = {**scale.training, **{k: v for k, v in entry.items() if k != "name"}}
    try:
        make_config({"seed": scale.seed, **settings, "output": name})
    except ConfigError as error:
        raise ConfigError(f"{where} ({name}): {error}") from error
    return TrainSpec(name=name, settings=settings)


def _methods(entry: Mapping[str, Any], where: str) -> list[MethodSpec]:
    """The rows of one entry: one for each of its `weights`, if it has a list of them."""
    kind = METHODS.get(str(entry.get("kind")))
    if kind is None:
        raise ConfigError(f"{where} has the kind {entry.get('kind')!r}; it must be one of {', '.join(METHODS)}")
    name = read_table(str, entry.get("name", entry["kind"]), f"{where}.name")
    where = f"method {name!r}"
    own = [*kind.roles, *([kind.named] if kind.named else []), *(["system"] if kind.system else [])]
    optional = ["references"] if kind.named == "tuned" else []
    _only(entry, ["kind", "name", "family", "sampling", "weights", *own, *optional, *kind.settings], where)
    missing = [key for key in own if key not in entry]
    if missing:
        raise ConfigError(f"{where} of kind {entry['kind']} lacks {', '.join(missing)}")
    named = _texts(entry, kind.named, where) if kind.named else {}
    references = _texts(entry, "references", where)
    _only(references, named, f"the references of {where}")
    system = read_table(_Text, entry["system"], f"{where}: system") if kind.system else None
    given = read_table(_Weights | tuple[_Weights, ...], entry.get("weights", {}), f"{where}: weights")
    grid = given if isinstance(given, tuple) else (given,)
    sampling = read_table(Mapping[str, Any], entry.get("sampling", {}), f"{where}: sampling")
    read_table(SamplingSpec, sampling, f"{where}: sampling")
    _check_sampling(sampling, kind, where)
    rows = []
    for weights in grid:
        full = {key: float(weights.get(key, 1.0)) for key in (named if kind.named else weights)}
        _only(weights, full, f"the weights of {where}")
        label = ", ".join(f"{key} {value:g}" for key, value in full.items())
        rows.append(
            MethodSpec(
                kind=entry["kind"],
                name=name if len(grid) == 1 else f"{name} ({label})",
                family=read_table(str, entry.get("family", name), f"{where}: family"),
                roles={role: read_table(str, entry[role], f"{where}: {role}") for role in kind.roles},
                table=kind.named,
                named=dict(named),
                weights=full,
                references=dict(references),
                system=system,
                settings={
                    key: _number(entry.get(key, value), key, value, where)
                    for key, value in kind.settings.items()
                    if entry.get(key, value) is not None
                },
                sampling=dict(sampling),
            )
        )
    return rows


def _check_sampling(sampling: Mapping[str, Any], kind: Kind, where: str) -> None:
    """What replaces the recipe's sampling must do something, and say it once."""
    if "interleave" in sampling:
        raise ConfigError(f"{where}: sampling has interleave, which is for all methods of a scale or none")
    if "temperature" in sampling and "temperature" in kind.settings:
        raise ConfigError(
            f"{where}: sampling has a temperature, and a method of kind {kind.name} has one of its own; give it as "
            f"temperature = {sampling['temperature']} beside the kind"
        )


def _texts(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, str]:
    found: Mapping[str, str] = read_table(Mapping[str, _Text], entry.get(key, {}), f"{where}: {key}")
    return found


def _number(value: object, key: str, usual: float | None, where: str) -> float:
    """A number of a method: a count where the usual one is a count."""
    bounds = (
        PositiveInt
        if isinstance(usual, int)
        else Annotated[FiniteFloat, Field(ge=0)]
        if key in ("temperature", "max_kl")
        else FiniteFloat
    )
    found: float = read_table(bounds, value, f"{where}: {key}")
    return found


def _check_prompts(prompts: PromptSpec) -> None:
    """What is said of them must do something."""
    if prompts.column is None and prompts.template != "{}":
        raise ConfigError('prompts has a template, which goes with a column; give the column as well, as in "prompt"')
    if "{}" not in prompts.template:
        raise ConfigError(f"the template of prompts is {prompts.template!r:.80}; it needs a {{}} for the prompt")
    if prompts.column is not None and prompts.objective is not None:
        raise ConfigError("prompts has a column and an objective; data that is labelled twice is read without a column")


def _check(recipe: Recipe) -> None:
    _check_prompts(recipe.prompts)
    names = [method.name for method in recipe.methods]
    judges = [judge.name for judge in recipe.judges]
    for what, values in (("method", names), ("judge", judges), ("trained model", [t.name for t in recipe.train])):
        files = [slug(value) for value in values]
        double = [value for value, file in zip(values, files, strict=True) if files.count(file) > 1 or not file]
        if double:
            raise ConfigError(f"the {what} {double[0]!r} has no file name of its own; give it another name")
    used = [recipe.reference, *(name for pair in recipe.comparisons for name in pair)]
    used += [name for gap in recipe.gaps for name in (gap.bottom, gap.top, *gap.methods)]
    of_families = [claim for claim in recipe.claims if claim.what in _OF_FAMILIES]
    used += [name for claim in recipe.claims if claim not in of_families for name in (claim.first, claim.second)]
    families = {method.family for method in recipe.methods}
    _known(used, names, "method")
    _known([*(name for claim in of_families for name in (claim.first, claim.second))], families, "family")
    _known(
        [*recipe.fronts, *(g.judge for g in recipe.gaps), *(c.judge for c in recipe.claims if c.judge)], judges, "judge"
    )
    for claim in recipe.claims:
        _check_claim(claim, recipe)


def _check_claim(claim: Claim, recipe: Recipe) -> None:
    about = f"the claim {claim.what!r} of {claim.first!r} and {claim.second!r}"
    if (claim.judge != "") != (claim.what in ("above", "level", "frontier", "gap")):
        found = "has" if claim.judge else "needs"
        raise ConfigError(f"{about} {found} a judge; above, level, frontier and gap have one")
    _check_bound(
        about, "margin", claim.margin, needed=claim.what == "level", allowed=claim.what in ("level", *_OF_FAMILIES)
    )
    _check_bound(about, "share", claim.share, needed=claim.what == "gap", allowed=claim.what == "gap")
    if claim.equal_kl and claim.what != "front":
        raise ConfigError(f"{about} has equal_kl, which is for front; a frontier is at equal KL as it is")
    if claim.what == "frontier":
        _check_frontier(about, claim, recipe)
    if claim.what == "front" and not recipe.fronts:
        raise ConfigError(f"{about} needs fronts: the judges of the objectives")
    if claim.what == "gap":
        meant = [
            gap.bottom
            for gap in recipe.gaps
            if claim.first in gap.methods and (claim.second, claim.judge) == (gap.top, gap.judge)
        ]
        if len(meant) != 1:
            found = f"; these begin at {' and '.join(map(repr, meant))}" if meant else ""
            raise ConfigError(f"{about} needs one entry of gaps with that method, top and judge{found}")


def _check_frontier(about: str, claim: Claim, recipe: Recipe) -> None:
    judge = next(judge for judge in recipe.judges if judge.name == claim.judge)
    if JUDGES[judge.kind].comparer is not None:
        raise ConfigError(f"{about} needs a judge that scores single replies, and {judge.name!r} compares two")
    for family in (claim.first, claim.second):
        if sum(method.family == family for method in recipe.methods[1:]) < 2:
            raise ConfigError(
                f"{about} needs two methods at least in the family {family!r}, beside the base: give it several "
                "weights, or entries with that family that differ in temperature, n or model"
            )


def _check_bound(about: str, name: str, value: Any, *, needed: bool, allowed: bool) -> None:
    if needed and not value:
        raise ConfigError(f"{about} needs a {name} above 0")
    if value and not allowed:
        raise ConfigError(f"{about} has a {name}; it does not go with it")


def _known(used: Sequence[str], known: Sequence[str] | set[str], what: str) -> None:
    unknown = [name for name in used if name not in known]
    if unknown:
        raise ConfigError(f"there is no {what} {unknown[0]!r}; the recipe has {', '.join(sorted(known))}")


def _only(table: Mapping[str, Any], allowed: Any, where: str) -> None:
    unknown = [key for key in table if key not in allowed]
    if unknown:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")
