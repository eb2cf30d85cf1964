"""Rewarded Soups (arXiv 2306.04488): one policy from several, each trained for one objective, by adding up weights.

LoRA adapters add up as updates of the weights, ΔW = Σ_i λ_i s_i B_i A_i with s_i the adapter's scale. Averaging the
factors A and B apart would mix in products B_i A_j of different policies. Whole models add up as θ = Σ_i λ_i θ_i.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from genarm.errors import MemberError, WeightsError
from genarm.lab.methods.interface import Kind, Parts, tally
from genarm.lab.methods.sample import POLICY, Sample
from genarm.model.config import MemberSpec
from genarm.model.contract import ADAPTER_FILE, load_whole
from genarm.model.loading import HubOptions, adapter_name, add_adapters

Folder: TypeAlias = str | Path


def soup(
    base: PreTrainedModel | Folder, policies: Mapping[str, Folder], lambdas: Mapping[str, float]
) -> PreTrainedModel:
    """The policy with the weights λ over `policies`, as a plain model of its own.

    Args:
        base: the model that adapters go on, loaded (it is left as it is) or its folder; whole models do without it.
        policies: {name: folder} of LoRA adapters, or of whole models.
        lambdas: {name: λ} for the same names; for whole models they add up to 1.

    Raises:
        WeightsError: other names than the policies', or values that do not serve.
        MemberError: a policy that cannot be loaded, or policies that cannot be added up.
    """
    _check_lambdas(policies, lambdas)
    adapters = {name: (Path(folder) / ADAPTER_FILE).is_file() for name, folder in policies.items()}
    if all(adapters.values()):
        return _add_updates(base, policies, lambdas)
    if any(adapters.values()):
        kinds = ", ".join(f"{name} is {'an adapter' if found else 'a model'}" for name, found in adapters.items())
        raise MemberError(f"a soup is made of adapters or of whole models, and {kinds}; train all in one way")
    return _add_models(policies, lambdas)


@torch.no_grad()
def _add_updates(
    base: PreTrainedModel | Folder, policies: Mapping[str, Folder], lambdas: Mapping[str, float]
) -> PreTrainedModel:
    model = copy.deepcopy(base) if isinstance(base, PreTrainedModel) else _load(base, "the base")
    specs = {name: MemberSpec(adapter=str(Path(folder).absolute())) for name, folder in policies.items()}
    adapted: Any = add_adapters(model, specs, None, HubOptions())
    factors = {adapter_name(index): lambdas[name] for index, name in enumerate(policies)}
    for name, adapter in zip(policies, factors, strict=True):
        if adapted.peft_config[adapter].use_dora or adapted.peft_config[adapter].lora_bias:
            raise MemberError(f"the adapter {name} is more than plain LoRA (DoRA, biases), so it cannot be added up")
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            _update(module, factors)
    plain: PreTrainedModel = adapted.unload()
    return plain.eval()


def _update(layer: Any, lambdas: Mapping[str, float]) -> None:
    """W + Σ_i λ_i s_i B_i A_i in float32, over the adapters that this layer has."""
    weight = layer.get_base_layer().weight
    updates = [factor * layer.get_delta_weight(name).float() for name, factor in lambdas.items() if name in layer.r]
    weight.copy_(weight.float() + torch.stack(updates).sum(0))


@torch.no_grad()
def _add_models(policies: Mapping[str, Folder], lambdas: Mapping[str, float]) -> PreTrainedModel:
    total = sum(lambdas.values())
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise WeightsError(f"the λ of whole models must add up to 1, and they add up to {total:g}")
    first, *others = policies
    result = _load(policies[first], first)
    target = {key: tensor for key, tensor in result.state_dict().items() if tensor.is_floating_point()}
    sums = {key: lambdas[first] * tensor.float() for key, tensor in target.items()}
    for name in others:
        weights = _load(policies[name], name).state_dict()
        shapes = {key: tensor.shape for key, tensor in weights.items() if tensor.is_floating_point()}
        if shapes != {key: tensor.shape for key, tensor in target.items()}:
            raise MemberError(f"the policies {first} and {name} have different shapes; start both from one model")
        for key, tensor in sums.items():
            tensor += lambdas[name] * weights[key].float()
    for key, tensor in target.items():
        tensor.copy_(sums[key])
    return result.eval()


def _check_lambdas(policies: Mapping[str, Folder], lambdas: Mapping[str, float]) -> None:
    if not policies:
        raise MemberError("a soup needs a policy at least")
    if set(policies) != set(lambdas):
        raise WeightsError(f"λ are given for {', '.join(lambdas)}, and the policies are {', '.join(policies)}")
    if not all(math.isfinite(value) for value in lambdas.values()):
        raise WeightsError(f"every λ must be a finite number, got {dict(lambdas)}")


def _load(folder: Folder, name: str) -> PreTrainedModel:
    model: PreTrainedModel = load_whole(AutoModelForCausalLM, str(folder), what=name)
    return model


def _build(parts: Parts) -> Sample:
    policies = {name: parts.models.resolve(reference) for name, reference in parts.spec.named.items()}
    mixed = soup(parts.model("base"), policies, parts.spec.weights)
    return Sample(mixed, parts.tokenizer, parts.sampling, names=POLICY)


KIND = Kind(
    name="soup",
    roles=("base",),
    named="policies",
    build=_build,
    forwards=lambda spec, tokens: tally((f"soup on {spec.base}", tokens)),
    total=lambda *_: 1.0,
)
