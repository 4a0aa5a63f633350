"""The bridge to a broker that is already there: its client, with a persistent session and acknowledgements by hand.

Drives paho on this event loop: paho's own thread would be a second busy one, which costs everybody (DESIGN, section 4).
Only dialling, which paho does in blocking calls, has a thread for as long as it takes. What to stage, answer and
publish is `bridge_flow`'s decision, when to dial is `uplink.state`'s.

Reads at QoS 1: paho sends PUBREC for a QoS 2 message before anybody has seen it, and the broker then forgets its
payload; only PUBACK waits for us, so only QoS 1 survives a power cut here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from gateway.amqp.message import Message
from gateway.bridge_flow import Inflow, Outflow, Taken, release
from gateway.bridge_topics import BridgeTopics
from gateway.broker import Broker
from gateway.config import Bridge as BridgeConfig
from gateway.config import Config
from gateway.mqtt.mapping import to_mqtt
from gateway.mqtt.packets import PublishProperties
from gateway.mqtt.topics import check_topic
from gateway.uplink.state import Failure, LinkState, State

log = logging.getLogger("lineside.bridge")

TICK_S = 0.5
READ_PACKETS_MAX = 64
PUBLISH_OVERHEAD_BYTES = 9  # fixed header, length of the topic, packet id (MQTT 5.0 §3.3)
NEVER_EXPIRES = 0xFFFFFFFF
TEXT_BYTES_MAX = 65535
RECEIVE_MAXIMUM_DEFAULT = 65535
# Bad user name or password, not authorized, banned (MQTT 5.0 §3.2.2.2), to which paho also translates 3.1.1's.
AUTHENTICATION_REASONS = frozenset({0x86, 0x87, 0x8A})
UNSUPPORTED_VERSION = 0x84
TAKEN_OVER = 0x8E
STOOD_S_MIN = 5.0
GOODBYE_S_MAX = 1.0
NOTHING = "lineside/nothing"  # a filter that nobody is subscribed to


class Bridge:
    """`start`, then `committed` after every commit, `network_changed` when the kernel says so, `stop` in the end."""

    def __init__(self, config: Config, broker: Broker, kick: Callable[[], None]) -> None:
        assert config.bridge is not None
        self.config: BridgeConfig = config.bridge
        self._client_id = self.config.client_id_for(config.gateway.id)
        self._gateway = config.gateway.id
        self._journal = broker.journal
        self._kick = kick
        self._loop = asyncio.get_running_loop()
        self._url = str(self.config.url)
        self._topics = BridgeTopics(
            self._journal, config.bridge_topics, self.config.version, self._url, self._client_id
        )
        self._state = LinkState([self._url], random.Random(), self._loop.time())
        inbound = [self._journal.streams[each.stream] for each in config.inbound]
        release(self._journal, frozenset(stream.name for stream in inbound))
        self._inflow = Inflow(self._journal, lambda: broker.router, self.config.window, self._answer)
        self._outflow = Outflow(self._journal, inbound, self.config.window)
        self._client: Client | None = None
        self._socket: Any = None
        self._reading = self._writing = self._flush_due = self._stopping = self._held_told = False
        self._heard = 0
        self._acks: list[tuple[int, tuple[str, str] | None]] = []
        self._events: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._reason: tuple[str, Failure] | None = None
        self._paho_error = ""
        self._receive_maximum = RECEIVE_MAXIMUM_DEFAULT
        self._packet_bytes_max: int | None = None
        self._fresh_start = False
        self._retained_known = False
        self._asking: int | None = None
        self._asked_at = 0.0
        self._answered_at = 0.0  # what we published, or nothing was in flight
        self._gone = asyncio.Event()
        self._sessions_lost = 0
        self._acknowledged = 0

    # ------------------------------------------------------------------ the owner's side

    @property
    def received(self) -> int:
        return self._inflow.journaled

    def start(self) -> None:
        self._schedule()
        self._tick()
        self._kick()

    def stop(self) -> None:
        """Take no more; say goodbye once what is being written has been acknowledged. The session stays.

        Reads on until the broker has proved that it has read the acknowledgements: closing a socket that holds unread
        bytes resets the connection, and would take them with it. `stopped` waits for that.
        """
        self._stopping = True
        self._state.stop(self._loop.time())
        for timer in (self._timer, self._deadline, self._tick_timer):
            if timer is not None:
                timer.cancel()
        self._inflow.close()
        self._read(True)
        if self._socket is None:
            self._gone.set()
        elif not self._inflow.staged:
            self._farewell()

    async def stopped(self) -> None:
        """Until the connection is closed, or the broker has had its time for it."""
        try:
            async with asyncio.timeout(GOODBYE_S_MAX):
                await self._gone.wait()
        except TimeoutError:
            self._abort("stopped")

    def committed(self) -> None:
        """The journal has more, or has room again."""
        if self._state.state is State.UP:
            self._go_on()

    def network_changed(self) -> None:
        self._state.network_changed(self._loop.time())
        self._schedule()

    def describe(self) -> dict[str, Any]:
        now = self._loop.time()
        status = self._state.status()
        retry_at = status.retry_at
        return {
            "state": status.state.value,
            "url": self._url,
            "since_s": round(now - status.since, 3),
            "error": status.error or self._topics.trouble,
            "retry_in_s": None if retry_at is None else round(max(0.0, retry_at - now), 3),
            "version": self.config.version,
            "client_id": self._client_id,
            "topics": list(self._topics.topics),
            "received": self._inflow.journaled,
            "repeated": self._inflow.repeated,
            "acknowledged": self._acknowledged,
            "unacknowledged": self._inflow.held + self._inflow.staged,
            "held": self._inflow.blocked,
            "sessions_lost": self._sessions_lost,
        } | self._outflow.describe()

    # ------------------------------------------------------------------ dialling

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state.state in (State.DOWN, State.BACKOFF):
            due = self._state.due()
            assert due is not None
            self._timer = self._loop.call_at(max(due, self._loop.time()), self._dial)

    def _dial(self) -> None:
        self._timer = None
        self._state.dial(self._loop.time())
        self._reason = None
        self._paho_error = ""
        if self._client is None or self._fresh_start:
            # Otherwise the client of before: what it has in flight goes again under its packet ids (MQTT 5.0 §4.4).
            self._client = self._new_client()
            self._outflow.rewind()
            self._fresh_start = False
        client, config, url = self._client, self.config, self.config.url
        try:
            if config.user is not None and config.password_file is not None:
                client.username_pw_set(config.user, _password(config.password_file))
        except (OSError, UnicodeDecodeError) as error:
            self._failed(Failure.HANDSHAKE, f"{config.password_file}: {error}")
            return
        properties: Properties | None = None
        if config.version == "5.0":
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = config.window
            expiry_s = config.session_expiry_s
            properties.SessionExpiryInterval = NEVER_EXPIRES if expiry_s is None else int(expiry_s)
        client.on_log = self._on_log  # until the connection stands: it costs a formatted string a packet
        client.connect_async(
            url.path or url.host,
            url.port or 1883,
            keepalive=int(config.keep_alive_s),
            clean_start=False,
            properties=properties,
        )
        threading.Thread(target=self._reconnect, args=(client,), name="bridge-dial", daemon=True).start()

    @property
    def _older(self) -> str:
        """Brokers of 3.1.1 refuse CONNECT of 5.0 (3.1.1 §3.1.2.2), or do not answer it."""
        return '; where it is one of MQTT 3.1.1 only, set version = "3.1.1"' if self.config.version == "5.0" else ""

    def _new_client(self) -> Client:
        config = self.config
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if config.version == "5.0" else False,
            protocol=MQTTProtocolVersion.MQTTv5 if config.version == "5.0" else MQTTProtocolVersion.MQTTv311,
            transport="unix" if config.url.path else "tcp",
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = config.connect_timeout_s
        client.max_inflight_messages = 0  # the window is kept by `Outflow`
        if config.url.tls:
            files = (config.ca, config.cert, config.key, config.crl, config.key_password_file)
            client.tls_set_context(_RenewedContext(*files))
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_register_write
        return client

    def _reconnect(self, client: Client) -> None:
        """In the dialling thread: names, TCP, TLS."""
        error: Exception | None = None
        try:
            client.reconnect()
        except Exception as caught:  # noqa: BLE001  (whatever it is, the loop has to hear of it)
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for this connection
            self._loop.call_soon_threadsafe(self._dialled, client, error)

    def _dialled(self, client: Client, error: Exception | None) -> None:
        sock = client.socket()
        if self._stopping:
            if sock is not None:
                sock.close()
            return
        if error is not None or sock is None:
            reachable = isinstance(error, ssl.SSLError) or not isinstance(error, OSError)
            self._failed(Failure.HANDSHAKE if reachable else Failure.UNREACHABLE, _told(error))
            return
        self._socket = sock
        if not self.config.url.path:
            # paho writes every acknowledgement by itself; none of them should wait for the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # type: ignore[attr-defined]
        self._deadline = self._loop.call_later(
            self.config.connect_timeout_s, self._abort, f"the broker does not answer CONNECT{self._older}"
        )
        self._read(True)
        self._flush()
        self._loop.call_soon(self._readable)  # TLS may have read ahead

    def _failed(self, failure: Failure, error: str) -> None:
        if error != self._state.error:
            log.warning("bridge not up", extra={"url": self._url, "error": error})
        self._state.attempt_failed(self._loop.time(), failure, error)
        self._schedule()

    # ------------------------------------------------------------------ paho's callbacks: note, and act afterwards

    def _on_log(self, client: Client, _data: Any, level: int, text: str) -> None:
        if level == LogLevel.MQTT_LOG_ERR:
            self._paho_error = text

    def _on_connect(
        self, client: Client, _data: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._heard += 1
        before = self._topics.remembered()
        present = flags.session_present
        # At once: the session's messages may follow in the same read.
        self._inflow.connected()
        # 3.1.1 sends retained messages at every SUBSCRIBE; 5.0 can be told not to.
        three = self.config.version == "3.1.1"
        self._retained_known = three and present and before is not None and set(self._topics.topics) <= set(before)
        self._events.append(lambda: self._connack(present, before, reason, properties))

    def _on_disconnect(
        self, client: Client, _data: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._heard += 1
        if flags.is_disconnect_packet_from_server and self._reason is None:
            text = getattr(properties, "ReasonString", "")
            self._reason = f"the broker ended it: {reason}{f' ({text})' if text else ''}", Failure.HANDSHAKE
            if reason.value == TAKEN_OVER:
                # Slowly: the other one comes back, too, and then it is our turn to go.
                told = f"another client uses our client_id {self._client_id}: give each its own"
                self._reason = told, Failure.AUTHENTICATION
        self._events.append(self._disconnected)

    def _on_message(self, client: Client, _data: Any, message: MQTTMessage) -> None:
        self._heard += 1
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        self._inflow.receive(
            Taken(
                topic,
                message.qos,
                message.mid if message.qos else 0,
                message.dup,
                bytes(message.payload),
                None if message.properties is None else _from_paho(message.properties),
                message.retain and self._retained_known,
            )
        )

    def _on_publish(
        self, client: Client, _data: Any, packet_id: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._heard += 1
        self._acks.append((packet_id, (f"mqtt:0x{reason.value:02x}", str(reason)) if reason.is_failure else None))

    def _on_subscribe(
        self, client: Client, _data: Any, packet_id: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        self._heard += 1
        self._events.append(lambda: self._topics.answered(packet_id, reasons, self._loop.time()))

    def _on_unsubscribe(
        self, client: Client, _data: Any, packet_id: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        self._heard += 1
        if packet_id == self._asking and self._stopping:
            self._events.append(self._goodbye)
        elif packet_id == self._asking:
            self._asking = None
            self._inflow.proven()
            self._events.append(self._ask)

    def _on_socket_close(self, client: Client, _data: Any, sock: Any) -> None:
        self._read(False)
        self._write(False)
        self._socket = None
        if self._stopping:
            self._gone.set()

    def _on_register_write(self, client: Client, _data: Any, sock: Any) -> None:
        if self._socket is not None and not self._flush_due:  # else it is the dialling thread that calls
            self._flush_due = True
            self._loop.call_soon(self._flush)

    # ------------------------------------------------------------------ the socket

    def _readable(self) -> None:
        client = self._client
        assert client is not None
        for _ in range(READ_PACKETS_MAX):
            if self._socket is None or not self._reading:
                break
            before = self._heard
            try:
                client.loop_read()
            except Exception as error:  # noqa: BLE001  (paho's answer to bytes that are no MQTT is any of a dozen)
                self._abort(f"the broker sent what is not MQTT: {type(error).__name__}: {error}")
                break
            if self._heard == before or self._inflow.full:
                break
        self._after()
        if self._reading and self._pending():
            self._loop.call_soon(self._readable)

    def _pending(self) -> int:
        """Bytes that TLS has taken off the socket, so that no selector will tell of them."""
        return self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0

    def _flush(self) -> None:
        self._flush_due = False
        client = self._client
        if client is None or self._socket is None:
            return
        client.loop_write()
        self._write(client.want_write() and self._socket is not None)
        if self._events:
            self._after()

    def _read(self, on: bool) -> None:
        if on != self._reading and self._socket is not None:
            self._reading = on
            if on:
                self._loop.add_reader(self._socket, self._readable)
            else:
                self._loop.remove_reader(self._socket)

    def _write(self, on: bool) -> None:
        if on != self._writing and self._socket is not None:
            self._writing = on
            if on:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)

    def _abort(self, error: str, failure: Failure = Failure.HANDSHAKE) -> None:
        """Cut the connection, and have paho see that it is cut."""
        client = self._client
        if self._socket is None or client is None:
            return
        self._reason = self._reason or (error, failure)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        client.disconnect()
        client.loop_write()
        self._after()

    def _farewell(self) -> None:
        if self._client is not None and self._socket is not None:
            _, self._asking = self._client.unsubscribe(NOTHING)

    def _goodbye(self) -> None:
        client = self._client
        if client is None or self._socket is None:
            return
        client.disconnect()
        client.loop_write()
        if self._socket is not None:
            self._abort("stopped")

    # ------------------------------------------------------------------ what happened

    def _after(self) -> None:
        """Act on what paho's callbacks have noted."""
        acks, self._acks = self._acks, []
        for packet_id, refusal in acks:
            if refusal is not None:
                log.warning("broker refused a message", extra={"url": self._url, "reason": refusal[1]})
            self._outflow.acked(packet_id, refusal)
        if acks:
            self._state.settled()
            self._answered_at = self._loop.time()
        events, self._events = self._events, []
        for event in events:
            event()
        self._go_on()

    def _go_on(self) -> None:
        """Stage what has come, publish what there is, read on if there is room."""
        if self._stopping:
            return
        self._inflow.stage()
        if self._state.state is State.UP and self._socket is not None:
            self._outflow.pump(self._publish, self._receive_maximum)
        was, now = self._reading, not self._inflow.full
        self._read(now)
        if now and not was and self._pending():
            self._loop.call_soon(self._readable)
        if self._journal.pending:
            self._kick()

    def _connack(
        self, present: bool, before: list[str] | None, reason: ReasonCode, properties: Properties | None
    ) -> None:
        client = self._client
        assert client is not None
        if reason.is_failure:
            authentication = reason.value in AUTHENTICATION_REASONS
            text = getattr(properties, "ReasonString", "")
            older = self._older if reason.value == UNSUPPORTED_VERSION else ""
            self._reason = (
                f"the broker refuses the connection: {reason}{f' ({text})' if text else ''}{older}",
                Failure.AUTHENTICATION if authentication else Failure.HANDSHAKE,
            )
            return
        if self._socket is None or self._state.state is not State.CONNECTING:
            return
        if getattr(properties, "MaximumQoS", 1) < 1:
            self._abort("the broker has QoS 0 only, at which nothing is acknowledged; raise its maximum QoS")
            return
        self._receive_maximum = getattr(properties, "ReceiveMaximum", RECEIVE_MAXIMUM_DEFAULT)
        self._packet_bytes_max = getattr(properties, "MaximumPacketSize", None)
        if self._outflow.in_flight > self._receive_maximum:
            self._fresh_start = True
            self._abort("the broker takes fewer messages at once than before")
            return
        if self._deadline is not None:
            self._deadline.cancel()
        client.on_log = None
        self._state.opened(self._loop.time(), self._url)
        if before is not None and not present:
            self._sessions_lost += 1
            log.warning("the broker has forgotten our session, and what it kept for us", extra={"url": self._url})
        log.info("bridge up", extra={"url": self._url, "client": self._client_id, "session_present": present})
        self._asking = None
        self._topics.ask(client, before if present else None)

    def _disconnected(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._inflow.connected()
        detail, url = f": {self._paho_error}" if self._paho_error else "", self.config.url
        if self._state.state is State.CONNECTING:
            # In place of paho's detail, which is another one each time: an alert, a reset, an end, as the race goes.
            if url.tls and self.config.cert is None:
                detail = "; the broker may ask for a certificate: set cert and key"
            elif not url.tls and not url.path:
                detail = "; the broker may want TLS (mqtts://)"
        error, failure = self._reason or (f"the connection ended{detail}", Failure.HANDSHAKE)
        self._reason = None
        if self._state.state is State.CONNECTING:
            self._failed(failure, error)
        elif self._state.state is State.UP:
            log.warning("bridge lost", extra={"url": self._url, "error": error})
            now = self._loop.time()
            if now - self._state.since >= STOOD_S_MIN:
                self._state.settled()  # it stood, if idle: what failed before is history
            self._state.lost(now, error, failure)
            self._schedule()

    # ------------------------------------------------------------------ what goes out

    def _answer(self, messages: list[Taken]) -> None:
        """These are on disk."""
        client = self._client
        if client is None or self._socket is None:
            return
        for message in messages:
            if message.qos:
                client.ack(message.packet_id, message.qos)
                self._acknowledged += 1
        self._state.settled()
        if self._stopping:
            self._farewell()
        else:
            self._ask()

    def _ask(self) -> None:
        """UNSUBSCRIBE from nothing: a broker reads in order, so that UNSUBACK says it has read every PUBACK before it.

        PINGREQ would do, but paho tells nobody of a PINGRESP. (MQTT 5.0 §3.10.4: answered though nothing matches.)
        """
        if self._client is not None and self._socket is not None and self._inflow.ask():
            _, self._asking = self._client.unsubscribe(NOTHING)
            self._asked_at = self._loop.time()

    def _publish(self, topic: str, message: Message, expiry_s: int | None) -> int | None:
        client = self._client
        assert client is not None
        check_topic(topic)
        properties = _to_paho(message, expiry_s, self._gateway) if self.config.version == "5.0" else None
        if self._packet_bytes_max is not None:
            size = PUBLISH_OVERHEAD_BYTES + len(topic.encode()) + len(message.body)
            size += 1 if properties is None else len(properties.pack())  # type: ignore[no-untyped-call]
            if size > self._packet_bytes_max:
                raise ValueError(f"{size} bytes; the broker takes {self._packet_bytes_max}")
        info = client.publish(topic, message.body, qos=1, properties=properties)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def _tick(self) -> None:
        """Keep-alive, and another look at what was full."""
        client = self._client
        if client is not None and self._socket is not None:
            client.loop_misc()
            now, patience_s = self._loop.time(), self.config.keep_alive_s + self.config.connect_timeout_s
            if self._asking is not None and self._reading and now - self._asked_at > patience_s:
                self._abort("the broker does not answer UNSUBSCRIBE")
            if not (self._outflow.in_flight and self._reading and self._state.state is State.UP):
                self._answered_at = now
            elif now - self._answered_at > patience_s:
                # As new messages then: there are brokers that answer no repeated one.
                self._fresh_start = True
                self._abort("the broker does not answer PUBLISH")
            if self._state.state is State.UP:
                self._topics.ask_again(client, now)
            if self._events:
                self._after()
            elif self._inflow.blocked:
                self._go_on()
        if self._inflow.blocked != self._held_told:  # here, and not at every change: a full stream that drains flickers
            self._held_told = self._inflow.blocked
            if self._held_told:
                log.info("bridge held: a stream is full, the broker keeps the rest", extra={"url": self._url})
            else:
                log.info("bridge goes on: there is room again", extra={"url": self._url})
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)


