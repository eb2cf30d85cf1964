"""Options that several verbs share, and what they do to keep the terminal clean."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from genarm.batch.output import Settings
    from genarm.batch.requests import BatchRequest
    from genarm.batch.run import Plan
    from genarm.engine import Engine
    from genarm.model.references import ModelFiles
    from genarm.sampling import Sampling
    from genarm.text.prompts import Reading

_NO_EDGE = 10_000


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model and how to load it."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="a guided folder, another causal LM's folder, or a hub id (ID@REVISION)",
    )
    add_device_options(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow models with code of their own")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """What weights are held in, and where."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto is what the files have",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, …, or auto to spread the model over all GPUs; by default the first GPU, if any",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Weights and the system message."""
    parser.add_argument(
        "--weights",
        metavar="NAME=W,…",
        help="reward weights, as in helpful=1,harmless=0.5; the folder's own for those not named",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """Arguments of the chat template."""
    parser.add_argument(
        "--template-arg",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an argument of the chat template, as in enable_thinking=false; JSON, or else text; repeatable",
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How prompts become token ids."""
    add_template_option(parser)
    parser.add_argument(
        "--plain-user-text",
        action="store_true",
        help="control tokens' strings in prompts, such as <|im_end|>, are ordinary text; otherwise they are those "
        "tokens",
    )


def reading_of(arguments: argparse.Namespace) -> Reading:
    """How prompts become token ids (raises ConfigError)."""
    from genarm.errors import ConfigError
    from genarm.text.prompts import Reading, read_template_args

    if arguments.template_arg and getattr(arguments, "raw", False):
        raise ConfigError("--raw sends text without the chat template, so --template-arg would do nothing; give one")
    return Reading(
        template_args=read_template_args(arguments.template_arg),
        plain_user_text=getattr(arguments, "plain_user_text", False),
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How replies are drawn."""
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=max_new_tokens, help="the most tokens of a reply"
    )
    parser.add_argument("--temperature", type=float, metavar="T", default=1.0, help="0 is greedy")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="sample from the likeliest tokens of this probability",
    )
    parser.add_argument("--seed", type=int, metavar="S", default=0, help="of everything random")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Speculation."""
    parser.add_argument(
        "--speculate",
        type=int,
        metavar="K",
        default=8,
        help="the most tokens that small members draft at once, fewer where that pays more; 0 never drafts. Drafts "
        "change the speed and which random numbers are used, never the distribution",
    )
    parser.add_argument(
        "--draft", metavar="FOLDER", help="a small causal LM with the base's vocabulary that drafts in the base's stead"
    )


def draft_files(arguments: argparse.Namespace) -> ModelFiles | None:
    """Check the engine's options and open the files of the draft model, before anything is loaded or written."""
    from genarm.engine import EngineOptions
    from genarm.model.references import open_files

    EngineOptions(speculate=arguments.speculate)
    if arguments.draft is None:
        return None
    return open_files(arguments.draft, trust_remote_code=arguments.trust_remote_code)


def open_engine(
    arguments: argparse.Namespace, files: ModelFiles, draft: ModelFiles | None, *, streams: int, context: int | None
) -> Engine:
    """Load the models and make the engine; raises what `Engine` does."""
    from genarm.engine import Engine, EngineOptions
    from genarm.model.references import find_device

    device = find_device(arguments.device)
    return Engine(
        files.load(dtype=arguments.dtype, device=device),
        files.tokenizer,
        EngineOptions(streams=streams, context=context, speculate=arguments.speculate),
        draft=None if draft is None else draft.load(dtype=arguments.dtype, device=device),
        draft_tokenizer=None if draft is None else draft.tokenizer,
    )


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling options, checked (raises ConfigError)."""
    from genarm.sampling import Sampling, check_seed

    check_seed(arguments.seed)
    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )


def settings_of(
    arguments: argparse.Namespace,
    files: ModelFiles,
    requests: Sequence[BatchRequest],
    plan: Plan,
    weights: dict[str, float],
    *,
    draft: ModelFiles | None,
    raw: bool,
) -> Settings:
    """All that decides what the rows of an output file are."""
    from genarm.batch.output import Settings
    from genarm.batch.requests import content
    from genarm.model.references import find_device
    from genarm.provenance import model_record

    return Settings(
        model=model_record(files.reference, files.revision),
        dtype=arguments.dtype,
        device=find_device(arguments.device),
        prompts=len(requests),
        prompts_content=content(requests),
        weights=weights,
        max_new_tokens=plan.sampling.max_new_tokens,
        temperature=plan.sampling.temperature,
        top_p=plan.sampling.top_p,
        seed=plan.seed,
        num_samples=plan.num_samples,
        speculate=arguments.speculate,
        draft=None if draft is None else model_record(draft.reference, draft.revision),
        system=arguments.system,
        raw=raw,
        reading=asdict(files.reading),
    )


def weights_of(arguments: argparse.Namespace, files: ModelFiles) -> dict[str, float]:
    """The complete reward weights that `--weights` gives (raises WeightsError)."""
    from genarm.model.weights import parse_weights

    return files.weights(parse_weights(arguments.weights) if arguments.weights is not None else {})


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep loading bars and advice meant for programmers off the terminal, unless the environment asks for them."""
    from transformers.utils import logging as transformers_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        for name in ("bitsandbytes", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error; a file or a pipe has no edge at which to fold a table."""
    from genarm.terminal import PlainConsole

    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=_NO_EDGE)


def say(text: str, *, end: str = "\n", stderr: bool = False) -> None:
    """Print a line for people: no control character in it, wherever its words come from, steers their terminal."""
    from genarm.terminal import printable

    print(printable(text), end=end, file=sys.stderr if stderr else sys.stdout, flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON, on one line without `indent`, with every control character in its escaped form."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    print(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


_CONTROL = re.compile("[\x7f-\x9f]")
"""Those that JSON has no need to escape."""
