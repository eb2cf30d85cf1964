"""Models that score pairs: found by their files, loaded one after the other.

What a folder or hub id holds is told from its files: a LoRA adapter (an ARM), a guided folder (each of its rewards, and
the policy that they make of its base), a model for sequence classification (a trajectory reward), or another model (a
causal LM, read as an ARM).

Shapes: B sequences, T positions, R rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch

from genarm.data.tokens import TokenPair
from genarm.errors import ConfigError, MemberError, UnsupportedError, VocabularyError
from genarm.lab.trajectory import TrajectoryReward, is_classifier
from genarm.model.adapter_files import host_of, read_adapter_config
from genarm.model.assembly import local_folder
from genarm.model.compose import start_spec
from genarm.model.config import THE_BASE, GuidedConfig, MemberSpec, RewardSpec
from genarm.model.contract import ADAPTER_FILE
from genarm.model.loading import HubOptions, add_adapters, load_model, load_tokenizer, locate
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.references import ModelFiles, find_device, open_files, positions_together
from genarm.model.trained import training_of
from genarm.model.vocabulary import align, embedding_rows, read_vocabulary
from genarm.model.weights import resolve_max_kl
from genarm.text.prompts import end_ids
from genarm.training.collator import collate
from genarm.training.reader import Batch, ModelReader, sample
from genarm.training.responses import summed, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Ids: TypeAlias = Sequence[int]
Kind: TypeAlias = Literal["arm", "tuned", "wish", "implicit", "trajectory", "policy"]

GUIDED = "guided"
"""The column of a guided model's own log-probs, beside those of its members."""
_ENTRIES = 1 << 28
"""Log-probs of whole distributions that a guided model holds at once: 1 GiB."""


Part: TypeAlias = tuple[Sequence[int], Mapping[str, Sequence[float]]]
"""Numbers of responses, of N pairs first the chosen ones, 0 … N − 1, then the rejected ones; and {column: scores}."""


