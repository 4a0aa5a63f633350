"""Reads no more from a peer that is faster than the disk, until what there is has been written. Knows no protocol."""

from __future__ import annotations

from typing import Protocol

from storeforward.errors import JournalFull
from storeforward.journal import Journal


class Readable(Protocol):
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Throttle:
    """One connection's; `look` whenever something of it was staged."""

    def __init__(self, journal: Journal, connection: Readable) -> None:
        self._journal = journal
        self._connection = connection
        self._paused = False

    def look(self) -> None:
        if self._journal.pending.size_bytes > self._journal.space.pending_bytes:
            self.pause()

    def pause(self) -> None:
        """Until the commit that is gathering now came back, or failed."""
        if not self._paused:
            self._paused = True
            self._connection.pause_reading()
            self._journal.intake()  # or this might wait for the hub's answer, which would not be read
            self._journal.wait(self, None)

    def committed(self, tokens: list[None]) -> None:
        self._paused = False
        self._connection.resume_reading()

    def failed(self, tokens: list[None], error: JournalFull) -> None:
        self.committed(tokens)
