"""A quantised base inside vLLM, with full and with LoRA ARMs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.platforms import current_platform

from builders.guided_vllm import SHAPES, Asked, ask, engine, folder, members, oracle

current_platform.import_kernels()
pytestmark = pytest.mark.skipif(
    current_platform.is_cpu() and not hasattr(torch.ops._C, "cpu_gemm_wna16"),
    reason="vLLM's CPU build multiplies 4-bit weights on processors with AVX-512 only",
)

GROUP = 32
BF16 = 0.15  # vLLM's 4-bit kernel on CPU computes in bfloat16; the oracle does in float32


def quantise(weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ's tensors of a weight in 4 bits, and the weight that they stand for, which bfloat16 holds exactly.

    Scales are powers of two, one for `GROUP` inputs of an output; zero is 8.
    """
    outputs, inputs = weight_OI.shape
    grouped = weight_OI.reshape(outputs, -1, GROUP)
    scale = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1, keepdim=True) / 7)))
    levels = torch.clamp(torch.round(grouped / scale), -8, 7)
    exact = (levels * scale).reshape(outputs, inputs)
    codes_IO = (levels.reshape(outputs, inputs).t() + 8).to(torch.int64)
    shifts = 4 * torch.arange(8)
    packed = (codes_IO.reshape(-1, 8, outputs) << shifts[:, None]).sum(1)
    zeros = torch.full((inputs // GROUP, outputs // 8), int((7 << shifts).sum()))  # written as zero − 1
    to_int32 = lambda values: values.to(torch.int64).bitwise_and(0xFFFFFFFF).view(torch.int32)[..., ::2].contiguous()  # noqa: E731
    return {
        "qweight": to_int32(packed),
        "qzeros": to_int32(zeros),
        "scales": scale.squeeze(-1).t().contiguous().to(torch.bfloat16),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }, exact


def quantised(model: Path, output: Path, exact: Path) -> None:
    """Write `model` in 4 bits to `output`, and the model that those bits stand for to `exact`."""
    import shutil

    for target in (output, exact):
        shutil.copytree(model, target)
    tensors = load_file(model / "model.safetensors")
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        if "_proj." not in name:
            packed[name] = plain[name] = tensor.to(torch.bfloat16)
            continue
        own, plain[name] = quantise(tensor.float())
        packed |= {name.replace("weight", part): value for part, value in own.items()}
    save_file(packed, output / "model.safetensors", {"format": "pt"})
    save_file(plain, exact / "model.safetensors", {"format": "pt"})
    record = json.loads((output / "config.json").read_text())
    record["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
    }
    (output / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize("rewards", [{"arm": "small"}, {"helpful": "lora", "harmless": "lora2"}], ids=["full", "lora"])
def test_a_base_in_four_bits(tmp_path: Path, rewards: dict[str, str]) -> None:
    assert SHAPES["llama"]["hidden"] % GROUP == 0
    places = members(tmp_path / "plain")
    quantised(places["base"], tmp_path / "four", tmp_path / "exact")
    four, exact = ({**places, "base": tmp_path / name} for name in ("four", "exact"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asked = [
        Asked(prompt=[7, 8, 9, 10], weights=dict.fromkeys(rewards, 0.0), tokens=6),
        Asked(prompt=list(range(6, 40)), weights=dict.fromkeys(rewards, 0.6), tokens=6),
    ]
    with engine(folder(tmp_path / "a", four, rewards), dtype="bfloat16") as llm:
        outputs = ask(llm, asked)
    model, unquantised = oracle(folder(tmp_path / "b", exact, rewards)), oracle(folder(tmp_path, places, rewards))
    for request, output in zip(asked, outputs, strict=True):
        reply = output.outputs[0]
        ids = torch.tensor([[*request.prompt, *reply.token_ids]])
        with torch.no_grad():
            expected, other = (
                m(ids, reward_weights=request.weights).logits[0, len(request.prompt) - 1 :]
                for m in (model, unquantised)
            )
        found = [(t, k, e.logprob) for t, entries in enumerate(reply.logprobs) for k, e in entries.items()]
        distances = [abs(value - expected[t, k].item()) for t, k, value in found]
        # How much is rounded depends on the processor's kernel (0.03 to 0.07 in the median, single ones to 0.24).
        assert median(distances) < BF16
        assert max(distances) < 3 * BF16
        assert median(abs(value - other[t, k].item()) for t, k, value in found) > 2 * BF16  # the bits make a difference
