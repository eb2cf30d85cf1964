"""Rewards that score pairs: found by their files, loaded one after the other.

What a folder or hub id holds is told from its files: a LoRA adapter (an ARM), a guided folder (each of its rewards), a
model for sequence classification (a trajectory reward), or another model (a causal LM, read as an ARM).

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
from torch.nn.utils.rnn import pad_sequence

from genarm.errors import MemberError, UnsupportedError
from genarm.lab.training.trainers import sequence_log_probs
from genarm.lab.trajectory import TrajectoryReward
from genarm.model.adapter_files import read_adapter_config
from genarm.model.config import GuidedConfig, MemberSpec
from genarm.model.contract import ADAPTER_FILE
from genarm.model.loading import HubOptions, add_adapters, load_model, load_tokenizer
from genarm.model.references import ModelFiles, find_device, open_files
from genarm.model.vocabulary import align, read_vocabulary
from genarm.text.prompts import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids: TypeAlias = Sequence[int]
Kind: TypeAlias = Literal["arm", "trajectory"]

# What peft calls the adapter of a reward.


class Reward(Protocol):
    """Scores responses."""

    @property
    def rows(self) -> int:
        """How many ids its embedding knows."""
        ...

    def score(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[float]:
        """r(x, y) of each reply to its prompt, all in one batch; end-of-turn tokens count as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardFiles:
    """A reward as its files describe it.

    Attributes:
        name: for tables: the folder's name, with that of the reward where it is a guided folder's.
        kind: an ARM, scored by log π(y|x), or a trajectory reward.
        reference: as the caller named it.
        spec: the model, and the adapter on it; `folder` is where relative paths in it start.
        tokenizer: what pairs are encoded with.
        ends: the ids that end a response.
        context: the most tokens that a prompt and its response may have together, where the model says.
    """

    name: str
    kind: Kind
    reference: str
    spec: MemberSpec
    folder: Path | None
    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    context: int | None
    hub: HubOptions

    def load(self, *, dtype: str, device: str | None) -> Reward:
        """The reward itself (raises MemberError where it cannot be loaded, ConfigError where there is no device)."""
        if self.kind == "trajectory":
            assert self.spec.model is not None
            return TrajectoryReward.load(self.spec.model, name=self.name, dtype=dtype, device=find_device(device))
        options = {"dtype": dtype, "device_map": find_device(device)}
        model = load_model(self.spec, self.folder, self.hub, options, name=self.name)
        if self.spec.adapter is not None:
            add_adapters(model, {self.name: self.spec}, self.folder, self.hub)
        return LogProbReward(name=self.name, model=model)


@dataclass(frozen=True, kw_only=True)
class LogProbReward:
    """A causal LM read as a reward: r(x, y) = Σ_t log π(y_t | x, y_<t), in float32 (GenARM, arXiv 2410.08193)."""

    name: str
    model: PreTrainedModel

    @property
    def rows(self) -> int:
        """As `Reward.rows`."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    @torch.inference_mode()
    def score(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[float]:
        """As `Reward.score`."""
        ids = [torch.tensor([*prompt, *reply]) for prompt, reply in zip(prompts, replies, strict=True)]
        replied = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(ids, prompts, strict=True)]
        tensors = (ids, [torch.ones_like(row) for row in ids], [mask.long() for mask in replied])
        padded_BT = (pad_sequence(rows, batch_first=True).to(self.model.device) for rows in tensors)
        scores: list[float] = sequence_log_probs(self.model, *padded_BT).tolist()
        return scores


def open_rewards(reference: str, *, trust_remote_code: bool) -> list[RewardFiles]:
    """The rewards at `reference`: one, or those of a guided folder.

    Raises:
        MemberError: there is no such model, it lacks a tokenizer, or an adapter's model is not there.
        UnsupportedError: a guided model on the hub, or a revision of a trajectory reward.
    """
    hub = HubOptions(trust_remote_code=trust_remote_code)
    if (Path(reference).expanduser() / ADAPTER_FILE).is_file():
        return [_open_adapter(reference, hub)]
    files = open_files(reference, trust_remote_code=trust_remote_code)
    if isinstance(files.config, GuidedConfig):
        return _open_guided(reference, files, files.config)
    architectures = getattr(files.config, "architectures", None) or ()
    classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    spec = MemberSpec(model=files.reference, revision=files.revision)
    if classifier and files.revision is not None:
        raise UnsupportedError(f"{reference} is a trajectory reward; of these only the main revision can be loaded")
    return [_files(_name(reference), reference, spec, files, kind="trajectory" if classifier else "arm")]


def full_name(files: RewardFiles) -> str:
    """A name that no other reward has: the whole reference in place of its last part."""
    return files.reference + files.name[len(_name(files.reference)) :]


def check_same_tokens(base: RewardFiles, policy: RewardFiles) -> None:
    """Refuse a base that does not read the policy's tokens (raises VocabularyError)."""
    vocabularies = [
        read_vocabulary(files.tokenizer, size=len(files.tokenizer), label=f"{files.name} ({files.reference})")
        for files in (policy, base)
    ]
    align(*vocabularies)


