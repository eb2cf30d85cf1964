"""Every preference format, from files as users have them to prompts and responses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from builders.tiny import SHARED
from genarm.data import formats
from genarm.data.formats.base import Format, Preference
from genarm.data.preferences import detect, load_preferences, to_preferences
from genarm.data.prompts import to_prompts
from genarm.errors import ConfigError, DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Any news?\n\nAssistant: None today.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Any news?\n\nAssistant: Go away.\nNow.",
}
PKU = {
    "prompt": "How do I rest?",
    "response_0": "Lie down.",
    "response_1": "Drink.",
    "better_response_id": 1,
    "safer_response_id": 0,
    "is_response_0_safe": True,
}
ULTRAFEEDBACK = {
    "prompt": "Name a fruit.",
    "prompt_id": "x",
    "chosen": [user("Name a fruit."), assistant("Apple.")],
    "rejected": [user("Name a fruit."), assistant("Car.")],
    "messages": [],
    "score_chosen": 8.0,
}

# row, format, pair
EXPLICIT = [
    (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        formats.STANDARD,
        ([user("The sky is")], " blue.", " green."),
    ),
    (
        {"chosen": "Q: The sky?\nA: It is blue.", "rejected": "Q: The sky?\nA: It is green."},
        formats.IMPLICIT_STANDARD,
        ("Q: The sky?\nA:", " It is blue.", " It is green."),
    ),
    (
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        formats.CONVERSATIONAL,
        ([user("Sky?")], "Blue.", "Green."),
    ),
    (
        {
            "chosen": [user("a"), assistant("b"), user("Sky?"), assistant("Blue.")],
            "rejected": [user("a"), assistant("b"), user("Sky?"), assistant("Green.")],
        },
        formats.IMPLICIT_CONVERSATIONAL,
        ([user("a"), assistant("b"), user("Sky?")], "Blue.", "Green."),
    ),
    (ULTRAFEEDBACK, formats.ULTRAFEEDBACK, ([user("Name a fruit.")], "Apple.", "Car.")),
    (
        {"prompt": "Name a fruit.", "chosen": [assistant("Apple.")], "rejected": [assistant("Car.")]},
        formats.ULTRAFEEDBACK,
        ([user("Name a fruit.")], "Apple.", "Car."),
    ),
    (
        {
            "prompt": "Name a fruit.",
            "chosen": [{"role": "system", "content": "Be brief."}, user("Name a fruit."), assistant("Apple.")],
            "rejected": [{"role": "system", "content": "Be brief."}, user("Name a fruit."), assistant("Car.")],
        },
        formats.ULTRAFEEDBACK,
        ([{"role": "system", "content": "Be brief."}, user("Name a fruit.")], "Apple.", "Car."),
    ),
    (
        {
            "prompt": [user("a"), assistant("b")],
            "chosen": [user("c"), assistant("d")],
            "rejected": [user("c"), assistant("e")],
        },
        formats.CONVERSATIONAL,
        ([user("a"), assistant("b"), user("c")], "d", "e"),
    ),
    (
        HH,
        formats.TRANSCRIPTS,
        ([user("Hi there"), assistant("Hello."), user("Any news?")], "None today.", "Go away.\nNow."),
    ),
]


@pytest.mark.parametrize(("row", "format_", "pair"), EXPLICIT, ids=[str(i) for i in range(len(EXPLICIT))])
def test_each_format(row: dict[str, Any], format_: Format, pair: tuple[Any, str, str]) -> None:
    found = to_preferences([row], source="rows")
    assert found.format is format_
    assert found.pairs == [Preference(prompt=pair[0], chosen=pair[1], rejected=pair[2])]
    assert not found.malformed


def test_transcripts_stay_text_without_a_chat_template() -> None:
    (pair,) = to_preferences([HH], source="rows", chat=False).pairs
    assert isinstance(pair.prompt, str)
    assert pair.prompt.endswith("\n\nHuman: Any news?\n\nAssistant:")
    assert pair.chosen == " None today."
    assert pair.prompt + pair.chosen == HH["chosen"]
    assert pair.prompt + pair.rejected == HH["rejected"]


# What comes before a dialogue's last reply in HH data, as prompt, and as how the responses begin.
DIALOGUE = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Any news?\n\nAssistant:"
PLACES = [
    (None, DIALOGUE),
    (DIALOGUE, ""),
    (DIALOGUE, DIALOGUE),
    (DIALOGUE.strip() + " ", DIALOGUE.lstrip()),
    (DIALOGUE.removesuffix("\n\nAssistant:"), DIALOGUE),
    (DIALOGUE.removesuffix("\n\nAssistant:"), "\n\nAssistant:"),
    (DIALOGUE, "Assistant:"),
    ("\n\nHuman: Hi there\n\nAssistant: Hello.", "\n\nHuman: Any news?\n\nAssistant:"),
    ("\n\nHuman: Hi there\n\nAssistant:", DIALOGUE),
    ("Any news?", DIALOGUE),
]


@pytest.mark.parametrize(("prompt", "begin"), PLACES, ids=map(str, range(len(PLACES))))
@pytest.mark.parametrize("chat", [True, False])
def test_a_dialogue_is_the_same_wherever_its_row_has_it(prompt: str | None, begin: str, chat: bool) -> None:
    row = {"prompt": prompt, "chosen": f"{begin} None today.", "rejected": f"{begin} Go away.\nNow."}
    (pair,) = to_preferences([*[HH] * 100, row], source="rows", chat=chat).pairs[100:]
    (expected,) = to_preferences([HH], source="rows", chat=chat).pairs
    assert pair.prompt_key.strip() == expected.prompt_key.strip()
    assert [pair.chosen, pair.rejected] == [expected.chosen, expected.rejected]
    alone = {name: value for name, value in row.items() if value is not None}
    if all(DIALOGUE.strip() in said for said in (begin, prompt or begin)):
        assert to_preferences([alone], source="rows", chat=chat).pairs == [pair]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("prompt", "chosen", "reason"),
    [
        ("What is 1+1?", "two", "is no transcript"),
        (None, "two", "is no transcript"),
        (None, "\n\nAssistant: two", "is no transcript|there is no prompt"),
        ([user("What is 1+1?")], "\n\nHuman: What is 1+1?\n\nAssistant: two", "'prompt' is a list, expected a text"),
        ("\n\nHuman: What is 1+1?\n\nAssistant:", "\n\nHuman: Is it?\n\nAssistant: two", "contradict each other"),
        ("What is 1+1?", "\n\nHuman: Is it?\n\nAssistant: two", "contradict each other"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: What is 1+1?", " two", "does not end with an assistant message"),
    ],
)
def test_a_row_that_is_no_transcript_is_set_aside_among_those(
    prompt: Any, chosen: str, reason: str, chat: bool
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": chosen.replace("two", "three")}
    found = to_preferences([*[HH] * 100, row], source="rows", chat=chat)
    assert len(found.pairs) == 100
    assert re.search(reason, *found.malformed)


def test_text_before_the_first_turn_of_a_transcript_is_not_lost() -> None:
    """It stays in plain text; what role it has in a conversation, only a column says."""
    french = "Answer in French."
    whole = {name: french + said for name, said in HH.items()}
    parted = {"prompt": french + DIALOGUE, "chosen": " None today.", "rejected": " Go away.\nNow."}
    for row in (whole, parted):
        (pair,) = to_preferences([*[HH] * 100, row], source="rows", chat=False).pairs[100:]
        assert pair.prompt == french + DIALOGUE
        (reason,) = to_preferences([*[HH] * 100, row], source="rows").malformed
        assert "text before the first turn of a transcript; put it into a column 'system'" in reason


@pytest.mark.parametrize(("objective", "chosen"), [("better", "Drink."), ("safer", "Lie down.")])
def test_pku_objective_chooses_the_label(objective: str, chosen: str) -> None:
    (pair,) = to_preferences([PKU], source="rows", objective=objective).pairs
    assert pair.prompt == [user("How do I rest?")]
    assert pair.chosen == chosen
    assert {pair.chosen, pair.rejected} == {"Drink.", "Lie down."}


def test_objective_is_required_for_pku_and_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match="--objective better or --objective safer"):
        to_preferences([PKU], source="rows")
    with pytest.raises(ConfigError, match="leave --objective out"):
        to_preferences([HH], source="rows", objective="safer")


@pytest.mark.parametrize(
    ("prompt", "replies"),
    [
        ("Question: the sky?\nAnswer:", (" blue", " blueish")),
        ("### Instruction:\nSay it.\n\n### Response:", ("\nOne two.", "\nOne three.")),
        ("<|user|>\nSky?\n<|assistant|>", ("\nBlue", "\nGreen")),
        ("<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n", ("The sky is blue", "The sky is red")),
        ("[INST] Sky? [/INST]", (" A b c", " A b d")),
        ("USER: Assistant: who?\nASSISTANT:", (" The one", " The other")),
    ],
)
def test_implicit_prompts_of_text_end_where_a_turn_begins(prompt: str, replies: tuple[str, str]) -> None:
    rows = [{"chosen": prompt + replies[0], "rejected": prompt + replies[1]}]
    (pair,) = to_preferences(rows, source="rows").pairs
    assert pair == Preference(prompt=prompt, chosen=replies[0], rejected=replies[1])


@pytest.mark.parametrize("said", [("The sky is blue.", "The sky is green."), ("yes", "no"), ("Answer: a", "Answer: b")])
def test_words_in_common_are_no_prompt(said: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="are text without a prompt: they have no turns in common"):
        to_preferences([{"chosen": said[0], "rejected": said[1]}], source="rows")


def test_unknown_columns_are_named_with_the_formats() -> None:
    with pytest.raises(DataError) as error:
        detect(["question", "good", "bad"], [])
    for text in ("bad, good, question", "chosen, rejected", "PKU-SafeRLHF", "Human"):
        assert text in str(error.value)


def test_missing_column_is_refused_with_the_source() -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl: the columns chosen, prompt fit no"):
        to_preferences([{"prompt": "a", "chosen": "b"}], source="pairs.jsonl")


def test_malformed_rows_are_counted_by_reason() -> None:
    good = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    rows = [
        good,
        {**good, "rejected": None},
        {**good, "rejected": []},
        {**good, "chosen": [user("a")]},
        {**good, "chosen": [{"role": "assistant", "content": None}]},
        {**good, "chosen": [user("x"), assistant("a")]},
        {**good, "prompt": None},
        {**good, "chosen": None},
    ]
    found = to_preferences(rows, source="rows")
    assert len(found.pairs) == 1
    assert sum(found.malformed.values()) == 7
    assert found.malformed["'rejected' is null, expected a list of messages"] == 1
    assert found.malformed["chosen and rejected answer different prompts"] == 1
    bad_label = {**PKU, "safer_response_id": -1}
    assert to_preferences([PKU, bad_label], source="rows", objective="safer").malformed == {
        "'safer_response_id' is -1, expected 0 or 1": 1
    }


SYSTEM = {"role": "system", "content": "Be brief."}
REPLIES = {"chosen": [assistant("x")], "rejected": [assistant("y")]}


def turns(*said: dict[str, str]) -> dict[str, Any]:
    """Replies after `said`."""
    return {name: [*said, *reply] for name, reply in REPLIES.items()}


# Everything that comes before the responses is in the prompt, wherever the row has it: row → prompt.
CONTEXTS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"system": "Be brief.", "question": "Why?", "chosen": "x", "rejected": "y"}, [SYSTEM, user("Why?")]),
    ({"system": "", "question": "Why?", "chosen": "The x", "rejected": "The y"}, [user("Why?")]),
    ({"system_prompt": "Be brief.", "instruction": "Why?", "chosen": "x", "rejected": "y"}, [SYSTEM, user("Why?")]),
    (
        {"history": [["a", "b"]], "system": "Be brief.", "prompt": "Why?", "chosen": "x", "rejected": "y"},
        [SYSTEM, user("a"), assistant("b"), user("Why?")],
    ),
    (
        {"history": [user("a"), assistant("b")], "prompt": [user("Why?")], **REPLIES},
        [user("a"), assistant("b"), user("Why?")],
    ),
    ({"system": "Be brief.", "prompt": [user("Why?")], **REPLIES}, [SYSTEM, user("Why?")]),
    ({"system": "Be brief.", "prompt": [SYSTEM, user("Why?")], **REPLIES}, [SYSTEM, user("Why?")]),
    ({"system": "Be brief.", **turns(user("Why?"))}, [SYSTEM, user("Why?")]),
    ({"prompt": [user("Q1")], **turns(assistant("A1"), user("Q2"))}, [user("Q1"), assistant("A1"), user("Q2")]),
    ({"prompt": "Q1", **turns(assistant("A1"), user("Q1"))}, [user("Q1"), assistant("A1"), user("Q1")]),
    ({"prompt": [SYSTEM], **turns(user("Why?"))}, [SYSTEM, user("Why?")]),
    ({"prompt": [SYSTEM, user("Why?")], **turns(SYSTEM, user("Why?"))}, [SYSTEM, user("Why?")]),
    ({"prompt": "Q2 ", **turns(user("Q1"), assistant("A1"), user("Q2"))}, [user("Q1"), assistant("A1"), user("Q2")]),
    ({"prompt": "Why?", "question": "Why?", **turns(user("Why?"))}, [user("Why?")]),
    ({"system": "Be brief.", **HH}, [SYSTEM, user("Hi there"), assistant("Hello."), user("Any news?")]),
    (
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " x", "rejected": " y"},
        [user("Why?")],
    ),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], **REPLIES}, [user("Why?")]),
]


@pytest.mark.parametrize(("row", "prompt"), CONTEXTS, ids=map(str, range(len(CONTEXTS))))
def test_nothing_before_the_response_is_lost(row: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    (pair,) = to_preferences([row], source="rows").pairs
    assert pair.prompt == prompt
    alone = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    if isinstance(row["chosen"], str) and row["chosen"] in ("x", "y"):
        assert [p.prompt for p in to_prompts([alone], source="rows").pairs] == [prompt]


IMPLICIT = turns(user("Q"))
LATER: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"prompt": [SYSTEM], **IMPLICIT}, [SYSTEM, user("Q")]),
    (
        {"prompt": [SYSTEM, user("P")], **turns(assistant("A"), user("Q"))},
        [SYSTEM, user("P"), assistant("A"), user("Q")],
    ),
    ({"prompt": "Q", **REPLIES}, [user("Q")]),
    ({"prompt": "Q", **IMPLICIT}, [user("Q")]),
    ({"question": "P", "system": "Be brief.", **REPLIES}, [SYSTEM, user("P")]),
]


@pytest.mark.parametrize(("row", "prompt"), LATER, ids=map(str, range(len(LATER))))
def test_a_prompt_of_a_later_row_is_read_though_the_first_have_none(
    row: dict[str, Any], prompt: list[dict[str, str]]
) -> None:
    for first in ([IMPLICIT] * 100, [{**IMPLICIT, "prompt": None}] * 100):
        found = to_preferences([*first, row], source="rows")
        assert found.format is formats.IMPLICIT_CONVERSATIONAL
        assert found.pairs[100:] == [Preference(prompt=prompt, chosen="x", rejected="y")]


def test_later_rows_in_another_form_are_set_aside() -> None:
    text = {"chosen": "Q: Why?\nA: x", "rejected": "Q: Why?\nA: y"}
    answers = {"prompt": "Why?", "chosen": "x", "rejected": "y"}
    for first, row, reason in (
        (text, {"prompt": "Be brief.", **text}, "the row has a prompt"),
        (text, {"instruction": 3, **text}, "the row has a prompt"),
        (answers, {"prompt": DIALOGUE, **HH}, "whole transcripts"),
        (IMPLICIT, {"prompt": [user("R")], **IMPLICIT}, "contradict each other"),
        (IMPLICIT, {"prompt": 3, **IMPLICIT}, "'prompt' is a number"),
    ):
        found = to_preferences([*[first] * 100, row], source="rows")
        assert len(found.pairs) == 100
        assert re.search(reason, *found.malformed)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "question": "How?", "chosen": "x", "rejected": "y"}, "'prompt' and 'question' could both"),
        ({"instruction": "Add", "input": "1, 2", "chosen": "x", "rejected": "y"}, "'instruction' and 'input' could"),
        *(
            ({"instruction": "Is this a noun?", "input": given, "chosen": "x", "rejected": "y"}, "'input' could both")
            for given in (7, 0.5, True, [3, 1, 2], {"a": 3}, "a", "this", "noun", [user("a")], [["a"]])
        ),
        ({"prompt": [user("Is this a noun?")], "input": "user", **REPLIES}, "'prompt' and 'input' could both"),
        ({"system": "a", "system_prompt": "b", "prompt": "Why?", "chosen": "x", "rejected": "y"}, "two of them"),
        ({"system": "Sing.", "prompt": [SYSTEM, user("Why?")], **REPLIES}, "contradict each other"),
        ({"prompt": "Who?", **turns(user("Why?"))}, "contradict each other"),
        ({"prompt": "Why?", "history": "before", "chosen": "x", "rejected": "y"}, "'history' is neither"),
        ({"prompt": [user("Why?")], "tools": [{"name": "f"}], **REPLIES}, "the row has 'tools'"),
        ({"prompt": "Why?", "images": ["a.png"], "chosen": "x", "rejected": "y"}, "the row has 'images'"),
        ({"prompt": [user("Why?")], "chosen": [CALL], "rejected": [assistant("y")]}, "'chosen' has 'tool_calls'"),
        ({"prompt": [user("Why?"), {**CALL, "content": None}], **REPLIES}, "'prompt' has 'tool_calls'"),
        *(
            ({"prompt": [user("Why?")], **REPLIES, name: [{**assistant("x"), key: value}]}, f"a message .* has '{key}'")
            for name in ("prompt", "chosen", "rejected")
            for key, value in (
                ("name", "Al"),
                ("reasoning_content", "二加二等于四。"),
                ("思考", "想"),
                ("prefix", True),
            )
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "text": "a"}]}], **REPLIES},
            "a message of 'prompt': the content has a part of the type 'image'",
        ),
        (
            {
                "prompt": [user("Why?")],
                "chosen": [assistant("a"), user("b"), assistant("c")],
                "rejected": [assistant("d")],
            },
            "answer different prompts",
        ),
        ({"prompt": [SYSTEM], **REPLIES}, "there is no prompt"),
        ({"prompt": [user("Why?"), assistant("As")], **REPLIES}, "ends with a turn of the assistant"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_preferences([row], source="rows")


@pytest.mark.parametrize(
    ("name", "value"),
    [("question", " Why? "), ("input", "Why?\n"), ("query", "Be brief.\nWhy?"), ("instruction", "Human: Be brief.")],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_prompt_that_is_told_twice_is_read_once(name: str, value: str, ends: str) -> None:
    prompt = "Human: Be brief.\nWhy?\n\nAssistant:" if name == "instruction" else "Question: Be brief.\nWhy? [/INST]"
    row = {"prompt": prompt.replace("\n", ends), name: value.replace("\n", ends), "chosen": "x", "rejected": "y"}
    assert to_preferences([row], source="rows", chat=False).pairs[0].prompt == row["prompt"]
    said = [SYSTEM, user("Why?")]
    for again in (said, said[1:], "Why?"):
        row = {"prompt": said, name: again, **REPLIES}
        assert to_preferences([row], source="rows").pairs[0].prompt == said


def test_what_is_said_about_a_message_is_no_part_of_it() -> None:
    """As WildChat, OpenAI's files and score models have it."""
    about = {"score": 0.5, "id": "a1", "timestamp": "2023-04-01 12:00:00", "language": "English", "turn_identifier": 7}
    about |= {
        "hashed_ip": "f0",
        "header": {"user-agent": "A browser of 2023"},
        "toxic": True,
        "weight": 0,
        "train": True,
    }
    about |= {"model": "m-1", "createdAt": 3, "name": None, "prefix": False, "tool_calls": [], "refusal": ""}
    row = {"prompt": [{**user("Why?"), **about}], "chosen": [assistant("x") | about], "rejected": [assistant("y")]}
    assert to_preferences([row], source="rows").pairs == [Preference(prompt=[user("Why?")], chosen="x", rejected="y")]


