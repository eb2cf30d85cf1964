"""How many requests may be in the house: those that run and a bounded queue; the others are told when to come back."""

from __future__ import annotations

import time

from genarm.errors import ConfigError
from genarm.server.errors import ApiError

_FIRST_GUESS = 5.0
_MEMORY = 0.9
_LONGEST_WAIT = 60.0


class Admission:
    """Counts replies that run or wait. Of one event loop; not thread-safe.

    Attributes:
        streams: replies that run at once.
        queue: replies that may wait.
        inside: replies now.
    """

    def __init__(self, *, streams: int, queue: int) -> None:
        """Begin with an empty house (raises ConfigError for a negative queue)."""
        if queue < 0:
            raise ConfigError(f"--queue is {queue}; it must be 0 or more")
        self.streams = streams
        self.queue = queue
        self.inside = 0
        self._seconds = _FIRST_GUESS

    def enter(self, count: int) -> Ticket:
        """Let `count` replies in (raises what `Ticket.grow` raises)."""
        ticket = Ticket(self)
        ticket.grow(count)
        return ticket

    def add(self, count: int, more: int) -> None:
        """Let `more` replies in, of a request of `count` altogether.

        Raises:
            ApiError: 429 where they do not fit now, 400 where they never will.
        """
        room = self.streams + self.queue
        if count > room:
            raise ApiError(
                400,
                f"the request asks for {count} replies at once (prompts times n); this server takes up to {room}",
                param="n",
            )
        if self.inside + more > room:
            raise ApiError(
                429,
                f"the server is full: {self.inside} replies run or wait, and it takes {room} at most; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=min(_LONGEST_WAIT, self._seconds * (self.inside + more - room) / self.streams),
            )
        self.inside += more

    def left(self, count: int) -> None:
        """So many replies are gone."""
        self.inside -= count

    def saw(self, seconds: float) -> None:
        """A reply took so long to its end, waiting included."""
        self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * seconds


class Ticket:
    """The places of one request; each is given back once."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._count = 0
        self._began = time.monotonic()

    def grow(self, count: int) -> None:
        """Take places until there are `count` (raises what `Admission.add` raises)."""
        self._admission.add(count, count - self._count)
        self._count = count

    def give_back(self) -> None:
        """One reply has come to its end."""
        if self._count:
            self._count -= 1
            self._admission.left(1)
            self._admission.saw(time.monotonic() - self._began)

    def close(self) -> None:
        """The others are gone too, however they ended; that says nothing about how long replies take."""
        self._admission.left(self._count)
        self._count = 0
