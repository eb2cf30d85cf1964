"""Every preference format, from files as users have them to prompts and responses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from genarm.data.preferences import Format, Preference, detect, load_preferences, normalise, to_preferences
from genarm.errors import ConfigError, DataError
from tiny import SHARED


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
        Format.STANDARD,
        ("The sky is", " blue.", " green."),
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is blueish."},
        Format.IMPLICIT_STANDARD,
        ("The sky is", " blue.", " blueish."),
    ),
    (
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        Format.CONVERSATIONAL,
        ([user("Sky?")], "Blue.", "Green."),
    ),
    (
        {
            "chosen": [user("a"), assistant("b"), user("Sky?"), assistant("Blue.")],
            "rejected": [user("a"), assistant("b"), user("Sky?"), assistant("Green.")],
        },
        Format.IMPLICIT_CONVERSATIONAL,
        ([user("a"), assistant("b"), user("Sky?")], "Blue.", "Green."),
    ),
    (ULTRAFEEDBACK, Format.ULTRAFEEDBACK, ([user("Name a fruit.")], "Apple.", "Car.")),
    (
        {"prompt": "Name a fruit.", "chosen": [assistant("Apple.")], "rejected": [assistant("Car.")]},
        Format.ULTRAFEEDBACK,
        ([user("Name a fruit.")], "Apple.", "Car."),
    ),
    (
        {
            "prompt": "Name a fruit.",
            "chosen": [{"role": "system", "content": "Be brief."}, user("Name a fruit."), assistant("Apple.")],
            "rejected": [{"role": "system", "content": "Be brief."}, user("Name a fruit."), assistant("Car.")],
        },
        Format.ULTRAFEEDBACK,
        ([{"role": "system", "content": "Be brief."}, user("Name a fruit.")], "Apple.", "Car."),
    ),
    (
        {
            "prompt": [user("a"), assistant("b")],
            "chosen": [user("c"), assistant("d")],
            "rejected": [user("c"), assistant("e")],
        },
        Format.CONVERSATIONAL,
        ([user("a"), assistant("b"), user("c")], "d", "e"),
    ),
    (
        HH,
        Format.TRANSCRIPTS,
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


def test_implicit_prompt_ends_at_a_word() -> None:
    def prompt(chosen: str, rejected: str) -> str:
        pair = normalise({"chosen": chosen, "rejected": rejected}, Format.IMPLICIT_STANDARD)
        assert isinstance(pair.prompt, str)
        assert pair.prompt + pair.chosen == chosen
        assert pair.prompt + pair.rejected == rejected
        return pair.prompt

    assert prompt("one two three", "one two four") == "one two"
    assert prompt("one two three", "one two  four") == "one two"
    assert prompt("one two\nx", "one two y") == "one two"
    assert prompt("one two", "one two three") == "one"  # "two" must not become an empty response
    with pytest.raises(ValueError, match="no first words in common"):
        prompt("yes", "no")


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
    assert found.malformed["'rejected' is missing, expected a list of messages"] == 1
    assert found.malformed["chosen and rejected answer different prompts"] == 1
    bad_label = {**PKU, "safer_response_id": -1}
    assert to_preferences([PKU, bad_label], source="rows", objective="safer").malformed == {
        "'safer_response_id' is -1, expected 0 or 1": 1
    }


def test_nothing_usable_is_an_error() -> None:
    with pytest.raises(DataError, match="has no rows"):
        to_preferences([], source="rows")
    with pytest.raises(DataError, match=r"none of 2 rows gives a pair .* 'rejected' is missing"):
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
    assert load_preferences(str(path)).pairs == [Preference(**row) for row in STANDARD_ROWS]
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
        ("a.json", "[1]", "element 1 of the list is a int"),
        ("a.csv", "chosen,rejected\na,b\na,b,c\n", r"a\.csv, line 3: 3 values, expected 2 \(chosen, rejected\)"),
        ("a.parquet", "no parquet", r"cannot read .*a\.parquet"),
        ("a.txt", "x", r"unknown ending; expected one of \.jsonl, \.json, \.parquet, \.csv"),
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
    assert load_preferences("Anthropic/hh-rlhf/helpful-base", split="test").format is Format.TRANSCRIPTS
    assert load_preferences("owner/name").format is Format.TRANSCRIPTS
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
    assert found.format is Format.CONVERSATIONAL
    assert not found.malformed
    assert [(p.prompt, p.chosen, p.rejected) for p in found.pairs] == [
        (row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows
    ]
