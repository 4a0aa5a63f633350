"""A file system that is really full: intake is refused, draining goes on, and intake resumes by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.streams import StreamLimits, WhenFull
from tests.daemon import HUB_CONFIG, WAIT_S, Client, Daemon, free_port, wait_until
from tests.storeforward.test_journal import encode, outbound

MIB = 1 << 20
PAYLOAD = b"x" * 1000
RESUME_S_MAX = 5.0


@contextmanager
def small_disk(path: Path, kind: str, mib: int) -> Iterator[Path]:
    """A file system of its own, `mib` large; skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount the small file system this test fills")
    path.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}M", "tmpfs", str(path)]
    else:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("no mkfs.ext4 here")
        image = path.with_suffix(".image")
        with image.open("wb") as file:
            file.truncate(mib * MIB)
        # No blocks kept for root: the daemon may run as root here and must find the disk as full as anybody.
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no {kind} to fill: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def used_bytes(path: Path) -> int:
    disk = os.statvfs(path)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def fill_up(path: Path) -> Path:
    """Another program's file that takes every byte there is."""
    other = path / "other-program"
    with other.open("wb", buffering=0) as file:
        for size in (MIB, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return other


# ---------------------------------------------------------------------- the daemon


@pytest.mark.parametrize(("kind", "mib"), [("tmpfs", 12), ("tmpfs", 24), ("ext4", 16)])
def test_a_full_disk_refuses_intake_keeps_draining_and_takes_messages_again(
    tmp_path: Path, kind: str, mib: int
) -> None:
    hub_port = free_port()
    (tmp_path / "hub").mkdir()
    with small_disk(tmp_path / "disk", kind, mib) as disk:
        daemon = Daemon(tmp_path, hub_port=hub_port, state=disk / "state")
        hub = None
        try:
            daemon.status()
            client = Client(daemon.port, MQTTProtocolVersion.MQTTv5)
            sent = mib * 1000
            for _ in range(sent):
                client.client.publish("train/speed", PAYLOAD, qos=1)
            wait_until(lambda: client.acknowledged + client.refused == sent, 2 * WAIT_S)
            assert client.refused > 0
            stored = daemon.rows()
            assert stored == client.acknowledged > sent // 4
            assert daemon.status()["disk_full"]

            hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
            hub.status()
            wait_until(lambda: daemon.stream()["waiting"] == 0, 2 * WAIT_S)
            drained = time.monotonic()
            wait_until(lambda: not daemon.status()["disk_full"], RESUME_S_MAX)
            client.publish(100)
            wait_until(lambda: client.acknowledged == stored + 100, RESUME_S_MAX)
            wait_until(lambda: daemon.rows() == 0, drained + RESUME_S_MAX - time.monotonic())
            wait_until(lambda: hub is not None and hub.stream("local")["next_seq"] - 1 == stored + 100, 2 * WAIT_S)
            client.close()
        finally:
            daemon.end()
            if hub is not None:
                hub.end()


def test_space_that_another_program_gives_back_is_used_without_a_restart_and_a_3_1_1_client_waits_for_it(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", "tmpfs", 12) as disk:
        daemon = Daemon(tmp_path, state=disk / "state")
        try:
            daemon.status()
            client = Client(daemon.port)
            client.publish(10)
            other = fill_up(disk)
            for _ in range(200):
                client.client.publish("train/speed", PAYLOAD, qos=1)
            wait_until(lambda: daemon.status()["disk_full"], 2 * WAIT_S)
            time.sleep(2 * 0.5)  # longer than it takes to look for room twice: none appears
            assert daemon.status()["disk_full"]
            assert client.acknowledged == 10
            other.unlink()
            wait_until(lambda: client.acknowledged == 210, RESUME_S_MAX)
            assert not daemon.status()["disk_full"]
            assert daemon.rows() == 210
            client.close()
        finally:
            daemon.end()


def test_a_daemon_starts_on_a_disk_without_a_byte_left_and_its_backlog_drains(tmp_path: Path) -> None:
    hub_port = free_port()
    (tmp_path / "hub").mkdir()
    with small_disk(tmp_path / "disk", "tmpfs", 12) as disk:
        daemon = Daemon(tmp_path, hub_port=hub_port, state=disk / "state")
        hub = None
        try:
            daemon.status()
            client = Client(daemon.port, MQTTProtocolVersion.MQTTv5)
            client.publish(2000)
            client.close()
            daemon.process.terminate()
            assert daemon.process.wait(WAIT_S) == 0
            fill_up(disk)
            daemon.start()
            assert daemon.status()["disk_full"]
            assert daemon.rows() == 2000
            hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
            hub.status()
            wait_until(lambda: daemon.rows() == 0, 2 * WAIT_S)
            assert hub.stream("local")["next_seq"] - 1 == 2000
        finally:
            daemon.end()
            if hub is not None:
                hub.end()


# ---------------------------------------------------------------------- the journal alone


class Told:
    def __init__(self) -> None:
        self.stored: list[int] = []
        self.refused: list[int] = []

    def committed(self, tokens: list[int]) -> None:
        self.stored += tokens

    def failed(self, tokens: list[int], error: JournalFull) -> None:
        self.refused += tokens


def commit(journal: Journal) -> bool:
    """One commit as the daemon makes it; whether it came through."""
    try:
        journal.commit_now()
    except JournalFull:
        journal.recover()
        journal.reclaim()
        return False
    if journal.disk_full:
        journal.recover()
        journal.reclaim()
    elif journal.checkpoint_due():
        journal.checkpoint()
    return True


def append(journal: Journal, told: Told, name: str, count: int, size: int) -> None:
    stream = journal.streams[name]
    for _ in range(count):
        try:
            seq = journal.append(stream, "a/b", encode, os.urandom(size), identity=b"sender" + os.urandom(10))
        except JournalFull:
            continue
        journal.wait(told, seq)


def assert_memory_is_what_the_file_says(journal: Journal) -> None:
    for stream in journal.streams.values():
        (rows, size, next_seq) = journal.query("SELECT rows, bytes, next_seq FROM stream WHERE id = ?", (stream.id,))[0]
        span = (stream.base, stream.base | ((1 << 48) - 1))
        counted = journal.query(
            "SELECT count(*), coalesce(sum(length(body)), 0) FROM message WHERE id BETWEEN ? AND ?", span
        )
        assert counted == [(rows, size)] == [(stream.rows, stream.size_bytes)], stream.name
        assert next_seq <= stream.next_seq
        (first,) = journal.query("SELECT min(id) FROM message WHERE id BETWEEN ? AND ?", span)[0]
        assert first is None or first - stream.base >= stream.first_seq
        assert {n: c.position for n, c in stream.cursors.items()} == dict(
            journal.query("SELECT name, position FROM cursor WHERE stream = ?", (stream.id,))
        )
        seen = journal.query("SELECT identity, id FROM seen WHERE id BETWEEN ? AND ? ORDER BY id", span)
        assert list(stream.seen.items()) == seen
    assert journal.query("SELECT count(*) FROM dead") == [(journal.dead_count,)]
    assert journal.query("SELECT coalesce(sum(messages), 0) FROM loss_total") == [(journal.loss_count,)]


@pytest.mark.parametrize("size", [10, 300, 5_000, 60_000])
def test_rounds_of_filling_and_draining_leave_memory_and_file_agreed_and_always_end_with_room(
    tmp_path: Path, size: int
) -> None:
    with small_disk(tmp_path / "disk", "tmpfs", 8) as disk:
        journal = Journal.open(disk)
        stream = outbound(journal, seen_max=200)
        told = Told()
        for other_fills in (False, True, False, True):
            count = max(4, 200_000 // (size + 100))
            for n in range(1000):
                append(journal, told, "alarms", count, size)
                commit(journal)
                if journal.disk_full:
                    break
                if other_fills and n == 1:
                    other = fill_up(disk)
            assert journal.disk_full
            with pytest.raises(JournalFull, match="disk is full"):
                journal.append(stream, "a/b", encode, b"")
            while journal.pending:
                assert commit(journal)
            assert_memory_is_what_the_file_says(journal)

            # Half drains, some of it refused by the hub, while nobody else gives anything back.
            cursor = stream.cursors["uplink"]
            rows = list(journal.read_range(stream, cursor.position, stream.committed))
            assert [r.seq for r in rows] == [s for s in told.stored if s >= cursor.position]
            for row in rows[:3]:
                journal.bury(stream, row, "amqp:decode-error", "no")
            journal.advance(stream, cursor, rows[len(rows) // 2].seq)
            for _ in range(1000):
                if not journal.pending:
                    break
                assert commit(journal), "draining is never refused"
            assert stream.first_seq == cursor.position
            assert_memory_is_what_the_file_says(journal)
            if other_fills:
                other.unlink()
            journal.advance(stream, cursor, stream.committed)
            for _ in range(1000):
                if not (journal.pending or journal.disk_full):
                    break
                assert commit(journal)
            assert not journal.disk_full
            assert stream.rows == 0
            assert journal.space.laid_by
            assert_memory_is_what_the_file_says(journal)
        assert sorted(told.stored) == told.stored
        assert not set(told.stored) & set(told.refused)
        while journal.recover():
            pass
        journal.close()
        assert used_bytes(disk) < 4 * MIB


def test_a_reader_that_holds_a_snapshot_holds_space_up_and_nothing_else(tmp_path: Path) -> None:
    import sqlite3

    with small_disk(tmp_path / "disk", "tmpfs", 12) as disk:
        journal = Journal.open(disk)
        stream = outbound(journal)
        told = Told()
        append(journal, told, "alarms", 100, 1000)
        commit(journal)
        shell = sqlite3.connect(disk / "journal.db", isolation_level=None)
        shell.execute("BEGIN")
        shell.execute("SELECT count(*) FROM message").fetchone()
        while not journal.disk_full:
            append(journal, told, "alarms", 200, 1000)
            commit(journal)
        journal.advance(stream, stream.cursors["uplink"], stream.committed)
        began = time.monotonic()
        came_through = [commit(journal) for _ in range(20)]
        assert time.monotonic() - began < 8, "no commit waits for the reader"
        assert came_through[0], "cursors can still be written"
        assert journal.disk_full
        assert stream.rows == len(told.stored), "a deletion would only fill the WAL"
        for n in range(1000):
            journal.lose("alarms", n, "expired", 1)
            if not commit(journal):
                break
        assert journal.space.laid_by or journal.space.free_bytes() > 0
        shell.execute("ROLLBACK")
        shell.close()
        for _ in range(200):
            if not (journal.pending or journal.disk_full):
                break
            commit(journal)
        assert not journal.disk_full
        assert stream.rows == 0
        assert_memory_is_what_the_file_says(journal)
        journal.close()


def test_qos_0_refused_on_a_full_disk_is_all_in_the_ledger_which_stays_bounded(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "tmpfs", 12) as disk:
        journal = Journal.open(disk)
        outbound(journal)
        fill_up(disk)
        commit(journal)
        for _ in range(20):
            for n in range(2000):
                journal.lose("alarms", 0, "refused-qos-0", 10, "app")
                journal.lose("alarms", n + 1, "expired", 10, "x" * 2000)
            while journal.pending:
                assert commit(journal)
        assert journal.query("SELECT reason, messages, bytes FROM loss_total ORDER BY reason") == [
            ("expired", 40_000, 400_000),
            ("refused-qos-0", 40_000, 400_000),
        ]
        ((rows,),) = journal.query("SELECT count(*) FROM loss")
        assert rows < 2 * journal.space.ledger_rows
        assert journal.query("SELECT detail FROM loss WHERE seq = 0 ORDER BY id DESC LIMIT 1") == [
            ("app (2000 messages)",)
        ]
        journal.close()


def test_dropping_the_oldest_is_told_once_however_often_the_commit_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path)
    # No cursor holds this stream: nothing but the batch itself knows that the rows are to go.
    stream = journal.stream("log", "inbound", StreamLimits(messages_max=100, when_full=WhenFull.DROP_OLDEST))
    told = Told()
    append(journal, told, "log", 100, 10)
    journal.commit_now()
    for _ in range(3):
        append(journal, told, "log", 1, 10)
        monkeypatch.setattr(journal.space, "free_bytes", lambda: 0)
        with pytest.raises(JournalFull):
            journal.commit_now()
        monkeypatch.undo()
        journal.disk_full = False
    append(journal, told, "log", 1, 10)
    journal.commit_now()
    assert_memory_is_what_the_file_says(journal)
    lost = [r[0] for r in journal.query("SELECT seq FROM loss ORDER BY id")]
    kept = [r.seq for r in journal.read_range(stream, 1, stream.next_seq)]
    assert lost + kept == [*range(1, 101), told.stored[-1]]
    journal.close()


def test_a_dead_letter_that_can_not_be_sent_again_now_stays_a_dead_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path)
    stream = outbound(journal)
    append(journal, Told(), "alarms", 1, 10)
    journal.commit_now()
    row = journal.read(stream, 1, 1)[0]
    journal.bury(stream, row, "no", "no")
    journal.advance(stream, stream.cursors["uplink"], 2)
    journal.commit_now()
    assert journal.revive(1, stream, row.topic, row.body)
    assert not journal.revive(1, stream, row.topic, row.body)
    monkeypatch.setattr(journal.space, "free_bytes", lambda: 0)
    with pytest.raises(JournalFull):
        journal.commit_now()
    monkeypatch.undo()
    assert_memory_is_what_the_file_says(journal)
    assert journal.dead_count == 1
    journal.disk_full = False
    assert journal.revive(1, stream, row.topic, row.body)
    journal.commit_now()
    assert [r.body for r in journal.read_range(stream, 2, stream.next_seq)] == [row.body]
    assert_memory_is_what_the_file_says(journal)
    journal.close()
