"""The journal keeps what it was given: across restarts, failed commits, limits, and damage."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from storeforward import maintenance, schema
from storeforward.errors import JournalError, JournalFull, JournalLocked, JournalNewer
from storeforward.journal import Journal
from storeforward.streams import Stream, StreamLimits, WhenFull

MESSAGE_ROOT = 5


def encode(seq: int, payload: bytes) -> bytes:
    return b"%d:%b" % (seq, payload)


def fill(journal: Journal, stream: Stream, count: int, size: int = 20) -> None:
    for _ in range(count):
        journal.append(stream, "a/b", encode, b"x" * size)
    journal.commit_now()


def outbound(journal: Journal, **limits: Any) -> Stream:
    stream = journal.stream("alarms", "outbound", StreamLimits(**limits))
    journal.cursor(stream, "uplink", "uplink")
    return stream


class Heard:
    def __init__(self) -> None:
        self.committed_tokens: list[Any] = []
        self.failed_tokens: list[Any] = []

    def committed(self, tokens: list[Any]) -> None:
        self.committed_tokens += tokens

    def failed(self, tokens: list[Any], error: JournalFull) -> None:
        self.failed_tokens += tokens


def test_rows_cursors_and_counters_survive_a_restart_and_seqs_go_on(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 1000)
    journal.advance(stream, stream.cursors["uplink"], 400)
    journal.commit_now()
    epoch = journal.epoch_token
    journal.close()

    journal = Journal.open(tmp_path)
    stream = journal.streams["alarms"]
    assert journal.epoch_token != epoch
    assert (stream.next_seq, stream.rows, stream.cursors["uplink"].position) == (1001, 601, 400)
    rows = list(journal.read_range(stream, 400, stream.next_seq))
    assert [r.seq for r in rows] == list(range(400, 1001))
    assert rows[0].body == b"400:" + b"x" * 20
    journal.close()


def test_a_seq_is_never_used_again_when_everything_was_drained_before_the_restart(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 10)
    journal.advance(stream, stream.cursors["uplink"], 11)
    journal.reclaim()
    journal.commit_now()
    assert stream.rows == 0
    journal.close()
    journal = Journal.open(tmp_path)
    assert journal.streams["alarms"].next_seq == 11
    journal.close()


def test_nobody_is_told_before_the_commit(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    heard = Heard()
    journal.append(stream, "t", encode, b"1")
    journal.wait(heard, "first")
    journal.begin()
    assert heard.committed_tokens == []
    assert journal.read(stream, 1, 10) == []
    journal.commit()
    assert heard.committed_tokens == []
    journal.committed()
    assert heard.committed_tokens == ["first"]
    assert [r.seq for r in journal.read(stream, 1, 10)] == [1]
    journal.close()


def test_a_commit_that_fails_takes_everything_back_and_tells_who_waits(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 5)
    heard = Heard()
    journal.append(stream, "t", encode, b"1", identity=b"i" * 16)
    journal.wait(heard, "token")
    journal.execute("INSERT INTO no_such_table VALUES (1)")
    with pytest.raises(JournalFull):
        journal.begin()
    journal.pending.statements.clear()
    assert heard.failed_tokens == ["token"]
    assert (stream.rows, stream.seen) == (5, {})
    journal.append(stream, "t", encode, b"2")
    journal.commit_now()
    assert stream.rows == 6
    assert [r.seq for r in journal.read(stream, 1, 100)] == [1, 2, 3, 4, 5, 7]
    journal.close()
    journal = Journal.open(tmp_path)
    assert journal.streams["alarms"].rows == 6
    journal.close()


def test_a_full_stream_refuses_and_takes_messages_again_once_drained(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal, messages_max=10)
    fill(journal, stream, 10)
    with pytest.raises(JournalFull, match="alarms: full"):
        journal.append(stream, "t", encode, b"")
    journal.advance(stream, stream.cursors["uplink"], 11)
    journal.commit_now()
    journal.append(stream, "t", encode, b"")
    journal.commit_now()
    assert journal.loss_count == 0
    journal.close()


def test_drop_oldest_makes_room_and_every_dropped_message_is_in_the_ledger(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal, messages_max=100, when_full=WhenFull.DROP_OLDEST)
    for _ in range(50):
        fill(journal, stream, 10)
    assert stream.rows <= 100
    rows = [r.seq for r in journal.read_range(stream, 1, stream.next_seq)]
    lost = [r[0] for r in journal.query("SELECT seq FROM loss WHERE reason = 'drop-oldest' ORDER BY seq")]
    assert lost + rows == list(range(1, 501))
    assert stream.cursors["uplink"].position == rows[0]
    journal.close()


def test_a_subscriber_far_behind_does_not_hold_up_a_full_stream_and_the_ledger_tells_what_it_missed(
    tmp_path: Path,
) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal, messages_max=100)
    journal.cursor(stream, "mqtt:slow", "mqtt")
    for _ in range(30):
        fill(journal, stream, 10)
        journal.advance(stream, stream.cursors["uplink"], stream.next_seq)
    journal.commit_now()
    lost = journal.query("SELECT seq, detail FROM loss WHERE reason = 'subscriber-behind' ORDER BY seq")
    assert [r[0] for r in lost] == list(range(1, len(lost) + 1))
    assert {r[1] for r in lost} == {"mqtt:slow"}
    assert stream.cursors["mqtt:slow"].position == len(lost) + 1
    journal.close()


def test_without_any_reader_a_stream_is_held_for_the_first(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = journal.stream("commands", "inbound")
    fill(journal, stream, 300)
    first = journal.cursor(stream, "mqtt:app", "mqtt")
    second = journal.cursor(stream, "mqtt:late", "mqtt")
    assert (first.position, second.position) == (1, 301)
    journal.close()


def test_identities_are_remembered_across_restarts_and_no_more_than_the_limit(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = journal.stream("commands", "inbound", StreamLimits(seen_max=50))
    for n in range(120):
        journal.append(stream, "t", encode, b"", identity=b"%016d" % n)
        if n % 7 == 0:
            journal.commit_now()
    journal.close()
    journal = Journal.open(tmp_path)
    assert list(journal.streams["commands"].seen) == [b"%016d" % n for n in range(70, 120)]
    journal.close()


def test_what_one_sender_sends_does_not_push_out_the_identities_of_another(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = journal.stream("local", "local", StreamLimits(seen_max=50))

    def take(sender: bytes, first: int, count: int) -> None:
        for n in range(first, first + count):
            journal.append(stream, "a", lambda seq, payload: payload, b"x", identity=sender + b"%010d" % n)
        journal.commit_now()

    take(b"late--", 0, 40)
    take(b"busy--", 0, 5000)
    take(b"busy--", 5000, 10)
    assert {i for i in stream.seen if i[:6] == b"late--"} == {b"late--%010d" % n for n in range(40)}
    assert [i for i in stream.seen if i[:6] == b"busy--"] == [b"busy--%010d" % n for n in range(4960, 5010)]
    before = dict(stream.seen)
    journal.close()
    journal = Journal.open(tmp_path)
    assert journal.streams["local"].seen == before
    journal.close()


def test_a_second_daemon_on_the_same_directory_is_refused_by_name(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    with pytest.raises(JournalLocked, match=r"in use by another lineside \(pid \d+\)"):
        Journal.open(tmp_path)
    journal.close()
    Journal.open(tmp_path).close()


def test_a_journal_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    Journal.open(tmp_path).close()
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    db.execute("UPDATE meta SET value = ? WHERE key = ?", (f"{schema.VERSION + 1} 0", schema.VERSION_KEY))
    db.commit()
    db.close()
    with pytest.raises(JournalNewer, match="newer lineside"):
        Journal.open(tmp_path)
    assert not (tmp_path / "quarantine").exists()


def test_a_journal_locked_by_another_program_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal.open(tmp_path).close()
    db = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **(k | {"timeout": 0.05})))
    with pytest.raises(JournalError, match="locked by another program"):
        Journal.open(tmp_path)
    db.close()


def test_a_bit_flip_in_a_body_is_found_by_its_crc_and_entered_in_the_ledger(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 20)
    journal.close()
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("UPDATE message SET body = x'00' WHERE id & ? = 7", (schema.SEQ_MASK,))
    db.commit()
    db.close()
    journal = Journal.open(tmp_path)
    stream = journal.streams["alarms"]
    assert [r.seq for r in journal.read(stream, 1, 100)] == [s for s in range(1, 21) if s != 7]
    journal.commit_now()
    assert journal.query("SELECT stream, seq, reason FROM loss") == [("alarms", 7, "corrupt")]
    journal.close()


@pytest.mark.parametrize("page", [2, 5, 12, 30, 47])
def test_a_ruined_page_is_set_aside_and_every_row_is_salvaged_or_in_the_ledger(tmp_path: Path, page: int) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 3000, size=200)
    journal.close()
    path = tmp_path / "journal.db"
    data = bytearray(path.read_bytes())
    start = page * schema.PAGE_SIZE_BYTES
    assert len(data) > start + schema.PAGE_SIZE_BYTES
    data[start : start + schema.PAGE_SIZE_BYTES] = b"\xa5" * schema.PAGE_SIZE_BYTES
    path.write_bytes(data)
    ruined = bytes(data)

    journal = open_until_it_reads(tmp_path)
    stream = journal.streams["alarms"]
    kept = [r.seq for r in journal.read_range(stream, 1, stream.next_seq)]
    lost = [r[0] for r in journal.query("SELECT seq FROM loss WHERE reason = 'corrupt'")]
    assert sorted(kept + lost) == list(range(1, 3001))
    # The root of the message table is the one page without which no row can be reached; the ledger has them all then.
    assert len(kept) > 2500 or page == MESSAGE_ROOT
    aside = list((tmp_path / "quarantine").glob("*/journal.db"))
    assert [p.read_bytes() for p in aside] in ([ruined], [])
    journal.close()


def open_until_it_reads(state_dir: Path) -> Journal:
    """As the service does: damage found while running ends the process, the next start salvages."""
    for _ in range(2):
        journal = Journal.open(state_dir)
        try:
            for stream in journal.streams.values():
                for _row in journal.read_range(stream, 1, stream.next_seq):
                    pass
        except JournalError:
            journal._lock.release()
            continue
        return journal
    raise AssertionError("not readable after a salvage")


def test_dead_letters_can_be_sent_again_or_given_up(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 3)
    for row in journal.read(stream, 1, 2):
        journal.bury(stream, row, "amqp:decode-error", "no")
    journal.advance(stream, stream.cursors["uplink"], 4)
    journal.commit_now()
    journal.close()
    assert maintenance.requeue_dead(tmp_path, [1]) == 1
    assert maintenance.drop_dead(tmp_path, [2, 99]) == 1
    journal = Journal.open(tmp_path)
    stream = journal.streams["alarms"]
    assert [(r.seq, r.body) for r in journal.read(stream, 4, 9)] == [(4, b"1:" + b"x" * 20)]
    assert journal.query("SELECT count(*) FROM dead") == [(0,)]
    assert journal.query("SELECT reason FROM loss ORDER BY id") == [
        ("dead-letter",),
        ("dead-letter",),
        ("dropped-by-operator",),
    ]
    journal.close()


def test_a_damaged_dead_letter_stays_where_people_see_it_and_is_not_sent_again(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 1)
    journal.bury(stream, journal.read(stream, 1, 1)[0], "amqp:decode-error", "no")
    journal.commit_now()
    journal.close()
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("UPDATE dead SET body = CAST('1:xxxxxxxxxxxxxxxxxxxy' AS BLOB)")
    db.commit()
    db.close()
    assert maintenance.requeue_dead(tmp_path, [1]) == 0
    journal = Journal.open(tmp_path)
    assert journal.query("SELECT count(*) FROM dead") == [(1,)]
    assert journal.streams["alarms"].next_seq == 2
    journal.close()


def test_the_age_clock_does_not_follow_the_wall_clock(tmp_path: Path) -> None:
    boottime, wall = [100.0], [1e9]
    journal = Journal.open(tmp_path, clock=lambda: boottime[0], wall=lambda: wall[0])
    before = journal.age_us()
    wall[0] += 50 * 365 * 86400
    assert journal.age_us() == before
    boottime[0] += 60
    assert journal.age_us() == before + 60_000_000
    journal.execute("SELECT 1")
    journal.commit_now()
    journal.close()
    boottime[0] += 30
    wall[0] = 0.0
    journal = Journal.open(tmp_path, clock=lambda: boottime[0], wall=lambda: wall[0])
    assert journal.age_us() == before + 90_000_000
    journal.close()


@pytest.mark.parametrize("name", ["journal.db", "journal.db-wal", "journal.db-shm"])
@pytest.mark.parametrize("put_back", [False, True])
def test_nothing_is_committed_into_a_file_that_has_lost_its_name(tmp_path: Path, name: str, put_back: bool) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    fill(journal, stream, 10)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if put_back:
        (tmp_path / name).write_bytes(content)
    heard = Heard()
    journal.append(stream, "a/b", encode, b"late")
    journal.wait(heard, 1)
    for step in (journal.begin, journal.recover):
        with pytest.raises(JournalError, match=f"{name}: .*while it is in use"):
            step()
    assert heard.committed_tokens == []
    journal.close()
