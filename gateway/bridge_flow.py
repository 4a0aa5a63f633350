"""What the bridge to another broker decides: what of that broker's messages is staged, answered, held; what of ours is
published, and when a cursor may move.

Knows no socket, no clock and no MQTT library: a driver tells what arrived, and does what is returned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from gateway.amqp.message import Message, MessageError, decode
from gateway.mqtt.mapping import append_with
from gateway.mqtt.packets import PublishProperties
from gateway.routing import Router
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.streams import Cursor, Row, Stream

CURSOR = "bridge"
# Not the window: Mosquitto 2.0 sends more than the receive maximum, and who stops reading hears no PINGRESP either.
HELD_BYTES_MAX = 8 << 20
MESSAGE_BYTES = 512  # about what one costs in memory beside its payload
OUT_BYTES_MAX = 4 << 20
READ_ROWS = 256
ANNOTATION_REPEATED = "x-opt-lineside-repeated"


class Taken(NamedTuple):
    """A message of the broker's. `packet_id` is 0 at QoS 0; an empty topic is one that is not UTF-8.

    `known`: nothing new in it, so that it is only acknowledged, in its turn (MQTT 5.0 §4.6).
    """

    topic: str
    qos: int
    packet_id: int
    dup: bool
    payload: bytes
    properties: PublishProperties | None
    known: bool = False


class Inflow:
    """From the broker into the journal: `receive`, then `stage`; `answer` is called with what is on disk.

    One batch of ours is in the journal at a time, and what arrives meanwhile waits here: so a batch that the disk does
    not take goes again before anything that came after it (promise P2), and nobody has to be disconnected for it.
    What is neither staged nor answered is the broker's to send again, so that losing this object loses nothing.

    A crash makes the broker repeat what is in the journal and whose answer it has not read. To bound that, no more than
    `window` messages are in that place, whatever the broker sends: `ask` says when to have it prove what it has read.
    (Mosquitto 2.0 keeps to no receive maximum: acknowledged in order, it sends far more.)
    """

    def __init__(
        self,
        journal: Journal,
        router: Callable[[], Router],
        window: int,
        answer: Callable[[list[Taken]], None],
    ) -> None:
        self._journal = journal
        self._router = router
        self._window = window
        self._unproven = 0  # answered since the last question
        self._asked = 0  # answered before the question that is out
        self._answer = answer
        self._queue: deque[Taken] = deque()
        self._queue_bytes = 0
        self._connection = 0
        self._blocked: str | None = None
        self._closed = False
        self.staged = 0
        self.journaled = 0
        self.repeated = 0

    @property
    def held(self) -> int:
        """Messages that neither the journal nor the broker has off our hands."""
        return len(self._queue)

    @property
    def blocked(self) -> bool:
        """Whether a stream or the disk is full."""
        return self._blocked is not None

    @property
    def full(self) -> bool:
        """Whether to stop reading. A broker that keeps to a window never gets us there; one that knows none does."""
        return (
            self._queue_bytes >= HELD_BYTES_MAX or self._journal.pending.size_bytes > self._journal.space.pending_bytes
        )

    def connected(self) -> None:
        """A new connection: what is unanswered comes again, and answers to the old connection's are void."""
        self._connection += 1
        self._unproven = self._asked = 0
        self._queue.clear()
        self._queue_bytes = 0
        self._blocked = None

    def close(self) -> None:
        """Take no more: what is not staged yet is the broker's to send again."""
        self._closed = True
        self._queue.clear()
        self._queue_bytes = 0

    def receive(self, message: Taken) -> None:
        if self._closed:
            return
        if message.qos == 0 and self._blocked is not None:
            stream = self._router().route(message.topic, 0).stream.name if message.topic else "-"
            if stream == self._blocked:
                self._journal.lose(stream, 0, "refused-qos-0", len(message.payload), CURSOR)
                return
        self._queue.append(message)
        self._queue_bytes += _cost(message)

    def stage(self) -> None:
        """Append what has arrived, as far as the journal takes it."""
        if not self._queue or (self.staged and self not in self._journal.pending.waiting):
            return
        self._blocked = None
        router, queue, journal = self._router(), self._queue, self._journal
        journal.intake()
        age_us = journal.age_us()
        done: list[Taken] = []
        room = self._window - self.staged - self._unproven - self._asked
        while queue and len(done) < room:
            message = queue[0]
            try:
                self._append(message, router, age_us)
            except JournalFull as error:
                if not self._never_fits(message, router):
                    self._blocked = error.stream
                    break
                journal.lose(error.stream, 0, "larger-than-the-stream", len(message.payload), CURSOR)
            done.append(queue.popleft())
            self._queue_bytes -= _cost(message)
        if done:
            self.staged += len(done)
            journal.wait(self, (self._connection, done))

    def ask(self) -> bool:
        """Whether to ask the broker something whose answer proves that it has read our acknowledgements so far."""
        if self._asked or 2 * self._unproven < self._window:
            return False
        self._asked, self._unproven = self._unproven, 0
        return True

    def proven(self) -> None:
        """The answer has come."""
        self._asked = 0

    def _append(self, message: Taken, router: Router, age_us: int) -> None:
        topic, qos, _, dup, payload, properties, known = message
        if known:
            return
        if not topic:
            self._journal.lose("-", 0, "topic-not-utf-8", len(payload), CURSOR)
            return
        route = router.route(topic, qos)
        if dup:
            self.repeated += 1
        if not route.wanted:
            return
        if properties is None and route.ttl_us is None and not dup:
            self._journal.append(route.stream, topic, route.encode, payload)
        else:
            # DUP says that it may be here already; all that MQTT lets one know is worth passing on.
            notes = {ANNOTATION_REPEATED: True} if dup else None
            append_with(self._journal, router.identity, route, qos, payload, properties, age_us, notes)
        self.journaled += 1

    def _never_fits(self, message: Taken, router: Router) -> bool:
        """Whether to wait for room would be to wait for ever."""
        stream = router.route(message.topic, message.qos).stream
        return not self._journal.refuses(stream) and (len(message.payload) > stream.limits.bytes_max or not stream.rows)

    # ------------------------------------------------------------------ the journal's side (Waiter)

    def committed(self, tokens: list[tuple[int, list[Taken]]]) -> None:
        """The commit that holds these messages is on disk: now, and only now, they are acknowledged."""
        self.staged -= sum(len(messages) for _, messages in tokens)
        mine = [each for connection, messages in tokens if connection == self._connection for each in messages]
        self._unproven += sum(each.qos > 0 for each in mine)
        self._answer(mine)
        self.stage()

    def failed(self, tokens: list[tuple[int, list[Taken]]], error: JournalFull) -> None:
        """Nothing of it is on disk: it goes again, before what came after it. The driver calls `stage` in a while."""
        self.staged -= sum(len(messages) for _, messages in tokens)
        self._blocked = error.stream
        for connection, messages in reversed(tokens):
            if connection == self._connection:
                self._queue.extendleft(reversed(messages))
                self._queue_bytes += sum(map(_cost, messages))


