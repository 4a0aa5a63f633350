"""Mounting the disk that forgets and telling it what to do: for tests, and for `lineside verify`."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gateway.errors import LinesideError
from gateway.simulate.cutfs import unmount

MOUNT_S_MAX = 15.0
STOP_S_MAX = 10.0
ANSWER_S_MAX = 30.0
POLL_S = 0.01


def missing() -> str | None:
    """Why no such disk can be mounted here, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "FUSE is used on Linux only"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is not installed (pip install 'lineside[powercut]')"
    if not (ctypes.util.find_library("fuse3") or ctypes.util.find_library("fuse")):
        return "libfuse is not installed (Debian: fuse3)"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse: the kernel, or the container, has no FUSE"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    if os.geteuid() == 0 and not _may_mount():
        return "this container may not mount file systems (it lacks CAP_SYS_ADMIN)"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        return "fusermount3 is not installed (Debian: fuse3); only root can mount without it"
    return None


def _may_mount() -> bool:
    """capabilities(7): CAP_SYS_ADMIN is bit 21."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 21 & 1)
    return False


class CutMount:
    """One mounted disk: `path` is where. `directory` holds the backing files, the socket and the mountpoint."""

    def __init__(self, directory: Path, **options: str | int | bool) -> None:
        self.path = directory / "disk"
        self.backing = directory / "backing"
        self._socket_path = directory / "control"
        self._log_path = directory / "log"
        directory.mkdir(parents=True, exist_ok=True)
        self._unmount()  # what a run that was killed left behind
        self.path.mkdir(exist_ok=True)
        given = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()
        ]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway.simulate.cutfs", self.path, self.backing, self._socket_path, *given],
                stdin=subprocess.PIPE,  # whose end is the disk's, too
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + MOUNT_S_MAX
        while not os.path.ismount(self.path):
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                said = self._log_path.read_text(errors="replace").strip().splitlines()
                raise LinesideError(f"could not mount {self.path}: {said[-1] if said else 'no reason given'}")
            time.sleep(POLL_S)

    def __enter__(self) -> CutMount:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def stored(self) -> Path:
        """What is durable now, readable beside the mount."""
        return self.backing / "tree"

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """One command of `cutfs.Control`. Raises LinesideError with the disk's own words."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S_MAX)
            connection.connect(str(self._socket_path))
            connection.sendall(json.dumps({"do": do, **given}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                answer: dict[str, Any] = json.loads(stream.readline())
        if "error" in answer:
            raise LinesideError(f"the disk that forgets: {do}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """Unmount. What is not durable is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._unmount()

    def _unmount(self) -> None:
        with contextlib.suppress(OSError):  # ENOTCONN: mounted, and nobody serves it
            if not os.path.ismount(self.path):
                return
        unmount(self.path)
