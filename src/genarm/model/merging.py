"""One plain causal LM in the place of a guided model, where there is one that says exactly the same.

A guided model adds up what its members say: log π = Σ_m c_m log π_m − log Z, with a coefficient for each member that
the weights give. Two cases are those of one model:

- **One member alone** has a coefficient, and it is 1: a tuned model at weight 1, its adapter merged into the weights.
- **Members of one body**, whose hidden states h are the same: the base and adapters of its output layer, such as head
  ARMs. Logits are linear in that layer, so Σ_m c_m (E_m h) is (Σ_m c_m E_m) h, at any weights. One member alone with
  another coefficient is such a case, too.

Anything else adds up different hidden states. In particular log π_base + w (log π_tuned − log π_base) is not the model
with the weights W + w·ΔW, unless w is 0 or 1: what comes out of a network is not linear in its weights.

What is written is read again by transformers and compared with what the guided model said, so that a case which nobody
thought of is refused as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from genarm.errors import UnsupportedError
from genarm.files import check_new_folder, new_folder
from genarm.model.adapters import adapter_layers, names_on
from genarm.model.combine import log_probs
from genarm.model.config import BASE
from genarm.model.contract import load_whole, refusing
from genarm.model.loading import Member
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.nearness import apart
from genarm.model.output_layer import logit_scale, output_layer
from genarm.model.references import ModelFiles
from genarm.model.saving import write_model
from genarm.model.vocabulary import embedding_rows
from genarm.model.weights import weight_row

_NO_FACTOR = 1e-9
_PROBE = (2, 16)  # rows and tokens on which both are compared


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written: the folder, each member's coefficient, the dtype, and the largest difference seen in nats."""

    folder: Path
    factors: Mapping[str, float]
    dtype: str
    difference: float


def write_merged(
    files: ModelFiles, weights: Mapping[str, float], output: Path, *, dtype: str = "auto", device: str | None = None
) -> Merged:
    """Write the plain model that says what a guided folder says at `weights` into the new folder `output`.

    Args:
        files: the guided folder.
        weights: of all its rewards.
        output: it must not exist or be empty.
        dtype, device: of the weights, and where they are computed, as for `ModelFiles.load`.

    Raises:
        DataError: `output` cannot be written, or is there already.
        UnsupportedError: no plain model says the same; the message says why.
        MemberError: a member cannot be loaded.
    """
    check_new_folder(output)
    if not files.guided:
        raise UnsupportedError(f"{files.reference} is a plain model already, so there is nothing to merge")
    outline: Any = files.outline()
    check_mergeable(outline, weights)
    guided: Any = files.load(dtype=dtype, device=device)
    generation = files.generation_config
    embedding: Any = guided.base.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding_rows(guided.base), _PROBE, generator=generator).to(embedding.weight.device)
    with torch.inference_mode():
        said_TV = guided(ids, reward_weights=weights, use_cache=False).logits.flatten(0, 1).cpu()
    factors = factors_of(guided, weights)
    model = merge(guided, weights)
    del guided
    held = str(model.dtype).removeprefix("torch.")
    with new_folder(output) as folder:
        model.generation_config = GenerationConfig()  # whatever the base's is, it is written below as it is
        write_model(model, folder)
        del model
        files.tokenizer.save_pretrained(folder)
        generation.to_json_file(folder / "generation_config.json")
        difference = _prove(folder, ids.cpu(), said_TV, held, ", ".join(factors))
    return Merged(folder=output, factors=factors, dtype=held, difference=difference)


def factors_of(guided: GuidedForCausalLM, weights: Mapping[str, float]) -> dict[str, float]:
    """{member: its coefficient c_m} of those that have one, at `weights` over the defaults (raises WeightsError)."""
    row = torch.tensor([weight_row(weights, guided.default_weights)], dtype=torch.float64)
    given = guided.coefficients(row)
    base = 1.0 if given.base_B is None else float(given.base_B[0])
    factors = zip(guided.members, [base, *given.streams_BS[0].tolist()], strict=True)
    return {member.name: factor for member, factor in factors if abs(factor) > _NO_FACTOR}


def check_mergeable(guided: GuidedForCausalLM, weights: Mapping[str, float]) -> None:
    """Whether a plain model can say the same; no values of weights are needed.

    Raises:
        WeightsError: weights that the model does not take.
        UnsupportedError: it cannot; the message says why.
    """
    factors = factors_of(guided, weights)
    if [*factors] == [BASE]:
        raise UnsupportedError("all weights are 0, so that the merged model would be the base; give --weights NAME=W")
    members = {member.name: member for member in guided.members}
    alignments = dict(zip([*members][1:], guided.alignments, strict=True))
    for name in factors:
        if members[name].wish is not None:
            raise UnsupportedError(
                f"{name!r} is a wish, which reads a prompt of its own, and no weights can stand for a prompt; merge "
                f"without it: --weights {name}=0"
            )
        if getattr(members[name].model, "hf_quantizer", None) is not None or _quantised(members[name].model):
            raise UnsupportedError(
                f"{name!r} is quantised, and a sum cannot be written into its packed weights; compose the folder with "
                "the model that is not quantised, merge that, and quantise the result"
            )
    if len({_body(members[name]) for name in factors}) > 1:
        formula = " ".join(f"{factor:+g}·log π_{name}" for name, factor in factors.items()).removeprefix("+")
        raise UnsupportedError(
            f"{formula} adds up what {len(factors)} networks with different hidden states say, which is not linear in "
            "their weights, so no weights of one network say it (a tuned model's W + w·ΔW is exact at w = 1 alone); "
            "what can be merged are a tuned reward by itself at weight 1, and adapters of the base's output layer, "
            "such as head ARMs, at any weights"
        )
    for name in factors:
        if name != BASE and (alignments[name].unknown or alignments[name].reward_size != alignments[name].base_size):
            raise UnsupportedError(
                f"{name!r} does not have exactly the base's token ids, and a plain model would say those that it does "
                "not know; the guided model never does"
            )
    if _own_output(factors) and type(_plain(output_layer(members[next(iter(factors))].model))) is not nn.Linear:
        raise UnsupportedError("the base's output layer is no plain linear layer, so nothing can be added to it")


