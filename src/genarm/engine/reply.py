"""A reply while it is being written: tokens go in, text and the ending come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from genarm.engine.reply_text import TextStream
from genarm.engine.request import Completion, Ending, Request, Token
from genarm.engine.stream import Event


def _nobody(event: Event) -> None:
    """Nobody listens yet."""


@dataclass(eq=False, kw_only=True)
class GrowingReply:
    """A reply so far.

    Attributes:
        request: what was asked.
        stops: ids that end the reply.
        text: decodes it.
        limit: the most tokens of the reply.
        prompt_tokens: how many tokens the prompt has.
        deliver: called with each token, and at last with the completion, or with the error that ended it.
    """

    request: Request
    stops: frozenset[int]
    text: TextStream
    limit: int
    prompt_tokens: int = 0
    deliver: Callable[[Event], None] = _nobody
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: list[Token] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def append(self, token: Token) -> Ending | None:
        """Take in the next token, deliver it with its text, and say whether the reply ends with it, and why."""
        ending: Ending | None = None
        offset = self.text.position
        if token.id in self.stops:
            text, ending = self.text.finish(), "stop"
        else:
            early = len(self.tokens) < self.request.sampling.min_new_tokens
            text = self.text.add(token.id, early=early)
            if self.text.stopped:
                ending = "stop"
            elif len(self.tokens) + 1 == self.limit:
                text, ending = text + self.text.finish(), "length"
                ending = "stop" if self.text.stopped else ending
        token = replace(token, text=text, offset=offset)
        self.tokens.append(token)
        self.pieces.append(text)
        self.deliver(token)
        return ending

    def completion(self, ending: Ending) -> Completion:
        """What came of it."""
        return Completion(
            text="".join(self.pieces),
            tokens=tuple(self.tokens),
            ending=ending,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused,
            drafted=self.drafted,
            accepted=self.accepted,
        )
