"""The guided model inside vLLM: every member's layers in one model, their logits combined before anything samples.

vLLM sees an ordinary causal LM. `forward` runs each trunk once (`streams`) and lays the members' hidden states side
by side; `compute_logits` turns them into logits, member by member, and adds them with the weights of each row's
request. All else is vLLM's: it finds the attention layers of all trunks and gives each its own KV cache.

Shapes: N tokens of a step, R rewards, V ids of the base's vocabulary, H sizes of the members' hidden states together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.compilation.decorators import support_torch_compile
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from genarm.errors import UnsupportedError
from genarm.model.combine import coefficients, log_probs, weighted_sum, within_budget
from genarm.vllm.config import served_config
from genarm.vllm.streams import SharedModel, quicker_twice
from genarm.vllm.weights import weight_table

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0})
class AllTrunks(nn.Module):
    """All trunks, run one after the other on the same tokens; compiled as one."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        trunks = served_config(vllm_config.model_config).trunks
        self.trunks = nn.ModuleList(SharedModel(trunk, vllm_config, prefix=prefix) for trunk in trunks)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> Tensor | IntermediateTensors:
        """Hidden states [N, H], or those for the next stage of a pipeline."""
        outputs = [trunk(input_ids, positions, intermediate_tensors) for trunk in self.trunks]
        if isinstance(outputs[0], dict):
            return IntermediateTensors({key: value for output in outputs for key, value in output.items()})
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


class GuidedForCausalLM(nn.Module, SupportsPP):
    """π ∝ π_base · Π_i π_i^{w_i} (GenARM, arXiv 2410.08193) as a model of vLLM, w_i per request."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = served_config(vllm_config.model_config)
        self.config = config
        self.vllm_config = vllm_config
        table = weight_table(vllm_config)
        if table is None:
            raise UnsupportedError(
                "the processor of reward weights is not loaded, without which every request would silently get the "
                "default weights; start vLLM with the environment variable VLLM_USE_V2_MODEL_RUNNER=0"
            )
        self._table = table
        self.members = AllTrunks(vllm_config=vllm_config, prefix=prefix)
        self._one_stage = vllm_config.parallel_config.pipeline_parallel_size == 1
        self._alignments = config.alignments()
        self._references = config.references
        for i, alignment in enumerate(self._alignments):
            self.register_buffer(f"unknown_{i}", alignment.mask(), persistent=False)

    @property
    def _trunks(self) -> list[SharedModel]:
        return list(self.members.trunks)  # type: ignore[arg-type]

    # --- running it -------------------------------------------------------------------------------------------------

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embedding; each reward has its own."""
        return self._trunks[0].model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Hidden states of all members [N, H]; refuses embeddings, which members do not share."""
        if input_ids is None or inputs_embeds is not None:
            raise UnsupportedError("a guided model takes token ids, no embeddings: its members embed them differently")
        tokens = input_ids.shape[0]
        if self._one_stage and quicker_twice(tokens * len(self._trunks[0].streams), input_ids.device):
            with _spare_rows(tokens):
                twice = (torch.cat([part, part], dim=-1) for part in (input_ids, positions))
                return self.members(*twice)[:tokens]
        return self.members(input_ids, positions, intermediate_tensors)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Normalised float32 log-probs [N, V] of the combination; None on ranks that do not sample."""
        *weights, budget_N = self._table.take(hidden_states.shape[0]).unbind(dim=1)
        weights_NR = torch.stack(weights, dim=1)
        given = coefficients(weights_NR, self._references, len(self._alignments))
        active = (given.streams_BS != 0).any(dim=0).tolist()  # alike on every rank
        wanted = {0, *(i + 1 for i, counts in enumerate(active) if counts)}
        parts: dict[int, Tensor | None] = {}
        start = 0
        for trunk in self._trunks:
            own = hidden_states[:, start : start + trunk.hidden_size * len(trunk.streams)]
            start += own.shape[1]
            parts |= trunk.logits(own, wanted)
        base = parts.pop(0)
        if base is None:
            return None
        columns = sorted(member - 1 for member in parts)
        rewards = [self._alignments[i].fit(parts[i + 1].float()[:, None]) for i in columns]  # type: ignore[union-attr]
        unknown = [getattr(self, f"unknown_{i}") for i in columns]
        given = given.take(columns).to(base.device)
        total_N1V = log_probs(weighted_sum(base.float()[:, None], rewards, given, unknown))
        if bool(budget_N.isfinite().any()):
            total_N1V = within_budget(log_probs(base)[:, None], total_N1V, budget_N.to(base.device))
        return total_N1V[:, 0]

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Room for what an earlier stage of a pipeline sends."""
        parts = [trunk.empty_intermediate_tensors(batch_size, dtype, device) for trunk in self._trunks]
        return IntermediateTensors({key: value for part in parts for key, value in part.items()})

    # --- loading it -------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Each trunk's weights from its own files, by vLLM's own loader; the guided folder itself holds none."""
        for trunk in self._trunks:
            loader = get_model_loader(self.vllm_config.load_config)
            loader.load_weights(trunk.model, trunk.model_config)
            trunk.load_adapters()
        return {name for name, _ in self.named_parameters()}


@contextmanager
def _spare_rows(count: int) -> Iterator[None]:
    """For a step with rows behind those that vLLM knows of: nothing of them goes into a KV cache."""
    context = get_forward_context()
    slots = context.slot_mapping
    if isinstance(slots, dict):  # layer: its slots, the same tensor for many layers
        kinds = {id(own): own for own in slots.values()}
        longer = {key: functional.pad(own, (0, count), value=PAD_SLOT_ID) for key, own in kinds.items()}
        context.slot_mapping = {layer: longer[id(own)] for layer, own in slots.items()}
    try:
        yield
    finally:
        context.slot_mapping = slots
