"""Sessions that have ended, and the disk may not know it yet: after a crash they would be there again.

Whoever is told that there is no session of its name any more is told so when the end is on the disk. Knows no socket
and no clock.
"""

from __future__ import annotations

from collections import Counter

from storeforward.errors import JournalFull
from storeforward.journal import Journal


class Endings:
    """Client ids. One whose session ended twice since the last commit is in it until both ends are written."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._unwritten: Counter[str] = Counter()

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._unwritten

    def add(self, client_id: str) -> None:
        """Call when what forgets the session is staged."""
        self._unwritten[client_id] += 1
        self._journal.wait(self, client_id)

    def committed(self, tokens: list[str]) -> None:
        """The journal's side (Waiter)."""
        for client_id in tokens:
            self._unwritten[client_id] -= 1
            if not self._unwritten[client_id]:
                del self._unwritten[client_id]

    def failed(self, tokens: list[str], error: JournalFull) -> None:
        """The statements are staged again, and go with the next commit."""
        for client_id in tokens:
            self._journal.wait(self, client_id)
