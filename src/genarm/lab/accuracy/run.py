"""`measure`: open every model, then load one after the other, score its pairs and draw up its figures.

A guided model scores by all of its members in one pass, so what it and another row both need of a model on the same
pairs is done once: the rows say what they want (`_Row`), and passes (`Pass`) are what gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from genarm.data.tokens import TokenReport, example_lines
from genarm.errors import ConfigError, MemberError
from genarm.lab.accuracy.figures import Difference, Figures, Floats, Scores, difference, figures
from genarm.lab.accuracy.models import (
    GUIDED,
    GuidedFiles,
    Kind,
    Reward,
    RewardFiles,
    check_same_tokens,
    guided_by,
    open_rewards,
    responses,
)
from genarm.lab.accuracy.pairs import EncodedPairs, Limits, PairData, encode, limits, read_pairs
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.model.config import BASE, MemberSpec
from genarm.model.weights import parse_weights, weight_row
from genarm.provenance import AT, Record, content_of, model_record
from genarm.terminal import Bar


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One reward, or one guided policy, on the pairs.

    Attributes:
        name, reference: for tables, and as the caller named it.
        kind: how responses are scored: log π(y|x); of a tuned reward or a wish, less that of its reference; of an
            implicit one, less that of the base that was named; of a policy, log π_guided(y|x) − log π_base(y|x); or by
            a trajectory reward.
        scores: of every pair that was kept.
        figures, per_token: from the scores, and from the scores divided by the responses' lengths, which a trajectory
            reward has none of.
        report, limit: what was dropped and cut.
        weights, max_kl: of a policy.
    """

    name: str
    reference: str
    kind: Kind
    scores: Scores
    figures: Figures
    per_token: Figures | None
    report: TokenReport
    limit: Limits
    weights: Mapping[str, float] | None = None
    max_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class AccuracyResult:
    """Every reward, in the order of the settings, and how the others differ from the first.

    `rows` is the number of rows of the data, `categories` the category of each, `record` what decides the scores.
    """

    settings: AccuracySettings
    format: str
    rows: int
    categories: tuple[str, ...] | None
    measured: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    record: Record


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A model that has not been loaded, and the pairs that it scores."""

    files: RewardFiles | GuidedFiles
    limit: Limits
    encoded: EncodedPairs

    def has(self, spec: MemberSpec, encoded: EncodedPairs) -> str | None:
        """The column in which a model is on these pairs, if there is one."""
        if (self.encoded.rows, self.encoded.pairs) != (encoded.rows, encoded.pairs):
            return None
        return next((column for column, other in self.files.columns.items() if other == spec), None)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of the result: the column of a pass, less another one, if one is named."""

    name: str
    kind: Kind
    shown: Pass
    column: tuple[Pass, str]
    less: tuple[Pass, str] | None = None


Advance: TypeAlias = Callable[[str, int], None]
"""Called with the name of a model and the number of responses that it has scored."""


def measure(settings: AccuracySettings, console: Console) -> AccuracyResult:
    """Score the pairs of `settings` with each of its models; `console` shows the progress where it is a terminal.

    Raises:
        GenarmError: any mistake in the data, the models or the lengths, before the first model is loaded where it can
            be seen then.
    """
    data = read_pairs(settings)
    opened = _open(settings)
    passes, rows = _planned(settings, data, opened)
    for files in opened.models:
        if isinstance(files, RewardFiles) and files.start is not None:
            line = f"{files.name} is a difference to the model that it was trained from, {files.start.reference}"
            console.print(line, markup=False, soft_wrap=True)
    for line in reading(data, rows[0].shown):
        console.print(line, markup=False, soft_wrap=True)
    with progress(console, passes) as advance:
        found = {of: score_pairs(of, settings, advance) for of in passes}
    measured = [_measured(row, found, data) for row in rows]
    return AccuracyResult(
        settings=settings,
        format=data.format.description,
        rows=len(data.rows),
        categories=data.categories,
        measured=tuple(measured),
        differences=_differences(measured),
        record=_record(settings, data),
    )


def reading(data: PairData, first: Pass) -> Iterator[str]:
    """How the data is read, and its first pair as the first model reads it."""
    template = "with" if first.files.tokenizer.chat_template and not data.raw else "without"
    yield f"the data is {data.format.description}, read {template} the chat template"
    if data.unread:
        yield f"columns not read: {', '.join(data.unread)}"
    yield f"the first pair, as {first.files.name} reads it:"
    yield from example_lines(first.files.tokenizer, first.encoded.pairs[0])