def test_what_a_judge_was_asked_is_no_part_of_a_pair() -> None:
    """The columns of distilabel's pairs."""
    about = {"generations": ["x", "y"], "order": ["chosen", "rejected"], "labelling_model": "m", "rating": [9, 1]}
    about |= {"labelling_prompt": [user("Which answer is better?")], "raw_labelling_response": "9 1 As I see it …"}
    about |= {"rationale": "As I see it …", "status": "tie", "original_chosen": "a b", "chosen_score": 9.0}
    row = {"system": "Be brief.", "input": "Why?", "chosen": "x", "rejected": "y", **about}
    (pair,) = to_preferences([row], source="rows", chat=True).pairs
    assert (pair.prompt, pair.chosen) == ([{"role": "system", "content": "Be brief."}, user("Why?")], "x")


def test_columns_that_are_not_read_are_named() -> None:
    row = {"prompt": "Why?", "chosen": "x", "rejected": "y", "id": 3, "chosen-model": "a b", "score_chosen": 0.5}
    found = to_preferences([row, {**row, "extra": 1}], source="rows")
    assert list(found.unread) == ["id", "chosen-model", "score_chosen", "extra"]
    assert "columns not read: id, chosen-model" in found.description
    for text in ("In the year 1900 …", "小明有3个苹果", ["a b"], [{"role": "user", "content": "a b"}]):
        with pytest.raises(
            DataError, match=r"rows: the column 'persona' holds text that nothing would read; .*take it"
        ):
            to_preferences([row, {**row, "persona": text}], source="rows")
    assert to_preferences([{**row, "persona": "In 1900 …"}], source="rows", read=["persona"]).pairs


