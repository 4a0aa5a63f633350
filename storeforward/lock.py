"""One daemon a state directory: an advisory lock that the kernel drops with the process."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from storeforward.errors import JournalError, JournalLocked


class StateLock:
    """Holds `<state_dir>/lock` until released or until the process ends."""

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / "lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(
                f"{path}: {error.strerror}; the state directory must be writable by this user"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise JournalLocked(
                f"{state_dir}: in use by another lineside (pid {pid}); stop it, or give this one its own state_dir"
            ) from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # on a full disk the lock holds without its number
                self.release()
                raise JournalError(f"{path}: {error.strerror}; check the disk, then start again") from error

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
