"""Rewarded Soups against sums of the adapters' own tensors, and of whole models' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from builders.tiny import save_member, tiny_lora, tiny_model
from genarm.errors import MemberError, WeightsError
from genarm.lab.methods.soup import soup

LAMBDAS = {"helpful": 0.7, "harmless": 0.3}


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    base = tiny_model()
    save_member(base, tmp_path / "base")
    ranks = {"helpful": 4, "harmless": 2}
    return base, {
        name: tiny_lora(base, tmp_path / name, seed=i, base_path=str(tmp_path / "base"), rank=rank)
        for i, (name, rank) in enumerate(ranks.items())
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """{module: …} of the factors in an adapter's file, by their names there."""
    return {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def _by_hand(base: PreTrainedModel, folders: dict[str, Path], *, apart: bool = False) -> dict[str, torch.Tensor]:
    """W + Σ λ s B A for every weight; `apart` averages A and B first, which is the mistake."""
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    found = {name: _tensors(folder) for name, folder in folders.items()}
    scale = 2.0  # tiny_lora's alpha is twice its rank
    for key in [key for key in found["helpful"] if ".lora_A." in key]:
        module, other = key.split(".lora_A.")[0], key.replace("lora_A", "lora_B")
        if apart:
            a, b = (sum(LAMBDAS[name] * found[name][part] for name in found) for part in (key, other))
            weights[f"{module}.weight"] += scale * b @ a
        else:
            for name in found:
                weights[f"{module}.weight"] += LAMBDAS[name] * scale * found[name][other] @ found[name][key]
    return weights


@pytest.mark.parametrize("loaded", [True, False])
def test_adapters_add_up_as_updates(
    adapters: tuple[PreTrainedModel, dict[str, Path]], loaded: bool, tmp_path: Path
) -> None:
    base, folders = adapters
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    mixed = soup(base if loaded else tmp_path / "base", folders, LAMBDAS)
    assert type(mixed) is type(base)
    expected = _by_hand(base, folders)
    assert set(mixed.state_dict()) == set(expected)
    for key, tensor in mixed.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], msg=key)
    assert max((expected[key] - before[key]).abs().max() for key in before) > 0.1
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def test_averaging_the_factors_apart_is_something_else(tmp_path: Path) -> None:
    base = tiny_model()
    folders = {
        name: tiny_lora(base, tmp_path / name, seed=i, base_path=str(tmp_path)) for i, name in enumerate(LAMBDAS)
    }
    mixed, apart = soup(base, folders, LAMBDAS).state_dict(), _by_hand(base, folders, apart=True)
    key = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(mixed[key], _by_hand(base, folders)[key])
    assert (mixed[key] - apart[key]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_a_corner_is_the_policy_itself(
    name: str, adapters: tuple[PreTrainedModel, dict[str, Path]], tmp_path: Path
) -> None:
    from peft import PeftModel

    base, folders = adapters
    ids = torch.arange(6, 16)[None]
    mixed = soup(base, folders, {other: float(other == name) for other in folders})
    with torch.no_grad():
        got = mixed(ids).logits
        expected = PeftModel.from_pretrained(tiny_model(), folders[name])(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_whole_models_add_up(tmp_path: Path) -> None:
    models = {name: tiny_model(seed=i) for i, name in enumerate(LAMBDAS)}
    folders = {name: save_member(model, tmp_path / name) for name, model in models.items()}
    mixed = soup(tmp_path / "unused", folders, LAMBDAS).state_dict()
    states = {name: model.state_dict() for name, model in models.items()}
    for key, tensor in mixed.items():
        expected = 0.7 * states["helpful"][key] + 0.3 * states["harmless"][key]
        torch.testing.assert_close(tensor, expected, msg=key)
    with pytest.raises(WeightsError, match=r"add up to 1, and they add up to 1\.3"):
        soup(tmp_path, folders, {"helpful": 1.0, "harmless": 0.3})


def test_refusals(adapters: tuple[PreTrainedModel, dict[str, Path]], tmp_path: Path) -> None:
    base, folders = adapters
    whole = save_member(tiny_model(seed=2), tmp_path / "whole")
    other = tiny_model(hidden=16)
    stranger = tiny_lora(other, tmp_path / "stranger", seed=1, base_path="x")
    cases: list[tuple[type[Exception], str, dict[str, Any], dict[str, float]]] = [
        (WeightsError, "the policies are helpful, harmless", folders, {"helpful": 1.0}),
        (WeightsError, "finite", folders, {**LAMBDAS, "helpful": float("nan")}),
        (MemberError, "helpful is an adapter, whole is a model", {"helpful": folders["helpful"], "whole": whole}, {}),
        (MemberError, "stranger.* does not fit its model: size mismatch for .*lora_A", {"stranger": stranger}, {}),
    ]
    for kind, message, policies, lambdas in cases:
        with pytest.raises(kind, match=message):
            soup(base, policies, lambdas or {name: 1 / len(policies) for name in policies})
