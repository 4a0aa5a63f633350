"""Has the configuration read in a child process (`config_child`): pydantic and the schema, 14 MB, end with it.

The child has our interpreter, user, working directory and environment, so paths and credentials mean there what they
mean here.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Final

from gateway.child import Child, ask
from gateway.config import Config, ConfigErrors

READ_S_MAX: Final = 60.0  # most of it for a small machine whose disk is cold
_MODULE: Final = "gateway.config_child"


class Reading:
    """Begins to read at once, so that its maker can import in the meantime what the rest takes. Raises ChildError."""

    def __init__(self, path: Path) -> None:
        self._child = Child(_MODULE, str(path))

    def config(self) -> Config:
        """As `config.load`. Raises ConfigErrors, ChildError."""
        return _received(self._child.answer(READ_S_MAX))


async def read(path: Path) -> Config:
    """As `config.load`, without holding the loop. Raises ConfigErrors, ChildError."""
    return _received(await ask(_MODULE, str(path), timeout_s=READ_S_MAX))


def _received(answer: bytes) -> Config:
    # A pickle can make its reader run anything, so it is only for one's own: nobody but the child that we started, and
    # that is this very code, has the other end of the pipe.
    found = pickle.loads(answer)
    if isinstance(found, Config):
        return found
    raise ConfigErrors(found)