class Reward(Protocol):
    """Scores responses."""

    def score(
        self, pairs: Sequence[TokenPair], contexts: Sequence[Mapping[str, Ids]], batch_size: int
    ) -> Iterator[Part]:
        """The score of every response, end-of-turn tokens as they are, a forward after another.

        Args:
            pairs: token ids.
            contexts: of each pair, {wish: the token ids of its prompt as that wish reads it}.
            batch_size: responses of one forward; a pair has two.

        Raises:
            MemberError: the model cannot score pairs at all.
        """
        ...

    def check(self, read: Collection[int], scored: Collection[int]) -> None:
        """Refuse ids that cannot be `read`, or not be `scored` (raises VocabularyError)."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardFiles:
    """A reward as its files describe it; its one column is called as it is.

    Attributes:
        name: for tables: the folder's name.
        kind: an ARM, scored by log π(y|x), one that is a difference to its start ("tuned"), or a trajectory reward.
        reference: as the caller named it.
        spec: the model, and the adapter on it.
        files: of the model.
        tokenizer: what pairs are encoded with.
        start: of a difference, the model that is taken away from it.
    """

    name: str
    kind: Kind
    reference: str
    spec: MemberSpec
    files: ModelFiles
    tokenizer: PreTrainedTokenizerBase
    start: RewardFiles | None = None

    @property
    def columns(self) -> dict[str, MemberSpec]:
        """Which model each column is of."""
        return {self.name: self.spec}

    @property
    def wishes(self) -> dict[str, str]:
        """None."""
        return {}

    @cached_property
    def ends(self) -> Sequence[int]:
        """The ids that end a response."""
        return end_ids(self.files.generation_config, self.tokenizer)

    @property
    def context(self) -> int | None:
        """The most tokens that a prompt and its response may have together, where the model says."""
        return positions_together(self.files.config)

    def load(self, *, dtype: str, device: str | None) -> Reward:
        """The reward itself (raises MemberError where it cannot be loaded, ConfigError where there is no device)."""
        if self.kind == "trajectory":
            assert self.spec.model is not None
            where = find_device(device)
            return HeadReward(
                name=self.name,
                model=TrajectoryReward.load(self.spec.model, name=self.name, dtype=dtype, device=where),
            )
        options = {"dtype": dtype, "device_map": find_device(device)}
        model = load_model(self.spec, None, self.files.hub, options, name=self.name)
        if self.spec.adapter is not None:
            add_adapters(model, {self.name: self.spec}, None, self.files.hub)
        return LogProbReward(name=self.name, model=model)


@dataclass(frozen=True, kw_only=True)
class GuidedFiles:
    """A guided model as its files describe it: a folder, or a base and a reward that no folder puts together.

    Its columns are its members, by their names, and `GUIDED`.

    Attributes:
        name: for tables.
        reference: as the caller named it.
        files: of the folder, or of the base.
        config: names the members.
        weights: of each reward, by the name that tables have it by, in the order of the configuration.
        max_kl: the most nats per token from the base, if there is a bound.
    """

    name: str
    reference: str
    files: ModelFiles
    config: GuidedConfig
    weights: Mapping[str, float]
    max_kl: float | None = None

    @property
    def columns(self) -> dict[str, MemberSpec]:
        """Which model each column is of, where one model alone says it; wishes read other prompts."""
        own = self.files.without or self.files  # wishes may have been added to a model that is no folder of ours
        folder = local_folder(own.reference, own.revision, own.hub) if own.guided else None

        def whole(spec: MemberSpec) -> MemberSpec:
            host = spec if spec.model else self.config.base_spec
            model, adapter = (place and locate(place, folder) for place in (host.model, spec.adapter))
            return replace(host, model=model, adapter=adapter, adapter_revision=spec.adapter_revision)

        return {name: whole(spec) for name, spec in self.config.member_specs.items() if spec.wish is None}

    @property
    def rewards(self) -> Iterator[tuple[str, str, Kind, str | None]]:
        """Of each reward: its name in tables, its column, its kind, and the column that is taken away from it."""
        members = [*self.config.member_specs]
        for spec, against in zip(self.config.reward_specs, self.config.references, strict=True):
            kind: Kind = "wish" if spec.member.wish else "arm" if against is None else "tuned"
            yield f"{self.name}:{spec.name}", spec.name, kind, None if against is None else members[against]

    @property
    def wishes(self) -> dict[str, str]:
        """{reward: system text}."""
        return self.config.wishes

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What pairs are encoded with: all members read the tokens and the chat template of the base."""
        return self.files.tokenizer

    @property
    def ends(self) -> Sequence[int]:
        """The ids that end a response."""
        return self.files.end_ids

    @property
    def context(self) -> int | None:
        """The most tokens that a prompt and its response may have together, where the members say."""
        return getattr(self.config, "max_position_embeddings", None)

    def load(self, *, dtype: str, device: str | None) -> Reward:
        """The model with all of its members (raises what `ModelFiles.load` raises)."""
        if self.files.guided:
            model = self.files.load(dtype=dtype, device=device)
        else:
            local = Path(self.files.reference)
            model = GuidedForCausalLM.from_pretrained(
                local if local.is_dir() else Path(),
                config=self.config,
                trust_remote_code=self.files.hub.trust_remote_code,
                dtype=dtype,
                device_map=find_device(device),
            )
        assert isinstance(model, GuidedForCausalLM)
        return GuidedReward(name=self.name, model=model, weights=[*self.weights.values()], max_kl=self.max_kl)


