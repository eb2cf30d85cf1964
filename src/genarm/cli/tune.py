"""Find weights for a guided folder: from pairs that somebody prefers, or from replies that something scores.

With --pairs the weights are fitted to preference pairs (Bradley–Terry, a logistic regression on what each reward says
more of the chosen response than of the rejected one); 20 pairs give an answer, and how sure it is. With --prompts and
--score replies are drawn under several weights and scored, against their distance from the base. Either goes on where
an interrupted run stopped. Wishes given with --wish can be tuned, too.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.batch.plan import Plan
from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import goes_on, open_console, progress, quiet_libraries, say
from genarm.cli.options import ModelOptions, PromptOptions, TemplateOptions, WishOptions
from genarm.errors import ConfigError, UnsupportedError
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.tune.settings import TuneOptions
from genarm.sampling import Sampling

if TYPE_CHECKING:
    from genarm.cli.session import Session

SUMMARY = "find weights: from a few preference pairs, or from a sweep that something scores"

_PLAN = Plan(sampling=Sampling())
_OF_PAIRS = ("split", "objective", "max_prompt_tokens", "max_response_tokens", "beta")
_OF_A_SWEEP = (
    *("score", "judge_url", "judge_model", "scales", "vary", "budget", "weights", "system", "num_samples"),
    *("max_new_tokens", "temperature", "top_p"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm tune`."""
    add_options(parser, ModelOptions, only=["folder"])
    of = parser.add_mutually_exclusive_group(required=True)
    pairs = "preference pairs, in any format that genarm train takes: a hub id, a folder, or a file"
    of.add_argument("--pairs", metavar="DATA", help=pairs)
    prompts = "prompts to reply to: FILE.txt, one per line, or FILE.jsonl, as genarm generate takes them"
    of.add_argument("--prompts", type=Path, metavar="FILE", help=prompts)
    with_pairs, with_prompts = (parser.add_argument_group(f"with {option}") for option in ("--pairs", "--prompts"))
    add_options(with_pairs, AccuracySettings, TuneOptions, only=_OF_PAIRS)
    score = "what scores a reply, as in genarm pairs: function=MODULE:FUNCTION, reward=FOLDER, judge=RUBRIC.txt, …"
    with_prompts.add_argument("--score", metavar="KIND=VALUE", help=score)
    add_options(with_prompts, PromptOptions, TuneOptions, only=["weights", "scales", "vary", "budget", "system"])
    samples = {"option": "--samples", "help": "how many replies to each prompt"}
    add_options(with_prompts, _PLAN, only=["num_samples"], num_samples=samples)
    add_options(with_prompts, Sampling)
    with_prompts.add_argument("--judge-url", metavar="URL", help="of --score judge=…, as in genarm pairs")
    with_prompts.add_argument("--judge-model", metavar="NAME", help="the judge, as the endpoint calls it")
    add_options(parser, TuneOptions, PromptOptions, WishOptions, TemplateOptions)
    parser.add_argument("--raw", action="store_true", help="take text as it is, without the chat template")
    at_once = {"help": "how many replies to decode, or responses to score, at once"}
    add_options(parser, _PLAN, only=["seed", "batch_size"], batch_size=at_once)
    add_options(parser, ModelOptions)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, measure, show, and write the weights where they were asked for."""
    from genarm.data.presets import check_preset_name, read_presets
    from genarm.files import check_output

    options = settings_from(arguments, TuneOptions)
    name = Path(arguments.folder).expanduser().resolve().name
    output = options.output or Path("genarm-tune") / name
    check_output(output, folder=True)
    _check_mode(arguments)
    if options.preset is not None:
        check_preset_name(options.preset)
    with quiet_libraries():
        from genarm.cli.session import open_session

        session = open_session(arguments)
        if not session.weights:
            raise UnsupportedError(
                f"{arguments.folder} is not a guided folder, so it has no weights; give a --wish, or make one with "
                "genarm compose"
            )
        if options.write or options.preset is not None:
            _check_folder(session, "--write" if options.write else "--preset")
            read_presets(Path(session.files.reference))
        with goes_on(output):
            find = _from_pairs if arguments.pairs is not None else _from_sweep
            weights = find(arguments, options, session, output)
    _write(options, session, weights)
    return 0


def _check_mode(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing (raises ConfigError)."""
    sweeps = arguments.prompts is not None
    if sweeps and arguments.score is None:
        raise ConfigError("--prompts needs --score, which says how good a reply is; or give --pairs")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name in _OF_PAIRS if sweeps else _OF_A_SWEEP:
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            option = next(action.option_strings[0] for action in parser._actions if action.dest == name)
            other = ("--pairs", "--prompts") if sweeps else ("--prompts", "--pairs")
            raise ConfigError(f"{option} is for {other[0]}, and with {other[1]} it would do nothing; leave it out")
    if not sweeps and arguments.max_kl is not None and arguments.preset is None:
        raise ConfigError("--max-kl changes nothing in what pairs say; it goes into a --preset, or leave it out")


