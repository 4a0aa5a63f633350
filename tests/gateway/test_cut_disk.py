"""The disk that forgets, without a file system: what a cut takes and what it leaves."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from gateway.simulate.cutdisk import SECTOR_BYTES, CutDisk, Keep, Names, Node
from gateway.simulate.diskfaults import Fault, Faults, Op

FILE = stat.S_IFREG | 0o600
DIRECTORY = stat.S_IFDIR | 0o700
SEEDS = range(200)


def new_file(disk: CutDisk, path: str, *, durable: bool = False, content: bytes = b"") -> Node:
    node = disk.create(path, FILE, 0, 0, 0)
    disk.write(node, 0, content, 0)
    if durable:
        disk.sync(node)
        disk.sync(disk.find(path.rpartition("/")[0] or "/"))
    return node


def content(disk: CutDisk, path: str) -> bytes | None:
    try:
        return bytes(disk.find(path).data)
    except FileNotFoundError:
        return None


def test_after_a_cut_a_file_holds_what_was_synced_and_is_as_long_as_it_was_then(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    node = new_file(disk, "/a", durable=True, content=b"x" * 1000)
    disk.write(node, 100, b"y" * 5000, 0)
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") == b"x" * 1000
    node = disk.find("/a")
    disk.truncate(node, 10, 0)
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") == b"x" * 1000
    disk.truncate(disk.find("/a"), 10, 0)
    disk.sync(disk.find("/a"))
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") == b"x" * 10
    assert (tmp_path / "tree" / "a").read_bytes() == b"x" * 10


def test_strictly_a_synced_file_is_lost_with_its_name_until_the_directory_is_synced(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    node = new_file(disk, "/a", content=b"x")
    disk.sync(node)
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") is None
    node = new_file(disk, "/a", content=b"x")
    disk.sync(disk.root)
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") == b"", "the name without the data"


def test_as_ext4_does_it_a_file_s_sync_keeps_its_name_too(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path, names=Names.FILE)
    disk.sync(new_file(disk, "/a", content=b"x"))
    new_file(disk, "/b", content=b"x")
    disk.cut(Keep.NOTHING)
    assert (content(disk, "/a"), content(disk, "/b")) == (b"x", None)


def test_a_directory_that_was_not_synced_takes_what_is_in_it_along(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    directory = disk.create("/d", DIRECTORY, 0, 0, 0)
    disk.sync(new_file(disk, "/d/a", content=b"x"))
    disk.sync(directory)
    assert not (tmp_path / "tree" / "d").exists()
    disk.sync(disk.root)
    assert (tmp_path / "tree" / "d" / "a").read_bytes() == b"x"
    disk.cut(Keep.NOTHING)
    assert content(disk, "/d/a") == b"x"
    disk.create("/e", DIRECTORY, 0, 0, 0)
    disk.sync(disk.find("/e"))
    disk.cut(Keep.NOTHING)
    with pytest.raises(FileNotFoundError):
        disk.find("/e")


@pytest.mark.parametrize("keep", list(Keep))
def test_a_rename_is_whole_or_not_at_all(tmp_path: Path, keep: Keep) -> None:
    disk = CutDisk(tmp_path)
    found = set()
    for seed in SEEDS:
        for name, text in (("/a", b"old"), ("/a.new", b"new")):
            if content(disk, name) is not None:
                disk.unlink(name)
            new_file(disk, name, durable=True, content=text)
        disk.rename("/a.new", "/a")
        assert content(disk, "/a") == b"new"
        disk.cut(keep, seed)
        found.add((content(disk, "/a"), content(disk, "/a.new")))
    before, after = (b"old", b"new"), (b"new", None)
    assert found == {Keep.NOTHING: {before}, Keep.ALL: {after}}.get(keep, {before, after})


def test_an_unlinked_file_comes_back_whole_unless_its_directory_was_synced(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    new_file(disk, "/a", durable=True, content=b"x" * 5000)
    for keep in (Keep.NOTHING, Keep.TORN, Keep.SOME):
        disk.unlink("/a")
        assert disk.used_bytes == 0
        disk.cut(keep, seed=3)  # a seed for which no name changes
        assert content(disk, "/a") == b"x" * 5000
    disk.unlink("/a")
    disk.sync(disk.root)
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") is None
    assert not list((tmp_path / "inodes").iterdir())


def test_some_sectors_survive_each_whole_old_new_or_one_between_and_in_any_mixture(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    sectors, seen = 8, set()
    for seed in SEEDS:
        if content(disk, "/a") is not None:
            disk.unlink("/a")
        node = new_file(disk, "/a", durable=True, content=b"0" * SECTOR_BYTES * sectors)
        disk.write(node, 0, b"1" * SECTOR_BYTES * sectors, 0)
        disk.write(node, 0, b"2" * SECTOR_BYTES * sectors, 0)
        disk.cut(Keep.SOME, seed)
        data = content(disk, "/a") or b""
        assert len(data) == SECTOR_BYTES * sectors
        pieces = [data[at : at + SECTOR_BYTES] for at in range(0, len(data), SECTOR_BYTES)]
        assert all(len(set(piece)) == 1 for piece in pieces), "a sector is written whole or not"
        seen.add("".join(chr(piece[0]) for piece in pieces))
    assert len(seen) > len(SEEDS) // 4
    assert {"0", "1", "2"} <= set("".join(seen))
    assert any(picture != "".join(sorted(picture, reverse=True)) for picture in seen), "not only a prefix"


def test_a_torn_write_ends_at_a_sector_and_everything_before_it_is_there(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    sectors, seen = 32, set()
    for seed in SEEDS:
        if content(disk, "/a") is not None:
            disk.unlink("/a")
        node = new_file(disk, "/a", durable=True)
        for n in range(4):
            disk.write(node, n * 8 * SECTOR_BYTES, b"x" * 8 * SECTOR_BYTES, 0)
        disk.cut(Keep.TORN, seed)
        data = content(disk, "/a") or b""
        written = len(data.rstrip(b"\0"))
        assert written % SECTOR_BYTES == 0
        assert b"\0" not in data[:written]
        seen.add(written // SECTOR_BYTES)
    assert len(seen) > sectors // 2


def test_the_same_seed_takes_the_same(tmp_path: Path) -> None:
    pictures = []
    for n in range(2):
        disk = CutDisk(tmp_path / str(n))
        node = new_file(disk, "/a", durable=True, content=b"0" * 50_000)
        disk.write(node, 3000, b"1" * 40_000, 0)
        new_file(disk, "/b")
        disk.cut(Keep.SOME, 77)
        pictures.append((content(disk, "/a"), content(disk, "/b")))
    assert pictures[0] == pictures[1]


def test_what_was_synced_is_there_when_the_disk_is_opened_again(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    disk.create("/d", DIRECTORY, 0, 0, 0)
    new_file(disk, "/d/a", durable=True, content=b"x" * 1000)
    disk.sync(disk.root)
    new_file(disk, "/d/b", content=b"y")
    disk.close()
    disk = CutDisk(tmp_path)
    assert content(disk, "/d/a") == b"x" * 1000
    assert content(disk, "/d/b") is None
    disk.write(disk.find("/d/a"), 0, b"z", 0)
    disk.sync(disk.find("/d/a"))
    assert (tmp_path / "tree" / "d" / "a").read_bytes() == b"z" + b"x" * 999


def test_after_a_failed_sync_the_pages_count_as_clean_and_are_not_written_by_the_next(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    node = new_file(disk, "/a", durable=True, content=b"0" * 2048)
    disk.write(node, 0, b"1" * 1024, 0)
    disk.lose(node)
    assert bytes(node.data[:1024]) == b"1" * 1024, "read as if all were well"
    disk.write(node, 1024, b"2" * 512, 0)
    disk.sync(node)
    disk.cut(Keep.NOTHING)
    assert content(disk, "/a") == b"0" * 1024 + b"2" * 512 + b"0" * 512


def test_a_full_disk_says_so_and_takes_nothing_of_that_write(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path, size_bytes=64 << 10)
    node = new_file(disk, "/a", content=b"x" * (32 << 10))
    assert disk.free_bytes == 32 << 10
    with pytest.raises(OSError, match="no space") as raised:
        disk.write(node, 32 << 10, b"y" * (33 << 10), 0)
    assert raised.value.errno == errno.ENOSPC
    assert len(node.data) == 32 << 10
    disk.write(node, 0, b"z" * (64 << 10), 0)
    disk.unlink("/a")
    assert disk.free_bytes == 64 << 10


def test_a_handle_of_before_the_cut_is_good_for_nothing(tmp_path: Path) -> None:
    disk = CutDisk(tmp_path)
    handle = disk.open(new_file(disk, "/a", durable=True))
    disk.cut(Keep.NOTHING)
    with pytest.raises(OSError, match="before the power was cut"):
        disk.at(handle)


def test_faults_count_skip_end_and_mean_the_file_they_name() -> None:
    faults = Faults()
    faults.add(Fault(Op.WRITE, errno.EIO, "*-wal", times=2, skip=1))
    faults.check(Op.WRITE, "/s/journal.db")
    faults.check(Op.WRITE, "/s/journal.db-wal")
    for _ in range(2):
        with pytest.raises(OSError, match="by request"):
            faults.check(Op.WRITE, "/s/journal.db-wal")
    faults.check(Op.WRITE, "/s/journal.db-wal")
    assert not faults.faults


def test_a_dead_disk_does_nothing_from_the_change_on_that_it_died_at() -> None:
    faults = Faults(dead_at=2)
    faults.check(Op.WRITE, "/a")
    faults.check(Op.READ, "/a")
    for op in (Op.SYNC, Op.WRITE):
        with pytest.raises(OSError, match="power is gone"):
            faults.check(op, "/a")
    faults.clear()
    faults.check(Op.WRITE, "/a")


def test_a_read_only_disk_refuses_every_change_and_no_sync() -> None:
    faults = Faults(read_only=True)
    for op in Op:
        if op in (Op.READ, Op.OPEN, Op.SYNC, Op.SYNC_DIRECTORY):
            faults.check(op, "/a")
        else:
            with pytest.raises(OSError, match="read-only") as raised:
                faults.check(op, "/a")
            assert raised.value.errno == errno.EROFS