@dataclass(frozen=True, kw_only=True)
class LogProbReward:
    """A causal LM read as a reward: r(x, y) = Σ_t log π(y_t | x, y_<t), in float32 (GenARM, arXiv 2410.08193).

    Pairs are read as in training: packed, each prompt once, where the model can be read so.
    """

    name: str
    model: PreTrainedModel

    def score(
        self, pairs: Sequence[TokenPair], contexts: Sequence[Mapping[str, Ids]], batch_size: int
    ) -> Iterator[Part]:
        """As `Reward.score`."""
        reader = ModelReader(self.model)
        try:
            notes = reader.check(self.model, self._batch(sample(pairs)))
        except MemberError as error:
            raise MemberError(f"{self.name} cannot score pairs: {error}") from error
        for note in notes:
            logger.warning("%s: %s", self.name, note)
        order = sorted(range(len(pairs)), key=lambda i: pairs[i].width, reverse=True)
        for part in _parts(order, max(1, batch_size // 2)):
            with torch.no_grad():
                states = reader.states(self.model, self._batch([pairs[i] for i in part]))
                scores_S = summed(token_log_probs(states), states)
            yield [*part, *(len(pairs) + i for i in part)], {self.name: scores_S.tolist()}

    def _batch(self, pairs: Sequence[TokenPair]) -> Batch:
        where = self.model.device
        return {key: part.to(where) if torch.is_tensor(part) else part for key, part in collate(pairs).items()}

    def check(self, read: Collection[int], scored: Collection[int]) -> None:
        """As `Reward.check`."""
        _check_rows(self.name, embedding_rows(self.model), read)


@dataclass(frozen=True, kw_only=True)
class HeadReward:
    """A trajectory reward."""

    name: str
    model: TrajectoryReward

    def score(
        self, pairs: Sequence[TokenPair], contexts: Sequence[Mapping[str, Ids]], batch_size: int
    ) -> Iterator[Part]:
        """As `Reward.score`."""
        prompts, replies = responses(pairs)
        for part in _parts(_longest_first(prompts, replies), batch_size):
            scores = self.model.score([prompts[i] for i in part], [replies[i] for i in part])
            yield part, {self.name: [*scores]}

    def check(self, read: Collection[int], scored: Collection[int]) -> None:
        """As `Reward.check`."""
        _check_rows(self.name, self.model.rows, read)


@dataclass(frozen=True, kw_only=True)
class GuidedReward:
    """Every member of a guided model, and the guided policy: Σ_t log π(y_t | x, y_<t) of each, in one forward of each.

    `weights` are of all rewards in order, `max_kl` the most nats per token from the base.
    """

    name: str
    model: GuidedForCausalLM
    weights: Sequence[float]
    max_kl: float | None

    def score(
        self, pairs: Sequence[TokenPair], contexts: Sequence[Mapping[str, Ids]], batch_size: int
    ) -> Iterator[Part]:
        """As `Reward.score`; as many at once as memory for their distributions allows."""
        prompts, replies = responses(pairs)
        self._check_lengths(pairs, contexts)
        for part in _parts(_longest_first(prompts, replies), batch_size):
            each = (max(len(replies[i]) for i in part) + 1) * self.model.config.vocab_size * len(self.model.members)  # type: ignore[operator]
            for few in _parts(part, max(1, _ENTRIES // each)):
                with torch.inference_mode():
                    said = self.model.said_of(
                        [prompts[i] for i in few],
                        [replies[i] for i in few],
                        [contexts[i % len(pairs)] for i in few],
                        torch.tensor([self.weights] * len(few), dtype=torch.float32).reshape(len(few), -1),
                        resolve_max_kl(self.max_kl, len(few)),
                    )
                    sums = {column: of_BT.double().sum(dim=1).tolist() for column, of_BT in said.items()}
                yield few, sums

    def check(self, read: Collection[int], scored: Collection[int]) -> None:
        """As `Reward.check`; of a prompt's ids a reward need not know all."""
        _check_rows(self.name, embedding_rows(self.model.base), read)
        for member, alignment in zip(self.model.members[1:], self.model.alignments, strict=True):
            if strange := {*scored}.intersection(alignment.unknown):
                raise VocabularyError(
                    f"responses of the pairs have the token id {min(strange)}, which the reward {member.name!r} of "
                    f"{self.name} does not know, so that the guided model never produces it; take such responses out"
                )

    def _check_lengths(self, pairs: Sequence[TokenPair], contexts: Sequence[Mapping[str, Ids]]) -> None:
        wished = [max(map(len, context.values()), default=0) for context in contexts]
        longest = max(
            pair.width + max(0, more - len(pair.prompt_ids)) for pair, more in zip(pairs, wished, strict=True)
        )
        for member in self.model.members:
            most = positions_together(member.model.config)
            if most is not None and longest > most:
                raise ConfigError(
                    f"a prompt and its response have up to {longest} tokens, and {member.name!r} of {self.name} has "
                    f"{most} positions for texts read together; lower --max-prompt-tokens or --max-response-tokens"
                )


def responses(pairs: Sequence[TokenPair]) -> tuple[Sequence[Ids], Sequence[Ids]]:
    """(prompts, responses), numbered as in a `Part`."""
    replies = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return [pair.prompt_ids for pair in pairs] * 2, replies


def _longest_first(prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[int]:
    """So that sequences of about one length go together, and the first forward needs the most memory."""
    return sorted(range(len(replies)), key=lambda i: len(prompts[i]) + len(replies[i]), reverse=True)


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _check_rows(name: str, rows: int, ids: Collection[int]) -> None:
    if max(ids) >= rows:
        raise VocabularyError(
            f"the pairs have the token id {max(ids)}, and {name} knows {rows} ids only; use the tokenizer that the "
            "model was trained with"
        )


def open_rewards(reference: str, *, trust_remote_code: bool) -> RewardFiles | GuidedFiles:
    """What scores at `reference`: one reward, or a guided folder.

    Raises:
        MemberError: there is no such model, it lacks a tokenizer, or an adapter's model is not there.
        UnsupportedError: a revision of a trajectory reward.
    """
    hub = HubOptions(trust_remote_code=trust_remote_code)
    if (Path(reference).expanduser() / ADAPTER_FILE).is_file():
        return _open_adapter(reference, hub)
    files = open_files(reference, trust_remote_code=trust_remote_code)
    if isinstance(files.config, GuidedConfig):
        return guided_files(reference, files)
    classifier = is_classifier(files.config)
    spec = MemberSpec(model=files.reference, revision=files.revision)
    if classifier and files.revision is not None:
        raise UnsupportedError(f"{reference} is a trajectory reward; of these only the main revision can be loaded")
    kind: Kind = "trajectory" if classifier else "arm"
    found = RewardFiles(
        name=_name(reference), kind=kind, reference=reference, spec=spec, files=files, tokenizer=files.tokenizer
    )
    return found if classifier else _as_trained(found)


def guided_files(reference: str, files: ModelFiles) -> GuidedFiles:
    """A guided folder, or another model that was given wishes, at its default weights."""
    config = files.config
    assert isinstance(config, GuidedConfig)
    return GuidedFiles(
        name=_name(reference), reference=reference, files=files, config=config, weights=config.default_weights
    )


def guided_by(base: RewardFiles, arm: RewardFiles) -> GuidedFiles | None:
    """`base` guided by `arm` at weight 1, which reads pairs as the base does; None for a base that is an adapter."""
    if base.spec.adapter is not None:
        return None
    on_base = (arm.spec.model, arm.spec.revision) == (base.spec.model, base.spec.revision)
    member = replace(arm.spec, model=None, revision=None) if on_base else arm.spec
    against = None if arm.start is None else THE_BASE if arm.start.spec == base.spec else arm.start.spec
    reward = RewardSpec(name="reward", member=member, reference=against)
    return GuidedFiles(
        name=f"{base.name} guided by {arm.name}",
        reference=arm.reference,
        files=base.files,
        config=GuidedConfig.of(base.spec, [reward], [base.files.config, arm.files.config]),
        weights={arm.name: 1.0},
    )


def check_same_tokens(base: RewardFiles, policy: RewardFiles | GuidedFiles) -> None:
    """Refuse a base that does not read the policy's tokens (raises VocabularyError)."""
    vocabularies = [
        read_vocabulary(files.tokenizer, size=len(files.tokenizer), label=f"{files.name} ({files.reference})")
        for files in (policy, base)
    ]
    align(*vocabularies)


def _open_adapter(reference: str, hub: HubOptions) -> RewardFiles:
    where = str(Path(reference).expanduser().resolve())
    name = _name(reference)
    host = host_of(read_adapter_config(where, hub.common(), name=name))
    if host is None:
        raise MemberError(f"the adapter {reference} does not say which model it goes on; write it into {ADAPTER_FILE}")
    try:
        files = open_files(host, trust_remote_code=hub.trust_remote_code)
    except MemberError as error:
        raise MemberError(
            f"the adapter {reference} goes on {host}, which cannot be opened: {error}; correct "
            f"base_model_name_or_path and revision in its {ADAPTER_FILE}"
        ) from error
    spec = MemberSpec(model=files.reference, revision=files.revision, adapter=where)
    # The adapter's own files come first: they have the chat template that it was trained with.
    tokenizer = load_tokenizer(where, None, hub) or files.tokenizer
    return _as_trained(
        RewardFiles(name=name, kind="arm", reference=reference, spec=spec, files=files, tokenizer=tokenizer)
    )


def _as_trained(arm: RewardFiles) -> RewardFiles:
    """An ARM, or the difference to its start that `genarm train` made of it (raises MemberError: no such start)."""
    hub = arm.files.hub
    trained = training_of(arm.spec, hub)
    if trained.get("start") != "zero":
        return arm
    spec = start_spec(arm.name, arm.spec, trained, MemberSpec(), hub)
    where = spec.model_reference
    assert where is not None
    files = open_files(where, trust_remote_code=hub.trust_remote_code)
    start = RewardFiles(
        name=f"the start of {arm.name}", kind="arm", reference=where, spec=spec, files=files, tokenizer=arm.tokenizer
    )
    return replace(arm, kind="tuned", start=start)


def _name(reference: str) -> str:
    return Path(reference).resolve().name if Path(reference).is_dir() else reference
