"""Make a smaller sibling of a model: some of its layers, evenly spread, taught by the whole for some minutes.

    python scripts/sibling.py MODEL DIR --layers 12 --data PAIRS --minutes 20

For experiments in which a small ARM guides a larger model with the same tokenizer, where no small one is to be had. The
first and the last layer stay, and the embeddings. What it learns from is the text of preference pairs, prompt and
response, in the model's chat format; the loss is KL(whole ‖ sibling) of each next token of a response. The last line
says the mean divergence before and after, on texts that it has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from genarm.data.preferences import load_preferences
from genarm.errors import GenarmError
from genarm.files import new_folder
from genarm.model.references import find_device
from genarm.text.prompts import encode_pair

HELD_OUT = 32
"""Texts that measure it."""


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the whole model: a hub id or a folder")
    parser.add_argument("output", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--layers", type=int, default=12, help="that stay (default 12)")
    parser.add_argument("--data", required=True, help="preference pairs, as genarm train takes them")
    parser.add_argument("--minutes", type=float, default=20.0, help="of learning (default 20)")
    parser.add_argument("--tokens", type=int, default=192, help="of a text, at most (default 192)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, …; by default the first GPU, if any")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    try:
        device = torch.device(find_device(given.device))
    except (GenarmError, RuntimeError) as error:
        parser.error(f"--device: {error}")
    whole = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval().requires_grad_(False)
    sibling = keep_layers(whole, AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), given.layers)
    whole, sibling = whole.to(device), sibling.to(device)
    texts = read_texts(given.data, tokenizer, given.tokens)
    random.Random(given.seed).shuffle(texts)
    held_out, rest = texts[:HELD_OUT], texts[HELD_OUT:]
    if not rest:
        parser.error(f"{given.data} has {len(texts)} texts of at most {given.tokens} tokens; {HELD_OUT + 1} are needed")
    before = measure(whole, sibling, held_out)
    steps = learn(whole, sibling, rest, seconds=60 * given.minutes, learning_rate=given.learning_rate)
    after = measure(whole, sibling, held_out)
    with new_folder(given.output) as new:
        sibling.save_pretrained(new)
        tokenizer.save_pretrained(new)
    size = sum(p.numel() for p in sibling.parameters()) / sum(p.numel() for p in whole.parameters())
    print(
        f"wrote {given.output}: {given.layers} of {whole.config.num_hidden_layers} layers, {size:.0%} of the "
        f"parameters; {steps} steps; KL(whole ‖ sibling) per token {before:.3f} before, {after:.3f} after "
        f"(n={HELD_OUT} texts)"
    )


def keep_layers(whole: PreTrainedModel, copy: PreTrainedModel, layers: int) -> PreTrainedModel:
    """`copy` with `layers` of its layers, the first and the last among them."""
    total = whole.config.num_hidden_layers
    if not 2 <= layers < total:
        raise SystemExit(f"--layers is {layers}; the model has {total}, and a sibling from 2 to {total - 1}")
    kept = [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
    inner = copy.base_model
    inner.layers = nn.ModuleList(inner.layers[i] for i in kept)
    for number, layer in enumerate(inner.layers):  # where its keys and values are in a cache
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    copy.config.num_hidden_layers = layers
    if getattr(copy.config, "layer_types", None):
        copy.config.layer_types = [copy.config.layer_types[i] for i in kept]
    return copy


def read_texts(data: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[tuple[list[int], int]]:
    """(ids, where the response begins) of each response of pairs that is short enough."""
    found = []
    for pair in load_preferences(data, chat=bool(tokenizer.chat_template)).pairs:
        for response in (pair.chosen, pair.rejected):
            prompt, said = encode_pair(tokenizer, pair.prompt, response)
            if said and len(prompt) + len(said) <= longest:
                found.append(([*prompt, *said], len(prompt)))
    return found


def divergence(whole: PreTrainedModel, sibling: PreTrainedModel, text: tuple[Sequence[int], int]) -> Tensor:
    """KL(whole ‖ sibling) [T] of the tokens of a response."""
    ids, begin = text
    row = torch.tensor([ids], device=whole.device)
    with torch.no_grad():
        p = whole(row, use_cache=False).logits[0, begin - 1 : -1].float().log_softmax(-1)
    q = sibling(row, use_cache=False).logits[0, begin - 1 : -1].float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def measure(whole: PreTrainedModel, sibling: PreTrainedModel, texts: Sequence[tuple[list[int], int]]) -> float:
    """Mean divergence per token."""
    sibling.eval()
    return float(torch.cat([divergence(whole, sibling, text) for text in texts]).mean())


def learn(
    whole: PreTrainedModel,
    sibling: PreTrainedModel,
    texts: Sequence[tuple[list[int], int]],
    *,
    seconds: float,
    learning_rate: float,
    batch: int = 8,
) -> int:
    """Train all weights for so long; the rate falls to 0 on the way. Returns the steps taken."""
    sibling.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(sibling.parameters(), lr=learning_rate, weight_decay=0.0)
    begun, steps = time.monotonic(), 0
    endless: Iterator[tuple[list[int], int]] = itertools.cycle(texts)
    while (passed := (time.monotonic() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (steps + 1) / 10) * (1 - passed)
        part = list(itertools.islice(endless, batch))
        count = sum(len(ids) - begin for ids, begin in part)
        total = 0.0
        for text in part:
            loss = divergence(whole, sibling, text).sum() / count
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(sibling.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 10 == 0:
            print(f"{passed:.0%}: step {steps}, KL per token {total:.3f}", flush=True)
    return steps


if __name__ == "__main__":
    main()