def _cost(message: Taken) -> int:
    return len(message.payload) + MESSAGE_BYTES


class Publish(Protocol):
    """Publishes at QoS 1 and returns the packet id; None where it can't just now.

    Raises ValueError for what this broker will never take, saying why.
    """

    def __call__(self, topic: str, message: Message, expiry_s: int | None) -> int | None: ...


@dataclass(slots=True)
class _Sent:
    seq: int
    size: int
    done: bool = False


@dataclass(slots=True)
class _Feed:
    stream: Stream
    cursor: Cursor
    next: int
    unacked: deque[_Sent] = field(default_factory=deque)


class Outflow:
    """From the inbound streams to the broker, in order, within the window; cursors move over what was acknowledged."""

    def __init__(self, journal: Journal, streams: list[Stream], window: int) -> None:
        self._journal = journal
        self._window = window
        self._feeds = [_Feed(s, c := journal.cursor(s, CURSOR, "mqtt"), c.position) for s in streams]
        self._waiting: dict[int, tuple[_Feed, _Sent]] = {}
        self._bytes = 0
        self.published = 0
        self.refused = 0

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def rewind(self) -> None:
        """Whoever kept what is unacknowledged is gone: it goes again from the cursors on."""
        self._waiting.clear()
        self._bytes = 0
        for feed in self._feeds:
            feed.unacked.clear()
            feed.next = feed.cursor.position

    def pump(self, publish: Publish, receive_maximum: int) -> None:
        """Publish what there is room for; `receive_maximum` is what the broker grants (MQTT 5.0 §3.3.4)."""
        for feed in self._feeds:
            self._pump(feed, publish, receive_maximum)
            self._settle(feed)
        # Who was first is last next time, so that no stream's backlog stands before another's messages for good.
        self._feeds = self._feeds[1:] + self._feeds[:1]

    def _pump(self, feed: _Feed, publish: Publish, receive_maximum: int) -> None:
        stream, cursor = feed.stream, feed.cursor
        # A full stream may have been taken from under a reader that is far behind.
        feed.next = max(feed.next, cursor.position)
        while feed.next < stream.committed:
            # What is settled but not yet durably so would go again after a crash: it counts as in the window.
            behind = sum(f.cursor.position - f.cursor.durable for f in self._feeds)
            room = min(receive_maximum, self._window - behind) - len(self._waiting)
            if room <= 0 or (self._bytes >= OUT_BYTES_MAX and self._waiting):
                return
            rows = self._journal.read(stream, feed.next, min(READ_ROWS, room))
            if not rows:
                feed.next = stream.committed
                return
            for row in rows:
                if not self._offer(feed, row, publish):
                    return
                feed.next = row.seq + 1
                if self._bytes >= OUT_BYTES_MAX:
                    return

    def _offer(self, feed: _Feed, row: Row, publish: Publish) -> bool:
        """Publish one row, or enter it where it belongs. False when it has to wait."""
        expiry_s: int | None = None
        if row.expires_age_us is not None:
            left_us = row.expires_age_us - self._journal.age_us()
            if left_us <= 0:
                self._journal.lose(feed.stream.name, row.seq, "expired", len(row.body), CURSOR)
                return True
            expiry_s = max(1, left_us // 1_000_000)
        try:
            packet_id = publish(row.topic, decode(row.body), expiry_s)
        except (MessageError, ValueError) as error:
            self._bury(feed, row, "lineside:not-publishable", str(error))
            return True
        if packet_id is None:
            return False
        sent = _Sent(row.seq, len(row.body))
        feed.unacked.append(sent)
        self._waiting[packet_id] = (feed, sent)
        self._bytes += sent.size
        return True

    def acked(self, packet_id: int, refusal: tuple[str, str] | None) -> None:
        """The broker has it; or, on 5.0, does not want it, with a condition and a text: a dead letter."""
        entry = self._waiting.pop(packet_id, None)
        if entry is None:
            return
        feed, sent = entry
        sent.done = True
        self._bytes -= sent.size
        if refusal is None:
            self.published += 1
        else:
            for row in self._journal.read(feed.stream, sent.seq, 1):
                if row.seq == sent.seq:
                    self._bury(feed, row, *refusal)
        self._settle(feed)

    def _bury(self, feed: _Feed, row: Row, condition: str, text: str) -> None:
        self.refused += 1
        self._journal.bury(feed.stream, row, condition, text)

    def _settle(self, feed: _Feed) -> None:
        unacked = feed.unacked
        while unacked and unacked[0].done:
            unacked.popleft()
        self._journal.advance(feed.stream, feed.cursor, unacked[0].seq if unacked else feed.next)

    def describe(self) -> dict[str, Any]:
        return {"published": self.published, "refused": self.refused, "in_flight": self.in_flight}


def release(journal: Journal, keep: frozenset[str] = frozenset()) -> list[str]:
    """Drop the bridge's cursors on all streams but these: a bridge that is no more must not hold rows for ever."""
    left = [s for s in journal.streams.values() if CURSOR in s.cursors and s.name not in keep]
    for stream in left:
        journal.drop_cursor(stream, CURSOR)
    return [s.name for s in left]
