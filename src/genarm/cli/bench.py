"""Measure how fast this machine decodes, serves and trains."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import open_console, quiet_libraries, say
from genarm.cli.options import DraftOptions, ModelOptions
from genarm.engine import EngineOptions
from genarm.lab.bench.settings import DecodeSettings, ServeSettings, TrainSettings, VllmSettings

if TYPE_CHECKING:
    from rich.console import Console

    from genarm.lab.bench.report import Circumstances

SUMMARY = "measure the speed of decoding, serving and training here"

_DECODE = """Measure the decoding engine: guided and unguided, with and without speculation, at one and at many streams,
beside transformers' generate and a naive loop of two models.

Models have random weights at a chosen shape, so nothing is downloaded. Contestants take turns, and all figures are
ratios within a round. The results are printed as Markdown; progress goes to standard error."""


_VLLM = """Measure guided decoding inside vLLM over plain vLLM: with a full ARM of an eighth of the base's size, with
one and two LoRA ARMs that share the base's forward, with a LoRA ARM merged into a model of its own, and with a head
ARM.

Models have random weights at a chosen shape, so nothing is downloaded. Every contestant has an engine of vLLM in a
process of its own, and they take turns; all figures are ratios within a round. vLLM chooses the device, and compiles
each contestant first, about a minute each. The results are printed as Markdown; progress goes to standard error."""


_SERVE = """Measure what clients of `genarm serve` see: the time to the first token, the time between tokens, and the
throughput, at so many replies at once, beside what the engine makes without a server.

The server is started for the measurement, as a process of its own on this machine; the clients are this process, which
also has the other engine, so that there must be memory for the model twice. The results are printed as Markdown;
progress goes to standard error."""


_TRAIN = """Measure the training of an ARM, packed and in padded rows, beside trl's CPO without its likelihood term,
the same loss, and of an ARM with a reference beside trl's DPO: time of a step, and peak memory, on the same tokens.

Contestants are ordinary runs of their trainers, each in a process of its own, and take turns; all figures are ratios
within a round. The results are printed as Markdown; progress goes to standard error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be measured, each with its options."""
    subjects = parser.add_subparsers(dest="subject", metavar="WHAT", required=True)
    decode_streams = {"help": "replies at once, with one LoRA ARM; 1 is always measured"}

    def add(name: str, title: str, text: str, bench: Callable[..., _Bench], *settings: type, **changes: Any) -> None:
        verb = subjects.add_parser(name, help=title, description=text)
        verb.formatter_class = parser.formatter_class
        verb.set_defaults(bench=bench)
        add_options(verb, *settings, **changes)
        folder = f"the folder to write {name}.json and {name}.md into"
        verb.add_argument("--output", type=Path, metavar="DIR", help=folder)

    add("decode", "the decoding engine, in this process", _DECODE, _decode, DecodeSettings, streams=decode_streams)
    add("vllm", "guided folders inside vLLM, over plain vLLM", _VLLM, _vllm, VllmSettings)
    served = (ModelOptions, ServeSettings, EngineOptions, DraftOptions)
    add("train", "training, beside trl's trainers", _TRAIN, _train, TrainSettings)
    add("serve", "a model's server, as its clients see it", _SERVE, _serve, *served)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """How one subject is measured, and what becomes of its result."""

    measure: Callable[[Console], Any]
    device: Callable[[Any], str]
    markdown: Callable[[Any, Circumstances], str]


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for, print it and write it."""
    with quiet_libraries():
        import datetime
        from contextlib import nullcontext

        from genarm.files import new_folder
        from genarm.lab.bench.report import Circumstances, write_report
        from genarm.lab.machine import code_version, this_machine

        bench: _Bench = arguments.bench(arguments)
        with nullcontext() if arguments.output is None else new_folder(arguments.output) as folder:
            result = bench.measure(open_console(stderr=True))
            machine = this_machine(bench.device(result))
            circumstances = Circumstances(machine=machine, date=datetime.date.today(), code=code_version())
            markdown = bench.markdown(result, circumstances)
            if folder is not None:
                write_report(folder, result, circumstances, markdown)
    say(markdown, end="")
    if arguments.output is not None:
        say(f"wrote {arguments.output}", stderr=True)
    return 0


def _decode(arguments: argparse.Namespace) -> _Bench:
    from genarm.lab.bench.decode import run_decode
    from genarm.lab.bench.report import as_markdown

    measure = partial(run_decode, settings_from(arguments, DecodeSettings))
    return _Bench(measure=measure, device=lambda r: r.where.device, markdown=as_markdown)


def _vllm(arguments: argparse.Namespace) -> _Bench:
    from genarm.lab.bench.vllm import run_vllm
    from genarm.lab.bench.vllm_report import as_markdown

    measure = partial(run_vllm, settings_from(arguments, VllmSettings))
    return _Bench(measure=measure, device=lambda r: r.where.device, markdown=as_markdown)


def _serve(arguments: argparse.Namespace) -> _Bench:
    from genarm.lab.bench.serve import run_serve
    from genarm.lab.bench.serve_report import as_markdown

    measure = partial(run_serve, settings_from(arguments, ServeSettings))
    return _Bench(measure=measure, device=lambda r: "cpu" if r.device == "auto" else r.device, markdown=as_markdown)


def _train(arguments: argparse.Namespace) -> _Bench:
    from genarm.lab.bench.train import run_train
    from genarm.lab.bench.train_report import as_markdown

    measure = partial(run_train, settings_from(arguments, TrainSettings))
    return _Bench(measure=measure, device=lambda r: r.trained.device, markdown=as_markdown)
