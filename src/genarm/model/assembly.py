"""Members put together: from a guided folder, or from models in memory.

Both ways end with what `GuidedForCausalLM` is made of: a configuration, the members, and how each reward's
vocabulary aligns with the base's.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedModel

from genarm.errors import ConfigError, MemberError
from genarm.model.adapter_files import check_settings
from genarm.model.adapters import adapter_layers
from genarm.model.config import BASE, THE_BASE, GuidedConfig, MemberSpec, RewardSpec, host_folder, reference_name
from genarm.model.contract import check_finite, refusing
from genarm.model.loading import HubOptions, Member, load_members, load_tokenizer
from genarm.model.options import LoadOptions
from genarm.model.vocabulary import (
    Alignment,
    Vocabulary,
    align,
    read_vocabulary,
    unknown_note,
    unknown_tokens,
)
from genarm.model.weights import weight_row
from genarm.model.wishes import check_wish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genarm.model.modeling import GuidedForCausalLM


_log = logging.getLogger(__name__)


def load_guided(
    reference: str | os.PathLike[str], *, config: GuidedConfig | str | None, revision: str | None, options: LoadOptions
) -> tuple[GuidedConfig, list[Member], list[Alignment], Path]:
    """Load the members of a guided folder; see `GuidedForCausalLM.from_pretrained`."""
    hub = options.hub
    folder = local_folder(reference, revision, hub, options.subfolder)
    if isinstance(config, GuidedConfig):
        config = copy.deepcopy(config)
    else:
        config = read_guided_config(folder if config is None else Path(config))
    config.update(dict(options.config))
    members = load_members(config, folder, hub, options.members)
    specs = [*config.member_specs.values()]
    base, *others = (_vocabulary(m, s, specs[0], folder, hub) for m, s in zip(members, specs, strict=True))
    return config, members, [align(base, other) for other in others], folder


def gather_guided(
    base: PreTrainedModel,
    rewards: Mapping[str, PreTrainedModel | PeftModel],
    references: Mapping[str, PreTrainedModel | PeftModel],
    wishes: Mapping[str, str],
    weights: Mapping[str, float],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> tuple[GuidedConfig, list[Member], list[Alignment]]:
    """Members from memory; see `GuidedForCausalLM.from_members`."""
    if twice := sorted({*rewards} & {*wishes}):
        raise ConfigError(f"{twice[0]!r} is a reward and a wish; every reward needs a name of its own")
    members = [Member(name=BASE, model=base), *(_member(name, reward) for name, reward in rewards.items())]
    members += [_wish(name, text, base) for name, text in wishes.items()]
    places: dict[str, int] = {}
    for name, reference in references.items():
        if name not in rewards:
            raise MemberError(f"there is a reference for {name!r}, which is no reward; the rewards are {[*rewards]}")
        found = _member(reference_name(name), reference)
        same = [
            i for i, m in enumerate(members) if m.model is found.model and m.adapter == found.adapter and m.wish is None
        ]
        places[name] = same[0] if same else len(members)
        members += [] if same else [found]
    for model in {id(member.model): member.model for member in members}.values():
        check_finite(model.state_dict(), what="a member")
        _refuse_merged(model)
    _refuse_one_adapter_twice(members)
    values = weight_row(weights, dict.fromkeys([*rewards, *wishes], 1.0))
    where = [THE_BASE, *(_place(member, members) for member in members[1:])]
    specs = [
        RewardSpec(
            name=name,
            weight=value,
            member=member,
            reference=where[places[name]] if name in places else None,
        )
        for name, value, member in zip([*rewards, *wishes], values, where[1:], strict=False)
    ]
    config = GuidedConfig.of(MemberSpec(model=_in_folder(BASE)), specs, [m.model.config for m in members])
    vocabularies = [
        read_vocabulary(
            tokenizers.get(BASE if member.model is base else member.name),
            size=output_rows(member.model),
            label=member.name,
        )
        for member in members
    ]
    alignments = [align(vocabularies[0], vocabulary) for vocabulary in vocabularies[1:]]
    for member, alignment in zip(members[1:], alignments, strict=True):  # a folder's user was told by `compose`
        if vocabularies[0].tokens is not None and (tokens := unknown_tokens(alignment, vocabularies[0])):
            _log.warning(unknown_note(repr(member.name), tokens))
    return config, members, alignments


def add_wishes(
    model: GuidedForCausalLM, wishes: Mapping[str, str], weights: Mapping[str, float]
) -> tuple[GuidedConfig, list[Member], list[Alignment]]:
    """A model's members with those of further wishes; see `GuidedForCausalLM.with_wishes`."""
    members = {member.name: member for member in model.members}
    alignments = {member.name: of for member, of in zip(model.members[1:], model.alignments, strict=True)}
    size = output_rows(model.base)
    for name, text in wishes.items():
        if name in members:
            raise ConfigError(f"the guided model has a reward {name!r} already; name the wish otherwise")
        members[name] = _wish(name, text, model.base)
        alignments[name] = Alignment(base_size=size, reward_size=size)
    values = weight_row(weights, dict.fromkeys(wishes, 1.0))
    config = model.config.with_wishes(wishes, values)
    names = [*config.member_specs]
    return config, [members[name] for name in names], [alignments[name] for name in names[1:]]


