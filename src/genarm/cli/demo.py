"""See the whole product at work, offline, in about two minutes on two CPU cores.

Builds a small world of requests and replies whose helpfulness and harmlessness are known by rule, trains a base and
two rewards, composes a guided model, shows its replies under different weights and measures the trade-off.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import open_console, quiet_libraries

SUMMARY = "train, compose and steer a small guided model from start to end, offline, in about two minutes"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Where the demo goes, and what is drawn."""

    output: Path = field(default=Path("genarm-demo"), metadata={"metavar": "DIR", "help": "the folder to write"})
    seed: int = field(
        default=0,
        metadata={"metavar": "SEED", "help": "of everything that is drawn; the same seed, the same figures"},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm demo`."""
    add_options(parser, DemoOptions)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    options = settings_from(arguments, DemoOptions)
    with quiet_libraries():
        from genarm.lab.demo.run import DemoSettings, run_demo

        run_demo(options.output, DemoSettings(seed=options.seed), open_console())
    return 0
