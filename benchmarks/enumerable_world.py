"""How close does guided decoding come to the optimum it aims at? Everything here is computed exactly.

    python benchmarks/enumerable_world.py

The world: 2 prompts, responses of 4 tokens over a vocabulary of 4, so 256 responses each. A random base (a tiny
Llama) and a random reward r(x, y), one number per whole response. An ARM is trained on exact Bradley–Terry
preferences (all pairs, with their exact probabilities) and guides the base. Compared, by KL divergence to the
optimum π*(y|x) ∝ π_base(y|x) exp(r(x, y) / β) of the KL-regularised objective:

- the base;
- the guided model, which normalises after every token;
- the product of experts π_base · π_r^w, normalised over whole responses: what the ARM says, without the
  approximation of normalising per token;
- the guided model with the ideal ARM, whose conditionals are π*(v | x, y_<t) / π_base(v | x, y_<t), normalised:
  the theory's claim that *some* ARM reaches the optimum exactly.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from genarm import GuidedForCausalLM

V, L = 4, 4  # vocabulary, response length
PROMPTS = (0, 1)
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # [N, L], N = V^L


@dataclass(frozen=True, kw_only=True)
class Distances:
    """KL(·‖π*) in nats, averaged over the prompts."""

    base: float
    guided: float
    product: float
    ideal: float

    def __str__(self) -> str:
        return (
            f"KL(base ‖ optimum)                {self.base:.4f}\n"
            f"KL(guided ‖ optimum)              {self.guided:.4f}\n"
            f"KL(product of experts ‖ optimum)  {self.product:.4f}\n"
            f"KL(ideal ARM ‖ optimum)           {self.ideal:.2e}"
        )


def tiny_llama(seed: int, spread: float) -> PreTrainedModel:
    """A random Llama over the world's vocabulary; `spread` is the standard deviation of its weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=spread,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def conditionals(model: PreTrainedModel, prompt: int) -> Tensor:
    """Log-probs [N, L, V] of every next token along every response; a model's logits may be log-probs already."""
    ids = torch.cat([torch.full((len(RESPONSES), 1), prompt), RESPONSES], dim=1)
    return model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def sequence_log_probs(conditionals_NLV: Tensor) -> Tensor:
    """Log-prob [N] of each whole response."""
    return conditionals_NLV.gather(-1, RESPONSES[..., None])[..., 0].sum(-1)


def train_on_exact_preferences(model: PreTrainedModel, rewards: dict[int, Tensor], beta_r: float, steps: int) -> float:
    """Minimise the ARM loss in expectation over all pairs; returns how far the last loss is above its lower bound."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    excess = float("nan")
    for _ in range(steps):
        loss = excess_sum = torch.zeros(())
        for prompt, reward_N in rewards.items():
            wins_NN = torch.sigmoid(reward_N[:, None] - reward_N[None]).float()  # Bradley–Terry
            score_N = sequence_log_probs(conditionals(model, prompt)).float()
            margins_NN = beta_r * (score_N[:, None] - score_N[None])
            nll = F.binary_cross_entropy_with_logits(margins_NN, wins_NN)
            loss = loss + nll
            excess_sum = excess_sum + nll.detach() - F.binary_cross_entropy(wins_NN, wins_NN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        excess = float(excess_sum)
    return excess / len(rewards)


def kl(log_p_N: Tensor, log_q_N: Tensor) -> float:
    """KL(p‖q) of two distributions over responses, given unnormalised log-probs."""
    log_p_N, log_q_N = log_p_N.log_softmax(0), log_q_N.log_softmax(0)
    return float((log_p_N.exp() * (log_p_N - log_q_N)).sum())


def ideal_arm(base_NLV: Tensor, optimum_N: Tensor) -> Tensor:
    """Conditionals [N, L, V] of the ARM whose per-token product with the base is the optimum."""
    tree = optimum_N.log_softmax(0).exp().reshape((V,) * L)
    steps = []
    for t in range(L):
        marginal = tree.sum(dim=tuple(range(t + 1, L))) if t + 1 < L else tree
        conditional = marginal / marginal.sum(-1, keepdim=True)  # [V, …, V]: π*(y_t | y_<t)
        along = conditional.reshape(V**t, V).repeat_interleave(V ** (L - t), dim=0)
        steps.append((along.log() - base_NLV[:, t]).log_softmax(-1))
    return torch.stack(steps, dim=1)


@torch.no_grad()
def measure(
    base: PreTrainedModel, arm: PreTrainedModel, rewards: dict[int, Tensor], beta: float, w: float
) -> Distances:
    """All four distances, by enumeration."""
    guided = GuidedForCausalLM.from_members(base, {"r": arm}, weights={"r": w})
    totals = dict.fromkeys(("base", "guided", "product", "ideal"), 0.0)
    for prompt, reward_N in rewards.items():
        base_NLV, arm_NLV = conditionals(base, prompt), conditionals(arm, prompt)
        base_N = sequence_log_probs(base_NLV)
        optimum_N = base_N + reward_N / beta
        ideal_NLV = (base_NLV + ideal_arm(base_NLV, optimum_N)).log_softmax(-1)
        candidates = {
            "base": base_N,
            "guided": sequence_log_probs(conditionals(guided, prompt)),
            "product": base_N + w * sequence_log_probs(arm_NLV),
            "ideal": sequence_log_probs(ideal_NLV),
        }
        for name, log_p_N in candidates.items():
            totals[name] += kl(log_p_N, optimum_N) / len(rewards)
    return Distances(**totals)


def run(seed: int = 0, *, beta: float = 1.0, beta_r: float = 1.0, spread: float = 1.0, steps: int = 600) -> Distances:
    """Train the ARM in the world of `seed` and measure; w = β_r / β makes π_r^w ∝ exp(r/β)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = {x: spread * torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64) for x in PROMPTS}
    base, arm = tiny_llama(seed, 0.35), tiny_llama(seed + 1000, 0.05)
    excess = train_on_exact_preferences(arm, rewards, beta_r, steps)
    assert excess < 0.02, f"the ARM did not learn its preferences: {excess:.3f} nats above the lower bound"
    return measure(base, arm, rewards, beta, beta_r / beta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many worlds (default 3)")
    for seed in range(parser.parse_args().seeds):
        for beta in (2.0, 1.0, 0.5):
            print(f"seed {seed}, β = {beta:g}\n{run(seed, beta=beta)}\n")


if __name__ == "__main__":
    main()
