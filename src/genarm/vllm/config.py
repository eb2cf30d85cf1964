"""A guided folder as vLLM sees it: the base's shape outside, all members inside.

vLLM reads one configuration of one model. `ServedConfig` answers its questions (layers, heads, vocabulary, context)
with the base's, and carries along, into every worker process, what the composite model is built from: which models
there are, which members each of them stands for, and how their vocabularies align.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genarm.errors import MemberError, UnsupportedError
from genarm.model.adapter_files import low_rank_parts, read_adapter, read_adapter_config
from genarm.model.assembly import local_folder
from genarm.model.config import BASE, GuidedConfig, MemberSpec
from genarm.model.loading import HubOptions, load_model_config, load_tokenizer, locate
from genarm.model.vocabulary import Alignment, align, read_vocabulary
from genarm.vllm import ARCHITECTURE

OUTPUT_LAYER = "lm_head"
INTERLEAVED = ("query_key_value", "Wqkv", "c_attn")
"""Fused in the checkpoint in an order that vLLM undoes when it loads the weight: adapters' rows would be mixed up."""

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@dataclass(frozen=True, kw_only=True)
class MemberStream:
    """One member's way through a model: plain, or with a LoRA adapter.

    Attributes:
        member: 0 for the base, i + 1 for reward i.
        name: the member's.
        adapter: the adapter's folder or hub id; None runs the model as it is.
        adapter_revision: its hub revision.
    """

    member: int
    name: str
    adapter: str | None = None
    adapter_revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrunkSpec:
    """A model whose weights are held once, and the members that go through it, in one forward.

    Attributes:
        name: of its first member; the prefix of its layers.
        model: its folder or hub id.
        revision: its hub revision.
        streams: the base comes first where it is among them.
        heads: members of the base's model with an adapter of the output layer alone: they have no way through it of
            their own, as what they say is told from the base's hidden states.
    """

    name: str
    model: str
    revision: str | None
    streams: tuple[MemberStream, ...]
    heads: tuple[MemberStream, ...] = ()


class ServedConfig(GuidedConfig):
    """Configuration of a guided folder inside vLLM; `AutoConfig` makes it once the plug-in is registered.

    Attributes:
        folder: where the guided folder is on this machine.
        base_config: the base's own configuration.
        shapes: digest of all members' own configurations. vLLM names what it has compiled by its configuration, so
            this keeps it from taking what it compiled for an ARM of another shape at the same place.
    """

    folder: str | None = None
    base_config: Any = None
    shapes: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': and the base's configuration is read as well.

        Raises:
            MemberError: the base cannot be found.
        """
        reference = kwargs.get("name_or_path") or kwargs.get("_name_or_path") or config_dict.get("_name_or_path")
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if reference and config.base is not None:
            config.describe(str(reference))
        return result

    def describe(self, reference: str) -> None:
        """Read the members' configurations and answer vLLM's questions with the base's.

        Raises:
            MemberError: they cannot be read.
            UnsupportedError: a wish, for which one request would have to be read twice.
        """
        if self.wishes:
            raise UnsupportedError(
                f"vLLM reads one prompt for all members, so it cannot run the wish {next(iter(self.wishes))!r}; genarm "
                "serve --engine genarm does, or compose the folder without it"
            )
        hub = HubOptions()
        folder = local_folder(reference, None, hub)
        self.folder = str(folder)
        base = load_model_config(self.base_spec, folder, hub, name=BASE)
        text = base.get_text_config()
        if self.max_position_embeddings is not None:  # the smallest among the members
            text.max_position_embeddings = self.max_position_embeddings
        self.base_config = base
        self.shapes = self._shapes(hub)
        self.architectures = [ARCHITECTURE]
        self.tie_word_embeddings = bool(getattr(base, "tie_word_embeddings", False))
        if (quantization := getattr(base, "quantization_config", None)) is not None:
            self.quantization_config = quantization

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The base's, where it is known."""
        return self if self.base_config is None else self.base_config.get_text_config()

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """The models to hold, the base's first; members that name the same one share it."""
        folder = self._place
        streams: dict[tuple[str, str | None], list[MemberStream]] = {}
        for member, (name, spec) in enumerate(self.member_specs.items()):
            host = spec if spec.model is not None else self.base_spec
            adapter = None if spec.adapter is None else locate(spec.adapter, folder)
            stream = MemberStream(member=member, name=name, adapter=adapter, adapter_revision=spec.adapter_revision)
            streams.setdefault((locate(str(host.model), folder), host.revision), []).append(stream)
        return tuple(_trunk(model, revision, group) for (model, revision), group in streams.items())

    def alignments(self) -> list[Alignment]:
        """How every other member's vocabulary relates to the base's (reads their tokenizers).

        Raises:
            MemberError, VocabularyError.
        """
        base, *others = (self._vocabulary(name, spec) for name, spec in self.member_specs.items())
        return [align(base, other) for other in others]

    def check_members(self) -> None:
        """Whether vLLM can run these members as they are described.

        Raises:
            UnsupportedError: a setting that belongs to transformers.
            MemberError, VocabularyError: a member is not there or does not fit.
        """
        for name, spec in self.member_specs.items():
            if spec.device_map is not None or spec.quantization_config is not None:
                setting = "device_map" if spec.device_map is not None else "quantization_config"
                raise UnsupportedError(
                    f"{name!r} has a {setting} in the guided folder's config.json, which is for transformers; vLLM "
                    "places models itself and reads quantised checkpoints (AWQ, GPTQ, compressed-tensors, …) as they "
                    "are: compose the folder without it, with a quantised checkpoint as the member if one is wanted"
                )
        for trunk in self.trunks:  # vLLM would open a pickle where there is nothing else
            if Path(trunk.model).is_dir() and not any(Path(trunk.model).glob("*.safetensors")):
                raise MemberError(f"{trunk.name!r} at {trunk.model!r} has no safetensors file; save the model again")
        self.alignments()

    def _shapes(self, hub: HubOptions) -> str:
        digest = hashlib.sha256()
        for trunk in self.trunks:
            spec = MemberSpec(model=trunk.model, revision=trunk.revision)
            digest.update(load_model_config(spec, None, hub, name=trunk.name).to_json_string().encode())
            for stream in (*trunk.streams, *trunk.heads):
                if stream.adapter is not None:
                    settings = read_adapter_config(
                        stream.adapter, {"revision": stream.adapter_revision}, name=stream.name
                    )
                    digest.update(json.dumps(settings.to_dict(), sort_keys=True, default=sorted).encode())
        return digest.hexdigest()

    def _vocabulary(self, name: str, spec: MemberSpec) -> Any:
        host = spec if spec.model is not None else self.base_spec
        hub = HubOptions()
        tokenizer = load_tokenizer(str(host.model), self._place, hub, host.revision)
        size = load_model_config(host, self._place, hub, name=name).get_text_config().vocab_size
        return read_vocabulary(tokenizer, size=size, label=f"{name} ({host.model})")

    @property
    def _place(self) -> Path:
        if self.folder is None:
            raise MemberError("this guided configuration was not read from a folder; load it with AutoConfig")
        return Path(self.folder)


