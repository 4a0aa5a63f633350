"""The disk that forgets, mounted: what SQLite and other programs see of it."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import LinesideError
from gateway.simulate.cutmount import CutMount
from tests.conftest import require_fuse

PAGE = b"x" * 4096
WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("PRAGMA synchronous = " + sys.argv[2])
db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, b BLOB)")
for n in range(int(sys.argv[3]), int(sys.argv[4])):
    db.execute("INSERT INTO t VALUES (?, zeroblob(3000))", (n,))
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CutMount]:
    """One mount for all of them: each test cuts, and so begins with what the one before had synced."""
    require_fuse()
    with CutMount(tmp_path_factory.mktemp("cut")) as mounted:
        yield mounted


@pytest.fixture(autouse=True)
def whole(disk: CutMount) -> None:
    disk.ask("clear")
    for path in disk.path.iterdir():
        path.unlink()
    disk.ask("sync")


def write(path: Path, data: bytes, *, sync: bool = False) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, data, 0)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def test_through_the_mount_a_cut_takes_what_was_not_synced_and_the_kernel_has_forgotten_it_too(disk: CutMount) -> None:
    write(disk.path / "a", b"old", sync=True)
    sync_directory(disk.path)
    write(disk.path / "a", b"new and longer")
    write(disk.path / "b", b"unnamed", sync=True)
    assert (disk.path / "a").read_bytes() == b"new and longer"
    assert (disk.stored / "a").read_bytes() == b"old"
    disk.ask("cut")
    assert (disk.path / "a").read_bytes() == b"old"
    assert [p.name for p in disk.path.iterdir()] == ["a"]


def test_a_file_that_was_open_at_the_cut_can_no_longer_be_used(disk: CutMount) -> None:
    with (disk.path / "a").open("wb", buffering=0) as file:
        file.write(b"x")
        disk.ask("cut")
        with pytest.raises(OSError, match=r"\[Errno 5\]"):
            file.write(b"y")


def test_an_unlinked_file_stays_usable_while_it_is_open(disk: CutMount) -> None:
    with (disk.path / "a").open("w+b", buffering=0) as file:
        file.write(b"x" * 10)
        (disk.path / "a").unlink()
        assert list(disk.path.iterdir()) == []
        file.truncate(5)
        file.seek(0)
        assert file.read() == b"xxxxx"
        os.fsync(file.fileno())


@pytest.mark.parametrize("keep", ["nothing", "torn", "some"])
def test_sqlite_in_wal_mode_works_on_it_from_two_processes_and_keeps_what_it_committed(
    disk: CutMount, keep: str
) -> None:
    path = disk.path / "t.db"
    first = 0
    for seed in range(3):
        # The first connection makes the shared memory: a map of a file, in two processes.
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), "FULL", str(first), str(first + 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == b"done\n"
        reader = sqlite3.connect(path)
        assert reader.execute("SELECT count(*) FROM t").fetchone() == (first + 20,)
        reader.close()
        first += 20
        if not seed:
            sync_directory(disk.path)
        writer.kill()
        writer.communicate()
        disk.ask("cut", keep=keep, seed=seed)
        reader = sqlite3.connect(path)
        assert reader.execute("SELECT count(*), max(n) FROM t").fetchone() == (first, first - 1)
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        reader.close()


def test_without_syncs_sqlite_loses_what_it_committed(disk: CutMount) -> None:
    path = disk.path / "t.db"
    subprocess.run([sys.executable, "-c", WRITER, str(path), "FULL", "0", "1"], input=b"", check=True)
    disk.ask("sync")
    subprocess.run(
        [sys.executable, "-c", "import os, sqlite3, sys; exec(sys.stdin.read())"],
        input=f"""
db = sqlite3.connect({str(path)!r}, isolation_level=None)
db.execute("PRAGMA synchronous = OFF")
db.execute("INSERT INTO t VALUES (7, 'x')")
os._exit(0)
""".encode(),
        check=True,
    )
    disk.ask("cut")
    reader = sqlite3.connect(path)
    assert reader.execute("SELECT count(*) FROM t WHERE n = 7").fetchone() == (0,)
    reader.close()


def test_errors_come_on_request_once_or_for_good_and_where_they_were_asked_for(disk: CutMount) -> None:
    disk.ask("fault", op="write", path="a", times=1)
    write(disk.path / "b", PAGE)
    with pytest.raises(OSError, match="Input/output"):
        write(disk.path / "a", PAGE)
    write(disk.path / "a", PAGE)
    disk.ask("fault", op="sync", errno="ENOSPC")
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            write(disk.path / "a", PAGE, sync=True)
    disk.ask("clear")
    write(disk.path / "a", PAGE, sync=True)
    fd = os.open(disk.path / "a", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        disk.ask("fault", op="read", path="a")
        with pytest.raises(OSError, match="Input/output"):
            os.read(fd, 10)
    finally:
        os.close(fd)


def test_a_full_a_slow_and_a_read_only_disk_are_that(disk: CutMount) -> None:
    disk.ask("limit", bytes=8192)
    free = os.statvfs(disk.path)
    assert free.f_bavail * free.f_frsize == 8192
    write(disk.path / "a", PAGE + PAGE)
    with pytest.raises(OSError, match="No space"):
        write(disk.path / "b", PAGE)
    disk.ask("limit", bytes=None)
    disk.ask("slow", sync_s=0.2)
    began = time.monotonic()
    write(disk.path / "a", PAGE, sync=True)
    assert time.monotonic() - began >= 0.2
    disk.ask("read-only", on=True)
    for attempt in (lambda: write(disk.path / "a", b""), (disk.path / "a").unlink, (disk.path / "d").mkdir):
        with pytest.raises(OSError, match="Read-only") as raised:
            attempt()
        assert raised.value.errno == errno.EROFS
    assert (disk.path / "a").read_bytes() == PAGE + PAGE


def test_a_wrong_command_is_told_and_harms_nobody(disk: CutMount) -> None:
    with pytest.raises(LinesideError, match="no such command: explode"):
        disk.ask("explode")
    with pytest.raises(LinesideError, match="sideways"):
        disk.ask("cut", keep="sideways")
    assert disk.ask("state")["ok"]


def test_nothing_stays_mounted_when_the_one_who_mounted_it_is_killed(tmp_path: Path) -> None:
    require_fuse()
    script = (
        "import sys; from pathlib import Path; from gateway.simulate.cutmount import CutMount;"
        "CutMount(Path(sys.argv[1])); print('up', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    assert os.path.ismount(tmp_path / "disk")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    end = time.monotonic() + 15
    while "/disk" in Path("/proc/self/mounts").read_text() and str(tmp_path) in Path("/proc/self/mounts").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
