"""Every decoder family of the installed transformers, made tiny: random weights, small shapes, float32."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from builders.tiny import DEVICE

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 96
MOST_WEIGHTS = 15_000_000

_NAMES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input entity_vocab_size"),
    (
        32,
        "hidden_size n_embd d_model emb_dim embedding_size input_embedding_size word_embed_proj_dim "
        "model_dim attention_hidden_size lru_width",
    ),
    (
        8,
        "hidden_size_per_layer_input head_dim global_head_dim attention_head_dim kv_channels dim_head "
        "sliding_window window_size attention_window_size qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "mamba_d_state ssm_state_size state_size linear_key_head_dim linear_value_head_dim",
    ),
    (
        4,
        "laurel_rank num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads rotary_dim "
        "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
        "mamba_dt_rank mamba_d_conv adapter_rank time_step_rank",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
        "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads multi_query_group_num "
        "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts mamba_expand expand "
        "linear_num_key_heads linear_num_value_heads bos_token_id decoder_start_token_id",
    ),
    (
        48,
        "intermediate_size ffn_dim d_ff dim_ff dff n_inner ffn_hidden_size decoder_ffn_dim "
        "encoder_ffn_dim intermediate_size_mlp block_ff_dim dense_intermediate_size",
    ),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length"),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
    ),
    (
        1,
        "n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts zero_expert_num "
        "mamba_n_groups n_mamba_heads mamba_ngroups n_groups eos_token_id",
    ),
    (16, "q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_chunk_size mamba_head_dim chunk_size"),
    (64, "mamba_d_ssm"),
    (3, "conv_L_cache"),
    (0, "pad_token_id"),
    (0.2, "initializer_range init_std"),
    (False, "tie_word_embeddings add_cross_attention use_cache"),
    (True, "is_decoder"),
]
"""What any of them may call its sizes, with a small value for it."""
_SMALL = {name: value for value, names in _NAMES for name in names.split()}

_SLIDING, _FULL = "sliding_attention", "full_attention"
_SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": [_SLIDING, _FULL] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL]},
    "mamba2": {"head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "layer_types": ["linear_attention", "hybrid"]},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layer_types": ["linear_attention", "hybrid"],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_LEAVE: dict[str, set[str]] = {"prophetnet": {"num_hidden_layers"}, "xlnet": {"max_position_embeddings"}}
"""What single families need besides."""


def _can_set(usual: PreTrainedConfig, key: str) -> bool:
    if isinstance(getattr(type(usual), key, None), property):
        return False
    try:
        return hasattr(usual, key)
    except Exception:  # "varies across layers", says one that has it
        return True


def _layer_types(usual: PreTrainedConfig) -> list[str]:
    types = getattr(usual, "layer_types", None)
    return list(types) if isinstance(types, list) and all(isinstance(t, str) for t in types) else []


def tiny_config(kind: type[PreTrainedConfig], name: str) -> PreTrainedConfig:
    """A small configuration; sub-configurations (of text, vision, audio) are small too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = kind()
    changes = {key: value for key, value in _SMALL.items() if _can_set(usual, key)}
    if "kv_lora_rank" in changes:  # every head has keys of its own
        changes["num_key_value_heads"] = 4
    for key in kind.sub_configs:
        sub = getattr(usual, key, None)
        if isinstance(sub, PreTrainedConfig):
            changes[key] = tiny_config(type(sub), sub.model_type).to_dict()
    kinds = list(dict.fromkeys(_layer_types(usual)))
    if len(kinds) > 1 and _can_set(usual, "layer_types"):  # one layer of either
        changes["layer_types"] = kinds[:2]
    changes |= _SPECIAL.get(name, {})
    return kind(**{key: value for key, value in changes.items() if key not in _LEAVE.get(name, set())})


def tiny_family(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, far from uniform."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    config = tiny_config(kind.config_class, kind.config_class.model_type)
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights are not tiny")
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(DEVICE)
