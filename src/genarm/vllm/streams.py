"""One model's weights, several members: their tokens go through together, side by side.

A LoRA ARM is its base but for low-rank additions, and decoding is bound by reading weights. So each token of a step is
repeated once per member, every linear layer reads its weight once for all of them (`lora` adds each member's part to
its own rows), and to attention the members are further heads: a layer has those of all of them, and vLLM keeps their
keys and values like any others, in one KV cache per layer, paged and shared by prefix.

Shapes: N tokens of a step, S members of this trunk; between layers rows are [N·S], token by token; outside, and
between the stages of a pipeline, they are [N] with the members side by side along the last axis.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.utils import replace
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.v1.attention.backend import AttentionType

from genarm.errors import UnsupportedError
from genarm.model.config import BASE
from genarm.model.contract import check_finite
from genarm.model.vocabulary import readable
from genarm.vllm.heads import OutputHeads
from genarm.vllm.lora import add_adapters

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

    from genarm.vllm.config import TrunkSpec


class SharedModel(nn.Module):
    """A model of vLLM and the members that go through it."""

    def __init__(self, trunk: TrunkSpec, vllm_config: VllmConfig, *, prefix: str) -> None:
        """Make the model, without weights yet.

        Raises:
            UnsupportedError: its layers cannot be shared between members.
        """
        super().__init__()
        self.trunk = trunk
        self.streams = trunk.streams
        # The base keeps its own names, which lists in quantised checkpoints refer to; a second integer in a layer's
        # name would confuse vLLM, so rewards are told apart by name.
        own_prefix = prefix if trunk.name == BASE else maybe_prefix(prefix, f"reward_{trunk.name}")
        own = _own_config(trunk, vllm_config, own_prefix)
        self.model_config: ModelConfig = own.model_config
        self.hidden_size: int = own.model_config.get_hidden_size()
        self._vocab_size = own.model_config.get_vocab_size()
        self._reads_all_ids = self._vocab_size >= vllm_config.model_config.get_vocab_size()
        self.model: Any = initialize_model(vllm_config=own, prefix=own_prefix)
        self.heads: OutputHeads | None = None
        if len(self.streams) > 1:
            _refuse_unshareable(self.model, own.model_config, trunk)
            _widen_attention(self.model, len(self.streams))

    def load_adapters(self) -> None:
        """Read the adapters and put them on the model, whose own weights are there already.

        Raises:
            MemberError: an adapter does not fit, or a weight of the model is not finite.
        """
        check_finite(dict(self.model.named_parameters()), what=f"{self.trunk.name!r} at {self.trunk.model!r}")
        add_adapters(self.model, self.trunk)
        self.heads = OutputHeads(self.model, self.trunk) if self.trunk.heads else None

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: IntermediateTensors | None
    ) -> Tensor | dict[str, Tensor]:
        """Hidden states [N, S·H], or by name those for the next stage of a pipeline."""
        copies = len(self.streams)
        if not self._reads_all_ids:
            input_ids = readable(input_ids, self._vocab_size)
        if copies > 1:
            input_ids = input_ids.repeat_interleave(copies)
            positions = positions.repeat_interleave(copies)
        output = self.model(input_ids, positions, self._received(intermediate_tensors))
        if isinstance(output, Tensor):
            return _side_by_side(output, copies)
        return {f"{self.trunk.name}.{key}": _side_by_side(value, copies) for key, value in output.items()}

    def logits(self, hidden_states: Tensor, wanted: Container[int]) -> dict[int, Tensor | None]:
        """{member: logits [N, V]} of the members that are wanted, with one read of the output layer.

        Args:
            hidden_states: [N, S·H], as `forward` gives them.
            wanted: the members that count, the base among them; the others are left out.
        """
        chosen = [i for i, stream in enumerate(self.streams) if stream.member in wanted]
        if not chosen:
            return {}
        states_NSH = hidden_states.unflatten(-1, (len(self.streams), -1))
        if len(chosen) < len(self.streams):
            states_NSH = states_NSH[:, chosen]
        logits = self._output_layer(states_NSH.flatten(0, 1))
        parts = [None] * len(chosen) if logits is None else logits.unflatten(0, (-1, len(chosen))).unbind(1)
        found = {self.streams[i].member: part for i, part in zip(chosen, parts, strict=True)}
        if self.heads is not None:
            found |= self.heads.logits(found[self.streams[0].member], states_NSH[:, 0], wanted)
        return found

    def _output_layer(self, rows: Tensor) -> Tensor | None:
        if quicker_twice(rows.shape[0], rows.device):
            logits = self.model.compute_logits(rows.repeat(2, 1))
            return None if logits is None else logits[: rows.shape[0]]
        return self.model.compute_logits(rows)

    def empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Room for what an earlier stage sends, by name."""
        own = self.model.make_empty_intermediate_tensors(batch_size, dtype, device)
        copies = len(self.streams)
        return {f"{self.trunk.name}.{key}": value.repeat(1, copies) for key, value in own.items()}

    def _received(self, tensors: IntermediateTensors | None) -> Any:
        if tensors is None:
            return None
        start = f"{self.trunk.name}."
        own = {key: value for key, value in tensors.items() if key.startswith(start)}
        return type(tensors)(
            {key.removeprefix(start): _below_each_other(value, len(self.streams)) for key, value in own.items()}
        )


