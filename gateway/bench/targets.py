"""The aims of this project, held against the rows of a run: measured, met or missed. Values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.bench.rows import Row, figure, find

HEADLINE = "100 B, 4 × 200"
SINGLE = "100 B, 1 × 1"
OURS = "lineside"
MB = 1e6

Rows = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Target:
    """`least`: the figure must be at least this; otherwise at most."""

    what: str
    limit: float
    unit: str
    least: bool
    measured: Callable[[Rows], float | None]


@dataclass(frozen=True, slots=True)
class Judged:
    what: str
    wanted: str
    measured: float | None
    unit: str
    met: bool | None  # None: not measured


def _ratio(measure: str, case: str, who: str) -> Callable[[Rows], float | None]:
    def measured(rows: Rows) -> float | None:
        row = find(rows, measure, case, who)
        return row.ratio if row is not None else None

    return measured


def _value(measure: str, case: str, scale: float = 1.0) -> Callable[[Rows], float | None]:
    def measured(rows: Rows) -> float | None:
        value = figure(rows, measure, case, OURS)
        return None if value is None else value / scale

    return measured


def _single_latency(rows: Rows) -> float | None:
    row, disk = find(rows, "latency", SINGLE, OURS), find(rows, "latency", SINGLE, "fdatasync")
    if row is None or disk is None or row.p99_ms is None or not disk.p99_ms:
        return None
    return row.p99_ms / disk.p99_ms


def _both(rows: Rows) -> float | None:
    shares = [figure(rows, "both", case, OURS) for case in ("intake, of alone", "drain, of alone")]
    known = [share for share in shares if share is not None]
    return min(known) if len(known) == len(shares) else None


TARGETS = (
    Target("MQTT intake : Mosquitto, offline session", 1.5, "×", True, _ratio("intake", HEADLINE, "mosquitto")),
    Target("MQTT intake : NATS, sync always", 30, "×", True, _ratio("intake", HEADLINE, "nats, always")),
    Target("MQTT intake : RabbitMQ, durable", 10, "×", True, _ratio("intake", HEADLINE, "rabbitmq")),
    Target("MQTT intake : Artemis, durable", 5, "×", True, _ratio("intake", HEADLINE, "artemis")),
    Target("intake, syncs 20 ms longer : raw file", 1.0, "×", True, _ratio("slow-disk", HEADLINE, "raw file")),
    Target("intake with rules and properties : Mosquitto", 1.0, "×", True, _ratio("rules", HEADLINE, "mosquitto")),
    Target(
        "intake at 1,000,000 rows : at none", 0.9, "×", True, _ratio("growth", f"{HEADLINE}, 1,000,000 rows", "empty")
    ),
    Target("latency, window 1, p99 : the disk's sync p99", 3, "×", False, _single_latency),
    Target("drain over mutual TLS", 100_000, "/s", True, _value("drain", "100 B")),
    Target("drain : C proton to C proton, no journal", 0.5, "×", True, _ratio("drain", "100 B", "C proton, TLS")),
    Target("intake and drain at once : each alone", 0.6, "×", True, _both),
    Target("RSS, idle", 40, "MB", False, _value("memory", "RSS, idle", MB)),
    Target("RSS, 1,000,000 rows queued", 48, "MB", False, _value("memory", "RSS, 1,000,000 rows", MB)),
    Target("RSS, 1,000 sessions", 80, "MB", False, _value("memory", "RSS, 1,000 sessions", MB)),
    Target("idle CPU", 0.3, "%", False, _value("memory", "idle CPU")),
    Target("start to ready, 10,000,000 rows", 1, "s", False, _value("start", "10,000,000 rows")),
)


def judge(rows: Rows) -> list[Judged]:
    """Every target, also those that this run did not measure."""
    judged = []
    for target in TARGETS:
        measured = target.measured(rows)
        met = None if measured is None else (measured >= target.limit) == target.least or measured == target.limit
        wanted = f"{'≥' if target.least else '≤'} {target.limit:,g} {target.unit}"
        judged.append(Judged(target.what, wanted, measured, target.unit, met))
    return judged
