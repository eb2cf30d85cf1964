"""Tables that a stranger wrote, such as those of a TOML file, checked against the types that they are to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from genarm.errors import ConfigError

FORBID = {"extra": "forbid"}
"""What a dataclass has as its `__pydantic_config__` where it takes no keys but its own."""


_UNKNOWN = "unexpected_keyword_argument"


def read_table(kind: Any, value: object, where: str) -> Any:
    """`value` as `kind`, in which nothing is converted but 1 to 1.0 and lists to tuples.

    Args:
        kind: a dataclass, whose hints say what each key must be (no others, if its
            `__pydantic_config__` is `FORBID`), or another type; pydantic's bounds hold.
        value: as TOML or JSON gives it.
        where: what it is called in messages.

    Raises:
        ConfigError: names a key that is not as it must be, what it is and what is allowed.
    """
    adapter = _adapter(kind)
    try:
        # As JSON, in which a list may stand for a tuple and a table for a dataclass, but never a text for a number.
        return adapter.validate_json(json.dumps(value, default=_refuse), strict=True)
    except ValidationError as error:
        # Of a union's branches, the one that came furthest; and a key too many tells more than one that is missing.
        problem = max(error.errors(include_url=False), key=lambda e: (len(e["loc"]), e["type"] == _UNKNOWN))
        raise ConfigError(_words(dict(problem), where, adapter)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each kind: making one takes milliseconds, using it microseconds."""
    return TypeAdapter(kind)


def _refuse(value: object) -> NoReturn:
    """TOML has dates and times, and no table of ours does."""
    raise ConfigError(f"{value} is a date or a time; it must be a text, a number, a list or a table")


def _words(problem: Mapping[str, Any], where: str, adapter: TypeAdapter[Any]) -> str:
    place = [str(part) for part in problem["loc"] if "[" not in str(part)]  # without the branches of a union
    if problem["type"] == "value_error":
        return f"{'.'.join((where, *place))}: {problem['ctx']['error']}"
    if problem["type"] in (_UNKNOWN, "missing", "missing_argument"):
        *above, last = place
        keys = _keys(adapter, above)
        what = "has the unknown key" if problem["type"] == _UNKNOWN else "lacks"
        return f"{'.'.join((where, *above))} {what} {last!r}" + (f"; allowed are {', '.join(keys)}" if keys else "")
    text = repr(problem["input"])
    allowed = problem["msg"].removeprefix("Input should be ").replace("an object", "a table")
    allowed = allowed.replace("a valid integer", "an integer").replace("a valid", "a")
    return f"{'.'.join((where, *place))} is {text if len(text) <= 80 else f'{text[:80]}…'}; it must be {allowed}"


def _keys(adapter: TypeAdapter[Any], place: list[str]) -> list[str]:
    """The keys of the table at `place`."""
    schema = adapter.json_schema()
    node = schema
    for part in (*place, None):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if part is not None:
            node = node.get("properties", {}).get(part) or node.get("items") or {}
    return list(node.get("properties", {}))
