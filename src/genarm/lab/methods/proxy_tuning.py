"""Proxy tuning (arXiv 2401.08565) and EFT: a base with the difference that tuning made to a small model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Blend, Term
from genarm.model.config import BASE
from genarm.sampling import Sampling


def proxy_tuning(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    weight: float = 1.0,
) -> Blend:
    """Proxy tuning: softmax((z + w·(z_tuned − z_untuned)) / T), z of the base.

    Raises:
        WeightsError: a weight that is not finite.
        VocabularyError, UnsupportedError: as `Blend`.
    """
    terms = [
        Term(model=base, members=(BASE,)),
        Term(model=tuned, members=("tuned",), factor=weight),
        Term(model=untuned, members=("untuned",), factor=-weight),
    ]
    return Blend(terms, tokenizer, sampling, name="proxy tuning")


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
    forwards=lambda spec, tokens: tally(*((model, tokens) for model in spec.roles.values())),
)