def _record(settings: AccuracySettings, data: PairData) -> Record:
    """The content of the data and the models."""
    models = {name: model_record(name) for name in settings.models}
    base = {} if settings.base is None else {"base": model_record(settings.base)}
    return {"data": {AT: settings.data, "rows": content_of(map(dict, data.rows))}, **models, **base}


# --- opening ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What the settings name.

    Attributes:
        models: in their order.
        base: the reference of implicit rewards, if there is one.
        products: the base guided by each ARM.
    """

    models: Sequence[RewardFiles | GuidedFiles]
    base: RewardFiles | None
    products: Sequence[GuidedFiles]


def _open(settings: AccuracySettings) -> _Opened:
    """All models, by their full reference where two would have one name, and policies at their weights."""
    models = [open_rewards(model, trust_remote_code=settings.trust_remote_code) for model in settings.models]
    names = Counter(files.name for files in models)
    models = [replace(files, name=files.reference) if names[files.name] > 1 else files for files in models]
    base = None if settings.base is None else _open_base(settings, settings.base, models)
    arms = [files for files in models if isinstance(files, RewardFiles) and base and _beside(files, base)]
    products = [product for arm in arms if base and (product := guided_by(base, arm))]
    weigh = _weigher(settings, [*(files for files in models if isinstance(files, GuidedFiles)), *products])
    return _Opened(
        models=[weigh(files) if isinstance(files, GuidedFiles) else files for files in models],
        base=base,
        products=[*map(weigh, products)],
    )


def _weigher(settings: AccuracySettings, policies: Sequence[GuidedFiles]) -> Callable[[GuidedFiles], GuidedFiles]:
    """What puts a policy at the weights and the budget of the settings.

    Raises:
        WeightsError: a weight that cannot be read or of no policy's reward.
        ConfigError: there is no policy.
    """
    if not policies and (settings.weights is not None or settings.max_kl is not None):
        option = "--max-kl" if settings.weights is None else "--weights"
        raise ConfigError(f"{option} is for guided policies; give a guided folder, or an ARM with its --base")
    given = {} if settings.weights is None else parse_weights(settings.weights)
    weight_row(given, {name: weight for files in policies for name, weight in files.weights.items()})

    def weigh(files: GuidedFiles) -> GuidedFiles:
        own = {name: given.get(name, weight) for name, weight in files.weights.items()}
        return replace(files, weights=own, max_kl=settings.max_kl)

    return weigh


def _open_base(settings: AccuracySettings, reference: str, models: Sequence[RewardFiles | GuidedFiles]) -> RewardFiles:
    """The reference of implicit rewards, checked to read the tokens of every causal LM."""
    base = open_rewards(reference, trust_remote_code=settings.trust_remote_code)
    if not isinstance(base, RewardFiles) or base.kind != "arm":
        raise MemberError(f"--base {reference} must be one causal language model, whose log-probabilities are known")
    policies = [files for files in models if _beside(files, base)]
    if not policies:
        raise MemberError("--base is for causal language models, and none of the models is one beside it; leave it out")
    for policy in policies:
        check_same_tokens(base, policy)
    return base


def _beside(files: RewardFiles | GuidedFiles, base: RewardFiles) -> bool:
    """Whether `base` reads its pairs, too: for an implicit reward, which differences have none of, or to be guided."""
    if isinstance(files, GuidedFiles):
        return any(kind == "arm" for _, _, kind, _ in files.rewards)
    return files.kind != "trajectory" and files.spec != base.spec


# --- what is scored, and what is made of it -----------------------------------------------------------------------


def prepare(
    files: RewardFiles | GuidedFiles, data: PairData, settings: AccuracySettings, base: RewardFiles | None = None
) -> Pass:
    """The pairs of a model, which the base, if one is given, must be able to read too.

    Raises:
        DataError: nothing is left to score.
        ConfigError: lengths that do not fit, or template arguments that the chat template does not have.
    """
    contexts = [(of.context, of.name) for of in (files, base) if of is not None and of.context is not None]
    context, name = min(contexts, default=(None, files.name))
    limit = limits(settings, context, model=name)
    encoded = encode(files.tokenizer, data, limit, files.ends, settings.reading, files.wishes)
    return Pass(files=files, limit=limit, encoded=encoded)


def _planned(settings: AccuracySettings, data: PairData, opened: _Opened) -> tuple[list[Pass], list[_Row]]:
    """The passes, those of guided models first, and the rows: rewards, then implicit ones, then policies."""
    base = opened.base

    def prepared(files: RewardFiles | GuidedFiles) -> Pass:
        return prepare(files, data, settings, base if base and _beside(files, base) else None)

    own = [(files, prepared(files)) for files in opened.models]
    policies = [of for files, of in own if isinstance(files, GuidedFiles)] + [*map(prepared, opened.products)]
    passes = [*policies]

    def column(spec: MemberSpec, otherwise: Pass) -> tuple[Pass, str]:
        """Where a model's scores of some pairs come from: a pass that has them, or one more."""
        for of in passes:
            if (name := of.has(spec, otherwise.encoded)) is not None:
                return of, name
        passes.append(otherwise)
        return otherwise, otherwise.files.name

    rows: list[_Row] = []
    for files, of in own:
        if isinstance(files, RewardFiles):
            start = None if files.start is None else column(files.start.spec, replace(of, files=files.start))
            rows.append(_Row(name=files.name, kind=files.kind, shown=of, column=column(files.spec, of), less=start))
            continue
        for name, at, kind, less in files.rewards:
            against = None if less is None else (of, less)
            rows.append(_Row(name=name, kind=kind, shown=of, column=(of, at), less=against))
    for row in [*rows] if base else ():
        of, at = row.column
        if base and row.kind == "arm" and of.files.columns[at] != base.spec:
            of_base = column(base.spec, replace(row.shown, files=base))
            rows.append(replace(row, name=f"{row.name} − {base.name}", kind="implicit", less=of_base))
    rows += [_Row(name=of.files.name, kind="policy", shown=of, column=(of, GUIDED), less=(of, BASE)) for of in policies]
    return passes, rows


