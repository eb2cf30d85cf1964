"""`genarm pairs` from start to end, against samples of `genarm generate` that are scored and paired by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders.judge_server import Act, JudgeServer, Seen, says
from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm.cli.main import main
from genarm.data import formats
from genarm.data.preferences import load_preferences
from genarm.lab.tasks import sandbox
from genarm.model.compose import compose

WISH = """
import time

def score(prompt, response):
    return response.split().count("w3") - response.split().count("w5")

def slow(prompt, response):
    time.sleep(0.002)
    return score(prompt, response)

def flat(prompt, response):
    return 1

def with_row(prompt, response, row):
    assert row["prompt"] == prompt or row["prompt"][-1]["content"] == prompt
    return row["gold"] * len(response.split())

def fails(prompt, response):
    raise KeyError("no such word")

def says_nothing(prompt, response):
    return None
"""

PROMPTS = [
    {"prompt": "w1 w2", "id": "a", "gold": 1},
    {"prompt": [{"role": "system", "content": "w9"}, {"role": "user", "content": "w3"}], "gold": -1},
    {"prompt": "w7 w8 w9", "gold": 0},
    *({"prompt": f"w{i} w{i + 1}", "gold": i} for i in range(20, 29)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_member(tiny_model(seed=1, spread=0.05), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the wishes and the prompts in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("wish.py").write_text(WISH, encoding="utf-8")
    write_prompts(PROMPTS)
    yield tmp_path
    sys.modules.pop("wish", None)  # other tests have wishes of their own


def write_prompts(rows: list[dict[str, Any]]) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(base: Path, *more: str, score: str = "function=wish:score") -> list[str]:
    options = ["--samples", "6", "--max-new-tokens", "10", "--batch-size", "4", "--seed", "5"]
    files = ["--prompts", "prompts.jsonl", "--output", "pairs.jsonl"]
    return ["pairs", "--model", str(base), "--score", score, *files, *options, *more]


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def settings() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path("pairs.jsonl.settings.json").read_text(encoding="utf-8"))
    return record


# --- what is written ------------------------------------------------------------------------------------------


def generated(base: Path) -> list[list[dict[str, Any]]]:
    """The same responses by `genarm generate`, by prompt."""
    options = ["--num-samples", "6", "--max-new-tokens", "10", "--batch-size", "3", "--seed", "5"]
    assert main(["generate", str(base), "--input", "prompts.jsonl", "--output", "all.jsonl", *options]) == 0
    rows = rows_of("all.jsonl")
    return [rows[i : i + 6] for i in range(0, len(rows), 6)]


def wish(row: dict[str, Any]) -> int:
    words = row["response"].split()
    return words.count("w3") - words.count("w5")


def test_best_against_worst(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written out by hand from the responses: the first best one, the first worst one, no ties."""
    assert main(command(base)) == 0
    said = capsys.readouterr().out
    expected, ties = [], 0
    for group, given in zip(generated(base), PROMPTS, strict=True):
        spoken = [row for row in group if row["response"].strip()]
        best, worst = max(spoken, key=wish), min(spoken, key=wish)
        ties += wish(best) == wish(worst)
        if wish(best) > wish(worst):
            prompt = given["prompt"]
            expected.append(
                {
                    "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                    "chosen": [{"role": "assistant", "content": best["response"]}],
                    "rejected": [{"role": "assistant", "content": worst["response"]}],
                    "score_chosen": wish(best),
                    "score_rejected": wish(worst),
                    "seed_chosen": best["seed"],
                    "seed_rejected": worst["seed"],
                }
            )
    assert rows_of("pairs.jsonl") == expected
    assert 0 < ties < len(PROMPTS)
    counts = settings()["counts"]
    assert (counts["prompts"], counts["responses"], counts["pairs"], counts["ties"]) == (12, 72, len(expected), ties)
    assert counts["mean_score_chosen"] == pytest.approx(sum(r["score_chosen"] for r in expected) / len(expected))
    assert f"pairs.jsonl: {len(expected)} pairs from {len(expected)} of 12 prompts (72 responses)" in said
    assert f"dropped: {ties} tied pairs" in said
    assert f"mean score: {counts['mean_score_chosen']:.3f} chosen" in said
    assert f"{counts['cut']} responses were cut" in said
    assert {row["settings"] for row in rows_of("pairs.scores.jsonl")} == {settings()["digest"]}


