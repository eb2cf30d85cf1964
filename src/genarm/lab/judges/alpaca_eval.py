"""AlpacaEval 2 through its own package (extra `alpaca`): raw and length-controlled win rates, in percent.

`annotate` has the package's own annotator compare a model's outputs with a reference's, at any endpoint that returns
log-probabilities; `win_rates` makes the figures of annotations, whoever made them. Rows are numbered as in AlpacaEval's
set of 805 instructions: length control knows how hard each one is.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genarm.errors import ConfigError, DataError, MissingExtraError
from genarm.files import write_text
from genarm.lab.judges.comparing import Compared, Comparer
from genarm.lab.judges.interface import Kind
from genarm.lab.judges.llm import Pair
from genarm.lab.judges.protocol import as_text
from genarm.lab.judges.settings import KEY_VARIABLE, ClientSettings
from genarm.statistics import Outcome

if TYPE_CHECKING:
    from genarm.lab.judges.kinds import JudgeSpec

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"

_HUB_DATA = "tatsu-lab/alpaca_eval"
_INSTRUCTIONS = 805
_NOT_ITS_OWN = (
    f"it knows how hard each of AlpacaEval's {_INSTRUCTIONS} instructions is, and these prompts are others (they are "
    f'read as {_HUB_DATA} has them, with column = "instruction")'
)


@dataclass(frozen=True, kw_only=True)
class Output:
    """An instruction of AlpacaEval by its number, and what a model and the reference answered."""

    index: int
    instruction: str
    output: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """A verdict: `preference` goes from 1 (the reference is better) to 2 (the model is); None where it is missing."""

    index: int
    output: str
    reference: str
    preference: float | None


@dataclass(frozen=True, kw_only=True)
class AlpacaWinRates:
    """Percentages with their standard errors; `n` annotations have a preference and `missing` have none."""

    raw: float
    raw_error: float
    controlled: float
    controlled_error: float
    n: int
    missing: int


def write_outputs(path: Path, outputs: Sequence[Output], *, generator: str, reference: bool = False) -> None:
    """Write the model's outputs, or the reference's, as the command `alpaca_eval` reads them."""
    rows = [
        {"instruction": o.instruction, "output": o.reference if reference else o.output, "generator": generator}
        for o in outputs
    ]
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def annotate(outputs: Sequence[Output], folder: Path, settings: ClientSettings) -> list[Annotation]:
    """Have AlpacaEval 2's annotator compare each output with the reference's, in an order that it draws itself.

    Args:
        outputs: of one model, with the reference's.
        folder: for the annotator's configuration and its annotations, which a later run goes on with.
        settings: of an endpoint that returns log-probabilities; published figures are by gpt-4-1106-preview. The
            package has no limit of requests per minute.

    Raises:
        ConfigError: a setting that the package lacks; an error of the endpoint that it does not recover from.
        MissingExtraError: the package is not installed.
    """
    if settings.requests_per_minute is not None:
        raise ConfigError("alpaca_eval cannot limit requests per minute; leave requests_per_minute out")
    key = settings.find_key()
    with _package(), _key_in_place(key):
        from alpaca_eval.annotators import PairwiseAnnotator
        from openai import OpenAIError

        kept = folder / "annotations.json"
        annotator = PairwiseAnnotator(
            annotators_config=_write_configuration(folder, settings),
            caching_path=kept,
            # What is missing is asked again by a later run; the package only allows that where annotations are there.
            is_store_missing_annotations=not kept.exists(),
        )
        pairs = [
            {"instruction": o.instruction, "output_1": o.reference, "output_2": o.output, "index": o.index}
            for o in outputs
        ]
        try:
            rows = annotator.annotate_pairs(pairs)
        except OpenAIError as error:
            said = str(error) if key is None else str(error).replace(key, "***")
            raise ConfigError(f"{settings.base_url} does not annotate: {said}") from None  # its text may have the key
    found = {(row["instruction"], row["output_1"], row["output_2"]): row["preference"] for row in rows}
    return [
        _annotation(o.index, o.output, o.reference, found.get((o.instruction, o.reference, o.output))) for o in outputs
    ]


def read_annotations(path: Path) -> list[Annotation]:
    """The annotations in a JSON file of the package (annotations.json), one for each instruction, in its order.

    Raises:
        DataError: the file cannot be read, or is no list of annotations.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            _annotation(row.get("index", place), row["output_2"], row["output_1"], row["preference"])
            for place, row in enumerate(rows)
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"cannot read the annotations in {path}: {error}; expected a list of objects with output_1, output_2 and "
            "preference, as alpaca_eval writes it"
        ) from error


