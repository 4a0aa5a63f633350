"""What a salvaged journal lacks: every seq that is owed and not there goes into the ledger, counters follow the rows.

Rows are gone through in their order and never held: a journal may have more of them than the service may use memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator

from storeforward.schema import SEQ_BITS, SEQ_MASK
from storeforward.unwritten import SEQS_RESERVED

LOST_ROWS_MAX = 100_000
SPAN_MAX = 2 * SEQS_RESERVED

# From the first to before the second.
_Span = tuple[int, int]


def account(new: sqlite3.Connection, wall_us: int) -> int:
    """Bring counters in line with the rows; enter what is owed and missing in the ledger. Returns how many that are."""
    named = {
        int(key.removeprefix("stream ")): value.split(" ", 1)
        for key, value in new.execute("SELECT key, value FROM meta WHERE key LIKE 'stream %'")
    }
    counted = {id_ for (id_,) in new.execute("SELECT id FROM stream")}
    for stream in _with_messages(new) | named.keys():
        direction, name = named.get(stream, ("local", f"salvaged-{stream}"))
        new.execute("INSERT OR IGNORE INTO stream (id, name, direction) VALUES (?, ?, ?)", (stream, name, direction))
    new.execute("DELETE FROM cursor WHERE stream NOT IN (SELECT id FROM stream)")
    streams = new.execute("SELECT id, name, next_seq, first_seq FROM stream").fetchall()
    return sum(_account(new, *row, counted=row[0] in counted, wall_us=wall_us) for row in streams)


def _account(
    new: sqlite3.Connection,
    stream: int,
    name: str,
    next_seq: int,
    first_seq: int | None,
    *,
    counted: bool,
    wall_us: int,
) -> int:
    base = stream << SEQ_BITS
    first, last = new.execute(
        "SELECT min(id) & ?, max(id) & ? FROM message WHERE id BETWEEN ? AND ?",
        (SEQ_MASK, SEQ_MASK, base, base | SEQ_MASK),
    ).fetchone()
    end = 0 if last is None else last + 1
    next_seq = max(next_seq, end, 1)
    begin = next_seq if first is None else first
    if counted:
        # Nobody can be past the end: that position is damage, and what is there goes again.
        new.execute(
            "UPDATE cursor SET position = ? WHERE stream = ? AND position > ?",
            (begin, stream, next_seq),
        )
    else:
        # Its counter is lost. A seq that a cursor is past must not be given to a new message.
        (far,) = new.execute("SELECT max(position) FROM cursor WHERE stream = ?", (stream,)).fetchone()
        next_seq = max(next_seq, far or 0)
    (low,) = new.execute("SELECT min(position) FROM cursor WHERE stream = ?", (stream,)).fetchone()
    if low is None:
        low = begin if first_seq is None else first_seq
    # A cursor may be behind what was deleted: how far it had moved was not written yet.
    start = max(low, first_seq or 0)
    missing = 0
    never = _never_written(new, stream, max(end, 1), next_seq)
    for at, to in _outside(never, _gaps(new, stream, start, next_seq)):
        told = range(at, min(to, at + LOST_ROWS_MAX - min(missing, LOST_ROWS_MAX)))
        lose(new, wall_us, name, told, "did not read when the journal was salvaged")
        missing += to - at
    if missing > LOST_ROWS_MAX:
        _count(new, name, missing - LOST_ROWS_MAX)
    new.execute(
        "UPDATE stream SET next_seq = ?, first_seq = ?, written = ?, (rows, bytes) = "
        "(SELECT count(*), coalesce(sum(length(body)), 0) FROM message WHERE id BETWEEN ? AND ?) WHERE id = ?",
        (next_seq, begin, end or None, base, base | SEQ_MASK, stream),
    )
    return missing


def _with_messages(new: sqlite3.Connection) -> set[int]:
    """The streams that have any, by one look into the index for each."""
    found: set[int] = set()
    at = 0
    while True:
        (id_,) = new.execute("SELECT min(id) FROM message WHERE id >= ?", (at,)).fetchone()
        if id_ is None:
            return found
        found.add(id_ >> SEQ_BITS)
        at = ((id_ >> SEQ_BITS) + 1) << SEQ_BITS


def _gaps(new: sqlite3.Connection, stream: int, start: int, end: int) -> Iterator[_Span]:
    """Where no row is."""
    base = stream << SEQ_BITS
    after = start
    for (id_,) in new.execute(
        "SELECT id FROM message WHERE id BETWEEN ? AND ? ORDER BY id", (base | start, base | SEQ_MASK)
    ):
        seq = id_ & SEQ_MASK
        if seq > after:
            yield after, seq
        after = seq + 1
    if end > after:
        yield after, end


def _outside(spans: list[_Span], gaps: Iterable[_Span]) -> Iterator[_Span]:
    """What of the gaps lies in none of the spans, which are in order."""
    for at, to in gaps:
        for first, end in spans:
            if end <= at or first >= to:
                continue
            if first > at:
                yield at, first
            at = max(at, end)
        if at < to:
            yield at, to


def _never_written(new: sqlite3.Connection, stream: int, end: int, next_seq: int) -> list[_Span]:
    """Seqs that were reserved only, for messages that the hub settled before they were written; `end`: of the rows."""
    keys = f"reserved {stream}", f"holes {stream}"
    meta = dict(new.execute("SELECT key, value FROM meta WHERE key IN (?, ?)", keys))
    spans = []
    for text in meta.get(f"holes {stream}", "").split():
        first, _, before = text.partition("-")
        if first.isdecimal() and before.isdecimal():
            spans.append((max(int(first), int(before) - SPAN_MAX), min(int(before), next_seq)))
    if f"reserved {stream}" in meta:
        spans.append((max(end, next_seq - SPAN_MAX), next_seq))
    return sorted(spans)


def lose(new: sqlite3.Connection, wall_us: int, stream: str, seqs: Collection[int], detail: str) -> None:
    """Enter these in the ledger as corrupt, and in its totals."""
    new.executemany(
        "INSERT INTO loss (time_us, stream, seq, reason, size, detail) VALUES (?, ?, ?, 'corrupt', 0, ?)",
        ((wall_us, stream, seq, detail) for seq in seqs),
    )
    if seqs:
        _count(new, stream, len(seqs))


def _count(new: sqlite3.Connection, stream: str, messages: int) -> None:
    new.execute(
        "INSERT INTO loss_total (stream, reason, messages, bytes) VALUES (?, 'corrupt', ?, 0) "
        "ON CONFLICT DO UPDATE SET messages = messages + excluded.messages",
        (stream, messages),
    )
