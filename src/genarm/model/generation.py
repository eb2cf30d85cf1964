"""The hooks of transformers' `generate`: how one call keeps its reward weights, its caches and its arguments.

Shapes: B rows, T positions, R rewards.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache

from genarm.errors import UnsupportedError, WeightsError
from genarm.model.cache import GuidedCache
from genarm.model.combine import Coefficients
from genarm.model.config import GuidedConfig
from genarm.model.loading import Member
from genarm.model.weights import RewardWeights, resolve_max_kl, resolve_weights
from genarm.model.wishes import Contexts


class _Call(NamedTuple):
    """What a `generate` call asks of the model, a row for each sequence."""

    weights_BR: Tensor
    max_kl_B: Tensor | None


_calls: ContextVar[Mapping[int, _Call]] = ContextVar("each model's generate call in this thread")


class GuidedGeneration(GenerationMixin):
    """`generate` of a guided model, which makes the weights a row per sequence and a cache per member."""

    members: tuple[Member, ...]
    config: GuidedConfig

    def coefficients(self, weights_BR: Tensor) -> Coefficients:
        """See `GuidedForCausalLM`."""
        raise NotImplementedError

    def with_wishes(self, wishes: Mapping[str, str]) -> GuidedGeneration:
        """See `GuidedForCausalLM`."""
        raise NotImplementedError

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`, with `reward_weights`, `max_kl` and `contexts` beside its own arguments.

        Every forward that transformers makes within the call uses them, the one for `negative_prompt_ids` too. Inputs
        that `encode` made with wishes of their own have these as rewards for this call.

        Raises:
            WeightsError: the weights are not what they may be.
            UnsupportedError: continuous batching, or early exit from a layer.
        """
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        if kwargs.get("assistant_early_exit") is not None:
            raise UnsupportedError(
                "a guided model has no layers of its own to leave early, as assistant_early_exit asks; draft with "
                "assistant_model= or prompt_lookup_num_tokens= instead"
            )
        if "wishes" in kwargs:
            raise UnsupportedError(
                "generate takes wishes by its inputs, since each wish reads the prompt in its own way: "
                "generate(**model.encode(prompts, wishes={name: text}), reward_weights={name: weight})"
            )
        contexts = kwargs.get("contexts")
        if isinstance(contexts, Contexts) and contexts.wishes:
            kwargs["contexts"] = replace(contexts, wishes={})
            return self.with_wishes(contexts.wishes).generate(inputs, *args, **kwargs)
        before = _calls.set({**_calls.get({})})
        try:
            parent: Any = super()
            return parent.generate(inputs, *args, **kwargs)
        finally:
            _calls.reset(before)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as continuous batching is."""
        raise UnsupportedError(
            "transformers' continuous batching reads one model's layers, so it cannot run a guided model; "
            "genarm.engine.Engine serves many requests at once"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self.generate_batch()

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self.generate_batch()

    def _row_weights(self, given: RewardWeights | None, batch_size: int) -> Tensor:
        """[batch_size, R] for a forward: what it was given, else what the `generate` call around it was."""
        call = _calls.get({}).get(id(self))
        if call is None or (given is not None and given is not call.weights_BR):
            return resolve_weights(given, self.config.default_weights, batch_size)
        return _fit(call.weights_BR, batch_size)

    def _row_budgets(self, given: float | Tensor | None, batch_size: int) -> Tensor | None:
        """[batch_size] for a forward, likewise; None where nothing is bounded."""
        call = _calls.get({}).get(id(self))
        if call is None or (given is not None and given is not call.max_kl_B):
            return resolve_max_kl(given, batch_size)
        return None if call.max_kl_B is None else _fit(call.max_kl_B[:, None], batch_size)[:, 0]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        parent: Any = super()
        base: Any = self.members[0].model
        extra = {"token_type_ids"} & forward_arguments(base)
        parent._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in extra})

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        # `generate` calls this once, before anything is run: here the weights become a row per sequence, so that
        # they are repeated with the rows for beams and for several returned sequences.
        assert input_ids is not None
        rows = input_ids.shape[0]
        model_kwargs["reward_weights"] = resolve_weights(
            model_kwargs.get("reward_weights"), self.config.default_weights, rows
        )
        model_kwargs["max_kl"] = resolve_max_kl(model_kwargs.get("max_kl"), rows)
        if isinstance(contexts := model_kwargs.get("contexts"), Contexts):
            if input_ids.shape[1] < contexts.columns:
                raise UnsupportedError(
                    f"input_ids have {input_ids.shape[1]} columns and the prompts of the contexts {contexts.columns}; "
                    "give what one call of encode has made"
                )
            model_kwargs["contexts"] = contexts.repeated(expand_size)
        parent: Any = super()  # transformers types `self` there as a protocol of its own
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        calls = _calls.get(None)
        if isinstance(calls, dict):
            calls[id(self)] = _Call(model_kwargs["reward_weights"], model_kwargs["max_kl"])
        assert input_ids is not None
        return input_ids, model_kwargs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let each member that will run make the cache its own architecture needs (static, sliding, …)."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            parent: Any = super()
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        needed_BS = self.coefficients(model_kwargs["reward_weights"]).streams_BS != 0
        caches: dict[str, Cache] = {}
        for i, member in enumerate(self.members):
            if i == 0 or bool(needed_BS[:, i - 1].any()):
                own: dict[str, Any] = {}
                model: Any = member.model
                contexts = model_kwargs.get("contexts")
                extra = 0 if member.wish is None or contexts is None else contexts.extra(member.name)
                model._prepare_cache_for_generation(
                    generation_config, own, generation_mode, batch_size, max_cache_length + extra
                )
                caches[member.name] = own["past_key_values"]
        model_kwargs["past_key_values"] = GuidedCache(caches)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        # An assistant with other rewards, or with none, would refuse the weights.
        assistant = kwargs.get("assistant_model")
        if getattr(assistant, "default_weights", {}).keys() != self.config.default_weights.keys():
            own = ("reward_weights", "max_kl", "contexts")
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in own}
        parent: Any = super()
        return parent._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)


def forward_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments that a model's forward declares, "kwargs" where it takes any others."""
    return frozenset(inspect.signature(model.forward).parameters)


def last_positions(count: int | Tensor, ids_BT: Tensor) -> int | Tensor:
    """`logits_to_keep`, as indices where a slice would leave some positions out.

    A slice of several rows is not contiguous, and for such hidden states torch copies a frozen output layer once for
    each row (in bfloat16 on a CPU, seven times a whole prefill's time). Indices make a copy of the states instead.
    """
    length = ids_BT.shape[1]
    if isinstance(count, Tensor) or count == 0 or count >= length:
        return count
    return torch.arange(length - count, length, device=ids_BT.device)


def _fit(weights_BR: Tensor, batch_size: int) -> Tensor:
    """The rows of a call for a forward of `batch_size` rows: several for each, or one for several that are alike."""
    rows = len(weights_BR)
    if rows == batch_size:
        return weights_BR
    if batch_size % rows == 0:
        return weights_BR.repeat_interleave(batch_size // rows, dim=0)
    if rows % batch_size == 0:
        groups = weights_BR.view(batch_size, rows // batch_size, -1)
        if bool((groups == groups[:, :1]).all()):
            return groups[:, 0]
    raise WeightsError(
        f"a forward of {batch_size} rows inside a generate call with reward weights for {rows} rows; give as many rows "
        "of negative_prompt_ids as of prompts"
    )
