"""ThingsBoard gateway's SQLite event store as a peer: `python -m gateway.bench.thingsboard DIRECTORY COUNT SIZE_BYTES`.

Its own storage class, driven as its gateway does: put() returns when the message is in a queue in memory, a thread
writes batches (WAL, synchronous=NORMAL: nothing is synced before a checkpoint). No network, no protocol. Timed until
the last message can be read from its table; prints one JSON line.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
import time
from pathlib import Path
from threading import Event
from typing import Any

WRITTEN_S_MAX = 120.0
POLL_S = 0.01


class _Log(logging.Logger):
    def trace(self, *_: Any) -> None:
        """A level of that gateway's own."""


def main() -> None:
    from thingsboard_gateway.storage.sqlite.sqlite_event_storage import SQLiteEventStorage

    directory, count, size_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    store = SQLiteEventStorage({"data_file_path": f"{directory}/"}, _Log("bench", logging.ERROR), Event())
    body = "." * size_bytes
    began = time.perf_counter()
    for _ in range(count):
        store.put(body)
    reading = sqlite3.connect(directory / "data.db")
    while reading.execute("SELECT count(*) FROM messages").fetchone()[0] < count:
        if time.perf_counter() - began > WRITTEN_S_MAX:
            raise SystemExit(f"not all was written within {WRITTEN_S_MAX:g} s")
        time.sleep(POLL_S)
    print(json.dumps({"messages": count, "per_s": count / (time.perf_counter() - began)}), flush=True)
    reading.close()
    store.stop()


if __name__ == "__main__":
    main()
