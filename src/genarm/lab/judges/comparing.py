"""What judges that compare have in common: an endpoint, what it would be asked, and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, FiniteFloat

from genarm.data.tables import read_table
from genarm.errors import ConfigError
from genarm.lab.judges.llm import Pair
from genarm.lab.judges.protocol import load_protocol
from genarm.lab.judges.settings import ClientSettings
from genarm.statistics import Outcome

if TYPE_CHECKING:
    from genarm.lab.judges.kinds import JudgeSpec

CHARACTERS = 4
"""Of a token, for estimates."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a judge would be asked: calls of an endpoint, tokens read and written, and their price if known."""

    judge: str
    calls: int = 0
    tokens: float = 0.0
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An outcome for each pair, a row of JSON for each, and what a reader must know of them (empty: nothing)."""

    outcomes: Sequence[Outcome | None]
    rows: Sequence[Mapping[str, Any]]
    note: str


class Comparer:
    """Compares two answers through an endpoint.

    Attributes:
        orders: how often each pair is shown.
    """

    orders = 1

    def model(self, judge: JudgeSpec) -> str | None:
        """Who is asked, if the settings name nobody else."""
        raise NotImplementedError

    def asked(self, judge: JudgeSpec) -> tuple[str, int]:
        """The protocol that a question is about as long as, and the most tokens of a verdict."""
        raise NotImplementedError

    def compare(
        self, judge: JudgeSpec, pairs: Sequence[Pair], where: Path, name: str, on_reply: Callable[[], None]
    ) -> Compared:
        """The verdicts on pairs of two methods' answers, which are called `name`.

        Args:
            judge: with the settings of the endpoint.
            pairs: what to judge.
            where: the judge's folder; all that it says is kept there, and nothing is asked twice.
            name: of these pairs, fit for a file.
            on_reply: called for each pair and order when it is settled.

        Raises:
            ConfigError: the judge's settings, or an endpoint that does not take them.
            MissingExtraError: a package that is not installed.
        """
        raise NotImplementedError

    def endpoint(
        self, judge: JudgeSpec, *, otherwise: str | None = None
    ) -> tuple[ClientSettings, tuple[float | None, float | None]]:
        """Whom to ask (`otherwise` where nobody is named), and the prices of a million tokens read and written."""
        given = {"model": self.model(judge) or otherwise, **judge.settings}
        price = Annotated[FiniteFloat, Field(ge=0)] | None
        price_in, price_out = (
            read_table(price, given.pop(key, None), f"judge {judge.name!r}: {key}") for key in ("price_in", "price_out")
        )
        allowed = [field.name for field in fields(ClientSettings)]
        unknown = [key for key in given if key not in allowed]
        if unknown or given["model"] is None:
            what = (
                f"has the unknown setting {unknown[0]!r}" if unknown else "names no model, and its protocol names none"
            )
            raise ConfigError(f"judge {judge.name!r} {what}; settings are {', '.join(allowed)}, price_in and price_out")
        return ClientSettings(**given), (price_in, price_out)

    def calls(self, judge: JudgeSpec, pairs: int, tokens: int) -> Calls:
        """What it would be asked at most: answers of `tokens` tokens, every verdict as long as it may be."""
        source, verdict = self.asked(judge)
        _, (price_in, price_out) = self.endpoint(judge, otherwise=judge.source)
        count = self.orders * pairs
        frame = sum(len(message["content"]) for message in load_protocol(source).messages("", "", "")) / CHARACTERS
        read = count * (frame + 3 * tokens)  # two replies, and a prompt of about the same length
        written = count * verdict
        price = None if price_in is None or price_out is None else (read * price_in + written * price_out) / 1e6
        return Calls(judge=judge.name, calls=count, tokens=read + written, price=price)
