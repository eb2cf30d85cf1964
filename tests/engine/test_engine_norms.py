"""RMSNorm as one kernel against the models' own, written out."""

from __future__ import annotations

import copy

import pytest
import torch

from builders.families import tiny_family
from genarm.engine.norms import fuse_norms, one_kernel_norms

KINDS = {"llama": True, "qwen3": True, "mixtral": True, "olmo2": True, "gemma2": False, "gpt_neox": False}
"""Families, and whether their norms are x / √(mean x² + ε) · weight."""


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norms_are_what_they_were(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_family(family).to(dtype)
    plain = copy.deepcopy(model)
    fuse_norms(model)
    norms = {name: module for name, module in model.named_modules() if "norm" in name}
    kernels: list[str] = []
    for name, norm in norms.items():
        before = plain.get_submodule(name)
        size = before.weight.shape[-1]  # type: ignore[union-attr]
        x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(1)).to(dtype).to(model.device)
        assert torch.equal(norm(x), before(x))
        with one_kernel_norms():
            torch.testing.assert_close(norm(x), before(x), atol=tolerance, rtol=tolerance)
        kernels += [name] if type(norm) is not type(before) else []
    assert bool(kernels) == KINDS[family]
    assert {*model.state_dict()} == {*plain.state_dict()}
