"""Documentation that can fail: links, commands and generated pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import command_docs
import pytest

from genarm.cli.main import build_parser
from genarm.lab.evaluation.recipe import Claim
from genarm.lab.judges.kinds import JUDGES
from genarm.lab.methods.kinds import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def test_the_pages_are_found() -> None:
    assert {"README.md", "how-it-works.md", "decisions.md", "commands.md", "RESULTS.md"} <= {p.name for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_shown_commands_parse(page: Path) -> None:
    """Every `genarm …` line of a bash block is a command line that the parser accepts."""
    parser = build_parser()
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["genarm"]:
                parser.parse_args(words[1:])


def test_the_command_page_is_up_to_date() -> None:
    assert command_docs.PAGE.read_text(encoding="utf-8") == command_docs.render()


def test_the_page_of_comparisons_knows_all_that_a_recipe_may_have() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    claims = get_args(get_type_hints(Claim)["what"])
    assert "cheaper" in claims
    for kind in (*METHODS, *(name for name, judge in JUDGES.items() if judge.recipes), *claims):
        assert f"`{kind}`" in text


def test_the_readme_has_two_set_up_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    setup = text.split("## Set up")[1].split("\n## ")[0]
    lines = re.search(r"```bash\n(.*?)```", setup, flags=re.DOTALL)
    assert lines is not None
    commands = [line.split("#")[0].strip() for line in lines[1].splitlines()]
    assert commands == ["./scripts/demo", "./scripts/test"]
    assert all((ROOT / command).stat().st_mode & 0o111 for command in commands)


def test_the_page_of_the_architecture_names_what_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "genarm"
    named = set(re.findall(r"`([a-z_/]+(?:/|\.py))`", text))
    assert len(named) > 40
    assert not [
        name for name in named if not (source / name).exists() or name.endswith("/") != (source / name).is_dir()
    ]
    top = {path.name + "/" * path.is_dir() for path in source.iterdir() if not path.name.startswith(("__", "py."))}
    assert top <= named
    picture = set(re.findall(r"[a-z_]+(?:/|\.py)", text.split("```text")[1].split("```")[0]))
    assert picture == top
