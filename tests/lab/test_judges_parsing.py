"""Protocols and parsers: what is asked, and how awkward replies are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genarm.errors import ConfigError
from genarm.lab.judges.parsing import SingleScore, TwoScores, VerdictTag
from genarm.lab.judges.protocol import as_text, load_protocol, protocol_names

scores = st.integers(1, 10) | st.decimals(1, 10, places=1)
prose = st.text(st.characters(exclude_categories=["Nd", "Cs"])).filter(lambda text: "</think>" not in text)
blank = st.text(" \t\r\n*_`", max_size=4)

# --- parsers --------------------------------------------------------------------------------------------------------


@given(scores, scores, blank, prose)
def test_two_scores_on_the_first_or_the_last_line(first: float, second: float, before: str, after: str) -> None:
    """What surrounds the line plays no part; the other end of the reply is not looked at."""
    expected = (first > second) - (first < second)
    line = f"{before}{first} {second}"
    assert TwoScores()(f"{line}\n{after}") == expected
    assert TwoScores(line="last")(f"{after}\n{line}\n\n") == expected
    if after.strip(" \t\r\n*_`\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029"):
        assert TwoScores()(f"{after}\n{line}") is None


@given(prose)
def test_no_prose_is_two_scores_or_a_score(text: str) -> None:
    assert TwoScores()(text) is TwoScores(line="last")(text) is SingleScore()(text) is None


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("8 7\nBecause …", 1),
        ("**7, 8**", -1),
        ("7.5\t7.5", 0),
        ("<think>9 1 [[A]]\n</think>\n\n2 3", -1),
        ("8", None),
        ("8 7 6", None),
        ("8/10 7/10", None),
        ("7/10", None),
        ("8,7", None),
        ("0 7", None),
        ("8 11", None),
        ("-8 7", None),
        ("8 7.", None),
        ("eight seven", None),
        ("Assistant 1: 8\nAssistant 2: 7", None),
        ("٨ ٧", None),
        ("8 1e0", None),
        ("nan nan", None),
        ("", None),
        ("I cannot grade this.\n8 7", None),
    ],
)
def test_two_scores(reply: str, expected: int | None) -> None:
    assert TwoScores()(reply) == expected


@given(st.lists(st.sampled_from(["[[A]]", "[[B]]", "[[C]]", "[A]", "[[D]]", "A", "\n", "[[", "]]", "better: "])))
def test_a_verdict_is_one_kind_of_tag(pieces: list[str]) -> None:
    reply = " ".join(pieces)
    found = {piece for piece in pieces if piece in ("[[A]]", "[[B]]", "[[C]]")}
    expected = {"[[A]]": 1, "[[B]]": -1, "[[C]]": 0}[found.pop()] if len(found) == 1 else None
    assert VerdictTag()(reply) == expected


def test_what_is_thought_aloud_is_no_verdict() -> None:
    assert VerdictTag()("<think>[[A]]? No, [[C]].</think> [[B]]") == -1
    cut_off = "Let me see.\n<think>\nAt first sight [[A]] is better, but\n8 7"
    assert [parse(cut_off) for parse in (VerdictTag(), TwoScores(line="last"))] == [None, None]
    assert SingleScore()("<think>\nScore: 3") is None


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Good.\nScore: 7", 7),
        ("**Score:** 7.5", 7.5),
        ("score:10/10\n\n", 10),
        ("7", 7),
        ("Score: 7 of 10", None),
        ("Score: 7/5", None),
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: 7\nThat is all.", None),
        ("Score:", None),
        ("I would say 7", None),
        ("Score: 7 8", None),
        ("", None),
    ],
)
def test_one_score(reply: str, expected: float | None) -> None:
    assert SingleScore()(reply) == expected


# --- protocols ------------------------------------------------------------------------------------------------------


def test_every_protocol_of_the_package_asks_with_both_answers_in_their_places() -> None:
    assert protocol_names() == ("genarm-hh", "harmless", "helpful", "pairwise", "score")
    for name in protocol_names():
        protocol = load_protocol(name)
        assert protocol.name == name
        assert protocol.model
        answers = ("<one>",) if protocol.single else ("<one>", "<two>")
        text = "\n".join(message["content"] for message in protocol.messages("<asked>", *answers))
        places = [text.index(part) for part in ("<asked>", *answers)]
        assert places == sorted(places)
        assert "{" not in text
        assert "\\" not in text


def test_an_answer_cannot_fill_another_place() -> None:
    protocol = load_protocol("pairwise")
    text = protocol.messages("{first}", "{second} {0} {", "two")[-1]["content"]
    assert text.count("{first}") == text.count("{second} {0} {") == text.count("two") == 1


def test_conversations_are_shown_with_their_roles() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    chat = [{"role": role, "content": content} for role, content in turns]
    assert as_text(chat) == "User: a\n\nAssistant: b\n\nUser: c"
    assert as_text(chat[:1]) == as_text("a") == "a"


def test_a_rubric_in_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "polite.md"
    file.write_text("Is it {prompt} polite?\n")
    protocol = load_protocol(file)
    assert protocol.single
    assert protocol.name == "polite"
    text = protocol.messages("Q", "R")[-1]["content"]
    assert "Is it {prompt} polite?" in text
    assert "does what was asked" not in text
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        load_protocol(file)


VERDICT = 'kind = "verdict"\nfirst = "<1>"\nsecond = "<2>"\ntie = "<0>"'

OWN = f"""
system = "s"
template = "{{prompt}} {{first}} {{second}}"
[parser]
{VERDICT}
[sampling]
max_completion_tokens = 9
reasoning_effort = "low"
"""


def test_a_protocol_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    protocol = load_protocol(str(file))
    assert protocol.messages("p", "a", "b") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "p a b"},
    ]
    assert (protocol.name, protocol.model, protocol.reply_limit) == ("own", None, 9)
    assert protocol.parser("so <2>") == -1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{second}", "", "it must have {first}, {prompt}, {second}"),
        ("{second}", "{second} {response}", "must have"),
        ('system = "s"', 'rubric = "r"', "with this parser and a rubric it must have"),
        ('system = "s"', 'colour = "s"', "unknown key 'colour'"),
        ('system = "s"', "system = 3", "system is 3; it must be a string"),
        ('"verdict"', '"votes"', "two-scores, verdict, score"),
        ('tie = "<0>"', 'draw = "<0>"', "draw"),
        ('tie = "<0>"', 'tie = "<1>>"', "part of another"),
        ("max_completion_tokens = 9", "", "limit the length"),
        ("max_completion_tokens = 9", "max_completion_tokens = 0", "limit the length"),
        ("max_completion_tokens = 9", "max_completion_tokens = 9\nn = 2", "sampling setting 'n'"),
        ("[parser]", "[parse", "not valid TOML"),
        ("[sampling]", "[parser.sampling]", "lacks 'sampling'"),
        (
            'kind = "verdict"\nfirst = "<1>"\nsecond = "<2>"\ntie = "<0>"',
            'kind = "two-scores"\nline = "middle"',
            "line is 'middle'",
        ),
        (
            'kind = "verdict"\nfirst = "<1>"\nsecond = "<2>"\ntie = "<0>"',
            'kind = "two-scores"\nlow = 10',
            "low must be",
        ),
    ],
)
def test_what_a_protocol_must_not_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    file = tmp_path / "own.toml"
    file.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_protocol(file)


def test_no_such_protocol(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"genarm-hh, harmless, helpful, pairwise, score.*\.toml"):
        load_protocol("gpt4")
    for name in ("none.toml", "none.txt"):
        with pytest.raises(ConfigError, match="cannot read"):
            load_protocol(tmp_path / name)
