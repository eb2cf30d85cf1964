"""From a recipe's words to loaded models and methods.

Models are kept while the next method still needs them: a grid of weights over the same models loads them once, and
a large base is not loaded again for every method.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from genarm.errors import MemberError
from genarm.lab.evaluation.recipe import MethodSpec, SamplingSpec
from genarm.lab.methods.args import Args
from genarm.lab.methods.best_of_n import BestOfN
from genarm.lab.methods.best_of_n import kl_bound as bound_of_best
from genarm.lab.methods.cards import Cards
from genarm.lab.methods.interface import Method
from genarm.lab.methods.sample import Sample, mod, proxy_tuning
from genarm.lab.methods.soup import soup
from genarm.lab.methods.transfer_q import TransferQ
from genarm.lab.trajectory import TrajectoryReward
from genarm.model.adapter_files import read_adapter_config
from genarm.model.compose import compose
from genarm.model.config import MemberSpec
from genarm.model.contract import ADAPTER_FILE
from genarm.model.loading import HubOptions, add_adapters, load_model
from genarm.model.references import ModelFiles, find_device, open_files
from genarm.provenance import Record, digest, model_record
from genarm.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        needed = {self.resolve(r) for method in methods for r in (*method.roles.values(), *method.named.values())}
        needed |= {self._guided_folder(method) for method in methods if method.kind == "genarm"}
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

    def files(self, reference: str) -> ModelFiles:
        """A model by its files alone."""
        return open_files(self.resolve(reference))

    def guided(self, method: MethodSpec) -> PreTrainedModel:
        """The guided model of a GenARM row, whose folder is composed in the run's `guided/`."""
        where = self._guided_folder(method)
        if not Path(where).exists():
            rewards = {name: self.resolve(reference) for name, reference in method.named.items()}
            compose(self.resolve(method.roles["base"]), rewards, Path(where))
        return self._get("guided", where, lambda: open_files(where).load(dtype=self.dtype, device=self.device))

    def _guided_folder(self, method: MethodSpec) -> str:
        members = {"base": method.roles["base"], "rewards": dict(method.named)}
        return str(self.folder / "guided" / digest(members))

    def _load_policy(self, where: str) -> PreTrainedModel:
        if not (Path(where) / ADAPTER_FILE).exists():
            return open_files(where).load(dtype=self.dtype, device=self.device)
        hub, name = HubOptions(), "policy"
        host = read_adapter_config(where, hub.common(), name=name).base_model_name_or_path
        if host is None:
            raise MemberError(f"the policy {where} is an adapter that does not say which model it goes on")
        spec = MemberSpec(model=host, adapter=where)
        options = {"dtype": self.dtype, "device_map": find_device(self.device)}
        model = load_model(spec, None, hub, options, name=name)
        merged: PreTrainedModel = add_adapters(model, {name: spec}, None, hub).merge_and_unload()
        return merged.eval().requires_grad_(False)

    def _get(self, what: str, where: str, load: Any) -> Any:
        if (what, where) not in self._loaded:
            self._loaded[what, where] = load()
        return self._loaded[what, where]


def base_reference(spec: MethodSpec) -> str:
    """The model whose tokenizer reads the prompts of a method."""
    return next(iter((*spec.roles.values(), *spec.named.values())))


def kl_bound(spec: MethodSpec) -> float | None:
    """What the divergence from the base is at most where theory says so, in nats per reply."""
    return bound_of_best(int(spec.settings["n"])) if spec.kind == "best-of-n" else None


def build(spec: MethodSpec, models: Models, tokenizer: PreTrainedTokenizerBase, draw_as: SamplingSpec) -> Method:
    """The method of one row, ready to answer."""
    draw = Sampling(max_new_tokens=draw_as.max_new_tokens, temperature=draw_as.temperature)
    policies = {role: models.policy(ref) for role, ref in spec.roles.items() if spec.kind != "genarm"}
    numbers = spec.settings
    match spec.kind:
        case "sample":
            return Sample(policies["model"], tokenizer, draw, members=("policy",))
        case "genarm":
            return Sample(models.guided(spec), tokenizer, draw, weights=spec.weights)
        case "proxy-tuning":
            return proxy_tuning(
                policies["base"], policies["tuned"], policies["untuned"], tokenizer, draw, weight=numbers["weight"]
            )
        case "mod":
            return mod({name: models.policy(ref) for name, ref in spec.named.items()}, spec.weights, tokenizer, draw)
        case "soup":
            parts = {name: models.resolve(reference) for name, reference in spec.named.items()}
            return Sample(soup(policies["base"], parts, spec.weights), tokenizer, draw, members=("policy",))
    rewards = {name: models.reward(reference) for name, reference in spec.named.items()}
    match spec.kind:
        case "best-of-n":
            return BestOfN(Sample(policies["base"], tokenizer, draw), rewards, spec.weights, n=int(numbers["n"]))
        case "args":
            return Args(policies["base"], tokenizer, draw, rewards, spec.weights, top_k=int(numbers["top_k"]))
        case "transfer-q":
            return TransferQ(
                policies["base"],
                policies["policy"],
                tokenizer,
                draw,
                rewards,
                spec.weights,
                top_k=int(numbers["top_k"]),
                rollout=int(numbers["rollout"]),
            )
        case "cards":
            return Cards(
                policies["base"],
                tokenizer,
                draw,
                rewards,
                spec.weights,
                entropy=numbers["entropy"],
                beta=numbers["beta"],
                goal=numbers["goal"],
                tries=int(numbers["tries"]),
            )
    raise AssertionError(spec.kind)
