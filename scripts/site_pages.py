"""What the site needs beside docs/, a hook of mkdocs: two further pages, and links that fit both repository and site.

Pages link to each other and to source files by relative paths, which is right wherever the repository is looked at.
On the site README.md is the front page and benchmarks/RESULTS.md is results.md; a link to any other file of the
repository leads to the address in GENARM_SOURCE, and without one is its text alone. A link to nothing stays as it is,
and `mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"index.md": "README.md", "results.md": "benchmarks/RESULTS.md"}
"""Pages of the site that do not lie in docs/, by where they do."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r"(!\[[^\]]*\])\(([^)\s#:]+)()\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Turn the links of a page's text."""
    return turned(markdown, page.file.src_uri, config.extra["source"])


def turned(markdown: str, name: str, source: str) -> str:
    """The text of the site's page `name`, its links as the site has them; `source` is GENARM_SOURCE."""
    own = ELSEWHERE.get(name, f"docs/{name}")

    def turn(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        if not (ROOT / path).exists():
            return found[0]
        inside = {place: page for page, place in ELSEWHERE.items()}.get(path, path.removeprefix("docs/"))
        if path in ELSEWHERE.values() or path.startswith("docs/"):
            return f"{text if text.startswith('!') else f'[{text}]'}({inside}{anchor})"
        return f"[{text}]({source.rstrip('/')}/{path}{anchor})" if source else text

    return _LINK.sub(turn, _PICTURE.sub(turn, markdown))
