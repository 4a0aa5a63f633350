"""MQTT sessions as cursors: what a client subscribed to, how far it has read, what it has not acknowledged.

A session reads the journal's rows in order and hands them to its client within the client's window. Its place moves
over rows that are acknowledged or that it does not want. Nothing is copied for it. Knows no socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.amqp.message import Message
from gateway.mqtt.topics import filter_matches
from storeforward.journal import Journal
from storeforward.streams import Cursor, Row, Stream

READ_ROWS = 256
PUMP_ROWS_MAX = 4096


class Outlet(Protocol):
    """The client's connection, as far as a session needs it."""

    @property
    def window_left(self) -> int: ...
    @property
    def congested(self) -> bool: ...
    def publish(self, topic: str, message: Message, qos: int, dup: bool) -> int | None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Subscription:
    """`since`: by stream name, the first seq that the subscription is about."""

    filter: str
    qos: int
    options: int
    identifier: int | None
    since: dict[str, int]


@dataclass(slots=True)
class _Sent:
    seq: int
    done: bool


@dataclass(slots=True)
class Feed:
    """One session's reading of one stream. `high`: one past the highest seq ever sent, so that a repeat is marked."""

    stream: Stream
    cursor: Cursor
    next: int
    high: int
    unacked: deque[_Sent] = field(default_factory=deque)


class Session:
    """State that outlives a connection. `durable` sessions keep theirs in the journal."""

    def __init__(self, client_id: str, durable: bool) -> None:
        self.client_id = client_id
        self.durable = durable
        self.expiry_s: int | None = 0
        self.gone_age_us: int | None = None
        self.subscriptions: dict[str, Subscription] = {}
        self.suspended: dict[str, Subscription] = {}  # what access rules forbid now; a reload may allow it again
        self.feeds: dict[Stream, Feed] = {}
        self.outlet: Outlet | None = None
        self._waiting: dict[int, tuple[Feed, _Sent]] = {}
        self._wanted: dict[str, int] = {}

    @property
    def cursor_name(self) -> str:
        return f"mqtt:{self.client_id}"

    def attach(self, outlet: Outlet) -> None:
        """A connection took the session over: everything not acknowledged goes again, in order (MQTT 5.0 §4.6)."""
        self.outlet = outlet
        self.gone_age_us = None
        self._rewind()

    def detach(self) -> None:
        self.outlet = None
        self._rewind()

    def _rewind(self) -> None:
        self._waiting.clear()
        for feed in self.feeds.values():
            feed.unacked.clear()
            feed.next = feed.cursor.position

    def changed(self) -> None:
        self._wanted.clear()

    def wants(self, stream: Stream, row: Row) -> int:
        """The QoS to deliver a row at, -1 if no subscription takes it."""
        qos = self._wanted.get(row.topic)
        if qos is None:
            if len(self._wanted) > 1000:
                self._wanted.clear()
            qos = max((s.qos for s in self.subscriptions.values() if filter_matches(s.filter, row.topic)), default=-1)
            self._wanted[row.topic] = qos
        if qos < 0:
            return -1
        # Only rows from before a subscription need the slower look.
        return max(
            (
                s.qos
                for s in self.subscriptions.values()
                if row.seq >= s.since.get(stream.name, 0) and filter_matches(s.filter, row.topic)
            ),
            default=-1,
        )

    def pump(self, journal: Journal, decoded: Callable[[Stream, Row], Message]) -> None:
        """Send what there is, as far as the client's window and the socket let us."""
        outlet = self.outlet
        if outlet is None:
            return
        for feed in self.feeds.values():
            self._pump_feed(feed, outlet, journal, decoded)
        outlet.flush()

    def _pump_feed(
        self, feed: Feed, outlet: Outlet, journal: Journal, decoded: Callable[[Stream, Row], Message]
    ) -> None:
        stream = feed.stream
        feed.next = max(feed.next, feed.cursor.position)
        budget = PUMP_ROWS_MAX
        while feed.next < stream.committed and budget > 0 and not outlet.congested:
            rows = journal.read(stream, feed.next, min(READ_ROWS, budget))
            if not rows:
                feed.next = stream.committed
                break
            budget -= len(rows)
            for row in rows:
                if not self._offer(feed, row, outlet, journal, decoded):
                    self._settle(feed, journal)
                    return
                feed.next = row.seq + 1
        self._settle(feed, journal)

    def _offer(
        self, feed: Feed, row: Row, outlet: Outlet, journal: Journal, decoded: Callable[[Stream, Row], Message]
    ) -> bool:
        """Send one row if it is wanted. False when the client's window is full."""
        qos = self.wants(feed.stream, row)
        if qos < 0:
            return True
        if row.expires_age_us is not None and row.expires_age_us <= journal.age_us():
            journal.lose(feed.stream.name, row.seq, "expired", len(row.body), self.cursor_name)
            return True
        message = decoded(feed.stream, row)
        qos = min(qos, int(message.annotations.get("x-opt-lineside-qos", 1)), 1)
        if qos and outlet.window_left <= 0:
            return False
        packet_id = outlet.publish(row.topic, message, qos, qos > 0 and row.seq < feed.high)
        if packet_id is None:
            return False
        if qos:
            sent = _Sent(row.seq, False)
            feed.unacked.append(sent)
            self._waiting[packet_id] = (feed, sent)
        feed.high = max(feed.high, row.seq + 1)
        return True

    def acked(self, packet_ids: list[int], journal: Journal) -> None:
        for packet_id in packet_ids:
            entry = self._waiting.pop(packet_id, None)
            if entry is not None:
                entry[1].done = True
        for feed in self.feeds.values():
            self._settle(feed, journal)

    @staticmethod
    def _settle(feed: Feed, journal: Journal) -> None:
        unacked = feed.unacked
        while unacked and unacked[0].done:
            unacked.popleft()
        journal.advance(feed.stream, feed.cursor, unacked[0].seq if unacked else feed.next)