def merge(guided: GuidedForCausalLM, weights: Mapping[str, float]) -> PreTrainedModel:
    """The plain model that says what `guided` says at `weights`; made of its members, so that `guided` is used up.

    Raises:
        WeightsError, UnsupportedError: as `check_mergeable`; or the logits are more than what the output layer says.
    """
    check_mergeable(guided, weights)
    factors = factors_of(guided, weights)
    members = [member for member in guided.members if member.name in factors]
    model, adapter = members[0].model, _body(members[0])[1]
    if _own_output(factors) and logit_scale(model) is None:
        raise UnsupportedError(
            f"{type(model).__name__} does more to its logits than its output layer (a cap, say), so that those of "
            f"{', '.join(factors)} do not add up in that layer"
        )
    with refusing("cannot merge"), torch.no_grad():
        new = _new_output(output_layer(model), [(member.adapter, factors[member.name]) for member in members])
        _untie(model, changed=new is not None or adapter in _names(model.get_input_embeddings()))
        model = _without_adapters(model, guided.members, adapter)
        if new is not None:
            layer = output_layer(model)
            layer.weight = nn.Parameter(new[0].to(layer.weight), requires_grad=False)
            if new[1] is not None:
                layer.bias = nn.Parameter(new[1].to(layer.weight), requires_grad=False)
    return model


# --- parts ----------------------------------------------------------------------------------------------------


def _own_output(factors: Mapping[str, float]) -> bool:
    """Whether the merged output layer is another than that of a member."""
    return [*factors.values()] != [1.0]


def _quantised(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _plain(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _body(member: Member) -> tuple[int, str | None]:
    """What makes a member's last hidden states: the model, and the adapter unless it is on the output layer alone."""
    layers = [layer for layer in adapter_layers(member.model) if member.adapter in names_on(layer)]
    return id(member.model), None if layers in ([], [output_layer(member.model)]) else member.adapter


def _new_output(layer: Any, factors: Sequence[tuple[str | None, float]]) -> tuple[Tensor, Tensor | None] | None:
    """Σ_m c_m E_m of (adapter, c_m) in float32, and of the biases; None where that is the layer as it is."""
    touched = {adapter for adapter, _ in factors} & _names(layer)
    if not touched and [factor for _, factor in factors] == [1.0]:
        return None
    total: list[Tensor | None] = [None, None]
    for adapter, factor in factors:
        own: Any = copy.deepcopy(layer).to(torch.float32)
        if adapter in touched:
            own.merge(adapter_names=[adapter])  # whatever peft's kinds of adapters mean there
        plain = _plain(own)
        for i, part in enumerate((plain.weight, plain.bias)):
            if part is not None:
                total[i] = factor * part + (0 if total[i] is None else total[i])
    weight, bias = total
    assert weight is not None
    return weight.contiguous(), bias


def _names(layer: Any) -> set[str | None]:
    return {*names_on(layer)} if hasattr(layer, "adapter_layer_names") else set()


def _untie(model: PreTrainedModel, *, changed: bool) -> None:
    """Give the output layer weights of its own where it shares them with the embedding and either is to change."""
    layer, embedding = _plain(output_layer(model)), _plain(model.get_input_embeddings())
    if not changed or layer is None or layer.weight is not embedding.weight:
        return
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _without_adapters(model: PreTrainedModel, members: tuple[Member, ...], adapter: str | None) -> PreTrainedModel:
    """The model with one adapter merged into its weights, or none, and without the others."""
    peft: Any = next((m.peft for m in members if m.model is model and m.peft is not None), None)
    if peft is None:
        return model
    found: PreTrainedModel = peft.unload() if adapter is None else peft.merge_and_unload(adapter_names=[adapter])
    return found


def _prove(folder: Path, ids: Tensor, said_TV: Tensor, dtype: str, names: str) -> float:
    """The largest difference in nats of the written model from the guided one (raises UnsupportedError)."""
    model = load_whole(AutoModelForCausalLM, str(folder), what="the merged model", dtype=dtype)
    with torch.inference_mode():
        got_TV = log_probs(model.eval()(ids, use_cache=False).logits).flatten(0, 1)
    if (far := apart(got_TV, said_TV, exact=dtype in ("float32", "float64"))) is not None:
        raise UnsupportedError(
            f"the merged model would say something else than {names} do together (up to {far:.2g} nats), so nothing "
            "was written; what this model does with its output layer or its adapters is not known here"
        )
    return float((got_TV - said_TV).abs().max())
