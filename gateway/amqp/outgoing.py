"""A link on which an app receives from us: what to send next, and what the app's answers mean.

Reads the groups of one source, in order, within credit and window. `accepted` finishes a row; what is released or
modified goes out again before anything newer, after a pause; what is rejected becomes a dead letter. On a source of
one's own the window empties first, so that the order stays. Knows no socket and reads no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from gateway.amqp.directory import Source
from gateway.amqp.engine import Sender
from gateway.amqp.events import MESSAGE_SIZE_EXCEEDED, Outcome, OutcomeKind
from gateway.amqp.message import patch_header, patch_ttl
from gateway.groups import Group
from storeforward.journal import Journal
from storeforward.streams import Row

BATCH_BYTES_MAX = 1 << 20
RESEND_S_MIN, RESEND_S_MAX = 0.2, 10.0
# A receiver of a queue that others wait for, and that has settled nothing for so long, loses its link.
STUCK_S_MAX = 30.0


class Outgoing:
    """`wake(now)` after a commit, after credit, after answers. `given_back(group)`: others may want what it holds now.

    `writable()`: whether the connection takes more.
    """

    def __init__(
        self,
        journal: Journal,
        link: Sender,
        source: Source,
        window: int,
        now: float,
        given_back: Callable[[Group], None],
        writable: Callable[[], bool] = lambda: True,
    ) -> None:
        self.journal = journal
        self.link = link
        self.source = source
        self.window = window
        self._given_back = given_back
        self._writable = writable
        link.any_order()  # workers finish as they can, and a queue hands nothing out again that was accepted
        self._sent: deque[tuple[int, Group, int]] = deque()  # number, group, seq; in the order sent
        self._number = 0
        self._turn = 0
        self._resend_at: float | None = None
        self._resend_s = RESEND_S_MIN
        self.progress_at = now
        self.again = False
        self.lagging = False
        self.ended = False
        self.settled = 0
        for group in source.groups.values():
            group.join(self)

    @property
    def resend_at(self) -> float | None:
        """When to wake this for what was given back. None also where answers have to come first: those wake it."""
        return None if self._waits_for_answers else self._resend_at

    @property
    def _waits_for_answers(self) -> bool:
        return self.source.exclusive and self.link.unsettled > 0

    def end(self) -> None:
        """The link is gone: what it has not finished goes back. May be called twice."""
        if not self.ended:
            self._take_answers(self.progress_at)
        self.ended = True
        self._sent.clear()
        for group in self.source.groups.values():
            if group.has(self):
                group.leave(self)
                if not self.source.exclusive:
                    self._given_back(group)

    def stuck(self, now: float) -> bool:
        """Whether this receiver holds up the others of its queue."""
        if self.source.exclusive or now - self.progress_at <= STUCK_S_MAX:
            return False
        return any(group.blocker is self for group in self.source.groups.values())

    def wake(self, now: float) -> None:
        """Take answers, move cursors, send what there is room for.

        Afterwards `again` says that there is more to look at (wake soon), `lagging` that a commit has to come first.
        """
        self.again = self.lagging = False
        link = self.link
        if self.ended:
            return
        self._take_answers(now)
        if not link.alive:
            return
        if self._resend_at is not None:
            if now < self._resend_at or self._waits_for_answers:
                link.drained()
                return
            self._resend_at = None
        all_gone = self._send(link, now) and not self.again
        if link.draining and (all_gone or not link.credit or link.unsettled >= self.window):
            link.drained()

    # ------------------------------------------------------------------ answers

    def _take_answers(self, now: float) -> None:
        """Also from a link that is gone by now: an app may answer and detach in one breath."""
        for outcome in self.link.take_outcomes():
            self.progress_at = now
            self._judge(outcome, now)

    def _judge(self, outcome: Outcome, now: float) -> None:
        """What one answer means. Absent from this table is a bug of ours, not the app's."""
        for _ in range(outcome.count - 1):
            _, group, seq = self._sent.popleft()
            group.done(self, seq)
        group, seq = self._answered(outcome.seq)
        match outcome.kind:
            case OutcomeKind.ACCEPTED:
                self.settled += outcome.count
                self._resend_s = RESEND_S_MIN
                group.done(self, seq)
            case OutcomeKind.REJECTED:
                self._bury(group, seq, outcome.condition or "rejected", outcome.description or "")
            case OutcomeKind.MODIFIED if outcome.undeliverable_here and self.source.exclusive:
                self._bury(group, seq, "undeliverable-here", "its only receiver says so")
            case OutcomeKind.RELEASED | OutcomeKind.MODIFIED | OutcomeKind.UNKNOWN:
                if self._resend_at is None:
                    self._resend_at = now + self._resend_s
                    self._resend_s = min(RESEND_S_MAX, self._resend_s * 2)
                group.release(self, seq, failed=outcome.delivery_failed, barred=outcome.undeliverable_here)
                if not self.source.exclusive:
                    self._given_back(group)

    def _answered(self, number: int) -> tuple[Group, int]:
        """Take out what was sent under this number."""
        at = bisect_left(self._sent, (number,))
        _, group, seq = self._sent[at]
        del self._sent[at]
        return group, seq

    def _bury(self, group: Group, seq: int, condition: str, description: str) -> None:
        if group.done(self, seq):
            for row in self.journal.read(group.stream, seq, 1):
                if row.seq == seq:
                    self.journal.bury(group.stream, row, condition, description)

    # ------------------------------------------------------------------ sending

    def _send(self, link: Sender, now: float) -> bool:
        """Whether everything there is has gone."""
        groups = list(self.source.groups.values())
        while True:
            if not self._writable():
                return False
            lag = sum(g.cursor.position - g.cursor.durable for g in groups)
            room = min(link.capacity, self.window - link.unsettled - lag)
            if room <= 0:
                self.lagging = lag > 0
                return False
            idle = not link.unsettled
            batch, taken = self._batch(groups, room)
            if batch:
                if idle:
                    self.progress_at = now
                link.send(batch)
            elif not taken:
                self.again = any(g.behind for g in groups)
                return not self.again

    def _batch(self, groups: list[Group], room: int) -> tuple[list[tuple[int, bytes]], int]:
        """Up to `room` messages, and how many rows were looked at for them.

        The streams take turns at being first, so that none waits for another's backlog.
        """
        batch: list[tuple[int, bytes]] = []
        size, taken = 0, 0
        self._turn += 1
        for at in range(len(groups)):
            group = groups[(at + self._turn) % len(groups)]
            if len(batch) >= room or size >= BATCH_BYTES_MAX:
                break
            if not group.has(self):
                group.join(self)
            for row, _ in group.take(self, room - len(batch), BATCH_BYTES_MAX - size):
                taken += 1
                body = self._body(group, row)
                if body is not None:
                    self._number += 1
                    self._sent.append((self._number, group, row.seq))
                    batch.append((self._number, body))
                    size += len(body)
        return batch, taken

    def _body(self, group: Group, row: Row) -> bytes | None:
        body = row.body
        if row.expires_age_us is not None:
            body = patch_ttl(body, max(1, (row.expires_age_us - self.journal.age_us()) // 1000))
        failures = group.failures(row.seq)
        if failures:
            body = patch_header(body, failures=failures)
        size_max = self.link.peer_max_message_bytes
        if size_max and len(body) > size_max:
            if self.source.exclusive:
                self._bury(group, row.seq, MESSAGE_SIZE_EXCEEDED, f"{len(body)} bytes; the receiver takes {size_max}")
            else:
                group.release(self, row.seq, barred=True)
                self._given_back(group)
            return None
        return body
