"""What can go wrong with a journal, by who must act."""

from __future__ import annotations

import sqlite3


class JournalError(Exception):
    """The journal can't be used as it is: the operator must act. The text says what to do."""


class JournalLocked(JournalError):
    """Another process has this state directory."""


class JournalNewer(JournalError):
    """A newer version wrote this file."""


class JournalCorrupt(JournalError):
    """The file is damaged; the next start sets it aside and salvages what reads."""


class JournalFull(Exception):
    """A limit or the disk stops intake. Nothing was stored; the sender keeps its message and tries again later."""

    def __init__(self, stream: str, reason: str) -> None:
        super().__init__(f"stream {stream}: {reason}")
        self.stream = stream
        self.reason = reason


def corrupt(what: str) -> sqlite3.DatabaseError:
    """Damage that SQLite itself does not notice, as SQLite would name it."""
    error = sqlite3.DatabaseError(what)
    error.sqlite_errorname = "SQLITE_CORRUPT"
    return error
