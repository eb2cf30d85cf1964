"""Have an LLM compare the answers of two models to the same prompts.

Each pair is shown in both orders. Replies are kept beside the output as they come, so that the same command goes on
where an interrupted run stopped and pays for nothing twice. The key of the endpoint comes from an environment variable
and from nowhere else.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import goes_on, progress, say
from genarm.errors import ConfigError
from genarm.lab.judges.settings import ClientSettings

if TYPE_CHECKING:
    from genarm.lab.judges.answers import Matched
    from genarm.lab.judges.llm import Estimate, Verdict
    from genarm.lab.judges.protocol import Protocol

SUMMARY = "have an LLM compare two models' answers: win, tie and lose with intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm judge`."""
    for name, letter in (("first", "A"), ("second", "B")):
        parser.add_argument(name, type=Path, metavar=f"{letter}.jsonl", help=f"answers of {letter}, by genarm generate")
    parser.add_argument(
        "--protocol",
        required=True,
        metavar="NAME|FILE",
        help="genarm-hh, harmless, helpful, pairwise, or a TOML file of your own",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSONL file for the verdicts")
    parser.add_argument("--model", metavar="NAME", help="the judge, as the endpoint calls it; else the protocol's")
    add_options(parser, ClientSettings)
    parser.add_argument("--price-in", type=float, metavar="P", help="of a million tokens read")
    parser.add_argument("--price-out", type=float, metavar="P", help="of a million tokens written")
    parser.add_argument("--estimate", action="store_true", help="say what it will take, and ask nothing")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, say what it will take, then ask."""
    from genarm.files import check_output, resume_rows
    from genarm.lab.judges.answers import match_answers
    from genarm.lab.judges.cache import ReplyCache
    from genarm.lab.judges.llm import estimate, judge_pairs
    from genarm.lab.judges.protocol import load_protocol
    from genarm.provenance import alone, claim

    check_output(arguments.output)
    protocol = load_protocol(arguments.protocol)
    if protocol.single:
        raise ConfigError(f"the protocol {protocol.name} scores single answers; comparing two needs one for pairs")
    settings = _settings(arguments, protocol)
    _check_prices(arguments)
    matched = match_answers(arguments.first, arguments.second)
    pairs = [match.pair for match in matched]
    cache = ReplyCache(arguments.output.with_name(f"{arguments.output.name}.replies"))
    expected = estimate(
        pairs,
        protocol,
        model=settings.model,
        cache=cache,
        price_in=arguments.price_in,
        price_out=arguments.price_out,
    )
    say(_forecast(expected, len(pairs)))
    if arguments.estimate:
        return 0
    with alone(arguments.output):
        digest = claim(arguments.output, _record(arguments, matched, protocol, settings.model))
        resume_rows(arguments.output, digest)
        total, asked = 2 * len(pairs), itertools.count(1)
        with goes_on(arguments.output), progress() as advance:
            advance("replies", 0, total)
            verdicts = judge_pairs(pairs, protocol, settings, cache, lambda: advance("replies", next(asked), total))
        _write(arguments.output, matched, verdicts, digest)
    _report(arguments, protocol, settings, verdicts)
    return 0


def _settings(arguments: argparse.Namespace, protocol: Protocol) -> ClientSettings:
    model = arguments.model or protocol.model
    if model is None:
        raise ConfigError(f"the protocol {protocol.name} names no model; name one with --model")
    settings = settings_from(arguments, ClientSettings, model=model)
    if not arguments.estimate:
        settings.find_key()
    return settings


def _check_prices(arguments: argparse.Namespace) -> None:

    prices = [arguments.price_in, arguments.price_out]
    if prices.count(None) == 1:
        raise ConfigError("--price-in and --price-out go together; give both, or neither")
    if any(price is not None and not 0 <= price < float("inf") for price in prices):
        raise ConfigError(f"the prices are {prices[0]} and {prices[1]}; they must be numbers of at least 0")


def _record(
    arguments: argparse.Namespace, matched: Sequence[Matched], protocol: Protocol, model: str
) -> dict[str, object]:
    """What decides the verdicts: the answers, what is asked about them, and of whom."""
    from genarm.provenance import AT, content_of

    sides = {"first": arguments.first, "second": arguments.second}
    answers = {
        side: {
            AT: str(path),
            "answers": content_of((m.index, m.sample, m.pair.prompt, getattr(m.pair, side)) for m in matched),
        }
        for side, path in sides.items()
    }
    return {"model": model, "protocol": protocol.record, **answers}


def _forecast(expected: Estimate, pairs: int) -> str:
    price = "" if expected.price is None else f", at most {expected.price:,.2f} at these prices"
    return (
        f"{pairs:,} pairs in both orders: {expected.calls:,} questions to ask, {expected.cached:,} replies kept; about "
        f"{expected.prompt_tokens:,} tokens to read (a token per 4 characters) and at most "
        f"{expected.completion_tokens:,} to write{price}"
    )


def _write(output: Path, matched: Sequence[Matched], verdicts: Sequence[Verdict], digest: str) -> None:
    from genarm.files import write_text

    rows = [
        {
            "index": match.index,
            "sample": match.sample,
            "prompt": match.pair.prompt,
            "first": match.pair.first,
            "second": match.pair.second,
            **verdict.record(),
            "settings": digest,
        }
        for match, verdict in zip(matched, verdicts, strict=True)
    ]
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _report(
    arguments: argparse.Namespace, protocol: Protocol, settings: ClientSettings, verdicts: Sequence[Verdict]
) -> None:
    """Print the figures, and say what went wrong; raises DataError where there is no figure at all."""
    from genarm.errors import DataError
    from genarm.lab.judges.llm import summarise
    from genarm.statistics import win_rate

    summary = summarise(verdicts)
    rate = win_rate([verdict.outcome for verdict in verdicts])
    say(f"{arguments.first} against {arguments.second}, by {settings.model} ({protocol.name})")
    say(f"win {rate.win}  tie {rate.tie}  lose {rate.lose}  unparsed {summary.unparsed}  failed {summary.failed}")
    say(f"win + ½ tie: {rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}] (n={rate.n})" if rate.n else "n=0")
    say(
        f"the two orders disagree on {summary.inconsistent} of {rate.n} pairs: {summary.for_first} for the answer "
        f"shown first, {summary.for_second} for the one shown second"
    )
    say(f"{summary.prompt_tokens:,} tokens read, {summary.completion_tokens:,} written")
    if summary.failed:
        say(f"failed: {summary.failure}; the same command asks again", stderr=True)
    say(f"wrote {arguments.output}", stderr=True)
    if not rate.n:
        raise DataError(f"no pair has a verdict; see the replies in {arguments.output}")