def _check_folder(session: Session, option: str) -> None:
    """Refuse to write weights where no folder could have them (raises UnsupportedError)."""
    files = session.files
    if files.added_wishes:
        raise UnsupportedError(
            f"{option} writes into a guided folder, and the wish {next(iter(files.added_wishes))!r} is in none; make "
            "one with genarm compose --wish first"
        )
    if not Path(files.reference).is_dir():
        raise UnsupportedError(f"{option} writes into a folder, and {files.reference} is on the hub; download it first")


def _from_pairs(
    arguments: argparse.Namespace, options: TuneOptions, session: Session, output: Path
) -> dict[str, float]:
    """Fit the weights to pairs, show and note them."""
    import datasets

    from genarm.lab.accuracy.models import guided_files
    from genarm.lab.accuracy.pairs import read_pairs
    from genarm.lab.accuracy.run import reading
    from genarm.lab.tune.pairs import open_pairs, tune_on_pairs
    from genarm.lab.tune.report import pairs_json, print_pairs, write_json

    datasets.disable_progress_bars()
    # What the folder is asked for is not among the options here: margins depend on no weight.
    given = {"models": (arguments.folder,), "data": arguments.pairs, "weights": None, "max_kl": None}
    settings = settings_from(arguments, AccuracySettings, **given)
    data = read_pairs(settings)
    pairs, record = open_pairs(guided_files(arguments.folder, session.files), data, settings)
    for line in reading(data, pairs):
        say(line, stderr=True)
    with progress() as advance:
        result = tune_on_pairs(output, pairs, record, settings, beta=options.beta, seed=arguments.seed, advance=advance)
    print_pairs(open_console(), result)
    write_json(output / "pairs.json", pairs_json(result), device=session.device)
    say(f"wrote {output}", stderr=True)
    return result.values


def _from_sweep(
    arguments: argparse.Namespace, options: TuneOptions, session: Session, output: Path
) -> dict[str, float]:
    """Draw and score replies under several weights, show and note them."""
    from genarm.batch.requests import read_requests
    from genarm.cli.pairs import make_score
    from genarm.lab.tune.report import draw_sweep, print_sweep, sweep_json, write_json
    from genarm.lab.tune.sweep import ray, sweep

    requests = read_requests(arguments.prompts)
    if weighed := [request.where for request in requests if request.reward_weights]:
        raise ConfigError(f"{weighed[0]} has reward_weights of its own, which no sweep could change; take them out")
    plan = settings_from(arguments, _PLAN, sampling=settings_from(arguments, Sampling))
    weights = ray(session.weights, options.scales, options.vary)
    jobs = {scale: replace(session, weights=own).jobs(requests, plan) for scale, own in weights.items()}
    conversations = [session.files.conversation(r.prompt, system=session.system, raw=session.raw) for r in requests]
    scorer = make_score(arguments, requests, replies=output / "judge")
    with progress() as advance:
        result = sweep(
            output,
            jobs,
            conversations,
            plan,
            session.settings(requests, plan),
            scorer,
            budget=options.budget,
            open_engine=lambda streams, context: session.engine(streams=streams, context=context),
            advance=advance,
        )
    print_sweep(open_console(), result)
    write_json(output / "sweep.json", sweep_json(result), device=session.device)
    draw_sweep(output / "sweep.png", result, score=arguments.score)
    say(f"wrote {output}; the picture is {output / 'sweep.png'}", stderr=True)
    return dict(result.points[result.best].weights)


def _write(options: TuneOptions, session: Session, weights: dict[str, float]) -> None:
    """Put the weights where they were asked for."""
    from genarm.cli.serve import ServeOptions
    from genarm.data.presets import write_preset
    from genarm.lab.tune.report import show_weights
    from genarm.model.saving import write_default_weights

    folder = Path(session.files.reference)
    if not any(weights.values()) and (options.write or options.preset is not None):
        say("nothing is written: no weights are better than none", stderr=True)
        return
    if options.write:
        write_default_weights(folder, weights)
        say(f"the default weights of {folder} are now {show_weights(weights)}")
    if options.preset is not None:
        file = write_preset(folder, options.preset, weights, session.max_kl)
        largest, most = max(map(abs, weights.values())), ServeOptions.max_weight
        wide = f" (start it with --max-weight {math.ceil(largest)})" if largest > most else ""
        say(f"the preset {options.preset} is in {file}: genarm serve answers to MODEL@{options.preset}{wide}")
