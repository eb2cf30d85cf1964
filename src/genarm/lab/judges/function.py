"""A Python function as the judge."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from genarm.errors import ConfigError, DataError
from genarm.lab.judges.interface import Item, Kind, Scorer
from genarm.provenance import code_record


@dataclass(frozen=True, kw_only=True)
class FunctionScorer(Scorer):
    """Calls `function(prompt, response)`, or `function(prompt, response, row)` where it takes three arguments."""

    name: str
    function: Callable[..., Any]

    @property
    def record(self) -> dict[str, Any]:
        """The name, and the code."""
        return {"kind": "function", "function": self.name, "code": code_record(self.function)}

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises DataError where the function fails or gives no finite number."""
        more = _takes_row(self.function)
        return [self._call(item, (item.row,) if more else ()) for item in items]

    def _call(self, item: Item, more: tuple[Mapping[str, Any], ...]) -> float:
        try:
            said = self.function(item.text, item.response, *more)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"{self.name} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno}) for the "
                f"response {_short(item.response)} to {_short(item.text)}; mend it and run again"
            ) from error
        try:
            value = float(said)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{self.name} gave {said!r} for the response {_short(item.response)} to {_short(item.text)}; it must "
                "give a finite number"
            )
        return value


def _moved(module: str) -> str | None:
    """Where a module of ours is that was beside the others before the laboratory had a place of its own."""
    ours, _, rest = module.partition(".")
    new = f"{ours}.lab.{rest}"
    with contextlib.suppress(ModuleNotFoundError):
        return new if ours == "genarm" and find_spec(new) else None
    return None


def find_function(name: str) -> Callable[..., Any]:
    """The function that `name`, "module:function", means, from the current folder or an installed package.

    Raises:
        ConfigError: there is none, its module cannot be imported, or it takes other than two or three arguments.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"function={name} names no function; expected module:function, such as wish:score")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        moved = _moved(module_name)
        advice = (
            f"it is {moved}:{function_name} now"
            if moved
            else "it must be a .py file in the current folder or an installed package"
        )
        raise ConfigError(f"function={name}: {error}; {advice}") from error
    except AttributeError as error:
        raise ConfigError(f"function={name}: {error}") from error
    except Exception as error:
        raise ConfigError(f"function={name}: importing {module_name} raised {type(error).__name__}: {error}") from error
    try:
        _takes_row(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"function={name}: it must be a function of (prompt, response) or (prompt, response, row): {error}"
        ) from error
    return function


def _takes_row(function: Callable[..., Any]) -> bool:
    """Whether `function` can be called with three arguments (raises TypeError if neither with three nor with two)."""
    signature = inspect.signature(function)
    try:
        signature.bind("prompt", "response", {})
    except TypeError:
        signature.bind("prompt", "response")
        return False
    return True


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


KIND = Kind(
    name="function",
    about="scores a reply by a Python function, module:function",
    form="module:function",
    scorer=lambda value, _: FunctionScorer(name=value, function=find_function(value)),
)
