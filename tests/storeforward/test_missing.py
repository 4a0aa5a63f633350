"""What a salvaged journal lacks, by spans, held against the same by sets."""

from __future__ import annotations

import sqlite3
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from storeforward import schema
from storeforward.missing import account
from storeforward.schema import SEQ_BITS

STREAM = 3
seqs = st.sets(st.integers(1, 40))
spans = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), max_size=4)


def journal(rows: list[int], next_seq: int, cursor: int | None = None, holes: str = "") -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    schema.migrate(db)
    db.execute("INSERT INTO stream (id, name, direction, next_seq) VALUES (?, 's', 'outbound', ?)", (STREAM, next_seq))
    db.executemany(
        "INSERT INTO message (id, time_us, topic, crc, body) VALUES (?, 0, 't', 0, x'00')",
        ((STREAM << SEQ_BITS | seq,) for seq in rows),
    )
    if cursor is not None:
        values = STREAM, "uplink", "uplink", cursor
        db.execute("INSERT INTO cursor (stream, name, kind, position) VALUES (?, ?, ?, ?)", values)
    if holes:
        db.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (f"holes {STREAM}", holes))
    return db


@given(seqs, st.integers(1, 45), st.integers(1, 40), spans)
def test_what_is_owed_not_there_and_was_written_once_is_in_the_ledger_seq_by_seq(
    rows: set[int], next_seq: int, cursor: int, holes: list[tuple[int, int]]
) -> None:
    told = " ".join(f"{first}-{first + length}" for first, length in holes)
    db = journal(sorted(rows), next_seq, cursor, told)
    end = max([next_seq, *(seq + 1 for seq in rows)])
    start = cursor if cursor <= end else min(rows, default=end)
    never = {seq for first, length in holes for seq in range(first, first + length)}
    owed = set(range(start, end)) - rows - never
    assert account(db, 0) == len(owed)
    assert [seq for (seq,) in db.execute("SELECT seq FROM loss ORDER BY id")] == sorted(owed)
    assert db.execute("SELECT coalesce(sum(messages), 0) FROM loss_total").fetchone() == (len(owed),)
    assert db.execute("SELECT next_seq, rows, written FROM stream").fetchone() == (
        end,
        len(rows),
        max(rows) + 1 if rows else None,
    )
    db.close()


def test_rows_are_counted_without_being_held() -> None:
    db = journal(list(range(1, 100_001, 2)), 100_001)
    tracemalloc.start()
    assert account(db, 0) == 50_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000, "fifty thousand seqs in a set are some millions of bytes"
    db.close()
