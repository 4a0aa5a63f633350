"""A backup is one consistent moment, whole or not there; and no two machines ever own one journal."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from storeforward import backup, schema
from storeforward.backup import back_up, hand_over, restore, verify
from storeforward.errors import JournalCorrupt, JournalError, JournalLocked, JournalNewer
from storeforward.journal import Journal
from storeforward.streams import Stream

ROWS = 500


def encode(seq: int, payload: bytes) -> bytes:
    return b"%d:%b" % (seq, payload)


def opened(state_dir: Path) -> tuple[Journal, Stream]:
    journal = Journal.open(state_dir)
    stream = journal.stream("alarms", "outbound")
    journal.cursor(stream, "uplink", "uplink")
    return journal, stream


def fill(state_dir: Path, rows: int, text: bytes = b"x") -> None:
    state_dir.mkdir(exist_ok=True)
    journal, stream = opened(state_dir)
    for _ in range(rows):
        journal.append(stream, "a/b", encode, text)
    journal.commit_now()
    journal.close()


def bodies(state_dir: Path) -> list[bytes]:
    journal, stream = opened(state_dir)
    try:
        return [bytes(row.body) for row in journal.read_range(stream, stream.first_seq, stream.next_seq)]
    finally:
        journal.close()


def test_a_backup_of_a_journal_that_is_being_written_holds_a_run_without_gaps(tmp_path: Path) -> None:
    state = tmp_path / "state"
    fill(state, ROWS)
    stop, begun = threading.Event(), threading.Event()
    committed = [ROWS]

    def write() -> None:
        journal, stream = opened(state)
        while not stop.is_set():
            for _ in range(50):
                journal.append(stream, "a/b", encode, b"x" * 100)
            journal.commit_now()
            committed[0] = stream.next_seq - 1
            begun.set()
        journal.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert begun.wait(10)
        for n in range(3):
            before = committed[0]
            contents = back_up(state, tmp_path / f"{n}.db")
            assert before <= contents.messages
            assert contents == verify(tmp_path / f"{n}.db")
            restore(tmp_path / f"{n}.db", tmp_path / f"new{n}")
            found = bodies(tmp_path / f"new{n}")
            assert [int(body.partition(b":")[0]) for body in found] == list(range(1, contents.messages + 1))
    finally:
        stop.set()
        writer.join(10)
    assert not list(tmp_path.glob("*.part"))


def test_a_backup_is_readable_by_its_owner_only_and_holds_no_deleted_bytes(tmp_path: Path) -> None:
    state = tmp_path / "state"
    fill(state, 200, b"a secret of yesterday")
    journal, stream = opened(state)
    journal.advance(stream, stream.cursors["uplink"], stream.next_seq)
    journal.reclaim()
    journal.commit_now()
    journal.append(stream, "a/b", encode, b"of today")
    journal.commit_now()
    assert b"yesterday" in (state / "journal.db-wal").read_bytes() + (state / "journal.db").read_bytes()
    back_up(state, tmp_path / "b.db")
    journal.close()
    assert (tmp_path / "b.db").stat().st_mode & 0o777 == 0o600
    assert b"of today" in (tmp_path / "b.db").read_bytes()
    assert b"yesterday" not in (tmp_path / "b.db").read_bytes()


def test_an_existing_file_is_replaced_only_when_asked_and_only_by_a_whole_backup(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "b.db"
    fill(state, 3)
    back_up(state, target)
    with pytest.raises(JournalError, match="exists already"):
        back_up(state, target)
    fill(state, 2)
    with pytest.raises(JournalError, match="directory"):
        back_up(state, tmp_path)
    assert verify(target).messages == 3
    with pytest.raises(JournalError, match="No such file"):
        back_up(state, tmp_path / "nowhere" / "b.db")
    assert back_up(state, target, overwrite=True).messages == 5
    (state / "journal.db").write_bytes(os.urandom(1 << 16))
    with pytest.raises(JournalError):
        back_up(state, target, overwrite=True)
    assert verify(target).messages == 5
    assert not list(tmp_path.glob("*.part"))


def test_no_flipped_bit_of_a_page_goes_unseen_and_a_damaged_backup_is_not_restored(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "b.db"
    fill(state, ROWS, b"y" * 200)
    back_up(state, target)
    whole = target.read_bytes()
    state_before = (state / "journal.db").read_bytes()
    unseen = []
    for page in range(len(whole) // schema.PAGE_SIZE_BYTES):
        # The middle of a row: no structure of SQLite's, so only the checksum can tell.
        at = whole.find(b"yyyy", page * schema.PAGE_SIZE_BYTES, (page + 1) * schema.PAGE_SIZE_BYTES)
        if at < 0:
            continue
        target.write_bytes(whole[:at] + b"Y" + whole[at + 1 :])
        try:
            restore(target, state, replace=True)
            unseen.append(page)
        except JournalCorrupt:
            pass
    assert unseen == []
    for cut in (1, 100, len(whole) // 2, len(whole) - 1):
        target.write_bytes(whole[:cut])
        with pytest.raises(JournalError):
            restore(target, state, replace=True)
    target.write_bytes(b"")
    with pytest.raises(JournalError, match="not a journal"):
        restore(target, state, replace=True)
    assert (state / "journal.db").read_bytes() == state_before
    assert not (state / "quarantine").exists()


def test_a_journal_that_is_there_is_set_aside_only_when_asked(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "b.db"
    fill(state, 3)
    back_up(state, target)
    fill(state, 2)
    with pytest.raises(JournalError, match="--replace"):
        restore(target, state)
    assert len(bodies(state)) == 5
    restore(target, state, replace=True)
    assert len(bodies(state)) == 3
    assert verify(state / "quarantine" / "0001" / "journal.db").messages == 5


def test_a_restored_journal_uses_no_identity_twice(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "b.db"
    fill(state, 1)
    back_up(state, target)
    journal, _ = opened(state)
    first = journal.epoch_token
    journal.close()
    restore(target, state, replace=True)
    journal, _ = opened(state)
    assert journal.epoch_token != first
    journal.close()


def test_a_running_gateway_is_neither_handed_over_nor_replaced(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "b.db"
    fill(state, 1)
    back_up(state, target)
    journal, _ = opened(state)
    for attempt in (
        lambda: hand_over(state, tmp_path / "c.db"),
        lambda: restore(target, state, replace=True),
    ):
        with pytest.raises(JournalLocked, match="stop it"):
            attempt()
    journal.close()
    assert not (tmp_path / "c.db").exists()
    assert len(bodies(state)) == 1


def test_a_journal_that_was_handed_over_starts_nowhere_but_from_the_file(tmp_path: Path) -> None:
    state, target, new = tmp_path / "state", tmp_path / "b.db", tmp_path / "new"
    fill(state, ROWS)
    assert hand_over(state, target).messages == ROWS
    with pytest.raises(JournalError, match=r"handed over as .*b\.db"):
        Journal.open(state)
    restore(target, new)
    assert len(bodies(new)) == ROWS
    # Changed one's mind: back from the file, without --replace, because what is there is nobody's.
    restore(target, state)
    assert len(bodies(state)) == ROWS


def test_a_hand_over_that_fails_changes_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    fill(state, 2)
    with pytest.raises(JournalError, match="No such file"):
        hand_over(state, tmp_path / "nowhere" / "b.db")
    assert len(bodies(state)) == 2
    with pytest.raises(JournalError, match="there is no journal"):
        hand_over(tmp_path / "empty", tmp_path / "b.db")


def test_a_backup_of_a_newer_version_is_refused_and_of_an_older_one_taken(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "b.db"
    fill(state, 2)
    back_up(state, target)
    with closing(sqlite3.connect(target, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    with pytest.raises(JournalNewer):
        restore(target, tmp_path / "new")
    target.unlink()
    with closing(sqlite3.connect(target, isolation_level=None)) as connection:
        schema.migrate(connection, 1)
    assert restore(target, tmp_path / "new").messages == 0
    assert bodies(tmp_path / "new") == []


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Whether a child process that runs `action` and dies before its `step`th change to a directory got so far."""
    child = os.fork()
    if child == 0:
        left = [step]

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(1)
                return real(*arguments, **named)

            return call

        for name in ("replace", "rename", "unlink", "mkdir", "fsync", "chown"):
            setattr(os, name, dying(getattr(os, name)))
        backup._mark = dying(backup._mark)  # type: ignore[assignment]
        try:
            action()
            os._exit(0)
        finally:
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 1


