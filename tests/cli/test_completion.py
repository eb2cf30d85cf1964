"""Completion scripts, in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from genarm.cli.completion import SHELLS, script
from genarm.cli.main import VERBS, build_parser, main

CASES = {
    "genarm comp": {"compose"},
    "genarm compose --fr": {"--from"},
    "genarm compose --from x --dro": {"--drop"},
    "genarm train --loss re": {"reference"},
    "genarm serve --engine ": {"auto", "genarm", "vllm"},
    "genarm bench de": {"decode"},
    "genarm bench serve --conc": {"--concurrency"},
    "genarm bench serve --pres": set(),
    "genarm serve --pres": {"--presets"},
    "genarm --print-completion f": {"fish"},
}


def in_bash(path: Path, line: str) -> set[str]:
    words = line.split(" ")
    given = " ".join(f"'{word}'" for word in words)
    shown = "printf '%s\\n' \"${COMPREPLY[@]}\""
    program = f"source {path}; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _genarm; {shown}"
    return {*subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()}


def in_fish(path: Path, line: str) -> set[str]:
    program = f"source {path}; complete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True, check=True)
    return {row.split("\t")[0] for row in done.stdout.splitlines()}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_what_is_offered(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    path = tmp_path / "script"
    path.write_text(script(build_parser(), shell))
    ask = in_bash if shell == "bash" else in_fish
    for line, expected in CASES.items():
        assert ask(path, line) == expected, line
    assert ask(path, "genarm ") >= {*VERBS}


def test_zsh_takes_it(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh")
    (tmp_path / "script").write_text(script(build_parser(), "zsh"))
    program = f"source {tmp_path / 'script'}; whence -w _genarm; print $_comps[genarm]"
    done = subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, check=True)
    assert "_genarm: function" in done.stdout
    assert "_bash_complete" in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_it_is_printed(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert end.value.code == 0
    assert capsys.readouterr().out == script(build_parser(), shell)


def test_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "cmd"])
    assert end.value.code == 2
    assert "invalid choice: 'cmd'" in capsys.readouterr().err
