"""The output layer of a model, and whether its logits are what that layer says of the last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genarm.model.adapters import running

_TOKENS = 4
_NEAR = 1e-4
"""How far the layer's own logits may be from the model's, as a share of the largest; they are the same product."""


def output_layer(model: PreTrainedModel) -> Any:
    """What makes logits of hidden states; None where the model does not say."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


@torch.inference_mode()
def logit_scale(model: PreTrainedModel) -> float | None:
    """By what the plain model multiplies what its output layer says, which for most models is 1.

    None where its logits are anything else, such as capped; that is tried on a few tokens.
    """
    layer = output_layer(model)
    if layer is None:
        return None
    heard: list[Tensor] = []

    def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0])

    embedding: Any = model.get_input_embeddings()
    ids_1T = torch.arange(_TOKENS, device=embedding.weight.device)[None]
    hook = layer.register_forward_pre_hook(hear)
    try:
        with running(model, None):
            logits_1TV = model(input_ids=ids_1T, use_cache=False, return_dict=True).logits.float()
    finally:
        hook.remove()
    plain_1TV = getattr(layer, "base_layer", layer)(heard[-1]).float().to(logits_1TV.device)
    if plain_1TV.shape != logits_1TV.shape:
        return None
    scale = float((plain_1TV * logits_1TV).sum() / plain_1TV.square().sum())
    if abs(scale - 1) <= _NEAR:
        scale = 1.0
    near = bool((scale * plain_1TV - logits_1TV).abs().max() <= _NEAR * logits_1TV.abs().max())
    return scale if near else None
