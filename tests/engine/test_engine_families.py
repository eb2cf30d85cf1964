"""The engine over transformers' decoder families: right to rounding, or refused with a reason; nothing else.

A dozen families run always. All of those installed are a proof to ask for; it prints a table:

    pytest -m slow -s tests/test_engine_families.py
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from builders.families import FAMILIES, VOCABULARY, tiny_family
from builders.tiny import DEVICE, SPECIAL, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, EngineOptions, Request
from genarm.engine.build import foresee
from genarm.errors import GenarmError, MemberError, UnsupportedError
from genarm.sampling import Sampling

TOKENIZER = tiny_tokenizer(words=[f"w{i}" for i in range(VOCABULARY - len(SPECIAL))])
WEIGHTS = {"full": 0.7, "lora": -0.4}
PROMPTS = [[*range(3, 33)], [44, 5, 90, 12, 7, 61, 8], [*range(80, 62, -1)]]
ROUNDING = 1e-3
"""Of log-probs in float32: what is wrong is off by far more, as weights are large."""


def with_lora(model: PreTrainedModel, where: str | None = None) -> PeftModel:
    """On `where`, as peft takes it, or on all linear layers but the head and those that peft takes for experts."""
    torch.manual_seed(5)
    names = {name: layer for name, layer in model.named_modules() if layer is not model.get_output_embeddings()}
    of_experts = ("gate", "gate_proj", "up_proj", "down_proj") if any("experts" in name for name in names) else ()
    linear = [name for name, layer in names.items() if isinstance(layer, nn.Linear) and not name.endswith(of_experts)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=where or linear, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel(model, config, adapter_name="lora")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def members(family: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The base and its rewards, new each time and the same each time."""
    base = tiny_family(family, seed=0)
    rewards = {"full": lambda: tiny_family(family, seed=1), "lora": lambda: with_lora(base)}
    return {"base": base, **{kind: rewards[kind]() for kind in kinds}}


@cache
def takes_lora(family: str) -> bool:
    """Whether peft can put an adapter on the family, and the family still runs."""
    try:
        with torch.no_grad():
            with_lora(tiny_family(family))(torch.tensor([PROMPTS[1]], device=DEVICE))
    except Exception:
        return False
    return True


def decoded(family: str, kinds: tuple[str, ...]) -> list[Completion]:
    """Three requests at once through the engine (raises GenarmError where it cannot)."""
    parts = members(family, kinds)
    base = parts.pop("base")
    model = GuidedForCausalLM.from_members(base, parts) if parts else base
    sampling = Sampling(max_new_tokens=6, temperature=0)
    requests = [
        Request(
            prompt=prompt,
            weights={kind: WEIGHTS[kind] for kind in kinds},
            sampling=sampling,
            ignore_eos=True,
            top_log_probs=VOCABULARY,
            prompt_log_probs=1,
        )
        for prompt in PROMPTS
    ]
    options = EngineOptions(streams=3, context=64, speculate=0, chunk=40)
    with Engine(model, TOKENIZER, options) as engine:
        streams = [engine.stream(request) for request in requests]
        return [stream.result() for stream in streams]


@torch.no_grad()
def furthest(family: str, kinds: tuple[str, ...], completions: list[Completion]) -> float:
    """The largest difference of any number from transformers' and peft's own forwards."""
    parts = members(family, kinds)
    lora = parts.pop("lora", None)
    worst = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids_1T = torch.tensor([[*prompt, *completion.token_ids]], device=DEVICE)
        said: dict[str, torch.Tensor] = {}
        if lora is not None:
            said["lora"] = lora(input_ids=ids_1T, use_cache=False).logits
            with lora.disable_adapter():
                said["base"] = lora(input_ids=ids_1T, use_cache=False).logits
        for name, model in parts.items():
            said.setdefault(name, model(input_ids=ids_1T, use_cache=False).logits)
        of = {name: torch.log_softmax(x[0, len(prompt) - 1 : -1].cpu().float(), dim=-1) for name, x in said.items()}
        guided_TV = torch.log_softmax(of["base"] + sum(WEIGHTS[kind] * of[kind] for kind in kinds), dim=-1)
        for i, token in enumerate(completion.tokens):
            numbers = {"base": token.base, **token.rewards}
            apart = [abs(float(of[name][i, token.id]) - value) for name, value in numbers.items() if value is not None]
            apart += [abs(float(guided_TV[i, v]) - value) for v, value in token.top]
            worst = max(worst, *(x if x == x else float("inf") for x in apart))
    return worst


