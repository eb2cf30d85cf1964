"""The known answer of a problem as the judge: the last number of a response is right, or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from genarm.lab.judges.interface import Item, Kind, Scorer, check_rows, value_of
from genarm.lab.tasks.mathematics import gold_number, last_number


@dataclass(frozen=True, kw_only=True)
class NumberScorer(Scorer):
    """1 if the last number of the response is that of the row's `key`, else 0."""

    key: str

    @property
    def record(self) -> dict[str, Any]:
        """The key."""
        return {"kind": "last-number", "key": self.key}

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every row has a number."""
        check_rows(rows, self._gold)

    def _gold(self, row: Mapping[str, Any]) -> Decimal:
        value = value_of(row, self.key)
        if isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value):
            return Decimal(str(value))  # in digits, 0.00001 would be 1e-05, whose last number is 5
        return gold_number(str(value))

    def score(self, items: Sequence[Item]) -> list[float | None]:
        """Exact equality, as decimal numbers."""
        return [float(last_number(item.response) == self._gold(item.row)) for item in items]


KIND = Kind(
    name="last-number",
    about="1 where the last number of a reply is that of the prompt's column",
    form="KEY",
    scorer=lambda value, _: NumberScorer(key=value),
)
