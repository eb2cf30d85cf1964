"""The tokenizer and the model that a run starts from."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from genarm.data.tokens import fit_lengths
from genarm.errors import ConfigError, MemberError, MissingExtraError
from genarm.files import refuse_file
from genarm.model.contract import ADAPTER_FILE, load_whole, refusing
from genarm.model.loading import HubOptions, load_generation_config
from genarm.model.references import positions_together
from genarm.text.prompts import end_ids
from genarm.training.config import TrainConfig
from genarm.training.head import add_head
from genarm.training.kinds import kind_of


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with every default filled in that depends on the model, and local paths made absolute.

    Raises:
        MemberError: the model's configuration cannot be loaded, or is no causal LM's to train.
        ConfigError: the lengths do not fit into the model's context.
    """
    kind, model_config = kind_of(config), _model_config(config)
    context = positions_together(model_config)
    prompt, response = fit_lengths(config.max_prompt_tokens, config.max_response_tokens, context, model=config.model)
    return dataclasses.replace(
        config,
        model=absolute(config.model),
        data=absolute(config.data),
        eval_data=absolute(config.eval_data) if config.eval_data else None,
        chat_template=Path(os.path.abspath(config.chat_template)) if config.chat_template else None,
        output=Path(os.path.abspath(config.output)),
        loss=kind.name if config.kind == "arm" else None,
        learning_rate=config.resolved_learning_rate,
        beta=config.resolved_beta if "beta" in kind.takes else None,
        lora_dropout=config.resolved_lora_dropout,
        max_prompt_tokens=prompt,
        max_response_tokens=response,
        **kind.resolved(config),
    )


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that the user chose.

    Raises:
        MemberError: there is no tokenizer.
        ConfigError: the chat template cannot be read.
    """
    with refusing(f"cannot load the tokenizer of {config.model} (check --model)"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    # We cut what is too long ourselves, and say so: no warning about the length of the uncut text.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --chat-template {config.chat_template}: {error}") from error
    return tokenizer


def decoding_ends(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response when the model decodes (raises MemberError where its files cannot be read)."""
    hub = HubOptions(trust_remote_code=config.trust_remote_code)
    generation = load_generation_config(config.model, config.revision, hub, _model_config(config))
    return end_ids(generation, tokenizer)


def load_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model to train as an ARM: a `PreTrainedModel`, or a `peft.PeftModel` around one.

    Raises:
        MemberError, MissingExtraError: as `load_weights`.
        ConfigError: no module has the name given in `lora_targets`.
    """
    model = load_weights(config, tokenizer, AutoModelForCausalLM)
    if config.head:
        return add_head(model, config.head, config.resolved_lora_dropout)
    return add_adapter(model, config, "CAUSAL_LM") if config.lora else model


def load_weights(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, auto_class: Any, **options: Any
) -> PreTrainedModel:
    """The model that training starts from, without an adapter; `options` are for its `from_pretrained`.

    Weights that are trained are float32, also with `bf16`: then the forward runs under bfloat16 autocast (see
    `ArmTrainer`) while updates, often too small for bfloat16's 8 bits, are kept. Frozen weights under an adapter
    take no updates, so with `bf16` they are loaded in bfloat16.

    Raises:
        MemberError: the weights cannot be loaded, are not all there and finite, or have fewer embeddings than the
            tokenizer has tokens.
        MissingExtraError: `load_in_4bit` without bitsandbytes.
    """
    frozen_dtype = torch.bfloat16 if config.bf16 else torch.float32
    options = {"dtype": frozen_dtype if config.adapter else torch.float32, **options}
    if config.load_in_4bit:
        options |= _four_bit_options()
    model = load_whole(
        auto_class,
        config.model,
        what="the model of --model",
        new_head="score" if auto_class is AutoModelForSequenceClassification else None,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        **options,
    )
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if not config.load_in_4bit and len(tokenizer) > rows:
        raise MemberError(
            f"the tokenizer of {config.model} has {len(tokenizer)} tokens and its model embeddings for {rows} only; "
            "use the tokenizer that the model was trained with"
        )
    if model.can_generate():  # its own `generate`, and that of what is saved, shall end where training ends responses
        model.generation_config.eos_token_id = end_ids(model.generation_config, tokenizer) or None
    _keep_gradients(model)
    return _ready_for_adapter(model, config) if config.load_in_4bit else model


def add_adapter(model: PreTrainedModel, config: TrainConfig, task: str) -> Any:
    """`model` inside a new `PeftModel`.

    Raises:
        ConfigError: no module has the name given in `lora_targets`.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, adapter_config(model, config, task))
    except ValueError as error:
        raise ConfigError(f"--lora-targets {config.lora_targets}: {error}") from error


def adapter_config(model: PreTrainedModel, config: TrainConfig, task: str) -> Any:
    """The settings of a LoRA adapter on `model`, in peft's words."""
    from peft import LoraConfig

    names = [name.strip() for name in config.lora_targets.split(",")]
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.resolved_lora_dropout,
        target_modules=names[0] if names == ["all-linear"] else names,
        fan_in_fan_out=model.config.model_type == "gpt2",  # GPT-2 stores its linear layers transposed
        revision=config.revision,
        task_type=task,
    )


def _keep_gradients(model: PreTrainedModel) -> None:
    """See to it that 4-bit layers let gradients through after a forward without any.

    On CPUs with bfloat16 instructions, bitsandbytes repacks their weights at the first forward in evaluation, for good,
    and its product with repacked weights has no gradient: all that is trained below such a layer would learn nothing.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _ready_for_adapter(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training

    prepared: PreTrainedModel = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return prepared


def _four_bit_options() -> dict[str, Any]:
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantize")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().device}}


def _model_config(config: TrainConfig) -> PretrainedConfig:
    refuse_file(config.model)
    if (Path(config.model) / ADAPTER_FILE).is_file():
        raise MemberError(
            f"{config.model} is an adapter, and training starts from a whole model; give the model below it, "
            "or merge the adapter first (peft: merge_and_unload)"
        )
    with refusing(f"cannot load the model {config.model} (check --model and --revision)"):
        found: PretrainedConfig = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if found.model_type == "guided":
        raise MemberError(f"{config.model} is a guided model; train from its base or another plain causal LM")
    return found


def absolute(name: str) -> str:
    """The absolute path of what is here; the name of anything else as it is."""
    return os.path.abspath(name) if Path(name).exists() else name
