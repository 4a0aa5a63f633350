"""Drives the journal's group commit on an event loop: stage here, wait for the disk in one other thread.

While one commit syncs, the next batch gathers. Before the next commit it waits a tenth of what the last one took, at
most 2 ms, so that clients with half a window outstanding do not make every other batch half empty.

With the disk full, every commit is followed by a step that gives space back, and more of them follow at once while
there is more to give back; when intake goes on before that is over, they fill the pauses between commits. When there
is nothing to give back, it looks every half second whether somebody else has made room.
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
WAL_HELD_SHARE = 8


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
        self._under_way: Future[float] | None = None
        self._refused_since: float | None = None
        self._failures = 0
        self._looking: asyncio.TimerHandle | None = None
        self._wal_held = False
        self._giving_back = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_s = 0.0
        self.durations_s: deque[float] = deque(maxlen=1024)
        if journal.disk_full:
            self._refuse("found so at the start")

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
            self._failed(error)
            return
        except JournalError as error:
            self._fatal(error)
            return
        self._under_way = self._executor.submit(self._commit)
        self._under_way.add_done_callback(self._commit_is_back)

    def _commit(self) -> float:
        start = time.perf_counter()
        self.journal.commit()
        return time.perf_counter() - start

    def _commit_is_back(self, future: Future[float]) -> None:
        self._loop.call_soon_threadsafe(self._committed, future)

    def _committed(self, future: Future[float]) -> None:
        if future is not self._under_way:
            return  # dealt with by `stop`
        self._under_way = None
        journal = self.journal
        error = future.exception()
        if isinstance(error, sqlite3.Error):
            result = journal.failed(error)
            if isinstance(result, JournalFull):
                self._failed(result)
            else:
                self._fatal(result)
            return
        self._failures = 0
        self._last_s = future.result()
        self.durations_s.append(self._last_s)
        self._on_commit(journal.committed())
        self._take_again()
        if self._stopped:
            return
        if journal.disk_full or (self._giving_back and not journal.pending):
            self._recover()
        elif journal.checkpoint_due():
            self._executor.submit(journal.checkpoint).add_done_callback(self._checkpoint_is_back)
        else:
            self._next()

    def _checkpoint_is_back(self, future: Future[None]) -> None:
        self._loop.call_soon_threadsafe(self._checkpointed, future)

    def _checkpointed(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._fatal_error(error)
            return
        if self.journal.disk_full:
            self._failed(JournalFull("*", "a checkpoint found no room"))
            return
        held = self.journal.wal_bytes() > WAL_HELD_SHARE * self.journal.space.wal_bytes
        if held and not self._wal_held:
            log.warning(
                "another program holds the journal in a read transaction: its WAL grows until that ends",
                extra={"wal_bytes": self.journal.wal_bytes()},
            )
        self._wal_held = held
        self._next()

    # ------------------------------------------------------------------ a full disk

    def _failed(self, error: JournalFull) -> None:
        self._refuse(error.reason)
        self._failures += 1
        if self._stopped:
            return
        if self._failures == 1 and self.journal.disk_full:
            # Now without the messages, and with the reserve.
            self._recover()
        else:
            self._loop.call_later(RETRY_S, self._recover if self.journal.disk_full else self._submit)

    def _refuse(self, reason: str) -> None:
        if self._refused_since is None:
            self._refused_since = time.monotonic()
            log.error("the disk takes no messages; intake is refused until it does", extra={"error": reason})
            if self._looking is None:
                self._looking = self._loop.call_later(RETRY_S, self._look)

    def _take_again(self) -> None:
        if self._refused_since is not None and not self._failures and not self.journal.disk_full:
            log.warning("the disk takes messages again", extra={"refused_s": time.monotonic() - self._refused_since})
            self._refused_since = None

    def _look(self) -> None:
        self._looking = None
        if self._stopped or self._refused_since is None:
            return
        self._looking = self._loop.call_later(RETRY_S, self._look)
        if not self._busy and self.journal.disk_full:
            self._busy = True
            self._idle.clear()
            self._recover()

    def _recover(self) -> None:
        if self._stopped:
            return
        self._executor.submit(self.journal.recover).add_done_callback(self._recover_is_back)

    def _recover_is_back(self, future: Future[bool]) -> None:
        self._loop.call_soon_threadsafe(self._recovered, future)

    def _recovered(self, future: Future[bool]) -> None:
        error = future.exception()
        if error is not None:
            self._fatal_error(error)
            return
        journal = self.journal
        journal.reclaim()
        self._take_again()
        self._giving_back = future.result() or journal.disk_full
        if future.result() and not journal.pending:
            self._recover()
        else:
            self._next()

    def _next(self) -> None:
        if self.journal.pending:
            self._loop.call_later(min(GATHER_S_MAX, self._last_s * GATHER_SHARE), self._submit)
        else:
            self._busy = False
            self._idle.set()

    def _fatal_error(self, error: BaseException) -> None:
        if not isinstance(error, JournalError):
            raise error
        self._fatal(error)

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
        if self._under_way is not None:
            # Its answer is in, but the loop won't come round to it any more.
            self._committed(self._under_way)
