"""Say what a folder is and what is in it: members, sizes, training, licences, and what would run it.

Reads configurations, cards and the headers of weights, and nothing big. Of a model or an adapter by itself it says how
to make a guided folder of it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from genarm.cli.console import open_console, quiet_libraries, say, say_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genarm.model.describe import Description, MemberFacts

SUMMARY = "say what a folder is: members, sizes, training, licences, and what would run it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm show`."""
    about = "a guided folder, an ARM's or another model's folder, or a hub id (ID@REVISION)"
    parser.add_argument("folder", metavar="FOLDER", help=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow members with code of their own")


def run(arguments: argparse.Namespace) -> int:
    """Look, and print."""
    with quiet_libraries():
        from genarm.model.describe import describe

        found = describe(arguments.folder, trust_remote_code=arguments.trust_remote_code)
        runs = _what_runs(found)
    if arguments.json:
        say_json(_record(found, runs), indent=2)
    else:
        _print(found, runs)
    return 0


# --- what would run it ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether something would run a model: None where that shows at loading only. `why` is its own refusal, if any."""

    runs: bool | None
    why: str | None = None


def _what_runs(found: Description) -> dict[str, Verdict]:
    """What transformers, the engine and vLLM would do, by their own checks; nothing for an adapter."""
    if found.files is None:
        return {}
    if found.outline is None:
        fails = Verdict(runs=False, why=found.problem)
        return {"transformers": fails, "engine": fails, **({"vllm": fails} if found.files.guided else {})}
    verdicts = {"transformers": Verdict(runs=True), "engine": _by_engine(found.outline)}
    # Whether vLLM knows a plain model is its own matter.
    return {**verdicts, "vllm": _by_vllm(found)} if found.files.guided else verdicts


def _by_engine(outline: Any) -> Verdict:
    from genarm.engine.build import foresee
    from genarm.errors import GenarmError

    try:
        known = foresee(outline)
    except GenarmError as error:
        return Verdict(runs=False, why=str(error))
    proof = "it compares itself with the model's own forward when that is loaded"
    if known:
        return Verdict(runs=True, why=f"as far as shows without values; {proof}")
    return Verdict(runs=None, why=f"which shows with the weights' values alone; {proof}")


def _by_vllm(found: Description) -> Verdict:
    from genarm.errors import GenarmError
    from genarm.model.assembly import local_folder
    from genarm.server.vllm_backend import need_vllm
    from genarm.vllm.config import foresee

    assert found.files is not None
    try:
        foresee(str(local_folder(found.files.reference, found.files.revision, found.files.hub)))
    except GenarmError as error:
        return Verdict(runs=False, why=str(error))
    try:
        need_vllm()
    except GenarmError as error:
        return Verdict(runs=None, why=f"nothing in the files speaks against it, but {error}")
    return Verdict(runs=True)


# --- as JSON --------------------------------------------------------------------------------------------------


def _record(found: Description, runs: dict[str, Verdict]) -> dict[str, Any]:
    return {
        "reference": found.reference,
        "kind": found.kind,
        "vocabulary": found.vocabulary,
        "context": found.context,
        "members": [{**asdict(member), "loss": _loss(member), "beta": _beta(member)} for member in found.members],
        "runs": {name: asdict(verdict) for name, verdict in runs.items()},
        "problem": found.problem,
    }


def _loss(member: MemberFacts) -> str | None:
    """The loss that a member was trained by; None where `genarm train` did not make it."""
    kind = member.trained.get("kind")
    return None if kind is None else str(member.trained.get("loss") or kind)


def _beta(member: MemberFacts) -> float | None:
    beta = member.trained.get("beta")
    return float(beta) if isinstance(beta, int | float) else None


# --- for people -----------------------------------------------------------------------------------------------


def _print(found: Description, runs: dict[str, Verdict]) -> None:
    from rich import box
    from rich.table import Table

    rewards = sum(member.weight is not None for member in found.members)
    what = f"a guided folder: a base and {rewards} reward{'s' * (rewards != 1)}"
    if found.kind != "guided folder":
        what = "a LoRA adapter" if found.kind == "adapter" else "a causal language model by itself, no guided folder"
    say(f"{found.reference} is {what}\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("member", no_wrap=True)
    table.add_column("weight", justify="right")
    table.add_column("what it is", overflow="fold")
    for title in ("parameters", "dtype", "on disk", "in memory"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    for member in found.members:
        table.add_row(*map(_plain, _row(member)))
    open_console().print(table)
    for member in found.members:
        for line in _about(member):
            say(f"{member.name}: {line}")
    if found.vocabulary is not None:
        context = "" if found.context is None else f"; up to {found.context:,} tokens of prompt and reply together"
        say(f"vocabulary: {found.vocabulary:,} ids{context}")
    for name, verdict in runs.items():
        says = {True: "runs it", False: "would refuse it", None: "may run it"}[verdict.runs]
        say(f"{_RUNNERS[name]} {says}" + ("" if verdict.why is None else f": {verdict.why}"))
    for line in _advice(found):
        say(line)


_RUNNERS = {"transformers": "transformers' generate", "engine": "genarm's engine", "vllm": "vLLM"}


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _row(member: MemberFacts) -> Iterator[str]:
    yield member.name
    yield "" if member.weight is None else f"{member.weight:g}"
    revision = "" if member.revision is None else f"@{member.revision}"
    yield {
        "wish": "a wish, read by " + (member.model or "the base"),
        "adapter": f"a LoRA adapter {member.adapter}{revision} on {member.model or 'the base'}",
        "model": f"a model {member.model}{revision}",
    }[member.kind]
    held = member.weights
    if held is None:
        yield from ["", "", "", ""] if member.kind == "wish" else ["not here", "", "", ""]
    else:
        yield from (f"{held.parameters:,}", held.dtype, _size(held.on_disk))
        yield "as quantised" if held.in_memory is None else _size(held.in_memory)
    yield "" if member.kind == "wish" else member.licence or "none found"


def _about(member: MemberFacts) -> Iterator[str]:
    if member.problem is not None:
        yield f"cannot be read: {member.problem}"
    if member.description:
        yield member.description
    if member.wish is not None:
        yield f"the wish {member.wish!r}"
    if member.weight is not None and member.reference is not None:
        yield f"a difference to {member.reference}"
    loss, beta = _loss(member), _beta(member)
    if loss is not None:
        given = "" if beta is None else f" with β_r = {beta:g}"
        data = f" on {member.trained['data']}" if member.trained.get("data") else ""
        option = "--loss" if member.trained.get("loss") else "--kind"
        yield f"trained by {option} {loss}{given} from {member.trained.get('model')}{data}"
    if (rate := member.figures.get("eval_accuracy")) is not None:
        low, high, n = (member.figures.get(f"eval_{key}") for key in ("accuracy_low", "accuracy_high", "pairs"))
        interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        yield f"held-out accuracy {rate:.3f}{interval}" + ("" if n is None else f" (n={n:.0f})")
    if member.unknown:
        from genarm.model.vocabulary import unknown_note

        yield unknown_note("it", list(member.unknown))


def _advice(found: Description) -> Iterator[str]:
    """How to make a guided folder of what is none."""
    if found.kind == "guided folder":
        return
    place, kind = found.reference, found.members[0].trained.get("kind")
    if kind == "trajectory":
        yield f"it scores whole replies: genarm pairs --score reward={place}, for example; it cannot guide"
        return
    model = found.members[0].model if found.kind == "adapter" else "BASE"
    reward = f"genarm compose --base {model or 'BASE'} --reward NAME={place} --output DIR"
    tuned = f"genarm compose --base {model or 'BASE'} --tuned NAME={place} --output DIR"
    if kind is None and found.kind == "model":
        yield f"to guide it: genarm compose --base {place} --reward NAME=ARM --output DIR"
        yield f"or with a wish, without training: genarm chat {place} --wish NAME=TEXT"
    if kind in (None, "arm"):
        yield f"as a reward{'' if kind else ', where it was trained to be one'}: {reward}"
    if kind != "arm":
        yield f"as a reward{'' if kind else ', where it was tuned by DPO, SFT, RL or the like'}: {tuned}"


def _size(count: int) -> str:
    """Bytes; a GB is 10⁹ of them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
