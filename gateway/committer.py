"""Drives the journal's group commit on an event loop: stage here, wait for the disk in one other thread.

While one commit syncs, the next batch gathers. Before the next commit it waits a tenth of what the last one took, at
most 2 ms, so that clients with half a window outstanding do not make every other batch half empty.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from storeforward.errors import JournalError, JournalFull
from storeforward.journal import Batch, Journal

log = logging.getLogger("lineside.journal")

GATHER_SHARE = 0.1
GATHER_S_MAX = 0.002
RETRY_S = 0.5


class Committer:
    """`kick()` after every change to `journal.pending`; `on_commit(batch)` is called after each commit."""

    def __init__(
        self,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        on_commit: Callable[[Batch], None],
        on_fatal: Callable[[JournalError], None],
    ) -> None:
        self.journal = journal
        self._loop = loop
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._busy = False
        self._stopped = False
        self._refused_since: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_s = 0.0
        self.durations_s: deque[float] = deque(maxlen=1024)

    def kick(self) -> None:
        if not self._busy and not self._stopped:
            self._busy = True
            self._idle.clear()
            # After every socket that is readable in this turn of the loop.
            self._loop.call_soon(self._submit)

    def _submit(self) -> None:
        journal = self.journal
        if not journal.pending or self._stopped:
            self._busy = False
            self._idle.set()
            return
        try:
            journal.begin()
        except JournalFull as error:
            self._refused(error)
            return
        except JournalError as error:
            self._fatal(error)
            return
        self._executor.submit(self._commit).add_done_callback(self._commit_is_back)

    def _commit(self) -> float:
        start = time.perf_counter()
        self.journal.commit()
        return time.perf_counter() - start

    def _commit_is_back(self, future: Future[float]) -> None:
        self._loop.call_soon_threadsafe(self._committed, future)

    def _committed(self, future: Future[float]) -> None:
        journal = self.journal
        error = future.exception()
        if isinstance(error, sqlite3.Error):
            result = journal.failed(error)
            if isinstance(result, JournalFull):
                self._refused(result)
            else:
                self._fatal(result)
            return
        self._last_s = future.result()
        self.durations_s.append(self._last_s)
        batch = journal.committed()
        if self._refused_since is not None and not journal.disk_full:
            log.warning("the disk takes messages again", extra={"refused_s": time.monotonic() - self._refused_since})
            self._refused_since = None
        self._on_commit(batch)
        if journal.disk_full:
            self._executor.submit(journal.recover).add_done_callback(self._checkpoint_is_back)
        elif journal.wal_bytes() > journal.wal_bytes_max:
            self._executor.submit(journal.checkpoint).add_done_callback(self._checkpoint_is_back)
        else:
            self._next()

    def _checkpoint_is_back(self, future: Future[None]) -> None:
        self._loop.call_soon_threadsafe(self._checkpointed, future)

    def _checkpointed(self, future: Future[None]) -> None:
        error = future.exception()
        if isinstance(error, JournalError):
            self._fatal(error)
            return
        if self.journal.disk_full:
            self.journal.reclaim()
        self._next()

    def _next(self) -> None:
        if self.journal.pending:
            self._loop.call_later(min(GATHER_S_MAX, self._last_s * GATHER_SHARE), self._submit)
        else:
            self._busy = False
            self._idle.set()

    def _refused(self, error: JournalFull) -> None:
        if self._refused_since is None:
            self._refused_since = time.monotonic()
            log.error("the disk takes no messages; intake is refused until it does", extra={"error": error.reason})
        self._loop.call_later(RETRY_S, self._submit)

    def _fatal(self, error: JournalError) -> None:
        self._stopped = True
        self._busy = False
        self._idle.set()
        self._on_fatal(error)

    async def drain(self) -> None:
        """Wait until nothing is pending and no commit is under way."""
        while self.journal.pending and not self._stopped:
            self.kick()
            await self._idle.wait()
        await self._idle.wait()

    def stop(self) -> None:
        self._stopped = True
        self._executor.shutdown(wait=True)
