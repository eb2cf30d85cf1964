"""Configuration of a guided model: which base, which rewards, which default weights."""

from __future__ import annotations

import copy
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from genarm.errors import ConfigError, MemberError, UnsupportedError
from genarm.model.weights import is_finite_number
from genarm.model.wishes import check_wish

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
BASE = "base"
_TAKEN = (BASE, "guided")  # what figures of a reply are listed under, beside the rewards' names


def reference_name(reward: str) -> str:
    """Name of the member that is a reward's reference; no reward can have this name."""
    return f"{reward}.reference"


def host_folder(name: str) -> str:
    """Name of the folder for the model that a reward's adapter goes on; no reward can have this name."""
    return f"{name}.model"


_OF_THE_BASE = frozenset(
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
)
_CODE = "genarm_model.py"
_AUTO_MAP = {"AutoConfig": "genarm_model.GuidedConfig", "AutoModelForCausalLM": "genarm_model.GuidedForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """One stream of log-probs: a model, an adapter on it if any, and the context that it reads.

    Attributes:
        model: a hub id, or a path: absolute, or relative to the guided folder. None, for a reward only: the
            base's own model, which then carries the reward's LoRA adapter.
        revision: hub revision of `model`.
        adapter: a LoRA adapter on `model` (hub id or path), for rewards only.
        adapter_revision: hub revision of `adapter`.
        dtype: "float32", "bfloat16", "float16" or None for the checkpoint's own.
        device_map: as transformers' `from_pretrained`.
        quantization_config: as transformers writes it in a config.json (bitsandbytes, GPTQ, AWQ, …).
        wish: a system text that this member reads before every prompt, for rewards only.
    """

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    dtype: str | None = None
    device_map: str | dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    wish: str | None = None

    def __post_init__(self) -> None:
        for field in ("model", "revision", "adapter", "adapter_revision"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{field} of a member is {value!r:.50}; it must be a text, or be left out")
        if self.wish is not None:
            check_wish(self.wish)
        if not isinstance(self.device_map, str | int | dict | None):
            raise ConfigError(f"device_map is {self.device_map!r:.50}; it must be a device or a mapping to devices")
        if not isinstance(self.quantization_config, dict | None):
            raise ConfigError(f"quantization_config is {self.quantization_config!r:.50}; it must be a mapping")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it may be 'float32', 'bfloat16' or 'float16'")
        if self.model is None and (self.dtype or self.device_map or self.quantization_config or self.revision):
            raise ConfigError(
                "revision, dtype, device_map and quantization_config belong to a model; an adapter on the base takes "
                "the base's: set them there"
            )

    @property
    def model_reference(self) -> str | None:
        """The model as a user writes it: a folder, or a hub id with its @revision; None for the base's."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def parse(cls, data: Any) -> MemberSpec:
        """The spec written as `data` in a config.json.

        Raises:
            ConfigError: not a mapping, or keys that are no fields.
        """
        return cls(**_checked(data, {f.name for f in fields(cls)}, what="a member"))


THE_BASE = MemberSpec()
"""The reference that is the base."""


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """A reward: a name to weigh it by, its default weight w = α/β, and the member it is.

    With a `reference` the reward is a difference, log π_member − log π_reference: what a tuned model has learned over
    its untuned self, say (method of proxy tuning, arXiv 2401.08565, and of emulated fine-tuning, 2310.12962). The
    The reference `THE_BASE` is the base itself, which costs no forward.

    With a wish the member reads a system text of its own, and the reference is always the member without it: at
    weight 1 a wish of the base is the base with that system text, prompted (classifier-free guidance for language
    models, arXiv 2306.17806).
    """

    name: str
    member: MemberSpec
    reference: MemberSpec | None = None
    weight: float = 1.0
    description: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or self.name in _TAKEN:
            raise ConfigError(
                f"a reward cannot be named {self.name!r:.50}; use letters, digits, '_' and '-', starting with a letter "
                f"(and not {' or '.join(map(repr, _TAKEN))})"
            )
        if not is_finite_number(self.weight):
            raise ConfigError(f"the weight of reward {self.name!r} is {self.weight!r:.50}; it must be a finite number")
        if not isinstance(self.description, str):
            raise ConfigError(f"the description of reward {self.name!r} is {self.description!r:.50}; it must be a text")
        if self.member.wish is not None:
            silent = replace(self.member, wish=None)
            if self.reference not in (None, silent):
                raise ConfigError(f"the wish {self.name!r} is compared with its member without it; leave reference out")
            object.__setattr__(self, "reference", silent)
        elif self.member == THE_BASE:
            raise ConfigError(f"reward {self.name!r} names neither a model nor an adapter nor a wish; give one of them")
        if self.reference is not None and self.reference.wish is not None:
            raise ConfigError(f"the reference of reward {self.name!r} has a wish; a wish is a reward of its own")
        if self.reference == self.member:
            raise ConfigError(f"the reference of reward {self.name!r} is the reward itself, so it would change nothing")

    def moved(self, move: Callable[[MemberSpec], MemberSpec]) -> RewardSpec:
        """The same with its member, and its reference if there is one, as `move` puts them."""
        # A wish's reference is its member without it, wherever that is.
        reference = None if self.reference is None or self.member.wish is not None else move(self.reference)
        return replace(self, member=move(self.member), reference=reference)

    def to_dict(self) -> dict[str, Any]:
        """The record in config.json."""
        record: dict[str, Any] = {"name": self.name, "weight": self.weight, **self.member.to_dict()}
        if self.reference is not None and self.member.wish is None:
            record["reference"] = BASE if self.reference == THE_BASE else self.reference.to_dict()
        return {**record, "description": self.description} if self.description else record

    @classmethod
    def parse(cls, data: Any) -> RewardSpec:
        """The reward written as `data` in a config.json (raises ConfigError)."""
        own = {"name", "weight", "description", "reference"}
        record = _checked(data, own | {f.name for f in fields(MemberSpec)}, what="a reward")
        if "name" not in record:
            raise ConfigError("a reward has no name; every reward needs one")
        member = MemberSpec(**{key: value for key, value in record.items() if key not in own})
        if "reference" in record:
            given = record["reference"]
            record["reference"] = THE_BASE if given == BASE else MemberSpec.parse(given)
        return cls(member=member, **{key: value for key, value in record.items() if key in own})


class GuidedConfig(PreTrainedConfig):
    """Configuration of `GuidedForCausalLM`, stored as the guided folder's config.json.

    Args:
        base: a `MemberSpec` as a mapping; `model` is required, `adapter` is not allowed.
        rewards: `RewardSpec`s as mappings: `name`, `weight`, `description` and the fields of `MemberSpec`.
        vocab_size, max_position_embeddings and the token ids: the base's; `max_position_embeddings` is the
            smallest among the members.
        use_cache: whether a forward returns a cache where its caller does not say; the base's by default.

    `hidden_size`, `num_hidden_layers` and the like are answered with the base's, from its own configuration.

    Raises:
        ConfigError: when a record does not hold together or a name comes twice.
    """

    model_type = "guided"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own declaration)

    base: dict[str, Any] | None = None
    rewards: list[Any] | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.rewards, list | tuple | None):
            raise ConfigError(f"rewards is {self.rewards!r:.50}; it must be a list of rewards")
        self.rewards = list(self.rewards or [])
        names = [reward.name for reward in self.reward_specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two rewards are named {twice[0]!r}; every reward needs a name of its own")
        if self.base is not None and self.base_spec.wish is not None:
            raise ConfigError("the base cannot have a wish; make it a reward, whose weight says how much it counts")
        if self.base is not None and (self.base_spec.model is None or self.base_spec.adapter is not None):
            raise ConfigError("the base must name a model and no adapter; merge an adapter into the base first")
        super().__post_init__(**kwargs)
        # The Auto classes find the model of every configuration that exists (see genarm.model.auto).
        importlib.import_module("genarm.model.modeling")

    def __getattr__(self, name: str) -> Any:
        # Asked only for what this object does not have itself.
        if name in _OF_THE_BASE or name == "use_cache":
            described = self.__dict__.get("_described") or self._read_base()
            if described is not None:
                text = described.get_text_config()
                return getattr(text, name) if name != "use_cache" else getattr(text, name, True)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def describe_base(self, config: PreTrainedConfig) -> None:
        """Answer for the base with `config`, the base's own, from now on."""
        self.__dict__["_described"] = config

    def _read_base(self) -> Any:
        """The base's configuration, from its files; None where there are none or they cannot be reached."""
        from transformers import AutoConfig  # at the top it would register this module's class before there is one

        from genarm.model.loading import HubOptions, load_model_config

        place = self.__dict__.get("_name_or_path")
        if not (self.base and place):
            return None
        spec = self.base_spec
        inside = str(spec.model)
        try:
            if inside.startswith("./") and not Path(place).is_dir():  # in a guided folder on the hub
                found = AutoConfig.from_pretrained(place, subfolder=inside.removeprefix("./"))
            else:
                found = load_model_config(spec, Path(place), HubOptions(), name=BASE)
        except (MemberError, OSError, ValueError):
            return None
        self.describe_base(found)
        return found

    def check_shapes(self) -> None:
        """Refuse a configuration that was told another shape than its members have (raises UnsupportedError)."""
        told = sorted(_OF_THE_BASE.intersection(self.__dict__))
        if told:
            raise UnsupportedError(
                f"{told[0]} cannot be set for a guided model: its members have the shapes of their files; leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: nothing of how this object's model happens to be loaded."""
        record: dict[str, Any] = super().to_dict()
        return {key: value for key, value in record.items() if key not in ("_described", "dtype", "torch_dtype")}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, and the file through which `trust_remote_code=True` finds the installed genarm."""
        self.auto_map = dict(_AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        code = resources.files("genarm.model").joinpath("remote_code.py").read_text(encoding="utf-8")
        (Path(save_directory) / _CODE).write_text(code, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: `save_pretrained` writes what the Auto classes need."""

    @classmethod
    def of(cls, base: MemberSpec, rewards: Sequence[RewardSpec], models: Sequence[PreTrainedConfig]) -> GuidedConfig:
        """The configuration of a base and its rewards; `models` are the members' own, the base's first."""
        texts = [model.get_text_config() for model in models]
        lengths = [getattr(text, "max_position_embeddings", None) for text in texts]
        return cls(
            base=base.to_dict(),
            rewards=[reward.to_dict() for reward in rewards],
            vocab_size=texts[0].vocab_size,
            max_position_embeddings=min((n for n in lengths if n is not None), default=None),
            bos_token_id=getattr(texts[0], "bos_token_id", None),
            eos_token_id=getattr(texts[0], "eos_token_id", None),
            pad_token_id=getattr(texts[0], "pad_token_id", None),
            architectures=["GuidedForCausalLM"],
        )

    @property
    def base_spec(self) -> MemberSpec:
        """The base, parsed.

        Raises:
            ConfigError: this configuration names no base.
        """
        if self.base is None:
            raise ConfigError("this guided configuration names no base; write one with `genarm compose`")
        return MemberSpec.parse(self.base)

    @property
    def reward_specs(self) -> tuple[RewardSpec, ...]:
        """The rewards, parsed, in the order of the columns of a weights tensor."""
        return tuple(RewardSpec.parse(reward) for reward in self.rewards or [])

    @property
    def member_specs(self) -> dict[str, MemberSpec]:
        """Every member by name: the base, the rewards in order, then their references that are none of these."""
        rewards = self.reward_specs
        specs = {BASE: self.base_spec, **{reward.name: reward.member for reward in rewards}}
        for reward in rewards:
            if reward.reference is not None and reward.reference not in (THE_BASE, *specs.values()):
                specs[reference_name(reward.name)] = reward.reference
        return specs

    @property
    def references(self) -> tuple[int | None, ...]:
        """The place of each reward's reference among the members: 0 is the base, None where there is none."""
        members = [*self.member_specs.values()]
        return tuple(
            None if reference is None else 0 if reference == THE_BASE else members.index(reference)
            for reference in (reward.reference for reward in self.reward_specs)
        )

    def with_wishes(self, wishes: Mapping[str, str], weights: Sequence[float]) -> GuidedConfig:
        """The same with further wishes {name: system text} and their weights (raises ConfigError)."""
        specs = [
            RewardSpec(name=name, member=MemberSpec(wish=text), weight=weight)
            for (name, text), weight in zip(wishes.items(), weights, strict=True)
        ]
        twin = copy.deepcopy(self)
        twin.rewards = [*(self.rewards or []), *(spec.to_dict() for spec in specs)]
        return twin

    @property
    def wishes(self) -> dict[str, str]:
        """{reward: system text} of the rewards that are wishes."""
        return {reward["name"]: reward["wish"] for reward in self.rewards or [] if reward.get("wish") is not None}

    @property
    def default_weights(self) -> dict[str, float]:
        """{name: weight} of every reward, in order; read at every forward, so not parsed again."""
        return {reward["name"]: float(reward.get("weight", 1.0)) for reward in self.rewards or []}


def _checked(data: Any, allowed: set[str], *, what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what} is described by {data!r}; expected a mapping with keys from {sorted(allowed)}")
    unknown = sorted(set(data) - allowed)
    if unknown:
        raise ConfigError(f"{what} has the unknown key {unknown[0]!r}; the keys may be {', '.join(sorted(allowed))}")
    return dict(data)
