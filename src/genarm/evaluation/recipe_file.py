"""Recipes from TOML files: read, and checked for everything that does not hold together.

A file has a section per scale (`paper`, `tiny`, …), each complete in itself, beside a `title` and the published
figures.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genarm.errors import ConfigError
from genarm.evaluation.recipe import (
    CLAIMS,
    JUDGES,
    KINDS,
    Claim,
    Gap,
    JudgeSpec,
    MethodSpec,
    PairSpec,
    PromptSpec,
    Recipe,
    SamplingSpec,
    TrainSpec,
    slug,
)


def scales(path: Path) -> tuple[str, ...]:
    """The scales that a recipe file has (raises ConfigError)."""
    return tuple(name for name, value in _read(path).items() if isinstance(value, dict))


def load_recipe(path: Path, scale: str, *, seed: int | None = None) -> Recipe:
    """One scale of the recipe at `path`, with another `seed` if given.

    Raises:
        ConfigError: the file cannot be read, lacks the scale, or something in it does not hold together.
    """
    content = _read(path)
    table = content.get(scale)
    if not isinstance(table, dict):
        raise ConfigError(f"{path} has no scale {scale!r}; it has {', '.join(scales(path))}")
    try:
        table = table if seed is None else {**table, "seed": seed}
        return _recipe(str(content.get("title", path.stem)), scale, table, content.get("published", []))
    except ConfigError as error:
        raise ConfigError(f"{path}, scale {scale}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; see the folder recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


_KEYS = [
    "seed",
    "prompts",
    "sampling",
    "methods",
    "judges",
    "reference",
    "world",
    "pairs",
    "train",
    "training",
    "comparisons",
    "gaps",
    "fronts",
    "claims",
    "sizes",
]


def _recipe(title: str, scale: str, table: Mapping[str, Any], published: Sequence[Mapping[str, Any]]) -> Recipe:
    _only(table, _KEYS, "the recipe")
    for key in ("prompts", "methods", "judges", "reference"):
        if key not in table:
            raise ConfigError(f"{key} is missing; a recipe has at least prompts, methods, judges and a reference")
    common = table.get("training", {})
    recipe = Recipe(
        title=title,
        scale=scale,
        seed=_number(table.get("seed", 0), int, "seed"),
        prompts=_make(PromptSpec, table["prompts"], "prompts"),
        sampling=_make(SamplingSpec, table.get("sampling", {}), "sampling"),
        methods=tuple(spec for entry in table["methods"] for spec in _methods(entry)),
        judges=tuple(_make(JudgeSpec, entry, "a judge") for entry in table["judges"]),
        reference=str(table["reference"]),
        world=table.get("world", {}),
        pairs=tuple(_make(PairSpec, entry, "an entry of pairs") for entry in table.get("pairs", ())),
        train=tuple(_train(entry, common) for entry in table.get("train", ())),
        comparisons=tuple((str(a), str(b)) for a, b in table.get("comparisons", ())),
        gaps=tuple(_make(Gap, {**g, "methods": tuple(g.get("methods", ()))}, "a gap") for g in table.get("gaps", ())),
        fronts=tuple(table.get("fronts", ())),
        claims=tuple(_make(Claim, entry, "a claim") for entry in table.get("claims", ())),
        published=tuple(published),
        sizes=table.get("sizes", {}),
    )
    _check(recipe)
    return recipe


def _train(entry: Mapping[str, Any], common: Mapping[str, Any]) -> TrainSpec:
    if not isinstance(entry.get("name"), str):
        raise ConfigError("an entry of train has no name")
    return TrainSpec(name=entry["name"], settings={**common, **{k: v for k, v in entry.items() if k != "name"}})


def _methods(entry: Mapping[str, Any]) -> list[MethodSpec]:
    """The rows of one entry: one for each of its `weights`, if it has a list of them."""
    kind = KINDS.get(str(entry.get("kind")))
    if kind is None:
        raise ConfigError(f"a method has the kind {entry.get('kind')!r}; it must be one of {', '.join(KINDS)}")
    name = str(entry.get("name", entry["kind"]))
    own = [*kind.roles, *([kind.named] if kind.named else [])]
    _only(entry, ["kind", "name", "family", "sampling", "weights", *own, *kind.settings], f"method {name!r}")
    missing = [key for key in own if key not in entry]
    if missing:
        raise ConfigError(f"method {name!r} of kind {entry['kind']} lacks {', '.join(missing)}")
    named: Mapping[str, str] = entry[kind.named] if kind.named else {}
    given = entry.get("weights", {})
    grid = given if isinstance(given, list) else [given]
    rows = []
    for weights in grid:
        full = {key: float(weights.get(key, 1.0)) for key in (named if kind.named else weights)}
        _only(weights, full, f"the weights of method {name!r}")
        label = ", ".join(f"{key} {value:g}" for key, value in full.items())
        rows.append(
            MethodSpec(
                kind=entry["kind"],
                name=name if len(grid) == 1 else f"{name} ({label})",
                family=str(entry.get("family", name)),
                roles={role: entry[role] for role in kind.roles},
                named=dict(named),
                weights=full,
                settings={key: entry.get(key, value) for key, value in kind.settings.items()},
                sampling=dict(entry.get("sampling", {})),
            )
        )
    return rows


def _check(recipe: Recipe) -> None:
    names = [method.name for method in recipe.methods]
    judges = [judge.name for judge in recipe.judges]
    for what, values in (("method", names), ("judge", judges), ("trained model", [t.name for t in recipe.train])):
        files = [slug(value) for value in values]
        double = [value for value, file in zip(values, files, strict=True) if files.count(file) > 1 or not file]
        if double:
            raise ConfigError(f"the {what} {double[0]!r} has no file name of its own; give it another name")
    used = [recipe.reference, *(name for pair in recipe.comparisons for name in pair)]
    used += [name for gap in recipe.gaps for name in (gap.bottom, gap.top, *gap.methods)]
    used += [name for claim in recipe.claims if claim.what != "front" for name in (claim.first, claim.second)]
    for method in recipe.methods:
        _only(method.sampling, list(SamplingSpec.__dataclass_fields__), f"the sampling of method {method.name!r}")
    families = {method.family for method in recipe.methods}
    _known(used, names, "method")
    _known([*(n for c in recipe.claims if c.what == "front" for n in (c.first, c.second))], families, "family")
    _known(
        [*recipe.fronts, *(g.judge for g in recipe.gaps), *(c.judge for c in recipe.claims if c.judge)], judges, "judge"
    )
    for claim in recipe.claims:
        _check_claim(claim, recipe)
    for judge in recipe.judges:
        if judge.kind not in JUDGES:
            raise ConfigError(
                f"judge {judge.name!r} has the kind {judge.kind!r}; it must be one of {', '.join(JUDGES)}"
            )
    if recipe.prompts.count < 2:
        raise ConfigError(f"prompts.count is {recipe.prompts.count}; an interval needs at least 2")


def _check_claim(claim: Claim, recipe: Recipe) -> None:
    about = f"the claim {claim.what!r} of {claim.first!r} and {claim.second!r}"
    if claim.what not in CLAIMS:
        raise ConfigError(f"a claim is {claim.what!r}; it must be one of {', '.join(CLAIMS)}")
    if (claim.judge != "") != (claim.what in ("above", "level", "gap")):
        raise ConfigError(f"{about} {'has' if claim.judge else 'needs'} a judge; above, level and gap have one")
    _check_bound(about, "margin", claim.margin, needed=claim.what == "level", allowed=claim.what in ("level", "front"))
    _check_bound(about, "share", claim.share, needed=claim.what == "gap", allowed=claim.what == "gap")
    if claim.what == "front" and not recipe.fronts:
        raise ConfigError(f"{about} needs fronts: the judges of the objectives")
    if claim.what == "gap" and not any(
        claim.first in gap.methods and (claim.second, claim.judge) == (gap.top, gap.judge) for gap in recipe.gaps
    ):
        raise ConfigError(f"{about} needs an entry of gaps with that method, top and judge")


def _check_bound(about: str, name: str, value: Any, *, needed: bool, allowed: bool) -> None:
    if type(value) not in (int, float) or value < 0:
        raise ConfigError(f"{about} has the {name} {value!r}; it must be a number of 0 or more")
    if needed and not value:
        raise ConfigError(f"{about} needs a {name} above 0")
    if value and not allowed:
        raise ConfigError(f"{about} has a {name}; it does not go with it")


def _known(used: Sequence[str], known: Sequence[str] | set[str], what: str) -> None:
    unknown = [name for name in used if name not in known]
    if unknown:
        raise ConfigError(f"there is no {what} {unknown[0]!r}; the recipe has {', '.join(sorted(known))}")


def _make(cls: Any, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {table!r}; expected a table")
    fields = list(cls.__dataclass_fields__)
    _only(table, fields, where)
    try:
        return cls(**table)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; its keys are {', '.join(fields)}") from error


def _only(table: Mapping[str, Any], allowed: Any, where: str) -> None:
    unknown = [key for key in table if key not in allowed]
    if unknown:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")


def _number(value: Any, kind: type[int], name: str) -> int:
    if type(value) is not kind or value < 0:
        raise ConfigError(f"{name} is {value!r}; it must be an integer of 0 or more")
    return value
