"""Show what the base and each reward say about every token of a response.

The table has a row per token: its log-probability by the base, by each reward and by the guided model, and each
reward's weighted contribution. Colours show how a reward differs from the base.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genarm.cli.arguments import add_options
from genarm.cli.console import open_console, quiet_libraries, say, say_json
from genarm.cli.options import ModelOptions, PromptOptions, TemplateOptions, WishOptions

if TYPE_CHECKING:
    from genarm.model.token_rewards import TokenRewards

SUMMARY = "show what each reward says about each token of a response"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm score`."""
    add_options(parser, ModelOptions)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what was asked")
    parser.add_argument("--response", required=True, metavar="TEXT", help="what was answered")
    add_options(parser, WishOptions, PromptOptions, TemplateOptions)
    parser.add_argument("--raw", action="store_true", help="plain text, without the chat template")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with a heat map")


def run(arguments: argparse.Namespace) -> int:
    """Score one response and show it."""
    from genarm.batch.requests import check_prompt
    from genarm.files import check_output

    if arguments.html:
        check_output(arguments.html, option="--html")
    check_prompt(arguments.prompt, "--prompt")
    with quiet_libraries():
        rewards = _score(arguments)
    _show(rewards, as_json=arguments.json)
    if arguments.html:
        _write_page(arguments, rewards)
    return 0


def _score(arguments: argparse.Namespace) -> TokenRewards:
    """Load the model and ask it, once everything else is in order."""
    from genarm.cli.session import open_session
    from genarm.errors import DataError, UnsupportedError
    from genarm.model.modeling import GuidedForCausalLM
    from genarm.model.references import check_length

    if not arguments.response:
        raise DataError("--response is empty; give the text to score")
    session = open_session(arguments)
    files = session.files
    if not files.guided:
        raise UnsupportedError(
            f"{arguments.folder} is not a guided folder, so there are no rewards to show; give a --wish, or make one "
            "with genarm compose"
        )
    prompt = files.conversation(arguments.prompt, system=session.system, raw=session.raw)
    prompt_ids, response_ids = files.encode_pair(prompt, arguments.response)
    longest = max(map(len, (prompt_ids, *files.contexts(prompt, dict.fromkeys(session.weights, 1.0)).values())))
    check_length(files, longest, len(response_ids), where="--prompt and --response")
    # In bfloat16 a token's log-prob moves by a tenth with what follows it, which would be coloured as if it meant much.
    exact = session.dtype == "auto" and session.device == "cpu"
    model = session.load(dtype="float32" if exact else None)
    assert isinstance(model, GuidedForCausalLM)
    rounding = sorted({str(m.model.dtype).removeprefix("torch.") for m in model.members} - {"float32"})
    if rounding:
        note = f"computed in {', '.join(rounding)}: differences of about 0.1 may be rounding (--dtype float32 is exact)"
        say(note, stderr=True)
    return model.token_rewards(
        prompt,
        arguments.response,
        tokenizer=files.tokenizer,
        reward_weights=session.weights,
        max_kl=session.max_kl,
        reading=files.reading,
    )


def _write_page(arguments: argparse.Namespace, rewards: TokenRewards) -> None:
    from genarm.cli.heatmap import html_page
    from genarm.files import write_text

    prompt = "\n\n".join(filter(None, [arguments.system, arguments.prompt]))
    write_text(arguments.html, html_page(rewards, model=arguments.folder, prompt=prompt))
    say(f"wrote {arguments.html}", stderr=True)


def _show(rewards: TokenRewards, *, as_json: bool) -> None:
    if as_json:
        say_json(_finite(rewards.to_dict()), indent=2)
        return
    from genarm.cli.heatmap import print_table

    print_table(open_console(), rewards)


def _finite(value: Any) -> Any:
    """`value` with null for the infinities of impossible tokens, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
