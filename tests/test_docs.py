"""Documentation that can fail: links, commands and generated pages."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import command_docs
import pytest
import site_pages
from mkdocs.commands.build import build
from mkdocs.config import load_config

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


def test_the_site_has_no_dead_link_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENARM_SOURCE", "https://example.org/genarm/blob/main")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    shown = {path.stem for path in ROOT.glob("docs/*.md")} | {"index", "results", "404"}
    assert {name.removesuffix(".html") for name in pages} == shown
    fetched = r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
    assert not [found for text in pages.values() for found in re.findall(fetched, text)]
    styles = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)
    assert 'href="https://example.org/genarm/blob/main/src/genarm"' in pages["architecture.html"]
    assert 'href="results.html#comparisons"' in pages["index.html"]


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("vllm.md", "[figures](../benchmarks/RESULTS.md#vllm)", "[figures](results.md#vllm)"),
        ("results.md", "[how](../docs/evaluation.md)", "[how](evaluation.md)"),
        ("index.md", "![a picture](docs/server.png)", "![a picture](server.png)"),
        ("index.md", "[it](docs/how-it-works.md) [engine](#engine)", "[it](how-it-works.md) [engine](#engine)"),
        ("vllm.md", "[the front page](../README.md)", "[the front page](index.md)"),
        ("server.md", "[`combine`](../src/genarm/model/combine.py)", "`combine`"),
        ("server.md", "[gone](../src/nothing.py)", "[gone](../src/nothing.py)"),
        ("server.md", "[paper](https://arxiv.org/abs/2410.08193)", "[paper](https://arxiv.org/abs/2410.08193)"),
    ],
)
def test_links_fit_the_site(page: str, written: str, shown: str) -> None:
    assert site_pages.turned(written, page, "") == shown


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


def _said(path: Path) -> str:
    """All texts of a source file, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_what_the_page_of_refusals_quotes_is_still_said() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    quotes = [quote for cells in rows for quote in re.findall(r"`([^`]+)`", " ".join(cells[:-1]))]
    assert len(quotes) > 100
    sources = [_said(path) for path in (ROOT / "src" / "genarm").rglob("*.py")]
    for quote in quotes:
        parts = [part.strip() for part in quote.split("…") if part.strip()]
        assert any(all(part in source for part in parts) for source in sources), f"nothing says {quote!r} any more"