def _measured(row: _Row, found: Mapping[Pass, Mapping[str, Scores]], data: PairData) -> Measured:
    of, at = row.column
    scores = found[of][at]
    if row.less is not None:
        scores = scores.minus(found[row.less[0]][row.less[1]])
    policy = of.files if row.kind == "policy" and isinstance(of.files, GuidedFiles) else None
    return Measured(
        name=row.name,
        reference=row.shown.files.reference,
        kind=row.kind,
        scores=scores,
        figures=figures(scores, data.categories),
        per_token=None if row.kind == "trajectory" else figures(scores.per_token(), data.categories),
        report=row.shown.encoded.report,
        limit=row.shown.limit,
        weights=None if policy is None else policy.weights,
        max_kl=None if policy is None else policy.max_kl,
    )


# --- scoring ------------------------------------------------------------------------------------------------------


def score_pairs(of: Pass, settings: AccuracySettings, advance: Advance) -> dict[str, Scores]:
    """The scores of each of a model's columns; the model is let go before the next one is loaded."""
    reward = of.files.load(dtype=settings.dtype, device=settings.device)
    return score_with(reward, of, settings.batch_size, advance)


def score_with(reward: Reward, of: Pass, batch_size: int, advance: Advance) -> dict[str, Scores]:
    """As `score_pairs`, of a model that is there.

    Raises:
        VocabularyError: the pairs have ids that the model does not know.
        MemberError: scores that are no finite numbers, or a model that cannot score pairs.
    """
    name, pairs = of.files.name, of.encoded.pairs
    _, replies = responses(pairs)
    scored = {i for ids in replies for i in ids}
    reward.check(scored.union(*(pair.prompt_ids for pair in pairs)), scored)
    found: dict[str, Floats] = {}
    for part, said in reward.score(pairs, of.encoded.contexts, batch_size):
        for at, values in said.items():
            if not np.isfinite(values).all():
                raise MemberError(
                    f"{_column_name(of, at)} gives scores that are no finite numbers: its weights are broken, or too "
                    "large for its dtype (try --dtype float32)"
                )
            found.setdefault(at, np.zeros(len(replies)))[[*part]] = values
        advance(name, len(part))
    lengths_2B = np.array([len(reply) for reply in replies]).reshape(2, -1)
    return {
        at: Scores(
            rows=np.array(of.encoded.rows),
            chosen_B=values[: len(pairs)],
            rejected_B=values[len(pairs) :],
            chosen_length_B=lengths_2B[0],
            rejected_length_B=lengths_2B[1],
        )
        for at, values in found.items()
    }


def _column_name(of: Pass, column: str) -> str:
    return of.files.name if column in (of.files.name, GUIDED) else f"{of.files.name}:{column}"


def _differences(measured: Sequence[Measured]) -> tuple[Difference, ...]:
    first, *others = measured
    found = [difference((first.name, first.scores), (other.name, other.scores)) for other in others]
    return tuple(of for of in found if of is not None)


@contextmanager
def progress(console: Console, passes: Sequence[Pass]) -> Iterator[Advance]:
    """A bar over the responses that all models together have to score."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("loading", total=sum(2 * len(of.encoded.pairs) for of in passes))
        yield lambda name, count: bar.update(task, description=f"scoring with {name}", advance=count)
