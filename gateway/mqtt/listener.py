"""The thin asyncio side of MQTT: one `Client` a connection, between its socket, its protocol and the broker.

Acknowledges only from `committed`, which the journal calls after the sync (promise P1). Reads the loop's clock, as only
drivers do.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from gateway.access import LOGGED_MAX, Access, Admission, Login, Permit, identity_of
from gateway.broker import Broker
from gateway.mqtt.codec import ONLY, PropertiesCache, TopicCache
from gateway.mqtt.connection import Limits, ServerConnection, TooLargeForPeer
from gateway.mqtt.delivery import Delivery
from gateway.mqtt.events import (
    Acked,
    Completed,
    Connected,
    Disconnected,
    Event,
    Failed,
    Publishes,
    Received,
    Released,
    Subscribed,
    Unsubscribed,
)
from gateway.mqtt.events import Message as Published
from gateway.mqtt.mapping import Encoders
from gateway.mqtt.packets import V5, Connect, PublishProperties, Reason, Subscribe, Unsubscribe
from gateway.mqtt.subscribing import Subscriptions
from gateway.mqtt.topics import filter_matches
from gateway.sessions import Arrival, Session
from gateway.slices import Looked, Slices
from gateway.transports import peer_name, source_of
from gateway.turns import AT_ONCE, Account, Turns
from security.identity import CertificateIdentity, certificate_identity
from security.rules import Action, Identity
from storeforward.errors import JournalFull
from storeforward.journal import Encode, Journal

log = logging.getLogger("lineside.mqtt")

_CONNACK = {
    Login.BAD_CREDENTIALS: Reason.BAD_USER_NAME_OR_PASSWORD,
    Login.ANONYMOUS: Reason.NOT_AUTHORIZED,
    Login.BUSY: Reason.SERVER_BUSY,
}
SESSION_NEVER_EXPIRES = 0xFFFFFFFF
RESPONSE_PREFIX = "response/"
HOLD_RETRY_S = 0.2
CLOSE_WAIT_S = 2.0
WRITE_BUFFER_BYTES = 256 << 10
# Answers that a client does not read, beyond what it is sent: then it is not read from either.
ANSWERS_BYTES_MAX = 1 << 20
SURPLUS_MAX = 64  # connections beyond clients_max that are told why they are refused; the next are just cut off


class Kick(Protocol):
    def kick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a batch's messages are answered in their turn (MQTT 5.0 §4.6): PUBREC, or a PUBACK that refuses.

    `session`: whose id of QoS 2 this is, where it was taken, with its `arrival`. `repeat`: of a message that was staged
    before, with an earlier batch, and whose fate is that batch's.
    """

    packet_ids: list[bytes]
    qos: int
    reason: int = 0
    session: Session | None = None
    arrival: Arrival | None = None
    repeat: bool = False

    def give(self, conn: ServerConnection) -> None:
        reason = self.reason
        if self.repeat and self.arrival is not None and self.arrival.failed:
            reason = Reason.QUOTA_EXCEEDED
        (conn.pubrec if self.qos == 2 else conn.puback)(self.packet_ids, reason)

    def take_back(self) -> None:
        """The id was taken with a batch that failed, even if its client is gone meanwhile."""
        if self.session is not None and self.arrival is not None:
            self.session.take_back(int.from_bytes(self.packet_ids[0], "big"), self.arrival)


