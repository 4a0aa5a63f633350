"""Which of several streams sends next on one line, and how much of it: classes, guaranteed shares, live before backlog.

Three choices, each between a preferred party and one that is owed its share while it waits: urgent before the rest,
normal before bulk, and within a class the streams that keep up before those that work off a backlog. Streams that are
equal in all of that take turns by bytes (start-time fair queueing), so that one with little to send is hardly kept
waiting by one with much. Within a stream there is no choice: its order is promised. Time is an argument; knows no
journal, no AMQP and no line: `room` is what the line takes now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gateway.config_values import Shares

# A stream that had nothing left to send less than this long ago keeps up with its producers.
LIVE_S = 5.0
# What a waiting party is owed grows to about this many quanta at most, so that nobody is paid for hours at once.
OWED_QUANTA_MAX = 4


class Class(Enum):
    URGENT = "urgent"
    NORMAL = "normal"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Turn:
    """`queue` may send about `size_bytes` now: whole messages, or a part of one that is larger than that."""

    queue: Queue
    size_bytes: int


class Queue:
    """One stream as the scheduler sees it. `owner` is whose it is."""

    __slots__ = ("_emptied_at", "_tag", "class_", "empty", "owner", "ready", "sent_bytes")

    def __init__(self, class_: Class, owner: Any = None) -> None:
        self.class_ = class_
        self.owner = owner
        self.ready = False
        self.empty = False
        self._emptied_at = -math.inf  # until it has been empty once, what it has is backlog
        self.sent_bytes = 0
        self._tag = 0  # the place in its group's virtual time where its next turn begins

    def live(self, now: float) -> bool:
        return self.empty or now - self._emptied_at < LIVE_S

    def emptied(self) -> None:
        """All that its producers have given so far is sent."""
        self.empty = True

    def filled(self, now: float) -> None:
        """It has something to send."""
        if self.empty:
            self.empty = False
            self._emptied_at = now

    def cut(self) -> None:
        """The line is gone: what it has when the line is back is backlog."""
        self.empty = False
        self._emptied_at = -math.inf


class _Choice:
    """First one party, then the other; but the other is owed its share of what is sent while both wait."""

    __slots__ = ("_ratio", "owed")

    def __init__(self, second_percent: float) -> None:
        self._ratio = second_percent / max(1.0, 100.0 - second_percent)
        self.owed = 0.0

    def second(self, first: bool, second: bool, quantum: int) -> bool:
        """Whether it is the second party's turn. One of the two waits; debts are only of a time in which both do."""
        if not (first and second):
            self.owed = min(self.owed, 0.0)
            return second
        return self.owed >= quantum

    def sent(self, by_second: bool, size: int, other_waits: bool, quantum: int) -> None:
        if not other_waits:
            return
        bound = max(OWED_QUANTA_MAX, 2 * self._ratio) * max(quantum, size)
        if by_second:
            self.owed = max(-bound, self.owed - size)
        else:
            self.owed = min(bound, self.owed + size * self._ratio)


class Fair:
    """`add` every stream, `wake` one that may have something to send, then ask `next` and tell `sent`, by turns.

    `quantum` is how much one turn is at most while others wait; the owner fits it to the line.
    """

    def __init__(self, shares: Shares, quantum: int = 1 << 16) -> None:
        self.shares = shares
        self.quantum = quantum
        self.queues: list[Queue] = []
        self._ready: list[Queue] = []
        self._rest = _Choice(100.0 - shares.urgent)
        self._bulk = _Choice(100.0 * shares.bulk / (shares.normal + shares.bulk))
        self._backlog = {each: _Choice(100.0 - shares.live) for each in Class}
        self._time = {(each, live): 0 for each in Class for live in (False, True)}

    def add(self, class_: Class, owner: Any = None) -> Queue:
        queue = Queue(class_, owner)
        self.queues.append(queue)
        return queue

    def wake(self, queue: Queue) -> None:
        """It may have something to send: it is asked until it sends nothing."""
        if not queue.ready:
            queue.ready = True
            self._ready.append(queue)

    def rest(self, queue: Queue) -> None:
        """It has nothing to send, or may not, until it is woken."""
        if queue.ready:
            queue.ready = False
            self._ready.remove(queue)

    @property
    def waiting(self) -> bool:
        return bool(self._ready)

    def next(self, now: float, room: int, reserve: int = 0, *, urgent_only: bool = False) -> Turn | None:
        """Who may send, where the line takes `room` bytes now, and `reserve` more if they are urgent.

        None where nobody is ready, or the line has no room for whose turn it is.
        """
        ready = self._ready
        if urgent_only:
            ready = [queue for queue in ready if queue.class_ is Class.URGENT]
        if not ready:
            return None
        queue = ready[0] if len(ready) == 1 else self._choose(ready, now)
        if queue.class_ is Class.URGENT:
            room += reserve
        if room <= 0:
            return None
        return Turn(queue, room if len(ready) == 1 else min(room, self.quantum))

    def sent(self, queue: Queue, size: int, now: float) -> None:
        """What came of a turn; 0 if it had nothing to send."""
        ready = self._ready
        queue.sent_bytes += size
        if not size:
            self.rest(queue)
        elif len(ready) > 1:
            self._account(queue, size, now)

    def _choose(self, ready: list[Queue], now: float) -> Queue:
        urgent = [queue for queue in ready if queue.class_ is Class.URGENT]
        rest = [queue for queue in ready if queue.class_ is not Class.URGENT] if len(urgent) < len(ready) else []
        group = urgent
        if self._rest.second(bool(urgent), bool(rest), self.quantum):
            normal = [queue for queue in rest if queue.class_ is Class.NORMAL]
            bulk = [queue for queue in rest if queue.class_ is Class.BULK]
            group = bulk if self._bulk.second(bool(normal), bool(bulk), self.quantum) else normal
        class_ = group[0].class_
        live = [queue for queue in group if queue.live(now)]
        backlog = [queue for queue in group if not queue.live(now)] if len(live) < len(group) else []
        of_backlog = self._backlog[class_].second(bool(live), bool(backlog), self.quantum)
        group = backlog if of_backlog else live
        time = self._time[class_, not of_backlog]
        return min(group, key=lambda queue: max(queue._tag, time))

    def _account(self, queue: Queue, size: int, now: float) -> None:
        others = [other for other in self._ready if other is not queue]
        class_, live = queue.class_, queue.live(now)
        urgent = class_ is Class.URGENT
        self._rest.sent(not urgent, size, any((o.class_ is Class.URGENT) != urgent for o in others), self.quantum)
        if not urgent:
            apart = any(o.class_ not in (Class.URGENT, class_) for o in others)
            self._bulk.sent(class_ is Class.BULK, size, apart, self.quantum)
        peers = [other for other in others if other.class_ is class_]
        self._backlog[class_].sent(not live, size, any(o.live(now) != live for o in peers), self.quantum)
        key = class_, live
        self._time[key] = start = max(queue._tag, self._time[key])
        queue._tag = start + size