def win_rates(annotations: Sequence[Annotation]) -> AlpacaWinRates:
    """The raw win rate, and what it would be if answers were as long as the reference's, by AlpacaEval 2's own fit.

    Raises:
        DataError: there are too few annotations to fit, or the data of length control (df_gamed.csv, from the hub) is
            not to be had.
        MissingExtraError: the package is not installed.
    """
    known = sum(annotation.preference is not None for annotation in annotations)
    if known < 10:
        raise DataError(f"{known} annotations have a preference; length control needs at least 10")
    rows = [
        {
            "index": annotation.index,
            "output_1": annotation.reference,
            "output_2": annotation.output,
            "generator_1": "reference",
            "generator_2": "model",
            "annotator": ANNOTATOR,
            "preference": annotation.preference,
        }
        for annotation in annotations
    ]
    with _package():
        from alpaca_eval.metrics import get_length_controlled_winrate
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = get_length_controlled_winrate(rows, save_weights_dir=None)
        except (OSError, HfHubHTTPError) as error:
            raise DataError(
                f"length control needs df_gamed.csv of the hub data set {_HUB_DATA}, which is neither in the local "
                f"cache nor within reach; run: hf download --repo-type dataset {_HUB_DATA} df_gamed.csv"
            ) from error
    return AlpacaWinRates(
        raw=float(found["win_rate"]),
        raw_error=float(found["standard_error"]),
        controlled=float(found["length_controlled_winrate"]),
        controlled_error=float(found["lc_standard_error"]),
        n=int(found["n_total"]),
        missing=len(annotations) - known,
    )


def _annotation(index: int, output: str, reference: str, preference: float | None) -> Annotation:
    known = preference is not None and 0 <= preference <= 2  # not NaN; 0 is the package's old word for a tie
    return Annotation(
        index=index, output=output, reference=reference, preference=float(preference or 1.5) if known else None
    )


def _write_configuration(folder: Path, settings: ClientSettings) -> Path:
    """The package's annotator with another model and endpoint; annotations go by its name, which has the model."""
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
    from alpaca_eval.utils import load_configs

    annotator: dict[str, Any] = load_configs(ANNOTATOR, relative_to=EVALUATORS_CONFIG_DIR)[ANNOTATOR]
    client = folder / "client.json"
    annotator["prompt_template"] = str(EVALUATORS_CONFIG_DIR / annotator["prompt_template"])
    annotator["completions_kwargs"] |= {
        "model_name": settings.model,
        "client_config_path": str(client),
        "num_procs": settings.concurrency,
        "requires_chatml": True,
        "price_per_token": 0,  # it knows the prices of some models only
    }
    endpoint = {"base_url": settings.base_url, "timeout": settings.timeout, "max_retries": settings.retries}
    # JSON, which every reader of YAML takes.
    write_text(client, json.dumps({"default": [endpoint]}))
    write_text(folder / "annotator" / "configs.yaml", json.dumps({f"{ANNOTATOR} by {settings.model}": annotator}))
    return (folder / "annotator").resolve()


@contextmanager
def _package() -> Iterator[None]:
    """The package loaded, without its warnings and its logging, which it switches on for the whole process."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import alpaca_eval  # noqa: F401
            except ModuleNotFoundError as error:
                raise MissingExtraError(str(error.name), "alpaca") from error
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)


@contextmanager
def _key_in_place(key: str | None) -> Iterator[None]:
    """The key in the variable where the package's client looks for it, while the block runs."""
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = key or "none"  # the client insists on one, even where the endpoint needs none
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY_VARIABLE]
        else:
            os.environ[KEY_VARIABLE] = before


class AlpacaEval(Comparer):
    """Asks what AlpacaEval 2 asks."""

    def model(self, judge: JudgeSpec) -> str | None:
        """The judge's source."""
        return judge.source

    def asked(self, judge: JudgeSpec) -> tuple[str, int]:
        """About as much as our protocol for pairs, and one token."""
        return "pairwise", 1

    def compare(
        self, judge: JudgeSpec, pairs: Sequence[Pair], where: Path, name: str, on_reply: Callable[[], None]
    ) -> Compared:
        """Annotations are kept in a folder of these pairs."""
        numbers = [_number(pair) for pair in pairs]
        known = None not in numbers
        outputs = [
            Output(index=number, instruction=as_text(pair.prompt), output=pair.first, reference=pair.second)
            for pair, number in zip(pairs, (i if n is None else n for i, n in enumerate(numbers)), strict=True)
        ]
        annotations = annotate(outputs, where / name, self.endpoint(judge)[0])
        outcomes = [_outcome(annotation.preference) for annotation in annotations]
        for _ in pairs:
            on_reply()
        return Compared(
            outcomes=outcomes,
            rows=[
                {"index": i, "outcome": outcome, "preference": annotation.preference}
                for i, (annotation, outcome) in enumerate(zip(annotations, outcomes, strict=True))
            ],
            note=_rates(annotations) if known else f"no length control: {_NOT_ITS_OWN}",
        )


def _number(pair: Pair) -> int | None:
    """Which of AlpacaEval's instructions it is, by its place in their data; None where the row is none of theirs."""
    its_own = {"instruction", "dataset"} <= pair.row.keys() and pair.number is not None and pair.number < _INSTRUCTIONS
    return pair.number if its_own else None


def _outcome(preference: float | None) -> Outcome | None:
    if preference is None:
        return None
    return "tie" if preference == 1.5 else "win" if preference > 1.5 else "lose"


def _rates(annotations: Sequence[Annotation]) -> str:
    try:
        rates = win_rates(annotations)
    except DataError as error:  # the verdicts are there all the same
        return f"no length control: {error}"
    return (
        f"raw win rate {rates.raw:.1f}% (standard error {rates.raw_error:.1f}), length-controlled "
        f"{rates.controlled:.1f}% ({rates.controlled_error:.1f}), n={rates.n}, {rates.missing} missing"
    )


KIND = Kind(
    name="alpaca-eval",
    about="compares two replies as AlpacaEval 2 does, with length control (extra `alpaca`)",
    comparer=AlpacaEval(),
)
