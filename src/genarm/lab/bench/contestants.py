"""What is timed: replies of the same length to the same prompts, sampled at temperature 1, end of text ignored.

Each function makes a contestant: called with the number of a round, it answers that round's prompt and returns seconds
per token, the prompt's own time left out; `throughput` returns tokens per second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from genarm.engine import Engine, Request, Stream
from genarm.errors import ConfigError
from genarm.lab.bench.timing import Contestant, clock, per_token
from genarm.lab.replies import generation_config
from genarm.sampling import Sampling

WISH_TOKENS = 16
"""How many tokens the words of a wish are, at most."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every contestant does: `tokens` tokens after the prompt of the round.

    Attributes:
        prompts: token ids, each prompt as many.
        tokens: of each reply.
        vocabulary: how many ids there are.
        wishes: names of the wishes that read each prompt as well, after words of their own.
        weights: of rewards, over the model's.
    """

    prompts: Sequence[Sequence[int]]
    tokens: int
    vocabulary: int
    wishes: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt."""
        return len(self.prompts[0])

    @property
    def positions(self) -> int:
        """Of a prompt and its reply, as a wish reads them."""
        return self.prompt_tokens + self.tokens + (WISH_TOKENS if self.wishes else 0)

    def prompt(self, number: int) -> Sequence[int]:
        """Of a round; after the last one they begin again."""
        return self.prompts[number % len(self.prompts)]

    def request(self, number: int, seed: int) -> Request:
        """One reply to the prompt of a round."""
        prompt = self.prompt(number)
        return Request(
            prompt=prompt,
            weights=self.weights,
            contexts={
                name: [*self.prompt(number + 1 + i)[:WISH_TOKENS], *prompt] for i, name in enumerate(self.wishes)
            },
            sampling=Sampling(max_new_tokens=self.tokens),
            seed=seed,
            ignore_eos=True,
        )


def make_task(*, prompts: int, prompt_tokens: int, tokens: int, vocabulary: int, seed: int) -> Task:
    """Prompts of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (prompts, prompt_tokens), generator=generator).tolist()
    return Task(prompts=ids, tokens=tokens, vocabulary=vocabulary)


def in_engine(engine: Engine, task: Task) -> Contestant:
    """One stream in the engine."""

    def run(number: int) -> float:
        return per_token(_stamps(engine.stream(task.request(number, seed=number))))

    return run


def throughput(engine: Engine, task: Task, streams: int) -> Contestant:
    """Tokens per second of so many streams, while all of them decode."""
    # Prompts are run in chunks, so the last stream begins some steps after the first, and ends as much later. Its
    # tokens are timed, up to where the first stream has ended.
    late = -(-streams * engine.members * task.prompt_tokens // engine.options.chunk)
    if task.tokens < late + 2:
        raise ConfigError(
            f"--tokens is {task.tokens}; the first of {streams} streams would end before the last one decodes: give at "
            f"least {late + 2}"
        )

    def run(number: int) -> float:
        requests = [task.request(number + i, seed=number * streams + i) for i in range(streams)]
        # All in this thread: the first of each round makes a step, and the others' tokens are there.
        rounds = zip(*[engine.stream(request) for request in requests], strict=True)
        stamps = [time.perf_counter() for _ in rounds][: task.tokens - late]
        return streams * (len(stamps) - 1) / (stamps[-1] - stamps[0])

    return run


def _stamps(stream: Stream) -> list[float]:
    return [time.perf_counter() for _ in stream]  # a token that has arrived waits for no device


def in_transformers(model: PreTrainedModel, task: Task) -> Contestant:
    """The model alone, by transformers' `generate`."""
    config = generation_config(Sampling(max_new_tokens=task.tokens), (), 0)

    def run(number: int) -> float:
        ids_BT = torch.tensor([task.prompt(number)], device=model.device)
        streamer = _Clock(model.device)
        model.generate(  # type: ignore[operator] # typed as a Module's attribute
            ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config, streamer=streamer
        )
        return per_token(streamer.stamps[1:])  # the first is the prompt's

    return run


class _Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt, then with each token."""
        self.stamps.append(clock(self.device))

    def end(self) -> None:
        """Called by transformers at the end."""


def naive(base: PreTrainedModel, arm: PreTrainedModel, task: Task, *, weight: float) -> Contestant:
    """Two whole models one after the other: guided decoding as one would write it down."""

    @torch.inference_mode()
    def run(number: int) -> float:
        torch.manual_seed(number)
        caches = DynamicCache(), DynamicCache()
        new_BT = torch.tensor([task.prompt(number)], device=base.device)
        stamps = []
        for _ in range(task.tokens):
            base_BV, arm_BV = (
                model(new_BT, past_key_values=cache, use_cache=True).logits[:, -1].float().log_softmax(dim=-1)
                for model, cache in zip((base, arm), caches, strict=True)
            )
            new_BT = torch.multinomial((base_BV + weight * arm_BV).softmax(dim=-1), 1)
            stamps.append(clock(base.device))
        return per_token(stamps)

    return run
