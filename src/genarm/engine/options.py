"""What is fixed when an engine starts; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from genarm.errors import ConfigError

MOST_WISHES = 4
"""How many wishes of its own a request may have."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What is fixed when an engine starts.

    Attributes:
        streams: requests that run at once; others wait.
        context: the most tokens of a prompt and its reply together; by default what the members have, but no more
            than 2,048. Memory for `streams` times `context` positions of every member is allotted at the start.
        speculate: the most tokens drafted at once; 0 never drafts.
        adapt: draft as many as pay by the acceptance seen; False always drafts `speculate`.
        chunk: the most prompt tokens run per step, over all members.
        wishes: how many wishes of its own a request may have. Each needs memory for keys and values while it runs:
            engines of few streams allot more for it, and in others such requests run fewer at once.
    """

    streams: int = 8
    context: int | None = None
    speculate: int = field(
        default=8,
        metadata={
            "metavar": "K",
            "help": "the most tokens that small members draft at once, fewer where that pays more; 0 never drafts. "
            "Drafts change the speed and which random numbers are used, never the distribution",
        },
    )
    adapt: bool = True
    chunk: int = 256
    wishes: int = MOST_WISHES

    def __post_init__(self) -> None:
        for name, least in (("streams", 1), ("speculate", 0), ("chunk", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= self.wishes <= MOST_WISHES:
            raise ConfigError(f"wishes is {self.wishes}; it must be from 0 to {MOST_WISHES}")
