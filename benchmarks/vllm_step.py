"""Where a step of vLLM spends its time on a CPU, plain and with one LoRA ARM that shares the base's forward.

    .venv-vllm/bin/python benchmarks/vllm_step.py

Two tables, about five minutes, for the models of `genarm bench vllm --base-shape 200m`:

- all linear layers and the output layer of the base once over, by how many rows go through them. One stream of a
  guided model has two rows where plain vLLM has one (`quicker_twice` in `genarm/vllm/streams.py`);
- torch's profiler on compiled decoding steps of one stream. Times are those of an operation itself, without what it
  calls; the profiler makes every step a little slower.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from genarm.lab.bench import figures
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.vllm_models import write_entries

SHAPES_200M = SHAPES["200m"]
ROWS = (1, 2, 3, 4, 6, 8, 16, 32)
PASSES = 30
PROMPT, TOKENS = 32, 48
KINDS = {
    "products (onednn_mm)": ("_C::onednn_mm",),
    "low-rank products (aten::mm)": ("aten::mm",),
    "compiled loops": ("## Call CompiledFxGraph None ##", "Call CompiledFxGraph"),
    "attention and its cache": (
        *("_C::cpu_attention_with_kv_cache", "vllm::unified_attention_with_output"),
        *("_C::cpu_attn_reshape_and_cache", "vllm::unified_kv_cache_update"),
    ),
}


def products() -> None:
    """Print the milliseconds of a pass over all weights, by rows."""
    from vllm import _custom_ops as ops

    base = SHAPES_200M.base
    width, inner = base.hidden, base.intermediate
    layer = [(3 * width, width), (width, width), (2 * inner, width), (width, inner)]
    sizes = [*layer * base.layers, (base.vocabulary, width)]
    weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16) for outputs, inputs in sizes]
    handlers = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(PASSES):
        for rows, taken in times.items():
            inputs = {size: torch.randn(rows, size, dtype=torch.bfloat16) for size in (width, inner)}
            began = time.perf_counter()
            for handler, (_, size) in zip(handlers, sizes, strict=True):
                ops.onednn_mm(handler, inputs[size], None)
            taken.append(1000 * (time.perf_counter() - began))
    print("\n| rows | ms: median [smallest to largest] |\n| --- | --- |")
    for rows, taken in times.items():
        counted = taken[3:]
        print(f"| {rows} | {statistics.median(counted):.1f} [{min(counted):.1f} to {max(counted):.1f}] |")


def profile(folder: Path, files: Path) -> dict[str, float]:
    """Milliseconds a step by kind of operation; the whole step, unprofiled, comes first."""
    os.environ |= {
        "VLLM_CACHE_ROOT": str(files),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
        async_scheduling=False,
    )
    prompts = [{"prompt_token_ids": list(range(5, 5 + PROMPT))}]
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    steps: list[float] = []
    usual = llm.llm_engine.step

    def timed() -> list[object]:
        began = time.perf_counter()
        outputs = usual()
        steps.append(1000 * (time.perf_counter() - began))
        return list(outputs)

    llm.llm_engine.step = timed
    for _ in range(6):
        llm.generate(prompts, greedy, use_tqdm=False)
    result = {"a whole step": statistics.median(steps)}
    with profiler(activities=[ProfilerActivity.CPU]) as seen:
        llm.generate(prompts, greedy, use_tqdm=False)
    own = {event.key: event.self_cpu_time_total / 1000 / TOKENS for event in seen.key_averages()}
    return result | {kind: sum(own.get(name, 0.0) for name in names) for kind, names in KINDS.items()}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="genarm-step-") as root:
        # An engine of vLLM wants a process to itself, and so does whatever is timed.
        spawning = multiprocessing.get_context("spawn")
        with spawning.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(products)
            entries = write_entries(SHAPES_200M, dtype=torch.bfloat16, seed=0, root=Path(root))
            columns = {
                name: pool.apply(profile, (entries[name].folder, Path(root) / "compiled"))
                for name in (figures.VLLM_PLAIN, figures.VLLM_LORA)
            }
    print(f"\n| ms a step, 1 stream | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for kind in ("a whole step", *KINDS):
        print(f"| {kind} | {' | '.join(f'{column[kind]:.2f}' for column in columns.values())} |")


if __name__ == "__main__":
    main()
