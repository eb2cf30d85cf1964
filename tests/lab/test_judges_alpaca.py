"""AlpacaEval 2 through its own package, offline: the hub's file for length control is made here, in its form."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from builders.alpaca import sigmoid, weigh
from builders.judge_server import Act, JudgeServer, Seen
from genarm.errors import ConfigError, DataError
from genarm.lab.judges.alpaca_eval import (
    AlpacaEval,
    Annotation,
    Output,
    annotate,
    read_annotations,
    win_rates,
    write_outputs,
)
from genarm.lab.judges.kinds import JudgeSpec
from genarm.lab.judges.llm import Pair
from genarm.lab.judges.settings import ClientSettings

pytestmark = pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="needs the extra alpaca")
KEY = "sk-test-0123456789abcdef"
N = 805


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no key, and nothing left of what the package does to logging where a test imports it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What length control needs in a cache of the hub: how hard instructions are, and verdicts on two gamed models."""
    draw = random.Random(0)
    hardness = [draw.gauss(0, 1) for _ in range(N)]
    columns = ["index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"]
    deltas = [(model, i, draw.gauss(0, 1)) for model in ("short", "long") for i in range(N)]
    rows = [[i, sigmoid(-3 * math.tanh(d)), d, hardness[i], False, model] for model, i, d in deltas]
    folder = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    text = "\n".join(",".join(map(str, row)) for row in [columns, *rows])
    (snapshot / "df_gamed.csv").write_text(text + "\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def annotations(prefer: Callable[[float], float], n: int = N) -> list[Annotation]:
    """Verdicts of a judge whose preference is `prefer` of tanh of the standardised difference in length."""
    draw = random.Random(1)
    lengths = [(draw.randint(100, 1000), draw.randint(300, 1200)) for _ in range(n)]
    differences = [reference - output for reference, output in lengths]
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    return [
        Annotation(index=i, output="x" * b, reference="y" * a, preference=1 + prefer(math.tanh((a - b) / spread)))
        for i, (a, b) in enumerate(lengths)
    ]


@pytest.mark.usefixtures("hub")
def test_length_control_finds_the_rate_at_equal_lengths() -> None:
    """A judge that goes by length alone: the raw rate is far from a half, the controlled one is a half. Another likes
    the model itself by 1 logit: what is left after the control is sigmoid(1)."""
    by_length = annotations(lambda t: sigmoid(-3 * t))
    rates = win_rates(by_length)
    raw = [a.preference - 1 for a in by_length if a.preference is not None]
    assert rates.raw == pytest.approx(100 * sum(raw) / N)
    assert rates.raw > 60
    assert rates.controlled == pytest.approx(50, abs=1.5)
    assert (rates.n, rates.missing) == (N, 0)
    by_taste = win_rates(annotations(lambda t: sigmoid(1 - 3 * t)))
    assert by_taste.controlled == pytest.approx(100 * sigmoid(1), abs=1.5)


@pytest.mark.usefixtures("hub")
def test_the_package_gives_the_same_for_its_own_file(tmp_path: Path) -> None:
    """A file of the package against the same through its functions; missing preferences are counted."""
    from alpaca_eval.metrics import get_length_controlled_winrate

    given = annotations(lambda t: float(t < 0.3))
    rows = [
        {
            "output_1": a.reference,
            "output_2": a.output,
            "preference": None if a.index % 100 == 7 else 1.5 if a.index % 50 == 3 else a.preference,
            "generator_1": "base",
            "generator_2": "ours",
            "annotator": "gpt",
        }
        for a in given
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows))
    found = win_rates(read_annotations(file))
    expected = get_length_controlled_winrate(rows, save_weights_dir=None)
    assert found.raw == pytest.approx(expected["win_rate"])
    assert found.raw_error == pytest.approx(expected["standard_error"])
    assert found.controlled == pytest.approx(expected["length_controlled_winrate"])
    assert found.controlled_error == pytest.approx(expected["lc_standard_error"])
    assert (found.n, found.missing) == (N - 8, 8)


@pytest.mark.usefixtures("hub")
def test_instructions_go_by_their_numbers() -> None:
    """The order of the rows plays no part, so a part of the set in any order is the same."""
    some = annotations(lambda t: float(t < 0.1))[400:]
    assert win_rates(some).controlled == pytest.approx(win_rates(some[::-1]).controlled, abs=0.5)
    renumbered = [Annotation(**{**vars(a), "index": a.index - 400}) for a in some]
    assert win_rates(renumbered).controlled != win_rates(some).controlled


@pytest.mark.usefixtures("hub")
def test_a_comparison_knows_each_instruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its place in AlpacaEval's data, some of which may be left out; of other prompts nothing is known."""
    given = annotations(lambda t: float(t < 0.1))
    preferences = {f"instruction {a.index}": a.preference for a in given}

    def verdicts(outputs: Sequence[Output], *_: object) -> list[Annotation]:
        return [
            Annotation(index=o.index, output=o.output, reference=o.reference, preference=preferences[o.instruction])
            for o in outputs
        ]

    monkeypatch.setattr("genarm.lab.judges.alpaca_eval.annotate", verdicts)
    judge = JudgeSpec(name="AlpacaEval 2", kind="alpaca-eval", source="j", settings={"base_url": "http://localhost:1"})

    def note(kept: Sequence[Annotation], **row: str) -> str | None:
        pairs = [
            Pair(
                prompt=f"instruction {a.index}",
                first=a.output,
                second=a.reference,
                row={"instruction": f"instruction {a.index}", **row},
                number=a.index,
            )
            for a in kept
        ]
        return AlpacaEval().compare(judge, pairs, tmp_path, "name", lambda: None).note

    kept = [*given[3:90], *given[200:]]
    rates = win_rates(kept)
    assert f"length-controlled {rates.controlled:.1f}% ({rates.controlled_error:.1f})" in (
        note(kept, dataset="koala") or ""
    )
    assert "these prompts are others" in (note(kept) or "")