def quicker_twice(rows: int, device: torch.device) -> bool:
    """Whether a product with twice as many rows takes less time.

    On CPUs, with vLLM's products (oneDNN), it does for two rows; `benchmarks/vllm_step.py` shows it.
    """
    return rows == 2 and device.type == "cpu"


def _side_by_side(rows: Tensor, copies: int) -> Tensor:
    """[N·S, H] as [N, S·H]."""
    return rows.reshape(-1, copies * rows.shape[1])


def _below_each_other(rows: Tensor, copies: int) -> Tensor:
    """[N, S·H] as [N·S, H]."""
    return rows.reshape(-1, rows.shape[1] // copies)


def _own_config(trunk: TrunkSpec, vllm_config: VllmConfig, prefix: str) -> VllmConfig:
    """vLLM's configuration for this model alone; caches, devices and compilation are the guided model's."""
    guided = vllm_config.model_config
    model_config = ModelConfig(
        model=trunk.model,
        revision=trunk.revision,
        tokenizer=guided.tokenizer,
        skip_tokenizer_init=True,
        trust_remote_code=guided.trust_remote_code,
        dtype=guided.dtype,
        seed=guided.seed,
        max_model_len=guided.max_model_len,
        quantization=guided.quantization if trunk.name == BASE else None,
        enforce_eager=guided.enforce_eager,
    )
    cache_config = copy.copy(vllm_config.cache_config)
    cache_config.sliding_window = _window(model_config)
    own = replace(vllm_config, model_config=model_config, cache_config=cache_config, quant_config=None)
    if own.quant_config is not None and prefix:
        own.quant_config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"": f"{prefix}."}))
    return own


def _window(model_config: ModelConfig) -> int | None:
    """The sliding window of a model whose layers all have one; layers of mixed models know their own."""
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    mixed = kinds is not None and any(kind != "sliding_attention" for kind in kinds)
    return None if mixed else model_config.get_sliding_window()


def _refuse_unshareable(model: nn.Module, model_config: ModelConfig, trunk: TrunkSpec) -> None:
    names = ", ".join(stream.name for stream in trunk.streams)
    kinds = {type(module) for module in model.modules() if isinstance(module, AttentionLayerBase)}
    plain = all(
        module.attn_type == AttentionType.DECODER
        and module.kv_sharing_target_layer_name is None
        and getattr(module.impl, "sinks", None) is None
        for module in model.modules()
        if isinstance(module, Attention)
    )
    if kinds - {Attention} or not plain or model_config.uses_mrope:
        raise UnsupportedError(
            f"{names} share the model {trunk.model}, whose layers keep more than keys and values of one causal "
            "attention; merge each adapter into a full model (peft's merge_and_unload) and compose those instead"
        )


# --- attention --------------------------------------------------------------------------------------------------------


def _widen_attention(model: nn.Module, copies: int) -> None:
    """Give each attention layer the heads of all members, the first member's first."""
    for layer in [module for module in model.modules() if isinstance(module, Attention)]:
        impl: Any = layer.impl
        for part in (layer, impl):
            part.num_heads *= copies
            part.num_kv_heads *= copies
        if getattr(impl, "alibi_slopes", None) is not None:
            impl.alibi_slopes = impl.alibi_slopes.repeat(copies)
        layer.copies = copies
        kind: Any = type(layer)
        layer.__class__ = _wide(kind)


@cache
def _wide(kind: type[nn.Module]) -> type[nn.Module]:
    """An attention class that takes the rows of a token's members for one row of more heads."""
    return type(kind.__name__, (_Wide, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Wide:
    """Mixed in before a class of attention layers."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if args or any(option is not None for option in options.values()):
            raise UnsupportedError("this model's attention takes options that cannot be shared between members")
        copies: int = self.copies  # type: ignore[attr-defined]
        wide = [_side_by_side(rows, copies) for rows in (query, key, value)]
        return _below_each_other(super().forward(*wide), copies)  # type: ignore[misc]
