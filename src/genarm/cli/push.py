"""Upload a guided folder to the hub, with a card: members, licences, training, and how to load it.

Members that lie on this machine go along; those named by hub id stay names. The token is that of `hf auth login`, or
HF_TOKEN. A README.md in the folder is taken as the card; without one, a card is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import quiet_libraries, say
from genarm.cli.options import PushOptions

SUMMARY = "upload a guided folder to the hub, with a card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm push`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a guided folder")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME, or NAME for the owner of the token")
    add_options(parser, PushOptions)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow members with code of their own")


def run(arguments: argparse.Namespace) -> int:
    """Upload, and say where it is."""
    with quiet_libraries():
        push(arguments.folder, arguments.repo, arguments)
    return 0


def push(folder: Path, repo: str, arguments: argparse.Namespace) -> None:
    """Upload `folder` by the `PushOptions` of a command line (raises what `publish` raises)."""
    from genarm.model.publish import publish

    options = settings_from(arguments, PushOptions)
    done = publish(
        folder,
        repo,
        private=options.private or None,
        licence=options.license,
        trust_remote_code=arguments.trust_remote_code,
    )
    if done.licence is None:
        say("note: the members have no licence in common that the card could name; give --license ID")
    say(f"{done.url}: {done.files} files, {done.size / 1e6:,.1f} MB; genarm chat {done.repo} loads it from anywhere")
