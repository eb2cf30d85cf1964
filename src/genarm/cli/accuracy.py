"""Measure how often rewards agree with held-out preferences, by category and by length.

A reward is right about a pair when it scores the chosen response higher; ties are never right. Several models are
compared pair by pair with the first. Intervals are at 95%.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genarm.cli.options import (
    add_device_options,
    add_template_option,
    open_console,
    quiet_libraries,
    say,
)

SUMMARY = "measure how often rewards agree with held-out preferences"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm accuracy`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="an ARM (a causal LM's folder or hub id, or a LoRA adapter's folder), a guided folder (each of its "
        "rewards), or a trajectory reward model",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="preference pairs, in any format that genarm train takes: a hub id, a folder, or a file",
    )
    parser.add_argument("--split", metavar="NAME", default="train", help="split or slice, such as test[:500]")
    parser.add_argument(
        "--objective", choices=("better", "safer"), help="which label of PKU-SafeRLHF says what is chosen"
    )
    parser.add_argument("--raw", action="store_true", help="take text as it is, without the chat template")
    parser.add_argument(
        "--category", metavar="COLUMN", help="column of the data with each pair's category, such as subset"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="also score each causal LM by log π − log π_base, the implicit reward of DPO, with this model as the base",
    )
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longer prompts lose their beginning")
    parser.add_argument("--max-response-tokens", type=int, metavar="N", help="longer responses lose their end")
    parser.add_argument("--batch-size", type=int, metavar="N", default=16, help="responses scored in one forward")
    add_template_option(parser)
    add_device_options(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow models with code of their own")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file for all figures; the scores of every pair go beside it, under the ending .pairs.jsonl",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and write."""
    with quiet_libraries():
        import datasets

        from genarm.files import check_output
        from genarm.lab.accuracy.report import print_result, write_result
        from genarm.lab.accuracy.run import measure
        from genarm.lab.accuracy.settings import AccuracySettings

        datasets.disable_progress_bars()
        settings = AccuracySettings(
            models=tuple(arguments.models),
            data=arguments.data,
            split=arguments.split,
            objective=arguments.objective,
            raw=arguments.raw,
            category=arguments.category,
            base=arguments.base,
            batch_size=arguments.batch_size,
            max_prompt_tokens=arguments.max_prompt_tokens,
            max_response_tokens=arguments.max_response_tokens,
            template_arg=arguments.template_arg,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
        )
        if arguments.output is not None:
            check_output(arguments.output)
        result = measure(settings, open_console(stderr=True))
    print_result(open_console(), result)
    if arguments.output is not None:
        scores = write_result(arguments.output, result)
        say(f"wrote {arguments.output} and {scores}", stderr=True)
    return 0
