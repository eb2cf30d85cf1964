"""Pairs for training from code problems: the canonical solution against the same with one small fault.

The fault is one of these, at a place drawn at random, and the sandbox has seen the tests fail with it:

    < and <=, > and >=, == and !=, in and not in    swapped
    + and -, * and //, % and //                     swapped (% to //)
    and, or                                         swapped
    True, False                                     swapped
    an integer                                      one more

Both sides are printed from the syntax tree, without docstrings, so that neither comments nor layout tells them apart.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from genarm.lab.tasks.code import Problem, passed
from genarm.lab.tasks.sandbox import Limits, run_code
from genarm.text.prompts import as_conversation

LIMITS = Limits(seconds=10, cpu_seconds=2)

TRIES = 20
"""Faults that are tried before a problem is given up."""

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def pair_rows(problems: Sequence[Problem], *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A pair in TRL's conversational format for each problem that a fault can be found for, with its `name`.

    Raises:
        UnsupportedError: the sandbox cannot run here.
    """
    for problem in problems:
        faulty = break_solution(problem, seed=seed)
        if faulty is not None:
            yield {
                "prompt": as_conversation(problem.instruction),
                "chosen": [{"role": "assistant", "content": fenced(plain(problem.solution))}],
                "rejected": [{"role": "assistant", "content": fenced(faulty)}],
                "name": problem.name,
            }


def break_solution(problem: Problem, *, seed: int = 0) -> str | None:
    """The canonical solution with a fault that the tests find; None where they fail without one, or find none."""
    whole = plain(problem.solution)
    if not passed(run_code(f"{whole}\n\n{problem.tests}", LIMITS)):
        return None
    faulty = mutants(whole)
    random.Random(f"fault {seed} {problem.name}").shuffle(faulty)
    for code in faulty[:TRIES]:
        outcome = run_code(f"{code}\n\n{problem.tests}", LIMITS)
        if outcome.status == "failed":  # not one that never ends: nobody would take it for a solution
            return code
    return None


def fenced(code: str) -> str:
    """`code` as a chat model shows it."""
    return f"```python\n{code}\n```"


def plain(code: str) -> str:
    """`code` in the layout of the syntax tree, without comments and docstrings."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def mutants(code: str) -> list[str]:
    """`code` with each single fault."""
    tree = ast.parse(code)
    faulty = []
    for number, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            twin = copy.deepcopy(tree)
            change(next(n for i, n in enumerate(ast.walk(twin)) if i == number))
            faulty.append(ast.unparse(twin))
    return faulty


def _changes(node: ast.AST) -> list[Callable[[Any], None]]:
    """What can be made wrong at `node`, as functions that do it to a copy."""
    match node:
        case ast.Compare(ops=ops):
            return [_swap_comparison(i) for i, op in enumerate(ops) if type(op) in _SWAPS]
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in _SWAPS:
            return [_swap]
        case ast.Constant(value=bool() | int()):
            return [_alter]
    return []


def _swap_comparison(place: int) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        node.ops[place] = _SWAPS[type(node.ops[place])]()

    return change


def _swap(node: Any) -> None:
    node.op = _SWAPS[type(node.op)]()


def _alter(node: Any) -> None:
    node.value = not node.value if isinstance(node.value, bool) else node.value + 1
