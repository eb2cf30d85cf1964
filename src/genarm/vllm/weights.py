"""Each request's reward weights: checked when it arrives, kept by its row in the batch, read by the model.

They come as `reward_weights` in `SamplingParams.extra_args` or, over HTTP, in `vllm_xargs`: a mapping, the same as a
JSON text, or `helpful=1,harmless=0.5`; and beside them the budget `max_kl`, nats per token from the base. vLLM has a
place where a plug-in learns which request is in which row of the batch, the logits processor, so that is what
`RewardWeightsProcessor` is, though it leaves the logits alone: weights are applied before, where the members' logits
are still apart.

A worker process makes the processor and the model separately; they meet in the `WeightTable` of that worker.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from genarm.errors import UnsupportedError, WeightsError
from genarm.model.weights import check_max_kl, parse_weights, weight_row
from genarm.vllm.config import served_config

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

FIELD = "reward_weights"
BUDGET = "max_kl"


class WeightTable:
    """Weights of the requests in one worker's batch, in the order of its rows.

    vLLM asks the model for logits once a step for the rows to sample from, and then again for the positions of
    prompts whose log-probs were asked for; those requests have default weights (`read_weights`).
    """

    def __init__(self, defaults: Mapping[str, float]) -> None:
        self._defaults = _row(defaults.values(), None)
        self._rows: dict[int, list[float]] = {}
        self._size: int | None = None
        self._sampling = False

    def begin_step(self, update: BatchUpdate | None, new: Any) -> None:
        """Follow a change of the batch; the next logits are those to sample from."""
        process_dict_updates(self._rows, update, new)
        if update is not None:
            self._size = update.batch_size
        self._sampling = True

    def take(self, rows: int) -> Tensor:
        """Float32 [rows, rewards + 1] for the logits that are being computed, on the CPU: weights, then the budget.

        Raises:
            RuntimeError: there are not as many rows as requests, so that nobody can say whose they are.
        """
        if not self._sampling:  # positions of prompts, or a rehearsal before the first request
            return torch.tensor([self._defaults] * rows, dtype=torch.float32)
        self._sampling = False
        if self._size is not None and rows != self._size:
            raise RuntimeError(
                f"vLLM asks for logits of {rows} rows with {self._size} requests in the batch; guided decoding knows "
                "one row a request only"
            )
        return torch.tensor([self._rows.get(row, self._defaults) for row in range(rows)], dtype=torch.float32)


_tables: WeakValueDictionary[int, WeightTable] = WeakValueDictionary()


def weight_table(vllm_config: VllmConfig) -> WeightTable | None:
    """The table of this worker, if its processor has been made. Whoever takes it must hold on to it."""
    return _tables.get(id(vllm_config.compilation_config))


class RewardWeightsProcessor(LogitsProcessor):
    """Follows the requests through the batch. Classes for each guided model come from `processor_name`."""

    defaults: Mapping[str, float] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request before it is taken in (raises WeightsError, UnsupportedError: HTTP's 400)."""
        read_weights(sampling_params, cls.defaults)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        defaults = served_config(vllm_config.model_config).default_weights
        self._table = WeightTable(defaults)
        self._names = defaults
        _tables[id(vllm_config.compilation_config)] = self._table

    def is_argmax_invariant(self) -> bool:
        """True: nothing is changed here."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """`logits` as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each step."""
        self._table.begin_step(batch_update, lambda params, _prompt, _output: read_weights(params, self._names))


def read_weights(sampling_params: SamplingParams, defaults: Mapping[str, float]) -> list[float] | None:
    """The weights of a request in the order of the rewards, then its budget; None where it gives neither.

    Raises:
        WeightsError: they name no reward, are no finite numbers, or cannot be read.
        UnsupportedError: log-probs of the prompt are asked for as well.
    """
    extra = sampling_params.extra_args or {}
    given = extra.get(FIELD)
    row = _row(weight_row({} if given is None else _mapping(given), defaults), _budget(extra.get(BUDGET)))
    if row == _row(defaults.values(), None):
        return None
    if sampling_params.prompt_logprobs is not None:
        raise UnsupportedError(
            "log-probs of the prompt (prompt_logprobs, or echo with logprobs) are computed with the model's default "
            f"weights only; leave {FIELD} and {BUDGET} out, or ask for them with genarm's own engine"
        )
    return row


def _row(weights: Iterable[float], max_kl: float | None) -> list[float]:
    return [*weights, math.inf if max_kl is None else max_kl]


def _budget(given: Any) -> float | None:
    if isinstance(given, str):  # as `vllm_xargs` may have it
        try:
            given = float(given)
        except ValueError as error:
            raise WeightsError(
                f"{BUDGET} is {given!r:.50}; it must be a number of nats per token, 0 or more"
            ) from error
    check_max_kl(given)
    return None if given is None else float(given)


def _mapping(given: Any) -> Mapping[str, float]:
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        return parse_weights(given)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise WeightsError(f"{FIELD} is {given!r:.80}, which is no JSON: {error}") from error
    if not isinstance(given, Mapping):
        raise WeightsError(
            f"{FIELD} is {given!r:.80}; give a mapping such as {{'helpful': 1.0}}, the same as a JSON text, or a text "
            "such as helpful=1,harmless=0.5"
        )
    return given


# --- a class for each guided model ------------------------------------------------------------------------------------
#
# vLLM checks requests with a classmethod that is told nothing but the request, in a process that may serve several
# models, and passes a processor on to other processes by name. So the names and defaults of the rewards are written
# into the name of the class, and looking that name up in this module makes the class.

_CLASS = re.compile(r"RewardWeights_((?:[0-9a-f]{2})+)")


def processor_name(defaults: Mapping[str, float]) -> str:
    """`module:class` of the processor for a model with these rewards."""
    return f"{__name__}:RewardWeights_{json.dumps(dict(defaults)).encode().hex()}"


@lru_cache
def _processor(name: str) -> type[RewardWeightsProcessor]:
    match = _CLASS.fullmatch(name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    defaults = json.loads(bytes.fromhex(match[1]))
    return type(name, (RewardWeightsProcessor,), {"defaults": defaults, "__module__": __name__})


def __getattr__(name: str) -> Any:
    return _processor(name)
