"""Names that survive a power cut: a directory's entries are durable once the directory itself was synced (fsync(2))."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path, mode: int = 0o700) -> None:
    """`path` and what is missing above it; its name is durable when this returns.

    Also where it is there already: a start that was killed may have made it and not come to sync it. Who may not read
    the directory above did not make this one.
    """
    missing = []
    above = path
    while not above.is_dir():
        missing.append(above)
        above = above.parent
    for each in reversed(missing):
        each.mkdir(mode=mode, exist_ok=True)
        sync_directory(each.parent)
    if not missing:
        with contextlib.suppress(PermissionError):
            sync_directory(path.parent)
