"""What a journal tells whoever looks into it: quickly, in whatever state it was left, changing nothing."""

from __future__ import annotations

import base64
import os
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storeforward import schema
from storeforward.errors import JournalCorrupt, JournalError, JournalNewer
from storeforward.inspection import Inspection
from storeforward.journal import Journal

ROWS = 1_000_000
ANSWER_MAX_S = 1.0
BODY = b"\x00\x53\x75\xa0\x05hello"


def create(state_dir: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(state_dir / "journal.db", isolation_level=None)
    connection.execute(f"PRAGMA page_size = {schema.PAGE_SIZE_BYTES}")
    connection.execute("PRAGMA journal_mode = WAL")
    schema.migrate(connection)
    return connection


def fill(connection: sqlite3.Connection, id: int, name: str, rows: int, first: int = 1) -> None:
    """A stream with `rows` messages, of which the uplink has finished with the first nine (or all, if fewer)."""
    connection.execute("BEGIN")
    connection.execute(
        "INSERT INTO stream (id, name, direction, next_seq, rows, bytes) VALUES (?, ?, 'outbound', ?, ?, ?)",
        (id, name, first + rows, rows, rows * len(BODY)),
    )
    connection.execute(
        "WITH RECURSIVE n (i) AS (SELECT ?1 UNION ALL SELECT i + 1 FROM n WHERE i < ?2) "
        "INSERT INTO message SELECT ?3 | i, 1700000000000000 + i, NULL, 'alarm/' || (i % 10), ?4, ?5 FROM n",
        (first, first + rows - 1, id << schema.SEQ_BITS, zlib.crc32(BODY), BODY),
    )
    connection.execute("INSERT INTO cursor VALUES (?, ?, 'uplink', 'uplink', ?)", (id, id, first + min(9, rows)))
    connection.execute("COMMIT")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A million messages, and as many rows each of losses and dead letters as nobody hopes to see."""
    state_dir = tmp_path_factory.mktemp("large")
    connection = create(state_dir)
    fill(connection, 1, "alarms", ROWS)
    fill(connection, 2, "telemetry", 20)
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
    connection.execute("BEGIN")
    connection.execute(
        numbers
        + "INSERT INTO loss SELECT i, i, CASE i WHEN 7 THEN 'rare' ELSE 'alarms' END, i, 'expired', 5, '' FROM n",
        (ROWS,),
    )
    connection.execute("INSERT INTO loss_total VALUES ('alarms', 'expired', ?, ?)", (ROWS, 5 * ROWS))
    connection.execute(
        numbers + "INSERT INTO dead SELECT i, i, 'alarms', i, 'amqp:not-allowed', '', 'alarm/1', ?, ? FROM n",
        (100_000, zlib.crc32(BODY), BODY),
    )
    connection.execute("COMMIT")
    connection.close()
    return state_dir


@pytest.fixture
def small(tmp_path: Path) -> Path:
    connection = create(tmp_path)
    fill(connection, 1, "alarms", 20)
    fill(connection, 2, "telemetry", 5, first=100)
    connection.close()
    return tmp_path


ANSWERS: list[Callable[[Inspection], object]] = [
    lambda journal: journal.streams(),
    lambda journal: journal.backlog("alarms", 1000),
    lambda journal: journal.backlog("alarms", 1000, ROWS - 500),
    lambda journal: journal.show("alarms", ROWS // 2),
    lambda journal: next(journal.export("alarms")),
    lambda journal: journal.dead(1000),
    lambda journal: journal.dead_ids(),
    lambda journal: journal.dead_show(99_999),
    lambda journal: journal.dead_count(),
    lambda journal: journal.losses(1000),
    lambda journal: journal.losses(1000, "rare"),
    lambda journal: journal.loss_totals(),
    lambda journal: journal.cursors(),
    lambda journal: journal.sessions(),
]


@pytest.mark.parametrize("ask", ANSWERS)
def test_every_answer_from_a_million_rows_takes_less_than_a_second(
    large: Path, ask: Callable[[Inspection], object]
) -> None:
    begun = time.monotonic()
    with Inspection(large) as journal:
        assert ask(journal) is not None
    assert time.monotonic() - begun < ANSWER_MAX_S


def test_streams_are_told_by_their_counters(small: Path) -> None:
    with Inspection(small) as journal:
        alarms, telemetry = journal.streams()
    assert (alarms.name, alarms.rows, alarms.bytes, alarms.next_seq) == ("alarms", 20, 20 * len(BODY), 21)
    assert (alarms.waiting, alarms.cursors, alarms.oldest_us) == (11, 1, 1700000000000001)
    assert (telemetry.name, telemetry.next_seq, telemetry.waiting) == ("telemetry", 105, 0)


def test_the_backlog_begins_where_the_slowest_reader_is_and_keeps_to_its_stream(small: Path) -> None:
    with Inspection(small) as journal:
        assert [message.seq for message in journal.backlog("alarms", 5)] == [10, 11, 12, 13, 14]
        assert [message.seq for message in journal.backlog("alarms", 5, from_seq=19)] == [19, 20]
        assert [message.seq for message in journal.backlog("alarms", 100, from_seq=-1)] == list(range(1, 21))
        assert journal.backlog("alarms", 100, from_seq=1 << 60) == []
        assert [message.seq for message in journal.backlog("telemetry", from_seq=0)] == list(range(100, 105))


def test_one_message_is_shown_with_whether_its_bytes_are_intact(small: Path) -> None:
    connection = sqlite3.connect(small / "journal.db")
    connection.execute("UPDATE message SET body = ? WHERE id & ? = 3", (b"changed", schema.SEQ_MASK))
    connection.commit()
    connection.close()
    with Inspection(small) as journal:
        assert (journal.show("alarms", 2).intact, journal.show("alarms", 2).body) == (True, BODY)
        assert (journal.show("alarms", 3).intact, journal.show("alarms", 3).body) == (False, b"changed")
        for seq in (0, 21, -1, 1 << 48, 1 << 70):
            with pytest.raises(JournalError, match="holds no message"):
                journal.show("alarms", seq)


def test_an_export_is_every_message_in_order_across_chunks(tmp_path: Path) -> None:
    connection = create(tmp_path)
    fill(connection, 1, "alarms", 1000)
    fill(connection, 2, "after", 3)
    connection.close()
    with Inspection(tmp_path) as journal:
        exported = list(journal.export("alarms", lambda body: {"length": len(body)}))
    assert [message["seq"] for message in exported] == list(range(1, 1001))
    assert exported[0]["message"] == {"length": len(BODY)}
    assert base64.b64decode(exported[-1]["body_base64"]) == BODY


def test_a_stream_that_is_not_there_is_named_with_those_that_are(small: Path) -> None:
    with Inspection(small) as journal, pytest.raises(JournalError, match=r"no stream 'alarm'; there are alarms, tele"):
        journal.export("alarm")


def test_dead_letters_and_losses_come_newest_first(large: Path) -> None:
    with Inspection(large) as journal:
        assert [letter.id for letter in journal.dead(3)] == [100_000, 99_999, 99_998]
        assert journal.dead_ids()[:2] == [1, 2]
        assert journal.dead_show(5).body == BODY
        assert [loss.seq for loss in journal.losses(2)] == [ROWS, ROWS - 1]
        assert [loss.seq for loss in journal.losses(2, "rare")] == [7]
        assert journal.loss_totals()[0].messages == ROWS
        with pytest.raises(JournalError, match="no dead letter 0"):
            journal.dead_show(0)


def test_a_journal_can_be_read_while_the_daemon_writes_it(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    try:
        stream = journal.stream("alarms", "outbound")
        journal.commit_now()
        with Inspection(tmp_path) as seen:
            assert seen.streams()[0].rows == 0
            journal.append(stream, "alarm/1", lambda seq, payload: payload, BODY)
            journal.commit_now()
            assert seen.streams()[0].rows == 1
            assert seen.show("alarms", 1).body == BODY
    finally:
        journal.close()


def test_looking_does_not_keep_the_daemon_from_its_checkpoint(small: Path) -> None:
    writer = sqlite3.connect(small / "journal.db", isolation_level=None)
    with Inspection(small) as journal:
        messages = journal.export("alarms")
        next(messages)
        writer.execute("UPDATE meta SET value = value")
        writer.execute("INSERT INTO meta VALUES ('x', 'y')")
        (busy, _, _) = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert busy == 0
        assert len(list(messages)) == 19
    writer.close()


def killed(state_dir: Path) -> None:
    """Leave a journal as a power cut would: with a WAL that holds a committed message."""
    script = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1] + '/journal.db', isolation_level=None)\n"
        "c.execute('PRAGMA wal_autocheckpoint = 0')\n"
        "c.execute(\"INSERT INTO meta VALUES ('late', '1')\")\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(state_dir)], check=False)
    assert (state_dir / "journal.db-wal").stat().st_size > 0


def test_after_a_power_cut_what_the_wal_holds_is_seen_and_the_wal_is_left_as_it_was(small: Path) -> None:
    killed(small)
    (small / "journal.db-shm").unlink()
    before = (small / "journal.db-wal").read_bytes()
    with Inspection(small) as journal:
        assert journal.meta()["late"] == "1"
    assert (small / "journal.db-wal").read_bytes() == before


@pytest.fixture
def as_nobody(small: Path) -> Iterator[Path]:
    """The journal, to somebody who may read but not write it."""
    if os.geteuid() != 0:
        yield small
        return
    for directory in [small, *small.parents]:
        if not directory.stat().st_mode & 0o001:
            directory.chmod(directory.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield small
    finally:
        os.seteuid(0)


def test_a_stopped_journal_reads_where_nothing_may_be_written(as_nobody: Path) -> None:
    os.seteuid(os.getuid())
    (as_nobody / "journal.db").chmod(0o444)
    as_nobody.chmod(0o555)
    os.seteuid(65534 if os.getuid() == 0 else os.getuid())
    with Inspection(as_nobody) as journal:
        assert len(journal.streams()) == 2
    assert sorted(path.name for path in as_nobody.iterdir()) == ["journal.db"]


def test_a_wal_that_may_not_be_read_is_said_not_passed_over(as_nobody: Path) -> None:
    os.seteuid(os.getuid())
    killed(as_nobody)
    (as_nobody / "journal.db-shm").unlink()
    (as_nobody / "journal.db").chmod(0o444)
    (as_nobody / "journal.db-wal").chmod(0o444)
    as_nobody.chmod(0o555)
    os.seteuid(65534 if os.getuid() == 0 else os.getuid())
    with pytest.raises(JournalError, match="as root or as the user"):
        Inspection(as_nobody)


def test_a_directory_that_is_closed_to_us_is_said_in_one_line(as_nobody: Path) -> None:
    os.seteuid(os.getuid())
    as_nobody.chmod(0o700 if os.getuid() == 0 else 0)
    os.seteuid(65534 if os.getuid() == 0 else os.getuid())
    try:
        with pytest.raises(JournalError, match="as root or as the user"):
            Inspection(as_nobody)
    finally:
        os.seteuid(os.getuid())
        as_nobody.chmod(0o700)


def test_no_journal_a_newer_one_and_a_file_that_is_none_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal"):
        Inspection(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "journal.db"
    path.write_bytes(b"")
    with pytest.raises(JournalError, match="not a journal"):
        Inspection(tmp_path)
    path.write_bytes(b"this is no database " * 1000)
    with pytest.raises(JournalCorrupt, match="not a database") as caught:
        Inspection(tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    connection = create(tmp_path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    with pytest.raises(JournalNewer, match="newer"):
        Inspection(tmp_path)


def test_damage_inside_the_file_is_told_as_such(small: Path) -> None:
    path = small / "journal.db"
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // schema.PAGE_SIZE_BYTES):
        data[page * schema.PAGE_SIZE_BYTES : page * schema.PAGE_SIZE_BYTES + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(JournalCorrupt), Inspection(small) as journal:
        journal.streams()
