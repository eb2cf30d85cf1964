"""Frozen models beside the one that is trained: its own start, and the base that it shall guide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from genarm.errors import ConfigError, MemberError, VocabularyError
from genarm.model.config import GuidedConfig
from genarm.model.contract import load_whole
from genarm.model.references import ModelFiles, open_files, positions_together
from genarm.model.vocabulary import Alignment, align, read_vocabulary
from genarm.training.losses.product import model_name, weight_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genarm.data.tokens import TokenPair
    from genarm.training.config import TrainConfig
    from genarm.training.kinds import Setup


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A model that is not trained; without one of its own, the trained model with its adapter switched off."""

    model: PreTrainedModel | None = None

    @contextmanager
    def running(self, trained: nn.Module) -> Iterator[nn.Module]:
        """The model, in inference mode, where `trained` is the one that is trained (not wrapped for processes)."""
        if self.model is not None:
            yield self.model
            return
        peft: Any = trained
        training = trained.training
        trained.eval()  # the model's own dropout, too
        with peft.disable_adapter():
            yield trained
        trained.train(training)

    def is_below_head(self, trained: nn.Module) -> bool:
        """Whether it has the trained model's hidden states, as nothing before the output layer is trained."""
        found: Any = trained
        if self.model is not None:
            return False
        return [one for one in found.modules() if isinstance(one, BaseTunerLayer)] == [found.get_output_embeddings()]

    def adapted_head(self, trained: nn.Module) -> bool:
        """Whether the output layer says something else once the adapter is on again."""
        found: Any = trained
        head = None if self.model is not None else found.get_output_embeddings()
        return head is not None and any(
            isinstance(module, BaseTunerLayer) or hasattr(module, "modules_to_save") for module in head.modules()
        )


@dataclass(frozen=True, kw_only=True)
class Through:
    """What an ARM is trained through.

    Attributes:
        base: the base that it shall guide.
        alignment: of the ARM's ids with the base's; None where they are the same.
        low, high: the weights that it shall serve.
    """

    base: Frozen
    alignment: Alignment | None
    low: float
    high: float


def start_of(config: TrainConfig) -> Frozen:
    """The model as it starts: of an adapter the model below it, or else a copy (raises MemberError).

    A resumed run loads it from the same place, whose content is checked then.
    """
    if config.adapter:
        return Frozen()
    model = load_whole(
        AutoModelForCausalLM,
        config.model,
        what="the model of --model",
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
    )
    return Frozen(model=model.eval().requires_grad_(False))


def base_files(config: TrainConfig) -> ModelFiles | None:
    """The base of --through by its files; None where it is the model itself, as it starts.

    Raises:
        MemberError: there is no such model, it lacks a tokenizer, or is none that is one plain model.
        ConfigError: its context is shorter than what is trained on.
    """
    if config.through in (None, model_name(config)):
        return None
    files = open_files(str(config.through), trust_remote_code=config.trust_remote_code)
    if isinstance(files.config, GuidedConfig):
        raise MemberError(f"{config.through} is a guided folder; give --through its base, or another plain causal LM")
    wanted = int(config.max_prompt_tokens or 0) + int(config.max_response_tokens or 0)
    most = positions_together(files.config)
    if most is not None and wanted > most:
        raise ConfigError(
            f"the base {config.through} has {most} positions for texts read together, and prompts and responses may "
            f"have {wanted} tokens; lower --max-prompt-tokens or --max-response-tokens"
        )
    return files


def files_of_model(config: TrainConfig) -> ModelFiles:
    """The model that is trained, by its files (raises MemberError)."""
    return open_files(model_name(config), trust_remote_code=config.trust_remote_code)


def align_base(files: ModelFiles, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Alignment:
    """How the ids of the model that is trained relate to those of the base (raises VocabularyError)."""
    own = files_of_model(config)
    sizes = [int(one.config.get_text_config().vocab_size) for one in (files, own)]
    return align(
        read_vocabulary(files.tokenizer, size=sizes[0], label=f"the base ({config.through})"),
        read_vocabulary(tokenizer, size=sizes[1], label=f"the model ({config.model})"),
    )


def check_known(pairs: Iterable[TokenPair], alignment: Alignment, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse data with tokens that the base does not know (raises VocabularyError)."""
    unknown = frozenset(alignment.unknown)
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            token = next((i for i in ids if i >= alignment.base_size or i in unknown), None)
            if token is not None:
                raise VocabularyError(
                    f"the data hold {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), which the base of "
                    "--through does not know; train a model with the base's tokenizer and chat template"
                )


def through_options(setup: Setup, from_zero: bool) -> dict[str, Any]:
    """What a `ThroughTrainer` is made of: the base and the weights, and the start of a reward that begins at zero.

    Raises:
        MemberError: a model cannot be loaded.
        VocabularyError: the base reads other tokens than the model.
    """
    config = setup.config
    files = base_files(config)
    low, high = weight_range(config)
    start = start_of(config) if from_zero or files is None else None
    base, alignment = start, None
    if files is not None:
        alignment = align_base(files, setup.tokenizer, config)
        check_known([*setup.data.training, *(setup.data.held_out or ())], alignment, setup.tokenizer)
        base = Frozen(model=files.load(device=str(PartialState().device)))
    assert base is not None
    through = Through(base=base, alignment=alignment, low=low, high=high)
    return {"start": start if from_zero else None, "through": through}
