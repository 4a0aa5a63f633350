"""A journal before its first start, for worlds that have no time to make one: it is made once a process, and copied."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from storeforward.opening import close_file, open_file


def lay(state_dir: Path) -> None:
    """Have such a journal in a directory that has none. Making it takes as long as a third of a brief life."""
    (state_dir / "journal.db").write_bytes(_made())


@cache
def _made() -> bytes:
    with tempfile.TemporaryDirectory(prefix="lineside-") as path:
        close_file(*open_file(Path(path), "OFF"))
        return (Path(path) / "journal.db").read_bytes()
