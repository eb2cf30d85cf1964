"""Proxy tuning (arXiv 2401.08565) and EFT: a base with the difference that tuning made to a small model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Sample
from genarm.model.config import BASE, reference_name
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling

_TUNED = "tuned"
_UNTUNED = reference_name(_TUNED)


def proxy_tuning(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    weight: float = 1.0,
) -> Sample:
    """Proxy tuning: softmax((z + w·(z_tuned − z_untuned)) / T), z of the base.

    Raises:
        WeightsError: a weight that is not finite.
        ConfigError: the tuned model is the untuned one.
        VocabularyError: models with different tokens.
        UnsupportedError: as `Sample`.
    """
    model = GuidedForCausalLM.from_members(
        base,
        {_TUNED: tuned},
        references={_TUNED: untuned},
        tokenizers=dict.fromkeys((BASE, _TUNED, _UNTUNED), tokenizer),
    )
    return Sample(model, tokenizer, sampling, weights={_TUNED: weight}, names={_UNTUNED: "untuned"})


KIND = Kind(
    name="proxy-tuning",
    roles=("base", "tuned", "untuned"),
    settings={"weight": 1.0},
    build=lambda parts: proxy_tuning(
        parts.model("base"),
        parts.model("tuned"),
        parts.model("untuned"),
        parts.tokenizer,
        parts.sampling,
        **parts.spec.numbers,
    ),
    forwards=lambda spec, tokens: tally(*((model, tokens) for model in dict.fromkeys(spec.roles.values()))),
    total=lambda *_: 1.0,
)
