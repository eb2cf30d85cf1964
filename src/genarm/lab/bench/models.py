"""Models of random weights at given shapes, adapters for them, and a tokenizer that knows as many words.

Shapes: V ids of the vocabulary, H features of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from genarm.lab.bench.shapes import Shape

LORA_RANK = 8
_POSITIONS = 4096


def random_model(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> PreTrainedModel:
    """A Llama without an end-of-text id, in inference mode; made where it will run."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Modules and parameters of its own, in the same memory: what is done to its modules leaves `model` alone."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def random_adapters(
    model: PreTrainedModel, names: Sequence[str], *, seed: int, heads: bool = False
) -> dict[str, PeftModel]:
    """LoRA adapters on all linear layers of `model` but the last, with random A and B; `model` then carries them.

    With `heads`, on the last one alone.
    """
    torch.manual_seed(seed)
    config = _lora_config("lm_head" if heads else "all-linear")
    return {name: PeftModel(model, config, adapter_name=name).eval() for name in names}


def _lora_config(targets: str) -> LoraConfig:
    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=targets,
        init_lora_weights=False,  # B random too; with peft's usual zeros the ARM would be the base
        task_type="CAUSAL_LM",
    )


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of V = `size` words "w0", "w1", …, none of them special."""
    raw = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters, shared ones once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def bytes_per_token(model: PreTrainedModel, positions: float) -> float:
    """What one decoded token reads: the weights, one row of the embedding, and the keys and values so far."""
    table_VH = cast(nn.Embedding, model.get_input_embeddings()).weight
    config = model.config.get_text_config()
    width = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    row = table_VH.nbytes / table_VH.shape[0]
    return weight_bytes(model) - table_VH.nbytes + row + positions * width * table_VH.dtype.itemsize
