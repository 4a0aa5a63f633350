"""Rescue what reads from a damaged journal.

The damaged file is set aside whole under `quarantine/`, never changed. Every row that can still be read, and whose CRC
fits, goes into a fresh journal; what is missing between a stream's first unfinished seq and its end is entered in the
loss ledger, seq by seq. Cursors keep their place: none moves past what was not delivered.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from storeforward import schema
from storeforward.errors import JournalError
from storeforward.schema import SEQ_BITS, SEQ_MASK

SUSPECT = "journal.suspect"
SMALL_TABLES = (
    "meta",
    "stream",
    "cursor",
    "mqtt_session",
    "mqtt_subscription",
    "mqtt_will",
    "mqtt_incoming",
    "mqtt_outgoing",
    "mqtt_retained_due",
    "retained",
    "dead",
    "loss",
    "loss_total",
    "request",
)
MESSAGE_TYPES = ("INTEGER", "INTEGER", "INTEGER", "TEXT", "INTEGER", "BLOB")
PYTHON_TYPES = {"INTEGER": int, "TEXT": str, "BLOB": bytes}
# sqlite3 quotes what is damaged in its messages, and that need not be text.
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
LOST_ROWS_MAX = 100_000
STREAMS_GUESSED = 64
SKIP_MAX = 1 << 24
SINGLY_MAX = 100_000

_SELECT = "SELECT id, time_us, expires_age_us, topic, crc, body FROM message"


def salvage(state_dir: Path, clock: Callable[[], float]) -> str:
    """Set `journal.db` aside and build a fresh one from what reads; return one sentence that says what was lost."""
    aside = _set_aside(state_dir)
    fresh_path = state_dir / "journal.db"
    building = state_dir / "journal.db.salvage"
    for leftover in (building, Path(f"{building}-wal"), Path(f"{building}-shm"), Path(f"{building}-journal")):
        leftover.unlink(missing_ok=True)
    # The old file is read from a copy: opening it would replay its WAL and so change it.
    work = state_dir / "quarantine" / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        for name in aside.iterdir():
            shutil.copy2(name, work / name.name)
        old = sqlite3.connect(work / "journal.db", isolation_level=None)
        new = sqlite3.connect(building, isolation_level=None)
        try:
            new.execute(f"PRAGMA page_size = {schema.PAGE_SIZE_BYTES:d}")
            new.execute("PRAGMA auto_vacuum = INCREMENTAL")
            new.execute("PRAGMA synchronous = FULL")
            schema.migrate(new)
            new.execute("BEGIN")
            notes = _copy(old, new)
            new.execute("COMMIT")
        finally:
            old.close()
            new.close()
        os.chmod(building, 0o600)
        os.replace(building, fresh_path)
        (state_dir / SUSPECT).unlink(missing_ok=True)
        fd = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return f"the journal was damaged; set aside as {aside}; {notes}"


def _set_aside(state_dir: Path) -> Path:
    quarantine = state_dir / "quarantine"
    quarantine.mkdir(mode=0o700, exist_ok=True)
    number = 1
    while (aside := quarantine / f"{number:04d}").exists():
        number += 1
    files = [p for s in ("", "-wal", "-shm") if (p := state_dir / f"journal.db{s}").exists()]
    if not files:
        # A salvage that was cut off after the file had been moved: go on from the newest set.
        done = sorted(p for p in quarantine.iterdir() if p.name.isdigit())
        if not done:
            raise JournalError(f"{state_dir}: no journal to salvage; remove {state_dir / SUSPECT} to start empty")
        return done[-1]
    (state_dir / SUSPECT).touch()
    aside.mkdir(mode=0o700)
    for path in files:
        os.rename(path, aside / path.name)
    return aside


def _copy(old: sqlite3.Connection, new: sqlite3.Connection) -> str:
    problems: list[str] = []
    for table in SMALL_TABLES:
        columns, types = zip(*[r[1:3] for r in new.execute(f"PRAGMA table_info({table})")], strict=True)
        marks = ",".join("?" * len(columns))
        try:
            for row in old.execute(f"SELECT {','.join(columns)} FROM {table}"):
                if _makes_sense(table, row, types):
                    new.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)
                else:
                    problems.append(f"table {table}: a row that makes no sense")
        except DAMAGE as error:
            problems.append(f"table {table}: {error}")
    kept = bad = 0
    have: dict[int, set[int]] = {}
    wall_us = int(time.time() * 1e6)
    ends = dict(new.execute("SELECT id, next_seq FROM stream"))
    for row in _messages(old, _stream_ids(new)):
        id_, _, _, _, crc, body = row
        stream, seq = id_ >> SEQ_BITS, id_ & SEQ_MASK
        # Beyond the stream's end only a damaged seq can be: the counter is written with the rows.
        if not _makes_sense("message", row, MESSAGE_TYPES) or crc32(body) != crc or seq >= ends.get(stream, SEQ_MASK):
            bad += 1
            continue
        if new.execute("INSERT OR IGNORE INTO message VALUES (?,?,?,?,?,?)", row).rowcount:
            kept += 1
            have.setdefault(stream, set()).add(seq)
    try:
        for row in old.execute("SELECT id, identity FROM seen"):
            new.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", row)
    except DAMAGE as error:
        problems.append(f"table seen: {error}")
    lost = _account(new, have, wall_us)
    text = f"{kept} messages salvaged, {lost} lost and entered in the ledger"
    if bad:
        text += f" ({bad} of them by their CRC)"
    return text + "".join(f"; {p}" for p in problems)


def _makes_sense(table: str, row: tuple[Any, ...], types: tuple[str, ...]) -> bool:
    """Whether the columns are of the types that were written; a flipped bit can change them, SQLite does not mind."""
    if table == "meta" and row[0] == "epoch" and not str(row[1]).isdecimal():
        return False
    return all(v is None or type(v) is PYTHON_TYPES[t] for v, t in zip(row, types, strict=True))


def _account(new: sqlite3.Connection, have: dict[int, set[int]], wall_us: int) -> int:
    """Bring counters in line with the rows; enter every seq that is owed and missing in the ledger."""
    named = {
        int(key.removeprefix("stream ")): value.split(" ", 1)
        for key, value in new.execute("SELECT key, value FROM meta WHERE key LIKE 'stream %'")
    }
    counted = {id_ for (id_,) in new.execute("SELECT id FROM stream")}
    for stream in have.keys() | named.keys():
        direction, name = named.get(stream, ("local", f"salvaged-{stream}"))
        new.execute("INSERT OR IGNORE INTO stream (id, name, direction) VALUES (?, ?, ?)", (stream, name, direction))
    total = 0
    for stream, name, next_seq in new.execute("SELECT id, name, next_seq FROM stream").fetchall():
        seqs = have.get(stream, set())
        next_seq = max(next_seq, max(seqs, default=0) + 1)
        if stream in counted:
            # Nobody can be past the end: that position is damage, and what is there goes again.
            new.execute(
                "UPDATE cursor SET position = ? WHERE stream = ? AND position > ?",
                (min(seqs, default=next_seq), stream, next_seq),
            )
        else:
            # Its counter is lost. A seq that a cursor is past must not be given to a new message.
            (far,) = new.execute("SELECT max(position) FROM cursor WHERE stream = ?", (stream,)).fetchone()
            next_seq = max(next_seq, far or 0)
        (low,) = new.execute("SELECT min(position) FROM cursor WHERE stream = ?", (stream,)).fetchone()
        start = low if low is not None else min(seqs, default=next_seq)
        missing = 0
        after = start
        for seq in [*sorted(seq for seq in seqs if seq >= start), next_seq]:
            new.executemany(
                "INSERT INTO loss (time_us, stream, seq, reason, size, detail) "
                "VALUES (?, ?, ?, 'corrupt', 0, 'did not read when the journal was salvaged')",
                ((wall_us, name, gone) for gone in range(after, min(seq, after + LOST_ROWS_MAX - missing))),
            )
            missing += seq - after
            after = seq + 1
        if missing:
            new.execute(
                "INSERT INTO loss_total VALUES (?, 'corrupt', ?, 0) "
                "ON CONFLICT DO UPDATE SET messages = messages + excluded.messages",
                (name, missing),
            )
        total += missing
        base = stream << SEQ_BITS
        new.execute(
            "UPDATE stream SET next_seq = ?, (rows, bytes) = "
            "(SELECT count(*), coalesce(sum(length(body)), 0) FROM message WHERE id BETWEEN ? AND ?) WHERE id = ?",
            (next_seq, base, base | SEQ_MASK, stream),
        )
    return total


def _stream_ids(new: sqlite3.Connection) -> list[int]:
    """Streams that the salvaged tables name; if neither table reads, the numbers that streams get first."""
    ids = {i for (i,) in new.execute("SELECT id FROM stream")}
    ids |= {int(k.removeprefix("stream ")) for (k,) in new.execute("SELECT key FROM meta WHERE key LIKE 'stream %'")}
    return sorted(ids or range(1, STREAMS_GUESSED))


def _messages(old: sqlite3.Connection, streams: list[int]) -> Iterator[tuple[Any, ...]]:
    """Every message row that reads: each stream forwards, past a page that does not read by seeking beyond it."""
    try:
        old.execute("SELECT id FROM message LIMIT 0")
    except DAMAGE:
        return  # the schema itself is gone
    for stream in streams:
        base = stream << SEQ_BITS
        last, step = base, 1
        while last - base + step <= SEQ_MASK and step <= SKIP_MAX:
            try:
                for row in old.execute(f"{_SELECT} WHERE id > ? AND id <= ? ORDER BY id", (last, base | SEQ_MASK)):
                    if row[0] <= last:
                        raise sqlite3.DatabaseError("a page of another place")
                    if row[0] > last + 1:
                        yield from _singly(old, last + 1, row[0])
                    last, step = row[0], 1
                    yield row
                break
            except DAMAGE:
                pass
            # Growing steps, then back: what lies between the damage and where reading begins again is looked up singly.
            try:
                beyond = old.execute(
                    "SELECT id FROM message WHERE id > ? AND id <= ? ORDER BY id LIMIT 1",
                    (last + step, base | SEQ_MASK),
                ).fetchone()
            except DAMAGE:
                step *= 2
                continue
            if beyond is not None and beyond[0] <= last + step:
                step *= 2
                continue
            end = base | SEQ_MASK if beyond is None else beyond[0]
            yield from _singly(old, last + 1, min(end, last + step + 1))
            if beyond is None:
                break
            last, step = end - 1, 1
        else:
            # Nothing reads to the end: what is there of the part after the last good row is found only one by one.
            yield from _singly(old, last + 1, last + SINGLY_MAX)


def _singly(old: sqlite3.Connection, start: int, end: int) -> Iterator[tuple[Any, ...]]:
    for id_ in range(start, min(end, start + SINGLY_MAX)):
        try:
            row = old.execute(f"{_SELECT} WHERE id = ?", (id_,)).fetchone()
        except DAMAGE:
            continue
        if row is not None:
            yield row
