"""Tiny models and tokenizers for the tests: random weights, no downloads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"

DEVICE = os.environ.get("GENARM_TEST_DEVICE", "cpu")
"""Where the engine's tests put their models: cpu, or cuda."""

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", "<unk>"]

_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 8, "head_dim": 8},
}

FAMILIES = tuple(_SHAPES)


def tiny_tokenizer(extra: tuple[str, ...] = (), words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template; `extra` are special tokens added at the end."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *(words or WORDS)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
        chat_template=TEMPLATE,
        padding_side="left",
    )
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>", *extra]})
    return tokenizer


VOCAB_SIZE = len(SPECIAL) + len(WORDS)


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vocab_size: int = VOCAB_SIZE,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.25,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal LM of one family; `spread` is large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **{**_SHAPES[family], **overrides},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().to(DEVICE)


def save_member(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a member as `compose` finds it on disk: model and tokenizer files."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def tiny_lora(
    model: PreTrainedModel,
    folder: Path,
    *,
    seed: int,
    base_path: str,
    rank: int = 4,
    targets: str | list[str] = "all-linear",
) -> Path:
    """Write a random LoRA adapter that fits `model` (a copy of it is wrapped; `model` is left alone)."""
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, which would make the adapter the base
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # of an adapted output layer, too
    settings = folder / "adapter_config.json"
    import json

    record = json.loads(settings.read_text())
    record["base_model_name_or_path"] = base_path
    settings.write_text(json.dumps(record))
    return folder
