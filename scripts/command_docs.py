"""Write docs/commands.md from the command line's own help; with --check, fail where the page is out of date."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"


def render() -> str:
    """The page: every verb's help, at a fixed width so that the terminal does not matter."""
    os.environ["COLUMNS"] = "100"
    from genarm.cli.main import VERBS, build_parser

    parser = build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    sections = [
        f"## genarm {name}\n\n```text\n{subparsers.choices[name].format_help().rstrip()}\n```\n" for name in VERBS
    ]
    return "\n".join(
        [
            "# Commands",
            "",
            "Written by `scripts/command_docs.py` from the commands' own help; do not edit.",
            "",
            f"```text\n{parser.format_help().rstrip()}\n```\n",
            *sections,
        ]
    )


def main() -> int:
    """Write or check the page; returns the exit code."""
    page = render()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            print("docs/commands.md is out of date; run: python scripts/command_docs.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
