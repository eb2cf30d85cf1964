"""How a causal LM reads a batch of pairs: one forward, and what it says before each token of the responses.

The best way is a packed row, and an output layer that is left out of the forward. Not every model can be read so, and
none says whether it can. So the first time that a model is read, the ways are tried in turn on a few sequences, and
the first one is taken that says what the model says of each sequence alone.

Shapes: as in `rows` and `responses`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from genarm.data.tokens import TokenPair
from genarm.errors import MemberError
from genarm.training.packing import Packing
from genarm.training.responses import ResponseStates, summed, token_log_probs
from genarm.training.rows import padded

Batch: TypeAlias = Mapping[str, Any]
Forward: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to read a batch: pairs in one row or sequences padded, the output layer in chunks or all at once."""

    packed: bool
    split: bool


WAYS = tuple(Way(packed=packed, split=split) for packed in (True, False) for split in (True, False))

# How far log-probs of one token may be off in float32, and their mean over a sequence in bfloat16: nats, and a share.
EXACT, ROUNDED = (2e-3, 2e-4), (0.1, 0.02)

# Pairs that are looked at for a short and a long one.
SAMPLED = 256


class ModelReader:
    """Reads batches with one model: a `PreTrainedModel`, or a `peft.PeftModel` on one.

    Args:
        model: without what wraps it for several processes.
        ways: those to try, the best first.
    """

    def __init__(self, model: nn.Module, ways: Sequence[Way] = WAYS) -> None:
        self.model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.ways = ways
        self._way: Way | None = None
        self._trunk: nn.Module | None = None
        self._takes_positions = "position_ids" in inspect.signature(type(self.model).forward).parameters
        self._packing = Packing(self.model)

    @torch.no_grad()
    def check(self, forward: Forward, batch: Batch) -> list[str]:
        """Find the way to read batches; returns what there is to say of it, if it is not the best.

        Args:
            forward: the model, wrapped or not.
            batch: of a few short pairs.

        Raises:
            MemberError: what the model says of a sequence depends on what is beside it, however it is read; or it says
                nothing, as its weights are broken.
        """
        problems: dict[Way, str] = {}
        with _evaluating(self.model):
            self._trunk = self._find_trunk(forward, batch)
            expected_N = self._alone(forward, batch)
            if bool(expected_N.isnan().any()):
                raise MemberError("log-probs are nan: its weights are broken, or too large for its dtype")
            for way in self.ways:
                problem = self._problem(way, forward, batch, expected_N)
                if problem is None:
                    self._way = way
                    return _notes(way, problems)
                problems[way] = problem
        raise MemberError(
            "what this model says of a text depends on the texts beside it, or on padding after it: "
            f"{problems[self.ways[-1]]}; take a model of another family"
        )

    def states(self, forward: Forward, batch: Batch) -> ResponseStates:
        """What `forward`, which is the model or wraps it, says before each token of the responses."""
        assert self._way is not None
        return self._states(self._way, forward, batch)

    def leave(self) -> None:
        """Give the model back as it was."""
        self._packing.switch(False)

    def _states(self, way: Way, forward: Forward, batch: Batch) -> ResponseStates:
        ids_1T, places_1T = batch["input_ids"], batch["position_ids"]
        if way.packed:
            inputs = {"input_ids": ids_1T, "position_ids": places_1T, "attention_mask": torch.ones_like(ids_1T)}
            with self._packing.reading(batch["lengths"], ids_1T.device):
                hidden_ND, head = self._run(way, forward, inputs, batch["sources"])
        else:
            rows, device = padded(batch["lengths"]), ids_1T.device
            places_SW = rows.places_SW.to(device)
            inputs = {"input_ids": ids_1T[0][places_SW], "attention_mask": rows.mask_SW.to(device)}
            # With padding on the right, positions are those that any model takes by itself.
            hidden_ND, head = self._run(way, forward, inputs, rows.sources_N.to(device))
        return ResponseStates(
            hidden_ND=hidden_ND,
            labels_N=batch["labels"],
            sequences_N=batch["sequences"],
            count=2 * len(batch["lengths"]),
            head=head,
        )

    def _run(
        self, way: Way, forward: Forward, inputs: Mapping[str, Tensor], sources_N: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the output layer reads at `sources_N` and the layer, or logits there and nothing more to do."""
        if self._trunk is None:
            logits = forward(**inputs, use_cache=False).logits
            return logits.flatten(0, 1).to(sources_N.device)[sources_N], nn.Identity()
        found: list[Any] = []

        def keep(_: nn.Module, __: Any, output: Any) -> Any:
            """Lets the model's own output layer see these positions alone, or a single one."""
            # The last layers of a model that is spread over several devices are elsewhere than its inputs.
            hidden_ND = output.last_hidden_state.flatten(0, 1).to(sources_N.device)[sources_N]
            found.extend((hidden_ND, type(output)))
            kept = copy.copy(output)
            kept.last_hidden_state = (hidden_ND[:1] if way.split else hidden_ND)[None]
            return kept

        with _hooked(self._trunk, keep):
            logits = forward(**inputs, use_cache=False).logits
        if not way.split:
            return logits[0], nn.Identity()
        hidden_ND, kind = found
        return hidden_ND, lambda hidden_CD: self._logits(hidden_CD, kind)

    def _logits(self, hidden_CD: Tensor, kind: Any) -> Tensor:
        """The model's own forward after its last hidden states, whatever it does to them: logits [C, V]."""
        ids_1C = torch.zeros((1, len(hidden_CD)), dtype=torch.long, device=hidden_CD.device)
        assert self._trunk is not None
        with _instead(self._trunk, kind(last_hidden_state=hidden_CD[None])):
            logits: Tensor = self.model.forward(input_ids=ids_1C, use_cache=False).logits[0]
        return logits

    # --- finding the way ----------------------------------------------------------------------------------------

    def _find_trunk(self, forward: Forward, batch: Batch) -> nn.Module | None:
        """What makes the last hidden states: the outermost model inside that says so."""
        found: list[nn.Module] = []

        def note(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, ModelOutput) and getattr(output, "last_hidden_state", None) is not None:
                found.append(module)

        inside = [one for one in self.model.modules() if isinstance(one, PreTrainedModel) and one is not self.model]
        with ExitStack() as stack:
            for one in inside:
                stack.enter_context(_hooked(one, note))
            forward(input_ids=batch["input_ids"][:, :2], use_cache=False)
        return found[-1] if found else None

    def _alone(self, forward: Forward, batch: Batch) -> Tensor:
        """Log-probs [N] of the responses, each sequence in a forward of its own, as anybody would call the model."""
        rows, parts = padded(batch["lengths"]), []
        for number, (places_W, mask_W) in enumerate(zip(rows.places_SW, rows.mask_SW, strict=True)):
            places = places_W[mask_W.bool()].to(batch["input_ids"].device)
            labels_C = batch["labels"][batch["sequences"] == number]
            logits = forward(input_ids=batch["input_ids"][:, places], use_cache=False).logits[0]
            log_probs_CV = logits[-len(labels_C) - 1 : -1].float().log_softmax(-1)
            parts.append(log_probs_CV.gather(-1, labels_C[:, None]).squeeze(-1))
        return torch.cat(parts)

    def _problem(self, way: Way, forward: Forward, batch: Batch, expected_N: Tensor) -> str | None:
        """Why batches cannot be read so, if they cannot."""
        if way.packed and not self._takes_positions:
            return "it takes no positions"
        if way.split and self._trunk is None:
            return "its output layer is no part of its own"
        try:
            states = self._states(way, forward, batch)
            off_N = (token_log_probs(states).to(expected_N.dtype) - expected_N).abs()
        except Exception as error:
            return f"its layers stop at them with {type(error).__name__}"
        finally:
            self.leave()
        counts_N, size_N = expected_N.isfinite(), expected_N.abs()  # what has no probability has none anywhere
        if self._is_exact(expected_N):
            wrong = (off_N > EXACT[0] + EXACT[1] * size_N) & counts_N
        else:
            means = [summed(torch.where(counts_N, one_N, 0), states) for one_N in (off_N, size_N, counts_N.float())]
            wrong = means[0] > ROUNDED[0] * means[2] + ROUNDED[1] * means[1]
        return f"log-probs are up to {float(off_N[counts_N].max()):.2g} nats off" if bool(wrong.any()) else None

    def _is_exact(self, computed: Tensor) -> bool:
        wide = all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.model.parameters())
        return wide and not torch.is_autocast_enabled(computed.device.type)


def _notes(way: Way, problems: Mapping[Way, str]) -> list[str]:
    notes = []
    if not way.packed and (problem := problems.get(Way(packed=True, split=way.split))):
        notes.append(
            f"pairs are not packed, which this model cannot read ({problem}): each response goes with its prompt in a "
            "padded row of its own"
        )
    if not way.split and (problem := problems.get(Way(packed=way.packed, split=True))):
        notes.append(f"the logits of all tokens of the responses of a batch are held at once ({problem})")
    return notes


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is left in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _instead(module: nn.Module, output: Any) -> Iterator[None]:
    """`module` says `output`, whatever it is given."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def sample(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Two pairs of different lengths to check a model with, cut so that it takes no time."""
    sizes = sorted(pairs[:SAMPLED], key=lambda pair: len(pair.prompt_ids) + len(pair.chosen_ids))
    return [
        TokenPair(
            prompt_ids=pair.prompt_ids[-96:], chosen_ids=pair.chosen_ids[:32], rejected_ids=pair.rejected_ids[:48]
        )
        for pair in (sizes[-1], sizes[0])
    ]
