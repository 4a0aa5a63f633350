"""The disk that forgets, mounted: `python -m gateway.simulate.cutfs MOUNTPOINT BACKING SOCKET`.

A process of its own between FUSE and `CutDisk`; it unmounts and ends when its standard input does. Commands come
over a Unix socket, one JSON object a line: see `Control`. The kernel keeps no pages from one open of a file to the
next, so what a cut took is not found in its cache; memory maps (SQLite's -shm) work, because direct_io is off.
Only this module knows FUSE.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gateway.simulate.cutdisk import BLOCK_BYTES, SIZE_BYTES_DEFAULT, CutDisk, Keep, Names, Node
from gateway.simulate.diskfaults import Fault, Faults, Op

SYNC_DELAY_S_MAX = 60.0
UNMOUNT_S_MAX = 10.0
LINE_BYTES_MAX = 64 << 10
ATTRIBUTES = (
    "st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize",
    "st_atime", "st_mtime", "st_ctime",
)  # fmt: skip


class CutFs:
    """The operations as mfusepy calls them, from several threads; `mutex` is held in all of them but for waiting."""

    # What mfusepy looks for: times are whole nanoseconds, and open files are known by their handle alone.
    use_ns = True
    flag_nullpath_ok = True
    flag_nopath = True

    def __init__(self, disk: CutDisk) -> None:
        self.disk = disk
        self.faults = Faults()
        self.mutex = threading.Lock()
        self._paths: dict[int, str] = {}  # for faults that mean one file

    def _check(self, op: Op, path: str | None, handle: int | None = None) -> None:
        if path is None:
            path = self._paths.get(handle or 0, "")
        self.faults.check(op, path)

    def _node(self, path: str | None, handle: int | None) -> Node:
        if path is None or (handle is not None and handle in self._paths):
            return self.disk.at(handle or 0)
        return self.disk.find(path)

    def _opened(self, node: Node, path: str) -> int:
        handle = self.disk.open(node)
        self._paths[handle] = path
        return handle

    # ------------------------------------------------------------------ names

    def getattr(self, path: str | None, handle: int | None = None) -> dict[str, int]:
        with self.mutex:
            node = self._node(path, handle)
            size = len(node.data) if node.is_file else BLOCK_BYTES
            values = (
                node.number, node.mode, max(node.links, 0), node.uid, node.gid, size, -(-size // 512), BLOCK_BYTES,
                node.mtime_ns, node.mtime_ns, node.mtime_ns,
            )  # fmt: skip
            return dict(zip(ATTRIBUTES, values, strict=True))

    def readdir(self, path: str | None, handle: int) -> list[tuple[str, dict[str, int], int]]:
        """With numbers: the C library passes over entries that have none."""
        with self.mutex:
            node = self._node(path, handle)
            named = {".": node, "..": node} | node.entries
            return [(name, {"st_ino": each.number, "st_mode": each.mode}, 0) for name, each in named.items()]

    def opendir(self, path: str) -> int:
        with self.mutex:
            return self._opened(self.disk.find(path), path)

    def releasedir(self, path: str | None, handle: int) -> int:
        return self.release(path, handle)

    def mknod(self, path: str, mode: int, device: int) -> int:
        del device
        self._create(path, mode)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._create(path, mode | 0o040000)
        return 0

    def create(self, path: str, mode: int, flags: int) -> int:
        del flags
        with self.mutex:
            return self._opened(self._create_locked(path, mode), path)

    def _create(self, path: str, mode: int) -> Node:
        with self.mutex:
            return self._create_locked(path, mode)

    def _create_locked(self, path: str, mode: int) -> Node:
        from mfusepy import fuse_get_context

        self._check(Op.CREATE, path)
        uid, gid, _ = fuse_get_context()
        return self.disk.create(path, mode, uid, gid, time.time_ns())

    def unlink(self, path: str) -> int:
        with self.mutex:
            self._check(Op.UNLINK, path)
            self.disk.unlink(path)
        return 0

    def rmdir(self, path: str) -> int:
        with self.mutex:
            self._check(Op.UNLINK, path)
            self.disk.rmdir(path)
        return 0

    def rename(self, old: str, new: str) -> int:
        with self.mutex:
            self._check(Op.RENAME, old)
            self.disk.rename(old, new)
        return 0

    def link(self, target: str, source: str) -> int:
        with self.mutex:
            self._check(Op.CREATE, target)
            self.disk.link(source, target)
        return 0

    def chmod(self, path: str | None, mode: int, handle: int | None = None) -> int:
        with self.mutex:
            if self.faults.read_only:
                raise OSError(errno.EROFS, "mounted read-only")
            self.disk.set_mode(self._node(path, handle), mode)
        return 0

    def chown(self, path: str | None, uid: int, gid: int, handle: int | None = None) -> int:
        with self.mutex:
            node = self._node(path, handle)
            node.uid = node.uid if uid in (-1, 0xFFFFFFFF) else uid
            node.gid = node.gid if gid in (-1, 0xFFFFFFFF) else gid
        return 0

    def utimens(self, path: str | None, handle: int | None = None) -> int:
        with self.mutex:
            self._node(path, handle).mtime_ns = time.time_ns()
        return 0

    # ------------------------------------------------------------------ files

    def open(self, path: str, flags: int) -> int:
        with self.mutex:
            self._check(Op.OPEN, path)
            if self.faults.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
                raise OSError(errno.EROFS, "mounted read-only")
            return self._opened(self.disk.find(path), path)

    def release(self, path: str | None, handle: int) -> int:
        with self.mutex:
            self._paths.pop(handle, None)
            self.disk.release(handle)
        return 0

    def flush(self, path: str | None, handle: int) -> int:
        """close(2) makes nothing durable."""
        return 0

    def read(self, path: str | None, size: int, offset: int, handle: int) -> bytes:
        with self.mutex:
            self._check(Op.READ, path, handle)
            return self.disk.read(self.disk.at(handle), offset, size)

    def write(self, path: str | None, data: bytes, offset: int, handle: int) -> int:
        with self.mutex:
            self._check(Op.WRITE, path, handle)
            self.disk.write(self.disk.at(handle), offset, data, time.time_ns())
        return len(data)

    def truncate(self, path: str | None, length: int, handle: int | None = None) -> int:
        with self.mutex:
            self._check(Op.TRUNCATE, path, handle)
            self.disk.truncate(self._node(path, handle), length, time.time_ns())
        return 0

    def fallocate(self, path: str | None, mode: int, offset: int, length: int, handle: int) -> int:
        if mode:
            raise OSError(errno.EOPNOTSUPP, "only plain allocation")
        with self.mutex:
            self._check(Op.ALLOCATE, path, handle)
            self.disk.allocate(self.disk.at(handle), offset, length)
        return 0

    def fsync(self, path: str | None, datasync: int, handle: int) -> int:
        del datasync  # both make the size durable, too
        time.sleep(self.faults.sync_delay_s)
        with self.mutex:
            node = self.disk.at(handle)
            try:
                self._check(Op.SYNC, path, handle)
            except OSError:
                if not self.faults.dead:
                    self.disk.lose(node)
                raise
            self.disk.sync(node)
        return 0

    def fsyncdir(self, path: str | None, datasync: int, handle: int) -> int:
        del datasync
        time.sleep(self.faults.sync_delay_s)
        with self.mutex:
            self._check(Op.SYNC_DIRECTORY, path, handle)
            self.disk.sync(self.disk.at(handle))
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        del path
        with self.mutex:
            free = self.disk.free_bytes // BLOCK_BYTES
            return {
                "f_bsize": BLOCK_BYTES,
                "f_frsize": BLOCK_BYTES,
                "f_blocks": self.disk.size_bytes // BLOCK_BYTES,
                "f_bfree": free,
                "f_bavail": free,
                "f_namemax": 255,
            }


class Control:
    """The commands, `{"do": NAME, ...}`; each is answered by `{"ok": true, ...}` or `{"error": TEXT}`.

    cut (keep, seed)                   the power goes; `keep`: nothing, some, torn, all
    fault (op, errno, path, times, skip)   an operation fails: `errno` by its name, `path` a pattern of the file's name
    limit (bytes)                      ENOSPC beyond this many bytes used; null: the disk's own size
    slow (sync_s)                      every sync takes this long
    read-only (on)                     EROFS for every change
    dead-at (change)                   from the n-th change on nothing happens any more
    clear                              no more faults; the counters start anew
    sync                               everything becomes durable
    state                              counters, room, what is not synced
    history                            the changes since the last `clear`, in order
    """

    def __init__(self, fs: CutFs, path: Path) -> None:
        self._fs = fs
        self._socket = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._socket.bind(str(path))
        os.chmod(path, 0o600)
        self._socket.listen()

    def run(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rwb") as stream:
                for line in iter(lambda: stream.readline(LINE_BYTES_MAX), b""):
                    stream.write(json.dumps(self._answer(line)).encode() + b"\n")
                    stream.flush()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            with self._fs.mutex:
                return {"ok": True} | self._do(**json.loads(line))
        except (ValueError, TypeError, KeyError, OSError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _do(self, do: str, **given: Any) -> dict[str, Any]:
        disk, faults = self._fs.disk, self._fs.faults
        if do == "cut":
            disk.cut(Keep(given.get("keep", "nothing")), int(given.get("seed", 0)))
        elif do == "fault":
            number = getattr(errno, str(given.pop("errno", "EIO")))
            faults.add(Fault(Op(given.pop("op")), int(number), **given))
        elif do == "limit":
            limit = given["bytes"]
            disk.limit_bytes = disk.size_bytes if limit is None else int(limit)
        elif do == "slow":
            faults.sync_delay_s = min(max(0.0, float(given["sync_s"])), SYNC_DELAY_S_MAX)
        elif do == "read-only":
            faults.read_only = bool(given["on"])
        elif do == "dead-at":
            faults.changes, faults.dead_at = 0, int(given["change"])
        elif do == "clear":
            faults.clear()
            disk.limit_bytes = disk.size_bytes
        elif do == "sync":
            disk.sync_all()
        elif do == "history":
            return {"changes": [op.value for op in faults.history]}
        elif do != "state":
            raise ValueError(f"no such command: {do}")
        return {
            "used_bytes": disk.used_bytes,
            "unsynced_sectors": disk.unsynced_sectors,
            "unsynced_names": disk.unsynced_names,
            "cuts": disk.cuts,
            "changes": faults.changes,
            "dead": faults.dead,
            "counts": {op.value: count for op, count in faults.counts.items()},
        }


def _serve(fs: CutFs, mountpoint: str) -> None:
    """Until it is unmounted."""
    import mfusepy

    class Fuse(mfusepy.FUSE):  # type: ignore[misc]
        """With libfuse 3 these come with a handle or without, and a file that is open need not have a path."""

        def truncate_fuse_3(self, path: bytes | None, length: int, info: Any) -> int:
            return fs.truncate(_text(path), length, _handle(info))

        def chmod_fuse_3(self, path: bytes | None, mode: int, info: Any) -> int:
            return fs.chmod(_text(path), mode, _handle(info))

        def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, info: Any) -> int:
            return fs.chown(_text(path), uid, gid, _handle(info))

        def utimens_fuse_3(self, path: bytes | None, times: Any, info: Any) -> int:
            return fs.utimens(_text(path), _handle(info))

    Fuse(
        fs,
        mountpoint,
        foreground=True,
        fsname="lineside-cut",
        use_ino=True,
        hard_remove=True,
        # The kernel asks each time: after a cut nothing is as it was.
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
    )


def unmount(mountpoint: str | Path) -> None:
    """Lazily: who still has a file open there keeps the disk from ending, not from going out of sight."""
    command = ["umount", "-l"] if os.geteuid() == 0 else [shutil.which("fusermount3") or "fusermount", "-uz"]
    subprocess.run([*command, str(mountpoint)], capture_output=True, check=False, timeout=UNMOUNT_S_MAX)


def _end_with_input(mountpoint: str) -> None:
    """Whoever started this may have been killed: nothing is to stay mounted then."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    unmount(mountpoint)
    os._exit(0)  # not to wait for those who still have files open here


def _text(path: bytes | None) -> str | None:
    return None if path is None else os.fsdecode(path)


def _handle(info: Any) -> int | None:
    return int(info.contents.fh) if info else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway.simulate.cutfs", description="A disk that forgets.")
    parser.add_argument("mountpoint")
    parser.add_argument("backing", type=Path)
    parser.add_argument("socket", type=Path)
    parser.add_argument("--size", type=int, default=SIZE_BYTES_DEFAULT, metavar="BYTES")
    parser.add_argument("--names", type=Names, default=Names.STRICT, choices=list(Names))
    parser.add_argument("--real-sync", action="store_true", help="sync the backing files, too, at every sync")
    options = parser.parse_args(arguments)
    disk = CutDisk(options.backing, size_bytes=options.size, names=options.names, real_sync=options.real_sync)
    fs = CutFs(disk)
    control = Control(fs, options.socket)
    threading.Thread(target=control.run, daemon=True).start()
    threading.Thread(target=_end_with_input, args=(options.mountpoint,), daemon=True).start()
    try:
        _serve(fs, options.mountpoint)
    finally:
        options.socket.unlink(missing_ok=True)
        disk.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
