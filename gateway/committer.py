"""Drives the journal's group commit on an event loop: stage here, wait for the disk in one other thread.

While one commit syncs, the next batch gathers. After a slow one it waits until as many more messages have come as were
acknowledged, for a fifth of what that took at most: whoever was answered is likely to send again at once, and in turns
with the others each would wait for two syncs.

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
from functools import wraps
from typing import Any, TypeVar, cast

from storeforward.batch import Batch
from storeforward.errors import JournalError, JournalFull
from storeforward.journal import Journal

log = logging.getLogger("lineside.journal")

GATHER_SHARE = 0.2
GATHER_S_MAX = 0.01
QUICK_S = 0.002  # a commit, after which nothing waits
RETRY_S = 0.5
CALM_S = 5.0  # without a refusal, before "again" is believed
WAL_HELD_SHARE = 8


_Step = TypeVar("_Step", bound=Callable[..., None])


def _vital(step: _Step) -> _Step:
    """Without the end of this step there is no next commit: what it raises ends the daemon, and not only all intake."""

    @wraps(step)
    def guarded(self: Committer, *args: Any) -> None:
        try:
            step(self, *args)
        except JournalError as error:
            self._fatal(error)
        except Exception as error:
            log.exception("a commit failed in a way that nobody expected")
            self._fatal(JournalError(f"unexpected: {error!r}"))

    return cast(_Step, guarded)


class _Mark:
    """Waits as a client does, for its place in the order of commits alone."""

    def __init__(self, reached: asyncio.Future[None]) -> None:
        self.reached = reached

    def committed(self, tokens: list[object]) -> None:
        if not self.reached.done():
            self.reached.set_result(None)

    def failed(self, tokens: list[object], error: JournalFull) -> None:
        self.committed(tokens)


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
        self._gathering: asyncio.TimerHandle | None = None
        self._stopped = False
        self._under_way: Future[float] | None = None
        self._refused_since: float | None = None
        self._failures = 0
        self._looking: asyncio.TimerHandle | None = None
        self._saying: asyncio.TimerHandle | None = None
        self._wal_held = False
        self._giving_back = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_s = 0.0
        self._worth = 0  # how many messages are worth a commit before `_gather_until`
        self._gather_until = 0.0
        self.durations_s: deque[float] = deque(maxlen=1024)
        # Called when there is more to read though nothing was committed: messages held for the hub.
        self.on_offered: Callable[[], None] = lambda: None
        self._marks: set[_Mark] = set()
        self._turning = False
        self._late: asyncio.TimerHandle | None = None
        journal.on_stir = self._stir
        # Whoever reads may only give up its connection, and would come by the same page again and again.
        journal.on_damage = self._fatal
        if journal.disk_full:
            self._refuse("found so at the start")

    def kick(self) -> None:
        if self._stopped:
            return
        if not self._busy:
            self._busy = True
            self._idle.clear()
            self._gather()
        elif self._gathering is not None and self._enough():
            self._gathering.cancel()
            self._gather()

    def _gather(self) -> None:
        """Submit what is pending as soon as it is worth a sync."""
        self._gathering = None
        if self._enough() or self._loop.time() >= self._gather_until:
            # After every socket that is readable in this turn of the loop.
            self._loop.call_soon(self._submit)
        else:
            self._gathering = self._loop.call_at(self._gather_until, self._submit)

    def _enough(self) -> bool:
        return self.journal.pending.messages >= self._worth

    # ------------------------------------------------------------------ messages held for the hub

    def _stir(self) -> None:
        if not self._turning and not self._stopped:
            self._turning = True
            self._loop.call_soon(self._turn)

    @_vital
    def _turn(self) -> None:
        self._turning = False
        if self._stopped:
            return
        journal = self.journal
        if journal.turn(self._loop.time()):
            self.on_offered()
        if journal.pending:
            self.kick()
        if self._late is None:
            due = journal.turn_due()
            if due is not None:
                self._late = self._loop.call_at(due, self._lingered)

    def _lingered(self) -> None:
        self._late = None
        self._turn()

    # ------------------------------------------------------------------ commits

    @_vital
    def _submit(self) -> None:
        self._gathering = None
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

    @_vital
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
        batch = journal.committed()
        self._worth = journal.pending.messages + batch.messages
        gather_s = min(GATHER_S_MAX, self._last_s * GATHER_SHARE) if self._last_s > QUICK_S else 0.0
        self._gather_until = self._loop.time() + gather_s
        self._on_commit(batch)
        if journal.disk_full:
            self._refuse("little room is left, and kept for urgent streams")
        self._take_again()
        if journal.turn_due() is not None:
            self._stir()
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

    @_vital
    def _checkpointed(self, future: Future[None]) -> None:
        if self._stopped:
            return  # the journal may be closed by now
        error = future.exception()
        if error is not None:
            raise error
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
        """While a disk fills up, room is found and used up many times a second: that is told once."""
        if self._saying is not None:
            self._saying.cancel()
            self._saying = None
        elif self._refused_since is None:
            self._refused_since = time.monotonic()
            log.error("the disk takes no messages; intake is refused until it does", extra={"error": reason})
        if self._looking is None:
            self._looking = self._loop.call_later(RETRY_S, self._look)

    def _take_again(self) -> None:
        if self._refused_since is None or self._failures:
            return
        if not self.journal.disk_full and self._saying is None:
            self._saying = self._loop.call_later(CALM_S, self._say, time.monotonic() - self._refused_since)

    def _say(self, refused_s: float) -> None:
        """It has taken messages for a while."""
        self._saying = self._refused_since = None
        log.warning("the disk takes messages again", extra={"refused_s": round(refused_s, 3)})

    def _look(self) -> None:
        self._looking = None
        if self._stopped or self._refused_since is None or self._saying is not None:
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

    @_vital
    def _recovered(self, future: Future[bool]) -> None:
        if self._stopped:
            return  # the journal may be closed by now
        error = future.exception()
        if error is not None:
            raise error
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
            self._gather()
        else:
            self._busy = False
            self._idle.set()

    def _fatal(self, error: JournalError) -> None:
        self._cease()
        self._on_fatal(error)

    def _cease(self) -> None:
        """No commit comes any more: nobody waits for one."""
        self._stopped = True
        for mark in self._marks:
            mark.committed([])
        self._busy = False
        self._idle.set()

    async def flush(self) -> None:
        """Wait until all that is staged now is on the disk or was refused, whatever is staged meanwhile.

        Where no commit comes any more, after `stop` or an error that ends the daemon, there is nothing to wait for.
        """
        if self._stopped:
            return
        mark = _Mark(self._loop.create_future())
        self.journal.wait(mark, None)
        self._marks.add(mark)
        try:
            self.kick()
            await mark.reached
        finally:
            self._marks.discard(mark)

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
        self._cease()
