"""MOD (multi-objective decoding, arXiv 2406.18853): policies for several objectives, mixed token by token."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.errors import WeightsError
from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Blend, Term
from genarm.sampling import Sampling


def mod(
    policies: Mapping[str, PreTrainedModel],
    weights: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Blend:
    """MOD: softmax(Σ_i λ_i z_i / T), with λ for each of `policies` by name.

    Raises:
        WeightsError: other names than the policies', values that are not finite, or zeros alone.
        VocabularyError, UnsupportedError: as `Blend`.
    """
    if set(weights) != set(policies):
        raise WeightsError(f"λ are given for {', '.join(weights)}, and the policies are {', '.join(policies)}")
    terms = [Term(model=model, members=(name,), factor=weights[name]) for name, model in policies.items()]
    return Blend(terms, tokenizer, sampling, name="MOD")


KIND = Kind(
    name="mod",
    named="policies",
    build=lambda parts: mod(parts.policies, parts.spec.weights, parts.tokenizer, parts.sampling),
    forwards=lambda spec, tokens: tally(*((policy, tokens) for policy in spec.used)),
)
