"""How much each of those who send messages may put into one commit, while others wait for it.

Who sends without waiting for an answer, or with a very large window, would make each commit as large as the time since
the last one allows; and an app that sends a few messages and waits would wait for all of that, each time. So nobody
takes more than twice of what the others need each, or half of the time that a commit takes; and who had its helping has
the next when somebody else sends, so that the rows of both go with one commit, and not in turns. Alone, everybody takes
what there is. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Final, Protocol

HELPING_S: Final = 0.00025  # everybody may have that much
# An app that has its answers is about to send more: for part of what a commit takes, and so long at least.
ABOUT_SHARE: Final = 0.25
ABOUT_S: Final = 0.001
SMALL_S: Final = HELPING_S / 8
CRUMB: Final = 0.25  # what is less than this part of a helping is left
LOST_S: Final = 0.05  # no commit comes at all

REMEMBERED: Final = 4  # commits: about how long it counts what somebody had
FADING: Final = 0.75  # what somebody has needed may have been a part of it: it fades only slowly, commit by commit


class Commits(Protocol):
    """A journal, as far as it is of interest here."""

    @property
    def under_way(self) -> object | None: ...


class Idle:
    """One that never commits."""

    under_way = None


class Helpings:
    """For all connections of a daemon. `who` stands for one; what it takes is seconds of processor time.

    `journal`: whose commits; the owner sets it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.journal: Commits = Idle()
        self._under_way: dict[object, float] = {}  # what each has in the commit that comes back next
        self._pending: dict[object, float] = {}  # and in the one after that
        self._needs: dict[object, tuple[float, int]] = {}  # what each had in the last ones, and in which the last time
        self._number = 0
        self._least: list[tuple[float, object]] = []  # the least of that, and the next; empty: not known yet
        self._commit_s = 0.0
        self._anybody_s = HELPING_S  # so much everybody may take of the next one, whoever it is
        self._waiting: dict[object, tuple[Callable[[], None], asyncio.Handle]] = {}
        self._serving = False

    def fits(self, who: object, seconds: float) -> bool:
        """Whether `who` may take all of that into the next commit; a trifle always does. HOT: tests/bench, intake"""
        filling = self._under_way if self.journal.under_way is None else self._pending
        taken_s = seconds + filling.get(who, 0.0)
        return taken_s <= self._anybody_s or seconds <= SMALL_S or taken_s <= self._allowed_s(who)

    def took(self, who: object, seconds: float) -> None:
        """Messages of `who` were staged, which took so long."""
        filling = self._under_way if self.journal.under_way is None else self._pending  # HOT: tests/bench, intake
        filling[who] = filling.get(who, 0.0) + seconds
        if self._waiting and not self._serving:
            self._serving = True
            try:
                for each in [w for w in self._waiting if w is not who and self.left_s(w) > 0]:
                    self._let(each)
            finally:
                self._serving = False

    def others(self, who: object) -> bool:
        """Whether anybody else sends, too."""
        needs, under_way, pending = self._needs, self._under_way, self._pending
        return len(needs) > (who in needs) or len(under_way) > (who in under_way) or len(pending) > (who in pending)

    @property
    def _filling(self) -> dict[object, float]:
        """What is staged now goes with that commit."""
        return self._under_way if self.journal.under_way is None else self._pending

    def left_s(self, who: object) -> float:
        """What `who` may still take into the next commit."""
        allowed_s = self._allowed_s(who)
        if allowed_s == math.inf:
            return math.inf
        left_s = allowed_s - self._filling.get(who, 0.0)
        return left_s if left_s > allowed_s * CRUMB else 0.0

    def _allowed_s(self, who: object) -> float:
        if not self.others(who):
            return math.inf
        return max(HELPING_S, 2 * self._least_of_others(who), self._commit_s / 2)

    def _least_of_others(self, who: object) -> float:
        if not self._least:
            self._least = heapq.nsmallest(2, ((s, by) for by, (s, _) in self._needs.items()), key=itemgetter(0))
        return next((seconds for seconds, by in self._least if by is not who), 0.0)

    def wait(self, who: object, call: Callable[[], None]) -> None:
        """Call that for its next helping. It must not raise."""
        self._waiting[who] = call, self._loop.call_later(LOST_S, self._lost, who)

    def _lost(self, who: object) -> None:
        self._under_way, self._pending = {}, {}
        self._let(who)

    def _let(self, who: object) -> None:
        call, timer = self._waiting.pop(who)
        timer.cancel()
        call()

    def forget(self, who: object) -> None:
        """It is gone. With no commit to come it would be kept for good."""
        for had in (self._under_way, self._pending):
            had.pop(who, None)
        if self._needs.pop(who, None) is not None:
            self._least = []

    def committed(self, commit_s: float) -> None:
        """A commit has come back; it took so long."""
        self._commit_s = commit_s
        taken, self._under_way, self._pending = self._under_way, self._pending, {}
        self._number += 1
        needs = self._needs
        for who, seconds in taken.items():
            before_s, _ = needs.get(who, (0.0, 0))
            needs[who] = max(seconds, before_s * FADING), self._number
        if self._number % REMEMBERED == 0:
            oldest = self._number - REMEMBERED
            needs = self._needs = {who: need for who, need in needs.items() if need[1] > oldest}
        self._least = []
        least_s = min([need[0] for need in needs.values()], default=0.0)
        self._anybody_s = max(HELPING_S, 2 * least_s, commit_s / 2)
        if self._waiting:
            self._expect(taken, max(ABOUT_S, commit_s * ABOUT_SHARE))

    def _expect(self, answered: dict[object, float], about_s: float) -> None:
        """Those who wait let others go first who have their answers now, but not for ever."""
        for who, (call, timer) in self._waiting.items():
            timer.cancel()
            wait_s = about_s if any(each is not who for each in answered) else 0.0
            self._waiting[who] = call, self._loop.call_later(wait_s, self._let, who)
