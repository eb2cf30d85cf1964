"""Values over the vocabulary against autograd on whole tables: log-probs, and a product of two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genarm.training import responses
from genarm.training.responses import ResponseStates, over_vocabulary, summed, token_log_probs

N, D, V = 11, 6, 13
WEIGHT = 0.7


def _states(seed: int, kind: str, dtype: torch.dtype = torch.float64) -> ResponseStates:
    torch.manual_seed(seed)
    layer = nn.Linear(D, V, dtype=dtype).requires_grad_(kind == "trained")
    heads: dict[str, Callable[[Tensor], Tensor]] = {
        "frozen": layer,
        "trained": lambda hidden: 5 * torch.tanh(layer(hidden) / 5),
        "table": nn.Identity(),
    }
    hidden_ND = 3 * torch.randn(N, V if kind == "table" else D, dtype=dtype)
    return ResponseStates(
        hidden_ND=hidden_ND.requires_grad_(),
        labels_N=torch.randint(V, (N,)),
        sequences_N=torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3]),
        count=4,
        head=heads[kind],
    )


def _parameters(states: ResponseStates) -> list[Tensor]:
    closure: Any = getattr(states.head, "__closure__", None) or ()
    layers = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, nn.Module)]
    return [states.hidden_ND, *(parameter for layer in layers for parameter in layer.parameters())]


def _picked(table_NV: Tensor, labels_N: Tensor) -> Tensor:
    return table_NV.gather(-1, labels_N[:, None]).squeeze(-1)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("kind", ["frozen", "trained", "table"])
def test_log_probs_and_gradients(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "CHUNK_ENTRIES", chunk * V)
    states = _states(0, kind)
    weights_N = torch.rand(N, dtype=torch.float64)
    got = token_log_probs(states)
    expected = _picked(states.head(states.hidden_ND).log_softmax(-1), states.labels_N)
    torch.testing.assert_close(got, expected)
    inputs = _parameters(states)
    assert len(inputs) == (3 if kind == "trained" else 1)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights_N).sum(), inputs),
        torch.autograd.grad((expected * weights_N).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(states), expected)


@pytest.mark.parametrize("kinds", [("frozen", "frozen"), ("frozen", "trained"), ("table", "trained")])
def test_a_function_of_two_models(kinds: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probs of π_base · π_arm^w / Z, with a base that takes no gradient."""
    monkeypatch.setattr(responses, "CHUNK_ENTRIES", 4 * V)

    def product(labels_C: Tensor, base_CV: Tensor, arm_CV: Tensor) -> Tensor:
        return _picked((base_CV.log_softmax(-1) + WEIGHT * arm_CV.log_softmax(-1)).log_softmax(-1), labels_C)

    base, arm = _states(0, kinds[0]), _states(1, kinds[1])
    base = replace(base, hidden_ND=base.hidden_ND.detach())
    got = over_vocabulary(product, base, arm)
    expected = product(base.labels_N, base.head(base.hidden_ND), arm.head(arm.hidden_ND))
    torch.testing.assert_close(got, expected)
    inputs = _parameters(arm)
    ours, theirs = (torch.autograd.grad(value.square().sum(), inputs) for value in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_sums_belong_to_sequences() -> None:
    states, values_N = _states(0, "frozen"), torch.arange(N, dtype=torch.float32)
    assert summed(values_N, states).tolist() == [3, 3, 22, 27]
    assert summed(values_N, replace(states, sequences_N=3 - states.sequences_N)).tolist() == [27, 22, 3, 3]


def test_huge_logits_stay_finite_and_bfloat16_is_summed_in_float32() -> None:
    states = _states(0, "table", torch.bfloat16)
    states = replace(states, hidden_ND=(1e4 * states.hidden_ND.detach()).requires_grad_())
    got = token_log_probs(states)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), _picked(states.hidden_ND.double().log_softmax(-1), states.labels_N), rtol=1e-6, atol=1e-6
    )
    got.sum().backward()
    assert states.hidden_ND.grad is not None
    assert states.hidden_ND.grad.dtype == torch.bfloat16
