"""Configuration of a guided model: which base, which rewards, which default weights."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from genarm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
BASE = "base"


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """Where one member's weights are and how to load them.

    Attributes:
        model: a hub id, or a path: absolute, or relative to the guided folder. None, for a reward only: the
            base's own model, which then carries the reward's LoRA adapter.
        revision: hub revision of `model`.
        adapter: a LoRA adapter on `model` (hub id or path), for rewards only.
        adapter_revision: hub revision of `adapter`.
        dtype: "float32", "bfloat16", "float16" or None for the checkpoint's own.
        device_map: as transformers' `from_pretrained`.
        quantization_config: as transformers writes it in a config.json (bitsandbytes, GPTQ, AWQ, …).
    """

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    dtype: str | None = None
    device_map: str | dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it may be 'float32', 'bfloat16' or 'float16'")
        if self.model is None and (self.dtype or self.device_map or self.quantization_config or self.revision):
            raise ConfigError(
                "revision, dtype, device_map and quantization_config belong to a model; an adapter on the base takes "
                "the base's: set them there"
            )

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


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """A reward: a name to weigh it by, its default weight w = α/β, and the member it is."""

    name: str
    member: MemberSpec
    weight: float = 1.0
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == BASE:
            raise ConfigError(
                f"a reward cannot be named {self.name!r}; use letters, digits, '_' and '-', starting with a letter "
                "(and not 'base')"
            )
        if isinstance(self.weight, bool) or not math.isfinite(self.weight):
            raise ConfigError(f"the weight of reward {self.name!r} is {self.weight!r}; it must be a finite number")
        if self.member.model is None and self.member.adapter is None:
            raise ConfigError(f"reward {self.name!r} names neither a model nor an adapter; give one of them")

    def to_dict(self) -> dict[str, Any]:
        """The record in config.json."""
        record: dict[str, Any] = {"name": self.name, "weight": self.weight, **self.member.to_dict()}
        return {**record, "description": self.description} if self.description else record

    @classmethod
    def parse(cls, data: Any) -> RewardSpec:
        """The reward written as `data` in a config.json (raises ConfigError)."""
        own = {"name", "weight", "description"}
        record = _checked(data, own | {f.name for f in fields(MemberSpec)}, what="a reward")
        if "name" not in record:
            raise ConfigError("a reward has no name; every reward needs one")
        member = MemberSpec(**{key: value for key, value in record.items() if key not in own})
        return cls(member=member, **{key: value for key, value in record.items() if key in own})


class GuidedConfig(PreTrainedConfig):
    """Configuration of `GuidedForCausalLM`, stored as the guided folder's config.json.

    Args:
        base: a `MemberSpec` as a mapping; `model` is required, `adapter` is not allowed.
        rewards: `RewardSpec`s as mappings: `name`, `weight`, `description` and the fields of `MemberSpec`.
        vocab_size, max_position_embeddings and the token ids: the base's; `max_position_embeddings` is the
            smallest among the members.

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
        self.rewards = list(self.rewards or [])
        names = [reward.name for reward in self.reward_specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two rewards are named {twice[0]!r}; every reward needs a name of its own")
        if self.base is not None and (self.base_spec.model is None or self.base_spec.adapter is not None):
            raise ConfigError("the base must name a model and no adapter; merge an adapter into the base first")
        super().__post_init__(**kwargs)
        # The Auto classes find the model of every configuration that exists (see genarm.auto).
        importlib.import_module("genarm.model.modeling")

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
            bos_token_id=texts[0].bos_token_id,
            eos_token_id=texts[0].eos_token_id,
            pad_token_id=texts[0].pad_token_id,
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
