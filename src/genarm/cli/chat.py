"""Talk to a guided model, change its reward weights in mid-conversation and see what they change.

Type /help for the commands: /weights, /wish, /kl, /compare, /tokens, /system, /reset, /quit. A pasted text of several
lines is one message. Reads plain lines where the input is not a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import sys
from typing import TYPE_CHECKING

from genarm.batch.plan import Plan
from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import open_console, quiet_libraries, say
from genarm.cli.options import DraftOptions, ModelOptions, PromptOptions, ReadingOptions, WishOptions
from genarm.engine import EngineOptions
from genarm.engine.options import MOST_WISHES
from genarm.sampling import Sampling, check_seed

if TYPE_CHECKING:
    from rich.console import Console

    from genarm.cli.conversation import Chat, ChatReply
    from genarm.model.token_rewards import TokenRewards

SUMMARY = "talk to a model in the terminal and steer it as you go"


_SAMPLING = Sampling(max_new_tokens=256, temperature=0.7, top_p=0.9)
"""A conversation is there to be read, and small models ramble where they draw from all of their distribution."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm chat`."""
    add_options(parser, ModelOptions, WishOptions, PromptOptions, ReadingOptions, _SAMPLING)
    add_options(parser, Plan, only=["seed"])
    context = (
        "how many tokens of the conversation the model sees, questions and answers together (a token is about three "
        "quarters of an English word); memory for them is reserved at the start. By default what the members have, but "
        "no more than 2048"
    )
    add_options(parser, EngineOptions, only=["context", "speculate"], context={"help": context})
    add_options(parser, DraftOptions)


def run(arguments: argparse.Namespace) -> int:
    """Load the model and handle lines until there are no more."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text must not end the conversation
    with quiet_libraries():
        from genarm.cli.conversation import Chat
        from genarm.cli.session import open_session

        sampling, seed = settings_from(arguments, _SAMPLING), check_seed(arguments.seed)
        session = open_session(arguments)
        chat = Chat(
            session.engine(streams=3, context=arguments.context, wishes=MOST_WISHES),
            session.files,
            TerminalScreen(open_console()),
            sampling,
            seed=seed,
            weights=session.weights,
            max_kl=session.max_kl,
            system=session.system,
        )
        _greet(chat)
        while _turn(chat):
            pass
    return 0


def _greet(chat: Chat) -> None:
    from genarm.cli.conversation import describe_weights

    if not sys.stdin.isatty():
        return
    with contextlib.suppress(ImportError):  # gives input() a history and editing keys, where there is one
        import readline  # noqa: F401
    if chat.files.guided:
        chat.screen.note(f"weights {describe_weights(chat.weights)}")
    chat.screen.note(chat.engine.describe())
    chat.screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")


def _turn(chat: Chat) -> bool:
    """Read what is typed or pasted and handle it; whether the conversation goes on."""
    terminal = sys.stdin.isatty()
    try:
        text, message = _read(terminal)
    except EOFError:
        if terminal:
            print()
        return False
    except KeyboardInterrupt:
        if not terminal:
            raise
        print()
        chat.screen.note("/quit or Ctrl-D leaves")
        return True
    try:
        return chat.handle(text, message=message)
    except KeyboardInterrupt:  # while nothing was being generated: a heat map, say
        chat.screen.note("[stopped]")
        return True


def _read(terminal: bool) -> tuple[str, bool]:
    """A line, or the several of a paste or between two fences; and whether they are a message, whatever they say."""
    lines = [input("› " if terminal else "")]
    while terminal and (rest := _pasted()):
        *whole, last = rest.split("\n")
        unseen = "readline" in sys.modules  # which has the terminal show nothing by itself
        lines += whole
        for line in whole if unseen else ():
            say(line)
        if last:  # its end is still to be typed
            lines.append(last + input(last if unseen else ""))
    text = "\n".join(lines)
    before, fence, rest = text.partition(_FENCE)
    if not fence or before.strip() not in ("", *_TAKE_TEXT):
        return text, "\n" in text.strip()
    while _FENCE not in rest:
        rest += "\n" + input("… " if terminal else "")
    inside, _, after = rest.partition(_FENCE)
    return before + inside.strip("\n") + after, not before.strip()


def _pasted() -> str:
    """What came right after a line, faster than anybody types; the end of it may be a line that is not complete."""
    try:
        import termios
    except ImportError:  # a system that cannot look ahead
        return ""
    terminal, found = sys.stdin.fileno(), b""
    usual = termios.tcgetattr(terminal)
    at_once = [*usual[:3], usual[3] & ~(termios.ICANON | termios.ECHO), *usual[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, at_once)
    try:
        while select.select([terminal], [], [], _PASTE_SECONDS)[0]:
            found += os.read(terminal, 2**16)
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, usual)
    return found.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")


class TerminalScreen:
    """A `Screen` on a terminal, or on whatever stands in for one; colours only where the console has them."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        """A remark in faint letters."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """One line in red."""
        self.console.print(f"error: {' '.join(text.split())}", style="red", markup=False, soft_wrap=True)

    def piece(self, text: str) -> None:
        """As it comes; the terminal breaks the lines."""
        self.console.print(text, end="", markup=False, soft_wrap=True)

    def answered(self, answer: ChatReply) -> None:
        """Close the last line, and say if the answer was cut."""
        self.console.print()
        if answer.ended != "stop" or not answer.text:
            self.note(_ENDINGS[answer.ended])

    def compared(self, base: ChatReply, guided: ChatReply, sharpened: tuple[float, ChatReply] | None) -> None:
        """A column for each."""
        from rich.table import Table
        from rich.text import Text

        from genarm.cli.conversation import describe_weights

        columns = [("base", base), (f"guided {describe_weights(guided.weights)}", guided)]
        if sharpened is not None:
            columns.append((f"sharpened base, temperature {sharpened[0]:.3g}", sharpened[1]))
        table = Table(width=min(self.console.width, _COLUMNS_WIDTH))
        cells = []
        for heading, answer in columns:
            table.add_column(Text(heading), ratio=1, overflow="fold")
            text = Text(answer.text)
            if answer.ended != "stop" or not answer.text:
                text.append(f"\n{_ENDINGS[answer.ended]}", style="dim")
            cells.append(text)
        table.add_row(*cells)
        self.console.print(table)

    def heat(self, rewards: TokenRewards) -> None:
        """Coloured text for each quantity, or the table of numbers where there are no colours."""
        from genarm.cli.heatmap import heat_text, legend, print_table, quantities

        if self.console.color_system is None or self.console.no_color:
            print_table(self.console, rewards)
            return
        for quantity in quantities(rewards):
            self.console.print(legend(quantity))
            self.console.print(heat_text(rewards, quantity))
            self.console.print()


_FENCE = '"""'
_TAKE_TEXT = ("/system", "/compare")
_PASTE_SECONDS = 0.03
_ENDINGS = {"stop": "[an empty answer]", "length": "[cut at the token limit]", "interrupted": "[stopped]"}
_COLUMNS_WIDTH = 120
