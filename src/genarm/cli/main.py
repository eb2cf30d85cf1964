"""Entry point of the `genarm` command: find the verb, run it, turn the user's mistakes into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

VERBS = (
    *("train", "compose", "show", "merge", "push", "generate", "chat", "score", "serve"),
    *("pairs", "judge", "accuracy", "tune", "eval", "demo", "bench"),
)

USER_ERROR = 2
INTERRUPTED = 130


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says the defaults that are values; None, False and [] only mean that an option was left out."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each verb's module says its own summary, options and action."""
    from genarm import __version__
    from genarm.cli.completion import SHELLS, PrintCompletion

    parser = argparse.ArgumentParser(
        prog="genarm",
        description="Train autoregressive reward models and steer any frozen causal LM with them.",
    )
    parser.add_argument("--version", action="version", version=f"genarm {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help='print a completion script for bash, zsh or fish, as in: eval "$(genarm --print-completion bash)"',
    )
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for name in VERBS:
        module = importlib.import_module(f"genarm.cli.{name}")
        verb = verbs.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        verb.formatter_class = _Help
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a user's mistake, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    from genarm.cli.console import say
    from genarm.errors import GenarmError

    try:
        code: int = arguments.run(arguments)
    except GenarmError as error:
        if os.environ.get("RANK", "0") == "0":  # every process of `accelerate launch` runs into the same mistake
            say(f"genarm {arguments.verb}: error: {' '.join(str(error).split())}", stderr=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"\ngenarm {arguments.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has left: nothing more to say, and no traceback
        sys.stderr.close()
        return 0
    return code
