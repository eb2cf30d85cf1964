"""What of vLLM is touched here, in one table, so that a version can be asked whether all of it is still there.

vLLM's plug-ins may register models and processors; what those are made of (layers, loaders, caches) has no stable
interface. The table has what is imported, what is passed to it and what is read of it, by the plug-in and by the server
with vLLM's engine; whatever else these use is torch's.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

TOUCHED: dict[str, tuple[str, ...]] = {
    "vllm": ("ModelRegistry.register_model(model_arch, model_cls)", "SamplingParams.extra_args"),
    "vllm.compilation.decorators": ("support_torch_compile(dynamic_arg_dims)",),
    "vllm.config": (
        "ModelConfig(model, revision, tokenizer, skip_tokenizer_init, trust_remote_code, dtype, seed, max_model_len, "
        "quantization, enforce_eager)",
        "ModelConfig.hf_config",
        "ModelConfig.hf_text_config",
        "ModelConfig.logits_processors",
        "ModelConfig.get_hidden_size()",
        "ModelConfig.get_vocab_size()",
        "ModelConfig.get_sliding_window()",
        "ModelConfig.uses_mrope",
        "VllmConfig.cache_config",
        "VllmConfig.compilation_config",
        "VllmConfig.load_config",
        "VllmConfig.lora_config",
        "VllmConfig.model_config",
        "VllmConfig.parallel_config",
        "VllmConfig.quant_config",
        "VllmConfig.speculative_config",
        "CacheConfig.sliding_window",
        "ParallelConfig.pipeline_parallel_size",
    ),
    "vllm.config.utils": ("replace(dataclass_instance)",),
    "vllm.distributed": ("tensor_model_parallel_all_reduce(input_)",),
    "vllm.forward_context": ("get_forward_context()", "ForwardContext.slot_mapping"),
    "vllm.model_executor.layers.attention": (
        "Attention.forward(query, key, value)",
        "Attention.attn_type",
        "Attention.impl",
        "Attention.kv_sharing_target_layer_name",
        "Attention.num_heads",
        "Attention.num_kv_heads",
    ),
    "vllm.model_executor.layers.attention_layer_base": ("AttentionLayerBase",),
    "vllm.model_executor.layers.linear": (
        "LinearBase.forward()",
        "ColumnParallelLinear.output_size_per_partition",
        "ColumnParallelLinear.weight_loader(param, loaded_weight)",
        "MergedColumnParallelLinear.weight_loader(param, loaded_weight, loaded_shard_id)",
        "QKVParallelLinear.weight_loader(param, loaded_weight, loaded_shard_id)",
        "RowParallelLinear.input_size_per_partition",
        "RowParallelLinear.reduce_results",
        "RowParallelLinear.tp_size",
        "RowParallelLinear.weight_loader(param, loaded_weight)",
    ),
    "vllm.model_executor.layers.logits_processor": ("LogitsProcessor.scale", "LogitsProcessor.soft_cap"),
    "vllm.model_executor.model_loader": ("get_model_loader(load_config)",),
    "vllm.model_executor.model_loader.base_loader": ("BaseModelLoader.load_weights(model, model_config)",),
    "vllm.model_executor.model_loader.utils": ("initialize_model(vllm_config, prefix)",),
    "vllm.model_executor.models.config": (
        "MODELS_CONFIG_MAP",
        "VerifyAndUpdateConfig.verify_and_update_config(vllm_config)",
        "VerifyAndUpdateConfig.verify_and_update_model_config(model_config)",
    ),
    "vllm.model_executor.models.interfaces": ("SupportsPP",),
    "vllm.model_executor.models.utils": (
        "PPMissingLayer",
        "WeightsMapper(orig_to_new_prefix)",
        "maybe_prefix(prefix, name)",
    ),
    "vllm.envs": ("VLLM_USE_V2_MODEL_RUNNER",),
    "vllm.sequence": ("IntermediateTensors(tensors)", "IntermediateTensors.items()"),
    "vllm.v1.attention.backend": ("AttentionType.DECODER",),
    "vllm.v1.attention.backends.utils": ("PAD_SLOT_ID",),
    "vllm.v1.sample.logits_processor": (
        "BatchUpdate.batch_size",
        "LogitsProcessor.apply(logits)",
        "LogitsProcessor.is_argmax_invariant()",
        "LogitsProcessor.update_state(batch_update)",
        "LogitsProcessor.validate_params(sampling_params)",
    ),
    "vllm.v1.sample.logits_processor.builtin": ("process_dict_updates(req_entries, batch_update, new_state)",),
    "vllm.engine.arg_utils": ("AsyncEngineArgs",),
    "vllm.exceptions": ("VLLMClientError",),
    "vllm.inputs.engine": ("tokens_input(prompt_token_ids)",),
    "vllm.platforms": ("current_platform.device_type",),
    "vllm.sampling_params": ("RequestOutputKind.DELTA", "SamplingParams.prompt_logprobs"),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
    "vllm.v1.engine.exceptions": ("EngineDeadError", "EngineGenerateError"),
}
"""{module: what of it}: a name, an attribute of one, or a function with the arguments that it is given."""

_ENTRY = re.compile(r"([\w.]+)(?:\(([^)]*)\))?")


def missing() -> list[str]:
    """What of the table the installed vLLM has not; all of its modules are imported."""
    return [problem for module, entries in TOUCHED.items() for problem in _problems(module, entries)]


def _problems(module: str, entries: tuple[str, ...]) -> Iterator[str]:
    try:
        place = importlib.import_module(module)
    except ImportError:
        yield module
        return
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        assert match is not None, entry
        path, arguments = match.groups()
        found = _find(place, path)
        if not found:
            yield f"{module}.{path}"
        elif arguments:
            yield from (f"the argument {name} of {module}.{path}" for name in _unknown(found[0], arguments))


def _find(place: Any, path: str) -> tuple[Any] | None:
    """What `path` leads to; an attribute that instances are given stands for itself."""
    names = path.split(".")
    for name in names[:-1]:
        place = getattr(place, name, None)
    if hasattr(place, names[-1]):
        return (getattr(place, names[-1]),)
    return (None,) if inspect.isclass(place) and _is_given(place, names[-1]) else None


def _is_given(kind: type, name: str) -> bool:
    """Whether instances of `kind` have an attribute: a field, or one that a method sets."""
    for one in kind.__mro__:
        if name in getattr(one, "__annotations__", {}) or name in getattr(one, "__struct_fields__", ()):
            return True
        try:
            source = inspect.getsource(one)
        except (OSError, TypeError):
            continue
        if re.search(rf"\bself\.{name}\b\s*(:[^=\n]+)?=", source):
            return True
    return False


def _unknown(function: Any, arguments: str) -> list[str]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [name for name in re.split(r",\s*", arguments) if name not in parameters]