def _trunk(model: str, revision: str | None, group: list[MemberStream]) -> TrunkSpec:
    heads = [stream for stream in group if group[0].name == BASE and _is_of_the_output(stream)]
    streams = tuple(stream for stream in group if stream not in heads)
    return TrunkSpec(name=group[0].name, model=model, revision=revision, streams=streams, heads=tuple(heads))


def _is_of_the_output(stream: MemberStream) -> bool:
    """Whether a member's adapter is on the output layer alone."""
    if stream.adapter is None:
        return False
    settings = read_adapter_config(stream.adapter, {"revision": stream.adapter_revision}, name=stream.name)
    targets: Any = settings.target_modules
    return ([targets] if isinstance(targets, str) else sorted(targets or ())) == [OUTPUT_LAYER]


def cannot_carry(label: str, layer: str, trunk: TrunkSpec) -> MemberError:
    """What is raised for an adapter of a layer that is no layer of vLLM's."""
    return MemberError(
        f"{label} changes {layer!r}, where {trunk.model} has no linear layer in vLLM that could carry it; "
        "merge it into a full model (peft's merge_and_unload) and compose that instead"
    )


def foresee(folder: str) -> None:
    """Refuse the guided folder `folder` as vLLM would, as far as its files tell; vLLM need not be there.

    Raises:
        GenarmError: in the words in which loading it would fail.
    """
    config = ServedConfig.from_pretrained(folder, name_or_path=folder)
    config.check_members()
    hub = HubOptions()
    for trunk in config.trunks:
        own = load_model_config(MemberSpec(model=trunk.model, revision=trunk.revision), None, hub, name=trunk.name)
        for stream in (*trunk.streams, *trunk.heads):
            if stream.adapter is None:
                continue
            where = {"revision": stream.adapter_revision}
            files = read_adapter(stream.adapter, where, name=stream.name, values=False)
            for layer in low_rank_parts(own, files):
                carried = stream in trunk.heads or layer.rpartition(".")[2] != OUTPUT_LAYER
                if not carried or layer.rpartition(".")[2] in INTERLEAVED:
                    raise cannot_carry(files.label, layer, trunk)


def served_config(model_config: Any) -> ServedConfig:
    """The configuration of the guided model in a vLLM `ModelConfig`."""
    config = model_config.hf_config
    assert isinstance(config, ServedConfig), type(config)
    return config


def install_checks() -> None:
    """Have vLLM check a guided folder when it makes its configuration, before any process is started."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class GuidedChecks(VerifyAndUpdateConfig):
        """vLLM calls these when it has read a configuration."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            from genarm.vllm.weights import processor_name

            config = served_config(model_config)
            _choose_runner()
            config.check_members()
            name = processor_name(config.default_weights)
            given = list(model_config.logits_processors or [])
            if name not in given:
                model_config.logits_processors = [*given, name]

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if vllm_config.speculative_config is not None:
                raise UnsupportedError(
                    "speculative decoding cannot be combined with a guided model inside vLLM; leave "
                    "--speculative-config out"
                )
            if vllm_config.lora_config is not None:
                raise UnsupportedError(
                    "vLLM's own LoRA requests cannot be combined with a guided model; leave --enable-lora out: an ARM "
                    "that is an adapter is named in the guided folder (genarm compose)"
                )

    MODELS_CONFIG_MAP[ARCHITECTURE] = GuidedChecks


def _choose_runner() -> None:
    """Have vLLM's first model runner in every process: the second tells a plug-in too late whose rows are whose."""
    if os.environ.get(_RUNNER, "0").strip().lower() not in ("0", "false"):
        raise UnsupportedError(
            f"guided models run on vLLM's model runner V1, and {_RUNNER}={os.environ[_RUNNER]} asks for V2; unset it"
        )
    os.environ[_RUNNER] = "0"
