"""Rescue what reads from a damaged journal.

The damaged file is set aside whole under `quarantine/`, never changed. Every row that stands in any of its pages, and
whose checksum or copies fit, goes into a fresh journal, whether SQLite reaches that page or not; what is missing
between a stream's first unfinished seq and its end is entered in the loss ledger, seq by seq. Cursors keep their place:
none moves past what was not delivered.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

from storeforward import schema
from storeforward.checks import foreign
from storeforward.durable import make_directories, sync_directory
from storeforward.errors import JournalError
from storeforward.harvest import Harvest
from storeforward.missing import account, lose
from storeforward.pages import (
    FREE_PAGE,
    HEADER_BYTES,
    ROOT_PAGE,
    TREE_PAGE,
    WITH_RECORDS,
    Pages,
    Wal,
    mend,
    read_header,
)
from storeforward.schema import SUSPECT
from storeforward.sealing import META, is_sealed

_SET = "being set aside as "
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
    "seen",
)
PYTHON_TYPES = {"INTEGER": int, "TEXT": str, "BLOB": bytes}
# sqlite3 quotes what is damaged in its messages, and that need not be text.
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)


def salvage(state_dir: Path, why: str = "") -> str:
    """Set `journal.db` aside and build a fresh one from what reads; return one sentence that says what was lost.

    `why`: what was found, for that sentence.

    Can be cut off anywhere and goes on at the next call: until all is done, `journal.suspect` names the set.
    """
    aside = set_aside(state_dir)
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
        wal = Wal(aside / "journal.db-wal")
        if _other(aside, wal):
            wal = Wal(work / "none")
        size, behind = mend(work / "journal.db", wal)
        new = sqlite3.connect(building, isolation_level=None)
        try:
            new.execute(f"PRAGMA page_size = {schema.PAGE_SIZE_BYTES:d}")
            new.execute("PRAGMA auto_vacuum = INCREMENTAL")
            new.execute("PRAGMA synchronous = FULL")
            schema.migrate(new)
            new.execute("PRAGMA foreign_keys = OFF")
            new.execute("BEGIN")
            notes = _copy(work / "journal.db", wal, size, new)
            new.execute("COMMIT")
        finally:
            new.close()
        os.chmod(building, 0o600)
        os.replace(building, fresh_path)
        sync_directory(state_dir)
        (state_dir / SUSPECT).unlink(missing_ok=True)
        sync_directory(state_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if behind:
        notes += f"; {behind} commits of the WAL stood behind the damage"
    found = "" if not why or why.startswith(_SET) else f" ({why})"
    return f"the journal was damaged{found}; set aside as {aside}; {notes}"


def _other(aside: Path, wal: Wal) -> bool:
    try:
        with (aside / "journal.db").open("rb") as file:
            return foreign(read_header(file.read(HEADER_BYTES)), wal)
    except FileNotFoundError:
        return False


def set_aside(state_dir: Path) -> Path:
    """Move the damaged files into a set of their own, whole: whatever cuts this off, the next call completes the set.

    Each step is durable before the next: a set without its name in `journal.suspect` would be begun anew, and a WAL
    without its file reads as nothing. Until SUSPECT is gone, a start salvages the set. Returns where it is.
    """
    quarantine = state_dir / "quarantine"
    suspect = state_dir / SUSPECT
    begun = _set_begun(state_dir)
    if begun is None:
        if not any(path.exists() for path in _files(state_dir)):
            raise JournalError(f"{state_dir}: no journal to salvage; remove {suspect} to start empty")
        number = 1
        while (quarantine / f"{number:04d}").exists():
            number += 1
        begun = quarantine / f"{number:04d}"
        make_directories(begun)
        fresh = suspect.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(f"{_SET}{begun.name}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, suspect)
        sync_directory(state_dir)
    for path in _files(state_dir):
        # What is there already was moved before the cut; what has its name now is the fresh one, and is made again.
        if path.exists() and not (begun / path.name).exists():
            os.rename(path, begun / path.name)
    sync_directory(begun)
    sync_directory(state_dir)
    return begun


def _set_begun(state_dir: Path) -> Path | None:
    """The set that an earlier call was making, if one was cut off."""
    try:
        text = (state_dir / SUSPECT).read_text(errors="replace")
    except FileNotFoundError:
        return None
    aside = state_dir / "quarantine" / text.removeprefix(_SET).strip()
    return aside if text.startswith(_SET) and aside.is_dir() else None


def _files(state_dir: Path) -> list[Path]:
    return [state_dir / f"journal.db{suffix}" for suffix in ("", "-wal", "-shm")]


def _copy(work: Path, wal: Wal, size: int, new: sqlite3.Connection) -> str:
    """Fill `new` with what reads; return what there was to say about the rest."""
    problems = _small_tables(work, new)
    harvest = Harvest(new)
    fd = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = Pages(fd, size, os.fstat(fd).st_size // size)
        mapped = read_header(pages.read(1)).auto_vacuum
        free = []
        for number in range(1, pages.count + 1):
            if mapped and number > 1 and number == pages.map_page(number):
                continue
            page = pages.read(number)
            kind = pages.kind(number) if mapped and number > 1 else TREE_PAGE
            if kind == FREE_PAGE:
                # What was deleted stands there as if it had not been: it counts only where it is missing.
                free.append(number)
            # One of the two may be damaged. Of a large body there are pages that are neither.
            elif kind in (ROOT_PAGE, TREE_PAGE) or page[0] in WITH_RECORDS:
                pages.harvest(page, _start(number), harvest.judge, harvest.rest)
        harvest.settle()
        for number in free:
            pages.harvest(pages.read(number), 0, harvest.judge_message)
        for frame in wal.frames if wal.page_size == size else []:
            if not frame.chained:
                pages.harvest(wal.page(frame), _start(frame.page), harvest.judge_message)
        harvest.finish()
    finally:
        os.close(fd)
    # Whatever became of that table: the next start must know which keys it needs.
    new.executemany("INSERT OR IGNORE INTO meta (key, value) VALUES (?, '')", [(META + key,) for key in harvest.keys])
    wall_us = int(time.time() * 1e6)
    for table, count in harvest.problems.items():
        lose(new, wall_us, "-", [0] * count, f"a row of the table {table}")
    lost = account(new, wall_us)
    ((found,),) = new.execute("SELECT count(*) FROM message")
    text = f"{found} messages salvaged, {lost} lost and entered in the ledger"
    problems += [f"table {table}: {count} rows that make no sense" for table, count in harvest.problems.items()]
    return text + "".join(f"; {p}" for p in problems)


def _start(page: int) -> int:
    return HEADER_BYTES if page == 1 else 0


def _small_tables(work: Path, new: sqlite3.Connection) -> list[str]:
    """What SQLite reads of tables whose rows have no copies; those that have, since schema 5, are found without it."""
    problems = []
    with contextlib.closing(sqlite3.connect(work, isolation_level=None)) as old:
        try:
            old.execute("SELECT 1 FROM sqlite_schema").fetchone()
        except DAMAGE as error:
            return [f"its schema: {error}"]
        for table in SMALL_TABLES:
            info = new.execute(f"PRAGMA table_info({table})").fetchall()
            try:
                there = {row[1] for row in old.execute(f"PRAGMA table_xinfo({table})")}
                if not there or "copies" in there:
                    continue
                columns, types = zip(*[row[1:3] for row in info if row[1] in there], strict=True)
                names, marks = ", ".join(columns), ",".join("?" * len(columns))
                for row in old.execute(f"SELECT {names} FROM {table}"):
                    if _makes_sense(table, row, types):
                        new.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", row)
                    else:
                        problems.append(f"table {table}: a row that makes no sense")
            except DAMAGE as error:
                problems.append(f"table {table}: {error}")
    return problems


def _makes_sense(table: str, row: tuple[Any, ...], types: tuple[str, ...]) -> bool:
    """Whether the columns are of the types that were written; a flipped bit can change them, SQLite does not mind."""
    if table == "meta" and row[0] == "epoch" and not str(row[1]).isdecimal():
        return False
    return all(
        v is None or type(v) is PYTHON_TYPES[t] or (t == "TEXT" and is_sealed(v))
        for v, t in zip(row, types, strict=True)
    )
