"""What all lives have in common: where their files are, and the command that runs one of them again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")


def again(life: str, seed: int) -> str:
    """The one command that lives this seed again."""
    return f"python -m tests.simulation.campaign --life {life} --seed {seed}"


@contextmanager
def memory_dir(otherwise: Path) -> Iterator[Path]:
    """A directory whose files are memory where the system has one."""
    if not os.access(MEMORY, os.W_OK):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="lineside-") as path:
        yield Path(path)
