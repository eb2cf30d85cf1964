"""Unit tests as the judge of code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from genarm.errors import DataError
from genarm.lab.judges.interface import Item, Kind, Scorer, check_rows, value_of
from genarm.lab.tasks.code import Problem, passed, problem_of, run_tests
from genarm.lab.tasks.sandbox import Limits


@dataclass(frozen=True, kw_only=True)
class UnitTestScorer(Scorer):
    """1 if the code in the response passes the tests of the row's `key` in the sandbox, else 0."""

    key: str
    limits: Limits = field(default_factory=Limits)

    @property
    def record(self) -> dict[str, Any]:
        """The key, what of prompt and reply becomes the program, and what a program may use."""
        return {
            "kind": "tests",
            "key": self.key,
            "program": "without the words around a prompt's code",
            "limits": asdict(self.limits),
        }

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every row has tests: code, or a list of lines of code."""
        check_rows(rows, self._tests)

    def _tests(self, row: Mapping[str, Any]) -> str:
        tests = value_of(row, self.key)
        lines = [tests] if isinstance(tests, str) else tests
        if not (isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines)):
            raise DataError(f"{self.key!r} is {tests!r}; expected Python code, or a list of lines of it")
        return "\n".join(lines)

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Raises UnsupportedError where the sandbox cannot run."""
        return [float(passed(run_tests(self._problem(item), item.response, self.limits))) for item in items]

    def _problem(self, item: Item) -> Problem:
        return problem_of(item.text, self._tests(item.row), str(item.row.get("entry_point", "")))


KIND = Kind(
    name="tests",
    about="1 where code passes the unit tests of the prompt's column",
    form="KEY",
    scorer=lambda value, _: UnitTestScorer(key=value),
)
