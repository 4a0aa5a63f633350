"""A disk that fails while it is in use: syncs and writes that fail, reads that fail, syncs that take half a second."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.simulate.cutmount import CutMount
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.streams import StreamLimits
from tests.conftest import require_fuse
from tests.cut import abandon
from tests.storeforward.test_journal import encode, outbound

# ---------------------------------------------------------------------- the journal alone


@pytest.fixture(scope="module")
def module_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CutMount]:
    require_fuse()
    with CutMount(tmp_path_factory.mktemp("cut"), size=16 << 20) as mounted:
        yield mounted


@pytest.fixture
def state(module_disk: CutMount, request: pytest.FixtureRequest) -> Path:
    module_disk.ask("clear")
    path = module_disk.path / f"state-{request.node.callspec.id if hasattr(request.node, 'callspec') else ''}"
    path.mkdir()
    module_disk.ask("sync")
    return path


def store(journal: Journal, count: int) -> None:
    stream = outbound(journal)
    for _ in range(count):
        journal.append(stream, "a/b", encode, b"x" * 300)
    journal.commit_now()


KILLED_AFTER_A_FAILED_SYNC = """
import os, socket, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from storeforward.journal import Journal
from tests.crash.test_failing_disk import store
journal = Journal.open(Path(sys.argv[1]))
store(journal, 10)
print("stored", flush=True)
sys.stdin.readline()
try:
    store(journal, 10)
except Exception as error:
    print("refused", error, flush=True)
os._exit(0)
"""


def test_what_is_committed_after_a_restart_that_followed_a_failed_sync_survives_a_power_cut(
    module_disk: CutMount, tmp_path: Path
) -> None:
    """The kernel says of a page that it could not write: written. A WAL that reads well may end there on the disk."""
    state = module_disk.path / "restart"
    state.mkdir()
    module_disk.ask("clear")
    module_disk.ask("sync")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED_AFTER_A_FAILED_SYNC, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"stored\n"
    module_disk.ask("fault", op="sync", path="*-wal", times=1)
    out, _ = child.communicate(b"\n")
    assert out.startswith(b"refused")

    journal = Journal.open(state)
    store(journal, 10)
    end = journal.streams["alarms"].next_seq
    module_disk.ask("cut")
    abandon(journal)
    journal = Journal.open(state)
    stream = outbound(journal)
    assert stream.next_seq == end
    assert [row.seq for row in journal.read_range(stream, 1, end)][-10:] == list(range(end - 10, end))
    journal.close()


@pytest.mark.parametrize("what", ["sync", "write"])
def test_a_commit_that_failed_is_taken_back_and_the_next_one_is_durable(
    module_disk: CutMount, state: Path, what: str
) -> None:
    journal = Journal.open(state)
    store(journal, 10)
    module_disk.ask("fault", op=what, path="*-wal", times=1)
    with pytest.raises(JournalFull):
        store(journal, 10)
    assert journal.streams["alarms"].rows == 10
    while journal.disk_full:
        journal.recover()
    store(journal, 10)
    module_disk.ask("cut")
    abandon(journal)
    journal = Journal.open(state)
    stream = outbound(journal)
    # The seqs of the batch that failed are spent.
    assert [row.seq for row in journal.read_range(stream, 1, stream.next_seq)] == [*range(1, 11), *range(21, 31)]
    journal.close()


def test_urgent_streams_have_the_last_of_the_room_and_others_come_back_when_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path)
    urgent = journal.stream("alarms", "outbound", StreamLimits(urgent=True))
    normal = journal.stream("telemetry", "outbound", StreamLimits())
    free = journal.space.urgent_bytes // 2
    monkeypatch.setattr(journal.space, "free_bytes", lambda: free)
    journal.append(normal, "a/b", encode, b"the one with which room gets low")
    journal.commit_now()
    with pytest.raises(JournalFull, match="telemetry: the disk is full"):
        journal.append(normal, "a/b", encode, b"x")
    assert not journal.append_run(normal, "a/b", encode, [b"x"])
    journal.append(urgent, "a/b", encode, b"x")
    journal.commit_now()
    free = 0
    journal.append(urgent, "a/b", encode, b"x")
    with pytest.raises(JournalFull):
        journal.commit_now()
    assert journal.refuses(urgent)
    monkeypatch.undo()
    journal.recover()
    for stream in (urgent, normal):
        assert not journal.refuses(stream)
        journal.append(stream, "a/b", encode, b"x")
    journal.commit_now()
    assert (urgent.rows, normal.rows) == (2, 2)
    journal.close()
