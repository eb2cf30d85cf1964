"""Two runs of one output at once: the second is refused, whatever becomes of the first."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builders.tiny import save_member, tiny_model
from builders.toy_training import toy_preferences
from genarm import files
from genarm.cli.main import main
from genarm.errors import DataError
from genarm.files import only_run, write_text
from genarm.provenance import alone, claim, settings_file

_HOLDER = """
import sys
from pathlib import Path
from genarm.provenance import alone
with alone(Path(sys.argv[1]), noted=Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
_RACER = """
import sys, time
from pathlib import Path
from genarm.errors import DataError
from genarm.provenance import alone, claim
path = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with alone(path):
        claim(path, {"a": 1})
        time.sleep(1.5)
        claim(path, {"a": 1})
        time.sleep(1.5)
        print("wrote")
except DataError:
    print("refused")
"""


@contextmanager
def held(path: Path, noted: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the output."""
    command = [sys.executable, "-c", _HOLDER, str(path), str(noted)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


def test_another_process_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    path = tmp_path / "new" / "o.jsonl"
    noted = settings_file(path)
    with held(path, noted) as other:
        for _ in range(2):
            with pytest.raises(DataError, match=r"another run is writing .*o\.jsonl; wait until it has ended, or"):
                alone(path).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
        with alone(path):
            claim(path, {"a": 1})
    assert [file.name for file in path.parent.iterdir()] == [noted.name]


def test_of_several_that_begin_together_one_writes(tmp_path: Path) -> None:
    """Though each puts a new file of settings in the place of the one that is locked, twice."""
    command = [sys.executable, "-c", _RACER, str(tmp_path / "o.jsonl")]
    racers = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(4)]
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.readline()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    assert sorted(racer.communicate()[0].strip() for racer in racers) == ["refused"] * 3 + ["wrote"]


def test_a_process_does_not_lock_itself_out(tmp_path: Path) -> None:
    path, noted = tmp_path / "o", tmp_path / "s"
    for _ in range(2):
        with only_run(path, noted), only_run(path, noted):
            write_text(noted, "{}")
    assert not files._HELD
    assert noted.read_text() == "{}"
    assert noted.stat().st_mode & 0o777 == 0o644


def test_an_output_that_is_refused_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text("not ours")
    for path, noted in ((tmp_path / "o.jsonl", None), (tmp_path, tmp_path / "recipe.json")):
        with alone(path, noted=noted), pytest.raises(DataError, match="already has content and no"):
            claim(path, {}, noted=noted)
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]
    empty = tmp_path / "new"
    with alone(empty, noted=empty / "recipe.json"):
        claim(empty, {"a": 1}, noted=empty / "recipe.json")


def test_without_locks_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / "o.jsonl"
    with held(path, settings_file(path)):
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
        with alone(path):
            claim(path, {"a": 1})
        monkeypatch.setattr(files, "fcntl", None)
        with alone(path):
            claim(path, {"a": 1})


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    program = """
import os, sys, time
from pathlib import Path
from genarm.provenance import alone
with alone(Path(sys.argv[1])):
    if (child := os.fork()) == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    print(child, flush=True)
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "o.jsonl"
    done = subprocess.run([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True, check=False)
    try:
        with alone(path):
            pass
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_two_runs_of_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is stopped while it writes, so that the second comes in between for sure."""
    monkeypatch.chdir(tmp_path)
    save_member(tiny_model("llama"), tmp_path / "model")
    prompts = "".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(20))
    (tmp_path / "in.jsonl").write_text(prompts)
    command = ["generate", "model", "--input", "in.jsonl", "--batch-size", "1", "--max-new-tokens", "60"]
    command += ["--output", "out.jsonl"]
    output = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-m", "genarm", *command], stderr=subprocess.DEVNULL) as first:
        while not (output.exists() and output.stat().st_size):
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        rows = output.read_text().count("\n")
        capsys.readouterr()
        assert main(command) == 2
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert rows < 20
    said = capsys.readouterr().err
    assert "another run is writing out.jsonl; wait until it has ended, or choose another --output" in said
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == list(range(20))
    assert main(command) == 0
    assert "out.jsonl is complete: 20 of 20 rows" in capsys.readouterr().err


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save_member(tiny_model("llama"), root / "model")
    rows = toy_preferences(8, 0)
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("one", "two"):
        (root / f"{name}.jsonl").write_text(json.dumps({"index": 0, "prompt": "w1", "response": name}) + "\n")
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "w1", "k": 1}) + "\n")
    return root


SHORT = ("--max-new-tokens", "4")
COMMANDS = {
    "pairs": (["pairs", "--model", "model", "--prompts", "prompts.jsonl", "--score", "last-number=k", *SHORT], ""),
    "judge": (["judge", "one.jsonl", "two.jsonl", "--protocol", "helpful", "--model", "m"], ""),
    "train": (["train", "--model", "model", "--data", "pairs.jsonl", "--epochs", "1", "--resume"], "train_config.toml"),
    "tune": (["tune", "model", "--wish", "kind=w1 w2", "--pairs", "pairs.jsonl"], "margins.jsonl.settings.json"),
    "eval": (["eval", "recipe.toml", "--scale", "tiny"], "recipe.json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_goes_on_with_its_output(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "hh-rlhf.toml"
    Path("recipe.toml").write_bytes(recipe.read_bytes())
    command, inside = COMMANDS[name]
    output = tmp_path / "output"
    noted = output / inside if inside else settings_file(output)
    if name == "train":  # without --resume, a folder with a run in it is refused anyway
        assert main([*command, "--output", str(output)]) == 0
        (output / "metrics.json").unlink()
    with held(output, noted):
        assert main([*command, "--output", str(output)]) == 2
    assert "another run is writing" in capsys.readouterr().err