def _open_adapter(reference: str, hub: HubOptions) -> RewardFiles:
    where = str(Path(reference).expanduser().resolve())
    name = _name(reference)
    host = read_adapter_config(where, hub.common(), name=name).base_model_name_or_path
    if host is None:
        raise MemberError(f"the adapter {reference} does not say which model it goes on; write it into {ADAPTER_FILE}")
    try:
        files = open_files(host, trust_remote_code=hub.trust_remote_code)
    except MemberError as error:
        raise MemberError(
            f"the adapter {reference} goes on {host}, which cannot be opened: {error}; correct "
            f"base_model_name_or_path in its {ADAPTER_FILE}"
        ) from error
    spec = MemberSpec(model=files.reference, revision=files.revision, adapter=where)
    # The adapter's own files come first: they have the chat template that it was trained with.
    return _files(name, reference, spec, files, tokenizer=load_tokenizer(where, None, hub))


def _open_guided(reference: str, files: ModelFiles, config: GuidedConfig) -> list[RewardFiles]:
    """The rewards as they guide: all of them read the tokens and the chat template of the base."""
    folder, base = Path(files.reference), config.base_spec
    if not folder.is_dir():
        raise UnsupportedError(
            f"{reference} is a guided model on the hub; download it (hf download) and give the folder"
        )
    found = []
    for reward in config.reward_specs:
        spec = reward.member
        if spec.wish is not None:
            raise UnsupportedError(
                f"reward {reward.name!r} of {reference} is a wish in words, which genarm accuracy does not score; give "
                "it the models of the other rewards themselves, or a guided folder without wishes"
            )
        if reward.reference is not None:
            raise UnsupportedError(
                f"reward {reward.name!r} of {reference} is a tuned model less its reference; give genarm accuracy the "
                "tuned model itself, and the reference as --base, which is taken away from it"
            )
        if spec.model is None:
            spec = replace(base, adapter=spec.adapter, adapter_revision=spec.adapter_revision)
        found.append(_files(f"{_name(reference)}:{reward.name}", reference, spec, files, folder=folder))
    return found


def _files(
    name: str,
    reference: str,
    spec: MemberSpec,
    files: ModelFiles,
    *,
    kind: Kind = "arm",
    folder: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardFiles:
    tokenizer = tokenizer or files.tokenizer
    return RewardFiles(
        name=name,
        kind=kind,
        reference=reference,
        spec=spec,
        folder=folder,
        tokenizer=tokenizer,
        ends=end_ids(files.generation_config, tokenizer),
        context=files.context,
        hub=files.hub,
    )


def _name(reference: str) -> str:
    return Path(reference).resolve().name if Path(reference).is_dir() else reference
