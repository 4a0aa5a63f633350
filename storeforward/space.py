"""The room a journal has on its file system: what is free, and a reserve laid by in a file of its own.

Without a reserve a full disk is a trap: what has drained could not be deleted, because SQLite writes a deletion to the
WAL first, page by page, and copying the WAL into the file may make the file longer. All sizes that have to fit into the
reserve are shares of it and stand here. Knows no SQL.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from storeforward.schema import PAGE_SIZE_BYTES

RESERVE_BYTES_MAX = 16 << 20
RESERVE_BYTES_MIN = 1 << 20
RESERVE_SHARE = 8
LEDGER_ROW_BYTES = 256
LEDGER_SHARE = 64
LEDGER_ROWS_MAX = 200_000


class Space:
    """`laid_by`: whether the reserve is there. Spent only when a write finds no room; laid by again before intake."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._path = state_dir / "reserve"
        disk = os.statvfs(state_dir)
        total = disk.f_blocks * disk.f_frsize
        reserve = max(RESERVE_BYTES_MIN, min(RESERVE_BYTES_MAX, total // RESERVE_SHARE))
        self.reserve_bytes = reserve
        # The WAL is copied into the file when it is longer; the copy, growth of the file included, fits the reserve.
        self.wal_bytes = reserve // 2
        # Callers stop reading when this much is staged: WAL and one batch more fit the reserve.
        self.pending_bytes = reserve // 4
        # What one commit may delete costs about as much WAL: with the disk full, an eighth of the reserve, and the
        # pages that every commit touches (cursor, stream, interior pages) another.
        self.delete_bytes = reserve // 4
        self.delete_bytes_full = reserve // 8
        self.statement_bytes_full = reserve // 8
        # Of what is free when other streams are refused, so much is left to those of class "urgent".
        self.urgent_bytes = reserve // 2
        # A page that moves costs itself and the page that points to it.
        self.vacuum_pages = max(4, reserve // 8 // PAGE_SIZE_BYTES)
        self.ledger_rows = min(LEDGER_ROWS_MAX, total // LEDGER_SHARE // LEDGER_ROW_BYTES)
        self.ledger_rows_trim = min(1000, reserve // 16 // LEDGER_ROW_BYTES)
        self._intake_bytes = (reserve, max(reserve, total // 4))
        self.intake_bytes = reserve
        self.laid_by = False
        if (self._path.exists() and self._path.stat().st_size >= reserve) or self.room_for_reserve():
            self.lay_by()

    def free_bytes(self) -> int:
        disk = os.statvfs(self._state_dir)
        return disk.f_bavail * disk.f_frsize

    def room_for_reserve(self) -> bool:
        """Not for its last byte of room: what is being deleted needs some beside it."""
        return self.free_bytes() >= self.reserve_bytes + self.delete_bytes

    def ask(self, need_bytes: int) -> None:
        """A batch that needed this much was refused: have as much room before the next is let in, within reason."""
        low, high = self._intake_bytes
        self.intake_bytes = min(max(need_bytes, low), high)

    def lay_by(self) -> bool:
        """Have the reserve on the disk; False where it does not fit."""
        self.laid_by = False
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # full, read-only, or failing: what is wrong shows when something has to be written
            return False
        try:
            os.posix_fallocate(fd, 0, self.reserve_bytes)
            self.laid_by = True
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        return self.laid_by

    def spend(self) -> bool:
        """Give the reserve to who needs it now; whether there was one."""
        had, self.laid_by = self.laid_by, False
        return spend(self._state_dir) or had


def spend(state_dir: Path) -> bool:
    """As `Space.spend`, for whoever has no journal open yet."""
    path = state_dir / "reserve"
    with contextlib.suppress(OSError):  # none there, or a file system that takes nothing at all
        if path.stat().st_size:
            os.truncate(path, 0)
            return True
    return False
