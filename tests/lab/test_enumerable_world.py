"""An ARM trained on exact preferences steers the base towards the exactly computed optimum."""

from __future__ import annotations

import enumerable_world
import pytest
import torch


def test_guided_decoding_moves_towards_the_optimum() -> None:
    distances = enumerable_world.run(seed=1, steps=300)
    print(distances)
    assert distances.guided < 0.5 * distances.base
    assert distances.product < 0.5 * distances.guided  # what normalising per token costs
    assert distances.ideal == pytest.approx(0, abs=1e-9)  # some ARM reaches the optimum exactly


def test_divergence_against_a_worked_example() -> None:
    p, q = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.9, 0.1]).double().log()
    assert enumerable_world.kl(p, q) == pytest.approx(0.5108, abs=1e-4)
    assert enumerable_world.kl(p, q + 3) == pytest.approx(0.5108, abs=1e-4)


def test_the_product_loss_aims_at_the_optimum_and_the_others_less_so() -> None:
    found = enumerable_world.compare_losses(1, beta=1.0, steps=100, start="small", losses=("arm", "product"))
    assert found["product"]["own"] > found["arm"]["own"] + 0.05
    assert found["ideal ARM"]["own"] == pytest.approx(1, abs=1e-9)
    assert set(found["product"]) == set(enumerable_world.BASES)