def test_all_pairs_above_a_margin(base: Path) -> None:
    assert main(command(base, "--select", "all", "--margin", "1")) == 0
    expected = []
    for group in generated(base):
        different = list({row["response"]: row for row in reversed(group) if row["response"].strip()}.values())
        expected += [(a["response"], b["response"]) for a in different for b in different if wish(a) - wish(b) > 1]
    written = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows_of("pairs.jsonl")]
    assert sorted(written) == sorted(expected)
    assert len(written) > 3


def test_the_pairs_train_an_arm(base: Path) -> None:
    """`load_preferences` reads them as conversations, and `genarm train` learns from them."""
    assert main(command(base, "--samples", "12")) == 0
    pairs = load_preferences("pairs.jsonl")
    assert pairs.format is formats.CONVERSATIONAL
    assert not pairs.malformed
    assert [p.chosen for p in pairs.pairs] == [row["chosen"][0]["content"] for row in rows_of("pairs.jsonl")]
    options = ["--max-steps", "4", "--batch-size", "4", "--learning-rate", "1e-2", "--eval-fraction", "0"]
    assert main(["train", "--model", str(base), "--data", "pairs.jsonl", "--output", "arm", *options]) == 0
    assert Path("arm/model.safetensors").exists()


def test_a_guided_folder_samples_with_weights(base: Path, here: Path) -> None:
    arm = tiny_lora(tiny_model(seed=1, spread=0.05), here / "arm", seed=3, base_path=str(base))
    compose(str(base), {"kind": str(arm)}, here / "guided")
    assert main(command(here / "guided", "--weights", "kind=3")) == 0
    options = ["--weights", "kind=3", "--num-samples", "6", "--max-new-tokens", "10", "--seed", "5"]
    assert main(["generate", "guided", "--input", "prompts.jsonl", "--output", "all.jsonl", *options]) == 0
    assert [row["response"] for row in rows_of("pairs.samples.jsonl")] == [
        row["response"] for row in rows_of("all.jsonl")
    ]
    assert settings()["record"]["weights"] == {"kind": 3.0}