class _RenewedContext(ssl.SSLContext):
    """Reads its files anew for every connection, so that renewed ones are used without a restart."""

    _files: tuple[Path | None, ...]

    def __new__(cls, *files: Path | None) -> _RenewedContext:
        """`files`: as `client_context` takes them."""
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context._files = files
        return context

    def __init__(self, *files: Path | None) -> None:
        super().__init__()

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        from security.tls import client_context  # OpenSSL is memory that a bridge on loopback need not spend

        return client_context(*self._files).wrap_socket(sock, *args, **kwargs)


def _from_paho(properties: Properties) -> PublishProperties | None:
    values = vars(properties)
    expiry_s = values.get("MessageExpiryInterval")
    content_type = values.get("ContentType")
    response_topic = values.get("ResponseTopic")
    correlation = values.get("CorrelationData")
    pairs = values.get("UserProperty")
    payload_format = values.get("PayloadFormatIndicator")
    if expiry_s is content_type is response_topic is correlation is pairs is payload_format is None:
        return None
    return PublishProperties(
        payload_format_indicator=payload_format,
        message_expiry_interval=expiry_s,
        response_topic=response_topic,
        correlation_data=correlation,
        content_type=content_type,
        user_property=tuple(pairs or ()),
    )


def _to_paho(message: Message, expiry_s: int | None, gateway: str) -> Properties | None:
    """Raises ValueError where a property is longer than MQTT has a length for (MQTT 5.0 §1.5.4)."""
    found = to_mqtt(message, gateway)
    if found is None and expiry_s is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if expiry_s is not None:
        properties.MessageExpiryInterval = min(expiry_s, NEVER_EXPIRES)
    if found is None:
        return properties
    texts = [text for pair in found.user_property for text in pair]
    texts += [found.content_type or "", found.response_topic or ""]
    if max(len(found.correlation_data or b""), *(len(text.encode()) for text in texts)) > TEXT_BYTES_MAX:
        raise ValueError(f"a property is longer than the {TEXT_BYTES_MAX} bytes that MQTT has room for")
    if found.payload_format_indicator is not None:
        properties.PayloadFormatIndicator = found.payload_format_indicator
    if found.content_type is not None:
        properties.ContentType = found.content_type
    if found.correlation_data is not None:
        properties.CorrelationData = found.correlation_data
    if found.user_property:
        properties.UserProperty = list(found.user_property)
    if found.response_topic:
        # An address of the hub's may be no topic, and a broker would end the connection for it.
        with contextlib.suppress(ValueError):
            check_topic(found.response_topic)
            properties.ResponseTopic = found.response_topic
    return properties


def _password(path: Path) -> str:
    return path.read_text(encoding="utf-8").rstrip("\r\n")


def _told(error: Exception | None) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        from security.tls_faults import distrust

        return f"TLS: the broker's certificate is not trusted: {distrust(error)}"
    if isinstance(error, ssl.SSLEOFError):
        return "TLS: the connection ended in the handshake; what answers there may speak no TLS"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, TimeoutError):
        return "no answer within connect_timeout"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
