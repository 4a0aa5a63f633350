"""A disk that forgets: files and directories of which only what was synced survives a power cut.

Everything written lives in memory; what a sync made durable also lies in a backing directory. `cut` throws the
difference away, all of it or, as a drive does that was busy writing, all but a random part of it. POSIX promises no
more: a name is durable once its directory was synced, data once the file was, and what was not synced may have arrived
in any order, sector by sector. Knows no FUSE, no clock, no faults.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
SIZE_BYTES_DEFAULT = 256 << 20
FILES_MAX = 10_000
_INODES = "inodes"
_TREE = "tree"


class Keep(Enum):
    """What of the unsynced is on the disk after a cut."""

    NOTHING = "nothing"
    SOME = "some"  # any sectors, in any order, also versions that were overwritten before a sync
    TORN = "torn"  # what was written first, up to some sector in the middle of a write
    ALL = "all"  # as after SIGKILL: the operating system lives on


class Names(Enum):
    """What makes a new, renamed or removed name durable."""

    STRICT = "strict"  # a sync of the directory
    FILE = "file"  # also a sync of the file that bears it, as ext4, XFS and btrfs do it


@dataclass(eq=False, slots=True)
class Node:
    """A file, directory or socket. `unsynced`: sectors in the order of their last write, with what an earlier write
    since the last sync had left there. `stored`: a directory's names as the backing directory has them."""

    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    data: bytearray = field(default_factory=bytearray)
    stored_bytes: int = 0
    unsynced: dict[int, bytes | None] = field(default_factory=dict)
    entries: dict[str, Node] = field(default_factory=dict)
    stored: dict[str, Node] = field(default_factory=dict)
    links: int = 0
    handles: int = 0
    gone: bool = False  # no name, no handle; only a cut can bring it back, as it was stored

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def blocks(self) -> int:
        return -(-len(self.data) // BLOCK_BYTES)


# One step that is durable as a whole: names set (or, None, taken away) in directories.
_Change = list[tuple[Node, str, Node | None]]


class CutDisk:
    """Paths are absolute within the disk, handles are numbers. Errors are OSError with the errno of POSIX.

    `limit_bytes`: what writes may fill, which can be less than the disk's size; both count whole blocks.
    """

    def __init__(
        self,
        backing: Path,
        *,
        size_bytes: int = SIZE_BYTES_DEFAULT,
        names: Names = Names.STRICT,
        real_sync: bool = False,
    ) -> None:
        self._store = _Store(backing, real_sync)
        self.size_bytes = size_bytes
        self.limit_bytes = size_bytes
        self.names = names
        self._numbers = 1
        self._pending: list[_Change] = []
        self._handles: dict[int, Node] = {}
        self._next_handle = 1
        self._blocks = 0
        self._files = 0
        self.cuts = 0
        self.root = self._load()

    def _load(self) -> Node:
        root = Node(1, stat.S_IFDIR | 0o755, os.geteuid(), os.getegid(), links=2)
        for path, status in self._store.begin():
            parent = root
            for part in path.parts[:-1]:
                parent = parent.entries[part]
            node = self._new(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
            if node.is_file:
                self._store.adopt(node, path)
                node.data = bytearray(self._store.read(node))
                node.stored_bytes = len(node.data)
                self._blocks += node.blocks
            node.links += 1
            parent.entries[path.name] = parent.stored[path.name] = node
        return root

    def _new(self, mode: int, uid: int, gid: int, mtime_ns: int) -> Node:
        if self._files >= FILES_MAX:
            raise OSError(errno.ENOSPC, "too many files")
        self._files += 1
        self._numbers += 1
        return Node(self._numbers, mode, uid, gid, mtime_ns)

    # ------------------------------------------------------------------ names

    def find(self, path: str) -> Node:
        node = self.root
        for part in PurePosixPath(path).parts[1:]:
            if not node.is_directory:
                raise OSError(errno.ENOTDIR, path)
            found = node.entries.get(part)
            if found is None:
                raise OSError(errno.ENOENT, path)
            node = found
        return node

    def _place(self, path: str) -> tuple[Node, str]:
        parent, _, name = path.rpartition("/")
        directory = self.find(parent or "/")
        if not directory.is_directory:
            raise OSError(errno.ENOTDIR, path)
        return directory, name

    def create(self, path: str, mode: int, uid: int, gid: int, now_ns: int) -> Node:
        """A file, directory or socket, by the type bits of `mode`."""
        directory, name = self._place(path)
        if name in directory.entries:
            raise OSError(errno.EEXIST, path)
        node = self._new(mode, uid, gid, now_ns)
        if node.is_file:
            self._store.create(node)
        self._change([(directory, name, node)])
        return node

    def unlink(self, path: str) -> None:
        directory, name = self._place(path)
        if self.find(path).is_directory:
            raise OSError(errno.EISDIR, path)
        self._change([(directory, name, None)])

    def rmdir(self, path: str) -> None:
        directory, name = self._place(path)
        node = self.find(path)
        if not node.is_directory:
            raise OSError(errno.ENOTDIR, path)
        if node.entries:
            raise OSError(errno.ENOTEMPTY, path)
        self._change([(directory, name, None)])

    def rename(self, old: str, new: str) -> None:
        """Atomic, also over a cut: both names as before, or both as after."""
        node = self.find(old)
        source, old_name = self._place(old)
        target, new_name = self._place(new)
        there = target.entries.get(new_name)
        if there is node:
            return
        if there is not None and there.is_directory and there.entries:
            raise OSError(errno.ENOTEMPTY, new)
        if there is not None and there.is_directory != node.is_directory:
            raise OSError(errno.EISDIR if there.is_directory else errno.ENOTDIR, new)
        self._change([(source, old_name, None), (target, new_name, node)])

    def link(self, old: str, new: str) -> None:
        node = self.find(old)
        directory, name = self._place(new)
        if name in directory.entries:
            raise OSError(errno.EEXIST, new)
        if not node.is_file:
            raise OSError(errno.EPERM, old)
        self._change([(directory, name, node)])

    def _change(self, change: _Change) -> None:
        replaced = []
        for directory, name, node in change:
            before = directory.entries.pop(name, None)
            if node is not None:
                directory.entries[name] = node
                node.links += 1
            if before is not None:
                before.links -= 1
                replaced.append(before)
        for node in replaced:
            self._forget_if_unused(node)
        self._pending.append(change)

    def _forget_if_unused(self, node: Node) -> None:
        """Its room is free again. What the disk still holds of it, should the power go now, stays."""
        if node.links <= 0 and not node.handles and not node.gone:
            node.gone = True
            self._blocks -= node.blocks
            self._files -= 1
            node.data = bytearray()
            node.unsynced.clear()

    # ------------------------------------------------------------------ files

    def open(self, node: Node) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = node
        node.handles += 1
        return handle

    def release(self, handle: int) -> None:
        node = self._handles.pop(handle, None)
        if node is not None:
            node.handles -= 1
            self._forget_if_unused(node)

    def at(self, handle: int) -> Node:
        """The open file. Handles of before a cut are nobody's."""
        node = self._handles.get(handle)
        if node is None:
            raise OSError(errno.EIO, "opened before the power was cut")
        return node

    def read(self, node: Node, offset: int, size: int) -> bytes:
        return bytes(node.data[offset : offset + size])

    def write(self, node: Node, offset: int, data: bytes, now_ns: int) -> None:
        end = offset + len(data)
        if end > len(node.data):
            self._grow(node, end, written_from=offset)
        unsynced, content = node.unsynced, node.data
        for sector in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            older = None
            if sector in unsynced:
                del unsynced[sector]  # to the end: the order is that of the last write
                older = bytes(content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
            unsynced[sector] = older
        content[offset:end] = data
        node.mtime_ns = now_ns

    def _grow(self, node: Node, size: int, *, written_from: int | None = None) -> None:
        """Zeros up to `size`; those that no write is about to cover are a change of their own, too."""
        blocks = -(-size // BLOCK_BYTES) - node.blocks
        if (self._blocks + blocks) * BLOCK_BYTES > self.limit_bytes:
            raise OSError(errno.ENOSPC, "no space left")
        self._blocks += blocks
        end = len(node.data)
        node.data += bytes(size - end)
        for sector in range(end // SECTOR_BYTES, -(-(size if written_from is None else written_from) // SECTOR_BYTES)):
            node.unsynced.setdefault(sector, None)

    def truncate(self, node: Node, size: int, now_ns: int) -> None:
        if size > len(node.data):
            self._grow(node, size)
        else:
            self._blocks -= node.blocks - -(-size // BLOCK_BYTES)
            del node.data[size:]
            for sector in [s for s in node.unsynced if s * SECTOR_BYTES >= size]:
                del node.unsynced[sector]
            if size % SECTOR_BYTES:
                node.unsynced.setdefault(size // SECTOR_BYTES, None)
        node.mtime_ns = now_ns

    def allocate(self, node: Node, offset: int, size: int) -> None:
        """posix_fallocate(3)."""
        if offset + size > len(node.data):
            self._grow(node, offset + size)

    def set_mode(self, node: Node, mode: int) -> None:
        """Durable at once: nothing that is tested hangs on it."""
        node.mode = node.mode & ~0o7777 | mode & 0o7777
        self._store.set_mode(node)

    @property
    def used_bytes(self) -> int:
        return self._blocks * BLOCK_BYTES

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)

    @property
    def unsynced_sectors(self) -> int:
        return sum(len(node.unsynced) for node in self._nodes() if node.is_file)

    @property
    def unsynced_names(self) -> int:
        return len(self._pending)

    # ------------------------------------------------------------------ syncing and cutting

    def sync(self, node: Node) -> None:
        """fsync(2) of a file or directory."""
        if node.is_directory:
            self._harden(lambda change: any(directory is node for directory, _, _ in change))
            return
        self._store.write(node, _runs(node), len(node.data))
        node.unsynced.clear()
        node.stored_bytes = len(node.data)
        if self.names is Names.FILE:
            self._harden(lambda change: any(named is node for _, _, named in change))

    def sync_all(self) -> None:
        """sync(2)."""
        for node in list(self._nodes()):
            if node.is_file:
                self.sync(node)
        self._harden(lambda change: True)

    def lose(self, node: Node) -> None:
        """What a failed fsync leaves behind on Linux: pages that count as written and are not.

        They are read as they were written until the cut, a later sync that succeeds does not touch them.
        """
        node.unsynced.clear()

    def _harden(self, meant: Callable[[_Change], bool]) -> None:
        still: list[_Change] = []
        for change in self._pending:
            if meant(change):
                self._apply(change)
            else:
                still.append(change)
        self._pending = still

    def _apply(self, change: _Change) -> None:
        for directory, name, node in change:
            before = directory.stored.pop(name, None)
            if node is not None:
                directory.stored[name] = node
            place = self._stored_path(directory)
            if place is not None:
                self._store.set_name(place / name, before, node)

    def _stored_path(self, wanted: Node) -> PurePosixPath | None:
        """Where the backing directory has this one; None: its own name is not durable yet."""
        todo = [(self.root, PurePosixPath())]
        while todo:
            node, path = todo.pop()
            if node is wanted:
                return path
            todo += [(each, path / name) for name, each in node.stored.items() if each.is_directory]
        return None

    def cut(self, keep: Keep, seed: int = 0) -> None:
        """The power goes, and comes back. Whoever had files open has nothing any more."""
        rng = random.Random(seed)
        kept = {Keep.NOTHING: 0, Keep.ALL: len(self._pending)}.get(keep)
        # A file system's journal keeps its order: what is on the disk of its changes is the first so and so many.
        for change in self._pending[: rng.randint(0, len(self._pending)) if kept is None else kept]:
            self._apply(change)
        self._pending.clear()
        for handle in list(self._handles):
            self._handles.pop(handle).handles -= 1
        self._store.clean({node.number for node in self._nodes(stored=True)})
        self._blocks = self._files = 0
        for node in self._nodes(stored=True):
            self._files += 1
            node.entries = dict(node.stored)
            if node.is_file:
                self._settle(node, keep, rng)
                self._blocks += node.blocks
        counted: dict[int, int] = {}
        for node in self._nodes():
            for each in node.entries.values():
                counted[each.number] = counted.get(each.number, 0) + 1
        for node in self._nodes():
            node.links = counted.get(node.number, 2)
        self.cuts += 1

    def _settle(self, node: Node, keep: Keep, rng: random.Random) -> None:
        if keep is Keep.NOTHING or node.gone:
            node.data = bytearray(self._store.read(node))
            node.unsynced.clear()
            node.gone = False
            return
        stored = bytearray(self._store.read(node))
        size = len(node.data)
        order = list(node.unsynced)
        if keep is Keep.ALL:
            chosen = {s: self._sector(node, s) for s in order}
        elif keep is Keep.TORN:
            torn = order[: rng.randint(0, len(order))]
            chosen = {s: self._sector(node, s) for s in torn}
            size = rng.choice((len(stored), size)) if len(torn) < len(order) else size
            if torn:
                size = max(size, min(len(node.data), (max(torn) + 1) * SECTOR_BYTES))
        else:
            share = rng.choice((0.1, 0.5, 0.9))
            chosen = {}
            for sector in order:
                older = node.unsynced[sector]
                if rng.random() < share:
                    newest = self._sector(node, sector)
                    chosen[sector] = newest if older is None or rng.random() < 0.7 else older
            size = rng.choice((len(stored), size))
        new = stored[:size] + bytes(max(0, size - len(stored)))
        for sector, content in chosen.items():
            start = sector * SECTOR_BYTES
            piece = content[: max(0, size - start)]
            new[start : start + len(piece)] = piece
        node.data = new
        node.unsynced = dict.fromkeys(range(-(-len(new) // SECTOR_BYTES)))
        self._store.write(node, _runs(node), len(new))
        node.unsynced.clear()
        node.stored_bytes = len(new)

    @staticmethod
    def _sector(node: Node, sector: int) -> bytes:
        return bytes(node.data[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])

    def _nodes(self, *, stored: bool = False) -> Iterator[Node]:
        """Every node that has a name, once, directories before what is in them."""
        seen: set[int] = set()
        todo = [self.root]
        while todo:
            node = todo.pop()
            if node.number in seen:
                continue
            seen.add(node.number)
            yield node
            todo += (node.stored if stored else node.entries).values()

    def close(self) -> None:
        self._store.close()


def _runs(node: Node) -> Iterator[tuple[int, bytes]]:
    """Unsynced sectors, neighbours together: offset and content."""
    start = end = -1
    for sector in sorted(node.unsynced):
        if sector != end:
            if end > start:
                yield start * SECTOR_BYTES, bytes(node.data[start * SECTOR_BYTES : end * SECTOR_BYTES])
            start = sector
        end = sector + 1
    if end > start:
        yield start * SECTOR_BYTES, bytes(node.data[start * SECTOR_BYTES : end * SECTOR_BYTES])


class _Store:
    """The durable half: `tree` holds what a restart would find, under its names; `inodes` the same files by number, so
    that a file whose name is not durable has a place for its synced data."""

    def __init__(self, backing: Path, real_sync: bool) -> None:
        self._tree = backing / _TREE
        self._inodes = backing / _INODES
        self._real_sync = real_sync
        self._open: dict[int, int] = {}

    def begin(self) -> list[tuple[PurePosixPath, os.stat_result]]:
        """What is there, directories before what is in them."""
        self._tree.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._inodes, ignore_errors=True)
        self._inodes.mkdir()
        found = []
        for directory, names, files in os.walk(self._tree):
            names.sort()
            for name in names + sorted(files):
                path = Path(directory, name)
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                    found.append((PurePosixPath(path.relative_to(self._tree)), status))
        return found

    def create(self, node: Node) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._open[node.number] = os.open(self._inodes / str(node.number), flags, stat.S_IMODE(node.mode) | 0o600)

    def adopt(self, node: Node, path: PurePosixPath) -> None:
        os.link(self._tree / path, self._inodes / str(node.number))
        self._open[node.number] = os.open(self._inodes / str(node.number), os.O_RDWR | os.O_CLOEXEC)

    def read(self, node: Node) -> bytes:
        fd = self._open[node.number]
        return os.pread(fd, os.fstat(fd).st_size, 0)

    def write(self, node: Node, runs: Iterator[tuple[int, bytes]], size: int) -> None:
        fd = self._open[node.number]
        for offset, content in runs:
            os.pwrite(fd, content, offset)
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
        if self._real_sync:
            os.fdatasync(fd)

    def set_mode(self, node: Node) -> None:
        if node.number in self._open:
            os.fchmod(self._open[node.number], stat.S_IMODE(node.mode) | 0o600)

    def set_name(self, path: PurePosixPath, before: Node | None, node: Node | None) -> None:
        place = self._tree / path
        if before is not None and before.is_directory:
            shutil.rmtree(place)
        elif before is not None and before.is_file:
            place.unlink()
        if node is not None and node.is_file:
            os.link(self._inodes / str(node.number), place)
        elif node is not None and node.is_directory:
            place.mkdir()
            for name, each in node.stored.items():
                self.set_name(path / name, None, each)
        if self._real_sync:
            _sync_directory(place.parent)

    def clean(self, numbers: set[int]) -> None:
        """Files that no name leads to are gone."""
        for number in [n for n in self._open if n not in numbers]:
            os.close(self._open.pop(number))
            (self._inodes / str(number)).unlink()

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
