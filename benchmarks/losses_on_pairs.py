"""What each loss of `genarm train` learns from real pairs: held-out reward and policy accuracy, and the sway of length.

    python benchmarks/losses_on_pairs.py --model MODEL --pairs hh-helpful=TRAIN.jsonl,TEST.jsonl --output DIR
    python benchmarks/losses_on_pairs.py --model MODEL --pairs … --output DIR --set lora=true --set bf16=true \
        --set learning_rate=5e-4 --through BASE --seeds 1
    python benchmarks/losses_on_pairs.py --output DIR --table

Every loss trains the same model on the same pairs with the same settings and seed. Then, of every held-out pair, with
plain forwards of transformers and peft: the reward of both responses (log π, less that of the start where the reward is
a difference), and how much the guided policy at weight 1 raises them over its base (log π_guided − log π_base), over
the model as it starts and, with --through, over that base. A row of `DIR/results.jsonl` has, of reward and policies,
accuracy with its 95% Wilson interval over all pairs and by which response is longer, and the correlation of margin and
difference in length; the margins themselves are in it, too. What is there already is not done again.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm import TrainConfig, train
from genarm.data.tokens import TokenPair
from genarm.model.vocabulary import align, read_vocabulary
from genarm.statistics import proportion
from genarm.training.data import load_pairs
from genarm.training.loading import load_tokenizer, resolve

UNTRAINED = "untrained"


def runs_of(through: str | None) -> dict[str, dict[str, Any]]:
    """The settings of each training, by its name."""
    found: dict[str, dict[str, Any]] = {
        "arm": {},
        "reference": {"loss": "reference"},
        "product, start model": {"loss": "product", "start": "model"},
    }
    if through is not None:
        found["product through the base"] = {"loss": "product", "through": through}
        found["product through the base, start model"] = {"loss": "product", "through": through, "start": "model"}
    return found


def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Float32 log-probs [T, V] before each token of the response."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1)
    return found


class Measured:
    """A trained model beside its start and the bases that it may guide."""

    def __init__(self, model: Any, start: Any, bases: dict[str, Any], unknown: dict[str, Tensor]) -> None:
        self.model, self.start, self.bases, self.unknown = model, start, bases, unknown

    def gains(self, pair: TokenPair, response: Sequence[int], *, zero: bool) -> dict[str, float]:
        """{"reward" or a base: what is said of the response}."""
        column = torch.tensor(response, device=self.model.device)[:, None]
        rho = log_probs(self.model, pair.prompt_ids, response)
        start = log_probs(self.start, pair.prompt_ids, response)
        rho = rho - start if zero else rho
        found = {"reward": rho.gather(-1, column).sum().item()}
        for name, base in self.bases.items():
            base_TV = start if base is self.start else log_probs(base, pair.prompt_ids, response)
            size = base_TV.shape[-1]
            added = rho[:, :size] if rho.shape[-1] >= size else torch.nn.functional.pad(rho, (0, size - rho.shape[-1]))
            total = base_TV + added
            if name in self.unknown:
                total = total.masked_fill(self.unknown[name].to(total.device), -torch.inf)
            guided = total.log_softmax(-1)
            found[name] = (guided.gather(-1, column) - base_TV.gather(-1, column)).sum().item()
        return found


@torch.no_grad()
def margins(measured: Measured, pairs: Sequence[TokenPair], *, zero: bool) -> dict[str, list[float]]:
    """{"reward" or a base: margin of every pair}."""
    found: dict[str, list[float]] = {}
    for pair in pairs:
        chosen, rejected = (measured.gains(pair, ids, zero=zero) for ids in (pair.chosen_ids, pair.rejected_ids))
        for name, value in chosen.items():
            found.setdefault(name, []).append(value - rejected[name])
    return found


def figures(margin: Sequence[float], differences: Sequence[int]) -> dict[str, Any]:
    """Accuracy by length with its interval, and the correlation of margin and difference in length."""
    margin_B, difference_B = np.array(margin), np.array(differences)
    groups = {
        "all": difference_B == difference_B,
        "chosen longer": difference_B > 0,
        "rejected longer": difference_B < 0,
    }
    found: dict[str, Any] = {}
    for name, group_B in groups.items():
        rate = proportion(int((margin_B[group_B] > 0).sum()), int(group_B.sum()))
        found[name] = {"accuracy": rate.rate, "low": rate.low, "high": rate.high, "n": rate.n}
    spread = margin_B.std() > 0 and difference_B.std() > 0
    found["correlation with length"] = float(np.corrcoef(margin_B, difference_B)[0, 1]) if spread else None
    found["mean margin"] = float(margin_B.mean())
    return found


def load(path: str, config: TrainConfig, **options: Any) -> Any:
    """A frozen model on the device of the training."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def trained_model(folder: Path, config: TrainConfig) -> Any:
    """What a training wrote, or the start itself."""
    if not config.adapter:
        return load(str(folder), config)
    from peft import PeftModel

    return PeftModel.from_pretrained(load(config.model, config), folder).eval()


