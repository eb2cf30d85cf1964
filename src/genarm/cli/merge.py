"""Write an ordinary causal LM that says exactly what a guided folder says at fixed weights, where there is one.

That is so for a tuned reward by itself at weight 1 (its adapter is merged into the base), and for adapters of the
base's output layer, such as head ARMs, at any weights. For anything else no weights of one model say the same, and the
message says why.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import quiet_libraries, say
from genarm.cli.options import ModelOptions, PromptOptions

_HALVES = ("bfloat16", "float16")
_ROUNDED = ", as sums are rounded to half precision once more; --dtype float32 keeps them"

SUMMARY = "write the ordinary model that a guided folder is at fixed weights, where there is one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm merge`."""
    add_options(parser, ModelOptions, only=["folder"], folder={"help": "a guided folder, or its hub id (ID@REVISION)"})
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add_options(parser, PromptOptions, only=["weights"])
    add_options(parser, ModelOptions)


def run(arguments: argparse.Namespace) -> int:
    """Merge, compare, and say what was written."""
    with quiet_libraries():
        from genarm.model.merging import write_merged
        from genarm.model.references import open_files
        from genarm.model.weights import parse_weights

        options = settings_from(arguments, ModelOptions)
        files = open_files(options.folder, trust_remote_code=options.trust_remote_code)
        weights = files.weights({} if arguments.weights is None else parse_weights(arguments.weights))
        merged = write_merged(files, weights, arguments.output, dtype=options.dtype, device=options.device)
    says = " ".join(f"{factor:+g}·log π_{name}" for name, factor in merged.factors.items()).removeprefix("+")
    say(
        f"{merged.folder}: an ordinary model of {says} in {merged.dtype}; on random tokens its log-probs are within "
        f"{merged.difference:.2g} nats of the guided model's" + (_ROUNDED if merged.dtype in _HALVES else "")
    )
    return 0
