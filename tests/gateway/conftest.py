"""What several of these tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A real one that answers, with nobody for a hub."""
    daemon = Daemon(tmp_path)
    try:
        daemon.status()
        yield daemon
    finally:
        daemon.end()
