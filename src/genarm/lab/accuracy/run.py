"""`measure`: open every model, then load one after the other, score its pairs and draw up its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from genarm.data.tokens import TokenReport, example_lines
from genarm.errors import MemberError, VocabularyError
from genarm.lab.accuracy.figures import Difference, Figures, Scores, difference, figures
from genarm.lab.accuracy.models import Ids, Reward, RewardFiles, check_same_tokens, full_name, open_rewards
from genarm.lab.accuracy.pairs import EncodedPairs, Limits, PairData, encode, limits, read_pairs
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.provenance import AT, Record, content_of, model_record
from genarm.terminal import Bar

Kind: TypeAlias = Literal["arm", "implicit", "trajectory"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One reward on the pairs.

    Attributes:
        name, reference: for tables, and as the caller named it.
        kind: how responses are scored: log π(y|x), log π(y|x) − log π_base(y|x), or by a trajectory reward.
        scores: of every pair that was kept.
        figures, per_token: from the scores, and from the scores divided by the responses' lengths, which a trajectory
            reward has none of.
        report, limit: what was dropped and cut.
    """

    name: str
    reference: str
    kind: Kind
    scores: Scores
    figures: Figures
    per_token: Figures | None
    report: TokenReport
    limit: Limits


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


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A reward that has not been loaded, and its pairs."""

    files: RewardFiles
    limit: Limits
    encoded: EncodedPairs


# Called with the name of a model and the number of responses that it has scored.
_Advance: TypeAlias = Callable[[str, int], None]


def measure(settings: AccuracySettings, console: Console) -> AccuracyResult:
    """Score the pairs of `settings` with each of its models; `console` shows the progress where it is a terminal.

    Raises:
        GenarmError: any mistake in the data, the models or the lengths, before the first model is loaded where it can
            be seen then.
    """
    data = read_pairs(settings)
    rewards = _open(settings)
    base = None if settings.base is None else _open_base(settings, settings.base, rewards)
    prepared = [_prepare(files, base, data, settings) for files in rewards]
    for line in _reading(data, prepared):
        console.print(line, markup=False, soft_wrap=True)
    with _progress(console, prepared, base) as advance:
        measured = [
            _measured(item, item.files.kind, _load_and_score(item, settings, advance), data) for item in prepared
        ]
        if base is not None:
            measured += _implicit(base, prepared, measured, data, settings, advance)
    return AccuracyResult(
        settings=settings,
        format=data.format.description,
        rows=len(data.rows),
        categories=data.categories,
        measured=tuple(measured),
        differences=_differences(measured),
        record=_record(settings, data),
    )


def _reading(data: PairData, prepared: Sequence[_Prepared]) -> Iterator[str]:
    """How the data is read, and its first pair as the first model reads it."""
    first = prepared[0]
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


def _open(settings: AccuracySettings) -> list[RewardFiles]:
    """All rewards, by their full reference where two would have one name."""
    found = [open_rewards(model, trust_remote_code=settings.trust_remote_code) for model in settings.models]
    names = Counter(files.name for rewards in found for files in rewards)
    return [
        replace(files, name=full_name(files)) if names[files.name] > 1 else files
        for rewards in found
        for files in rewards
    ]


def _prepare(files: RewardFiles, base: RewardFiles | None, data: PairData, settings: AccuracySettings) -> _Prepared:
    """The pairs of a reward, which the base must be able to read too."""
    readers = [files, base] if base and _is_policy(files, base) else [files]
    contexts = [(reader.context, reader.name) for reader in readers if reader.context is not None]
    context, name = min(contexts, default=(None, files.name))
    limit = limits(settings, context, model=name)
    return _Prepared(
        files=files, limit=limit, encoded=encode(files.tokenizer, data, limit, files.ends, settings.reading)
    )


def _open_base(settings: AccuracySettings, reference: str, rewards: Sequence[RewardFiles]) -> RewardFiles:
    """The reference of implicit rewards, checked to read the tokens of every causal LM."""
    base, *others = open_rewards(reference, trust_remote_code=settings.trust_remote_code)
    policies = [files for files in rewards if _is_policy(files, base)]
    if others or base.kind != "arm":
        raise MemberError(f"--base {reference} must be one causal language model, whose log-probabilities are known")
    if not policies:
        raise MemberError("--base is for causal language models, and none of the models is one beside it; leave it out")
    for policy in policies:
        check_same_tokens(base, policy)
    return base


def _is_policy(files: RewardFiles, base: RewardFiles) -> bool:
    """Whether it has an implicit reward over `base`; that of the base itself would be 0."""
    return files.kind == "arm" and (files.spec, files.folder) != (base.spec, base.folder)


def _left_to_base(prepared: Sequence[_Prepared], base: RewardFiles) -> list[EncodedPairs]:
    """What the base has to score for the causal LMs: pairs in the same tokens once, and none that it has as a model."""
    arms = [item for item in prepared if item.files.kind == "arm"]
    own = [item.encoded for item in arms if not _is_policy(item.files, base)]
    left: list[EncodedPairs] = []
    for item in arms:
        if not any(_same_pairs(item.encoded, known) for known in (*own, *left)):
            left.append(item.encoded)
    return left


def _same_pairs(first: EncodedPairs, second: EncodedPairs) -> bool:
    return (first.rows, first.pairs) == (second.rows, second.pairs)


def _implicit(
    base: RewardFiles,
    prepared: Sequence[_Prepared],
    measured: Sequence[Measured],
    data: PairData,
    settings: AccuracySettings,
    advance: _Advance,
) -> list[Measured]:
    """Every causal LM by log π(y|x) − log π_base(y|x), the reward that DPO trains."""
    known = [
        (item.encoded, own.scores)
        for item, own in zip(prepared, measured, strict=True)
        if item.files.kind == "arm" and not _is_policy(item.files, base)
    ]
    if left := _left_to_base(prepared, base):
        reward = base.load(dtype=settings.dtype, device=settings.device)
        known += [(pairs, _score(reward, base.name, pairs, settings.batch_size, advance)) for pairs in left]
    found = []
    for item, policy in zip(prepared, measured, strict=True):
        if _is_policy(item.files, base):
            of_base = next(scores for pairs, scores in known if _same_pairs(pairs, item.encoded))
            scores = policy.scores.minus(of_base)
            found.append(replace(_measured(item, "implicit", scores, data), name=f"{policy.name} − {base.name}"))
    return found


def _measured(item: _Prepared, kind: Kind, scores: Scores, data: PairData) -> Measured:
    return Measured(
        name=item.files.name,
        reference=item.files.reference,
        kind=kind,
        scores=scores,
        figures=figures(scores, data.categories),
        per_token=None if kind == "trajectory" else figures(scores.per_token(), data.categories),
        report=item.encoded.report,
        limit=item.limit,
    )


def _load_and_score(item: _Prepared, settings: AccuracySettings, advance: _Advance) -> Scores:
    """The model is let go before the next one is loaded."""
    reward = item.files.load(dtype=settings.dtype, device=settings.device)
    return _score(reward, item.files.name, item.encoded, settings.batch_size, advance)


def _score(reward: Reward, name: str, encoded: EncodedPairs, batch_size: int, advance: _Advance) -> Scores:
    """Scores of all pairs; sequences of about one length are scored together, the longest first."""
    prompts = [pair.prompt_ids for pair in encoded.pairs] * 2
    replies = [pair.chosen_ids for pair in encoded.pairs] + [pair.rejected_ids for pair in encoded.pairs]
    _check_tokens(reward, name, prompts, replies)
    order = sorted(range(len(replies)), key=lambda i: len(prompts[i]) + len(replies[i]), reverse=True)
    scores = np.zeros(len(replies))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        scores[part] = reward.score([prompts[i] for i in part], [replies[i] for i in part])
        if not np.isfinite(scores[part]).all():
            raise MemberError(
                f"{name} gives scores that are no finite numbers: its weights are broken, or too large for its dtype "
                "(try --dtype float32)"
            )
        advance(name, len(part))
    chosen_B, rejected_B = scores.reshape(2, -1)
    chosen_length_B, rejected_length_B = np.array([len(reply) for reply in replies]).reshape(2, -1)
    return Scores(
        rows=np.array(encoded.rows),
        chosen_B=chosen_B,
        rejected_B=rejected_B,
        chosen_length_B=chosen_length_B,
        rejected_length_B=rejected_length_B,
    )


def _check_tokens(reward: Reward, name: str, *sides: Sequence[Ids]) -> None:
    """Refuse ids that the embedding does not have (raises VocabularyError), which would fail without a name."""
    highest = max(max(ids) for side in sides for ids in side)
    if highest >= reward.rows:
        raise VocabularyError(
            f"the pairs have the token id {highest}, and {name} knows {reward.rows} ids only; use the tokenizer that "
            "the model was trained with"
        )


def _differences(measured: Sequence[Measured]) -> tuple[Difference, ...]:
    first, *others = measured
    found = [difference((first.name, first.scores), (other.name, other.scores)) for other in others]
    return tuple(of for of in found if of is not None)


@contextmanager
def _progress(console: Console, prepared: Sequence[_Prepared], base: RewardFiles | None) -> Iterator[_Advance]:
    """A bar over the responses that all models together have to score."""
    responses = [2 * len(item.encoded.pairs) for item in prepared]
    of_base = [2 * len(pairs.pairs) for pairs in _left_to_base(prepared, base)] if base else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as progress:
        task = progress.add_task("loading", total=sum(responses) + sum(of_base))
        yield lambda name, count: progress.update(task, description=f"scoring with {name}", advance=count)
