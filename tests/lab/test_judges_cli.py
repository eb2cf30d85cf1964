"""`genarm judge` from end to end, against a real HTTP server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from builders.judge_server import Act, JudgeServer, Seen, says
from genarm.cli.arguments import settings_from
from genarm.cli.main import build_parser, main
from genarm.lab.judges import protocol
from genarm.lab.judges.protocol import load_protocol, protocol_names
from genarm.lab.judges.settings import ClientSettings
from genarm.statistics import win_rate

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_answers(path: Path, responses: list[str], **more: Any) -> Path:
    """What `genarm generate` writes, as far as it matters here."""
    rows = [
        {"index": i, "id": None, "sample": 0, "prompt": f"prompt {i}", "response": response, **more}
        for i, response in enumerate(responses)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(folder: Path) -> tuple[Path, Path]:
    """6 wins, 2 ties, 4 losses of the first file for a judge of length."""
    first = write_answers(folder / "a.jsonl", ["long"] * 6 + ["ev\u2028n"] * 2 + ["x"] * 4)
    return first, write_answers(folder / "b.jsonl", ["s"] * 6 + ["odd!"] * 2 + ["long"] * 4)


def grade(seen: Seen, number: int) -> Act:
    """A judge of length by the protocol `genarm-hh`."""
    parts = [
        seen.question.split(f"[Reply of assistant {i}]\n")[1].split(f"\n[End of the reply of assistant {i}]")[0]
        for i in (1, 2)
    ]
    return says(f"{len(parts[0])} {len(parts[1])}\nBy length.")


def command(server: JudgeServer, first: Path, second: Path, output: Path, *more: str) -> list[str]:
    options = ["--protocol", "genarm-hh", "--base-url", server.url, "--output", str(output), *more]
    return ["judge", str(first), str(second), *options]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]


def test_a_whole_run(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    first, second = answers(tmp_path)
    output = tmp_path / "out" / "verdicts.jsonl"
    more = ["--key-variable", "MY_KEY", "--model", "judge-1", "--price-in", "1", "--price-out", "2"]
    with JudgeServer(grade) as server:
        assert main(command(server, first, second, output, *more)) == 0
        assert len(server.seen) == 24
        assert {seen.body["model"] for seen in server.seen} == {"judge-1"}
        assert {seen.headers["Authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
        said = capsys.readouterr()
        server.seen.clear()
        written = output.read_bytes()
        assert main(command(server, first, second, output, *more)) == 0
        assert server.seen == []
        assert output.read_bytes() == written
        assert "0 questions to ask, 24 replies kept" in capsys.readouterr().out
    expected = ["win"] * 6 + ["tie"] * 2 + ["lose"] * 4
    rate = win_rate(expected)
    assert "win 6  tie 2  lose 4  unparsed 0  failed 0" in said.out
    assert f"win + ½ tie: {rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}] (n=12)" in said.out
    assert "disagree on 0 of 12 pairs" in said.out
    assert "2,400 tokens read, 168 written" in said.out
    assert "12 pairs in both orders: 24 questions to ask, 0 replies kept" in said.out
    assert f"at most {24 * 128:,} to write, at most 0.0" in said.out
    rows = rows_of(output)
    assert [row["outcome"] for row in rows] == expected
    assert (rows[0]["index"], rows[0]["prompt"], rows[0]["first"], rows[0]["second"]) == (0, "prompt 0", "long", "s")
    assert rows[0]["orders"] == [
        {"reply": "4 1\nBy length.", "failure": None, "outcome": "win"},
        {"reply": "1 4\nBy length.", "failure": None, "outcome": "win"},
    ]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert KEY not in said.out + said.err
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_the_estimate_asks_nothing_and_needs_no_key(tmp_path: Path, capsys: Any) -> None:
    first, second = answers(tmp_path)
    output = tmp_path / "verdicts.jsonl"
    options = ["--protocol", "genarm-hh", "--output", str(output), "--price-in", "30", "--price-out", "60"]
    assert main(["judge", str(first), str(second), *options, "--estimate"]) == 0
    said = capsys.readouterr().out
    tokens = int(said.split("about ")[1].split(" tokens")[0].replace(",", ""))
    price = (tokens * 30 + 24 * 128 * 60) / 1e6
    assert f"24 questions to ask, 0 replies kept; about {tokens:,} tokens" in said
    assert f"at most {price:,.2f} at these prices" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    with JudgeServer(grade) as server:
        assert main(command(server, first, second, output)) == 0
    sent = sum(-(-len(m["content"]) // 4) for seen in server.seen for m in seen.body["messages"])
    assert sent == tokens


def test_what_cannot_be_read_and_what_fails_are_counted_apart(tmp_path: Path, capsys: Any) -> None:
    def behave(seen: Seen, number: int) -> Act:
        if "prompt 0\n" in seen.question:
            return says("They are equally good.")
        if "prompt 1\n" in seen.question:
            return Act(status=400, body={"error": {"message": "not \x1b[31m this"}})
        return says("7 3") if "prompt 2\n" in seen.question else grade(seen, number)

    first, second = answers(tmp_path)
    output = tmp_path / "verdicts.jsonl"
    with JudgeServer(behave) as server:
        assert main(command(server, first, second, output)) == 0
        said = capsys.readouterr()
        assert "win 3  tie 3  lose 4  unparsed 1  failed 1" in said.out
        assert "disagree on 1 of 10 pairs: 1 for the answer shown first, 0 for the one shown second" in said.out
        assert "failed: HTTP 400: not \ufffd[31m this" in said.err
        rows = rows_of(output)
        assert [row["outcome"] for row in rows[:3]] == [None, None, "tie"]
        assert rows[0]["orders"][0]["reply"] == "They are equally good."
        server.behave, server.seen = grade, []
        assert main(command(server, first, second, output)) == 0
        assert len(server.seen) == 2
    assert "unparsed 1  failed 0" in capsys.readouterr().out


def test_no_verdict_at_all_is_an_error(tmp_path: Path, capsys: Any) -> None:
    first, second = answers(tmp_path)
    with JudgeServer(lambda seen, number: says("Well…")) as server:
        assert main(command(server, first, second, tmp_path / "v.jsonl")) == 2
    said = capsys.readouterr()
    assert "win 0  tie 0  lose 0  unparsed 12  failed 0\nn=0\n" in said.out
    assert "no pair has a verdict" in said.err
    assert len(rows_of(tmp_path / "v.jsonl")) == 12


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_asks_only_for_the_rest(tmp_path: Path, capsys: Any, how: signal.Signals) -> None:
    first = write_answers(tmp_path / "a.jsonl", ["long"] * 40)
    second = write_answers(tmp_path / "b.jsonl", ["s"] * 40)
    output = tmp_path / "verdicts.jsonl"

    def slow(seen: Seen, number: int) -> Act:
        act = grade(seen, number)
        act.wait = 0.05
        return act

    with JudgeServer(slow) as server:
        arguments = command(server, first, second, output, "--concurrency", "2")
        process = subprocess.Popen([sys.executable, "-m", "genarm", *arguments], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(server.seen) < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, how)
        error = process.communicate(timeout=30)[1]
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert "the same command goes on with" in error
        assert not output.exists()
        kept = sum(file.read_bytes().count(b"\n") for file in (tmp_path / "verdicts.jsonl.replies").iterdir())
        assert 10 <= kept <= 22
        server.behave, server.seen = grade, []
        assert main(arguments) == 0
        assert len(server.seen) == 80 - kept
        assert max(Counter(seen.question for seen in server.seen).values()) == 1
    assert [row["outcome"] for row in rows_of(output)] == ["win"] * 40


def test_several_samples_and_conversations(tmp_path: Path) -> None:
    """Answers are matched by place whatever their order in the files; a conversation is shown with its roles."""
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    first = tmp_path / "a.jsonl"
    first.write_text(
        "".join(
            json.dumps({"index": i, "sample": s, "prompt": chat, "response": "x" * (i + 1)}) + "\n" for i, s in places
        )
    )
    second = tmp_path / "b.jsonl"
    second.write_text(
        "\n".join(
            json.dumps({"index": i, "sample": s, "prompt": chat, "response": "y" * (s + 1)}) for i, s in places[::-1]
        )
    )
    output = tmp_path / "v.jsonl"
    with JudgeServer(grade) as server:
        assert main(command(server, first, second, output)) == 0
    rows = rows_of(output)
    assert [(row["index"], row["sample"], row["outcome"]) for row in rows] == [
        (0, 0, "tie"),
        (0, 1, "lose"),
        (1, 0, "win"),
        (1, 1, "tie"),
    ]
    assert all("User: q\n\nAssistant: a\n\nUser: r" in seen.question for seen in server.seen)


def test_what_the_help_says_is_so(capsys: Any) -> None:
    """The parser repeats the protocols' names, so that asking for help loads nothing."""
    with pytest.raises(SystemExit):
        main(["judge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    pairwise = [name for name in protocol_names() if not load_protocol(name).single]
    assert f"{', '.join(pairwise)}, or a TOML file of your own" in text
    arguments = build_parser().parse_args(["judge", "a", "b", "--protocol", "helpful", "--output", "o"])
    assert settings_from(arguments, ClientSettings, model="m") == ClientSettings(model="m")


# --- mistakes -------------------------------------------------------------------------------------------------------


def refused(capsys: Any, arguments: list[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    return str(said.err)


def test_mistakes_before_anything_is_asked(tmp_path: Path, capsys: Any) -> None:
    first, second = answers(tmp_path)
    rubric = tmp_path / "rubric.md"
    rubric.write_text("Be kind.")
    other = write_answers(tmp_path / "other.jsonl", ["x"] * 11)
    output = tmp_path / "v.jsonl"
    with JudgeServer(grade) as server:
        for more, message in (
            (("--protocol", "gpt4"), "use one of genarm-hh"),
            (("--protocol", "score"), "needs one for pairs"),
            (("--protocol", str(rubric)), "needs one for pairs"),
            (("--base-url", "https://api.openai.com/v1"), "OPENAI_API_KEY is not set"),
            (("--base-url", "nowhere"), "http://localhost:8000/v1"),
            (("--key-variable", "MY_KEY"), "MY_KEY is not set"),
            (("--key-variable", KEY), "never the key itself"),
            (("--price-in", "1"), "go together"),
            (("--price-in", "-1", "--price-out", "nan"), "at least 0"),
            (("--concurrency", "0"), "concurrency is 0"),
            (("--rate", "0"), "requests_per_minute is 0"),
        ):
            error = refused(capsys, command(server, first, second, output, *more))
            assert message in error
            assert KEY not in error
        assert "lacks 1 answers" in refused(capsys, command(server, first, other, output))
        assert f"{other} lacks 1 answers" in refused(capsys, command(server, other, second, output))
        assert "cannot read" in refused(capsys, command(server, first, tmp_path / "none.jsonl", output))
        assert "is a folder; name a file" in refused(capsys, command(server, first, second, tmp_path))
        assert server.seen == []
    assert "cannot reach" in refused(capsys, command(server, first, second, output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no answers"),
        ("{", "line 1 is no answer"),
        ("[]", "line 1 is no answer"),
        ('{"prompt": "p", "response": "r"}', "line 1 is no answer"),
        ('{"index": "0", "prompt": "p", "response": "r"}', "line 1 is no answer"),
        ('{"index": 0, "prompt": "p", "response": null}', "line 1 is no answer"),
        (
            '{"index": 0, "prompt": "p", "response": "r"}\n{"index": 0, "prompt": "p", "response": "r"}',
            "a second answer",
        ),
        ('{"index": 0, "prompt": "other", "response": "r"}', "differ in the prompt of index 0"),
    ],
)
def test_files_that_are_no_answers(tmp_path: Path, capsys: Any, content: str, message: str) -> None:
    first = tmp_path / "a.jsonl"
    first.write_text(content)
    second = write_answers(tmp_path / "b.jsonl", ["x"])
    with JudgeServer(grade) as server:
        assert message in refused(capsys, command(server, first, second, tmp_path / "v.jsonl"))
        assert server.seen == []


def test_an_output_of_other_settings_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    first, second = answers(tmp_path)
    output, notes = tmp_path / "v.jsonl", tmp_path / "notes.txt"
    notes.write_text("one line")
    hh = (Path(protocol.__file__).parent / "protocols" / "genarm-hh.toml").read_text()
    warm = tmp_path / "warm.toml"
    warm.write_text(re.sub(r"(?m)^temperature = .*$", "temperature = 0.5", hh))
    renamed = tmp_path / "renamed.toml"
    renamed.write_text(hh)
    few = [write_answers(tmp_path / f"few-{side}.jsonl", texts) for side, texts in (("a", ["long"]), ("b", ["s"]))]
    turned = [tmp_path / "turned-a.jsonl", tmp_path / "turned-b.jsonl"]
    for path, source in zip(turned, (first, second), strict=True):
        texts = [row["response"] for row in rows_of(source)]
        write_answers(path, texts[::-1])
    with JudgeServer(grade) as server:
        assert main(command(server, first, second, output)) == 0
        written = output.read_bytes()
        capsys.readouterr()
        for others, problem in (
            (command(server, first, second, output, "--model", "another"), "model was "),
            (command(server, second, first, output), f"answers of first ({second}) has changed"),
            (command(server, first, second, first), "no a.jsonl.settings.json beside it"),
            (command(server, first, second, notes), "no notes.txt.settings.json beside it"),
            (command(server, *few, output), f"answers of first ({few[0]}) has changed"),
            (command(server, *turned, output), f"answers of first ({turned[0]}) has changed"),
            (
                command(server, first, second, output, "--protocol", str(warm)),
                "temperature of sampling of protocol was",
            ),
        ):
            assert problem in refused(capsys, others)
        assert output.read_bytes() == written
        assert main(command(server, first, second, output, "--protocol", str(renamed))) == 0
        assert len(server.seen) == 24
    assert output.read_bytes() == written
    assert notes.read_text() == "one line"
