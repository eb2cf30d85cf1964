"""What can score a response: a Python function, a reward model, an LLM judge, a known answer or unit tests.

All of it is checked before anything is sampled; models are loaded when the first response is scored.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from genarm.errors import ConfigError, DataError, MemberError
from genarm.lab.tasks.code import Problem, passed, problem_of, run_tests
from genarm.lab.tasks.mathematics import gold_number, last_number
from genarm.lab.tasks.sandbox import Limits
from genarm.model.placement import Placement
from genarm.provenance import code_record, model_record
from genarm.text.prompts import Prompt, encode_pair, end_ids

if TYPE_CHECKING:
    from genarm.lab.judges.cache import ReplyCache
    from genarm.lab.judges.protocol import Protocol as JudgeProtocol
    from genarm.lab.judges.settings import ClientSettings
    from genarm.lab.trajectory import TrajectoryReward

KINDS = {
    "function": "module:function",
    "reward": "FOLDER",
    "judge": "RUBRIC.txt",
    "last-number": "KEY",
    "tests": "KEY",
}
"""What `--score KIND=VALUE` may be."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A response to score.

    Attributes:
        prompt: as the model read it.
        response: its reply.
        row: the row of the prompt file.
    """

    prompt: Prompt
    response: str
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The prompt as text; of a conversation, the last message."""
        return last_text(self.row["prompt"])