def test_a_restore_killed_at_any_step_leaves_the_old_journal_or_the_new_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "b.db"
    fill(tmp_path / "source", 3)
    back_up(tmp_path / "source", target)
    seen = []
    for step in range(100):
        state = tmp_path / f"state{step}"
        fill(state, 7)
        died = killed_at(step, lambda state=state: restore(target, state, replace=True))  # type: ignore[misc]
        seen.append(len(bodies(state)))
        if not died:
            break
    assert not died
    assert len(seen) > 5
    assert set(seen) == {3, 7}
    assert seen == sorted(seen, reverse=True)


def test_a_hand_over_killed_at_any_step_never_leaves_two_owners(tmp_path: Path) -> None:
    both = 0
    for step in range(100):
        state, target = tmp_path / f"state{step}", tmp_path / f"{step}.db"
        fill(state, 7)
        died = killed_at(step, lambda state=state, target=target: hand_over(state, target))  # type: ignore[misc]
        try:
            old = len(bodies(state))
        except JournalError:
            old = 0
        assert not (old and target.exists())
        both += not old and not target.exists()
        if not old and not target.exists():  # said again, it is finished
            hand_over(state, target, overwrite=True)
        assert old or verify(target).messages == 7
        if not died:
            break
    assert not died
    assert both


def test_a_restore_that_fails_in_the_middle_says_where_the_old_journal_is_and_the_next_start_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, target = tmp_path / "state", tmp_path / "backup.db"
    fill(state, 3)
    back_up(state, target)
    fill(state, 2)
    replace = os.replace

    def fails(source: Path, to: Path) -> None:
        if to == state / "journal.db":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr("storeforward.backup.os.replace", fails)
        with pytest.raises(JournalError, match=r"Input/output error; the next start .*quarantine/0001"):
            restore(target, state, replace=True)
    assert len(bodies(state)) == 5
