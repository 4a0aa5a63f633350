"""Help for tests on the disk that forgets."""

from __future__ import annotations

import contextlib
import os
import sqlite3

from storeforward.journal import Journal


def abandon(journal: Journal) -> None:
    """Let go as a process does that ends. Only when the disk is dead or was cut: else closing would tidy up."""
    journal._r.close()
    with contextlib.suppress(sqlite3.Error):
        journal._w.close()
    os.close(journal._index_fd)
    journal._lock.release()