def read_guided_config(folder: Path) -> GuidedConfig:
    """The configuration of a guided folder.

    Raises:
        MemberError: its config.json cannot be read.
        ConfigError: it does not hold together.
    """
    with refusing(f"cannot read the guided folder {str(folder)!r}"):
        return GuidedConfig.from_pretrained(folder)


def _refuse_one_adapter_twice(members: list[Member]) -> None:
    """Two `PeftModel`s made around one model under one adapter name hold the same weights: the later ones."""
    seen: dict[tuple[int, str], str] = {}
    for member in members:
        if member.adapter is not None and member.wish is None:
            first = seen.setdefault((id(member.model), member.adapter), member.name)
            if first != member.name:
                raise MemberError(
                    f"rewards {first!r} and {member.name!r} are both the adapter {member.adapter!r} on one model; load "
                    "each with an adapter_name of its own (peft's load_adapter), or each on a copy of the model"
                )


def _refuse_merged(model: PreTrainedModel) -> None:
    """An adapter that is added into a model's weights makes the model itself another one."""
    names = {name for layer in adapter_layers(model) for name in getattr(layer, "merged_adapters", ())}
    if names:
        raise MemberError(
            f"the adapter {min(names)!r} is merged into the model that it is on, which others share; take it out with "
            "peft's unmerge_adapter, or make a model of its own of it with merge_and_unload"
        )


def output_rows(model: PreTrainedModel) -> int:
    """How many token ids the model's output layer has a row for."""
    out_features = getattr(model.get_output_embeddings(), "out_features", None)
    return int(out_features if out_features is not None else model.config.get_text_config().vocab_size)


def local_folder(reference: str | os.PathLike[str], revision: str | None, hub: HubOptions, subfolder: str = "") -> Path:
    """Where a guided folder is on this machine; one on the hub is downloaded (raises MemberError)."""
    if Path(reference).is_dir():
        return (Path(reference) / subfolder).resolve()
    try:
        options = {key: value for key, value in hub.common().items() if value is not None}
        return Path(snapshot_download(str(reference), revision=revision, **options)) / subfolder
    except (OSError, ValueError) as error:
        raise MemberError(f"there is no guided folder {str(reference)!r}, here or on the hub: {error}") from error


def _vocabulary(member: Member, spec: MemberSpec, base: MemberSpec, folder: Path, hub: HubOptions) -> Vocabulary:
    # An adapter speaks its model's language: its own copy of the tokenizer is not consulted.
    host = spec if spec.model is not None else base
    tokenizer = load_tokenizer(str(host.model), folder, hub, host.revision)
    return read_vocabulary(tokenizer, size=output_rows(member.model), label=f"{member.name} ({host.model})")


def _member(name: str, reward: PreTrainedModel | PeftModel) -> Member:
    if not isinstance(reward, PeftModel):
        return Member(name=name, model=reward)
    active = reward.active_adapters
    if len(active) != 1:
        raise MemberError(f"reward {name!r} has the active adapters {active}; activate one (peft's set_adapter)")
    # What A and B began from is of no account: the model is in memory as they go on it.
    settings = {**reward.peft_config[active[0]].to_dict(), "init_lora_weights": True}
    check_settings(settings, label=f"the adapter {active[0]!r} of reward {name!r}")
    return Member(name=name, model=cast(PreTrainedModel, reward.get_base_model()), peft=reward, adapter=active[0])


def _wish(name: str, text: str, base: PreTrainedModel) -> Member:
    check_wish(text)
    return Member(name=name, model=base, wish=text)


def _in_folder(name: str) -> str:
    return f"./members/{name}"


def _place(member: Member, members: Sequence[Member]) -> MemberSpec:
    """Where `save_pretrained` will put a member that has no files yet; what adapters go on is with the first."""
    if member.wish is not None:
        return MemberSpec(wish=member.wish)
    if member.adapter is None:
        on_it = [other for other in members if other.model is member.model and other.adapter is not None]
        return MemberSpec(model=_in_folder(host_folder(on_it[0].name) if on_it else member.name))
    model = None if member.model is members[0].model else _in_folder(host_folder(member.name))
    return MemberSpec(model=model, adapter=_in_folder(member.name))
