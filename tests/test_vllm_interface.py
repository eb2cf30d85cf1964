"""The table of what of vLLM is touched: everything that is imported is in it, and what is gone is named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from genarm.vllm import interface

SOURCE = Path(interface.__file__).parents[1]
USERS = [*sorted((SOURCE / "vllm").glob("*.py")), SOURCE / "server" / "vllm_backend.py"]


def imported(path: Path) -> set[tuple[str, str]]:
    return {
        (node.module, name.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for name in node.names
    }


def test_every_import_is_in_the_table() -> None:
    known = {
        (module, entry.partition("(")[0].partition(".")[0])
        for module, entries in interface.TOUCHED.items()
        for entry in entries
    }
    found = set().union(*map(imported, USERS))
    assert found
    assert found <= known


@pytest.mark.parametrize(
    ("module", "entry", "problem"),
    [
        ("json", "dumps(obj, indent)", None),
        ("json.encoder", "JSONEncoder.sort_keys", None),  # set by its __init__
        ("dataclasses", "Field.default", None),
        ("subprocess", "CompletedProcess.returncode", None),
        ("json.nowhere", "anything", "json.nowhere"),
        ("json", "undumps(obj)", "json.undumps"),
        ("json", "loads(s, colour)", None),  # takes what it is given
        ("textwrap", "TextWrapper(width, colour)", "the argument colour of textwrap.TextWrapper"),
        ("json.encoder", "JSONEncoder.colour", "json.encoder.JSONEncoder.colour"),
        ("json.encoder", "Nobody.colour", "json.encoder.Nobody.colour"),
    ],
)
def test_what_is_gone_is_named(module: str, entry: str, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "TOUCHED", {module: (entry,)})
    assert interface.missing() == ([] if problem is None else [problem])
