"""Clocks that lie to a real process while it runs: wall, boot-time, whether they are kept right, and the boot's name.

A small preloaded library (clocks.c) asks a shared file for them, so OpenSSL and every child are lied to as well. Timers
go on: the monotonic clock is left alone, as it is by steps and by suspend.
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clocks.c")
_TOLD = struct.Struct("=qqq40s")


class Clocks:
    """`environment` is for the process; the methods change what it sees at once."""

    def __init__(self, directory: Path) -> None:
        library = directory / "clocks.so"
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run([*compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
        told = directory / "clocks"
        told.write_bytes(bytes(_TOLD.size))
        with told.open("r+b") as file:
            self._told = mmap.mmap(file.fileno(), _TOLD.size)
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCKS": str(told)}
        self._wall_s = self._boottime_s = self._boots = 0
        self._synchronised = False
        self._tell()

    def wall(self, offset_s: float) -> None:
        """The wall clock is off by so much, as after a step."""
        self._wall_s = int(offset_s)
        self._tell()

    def kept_right(self, synchronised: bool) -> None:
        """Whether the kernel says that somebody keeps the wall clock right."""
        self._synchronised = synchronised
        self._tell()

    def suspended(self, seconds: int) -> None:
        """The machine slept for so long: the boot-time clock counts it, the monotonic one does not."""
        self._boottime_s += seconds
        self._tell()

    def booted(self) -> None:
        """The next process runs in another boot."""
        self._boots += 1
        self._tell()

    def _tell(self) -> None:
        boot = f"00000000-0000-4000-8000-{self._boots:012d}".encode()
        self._told[:] = _TOLD.pack(self._wall_s, self._boottime_s, self._synchronised, boot)
