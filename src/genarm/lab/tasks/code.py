"""Code problems with unit tests: HumanEval (Chen et al., arXiv 2107.03374) and MBPP (Austin et al., arXiv 2108.07732).

A response is either a chat reply with the code in a fenced block, or the text that continues `Problem.prompt`. It is
put together with the tests and run in the sandbox.
"""

from __future__ import annotations

import ast
import codeop
import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genarm.errors import DataError, UnsupportedError
from genarm.lab.tasks.sandbox import Limits, Outcome, run_code
from genarm.statistics import Proportion, proportion

_FENCED = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

_NO_PYTHON = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
"""What a compiler raises; the last two of brackets within brackets."""

_AFTER_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```")
_AFTER_PROGRAM = ("\nassert", '\n"""', "\nprint", "\nif ", "\n```")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task, its tests and one solution of it.

    Attributes:
        name: as in the file.
        prompt: what a base model continues.
        instruction: what a chat model is asked.
        entry_point: the function that the tests call; empty where it is unknown.
        tests: code to be run after a solution.
        solution: the canonical one, whole.
        stops: where a continuation of `prompt` has left the solution.
    """

    name: str
    prompt: str
    instruction: str
    entry_point: str
    tests: str
    solution: str
    stops: tuple[str, ...]


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a HumanEval or MBPP file, .jsonl or .jsonl.gz (raises DataError, naming the line)."""
    problems = []
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8") if Path(path).suffix == ".gz" else open(path, encoding="utf-8") as f
        ):
            lines = f.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected JSON lines in UTF-8, plain or as .gz") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            problems.append(_problem(line, f"{path}, line {number}"))
    if not problems:
        raise DataError(f"{path} holds no problem; expected the rows of HumanEval or MBPP")
    return problems


def _problem(line: str, where: str) -> Problem:
    try:
        row = json.loads(line)
        if "canonical_solution" in row:
            return _human_eval(row)
        return _mbpp(row)
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise DataError(
            f"{where} is no problem of HumanEval (prompt, canonical_solution, test, entry_point) or of MBPP (text, "
            f"code, test_list): {type(error).__name__} {error}"
        ) from error


def _human_eval(row: Mapping[str, Any]) -> Problem:
    prompt, entry_point = row["prompt"], row["entry_point"]
    return Problem(
        name=row["task_id"],
        prompt=prompt,
        instruction=f"Complete this Python function. Reply with the whole function in one code block.\n\n"
        f"```python\n{prompt.strip()}\n```",
        entry_point=entry_point,
        tests=f"{row['test']}\n\ncheck({entry_point})\n",
        solution=prompt + row["canonical_solution"],
        stops=_AFTER_FUNCTION,
    )


def _mbpp(row: Mapping[str, Any]) -> Problem:
    code, asserts = row["code"].replace("\r\n", "\n"), "\n".join(row["test_list"])
    task = f"{row['text']} It must pass these tests:\n\n{asserts}"
    defined = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    called = [name for name in defined if re.search(rf"\b{name}\(", asserts)]
    return Problem(
        name=f"MBPP/{row['task_id']}",
        prompt=f'"""\n{task}\n"""\n',
        instruction=f"{task}\n\nReply with the code in one code block.",
        entry_point=called[-1] if called else "",
        # After the code, not before it: what is set up uses its classes.
        tests=f"{row.get('test_setup_code', '')}\n{asserts}\n",
        solution=code,
        stops=_AFTER_PROGRAM,
    )


def extract_code(reply: str, entry_point: str = "") -> str | None:
    """The first fenced block of `reply` that defines `entry_point`, or else the first one; None without a block."""
    blocks = [_outdent(block, indent) for indent, block in _FENCED.findall(reply)]
    return next((block for block in blocks if _defines(block, entry_point)), blocks[0] if blocks else None)


def _outdent(block: str, indent: str) -> str:
    """`block` without the indentation of its fence (of a list item, say), which is none of the code."""
    return re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) if indent else block


def solution_of(problem: Problem, response: str) -> str:
    """The code that `response` stands for, without the tests.

    Where the prompt has the head of the entry point and the response defines it again, the response takes its place,
    after what the prompt has before it (imports, helpers). Anything else continues the prompt; text outside a block
    does so up to the first of `problem.stops`.
    """
    block = extract_code(response, problem.entry_point)
    code = response if block is None else block
    if _defines(code, problem.entry_point) and _defines(problem.prompt, problem.entry_point):
        return problem.prompt[: _head(problem.prompt, problem.entry_point).start()] + code
    if block is None:
        code = code[: min((i for stop in problem.stops if (i := code.find(stop)) >= 0), default=len(code))]
    return problem.prompt + code