class Scorer(Protocol):
    """Scores responses; higher is better."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What decides the scores, for the settings beside the output."""
        ...

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows of the prompt file without what the score needs of them (raises DataError)."""
        return

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """The score of each item; None where there is none (a judge's reply that cannot be read)."""
        ...

    def why_none(self, item: Item) -> str:
        """Why `item` has no score, as none has, and what to change."""
        return "see what the score says of a response by itself"


@dataclass(frozen=True, kw_only=True)
class ScorerOptions(Placement):
    """How scorers reach their models.

    Attributes:
        replies: the folder where a judge's replies are kept.
        judge_url: of an OpenAI-compatible endpoint; None for OpenAI's.
        judge_model: as the endpoint calls it; None for the protocol's.
        dtype, device: of a reward model.
    """

    replies: Path
    judge_url: str | None = None
    judge_model: str | None = None


def make_scorer(spec: str, options: ScorerOptions) -> Scorer:
    """The scorer that `spec`, KIND=VALUE, names.

    Raises:
        ConfigError: an unknown kind, or a value that names nothing; options of a judge without one.
        MemberError: the folder holds no reward model.
    """
    kind, _, value = spec.partition("=")
    if kind not in KINDS or not value:
        forms = ", ".join(f"{name}={form}" for name, form in KINDS.items())
        raise ConfigError(f"--score is {spec!r}; it must be one of {forms}")
    if kind != "judge" and (options.judge_url or options.judge_model):
        raise ConfigError(
            f"--judge-url and --judge-model are for --score judge=…, and this is {spec!r}; leave them out"
        )
    match kind:
        case "function":
            return FunctionScorer(name=value, function=find_function(value))
        case "reward":
            return _reward_scorer(value, options)
        case "judge":
            return _judge_scorer(value, options)
        case "last-number":
            return NumberScorer(key=value)
    return UnitTestScorer(key=value)


def last_text(prompt: Prompt) -> str:
    """`prompt` as text; of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


# --- a function -----------------------------------------------------------------------------------------------


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


# --- models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RewardScorer(Scorer):
    """Scores with a trajectory reward model, which reads prompt and response through its own tokenizer."""

    reference: str
    dtype: str
    device: str

    @property
    def record(self) -> dict[str, Any]:
        """The model and its precision."""
        return {"kind": "reward", "reward": model_record(self.reference), "dtype": self.dtype}

    @cached_property
    def _model(self) -> TrajectoryReward:
        from genarm.lab.trajectory import TrajectoryReward

        return TrajectoryReward.load(self.reference, dtype=self.dtype, device=self.device)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises DataError where the model's chat template refuses a conversation."""
        tokenizer = self._model.tokenizer
        ends = end_ids(None, tokenizer)
        encoded = [encode_pair(tokenizer, item.prompt, item.response, ends=ends) for item in items]
        prompts, replies = [ids for ids, _ in encoded], [ids for _, ids in encoded]
        return list(self._model.score(prompts, replies))


def _reward_scorer(reference: str, options: ScorerOptions) -> RewardScorer:
    from genarm.model.references import find_device, open_files

    files = open_files(reference)
    if not any("SequenceClassification" in name for name in files.config.architectures or ()):
        raise MemberError(
            f"{reference} is no trajectory reward model; give one that genarm train --kind trajectory has made"
        )
    return RewardScorer(reference=files.reference, dtype=options.dtype, device=find_device(options.device))


@dataclass(frozen=True, kw_only=True)
class JudgeScorer(Scorer):
    """Asks an LLM for a score by a rubric; a reply that cannot be read gives none."""

    protocol: JudgeProtocol
    settings: ClientSettings
    replies: Path

    @property
    def record(self) -> dict[str, Any]:
        """What is asked and of whom; where the model is served plays no part."""
        return {"kind": "judge", "protocol": self.protocol.record, "model": self.settings.model}

    @cached_property
    def _cache(self) -> ReplyCache:
        from genarm.lab.judges.cache import ReplyCache

        return ReplyCache(self.replies)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises DataError where the endpoint gives no reply; those that came are kept for the next run."""
        from genarm.lab.judges.llm import Answer, score_responses, summarise

        answers = [Answer(prompt=item.row["prompt"], response=item.response) for item in items]
        scores = score_responses(answers, self.protocol, self.settings, self._cache)
        summary = summarise(scores)
        if summary.failed:
            raise DataError(
                f"the judge gave no reply to {summary.failed} of {summary.items} questions ({summary.failure}); the "
                "same command goes on where this one stopped"
            )
        return [score.value for score in scores]

    def why_none(self, item: Item) -> str:
        """The judge's reply, which is kept, beside what it was asked for."""
        from genarm.lab.judges.llm import Answer, score_responses
        from genarm.lab.judges.parsing import SingleScore

        parser = self.protocol.parser
        assert isinstance(parser, SingleScore)
        answer = Answer(prompt=item.row["prompt"], response=item.response)
        (found,) = score_responses([answer], self.protocol, self.settings, self._cache)
        said = getattr(found.reply, "text", "")
        return (
            f"{self.settings.model} replied {_ending_of(said)}, where {parser.wanted} is read; take a judge "
            f"that keeps to it, or say so in the rubric (all replies are in {self.replies}), with another --output"
        )


def _ending_of(text: str) -> str:
    """A reply's end, where the score should be."""
    return repr(text if len(text) <= 80 else f"…{text[-80:]}") if text.strip() else "with nothing"


def _judge_scorer(source: str, options: ScorerOptions) -> JudgeScorer:
    from genarm.lab.judges.protocol import load_protocol
    from genarm.lab.judges.settings import OPENAI, ClientSettings

    protocol = load_protocol(source)
    if not protocol.single:
        raise ConfigError(f"the protocol {source} compares two answers; give a rubric (.txt), or one for single scores")
    model = options.judge_model or protocol.model
    if model is None:
        raise ConfigError(f"the protocol {source} names no model; name one with --judge-model")
    settings = ClientSettings(model=model, base_url=options.judge_url or OPENAI)
    settings.find_key()
    return JudgeScorer(protocol=protocol, settings=settings, replies=options.replies)


# --- verifiers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NumberScorer(Scorer):
    """1 if the last number of the response is that of the row's `key`, else 0."""

    key: str

    @property
    def record(self) -> dict[str, Any]:
        """The key."""
        return {"kind": "last-number", "key": self.key}

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every row has a number."""
        _check_rows(rows, self._gold)

    def _gold(self, row: Mapping[str, Any]) -> Decimal:
        return gold_number(str(_value(row, self.key)))

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Exact equality, as decimal numbers."""
        return [float(last_number(item.response) == self._gold(item.row)) for item in items]


@dataclass(frozen=True, kw_only=True)
class UnitTestScorer(Scorer):
    """1 if the code in the response passes the tests of the row's `key` in the sandbox, else 0."""

    key: str
    limits: Limits = field(default_factory=Limits)

    @property
    def record(self) -> dict[str, Any]:
        """The key, and what a program may use."""
        return {"kind": "tests", "key": self.key, "limits": asdict(self.limits)}

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every row has tests: code, or a list of lines of code."""
        _check_rows(rows, self._tests)

    def _tests(self, row: Mapping[str, Any]) -> str:
        tests = _value(row, self.key)
        lines = [tests] if isinstance(tests, str) else tests
        if not (isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines)):
            raise DataError(f"{self.key!r} is {tests!r}; expected Python code, or a list of lines of it")
        return "\n".join(lines)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises UnsupportedError where the sandbox cannot run."""
        return [float(passed(run_tests(self._problem(item), item.response, self.limits))) for item in items]

    def _problem(self, item: Item) -> Problem:
        return problem_of(item.text, self._tests(item.row), str(item.row.get("entry_point", "")))


def _check_rows(rows: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], object]) -> None:
    for number, row in enumerate(rows):
        try:
            read(row)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from error


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise DataError(f"there is no key {key!r} in the row, whose keys are {', '.join(row)}; name another")
    return row[key]
