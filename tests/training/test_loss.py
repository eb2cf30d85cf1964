"""The ARM loss against sums written by hand, numerical gradients and TRL."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from builders.tiny import tiny_model, tiny_tokenizer
from genarm.data.formats.base import Preference
from genarm.data.tokens import tokenize
from genarm.training import loss as loss_module
from genarm.training.collator import collate
from genarm.training.loss import arm_loss, response_log_probs, token_log_probs
from genarm.training.trainer import ArmTrainer


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (3, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    return logits.to(dtype), labels, mask


def test_sum_by_hand() -> None:
    logits, labels, mask = _inputs()
    for row, got in enumerate(response_log_probs(logits, labels, mask).tolist()):
        expected = 0.0
        for t in range(5):
            if mask[row, t]:
                scores = logits[row, t].tolist()
                expected += scores[labels[row, t]] - math.log(sum(math.exp(s) for s in scores))
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 14, 1 << 24])  # one position at a time, two, all
def test_equals_log_softmax_in_values_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ENTRIES", chunk)
    logits, labels, mask = _inputs()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.rand(3, 5)
    got = token_log_probs(ours, labels, mask)
    expected = theirs.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask
    torch.testing.assert_close(got, expected)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck() -> None:
    logits, labels, mask = _inputs(torch.float64)
    torch.autograd.gradcheck(lambda z: response_log_probs(z, labels, mask), logits.requires_grad_())


def test_gradcheck_of_the_whole_loss_on_a_view_of_logits() -> None:
    logits, labels, mask = _inputs(torch.float64)

    def loss(z: torch.Tensor) -> torch.Tensor:
        rewards = response_log_probs(z.transpose(0, 1)[:, 1:], labels[:, 1:], mask[:, 1:])
        return arm_loss(rewards[:1], rewards[1:2], 0.5)

    torch.autograd.gradcheck(loss, logits.transpose(0, 1).contiguous().requires_grad_())


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    value = response_log_probs(logits, torch.tensor([[1]]), torch.tensor([[1]]))
    assert value.item() == -2e4
    value.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[[-1.0, 1.0, 0.0]]]))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 200, 50, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(50, (2, 200), generator=generator)
    got = response_log_probs(logits, labels, torch.ones_like(labels))
    assert got.dtype == torch.float32
    exact = logits.detach().double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    got.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_no_second_table_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tensor as large as the logits is ever made, saved or returned, forwards or backwards."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(loss_module, "CHUNK_ENTRIES", 10 * 128)
    logits = torch.randn(4, 64, 128).bfloat16().requires_grad_()
    labels = torch.randint(128, (4, 64))
    largest = 0
    saved: list[torch.Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    largest = max(largest, tensor.numel())
            return out

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with Watch(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        response_log_probs(logits, labels, torch.ones_like(labels)).sum().backward()
    assert largest <= 10 * 128  # one chunk
    tables = [tensor for tensor in saved if tensor.numel() >= logits.numel()]
    assert {tensor.data_ptr() for tensor in tables} == {logits.data_ptr()}


def test_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([-3.0, -10.0]), torch.tensor([-5.0, -4.0])
    expected = sum(math.log1p(math.exp(-0.1 * margin)) for margin in (2.0, -6.0)) / 2
    assert arm_loss(chosen, rejected, 0.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_trl_cpo_sigmoid_without_nll(family: str, tmp_path: Path) -> None:
    """TRL's CPO trainer with `cpo_alpha=0` and the sigmoid loss, from the same texts to the same number."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    tokenizer, model = tiny_tokenizer(), tiny_model(family)
    rows = [
        {"prompt": "w0 w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"},
        {"prompt": "w7", "chosen": " w8", "rejected": " w9 w10 w11 w12 w3"},
    ]
    arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path)}
    theirs = CPOTrainer(
        model=model,
        args=CPOConfig(beta=0.3, loss_type="sigmoid", cpo_alpha=0.0, per_device_train_batch_size=2, **arguments),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )
    model.eval()
    batch = next(iter(theirs.get_train_dataloader()))
    expected, metrics = theirs.get_batch_loss_metrics(model, batch)

    pairs = tokenize(tokenizer, [Preference(**row) for row in rows], max_prompt_tokens=64, max_response_tokens=64).pairs
    ours = ArmTrainer(model, TrainingArguments(**arguments), beta=0.3, train_pairs=list(pairs))
    got = ours.compute_loss(model, collate(pairs))
    torch.testing.assert_close(got, expected)
    chosen, rejected = ours.rewards(model, collate(pairs))
    assert chosen.mean().item() == pytest.approx(metrics["logps/chosen"], rel=1e-5)
    assert rejected.mean().item() == pytest.approx(metrics["logps/rejected"], rel=1e-5)
