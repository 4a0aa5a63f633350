"""How many connections may begin in how little time: token buckets for each source and for all of them together.

Asked before anything of a connection is read or kept, so that a flood of them costs others no more than the accept.
Whoever is refused may come again at once; after a burst a source gets what its rate gives. Time is an argument. Knows
no socket; forgets the source that was silent longest when its table is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SOURCES_MAX: Final = 4096
REPORT_S: Final = 10.0  # in that time the log tells of one source
REPORTS_MAX: Final = 10  # so often at most


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_s` connections a second in the long run, `burst` at once after silence."""

    per_s: float
    burst: float


# A peer's address is one machine, or the /64 that it may choose its address from. Apps on this machine all have the
# same one, and come together after a restart.
REMOTE: Final = Rate(10.0, 100.0)
LOCAL: Final = Rate(200.0, 3000.0)
OVERALL: Final = Rate(300.0, 4000.0)


class Bucket:
    """Tokens: taken one by one, refilled by time."""

    __slots__ = ("_at", "_rate", "tokens")

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self.tokens = rate.burst
        self._at = now

    def refill(self, now: float) -> float:
        self.tokens = min(self._rate.burst, self.tokens + max(0.0, now - self._at) * self._rate.per_s)
        self._at = now
        return self.tokens


class Admission:
    """Asked for each connection: `admit`. For all listeners of a protocol together."""

    def __init__(self, now: float, remote: Rate = REMOTE, local: Rate = LOCAL, overall: Rate = OVERALL) -> None:
        self._remote, self._local = remote, local
        self._all = Bucket(overall, now)
        self._sources: dict[str, Bucket] = {}  # the one that came last is last

    def __len__(self) -> int:
        return len(self._sources)

    def admit(self, source: str, local: bool, now: float) -> bool:
        """Whether one more connection from there may begin. One that is refused costs the others nothing."""
        bucket = self._sources.pop(source, None)
        if bucket is None:
            if len(self._sources) >= SOURCES_MAX:
                del self._sources[next(iter(self._sources))]
            bucket = Bucket(self._local if local else self._remote, now)
        self._sources[source] = bucket
        if bucket.refill(now) < 1.0 or self._all.refill(now) < 1.0:
            return False
        bucket.tokens -= 1.0
        self._all.tokens -= 1.0
        return True


class Reports:
    """Which of many equal log lines are written: of each source REPORTS_MAX in REPORT_S, then the number left out."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], list[float]] = {}  # since when, how many, how many left out

    def __len__(self) -> int:
        return len(self._seen)

    def due(self, what: str, source: str, now: float) -> int | None:
        """How many were left out since the last one that was written; None: leave this one out, too."""
        key = what, source
        seen = self._seen.pop(key, None)
        if seen is not None and now - seen[0] < REPORT_S:
            self._seen[key] = seen
            full = seen[1] >= REPORTS_MAX
            seen[2 if full else 1] += 1
            return None if full else 0
        if len(self._seen) >= SOURCES_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = [now, 1, 0]
        return 0 if seen is None else int(seen[2])
