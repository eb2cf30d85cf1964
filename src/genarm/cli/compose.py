"""Write a guided model folder: a frozen base, one or more rewards, trained or tuned, and their default weights.

--from starts with all that is in a guided folder, which stays as it is: rewards are added, dropped (--drop) and weighed
anew (--weight), and a new folder is written.
"""

from __future__ import annotations

import argparse
import json

from genarm.cli.arguments import add_options
from genarm.cli.console import quiet_libraries, say
from genarm.cli.options import PushOptions, pairs, read_wishes
from genarm.cli.push import push
from genarm.errors import ConfigError

SUMMARY = "put a frozen base and rewards together into a guided model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm compose`."""
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--base", metavar="MODEL", help="path or hub id (ID@REVISION) of the base")
    start.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        help="a guided folder, or its hub id, to start from: its base, and its rewards with their weights",
    )
    parser.add_argument("--drop", action="append", metavar="NAME", help="leave out a reward of --from; may be repeated")
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME=PATH[:WEIGHT]",
        help="a reward: path or hub id of a full ARM or a LoRA adapter, and its default weight (1 if not given); "
        "may be repeated",
    )
    parser.add_argument(
        "--tuned",
        action="append",
        metavar="NAME=PATH[:WEIGHT]",
        help="a reward that needs no training of its own: a tuned model or LoRA adapter (by DPO, SFT, RL, …) less its "
        "untuned self, the base; weight 0 is the base, 1 the tuned model, 2 beyond it; may be repeated",
    )
    parser.add_argument(
        "--reference",
        action="append",
        metavar="NAME=PATH",
        help="the untuned model of a tuned one where that is not the base: with a small pair, what tuning has taught "
        "the small model is carried over to the base (proxy tuning)",
    )
    parser.add_argument(
        "--wish",
        action="append",
        metavar="NAME=TEXT",
        help="a reward in words, which needs no training at all: the base that reads TEXT as its system message less "
        "the base that does not; weight 1 is the base prompted so, 2 more of it, below 0 the opposite; NAME=@FILE "
        "reads the text from a file; may be repeated",
    )
    parser.add_argument(
        "--weight",
        action="append",
        metavar="NAME=W",
        help="a reward's default weight, as :WEIGHT behind its path",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--bundle", action="store_true", help="copy the members in, so that the folder can be moved")
    parser.add_argument(
        "--describe",
        action="append",
        metavar="NAME=TEXT",
        help="a line about what a reward prefers",
    )
    parser.add_argument(
        "--adapter-model",
        action="append",
        metavar="NAME=MODEL",
        help="the model that a reward's adapter goes on, where it has moved since training",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="MEMBER.FIELD=VALUE",
        help="how to load a member: dtype, device_map or quantization_config (JSON) of 'base' or a reward, as in "
        "base.dtype=bfloat16 or base.quantization_config='{\"load_in_4bit\": true, ...}'",
    )
    parser.add_argument("--push", metavar="REPO", help="also upload it to the hub, as genarm push does")
    add_options(parser, PushOptions)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow members with code of their own")


def run(arguments: argparse.Namespace) -> int:
    """Compose and print what was written."""
    if arguments.push is None and (arguments.private or arguments.license):
        raise ConfigError(f"--{'private' if arguments.private else 'license'} is for --push REPO, which is not given")
    rewards, weights = _rewards(arguments.reward, "--reward NAME=PATH[:WEIGHT]")
    tuned, tuned_weights = _rewards(arguments.tuned, "--tuned NAME=PATH[:WEIGHT]")
    weights = _all_weights({**weights, **tuned_weights}, arguments.weight)
    references = pairs(arguments.reference, "--reference NAME=PATH")
    descriptions = pairs(arguments.describe, "--describe NAME=TEXT")
    adapter_models = pairs(arguments.adapter_model, "--adapter-model NAME=MODEL")
    settings = _settings(arguments.set)
    with quiet_libraries():
        from genarm.data.presets import carry_presets
        from genarm.model.compose import compose

        report = compose(
            _start(arguments),
            rewards,
            arguments.output,
            drop=arguments.drop or (),
            tuned=tuned,
            references=references,
            wishes=read_wishes(arguments.wish),
            weights=weights,
            descriptions=descriptions,
            adapter_models=adapter_models,
            settings=settings,
            bundle=arguments.bundle,
            trust_remote_code=arguments.trust_remote_code,
        )
    if report.source is not None and (
        lost := carry_presets(report.source, report.folder, report.config.default_weights)
    ):
        say(f"note: the presets {', '.join(lost)} are left behind, as they weigh rewards that are dropped")
    for note in report.notes:
        say(f"note: {note}")
    listed = ", ".join(f"{name}={weight:g}" for name, weight in report.config.default_weights.items())
    say(f"{report.folder}: base {arguments.base or report.config.base_spec.model}, rewards {listed}")
    if arguments.push is not None:
        with quiet_libraries():
            push(report.folder, arguments.push, arguments)
    return 0


def _start(arguments: argparse.Namespace) -> str:
    """What --base or --from names (raises ConfigError, MemberError where --from is no guided folder)."""
    from genarm.model.config import GuidedConfig
    from genarm.model.references import open_files

    if arguments.source is None:
        if arguments.drop:
            raise ConfigError("--drop leaves out a reward of a guided folder; name the folder with --from")
        return str(arguments.base)
    config = open_files(arguments.source, trust_remote_code=arguments.trust_remote_code).config
    if not isinstance(config, GuidedConfig):
        raise ConfigError(f"{arguments.source} is not a guided folder; give a model as --base")
    return str(arguments.source)


def _all_weights(behind_paths: dict[str, float], items: list[str] | None) -> dict[str, float]:
    """The weights behind paths, and those of --weight."""
    from genarm.model.weights import parse_weights

    given = parse_weights(",".join(items)) if items else {}
    if twice := sorted({*behind_paths} & {*given}):
        raise ConfigError(f"the weight of {twice[0]!r} is given behind its path and by --weight; give it once")
    return {**behind_paths, **given}


def _rewards(items: list[str] | None, form: str) -> tuple[dict[str, str], dict[str, float]]:
    """{name: path} and {name: weight}; what follows the last colon is a weight if it is a number."""
    rewards = pairs(items, form)
    weights: dict[str, float] = {}
    for name, value in rewards.items():
        path, colon, tail = value.rpartition(":")
        try:
            weights[name] = float(tail)
        except ValueError:
            continue
        if not colon or not path:
            del weights[name]  # a path that is itself a number, as in helpful=1
            continue
        rewards[name] = path
    return rewards, weights


def _settings(items: list[str] | None) -> dict[str, dict[str, object]]:
    allowed = ("dtype", "device_map", "quantization_config")
    settings: dict[str, dict[str, object]] = {}
    for key, text in pairs(items, "--set MEMBER.FIELD=VALUE").items():
        member, _, field = key.rpartition(".")
        if not member or field not in allowed:
            raise ConfigError(f"cannot set {key!r}; write MEMBER.FIELD with FIELD one of {', '.join(allowed)}")
        value: object = text
        if text.startswith("{"):
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"the value of --set {key} is not JSON: {error}") from error
        if field == "quantization_config" and not isinstance(value, dict):
            raise ConfigError(f"--set {key} needs a JSON object, got {text!r}")
        settings.setdefault(member, {})[field] = value
    return settings
