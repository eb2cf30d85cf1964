"""From a recipe's words to loaded models.

Models are kept while the next method still needs them: a grid of weights over the same models loads them once, and
a large base is not loaded again for every method.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from genarm.errors import MemberError
from genarm.lab.methods.arm_reward import ArmReward
from genarm.lab.methods.interface import MethodSpec
from genarm.lab.trajectory import TrajectoryReward, is_classifier
from genarm.model.adapter_files import host_of, read_adapter_config
from genarm.model.compose import compose, spec_of, start_spec
from genarm.model.config import GuidedConfig, MemberSpec, RewardSpec
from genarm.model.contract import ADAPTER_FILE
from genarm.model.loading import HubOptions, add_adapters, load_model, load_tokenizer
from genarm.model.references import ModelFiles, find_device, open_files
from genarm.model.trained import files_of, said_of_start, trained_through, training_of
from genarm.provenance import Record, digest, model_record

_OWN = re.compile(r"(^|[=,])@")


@dataclasses.dataclass(kw_only=True)
class Models:
    """Loaded models by what they are; `folder` is the run's own.

    Attributes:
        folder: what names that begin with `@` are relative to.
        dtype, device: as on the command line.
    """

    folder: Path
    dtype: str = "auto"
    device: str | None = None
    _loaded: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)
    _records: dict[str, Record] = dataclasses.field(default_factory=dict)

    def resolve(self, reference: str) -> str:
        """`reference` with a path for each part of the run in it; the `@` before a revision is none."""
        return _OWN.sub(lambda found: f"{found[1]}{self.folder}/", reference)

    def record(self, reference: str) -> Record:
        """A model by its content, as it was when it was first asked for here."""
        where = self.resolve(reference)
        if where not in self._records:
            self._records[where] = model_record(where)
        return self._records[where]

    def keep(self, methods: tuple[MethodSpec, ...]) -> None:
        """Let go of every model that none of `methods` needs."""
        needed = {self.resolve(reference) for method in methods for reference in method.models}
        needed |= {self._guided_folder(method) for method in methods if method.table in ("rewards", "tuned")}
        self._loaded = {key: model for key, model in self._loaded.items() if key[1] in needed}

    def policy(self, reference: str) -> PreTrainedModel:
        """A plain causal LM; an adapter is merged into its model."""
        where = self.resolve(reference)
        return self._get("policy", where, lambda: self._load_policy(where))

    def reward(self, reference: str) -> TrajectoryReward:
        """A classic reward model."""
        where = self.resolve(reference)
        return self._get(
            "reward", where, lambda: TrajectoryReward.load(where, dtype=self.dtype, device=find_device(self.device))
        )

    def reward_of_replies(self, reference: str) -> TrajectoryReward | ArmReward:
        """A classic reward model, or an ARM with what it is a difference to."""
        where = self.resolve(reference)
        adapter = (Path(where) / ADAPTER_FILE).exists()
        config = None if adapter else open_files(where).config
        if is_classifier(config):
            return self.reward(reference)
        if isinstance(config, GuidedConfig):
            raise MemberError(f"{reference} is a guided folder, which is no reward of replies; name one of its rewards")
        hub = HubOptions()
        spec = _on_its_model(where, reference) if adapter else spec_of(where)
        at, revision = files_of(spec)
        tokenizer = load_tokenizer(str(at), None, hub, revision) or open_files(str(spec.model_reference)).tokenizer
        trained = training_of(spec, hub)
        zero = trained.get("start") == "zero"
        start = start_spec(reference, spec, trained, MemberSpec(), hub).model_reference if zero else None
        return ArmReward(
            self.policy(reference),
            tokenizer,
            label=f"the ARM {reference}",
            start=None if start is None else self.policy(start),
        )

    def files(self, reference: str) -> ModelFiles:
        """A model by its files alone."""
        return open_files(self.resolve(reference))

    def config(self, reference: str) -> PretrainedConfig | None:
        """The configuration of a policy; None of an adapter."""
        adapter = Path(self.resolve(reference)) / ADAPTER_FILE
        return None if adapter.exists() else self.files(reference).config

    def guided(self, method: MethodSpec) -> PreTrainedModel:
        """The guided model of a row with rewards or tuned models."""
        where = self._composed(method)
        return self._get("guided", where, lambda: open_files(where).load(dtype=self.dtype, device=self.device))

    def composed(self, method: MethodSpec) -> GuidedConfig:
        """How the model of such a row is composed: a reward that is a difference to its start has a reference."""
        config: GuidedConfig = GuidedConfig.from_pretrained(self._composed(method))
        return config

    def starts(self, method: MethodSpec) -> dict[str, Record]:
        """The models that rewards of a row are differences to, by content; the base and an adapter's own are known."""
        rewards = (r for r in self.composed(method).reward_specs if r.name in method.named and r.member.adapter is None)
        references = {reward.name: reward.reference for reward in rewards}
        return {
            name: model_record(spec.model, spec.revision)
            for name, spec in references.items()
            if spec is not None and spec.model is not None
        }

    def notes(self, method: MethodSpec) -> list[str]:
        """What a reader must know of the rewards that weigh in a row: to what they are differences, and what for."""
        base, hub, found = self.composed(method).base_spec, HubOptions(), []
        for name, (reward, trained) in self._trained(method).items():
            if weight := method.weights[name]:
                where = str(reward.member.adapter or reward.member.model)
                if trained.get("start") == "zero":
                    found.append(said_of_start(name, where, trained, reward.reference, hub))
                found += trained_through(name, trained, base, weight)
        return found

    def _trained(self, method: MethodSpec) -> dict[str, tuple[RewardSpec, Mapping[str, Any]]]:
        """The rewards of a row as they are composed, each with the settings of its training."""
        rewards = (reward for reward in self.composed(method).reward_specs if reward.name in method.named)
        return {reward.name: (reward, training_of(reward.member, HubOptions())) for reward in rewards}

    def _composed(self, method: MethodSpec) -> str:
        """The row's guided folder, which is composed in the run's `guided/` where it is not there yet."""
        where = self._guided_folder(method)
        if not Path(where).exists():
            named, references = (
                {name: self.resolve(reference) for name, reference in table.items()}
                for table in (method.named, method.references)
            )
            tuned = method.table == "tuned"
            compose(
                self.resolve(method.roles["base"]),
                {} if tuned else named,
                Path(where),
                tuned=named if tuned else {},
                references=references,
            )
        return where

    def _guided_folder(self, method: MethodSpec) -> str:
        """Named by what is composed: where it lies, which the folder says, and its content."""
        members = {**method.roles, **method.named, **{f"{n}.": ref for n, ref in method.references.items()}}
        parts = {name: [self.resolve(reference), self.record(reference)] for name, reference in members.items()}
        return str(self.folder / "guided" / digest({"table": method.table, "members": parts}))

    def _load_policy(self, where: str) -> PreTrainedModel:
        if not (Path(where) / ADAPTER_FILE).exists():
            return open_files(where).load(dtype=self.dtype, device=self.device)
        hub, name = HubOptions(), "policy"
        spec = _on_its_model(where, name)
        options = {"dtype": self.dtype, "device_map": find_device(self.device)}
        model = load_model(spec, None, hub, options, name=name)
        merged: PreTrainedModel = add_adapters(model, {name: spec}, None, hub).merge_and_unload()
        return merged.eval().requires_grad_(False)

    def _get(self, what: str, where: str, load: Any) -> Any:
        if (what, where) not in self._loaded:
            self._loaded[what, where] = load()
        return self._loaded[what, where]


def _on_its_model(where: str, name: str) -> MemberSpec:
    """An adapter on the model that it was trained on (raises MemberError: it does not say, or that is gone)."""
    host = host_of(read_adapter_config(where, HubOptions().common(), name=name))
    if host is None:
        raise MemberError(f"{name} at {where} is an adapter that does not say which model it goes on")
    on = spec_of(host)
    return MemberSpec(model=on.model, revision=on.revision, adapter=where)
