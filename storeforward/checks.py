"""What a start looks at before it trusts a journal that is there: all that a flipped bit can turn into another truth.

SQLite notices what cannot be; a smaller page count, a cursor further on, a row that no pointer leads to any more can
be. Messages have checksums of their own and are looked at when they are read. Everything here only reads: what is found
damaged can still be set aside as it is.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from storeforward import schema
from storeforward.errors import JournalCorrupt, JournalError, JournalNewer
from storeforward.pages import (
    FREE_PAGE,
    HEADER_BYTES,
    ROOT_PAGE,
    Header,
    PageDamaged,
    Pages,
    Wal,
    read_header,
)
from storeforward.room import BUSY_S, read_wal_index
from storeforward.schema import CHECKED, VERSION_KEY, copies

# Their bodies are not read. Rows of the ledger are many: one that vanishes is in its totals all the same.
_LARGE = ("dead", "retained")
_UNSEEN = ("loss",)


def check(path: Path, synchronous: str) -> None:
    """Raises JournalCorrupt where the file or its WAL is not what was written, JournalError where it is no journal."""
    if path.is_dir():
        raise JournalError(f"{path}: is a directory; move it away, a journal is a file")
    if Path(f"{path}-journal").exists():
        _roll_back(path)
    wal = Wal(Path(f"{path}-wal"), summed=False)
    size = path.stat().st_size if path.exists() else 0
    if not size:
        if wal.frames:
            raise JournalCorrupt(f"{path}: empty, and its WAL is not")
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; make the file readable and writable by this user") from error
    try:
        # Closing a descriptor of the file lets go of SQLite's locks on it: ours is closed after SQLite's.
        header = read_header(os.pread(fd, HEADER_BYTES, 0))
        if header.problem:
            raise JournalCorrupt(f"{path}: {header.problem}")
        if foreign(header, wal):
            raise JournalCorrupt(f"{path}: the WAL beside it is another journal's")
        if wal.frames and not wal.whole:
            raise JournalCorrupt(f"{path}: the header of its WAL is damaged")
        with _connected(path) as (connection, index):
            last = read_wal_index(index)[1] if wal.frames and index >= 0 else 0
            _check_wal(path, wal, last, synchronous)
            version = _check_version(path, connection, header)
            pages = _pages(path, fd, size, header, wal, last, connection)
            problem = _problem(connection, pages, version)
    except PageDamaged as error:
        raise JournalCorrupt(f"{path}: {error}") from error
    finally:
        os.close(fd)
    if problem:
        raise JournalCorrupt(f"{path}: {problem}")


def _roll_back(path: Path) -> None:
    """The power was cut while the file was made: until it is one with a WAL, SQLite keeps the way back in a journal."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)) as connection:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[tuple[sqlite3.Connection, int]]:
    """A connection, and the WAL's index, of which the same holds as of the file: closed later than SQLite's."""
    # For reading only: the last one that may write, and closes, copies the WAL into a file that may be damaged.
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=BUSY_S)
    # What is no text any more is found to be another one.
    connection.text_factory = lambda text: text.decode(errors="replace")
    index = -1
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        with contextlib.suppress(FileNotFoundError):
            index = os.open(f"{path}-shm", os.O_RDONLY | os.O_CLOEXEC)
        yield connection, index
    finally:
        connection.close()
        if index >= 0:
            os.close(index)


def _check_wal(path: Path, wal: Wal, last: int, synchronous: str) -> None:
    """`last`: the frame that SQLite takes for the last one of the last commit."""
    # Every commit was synced before the next one began. So the power can only have taken the last one, and what stands
    # behind that is damage. Where commits were not synced, it may have taken any of them.
    commits = sum(1 for frame in wal.frames[last:] if frame.commit and frame.ours)
    if commits > 1 and synchronous in ("FULL", "EXTRA"):
        raise JournalCorrupt(f"{path}: its WAL is damaged with {commits} commits from there on")


def foreign(header: Header, wal: Wal) -> bool:
    """Whether a WAL is another journal's: SQLite cannot tell."""
    theirs = wal.header
    return (
        theirs is not None
        and theirs.application_id != header.application_id
        and schema.is_journal_id(theirs.application_id)
        and schema.is_journal_id(header.application_id)
    )


