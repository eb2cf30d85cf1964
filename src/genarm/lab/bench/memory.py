"""What an engine with two LoRA ARMs holds, over its base alone."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from genarm.engine import Engine, EngineOptions, Request
from genarm.lab.bench.models import random_adapters, random_model, weight_bytes, word_tokenizer
from genarm.lab.bench.shapes import Shape
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of the base's weights, and of all that the engine holds but the KV cache: base, ARMs, tables."""

    base: int
    engine: int


def weigh(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> Weights:
    """Build an engine with two LoRA ARMs, let it reply once and count what has come to stay."""
    before = tensor_bytes()
    base = random_model(shape, dtype=dtype, device=device, seed=seed)
    weights = weight_bytes(base)
    model = GuidedForCausalLM.from_members(base, random_adapters(base, ("one", "two"), seed=seed))
    with Engine(model, word_tokenizer(shape.vocabulary), EngineOptions(streams=1, context=64)) as engine:
        engine.generate([Request(prompt=[1, 2, 3], sampling=Sampling(max_new_tokens=4), ignore_eos=True)])
        held = tensor_bytes() - before - engine.statistics().cache_bytes
    return Weights(base=weights, engine=held)


def tensor_bytes() -> int:
    """Memory of all tensors that Python knows of; views and shared weights count once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {
        (str(tensor.device), tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.layout == torch.strided and tensor.device.type != "meta"
    }
    packed = sum(tensor.nbytes for tensor in tensors if tensor.layout != torch.strided)
    return sum(storages.values()) + packed
