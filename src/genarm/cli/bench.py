"""Measure how fast this machine decodes."""

from __future__ import annotations

import argparse
from pathlib import Path

from genarm.cli.options import (
    add_engine_options,
    add_model_options,
    open_console,
    quiet_libraries,
    say,
)
from genarm.lab.bench.shapes import SHAPES

SUMMARY = "measure decoding speed on this machine"

_DECODE = """Measure the decoding engine: guided and unguided, with and without speculation, at one and at many streams,
beside transformers' generate and a naive loop of two models.

Models have random weights at a chosen shape, so nothing is downloaded. Contestants take turns, and all figures are
ratios within a round. The results are printed as Markdown; progress goes to standard error."""


_VLLM = """Measure guided decoding inside vLLM over plain vLLM: with a full ARM of an eighth of the base's size, with
one and two LoRA ARMs that share the base's forward, and with a LoRA ARM merged into a model of its own.

Models have random weights at a chosen shape, so nothing is downloaded. Every contestant has an engine of vLLM in a
process of its own, and they take turns; all figures are ratios within a round. vLLM chooses the device, and compiles
each contestant first, about a minute each. The results are printed as Markdown; progress goes to standard error."""


_SERVE = """Measure what clients of `genarm serve` see: the time to the first token, the time between tokens, and the
throughput, at so many replies at once.

The server is started for the measurement, as a process of its own on this machine; the clients are this process. The
results are printed as Markdown; progress goes to standard error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be measured, each with its options."""
    subjects = parser.add_subparsers(dest="subject", metavar="WHAT", required=True)
    decode = subjects.add_parser("decode", help="the decoding engine, in this process", description=_DECODE)
    decode.formatter_class = parser.formatter_class
    _add_decode_arguments(decode)
    decode.set_defaults(measure=_decode)
    vllm = subjects.add_parser("vllm", help="guided folders inside vLLM, over plain vLLM", description=_VLLM)
    vllm.formatter_class = parser.formatter_class
    _add_vllm_arguments(vllm)
    vllm.set_defaults(measure=_vllm)
    serve = subjects.add_parser("serve", help="a model's server, as its clients see it", description=_SERVE)
    serve.formatter_class = parser.formatter_class
    _add_serve_arguments(serve)
    serve.set_defaults(measure=_serve)


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for."""
    code: int = arguments.measure(arguments)
    return code


def _add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-shape",
        choices=tuple(SHAPES),
        default="200m",
        help="of the base; its full ARM has an eighth of the parameters",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; by default bfloat16 where the device has it, and float32 elsewhere",
    )


def _add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shape_arguments(parser)
    parser.add_argument("--tokens", type=int, metavar="N", default=64, help="of each reply, after a prompt of 32")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="in which every contestant runs once")
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", default=[1, 4, 16], help="replies at once")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write vllm.json and vllm.md into")
    parser.add_argument("--seed", type=int, metavar="S", default=0, help="of everything random")


def _add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shape_arguments(parser)
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, …; by default the first GPU, if any")
    parser.add_argument("--tokens", type=int, metavar="N", default=64, help="of each reply, after a prompt of 32")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="in which every contestant runs once")
    parser.add_argument(
        "--streams",
        type=int,
        nargs="+",
        metavar="N",
        default=[1, 4, 16],
        help="replies at once, with one LoRA ARM; 1 is always measured",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        nargs="+",
        metavar="P",
        default=[0.8],
        help="acceptance of drafts that the full ARM is made for",
    )
    parser.add_argument(
        "--real",
        nargs=2,
        metavar=("BASE", "ARM"),
        help="also count the drafts of a real ARM for a real base: folders or hub ids",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="for the real pair, .txt or .jsonl; by default a few questions"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write decode.json and decode.md into")
    parser.add_argument("--seed", type=int, metavar="S", default=0, help="of everything random")


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--concurrency", type=int, nargs="+", metavar="N", default=[1, 4, 16], help="replies at once; each is measured"
    )
    parser.add_argument("--tokens", type=int, metavar="N", default=64, help="of each reply, after a prompt of 32")
    parser.add_argument("--requests", type=int, metavar="N", default=4, help="of each client in a round")
    parser.add_argument("--rounds", type=int, metavar="N", default=5, help="in which each concurrency is measured once")
    add_engine_options(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write serve.json and serve.md into")
    parser.add_argument("--seed", type=int, metavar="S", default=0, help="of everything random")


def _serve(arguments: argparse.Namespace) -> int:
    with quiet_libraries():
        import datetime
        from contextlib import nullcontext

        from genarm.files import new_folder
        from genarm.lab.bench.report import Circumstances
        from genarm.lab.bench.serve import ServeSettings, run_serve
        from genarm.lab.bench.serve_report import as_markdown, write_serve_report
        from genarm.lab.machine import code_version, this_machine

        settings = ServeSettings(
            folder=arguments.folder,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            concurrency=tuple(arguments.concurrency),
            tokens=arguments.tokens,
            requests=arguments.requests,
            rounds=arguments.rounds,
            speculate=arguments.speculate,
            draft=arguments.draft,
            seed=arguments.seed,
        )
        with nullcontext() if arguments.output is None else new_folder(arguments.output) as folder:
            result = run_serve(settings, open_console(stderr=True))
            machine = this_machine("cpu" if result.device == "auto" else result.device)
            circumstances = Circumstances(machine=machine, date=datetime.date.today(), code=code_version())
            if folder is not None:
                write_serve_report(folder, result, circumstances)
    say(as_markdown(result, circumstances), end="")
    if arguments.output is not None:
        say(f"wrote {arguments.output}", stderr=True)
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    with quiet_libraries():
        import datetime
        from contextlib import nullcontext

        from genarm.files import new_folder
        from genarm.lab.bench.decode import run_decode
        from genarm.lab.bench.report import Circumstances, as_markdown, write_report
        from genarm.lab.bench.settings import DecodeSettings
        from genarm.lab.machine import code_version, this_machine

        settings = DecodeSettings(
            base_shape=arguments.base_shape,
            dtype=arguments.dtype,
            device=arguments.device,
            tokens=arguments.tokens,
            rounds=arguments.rounds,
            streams=tuple(arguments.streams),
            agreement=tuple(arguments.agreement),
            real=None if arguments.real is None else tuple(arguments.real),
            prompts=arguments.prompts,
            seed=arguments.seed,
        )
        with nullcontext() if arguments.output is None else new_folder(arguments.output) as folder:
            result = run_decode(settings, open_console(stderr=True))
            circumstances = Circumstances(
                machine=this_machine(result.where.device), date=datetime.date.today(), code=code_version()
            )
            if folder is not None:
                write_report(folder, result, circumstances)
    say(as_markdown(result, circumstances), end="")
    if arguments.output is not None:
        say(f"wrote {arguments.output}", stderr=True)
    return 0


def _vllm(arguments: argparse.Namespace) -> int:
    with quiet_libraries():
        import datetime
        from contextlib import nullcontext

        from genarm.files import new_folder
        from genarm.lab.bench.report import Circumstances
        from genarm.lab.bench.settings import VllmSettings
        from genarm.lab.bench.vllm import run_vllm
        from genarm.lab.bench.vllm_report import as_markdown, write_vllm_report
        from genarm.lab.machine import code_version, this_machine

        settings = VllmSettings(
            base_shape=arguments.base_shape,
            dtype=arguments.dtype,
            tokens=arguments.tokens,
            rounds=arguments.rounds,
            streams=tuple(arguments.streams),
            eager=arguments.eager,
            seed=arguments.seed,
        )
        with nullcontext() if arguments.output is None else new_folder(arguments.output) as folder:
            result = run_vllm(settings, open_console(stderr=True))
            circumstances = Circumstances(
                machine=this_machine(result.where.device), date=datetime.date.today(), code=code_version()
            )
            if folder is not None:
                write_vllm_report(folder, result, circumstances)
    say(as_markdown(result, circumstances), end="")
    if arguments.output is not None:
        say(f"wrote {arguments.output}", stderr=True)
    return 0
