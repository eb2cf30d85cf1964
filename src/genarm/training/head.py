"""A head ARM: a low-rank map of a model's last hidden states, read by its own output layer.

The trained model says `E (h + B A h)` where the frozen one says `E h`. It is zero at the start, has `2 · rank · width`
parameters, and needs no gradients below the output layer. `E B` and `A` are the two matrices of a LoRA adapter of the
output layer, as which the result is written: a guided model runs it beside its base without a forward of its own.

Shapes: C positions, D features of the hidden states, R the rank, V ids.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from genarm.errors import MemberError, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"


class ThroughOutput(nn.Linear):
    """A LoRA layer's second matrix [V, R] as `E B`, of which B [D, R] is trained and begins at zero."""

    def __init__(self, output: nn.Linear, rank: int) -> None:
        """`output` is the layer with E."""
        super().__init__(rank, output.in_features, bias=False, device=output.weight.device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        self._output = (output,)  # no module of this one: it is trained and saved nowhere

    def whole(self) -> Tensor:
        """E B, [V, R]."""
        own_VD = self._output[0].weight
        return own_VD @ self.weight.to(own_VD.dtype)

    def forward(self, low_CR: Tensor) -> Tensor:
        """[C, V]."""
        return F.linear(low_CR, self.whole().to(low_CR.dtype))


def add_head(model: PreTrainedModel, rank: int, dropout: float) -> PeftModel:
    """`model`, frozen, with a head ARM of this rank as its adapter.

    Raises:
        MemberError: its output layer is no plain linear layer.
    """
    output = model.get_output_embeddings()
    if type(output) is not nn.Linear:
        raise MemberError(
            f"the output layer of {kind_of(model)} is {kind_of(output)}, and --head needs a plain linear layer "
            "(not one in 4 bits); train with --lora"
        )
    name = next(name for name, module in model.named_modules() if module is output)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=[name], task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    layer: Any = adapted.get_base_model().get_output_embeddings()
    layer.lora_B[ADAPTER] = ThroughOutput(output, rank)
    # peft would write the output layer itself beside the adapter, as it may have been trained.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    head: PeftModel = adapted
    return head


def unfold(model: PeftModel) -> None:
    """Have the adapter in peft's own form, as which it is saved for use."""
    base: Any = model.get_base_model()
    layer = base.get_output_embeddings()
    own = layer.lora_B[ADAPTER]
    plain = nn.Linear(own.in_features, layer.out_features, bias=False, device=own.weight.device)
    plain.weight.data = own.whole().detach().float()
    layer.lora_B[ADAPTER] = plain
