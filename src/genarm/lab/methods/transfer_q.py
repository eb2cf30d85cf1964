"""Transfer-Q (arXiv 2405.20495): each token by its base logit and the reward of where an aligned policy goes from it.

Shapes: N candidates of all rows, V ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedModel

from genarm.errors import ConfigError
from genarm.lab.methods.interface import Kind, Meter, MethodSpec, tally
from genarm.lab.methods.rewards import Guidance
from genarm.lab.methods.search import Search
from genarm.lab.prefix import Ids, Prefix, next_logits, require_movable


class TransferQ(Search):
    """Among the base's `top_k` likeliest tokens v: z(v) + Σ_i w_i r_i([x, y_<t, v, rollout]).

    The rollout is the aligned policy's greedy continuation: at most `rollout` tokens, no further than EOS or the
    longest reply. A candidate that is EOS has none. The rollouts of all candidates of all rows are one batch.
    """

    title = "Transfer-Q"

    def __init__(self, guidance: Guidance, policy: PreTrainedModel, *, top_k: int, rollout: int) -> None:
        """As `Search`, with the aligned policy, and the most tokens of a rollout.

        Raises:
            ConfigError: a top_k or rollout below 1.
            WeightsError, VocabularyError, UnsupportedError: as `Search`.
        """
        if rollout < 1:
            raise ConfigError(f"rollout of {self.title} is {rollout}; it must be at least 1 token")
        super().__init__(guidance, top_k=top_k, others=[policy])
        require_movable([reward.trunk for reward in self.rewards.models], self.title)
        self.policy = policy
        self.rollout = rollout

    def _rollouts(self, meter: Meter) -> GreedyRollouts:
        return GreedyRollouts(
            Prefix(self.policy, count=meter.counter("policy")),
            stops=self.stops,
            known=self.known,
            length=self.rollout,
            room=self.sampling.max_new_tokens,
        )


class GreedyRollouts:
    """`Rollouts` of a policy, which has read each row in its cache."""

    def __init__(self, policy: Prefix, *, stops: Sequence[int], known: int, length: int, room: int) -> None:
        """Nothing is read yet.

        Args:
            policy: of the policy.
            stops: ids that end a rollout.
            known: ids from here on stand for no token.
            length: the most tokens of a rollout.
            room: how many tokens a reply may have.
        """
        self._policy = policy
        self._stops = stops
        self._known = known
        self._length = length
        self._room = room
        # Which row of the policy goes on from each candidate of the last call; those that ended a reply have none.
        self._places: dict[int, int] = {}

    def start(self, prompts: Sequence[Ids]) -> None:
        """Read the prompts."""
        self._policy.extend(prompts)
        self._places = {row: row for row in range(len(prompts))}

    def run(self, rows: Sequence[int], candidates: Sequence[int]) -> list[list[int]]:
        """The greedy continuation of each candidate."""
        self._room -= 1
        tails: list[list[int]] = [[] for _ in candidates]
        length = min(self._length, self._room)
        going = [n for n, token in enumerate(candidates) if token not in self._stops]
        if length == 0 or not going:
            return tails
        self._policy.select([self._places[rows[n]] for n in going])
        self._places = {n: place for place, n in enumerate(going)}
        chunks = [[candidates[n]] for n in going]
        reader = self._policy
        for position in range(length):
            logits_NV = next_logits(reader, chunks)
            tokens = logits_NV[:, : self._known].argmax(dim=-1).tolist()
            for n, token in zip(going, tokens, strict=True):
                tails[n].append(token)
            kept = [place for place, token in enumerate(tokens) if token not in self._stops]
            if not kept or position + 1 == length:
                break
            # The first forward read the candidates, which stay read; what follows is read by a copy.
            if position == 0:
                reader = self._policy.fork(kept)
            else:
                reader.select(kept)
            going, chunks = [going[place] for place in kept], [[tokens[place]] for place in kept]
        return tails


def _forwards(spec: MethodSpec, tokens: int) -> Counter[str]:
    top_k, rollout = spec.numbers["top_k"], spec.numbers["rollout"]
    return tally(
        (spec.base, tokens),
        (spec.roles["policy"], tokens * (1 + top_k * rollout)),
        *((reward, tokens * (1 + top_k)) for reward in spec.named.values()),
    )


KIND = Kind(
    name="transfer-q",
    roles=("base", "policy"),
    named="rewards",
    settings={"top_k": 10, "rollout": 20, "temperature": 0.7},
    build=lambda parts: TransferQ(Guidance.of(parts), parts.model("policy"), **parts.spec.numbers),
    forwards=_forwards,
    total=lambda *_: 1.0,
)
