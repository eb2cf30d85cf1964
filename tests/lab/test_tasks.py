"""Mathematics and code: parsers against known answers and properties, and the data sets themselves where they are."""

from __future__ import annotations

import gzip
import json
import math
import random
import tomllib
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.tiny import SHARED
from genarm.data.preferences import to_preferences
from genarm.errors import DataError, UnsupportedError
from genarm.lab.judges.interface import Item
from genarm.lab.judges.last_number import NumberScorer
from genarm.lab.tasks import broken, code, mathematics
from genarm.lab.tasks.code import Problem, extract_code, problem_of, run_tests, solution_of
from genarm.lab.tasks.mathematics import gold_number, last_number
from genarm.lab.tasks.sandbox import Outcome

DATA = SHARED / "data"
GSM8K, HUMAN_EVAL, MBPP = DATA / "gsm8k", DATA / "code/HumanEval.jsonl.gz", DATA / "code/mbpp.jsonl"


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"the shared data set {path.name} is not here")


# --- mathematics ----------------------------------------------------------------------------------------------

NUMBERS = {
    "It is 18.": "18",
    "1,234.50.": "1234.5",
    "$1,000,000 in all": "1000000",
    "from 3 to 4, so 3/4": "4",
    "16 - 3 = 13": "13",
    "16-3": "3",
    "pages 10-12": "12",
    "x=-3": "-3",
    "(-3)": "-3",
    "f(2)-3": "3",
    "−7 degrees": "-7",
    "-$5": "-5",
    "$-5.25!": "-5.25",
    "1, 2, 3": "3",
    "1,2,3": "3",
    "12,34": "34",
    "half is .5": "0.5",
    "4.": "4",
    "50%": "50",
    "He has <<2*3=6>>6 apples\nA: 6": "6",
    "0,123": "123",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_last_number(text: str) -> None:
    assert last_number(text) == Decimal(NUMBERS[text])


@pytest.mark.parametrize("text", ["", "none", "...", "-", "$", "x-y"])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9),
    st.sampled_from(["{}", "so it is {}", "The total is {}.", "= {} dollars", "12 and then {}", "({})"]),
    st.sampled_from(["plain", "commas", "currency"]),
)
def test_a_number_is_read_however_it_is_written(number: Decimal, sentence: str, form: str) -> None:
    written = f"{number:,f}" if form == "commas" else f"{number:f}"
    if form == "currency":
        written = f"-${written[1:]}" if written.startswith("-") else f"${written}"
    assert last_number(sentence.format(written)) == number


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    found = last_number(text)
    assert found is None or found.is_finite()


@given(st.text(alphabet="abc +-=\n"), st.integers(0, 10**6))
def test_only_the_last_number_counts(before: str, number: int) -> None:
    assert last_number(f"17 {before} {number} units") in (number, -number)
    assert last_number(f"17 {before} and {number} units") == number


def test_the_gold_number_follows_the_mark() -> None:
    assert gold_number("3 + 4 = <<3+4=7>>7\n#### 1,007") == 1007
    assert gold_number("A: 18") == 18
    with pytest.raises(DataError, match="has no number"):
        gold_number("7 apples\n#### none")
    for part in ("1/2", "#### 3 / 4", "6.02e23", "2e-5", "10^6"):
        with pytest.raises(DataError, match="a part of a number"):
            gold_number(part)
    assert gold_number("half of it/ 5") == 5


@pytest.mark.parametrize("gold", [0.00001, 1e16, 7, -3, 2.5, 10**20])
def test_a_number_of_the_data_is_that_number(gold: float) -> None:
    scorer = NumberScorer(key="answer")
    row = {"prompt": "q", "answer": gold}
    scorer.check([row])
    written = f"{Decimal(str(gold)):f}"
    assert scorer.score([Item(prompt="q", response=text, row=row) for text in (written, f"{written}1")]) == [1, 0]


