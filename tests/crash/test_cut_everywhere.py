"""Power cut at every single change to the disk: first start, migration, salvage, checkpoint, reserve, ordinary work.

The journal runs in this process on the disk that forgets. The disk dies with its n-th change, then loses what was not
synced; the next start must find everything that was acknowledged. LINESIDE_CUT_EVERYWHERE=1 takes every n, and at each
all three of what a cut can leave; without it, of plain writes only some, and the three by turns.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.simulate.cutmount import CutMount
from storeforward import schema
from storeforward.durable import make_directories
from storeforward.errors import JournalError, JournalFull
from storeforward.journal import Journal
from storeforward.space import RESERVE_SHARE
from storeforward.streams import Stream
from tests.conftest import require_fuse
from tests.cut import abandon
from tests.storeforward.test_journal import encode, outbound

EVERY = "LINESIDE_CUT_EVERYWHERE" in os.environ
KEEPS = ("nothing", "torn", "some")
WRITES_APART, WRITES_MAX = 11, 12  # between two syncs one write is as good as another; so many of them at most
DISK_BYTES = 16 << 20


@dataclass(eq=False)
class Known:
    """The independent record. `owed`: acknowledged and not delivered, by seq; `sent`: everything ever given a seq."""

    owed: dict[int, bytes] = field(default_factory=dict)
    sent: dict[int, bytes] = field(default_factory=dict)
    position: int = 1  # acknowledged
    position_max: int = 1
    tokens: set[str] = field(default_factory=set)
    damaged: bool = False

    def committed(self, tokens: list[tuple[int, bytes]]) -> None:
        self.owed.update(tokens)

    def failed(self, tokens: list[tuple[int, bytes]], error: JournalFull) -> None:
        """Refused and not owed, though a dying disk may have kept it."""


def append(journal: Journal, stream: Stream, known: Known, count: int, size: int = 300) -> None:
    for _ in range(count):
        payload = os.urandom(size)
        seq = journal.append(stream, "a/b", encode, payload, identity=b"sender" + payload[:10])
        known.sent[seq] = encode(seq, payload)
        journal.wait(known, (seq, known.sent[seq]))


def deliver(journal: Journal, stream: Stream, known: Known, position: int) -> None:
    known.position_max = position
    journal.advance(stream, stream.cursors["uplink"], position)
    journal.commit_now()
    known.position = position
    for seq in [seq for seq in known.owed if seq < position]:
        del known.owed[seq]


@contextlib.contextmanager
def opened(state: Path, known: Known) -> Iterator[tuple[Journal, Stream]]:
    """Closed afterwards if the disk lives; if it died, let go as a process does that ends."""
    journal = Journal.open(state)
    try:
        assert journal.epoch_token not in known.tokens, "an identity would be used twice"
        known.tokens.add(journal.epoch_token)
        yield journal, outbound(journal)
    except BaseException:
        abandon(journal)
        raise
    journal.close()


def work(state: Path, known: Known) -> None:
    """A day of a gateway in small: messages, deliveries, a checkpoint, more messages."""
    with opened(state, known) as (journal, stream):
        for _ in range(3):
            append(journal, stream, known, 20)
            journal.commit_now()
        deliver(journal, stream, known, stream.cursors["uplink"].position + 30)
        journal.checkpoint()
        append(journal, stream, known, 60, 1000)
        journal.commit_now()


def first_start(state: Path, known: Known) -> None:
    make_directories(state)
    with opened(state, known) as (journal, stream):
        append(journal, stream, known, 5)
        journal.commit_now()


def start(state: Path, known: Known) -> None:
    with opened(state, known) as (journal, stream):
        append(journal, stream, known, 5)
        journal.commit_now()


def checkpoint(state: Path, known: Known) -> None:
    """The WAL copied into the file, begun anew, and cut to nothing, with rows deleted and space given back between."""
    with opened(state, known) as (journal, stream):
        append(journal, stream, known, 100, 1000)
        journal.commit_now()
        journal.checkpoint()
        append(journal, stream, known, 5)
        journal.commit_now()
        deliver(journal, stream, known, stream.committed - 3)
        while journal.recover():
            pass
        append(journal, stream, known, 5)
        journal.commit_now()


def from_nothing(state: Path) -> Known:
    return Known()


def from_empty(state: Path) -> Known:
    state.mkdir()
    return Known()


def from_ordinary(state: Path) -> Known:
    state.mkdir()
    known = Known()
    with opened(state, known) as (journal, stream):
        append(journal, stream, known, 200)
        journal.commit_now()
        deliver(journal, stream, known, 51)
    return known


def from_killed(state: Path) -> Known:
    """As a SIGKILL leaves it: a WAL, and a reserve that is spent."""
    made = state.with_name("made")
    made.mkdir()
    known = Known()
    with opened(made, known) as (journal, stream):
        append(journal, stream, known, 200)
        journal.commit_now()
        deliver(journal, stream, known, 51)
        shutil.copytree(made, state)
    (state / "reserve").unlink()
    return known


def from_older(state: Path) -> Known:
    """A journal as the first schema had it, with messages."""
    state.mkdir()
    known = Known(position=3, position_max=3)
    db = sqlite3.connect(state / "journal.db", isolation_level=None)
    db.execute(f"PRAGMA page_size = {schema.PAGE_SIZE_BYTES}")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    schema.migrate(db, 1)
    rows = [(seq, encode(seq, b"old" * 50)) for seq in range(1, 101)]
    db.execute("BEGIN")
    db.execute("INSERT INTO stream VALUES (1, 'alarms', 'outbound', 101, 98, ?)", (sum(len(b) for _, b in rows[2:]),))
    db.execute("INSERT INTO cursor VALUES (1, 1, 'uplink', 'uplink', 3)")
    db.execute("INSERT INTO meta VALUES ('epoch', '7')")
    from zlib import crc32

    db.executemany(
        "INSERT INTO message VALUES (?, 0, NULL, 'a/b', ?, ?)",
        [(1 << schema.SEQ_BITS | seq, crc32(body), body) for seq, body in rows[2:]],
    )
    db.execute("COMMIT")
    db.close()
    known.sent = dict(rows)
    known.owed = dict(rows[2:])
    return known


def from_damaged(state: Path) -> Known:
    """Table and ledger of nobody's wills do not read; every message does, half of them in the WAL."""
    state.mkdir()
    made = state.with_name("made")
    made.mkdir()
    known = Known()
    with opened(made, known) as (journal, stream):
        append(journal, stream, known, 100)
        journal.commit_now()
        ((root,),) = journal.query("SELECT rootpage FROM sqlite_schema WHERE name = 'mqtt_will'")
        journal.checkpoint()
        append(journal, stream, known, 100)
        journal.commit_now()
        for name in ("journal.db", "journal.db-wal"):
            shutil.copy(made / name, state)
    with (state / "journal.db").open("r+b") as file:
        file.seek((root - 1) * schema.PAGE_SIZE_BYTES)
        file.write(os.urandom(schema.PAGE_SIZE_BYTES))
    (state / "journal.suspect").touch()
    known.damaged = True
    return known