class MqttListener:
    """What all clients of the daemon share."""

    def __init__(
        self,
        broker: Broker,
        committer: Kick,
        limits: Limits,
        clients_max: int,
        expiry_s_max: float,
        turns: Turns | None = None,
    ) -> None:
        self.turns = Turns(asyncio.get_running_loop()) if turns is None else turns
        self.broker = broker
        self.committer = committer
        self.limits = limits
        self.clients_max = clients_max
        self.expiry_s_max = int(expiry_s_max)
        self.clients: set[Client] = set()
        self.surplus: set[Client] = set()  # beyond clients_max, and about to be told
        self.topics = TopicCache()
        self.properties = PropertiesCache()
        self.encoders = Encoders(broker.router.identity)
        self.received = 0
        self.sent = 0
        self.stopping = False
        self.figures: Callable[[], list[tuple[str, bytes]]] = list
        self.access: Access | None = None  # None: everybody may do everything

    def protocol(self) -> Client:
        return Client(self)

    def send_sys(self, client: Client, filters: Iterable[str]) -> None:
        """A new subscription to $SYS topics is given them as they are now."""
        wanted = [f for f in filters if f.startswith("$SYS")]
        if wanted:
            client.give_figures(wanted, self.figures(), retain=True)

    def publish_sys(self) -> None:
        """Everybody who has subscribed to $SYS topics gets them. They are never journaled: they are about now."""
        readers = [(c, filters) for c in self.clients if (filters := c.sys_filters)]
        if readers:
            figures = self.figures()
            for client, filters in readers:
                client.give_figures(filters, figures, retain=False)

    def rules_changed(self) -> None:
        """Judge everybody anew. Who is away gets back what is his; it is judged when he comes."""
        for session in self.broker.sessions.values():
            if session.outlet is None:
                self.broker.suspend(session, None)
        for client in list(self.clients):
            client.rules_changed()

    def stop(self) -> None:
        """Say goodbye to everybody; who has unanswered messages gets its acknowledgements first."""
        self.stopping = True
        for client in list(self.clients):
            client.shut_down()


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, listener: MqttListener) -> None:
        self._listener = listener
        self._broker = listener.broker
        self._journal: Journal = listener.broker.journal
        self._loop = asyncio.get_running_loop()
        self._conn = ServerConnection(listener.limits, listener.topics, listener.properties)
        self._transport: asyncio.Transport | None = None
        self.session: Session | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held: deque[Published] = deque()
        self._congested = False
        self._paused = False
        self._expiry: int | None = 0
        self._claim: Identity
        self._admission: Admission | None = None
        self.permit: Permit | None = None
        self._login: asyncio.Task[None] | None = None
        self._deaf = False
        self._resumed = False  # the session is older than the connection
        self._parted = False  # the client said DISCONNECT
        self._ending = False  # we have said all we had to say
        self._finishing = False  # nothing more is read; what was said is done, and then this ends
        self._successors: list[Callable[[], None]] = []  # who came in its place, and waits for that
        self._slices: Slices
        self._turns = listener.turns
        self.account = Account()  # until it is let in, that of where it comes from
        self._local = True
        self._errands: deque[Iterator[None]] = deque()  # dear work that is begun; what comes next waits for it
        self._subscriptions = Subscriptions(self, self._broker, listener.turns)
        self._due = False  # retained messages are
        self._waits = False  # for its turn
        self._over = False  # the connection is gone, and all that came by it is done, but for the end itself
        self._refusals_logged = 0
        self.peer = "?"
        self.identity: CertificateIdentity | None = None  # who the client's certificate says it is, verified

    # ------------------------------------------------------------------ the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.identity = certificate_identity(transport.get_extra_info("peercert"))
        self._claim = identity_of(transport, "mqtt")
        self.peer = peer_name(transport)
        source, self._local = source_of(self.peer)
        self.account = self._turns.account(source)
        self._slices = Slices(self._turns, self, transport, self._look, gated=False)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        listener = self._listener
        if len(listener.clients) < listener.clients_max:
            listener.clients.add(self)
        else:
            log.warning("client refused: too many", extra={"peer": self.peer, "clients_max": listener.clients_max})
            if len(listener.surplus) >= SURPLUS_MAX:
                transport.abort()
                return
            listener.surplus.add(self)  # to be told so, once it has said CONNECT
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        self._slices.feed(data)

    def _look(self, data: bytes) -> Looked:
        conn = self._conn
        dear = conn.dear_left = AT_ONCE if self._turns.ready else 0  # HOT: tests/bench, intake
        events = conn.receive(data, self._loop.time())
        self._take(events)
        plain = 0
        for event in events:
            if type(event) is Publishes:
                plain += len(event.messages)
        if conn.waiting or self._errands:
            self.enter()
        if self._congested and self._unread and not self._finishing:
            self._pause()
        dear -= conn.dear_left
        plain = plain - dear if plain > dear else 0  # what is to be retained is a message, too
        return Looked(dear, plain, plain > 0 and bool(self._journal.pending), 0.0)

    @property
    def _unread(self) -> bool:
        """Whether the client is sent answers, and reads none of them."""
        return self._transport is not None and self._transport.get_write_buffer_size() > ANSWERS_BYTES_MAX

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        self._resume()
        if self.session is not None:
            self._broker.pump(self.session)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._finish(self._gone)

    def _finish(self, then: Callable[[], None]) -> None:
        """Have done what was said, in turns as ever, and then that: it counts when the connection is gone, too, and so
        may a goodbye.
        """
        self._finishing = True
        if self._deaf:
            self._slices.drop()
        self._resume()
        self._slices.end(then)

    def _gone(self) -> None:
        self._over = True
        if self.session is None or self._turns.ready:
            self._end()
        else:
            self._wait()

    def _end(self) -> None:
        self._listener.clients.discard(self)
        self._listener.surplus.discard(self)
        self._over = False
        self._errands.clear()
        self._take(self._conn.eof())
        self._leave()
        self._succeed()

    def _succeed(self) -> None:
        successors, self._successors = self._successors, []
        for come_in in successors:
            come_in()

    # ------------------------------------------------------------------ what costs more than messages do

    @property
    def _blocked(self) -> bool:
        """Whether nothing more may be taken from the client for now. What ends it calls `_resume`."""
        waits = bool(self._held) or self._unread  # for room in a stream, or to have its answers read
        return (waits and not self._finishing) or self._deaf or self._conn.awaiting_verdict

    def enter(self) -> None:
        """Have the rest of what is dear done when it is this client's turn, and read no more until then."""
        if self._errands or (self._conn.waiting and not self._blocked):
            self._pause()
            self._wait()

    def _wait(self) -> None:
        if not self._waits:
            self._waits = True
            self._turns.enter(self)

    def turn(self) -> None:
        """Do a portion of what is dear, in the order it came."""
        self._waits = False
        turns, conn, errands = self._turns, self._conn, self._errands
        while errands and not turns.over:
            if next(errands[0], self) is self:
                errands.popleft()
        if self._due and not errands:
            self._due = False
            if self.session is not None:
                self.session.pump_due(AT_ONCE)
        while conn.waiting and not (errands or self._blocked or turns.over):
            self._take(conn.go_on(AT_ONCE, self._loop.time()))
        if errands or self._due or (conn.waiting and not self._blocked):
            self._wait()
        elif self._over:
            self._end()
        else:
            self._resume()
        if self._journal.pending:
            self._listener.committer.kick()
        self.flush()

    def begin(self, errand: Iterator[None], *, at_once: bool) -> None:
        """Dear work."""
        if at_once and not self._errands:
            for _ in errand:
                pass
        else:
            self._errands.append(errand)

    def abort(self) -> None:
        """Its turn failed: only this connection pays."""
        self._errands.clear()
        self._deafen()
        if self._over:
            self._end()
        else:
            self._abort()

    def _deafen(self) -> None:
        """Nothing more is done of what it has said."""
        self._deaf = True
        self._pause()
        if self._finishing:
            self._slices.drop()

    def owes(self) -> None:
        """Retained messages are due to the session."""
        self._due = True
        self._wait()

    # ------------------------------------------------------------------ the session's side (Outlet)

    @property
    def window_left(self) -> int:
        return self._conn.window_left

    @property
    def congested(self) -> bool:
        # Before its CONNACK a client is sent nothing, so nothing may count as sent.
        conn = self._conn
        return self._congested or self._transport is None or conn.closing or conn.awaiting_verdict

    def takes(self, delivery: Delivery, qos: int, identifiers: tuple[int, ...]) -> bool:
        conn = self._conn
        if conn.unlimited:
            return True
        section = len(delivery.section(identifiers, 0)) if conn.version == V5 else 0
        return conn.fits(2 + len(delivery.topic.encode()) + (2 if qos else 0) + section + len(delivery.payload))

    def in_use(self, packet_ids: Iterable[int]) -> None:
        self._conn.in_use(packet_ids)

    def reserve(self, qos: int, packet_id: int | None = None) -> int | None:
        return self._conn.reserve(qos, packet_id)

    def come_back(self) -> None:
        """There is more to read for the session; other clients have their turn first."""
        self._loop.call_soon(self._pump_on)

    def _pump_on(self) -> None:
        if self.session is not None:
            self._broker.pump(self.session)

    def pubrel(self, packet_ids: Iterable[int]) -> None:
        self._conn.pubrel(packet_ids)

    def deliver(
        self,
        delivery: Delivery,
        qos: int,
        retain: bool,
        identifiers: tuple[int, ...],
        dup: bool = False,
        packet_id: int | None = None,
    ) -> int | None:
        """Queue a message for the client; see `ServerConnection.publish`."""
        conn = self._conn
        if conn.plain and packet_id is None and delivery.expires_age_us is None:
            self._listener.sent += 1
            return conn.publish_encoded(*delivery.packet(conn.version, qos, retain, identifiers), qos)
        section = delivery.section(identifiers, self._journal.age_us()) if conn.version == V5 else None
        try:
            number = conn.publish(delivery.topic, delivery.payload, qos, retain, dup, section, packet_id=packet_id)
        except TooLargeForPeer as error:  # `takes` was asked, so only a new, lower limit of ours could do this
            log.error("a message does not fit", extra=self._who(topic=delivery.topic, error=str(error)))
            return None
        self._listener.sent += 1
        return number

    # ------------------------------------------------------------------ the journal's side (Waiter)

    def committed(self, tokens: list[Any]) -> None:
        """The commit that holds these messages is on disk: now, and only now, they are acknowledged."""
        conn = self._conn
        for token in tokens:
            if type(token) is list:
                conn.puback(token)
            elif type(token) is _Answer:
                token.give(conn)
            else:
                token()
        self.flush()

    def failed(self, tokens: list[Any], error: JournalFull) -> None:
        """Nothing of it is on disk. 5.0 is told so; 3.1.1 has no word for it, and sends again when it comes back.

        What does not speak of messages (sessions, subscriptions, releases) is staged again, and goes on waiting.
        """
        answers: list[_Answer] = []
        for token in tokens:
            if type(token) is list:
                answers.append(_Answer(token, 1))
            elif type(token) is _Answer and not token.repeat:
                token.take_back()
                answers.append(token)
            else:
                self._journal.wait(self, token)
        if answers and self._conn.version != V5:
            log.warning("client dropped: its messages could not be stored", extra=self._who(error=error.reason))
            self._deafen()
            self._abort()
            return
        for answer in answers:
            replace(answer, reason=answer.reason or Reason.QUOTA_EXCEEDED).give(self._conn)
        self.flush()

    # ------------------------------------------------------------------ events

    def _take(self, events: list[Event]) -> None:
        answered = False
        for event in events:
            if type(event) is Publishes:
                self._published(event.messages)
            elif type(event) is Acked:
                self._acked(event.packet_ids, event.refused)
                answered = True
            else:
                answered = answered or type(event) in (Received, Completed)
                self._control(event)
        # Not before all answers are dealt with: the connection holds their packet ids for free already, and a new
        # message under one of them would be taken for the one that the next event answers.
        if answered and self.session is not None:
            self._broker.answered(self.session)
        if self._journal.pending:
            self._listener.committer.kick()
        self.flush()

    def _published(self, messages: list[Published]) -> None:
        if self._deaf:
            return
        if self._held:
            self._hold(messages)
            return
        done = self._append(messages)
        if done < len(messages):
            self._hold(messages[done:])
        if self._journal.pending.size_bytes > self._journal.space.pending_bytes:
            self._pause()
            self._journal.wait(self, self._resume)

    def _append(self, messages: list[Published]) -> int:
        """Stage messages; return how many were dealt with, which is fewer only where the rest has to be held."""
        journal = self._journal
        journal.intake()
        route_of, encoders = self._broker.router.route, self._listener.encoders
        packet_ids: list[bytes] = []
        may = None if self.permit is None else self.permit.publish
        at, count = 0, len(messages)
        while at < count:
            message = messages[at]
            topic, qos, retain, _, packet_id, _, properties = message
            route = route_of(topic, qos)
            if may is not None and not may(topic):
                if self._forbidden(message, packet_ids):
                    at += 1
                    continue
                at = count
                break
            encode: Encode | None = None
            if qos < 2 and not retain and topic[:1] != "$" and not self._marks_source:
                encode = route.encode if properties is None else encoders.of(route, qos, properties)
            if encode is not None and not route.wanted:
                at += 1
            elif encode is not None and route.ttl_us is None:
                run = _run_of(messages, at)
                done = journal.append_run(route.stream, topic, encode, [m[5] for m in run])
                if not done:
                    done = self._append_one(message, packet_ids)
                    if not done:
                        break
                elif qos:
                    packet_ids += [m[4] for m in run[:done]]
                at += done
                continue
            else:
                if not self._append_one(message, packet_ids):
                    break
                at += 1
                continue
            if qos:
                packet_ids.append(packet_id)
        if packet_ids:
            journal.wait(self, packet_ids)
        self._listener.received += at
        return at

    @property
    def _marks_source(self) -> bool:
        return self.session is not None and self.session.no_local > 0

    def _append_one(self, message: Published, acknowledged: list[bytes]) -> bool:
        """Stage a message of any kind. False where it has to be held; `acknowledged`: PUBACKs not yet waited for."""
        topic, qos, retain, dup, packet_id, payload, properties = message
        session = self.session
        if session is None:
            return True  # taken over meanwhile: the client sends it again
        number = int.from_bytes(packet_id, "big")
        content = hash((topic, payload)) if qos == 2 else 0
        if qos == 2 and session.repeats(number, content, dup=dup):
            self._answer(acknowledged, [packet_id], 2, session=session, repeat=True)
            return True
        refusal = self._refusal(topic, payload, properties)
        if refusal is not None:
            return self._refuse(refusal, message, acknowledged)
        try:
            self._broker.publish(topic, qos, retain, payload, properties, self._journal.age_us(), session)
        except JournalFull as error:
            log.debug("intake refused", extra=self._who(stream=error.stream, reason=error.reason))
            if qos and self._conn.version != V5:
                return False
            if qos:
                self._answer(acknowledged, [packet_id], qos, Reason.QUOTA_EXCEEDED)
            else:
                self._journal.lose(error.stream, 0, "refused-qos-0", len(payload), self._conn.client_id)
            return True
        if qos == 2:
            session.take_in(number, content)
            self._answer(acknowledged, [packet_id], 2, session=session)
        elif qos:
            acknowledged.append(packet_id)
        return True

    def _answer(
        self,
        before: list[bytes],
        packet_ids: list[bytes],
        qos: int,
        reason: int = 0,
        *,
        session: Session | None = None,
        repeat: bool = False,
    ) -> None:
        """Have these answered behind what came before them; after the commit, unless they are refused."""
        if before:
            self._journal.wait(self, before.copy())
            before.clear()
        arrival = None if session is None else session.incoming[int.from_bytes(packet_ids[0], "big")]
        answer = _Answer(packet_ids, qos, reason, session, arrival, repeat)
        if reason and not repeat:
            self._journal.tell(self, answer)  # nothing is staged for it
        else:
            self._journal.wait(self, answer)

    def _refusal(self, topic: str, payload: bytes, properties: PublishProperties | None) -> Reason | None:
        if topic.startswith("$SYS/"):
            return Reason.NOT_AUTHORIZED  # the server's own (§4.7.2)
        if properties is not None and self._asks_too_much(topic, properties.response_topic):
            return Reason.NOT_AUTHORIZED
        if properties is not None and properties.payload_format_indicator == 1:
            try:
                payload.decode()
            except UnicodeDecodeError:
                return Reason.PAYLOAD_FORMAT_INVALID
        return None

    def _asks_too_much(self, topic: str, asked: str | None) -> bool:
        """A reply from the hub is published here in the name of who asked for it: it needs the right to do that."""
        if asked is None or self._broker.router.route(topic, 1).reply_to is None:
            return False
        return asked.startswith("$SYS/") or (self.permit is not None and not self.permit.publish(asked))

    def _refuse(self, reason: Reason, message: Published, acknowledged: list[bytes]) -> bool:
        """Never to be taken, full or not. Without a word for it the message is in the ledger: nothing vanishes."""
        topic, qos, _, _, packet_id, payload, _ = message
        log.warning("message refused", extra=self._who(topic=topic, reason=reason.name.lower()))
        if qos and self._conn.version == V5:
            self._answer(acknowledged, [packet_id], qos, reason)
            return True
        self._journal.lose("-", 0, reason.name.lower().replace("_", "-"), len(payload), self._conn.client_id)
        if qos == 2:
            self._answer(acknowledged, [packet_id], 2)
        elif qos:
            acknowledged.append(packet_id)
        return True

    def _forbidden(self, message: Published, acknowledged: list[bytes]) -> bool:
        """An access rule is against it. False where nothing more is taken from this client.

        QoS 0 is dropped and in the ledger; 5.0 is told so in its turn. 3.1.1 has no word for it: to acknowledge and
        drop would be a lie that no app ever finds out, so the connection is closed (3.1.1 §3.3.5.2 leaves the choice),
        after the acknowledgements of what came before.
        """
        topic, qos, _, _, packet_id, payload, _ = message
        closing = bool(qos) and self._conn.version != V5
        self._log_forbidden(Action.PUBLISH, topic, qos=qos, closing=closing)
        if not qos:
            stream = self._broker.router.route(topic, 0).stream
            self._journal.lose(stream.name, 0, "not-allowed", len(payload), self._conn.client_id)
            return True
        self._answer(acknowledged, [packet_id], qos, Reason.NOT_AUTHORIZED)
        if closing:
            self._deafen()
        return not closing

    def _log_forbidden(self, action: Action, name: str, **fields: Any) -> None:
        self._refusals_logged += 1
        if self.permit is not None and self._refusals_logged <= LOGGED_MAX:
            why = self.permit.why(action, name).text
            log.warning("not allowed", extra=self._who(topic=name, why=why, **fields))

    def _hold(self, messages: list[Published]) -> None:
        if not self._held:
            log.info("client held: the stream is full", extra=self._who())
            if not self._finishing:
                self._pause()
            self._loop.call_later(HOLD_RETRY_S, self._retry)
        self._held.extend(messages)

    def _retry(self) -> None:
        if self._transport is None:
            for topic, qos, _, _, _, payload, _ in self._held:
                if not qos:  # the others were not acknowledged: their sender still has them
                    stream = self._broker.router.route(topic, 0).stream
                    self._journal.lose(stream.name, 0, "refused-qos-0", len(payload), self._conn.client_id)
            self._held.clear()
            return
        messages = list(self._held)
        done = self._append(messages)
        for _ in range(done):
            self._held.popleft()
        self._listener.committer.kick()
        if self._held:
            self._loop.call_later(HOLD_RETRY_S, self._retry)
        else:
            self._resume()

    def _acked(self, packet_ids: list[int], refused: list[tuple[int, int]]) -> None:
        session = self.session
        if session is None:
            return
        for packet_id, reason in refused:
            self._journal.lose(session.cursor_name, packet_id, "refused-by-client", 0, f"reason 0x{reason:02x}")
        session.acked(packet_ids)

    def _released(self, packet_ids: list[int]) -> None:
        """PUBRELs: the ids are free again once that is on disk, and only then are they answered."""
        session = self.session
        if session is None:
            return
        known = [p for p in packet_ids if session.let_go(p)]
        unknown = [p for p in packet_ids if p not in known]
        # Where a PUBCOMP may be lost this is no mismatch (MQTT 5.0 §3.7.2.1), and clients take 0x92 for a failure.
        reason = 0 if self._resumed else Reason.PACKET_IDENTIFIER_NOT_FOUND

        def answer() -> None:
            self._conn.pubcomp(known)
            self._conn.pubcomp(unknown, reason)

        self._journal.wait(self, answer)

    def _control(self, event: Event) -> None:
        match event:
            case Connected(connect):
                self._connect(connect)
            case Released(packet_ids):
                self._released(packet_ids)
            case Received(packet_ids, refused):
                if self.session is not None:
                    self.session.received(packet_ids)
                    if refused:
                        self._acked([p for p, _ in refused], refused)
            case Completed(packet_ids):
                self._acked(packet_ids, [])
            case Subscribed(packet):
                # One of more filters has stopped the connection: what comes behind it is not among these events.
                self._subscriptions.subscribe(packet)
            case Unsubscribed(packet):
                self._subscriptions.unsubscribe(packet)
            case Disconnected(packet, clean, reason):
                log.info("client left", extra=self._who(clean=clean, reason=reason))
                self._parted = True
                if packet is not None and packet.properties.session_expiry_interval is not None:
                    self._expiry = self._expiry_of(packet.properties.session_expiry_interval)
                self._leave(clean=clean)
            case Failed(error):
                log.warning(
                    "client broke the protocol", extra=self._who(reason=f"0x{error.reason:02x}", error=error.text)
                )
                self._leave()

    def _connect(self, connect: Connect) -> None:
        if self._listener.stopping:
            self._conn.refuse(Reason.SERVER_SHUTTING_DOWN)
            return
        if self in self._listener.surplus:
            self._conn.refuse(Reason.QUOTA_EXCEEDED, "too many clients")
            return
        known = self._admission.identity.client if self._admission is not None else f"lineside-{secrets.token_hex(8)}"
        assigned = None if connect.client_id else known
        client_id = connect.client_id or assigned or ""
        if not self._admitted(connect, client_id):
            return
        if connect.legacy:
            # Only now: Eclipse Paho for Java tries 3.1 wherever 3.1.1 was refused, and its app hears this answer only.
            log.warning("client refused", extra=self._who(client=client_id, why=ONLY))
            self._conn.refuse(Reason.UNSUPPORTED_PROTOCOL_VERSION, ONLY)
            return
        self._open(connect, client_id, assigned)

    def _open(self, connect: Connect, client_id: str, assigned: str | None) -> None:
        if connect.version == 5:
            asked = connect.properties.session_expiry_interval or 0
        else:
            asked = 0 if connect.clean_start else SESSION_NEVER_EXPIRES
        self._expiry = self._expiry_of(asked)
        other = self._broker.sessions.get(client_id)
        if other is not None and isinstance(other.outlet, Client):
            self._pause()
            other.outlet.taken_over(partial(self._come_in, connect))
            return
        if self._local:
            self.account = Account()  # apps of this machine are not one another's
        session, present, lasts = self._broker.connect(connect, client_id, self._expiry, self)
        self.session = session
        told = self._expiry if connect.version == 5 and self._expiry != asked else None
        self._suspend_forbidden()
        log.info("client connected", extra=self._who(client=client_id, version=connect.version, present=present))

        def accept() -> None:
            if self.session is session:
                with self._turns.charging(self.account):
                    self._accept(session, present, assigned, told)
                self.enter()
                self._resume()

        if lasts:
            self._pause()  # the time to CONNECT is over; what is sent meanwhile waits in the socket
            self._journal.wait(self, accept)
        else:
            self._accept(session, present, assigned, told)
            self.enter()

    def _come_in(self, connect: Connect) -> None:
        """Who had the session has left it."""
        try:
            if not self._conn.closing:
                self._connect(connect)
            self._resume()
            self._listener.committer.kick()
            self.flush()
        except Exception:  # only this connection pays, and not the one that it takes over
            log.exception("a connection failed; it is closed")
            self._deafen()
            self._abort()

    def _accept(self, session: Session, present: bool, assigned: str | None, expiry_s: int | None) -> None:
        """Session and will are on disk, or their end is: the client is told that it has them."""
        self._resumed = present
        connect = self._conn.connect
        information = None
        if connect is not None and connect.properties.request_response_information:
            information = f"{RESPONSE_PREFIX}{self._conn.client_id or assigned}"
        self._conn.dear_left = AT_ONCE if self._turns.ready else 0
        held = self._conn.accept(
            present, assigned_client_id=assigned, session_expiry_s=expiry_s, response_information=information
        )
        if self._timer is not None:  # until now it was the time allowed for CONNECT; the keep-alive may be shorter
            self._timer.cancel()
            self._timer = None
        self._set_timer()
        if self._conn.closing and not held:
            self._leave(clean=True)  # refused after all: it never was connected, so its will means nothing
        elif not self._conn.closing:  # what was held may end with DISCONNECT
            self._broker.attach(session, self)
        self._take(held)

    def _expiry_of(self, asked: int) -> int:
        """What is granted of a session expiry interval, in seconds; the cap bounds "never", too."""
        return min(asked, self._listener.expiry_s_max)

    # ------------------------------------------------------------------ subscriptions

    @property
    def five(self) -> bool:
        return self._conn.version == V5

    def refusal(self, filter_: str) -> Reason | None:
        """Why the client may not subscribe to that."""
        if self.permit is not None and not self.permit.subscribe(filter_):
            self._log_forbidden(Action.SUBSCRIBE, filter_)
            return Reason.NOT_AUTHORIZED  # 0x80 on 3.1.1
        if ("+" in filter_ or "#" in filter_) and not self._listener.limits.wildcards_available:
            return Reason.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
        return None

    def suback(self, packet: Subscribe, codes: Sequence[int]) -> None:
        self._conn.suback(packet, codes)
        self.flush()

    def unsuback(self, packet: Unsubscribe, codes: Sequence[int]) -> None:
        self._conn.unsuback(packet, codes)

    def subscribed(self, filters: Iterable[str]) -> None:
        """These were granted just now."""
        assert self.session is not None
        self._listener.send_sys(self, filters)
        self._broker.pump(self.session)

    # ------------------------------------------------------------------ $SYS

    @property
    def sys_filters(self) -> list[str]:
        return [f for f in self.session.subscriptions if f.startswith("$SYS")] if self.session is not None else []

    def give_figures(self, filters: list[str], figures: list[tuple[str, bytes]], *, retain: bool) -> None:
        """At QoS 0, and only as long as the socket takes them."""
        for topic, value in figures:
            if not self.congested and any(filter_matches(f, topic) for f in filters):
                delivery = Delivery(topic, value, 0, True, None, None, None)
                if self.takes(delivery, 0, ()):
                    self.deliver(delivery, 0, retain, ())
        self.flush()

    # ------------------------------------------------------------------ access

    def _admitted(self, connect: Connect, client_id: str) -> bool:
        """Whether the client is let in now. If not, it is refused, or will be asked again once its password is checked.

        Meanwhile nothing more is read from it.
        """
        access = self._listener.access
        if access is None:
            return True
        if self._admission is None:
            claim = replace(self._claim, client=client_id, user=connect.username)
            self._admission = access.admit(claim, connect.password)
            if self._admission is None:
                self._pause()
                self._login = self._loop.create_task(self._log_in(access.authenticate(claim, connect.password)))
                return False
        if not self._admission.ok:
            login = self._admission.login
            log.warning("client refused", extra=self._who(client=client_id, why=login.value))
            self._conn.refuse(_CONNACK[login], login.value)
            return False
        self.permit = access.permit(self._admission.identity)
        will = connect.will
        if will is not None and self.permit is not None and not self.permit.publish(will.topic):
            self._log_forbidden(Action.PUBLISH, will.topic, client=client_id, will=True)
            self._conn.refuse(Reason.NOT_AUTHORIZED, "the will's topic is not allowed")
            return False
        if will is not None and self._asks_too_much(will.topic, will.properties.response_topic):
            self._conn.refuse(Reason.NOT_AUTHORIZED, "the will's response topic is not allowed")
            return False
        return True

    async def _log_in(self, answer: Awaitable[Admission]) -> None:
        try:
            self._admission = await answer
        finally:
            self._login = None
            if self._admission is None:  # cancelled, or our own mistake: nobody gets in by it
                self._deafen()
                self._abort()
        connect = self._conn.connect
        if connect is not None and not self._conn.closing:
            self._connect(connect)
            self._listener.committer.kick()
            self.flush()
        self._resume()

    def rules_changed(self) -> None:
        """Other rules are in force: they count for what comes from now on, and for subscriptions there are."""
        access = self._listener.access
        if self.session is None or access is None or self._admission is None:
            return
        self.permit = access.permit(self._admission.identity)
        self._suspend_forbidden()
        self._broker.pump(self.session)

    def _suspend_forbidden(self) -> None:
        assert self.session is not None
        permit = self.permit
        for filter_ in self._broker.suspend(self.session, None if permit is None else permit.subscribe):
            self._log_forbidden(Action.SUBSCRIBE, filter_, session=True)

    # ------------------------------------------------------------------ ending

    def taken_over(self, come_in: Callable[[], None]) -> None:
        """Another connection came with the same client identifier (MQTT 5.0 §3.1.4); it is called once all is done that
        was said by this one.
        """
        log.info("client taken over", extra=self._who())
        self._successors.append(come_in)
        if self._transport is not None:
            self._slices.read_out()
            self._finish(self._give_way)
        elif self._over and not self._errands:
            self._end()

    def _give_way(self) -> None:
        self._leave()
        if not self._conn.closing:
            self._disconnect(Reason.SESSION_TAKEN_OVER)
        self._succeed()

    def shut_down(self) -> None:
        self._disconnect(Reason.SERVER_SHUTTING_DOWN)

    def _disconnect(self, reason: int, text: str = "") -> None:
        if self._conn.connect is not None and not self._conn.closing:
            self._conn.disconnect(reason, text)
            self.flush()
        elif self._transport is not None:
            self._transport.close()

    def _leave(self, *, clean: bool = False) -> None:
        session, self.session = self.session, None
        if session is not None and not self._listener.stopping:
            self._broker.disconnect(session, self, self._expiry, clean=clean)
            self._listener.committer.kick()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------ small things

    def flush(self) -> None:
        transport = self._transport
        if transport is None or self._ending:
            return
        data = self._conn.data_to_send()
        if data and not transport.is_closing():
            transport.write(data)
        if self._conn.closing:
            self._ending = True
            if transport.is_closing():
                return
            if (data or transport.can_write_eof()) and not (self._parted or self._listener.stopping):
                self._slices.last_words()
            else:
                # What is written still goes out; a peer that does not read it is cut off after a while.
                transport.close()
                self._loop.call_later(CLOSE_WAIT_S, transport.abort)
        elif self._timer is None:
            self._set_timer()

    def _set_timer(self) -> None:
        now = self._loop.time()
        deadline = self._conn.deadline(now)
        if deadline is not None and self._transport is not None:
            self._timer = self._loop.call_at(max(deadline, now + 0.05), self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self._errands:  # else it was not read from, so nothing can be said of its silence
            self._take(self._conn.tick(self._loop.time()))
        if self._timer is None and not self._conn.closing and self._transport is not None:
            self._set_timer()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._slices.hold()

    def _resume(self) -> None:
        if self._paused and not self._blocked:
            if self._errands or self._conn.waiting:
                self._wait()
                return
            self._paused = False
            self._slices.release()

    def _who(self, **fields: Any) -> dict[str, Any]:
        return {"client": self._conn.client_id, "peer": self.peer} | fields

    def describe(self) -> dict[str, Any]:
        """For `lineside clients`."""
        session = self.session
        return {
            "client": self._conn.client_id,
            "peer": self.peer,
            "certificate": None if self.identity is None else str(self.identity),
            "version": "5.0" if self._conn.version == 5 else "3.1.1",
            "user": self._admission.identity.user if self._admission is not None else None,
            "durable": bool(session and session.durable),
            "subscriptions": sorted(session.subscriptions) if session else [],
            "suspended": sorted(session.suspended) if session else [],
            "held": len(self._held),
        }


def _run_of(messages: list[Published], at: int) -> list[Published]:
    """The messages from `at` on that differ in nothing but packet id and payload, and are not retained."""
    topic, qos, properties = messages[at][0], messages[at][1], messages[at][6]
    end, count = at + 1, len(messages)
    while end < count:  # HOT: tests/bench, intake
        message = messages[end]
        if message[0] is not topic or message[6] is not properties or message[1] != qos or message[2]:
            break
        end += 1
    return messages if end - at == count else messages[at:end]
