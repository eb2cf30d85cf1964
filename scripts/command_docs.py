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
    verbs = _choices(parser)
    sections: list[str] = []
    for name in VERBS:
        sections.append(_section(f"## genarm {name}", verbs[name]))
        sections += [_section(f"### genarm {name} {subject}", own) for subject, own in _choices(verbs[name]).items()]
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


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def _section(heading: str, parser: argparse.ArgumentParser) -> str:
    return f"{heading}\n\n```text\n{parser.format_help().rstrip()}\n```\n"


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
