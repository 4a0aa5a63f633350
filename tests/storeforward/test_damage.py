"""Damage at random places of a closed journal: what reads is kept, the rest is told, nothing owed is passed over."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest

from storeforward import schema
from storeforward.errors import JournalCorrupt, JournalError
from storeforward.journal import Journal
from storeforward.schema import PAGE_SIZE_BYTES, SEQ_MASK
from tests.cut import abandon
from tests.storeforward.test_journal import encode, outbound

CASES = int(os.environ.get("LINESIDE_DAMAGE_CASES", "60"))
DELIVERED = 400
STORED = 2000


@dataclass(frozen=True, slots=True)
class Whole:
    """An undamaged state directory, and what it holds: bodies by seq of everything that is not delivered yet."""

    path: Path
    owed: dict[int, bytes]


def make(path: Path, *, with_wal: bool) -> Whole:
    journal = Journal.open(path)
    stream = outbound(journal)
    for n in range(20):
        for _ in range(STORED // 20):
            journal.append(stream, "a/b", encode, random.Random(n).randbytes(150), identity=b"%016d" % stream.next_seq)
        journal.commit_now()
        if n == 9:
            journal.advance(stream, stream.cursors["uplink"], DELIVERED + 1)
            journal.commit_now()
            if with_wal:
                journal.checkpoint()
    for row in journal.read(stream, DELIVERED + 1, 2):
        journal.bury(stream, row, "amqp:decode-error", "no")
    journal.commit_now()
    owed = {r.seq: r.body for r in journal.read_range(stream, DELIVERED + 1, stream.next_seq)}
    assert len(owed) == STORED - DELIVERED
    if with_wal:
        # As a SIGKILL leaves it: the WAL full, and nobody there.
        killed = path.with_name(path.name + "-killed")
        shutil.copytree(path, killed)
        journal.close()
        return Whole(killed, owed)
    journal.close()
    return Whole(path, owed)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make(tmp_path_factory.mktemp("closed"), with_wal=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make(tmp_path_factory.mktemp("journal"), with_wal=True)


def damage(path: Path, rng: random.Random) -> str:
    """Do to one file what failing flash does; says what was done."""
    data = bytearray(path.read_bytes())
    page = rng.choice([0, 1, rng.randrange(len(data) // PAGE_SIZE_BYTES), rng.randrange(len(data) // PAGE_SIZE_BYTES)])
    start = page * PAGE_SIZE_BYTES
    kind = rng.choice(["zeros", "noise", "bits", "head", "other page", "truncated"])
    match kind:
        case "zeros":
            data[start : start + PAGE_SIZE_BYTES] = bytes(PAGE_SIZE_BYTES)
        case "noise":
            data[start : start + PAGE_SIZE_BYTES] = rng.randbytes(PAGE_SIZE_BYTES)
        case "bits":
            for _ in range(8):
                data[start + rng.randrange(PAGE_SIZE_BYTES)] ^= 1 << rng.randrange(8)
        case "head":
            data[start : start + 12] = rng.randbytes(12)
        case "other page":
            other = rng.randrange(len(data) // PAGE_SIZE_BYTES) * PAGE_SIZE_BYTES
            data[start : start + PAGE_SIZE_BYTES] = data[other : other + PAGE_SIZE_BYTES]
        case "truncated":
            del data[start + rng.randrange(PAGE_SIZE_BYTES) :]
    path.write_bytes(data)
    return f"{kind} at page {page} of {path.name}"


def readable_rows(state_dir: Path, owed: dict[int, bytes]) -> set[int]:
    """What another reader, by rowid lookups of its own, gets out of the damaged file."""
    copy = state_dir.with_name(state_dir.name + "-copy")
    shutil.copytree(state_dir, copy)
    found = set()
    db = sqlite3.connect(copy / "journal.db")
    try:
        for seq, body in owed.items():
            try:
                row = db.execute(
                    "SELECT body, topic, expires_age_us, crc, typeof(time_us) FROM message WHERE id = ?",
                    (1 << schema.SEQ_BITS | seq,),
                ).fetchone()
            except (sqlite3.DatabaseError, UnicodeDecodeError):
                continue
            if row == (body, "a/b", None, crc32(body), "integer"):
                found.add(seq)
    finally:
        db.close()
        shutil.rmtree(copy)
    return found


def open_and_read(state_dir: Path) -> tuple[Journal, dict[int, bytes], list[str]]:
    """As the service does: damage found while running ends the process, and the next start salvages."""
    reports = []
    for _ in range(3):
        journal = Journal.open(state_dir)
        if journal.salvaged:
            reports.append(journal.salvaged)
        try:
            stream = outbound(journal)
            rows = {r.seq: r.body for r in journal.read_range(stream, stream.first_seq, stream.committed)}
            journal.append(stream, "t", encode, b"afterwards")
            journal.advance(stream, stream.cursors["uplink"], stream.cursors["uplink"].position)
            journal.commit_now()
            journal.query("SELECT * FROM loss")
            journal.query("SELECT * FROM dead")
        except (JournalError, sqlite3.DatabaseError):
            journal._lock.release()
            (state_dir / "journal.suspect").touch()
            continue
        return journal, rows, reports
    raise AssertionError("not usable after two salvages")


def check(whole: Whole, state_dir: Path, what: str) -> None:
    readable = readable_rows(state_dir, whole.owed)
    journal, rows, reports = open_and_read(state_dir)
    stream = journal.streams["alarms"]
    lost = {r[0] for r in journal.query("SELECT seq FROM loss WHERE reason = 'corrupt' AND stream = 'alarms'")}
    try:
        wrong = {s for s, body in rows.items() if s in whole.owed and body != whole.owed[s]}
        assert not wrong, "a row that is not what was stored was handed out"
        assert readable <= rows.keys(), "a row that reads was not kept"
        missing = whole.owed.keys() - rows.keys()
        known_end = stream.next_seq
        assert {s for s in missing if s < min(known_end, STORED + 1)} <= lost, "a row is gone without a ledger entry"
        if missing or reports:
            assert reports or lost, "damage was not told"
        position = stream.cursors["uplink"].position
        passed = {s for s in whole.owed if s < position}
        assert passed <= lost, "the cursor passed what was not delivered"
        if reports:
            assert list((state_dir / "quarantine").glob("*/journal.db")), "the damaged file is gone"
    except AssertionError as error:
        error.add_note(f"{what}; {reports}; position {stream.cursors['uplink'].position}; next {stream.next_seq}")
        raise
    finally:
        journal.close()


@pytest.mark.parametrize("seed", range(CASES))
def test_whatever_page_is_damaged_the_rows_that_read_are_kept_and_the_rest_is_told(
    tmp_path: Path, closed: Whole, seed: int
) -> None:
    state_dir = tmp_path / "state"
    shutil.copytree(closed.path, state_dir)
    what = damage(state_dir / "journal.db", random.Random(seed))
    check(closed, state_dir, what)


@pytest.mark.parametrize("seed", range(CASES // 2))
def test_a_damaged_wal_costs_a_row_or_the_end_that_was_cut_off_and_its_seqs_are_not_used_again_for_others(
    tmp_path: Path, killed: Whole, seed: int
) -> None:
    state_dir = tmp_path / "state"
    shutil.copytree(killed.path, state_dir)
    rng = random.Random(seed)
    wal = state_dir / "journal.db-wal"
    data = bytearray(wal.read_bytes())
    at = rng.randrange(len(data))
    if seed % 2:
        del data[at:]
    else:
        data[at] ^= 1 << rng.randrange(8)
    wal.write_bytes(data)
    if seed % 3 == 0:
        (state_dir / "journal.db-shm").unlink()
    epoch_before = killed_epoch(killed)
    journal = Journal.open(state_dir)
    stream = outbound(journal)
    rows = {r.seq: r.body for r in journal.read_range(stream, 1, stream.next_seq)}
    assert {s: b for s, b in rows.items() if s > DELIVERED} == {s: b for s, b in killed.owed.items() if s in rows}
    if journal.salvaged:
        lost = {r[0] for r in journal.query("SELECT seq FROM loss WHERE reason = 'corrupt'")}
        assert not seed % 2, "where it was cut off there is nothing that could tell"
        assert stream.next_seq == STORED + 1, "commits behind the damage are gone"
        assert killed.owed.keys() - rows.keys() <= lost
        assert len(lost) < 60, "more than a page"
    else:
        assert sorted(rows) == list(range(stream.first_seq, stream.next_seq)), "what is lost is the end, and only that"
    assert stream.next_seq > STORED // 2, "what had been copied into the file is there"
    # The identities differ all the same: each start has an epoch of its own.
    assert journal.epoch_token != epoch_before
    journal.close()


def test_a_salvaged_journal_gives_space_back_as_any_other_does(tmp_path: Path, closed: Whole) -> None:
    state_dir = tmp_path / "state"
    shutil.copytree(closed.path, state_dir)
    (state_dir / "journal.suspect").touch()
    journal = Journal.open(state_dir)
    assert journal.salvaged
    stream = outbound(journal)
    before = (state_dir / "journal.db").stat().st_size
    journal.advance(stream, stream.cursors["uplink"], stream.committed)
    while journal.pending:
        journal.commit_now()
    assert stream.rows == 0
    while journal.recover():
        pass
    assert (state_dir / "journal.db").stat().st_size < before - 200_000
    journal.close()


def test_an_empty_file_that_a_power_cut_left_becomes_a_journal_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "journal.db").touch()
    journal = Journal.open(tmp_path)
    assert journal.query("PRAGMA page_size") == [(PAGE_SIZE_BYTES,)]
    assert journal.query("PRAGMA auto_vacuum") == [(2,)]
    journal.close()


def test_a_read_only_file_system_is_named_and_what_to_do(tmp_path: Path, closed: Whole) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a read-only file system")
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    command = ["mount", "--bind", "-o", "ro", str(closed.path), str(state_dir)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no read-only mount here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(JournalError, match="must be writable by this user"):
            Journal.open(state_dir)
    finally:
        subprocess.run(["umount", str(state_dir)], check=True)


def killed_epoch(whole: Whole) -> str:
    db = sqlite3.connect(f"file:{whole.path / 'journal.db'}?mode=ro", uri=True)
    try:
        return str(db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
    finally:
        db.close()


def test_the_seqs_of_this_test_are_what_it_thinks(closed: Whole) -> None:
    db = sqlite3.connect(closed.path / "journal.db")
    ids = [r[0] for r in db.execute("SELECT id FROM message WHERE id & ? > ? ORDER BY id", (SEQ_MASK, DELIVERED))]
    db.close()
    assert [i & SEQ_MASK for i in ids] == list(closed.owed)
    assert {i >> schema.SEQ_BITS for i in ids} == {1}


def leaf_with(data: bytes, seq: int, stream: int = 1) -> int:
    """Where the page begins that holds this message, of which it is not the last."""
    for start in range(0, len(data), PAGE_SIZE_BYTES):
        if data[start] == 13 and b"%d:" % seq in data[start : start + PAGE_SIZE_BYTES]:
            return start
    raise AssertionError(seq)


@pytest.mark.parametrize("seq", [DELIVERED + 300, STORED], ids=["in the middle", "the last"])
def test_a_row_that_a_flipped_bit_hides_is_missed_and_found_again(tmp_path: Path, closed: Whole, seq: int) -> None:
    state_dir = tmp_path / "state"
    shutil.copytree(closed.path, state_dir)
    path = state_dir / "journal.db"
    data = bytearray(path.read_bytes())
    start = leaf_with(data, seq)
    count = int.from_bytes(data[start + 3 : start + 5], "big")
    data[start + 3 : start + 5] = (count - 1).to_bytes(2, "big")  # the page's last row: SQLite does not notice
    path.write_bytes(data)
    if seq != STORED:
        journal = Journal.open(state_dir)
        assert journal.salvaged is None
        stream = outbound(journal)
        with pytest.raises(JournalCorrupt, match="has vanished"):
            list(journal.read_range(stream, DELIVERED + 1, stream.next_seq))
        abandon(journal)
    journal = Journal.open(state_dir)
    assert journal.salvaged
    assert "0 lost" in journal.salvaged
    stream = outbound(journal)
    assert {r.seq: r.body for r in journal.read_range(stream, DELIVERED + 1, stream.next_seq)} == closed.owed
    journal.close()


@pytest.mark.parametrize("bit", [4, 9])
def test_a_cursor_that_a_flipped_bit_moves_on_is_put_back(tmp_path: Path, closed: Whole, bit: int) -> None:
    state_dir = tmp_path / "state"
    shutil.copytree(closed.path, state_dir)
    path = state_dir / "journal.db"
    data = bytearray(path.read_bytes())
    position = b"uplink" * 2 + (DELIVERED + 1).to_bytes(2, "big") + b"cursor,"
    assert data.count(position) == 1
    at = data.index(position) + 12
    data[at : at + 2] = (DELIVERED + 1 ^ 1 << bit).to_bytes(2, "big")
    path.write_bytes(data)
    journal = Journal.open(state_dir)
    assert journal.salvaged
    assert journal.streams["alarms"].cursors["uplink"].position == DELIVERED + 1
    assert not journal.query("SELECT * FROM loss WHERE reason = 'corrupt'")
    journal.close()


def test_a_message_does_not_expire_because_a_bit_of_its_expiry_flipped(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    for expires in (None, 1 << 60):
        journal.append(stream, "t", encode, b"1", expires)
    journal.commit_now()
    journal.close()
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("UPDATE message SET expires_age_us = 1")
    db.commit()
    db.close()
    journal = Journal.open(tmp_path)
    assert journal.read(journal.streams["alarms"], 1, 10) == []
    journal.commit_now()
    assert journal.query("SELECT seq, reason FROM loss") == [(1, "corrupt"), (2, "corrupt")]
    journal.close()


def test_a_salvage_that_fails_for_want_of_a_file_leaves_no_empty_journal_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path)
    journal.append(outbound(journal), "a/b", encode, b"owed")
    journal.close()
    (tmp_path / schema.SUSPECT).write_text("a page is damaged\n")

    def gone(*_: object) -> None:
        raise FileNotFoundError("somebody tidied up")

    with monkeypatch.context() as patch:
        patch.setattr("storeforward.salvage.mend", gone)
        with pytest.raises(FileNotFoundError):
            Journal.open(tmp_path)
    assert not (tmp_path / "journal.db").exists(), "what it takes would be thrown away by the salvage to come"
    journal = Journal.open(tmp_path)
    assert journal.salvaged
    assert [row.body[-4:] for row in journal.read(outbound(journal), 1, 10)] == [b"owed"]
    journal.close()
