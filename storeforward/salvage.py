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
    "dead",
    "loss",
    "loss_total",
    "request",
)
LOST_ROWS_MAX = 100_000


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
        columns = [r[1] for r in new.execute(f"PRAGMA table_info({table})")]
        marks = ",".join("?" * len(columns))
        try:
            for row in old.execute(f"SELECT {','.join(columns)} FROM {table}"):
                new.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)
        except sqlite3.DatabaseError as error:
            problems.append(f"table {table}: {error}")
    kept = bad = 0
    have: dict[int, set[int]] = {}
    wall_us = int(time.time() * 1e6)
    for row in _messages(old):
        id_, _, _, _, crc, body = row
        stream, seq = id_ >> SEQ_BITS, id_ & SEQ_MASK
        if not isinstance(body, bytes) or crc32(body) != crc:
            bad += 1
            continue
        if new.execute("INSERT OR IGNORE INTO message VALUES (?,?,?,?,?,?)", row).rowcount:
            kept += 1
            have.setdefault(stream, set()).add(seq)
    try:
        for row in old.execute("SELECT id, identity FROM seen"):
            new.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", row)
    except sqlite3.DatabaseError as error:
        problems.append(f"table seen: {error}")
    lost = _account(new, have, wall_us)
    text = f"{kept} messages salvaged, {lost} lost and entered in the ledger"
    if bad:
        text += f" ({bad} of them by their CRC)"
    return text + "".join(f"; {p}" for p in problems)


def _account(new: sqlite3.Connection, have: dict[int, set[int]], wall_us: int) -> int:
    """Bring counters in line with the rows; enter every seq that is owed and missing in the ledger."""
    named = {
        int(key.removeprefix("stream ")): value.split(" ", 1)
        for key, value in new.execute("SELECT key, value FROM meta WHERE key LIKE 'stream %'")
    }
    for stream in have.keys() | named.keys():
        direction, name = named.get(stream, ("local", f"salvaged-{stream}"))
        new.execute("INSERT OR IGNORE INTO stream (id, name, direction) VALUES (?, ?, ?)", (stream, name, direction))
    total = 0
    for stream, name, next_seq in new.execute("SELECT id, name, next_seq FROM stream").fetchall():
        seqs = have.get(stream, set())
        next_seq = max(next_seq, max(seqs, default=0) + 1)
        (low,) = new.execute("SELECT min(position) FROM cursor WHERE stream = ?", (stream,)).fetchone()
        start = low if low is not None else min(seqs, default=next_seq)
        missing = 0
        for seq in range(start, next_seq):
            if seq not in seqs:
                missing += 1
                if missing <= LOST_ROWS_MAX:
                    new.execute(
                        "INSERT INTO loss (time_us, stream, seq, reason, size, detail) "
                        "VALUES (?, ?, ?, 'corrupt', 0, 'did not read when the journal was salvaged')",
                        (wall_us, name, seq),
                    )
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


def _messages(old: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Every message row that reads, first forwards; past a page that does not read by seeking beyond it."""
    select = "SELECT id, time_us, expires_age_us, topic, crc, body FROM message WHERE id > ? ORDER BY id"
    last, step = 0, 1
    end = _last_id(old)
    while last <= end:
        try:
            for row in old.execute(select, (last,)):
                last, step = row[0], 1
                yield row
            return
        except sqlite3.DatabaseError:
            # Seek past the damage in growing steps; a stream's end makes the next stream's start the next try.
            if (last & SEQ_MASK) + step > SEQ_MASK or step > 1 << 24:
                last, step = ((last >> SEQ_BITS) + 1) << SEQ_BITS, 1
            else:
                last, step = last + step, step * 2


def _last_id(old: sqlite3.Connection) -> int:
    try:
        (id_,) = old.execute("SELECT max(id) FROM message").fetchone()
        return int(id_ or 0)
    except sqlite3.DatabaseError:
        return schema.STREAMS_MAX << SEQ_BITS
