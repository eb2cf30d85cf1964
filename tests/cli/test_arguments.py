"""Options from dataclasses: how each kind of field is read, and that every default of every command is written once."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import genarm.cli
from genarm.batch.plan import Plan
from genarm.cli import chat, pairs, tune
from genarm.cli.arguments import add_options, settings_from
from genarm.cli.demo import DemoOptions
from genarm.cli.eval import EvalOptions
from genarm.cli.main import VERBS, build_parser
from genarm.cli.options import (
    DraftOptions,
    ModelOptions,
    PromptOptions,
    PushOptions,
    ReadingOptions,
    TemplateOptions,
    WishOptions,
)
from genarm.cli.serve import ServeOptions
from genarm.engine import EngineOptions
from genarm.errors import ConfigError
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.bench.settings import DecodeSettings, ServeSettings, TrainSettings, VllmSettings
from genarm.lab.judges.settings import ClientSettings
from genarm.lab.pairs.select import Selection
from genarm.lab.tune.settings import TuneOptions
from genarm.model.placement import Loading
from genarm.sampling import Sampling
from genarm.training.config import TrainConfig

ENGINE = (EngineOptions, DraftOptions)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "train": (),  # a file may have what the command line does not, so the parser itself knows no defaults
    "compose": (PushOptions,),
    "show": (),
    "merge": (ModelOptions, PromptOptions),
    "push": (PushOptions,),
    "generate": (ModelOptions, WishOptions, PromptOptions, ReadingOptions, Sampling, Plan, *ENGINE),
    "chat": (ModelOptions, WishOptions, PromptOptions, ReadingOptions, chat._SAMPLING, Plan, *ENGINE),
    "score": (ModelOptions, WishOptions, PromptOptions, TemplateOptions),
    "serve": (ServeOptions, ModelOptions, WishOptions, *ENGINE, ReadingOptions),
    "pairs": (ModelOptions, pairs._PLAN, Selection, PromptOptions, TemplateOptions, Sampling, Loading, *ENGINE),
    "judge": (ClientSettings,),
    "accuracy": (AccuracySettings, TemplateOptions),
    "tune": (
        *(ModelOptions, TuneOptions, WishOptions, PromptOptions, TemplateOptions, Sampling, tune._PLAN),
        AccuracySettings,
    ),
    "eval": (EvalOptions,),
    "demo": (DemoOptions,),
    "bench decode": (DecodeSettings,),
    "bench vllm": (VllmSettings,),
    "bench train": (TrainSettings,),
    "bench serve": (ServeSettings, ModelOptions, *ENGINE),
}


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: own
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, own in action.choices.items()
    }


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every verb's parser; of a verb with subjects, those of the subjects."""
    found = {}
    for verb, parser in subparsers(build_parser()).items():
        subjects = {f"{verb} {name}": own for name, own in subparsers(parser).items()}
        found |= subjects or {verb: parser}
    return found


def test_every_command_is_here() -> None:
    assert list(SETTINGS) == list(commands())
    assert {name.split()[0] for name in SETTINGS} == set(VERBS)


@pytest.mark.parametrize("command", SETTINGS)
def test_a_default_is_that_of_its_dataclass_and_no_option_has_one_of_its_own(command: str) -> None:
    """The first of the settings that has a field of an option's name decides; without one, an option has no default."""
    defaults: dict[str, Any] = {}
    for kind in SETTINGS[command]:
        for option in dataclasses.fields(kind):
            default = getattr(kind, option.name, dataclasses.MISSING)
            if default is not dataclasses.MISSING:
                defaults.setdefault(option.name, default)
    for action in commands()[command]._actions:
        if action.dest == "help" or action.default is argparse.SUPPRESS:
            continue
        given = tuple(action.default) if isinstance(action.default, list) else action.default
        if action.required or not action.option_strings:
            assert given is None
        else:
            assert given == defaults.get(action.dest, False if action.nargs == 0 else None), action.dest


