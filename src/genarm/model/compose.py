"""`compose`: write a guided folder that names a base, its rewards and their default weights.

Everything that can be refused without loading weights is refused here: members that are not there, adapters that
belong to another model, vocabularies that really differ.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from genarm.errors import ConfigError, GenarmError, MemberError
from genarm.files import check_new_folder, new_folder, no_folder, refuse_file
from genarm.model.adapter_files import host_of, read_adapter_config
from genarm.model.assembly import local_folder
from genarm.model.config import BASE, THE_BASE, GuidedConfig, MemberSpec, RewardSpec, host_folder, reference_name
from genarm.model.contract import ADAPTER_FILE
from genarm.model.loading import (
    HubOptions,
    load_generation_config,
    load_model_config,
    load_plain_config,
    load_tokenizer,
    locate,
)
from genarm.model.trained import said_of_start, trained_through, training_of
from genarm.model.vocabulary import Vocabulary, align, read_vocabulary, shown, unknown_note, unknown_tokens
from genarm.model.weights import weight_row
from genarm.text.prompts import as_conversation, encode_prompt, end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEVER_COPIED = shutil.ignore_patterns("checkpoints", "*.bin", "*.pt", "*.pth", "*.pkl", ".git", ".cache")


@dataclass(frozen=True, kw_only=True)
class ComposeReport:
    """What was written, and what a user should know about it.

    `notes` are one-line remarks: tokens a reward cannot judge, chat templates that differ. `source` is the guided
    folder, on this machine, that was started from, if one was.
    """

    folder: Path
    config: GuidedConfig
    notes: tuple[str, ...]
    source: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A member as its files describe it, before any weight is loaded."""

    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerBase | None
    config: Any


