"""What is wrong with a disk: errors for operations on certain paths, now and then or from now on; a disk that is slow,
read-only, or dead from its n-th operation on. Decides only; knows no FUSE, no files, no clock.
"""

from __future__ import annotations

import errno
import fnmatch
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Op(Enum):
    """What can fail. The names are those of the control socket."""

    READ = "read"
    WRITE = "write"
    SYNC = "sync"  # fsync and fdatasync of a file
    SYNC_DIRECTORY = "sync-directory"
    TRUNCATE = "truncate"
    ALLOCATE = "allocate"
    CREATE = "create"
    UNLINK = "unlink"
    RENAME = "rename"
    OPEN = "open"


CHANGES = frozenset(Op) - {Op.READ, Op.OPEN}
# What a read-only file system refuses. A sync finds nothing to do there.
REFUSED_READ_ONLY = CHANGES - {Op.SYNC, Op.SYNC_DIRECTORY}
FAULTS_MAX = 100
HISTORY_MAX = 10_000


@dataclass(slots=True)
class Fault:
    """`times` left to fail, None: always. `skip` operations before go through. `path`: a shell pattern of the name."""

    op: Op
    errno: int = errno.EIO
    path: str = "*"
    times: int | None = None
    skip: int = 0


@dataclass(slots=True)
class Faults:
    """`dead_at`: the change of this number (counted from 1) and all after it do not happen any more.

    Reading goes on: a page of a memory map that does not read would end the process by SIGBUS, and earlier than meant.
    """

    faults: list[Fault] = field(default_factory=list)
    read_only: bool = False
    sync_delay_s: float = 0.0
    dead_at: int | None = None
    dead: bool = False
    changes: int = 0
    history: list[Op] = field(default_factory=list)  # of changes, the first HISTORY_MAX of them
    counts: Counter[Op] = field(default_factory=Counter)

    def add(self, fault: Fault) -> None:
        if len(self.faults) >= FAULTS_MAX:
            raise ValueError(f"more than {FAULTS_MAX} faults")
        self.faults.append(fault)

    def clear(self) -> None:
        """A whole, fast, writable disk."""
        self.faults.clear()
        self.read_only = self.dead = False
        self.sync_delay_s = 0.0
        self.dead_at = None
        self.changes = 0
        self.history.clear()
        self.counts.clear()

    def check(self, op: Op, path: str) -> None:
        """Return where the operation may go on; else raise OSError with the errno of the fault."""
        self.counts[op] += 1
        if op in CHANGES:
            self.changes += 1
            if len(self.history) < HISTORY_MAX:
                self.history.append(op)
            self.dead = self.dead or (self.dead_at is not None and self.changes >= self.dead_at)
            if self.dead:
                raise OSError(errno.EIO, "the power is gone")
        if self.read_only and op in REFUSED_READ_ONLY:
            raise OSError(errno.EROFS, "mounted read-only")
        for fault in self.faults:
            if fault.op is not op or not fnmatch.fnmatchcase(path.rpartition("/")[2], fault.path):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
            raise OSError(fault.errno, "by request")
