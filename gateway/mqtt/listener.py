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
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.amqp.addresses import reply_topic
from gateway.amqp.message import Message, Template, answer_to, correlation_id, user_properties
from gateway.broker import Broker
from gateway.mqtt.codec import Connect, PropertiesCache, PublishProperties, Reason, TopicCache
from gateway.mqtt.connection import (
    Acked,
    Connected,
    Disconnected,
    Event,
    Failed,
    Limits,
    Publishes,
    ServerConnection,
    Subscribed,
    TooLargeForPeer,
    Unsubscribed,
)
from gateway.mqtt.connection import Message as Published
from gateway.routing import Route
from gateway.sessions import Session
from storeforward.errors import JournalFull
from storeforward.journal import PENDING_BYTES_MAX, Journal

log = logging.getLogger("lineside.mqtt")

SESSION_NEVER_EXPIRES = 0xFFFFFFFF
HOLD_RETRY_S = 0.2
CLOSE_WAIT_S = 2.0
WRITE_BUFFER_BYTES = 256 << 10


class Kick(Protocol):
    def kick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Refused:
    """Packet ids whose messages were not taken: they are answered in their turn (MQTT 5.0 §4.6)."""

    packet_ids: list[bytes]


class MqttListener:
    """What all clients of the daemon share."""

    def __init__(self, broker: Broker, committer: Kick, limits: Limits, clients_max: int, expiry_s_max: float) -> None:
        self.broker = broker
        self.committer = committer
        self.limits = limits
        self.clients_max = clients_max
        self.expiry_s_max = int(expiry_s_max)
        self.clients: set[Client] = set()
        self.topics = TopicCache()
        self.properties = PropertiesCache()
        self.received = 0
        self.stopping = False

    def protocol(self) -> Client:
        return Client(self)

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
        self._session: Session | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held: deque[Published] = deque()
        self._congested = False
        self._paused = False
        self._expiry: int | None = 0
        self.peer = "?"

    # ------------------------------------------------------------------ the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = transport.get_extra_info("peername")
        self.peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        clients = self._listener.clients
        if len(clients) >= self._listener.clients_max:
            log.warning("client refused: too many", extra={"peer": self.peer, "clients_max": len(clients)})
            transport.abort()
            return
        clients.add(self)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        self._take(self._conn.receive(data, self._loop.time()))

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        if self._session is not None:
            self._broker.pump(self._session)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.clients.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._take(self._conn.eof())
        self._leave()
        self._transport = None

    # ------------------------------------------------------------------ the session's side (Outlet)

    @property
    def window_left(self) -> int:
        return self._conn.window_left

    @property
    def congested(self) -> bool:
        return self._congested or self._transport is None or self._conn.closing

    def publish(self, topic: str, message: Message, qos: int, dup: bool) -> int | None:
        properties = _to_mqtt(message) if self._conn.version == 5 else None
        try:
            return self._conn.publish(topic, message.body, qos, dup=dup, properties=properties)
        except TooLargeForPeer:
            session = self._session
            self._journal.lose(
                "local", 0, "larger-than-client-takes", len(message.body), session.cursor_name if session else ""
            )
            return 0

    # ------------------------------------------------------------------ the journal's side (Waiter)

    def committed(self, tokens: list[Any]) -> None:
        """The commit that holds these messages is on disk: now, and only now, they are acknowledged."""
        conn = self._conn
        for token in tokens:
            if type(token) is list:
                conn.puback(token)
            elif type(token) is _Refused:
                conn.puback(token.packet_ids, Reason.QUOTA_EXCEEDED)
            else:
                token()
        self.flush()

    def failed(self, tokens: list[Any], error: JournalFull) -> None:
        """Nothing of it is on disk. 5.0 is told so; 3.1.1 has no word for it, and sends again when it comes back."""
        if self._conn.version == 5:
            for token in tokens:
                if type(token) is list:
                    self._conn.puback(token, Reason.QUOTA_EXCEEDED)
                elif type(token) is _Refused:
                    self._conn.puback(token.packet_ids, Reason.QUOTA_EXCEEDED)
                elif token == self._resume:
                    token()
                else:
                    self._disconnect(Reason.QUOTA_EXCEEDED, error.reason)
            self.flush()
        else:
            log.warning("client dropped: its messages could not be stored", extra=self._who(error=error.reason))
            self._abort()

    # ------------------------------------------------------------------ events

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if type(event) is Publishes:
                self._published(event.messages)
            elif type(event) is Acked:
                self._acked(event)
            else:
                self._control(event)
        if events:
            self._listener.committer.kick()
        self.flush()

    def _published(self, messages: list[Published]) -> None:
        if self._held:
            self._hold(messages)
            return
        done = self._append(messages)
        if done < len(messages):
            self._hold(messages[done:])
        if self._journal.pending.size_bytes > PENDING_BYTES_MAX:
            self._pause()
            self._journal.wait(self, self._resume)

    def _append(self, messages: list[Published]) -> int:
        """Stage messages; return how many were dealt with, which is fewer only where the rest has to be held."""
        journal = self._journal
        router = self._broker.router
        append, route_of = journal.append, router.route
        packet_ids: list[bytes] = []
        count = 0
        age_us: int | None = None
        last_topic: str | None = None
        last_qos = -1
        for topic, qos, _retain, _dup, packet_id, payload, properties in messages:
            if topic is not last_topic or qos != last_qos:  # the usual case: a run of one topic
                route = route_of(topic, qos)
                last_topic, last_qos = topic, qos
            try:
                if route.wanted:
                    if properties is None and route.ttl_us is None:
                        append(route.stream, topic, route.encode, payload)
                    else:
                        if age_us is None:
                            age_us = journal.age_us()
                        self._append_with(route, qos, payload, properties, age_us)
            except JournalFull as error:
                if not self._full(error, packet_ids, packet_id):
                    break
                packet_ids = []
            else:
                if qos:
                    packet_ids.append(packet_id)
            count += 1
        if packet_ids:
            journal.wait(self, packet_ids)
        self._listener.received += count
        return count

    def _append_with(
        self, route: Route, qos: int, payload: bytes, properties: PublishProperties | None, age_us: int
    ) -> None:
        ttl_us = route.ttl_us
        encode = route.encode
        if properties is not None:
            if properties.message_expiry_interval is not None:
                asked_us = properties.message_expiry_interval * 1_000_000
                ttl_us = asked_us if ttl_us is None else min(ttl_us, asked_us)
            gateway, epoch = self._broker.router.identity
            encode = Template(
                gateway,
                epoch,
                route.stream.name,
                route.address,
                route.topic,
                None if ttl_us is None else min(ttl_us // 1000, 0xFFFFFFFF),
                content_type=properties.content_type,
                reply_to=properties.response_topic,
                correlation_id=correlation_id(properties.correlation_data),
                user_properties=properties.user_property,
                duplicate_property=route.duplicate_property,
                qos=qos,
            ).encode
        expires = None if ttl_us is None else age_us + ttl_us
        self._journal.append(route.stream, route.topic, encode, payload, expires)

    def _full(self, error: JournalFull, before: list[bytes], packet_id: bytes) -> bool:
        """A stream is full: QoS 0 is lost and in the ledger, 5.0 is refused, 3.1.1 is held. True to go on."""
        log.debug("intake refused", extra=self._who(stream=error.stream, reason=error.reason))
        if packet_id and self._conn.version != 5:
            return False
        if before:
            self._journal.wait(self, before)
        if packet_id:
            self._journal.wait(self, _Refused([packet_id]))
        else:
            self._journal.lose(error.stream, 0, "refused-qos-0", 0, self._conn.client_id)
        return True

    def _hold(self, messages: list[Published]) -> None:
        if not self._held:
            log.info("client held: the stream is full", extra=self._who())
            self._pause()
            self._loop.call_later(HOLD_RETRY_S, self._retry)
        self._held.extend(messages)

    def _retry(self) -> None:
        if self._transport is None:
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

    def _acked(self, event: Acked) -> None:
        session = self._session
        if session is None:
            return
        for packet_id, reason in event.refused:
            self._journal.lose(session.cursor_name, packet_id, "refused-by-client", 0, f"reason 0x{reason:02x}")
        self._broker.acked(session, event.packet_ids)

    def _control(self, event: Event) -> None:
        match event:
            case Connected(connect):
                self._connect(connect)
            case Subscribed(packet):
                self._subscribe(packet)
            case Unsubscribed(packet):
                assert self._session is not None
                codes = self._broker.unsubscribe(self._session, packet.filters)
                self._journal.wait(self, lambda: self._conn.unsuback(packet, codes))
            case Disconnected(packet, clean, reason):
                log.info("client left", extra=self._who(clean=clean, reason=reason))
                if packet is not None and packet.properties.session_expiry_interval is not None:
                    self._expiry = self._expiry_of(packet.properties.session_expiry_interval)
                self._leave()
            case Failed(error):
                log.warning(
                    "client broke the protocol", extra=self._who(reason=f"0x{error.reason:02x}", error=error.text)
                )
                self._leave()

    def _connect(self, connect: Connect) -> None:
        if self._listener.stopping:
            self._conn.refuse(Reason.SERVER_SHUTTING_DOWN)
            return
        assigned = None if connect.client_id else f"lineside-{secrets.token_hex(8)}"
        client_id = connect.client_id or assigned or ""
        if connect.version == 5:
            asked = connect.properties.session_expiry_interval or 0
        else:
            asked = 0 if connect.clean_start else SESSION_NEVER_EXPIRES
        self._expiry = self._expiry_of(asked)
        other = self._broker.sessions.get(client_id)
        if other is not None and isinstance(other.outlet, Client):
            other.outlet.taken_over()
        self._session, present = self._broker.connect(client_id, connect.clean_start, self._expiry, self)
        told = self._expiry if connect.version == 5 and self._expiry != asked else None
        log.info("client connected", extra=self._who(client=client_id, version=connect.version, present=present))
        held = self._conn.accept(present, assigned_client_id=assigned, session_expiry_s=told)
        if self._timer is not None:  # until now it was the time allowed for CONNECT; the keep-alive may be shorter
            self._timer.cancel()
            self._timer = None
        self._set_timer()
        self._broker.pump(self._session)
        self._take(held)

    def _expiry_of(self, asked: int) -> int:
        """What is granted of a session expiry interval, in seconds; the cap bounds "never", too."""
        return min(asked, self._listener.expiry_s_max)

    def _subscribe(self, packet: Any) -> None:
        session = self._session
        assert session is not None
        identifier = packet.properties.subscription_identifier
        codes = self._broker.subscribe(
            session,
            [
                (s.filter, s.qos, s.no_local | s.retain_as_published << 1 | s.retain_handling << 2, identifier)
                for s in packet.subscriptions
            ],
        )

        def answer() -> None:
            self._conn.suback(packet, codes)
            self.flush()
            if self._session is session:
                self._broker.pump(session)

        # Not before the subscription is on disk: a power cut must not take what was promised.
        self._journal.wait(self, answer)

    # ------------------------------------------------------------------ ending

    def taken_over(self) -> None:
        """Another connection came with the same client identifier (MQTT 5.0 §3.1.4)."""
        log.info("client taken over", extra=self._who())
        session, self._session = self._session, None
        if session is not None:
            session.detach()
        self._disconnect(Reason.SESSION_TAKEN_OVER)

    def shut_down(self) -> None:
        self._disconnect(Reason.SERVER_SHUTTING_DOWN)

    def _disconnect(self, reason: int, text: str = "") -> None:
        if self._conn.connect is not None and not self._conn.closing:
            self._conn.disconnect(reason, text)
            self.flush()
        elif self._transport is not None:
            self._transport.close()

    def _leave(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._broker.disconnect(session, self, self._expiry)
            self._listener.committer.kick()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------ small things

    def flush(self) -> None:
        transport = self._transport
        if transport is None:
            return
        data = self._conn.data_to_send()
        if data and not transport.is_closing():
            transport.write(data)
        if self._conn.closing:
            if not transport.is_closing():
                # What is written still goes out; a peer that does not read it is cut off after a while.
                transport.close()
                self._loop.call_later(CLOSE_WAIT_S, transport.abort)
        elif self._timer is None:
            self._set_timer()

    def _set_timer(self) -> None:
        now = self._loop.time()
        deadline = self._conn.deadline(now)
        if deadline is not None:
            self._timer = self._loop.call_at(max(deadline, now + 0.05), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._take(self._conn.tick(self._loop.time()))
        if self._timer is None and not self._conn.closing and self._transport is not None:
            self._set_timer()

    def _pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self._held:
            self._paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def _who(self, **fields: Any) -> dict[str, Any]:
        return {"client": self._conn.client_id, "peer": self.peer} | fields

    def describe(self) -> dict[str, Any]:
        """For `lineside clients`."""
        session = self._session
        return {
            "client": self._conn.client_id,
            "peer": self.peer,
            "version": "5.0" if self._conn.version == 5 else "3.1.1",
            "durable": bool(session and session.durable),
            "subscriptions": sorted(session.subscriptions) if session else [],
            "held": len(self._held),
        }


def _to_mqtt(message: Message) -> PublishProperties | None:
    pairs = tuple(user_properties(message))
    correlation = answer_to(message)
    response_topic = reply_topic(message.reply_to)
    if not (pairs or correlation or response_topic or message.content_type):
        return None
    return PublishProperties(
        response_topic=response_topic,
        correlation_data=correlation,
        content_type=message.content_type,
        user_property=pairs,
    )