def test_no_command_writes_a_default_beside_an_option() -> None:
    """The options of `genarm train` have none at all (argparse.SUPPRESS), since what is not given comes from a file."""
    found = [
        f"{path.name}:{call.lineno}"
        for path in Path(genarm.cli.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for keyword in call.keywords
        if keyword.arg == "default" and ast.unparse(keyword.value) != "argparse.SUPPRESS"
    ]
    assert found == []


@dataclass(frozen=True, kw_only=True)
class Every:
    """A field of each kind."""

    place: str = field(metadata={"positional": True, "metavar": "PLACE", "help": "where"})
    needed: Path = field(metadata={"metavar": "FILE", "help": "a file"})
    number: int = field(default=3, metadata={"help": "100% a number", "aliases": ("n",)})
    share: float | None = field(default=None, metadata={"help": "a share"})
    named: str = field(default="it", metadata={"help": "a name", "option": "--called"})
    switch: bool = field(default=False, metadata={"help": "a switch"})
    which: Literal["one", "other"] = field(default="one", metadata={"help": "one of two"})
    level: str = field(default="low", metadata={"choices": ("low", "high"), "help": "one of two"})
    again: tuple[str, ...] = field(default=("a",), metadata={"help": "given several times"})
    several: Sequence[int] = field(default=(1, 2), metadata={"nargs": "+", "help": "some numbers"})
    both: tuple[str, str] | None = field(default=None, metadata={"nargs": 2, "metavar": ("A", "B"), "help": "two"})
    inner: int = 7

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ConfigError(f"--number is {self.number}; it must be 0 or more")


def parsed(*words: str, settings: Any = Every, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, settings, **more)
    return parser.parse_args(words)


def test_what_is_not_given_is_the_default() -> None:
    assert settings_from(parsed("here", "--needed", "f"), Every) == Every(place="here", needed=Path("f"))


def test_what_is_given_is_read_by_its_type() -> None:
    words = ["here", "--needed", "f", "--n", "4", "--share", "0.5"]
    words += ["--called", "x", "--switch", "--which", "other", "--level", "high", "--again", "b", "--again", "c"]
    words += ["--several", "7", "8", "9", "--both", "p", "q"]
    assert settings_from(parsed(*words), Every, inner=8) == Every(
        place="here",
        needed=Path("f"),
        number=4,
        share=0.5,
        named="x",
        switch=True,
        which="other",
        level="high",
        again=("a", "b", "c"),
        several=(7, 8, 9),
        both=("p", "q"),
        inner=8,
    )


def test_an_objects_values_are_the_defaults() -> None:
    mine = Every(place="here", needed=Path("f"), number=5, inner=9)
    assert settings_from(parsed("there", "--share", "1", settings=mine), mine) == dataclasses.replace(
        mine, place="there", share=1.0
    )


def test_over_a_file_only_what_is_given_has_a_value() -> None:
    given = parsed("here", "--no-switch", "--number", "2", over_file=True)
    assert vars(given) == {"place": "here", "switch": False, "number": 2}


def test_a_command_may_take_some_fields_and_have_words_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Every, only=["number", "inner"], inner={"help": "now an option", "option": "--within"})
    add_options(parser, Every, only=["number", "switch"])  # the first is there already
    names = [action.option_strings for action in parser._actions if action.dest != "help"]
    assert names == [["--number", "--n"], ["--within"], ["--switch"]]
    assert "100% a number" in parser.format_help()
    assert vars(parser.parse_args(["--within", "2"])) == {"number": 3, "inner": 2, "switch": False}


@pytest.mark.parametrize("words", [[], ["here"], ["here", "--needed", "f", "--number", "x"]])
def test_what_is_missing_or_of_another_type_is_refused(words: list[str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parsed(*words)


def test_the_dataclass_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ConfigError, match="--number is -1"):
        settings_from(parsed("here", "--needed", "f", "--number", "-1"), Every)


def test_train_has_an_option_for_every_field() -> None:
    dests = {action.dest for action in commands()["train"]._actions}
    assert {option.name for option in dataclasses.fields(TrainConfig)} == dests - {"help", "config", "resume"}
