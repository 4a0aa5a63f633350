"""Opening a journal's file and closing it; what SQLite's errors about it mean, and what to do about them.

Knows the settings of the connections and what a file that is full, damaged or left by a killed process needs first.
Knows nothing of what stands in it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from storeforward import schema
from storeforward.checks import check
from storeforward.durable import sync_directory
from storeforward.errors import JournalCorrupt, JournalError, corrupt
from storeforward.room import BUSY_S, takes_nothing
from storeforward.schema import SUSPECT
from storeforward.space import spend

_T = TypeVar("_T")


def open_or_salvage(state_dir: Path, open_journal: Callable[[], _T]) -> tuple[_T, str | None]:
    """What `open_journal` returns; where that needs it, the reserve is spent first, or the journal is salvaged.

    In the latter case the second value says what happened. Raises JournalError and what it is made of.
    """
    from storeforward.salvage import salvage  # only a damaged file needs it

    report = None
    try:
        why = (state_dir / SUSPECT).read_text(errors="replace").strip()
    except FileNotFoundError:
        pass
    else:
        report = salvage(state_dir, why)
    try:
        try:
            return open_journal(), report
        except sqlite3.OperationalError as error:
            # Opening writes, too: epoch, WAL index. A full disk must not keep the backlog from draining.
            if not (takes_nothing(error) and spend(state_dir)):
                raise
            return open_journal(), report
    # UnicodeDecodeError: sqlite3 quotes what is damaged in its message, and it need not be text.
    except (JournalCorrupt, sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # "malformed": SQLite's word for a schema that it does not understand.
        if isinstance(error, sqlite3.OperationalError) and not (is_damage(error) or "malformed" in str(error)):
            raise explain(state_dir / "journal.db", error) from error
        report = salvage(state_dir, str(error))
        return open_journal(), report


def open_file(state_dir: Path, synchronous: str) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """The connection that writes and the one that reads; the file is made, or migrated, if it has to be.

    Raises JournalNewer, sqlite3.Error.
    """
    path = state_dir / "journal.db"
    check(path, synchronous)
    new = not path.exists() or not path.stat().st_size
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
    reader: sqlite3.Connection | None = None
    try:
        if new:
            os.chmod(path, 0o600)
            writer.execute(f"PRAGMA page_size = {schema.PAGE_SIZE_BYTES:d}")
            # A file system that was full gets its space back as the backlog drains.
            writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute(f"PRAGMA synchronous = {synchronous}")
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("PRAGMA cache_size = -2048")
        writer.execute("PRAGMA foreign_keys = ON")
        # Unless told so, each multi-row INSERT writes the pages it changes to a file of its own first.
        writer.execute("PRAGMA temp_store = MEMORY")
        # Debian's SQLite zeroes what it deletes: every deletion would cost its size in WAL again.
        writer.execute("PRAGMA secure_delete = OFF")
        _begin_wal_anew(writer)
        schema.migrate(writer)
        if new:
            sync_directory(state_dir)
        reader = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)
        reader.execute("PRAGMA query_only = ON")
        reader.execute("PRAGMA cache_size = -1024")
    except BaseException:
        abandon(writer, reader)
        raise
    return writer, reader


def abandon(writer: sqlite3.Connection, reader: sqlite3.Connection | None) -> None:
    """Close a file that could not be used, before anybody moves it.

    The last connection to close unlinks a WAL, and does it by name.
    """
    if reader is not None:
        reader.close()
    writer.close()


def close_file(writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
    """Copy what is in the WAL into the file and close both connections, whatever happens."""
    reader.close()
    try:
        # What does not fit into the file stays in the WAL, which the next start reads.
        with contextlib.suppress(sqlite3.OperationalError):
            writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        writer.close()


def _begin_wal_anew(writer: sqlite3.Connection) -> None:
    """Copy what a killed process left in the WAL into the file.

    After a failed fsync the kernel counts pages as written that are not (fsync(2)): read back, the WAL looks whole, and
    a power cut would end it there, with everything that had been committed behind. Copied, it is written again.
    """
    writer.execute("PRAGMA busy_timeout = 0")  # a backup that reads right now is no reason to wait
    try:
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError as error:
        # On a full disk it comes later: `Room.recover` does the same before it lets messages in.
        if not takes_nothing(error):
            raise
    finally:
        writer.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000}")


def is_damage(error: BaseException) -> bool:
    """Whether an error says that what stands in the file is not what was written there.

    UnicodeDecodeError: sqlite3 quotes what is damaged in its message, and it need not be text. What should be text and
    is none has no name of SQLite's.
    """
    name = getattr(error, "sqlite_errorname", "")
    text = isinstance(error, sqlite3.OperationalError) and str(error).startswith("Could not decode to UTF-8")
    return text or isinstance(error, UnicodeDecodeError) or name.startswith("SQLITE_CORRUPT") or name == "SQLITE_NOTADB"


def damaged(state_dir: Path, error: sqlite3.Error | UnicodeDecodeError) -> JournalError:
    """What an error of the open file means; where it is damage, the next start will know of it."""
    path = state_dir / "journal.db"
    if not isinstance(error, sqlite3.Error):
        error = corrupt(str(error))
    elif not is_damage(error):
        return explain(path, error)
    (state_dir / SUSPECT).write_text(f"{error}\n")
    sync_directory(state_dir)
    return JournalCorrupt(f"{path}: {error}; the next start sets the file aside and salvages what reads")


def explain(path: Path, error: sqlite3.Error) -> JournalError:
    """What SQLite says of a journal, and what to do about it."""
    name = getattr(error, "sqlite_errorname", "")
    advice = {
        "SQLITE_READONLY": "the file or its directory is read-only; make both writable by this user",
        "SQLITE_READONLY_DIRECTORY": "the directory is read-only; make it writable by this user",
        "SQLITE_CANTOPEN": "can't be opened; check that the directory exists and is writable by this user",
        "SQLITE_BUSY": "locked by another program; close it (a database browser, a backup) and start again",
        "SQLITE_LOCKED": "locked by another program; close it (a database browser, a backup) and start again",
        "SQLITE_FULL": "no space left; free some on this file system",
        "SQLITE_IOERR_SHMSIZE": "no space left; free some on this file system",
        "SQLITE_PERM": "no permission; make the file readable and writable by this user",
    }.get(name, "check the disk, then start again")
    return JournalError(f"{path}: {error} ({name or 'SQLite'}): {advice}")
