"""MOD (multi-objective decoding, arXiv 2406.18853): policies for several objectives, mixed token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.errors import WeightsError
from genarm.lab.methods.interface import Kind, tally
from genarm.lab.methods.sample import Sample
from genarm.model.config import BASE
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.weights import weight_row
from genarm.sampling import Sampling


def mod(
    policies: Mapping[str, PreTrainedModel],
    weights: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Sample:
    """MOD: softmax(Σ_i λ_i z_i / T), with λ for each of `policies` by name.

    With weights that add up to 1 that is the first policy with the differences of the others to it, and with other
    sums L that at the temperature T/L.

    Raises:
        WeightsError: other names than the policies', values that are not finite, or a sum that is not above 0.
        VocabularyError: policies with different tokens.
        UnsupportedError: as `Sample`.
    """
    if set(weights) != set(policies):
        raise WeightsError(f"λ are given for {', '.join(weights)}, and the policies are {', '.join(policies)}")
    total = sum(weight_row(weights, dict.fromkeys(policies, 1.0)))
    if total <= 0:
        raise WeightsError(f"the λ of MOD add up to {total:g}; a mixture of policies needs a sum above 0")
    first, *others = (name for name in policies if weights[name] != 0)
    names = {BASE: first} | {f"policy-{i}": name for i, name in enumerate(others)}
    mixed = {member: policies[name] for member, name in names.items() if member != BASE}
    model = GuidedForCausalLM.from_members(
        policies[first],
        mixed,
        references=dict.fromkeys(mixed, policies[first]),
        tokenizers=dict.fromkeys(names, tokenizer),
    )
    shares = {member: weights[names[member]] / total for member in mixed}
    cooled = replace(sampling, temperature=sampling.temperature / total)
    return Sample(model, tokenizer, cooled, weights=shares, names=names)


KIND = Kind(
    name="mod",
    named="policies",
    build=lambda parts: mod(parts.policies, parts.spec.weights, parts.tokenizer, parts.sampling),
    forwards=lambda spec, tokens: tally(*((policy, tokens) for policy in spec.used)),
    total=lambda spec, _: sum(spec.weights.values()),
)