def test_without_the_data_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"df_gamed\.csv.*hf download"):
        win_rates(annotations(lambda t: 0.5))
    with pytest.raises(DataError, match="at least 10"):
        win_rates(annotations(lambda t: 0.5, n=9))


QUIET = """
import logging, warnings
from genarm.errors import DataError
from genarm.lab.judges.alpaca_eval import Annotation, win_rates
warnings.simplefilter("error")
try:
    win_rates([Annotation(index=i, output="a" * i, reference="b", preference=1 + i % 2) for i in range(10)])
except DataError:
    pass
assert (logging.root.level, logging.root.handlers, logging.root.manager.disable) == (logging.WARNING, [], 0)
"""


def test_the_package_leaves_logging_alone(tmp_path: Path) -> None:
    """Importing it sets the whole process to print everything; in a process of its own, since it is imported once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", QUIET], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("content", ["", "{}x", "[1]", '[{"output_1": "a"}]', "3"])
def test_files_that_are_no_annotations(tmp_path: Path, content: str) -> None:
    file = tmp_path / "annotations.json"
    file.write_text(content)
    with pytest.raises(DataError, match="cannot read the annotations"):
        read_annotations(file)


# --- the annotator --------------------------------------------------------------------------------------------------

OUTPUTS = [
    Output(index=i, instruction=f"instruction {i}", output="m" * (5 + i % 7), reference="r" * 8) for i in range(12)
]


def test_the_annotator_at_an_endpoint_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    """Verdicts are the endpoint's log-probabilities, in either order; a later run asks for what is new only."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(weigh) as server:
        settings = ClientSettings(model="judge", base_url=server.url, key_variable="JUDGE_KEY", concurrency=2)
        found = annotate(OUTPUTS[:8], tmp_path, settings)
        assert len(server.seen) == 8
        again = annotate(OUTPUTS, tmp_path, settings)[:8]
        assert [a.preference for a in again] == pytest.approx([a.preference for a in found])  # files round
        assert len(server.seen) == 12
        annotate(OUTPUTS[:8], tmp_path, ClientSettings(**{**vars(settings), "model": "another"}))
        assert len(server.seen) == 20
    assert [a.index for a in found] == list(range(8))
    assert [a.preference for a in found] == pytest.approx([1 + sigmoid(len(o.output) - 8) for o in OUTPUTS[:8]])
    orders = {'"""mm' in seen.question.split('"M"')[0] for seen in server.seen}
    assert orders == {True, False}
    assert {seen.body["model"] for seen in server.seen} == {"judge", "another"}
    assert {
        value for seen in server.seen for name, value in seen.headers.items() if name.lower() == "authorization"
    } == {f"Bearer {KEY}"}
    said = "".join(capfd.readouterr()) + caplog.text
    assert KEY not in said
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "OPENAI_API_KEY" not in os.environ


def test_an_endpoint_without_log_probabilities_gives_no_preference(tmp_path: Path) -> None:
    def silent(seen: Seen, number: int) -> Act:
        act = weigh(seen, number)
        assert isinstance(act.body, dict)
        act.body["choices"][0]["logprobs"] = None
        return act

    with JudgeServer(silent) as server:
        found = annotate(OUTPUTS, tmp_path, ClientSettings(model="judge", base_url=server.url))
        assert [a.preference for a in found] == [None] * 12
        server.behave = weigh
        assert None not in [
            a.preference for a in annotate(OUTPUTS, tmp_path, ClientSettings(model="judge", base_url=server.url))
        ]


def test_what_the_annotator_cannot_get_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def refuse(seen: Seen, number: int) -> Act:
        return Act(status=401, body={"error": {"message": f"no: {KEY}"}}, headers={"Content-Type": "application/json"})

    with JudgeServer(refuse) as server:
        settings = ClientSettings(model="judge", base_url=server.url, concurrency=1)
        with pytest.raises(ConfigError, match=r"no: \*\*\*") as caught:
            annotate(OUTPUTS, tmp_path, settings)
        assert KEY not in str(caught.value)
        with pytest.raises(ConfigError, match="requests_per_minute"):
            annotate(OUTPUTS, tmp_path, ClientSettings(**{**vars(settings), "requests_per_minute": 9.0}))
    assert os.environ["OPENAI_API_KEY"] == KEY


def test_outputs_for_the_packages_own_command(tmp_path: Path) -> None:
    import alpaca_eval.utils

    for reference in (False, True):
        write_outputs(tmp_path / "o.json", OUTPUTS, generator="ours", reference=reference)
        table = alpaca_eval.utils.load_or_convert_to_dataframe(tmp_path / "o.json")
        assert list(table["output"]) == [o.reference if reference else o.output for o in OUTPUTS]
        assert list(table["instruction"]) == [o.instruction for o in OUTPUTS]
        assert alpaca_eval.utils.get_generator_name(None, table) == "ours"
