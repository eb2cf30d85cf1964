"""The main job on real input: two ARMs on human preferences, for a real chat model, from pairs to answers.

    scripts/real-model .real-model
    python benchmarks/real_chat_model.py .real-model --output /tmp/chat

Needs ../shared/data (which never becomes part of the project). A helpful ARM (hh-helpful) and a safer ARM (pku-safer),
LoRA on the model itself, are trained with `genarm train` from the first 1,024 pairs that are short enough to train on
two cores within an hour or two; `genarm accuracy` measures them on held-out pairs, `genarm compose` puts them on the
model, and `genarm generate` answers twenty held-out prompts under four settings of the weights. Costs, figures, answers
and tokens/s go to OUTPUT/report.md. A second run reuses what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from genarm.engine import Engine, EngineOptions, Request
from genarm.sampling import Sampling
from genarm.text.prompts import encode_pair

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"helpful": ("hh-helpful", 224), "safer": ("pku-safer", 112)}
"""{ARM: (pairs, the most tokens of a prompt and its longer response)}."""
PAIRS = 1024
HELD_OUT = 250
SETTINGS = {
    "base": {"helpful": 0.0, "safer": 0.0},
    "helpful": {"helpful": 1.0, "safer": 0.0},
    "safer": {"helpful": 0.0, "safer": 1.0},
    "both": {"helpful": 1.0, "safer": 1.0},
}
TRAINING = ["--lora", "--eval-fraction", "0", "--batch-size", "2", "--accumulation", "8", "--save-steps", "8"]
ANSWERS = ["--temperature", "0.7", "--max-new-tokens", "96", "--seed", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder that scripts/real-model has written")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    lines = [select_and_train(options.model, output), compose(options.model, output), accuracy(options.model, output)]
    lines += [speed(output / "guided", options.rounds), answers(output)]
    (output / "report.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print("\n\n".join(lines))


def genarm(*words: str | Path) -> dict[str, float]:
    """Run a command; its seconds, processor seconds and peak memory in MiB."""
    command = [sys.executable, "-m", "genarm", *map(str, words)]
    print(f"$ genarm {shlex.join(command[3:])}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the command failed: {shlex.join(command)}")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - began, "processor": processor, "memory": usage.ru_maxrss / 1024}


def select_and_train(model: Path, output: Path) -> str:
    """An ARM for each set; a table of what that took."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = ["| ARM | pairs | tokens | seconds | processor seconds | peak memory |", "|---|---|---|---|---|---|"]
    for name, (data, longest) in SETS.items():
        pairs = output / f"{name}.jsonl"
        if not pairs.exists():
            chosen = [line for line in read(DATA / data / "train.jsonl") if size(tokenizer, line) <= longest][:PAIRS]
            pairs.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        costs = output / f"{name}-costs.json"
        if not costs.exists():
            resume = ["--resume"] if (output / name).exists() else []
            found = genarm("train", "--model", model, "--data", pairs, *TRAINING, "--output", output / name, *resume)
            costs.write_text(json.dumps(found), encoding="utf-8")
        cost = json.loads(costs.read_text(encoding="utf-8"))
        tokens = sum(size(tokenizer, row, whole=True) for row in read(pairs))
        figures = [f"{cost[key]:,.0f}" for key in ("seconds", "processor", "memory")]
        table.append(f"| {name} | {len(read(pairs)):,} | {tokens:,} | {figures[0]} | {figures[1]} | {figures[2]} MiB |")
    return "\n".join(table)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def size(tokenizer: Any, row: Mapping[str, Any], *, whole: bool = False) -> int:
    """Tokens of a pair's prompt and longer response, or of all that is run."""
    sides = [encode_pair(tokenizer, row["prompt"], row[side][0]["content"]) for side in ("chosen", "rejected")]
    lengths = [len(prompt) + len(response) for prompt, response in sides]
    return sum(lengths) if whole else max(lengths)


