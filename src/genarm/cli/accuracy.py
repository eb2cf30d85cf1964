"""Measure how often rewards agree with held-out preferences, by category and by length.

A reward is right about a pair when it scores the chosen response higher; ties are never right. A guided policy is
scored by log π_guided − log π_base. Several models are compared pair by pair with the first. Intervals are at 95%.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import open_console, quiet_libraries, say
from genarm.cli.options import TemplateOptions
from genarm.lab.accuracy.settings import AccuracySettings

SUMMARY = "measure how often rewards and guided policies agree with held-out preferences"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm accuracy`."""
    add_options(parser, AccuracySettings, TemplateOptions)
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

        datasets.disable_progress_bars()
        settings = settings_from(arguments, AccuracySettings)
        if arguments.output is not None:
            check_output(arguments.output)
        result = measure(settings, open_console(stderr=True))
    print_result(open_console(), result)
    if arguments.output is not None:
        scores = write_result(arguments.output, result)
        say(f"wrote {arguments.output} and {scores}", stderr=True)
    return 0