@pytest.mark.parametrize("gold", [math.nan, math.inf, True, None])
def test_what_is_no_number_is_refused(gold: object) -> None:
    with pytest.raises(DataError, match="has no number"):
        NumberScorer(key="answer").check([{"prompt": "q", "answer": gold}])


def test_problems_are_scored_exactly(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n", encoding="utf-8")
    (problem,) = mathematics.read_problems(path)
    assert problem.prompt.startswith("1 + 1?")
    assert [mathematics.score(problem, r) for r in ("A: 2", "2.00", "2.0001", "", "2 or 3")] == [1, 1, 0, 0, 0]
    right = mathematics.accuracy([problem] * 4, ["2", "2", "2", "3"])
    assert (right.count, right.n) == (3, 4)
    path.write_text('{"question": "1 + 1?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"problems\.jsonl, row 0: the keys are question"):
        mathematics.read_problems(path)


def solutions(question: str, *right_and_text: tuple[bool, str]) -> str:
    models = {f"m{i}": {"is_correct": right, "solution": text} for i, (right, text) in enumerate(right_and_text)}
    return json.dumps({"question": question, "ground_truth": "A: 1", **models})


def test_pairs_of_right_and_wrong_solutions(tmp_path: Path) -> None:
    """Each different right one against each different wrong one; questions never cross the split."""
    path = tmp_path / "solutions.jsonl"
    rows = [
        solutions("all right", (True, "a"), (True, "b")),
        solutions("two by two", (True, "a"), (True, "b"), (False, "c"), (False, "d")),
        solutions("repeated", (True, "a"), (True, "a"), (False, "c"), (False, "c")),
        solutions("contradictory", (True, "a"), (False, "a"), (False, "c")),
        *(solutions(f"q{i}", (True, "a"), (False, "b")) for i in range(17)),
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    split = mathematics.read_pairs(path, held_out=0.25, seed=1)
    everything = to_preferences([*split.train, *split.held_out], source="pairs").pairs
    made: dict[str, list[tuple[str, str]]] = {}
    for pair in everything:
        made.setdefault(pair.prompt[0]["content"].split("\n")[0], []).append((pair.chosen, pair.rejected))
    assert "all right" not in made
    assert made["two by two"] == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert made["repeated"] == [("a", "c")]
    assert "contradictory" not in made
    questions = [{json.dumps(pair["prompt"]) for pair in part} for part in (split.train, split.held_out)]
    assert not questions[0] & questions[1]
    assert (len(questions[0]), len(questions[1])) == (14, 5)
    assert mathematics.read_pairs(path, held_out=0.25, seed=1) == split
    assert mathematics.read_pairs(path, held_out=0.25, seed=2) != split
    path.write_text(rows[0], encoding="utf-8")
    with pytest.raises(DataError, match="has 0 questions with a right and a wrong solution"):
        mathematics.read_pairs(path)


@needs(GSM8K)
def test_gsm8k_and_the_verdicts_that_came_with_it() -> None:
    """The parser agrees with the published verdict on every one of 5,276 solutions."""
    problems = mathematics.read_problems(GSM8K / "test.jsonl")
    rows = [json.loads(line) for line in (GSM8K / "test-solutions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(problems) == len(rows) == 1319
    verdicts = [
        (mathematics.score(problem, solution["solution"]) == 1, solution["is_correct"])
        for problem, row in zip(problems, rows, strict=True)
        for solution in row.values()
        if isinstance(solution, dict)
    ]
    assert len(verdicts) == 5276
    assert sum(ours != theirs for ours, theirs in verdicts) == 0
    split = mathematics.read_pairs(GSM8K / "test-solutions.jsonl")
    assert len(split.train) > 8 * len(split.held_out) > 800
    assert all(mathematics.score(problem, f"#### {problem.gold}") == 1 for problem in problems)


# --- code -----------------------------------------------------------------------------------------------------

PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef area(r: float) -> float:\n    """Of a circle."""\n'
CIRCLE = Problem(
    name="circle",
    prompt=PROMPT,
    instruction="",
    entry_point="area",
    tests="assert round(area(2), 2) == 12.57",
    solution=PROMPT + "    return math.pi * r * r\n",
    stops=("\ndef ", "\nprint"),
)
BODY = "    return math.pi * helper(r) * r\n"
WHOLE = f"def area(r):\n{BODY}"

RESPONSES = {
    "a continuation": BODY,
    "a continuation that goes on": BODY + "\nprint(area(input()))\ndef unfinished(",
    "the whole function in a block": f"Sure!\n\n```python\n{WHOLE}```\nIt multiplies.",
    "a block without a language, not closed": f"```\n{WHOLE}",
    "the second block defines it": f"Usage:\n```\narea(2)\n```\nThe function:\n```python\n{WHOLE}```",
    "a body in a block": f"```python\n{BODY}```",
    "the whole function without a block": WHOLE,
}


@pytest.mark.parametrize("kind", RESPONSES)
def test_responses_are_put_together_with_the_prompt(kind: str) -> None:
    outcome = run_tests(CIRCLE, RESPONSES[kind])
    assert outcome.passed, (outcome.reason, solution_of(CIRCLE, RESPONSES[kind]))
    assert code.score(CIRCLE, RESPONSES[kind]) == 1


@pytest.mark.parametrize("response", ["    return r\n", "", "I cannot.", "```python\n```", "    exit(0)\n"])
def test_wrong_responses_fail(response: str) -> None:
    assert code.score(CIRCLE, response) == 0


def test_blocks_of_a_reply() -> None:
    assert extract_code("no code") is None
    assert extract_code("```py\na\n```\n```\nb\n```") == "a\n"
    assert extract_code("```\na\n```\n```\ndef f(): 0\n```", "f") == "def f(): 0\n"
    assert extract_code("say `x` and ```y``` inline") is None
    assert extract_code("- item:\n  ```python\n  x\n    y\n  ```") == "x\n  y\n"


def test_pass_rate_and_a_sandbox_that_cannot_run() -> None:
    rate = code.pass_rate([CIRCLE] * 3, [BODY, "", WHOLE])
    assert (rate.count, rate.n) == (2, 3)
    broken_sandbox = Outcome(status="error", reason="no Python", output="", contained=frozenset())
    with pytest.raises(UnsupportedError, match="no Python"):
        code.passed(broken_sandbox)


def test_problems_from_rows() -> None:
    listed = problem_of("Write f.", "assert f(1) == 2\nassert f(2) == 3")
    assert code.score(listed, "```python\ndef f(x):\n    return x + 1\n```") == 1
    assert code.score(listed, "```python\ndef f(x):\n    return x\n```") == 0
    checked = problem_of("def f(x):\n", "def check(g):\n    assert g(1) == 2\n", "f")
    assert code.score(checked, "    return x + 1\n\ndef rest(") == 1
    assert code.score(checked, "    return x\n") == 0


AROUND = {
    "the code alone": "{}",
    "a fence": "```python\n{}\n```",
    "words and a fence": "Complete this function. Reply with it in one block.\n\n```python\n{}\n```",
    "words, a fence, and words": "Complete it: don't stop.\n\n```\n{}\n```\n\nReply with the code.",
    "words before and behind": "Task: complete\nSolution\nComplete the function below.\n{}\n\nReply with code alone.",
    "a list item": "1. Complete this.\n   ```python\n{indented}\n   ```",
}


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("response", RESPONSES)
def test_words_around_a_prompt_s_code_stay_out_of_the_program(kind: str, response: str) -> None:
    indented = "\n".join(f"   {line}" for line in PROMPT.split("\n"))
    problem = problem_of(AROUND[kind].format(PROMPT, indented=indented), CIRCLE.tests, "area")
    outcome = run_tests(problem, RESPONSES[response])
    assert outcome.passed, (outcome.reason, solution_of(problem, RESPONSES[response]))
    assert not run_tests(problem, RESPONSES[response].replace("math.pi", "math.e")).passed


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("def f(x):\n    y = ", "x + 1\n    return y\n"),
        ("def f(x):\n    return (\n        x", " + 1)\n"),
        ("def f(\n    x", "):\n    return x + 1\n"),
        ("def f(x):\n    if x:\n", "        return x + 1\n"),
        ("def f(x):\n    return (\n", "        x + 1)\n"),
        ("def f(x):\n  y = x\n", "  return y and x + 1\n"),
        ("def f(x):\n    'One more.'\n\n  Only the body, please.\n", "    return x + 1\n"),
        ("def f(x):\n    'One more.'\n\n    - be fast\n    - be short\n", "    return x + 1\n"),
        ("Solve.\ndef f(x):\n  'Two spaces.'\n", "  return x + 1\n"),
        ("(" * 3000 + "\ndef f(x):\n", "    return x + 1\n"),
    ],
)
def test_code_that_is_cut_off_is_continued_where_it_ends(prompt: str, reply: str) -> None:
    problem = problem_of(prompt, "assert f(1) == 2", "f")
    assert code.score(problem, reply) == 1, solution_of(problem, reply)
    assert code.score(problem, reply.replace("x + 1", "x + 2").replace(" + 1)", " + 2)")) == 0


@pytest.mark.parametrize("mark", ["\x0c", "\x1c", "\x85", "\u2028"])
def test_a_line_of_a_prompts_code_ends_where_pythons_does(mark: str) -> None:
    begun = f"def f(x):\n    y = 'a{mark}b'\n"
    assert problem_of(f"Solve it.\n{begun}Go on.\n", "assert f(1)", "f").prompt == begun


def test_a_decorated_head_is_replaced_whole() -> None:
    problem = problem_of("import functools\n\n@functools.cache\ndef f(x):\n", "assert f(1) == 2", "f")
    assert code.score(problem, "    return x + 1\n") == 1
    assert code.score(problem, "```python\nimport math\ndef f(x):\n    return x + 1\n```") == 1


@needs(HUMAN_EVAL)
def test_solutions_of_human_eval_pass_as_replies_to_a_recipe_s_prompts() -> None:
    """What decides is the data set's own solution: whatever a recipe puts around its prompts, that one passes."""
    template = tomllib.loads(Path("recipes/code.toml").read_text(encoding="utf-8"))["real"]["prompts"]["template"]
    with gzip.open(HUMAN_EVAL, "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in random.Random(0).sample(rows, 16):
        problem = problem_of(template.replace("{}", row["prompt"]), row["test"], row["entry_point"])
        whole = f"Here it is:\n\n```python\n{row['prompt']}{row['canonical_solution']}```"
        assert code.score(problem, whole) == 1, row["task_id"]
        assert code.score(problem, row["canonical_solution"]) == 1, row["task_id"]
        assert code.score(problem, whole.replace(row["canonical_solution"], "    pass\n")) == 0, row["task_id"]


def test_files_that_hold_no_problems(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    for text, message in (
        ("", "holds no problem"),
        ('{"text": "x"}', "line 1 is no problem of HumanEval"),
        ("[", "line 1 is no problem"),
        ('{"text": "x", "code": "def (", "test_list": []}', "line 1 is no problem"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            code.read_problems(path)
    with gzip.open(tmp_path / "problems.jsonl.gz", "wt") as file:
        file.write("{}\n")
    for missing in (tmp_path / "none.jsonl", tmp_path / "problems.jsonl.gz"):
        with pytest.raises(DataError):
            code.read_problems(missing)
    (tmp_path / "text.gz").write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match="cannot read"):
        code.read_problems(tmp_path / "text.gz")


# --- faults ---------------------------------------------------------------------------------------------------


def test_each_fault_alone() -> None:
    assert sorted(broken.mutants("x < 1 and y == z + 2")) == sorted(
        [
            "x <= 1 and y == z + 2",
            "x < 2 and y == z + 2",
            "x < 1 or y == z + 2",
            "x < 1 and y != z + 2",
            "x < 1 and y == z - 2",
            "x < 1 and y == z + 3",
        ]
    )
    assert broken.mutants("a < b < c") == ["a <= b < c", "a < b <= c"]
    assert set(broken.mutants("x = True\nx += 'text'")) == {"x = False\nx += 'text'", "x = True\nx -= 'text'"}
    assert broken.mutants("f(x)") == []


def test_comments_and_docstrings_tell_nothing() -> None:
    assert broken.plain('def f():\n    """Doc."""\n    # note\n    return (1)\n') == "def f():\n    return 1"
    assert broken.plain('class A:\n    """Doc."""\n') == "class A:\n    pass"


def test_a_fault_that_tests_do_not_see_is_not_used() -> None:
    """Only `==` of the guard matters to these tests; the endless loop of `-=` is no wrong solution either."""
    source = "def f(n):\n    while n < 3:\n        n += 1\n    return n"
    problem = Problem(
        name="p", prompt="", instruction="i", entry_point="f", tests="assert f(0) == 3", solution=source, stops=()
    )
    faulty = {broken.break_solution(problem, seed=seed) for seed in range(3)}
    assert faulty <= {source.replace("< 3", "<= 3"), source.replace("< 3", "< 4"), source.replace("+= 1", "+= 2")}
    rows = list(broken.pair_rows([problem]))
    assert rows == list(broken.pair_rows([problem]))
    (pair,) = to_preferences(rows, source="code").pairs
    assert code.score(problem, pair.chosen) == 1
    assert code.score(problem, pair.rejected) == 0
    untested = Problem(**{**vars(problem), "tests": ""})
    assert list(broken.pair_rows([untested])) == []
    failing = Problem(**{**vars(problem), "tests": "assert f(0) == 4"})
    assert list(broken.pair_rows([failing])) == []


@needs(HUMAN_EVAL)
def test_human_eval() -> None:
    """Of ten problems, every canonical solution passes, as a continuation and in a block, and its fault fails."""
    problems = code.read_problems(HUMAN_EVAL)
    assert len(problems) == 164
    sample = random.Random(0).sample(problems, 10)
    for problem in sample:
        assert code.score(problem, problem.solution.removeprefix(problem.prompt)) == 1, problem.name
        assert code.score(problem, "    pass\n") == 0, problem.name
    rows = list(broken.pair_rows(sample))
    assert len(rows) >= 6
    by_name = {problem.name: problem for problem in sample}
    for row, pair in zip(rows, to_preferences(rows, source="code").pairs, strict=True):
        assert code.score(by_name[row["name"]], pair.chosen) == 1
        assert code.score(by_name[row["name"]], pair.rejected) == 0


@needs(MBPP)
def test_mbpp() -> None:
    problems = code.read_problems(MBPP)
    assert len(problems) == 974
    assert all(problem.entry_point for problem in problems)
    for problem in [*random.Random(0).sample(problems, 5), *(p for p in problems if "root = Node" in p.tests)]:
        assert code.score(problem, broken.fenced(problem.solution)) == 1, problem.name
        assert code.score(problem, problem.solution + "\nprint(unknown)") == 1, problem.name
        assert problem.prompt.endswith('"""\n')


@pytest.mark.slow
@needs(HUMAN_EVAL)
def test_every_canonical_solution_of_human_eval_passes() -> None:
    problems = code.read_problems(HUMAN_EVAL)
    rate = code.pass_rate(problems, [p.solution.removeprefix(p.prompt) for p in problems])
    assert rate.count == 164
