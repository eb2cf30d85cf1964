"""Completion scripts for shells, from the command line's own parsers: commands, options and the values of choices."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_genarm() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} at= words=
  [ "$COMP_CWORD" -gt 1 ] && at=${{COMP_WORDS[1]}}
  case "$at" in -*) at= ;; {groups}) [ "$COMP_CWORD" -gt 2 ] && at="$at ${{COMP_WORDS[2]}}" ;; esac
  case "$at $before" in
{values}
    *) case "$at" in
{places}
    esac ;;
  esac
  COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -o bashdefault -F _genarm genarm
"""


class PrintCompletion(argparse.Action):
    """An option that prints the script for a shell and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any, **_: Any) -> None:
        """As argparse calls it: with the namespace and the value next."""
        print(script(parser, str(given[1])), end="")
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What to source in `shell`, one of `SHELLS`, for completing the command of `parser`."""
    if shell == "fish":
        return "".join(f"complete -c genarm {line}\n" for line in _fish(parser))
    places, values = [], []
    for place, own in _places(parser):
        at = " ".join(place)
        words = [*_commands(own), *(name for action in _options(own) for name in action.option_strings)]
        places.append(f"      {shlex.quote(at)}) words={shlex.quote(' '.join(words))} ;;")
        for action in _options(own):
            patterns = "|".join(shlex.quote(f"{at} {name}") for name in action.option_strings)
            if action.choices is not None:
                values.append(f"    {patterns}) words={shlex.quote(' '.join(map(str, action.choices)))} ;;")
            elif action.nargs != 0:  # a file, or a value of the user's own
                values.append(f"    {patterns}) return ;;")
    groups = "|".join(place[0] for place, own in _places(parser) if len(place) == 1 and _commands(own))
    text = _BASH.format(groups=groups or "''", values="\n".join(values), places="\n".join(places))
    return f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{text}" if shell == "zsh" else text


def _places(
    parser: argparse.ArgumentParser, place: Sequence[str] = ()
) -> Iterator[tuple[Sequence[str], argparse.ArgumentParser]]:
    """Every parser with the commands that lead to it."""
    yield place, parser
    for name, own in _commands(parser).items():
        yield from _places(own, (*place, name))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    groups = [place[0] for place, own in _places(parser) if len(place) == 1 and _commands(own)]
    for place, own in _places(parser):
        seen = [f"__fish_seen_subcommand_from {name}" for name in place]
        if len(place) == 1:  # a command of this name may be below another one
            seen += [f"not __fish_seen_subcommand_from {group}" for group in groups if group != place[0]]
        here = "; and ".join(seen) or "__fish_use_subcommand"
        commands = _commands(own)
        if commands:
            none = f"not __fish_seen_subcommand_from {' '.join(commands)}"
            where = here if not place else f"{here}; and {none}"
            yield f"-n {shlex.quote(where)} -f -a {shlex.quote(' '.join(commands))}"
        for action in _options(own):
            value = "" if action.nargs == 0 else " -r"
            if action.choices is not None:
                value = f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
            names = " ".join(f"{'-l' if n.startswith('--') else '-s'} {n.lstrip('-')}" for n in action.option_strings)
            about = shlex.quote((action.help or "").replace("%%", "%").split("; ")[0].replace("'", "’"))
            yield f"-n {shlex.quote(here)} {names}{value} -d {about}"
