"""See the whole product at work, offline, in about two minutes on two CPU cores.

Builds a small world of requests and replies whose helpfulness and harmlessness are known by rule, trains a base and
two rewards, composes a guided model, shows its replies under different weights and measures the trade-off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genarm.cli.console import (
    open_console,
    quiet_libraries,
)

SUMMARY = "train, compose and steer a small guided model from start to end, offline, in about two minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm demo`."""
    parser.add_argument("--output", type=Path, default=Path("genarm-demo"), metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything that is drawn; the same seed, the same figures"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    with quiet_libraries():
        from genarm.lab.demo.run import DemoSettings, run_demo

        run_demo(arguments.output, DemoSettings(seed=arguments.seed), open_console())
    return 0
