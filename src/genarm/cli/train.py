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
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from genarm.cli.options import quiet_libraries
from genarm.training.config import TrainConfig, make_config, option_name

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
    hints = get_type_hints(TrainConfig)
    fields = dataclasses.fields(TrainConfig)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(f.metadata["group"] for f in fields)}
    for field in fields:
        names = [option_name(name) for name in (field.name, *field.metadata.get("aliases", ()))]
        # No default here: an option that is not given must not override the file.
        groups[field.metadata["group"]].add_argument(
            *names, dest=field.name, default=argparse.SUPPRESS, help=_help(field), **_kind(field, hints[field.name])
        )


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the result has been written."""
    given = vars(args)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    config = make_config({k: v for k, v in given.items() if k in fields}, given.get("config"))

    with quiet_libraries():
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, we raise as one
        from genarm.lab.training.run import train

        train(config, resume=given.get("resume", False))
    return 0


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if field.default in (None, ()) or field.default is dataclasses.MISSING or isinstance(field.default, bool):
        return text
    return f"{text} (default: {field.default})"


def _kind(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """What argparse needs to know about the values of a field."""
    kind = next((k for k in get_args(hint) if k is not NoneType), hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {"action": "append", "metavar": field.metadata["metavar"]}
    return {
        "type": kind,
        "metavar": field.metadata.get("metavar", {int: "N", float: "X", str: "NAME"}.get(kind)),
        **({"choices": field.metadata["choices"], "metavar": None} if "choices" in field.metadata else {}),
    }
