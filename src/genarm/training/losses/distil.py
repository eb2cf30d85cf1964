"""An ARM that has the effect of a wish in words, without preference pairs.

The base that reads the wish as its system text answers prompts; the ARM learns, by the KL divergence over the whole
vocabulary at every token of these replies, to make of the base what the wish makes of it: π_b · ρ^w / Z shall be
π_b · (π_wished / π_b)^w / Z. So a wish costs no second row of the base, and works where there are no contexts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from genarm.errors import ConfigError
from genarm.training.losses.product import Product, starts_at_zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genarm.training.config import TrainConfig
    from genarm.training.data import TrainData
    from genarm.training.losses.replies import WishedReplies
    from genarm.training.trainer import ArmTrainer


class Distil(Product):
    """Learns what a system text makes of the base, from replies that the base draws with it."""

    name = "distil"
    takes: ClassVar = {
        **{name: value for name, value in Product.takes.items() if name != "beta"},
        "wish": None,
        "prompts": None,
    }
    lacks: ClassVar = {"beta": "a wish comes without pairs"}
    title = "an autoregressive reward model that has the effect of a wish"
    plots: ClassVar = {"loss": "KL from the wished-for policy, nats per token"}

    def check(self, config: TrainConfig) -> None:
        """A wish, and prompts (raises ConfigError)."""
        super().check(config)
        if config.wish is None or config.prompts is None:
            raise ConfigError("--loss distil learns a wish from prompts: give --wish TEXT and --prompts FILE")
        if config.data != config.prompts:
            raise ConfigError("--loss distil reads --prompts and no --data; leave that out")

    def resolved(self, config: TrainConfig) -> dict[str, Any]:
        """As of a product, and the words of the wish."""
        from genarm.training.loading import absolute

        prompts = absolute(str(config.prompts))
        return {**super().resolved(config), "wish": read_wish(str(config.wish)), "prompts": prompts}

    def load(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[WishedReplies]:
        """Replies of the wished-for model: those of an earlier start of this run, or new ones."""
        from genarm.training.losses.replies import load_replies

        return load_replies(config, tokenizer)

    def keep(self, config: TrainConfig, data: TrainData[Any]) -> None:
        """The replies, so that a resumed run learns from the same ones."""
        from genarm.training.losses.replies import write_replies

        write_replies(config.output, data)

    def trainer_class(self) -> type[ArmTrainer]:
        """Whose loss is a divergence."""
        from genarm.training.losses.distil_trainer import DistilTrainer

        return DistilTrainer

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on, and what it is for."""
        what = "log π − log π_start" if starts_at_zero(self, config) else "its log-probability"
        return (
            f"A {config.made_of} `{config.model}` that makes of the frozen base "
            f"`{self.base(config)}` what the system text “{config.wish}” makes of it, without that text: trained by "
            f"the KL divergence on replies of the base that reads it, at weight {config.through_weight or 1}. The "
            f"reward of a token is {what}."
        )

    def leak(self, count: int) -> str:
        """Of prompts."""
        return f"{count} held-out prompts are trained on too, which flatters the held-out divergence"

    def evaluated(self, metrics: Mapping[str, float]) -> str:
        """How far the guided policy, and the base, are from what was wished for."""
        return (
            f"KL(wished ‖ guided) {metrics['eval_loss']:.4f} nats per token, KL(wished ‖ base) "
            f"{metrics['eval_kl_base']:.4f}"
        )

    def figure(self, metrics: Mapping[str, float]) -> str | None:
        """The same."""
        return self.evaluated(metrics) if "eval_kl_base" in metrics else None

    def summary(self, metrics: Mapping[str, float]) -> list[str]:
        """The same."""
        found = self.figure(metrics)
        return [] if found is None else [f"held-out {found}"]

    def held_out(self, metrics: Mapping[str, float]) -> list[str]:
        """The same, and of how many tokens."""
        found = self.figure(metrics)
        if found is None:
            return ["## Held-out divergence", "", "No prompts were held out."]
        return [
            "## Held-out divergence",
            "",
            f"{found}: means over {metrics['eval_tokens']:,.0f} tokens of replies that the wished-for model drew to "
            "held-out prompts. Its share that is gone says how much of the wish's effect the reward has.",
        ]


def read_wish(text: str) -> str:
    """The words of a wish, which `@FILE` reads from a file (raises ConfigError)."""
    if not text.startswith("@"):
        return text
    try:
        found = Path(text[1:]).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text of --wish {text}: {error}") from error
    if not found:
        raise ConfigError(f"the file of --wish {text} is empty; write into it what is wished for")
    return found