def unknown_ids(base: str, config: TrainConfig, tokenizer: Any) -> Tensor | None:
    """Ids of the base that the model that is trained does not know."""
    from transformers import AutoConfig

    sizes = [int(AutoConfig.from_pretrained(name).get_text_config().vocab_size) for name in (base, config.model)]
    return align(
        read_vocabulary(AutoTokenizer.from_pretrained(base), size=sizes[0], label=base),
        read_vocabulary(tokenizer, size=sizes[1], label=config.model),
    ).mask()


def measure(model: Any, config: TrainConfig, through: str | None, *, zero: bool) -> dict[str, Any]:
    """The figures of one row."""
    tokenizer = load_tokenizer(config)
    pairs = load_pairs(config, tokenizer).held_out
    assert pairs is not None
    start = load(config.model, config)
    bases, unknown = {"its start": start}, {}
    if through is not None:
        bases[through] = load(through, config)
        mask = unknown_ids(through, config, tokenizer)
        unknown = {} if mask is None else {through: mask}
    found = margins(Measured(model, start, bases, unknown), pairs, zero=zero)
    differences = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs]
    return {
        "figures": {name: figures(values, differences) for name, values in found.items()},
        "margins": {name: [round(value, 4) for value in values] for name, values in found.items()},
        "differences": differences,
    }


def value_of(text: str) -> Any:
    """A value as TOML reads it, or else the text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def one_run(arguments: argparse.Namespace, name: str, data: str, files: str, seed: int) -> dict[str, Any]:
    """Train, if there is anything to train, and measure."""
    training, held_out = files.split(",")
    settings = dict(item.split("=", 1) for item in arguments.set)
    folder = arguments.output / "runs" / f"{data}-{name}-{seed}".replace(" ", "-").replace(",", "")
    loss = {} if name == UNTRAINED else runs_of(arguments.through)[name]
    config = TrainConfig(
        model=arguments.model,
        data=training,
        eval_data=held_out,
        output=folder,
        seed=seed,
        **{**{key: value_of(value) for key, value in settings.items()}, **loss},
    )
    begun = time.perf_counter()
    if name == UNTRAINED:
        config = resolve(config)
        model = load(config.model, config)
    else:
        train(config, resume=folder.exists(), console=Console(quiet=True))
        config = resolve(config)
        model = trained_model(folder, config)
    seconds = time.perf_counter() - begun
    row = measure(model, config, arguments.through, zero=config.start == "zero")
    del model
    gc.collect()
    if folder.exists() and not arguments.keep:
        shutil.rmtree(folder)
    return {"data": data, "loss": name, "seed": seed, "training seconds": round(seconds, 1), **row}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there; a line that was cut off is done again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: of each data set and loss, pooled over seeds."""
    lines = [
        "| data | loss | of | accuracy | chosen longer | rejected longer | r with length | seeds |",
        "|" + "---|" * 8,
    ]
    groups = dict.fromkeys((row["data"], row["loss"]) for row in rows)
    for data, loss in groups:
        own = [row for row in rows if (row["data"], row["loss"]) == (data, loss)]
        for what in own[0]["figures"]:
            cells = []
            for group in ("all", "chosen longer", "rejected longer"):
                parts = [row["figures"][what][group] for row in own]
                mean = float(np.mean([part["accuracy"] for part in parts]))
                # The same pairs under each seed: the interval is that of one seed's n.
                rate = proportion(round(mean * parts[0]["n"]), parts[0]["n"])
                cells.append(
                    f"{mean:.3f} [{rate.low:.3f}, {rate.high:.3f}] (n={rate.n})" if group == "all" else f"{mean:.2f}"
                )
            found = [row["figures"][what]["correlation with length"] for row in own]
            r = float(np.mean([value for value in found if value is not None] or [float("nan")]))
            label = "reward" if what == "reward" else f"policy on {Path(what).name}"
            lines.append(f"| {data} | {loss} | {label} | {' | '.join(cells)} | {r:+.2f} | {len(own)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the model that every ARM starts from")
    parser.add_argument("--pairs", action="append", default=[], metavar="NAME=TRAIN,TEST")
    parser.add_argument("--through", metavar="BASE", help="a larger base to train through, and to guide")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of genarm train")
    parser.add_argument("--losses", nargs="+", help="some of the losses alone")
    parser.add_argument("--keep", action="store_true", help="keep the trained weights")
    parser.add_argument("--table", action="store_true", help="print what is there, and train nothing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "results.jsonl"
    done = {(row["data"], row["loss"], row["seed"]) for row in read(results)}
    names = [UNTRAINED, *runs_of(arguments.through)]
    for seed in range(0 if arguments.table else arguments.seeds):
        for data, files in (item.split("=", 1) for item in arguments.pairs):
            for name in names:
                skipped = (seed and name == UNTRAINED) or (arguments.losses and name not in arguments.losses)
                if (data, name, seed) in done or skipped:
                    continue
                row = one_run(arguments, name, data, files, seed)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{data}, {name}, seed {seed}: {json.dumps(row['figures'])}", flush=True)
    print("\n".join(table(read(results))))


if __name__ == "__main__":
    main()
