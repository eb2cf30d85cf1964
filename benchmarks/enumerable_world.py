"""How close does guided decoding come to the optimum it aims at? Everything here is computed exactly.

    python benchmarks/enumerable_world.py            # the paper's loss, three worlds
    python benchmarks/enumerable_world.py --losses   # every loss, on the base that it was trained through and on others
    python benchmarks/enumerable_world.py --weights  # `product` through a weight or a range, at those it serves

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

With --losses, each loss of `genarm train` that learns from pairs trains the same network for as many steps, and guides
the base that it was trained through, the same base with noise on its logits, and another base, each towards its own
optimum; beside it, the ideal ARM of the first base.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from genarm import GuidedForCausalLM
from genarm.training.losses.through import guided_log_probs, guided_rewards, reward_log_probs

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
    return conditionals_of_all(model, [prompt])[0]


def conditionals_of_all(model: PreTrainedModel, prompts: list[int]) -> Tensor:
    """The same for several prompts, [prompts, N, L, V], in one forward."""
    begun = RESPONSES[::V, :-1]  # what the last token comes after: each prefix once
    ids = torch.cat([torch.tensor(prompts).repeat_interleave(len(begun))[:, None], begun.repeat(len(prompts), 1)], 1)
    found = model(ids, use_cache=False).logits.double().log_softmax(-1).repeat_interleave(V, dim=0)
    return found.view(len(prompts), len(RESPONSES), L, V)


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


# --- every loss -----------------------------------------------------------------------------------------------------

LOSSES = ("arm", "reference", "product", "product, start model")
STARTS = {"small": "a small random network", "base": "a copy of the base"}
BASES = ("own", "noise 0.5", "noise 1.0", "another")


def rho(own_NLV: Tensor, start_NLV: Tensor, loss: str) -> Tensor:
    """What a reward adds to the base's log-probs, at weight 1: a difference to its start or not."""
    return reward_log_probs(own_NLV, start_NLV if loss in ("reference", "product") else None)


