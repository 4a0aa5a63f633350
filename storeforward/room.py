"""Whether a batch may be written when the disk is nearly full, and giving back what the drained backlog freed.

Two lines of defence. A batch with messages is let in only if the disk holds it twice, in the WAL and in the file, so
that our own messages never use up the room that a checkpoint needs. Where others fill the disk and a write fails all
the same, the reserve is spent on what must go on: cursors, the ledger, deletions, giving space back.

Asks SQLite for checkpoints and vacuums only; knows no tables, and of a batch only what it may cost.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from pathlib import Path
from typing import Any

from storeforward import schema
from storeforward.errors import JournalError
from storeforward.space import Space

STATEMENTS_DISK_FULL_MAX = 512
# With this much free beside what a batch can cost, nobody has to look closer.
ROOM_BYTES_PLENTY = 64 << 20
ROW_BYTES = 64
FIXED_PAGES = 16
PAGES_A_STREAM = 4
BUSY_S = 5

# Of the WAL index' header and checkpoint information, which SQLite documents: page size, last valid frame, pages of
# the database as of that frame, frames already copied into the file.
_WAL_INDEX = struct.Struct("=14xHII72xI")

_TAKES_NOTHING = {
    "SQLITE_FULL",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_DIR_FSYNC",
    "SQLITE_IOERR_TRUNCATE",
    "SQLITE_IOERR_SHMSIZE",
}

_PUT_BACK = "nothing more is acknowledged; put the file back if it was moved away, or start with what is there"

_Statement = tuple[str, tuple[Any, ...], bool]


class Room:
    """`full`: the disk takes no messages. `low`: it takes those of urgent streams at most.

    `has_urgent`: whether there are any; without them nothing is kept for them. `wal_held`: a reader keeps the WAL from
    being copied into the file. `index_fd`: the WAL index, which stays the journal's to close.
    """

    def __init__(self, state_dir: Path, writer: sqlite3.Connection, index_fd: int, space: Space) -> None:
        self._path = state_dir / "journal.db"
        self._wal_path = state_dir / "journal.db-wal"
        self._files = {
            path: _identity(os.stat(path)) for path in (self._path, self._wal_path, state_dir / "journal.db-shm")
        }
        self._w = writer
        self._index_fd = index_fd
        self.space = space
        self.full = self.low = not space.laid_by or space.free_bytes() < space.delete_bytes
        self.has_urgent = False
        self.wal_held = False
        self._checkpoint_at_bytes = space.wal_bytes

    # ------------------------------------------------------------------ letting a batch in

    def admit(self, size_bytes: int, rows: int, streams: int) -> str | None:
        """None if messages of this size may be written; else the reason why not, and the disk counts as full.

        The batch with which room gets low is still let in, whatever streams it is for: it fits.
        Raises JournalError where what would be written is nothing that a restart would find.
        """
        self._check_in_place()
        size = size_bytes + ROW_BYTES * rows
        pages = FIXED_PAGES + PAGES_A_STREAM * streams
        cost = size + size // 2 + pages * schema.PAGE_SIZE_BYTES
        free = self.space.free_bytes()
        if free > 2 * cost + ROOM_BYTES_PLENTY:
            return None
        room = self.room_bytes()
        if room >= 2 * cost:
            self.low = self.low or room < 2 * cost + self._kept_bytes
            return None
        self.full = self.low = True
        self.space.ask(2 * cost)
        return f"the disk is full: {free} bytes free"

    def afford(self, statements: list[_Statement], *, deletes: bool) -> str | None:
        """With the disk full, what is written must leave room, the reserve counted, to copy the WAL into the file.

        None if it does, else the reason. A reader that holds a snapshot keeps the WAL from being copied: cursors and
        the ledger can still be written for a while, deletions wait (they would only fill the WAL), and then all of it
        waits until the reader is gone.
        """
        size = sum(_size_bytes(statement) for statement in statements)
        cost = 2 * size + FIXED_PAGES * schema.PAGE_SIZE_BYTES
        if deletes and not self.wal_held:
            cost += 2 * self.space.delete_bytes_full
        reserve = self.space.reserve_bytes if self.space.laid_by else 0
        return "the disk is full, and the reserve spent" if self.room_bytes() + reserve < cost else None

    def statements_affordable(self, statements: list[_Statement]) -> int:
        """With the disk full: how many of these, from the first on, surely fit the reserve in one commit."""
        size = count = 0
        for statement in statements[:STATEMENTS_DISK_FULL_MAX]:
            size += _size_bytes(statement)
            if count and size > self.space.statement_bytes_full:
                break
            count += 1
        return count

    def found_none(self) -> None:
        """A write or sync failed: no messages from now on, and the reserve for the rest."""
        self.full = self.low = True
        self.space.spend()

    def _check_in_place(self) -> None:
        """SQLite would go on writing into files that have lost their name, and all of it would be gone at the end."""
        for path, identity in self._files.items():
            try:
                found = _identity(os.stat(path))
            except OSError as error:
                if path == self._wal_path and isinstance(error, FileNotFoundError):
                    # The file itself is in place: what was acknowledged comes out of the nameless WAL into it.
                    with contextlib.suppress(sqlite3.Error):
                        self.checkpoint("TRUNCATE")
                raise JournalError(f"{path}: {error.strerror}, while it is in use: {_PUT_BACK}") from error
            if found != identity:
                raise JournalError(f"{path}: another file is in its place, while it is in use: {_PUT_BACK}")

    # ------------------------------------------------------------------ giving it back

    def checkpoint_due(self) -> bool:
        return self.wal_bytes() > self._checkpoint_at_bytes

    def checkpoint(self, mode: str) -> bool:
        """Whether everything was copied, so that the next commit starts the WAL from its beginning."""
        busy, frames, copied = self._w.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        done = not busy and frames == copied
        # A reader that stays (a backup, a shell) holds it up; asking again at every commit would only cost syncs.
        self._checkpoint_at_bytes = self.space.wal_bytes + (0 if done else self.wal_bytes())
        return done

    def recover(self) -> bool:
        """With the disk full: give back what the drained backlog freed, and take messages again once there is room.

        Whether there is more to give back. Any thread, between commits only. Raises sqlite3.DatabaseError for
        anything but writes and syncs that fail, JournalError as `admit`.

        After a failed sync the kernel counts pages as written that are not (fsync(2)). So nothing is acknowledged
        before all of the WAL has been copied into the file and synced, and the WAL begun anew.
        """
        self._check_in_place()
        space = self.space
        more = False
        try:
            # Not to wait for a reader: nothing else could be committed meanwhile.
            self._w.execute("PRAGMA busy_timeout = 0")
            try:
                self.wal_held = bool(self.wal_bytes()) and not self.checkpoint("TRUNCATE")
                if not self.wal_held:
                    more = self._vacuum()
            finally:
                self._w.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000}")
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                return False
            if not takes_nothing(error):
                raise
            return space.spend()
        if not space.laid_by and space.room_for_reserve():
            space.lay_by()
        room = self.room_bytes()
        if space.laid_by and room >= space.intake_bytes:
            self.full = False
            self.low = room < space.intake_bytes + self._kept_bytes
        return more

    def _vacuum(self) -> bool:
        """Give a bounded number of free pages back to the file system; whether there are more."""
        (free,) = self._w.execute("PRAGMA freelist_count").fetchone()
        if not free:
            return False
        # By executescript, which steps to the end; execute() stops after the first page.
        self._w.executescript(f"PRAGMA incremental_vacuum({self.space.vacuum_pages})")
        self.checkpoint("TRUNCATE")
        return bool(free > self.space.vacuum_pages)

    # ------------------------------------------------------------------ measuring

    @property
    def _kept_bytes(self) -> int:
        return self.space.urgent_bytes if self.has_urgent else 0

    def room_bytes(self) -> int:
        """What is free, less what the file still grows by when the WAL is copied into it.

        What can be written to the WAL without making its file longer counts as free.
        """
        page_bytes, frames, pages, copied = self._wal_index()
        growth = max(0, pages * page_bytes - self._path.stat().st_size)
        used = 0 if frames == copied else frames * page_bytes
        slack = max(0, self._wal_path.stat().st_size - used)
        return self.space.free_bytes() + slack - growth

    def wal_bytes(self) -> int:
        """How much of the WAL is in use. Its file never shrinks, so the file's size would say "too large" for good."""
        page_bytes, frames, _, _ = self._wal_index()
        return page_bytes * frames

    def _wal_index(self) -> tuple[int, int, int, int]:
        return read_wal_index(self._index_fd)


def read_wal_index(fd: int) -> tuple[int, int, int, int]:
    """Of the WAL's index, which connections keep: page size, valid frames, pages of the file, frames copied into it."""
    try:
        page_bytes, frames, pages, copied = _WAL_INDEX.unpack(os.pread(fd, _WAL_INDEX.size, 0))
    except struct.error:
        return 0, 0, 0, 0
    return page_bytes or 1 << 16, frames, pages, copied


def takes_nothing(error: sqlite3.Error) -> bool:
    """Whether the disk refused a write or a sync, which it may take again: full, over quota, read-only, failing.

    How a lack of room shows differs between file systems.
    """
    return getattr(error, "sqlite_errorname", "") in _TAKES_NOTHING


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def _size_bytes(statement: _Statement) -> int:
    return sum(len(p) for p in statement[1] if isinstance(p, (str, bytes)))
