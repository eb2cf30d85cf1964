"""A judging protocol: what an LLM is asked, how it is sampled and how its reply is read. Each one is a TOML file.

model = "gpt-4"         # asked unless the user names another one
system = "…"            # optional
template = "…"          # pairs: {prompt}, {first} and {second}; single answers: {prompt} and {response}
rubric = "…"            # optional: put where the template or the system message says {rubric}

[parser]
kind = "two-scores"     # or "verdict", "score"; then its settings: the fields of its class in `parsing`

[sampling]              # sent as it is; some limit on the reply's length is a must
temperature = 0.0
max_tokens = 256
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat

from genarm.data.tables import FORBID, read_table
from genarm.errors import ConfigError
from genarm.lab.judges.parsing import PARSERS, Parser, SingleScore
from genarm.text.prompts import Message, Prompt

_FOLDER = Path(__file__).parent / "protocols"
_RUBRICS = (".txt", ".md")
_LIMITS = ("max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "seed", "reasoning_effort", *_LIMITS)
_PLACE = re.compile(r"\{(prompt|first|second|response|rubric)\}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of judging; see the module's head for what the fields are.

    Raises:
        ConfigError: a place for the answers is missing or of the other kind, or the sampling does not hold together.
    """

    name: str
    template: str
    parser: Parser
    sampling: Mapping[str, Any]
    system: str | None = None
    rubric: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        places = set(_PLACE.findall(f"{self.system or ''}\n{self.template}"))
        needed = {"prompt", "response"} if self.single else {"prompt", "first", "second"}
        if self.rubric is not None:
            needed.add("rubric")
        if places != needed:
            raise ConfigError(
                f"the protocol {self.name} has the places {_list(places)}; with this parser"
                f"{' and a rubric' if self.rubric is not None else ''} it must have {_list(needed)}"
            )
        unknown = sorted(set(self.sampling) - set(_SAMPLING))
        if unknown:
            raise ConfigError(
                f"the protocol {self.name} has the sampling setting {unknown[0]!r}; allowed are {', '.join(_SAMPLING)}"
            )
        limits = [self.sampling[key] for key in _LIMITS if key in self.sampling]
        if len(limits) != 1 or type(limits[0]) is not int or limits[0] < 1:
            raise ConfigError(
                f"the protocol {self.name} must limit the length of replies: give one of {' and '.join(_LIMITS)}, at "
                "least 1"
            )

    @property
    def single(self) -> bool:
        """Whether it scores one answer by itself; otherwise it compares two."""
        return isinstance(self.parser, SingleScore)

    @property
    def reply_limit(self) -> int:
        """The most tokens of a reply."""
        return int(next(self.sampling[key] for key in _LIMITS if key in self.sampling))

    @property
    def record(self) -> dict[str, Any]:
        """What is asked, and how replies are read; not what it is called, nor whom it asks."""
        asked = {key: value for key, value in asdict(self).items() if key not in ("name", "model", "parser")}
        return {**asked, "parser": repr(self.parser)}

    def messages(self, prompt: Prompt, *answers: str) -> list[Message]:
        """The question about one answer, or about two in the order in which they are shown."""
        names = ("response",) if self.single else ("first", "second")
        values = {"prompt": as_text(prompt), "rubric": self.rubric or "", **dict(zip(names, answers, strict=True))}

        def fill(text: str) -> str:  # in one pass: an answer may say "{second}" itself
            return _PLACE.sub(lambda place: values[place[1]], text)

        system: list[Message] = [] if self.system is None else [{"role": "system", "content": fill(self.system)}]
        return [*system, {"role": "user", "content": fill(self.template)}]


def as_text(prompt: Prompt) -> str:
    """A prompt as a judge reads it: the text, or the turns of a conversation under their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def protocol_names() -> tuple[str, ...]:
    """The protocols that come with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_protocol(source: str | Path) -> Protocol:
    """A protocol by its name, from a TOML file, or `score` with the rubric in a plain text file (.txt, .md).

    Raises:
        ConfigError: no such name or file, or something in the file does not hold together.
    """
    if str(source) in protocol_names():
        return _from_table(str(source), _read_table(_FOLDER / f"{source}.toml"))
    path = Path(source)
    if path.suffix in _RUBRICS:
        rubric = _read(path).strip()
        if not rubric:
            raise ConfigError(f"the rubric {path} is empty; say in it what makes an answer good")
        return replace(load_protocol("score"), name=path.stem, rubric=rubric)
    if path.suffix == ".toml":
        return _from_table(path.stem, _read_table(path))
    raise ConfigError(
        f"there is no protocol {str(source)!r}; use one of {', '.join(protocol_names())}, a file of your own (.toml), "
        "or a rubric in plain text (.txt, .md)"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the protocol {path}: {error}") from error


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the protocol {path} is not valid TOML: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _File:
    """What a file says; see `Protocol`."""

    __pydantic_config__ = FORBID

    template: str
    parser: Mapping[str, Any]
    sampling: Mapping[str, str | int | FiniteFloat]
    model: str | None = None
    system: str | None = None
    rubric: str | None = None


def _from_table(name: str, table: Mapping[str, Any]) -> Protocol:
    read: _File = read_table(_File, table, f"the protocol {name}")
    own = {key: value for key, value in vars(read).items() if key != "parser"}
    return Protocol(name=name, parser=_parser(name, read.parser), **own)


def _parser(name: str, table: Mapping[str, Any]) -> Parser:
    make = PARSERS.get(str(table.get("kind")))
    if make is None:
        raise ConfigError(
            f"the protocol {name} has the parser kind {table.get('kind')!r}; it must be one of {', '.join(PARSERS)}"
        )
    own = {key: value for key, value in table.items() if key != "kind"}
    parser: Parser = read_table(make, own, f"the parser of the protocol {name}")
    return parser


def _list(places: set[str]) -> str:
    return ", ".join(f"{{{place}}}" for place in sorted(places)) or "none"
