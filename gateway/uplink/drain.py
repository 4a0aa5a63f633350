"""One stream's way out over one AMQP sender link: what to send next, and what the peer's answers mean.

Holds the order: a cursor moves only over rows that are settled, lost with a ledger row, or not wanted by this link.
Released and modified messages stop the link, the window empties, and what was not accepted goes again in order.
Knows no socket and reads no clock. Serves the uplink and, on a hub, the receivers that others attach.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.amqp.engine import Outcome, OutcomeKind, Sender
from gateway.amqp.message import patch_ttl
from storeforward.journal import Journal
from storeforward.streams import Cursor, Row, Stream

BATCH_BYTES_MAX = 1 << 20
RESEND_S_MIN, RESEND_S_MAX = 0.2, 10.0


class Drain:
    """Call `wake(now)` after a commit on the stream, after credit, and after answers from the peer."""

    def __init__(
        self,
        journal: Journal,
        stream: Stream,
        cursor: Cursor,
        window: int,
        wants: Callable[[Row], bool] | None = None,
    ) -> None:
        self.journal = journal
        self.stream = stream
        self.cursor = cursor
        self.window = window
        self._wants = wants
        self._link: Sender | None = None
        self._next = cursor.position
        # Finished with though the cursor is not past them: accepted behind a release, buried, expired.
        self._done: set[int] = set()
        self._resend_from: int | None = None
        self._resend_at = 0.0
        self._resend_s = RESEND_S_MIN
        self._progress_at = 0.0
        self.settled = 0
        # How often, since it took something, the peer has given messages back; and the first of the last ones.
        self.given_back = self.given_back_seq = 0
        self.paused = False

    def attached(self, link: Sender, now: float) -> None:
        """A new link: everything after the cursor goes again, in order, under the same identities."""
        self._link = link
        self._next = self.cursor.position
        self._resend_from = None
        self._progress_at = now

    def detached(self) -> None:
        """The link is gone; what the peer answered before it went still counts."""
        if self._link is not None:
            self._take_answers(self._link, self._progress_at)
        self._link = None

    @property
    def in_flight(self) -> int:
        return 0 if self._link is None else self._link.unsettled

    def stalled_since(self) -> float | None:
        """When the peer last settled something, if it still owes us an answer."""
        return self._progress_at if self.in_flight else None

    def resend_at(self) -> float | None:
        return None if self._resend_from is None else self._resend_at

    def wake(self, now: float) -> bool:
        """Take answers, move the cursor, send what there is room for. True when the peer settled something."""
        link = self._link
        if link is None:
            return False
        moved = self._take_answers(link, now)
        if not link.alive:
            return moved
        if self._resend_from is not None and not link.unsettled and now >= self._resend_at:
            self._next, self._resend_from = self._resend_from, None
        if self._resend_from is None and not self.paused:
            self._send(link, now)
            if link.draining and self._next >= self.stream.committed:
                link.drained()
        self._move_cursor(link)
        return moved

    def _take_answers(self, link: Sender, now: float) -> bool:
        """Also from a link that is gone by now: a peer may settle and detach, or end the session, in one breath.

        Such a link has forgotten its window, which must not be taken for "all settled": the cursor goes up to the last
        answer only. Answers come in the order sent and skip none.
        """
        moved, answered = False, 0
        for outcome in link.take_outcomes():
            self._progress_at = now
            moved = self._judge(outcome, now) or moved
            answered = outcome.seq + 1
        if not link.alive:
            self._move_to(answered)
        return moved

    def _judge(self, outcome: Outcome, now: float) -> bool:
        """What one answer means. Absent from this table is a bug of ours, not the peer's."""
        match outcome.kind:
            case OutcomeKind.ACCEPTED:
                self.settled += outcome.count
                if self._resend_from is not None:
                    # seqs may have gaps, so that the run can begin earlier than it looks; what is over is harmless
                    first = max(outcome.seq - outcome.count + 1, self._resend_from)
                    self._done.update(range(first, outcome.seq + 1))
                else:
                    self._resend_s = RESEND_S_MIN
                    self.given_back = 0
                return True
            case OutcomeKind.REJECTED:
                for row in self.journal.read(self.stream, outcome.seq, 1):
                    if row.seq == outcome.seq:
                        self.journal.bury(self.stream, row, outcome.condition or "rejected", outcome.description or "")
                self._done.add(outcome.seq)
                return True
            case OutcomeKind.RELEASED | OutcomeKind.MODIFIED | OutcomeKind.UNKNOWN:
                if self._resend_from is None:
                    self.given_back += 1
                    self.given_back_seq = outcome.seq
                    self._resend_from = outcome.seq
                    self._resend_at = now + self._resend_s
                    self._resend_s = min(RESEND_S_MAX, self._resend_s * 2)
                return False

    def _send(self, link: Sender, now: float) -> None:
        journal, stream, cursor = self.journal, self.stream, self.cursor
        while True:
            self._move_cursor(link)
            # What is settled but not yet durably so would be sent again after a crash: it counts as in the window.
            room = min(link.capacity, self.window - link.unsettled - (cursor.position - cursor.durable))
            if room <= 0 or self._next >= stream.committed:
                return
            rows = journal.read(stream, self._next, room, BATCH_BYTES_MAX)
            if not rows:
                # Only a gap is left (rows that a failed commit took back, or that did not read).
                self._next = stream.committed
                return
            idle = not link.unsettled
            batch = [(row.seq, body) for row in rows if (body := self._body(row, link)) is not None]
            self._next = rows[-1].seq + 1
            if batch:
                if idle:
                    self._progress_at = now
                link.send(batch)

    def _body(self, row: Row, link: Sender) -> bytes | None:
        if row.seq in self._done:
            return None
        if self._wants is not None and not self._wants(row):
            return None
        body = row.body
        if row.expires_age_us is not None:
            left_ms = (row.expires_age_us - self.journal.age_us()) // 1000
            if left_ms <= 0:
                self.journal.lose(self.stream.name, row.seq, "expired", len(body), self.cursor.name)
                self._done.add(row.seq)
                return None
            body = patch_ttl(body, left_ms)
        size_max = link.peer_max_message_bytes
        if size_max and len(body) > size_max:
            self.journal.bury(
                self.stream,
                row,
                "amqp:link:message-size-exceeded",
                f"{len(body)} bytes; the peer takes {size_max}",
            )
            self._done.add(row.seq)
            return None
        return body

    def _move_cursor(self, link: Sender) -> None:
        oldest = link.oldest_unsettled
        self._move_to(self._next if oldest is None else oldest)

    def _move_to(self, position: int) -> None:
        """The cursor to `position`, but never over what is to be sent again."""
        if self._resend_from is not None:
            position = min(position, self._resend_from)
        self.journal.advance(self.stream, self.cursor, position)
        if self._done:
            self._done = {seq for seq in self._done if seq >= position}
