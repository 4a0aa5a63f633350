"""Whether the promises held: what was measured against a scenario's limits. Values in, values out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.simulate.scenario import Limits

# Fewer gateways, or a quicker drain, say nothing of fairness.
FAIRNESS_GATEWAYS_MIN = 3
FAIRNESS_DRAIN_S_MIN = 0.2


@dataclass(frozen=True, slots=True)
class Way:
    """One app at all its gateways."""

    app: str
    direction: str
    qos: int
    published: int
    acknowledged: int
    delivered: int
    duplicates: int
    reordered: int

    @property
    def lost(self) -> int:
        """Acknowledged and not delivered. QoS 0 is never acknowledged: nothing is promised of it."""
        return max(0, self.acknowledged - self.delivered) if self.qos else 0

    @property
    def unacknowledged(self) -> int:
        return self.published - self.acknowledged if self.qos else 0


@dataclass(frozen=True, slots=True)
class Cut:
    """What came after one cut: seconds from the line's return, by gateway. Empty where there was nothing to see."""

    resume_s: tuple[float, ...]
    drain_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything a verdict is about."""

    ways: tuple[Way, ...]
    cuts: tuple[Cut, ...]
    ledger: int  # messages in the loss ledgers and dead letters of all daemons
    ack_p99_s: float | None
    latency_p99_s: float | None
    memory_bytes: int
    connections: int = 0  # how often the link of one gateway came up, at most
    urgent_p99_s: float | None = None  # of urgent messages, counted from the line's return where that came later


@dataclass(frozen=True, slots=True)
class Judgement:
    """One line of the verdict. `measured` is None where there was nothing to measure; that breaks nothing."""

    promise: str
    what: str
    unit: str
    measured: float | None
    limit: float
    kept: bool


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of them do not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def slowest_ratio(cut: Cut) -> float | None:
    """How much longer the slowest gateway took to drain than the one in the middle."""
    if len(cut.drain_s) < FAIRNESS_GATEWAYS_MIN:
        return None
    median = statistics.median(cut.drain_s)
    return max(cut.drain_s) / median if median >= FAIRNESS_DRAIN_S_MIN else None


def judge(measured: Measured, limits: Limits) -> tuple[Judgement, ...]:
    """The verdict, in the order of the promises. Raises nothing: a scenario that moved no message breaks P3."""
    ways = measured.ways
    lost = sum(way.lost for way in ways)
    delivered = sum(way.delivered for way in ways)
    duplicates = sum(way.duplicates for way in ways)
    resumes = [each for cut in measured.cuts for each in cut.resume_s]
    drains = [each for cut in measured.cuts for each in cut.drain_s]
    ratios = [ratio for cut in measured.cuts if (ratio := slowest_ratio(cut)) is not None]
    # The first one is not because of a cut.
    connections = max(0, measured.connections - 1) / max(1, len(measured.cuts))
    rows: list[tuple[str, str, str, float | None, float | None]] = [
        ("P1", "not acknowledged", "messages", sum(way.unacknowledged for way in ways), limits.unacknowledged),
        ("P1", "acknowledged within, p99", "s", measured.ack_p99_s, limits.ack_p99_s),
        ("P2", "out of order", "messages", sum(way.reordered for way in ways), limits.reordered),
        ("P3", "acknowledged and lost", "messages", lost, limits.lost),
        ("P3", "duplicates a cut", "messages", duplicates / max(1, len(measured.cuts)), limits.duplicates_per_cut),
        ("P4", "lost and not in the ledger", "messages", max(0, lost - measured.ledger), limits.unaccounted),
        ("P5", "memory of a gateway", "bytes", measured.memory_bytes, limits.memory_bytes),
        ("line", "traffic again after, p99", "s", quantile(resumes, 0.99), limits.resume_p99_s),
        ("line", "backlog delivered after", "s", max(drains, default=None), limits.drain_s),
        ("line", "slowest gateway to the median", "times", max(ratios, default=None), limits.slowest_ratio),
        ("line", "connections of a gateway a cut", "times", connections, limits.connections_per_cut),
        ("line", "on the way, p99", "s", measured.latency_p99_s, limits.latency_p99_s),
        ("line", "urgent, on the way or since the line is back, p99", "s", measured.urgent_p99_s, limits.urgent_p99_s),
    ]
    judged = [
        Judgement(promise, what, unit, value, limit, value is None or value <= limit)
        for promise, what, unit, value, limit in rows
        if limit is not None
    ]
    if not delivered:
        judged.append(Judgement("P3", "anything delivered at all", "messages", 0, 1, False))
    return tuple(judged)
