"""The invented models as folders that vLLM opens: a base, and guided folders around it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from genarm.lab.bench import figures
from genarm.lab.bench.agreement import WEIGHT
from genarm.lab.bench.models import random_adapters, random_model, word_tokenizer
from genarm.lab.bench.shapes import Shape, ShapePair
from genarm.model.compose import compose


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one contestant opens.

    Attributes:
        folder: a model or a guided folder.
        members: the shapes of those that keep keys and values.
    """

    folder: Path
    members: tuple[Shape, ...]

    def cache_bytes(self, positions: int, itemsize: int) -> int:
        """Keys and values of so many positions."""
        return positions * itemsize * sum(2 * shape.hidden * shape.layers for shape in self.members)


def write_entries(shapes: ShapePair, *, dtype: torch.dtype, seed: int, root: Path) -> dict[str, Entry]:
    """{contestant: what it opens}, all of them with one base, in `root`."""
    base = random_model(shapes.base, dtype=dtype, device="cpu", seed=seed)
    models = {"base": base, "full": random_model(shapes.arm, dtype=dtype, device="cpu", seed=seed + 1)}
    tokenizer = word_tokenizer(shapes.base.vocabulary)
    for name, model in models.items():
        _save(model, root / name)
        tokenizer.save_pretrained(root / name)
    loras = random_adapters(copy.deepcopy(base), ("one", "two"), seed=seed)
    heads = random_adapters(copy.deepcopy(base), ("head",), seed=seed, heads=True)
    for name, adapter in {**loras, **heads}.items():
        adapter.peft_config[name].base_model_name_or_path = str(root / "base")
        # Into a folder of the adapter's name, without the output layer, which peft writes beside an adapter of it.
        adapter.save_pretrained(str(root), selected_adapters=[name], save_embedding_layers=False)
    _save(_merged(base, seed), root / "merged")
    tokenizer.save_pretrained(root / "merged")
    guided: Mapping[str, tuple[tuple[str, ...], tuple[Shape, ...]]] = {
        figures.VLLM_FULL: (("full",), (shapes.arm,)),
        figures.VLLM_LORA: (("one",), (shapes.base,)),
        figures.VLLM_TWO_LORAS: (("one", "two"), (shapes.base, shapes.base)),
        figures.VLLM_MERGED: (("merged",), (shapes.base,)),
        figures.VLLM_HEAD: (("head",), ()),
    }
    entries = {figures.VLLM_PLAIN: Entry(folder=root / "base", members=(shapes.base,))}
    for number, (contestant, (rewards, members)) in enumerate(guided.items()):
        folder = root / f"guided-{number}"
        weights = dict.fromkeys(rewards, WEIGHT)
        own = {reward: root / reward for reward in rewards}
        # A head ARM is a difference to the base, as `genarm train --head` makes it by default.
        given, tuned = ({}, own) if contestant == figures.VLLM_HEAD else (own, {})
        compose(root / "base", given, folder, tuned=tuned, weights=weights)
        entries[contestant] = Entry(folder=folder, members=(shapes.base, *members))
    return entries


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.generation_config.do_sample = False
    model.save_pretrained(folder)


@torch.no_grad()
def _merged(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The first LoRA ARM as a whole model."""
    (adapter,) = random_adapters(copy.deepcopy(base), ("one",), seed=seed).values()
    merged: PreTrainedModel = adapter.merge_and_unload()
    return merged