def _defines(code: str, name: str) -> bool:
    return bool(name) and re.search(rf"^(?:async def|def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None


def run_tests(problem: Problem, response: str, limits: Limits | None = None) -> Outcome:
    """Run the tests on a response, in the sandbox."""
    return run_code(f"{solution_of(problem, response)}\n\n{problem.tests}", limits)


def score(problem: Problem, response: str) -> float:
    """1 if the tests pass, else 0 (raises UnsupportedError where the sandbox cannot run)."""
    return float(passed(run_tests(problem, response)))


def passed(outcome: Outcome) -> bool:
    """Whether the tests passed (raises UnsupportedError where nothing was tested)."""
    if outcome.status == "error":
        raise UnsupportedError(f"{outcome.reason}; run genarm as a user who may start its Python")
    return outcome.passed


def pass_rate(problems: Sequence[Problem], responses: Sequence[str]) -> Proportion:
    """The share of `problems` that their `responses` solve, one each (pass@1)."""
    solved = sum(score(p, r) for p, r in zip(problems, responses, strict=True))
    return proportion(int(solved), len(problems))


def problem_of(prompt: str, tests: str, entry_point: str = "") -> Problem:
    """A problem from a user's own row: its prompt, its tests, and what they call, if that is known.

    A prompt that has the head of `entry_point` can be continued, as those of HumanEval; of words and a fence around
    the code, as a template puts them, nothing gets into the program. `check(entry_point)` is called where the tests
    define `check` and do not call it themselves.
    """
    if entry_point and _defines(tests, "check") and not re.search(r"^check\(", tests, re.MULTILINE):
        tests += f"\n\ncheck({entry_point})\n"
    begun = _begun(prompt, entry_point)
    return Problem(
        name="",
        prompt=begun,
        instruction=prompt,
        entry_point=entry_point,
        tests=tests,
        solution="",
        stops=_AFTER_FUNCTION if begun else (),
    )


def _head(code: str, entry_point: str) -> re.Match[str]:
    """Where `code` begins to define `entry_point`, with what decorates it."""
    found = re.search(rf"^(?:@[^\n]*\n)*(?:async def|def|class) {re.escape(entry_point)}\b", code, re.MULTILINE)
    assert found is not None
    return found


def _begun(prompt: str, entry_point: str) -> str:
    """The code of a prompt that begins to define `entry_point`; empty where it does not.

    Of lines before the head as many as are a program, of those from the head on as many as a body can follow.
    """
    block = extract_code(prompt, entry_point) or ""
    code = block if _defines(block, entry_point) else prompt
    if not _defines(code, entry_point):
        return ""
    start = _head(code, entry_point).start()
    before = _lines(code[:start])
    head = _lines(code[start:])
    first = next(i for i in range(len(before) + 1) if _is_program("".join(before[i:])))
    # Of a last line without an end nobody knows whether it is words or code that is cut off; words begin at the margin.
    whole = code.endswith("\n")
    ends = (end for end in range(len(head), 0, -1) if whole or end == len(head) or not head[end][0].isspace())
    fits = (end for end in ends if _goes_on("".join(head[:end])))
    return "".join(before[first:] + head[: next(fits, len(head))])


def _lines(code: str) -> list[str]:
    """With their ends, as Python has them: a form feed or U+2028, at which splitlines() splits, is within a line."""
    return list(io.StringIO(code, newline=""))


def _goes_on(code: str) -> bool:
    """Whether a line of a body can follow `code`, or the rest of a statement that it begins."""
    lines = [line.rstrip("\r\n") for line in _lines(code.rstrip())]
    indent = lines[-1][: -len(lines[-1].lstrip())] or "    "
    if _is_program("\n".join([*lines, f"{indent}pass"])):
        return True
    try:
        return codeop.compile_command(code, symbol="exec") is None
    except _NO_PYTHON:
        return False


def _is_program(code: str) -> bool:
    """Whether `code` is Python, and not words that happen to be (`Solution`, `Task: sort`)."""
    try:
        body = ast.parse(code).body
    except _NO_PYTHON:
        return False
    return not any(
        (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Call))
        or (isinstance(node, ast.AnnAssign) and node.value is None)
        for node in body
    )
