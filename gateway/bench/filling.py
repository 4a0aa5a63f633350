"""Journals with many rows, for measures that begin with a backlog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gateway.amqp.message import encode
from gateway.errors import LinesideError
from storeforward.journal import Journal
from storeforward.streams import StreamLimits

FILL_BATCH = 1000
FILL_BATCHES = 20


def fill(state_dir: Path, rows: int, say: Callable[[str], None] = lambda text: None) -> None:
    """Append to a journal that nobody has open, until it has `rows` of the stream `bench`."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    body = encode(b"." * 100)
    journal = Journal.open(state_dir)
    try:
        stream = journal.stream("bench", "outbound", StreamLimits(bytes_max=32 << 30, messages_max=20_000_000))
        journal.cursor(stream, "uplink", "uplink")
        batches = 0
        while (missing := rows - stream.rows) > 0:
            count = min(FILL_BATCH, missing)
            if journal.append_run(stream, "bench/0", lambda seq, payload: payload, [body] * count) < count:
                raise LinesideError("the journal is full: give --directory on a larger disk")
            batches += 1
            if batches % FILL_BATCHES == 0 or missing <= FILL_BATCH:
                journal.commit_now()
                if journal.wal_bytes() > 64 << 20:
                    journal.checkpoint()
                    say(f"filling a journal: {stream.rows:,} of {rows:,} rows")
    finally:
        journal.close()