def _check_version(path: Path, connection: sqlite3.Connection, header: Header) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    ours = bool(tables & {"meta", "stream", "message", "cursor"}) or schema.is_journal_id(header.application_id)
    if tables and not ours:
        raise JournalError(f"{path}: another program's file; move it away, or give this gateway its own state_dir")
    told = None
    if "meta" in tables:
        told = connection.execute("SELECT value FROM meta WHERE key = ?", (VERSION_KEY,)).fetchone()
    second = None if told is None else str(told[0]).partition(" ")[0]
    if second is not None and second != str(version):
        raise JournalCorrupt(f"{path}: schema {version} by its header, {second} by its table")
    if version > schema.VERSION:
        raise JournalNewer(
            f"{path}: written by a newer lineside (schema {version}, this one knows {schema.VERSION}); "
            "install that version again, or move the state directory away"
        )
    if ours and (version == 0 or (version >= schema.COPIES_SINCE and second is None)):
        raise JournalCorrupt(f"{path}: schema {version} by its header, which its tables are not")
    if told is not None and str(told[0]) != f"{version} {schema.fingerprint(connection)}":
        raise JournalCorrupt(f"{path}: its schema is not what was written")
    return int(version)


def _pages(
    path: Path, fd: int, size: int, header: Header, wal: Wal, last: int, connection: sqlite3.Connection
) -> Pages:
    """The pages as SQLite sees them: what is valid in the WAL stands before what is in the file."""
    overlay: dict[int, int] = {}
    count = size // header.page_size
    for frame in wal.frames[:last]:
        overlay[frame.page] = frame.at
        count = frame.commit or count
    (told,) = connection.execute("PRAGMA page_count").fetchone()
    if told != count or (not last and size % header.page_size):
        raise JournalCorrupt(f"{path}: {told} pages by its header, and {size} bytes of {header.page_size} a page")
    return Pages(fd, header.page_size, count, wal.data, overlay)


def _problem(connection: sqlite3.Connection, pages: Pages, version: int) -> str | None:
    """The first thing that is wrong, None if nothing is."""
    roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_schema WHERE rootpage > 0"))
    if len(set(roots.values())) != len(roots):
        return "two tables in one page"
    if version:
        _check_free(pages, [root for root in roots.values() if root > 1])
    for table in CHECKED:
        if table not in roots or table in _UNSEEN:
            continue
        if table in _LARGE:
            pages.check_table(roots[table])
            if table == "retained" and (problem := _retained_problem(connection)):
                return problem
        else:
            found = connection.execute(f"PRAGMA integrity_check('{table}')").fetchone()
            if found != ("ok",):
                return f"table {table}: {found[0]}"
        if version >= schema.COPIES_SINCE:
            ((wrong,),) = connection.execute(f"SELECT count(*) FROM {table} WHERE copies IS NOT {copies(table)}")
            if wrong:
                return f"table {table}: {wrong} rows are not what was written"
    return None


def _retained_problem(connection: sqlite3.Connection) -> str | None:
    """Whether each topic is found by the index; without looking at the bodies, which SQLite's own check would."""
    index = "retained INDEXED BY sqlite_autoindex_retained_1"
    ((rows,),) = connection.execute("SELECT count(*) FROM retained NOT INDEXED")
    ((names,),) = connection.execute(f"SELECT count(*) FROM {index}")
    ((lost,),) = connection.execute(
        "SELECT count(*) FROM retained r NOT INDEXED "
        f"WHERE NOT EXISTS (SELECT 1 FROM {index} WHERE topic = r.topic AND rowid = r.rowid)"
    )
    return (
        f"table retained: {rows} rows, {names} in its index, {lost} not found by it" if lost or rows != names else None
    )


def _check_free(pages: Pages, roots: list[int]) -> None:
    """SQLite writes into a page that its list says is free, whatever stands there. Raises PageDamaged.

    The pointer map, which journals have, tells of each page a second time what it is.
    """
    header = read_header(pages.read(1)[:HEADER_BYTES])
    free = list(pages.free(header.free_first, header.free_count))
    if len(set(free)) != len(free):
        raise PageDamaged("a page is free twice")
    if not header.auto_vacuum:
        return
    for page in roots:
        if pages.kind(page) != ROOT_PAGE:
            raise PageDamaged(f"page {page} is no table's")
    for page in sorted(free):
        if not 2 < page <= pages.count or pages.kind(page) != FREE_PAGE:
            raise PageDamaged(f"page {page} is listed as free, and is not")
