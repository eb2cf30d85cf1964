"""Real preferences, small real language models: train ARMs, guide a larger base, write down what came out.

    python benchmarks/real_small_models.py --output /tmp/real

Needs ../shared (its models and data never become part of the project). From the 1.3M-parameter lm-small a helpful
ARM (hh-helpful) and two harmless ARMs (hh-harmless, pku-safer) are trained with the code users call; the helpful and
the pku-safer ARM guide the 5.7M-parameter lm-medium. Held-out accuracies, sample texts and tokens/s go to
OUTPUT/report.md. A second run reuses what is finished.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from genarm import TrainConfig, compose, train
from genarm.text.prompts import encode_prompt

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
SETS = {"helpful": "hh-helpful", "harmless": "hh-harmless", "safer": "pku-safer"}
SETTINGS = {"base": (0.0, 0.0), "helpful": (1.0, 0.0), "safer": (0.0, 1.0), "both": (1.0, 1.0)}
NEW_TOKENS = 48


def train_all(output: Path) -> dict[str, dict[str, float]]:
    """Train one ARM per preference set; {name: metrics}."""
    metrics = {}
    for name, data in SETS.items():
        config = TrainConfig(
            model=str(SHARED / "models" / "lm-small"),
            data=str(SHARED / "data" / data / "train.jsonl"),
            eval_data=str(SHARED / "data" / data / "test.jsonl"),
            output=output / name,
            beta=0.05,
            epochs=2,
            learning_rate=1e-3,
            batch_size=8,
            accumulation=2,
            max_prompt_tokens=192,
            max_response_tokens=192,
        )
        metrics[name] = train(config, resume=config.output.exists()).metrics
    return metrics


def prompts(n: int) -> list[list[dict[str, str]]]:
    """The first `n` held-out prompts of hh-harmless that are a single question."""
    with (SHARED / "data" / "hh-harmless" / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line)["prompt"] for line in lines]
    return [row for row in rows if len(row) == 1][:n]


def sample(folder: Path, n: int) -> list[dict[str, str]]:
    """Answers to the same prompts under every setting, sampled at temperature 1 from one seed."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt in prompts(n):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)] * len(SETTINGS))
        torch.manual_seed(0)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            reward_weights=torch.tensor(list(SETTINGS.values())),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": prompt[0]["content"], **dict(zip(SETTINGS, texts, strict=True))})
    return rows


def speed(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Tokens/s of greedy decoding at batch 1, settings interleaved; {setting: one figure per repeat}."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([encode_prompt(tokenizer, prompts(1)[0])])
    figures: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for repeat in range(repeats + 1):
        for name, weights in SETTINGS.items():
            began = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                reward_weights=torch.tensor([weights]),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
            )
            if repeat:  # the first round warms up
                figures[name].append(NEW_TOKENS / (time.perf_counter() - began))
    return figures


def report(metrics: dict[str, dict[str, float]], samples: list[dict[str, str]], speeds: dict[str, list[float]]) -> str:
    """Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    lines = [
        f"Date {datetime.date.today()}, commit {commit.strip()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}.",
        f"Command: `python benchmarks/real_small_models.py {' '.join(sys.argv[1:])}`.",
        "",
        "```json",
        json.dumps(metrics, indent=1),
        "```",
        "",
        "| setting | tokens/s, median (min to max) |",
        "|---|---|",
        *(f"| {k} | {statistics.median(v):.0f} ({min(v):.0f} to {max(v):.0f}) |" for k, v in speeds.items()),
        "",
    ]
    for row in samples:
        lines += [f"- **{row['prompt'].strip()}**", *(f"  - {name}: {row[name].strip()}" for name in SETTINGS)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the ARMs and report.md")
    parser.add_argument("--samples", type=int, default=4, help="prompts to answer (default 4)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    metrics = train_all(options.output)
    guided = options.output / "guided"
    if not guided.exists():
        rewards = {"helpful": options.output / "helpful", "safer": options.output / "safer"}
        compose(SHARED / "models" / "lm-medium", rewards, guided)
    text = report(metrics, sample(guided, options.samples), speed(guided, options.repeats))
    (options.output / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