def test_a_system_message_needs_a_template() -> None:
    with pytest.raises(DataError, match="a system message or a history needs a chat template"):
        to_preferences([CONTEXTS[0][0]], source="rows", chat=False)
    with pytest.raises(DataError, match="messages need a chat template"):
        to_preferences([{"prompt": [user("Why?")], **REPLIES}], source="rows", chat=False)


def test_nothing_usable_is_an_error() -> None:
    with pytest.raises(DataError, match="has no rows"):
        to_preferences([], source="rows")
    with pytest.raises(DataError, match=r"none of 2 rows gives a pair .* 'rejected' is null"):
        to_preferences([{"prompt": "a", "chosen": "b", "rejected": None}] * 2, source="rows")


STANDARD_ROWS = [{"prompt": f"say {i}", "chosen": f"{i}, of course", "rejected": 'a "no"\nindeed'} for i in range(4)]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = _write(tmp_path / f"pairs{suffix}", STANDARD_ROWS)
    assert load_preferences(str(path), chat=False).pairs == [Preference(**row) for row in STANDARD_ROWS]
    assert len(load_preferences(str(path), split="train[:50%]").pairs) == 2
    with pytest.raises(DataError, match="whose only split is train"):
        load_preferences(str(path), split="test")


def test_conversations_in_parquet(tmp_path: Path) -> None:
    path = _write(tmp_path / "pairs.parquet", [ULTRAFEEDBACK])
    assert load_preferences(str(path)).pairs == to_preferences([ULTRAFEEDBACK], source="rows").pairs


