"""What a terminal is shown and what is read from it, on a real pseudo-terminal where that matters."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from genarm.cli.console import say, say_json
from genarm.cli.main import main
from genarm.terminal import Bar, PlainConsole

EVIL = "a\x1b]0;title\x07b\x9b31mc\rd\x7f"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# --- shown ----------------------------------------------------------------------------------------------------------


def test_a_rule_in_a_log_is_its_title() -> None:
    log, terminal = io.StringIO(), io.StringIO()
    PlainConsole(file=log, width=10_000).rule("[bold]1/5  A base model", align="left")
    PlainConsole(file=terminal, width=40, force_terminal=True, color_system=None).rule("1/5", align="left")
    assert log.getvalue() == "1/5  A base model\n"
    assert terminal.getvalue().rstrip("\n") == "1/5 " + "─" * 36


def test_texts_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever they come from and however they are shown; what the program itself says to the terminal stays."""
    console = PlainConsole(file=io.StringIO(), width=80)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(EVIL, table, f":smile: {EVIL}")
    with Progress(console=console) as progress:
        progress.add_task(EVIL)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("a\ufffd]0;titleb\ufffd31mcd\ufffd") >= 3  # some rich takes out by itself
    assert ":smile:" in shown
    assert not CONTROL.search(shown)
    say(EVIL)
    say(EVIL, stderr=True)
    say_json({"x": EVIL})
    out, err = capsys.readouterr()
    assert not CONTROL.search(out + err)
    assert json.loads(out.splitlines()[1]) == {"x": EVIL}
    coloured = PlainConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    coloured.print(EVIL, style="red")
    assert coloured.file.getvalue().startswith("\x1b[31ma\ufffd]0;")  # type: ignore[attr-defined]


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal; none before its time, and none where progress is not wanted."""
    for every, shown, lines in ((60.0, True, 0), (0.0, False, 0), (0.0, True, 3)):
        monkeypatch.setattr("genarm.terminal.LINE_EVERY", every)
        log = io.StringIO()
        with Bar(console=PlainConsole(file=log), shown=shown) as bar:
            task = bar.add_task("replies", total=1200)
            bar.advance(task)
            bar.advance(task, 9)
            bar.update(task, completed=1100)
        assert len(log.getvalue().splitlines()) == lines
    assert log.getvalue().splitlines()[-1] == "replies: 1,100 of 1,200 after 0 min"


def test_an_error_message_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat template may raise what it likes, and a file may be called so."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no \\x1b[2J thanks \\x9bm') }}"
    folder = save_member(tiny_model(), tmp_path / "model", tokenizer)
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "w1"]) == 2
    assert main(["generate", str(folder), "--input", str(tmp_path / "\x1b[2J.txt")]) == 2
    err = capsys.readouterr().err
    assert "no \ufffd[2J thanks \ufffdm" in err
    assert not CONTROL.search(err)


# --- read -----------------------------------------------------------------------------------------------------------

READER = """
import sys
if {readline}:
    import readline
from genarm.cli.chat import _read
try:
    while True:
        print("GOT", _read(True), flush=True)
except EOFError:
    print("END", flush=True)
"""


class Typist:
    """Somebody at a terminal."""

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self._bytes = b""

    @property
    def seen(self) -> str:
        return self._bytes.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + 60
        while self.seen.count(text) < times and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.2)[0]:
                self._bytes += os.read(self.terminal, 4096)
        assert self.seen.count(text) >= times, self.seen

    def read(self, text: str) -> list[tuple[str, bool]]:
        """What the program makes of `text`, which is typed at once, and of Enter."""
        before = self.seen.count("GOT")
        self.type(text)
        self.wait_for("GOT", before + 1)
        self.wait_for("› ", before + 2)
        return [eval(said) for said in re.findall(r"GOT (\(.*\))", self.seen)[before:]]


@contextmanager
def typing(readline: bool, terminal: str) -> Iterator[Typist]:
    """At the prompt of chat's own reader."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", READER.format(readline=readline)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": terminal},
        start_new_session=True,
    )
    os.close(theirs)
    typist = Typist(ours)
    try:
        typist.wait_for("› ")
        yield typist
        typist.type("\x04")
        typist.wait_for("END")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(("readline", "terminal"), [(False, "dumb"), (True, "dumb"), (True, "xterm")])
def test_a_paste_is_one_message(readline: bool, terminal: str) -> None:
    """Whatever its lines begin with; a line that somebody types is still a command, and so are two, one by one."""
    if readline:
        pytest.importorskip("readline")
    with typing(readline, terminal) as typist:
        assert typist.read("hello\n") == [("hello", False)]
        assert typist.read("/weights a=1\n") == [("/weights a=1", False)]
        assert typist.read("one\n/weights a=9\nthree é\n") == [("one\n/weights a=9\nthree é", True)]
        assert typist.read("/quit\n\nnow\n") == [("/quit\n\nnow", True)]
        if terminal == "xterm":  # which tells where a paste begins and ends
            assert typist.read("\x1b[200~x\n/quit\n\x1b[201~\n") == [("x\n/quit\n", True)]
        typist.type("first\nsecond\nlast, not")
        time.sleep(1)
        assert typist.read(" complete\n") == [("first\nsecond\nlast, not complete", True)]


def test_several_lines_between_fences() -> None:
    with typing(readline=False, terminal="dumb") as typist:
        for line in ('"""\n', "/quit\n"):
            typist.type(line)
            time.sleep(0.3)
        assert typist.read('end"""\n') == [("/quit\nend", True)]
        assert typist.read('"""one line"""\n') == [("one line", True)]
        typist.type('/system """be\n')
        time.sleep(0.3)
        assert typist.read('kind"""\n') == [("/system be\nkind", False)]
        assert typist.read('what is """ in Python?\n') == [('what is """ in Python?', False)]