def test_text_without_a_chat_template(here: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    base = save_member(tiny_model(seed=1, spread=0.05), here / "plain", tokenizer)
    Path("prompts.txt").write_text("w1 w2\nw3\nw4\nw5 w6\n", encoding="utf-8")
    files = ["--prompts", "prompts.txt", "--output", "pairs.jsonl", "--score", "function=wish:score"]
    assert main(["pairs", "--model", str(base), *files, "--samples", "16", "--max-new-tokens", "10"]) == 0
    pairs = load_preferences("pairs.jsonl", chat=False)
    assert pairs.format is formats.STANDARD
    assert pairs.pairs[0].prompt == rows_of("pairs.jsonl")[0]["prompt"]
    assert isinstance(pairs.pairs[0].chosen, str)


def test_a_function_of_the_row(base: Path) -> None:
    """`gold` decides whether long or short responses are wished for; 0 makes a tie."""
    assert main(command(base, score="function=wish:with_row")) == 0
    rows = {json.dumps(row["prompt"]): row for row in rows_of("pairs.jsonl")}
    first, second = (rows.get(json.dumps(p)) for p in ([{"role": "user", "content": "w1 w2"}], PROMPTS[1]["prompt"]))
    assert first is not None
    assert second is not None
    lengths = [len(row[side][0]["content"].split()) for row in (first, second) for side in ("chosen", "rejected")]
    assert lengths[0] > lengths[1]
    assert lengths[2] < lengths[3]
    assert json.dumps([{"role": "user", "content": "w7 w8 w9"}]) not in rows


def test_only_ties(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(base, score="function=wish:flat")) == 2
    assert "no pairs: of 12 prompts, 0 have fewer than two different scored responses and 12 tie" in (
        capsys.readouterr().err
    )
    assert not Path("pairs.jsonl").exists()


def test_a_judge(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It counts a word, and cannot be read where another one is said; such responses are dropped and counted."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("rubric.txt").write_text("As many w3 as can be.", encoding="utf-8")

    def behave(seen: Seen, number: int) -> Act:
        words = seen.question.split("[Answer]")[1].split("[End")[0].split()
        return says("I would rather not." if "w7" in words else f"Score: {1 + words.count('w3')}")

    with JudgeServer(behave) as server:
        judge = ["--judge-url", server.url, "--judge-model", "counter"]
        assert main(command(base, *judge, score="judge=rubric.txt")) == 0
    rows, counts = rows_of("pairs.jsonl"), settings()["counts"]
    different = {(row["index"], row["response"]) for row in rows_of("pairs.samples.jsonl") if row["response"].strip()}
    assert counts["unscored"] == sum("w7" in response.split() for _, response in different) > 0
    for row in rows:
        for side in ("chosen", "rejected"):
            words = row[side][0]["content"].split()
            assert row[f"score_{side}"] == 1 + words.count("w3")
            assert "w7" not in words
    assert f"{counts['unscored']} responses without a score" in capsys.readouterr().out


def test_a_judge_that_cannot_be_read(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it replied and what is read is said, and nothing about sampling."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("rubric.txt").write_text("As many w3 as can be.", encoding="utf-8")
    with JudgeServer(lambda seen, number: says("A fine answer, I would say.")) as server:
        judge = ["--judge-url", server.url, "--judge-model", "critic"]
        assert main(command(base, *judge, score="judge=rubric.txt")) == 2
    said = capsys.readouterr().err
    assert "critic replied 'A fine answer, I would say.', where a last line such as 'Score: 10' (from 1 to 10)" in said
    assert "temperature" not in said


def test_unit_tests_and_what_the_sandbox_keeps_out(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No response of random words passes. Without namespaces the user is warned, and root may be refused."""
    write_prompts([{"prompt": "w1", "test": "assert f() == 1"}])
    assert main(command(base, score="tests=test")) == 2
    capsys.readouterr()
    without = Path("jail.py")
    jail, head = sandbox.JAIL.read_text(encoding="utf-8"), "def new_namespaces() -> list[str]:\n"
    assert head in jail
    without.write_text(jail.replace(head, f"{head}    return []\n"), encoding="utf-8")
    monkeypatch.setattr(sandbox, "JAIL", without.resolve())
    assert main(command(base, score="tests=test")) == 2
    said = capsys.readouterr().err
    if os.geteuid() == 0 and "user" not in sandbox.run_code("").contained:
        assert "nobody else may start" in said  # as root, and with Python in root's own folder
        assert "run genarm as a user who may start its Python" in said
        return
    assert "warning: on this machine the sandbox" in said
    assert "not from: files, network, processes; use a container" in said
    assert "no pairs: of 1 prompts" in said


# --- resuming -------------------------------------------------------------------------------------------------

FILES = ("pairs.jsonl", "pairs.jsonl.settings.json", "pairs.samples.jsonl", "pairs.scores.jsonl")


def contents() -> dict[str, bytes]:
    return {name: Path(name).read_bytes() for name in FILES}


def test_resuming_from_any_place_gives_the_same_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere in the samples or the scores, whatever else is there."""
    monkeypatch.setattr("genarm.lab.pairs.run.CHUNK", 10)
    assert main(command(base)) == 0
    whole = contents()
    samples, scores = whole["pairs.samples.jsonl"], whole["pairs.scores.jsonl"]
    assert scores.count(b"\n") > 30
    for cut in (0, 1, len(samples) // 3, samples.rindex(b"\n", 0, -1) + 5):
        Path("pairs.jsonl").unlink()
        Path("pairs.scores.jsonl").unlink()
        Path("pairs.samples.jsonl").write_bytes(samples[:cut])
        assert main(command(base)) == 0
        assert contents() == whole, cut
    for cut in (0, 1, len(scores) // 2, len(scores) - 3):
        Path("pairs.jsonl").unlink(missing_ok=True)
        Path("pairs.scores.jsonl").write_bytes(scores[:cut])
        assert main(command(base)) == 0
        assert contents() == whole, cut


def test_a_complete_run_loads_no_model(base: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(command(base)) == 0
    whole = contents()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("genarm.model.references.ModelFiles.load", refuse)
    assert main(command(base)) == 0
    assert contents() == whole


def test_a_run_that_is_killed_twice_ends_with_the_same_files(base: Path) -> None:
    """kill -9 while it samples, and again while it scores."""
    write_prompts([{"prompt": f"w{i % 40} w{i * 7 % 40}"} for i in range(30)])
    words = command(base, score="function=wish:slow")
    assert main(words) == 0
    whole = contents()
    for name in (*FILES, "pairs.samples.jsonl.settings.json"):
        Path(name).unlink()
    for working, rows in ((Path("pairs.samples.jsonl"), 20), (Path("pairs.scores.jsonl"), 64)):
        process = subprocess.Popen([sys.executable, "-m", "genarm", *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not working.exists() or working.read_bytes().count(b"\n") < rows:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert working.read_bytes().count(b"\n") < whole[working.name].count(b"\n")
        assert not Path("pairs.jsonl").exists()
    assert main(words) == 0
    assert contents() == whole


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_changed_setting_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(base)) == 0
    whole = contents()
    changes = {
        "num_samples was 6 and is 7": ["--samples", "7"],
        "temperature was 1.0 and is 0.5": ["--temperature", "0.5"],
        "seed was 5 and is 6": ["--seed", "6"],
        "select was 'extremes' and is 'all'": ["--select", "all"],
        "margin was 0.0 and is 0.5": ["--margin", "0.5"],
        "function of score was 'wish:score' and is 'wish:flat'": ["--score", "function=wish:flat"],
    }
    for difference, options in changes.items():
        capsys.readouterr()
        assert main(command(base, *options)) == 2
        assert f"pairs.jsonl was made with other settings: {difference}" in capsys.readouterr().err
        assert contents() == whole
    Path("wish.py").write_text(WISH.replace('count("w5")', 'count("w6")'), encoding="utf-8")
    sys.modules.pop("wish")
    assert main(command(base)) == 2
    assert "wish.py of code (" in capsys.readouterr().err
    assert contents() == whole


def test_files_that_are_not_ours_are_left_alone(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").write_text("mine\n", encoding="utf-8")
    assert main(command(base)) == 2
    assert "pairs.jsonl already has content and no pairs.jsonl.settings.json" in capsys.readouterr().err
    assert Path("pairs.jsonl").read_text(encoding="utf-8") == "mine\n"
    Path("pairs.jsonl.settings.json").write_text("{", encoding="utf-8")
    assert main(command(base)) == 2
    assert "cannot read pairs.jsonl.settings.json" in capsys.readouterr().err
    Path("pairs.jsonl.settings.json").write_text('{"settings": 3}', encoding="utf-8")
    assert main(command(base)) == 2
    assert "has no record of what pairs.jsonl was made with" in capsys.readouterr().err
    assert main(command(base, "--output", ".")) == 2
    assert "is a folder" in capsys.readouterr().err


REFUSED = {
    "--samples is 1; a pair needs at least 2": ["--samples", "1"],
    "--temperature 0, which would give the same reply": ["--temperature", "0"],
    "--margin is -1": ["--margin", "-1"],
    "--score is 'wish:score'; it must be one of function=module:function": ["--score", "wish:score"],
    "--score is 'function='": ["--score", "function="],
    "names no function; expected module:function": ["--score", "function=wish"],
    "No module named 'nowhere'; it must be a .py file in the current folder": ["--score", "function=nowhere:f"],
    "it is genarm.lab.demo.world:overall now": ["--score", "function=genarm.demo.world:overall"],
    "has no attribute 'absent'": ["--score", "function=wish:absent"],
    "must be a function of (prompt, response)": ["--score", "function=json:loads"],
    "importing broken raised SyntaxError": ["--score", "function=broken:f"],
    "--judge-url and --judge-model are for --score judge": ["--judge-model", "m"],
    "prompt 1: there is no key 'answer' in the row": ["--score", "last-number=answer"],
    "prompt 0: there is no key 'test' in the row": ["--score", "tests=test"],
    "prompt 0: 'gold' is 1; expected Python code": ["--score", "tests=gold"],
    "is no trajectory reward model": ["--score", "reward={base}"],
    "there is no folder 'nowhere' here": ["--score", "reward=nowhere"],
    "wish:fails raised KeyError: 'no such word'": ["--score", "function=wish:fails"],
    "wish:says_nothing gave None for the response": ["--score", "function=wish:says_nothing"],
}
LATE = ("wish:fails", "wish:says_nothing")
"""Only calling them tells."""


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_refused_before_anything_is_sampled(
    base: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text("def f(:", encoding="utf-8")
    if "answer" in message:
        write_prompts([{"prompt": "w1", "answer": "#### 3"}, {"prompt": "w2"}])
    assert main(command(base, *(word.format(base=base) for word in REFUSED[message]))) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert Path("pairs.samples.jsonl").exists() == any(late in message for late in LATE)