def train_by(
    loss: str,
    arm: PreTrainedModel,
    base: PreTrainedModel,
    rewards: dict[int, Tensor],
    *,
    beta_r: float,
    weights: tuple[float, float],
    steps: int,
) -> None:
    """Minimise a loss of `genarm train` in expectation over all pairs, through `base` at weights from a range."""
    with torch.no_grad():
        fixed = {x: (conditionals(base, x), conditionals(arm, x)) for x in rewards}
    wins = {x: torch.sigmoid(reward_N[:, None] - reward_N) for x, reward_N in rewards.items()}
    optimizer = torch.optim.Adam(arm.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    labels = RESPONSES.reshape(-1)
    for _ in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        w = float(torch.empty(()).uniform_(*weights))
        own = conditionals_of_all(arm, [*rewards])
        for own_NLV, (prompt, (base_NLV, start_NLV)) in zip(own, fixed.items(), strict=True):
            gain_NLV = rho(own_NLV, start_NLV, loss)
            if loss.startswith("product"):
                weight_C = torch.full((len(labels),), w, dtype=torch.float64)
                tokens = guided_rewards(labels, base_NLV.reshape(-1, V), gain_NLV.reshape(-1, V), weight_C, None)
                score_N = tokens.view(-1, L).sum(-1)
            else:
                score_N = sequence_log_probs(gain_NLV)
            total = total + F.binary_cross_entropy_with_logits(beta_r * (score_N[:, None] - score_N), wins[prompt])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()


def noise(seed: int, spread: float) -> Tensor:
    """Noise [N, L, V] on the logits of every prefix."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for t in range(L):
        table = spread * torch.randn(V**t, V, generator=generator, dtype=torch.float64)
        parts.append(table.repeat_interleave(V ** (L - t), dim=0))
    return torch.stack(parts, dim=1)


def bases_of(base: PreTrainedModel, seed: int, prompt: int) -> dict[str, Tensor]:
    """Conditionals [N, L, V] of the base that is trained through, of noisy ones, and of another."""
    own = conditionals(base, prompt)
    noisy = {f"noise {x}": (own + noise(97 * seed + prompt, x)).log_softmax(-1) for x in (0.5, 1.0)}
    return {"own": own, **noisy, "another": conditionals(tiny_llama(seed + 500, 0.35), prompt)}


def share_removed(
    gains: Mapping[int, Tensor], base: PreTrainedModel, seed: int, rewards: dict[int, Tensor], w: float, beta: float
) -> dict[str, float]:
    """Share of KL(base ‖ optimum) that guiding removes, on each base; `gains` has log ρ [N, L, V] by prompt."""
    before, after = dict.fromkeys(BASES, 0.0), dict.fromkeys(BASES, 0.0)
    for prompt, reward_N in rewards.items():
        for name, base_NLV in bases_of(base, seed, prompt).items():
            base_N = sequence_log_probs(base_NLV)
            optimum_N = base_N + reward_N / beta
            guided_N = sequence_log_probs(guided_log_probs(base_NLV, gains[prompt], w, None))
            before[name] += kl(base_N, optimum_N)
            after[name] += kl(guided_N, optimum_N)
    return {name: 1 - after[name] / before[name] for name in BASES}


@torch.no_grad()
def compare_losses(
    seed: int, *, beta: float, steps: int, start: str, losses: Sequence[str] = LOSSES
) -> dict[str, dict[str, float]]:
    """{loss: {base: share of the way to its optimum}}, the ideal ARM of the base trained through last."""
    generator = torch.Generator().manual_seed(seed)
    rewards = {x: torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64) for x in PROMPTS}
    base, w = tiny_llama(seed, 0.35), 1 / beta
    found = {}
    for loss in losses:
        arm = copy.deepcopy(base) if start == "base" else tiny_llama(seed + 1000, 0.05)
        before = {x: conditionals(arm, x) for x in rewards}
        with torch.enable_grad():
            train_by(loss, arm, base, rewards, beta_r=1.0, weights=(w, w), steps=steps)
        gains = {x: rho(conditionals(arm, x), before[x], loss) for x in rewards}
        found[loss] = share_removed(gains, base, seed, rewards, w, beta)
    own = {x: conditionals(base, x) for x in rewards}
    ideal = {x: ideal_arm(own[x], sequence_log_probs(own[x]) + rewards[x] / beta) for x in rewards}
    return {**found, "ideal ARM": share_removed(ideal, base, seed, rewards, w, beta)}


@torch.no_grad()
def compare_weights(seed: int, *, steps: int) -> dict[str, dict[str, float]]:
    """{weights trained through: {weight: share removed on the base trained through}}, by `product`."""
    generator = torch.Generator().manual_seed(seed)
    rewards = {x: torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64) for x in PROMPTS}
    base = tiny_llama(seed, 0.35)
    found: dict[str, dict[str, float]] = {}
    for weights in ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (0.5, 2.0)):
        arm = tiny_llama(seed + 1000, 0.05)
        before = {x: conditionals(arm, x) for x in rewards}
        torch.manual_seed(seed)
        with torch.enable_grad():
            train_by("product", arm, base, rewards, beta_r=1.0, weights=weights, steps=steps)
        gains = {x: rho(conditionals(arm, x), before[x], "product") for x in rewards}
        found["-".join(f"{w:g}" for w in dict.fromkeys(weights))] = {
            f"{w:g}": share_removed(gains, base, seed, rewards, w, 1 / w)["own"] for w in (0.5, 1.0, 2.0)
        }
    return found


def print_losses(seeds: int, steps: int, betas: Sequence[float]) -> None:
    for beta, start in itertools.product(betas, STARTS):
        worlds = [compare_losses(seed, beta=beta, steps=steps, start=start) for seed in range(seeds)]
        print(f"β = {beta:g}, started from {STARTS[start]}: share of KL(base ‖ optimum) removed, in each world")
        for loss in worlds[0]:
            cells = [" ".join(f"{world[loss][base]:5.2f}" for world in worlds) for base in BASES]
            print(f"| {loss} | {' | '.join(cells)} |", flush=True)


def print_weights(seeds: int, steps: int) -> None:
    print(f"product at weights | {' | '.join(('0.5', '1', '2'))} |")
    tables = [compare_weights(seed, steps=steps) for seed in range(seeds)]
    for weights in tables[0]:
        cells = [" ".join(f"{table[weights][w]:5.2f}" for table in tables) for w in ("0.5", "1", "2")]
        print(f"| {weights} | {' | '.join(cells)} |", flush=True)


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
    parser.add_argument("--losses", action="store_true", help="compare every loss of genarm train, on several bases")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each training with --losses")
    parser.add_argument("--beta", type=float, nargs="+", default=[1.0, 0.5, 2.0], help="of the optimum, with --losses")
    parser.add_argument("--weights", action="store_true", help="train through several weights, and serve others")
    arguments = parser.parse_args()
    if arguments.losses:
        print_losses(arguments.seeds, arguments.steps, arguments.beta)
    if arguments.weights:
        print_weights(arguments.seeds, arguments.steps)
    if arguments.losses or arguments.weights:
        return
    for seed in range(arguments.seeds):
        for beta in (2.0, 1.0, 0.5):
            print(f"seed {seed}, β = {beta:g}\n{run(seed, beta=beta)}\n")


if __name__ == "__main__":
    main()