def test_numbers_and_empty_fields_of_csv_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\n1+1,2,NA\n2+2,4.0,\n")
    first, second = load_preferences(str(path)).pairs
    assert (first.chosen, first.rejected, second.chosen, second.rejected) == ("2", "NA", "4.0", "")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_told_what_it_has(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("\ufeff" + "".join(f"{mark.join(row)}\r\n" for row in (("prompt", "chosen", "rejected"), "abc")))
    with pytest.raises(DataError, match=r"no commas, .* separated by .*; save it again as comma-separated values"):
        load_preferences(str(path))


def test_a_column_without_a_name_is_named_as_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(",prompt,chosen,rejected\n0,1+1,2,3\n")
    assert load_preferences(str(path)).description.endswith(", columns not read: ''")


def test_folder_with_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "train.jsonl", STANDARD_ROWS)
    _write(data / "test.jsonl", STANDARD_ROWS[:1])
    assert len(load_preferences(str(data)).pairs) == 4
    assert len(load_preferences(str(data), split="test").pairs) == 1
    with pytest.raises(DataError, match="validation"):
        load_preferences(str(data), split="validation")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.jsonl",
            '{"chosen": "a", "rejected": "b"}\n{"chosen": "a", \n',
            r"a\.jsonl, line 2, column \d+: .*one JSON",
        ),
        ("a.jsonl", '{"chosen": "a"}\n[1]\n', r"a\.jsonl, line 2, column 1: a list instead of an object"),
        ("a.json", '[{"chosen": "a",}]', r"a\.json, line 1, column 1\d: "),
        ("a.json", "[1]", "element 1 of the list is a number"),
        ("a.csv", "chosen,rejected\na,b\na,b,c\n", r"a\.csv, line 3: 3 values, expected 2 \(chosen, rejected\)"),
        ("a.tsv", "chosen\trejected\na\tb\na\n", r"a\.tsv, line 3: 1 values, expected 2 .* around values with tabs or"),
        ("a.tsv", "chosen,rejected\na,b\n", r"first line has no tabs, so values seem to be separated by ','; save it"),
        ("a.parquet", "no parquet", r"cannot read .*a\.parquet"),
        ("a.txt", "x", r"unknown ending; expected one of \.jsonl, \.json, \.csv, \.tsv, \.parquet.*: rename"),
    ],
)
def test_broken_files_say_where(name: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=expected):
        load_preferences(str(tmp_path / name))


def test_broken_line_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": \n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 2, column"):
        load_preferences(str(tmp_path))


def test_no_such_file() -> None:
    with pytest.raises(DataError, match=r"there is no file or folder nothing\.jsonl"):
        load_preferences("nothing.jsonl")


def test_hub_names_carry_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that the datasets library gets; the hub itself is out of a test's reach."""
    import datasets

    calls = []

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        calls.append((name, options))
        return datasets.Dataset.from_list([HH])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("Anthropic/hh-rlhf/helpful-base", split="test").format is formats.TRANSCRIPTS
    assert load_preferences("owner/name").format is formats.TRANSCRIPTS
    assert calls == [
        ("Anthropic/hh-rlhf", {"data_dir": "helpful-base", "split": "test"}),
        ("owner/name", {"data_dir": None, "split": "train"}),
    ]


@pytest.mark.parametrize("name", ["hh-helpful", "hh-harmless", "pku-safer"])
def test_real_data(name: str) -> None:
    path = SHARED / "data" / name / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = load_preferences(str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert found.format is formats.CONVERSATIONAL
    assert not found.malformed
    assert [(p.prompt, p.chosen, p.rejected) for p in found.pairs] == [
        (row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows
    ]
