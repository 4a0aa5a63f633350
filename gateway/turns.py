"""Whose turn it is on the loop: what costs many times what a message does waits for its turn, and messages don't.

A connection, a TLS handshake, a subscription, a retained message, an AMQP link: each is *dear*. Dear work is done in
portions, one client's at a time, and between two of them the loop turns. All of it together has what messages leave of
the loop, and SHARE_MIN of it at least: so a flood of it takes that share from those who publish and no more, alone it
is hardly slowed at all, and a few clients that come and subscribe never notice. Among those who wait it is the turn of
who has had the least (as Linux's completely fair scheduler has it); a client that waits is not read from, so the flood
backs up to its sender.

By the time this thread had or could have had, not by the clock: a machine that is busy with other programs makes nobody
look costly, and no share larger than it is. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from gateway.helpings import Helpings

log = logging.getLogger("lineside.turns")

PORTION_S: Final = 0.0005  # what one turn may take: messages wait so long for it
AT_ONCE: Final = 16  # packets, filters or messages that are dear: so many are done without looking at the clock
SHARE_MIN: Final = 0.125  # of the loop, when messages want all of it
YIELDING: Final = 12.0  # times what it takes to read messages is left to them: they are journaled and answered, too
BURST_S: Final = 0.01  # what may be done at once after a rest
DEBT_S_MAX: Final = 1.0
DUE_S_MIN: Final = 0.0001
WINDOW_S: Final = 0.02  # over which it is seen how much messages take
HALVED_S: Final = 0.25  # after which that counts half
# Who comes after a rest is so far ahead of those who keep asking; and who has had much is not further behind than that.
HEADSTART_S: Final = 4 * PORTION_S
ACCOUNTS_MAX: Final = 4096
# Below this share dear work waits for a moment when messages were staged, that its rows may go with theirs: a commit of
# its own would hold up the next messages. Where none come for so long, there is nothing to wait for.
CONTENDED: Final = 0.5
PATIENCE_S: Final = 0.05


class Account:
    """How much dear work was done for one client, or for one address, so far: seconds."""

    __slots__ = ("ran_s",)

    def __init__(self) -> None:
        self.ran_s = 0.0


class Waiting(Protocol):
    """Who waits for its turn. `turn` does about PORTION_S of work; whoever has more to do enters again.

    `abort`: its turn failed, and its connection alone pays for that.
    """

    @property
    def account(self) -> Account: ...
    def turn(self) -> None: ...
    def abort(self) -> None: ...


class Share:
    """How much of one thread's time dear work may have now.

    `now` is of a clock that stands still while the thread waits for a processor. `messages_s`: what messages have had
    of it lately; whoever deals with them adds to that.
    """

    __slots__ = ("_at", "_busy", "_since", "credit_s", "messages_s", "share")

    def __init__(self, now: float) -> None:
        self.credit_s = BURST_S
        self.share = 1.0
        self._at = self._since = now
        self.messages_s = 0.0
        self._busy = 0.0

    def spend(self, seconds: float) -> None:
        """On dear work."""
        self.credit_s = max(-DEBT_S_MAX, self.credit_s - seconds)

    def refresh(self, now: float) -> None:
        """Lay by what has become due since the last time."""
        window_s = now - self._since
        if window_s >= WINDOW_S:
            busy = self.messages_s / window_s
            # Up at once, down slowly: an app that waits for an answer is about to go on.
            self._busy = max(busy, self._busy * 0.5 ** (window_s / HALVED_S))
            self.share = max(SHARE_MIN, 1.0 - YIELDING * self._busy)
            self._since, self.messages_s = now, 0.0
        self.credit_s = min(BURST_S, self.credit_s + max(0.0, now - self._at) * self.share)
        self._at = now

    def due_s(self) -> float:
        """In how many seconds there will be credit again, as of the last `refresh`."""
        return 0.0 if self.credit_s > 0 else max(DUE_S_MIN, -self.credit_s / self.share)


class Denied:
    """For how many seconds the thread that makes one was ready and had no processor; 0 where Linux does not tell."""

    def __init__(self) -> None:
        try:
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1

    def __call__(self) -> float:
        return int(os.pread(self._file, 64, 0).split()[1]) / 1e9 if self._file >= 0 else 0.0

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class Turns:
    """For all listeners of a daemon.

    `cpu`: for how many seconds this thread has had a processor; `denied`: for how many it was ready and had none.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        cpu: Callable[[], float] = time.thread_time,
        denied: Callable[[], float] | None = None,
    ) -> None:
        self._loop = loop
        self.cpu = cpu
        self.helpings = Helpings(loop)
        self._denied = Denied() if denied is None else denied
        self._share = Share(self._time())
        self._waiting: dict[Account, deque[Waiting]] = {}
        self._heap: list[tuple[float, int, Account]] = []  # each of those once
        self._numbers = itertools.count()
        self._floor_s = 0.0  # what who had its turn last had had by then
        self._scheduled = False
        self._stopped = False
        self._stirred = False  # somebody has staged messages since that was looked at
        self._moment_at = -PATIENCE_S  # and when somebody had, last
        self._accounts: dict[str, Account] = {}
        self._until_s = 0.0
        self.serving: Waiting | None = None  # whose turn it is just now

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def ready(self) -> bool:
        """Whether dear work may be done at once: nobody waits, and there is credit. Its cost goes to `spent`."""
        share = self._share
        if self._heap or (share.share < CONTENDED and self._contended):
            return False
        if share.credit_s <= 0:
            share.refresh(self._time())
        return share.credit_s > 0

    def _time(self) -> float:
        return self._loop.time() - self._denied()

    @property
    def _contended(self) -> bool:
        """Whether it is better to wait for a moment when messages were staged."""
        now = self._loop.time()
        if self._stirred:
            self._stirred = False
            self._moment_at = now
        return self._share.share < CONTENDED and now - self._moment_at < PATIENCE_S

    def messages(self, seconds: float, *, staged: bool) -> None:
        """So long was spent on what is not dear. `staged`: a commit is about to take it, and goes for a turn now, too.

        HOT: tests/bench, intake
        """
        self._share.messages_s += seconds
        if staged:
            self._stirred = True
            if self._heap:
                self._share.refresh(self._time())
                if self._share.credit_s > 0:
                    self._serve_next()

    def spent(self, account: Account, seconds: float) -> None:
        """Dear work was done outside a turn."""
        self._share.spend(seconds)
        account.ran_s = self._within(account.ran_s) + seconds

    @contextmanager
    def charging(self, account: Account) -> Iterator[None]:
        """What is done within is dear, and done outside a turn."""
        began_s = self.cpu()
        try:
            yield
        finally:
            self.spent(account, self.cpu() - began_s)

    def account(self, source: str) -> Account:
        """What is known of an address that clients come from."""
        account = self._accounts.pop(source, None)
        if account is None:
            if len(self._accounts) >= ACCOUNTS_MAX:
                del self._accounts[next(iter(self._accounts))]
            account = Account()
        self._accounts[source] = account
        return account

    def enter(self, who: Waiting) -> None:
        """Have `who.turn()` called, once."""
        if self._stopped:
            return
        account = who.account
        others = self._waiting.get(account)
        if others is not None:
            others.append(who)
            return
        account.ran_s = self._within(account.ran_s)
        self._push(account, deque((who,)))
        self._schedule()

    def _within(self, ran_s: float) -> float:
        """What counts of what somebody has had."""
        return min(max(ran_s, self._floor_s - HEADSTART_S), self._floor_s + HEADSTART_S)

    def stop(self) -> None:
        """Nobody has a turn any more."""
        self._stopped = True
        self._heap.clear()
        self._waiting.clear()

    @property
    def over(self) -> bool:
        """Within a turn: whether it has taken its portion."""
        return self.cpu() >= self._until_s

    def _push(self, account: Account, waiting: deque[Waiting]) -> None:
        self._waiting[account] = waiting
        heapq.heappush(self._heap, (account.ran_s, next(self._numbers), account))

    def _schedule(self) -> None:
        if self._heap and not self._scheduled:
            self._scheduled = True
            self._share.refresh(self._time())
            due_s = self._share.due_s() + (PATIENCE_S if self._contended else 0.0)
            if due_s:
                self._loop.call_later(due_s, self._run)
            else:
                self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        if self._heap:
            self._share.refresh(self._time())
            if self._share.credit_s > 0 and not self._contended:
                self._serve_next()
            self._schedule()

    def _serve_next(self) -> None:
        """Let those of one account go who have had the least, for one portion."""
        while True:
            had_s, _, account = heapq.heappop(self._heap)
            waiting = self._waiting.pop(account)
            if account.ran_s <= had_s:
                break
            self._push(account, waiting)  # it has had more meanwhile, outside its turns
        self._floor_s = max(self._floor_s, had_s)
        self._waiting[account] = waiting  # for who enters in that turn
        self._until_s = self.cpu() + PORTION_S
        for _ in range(len(waiting)):
            self._serve(account, waiting.popleft())
            if self.over:
                break
        if waiting:
            self._push(account, waiting)
        else:
            del self._waiting[account]

    def _serve(self, account: Account, who: Waiting) -> None:
        began_s = self.cpu()
        self.serving = who
        try:
            who.turn()
        except Exception:  # whatever is wrong with one client, only its connection pays
            log.exception("a client's turn failed; its connection is closed")
            self._loop.call_soon(who.abort)  # should that fail, too, those who wait behind it still have their turns
        finally:
            self.serving = None
            self.spent(account, self.cpu() - began_s)
