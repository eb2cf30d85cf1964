"""Where and how the engine computes: decided here, once, and said.

CUDA: the checkpoint's dtype, decode steps as CUDA graphs where nothing forbids them. CPU: float32 stays float32; half
precision runs in bfloat16 where the processor has instructions for it, and otherwise in float32, which is then faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

_HALVES = (torch.bfloat16, torch.float16)
_LAYER_COST = {"cpu": 4e6, "cuda": 1.7e8}
"""What a layer costs besides reading its weights, as a number of weights that could be read in that time. On an H200 a
layer's small kernels take 80 µs."""
_DRAFT_COST = {"cpu": 0.0, "cuda": 8e9}
"""What drafting a token costs besides its forward: a dozen launches, and waiting for the token; 4 ms on an H200."""


@dataclass(frozen=True, kw_only=True)
class DevicePath:
    """How one model runs.

    Attributes:
        graphs: nothing speaks against decode steps as CUDA graphs, but for what the model does in them.
        why: the decision in words.
    """

    graphs: bool
    why: str


def settle(model: PreTrainedModel) -> DevicePath:
    """Decide how `model` runs, and convert it where the decision says so."""
    device = input_device(model)
    dtype: torch.dtype = model.dtype
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    quantized = getattr(model, "hf_quantizer", None) is not None
    if device.type != "cpu":
        graphs = device.type == "cuda" and not spread and not quantized
        reason = " (spread over devices)" if spread else " (quantized)" if quantized else ""
        return DevicePath(graphs=graphs, why=f"{device.type}, {_name(dtype)}{reason}")
    if dtype not in _HALVES or quantized:
        return DevicePath(graphs=False, why=f"cpu, {_name(dtype)}")
    wanted = torch.bfloat16 if has_bfloat16() else torch.float32
    why = "fast on this processor" if has_bfloat16() else "as this processor has no fast bfloat16"
    torch.nn.Module.to(model, wanted)
    return DevicePath(graphs=False, why=f"cpu, {_name(wanted)} ({why})")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device


def launches_count(device: torch.device) -> bool:
    """Whether a step's time goes by its launches as much as by what they read: on a GPU, at few rows."""
    return device.type != "cpu"


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(has and "bf16" in name for name, has in torch.cpu.get_capabilities().items())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # an older torch


def cost(model: PreTrainedModel) -> float:
    """What one forward of one token costs, as a number of weights to read; for comparing models on one device."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    read = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    if head is None or head.weight is not embedding.weight:
        read -= embedding.weight.numel()  # of which a token reads one row
    layers = int(model.config.get_text_config().num_hidden_layers)
    return float(read) + layers * _LAYER_COST.get(input_device(model).type, _LAYER_COST["cuda"])


def draft_cost(model: PreTrainedModel) -> float:
    """What drafting one token with `model` costs besides its forward, likewise."""
    return _DRAFT_COST.get(input_device(model).type, _DRAFT_COST["cuda"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
