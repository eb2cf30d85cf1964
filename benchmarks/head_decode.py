"""Time per token of head ARMs over the unguided base, at one stream and at many, interleaved.

    python benchmarks/head_decode.py --base-shape 7b --device cuda --streams 1 16 64

`genarm bench decode` has the same contestants among many others, for which a large base needs more memory.
"""

from __future__ import annotations

import argparse

from genarm.engine import Engine, EngineOptions
from genarm.lab.bench.contestants import in_engine, make_task, throughput
from genarm.lab.bench.decode import PROMPT_TOKENS, choose_where
from genarm.lab.bench.models import random_adapters, random_model, twin, word_tokenizer
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.timing import ratios, spread, take_turns
from genarm.model.modeling import GuidedForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-shape", choices=tuple(SHAPES), default="200m")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args()
    where = choose_where(given.device, given.dtype)
    base = random_model(SHAPES[given.base_shape].base, dtype=where.torch_dtype, device=where.device, seed=0)
    task = make_task(
        prompts=max(given.rounds + 1, *given.streams),
        prompt_tokens=PROMPT_TOKENS,
        tokens=given.tokens,
        vocabulary=SHAPES[given.base_shape].base.vocabulary,
        seed=0,
    )
    contestants, engines = {}, {}
    for heads in ((), ("one",), ("one", "two")):
        model = own = twin(base)
        if heads:
            adapters = random_adapters(own, heads, seed=0, heads=True)
            model = GuidedForCausalLM.from_members(own, adapters, references=dict.fromkeys(heads, own))
        for streams in given.streams:
            options = EngineOptions(
                streams=streams, context=task.positions, chunk=streams * PROMPT_TOKENS, wishes=0, speculate=0
            )
            engine = engines[len(heads), streams] = Engine(model, word_tokenizer(task.vocabulary), options)
            rate = throughput(engine, task, streams)
            alone = in_engine(engine, task)
            contestants[f"{len(heads)} heads, {streams} streams"] = (
                alone if streams == 1 else lambda number, rate=rate: 1 / rate(number)
            )
    print(engines[2, given.streams[0]].describe())
    values = take_turns(contestants, given.rounds, lambda number: print(f"round {number}", flush=True))
    for streams in given.streams:
        plain = values[f"0 heads, {streams} streams"]
        print(f"{streams} streams, unguided: {1000 * spread(plain).median:.2f} ms per token")
        for heads in (1, 2):
            over = spread(ratios(values[f"{heads} heads, {streams} streams"], plain))
            print(f"{streams} streams, {heads} heads over unguided: {over}")
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
