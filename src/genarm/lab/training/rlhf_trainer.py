"""A policy by reinforcement learning against trajectory rewards, by trl's `RLOOTrainer`.

The objective is E[Σ_k w_k r_k(x, y)] − β KL(π ‖ π_ref), where π_ref is the model that training starts from. With
several rewards r_k and a vector of weights w this is MORL.

trl has two online trainers. `RLOOTrainer` (arXiv 2402.14740) takes β · log(π / π_ref) off each reply's reward and
compares the rest with the mean of the other replies to the same prompt: that is the gradient of the objective above,
unbiased. `GRPOTrainer` divides rewards by their spread within a prompt and puts the KL term into the loss per token, so
that the same β and weights would mean something else for every prompt; hence it is not used.

Every reply is used for one step, so the policy that draws is the policy that learns. There is no dropout.

Shapes: B replies, T positions, K rewards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from genarm.errors import ConfigError
from genarm.lab.replies import SampledReply, sample_replies
from genarm.lab.training.rewards import Reward, load_rewards
from genarm.lab.training.rlhf import replies_per_prompt
from genarm.lab.training.trainers import (
    Baseline,
    TranslatedLog,
    make_policy,
    reference,
    sequence_log_probs,
)
from genarm.sampling import Sampling, derive_seed
from genarm.statistics import mean
from genarm.training.data import Ids
from genarm.training.kinds import Setup


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Prompts that the policy replies to at every evaluation, `batch` at a time, always with the same seed."""

    prompts: Sequence[Ids]
    sampling: Sampling
    batch: int
    seed: int


class RlhfTrainer(Baseline, RLOOTrainer, TranslatedLog):
    """trl's `RLOOTrainer` on prompts that are tokens already, evaluated by the rewards of replies to held-out ones."""

    def __init__(self, *, rewards: Sequence[Reward], held_out: HeldOut | None, **options: Any) -> None:
        super().__init__(reward_funcs=[_reward_function(reward) for reward in rewards], **options)
        self.rewards = rewards
        self.held_out = held_out

    def _tokenize_prompts(self, prompts: list[Ids]) -> tuple[list[Ids], None, dict[str, Any]]:
        """Prompts are ids; trl has images and more beside them."""
        return prompts, None, {}

    def translated(self, logs: Mapping[str, float]) -> dict[str, float]:
        """The figures of an entry of trl's log of the training, under our names; KL in nats per reply."""
        length = logs["completions/mean_length"]
        return {
            "reward": logs["reward"],
            "kl": logs["kl"] * length,
            "length": length,
            "cut": logs["completions/clipped_ratio"],
            **{f"reward/{reward.name}": logs[f"rewards/{reward.name}/mean"] for reward in self.rewards},
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reply to the held-out prompts: mean rewards, and log π − log π_ref in nats per reply."""
        assert self.held_out is not None
        start = time.perf_counter()
        policy = self.accelerator.unwrap_model(self.model).eval()
        tokenizer: Any = self.processing_class
        replies: list[SampledReply] = []
        kl: list[float] = []
        for number, first in enumerate(range(0, len(self.held_out.prompts), self.held_out.batch)):
            prompts = self.held_out.prompts[first : first + self.held_out.batch]
            seed = derive_seed(self.held_out.seed, number)
            drawn = sample_replies(policy, tokenizer, prompts, self.held_out.sampling, seed=seed)
            replies += drawn
            kl += self._log_ratios(policy, prompts, drawn)
        figures = self._reward_figures([list(reply.token_ids) for reply in replies])
        figures |= {"kl": sum(kl) / len(kl), "length": sum(len(reply.token_ids) for reply in replies) / len(replies)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock = (self._clock or start) + time.perf_counter() - start
        return metrics

    def _reward_figures(self, replies: list[Ids]) -> dict[str, float]:
        assert self.held_out is not None
        scores_KB = torch.tensor([reward.score(self.held_out.prompts, replies) for reward in self.rewards])
        weights_K = torch.tensor([reward.weight for reward in self.rewards])
        totals = (weights_K @ scores_KB).tolist()
        figures = {"reward": sum(totals) / len(totals), "prompts": float(len(totals))}
        if len(totals) > 1:
            interval = mean(totals)
            if not math.isnan(interval.low):
                figures |= {"reward_low": interval.low, "reward_high": interval.high}
        means = zip(self.rewards, scores_KB.mean(-1).tolist(), strict=True)
        return figures | {f"reward/{reward.name}": value for reward, value in means}

    @torch.no_grad()
    def _log_ratios(self, policy: Any, prompts: Sequence[Ids], replies: Sequence[SampledReply]) -> list[float]:
        rows = [torch.tensor([*prompt, *reply.token_ids]) for prompt, reply in zip(prompts, replies, strict=True)]
        ids_BT = pad_sequence(rows, batch_first=True).to(policy.device)
        lengths_B = torch.tensor([len(row) for row in rows], device=policy.device)
        starts_B = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        places_T = torch.arange(ids_BT.shape[1], device=policy.device)
        mask_BT = (places_T < lengths_B[:, None]).long()
        response_mask_BT = mask_BT * (places_T >= starts_B[:, None])
        policy_B = sequence_log_probs(policy, ids_BT, mask_BT, response_mask_BT)
        with reference(self) as frozen:
            reference_B = sequence_log_probs(frozen, ids_BT, mask_BT, response_mask_BT)
        ratios: list[float] = (policy_B - reference_B).tolist()
        return ratios


def make_trainer(setup: Setup) -> RlhfTrainer:
    """The trainer of a policy.

    Raises:
        GenarmError: the model, the rewards or the settings do not serve.
    """
    config, data, longest = setup.config, setup.data, setup.config.max_response_tokens
    assert config.rewards is not None
    assert longest is not None
    completions, generations = config.batch_size * config.accumulation, replies_per_prompt(config)
    if len(data.training) * generations < completions:
        raise ConfigError(
            f"a step has {completions} replies to {completions // generations} prompts, and there are "
            f"{len(data.training)} prompts only; lower --batch-size or --accumulation"
        )
    rewards = load_rewards(config.rewards, setup.tokenizer)
    held_out = HeldOut(
        prompts=data.held_out or (),
        sampling=Sampling(max_new_tokens=longest),
        batch=completions,
        seed=config.seed,
    )

    options = {
        "num_generations": generations,
        "num_generations_eval": 1,
        "max_completion_length": longest,
        "reward_weights": [reward.weight for reward in rewards],
    }
    shown = held_out if data.held_out else None
    return make_policy(setup, RlhfTrainer, RLOOConfig, _dataset, options, rewards=rewards, held_out=shown)


def _dataset(prompts: Sequence[Ids]) -> Dataset:
    return Dataset.from_dict({"prompt": [list(ids) for ids in prompts]})


def _reward_function(reward: Reward) -> Callable[..., list[float | None]]:
    """`reward` as trl calls it: with the replies' texts and more, of which the ids alone count here."""

    def score(*, prompts: list[Ids], completion_ids: list[Ids], **_: Any) -> list[float | None]:
        return list(reward.score(prompts, completion_ids))

    score.__name__ = reward.name
    return score