def compose(
    base: str | os.PathLike[str],
    rewards: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    drop: Collection[str] = (),
    tuned: Mapping[str, str | os.PathLike[str]] | None = None,
    references: Mapping[str, str | os.PathLike[str]] | None = None,
    wishes: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    descriptions: Mapping[str, str] | None = None,
    adapter_models: Mapping[str, str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    bundle: bool = False,
    trust_remote_code: bool = False,
) -> ComposeReport:
    """Write the guided folder `output`.

    Args:
        base: the frozen base: a path, a hub id, or a hub id with a revision, `ID@REVISION`. A guided folder stands
            for its base and its rewards with their weights, to which `rewards` are added.
        drop: names of that folder's rewards that are left out; a new reward may have such a name.
        rewards: {name: ARM}, each a full model or a LoRA adapter, written like `base`.
        output: the folder to write; it must not exist or be empty.
        tuned: {name: tuned model}, written likewise: any result of DPO, SFT or RL. The reward is what it says more
            than its reference, so that with the base as the reference w = 1 is the tuned model and w = 0 the base.
        references: {name: untuned model} of tuned ones; by default the base.
        wishes: {name: system text}: the base that reads it, less the base that does not.
        weights: default weight w = α/β of each reward, 1.0 where not named.
        descriptions: {name: a line about what the reward prefers}.
        adapter_models: {name: model} for a reward whose adapter names a model that has since moved.
        settings: {"base" or reward name: {dtype, device_map, quantization_config}}.
        bundle: copy the members in, so that the folder can be moved or pushed to the hub.
        trust_remote_code: allow members with code of their own.

    Raises:
        DataError: `output` cannot be written, or is there already.
        ConfigError, WeightsError: options that do not hold together.
        MemberError: a member is not there, is no causal LM or does not fit the base.
        VocabularyError: a reward has another vocabulary than the base.
    """
    check_new_folder(Path(output))
    hub = HubOptions(trust_remote_code=trust_remote_code)
    given = spec_of(str(base))
    if (Path(locate(str(given.model), None)) / ADAPTER_FILE).exists():
        raise MemberError(
            f"the base {str(base)!r} is an adapter; merge it into its model first (peft's merge_and_unload)"
        )
    base_spec, present, source = taken_apart(given, hub)
    for name in drop:
        if present.pop(name, None) is None:
            names = ", ".join(present) or "none"
            raise ConfigError(f"{str(base)!r} has no reward {name!r} to drop; its rewards are: {names}")
    tuned, references = tuned or {}, references or {}
    wishes = wishes or {}
    new = _one_of_each(rewards, tuned, wishes)
    if not (present or new):
        raise ConfigError(
            "a guided model needs at least one reward; give --reward NAME=PATH, --tuned NAME=PATH or --wish NAME=TEXT"
        )
    _check_names([*present, *new], descriptions, settings)
    _check_names(new, adapter_models)
    if odd := sorted({*(adapter_models or {})} & {*wishes}):
        raise ConfigError(f"{odd[0]!r} is a wish, which the base reads, so it goes on no other model; leave that out")
    if stray := sorted({*references} - {*tuned} - {*rewards}):
        raise ConfigError(
            f"{stray[0]!r} is no tuned reward, so it has no reference; give it as --tuned {stray[0]}=PATH"
        )
    if twice := sorted({*present} & {*new}):
        raise ConfigError(
            f"the guided folder {str(base)!r} has a reward {twice[0]!r} already; name the new one otherwise"
        )
    settings = settings or {}
    base_spec = replace(base_spec, **settings.get(BASE, {}))
    members = {name: reward.member for name, reward in present.items()}
    against = {name: reward.reference for name, reward in present.items()}
    said: list[str] = []
    for name, text in wishes.items():
        members[name], against[name] = MemberSpec(wish=text), None
    for name, path in {**rewards, **tuned}.items():
        members[name] = _reward_spec(name, str(path), base_spec, (adapter_models or {}).get(name), hub)
        trained = training_of(members[name], hub)
        against[name] = THE_BASE if name in tuned else None
        if name in references:
            if name not in tuned and trained.get("start") != "zero":
                raise ConfigError(
                    f"{name!r} is no tuned reward, so it has no reference; give it as --tuned {name}=PATH"
                )
            against[name] = _reference_spec(name, str(references[name]), base_spec, hub)
        elif trained.get("start") == "zero":
            against[name] = start_spec(name, members[name], trained, base_spec, hub)
            said.append(said_of_start(name, str(path), trained, against[name], hub))
        said += trained_through(name, trained, base_spec, (weights or {}).get(name, 1.0))
    for name in present:
        if name in (weights or {}):
            said += trained_through(name, training_of(members[name], hub), base_spec, (weights or {})[name])
    if source is not None and not bundle and _within(source, [base_spec, *members.values(), *against.values()]):
        said.append(f"members of the new folder lie in {source}, which must stay there; --bundle copies them")
    values = weight_row(weights or {}, {name: present[name].weight if name in present else 1.0 for name in members})
    texts = {**{name: reward.description for name, reward in present.items()}, **(descriptions or {})}
    specs = [
        RewardSpec(
            name=name,
            weight=weight,
            description=texts.get(name, ""),
            member=replace(member, **settings.get(name, {})),
            reference=against[name],
        )
        for (name, member), weight in zip(members.items(), values, strict=True)
    ]
    base_described = _describe(base_spec, hub, name=BASE)
    if source is not None:  # a folder's own tokenizer and settings are what its users know
        own = load_tokenizer(str(given.model), None, hub, given.revision)
        base_described = replace(base_described, tokenizer=own or base_described.tokenizer)
    all_specs = GuidedConfig(base=base_spec.to_dict(), rewards=[spec.to_dict() for spec in specs]).member_specs
    described = {
        name: _describe(spec, hub, name=name)
        for name, spec in all_specs.items()
        if name != BASE and spec.model is not None
    }
    notes = [*said, *_compare(base_described, described.values())]
    for spec in specs:
        notes += _reads_otherwise(spec, base_described, described.get(spec.name, base_described), hub)
        notes += _unlike_its_reference(spec)
        notes += _on_another_revision(spec, base_spec)
    config = GuidedConfig.of(base_spec, specs, [d.config for d in (base_described, *described.values())])
    with new_folder(Path(output)) as folder:
        if bundle:
            bundled(base_spec, specs, config, folder, partial(_copy, hub=hub))
        _write(folder, config, given, base_described, hub)
    return ComposeReport(folder=Path(output), config=config, notes=tuple(notes), source=source)


def _one_of_each(*kinds: Mapping[str, Any]) -> list[str]:
    """All names (raises ConfigError where one comes twice)."""
    names = [name for kind in kinds for name in kind]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two rewards are named {twice[0]!r}; every reward needs a name of its own")
    return names


def _check_names(rewards: Collection[str], *others: Mapping[str, Any] | None) -> None:
    for mapping in others:
        for name in mapping or {}:
            if name != BASE and name not in rewards:
                raise ConfigError(f"there is no member named {name!r}; the members are {', '.join((BASE, *rewards))}")


def _within(folder: Path, specs: Iterable[MemberSpec | None]) -> bool:
    """Whether files of some members lie in a guided folder."""
    places = [place for spec in specs if spec is not None for place in (spec.model, spec.adapter)]
    return any(Path(place).is_relative_to(folder) for place in places if place is not None)


def taken_apart(base: MemberSpec, hub: HubOptions) -> tuple[MemberSpec, dict[str, RewardSpec], Path | None]:
    """The base and the rewards of a guided folder, by references that hold from anywhere, and where that folder is.

    Of another model: `base` itself, no rewards, and no folder.
    """
    config = load_model_config(base, None, hub, name=BASE)
    if not isinstance(config, GuidedConfig):
        return base, {}, None
    folder = local_folder(str(base.model), base.revision, hub)

    def moved(spec: MemberSpec) -> MemberSpec:
        model, adapter = (reference and locate(reference, folder) for reference in (spec.model, spec.adapter))
        return replace(spec, model=model, adapter=adapter)

    rewards = {reward.name: reward.moved(moved) for reward in config.reward_specs}
    return moved(config.base_spec), rewards, folder


def spec_of(reference: str) -> MemberSpec:
    """A local folder by its absolute path, or a hub id with an optional @revision."""
    refuse_file(reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        return MemberSpec(model=str(path.resolve()))
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise MemberError(f"{no_folder(reference)}; give the path of a model folder, or a hub id like ORG/NAME")
    model, _, revision = reference.partition("@")
    return MemberSpec(model=model, revision=revision or None)


def _reward_spec(name: str, reference: str, base: MemberSpec, adapter_model: str | None, hub: HubOptions) -> MemberSpec:
    found = spec_of(reference)
    where = str(found.model)
    if not is_adapter(where, found.revision, hub):
        if adapter_model is not None:
            raise ConfigError(f"reward {name!r} at {reference!r} is a full model, so it goes on no other model")
        return found
    options = {**hub.common(), "revision": found.revision}
    trained_on = host_of(read_adapter_config(where, options, name=name))
    model = adapter_model or trained_on
    if model is None:
        raise MemberError(
            f"the adapter {reference!r} of reward {name!r} does not say which model it was trained on; say it with "
            f"--adapter-model {name}=MODEL"
        )
    try:
        host = spec_of(model)
    except MemberError as error:
        raise MemberError(
            f"the adapter {reference!r} of reward {name!r} was trained on {model!r}, which is not there any more; "
            f"say where it is now with --adapter-model {name}=MODEL"
        ) from error
    on_base = host.model == base.model and (host.revision in (None, base.revision))
    adapter = MemberSpec(adapter=where, adapter_revision=found.revision)
    return adapter if on_base else replace(adapter, model=host.model, revision=host.revision)


def _reference_spec(name: str, reference: str, base: MemberSpec, hub: HubOptions) -> MemberSpec:
    """What a tuned reward is compared with."""
    spec = _reward_spec(name, reference, base, None, hub)
    is_base = spec.adapter is None and (spec.model, spec.revision) == (base.model, base.revision)
    return THE_BASE if is_base else spec


def start_spec(
    name: str, member: MemberSpec, trained: Mapping[str, Any], base: MemberSpec, hub: HubOptions
) -> MemberSpec:
    """The model that a reward was trained from, and is a difference to: of an adapter, the one that it goes on."""
    if member.adapter is not None:
        return MemberSpec(model=member.model, revision=member.revision)
    model, revision = str(trained.get("model")), trained.get("revision")
    try:
        return _reference_spec(name, model if revision is None else f"{model}@{revision}", base, hub)
    except MemberError as error:
        raise MemberError(
            f"the reward {name!r} is a difference to the model that it was trained from, {model}, which is not there "
            f"any more; say where it is now with --reference {name}=MODEL"
        ) from error


def _unlike_its_reference(reward: RewardSpec) -> list[str]:
    """Whether a difference is one of two models that have nothing to do with each other."""
    member = reward.member
    if reward.reference != THE_BASE or member.model is None or member.adapter is None:
        return []
    host = member.model_reference
    return [
        f"{reward.name} is an adapter on {host} and is compared with the base, so at weight 1 that tuned model "
        f"replies by itself; to carry over what tuning has changed, give --reference {reward.name}={host}"
    ]


def _on_another_revision(reward: RewardSpec, base: MemberSpec) -> list[str]:
    """Whether an adapter shares no model with the base for the sake of a revision, which costs a model's memory."""
    member = reward.member
    if member.adapter is None or member.model != base.model or member.revision == base.revision:
        return []
    own = base.model_reference
    return [
        f"{reward.name} is an adapter on {member.model_reference} and the base is {own}, so that model is loaded "
        f"beside the base; where both are the same, give --adapter-model {reward.name}={own}"
    ]


def is_adapter(where: str, revision: str | None, hub: HubOptions) -> bool:
    """Whether there is an adapter and no model by itself (raises MemberError where there is nothing)."""
    if Path(where).is_dir():
        return (Path(where) / ADAPTER_FILE).exists()
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(where, revision=revision, **hub.common()) is not None
    except (OSError, ValueError) as error:
        raise MemberError(f"{no_folder(where)}, and as a hub id it fails: {error}") from error


def _describe(spec: MemberSpec, hub: HubOptions, *, name: str) -> _Described:
    config = load_plain_config(spec, None, hub, name=name)
    tokenizer = load_tokenizer(str(spec.model), None, hub, spec.revision)
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        raise MemberError(f"{name!r} ({spec.model}) is no causal language model: its configuration has no vocab_size")
    label = f"{name} ({spec.model})"
    return _Described(vocabulary=read_vocabulary(tokenizer, size=size, label=label), tokenizer=tokenizer, config=config)


def _compare(base: _Described, members: Iterable[_Described]) -> list[str]:
    """Align every reward's vocabulary with the base's (raises VocabularyError); what to tell the user."""
    notes: list[str] = []
    for member in members:
        label = member.vocabulary.label
        tokens = unknown_tokens(align(base.vocabulary, member.vocabulary), base.vocabulary)
        if tokens:
            written = [token for token in _written(base.tokenizer) if token in tokens]
            always = f"; every prompt has {shown(written)}, so train it with the base's tokenizer" if written else ""
            notes.append(unknown_note(label, tokens) + always)
    return notes


def _written(tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The tokens of a short prompt as `generate` reads it: what a chat template, or a text's beginning, always has."""
    if tokenizer is None:
        return []
    with contextlib.suppress(GenarmError):  # a template that wants more than one turn, say
        ids = encode_prompt(tokenizer, as_conversation("Hi") if tokenizer.chat_template else "Hi")
        return list(dict.fromkeys(tokenizer.convert_ids_to_tokens(ids)))
    return []


def _reads_otherwise(reward: RewardSpec, base: _Described, host: _Described, hub: HubOptions) -> list[str]:
    """In what a reward has learned on other prompts than the base's chat template makes, as far as its files say it.

    `host` is the model that the reward is, or is an adapter on.
    """
    member = reward.member
    if member == MemberSpec(wish=member.wish):  # the base itself
        return []
    tokenizer = host.tokenizer
    where, revision = str(member.model), member.revision
    if member.adapter is not None:
        where, revision = member.adapter, member.adapter_revision
        with contextlib.suppress(MemberError):  # most adapters bring no tokenizer, so they have their model's
            tokenizer = load_tokenizer(where, None, hub, revision) or tokenizer
    label, notes = f"{reward.name} ({where})", []
    templates = [getattr(t, "chat_template", None) for t in (base.tokenizer, tokenizer)]
    if templates[0] != templates[1]:
        notes.append(f"{label} has another chat template than the base; the base's is used for every member")
    settings = training_of(member, hub)
    arguments = settings.get("template_arg")
    if settings.get("raw") and templates[0] is not None:
        notes.append(f"{label} was trained on text without a chat template, so conversations are new to it")
    return notes + [
        f"{label} was trained with --template-arg {argument}; give that to generate, chat and serve as well, or it "
        "reads other prompts than it has learned"
        for argument in (arguments if isinstance(arguments, list) else ())
    ]


def bundled(
    base: MemberSpec,
    rewards: Iterable[RewardSpec],
    config: GuidedConfig,
    folder: Path,
    put: Callable[[str, str | None, Path], bool],
) -> None:
    """Have every member in `folder`/members, each model once, and `config` name it there.

    Args:
        base, rewards: by references that hold from anywhere.
        config: is changed.
        folder: where config.json will be.
        put: brings a reference, at a revision, to a new folder; returns False for one that stays a reference.
    """
    places: dict[tuple[str, str | None], str | None] = {}

    def carry(reference: str, revision: str | None, name: str) -> tuple[str, str | None]:
        key = (reference, revision)
        if key not in places:
            places[key] = f"./members/{name}" if put(reference, revision, folder / "members" / name) else None
        inside = places[key]
        return key if inside is None else (inside, None)

    def carried(member: MemberSpec, name: str) -> MemberSpec:
        if member.model is not None:
            place = name if member.adapter is None else host_folder(name)
            model, revision = carry(member.model, member.revision, place)
            member = replace(member, model=model, revision=revision)
        if member.adapter is not None:
            adapter, revision = carry(member.adapter, member.adapter_revision, name)
            member = replace(member, adapter=adapter, adapter_revision=revision)
        return member

    config.base = carried(base, BASE).to_dict()
    records: list[dict[str, Any]] = []
    for reward in rewards:
        reference = None
        if reward.reference is not None and reward.member.wish is None:
            reference = carried(reward.reference, reference_name(reward.name))
        records.append(replace(reward, member=carried(reward.member, reward.name), reference=reference).to_dict())
    config.rewards = records


def _copy(reference: str, revision: str | None, target: Path, hub: HubOptions) -> bool:
    source = locate(reference, None)
    if not Path(source).is_dir():
        options = {key: value for key, value in hub.common().items() if value is not None}
        try:
            source = snapshot_download(source, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.pt"], **options)
        except (OSError, ValueError) as error:
            raise MemberError(f"cannot download {reference!r} to bundle it: {error}") from error
    shutil.copytree(source, target, ignore=NEVER_COPIED)
    return True


def _write(folder: Path, config: GuidedConfig, base: MemberSpec, described: _Described, hub: HubOptions) -> None:
    if described.tokenizer is not None:
        described.tokenizer.save_pretrained(folder)
    where = locate(str(base.model), folder)
    generation = load_generation_config(where, base.revision, hub, described.config)
    if described.tokenizer is not None:  # so that transformers' own `generate` stops where all else does
        generation.eos_token_id = end_ids(generation, described.tokenizer) or None
    # Not `save_pretrained`, which refuses what bases come with: a temperature, say, where sampling is off.
    generation.to_json_file(folder / "generation_config.json")
    config.save_pretrained(folder)