def verify(state: Path, known: Known) -> None:
    make_directories(state)
    with opened(state, known) as (journal, stream):
        position = stream.cursors["uplink"].position
        assert known.position <= position <= known.position_max
        rows = {row.seq: row.body for row in journal.read_range(stream, position, stream.committed)}
        missing = {seq for seq in known.owed if seq >= position} - rows.keys()
        assert not missing, f"acknowledged and lost: {sorted(missing)}"
        assert all(known.sent[seq] == body for seq, body in rows.items())
        assert list(rows) == list(range(position, stream.committed)), "a gap"
        assert stream.next_seq > max(known.owed, default=0), "a seq would be used twice"
        if known.damaged:
            kept = list((state / "quarantine").glob("*/journal.db"))
            assert kept, "the damaged file is gone"
        else:
            assert not journal.salvaged
            assert not (state / "quarantine").exists()
        assert not journal.loss_count
        seq = journal.append(stream, "a/b", encode, b"after")
        assert seq not in known.owed
        journal.commit_now()


SCENES: dict[str, tuple[Callable[[Path], Known], Callable[[Path, Known], None]]] = {
    "first start": (from_nothing, first_start),
    "first start in a directory that is there": (from_empty, first_start),
    "start": (from_ordinary, start),
    "start after a kill, without a reserve": (from_killed, start),
    "migration from the first schema": (from_older, start),
    "salvage": (from_damaged, start),
    "checkpoint": (from_ordinary, checkpoint),
    "work": (from_ordinary, work),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CutMount]:
    require_fuse()
    with CutMount(tmp_path_factory.mktemp("cut"), size=DISK_BYTES) as mounted:
        yield mounted


@pytest.mark.parametrize("scene", SCENES)
def test_whatever_change_the_power_is_cut_at_everything_acknowledged_is_there_at_the_next_start(
    disk: CutMount, tmp_path: Path, scene: str
) -> None:
    prepare, act = SCENES[scene]
    template = tmp_path / "template"
    template.mkdir()
    known = prepare(template / "state")
    with contextlib.suppress(FileNotFoundError):
        os.truncate(template / "state" / "reserve", DISK_BYTES // RESERVE_SHARE)
    place = disk.path / "place"

    def fresh() -> Known:
        disk.ask("clear")
        if place.exists():
            shutil.rmtree(place)
        place.mkdir()
        if (template / "state").exists():
            shutil.copytree(template / "state", place / "state")
        disk.ask("sync")
        disk.ask("clear")
        return copy.deepcopy(known)

    act(place / "state", fresh())
    history = disk.ask("history")["changes"]
    apart = max(WRITES_APART, history.count("write") // WRITES_MAX)
    at = [n for n, op in enumerate(history, 1) if EVERY or op != "write" or n % apart == 0]
    for change in at:
        for keep in KEEPS if EVERY else (KEEPS[change % len(KEEPS)],):
            found = fresh()
            disk.ask("dead-at", change=change)
            try:
                act(place / "state", found)
            except (OSError, sqlite3.Error, JournalError, JournalFull):
                assert disk.ask("state")["dead"], "an error that is not the disk's"
            disk.ask("clear")
            disk.ask("cut", keep=keep, seed=change)
            try:
                verify(place / "state", found)
            except BaseException as error:
                error.add_note(f"{scene}: cut at change {change} ({history[change - 1]}), {keep} of the unsynced kept")
                raise
    print(f"{scene}: cut at {len(at)} of {len(history)} changes")
