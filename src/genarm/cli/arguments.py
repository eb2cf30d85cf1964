"""Options of a command from the fields of a dataclass, so that every default is written once, in the dataclass.

A field with a help text is an option. Its type says how the value is read; its metadata say the rest:

    help        what it is
    metavar     what the value is called: by default N, X or NAME, after its type
    choices     the values it may have
    nargs       of a tuple: how many values at once; otherwise the option is given once for each
    positional  it has no name: its place says what it is
    option      its name, where that is not the field's
    aliases     further names
    group       the title under which --help lists it
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

from genarm.training.config import option_name

S = TypeVar("S")


def add_options(
    parser: argparse._ActionsContainer,
    *settings: Any,
    only: Sequence[str] = (),
    over_file: bool = False,
    **changes: Mapping[str, Any],
) -> None:
    """Add an option for each field of `settings` that has a help text, where the parser has none of that name yet.

    Args:
        parser: where the options go.
        settings: dataclasses; or objects of them, whose values are the defaults.
        only: the names of the fields that become options here.
        over_file: the command also reads a file: an option that is not given leaves no value, and switches can be
            turned off.
        changes: metadata of a field for this command, over its own.
    """
    groups: dict[str, argparse._ActionsContainer] = {}
    for kind in settings:
        hints = get_type_hints(kind if isinstance(kind, type) else type(kind))
        for field in dataclasses.fields(kind):
            about = {**field.metadata, **changes.get(field.name, {})}
            unwanted = "help" not in about or (only and field.name not in only)
            if unwanted or any(action.dest == field.name for action in parser._actions):
                continue
            title = about.get("group")
            if title and title not in groups:
                groups[title] = parser.add_argument_group(title)
            default = getattr(kind, field.name, field.default)
            names, options = _option(field.name, hints[field.name], default, about, over_file=over_file)
            (groups[title] if title else parser).add_argument(*names, **options)


@overload
def settings_from(arguments: argparse.Namespace, settings: type[S], **more: Any) -> S: ...
@overload
def settings_from(arguments: argparse.Namespace, settings: S, **more: Any) -> S: ...
def settings_from(arguments: argparse.Namespace, settings: Any, **more: Any) -> Any:
    """The settings that the command line gives, over the defaults of a dataclass, or over an object of one.

    Args:
        arguments: what was parsed.
        settings: as in `add_options`.
        more: values of fields that are no options.

    Raises:
        ConfigError: whatever the dataclass refuses.
    """
    names = {field.name for field in dataclasses.fields(settings)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in names
    }
    values = {**given, **more}
    return settings(**values) if isinstance(settings, type) else dataclasses.replace(settings, **values)


def _option(
    name: str, hint: Any, default: Any, about: Mapping[str, Any], *, over_file: bool
) -> tuple[list[str], dict[str, Any]]:
    """The names of an option, and what else argparse needs to know of it."""
    names = [name]
    found: dict[str, Any] = {"help": about["help"].replace("%", "%%")}
    if not about.get("positional"):
        names = [about.get("option", option_name(name)), *map(option_name, about.get("aliases", ()))]
        found["dest"] = name
        if over_file:
            found["default"] = argparse.SUPPRESS
            if not (default in (None, (), "", dataclasses.MISSING) or isinstance(default, bool)):
                found["help"] += f" (default: {default})"
        elif default is dataclasses.MISSING:
            found["required"] = True
        else:
            found["default"] = list(default) if isinstance(default, tuple) else default
    return names, {
        **found,
        **_values(hint, about, switch=argparse.BooleanOptionalAction if over_file else "store_true"),
    }


def _values(hint: Any, about: Mapping[str, Any], *, switch: Any) -> dict[str, Any]:
    """How a value of the type `hint` is read."""
    kind = next(k for k in get_args(hint) if k is not NoneType) if NoneType in get_args(hint) else hint
    if kind is bool:
        return {"action": switch}
    several: dict[str, Any] = {}
    if get_origin(kind) in (tuple, Sequence):
        several = {"nargs": about["nargs"]} if "nargs" in about else {"action": "append"}
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else about.get("choices")
    if choices:
        return {**several, "choices": choices}
    metavar = about.get("metavar", {int: "N", float: "X", str: "NAME"}.get(kind))
    return {**several, "metavar": metavar, **({} if kind is str else {"type": kind})}
