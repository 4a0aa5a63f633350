"""One stream's way out over one AMQP sender link: what to send next, and what the peer's answers mean.

Holds the order: a cursor moves only over rows that are settled, lost with a ledger row, or not wanted by this link.
Released and modified messages stop the link, the window empties, and what was not accepted goes again in order.
Knows no socket and reads no clock. Serves the uplink and, on a hub, the receivers that others attach.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gateway.amqp.engine import Sender
from gateway.amqp.events import Outcome, OutcomeKind
from gateway.amqp.message import patch_ttl
from storeforward.journal import Journal
from storeforward.streams import Cursor, Row, Stream

BATCH_BYTES_MAX = 1 << 20
# Of one link, where the line is shared out: what may be without an answer, though a single message may be larger.
WINDOW_BYTES_MAX = 8 << 20
RESEND_S_MIN, RESEND_S_MAX = 0.2, 10.0
# How long a peer may work off what it got over a connection that is gone.
WORKED_OFF_S = 10.0


@dataclass(slots=True)
class _Flight:
    """Messages that went in one go: up to which seq, how many bytes, and where on the line the last of them is."""

    last_seq: int
    size_bytes: int
    end: int


class Drain:
    """Call `wake(now)` after a commit on the stream, after credit, and after answers from the peer.

    shared: the line belongs to others, too. `wake` then sends nothing; `send` does when it is this stream's turn.
    gently: the peer drops what it has had, but may have it in its queue only later. Where it may still be working off
    an earlier connection, one that repeats its messages could overtake it there. So for WORKED_OFF_S they are repeated
    one, then two, four ... at a time, each time once all before are settled; full windows of what is new follow.
    """

    def __init__(
        self,
        journal: Journal,
        stream: Stream,
        cursor: Cursor,
        window: int,
        wants: Callable[[Row], bool] | None = None,
        *,
        shared: bool = False,
        gently: bool = False,
    ) -> None:
        self.journal = journal
        self.stream = stream
        self.cursor = cursor
        self.window = window
        self._wants = wants
        self._link: Sender | None = None
        self._next = cursor.position
        self._gently = gently
        # What an earlier connection may have sent without an answer ends here, that of an earlier process, too.
        self._again_end = min(cursor.position + window, stream.committed) if gently else 0
        self._again = 1  # how many of these may go at a time
        self._sent_at = math.inf  # not known of an earlier process
        # Finished with though the cursor is not past them: accepted behind a release, buried, expired.
        self._done: set[int] = set()
        # Of what was read from the cursor on, the seqs that are no messages: from, and to behind the last.
        self._gaps: dict[int, int] = {}
        self._answered = -1  # the last seq that the peer has answered
        self._resend_from: int | None = None
        self._resend_at = 0.0
        self._resend_s = RESEND_S_MIN
        self._progress_at = 0.0
        self.settled = 0
        # How often, since it took something, the peer has given messages back; and the first of the last ones.
        self.given_back = self.given_back_seq = 0
        self.paused = False
        self._shared = shared
        self._flights: deque[_Flight] = deque()
        self.in_flight_bytes = 0

    def attached(self, link: Sender, now: float) -> None:
        """A new link: everything after the cursor goes again, in order, under the same identities."""
        self._link = link
        self._land(None)
        self._next = self.cursor.position
        self._again = 1
        if now - self._sent_at > WORKED_OFF_S:
            self._again_end = 0
        self._resend_from = None
        self._progress_at = now

    def narrow(self, window: int) -> None:
        """Fewer messages at a time. What is settled but not durably so is written: it may fill that."""
        self.window = window
        self.journal.write_cursors()

    def detached(self) -> None:
        """The link is gone; what the peer answered before it went still counts."""
        if self._link is not None:
            self._take_answers(self._link, self._progress_at)
        if self._gently and self._next > self.cursor.position:
            self._again_end = max(self._again_end, self._next)
        self._link = None
        self._land(None)

    @property
    def in_flight(self) -> int:
        return 0 if self._link is None else self._link.unsettled

    @property
    def flows(self) -> bool:
        """Whether the link takes what is appended, and has sent all that was written before it."""
        if self._link is None or not self._link.alive or self.paused or self._resend_from is not None:
            return False
        held = self.stream.unwritten
        return self._next >= (held.start if held is not None and held.rows else self.stream.committed)

    def stalled_since(self) -> float | None:
        """When the peer last settled something, if it still owes us an answer."""
        return self._progress_at if self.in_flight else None

    def resend_at(self) -> float | None:
        return None if self._resend_from is None else self._resend_at

    @property
    def oldest_end(self) -> int | None:
        """Where on the line the oldest messages without an answer end (see send); None if there are none."""
        return self._flights[0].end if self._flights else None

    @property
    def feeding(self) -> bool:
        """Whether a large message has gone in part only."""
        return self._link is not None and self._link.feeding

    @property
    def caught_up(self) -> bool:
        """Whether all that the stream has was sent."""
        return self._next >= self.stream.committed and not self.feeding

    @property
    def held_back(self) -> bool:
        """Whether there is something to send, everything sent was settled, and the peer gives no credit for more."""
        link = self._link
        return (
            link is not None
            and link.alive
            and self._resend_from is None
            and self._next < self.stream.committed
            and not link.unsettled
            and not link.credit
        )

    @property
    def has_more(self) -> bool:
        """Whether `send` would find something it may send, as far as that is known without reading."""
        link = self._link
        if link is None or not link.alive:
            return False
        if link.feeding:
            return True
        if self._resend_from is not None or self.paused or self._next >= self.stream.committed:
            return False
        return link.capacity > 0 and self._room(link) > 0

    def send(self, now: float, bytes_max: int, position: int = 0) -> int:
        """Send about bytes_max: whole messages, or a part of one that is larger than that. How many bytes it was.

        `position` is how many bytes the line was ever handed; it only comes back in `oldest_end`.
        """
        link = self._link
        if link is None or not link.alive:
            return 0
        if link.feeding:
            size = link.feed(bytes_max)
            if self._flights:
                self._flights[-1].end = position + size
        elif self._resend_from is not None or self.paused:
            size = 0
        else:
            size = self._send(link, now, bytes_max, position)
            if link.draining and not size and (self._next >= self.stream.committed or not link.credit):
                link.drained()
        self._move_cursor(link)
        return size

    def wake(self, now: float) -> bool:
        """Take answers, move the cursor, send what there is room for. True when the peer settled something."""
        link = self._link
        if link is None:
            return False
        moved = self._take_answers(link, now)
        if not link.alive:
            return moved
        if moved and not link.unsettled:
            self._again = min(self.window, 2 * self._again)
        if self._resend_from is not None and not link.unsettled and now >= self._resend_at:
            self._next, self._resend_from = self._resend_from, None
        if self._resend_from is None and not self.paused and not self._shared:
            self._send(link, now, None, 0)
            if link.draining and (self._next >= self.stream.committed or not link.credit):
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
            if self._flights:
                self._land(outcome.seq)
        if not link.alive:
            self._move_to(answered)
        return moved

    def _judge(self, outcome: Outcome, now: float) -> bool:
        """What one answer means. Absent from this table is a bug of ours, not the peer's."""
        before, self._answered = self._answered, outcome.seq
        match outcome.kind:
            case OutcomeKind.ACCEPTED:
                self.settled += outcome.count
                if self._resend_from is not None:
                    # Not `count` seqs: what went again has gaps, where others were accepted before. But answers skip
                    # none, so the run begins behind the last one, and that was given back or came after it.
                    self._finish(before + 1, outcome.seq + 1)
                else:
                    self._resend_s = RESEND_S_MIN
                    self.given_back = 0
                return True
            case OutcomeKind.REJECTED:
                row = self.journal.find(self.stream, outcome.seq)
                if row is not None:
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

    def _finish(self, start: int, end: int) -> None:
        """All messages with start <= seq < end were accepted, behind one that was not.

        Only messages count against the window. A crash can leave 65,536 seqs between two of them that were reserved and
        never given out, a failed commit as many as it had rows.
        """
        for gap, after in sorted(self._gaps.items()):
            if gap < end and after > start:
                self._done.update(range(start, gap))
                start = after
        self._done.update(range(start, end))

    def _land(self, seq: int | None) -> None:
        """The peer has answered for everything up to `seq`; None: nothing is in flight any more."""
        flights = self._flights
        while flights and (seq is None or flights[0].last_seq <= seq):
            self.in_flight_bytes -= flights.popleft().size_bytes

    def _room(self, link: Sender) -> int:
        """How many messages may go."""
        if self.in_flight_bytes >= WINDOW_BYTES_MAX:
            return 0
        # What is settled but not yet durably so would be sent again after a crash: it counts as in the window. So does
        # what was accepted behind a message that the peer gives back again and again.
        settled = self.cursor.position - self.cursor.durable + len(self._done)
        room = min(link.capacity, self.window - link.unsettled - settled)
        if self.cursor.position < self._again_end:
            return 0 if link.unsettled else min(room, self._again, self._again_end - self._next)
        return room

    def _send(self, link: Sender, now: float, budget: int | None, position: int) -> int:
        """Send as much as there is room for; with a budget, about that many bytes. How many bytes it was."""
        journal, stream = self.journal, self.stream
        total = 0
        while budget is None or total < budget:
            self._move_cursor(link)
            room = self._room(link)
            if room <= 0 or self._next >= stream.committed:
                break
            bytes_max = BATCH_BYTES_MAX if budget is None else min(BATCH_BYTES_MAX, budget - total)
            rows = journal.read(stream, self._next, room, bytes_max)
            if not rows:
                # Only a gap is left (rows that a failed commit took back, or that did not read).
                self._skip(self._next, stream.committed)
                self._next = stream.committed
                break
            if rows[-1].seq - self._next >= len(rows):
                for end, row in zip([self._next, *(row.seq + 1 for row in rows)], rows, strict=False):
                    self._skip(end, row.seq)
            idle = not link.unsettled
            batch = self._bodies(rows, link)
            if budget is not None and len(batch) > 1 and len(batch[-1][1]) > budget - total:
                # The last one is larger than what is left: it waits for a turn of its own.
                self._next = batch.pop()[0]
            else:
                self._next = rows[-1].seq + 1
            if not batch:
                continue
            if idle:
                self._progress_at = now
            self._sent_at = now
            if budget is None:
                link.send(batch)
                continue
            seq, body = batch[-1]
            if len(body) > budget - total:
                size, sent = len(body), link.send_part(seq, body, budget - total)
            else:
                size = sent = sum([len(body) for _, body in batch])
                link.send(batch)
            total += sent
            self._flights.append(_Flight(seq, size, position + total))
            self.in_flight_bytes += size
            if link.feeding or total > budget // 2:  # the rest is not worth a part of a message
                break
        return total

    def _skip(self, start: int, end: int) -> None:
        """There is no message with start <= seq < end. Between two gaps there is one, so that they are bounded, too."""
        if start < end:
            last = next(reversed(self._gaps), start)
            self._gaps[last if self._gaps.get(last) == start else start] = end

    def _bodies(self, rows: list[Row], link: Sender) -> list[tuple[int, bytes]]:
        """What of these rows is to be sent, and as what."""
        size_max = link.peer_max_message_bytes
        particular = self._wants is not None or bool(self._done)
        batch: list[tuple[int, bytes]] = []
        for row in rows:  # HOT: tests/bench measures it as drain
            seq, _, expires, body = row
            if particular or expires is not None or (size_max and len(body) > size_max):
                found = self._body(row, size_max)
                if found is None:
                    continue
                body = found
            batch.append((seq, body))
        return batch

    def _body(self, row: Row, size_max: int) -> bytes | None:
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
        cursor = self.cursor
        # Half a window behind, the cursor has to be written for more to be sent; until then it waits for company.
        lazily = position - cursor.durable < self.window // 2
        self.journal.advance(self.stream, cursor, position, lazily=lazily)
        if self._done:
            self._done = {seq for seq in self._done if seq >= position}
        if self._gaps:
            self._gaps = {gap: after for gap, after in self._gaps.items() if after > position}
