"""The command line as a whole: speed of --help, its options, exit codes and messages."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from builders.tiny import save_member, tiny_lora, tiny_model
from genarm.cli.main import VERBS, build_parser, main
from genarm.model.compose import compose

SAMPLING = ("--max-new-tokens", "--temperature", "--top-p", "--seed")
MODEL = ("folder", "--dtype", "--device", "--trust-remote-code", "--weights", "--max-kl", "--system")

ENGINE = {"--speculate", "--draft"}
READING = {"--template-arg", "--plain-user-text"}
OPTIONS = {
    "generate": {
        *MODEL,
        *READING,
        *SAMPLING,
        *ENGINE,
        "--prompt",
        "--input",
        "--output",
        "--json",
        "--raw",
        "--batch-size",
        "--num-samples",
        "--wish",
    },
    "chat": {*MODEL, *READING, *SAMPLING, *ENGINE, "--context", "--wish"},
    "merge": {"folder", "--output", "--weights", "--dtype", "--device", "--trust-remote-code"},
    "push": {"folder", "repo", "--private", "--license", "--trust-remote-code"},
    "show": {"folder", "--json", "--trust-remote-code"},
    "score": {*MODEL, "--wish", "--prompt", "--response", "--json", "--html", "--raw", "--template-arg"},
    "compose": {
        *("--base", "--from", "--drop", "--reward", "--output", "--bundle", "--describe", "--adapter-model", "--set"),
        *("--tuned", "--reference", "--wish", "--weight", "--push", "--private", "--license"),
        "--trust-remote-code",
    },
    "tune": {
        *MODEL,
        *SAMPLING,
        *("--pairs", "--split", "--objective", "--max-prompt-tokens", "--max-response-tokens", "--beta"),
        *("--prompts", "--score", "--judge-url", "--judge-model", "--samples", "--scales", "--vary", "--budget"),
        *("--wish", "--template-arg", "--raw", "--batch-size", "--output", "--write", "--preset"),
    },
    "bench decode": {
        *("--base-shape", "--dtype", "--device", "--tokens", "--rounds", "--streams", "--agreement"),
        *("--real", "--prompts", "--output", "--seed"),
    },
    "bench vllm": {"--base-shape", "--dtype", "--tokens", "--rounds", "--streams", "--eager", "--output", "--seed"},
    "bench serve": {
        *("folder", "--dtype", "--device", "--trust-remote-code", "--concurrency", "--tokens", "--requests"),
        *("--rounds", "--output", "--seed", "--explain"),
        *ENGINE,
    },
    "serve": {
        *("folder", "--dtype", "--device", "--trust-remote-code", "--host", "--port", "--served-name"),
        *("--engine", "--vllm-options", "--streams", "--context", "--queue", "--timeout", "--presets"),
        *("--max-weight", "--api-keys", "--cors", "--allowed-host", "--no-request-wishes", "--log-prompts", "--wish"),
        *READING,
        *ENGINE,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base, reward = (save_member(tiny_model(seed=i), root / f"m{i}") for i in range(2))
    compose(base, {"helpful": reward}, root / "guided")
    return root / "guided"


def verbs(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    actions = (parser or build_parser())._subparsers._group_actions  # type: ignore[union-attr]
    return dict(actions[0].choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_are_frozen(verb: str) -> None:
    """Scripts rely on these names: removing or renaming one is a decision, not an accident."""
    name, *subject = verb.split()
    parser = verbs(verbs()[name])[subject[0]] if subject else verbs()[name]
    actions = [action for action in parser._actions if action.dest != "help"]
    assert {action.option_strings[0] if action.option_strings else action.dest for action in actions} == OPTIONS[verb]
    assert all(len(action.option_strings) <= 1 and action.help for action in actions)


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)])
def test_help_is_fast_and_imports_nothing_heavy(verb: tuple[str, ...]) -> None:
    program = (
        "import sys, genarm.cli.main\n"
        "try: genarm.cli.main.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    times = []
    for _ in range(3):
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program, *verb, "--help"], capture_output=True, text=True)
        times.append(time.monotonic() - begin)
        assert done.returncode == 0, done.stderr
        assert "usage: genarm" in done.stdout or "usage: -c" in done.stdout
        if times[-1] < 0.5:
            break
    assert min(times) < 1.0


def test_every_verb_has_a_summary_and_unknown_ones_are_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["explain"])
    assert end.value.code == 2
    assert "invalid choice: 'explain'" in capsys.readouterr().err
    assert set(verbs()) == set(VERBS)


MISTAKES = {
    "missing folder": (["generate", "/no/such", "--prompt", "w1"], "there is no folder '/no/such' here"),
    "missing relative folder": (["chat", "nosuch"], "there is no folder 'nosuch' here; give a guided folder"),
    "file": (["generate", __file__, "--prompt", "w1"], "test_cli.py' is a file; give a model's folder, with config.js"),
    "file of a folder": (
        ["serve", "FOLDER/config.json"],
        "/config.json' is a file (did you mean '",
    ),
    "file as base": (
        ["compose", "--base", __file__, "--reward", "a=PLAIN", "--output", "new"],
        "test_cli.py' is a file",
    ),
    "file as reward": (
        ["compose", "--base", "PLAIN", "--reward", f"a={__file__}", "--output", "new-one"],
        "is a file; give",
    ),
    "file to train": (["train", "--model", __file__, "--data", __file__, "--output", "new"], "test_cli.py' is a file"),
    "folder of prompts": (["generate", "FOLDER", "--input", "FOLDER"], "is a folder; write the prompts to a file .txt"),
    "unknown reward": (["generate", "FOLDER", "--prompt", "w1", "--weights", "kind=1"], "this model has: helpful"),
    "NaN": (["generate", "FOLDER", "--prompt", "w1", "--weights", "helpful=nan"], "cannot read the weight"),
    "infinity": (["score", "FOLDER", "--prompt", "w1", "--response", "w2", "--weights", "helpful=inf"], "NAME=NUMBER"),
    "no weight": (["chat", "FOLDER", "--weights", ""], "no weight in ''"),
    "missing input": (["generate", "FOLDER", "--input", "no.jsonl"], "cannot read no.jsonl"),
    "unknown ending": (
        ["generate", "FOLDER", "--input", "no.csv"],
        "no.csv is neither .txt nor .jsonl; write the prompts to a file .txt",
    ),
    "empty prompt": (["generate", "FOLDER", "--prompt", ""], "--prompt 1: the prompt is empty"),
    "empty prompt to score": (["score", "FOLDER", "--prompt", " ", "--response", "w1"], "the prompt is empty"),
    "empty response": (["score", "FOLDER", "--prompt", "w1", "--response", ""], "--response is empty"),
    "long response": (["score", "FOLDER", "--prompt", "w1", "--response", "w1 " * 200], "more than the 128 positions"),
    "score of a plain model": (["score", "PLAIN", "--prompt", "w1", "--response", "w1"], "is not a guided folder"),
    "weights of a plain model": (["generate", "PLAIN", "--prompt", "w1", "--weights", "a=1"], "is not a guided model"),
    "an adapter": (["generate", "ADAPTER", "--prompt", "w1"], "is a LoRA adapter, which is no model by itself"),
    "no config": (["generate", "EMPTY", "--prompt", "w1"], "has no config.json"),
    "temperature": (["generate", "FOLDER", "--prompt", "w1", "--temperature", "-1"], "it must be 0 (greedy) or more"),
    "NaN temperature": (["chat", "FOLDER", "--temperature", "nan"], "temperature is nan"),
    "top-p": (["chat", "FOLDER", "--top-p", "0"], "top_p is 0; it must be above 0 and at most 1"),
    "tokens": (["chat", "FOLDER", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "seed": (["generate", "FOLDER", "--prompt", "w1", "--seed", "-1"], "--seed is -1; it must be 0 or more"),
    "batch": (["generate", "FOLDER", "--prompt", "w1", "--batch-size", "0"], "--batch-size is 0"),
    "speculate": (
        ["generate", "FOLDER", "--prompt", "w1", "--speculate", "-1"],
        "speculate is -1; it must be at least 0",
    ),
    "draft": (["generate", "FOLDER", "--prompt", "w1", "--draft", "nosuch"], "there is no folder 'nosuch' here"),
    "context": (["chat", "FOLDER", "--context", "500"], "the context is 500 tokens; it must be from 2 to 128"),
    "samples": (
        ["generate", "FOLDER", "--prompt", "w1", "--num-samples", "2", "--temperature", "0"],
        "the same reply 2 times",
    ),
    "device": (["generate", "FOLDER", "--prompt", "w1", "--device", "gpu7"], "cannot use the device 'gpu7'"),
    "raw system": (["generate", "FOLDER", "--prompt", "w1", "--raw", "--system", "w2"], "--raw sends plain text"),
    "output is a folder": (
        ["generate", "FOLDER", "--prompt", "w1", "--max-new-tokens", "9", "--output", "EMPTY"],
        "is a folder; name a file in it",
    ),
    "page in no folder": (
        ["score", "FOLDER", "--prompt", "w1", "--response", "w2", "--html", "FILE/x.html"],
        "cannot write --html",
    ),
    "chat without a template": (["chat", "BARE"], "has no chat template"),
    "system without a template": (["generate", "BARE", "--prompt", "w1", "--system", "w"], "has no chat template"),
}


@pytest.fixture(scope="module")
def places(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    plain = folder.parent / "m0"
    tiny_lora(tiny_model(), root / "adapter", seed=1, base_path=str(plain))
    bare = save_member(tiny_model(), root / "bare")
    (bare / "chat_template.jinja").unlink()
    names = {"EMPTY": "empty", "FILE": "file", "ADAPTER": "adapter", "BARE": "bare"}
    return {"FOLDER": str(folder), "PLAIN": str(plain), **{key: str(root / name) for key, name in names.items()}}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line(places: dict[str, str], capsys: Any, case: str) -> None:
    arguments, message = MISTAKES[case]
    for name, path in places.items():
        arguments = [
            path + a.removeprefix(name) if a in (name, f"{name}/x.html", f"{name}/config.json") else a
            for a in arguments
        ]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith(f"genarm {arguments[0]}: error: ")
    assert captured.err.count("\n") == 1
    assert "genarm" not in captured.out
