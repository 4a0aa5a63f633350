"""What a benchmark says: one row a contender and case, and how ratios are made of rounds. Values in, values out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one case. `rounds` in the order they were run; `ratio` is ours to this one, by pairs of rounds.

    `skipped`: why there is no figure, or fewer rounds. Times in milliseconds, CPU in microseconds of the server a
    message.
    """

    measure: str
    case: str
    who: str
    unit: str
    rounds: tuple[float, ...] = ()
    durability: str = ""
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_us: float | None = None
    ratio: float | None = None
    skipped: str | None = None
    more: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The median of the rounds."""
        return statistics.median(self.rounds) if self.rounds else None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median of the ratios of each pair of rounds, so that what slowed both down for a while does not count."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=False) if b > 0]
    return statistics.median(pairs) if pairs else None


def find(rows: Sequence[Row], measure: str, case: str, who: str) -> Row | None:
    """The row with a figure, or None."""
    return next((r for r in rows if (r.measure, r.case, r.who) == (measure, case, who) and r.rounds), None)


def figure(rows: Sequence[Row], measure: str, case: str, who: str) -> float | None:
    row = find(rows, measure, case, who)
    return row.value if row is not None else None