@dataclass(frozen=True)
class Verdict:
    """What came of one family: the largest difference of each set-up, or why it is refused."""

    family: str
    numbers: dict[str, float]
    refused: str = ""

    @property
    def right(self) -> bool:
        return all(value <= ROUNDING for value in self.numbers.values())


def verdict(family: str) -> Verdict:
    """Each set-up is right, or refused."""
    setups: list[tuple[str, ...]] = [(), ("full",)]
    if takes_lora(family):
        setups += [("lora",), ("full", "lora")]
    numbers: dict[str, float] = {}
    refused = ""
    for kinds in setups:
        name = " and ".join(kinds) or "alone"
        try:
            numbers[name] = furthest(family, kinds, decoded(family, kinds))
        except GenarmError as error:
            refused = refused or f"{name}: {error}"
    return Verdict(family, numbers, refused)


RIGHT = (
    "afmoe", "bert", "cohere", "gemma3_text", "gemma3n_text", "jetmoe", "mixtral", "olmo2", "phi", "qwen3_moe",
)  # fmt: skip
EXPERTS = ("afmoe", "mixtral", "qwen3_moe")
REFUSED = ("bloom", "codegen", "diffllama", "doge", "falcon", "falcon_h1", "gpt_oss", "lfm2", "llama4_text", "musicgen")


@pytest.mark.parametrize("family", RIGHT)
def test_families_that_are_right(family: str) -> None:
    found = verdict(family)
    assert not found.refused
    assert found.right, found.numbers


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_on_experts_are_refused(family: str) -> None:
    """peft counts the weights of experts among linear layers."""
    base = tiny_family(family)
    with pytest.raises(MemberError, match=r"'lora' has the setting target_parameters=.*merge it into a full model"):
        GuidedForCausalLM.from_members(base, {"lora": with_lora(base, "all-linear")})


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot run an? \w+ForCausalLM \(.*use GuidedForCausalLM\.generate"):
        decoded(family, ())


def test_what_shows_before_the_weights_are_there() -> None:
    """None that is right is refused by a look at its outline; some that are refused are, and others by the proof."""

    def outline(family: str) -> PreTrainedModel:
        model = tiny_family(family)
        with torch.device("meta"):
            return type(model)(model.config).eval()

    for family in RIGHT:
        foresee(outline(family))
    for family in ("bloom", "falcon", "lfm2", "llama4_text"):
        with pytest.raises(UnsupportedError, match=r"cannot run an? \w+ForCausalLM \("):
            foresee(outline(family))


@pytest.mark.slow
def test_every_family_is_right_or_refused() -> None:
    wrong = []
    for family in FAMILIES:
        try:
            tiny_family(family)(input_ids=torch.tensor([PROMPTS[1]], device=DEVICE), use_cache=False)
        except Exception as error:
            print(f"| {family} | cannot be made tiny: {' '.join(str(error).split())[:80]} |", flush=True)
            continue
        try:
            found = verdict(family)
        except Exception as error:
            wrong.append(family)
            print(f"| {family} | RAW ERROR {type(error).__name__}: {' '.join(str(error).split())[:200]} |", flush=True)
            continue
        if not found.right:
            wrong.append(family)
        numbers = ", ".join(f"{name} {value:.0e}" for name, value in found.numbers.items())
        print(f"| {family} | {numbers} {'' if found.right else 'WRONG'} | {found.refused} |", flush=True)
    assert not wrong
