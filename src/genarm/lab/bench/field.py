"""The engines and models that compete: one base in memory, and every way to run it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from genarm.engine import Engine, EngineOptions
from genarm.lab.bench.agreement import WEIGHT, Pair
from genarm.lab.bench.contestants import Task, in_engine, in_transformers, naive, throughput
from genarm.lab.bench.counting import Counts, acceptance, acceptance_options, count
from genarm.lab.bench.figures import (
    FULL,
    HEAD,
    LORA,
    NAIVE,
    TRANSFORMERS,
    TUNED,
    TWO_HEADS,
    TWO_LORAS,
    TWO_TUNED,
    TWO_WISHES,
    UNGUIDED,
    WISH,
    at_streams,
    speculating,
)
from genarm.lab.bench.models import random_adapters, twin, word_tokenizer
from genarm.lab.bench.timing import Contestant
from genarm.model.modeling import GuidedForCausalLM
from genarm.statistics import Proportion

_COUNTED = 8
"""Replies in which speculation is counted."""


@dataclass(frozen=True, kw_only=True)
class Speculated:
    """Speculation with one made ARM.

    Attributes:
        wanted: the acceptance asked for.
        made: Σ min(p, q) of the models, over tokens drawn evenly.
        seen: what the engine accepted of the drafts that it looked at.
        counts: at batch 1, drafting as much as pays.
    """

    wanted: float
    made: float
    seen: Proportion
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Field:
    """What the contestants are made of.

    Attributes:
        pair: its base is everybody's base; engines run twins of it, so that it stays as it is.
        arms: {wanted acceptance: full ARM}, at least one.
        task: what they do.
        seed: of the adapters.
        stack: closes the engines.
        engines: those made so far, by contestant.
    """

    pair: Pair
    arms: Mapping[float, PreTrainedModel]
    task: Task
    seed: int
    stack: ExitStack
    engines: dict[str, Engine] = field(default_factory=dict)

    def timed(self) -> dict[str, Contestant]:
        """Everything that returns seconds per token."""
        base, task = self.pair.base, self.task
        usual = EngineOptions(streams=1, context=task.positions)
        silent = EngineOptions(streams=1, context=task.positions, speculate=0)
        entries: dict[str, tuple[PreTrainedModel, EngineOptions]] = {
            UNGUIDED: (twin(base), usual),
            LORA: (self._with_loras("one"), usual),
            TWO_LORAS: (self._with_loras("one", "two"), usual),
            TUNED: (self._with_loras("one", tuned=True), usual),
            TWO_TUNED: (self._with_loras("one", "two", tuned=True), usual),
            HEAD: (self._with_loras("one", tuned=True, heads=True), usual),
            TWO_HEADS: (self._with_loras("one", "two", tuned=True, heads=True), usual),
            FULL: (self._with_full(next(iter(self.arms))), silent),
        }
        return {
            TRANSFORMERS: in_transformers(base, task),
            NAIVE: naive(base, self._merged(), task, weight=WEIGHT),
            **{name: in_engine(self._engine(name, *entry), task) for name, entry in entries.items()},
            **{speculating(wanted): in_engine(self._speculating(wanted), task) for wanted in self.arms},
            **self._wishing(),
        }

    def streamed(self, streams: Sequence[int]) -> dict[int, Contestant]:
        """Tokens per second with one LoRA ARM at so many streams, all in one engine."""
        members = 2
        options = EngineOptions(
            streams=max(streams),
            context=self.task.positions,
            chunk=max(streams) * members * self.task.prompt_tokens,  # all begin in one step
        )
        engine = self._engine(f"{LORA}, up to {max(streams)} streams", self._with_loras("one"), options)
        return {n: throughput(engine, self.task, n) for n in streams}

    def crowded(self, streams: int) -> dict[str, Contestant]:
        """Seconds per token of so many streams together, unguided and with a head ARM."""
        options = EngineOptions(
            streams=streams, context=self.task.positions, chunk=streams * self.task.prompt_tokens, wishes=0
        )
        models = {UNGUIDED: twin(self.pair.base), HEAD: self._with_loras("one", tuned=True, heads=True)}
        names = {at_streams(name, streams): model for name, model in models.items()}
        engines = {name: self._engine(name, model, options) for name, model in names.items()}
        return {name: _seconds(throughput(engine, self.task, streams)) for name, engine in engines.items()}

    def speculated(self, wanted: float, made: float) -> Speculated:
        """What speculation with this ARM comes to; `timed` uses the engine again."""
        requests = [self.task.request(i, seed=self.seed + i) for i in range(_COUNTED)]
        counts = count(self._speculating(wanted), requests)
        tokenizer = word_tokenizer(self.task.vocabulary)
        with Engine(self._with_full(wanted), tokenizer, acceptance_options(self.task.positions)) as engine:
            seen = acceptance(engine, requests)
        return Speculated(wanted=wanted, made=made, seen=seen, counts=counts)

    def _speculating(self, wanted: float) -> Engine:
        name = speculating(wanted)
        if name not in self.engines:
            usual = EngineOptions(streams=1, context=self.task.positions)
            self._engine(name, self._with_full(wanted), usual)
        return self.engines[name]

    def _engine(self, name: str, model: PreTrainedModel, options: EngineOptions) -> Engine:
        engine = self.stack.enter_context(Engine(model, word_tokenizer(self.task.vocabulary), options))
        self.engines[name] = engine
        return engine

    def _with_loras(self, *names: str, tuned: bool = False, heads: bool = False) -> GuidedForCausalLM:
        base = twin(self.pair.base)
        return GuidedForCausalLM.from_members(
            base,
            random_adapters(base, names, seed=self.seed, heads=heads),
            references=dict.fromkeys(names, base) if tuned else {},
            weights=dict.fromkeys(names, WEIGHT),
        )

    def _wishing(self) -> dict[str, Contestant]:
        """One wish and two, in one engine: a large base is not to be held twice for nothing."""
        texts = {"one": "words", "two": "words"}  # of which every prompt has ids of its own
        model = GuidedForCausalLM.from_members(twin(self.pair.base), {}, wishes=texts)
        both = replace(self.task, wishes=[*texts])
        alone = replace(self.task, wishes=["one"], weights={"two": 0.0})
        engine = self._engine(TWO_WISHES, model, EngineOptions(streams=1, context=both.positions))
        return {WISH: in_engine(engine, alone), TWO_WISHES: in_engine(engine, both)}

    def _with_full(self, wanted: float) -> GuidedForCausalLM:
        rewards: dict[str, PreTrainedModel | PeftModel] = {"full": twin(self.arms[wanted])}
        return GuidedForCausalLM.from_members(twin(self.pair.base), rewards, weights={"full": WEIGHT})

    @torch.no_grad()
    def _merged(self) -> PreTrainedModel:
        """The LoRA ARM as a whole model."""
        (adapter,) = random_adapters(copy.deepcopy(self.pair.base), ("one",), seed=self.seed).values()
        merged: PreTrainedModel = adapter.merge_and_unload()
        return merged


def _seconds(rate: Contestant) -> Contestant:
    """Seconds per token of a contestant that returns tokens per second."""
    return lambda number: 1 / rate(number)
