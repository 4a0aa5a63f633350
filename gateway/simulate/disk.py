"""What a disk says of itself and how long it takes to sync: whether `acknowledged means on disk` can be true on it.

Measures in a directory that the caller owns. The judgement on lying disks is a rule of thumb and says so: no program
can see through a drive's cache, only a power cut can.
"""

from __future__ import annotations

import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from gateway.simulate.verdict import quantile

SYNCS = 200
SYNC_S_MAX = 20.0  # on a slow disk fewer syncs have to do
PIECE_BYTES = 16 * 1024  # one page of the journal
# A sync that reaches the medium is hardly ever faster than this: half a turn of a plate at 7200/min, a program cycle
# of flash on a card, and what the best drives with a capacitor behind their cache need for a round over the bus.
ROTATING_S_MIN = 2e-3
CARD_S_MIN = 3e-4
FLASH_S_MIN = 15e-6
IN_MEMORY = {"tmpfs", "ramfs"}
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "afs", "ceph"}
WEAK_OPTIONS = {"nobarrier", "barrier=0", "data=writeback", "nodiscard_sync", "async_commit"}


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a directory lies. `device` is the block device's name under /sys/block, or empty."""

    point: str
    fs: str
    source: str
    options: tuple[str, ...]
    device: str
    rotating: bool | None
    write_cache: str  # "write back", "write through", or empty where nothing is said


@dataclass(frozen=True, slots=True)
class Syncs:
    """How long `count` syncs of one page took."""

    count: int
    median_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Disk:
    """Everything found out. `doubts`: reasons not to trust a sync here; `notes`: what is good to know."""

    mount: Mount
    syncs: Syncs
    pragmas: dict[str, str]
    doubts: tuple[str, ...]
    notes: tuple[str, ...]


def measure_syncs(directory: Path, count: int = SYNCS) -> Syncs:
    """Append pages to a file and sync each, as the journal's WAL does. Raises OSError."""
    path = directory / "sync-probe"
    times: list[float] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        page = os.urandom(PIECE_BYTES)
        end = time.monotonic() + SYNC_S_MAX
        while len(times) < count and (time.monotonic() < end or not times):
            os.write(descriptor, page)
            began = time.perf_counter()
            os.fdatasync(descriptor)
            times.append(time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()
    return Syncs(len(times), quantile(times, 0.5) or 0.0, quantile(times, 0.99) or 0.0)


def find_mount(directory: Path, mountinfo: str | None = None, sys: Path = Path("/sys")) -> Mount:
    """The mount that holds `directory`. `mountinfo`: proc(5)'s text, for tests."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    where = os.path.realpath(directory)
    best: tuple[str, str, str, tuple[str, ...], str] | None = None
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        point = fields[4].replace("\\040", " ")
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best[0])):
            options = tuple(dict.fromkeys([*fields[5].split(","), *rest[2].split(",")]))
            best = point, rest[0], rest[1], options, fields[2]
    assert best is not None, "every path is on some mount"
    point, fs, source, options, numbers = best
    device = _device(sys, numbers)
    queue = sys / "block" / device / "queue" if device else None
    rotating = {"1": True, "0": False}.get(_said(queue / "rotational")) if queue else None
    return Mount(point, fs, source, options, device, rotating, _said(queue / "write_cache") if queue else "")


def _device(sys: Path, numbers: str) -> str:
    """The whole disk that a device number belongs to: of a partition, the disk it is on."""
    link = sys / "dev" / "block" / numbers
    try:
        real = link.resolve(strict=True)
    except OSError:
        return ""
    name = real.parent.name if (real / "partition").exists() else real.name
    return name if (sys / "block" / name).exists() else ""


def _said(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def read_pragmas(journal: Path) -> dict[str, str]:
    """What the file says of itself; `synchronous` is each connection's own and stands in the configuration."""
    connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    try:
        names = ("journal_mode", "page_size", "auto_vacuum", "user_version")
        return {name: str(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in names}
    finally:
        connection.close()


def doubts(mount: Mount, syncs: Syncs, pragmas: dict[str, str], preload: str) -> tuple[str, ...]:
    """Reasons not to believe a sync here, in words for the person who owns the disk."""
    found = []
    if mount.fs in IN_MEMORY:
        found.append(f"{mount.point} is {mount.fs}: memory, of which a power cut leaves nothing")
    if mount.fs in REMOTE:
        found.append(f"{mount.point} is {mount.fs}: SQLite's WAL needs a disk of this machine")
    found += [f"mounted with {each}: a sync may return early" for each in mount.options if each in WEAK_OPTIONS]
    if "eatmydata" in preload:
        found.append("libeatmydata is preloaded: no sync does anything")
    lowest, medium = FLASH_S_MIN, "flash"
    if mount.rotating and not _virtual(mount):
        lowest, medium = ROTATING_S_MIN, "a rotating disk"
    elif mount.device.startswith("mmcblk"):
        lowest, medium = CARD_S_MIN, "a card"
    if mount.fs not in IN_MEMORY and syncs.median_s < lowest:
        found.append(
            f"a sync takes {syncs.median_s * 1e6:.0f} µs, faster than {medium} can be (about {lowest * 1e6:.0f} µs): "
            "the disk, or what stands between, seems to say yes before it has written (a rule of thumb)"
        )
    if pragmas and pragmas.get("journal_mode") != "wal":
        found.append(f"the journal is in mode {pragmas.get('journal_mode')}, not wal")
    return tuple(found)


def _virtual(mount: Mount) -> bool:
    """Virtual disks call themselves rotating without being so."""
    return mount.device.startswith(("vd", "xvd", "loop", "dm-", "nbd", "zd"))


def notes(mount: Mount) -> tuple[str, ...]:
    """What is good to know and no reason for doubt by itself."""
    said = []
    if mount.write_cache == "write back":
        said.append(
            f"{mount.device} has a volatile write cache (write back); the kernel flushes it at each sync, and the "
            "drive has to mean it"
        )
    if not mount.device:
        said.append("the file system is on no block device that can be asked (overlay, virtual or remote)")
    elif _virtual(mount):
        said.append(f"{mount.device} is virtual: what a sync means is up to the host")
    return tuple(said)


def examine(directory: Path, syncs: Syncs, pragmas: dict[str, str]) -> Disk:
    """Everything that can be found out about the disk below `directory`."""
    mount = find_mount(directory)
    preload = os.environ.get("LD_PRELOAD", "")
    return Disk(mount, syncs, pragmas, doubts(mount, syncs, pragmas, preload), notes(mount))
