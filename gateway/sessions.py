"""MQTT sessions as cursors: what a client subscribed to, how far it has read, what is under way to it and from it.

A session reads the journal's rows in order and hands them to its client within the client's window. Its place moves
over rows that are finished or that it does not want. Nothing is copied for it. What is under way at QoS 2 is in the
journal before it is on the wire, so that each message is delivered once across the client's restarts and ours
(MQTT 5.0 §4.3.3). Knows no socket and no packet.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from gateway.groups import Group
from gateway.mqtt.delivery import Delivery
from gateway.retained import Retained, RetainedStore
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.sealed_tables import seal_due
from storeforward.streams import Cursor, Row, Stream

if TYPE_CHECKING:
    from gateway.shares import ShareGroup

READ_ROWS = 256
PUMP_ROWS_MAX = 4096
TURN_ROWS_MAX = 1024  # that a client is sent before others have their turn
# Rows that a client may have acknowledged without the journal knowing: they would go again after a crash.
LAZY_ROWS_MAX = 64
# Rows of a stream that may be sent to a client behind one that it does not acknowledge.
AHEAD_ROWS_MAX = 4096
# Retained messages that one session is owed: more than a gateway retains by default.
DUE_MAX = 200_000


class Arrival:
    """A message of QoS 2 that came from the client and is not released yet."""

    __slots__ = ("content", "failed")

    def __init__(self, content: int | None = None) -> None:
        self.content = content  # a hash of it; None: it came before the daemon's start
        self.failed = False  # to be stored


class Outlet(Protocol):
    """The client's connection, as far as a session needs it."""

    @property
    def window_left(self) -> int: ...
    @property
    def congested(self) -> bool: ...
    def takes(self, delivery: Delivery, qos: int, identifiers: tuple[int, ...]) -> bool: ...
    def in_use(self, packet_ids: Iterable[int]) -> None: ...
    def reserve(self, qos: int, packet_id: int | None = None) -> int | None: ...
    def deliver(
        self,
        delivery: Delivery,
        qos: int,
        retain: bool,
        identifiers: tuple[int, ...],
        dup: bool = False,
        packet_id: int | None = None,
    ) -> int | None: ...
    def pubrel(self, packet_ids: Iterable[int]) -> None: ...
    def flush(self) -> None: ...
    def come_back(self) -> None: ...
    def owes(self) -> None:
        """Retained messages are due: have `pump_due` called when it is this client's turn for them."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """`since`: by stream name, the first seq that the subscription is about. `filter` without `$share/name/`."""

    filter: str
    qos: int
    options: int
    identifier: int | None
    since: dict[str, int]
    share: str | None = None

    @property
    def no_local(self) -> bool:
        return bool(self.options & 1)

    @property
    def retain_as_published(self) -> bool:
        return bool(self.options & 2)


@dataclass(frozen=True, slots=True)
class Want:
    """How a session wants the messages of one topic, from `since` on; `among` for the few from before that."""

    qos: int
    retain_as_published: bool
    identifiers: tuple[int, ...]
    no_local: bool
    since: int
    among: tuple[Subscription, ...]

    @classmethod
    def of(cls, stream: str, among: Sequence[Subscription]) -> Want:
        """Overlapping subscriptions give one delivery, at the highest QoS, with every identifier (§3.3.4)."""
        return cls(
            max(s.qos for s in among),
            any(s.retain_as_published for s in among),
            tuple(s.identifier for s in among if s.identifier is not None),
            all(s.no_local for s in among),
            max(s.since.get(stream, 0) for s in among),
            tuple(among),
        )

    def at(self, stream: str, seq: int) -> Want | None:
        """As of that row: subscriptions made after it do not count."""
        if seq >= self.since:
            return self
        among = [s for s in self.among if seq >= s.since.get(stream, 0)]
        return Want.of(stream, among) if among else None


# A committed row as the sessions that want it are handed it: seq, message, how the session wants it.
Item = tuple[int, Delivery, Want]


class SentState(IntEnum):
    """Of a message on its way to a client; the numbers stand in the journal."""

    SENT = 1
    RELEASED = 2  # the client has it: only the release and its answer are left
    DONE = 3


@dataclass(eq=False, slots=True)
class Sent:
    """`place`: the feed it was read from, the group that handed it out, or None: retained, and seq is its number.

    `restored`: begun before a restart, so that what its subscriptions ask for has to be looked up again.
    """

    packet_id: int
    place: Feed | Group | None
    seq: int
    qos: int
    state: SentState = SentState.SENT
    tried: bool = False
    retain: bool = False
    identifiers: tuple[int, ...] = ()
    restored: bool = False


@dataclass(eq=False, slots=True)
class Feed:
    """One session's reading of one stream.

    `order`: what was sent and is not passed by the cursor. `again`: of that, what a new connection has to be sent.
    `live`: nothing before the newest commit is wanted that was not sent, wherever `next` stands.
    `parked`: the row at `next` waits for a client that is away.
    `reached`: what is before it was looked at once: sent, or not wanted. At QoS 0 it is not sent again.
    """

    stream: Stream
    cursor: Cursor
    next: int
    order: deque[Sent] = field(default_factory=deque)
    again: dict[int, Sent] = field(default_factory=dict)
    live: bool = False
    parked: bool = False
    reached: int = 0


@dataclass(frozen=True, slots=True)
class Due:
    """A retained message that a new subscription is to be given."""

    topic: str
    qos: int
    identifiers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    delivery: Delivery
    qos: int
    retain: bool
    identifiers: tuple[int, ...]
    packet_id: int
    sent: Sent | None


@dataclass(frozen=True, slots=True)
class _Release:
    """PUBRELs that wait for the commit that remembers their PUBRECs."""

    stamp: int
    packet_ids: list[int]


class Desk(Protocol):
    """What a session asks its owner."""

    journal: Journal
    retained: RetainedStore

    def delivery(self, stream: Stream, row: Row) -> Delivery: ...
    def audience(self, stream: Stream, topic: str) -> dict[Session | ShareGroup, Want]: ...
    def decoded(self, topic: str, body: bytes, expires_age_us: int | None) -> Delivery: ...


class Session:
    """State that outlives a connection. `durable` sessions keep theirs in the journal."""

    def __init__(self, client_id: str, durable: bool, desk: Desk) -> None:
        self.client_id = client_id
        self.durable = durable
        self.expiry_s: int | None = 0
        self.gone_age_us: int | None = None
        self.subscriptions: dict[str, Subscription] = {}
        self.suspended: dict[str, Subscription] = {}  # what access rules forbid now; a reload may allow it again
        self.feeds: dict[Stream, Feed] = {}
        self.needs: Counter[Stream] = Counter()  # how many subscriptions want something of each
        self.groups: dict[str, ShareGroup] = {}
        self.outlet: Outlet | None = None
        self.incoming: dict[int, Arrival] = {}
        self.sent: dict[int, Sent] = {}
        self.due: dict[int, Due] = {}
        self.no_local = 0  # how many of them are so
        self._desk = desk
        self._journal = desk.journal
        self._searches = 0  # for what is retained for new subscriptions
        self._due_next = 1
        self._due_queue: deque[int] = deque()  # what of it is to be sent, again or for the first time, in order
        self._due_fresh: set[Due] = set()  # what of it was never sent
        self._due_sent: dict[int, Sent] = {}
        self._due_again: dict[int, Sent] = {}
        self._plan: list[_Planned] | None = None
        self._stamp = 0

    @property
    def cursor_name(self) -> str:
        return f"mqtt:{self.client_id}"

    @property
    def planning(self) -> bool:
        """Whether messages wait for a commit before they may be sent: nothing may overtake them."""
        return self._plan is not None

    # ------------------------------------------------------------------ connections

    def attach(self, outlet: Outlet) -> None:
        """A connection took the session over: what is not finished goes again, in order (MQTT 5.0 §4.4, §4.6)."""
        self.outlet = outlet
        self.gone_age_us = None
        self._rewind()
        outlet.in_use(s.packet_id for s in self.sent.values() if s.state is SentState.SENT)
        outlet.pubrel([s.packet_id for s in self.sent.values() if s.state is SentState.RELEASED])
        for group in self.groups.values():
            group.join(self)

    def detach(self) -> None:
        self.outlet = None
        for group in self.groups.values():
            group.leave(self)
        self._rewind()

    def _rewind(self) -> None:
        self._stamp += 1
        self._plan = None
        self._searches = 0
        # What a group handed out goes to its other members.
        for sent in [s for s in self.sent.values() if isinstance(s.place, Group)]:
            del self.sent[sent.packet_id]
        self._due_again = {n: s for n, s in self._due_sent.items() if s.state is not SentState.DONE}
        self._due_queue = deque(n for n in self.due if n not in self._due_sent or n in self._due_again)
        for feed in self.feeds.values():
            feed.again = {s.seq: s for s in feed.order}
            feed.parked = False
            # Not for the newest commit only: what came while nobody was here waits, too.
            feed.live = feed.live and not feed.order
            if not feed.live:  # else `woken` will say where to go on, perhaps about a commit that is being told
                feed.next = feed.cursor.position

    def restore(self, stream: Stream | None, seq: int, packet_id: int, state: SentState) -> None:
        """What the journal remembers of a message of QoS 2 under way. In order of stream and seq."""
        feed = None if stream is None else self.feeds.get(stream)
        sent = Sent(packet_id, feed, seq, 2, state, tried=True, restored=True)
        if feed is not None:
            if seq < feed.cursor.position:
                if state is SentState.DONE:
                    self._journal.execute(
                        "DELETE FROM mqtt_outgoing WHERE client_id = ? AND stream = ? AND seq = ?",
                        (self.client_id, feed.stream.id, seq),
                    )
                    return
                sent.state = SentState.RELEASED  # a limit moved the cursor past it, and the client may have its id
            feed.order.append(sent)
        elif stream is not None:
            return
        else:
            self._due_sent[seq] = sent
        if state is not SentState.DONE:
            self.sent[packet_id] = sent

    # ------------------------------------------------------------------ retained messages due

    def search_begins(self) -> None:
        """It is about to be found out what the client is owed; until then it is sent nothing newer, which would be
        followed by what was retained before.
        """
        self._searches += 1

    def search_ends(self) -> None:
        """It is owed all of it; the caller pumps."""
        self._searches -= 1

    def owe(self, messages: Iterable[tuple[Retained, int, tuple[int, ...]]]) -> bool:
        """Retained messages to give the client before anything newer; whether that waits for a commit."""
        added = False
        for message, qos, identifiers in messages:
            due = Due(message.topic, qos, identifiers)
            if due in self._due_fresh:
                continue  # a client that subscribes again and again, and does not read, is owed no more by it
            if len(self.due) >= DUE_MAX:
                self._journal.lose("retained", 0, "too-many-due", message.size, self.cursor_name)
                continue
            self.due[self._due_next] = due
            self._due_fresh.add(due)
            self._due_queue.append(self._due_next)
            if self.durable:
                topic = seal_due(self._journal.seal, self.client_id, self._due_next, message.topic)
                self._journal.execute(
                    "INSERT INTO mqtt_retained_due VALUES (?, ?, ?, ?, ?)",
                    (self.client_id, self._due_next, topic, qos, json.dumps(identifiers)),
                )
                added = True
            self._due_next += 1
        return added

    def restore_due(self, n: int, due: Due) -> None:
        self.due[n] = due
        if n not in self._due_sent:
            self._due_fresh.add(due)
        self._due_next = max(self._due_next, n + 1)

    def pump_due(self, count: int) -> None:
        """Send up to so many of the retained messages that are due, as far as the client takes them."""
        outlet = self.outlet
        if outlet is None or self._plan is not None:
            return
        more = self._pump_due(outlet, count)
        outlet.flush()
        if self._plan is not None:
            self._journal.wait(self, self._stamp)
        elif not self._due_queue:
            self.pump()
        elif more:
            outlet.owes()

    def _pump_due(self, outlet: Outlet, count: int) -> bool:
        """Whether it stopped at the count, and not for the client."""
        queue = self._due_queue
        for _ in range(min(count, len(queue))):
            n = queue[0]
            due = self.due.get(n)
            if due is None:
                queue.popleft()
                continue
            if outlet.congested:
                return False
            again = self._due_again.get(n)
            if again is not None and again.state is SentState.RELEASED:
                del self._due_again[n]
                queue.popleft()
                continue
            delivery = self._retained(due)
            qos = 0 if delivery is None else min(due.qos, delivery.qos) if again is None else again.qos
            if delivery is None or not outlet.takes(delivery, qos, due.identifiers):
                queue.popleft()
                if delivery is not None:
                    self._too_large(delivery, "retained", 0)
                if again is None:
                    self._forget_due(n)
                else:
                    del self._due_again[n]
                    self._abandon([again])
                continue
            if not qos:
                queue.popleft()
                self._now(_Planned(delivery, 0, True, due.identifiers, 0, None), outlet)
                self._forget_due(n)
                continue
            if not self._send(delivery, qos, True, due.identifiers, None, n, outlet, again):
                return False
            queue.popleft()
            self._due_again.pop(n, None)
        return True

    def _retained(self, due: Due) -> Delivery | None:
        """None where it is gone, has expired, or has been replaced by one that the subscription gets as a live one."""
        desk = self._desk
        message = desk.retained.get(due.topic)
        if message is None or (message.expires_age_us is not None and message.expires_age_us <= self._journal.age_us()):
            return None
        stream = self._journal.streams.get(message.stream)
        if stream is not None:
            want = desk.audience(stream, due.topic).get(self)
            if want is None:
                return None  # not subscribed any more, or not allowed to be
            if message.seq is not None and message.seq >= want.since:
                return None
        body = desk.retained.body(due.topic)
        return None if body is None else desk.decoded(due.topic, body, message.expires_age_us)

    def _forget_due(self, n: int) -> None:
        due = self.due.pop(n, None)
        sent = self._due_sent.pop(n, None)
        if due is not None and sent is None:
            self._due_fresh.discard(due)
        self._due_again.pop(n, None)
        if self.durable:
            self._journal.execute("DELETE FROM mqtt_retained_due WHERE client_id = ? AND n = ?", (self.client_id, n))
            if sent is not None and sent.qos == 2:
                self._journal.execute(
                    "DELETE FROM mqtt_outgoing WHERE client_id = ? AND stream = 0 AND seq = ?", (self.client_id, n)
                )

    # ------------------------------------------------------------------ sending

    def woken(self, stream: Stream, first_seq: int) -> None:
        """A commit added rows this session wants, from `first_seq` on: it is behind until it has been pumped."""
        feed = self.feeds.get(stream)
        if feed is not None and feed.live:
            feed.live = False
            feed.next = max(feed.next, first_seq)

    def live(self, stream: Stream, items: list[Item]) -> bool:
        """Take rows of the newest commit, of which nothing before was left unsent. False if this session can't.

        HOT: a thousand sessions come by here with each message (tests/bench, fan-out). What is not plain is `pump`'s.
        """
        outlet = self.outlet
        feed = self.feeds.get(stream)
        if (
            outlet is None
            or feed is None
            or not feed.live
            or self._due_queue
            or self._searches
            or self._plan is not None
            or outlet.congested
        ):
            return False
        if len(feed.order) >= AHEAD_ROWS_MAX:
            return False
        for seq, delivery, want in items:
            if seq < feed.next:
                continue  # a SUBACK of the same commit has had the session pumped already
            qos = delivery.qos if delivery.qos < want.qos else want.qos
            if (
                seq < want.since
                or want.no_local
                or delivery.expires_age_us is not None
                or (qos == 2 and self.durable)
                or not outlet.takes(delivery, qos, want.identifiers)
            ):
                break
            retain = delivery.retain and want.retain_as_published
            number = outlet.deliver(delivery, qos, retain, want.identifiers)
            if number is None:
                break
            if qos:
                sent = self.sent[number] = Sent(number, feed, seq, qos, SentState.SENT, True, retain, want.identifiers)
                feed.order.append(sent)
            feed.next = seq + 1
        else:
            feed.reached = feed.next
            outlet.flush()
            return True
        feed.next = feed.reached = seq
        feed.live = False
        self.pump()
        return True

    @property
    def behind(self) -> bool:
        """Whether `pump` might find something to send."""
        return bool(self._due_queue) or not all([f.live for f in self.feeds.values()])

    def caught_up(self) -> None:
        """Move the place over rows that nobody here wants; they hold up the deletion of what is before them."""
        for feed in self.feeds.values():
            if feed.cursor.position >= feed.stream.committed or feed.order:
                continue
            if feed.live:
                feed.next = feed.stream.committed
            elif self.outlet is None and not feed.parked:
                self._skip_unwanted(feed)
            else:
                continue
            self._journal.advance(feed.stream, feed.cursor, feed.next, lazily=True)

    def _skip_unwanted(self, feed: Feed) -> None:
        """For a client that is away: find the first row that it will want."""
        stream = feed.stream
        rows = self._journal.read(stream, feed.next, PUMP_ROWS_MAX)
        for row in rows:
            want = self._desk.audience(stream, row.topic).get(self)
            if want is not None and want.at(stream.name, row.seq) is not None:
                feed.parked = True
                return
            feed.next = row.seq + 1
        if not rows:
            feed.next = stream.committed
        feed.live = feed.next >= stream.committed

    def pump(self) -> None:
        """Send what there is, as far as the client's window and the socket let us."""
        outlet = self.outlet
        if outlet is None or self._plan is not None:
            return
        if self._due_queue:  # before anything newer
            outlet.flush()
            outlet.owes()
            return
        if self._searches:
            return
        more = False
        for feed in self.feeds.values():
            if not feed.live:
                more = self._pump_feed(feed, outlet) or more
        outlet.flush()
        if more:
            outlet.come_back()
        if self._plan is not None:
            self._journal.wait(self, self._stamp)

    def _pump_feed(self, feed: Feed, outlet: Outlet) -> bool:
        """Whether it stopped only to let others have a turn: then nothing else will wake it."""
        stream = feed.stream
        feed.next = max(feed.next, feed.cursor.position)
        budget = TURN_ROWS_MAX
        done = True
        while done and feed.next < stream.committed and budget > 0 and not outlet.congested:
            rows = self._journal.read(stream, feed.next, min(READ_ROWS, budget))
            if not rows:
                feed.next = stream.committed
                break
            budget -= len(rows)
            for row in rows:
                if not self._offer(feed, row, outlet):
                    done = False
                    break
                feed.next = row.seq + 1
        feed.reached = max(feed.reached, feed.next)
        if feed.again:
            self._give_up(feed)
        feed.live = feed.next >= stream.committed and not feed.again
        self._settle(feed)
        return done and budget <= 0 and not feed.live and not outlet.congested

    def _give_up(self, feed: Feed) -> None:
        """Of what was to be sent again, rows that are not there any more (the ledger says why)."""
        gone = [feed.again.pop(seq) for seq in [seq for seq in feed.again if seq < feed.next]]
        self._abandon([sent for sent in gone if sent.state is SentState.SENT])

    def _abandon(self, gone: list[Sent]) -> None:
        """These can't be sent again. Of QoS 2 the client may have the id, and would take a new message for the old.

        A release frees it on both sides, whether the client has it or not (§4.3.3, and reason 0x92 of §3.7.2.1).
        """
        self.acked([sent.packet_id for sent in gone if sent.qos < 2 or not sent.tried])
        release = [sent.packet_id for sent in gone if sent.qos == 2 and sent.tried]
        if release:
            self.received(release)

    def _offer(self, feed: Feed, row: Row, outlet: Outlet) -> bool:
        """Send one row if it is wanted. False when the client's window is full."""
        again = feed.again.get(row.seq) if feed.again else None
        if again is not None:
            # Begun once, it is finished, whatever was unsubscribed or expired meanwhile (MQTT-3.10.4-3).
            if again.state is SentState.SENT:
                delivery = self._desk.delivery(feed.stream, row)
                if again.restored:
                    want = self._desk.audience(feed.stream, row.topic).get(self)
                    want = None if want is None else want.at(feed.stream.name, row.seq)
                    if want is not None:
                        again.identifiers = want.identifiers
                        again.retain = delivery.retain and want.retain_as_published
                if not self._send(delivery, again.qos, again.retain, again.identifiers, feed, row.seq, outlet, again):
                    return False
            del feed.again[row.seq]
            return True
        if row.seq < feed.reached:
            return True
        if len(feed.order) >= AHEAD_ROWS_MAX:
            return False
        want = self._desk.audience(feed.stream, row.topic).get(self)
        if want is not None and row.seq < want.since:
            want = want.at(feed.stream.name, row.seq)
        if want is None:
            return True
        if row.expires_age_us is not None and row.expires_age_us <= self._journal.age_us():
            self._journal.lose(feed.stream.name, row.seq, "expired", len(row.body), self.cursor_name)
            return True
        delivery = self._desk.delivery(feed.stream, row)
        if want.no_local and delivery.source == self.client_id:
            return True
        identifiers = want.identifiers
        qos = min(want.qos, delivery.qos)
        if not outlet.takes(delivery, qos, identifiers):
            self._too_large(delivery, feed.stream.name, row.seq)
            return True
        retain = delivery.retain and want.retain_as_published
        return self._send(delivery, qos, retain, identifiers, feed, row.seq, outlet, None)

    def _send(
        self,
        delivery: Delivery,
        qos: int,
        retain: bool,
        identifiers: tuple[int, ...],
        feed: Feed | None,
        seq: int,
        outlet: Outlet,
        again: Sent | None,
    ) -> bool:
        if not qos:
            if self._plan is not None:
                self._plan.append(_Planned(delivery, 0, retain, identifiers, 0, None))
                return True
            return outlet.deliver(delivery, 0, retain, identifiers) is not None
        if again is not None:
            if outlet.reserve(qos, again.packet_id) is None:
                return False
            self._now(_Planned(delivery, qos, retain, identifiers, again.packet_id, again), outlet)
            return True
        if self._plan is None and not (qos == 2 and self.durable):  # the usual case
            number = outlet.deliver(delivery, qos, retain, identifiers)
            if number is None:
                return False
            self._begin(Sent(number, feed, seq, qos, SentState.SENT, True, retain, identifiers))
            return True
        number = outlet.reserve(qos)
        if number is None:
            return False
        sent = Sent(number, feed, seq, qos, SentState.SENT, False, retain, identifiers)
        self._begin(sent)
        if qos == 2 and self.durable:
            if self._plan is None:
                self._plan = []
            self._journal.execute(
                "INSERT OR REPLACE INTO mqtt_outgoing VALUES (?, ?, ?, ?, ?)",
                (self.client_id, 0 if feed is None else feed.stream.id, seq, number, SentState.SENT),
            )
        self._now(_Planned(delivery, qos, retain, identifiers, number, sent), outlet)
        return True

    def _begin(self, sent: Sent) -> None:
        self.sent[sent.packet_id] = sent
        if isinstance(sent.place, Feed):
            order = sent.place.order
            if order and order[-1].seq > sent.seq:
                # After a restart: those of QoS 2 are remembered, and this one stands before some of them.
                order.insert(bisect_left(order, sent.seq, key=lambda s: s.seq), sent)
            else:
                order.append(sent)
        elif sent.place is None:
            self._due_sent[sent.seq] = sent
            self._due_fresh.discard(self.due[sent.seq])

    def _now(self, planned: _Planned, outlet: Outlet) -> None:
        """Send, or wait behind what waits for its commit, so that the order stays."""
        if self._plan is not None:
            self._plan.append(planned)
            return
        sent = planned.sent
        outlet.deliver(
            planned.delivery,
            planned.qos,
            planned.retain,
            planned.identifiers,
            sent is not None and sent.tried,
            planned.packet_id or None,
        )
        if sent is not None:
            sent.tried = True

    def _too_large(self, delivery: Delivery, stream: str, seq: int) -> None:
        """Larger than the client takes: dropped as if it had been sent (MQTT-3.1.2-25), and in the ledger."""
        self._journal.lose(stream, seq, "larger-than-client-takes", len(delivery.payload), self.cursor_name)

    # ------------------------------------------------------------------ the journal's side (Waiter)

    def committed(self, tokens: list[object]) -> None:
        for token in tokens:
            outlet = self.outlet
            if isinstance(token, _Release):
                if token.stamp == self._stamp and outlet is not None:
                    outlet.pubrel(token.packet_ids)
            elif token == self._stamp and outlet is not None and self._plan is not None:
                plan, self._plan = self._plan, None
                for planned in plan:
                    self._now(planned, outlet)
                self.pump()
        if self.outlet is not None:
            self.outlet.flush()

    def failed(self, tokens: list[object], error: JournalFull) -> None:
        """The statements are staged again by themselves: what waits for them goes on waiting."""
        for token in tokens:
            self._journal.wait(self, token)

    # ------------------------------------------------------------------ the client's answers

    def acked(self, packet_ids: Iterable[int]) -> None:
        """PUBACK: these are finished. Of QoS 2: PUBCOMP, or a PUBREC that refuses."""
        places: dict[Feed, None] = {}
        for packet_id in packet_ids:
            sent = self.sent.pop(packet_id, None)
            if sent is None:
                continue
            sent.state = SentState.DONE
            place = sent.place
            if isinstance(place, Feed):
                places[place] = None
                if sent.qos == 2 and self.durable:
                    self._remember(sent, place.stream.id)
            elif place is None:
                self._forget_due(sent.seq)
            else:
                place.done(self, sent.seq)
        for place in places:
            self._settle(place)

    def received(self, packet_ids: list[int]) -> None:
        """PUBREC: the client has these. They are released once that is on disk."""
        for packet_id in packet_ids:
            sent = self.sent.get(packet_id)
            if sent is None:
                continue
            sent.state = SentState.RELEASED
            if self.durable:
                self._remember(sent, sent.place.stream.id if isinstance(sent.place, Feed) else 0)
        if self.durable:
            self._journal.wait(self, _Release(self._stamp, packet_ids))
        elif self.outlet is not None:
            self.outlet.pubrel(packet_ids)

    def _remember(self, sent: Sent, stream_id: int) -> None:
        self._journal.execute(
            "UPDATE mqtt_outgoing SET state = ? WHERE client_id = ? AND stream = ? AND seq = ?",
            (sent.state, self.client_id, stream_id, sent.seq),
        )

    def _settle(self, feed: Feed) -> None:
        order = feed.order
        exact = False
        while order and order[0].state is SentState.DONE and order[0].seq < feed.next:
            exact = exact or order[0].qos == 2
            order.popleft()
        position = min(order[0].seq, feed.next) if order else feed.next
        if exact and self.durable:
            # In the same commit as the cursor, or the message would go once more after a crash.
            self._journal.execute(
                "DELETE FROM mqtt_outgoing WHERE client_id = ? AND stream = ? AND seq < ?",
                (self.client_id, feed.stream.id, position),
            )
        lazily = not exact and position - feed.cursor.durable < LAZY_ROWS_MAX
        self._journal.advance(feed.stream, feed.cursor, position, lazily=lazily)

    # ------------------------------------------------------------------ what comes from the client at QoS 2

    def take_in(self, packet_id: int, content: int) -> bool:
        """A message of QoS 2 is taken: whether its id is new, which is remembered with the commit that holds it."""
        new = packet_id not in self.incoming
        self.incoming[packet_id] = Arrival(content)
        if new and self.durable:
            self._journal.execute_with_rows(
                "INSERT OR REPLACE INTO mqtt_incoming VALUES (?, ?)", (self.client_id, packet_id)
            )
        return new

    def repeats(self, packet_id: int, content: int, *, dup: bool) -> bool:
        """Whether a message of QoS 2 is one that came before and was not released (MQTT 5.0 §4.3.3).

        Without DUP it must not be one (MQTT-3.3.1-1): mostly it is the first under that id of a client that was
        restarted and has forgotten, and would be lost. But some (rumqttc) do send again so: the content decides.
        """
        return packet_id in self.incoming and (dup or self.incoming[packet_id].content == content)

    def take_back(self, packet_id: int, arrival: Arrival) -> None:
        """Its message was not stored: the client will send it again as a new one."""
        arrival.failed = True
        if self.incoming.get(packet_id) is arrival:
            del self.incoming[packet_id]

    def let_go(self, packet_id: int) -> bool:
        """PUBREL: whether the id was known."""
        if packet_id not in self.incoming:
            return False
        del self.incoming[packet_id]
        if self.durable:
            self._journal.execute(
                "DELETE FROM mqtt_incoming WHERE client_id = ? AND packet_id = ?", (self.client_id, packet_id)
            )
        return True