def compose(model: Path, output: Path) -> str:
    """The guided folder."""
    if not (output / "guided").exists():
        rewards = [f"--reward={name}={output / name}" for name in SETS]
        genarm("compose", "--base", model, *rewards, "--output", output / "guided")
    return f"Commands: `genarm train --model MODEL --data PAIRS {shlex.join(TRAINING)}`, then `genarm compose`."


def accuracy(model: Path, output: Path) -> str:
    """Held-out accuracy of both ARMs, by length, beside the model that they started from."""
    table = ["| ARM | pairs | scored by | all | chosen longer | rejected longer | margin and length |", "|---|" * 7]
    table[1] = "|---|---|---|---|---|---|---|"
    for name, (data, _) in SETS.items():
        result = output / f"{name}-accuracy.json"
        if not result.exists():
            held_out = ["--data", DATA / data / "test.jsonl", "--split", f"train[:{HELD_OUT}]", "--base", model]
            genarm("accuracy", output / name, model, *held_out, "--dtype", "float32", "--output", result)
        for found in json.loads(result.read_text(encoding="utf-8"))["models"]:
            figures = found["figures"]
            groups = [figures["overall"], *(figures["lengths"][key] for key in ("chosen longer", "rejected longer"))]
            cells = [rate(group["right"]) for group in groups]
            length = figures["length_correlation"]
            cells.append(
                "–" if length is None else f"{length['value']:+.2f} [{length['low']:+.2f}, {length['high']:+.2f}]"
            )
            table.append(f"| {name} | {data} | {found['name']} | {' | '.join(cells)} |")
    return "\n".join(table)


def rate(found: Mapping[str, float]) -> str:
    return f"{found['rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}] (n={found['n']:.0f})"


def answers(output: Path) -> str:
    """Twenty prompts, ten of each set's held-out half at equal distances, answered under every setting."""
    prompts = output / "prompts.jsonl"
    if not prompts.exists():
        rows = [read(DATA / data / "test.jsonl") for data, _ in SETS.values()]
        picked = [row["prompt"] for of in rows for row in of[:: len(of) // 10][:10]]
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in picked), encoding="utf-8")
    for name, weights in SETTINGS.items():
        file = output / f"answers-{name}.jsonl"
        given = ",".join(f"{reward}={weight:g}" for reward, weight in weights.items())
        genarm("generate", output / "guided", "--input", prompts, "--weights", given, *ANSWERS, "--output", file)
    columns = {name: read(output / f"answers-{name}.jsonl") for name in SETTINGS}
    text = []
    for i, row in enumerate(read(prompts)):
        text.append(f"{i + 1}. **{' / '.join(turn['content'].strip() for turn in row['prompt'])}**")
        text += [f"   - {name}: {' '.join(rows[i]['response'].split())}" for name, rows in columns.items()]
    return "\n".join(text)


def speed(folder: Path, rounds: int) -> str:
    """Tokens/s of the engine under every setting, at 1 and 8 streams, in turns."""
    chat = [{"role": "user", "content": "Tell me about the sea."}]
    sampling = Sampling(max_new_tokens=48, temperature=0)
    figures: dict[tuple[str, int], list[float]] = {}
    with Engine.from_pretrained(folder, EngineOptions(streams=8, context=256)) as engine:
        for round_ in range(rounds + 1):
            for streams in (1, 8):
                for name, weights in SETTINGS.items():
                    request = Request(prompt=chat, weights=weights, sampling=sampling, ignore_eos=True)
                    began = time.perf_counter()
                    engine.generate([request] * streams)
                    if round_:  # the first round warms up
                        rate = streams * sampling.max_new_tokens / (time.perf_counter() - began)
                        figures.setdefault((name, streams), []).append(rate)
    table = ["| setting | streams | tokens/s | time per token over the base's |", "|---|---|---|---|"]
    for (name, streams), found in figures.items():
        ratios = [base / own for base, own in zip(figures["base", streams], found, strict=True)]
        table.append(f"| {name} | {streams} | {spread(found, '.1f')} | {spread(ratios, '.2f')} |")
    return "\n".join(table)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


if __name__ == "__main__":
    main()
