"""A trunk: one model and the members that run on it, in one forward.

The base and the ARMs that are LoRA adapters on it are one trunk; so are two ARMs on one smaller model; a full ARM is
a trunk of its own.

Shapes: T tokens of a pass, W of them with logits wanted, V ids of the base's vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genarm.engine.attention import Feed, Pass, Plug, plan_pass
from genarm.engine.device import input_device, launches_count
from genarm.engine.fused_linears import FusedLinears
from genarm.engine.graphs import DecodeGraphs
from genarm.engine.kv_cache import KVCache, LayerShape
from genarm.engine.lora import SharedAdapters, can_share
from genarm.engine.norms import fuse_norms, one_kernel_norms
from genarm.engine.output_adapters import OutputAdapters
from genarm.errors import UnsupportedError, kind_of
from genarm.model.adapters import adapter_layers, names_on, running
from genarm.model.combine import log_probs
from genarm.model.vocabulary import Alignment, embedding_rows

_KNOWN = {"scaling", "sliding_window", "softcap", "dropout", "is_causal", "position_ids", "use_cache", "cache_position"}
_KNOWN |= {"output_router_logits", "logits_to_keep"}  # no matter of attention, but some models pass on everything


@dataclass(frozen=True, kw_only=True)
class TrunkMember:
    """A member by name, with the adapter to run it with (None: the model itself)."""

    name: str
    adapter: str | None


class Trunk:
    """One model in inference mode, its members and the KV cache that they share.

    Attributes:
        members: by index, as rows name them.
        shared: whether members with adapters run in one forward with the others.
        passes: forwards so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        members: Sequence[TrunkMember],
        alignment: Alignment | None,
        *,
        rows: int,
        capacity: int,
        graphs: bool,
        of_the_output: Sequence[str] = (),
    ) -> None:
        """Find out what the model's attention stores, allot the KV cache and stack the adapters.

        Args:
            model: loaded, frozen; from now on it belongs to the engine.
            members: at least one.
            alignment: of the model's vocabulary with the base's; None for the base itself.
            rows: requests times members that may run at once.
            capacity: positions of each row.
            graphs: capture decode steps as CUDA graphs, if the model can be captured.
            of_the_output: adapters of the output layer alone, which members without a row of their own have.

        Raises:
            UnsupportedError: an attention that the engine cannot reproduce.
        """
        self.model = model
        self.members = tuple(members)
        self.alignment = alignment
        self.device = input_device(model)
        self.embedding_size = embedding_rows(model)
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        adapters = [member.adapter for member in members]
        named = [adapter for adapter in adapters if adapter is not None]
        # Adapters of the output layer would get the wanted tokens only, and in another order than the others.
        self._keeps = "logits_to_keep" in self._arguments and not _beyond_the_body(model, named)
        self._output = OutputAdapters(model, of_the_output) if of_the_output else None
        self._plug = Plug(model)
        shapes = probe(model, self._plug, self._arguments, self.device)
        self.kv_cache = KVCache(shapes, rows=rows, capacity=capacity)
        self.shared = can_share(model, named)
        self._adapters = (
            SharedAdapters(model, adapters, _adapter_dtype(model), self._run_once) if named and self.shared else None
        )
        few = launches_count(self.device)  # at the price of some zeros between the adapters' second matrices
        self._fused = FusedLinears(model, self._run_once, self._adapters.riders if self._adapters and few else ())
        if few:
            fuse_norms(model)
        self._graphs = DecodeGraphs(self.kv_cache, self._logits) if graphs and self.shared else None
        self._adapted = frozenset(i for i, adapter in enumerate(adapters) if adapter is not None)
        self.passes = 0

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed], riders: Sequence[Sequence[int]] | None = None) -> list[list[Tensor]]:
        """Run new tokens; their rows then hold them.

        Args:
            feeds: at most one per row.
            riders: for each feed, those of the adapters `of_the_output` that are asked about it as well.

        Returns:
            For each feed, float32 log-probs [want, V] after its last `want` tokens, and those of its riders.
        """
        said = self._run(feeds)
        ridden = self._ride(said, riders or [()] * len(feeds))
        return [[self._fit(own), *of.values()] for (own, _), of in zip(said, ridden, strict=True)]

    def run(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """As `forward`, over the ids of the model's own vocabulary, and without riders."""
        return [own for own, _ in self._run(feeds)]

    def _ride(self, said: Sequence[tuple[Tensor, Tensor]], riders: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
        """{rider: log-probs} of each feed, in the order that it names them; a rider is asked of all feeds at once."""
        found: list[dict[int, Tensor]] = [dict.fromkeys(of, torch.empty(0)) for of in riders]
        if self._output is None:
            return found
        for rider in {rider for of in riders for rider in of}:
            feeds = [feed for feed, of in enumerate(riders) if rider in of]
            parts = [said[feed] for feed in feeds]
            own_WV, low_WR = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
            ridden_WV = self._output.log_probs(rider, own_WV, low_WR)
            for feed, piece in zip(feeds, ridden_WV.split([len(own) for own, _ in parts]), strict=True):
                found[feed][rider] = piece
        return found

    @torch.inference_mode()
    def _run(self, feeds: Sequence[Feed]) -> list[tuple[Tensor, Tensor]]:
        """Log-probs of each feed, and what the adapters of the output layer read of it (none where there are none)."""
        self.passes += 1
        groups = [feeds] if self.shared else _by_member(feeds)
        wanted: dict[int, tuple[Tensor, Tensor]] = {}
        for group in groups:
            adapter = self.members[group[0].row.member].adapter
            plan = plan_pass(self.kv_cache, group, self.embedding_size, self.device, self._adapted)
            with running(self.model, None if self.shared else adapter):
                logits_WV = self._logits(plan) if self._graphs is None else self._graphs.run(plan)
            sizes = [feed.want for feed in group]
            vocabulary = logits_WV.shape[1] - (0 if self._output is None else self._output.rank)
            own, low = logits_WV.tensor_split([vocabulary], dim=1)
            pieces = zip(log_probs(own).split(sizes), low.split(sizes), strict=True)
            wanted.update((id(feed), piece) for feed, piece in zip(group, pieces, strict=True))
        for feed in feeds:
            feed.row.ids.extend(feed.ids)
        return [wanted[id(feed)] for feed in feeds]

    @property
    def replays(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        return self._graphs is not None and self._graphs.refused is None

    def _run_once(self) -> None:
        """One token, whose keys and values go nowhere."""
        probe(self.model, self._plug, self._arguments, self.device)

    def _fit(self, log_probs_WV: Tensor) -> Tensor:
        return log_probs_WV if self.alignment is None else self.alignment.fit(log_probs_WV)

    def _logits(self, plan: Pass) -> Tensor:
        """Logits of a pass: tensors in, a tensor out, nothing that waits for the device.

        They are [W, V], or [W, V + R] with what the adapters of the output layer read of each position.
        """
        if self._output is None:
            return self._forward(plan)
        with self._output.listening():
            return self._forward(plan)

    def _forward(self, plan: Pass) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": plan.ids_T[None], "position_ids": plan.positions_T[None]}
        if self._keeps:
            inputs["logits_to_keep"] = plan.outputs_W
        with self._plug.attending(plan), self._fused.active(), one_kernel_norms():
            if self._adapters is None or not plan.adapted:
                output = self.model(**inputs, use_cache=False, return_dict=True)
            else:
                with self._adapters.masked(plan.adapters_T):
                    output = self.model(**inputs, use_cache=False, return_dict=True)
        # [T, V], or [W, V] where the model keeps no others; what the output layer has read goes with them.
        said: list[Tensor] = [output.logits[0]]
        if self._output is not None:
            said.append(self._output.low())
        if not self._keeps:
            said = [each.index_select(0, plan.outputs_W) for each in said]
        # The adapters' part keeps its float32, whatever the model's dtype.
        return said[0] if self._output is None else torch.cat([said[0].float(), said[1]], dim=1)


def _beyond_the_body(model: PreTrainedModel, adapters: Sequence[str]) -> bool:
    """Whether some of `adapters` have layers that come after the model's last hidden states."""
    body = {*map(id, model.base_model.modules())}
    return any(id(layer) not in body and not names_on(layer).isdisjoint(adapters) for layer in adapter_layers(model))


def cannot_run(model: PreTrainedModel, problem: str) -> UnsupportedError:
    """The error that says so, on one line."""
    return UnsupportedError(
        f"the engine cannot run {kind_of(model)} ({' '.join(problem.split())}); use "
        "GuidedForCausalLM.generate, which leaves everything to transformers"
    )


def _adapter_dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = model.dtype
    return torch.float32 if input_device(model).type == "cpu" else dtype


def _by_member(feeds: Sequence[Feed]) -> list[list[Feed]]:
    groups: dict[int, list[Feed]] = {}
    for feed in feeds:
        groups.setdefault(feed.row.member, []).append(feed)
    return list(groups.values())


# --- what an attention stores ---------------------------------------------------------------------------------------


class _Probe:
    """Runs in the place of attention once and notes what each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.foreign: set[str] = set()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.foreign |= {
            name for name, given in options.items() if name not in _KNOWN and not (given is None or given is False)
        }
        self.shapes[int(module.layer_idx)] = LayerShape(  # type: ignore[arg-type]
            heads=key.shape[1],
            key_size=key.shape[-1],
            value_size=value.shape[-1],
            dtype=torch.float32 if key.device.type == "cpu" else key.dtype,  # see attention._scores
            device=key.device,
        )
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


@torch.inference_mode()
def probe(model: PreTrainedModel, plug: Plug, arguments: frozenset[str], device: torch.device) -> list[LayerShape]:
    """What each layer's attention stores of a token, found out by running one.

    Raises:
        UnsupportedError: an attention that the engine cannot reproduce.
    """
    noted = _Probe()
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    if "position_ids" not in arguments or getattr(config, "attention_chunk_size", None):
        noted.foreign.add("positions or chunks of its own")
    else:
        one = torch.zeros(1, 1, dtype=torch.long, device=device)
        with plug.attending(noted):
            model(input_ids=one, position_ids=one, use_cache=False, return_dict=True)
    if noted.foreign or sorted(noted.shapes) != list(range(layers)):
        problem = ", ".join(sorted(noted.foreign)) or f"{len(noted.shapes)} of its {layers} layers are attention"
        raise cannot_run(model, problem)
    return [noted.shapes[i] for i in range(layers)]
