"""A copy of a journal as one file, taken while the daemon runs; verified; put back; handed over to another machine.

The copy is a consistent moment of the journal, holds no deleted bytes and opens with `sqlite3`. A journal that was
handed over says so itself and no daemon starts on it, so that two machines never send one backlog. Knows the files and
nothing of what the messages say.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storeforward import inspection
from storeforward.durable import sync_directory
from storeforward.errors import JournalCorrupt, JournalError
from storeforward.lock import StateLock
from storeforward.salvage import set_aside
from storeforward.schema import MOVED, SUSPECT
from storeforward.sealing import intact

BACKUP = "backup"
# Between two reports of progress SQLite executes so many of its own instructions.
PROGRESS_EVERY = 200_000
PROBLEMS_SHOWN = 5
CHUNK_BYTES = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup holds. `taken_us`: wall clock of the moment it shows, as that machine believed it to be."""

    taken_us: int | None
    streams: int
    messages: int
    size_bytes: int
    dead: int
    retained: int
    sessions: int
    file_bytes: int


def back_up(state_dir: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Contents:
    """Copy the journal of `state_dir` to `target`, mode 0600, and verify the copy. A running daemon goes on.

    `target` appears whole or not at all. `progress` gets bytes done and bytes expected. Raises JournalError.
    """
    part = _part(target, overwrite)
    try:
        with _source(state_dir) as source:
            _copy(source, part, target, progress or _silent)
        contents = verify(part)
        _put(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return contents


def hand_over(state_dir: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Contents:
    """`back_up`, and from then on no daemon starts on the journal that stays behind. The daemon must be stopped.

    The mark is set before the copy is complete: if the machine dies in between, neither runs until this is repeated.
    Raises JournalError, JournalLocked while a daemon runs.
    """
    journal_path = state_dir / "journal.db"
    if not journal_path.exists():
        raise JournalError(f"{journal_path}: there is no journal; has the daemon run with this state directory?")
    lock = StateLock(state_dir)
    try:
        before = _mark(journal_path, f"{time.time_ns() // 1000} {target.absolute()}")
        try:
            return back_up(state_dir, target, overwrite=overwrite, progress=progress)
        except BaseException:
            _mark(journal_path, before)
            raise
    finally:
        lock.release()


def restore(source: Path, state_dir: Path, *, replace: bool = False, progress: Progress | None = None) -> Contents:
    """Make `source` the journal of `state_dir`, whose daemon must be stopped. A journal that is there is set aside.

    Whatever cuts it short, the next start finds the old journal or the new one, whole. Raises JournalError.
    """
    verify(source)
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state_dir / "journal.db"
    lock = StateLock(state_dir)
    building = state_dir / "journal.db.restore"
    aside = None
    try:
        if path.exists() and not replace and not _moved(path):
            raise JournalError(
                f"{path}: there is a journal already; --replace sets it aside under {state_dir / 'quarantine'}"
            )
        _copy_file(source, building, progress or _silent)
        contents = verify(building)
        owner = state_dir.stat()
        aside = set_aside(state_dir) if path.exists() else None
        for made in (building, state_dir / "lock", *([aside, aside.parent] if aside else [])):
            # Restored by root, used by the daemon's own user.
            with contextlib.suppress(PermissionError):
                os.chown(made, owner.st_uid, owner.st_gid)
        os.replace(building, path)
        sync_directory(state_dir)
        (state_dir / SUSPECT).unlink(missing_ok=True)
        sync_directory(state_dir)
    except OSError as error:
        left = (
            "nothing was changed" if aside is None else f"the next start takes the old journal up again, from {aside}"
        )
        raise JournalError(f"{building}: {error.strerror}; {left}") from error
    finally:
        building.unlink(missing_ok=True)
        lock.release()
    return contents


def verify(path: Path) -> Contents:
    """Read every page and every row of a backup; return what it holds. Raises JournalCorrupt with what is wrong."""
    if not path.is_file():
        raise JournalError(f"{path}: there is no such file")
    try:
        # Immutable: a backup is one file, whatever directory it lies in, and reading it leaves nothing beside it.
        with contextlib.closing(inspection.connect(path, "mode=ro&immutable=1", older=True)) as connection:
            return _verify(path, connection)
    # UnicodeDecodeError: sqlite3 quotes what is damaged in its message, and it need not be text.
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise JournalCorrupt(f"{path}: {error}; it is not, or no longer, a backup") from error


def _verify(path: Path, connection: sqlite3.Connection) -> Contents:
    problems = [row[0] for row in connection.execute(f"PRAGMA integrity_check({PROBLEMS_SHOWN})")]
    if problems != ["ok"]:
        raise JournalCorrupt(f"{path}: damaged: " + "; ".join(str(problem) for problem in problems))
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    messages, size = _check_rows(path, connection, "message", "id")
    dead, _ = _check_rows(path, connection, "dead", "id")
    retained, _ = _check_rows(path, connection, "retained", "topic") if version > 1 else (0, 0)
    streams, counted = connection.execute("SELECT count(*), coalesce(sum(rows), 0) FROM stream").fetchone()
    if counted != messages:
        raise JournalCorrupt(f"{path}: its counters say {counted} messages, there are {messages}")
    (sessions,) = connection.execute("SELECT count(*) FROM mqtt_session").fetchone()
    taken = connection.execute("SELECT value FROM meta WHERE key = ?", (BACKUP,)).fetchone()
    taken_us = int(taken[0]) if taken and str(taken[0]).isdecimal() else None
    return Contents(taken_us, streams, messages, size, dead, retained, sessions, path.stat().st_size)


def _check_rows(path: Path, connection: sqlite3.Connection, table: str, key: str) -> tuple[int, int]:
    """Rows of the table and the bytes of their bodies; raises JournalCorrupt if a checksum is wrong."""
    rows = size = 0
    at = {"message": "id", "dead": "seq", "retained": "0"}[table]
    expires = "expires_age_us" if table == "message" else "NULL"
    for name, at_id, topic, crc, body, expires_age_us in connection.execute(
        f"SELECT {key}, {at}, topic, crc, body, {expires} FROM {table}"
    ):
        if not intact(at_id, topic, crc, body, expires_age_us):
            raise JournalCorrupt(f"{path}: {table} {name!r} does not match its checksum")
        rows += 1
        size += len(body)
    return rows, size


@contextmanager
def _source(state_dir: Path) -> Iterator[sqlite3.Connection]:
    path = state_dir / "journal.db"
    with inspection.explained(path), contextlib.closing(inspection.open_journal(path, older=True)) as connection:
        connection.execute("PRAGMA query_only = OFF")  # the file is open for reading only; the copy is not
        yield connection


def _copy(source: sqlite3.Connection, part: Path, target: Path, progress: Progress) -> None:
    (pages,) = source.execute("PRAGMA page_count").fetchone()
    (free,) = source.execute("PRAGMA freelist_count").fetchone()
    (page_bytes,) = source.execute("PRAGMA page_size").fetchone()
    expected = max(1, (pages - free) * page_bytes)

    def report() -> int:
        progress(min(part.stat().st_size, expected), expected)
        return 0

    source.set_progress_handler(report, PROGRESS_EVERY)
    try:
        source.execute("VACUUM INTO ?", (str(part),))
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "unable to open" in str(error) or "disk I/O" in str(error):
            raise JournalError(f"{target}: {error}; the backup was not made") from error
        raise
    finally:
        source.set_progress_handler(None, 0)
    with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy:
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.execute("BEGIN")
        copy.execute("DELETE FROM meta WHERE key = ?", (MOVED,))
        copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (BACKUP, str(time.time_ns() // 1000)))
        copy.execute("COMMIT")
    progress(expected, expected)


def _part(target: Path, overwrite: bool) -> Path:
    """An empty file beside `target` that nobody else can read."""
    if target.is_dir():
        raise JournalError(f"{target}: is a directory; name the file to write")
    if target.exists() and not overwrite:
        raise JournalError(f"{target}: exists already; choose another name, or --overwrite it")
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise JournalError(f"{target}: {error.strerror}") from error
    return part


def _put(part: Path, target: Path) -> None:
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(part, target)
    sync_directory(target.absolute().parent)


def _mark(path: Path, value: str | None) -> str | None:
    """Set or take away the mark that the journal was handed over; return what it was. The lock is the caller's."""
    with inspection.explained(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        found = connection.execute("SELECT value FROM meta WHERE key = ?", (MOVED,)).fetchone()
        if value is None:
            connection.execute("DELETE FROM meta WHERE key = ?", (MOVED,))
        else:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (MOVED, value))
    return found[0] if found else None


def _moved(path: Path) -> bool:
    try:
        with contextlib.closing(inspection.open_journal(path, older=True)) as connection:
            return connection.execute("SELECT 1 FROM meta WHERE key = ?", (MOVED,)).fetchone() is not None
    except (sqlite3.Error, JournalError):
        return False  # not known to have been handed over


def _copy_file(source: Path, target: Path, progress: Progress) -> None:
    target.unlink(missing_ok=True)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with source.open("rb") as reader, open(fd, "wb") as writer:
        total = max(1, os.fstat(reader.fileno()).st_size)
        done = 0
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
            done += len(chunk)
            progress(min(done, total), total)
        writer.flush()
        os.fsync(writer.fileno())


def _silent(done: int, total: int) -> None:
    pass
