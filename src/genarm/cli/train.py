"""Train an autoregressive reward model (ARM) on preference pairs: all weights of a causal LM, or a LoRA adapter.

`--kind` trains what an ARM is compared with, in the same way and on the same data: a classic reward model, or a policy
by DPO or reinforcement learning. These need the extra `baselines`.

Every option can also stand in a TOML file under its name with underscores (`lora_rank = 8`); the command line
overrides the file. The settings used are saved beside the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import genarm.lab.training  # noqa: F401 (so that what an ARM is compared with is among the kinds)
from genarm.cli.arguments import add_options
from genarm.cli.console import quiet_libraries
from genarm.training.config import TrainConfig, make_config

SUMMARY = "train a reward model on preference pairs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of `TrainConfig`, and two about the run itself."""
    run_options = parser.add_argument_group("run")
    run_options.add_argument(
        "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="TOML file with any of these settings"
    )
    run_options.add_argument(
        "--resume",
        action="store_true",
        default=argparse.SUPPRESS,
        help="continue the run in --output from its newest complete checkpoint",
    )
    add_options(parser, TrainConfig, over_file=True)  # what is not given must not override the file


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the result has been written."""
    given = vars(args)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    config = make_config({k: v for k, v in given.items() if k in fields}, given.get("config"))

    with quiet_libraries():
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, we raise as one
        from genarm.training.run import train

        train(config, resume=given.get("resume", False))
    return 0
