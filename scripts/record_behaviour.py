"""Write down what genarm does, small: a change that shall change nothing is one after which the record is the same.

    python scripts/record_behaviour.py FOLDER               # before
    python scripts/record_behaviour.py OTHER --check FOLDER # after: says what differs, and fails if anything does

Tiny seeded models decode with the engine and with transformers' `generate`, the server answers requests, a tiny recipe
trains and compares, and every command's help is kept. Times, random names, places and digests of
what lies in them are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "NO_COLOR": "1"}

_TIMED = re.compile(r"second|speed|slowest|fastest|runtime|per_sec|created|duration|^(date|machine|versions|command)$")
_RANDOM = re.compile(r"((?:chatcmpl|cmpl|req)-)[0-9A-Za-z]+|(\\?\"settings\\?\": \\?\")[0-9a-f]{16}")


def main() -> int:
    """Record; returns 1 where the record is not the one to compare with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the record goes; it must not be there yet")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="an earlier record to compare with")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    import torch

    torch.set_num_threads(1)
    for what in (helps, decoding, answers, commands, comparison):
        with tempfile.TemporaryDirectory() as place:
            for name, found in what(Path(place)).items():
                text = found if isinstance(found, str) else json.dumps(tidy(found), indent=1, ensure_ascii=False)
                text = _RANDOM.sub(r"\1\2…", text.replace(place, "PLACE").replace(str(ROOT), "ROOT"))
                (arguments.folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")
        print(f"recorded {what.__name__}", flush=True)
    return compare(arguments.check, arguments.folder) if arguments.check else 0


def compare(before: Path, after: Path) -> int:
    """Print what differs between two records; returns 1 where anything does."""
    differs = False
    for name in sorted({path.name for folder in (before, after) for path in folder.iterdir()}):
        lines = [
            (f / name).read_text(encoding="utf-8").splitlines() if (f / name).exists() else [] for f in (before, after)
        ]
        found = list(difflib.unified_diff(*lines, f"before/{name}", f"after/{name}", lineterm="", n=1))
        differs = differs or bool(found)
        print(*found, sep="\n", end="\n" if found else "")
    print("the records differ" if differs else "the records are the same")
    return int(differs)


def tidy(value: Any) -> Any:
    """`value` with floats to six digits, and without times and random names."""
    if isinstance(value, Mapping):
        return {name: "…" if _TIMED.search(name) else tidy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- what is recorded -------------------------------------------------------------------------------------------


def helps(_: Path) -> dict[str, Any]:
    """The help of every command."""
    import command_docs

    return {"help.txt": command_docs.render()}


def decoding(_: Path) -> dict[str, Any]:
    """Greedy and seeded replies of a base with two rewards, by the engine and by `generate`."""
    import torch

    from builders.serving import TOKENIZER, guided_model
    from genarm.engine import Engine, EngineOptions, Request
    from genarm.sampling import Sampling

    prompts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
    weights: list[dict[str, float]] = [{}, {"helpful": 2.0, "harmless": -0.5}, {"helpful": 0.0, "harmless": 0.0}]
    drawn = {
        "greedy": Sampling(max_new_tokens=12, temperature=0),
        "drawn": Sampling(max_new_tokens=12),
        "cut": Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.2),
    }
    found: dict[str, Any] = {}
    for speculate in (0, 3):
        options = EngineOptions(streams=4, context=128, speculate=speculate, adapt=False)
        with Engine(guided_model(), TOKENIZER, options) as engine:
            found[f"speculate {speculate}"] = {
                name: [
                    dict(vars(completion), tokens=[vars(token) for token in completion.tokens])
                    for completion in engine.generate(
                        [
                            Request(prompt=prompt, weights=row, sampling=sampling, seed=seed, top_log_probs=2)
                            for seed, (prompt, row) in enumerate(zip(prompts, weights, strict=True))
                        ]
                    )
                ]
                for name, sampling in drawn.items()
            }
    model = guided_model()
    generated: dict[str, Any] = {}
    inputs = TOKENIZER(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    for name, options_ in {"greedy": {"do_sample": False}, "drawn": {"do_sample": True, "top_k": 0}}.items():
        for label, row in {"defaults": None, "given": {"helpful": 2.0, "harmless": -0.5}}.items():
            torch.manual_seed(7)
            ids = model.generate(**inputs, max_new_tokens=12, reward_weights=row, pad_token_id=0, **options_)
            generated[f"{name}, {label}"] = ids.tolist()
    return {"engine.json": found, "generate.json": generated}


_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 8, "seed": 5}
_TEXT = {"model": "tiny", "prompt": "w3 w4", "max_tokens": 6, "seed": 3}
_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", _CHAT),
    "chat, greedy": ("chat/completions", _CHAT | {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
    "chat, two": ("chat/completions", _CHAT | {"n": 2, "reward_weights": {"helpful": 2}}),
    "chat, preset": ("chat/completions", _CHAT | {"model": "tiny:cautious"}),
    "chat, rewards": ("chat/completions", _CHAT | {"return_rewards": True}),
    "chat, streamed": ("chat/completions", _CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
    "text": ("completions", _TEXT | {"logprobs": 2}),
    "text, echo": ("completions", _TEXT | {"echo": True, "logprobs": 1, "max_tokens": 0}),
    "text, several": ("completions", _TEXT | {"prompt": ["w1", "w2 w3"], "stop": ["w7"]}),
    "no such model": ("chat/completions", _CHAT | {"model": "other"}),
    "no such reward": ("chat/completions", _CHAT | {"reward_weights": {"kind": 1}}),
    "no such field": ("chat/completions", _CHAT | {"temprature": 1}),
    "too hot": ("chat/completions", _CHAT | {"temperature": 3}),
    "no messages": ("chat/completions", {"model": "tiny"}),
    "too long": ("completions", _TEXT | {"max_tokens": 1000}),
}


def answers(_: Path) -> dict[str, Any]:
    """What the server answers, and its document."""
    from builders.serving import running

    found: dict[str, Any] = {}
    with running() as server, server.http() as client:
        for path in ("v1/models", "v1/models/tiny", "v1/rewards", "health", "ready"):
            found[path] = client.get(f"/{path}").json()
        for name, (path, body) in _REQUESTS.items():
            reply = client.post(f"/v1/{path}", json=body)
            if body.get("stream"):
                lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
                found[name] = [line if line == "[DONE]" else json.loads(line) for line in lines]
            else:
                found[name] = {"status": reply.status_code, "body": reply.json()}
        counts = [re.sub(r"[ {].*", "", line) for line in client.get("/metrics").text.splitlines() if line[:1] != "#"]
        document = client.get("/openapi.json").json()
    return {"server.json": found, "metrics.json": list(dict.fromkeys(counts)), "openapi.json": document}


def commands(place: Path) -> dict[str, Any]:
    """What commands print that use a model, and a training of an ARM."""
    from builders.tiny import save_member, tiny_lora, tiny_model
    from genarm.cli.main import main as genarm

    base = save_member(tiny_model(seed=0), place / "base")
    full = save_member(tiny_model(seed=1), place / "full")
    lora = tiny_lora(tiny_model(seed=0), place / "lora", seed=2, base_path=str(base))
    pairs = place / "pairs.jsonl"
    with pairs.open("w") as file:
        for i in range(24):
            good, bad = (
                " ".join(f"w{(7 * i + j) % 10 + start}" for j in range(1 + (i + start) % 3)) for start in (0, 10)
            )
            ask = {"role": "user", "content": f"w{20 + i % 20}"}
            print(
                json.dumps(
                    {
                        "prompt": [ask],
                        "chosen": [{"role": "assistant", "content": good}],
                        "rejected": [{"role": "assistant", "content": bad}],
                    }
                ),
                file=file,
            )
    guided, train = str(place / "guided"), ["train", "--model", str(base), "--data", str(pairs), "--batch-size", "4"]
    rewards = ["--reward", f"full={full}", "--reward", f"lora={lora}"]
    lines: dict[str, list[str]] = {
        "compose": ["compose", "--base", str(base), *rewards, "--output", guided],
        "generate": ["generate", guided, "--prompt", "w1 w2", "--prompt", "w3", "--max-new-tokens", "8", "--json"],
        "generate weighted": [
            "generate",
            guided,
            "--prompt",
            "w1",
            "--max-new-tokens",
            "8",
            "--weights",
            "full=0,lora=2",
        ],
        "generate wrong": ["generate", guided, "--prompt", "w1", "--weights", "helpful=1"],
        "score": ["score", guided, "--prompt", "w1 w2", "--response", "w3 w4", "--json"],
        "accuracy": ["accuracy", str(full), guided, "--data", str(pairs)],
        "train": [*train, "--output", str(place / "arm"), "--epochs", "2", "--eval-fraction", "0.2"],
        "train lora": [*train, "--output", str(place / "adapter"), "--lora", "--max-steps", "3"],
    }
    found = {name: said(genarm, words) for name, words in lines.items()}
    losses = {
        name: [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("arm", "adapter")
    }
    files = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
    return {"commands.json": found, "losses.json": losses, "files.json": files}


def said(genarm: Callable[[list[str]], int], words: list[str]) -> dict[str, Any]:
    """Exit code and output of a command, without what depends on the time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = genarm(words)
        except SystemExit as end:  # a command line that the parser refuses
            code = int(end.code or 0)
    lines = [line for line in out.getvalue().splitlines() if not re.search(r"tokens/s|\d:\d\d", line)]
    return {"code": code, "out": lines, "err": err.getvalue().splitlines()}


def comparison(place: Path) -> dict[str, Any]:
    """A whole comparison: worlds, trainings of every kind, methods, judges, figures."""
    from rich.console import Console

    from builders.shrunk import shrunk
    from genarm.lab.evaluation.run import RunOptions, evaluate

    recipe = shrunk(ROOT / "recipes" / "pku-pareto.toml", place / "recipe.toml")
    run = place / "run"
    evaluate(recipe, RunOptions(output=run, command="genarm eval", device="cpu"), Console(quiet=True))
    results = json.loads((run / "results.json").read_text())
    replies = {
        path.stem: [{k: v for k, v in json.loads(line).items() if k != "settings"} for line in path.open()]
        for path in sorted((run / "answers").glob("*.jsonl"))
    }
    losses = {
        path.parent.name: [json.loads(line) for line in path.open()]
        for path in sorted((run / "train").glob("*/metrics.jsonl"))
    }
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and "checkpoint" not in str(p))
    return {"results.json": results, "replies.json": replies, "trained.json": losses, "run-files.json": files}


if __name__ == "__main__":
    sys.exit(main())
