"""An ARM that judges whole replies: r(x, y) = Σ_t log π_r(y_t | x, y_<t), less that of its start where it is one."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.errors import VocabularyError
from genarm.lab.methods.sample import Sample
from genarm.lab.prefix import Ids
from genarm.lab.replies import SampledReply
from genarm.sampling import Sampling


class ArmReward:
    """The reward of an ARM (GenARM, arXiv 2410.08193), over the ids that its tokenizer has."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str,
        start: PreTrainedModel | None = None,
    ) -> None:
        """Ready to score.

        Args:
            model: a causal LM, its adapter merged.
            tokenizer: its own.
            label: what messages call it.
            start: the model that it is a difference to, if it is one.

        Raises:
            VocabularyError: a model knows fewer ids than the tokenizer has.
        """
        self.tokenizer = tokenizer
        self.label = label
        self._models = [Sample(one, tokenizer, Sampling()) for one in (model, start) if one is not None]

    @property
    def passes(self) -> int:
        """Forwards that a score takes: one, and one of the start."""
        return len(self._models)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a policy with another vocabulary (raises VocabularyError)."""
        if self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise VocabularyError(
                f"{self.label} has other tokens than the policy; train it on a model of the same family"
            )

    def score(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[float]:
        """r(x, y) of each reply to its prompt, end-of-turn tokens as they are."""
        said = [SampledReply(text="", token_ids=tuple(ids), finish_reason="stop") for ids in replies]
        values = [model.log_probs(prompts, said) or [] for model in self._models]
        return [own - sum(start) for own, *start in zip(*values, strict=True)]
