"""The server's end of one MQTT connection: bytes and `now` in, events and bytes out.

Knows no socket, clock, session store, password or rule: it says what the client asked, and its owner answers with
`accept`, `refuse`, `puback`, `pubrec`, `pubcomp`, `suback`, `publish`, `pubrel`, `disconnect`. Speaks 3.1.1 and 5.0.

The owner's loop::

    conn.deadline(now)                         # once when TCP is up: the time to CONNECT runs from here
    events = conn.receive(data, now)           # and write conn.data_to_send() after every call below, too
    on Connected:  conn.accept(...) or conn.refuse(reason), now or later; stop reading the socket in between
    on Publishes:  journal them, and after the commit conn.puback(ids) or, of QoS 2, conn.pubrec(ids)
    on Released:   forget the ids, and after the commit conn.pubcomp(ids)
    on Received:   remember that the client has them, and after the commit conn.pubrel(ids)
    at conn.deadline(now): conn.tick(now)
    when conn.closing: write what data_to_send() gives, then close TCP
    when TCP ends: conn.eof()

`accept` returns events: what the client sent behind its CONNECT is held until then.

Most of what a client sends costs little: messages, and answers to ours. The rest is dear, and an owner with more than
one client sets `dear_left` before `receive` and `accept`: where that is used up, `waiting` becomes true, and what
follows is held until `go_on(dear, now)`. The owner should not read the socket in between.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from gateway.errors import LinesideError
from gateway.mqtt.codec import (
    CONNACK_REASONS,
    DISCONNECT_REASONS,
    REMAINING_LENGTH_MAX,
    FilterReader,
    PropertiesCache,
    TopicCache,
    check_first_byte,
    decode_body,
    encode,
    encode_properties,
    encode_text,
    encode_varint,
    protocol_level,
    remaining_length,
    split_alias,
)
from gateway.mqtt.events import (
    Acked,
    Completed,
    Connected,
    Disconnected,
    Event,
    Failed,
    Message,
    Publishes,
    Received,
    Released,
    Subscribed,
    Unsubscribed,
)
from gateway.mqtt.packets import (
    V3,
    V5,
    Ack,
    Connack,
    ConnackProperties,
    Connect,
    Disconnect,
    DisconnectProperties,
    MqttError,
    PacketType,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    PublishProperties,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
)

PACKET_IDS_MAX = 65_535
ALIAS_TOPIC_MIN = 4  # characters; shorter topics gain nothing by an alias
NO_LIMIT = sys.maxsize
FILTERS_AT_ONCE = 16  # of a SUBSCRIBE: so many are read for one unit of dear work
_PINGRESP = encode(Pingresp(), V3)


class State(Enum):
    AWAITING_CONNECT = "awaiting CONNECT"
    AWAITING_VERDICT = "awaiting accept or refuse"
    OPEN = "open"
    CLOSED = "closed"


class Cause(Enum):
    CONNECT = "CONNECT came"
    ACCEPT = "the owner accepted"
    REFUSE = "the owner refused"
    DISCONNECT = "the client said DISCONNECT"
    CLOSE = "the owner closed"
    FAIL = "the client broke the protocol or kept silent"
    EOF = "TCP ended"


# What is missing here is our own mistake and raises.
TRANSITIONS: dict[tuple[State, Cause], State] = {
    (State.AWAITING_CONNECT, Cause.CONNECT): State.AWAITING_VERDICT,
    (State.AWAITING_CONNECT, Cause.CLOSE): State.CLOSED,
    (State.AWAITING_CONNECT, Cause.FAIL): State.CLOSED,
    (State.AWAITING_CONNECT, Cause.EOF): State.CLOSED,
    (State.AWAITING_VERDICT, Cause.ACCEPT): State.OPEN,
    (State.AWAITING_VERDICT, Cause.REFUSE): State.CLOSED,
    (State.AWAITING_VERDICT, Cause.FAIL): State.CLOSED,
    (State.AWAITING_VERDICT, Cause.EOF): State.CLOSED,
    (State.OPEN, Cause.DISCONNECT): State.CLOSED,
    (State.OPEN, Cause.CLOSE): State.CLOSED,
    (State.OPEN, Cause.FAIL): State.CLOSED,
    (State.OPEN, Cause.EOF): State.CLOSED,
}

# What a client may send in a state; anything else is its protocol error.
RECEIVABLE: dict[State, frozenset[PacketType]] = {
    State.AWAITING_CONNECT: frozenset({PacketType.CONNECT}),
    State.AWAITING_VERDICT: frozenset(),
    State.OPEN: frozenset(
        {
            PacketType.PUBLISH,
            PacketType.PUBACK,
            PacketType.PUBREC,
            PacketType.PUBREL,
            PacketType.PUBCOMP,
            PacketType.SUBSCRIBE,
            PacketType.UNSUBSCRIBE,
            PacketType.PINGREQ,
            PacketType.DISCONNECT,
        }
    ),
    State.CLOSED: frozenset(),
}

# 5.0 reason to 3.1.1 return code (3.1.1 §3.2.2.3). Others have no word there: the connection is closed without one.
RETURN_CODE_3: dict[int, int] = {
    Reason.UNSUPPORTED_PROTOCOL_VERSION: 1,
    Reason.CLIENT_IDENTIFIER_NOT_VALID: 2,
    Reason.SERVER_UNAVAILABLE: 3,
    Reason.SERVER_BUSY: 3,
    Reason.SERVER_SHUTTING_DOWN: 3,
    Reason.QUOTA_EXCEEDED: 3,
    Reason.CONNECTION_RATE_EXCEEDED: 3,
    Reason.BAD_USER_NAME_OR_PASSWORD: 4,
    Reason.NOT_AUTHORIZED: 5,
    Reason.BANNED: 5,
    Reason.BAD_AUTHENTICATION_METHOD: 5,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost. Packet sizes count the whole packet, header included.

    `receive_maximum`: PUBLISHes of QoS 1 and 2 a 5.0 client may have unacknowledged. 3.1.1 has no such word: there the
    owner stops reading the socket when `unacknowledged` grows too large.
    `keep_alive_max_s`: 0 for no limit; else a 5.0 client is told this if it asks for longer or none.
    `topic_alias_max`: aliases a 5.0 client may set; each holds one topic of at most 64 KiB.
    `topic_alias_send_max`: aliases we set, if the client takes as many.
    `held_max_bytes`: sent behind CONNECT while the verdict is out.
    `send_window_max`: our PUBLISHes of QoS 1 and 2 unacknowledged by the client, at most.
    """

    packet_max_bytes: int = 1 << 20
    receive_maximum: int = 1000
    keep_alive_max_s: int = 0
    topic_alias_max: int = 16
    topic_alias_send_max: int = 16
    connect_max_bytes: int = 128 << 10
    connect_timeout_s: float = 10.0
    held_max_bytes: int = 1 << 20
    send_window_max: int = 100
    maximum_qos: int = 2
    retain_available: bool = True
    wildcards_available: bool = True
    subscription_identifiers_available: bool = True
    shared_subscriptions_available: bool = True

    def __post_init__(self) -> None:
        if not 64 <= self.packet_max_bytes <= REMAINING_LENGTH_MAX + 5:
            raise ValueError("packet_max_bytes is 64 to 268435460")
        if not 1 <= self.receive_maximum <= PACKET_IDS_MAX or not 1 <= self.send_window_max <= PACKET_IDS_MAX:
            raise ValueError("receive_maximum and send_window_max are 1 to 65535")
        if not 0 <= self.keep_alive_max_s <= 65_535:
            raise ValueError("keep_alive_max_s is 0 to 65535")
        if not 0 <= self.topic_alias_max <= 65_535 or not 0 <= self.topic_alias_send_max <= 65_535:
            raise ValueError("topic_alias_max and topic_alias_send_max are 0 to 65535")
        if self.maximum_qos not in (0, 1, 2):
            raise ValueError("maximum_qos is 0, 1 or 2")


class Awaits(IntEnum):
    """What a message of ours waits for from the client."""

    PUBACK = 1
    PUBREC = 2
    PUBCOMP = 3


class TooLargeForPeer(LinesideError):
    """A message is larger than the client takes. It must be dropped as if it had been sent (MQTT-3.1.2-25)."""


def _publish_flags(first: int) -> tuple[int, bool, bool] | None:
    qos, retain, dup = first >> 1 & 3, bool(first & 1), bool(first & 8)
    plain = first >> 4 == PacketType.PUBLISH and qos < 2 and not (dup and not qos) and not retain
    return (qos, retain, dup) if plain else None


# (QoS, retain, dup) by first byte, for those bytes the hot loop takes. A message that is to be retained is dear.
_FLAGS: tuple[tuple[int, bool, bool] | None, ...] = tuple(_publish_flags(first) for first in range(256))


class ServerConnection:
    """One client. `topics` and `properties` are caches that all connections of a listener may share."""

    def __init__(
        self, limits: Limits, topics: TopicCache | None = None, properties: PropertiesCache | None = None
    ) -> None:
        self.limits = limits
        self.state = State.AWAITING_CONNECT
        self.version = V3  # until CONNECT says
        self.connect: Connect | None = None
        self.client_id = ""
        self.keep_alive_s = 0
        self._topics = TopicCache() if topics is None else topics
        self._properties = PropertiesCache() if properties is None else properties
        self._aliases: dict[int, str] = {}
        self._buffer = bytearray()  # an unfinished packet, or what is held behind CONNECT
        self._need_bytes = 0  # nothing to do before the buffer holds so many
        self._filters: FilterReader | None = None  # a packet that is being read
        self.dear_left = NO_LIMIT  # what may still be done, in units of about one packet or filter
        self.waiting = False  # for more of that
        self._out: list[bytes] = []
        self._began_s: float | None = None
        self._heard_s = 0.0
        self._intake_room = NO_LIMIT  # PUBLISHes of QoS 1 and 2 the client may still send
        self._intake_room_max = NO_LIMIT
        self._unreleased: set[int] = set()  # of QoS 2, counted against that room
        self._in_flight: dict[int, Awaits] = {}
        self._aliases_set: dict[str, int] = {}  # by us, the least lately used first
        self._alias_send_max = 0
        self.unlimited = True  # the client takes packets of any size
        self.plain = True  # and no topic aliases: `publish_encoded` may be used
        self._taken: set[int] = set()  # packet ids of messages that an earlier connection began to send
        self._next_id = 1
        self._window = limits.send_window_max
        self._send_max_bytes = REMAINING_LENGTH_MAX + 5

    # ------------------------------------------------------------------------------------------ questions
    @property
    def closing(self) -> bool:
        """Write what `data_to_send` gives, then close TCP."""
        return self.state is State.CLOSED

    @property
    def awaiting_verdict(self) -> bool:
        """Whether `accept` or `refuse` is still to come."""
        return self.state is State.AWAITING_VERDICT

    @property
    def window_left(self) -> int:
        """How many messages of QoS 1 and 2 `publish` takes now."""
        return self._window - len(self._in_flight) if self.state is State.OPEN else 0

    @property
    def unacknowledged(self) -> int:
        """How many messages of QoS 1 and 2 the client waits to have acknowledged."""
        return self._intake_room_max - self._intake_room

    def deadline(self, now: float) -> float | None:
        """When `tick` has something to say, if nothing is received before then."""
        if self._began_s is None:
            self._began_s = now
        if self.waiting:
            return None  # it is not the client that keeps silent
        if self.state is State.AWAITING_CONNECT:
            return self._began_s + self.limits.connect_timeout_s
        if self.state is State.OPEN and self.keep_alive_s:
            return self._heard_s + 1.5 * self.keep_alive_s  # MQTT-3.1.2-22
        return None

    def data_to_send(self) -> bytes:
        """Everything to write, once."""
        if not self._out:
            return b""
        data = b"".join(self._out)
        self._out.clear()
        return data

    # --------------------------------------------------------------------------------------------- input
    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes as they came, split anywhere. Never raises for anything a peer can send.

        Any byte counts as a sign of life: a large packet over a narrow line must not look like silence.
        Messages are gathered, and so are acknowledgements of a kind, but never past another event; among themselves
        they keep their order.
        """
        if self._began_s is None:
            self._began_s = now
        if not data or self.state is State.CLOSED:
            return []
        self._heard_s = now
        if self.state is State.AWAITING_VERDICT:
            return self._hold(data)
        if self.waiting:
            self._buffer += data
            return []
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._need_bytes:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        return self._process(data)

    def go_on(self, dear: int, now: float) -> list[Event]:
        """Take what was held because it is dear, up to so much of it."""
        assert self.waiting or self.state is State.CLOSED
        self.waiting = False
        if self.state is State.CLOSED:
            return []
        self.dear_left = dear
        self._heard_s = now  # until now nobody was listening
        data = bytes(self._buffer)
        self._buffer.clear()
        return self._process(data)

    def tick(self, now: float) -> list[Event]:
        """Let time pass: a CONNECT that never came, a keep-alive that ran out."""
        due = self.deadline(now)
        if due is None or now < due:
            return []
        if self.state is State.OPEN:
            return self._fail(MqttError(Reason.KEEP_ALIVE_TIMEOUT, "nothing was heard for 1.5 keep-alives"))
        return self._fail(MqttError(Reason.KEEP_ALIVE_TIMEOUT, "no CONNECT came in time"))

    def eof(self) -> list[Event]:
        """TCP ended. No event if the end was already told, or ours."""
        if self.state is State.CLOSED:
            return []
        self._enter(Cause.EOF)
        return [Disconnected(None, False, "the connection ended without DISCONNECT")]

    def _enter(self, cause: Cause) -> None:
        after = TRANSITIONS.get((self.state, cause))
        if after is None:
            raise AssertionError(f"{cause.value}, while {self.state.value}")
        self.state = after
        if after is State.CLOSED:
            self._buffer.clear()
            self._filters = None
            self.waiting = False
            self._aliases.clear()
            self._aliases_set.clear()

    def _hold(self, data: bytes) -> list[Event]:
        self._buffer += data
        if len(self._buffer) > self.limits.held_max_bytes:
            return self._fail(MqttError(Reason.QUOTA_EXCEEDED, "too much was sent before the CONNACK"))
        return []

    def _process(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        try:
            if self.state is State.AWAITING_CONNECT:
                at = self._take_connect(data, events)
            else:
                at = self._take_packets(data, events)
        except MqttError as error:
            return events + self._fail(error)
        if self.state is State.CLOSED:
            return events
        if self.state is State.AWAITING_VERDICT:
            return events + (self._hold(data[at:]) if at < len(data) else [])
        self._buffer += data[at:]
        return events

    def _frame(self, data: bytes, at: int, max_bytes: int) -> tuple[int, int] | None:
        """(where the body begins, where it ends) of the packet at `at`; None, and `_need_bytes`, if it is unfinished.

        Judges the header alone, so an unwanted packet is refused before it is buffered.
        """
        framed = remaining_length(data, at, strict=self.version == V5)
        if framed is None:
            self._need_bytes = len(data) - at + 1
            return None
        size, begin = framed
        end = begin + size
        if end - at > max_bytes:
            raise MqttError(Reason.PACKET_TOO_LARGE, f"a packet of {end - at} bytes, more than the {max_bytes} allowed")
        first = data[at]
        kind = check_first_byte(first, self.version)
        if kind not in RECEIVABLE[self.state]:
            raise MqttError(Reason.PROTOCOL_ERROR, f"{kind.name} while {self.state.value}")
        if kind is PacketType.PUBLISH:
            self._check_publish(first)
        if end > len(data):
            self._need_bytes = end - at
            return None
        return begin, end

    def _check_publish(self, first: int) -> None:
        if first >> 1 & 3 > self.limits.maximum_qos:
            raise MqttError(Reason.QOS_NOT_SUPPORTED, f"PUBLISH above QoS {self.limits.maximum_qos}")
        if first & 1 and not self.limits.retain_available and self.version == V5:
            raise MqttError(Reason.RETAIN_NOT_SUPPORTED, "PUBLISH has RETAIN set")

    # --------------------------------------------------------------------------------------- CONNECT
    def _take_connect(self, data: bytes, events: list[Event]) -> int:
        framed = self._frame(data, 0, min(self.limits.connect_max_bytes, self.limits.packet_max_bytes))
        if framed is None:
            return 0
        if not self._afford():
            return 0
        begin, end = framed
        body = data[begin:end]
        level = protocol_level(body)
        if level is not None and level >= V5:
            self.version = V5  # so that a refusal is said in the client's own words
        try:
            connect = decode_body(data[0], body, V3)
            assert isinstance(connect, Connect)
            if connect.properties.maximum_packet_size is not None:
                self._send_max_bytes = connect.properties.maximum_packet_size  # a refusal keeps to it, too
            self._check_connect(connect)
        except MqttError as error:
            self._write_refusal(error, level)
            raise
        self.connect = connect
        self.version = connect.version
        self.client_id = connect.client_id
        self._adopt(connect)
        self._enter(Cause.CONNECT)
        events.append(Connected(connect))
        return end

    def _check_connect(self, connect: Connect) -> None:
        if connect.version == V3 and not connect.client_id and not connect.clean_start:
            raise MqttError(Reason.CLIENT_IDENTIFIER_NOT_VALID, "a session needs a client identifier")  # MQTT-3.1.3-8
        if connect.properties.authentication_method is not None:
            raise MqttError(Reason.BAD_AUTHENTICATION_METHOD, "no authentication method is known here")
        will = connect.will
        if will is not None and will.qos > self.limits.maximum_qos:
            raise MqttError(Reason.QOS_NOT_SUPPORTED, f"the will is above QoS {self.limits.maximum_qos}")
        if will is not None and will.retain and not self.limits.retain_available and connect.version == V5:
            raise MqttError(Reason.RETAIN_NOT_SUPPORTED, "the will has RETAIN set")

    def _adopt(self, connect: Connect) -> None:
        limits = self.limits
        self.keep_alive_s = connect.keep_alive
        if connect.version == V3:
            return
        if limits.keep_alive_max_s and not 0 < connect.keep_alive <= limits.keep_alive_max_s:
            self.keep_alive_s = limits.keep_alive_max_s
        self._intake_room = self._intake_room_max = limits.receive_maximum
        self._window = min(limits.send_window_max, connect.properties.receive_maximum or PACKET_IDS_MAX)
        self._alias_send_max = min(limits.topic_alias_send_max, connect.properties.topic_alias_maximum or 0)
        self.unlimited = self._send_max_bytes > REMAINING_LENGTH_MAX
        self.plain = self.unlimited and not self._alias_send_max

    def accept(
        self,
        session_present: bool,
        *,
        assigned_client_id: str | None = None,
        session_expiry_s: int | None = None,
        response_information: str | None = None,
    ) -> list[Event]:
        """Queue a CONNACK of success, and return the events of what was held behind CONNECT.

        `assigned_client_id` is required where the client sent none; `session_expiry_s` only where it differs from
        what the client asked (MQTT 5.0 §3.2.2.3.2). Nothing happens if the client is gone meanwhile. A client that
        takes no packet as large as its CONNACK is refused instead, and then `closing`.
        """
        if self.state is State.CLOSED:
            return []
        connect = self.connect
        assert connect is not None, "accept before CONNECT"
        assert connect.client_id or assigned_client_id, "a client without an identifier is given one"
        assert not (session_present and connect.clean_start), "a clean start has no session"  # MQTT-3.2.2-2
        limits = self.limits
        properties = ConnackProperties(
            session_expiry_interval=session_expiry_s,
            receive_maximum=limits.receive_maximum if limits.receive_maximum < PACKET_IDS_MAX else None,
            maximum_qos=limits.maximum_qos if limits.maximum_qos < 2 else None,
            retain_available=None if limits.retain_available else 0,
            maximum_packet_size=limits.packet_max_bytes,
            assigned_client_identifier=assigned_client_id,
            topic_alias_maximum=limits.topic_alias_max or None,
            wildcard_subscription_available=None if limits.wildcards_available else 0,
            subscription_identifier_available=None if limits.subscription_identifiers_available else 0,
            shared_subscription_available=None if limits.shared_subscriptions_available else 0,
            server_keep_alive=self.keep_alive_s if self.keep_alive_s != connect.keep_alive else None,
            response_information=response_information,
        )
        worded = encode(Connack(session_present, 0, properties), self.version)
        if len(worded) > self._send_max_bytes:  # MQTT-3.1.2-24
            self.refuse(Reason.PACKET_TOO_LARGE, "the client takes no CONNACK of this size")
            return []
        self._enter(Cause.ACCEPT)
        self.client_id = assigned_client_id or connect.client_id
        self._out.append(worded)
        held = bytes(self._buffer)
        self._buffer.clear()
        return self._process(held) if held else []

    def refuse(self, reason: int, text: str = "") -> None:
        """Queue a CONNACK that says why not, and close. 3.1.1 has fewer words; some reasons have none there.

        Nothing happens if the client is gone meanwhile.
        """
        if self.state is State.CLOSED:
            return
        self._enter(Cause.REFUSE)
        self._write_connack_refusal(reason, text)

    def _write_refusal(self, error: MqttError, level: int | None) -> None:
        """Answer a CONNECT that can't be taken. To what isn't MQTT, silence."""
        if level is not None:
            self._write_connack_refusal(error.reason, error.text)

    def _write_connack_refusal(self, reason: int, text: str) -> None:
        if self.version == V3:
            if reason in RETURN_CODE_3:
                self._out.append(encode(Connack(False, RETURN_CODE_3[reason]), V3))
            return
        if reason not in CONNACK_REASONS or reason < 0x80:
            reason = Reason.UNSPECIFIED_ERROR
        worded = encode(Connack(False, reason, ConnackProperties(reason_string=text or None)), V5)
        if len(worded) > self._send_max_bytes:
            worded = encode(Connack(False, reason), V5)
        if len(worded) <= self._send_max_bytes:
            self._out.append(worded)

    # --------------------------------------------------------------------------------------- packets
    def _take_packets(self, data: bytes, events: list[Event]) -> int:
        """Take every whole packet in `data`; return where the rest begins."""
        gathered = _Gathered(events)
        at = 0
        try:
            if self._filters is not None and not self._read_filters(events):
                return 0
            while self.state is State.OPEN:
                if at < len(data) and data[at] >> 4 <= PacketType.PUBACK:  # CONNECT is none of the two, and harmless
                    gathered.turn(PacketType.PUBLISH)
                at = self._take_plain(data, at, gathered.messages, gathered.acked)
                framed = self._frame(data, at, self.limits.packet_max_bytes) if at < len(data) else None
                if framed is None:
                    return at
                first, kind = data[at], data[at] >> 4
                # Answers are what messages bring with them. Of messages only those to be retained are dear.
                dear = first & 1 if kind == PacketType.PUBLISH else not PacketType.PUBACK <= kind <= PacketType.PUBCOMP
                if dear and not self._afford():
                    return at
                body = data[framed[0] : framed[1]]
                at = framed[1]
                if kind == PacketType.PUBLISH:
                    gathered.turn(PacketType.PUBLISH)
                    gathered.messages.append(self._take_publish(first, body))
                elif PacketType.PUBACK <= kind <= PacketType.PUBCOMP:
                    self._take_ack(first, body, gathered)
                elif kind in (PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE):
                    gathered.flush()
                    self._filters = FilterReader(first, body, self.version)
                    if not self._read_filters(events):
                        return at
                else:
                    event = self._take_control(first, body)
                    if event is not None:
                        gathered.flush()
                        events.append(event)
        finally:
            gathered.flush()
        return at

    def _afford(self) -> bool:
        """Whether one more dear packet may be taken; if not, it waits."""
        if self.dear_left <= 0:
            self.waiting = True
            return False
        self.dear_left -= 1
        return True

    def _read_filters(self, events: list[Event]) -> bool:
        """Go on reading a SUBSCRIBE or UNSUBSCRIBE: whether what follows may be taken, too.

        What its filters ask for is dear, and has to be done first.
        """
        filters = self._filters
        assert filters is not None
        while not filters.done:
            if not self._afford():
                return False
            filters.read(FILTERS_AT_ONCE)
        self._filters = None
        packet = filters.packet()
        if isinstance(packet, Unsubscribe):
            self.dear_left -= len(packet.filters)
            events.append(Unsubscribed(packet))
            self.waiting = self.dear_left < 0
            return not self.waiting
        if packet.properties.subscription_identifier and not self.limits.subscription_identifiers_available:
            raise MqttError(
                Reason.SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED,
                "SUBSCRIBE has a subscription identifier",
            )
        self.dear_left -= len(packet.subscriptions)
        events.append(Subscribed(packet))
        self.waiting = self.dear_left < 0
        return not self.waiting

    def _take_plain(self, d: bytes, i: int, messages: list[Message], acked: list[int]) -> int:
        """Take plain PUBLISHes of QoS 0 and 1 and plain PUBACKs from `i`; return where something else begins.

        HOT, and written for speed: `python tests/protocol/test_mqtt_connection.py` measures it. It takes only
        what `_frame` and `_take_publish` would take, and leaves everything it is not sure of to them.
        """
        limits = self.limits
        if not (limits.maximum_qos and limits.retain_available):
            return i
        add = messages.append
        topics = self._topics
        sections = self._properties
        flags_of = _FLAGS
        v5 = self.version == V5
        max_bytes = limits.packet_max_bytes
        in_flight = self._in_flight
        room = self._intake_room
        n = len(d)
        properties = None
        # Apps that publish one thing over and over send the same bytes but for packet id and payload. Of the last
        # message: up to the former, and what stands between the two.
        like = between = b""
        length = id_at = payload_at = qos = 0
        retain = dup = False
        topic, last = "", None
        try:
            while i + 4 <= n:
                if like and d.startswith(like, i) and i + length <= n:
                    p = i + id_at
                    m = p + 2
                    packet_id = d[p:m]
                    if packet_id == b"\0\0" or not room:
                        return i
                    if not between or d.startswith(between, m):
                        m = i + payload_at
                        i += length
                        add((topic, qos, retain, dup, packet_id, d[m:i], properties))
                        room -= 1
                        continue
                first = d[i]
                end = d[i + 1]
                begin = i + 2
                flags = flags_of[first]
                if flags is None:
                    if first != 0x40 or end != 2:
                        return i
                    number = d[begin] << 8 | d[i + 3]
                    if in_flight.get(number) != 1:  # Awaits.PUBACK
                        return i
                    del in_flight[number]
                    acked.append(number)
                    i += 4
                    continue
                if end > 127:
                    high = d[begin]
                    if not 0 < high < 128:
                        return i
                    end += (high << 7) - 128
                    begin += 1
                end += begin
                if end > n or begin + 2 > end or end - i > max_bytes:
                    return i
                p = begin + 2 + (d[begin] << 8 | d[begin + 1])  # where the topic ends
                qos, retain, dup = flags
                alias = None
                if qos:
                    m = p + 2
                    packet_id = d[p:m]
                    if packet_id == b"\0\0" or not room:
                        return i
                else:
                    m = p
                    packet_id = b""
                if v5:
                    if m >= end:
                        return i
                    size = d[m]
                    m += 1
                    if size:
                        if size > 127 or m + size > end:
                            return i
                        properties, alias = sections[d[m - 1 : m + size]]
                        m += size
                        if alias:
                            raw = d[begin + 2 : p]
                            topic = self._resolve(topics[raw] if raw else "", alias)
                        elif p == begin + 2:
                            return i
                        else:
                            topic = topics[d[begin + 2 : p]]
                    elif p == begin + 2:
                        return i
                    else:
                        properties = None
                        topic = topics[d[begin + 2 : p]]
                elif m > end:
                    return i
                else:
                    topic = topics[d[begin + 2 : p]]
                add((topic, qos, retain, dup, packet_id, d[m:end], properties))
                like = b""
                if qos:
                    room -= 1
                    if topic is last and not alias:
                        like, between = d[i:p], d[p + 2 : m]
                        id_at, payload_at, length = p - i, m - i, end - i
                last = topic
                i = end
            return i
        finally:
            self._intake_room = room

    def _take_publish(self, first: int, body: bytes) -> Message:
        packet = decode_body(first, body, self.version)
        assert isinstance(packet, Publish)
        counts = packet.qos == 1 or (packet.qos == 2 and packet.packet_id not in self._unreleased)
        if counts and not self._intake_room:
            raise MqttError(Reason.RECEIVE_MAXIMUM_EXCEEDED, "more unacknowledged PUBLISHes than the receive maximum")
        properties, alias = split_alias(packet.properties)
        topic = self._resolve(packet.topic, alias) if alias else packet.topic
        packet_id = packet.packet_id.to_bytes(2, "big") if packet.qos else b""
        self._intake_room -= counts
        dup = packet.dup
        if packet.qos == 2:
            # Within a connection an id means one message until its PUBREL (MQTT-4.3.3-10), whatever DUP says.
            dup |= not counts
            self._unreleased.add(packet.packet_id)
        return topic, packet.qos, packet.retain, dup, packet_id, packet.payload, properties

    def _resolve(self, topic: str, alias: int) -> str:
        """Set or use an alias (MQTT 5.0 §3.3.2.3.4)."""
        if alias > self.limits.topic_alias_max:
            raise MqttError(Reason.TOPIC_ALIAS_INVALID, "a topic alias above the topic alias maximum")
        if topic:
            self._aliases[alias] = topic
            return topic
        if alias not in self._aliases:
            raise MqttError(Reason.PROTOCOL_ERROR, "a topic alias that was never set")
        return self._aliases[alias]

    def _take_ack(self, first: int, body: bytes, gathered: _Gathered) -> None:
        """PUBACK, PUBREC, PUBCOMP answer a message of ours; PUBREL releases one of the client's."""
        packet = decode_body(first, body, self.version)
        assert isinstance(packet, Ack)
        number, reason = packet.packet_id, packet.reason
        awaits = self._in_flight.get(number)
        match packet:
            case Pubrel():
                gathered.turn(PacketType.PUBREL)
                gathered.released.append(number)
            case Puback():
                self._check_answer(awaits, Awaits.PUBACK, "PUBACK")
                if awaits is None:
                    return  # acknowledged twice, or of an earlier connection: nothing waits for it
                del self._in_flight[number]
                gathered.turn(PacketType.PUBACK)
                gathered.acked.append(number)
                if reason >= 0x80:
                    gathered.refused.append((number, reason))
            case Pubrec():
                self._take_pubrec(number, reason, awaits, gathered)
            case _:
                self._check_answer(awaits, Awaits.PUBCOMP, "PUBCOMP")
                if awaits is None:
                    return
                del self._in_flight[number]
                gathered.turn(PacketType.PUBCOMP)
                gathered.completed.append(number)

    def _take_pubrec(self, number: int, reason: int, awaits: Awaits | None, gathered: _Gathered) -> None:
        if awaits is Awaits.PUBCOMP:
            return  # said twice: the release is on its way
        self._check_answer(awaits, Awaits.PUBREC, "PUBREC")
        if awaits is None:
            if number in self._taken:
                return  # of an earlier connection, and early: the message will be sent again, and answered again
            if reason < 0x80:
                self._out.append(encode(Pubrel(number, Reason.PACKET_IDENTIFIER_NOT_FOUND), self.version))
            return
        gathered.turn(PacketType.PUBREC)
        if reason >= 0x80:  # finished, and there will be no PUBREL (MQTT 5.0 §4.3.3)
            del self._in_flight[number]
            gathered.not_received.append((number, reason))
        else:
            self._in_flight[number] = Awaits.PUBCOMP
            gathered.received.append(number)

    @staticmethod
    def _check_answer(awaits: Awaits | None, wanted: Awaits, name: str) -> None:
        if awaits is not None and awaits is not wanted:
            raise MqttError(Reason.PROTOCOL_ERROR, f"{name} for a message that waits for {awaits.name}")

    def _take_control(self, first: int, body: bytes) -> Event | None:
        packet = decode_body(first, body, self.version)
        match packet:
            case Pingreq():
                self._out.append(_PINGRESP)
            case Disconnect():
                return self._take_disconnect(packet)
            case _:
                raise AssertionError(f"{type(packet).__name__} is not receivable")
        return None

    def _take_disconnect(self, packet: Disconnect) -> Event:
        asked = self.connect.properties.session_expiry_interval if self.connect is not None else None
        if packet.properties.session_expiry_interval and not asked:
            raise MqttError(Reason.PROTOCOL_ERROR, "DISCONNECT revives a session that was to end")  # §3.14.2.2.2
        self._enter(Cause.DISCONNECT)
        clean = packet.reason == Reason.SUCCESS  # any other reason leaves the will in force (MQTT-3.14.4-3)
        return Disconnected(packet, clean, f"the client disconnected, reason 0x{packet.reason:02x}")

    def _fail(self, error: MqttError) -> list[Event]:
        match self.state:
            case State.AWAITING_VERDICT:
                self._write_connack_refusal(error.reason, error.text)
            case State.OPEN:
                self._write_disconnect(error.reason, error.text)
            case _:
                pass  # before a CONNECT was understood no version is agreed on, and no word can be said
        self._enter(Cause.FAIL)
        return [Failed(error)]

    # -------------------------------------------------------------------------------------------- output
    def puback(self, packet_ids: Sequence[bytes], reason: int = 0) -> None:
        """Acknowledge messages of QoS 1, ids as `Publishes` gave them, in that order (MQTT-4.6.0-2).

        To be called after the commit that holds them. On 3.1.1 a refusal has no word: a `reason` of 0x80 or more
        closes the connection instead (3.1.1 §3.3.5.2). Nothing happens once the connection is closed.
        """
        if self.state is State.CLOSED or not packet_ids:
            return
        assert len(packet_ids) <= self.unacknowledged, "more acknowledgements than messages"
        if reason >= 0x80 and self.version == V3:
            self._enter(Cause.CLOSE)
            return
        self._intake_room += len(packet_ids)
        if reason and self.version == V5:
            self._out.append(b"".join([b"\x40\x03%b%c" % (packet_id, reason) for packet_id in packet_ids]))
        else:
            self._out.append(b"\x40\x02" + b"\x40\x02".join(packet_ids))

    def pubrec(self, packet_ids: Sequence[bytes], reason: int = 0) -> None:
        """Answer messages of QoS 2 after the commit that holds them, in the order they came (MQTT-4.6.0-3).

        A `reason` of 0x80 or more ends the exchange (5.0 §4.3.3); 3.1.1 has no such word and is closed instead.
        """
        if self.state is State.CLOSED or not packet_ids:
            return
        if reason >= 0x80:
            if self.version == V3:
                self._enter(Cause.CLOSE)
                return
            for packet_id in packet_ids:
                self._release(int.from_bytes(packet_id, "big"))
        if reason and self.version == V5:
            self._out.append(b"".join([b"\x50\x03%b%c" % (packet_id, reason) for packet_id in packet_ids]))
        else:
            self._out.append(b"\x50\x02" + b"\x50\x02".join(packet_ids))

    def pubcomp(self, packet_ids: Iterable[int], reason: int = 0) -> None:
        """Answer PUBRELs after the commit that forgets their ids; `reason` is for ids that nobody knew."""
        if self.state is State.CLOSED:
            return
        for number in packet_ids:
            self._release(number)
            self._out.append(encode(Pubcomp(number, reason), self.version))

    def _release(self, number: int) -> None:
        if number in self._unreleased:
            self._unreleased.discard(number)
            self._intake_room += 1

    def pubrel(self, packet_ids: Iterable[int]) -> None:
        """Release messages of QoS 2 that the client has, in the order of its PUBRECs (MQTT-4.6.0-4).

        Also what an earlier connection left to release: such ids take their place in the window.
        """
        if self.state is State.CLOSED:
            return
        for number in packet_ids:
            self._taken.discard(number)
            self._in_flight[number] = Awaits.PUBCOMP
            self._out.append(b"\x62\x02" + number.to_bytes(2, "big"))

    def reserve(self, qos: int, packet_id: int | None = None) -> int | None:
        """Take a place in the window, and a packet id, for a message that `publish` will send later.

        `packet_id`: the id that a message sent again had before (MQTT-4.4.0-1). None without a place.
        """
        assert qos in (1, 2)
        if self.state is not State.OPEN or len(self._in_flight) >= self._window:
            return None
        number = self._allocate() if packet_id is None else packet_id
        assert 0 < number <= PACKET_IDS_MAX, "a packet id is 1 to 65535"
        assert number not in self._in_flight, "a packet id in use"
        self._taken.discard(number)
        self._in_flight[number] = Awaits.PUBREC if qos == 2 else Awaits.PUBACK
        return number

    def in_use(self, packet_ids: Iterable[int]) -> None:
        """These packet ids belong to messages that will be sent again: no new message may have one."""
        self._taken.update(packet_ids)

    def fits(self, size: int) -> bool:
        """Whether the client takes a packet with `size` bytes after its fixed header (MQTT-3.1.2-24)."""
        return size + 1 + len(encode_varint(size)) <= self._send_max_bytes

    def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool = False,
        dup: bool = False,
        properties: PublishProperties | bytes | None = None,
        *,
        packet_id: int | None = None,
    ) -> int | None:
        """Queue a message; return its packet id, 0 at QoS 0, None if nothing was queued: no window, or not open.

        `properties` may be bytes of `encode_properties`, made once for many clients; 3.1.1 has none.
        `packet_id`: one that `reserve` gave; without it the message takes its place in the window now.
        Raises TooLargeForPeer, and then nothing was queued either.
        """
        assert qos or not dup, "DUP is for QoS 1 and 2"  # MQTT-3.3.1-2
        if self.state is not State.OPEN:
            return None
        section = b""
        name = encode_text(topic)
        alias = 0
        if self.version == V5:
            if properties is None:
                section = b"\0"
            else:
                section = properties if isinstance(properties, bytes) else encode_properties(properties)
            if self._alias_send_max:
                short = self._shorten(topic, name, section)
                # An alias that is set makes the packet larger: not beyond what the client takes.
                if self.fits(len(short[0]) + (2 if qos else 0) + len(short[1]) + len(payload)):
                    name, section, alias = short
        size = len(name) + (2 if qos else 0) + len(section) + len(payload)
        header = bytes((0x30 | dup << 3 | qos << 1 | retain,)) + encode_varint(size)
        if len(header) + size > self._send_max_bytes:
            raise TooLargeForPeer(f"a message of {len(header) + size} bytes, the client takes {self._send_max_bytes}")
        number = 0
        assert packet_id is None or packet_id in self._in_flight, "a packet id that was not reserved"
        if qos:
            taken = self.reserve(qos) if packet_id is None else packet_id
            if taken is None:
                return None
            number = taken
        if alias:
            self._alias_used(topic, alias)
        self._out += (header, name, number.to_bytes(2, "big") if qos else b"", section, payload)
        return number

    def publish_encoded(self, head: bytes, tail: bytes, qos: int) -> int | None:
        """As `publish`, of a packet encoded once for many: what stands before and behind the packet id.

        HOT: tests/bench, fan-out. The owner has looked whether it `fits` and whether aliases are in use.
        """
        if self.state is not _OPEN:
            return None
        if not qos:
            self._out += (head, tail)
            return 0
        in_flight = self._in_flight
        if len(in_flight) >= self._window:
            return None
        number = self._next_id
        if number in in_flight or self._taken:
            number = self._allocate()
        else:
            self._next_id = number % PACKET_IDS_MAX + 1
        in_flight[number] = _PUBREC if qos == 2 else _PUBACK
        self._out += (head, number.to_bytes(2, "big"), tail)
        return number

    def _shorten(self, topic: str, name: bytes, section: bytes) -> tuple[bytes, bytes, int]:
        """Topic and properties with an alias (MQTT 5.0 §3.3.2.3.4), and the alias to remember, 0 for none.

        Nothing changes yet: the message may still turn out not to be sent.
        """
        aliases = self._aliases_set
        alias = aliases.get(topic, 0)
        if alias:
            name = b"\0\0"
        elif len(topic) < ALIAS_TOPIC_MIN:
            return name, section, 0
        elif len(aliases) < self._alias_send_max:
            alias = len(aliases) + 1
        else:
            alias = aliases[next(iter(aliases))]
        size, at = _varint_at(section)
        return name, encode_varint(size + 3) + section[at:] + b"\x23" + alias.to_bytes(2, "big"), alias

    def _alias_used(self, topic: str, alias: int) -> None:
        """The client knows `alias` as `topic` now; whatever it stood for before is forgotten."""
        aliases = self._aliases_set
        if aliases.pop(topic, 0) != alias and len(aliases) >= self._alias_send_max:
            aliases.pop(next(iter(aliases)))
        aliases[topic] = alias

    def _allocate(self) -> int:
        number = self._next_id
        while number in self._in_flight or number in self._taken:  # ends: the window is smaller than all ids
            number = number % PACKET_IDS_MAX + 1
        self._next_id = number % PACKET_IDS_MAX + 1
        return number

    def suback(self, packet: Subscribe, reasons: Sequence[int]) -> None:
        """One reason a subscription, in its order: the QoS granted, or 0x80 and above. Those in surplus are refused."""
        assert len(reasons) == len(packet.subscriptions)
        reasons = [*reasons, *[Reason.QUOTA_EXCEEDED] * packet.surplus]
        if self.state is not State.OPEN:
            return
        if self.version == V3:
            reasons = [min(reason, 0x80) for reason in reasons]  # 3.1.1 §3.9.3
        self._out.append(encode(Suback(packet.packet_id, tuple(reasons)), self.version))

    def unsuback(self, packet: Unsubscribe, reasons: Iterable[int] | None = None) -> None:
        """One reason a filter, in its order; None: all found and gone."""
        told = (0,) * len(packet.filters) if reasons is None else tuple(reasons)
        assert len(told) == len(packet.filters)
        if self.state is State.OPEN:
            self._out.append(encode(Unsuback(packet.packet_id, told), self.version))

    def disconnect(self, reason: int, text: str = "") -> None:
        """Close, and say why where the protocol has a word for it: 5.0, or a CONNACK still owed."""
        match self.state:
            case State.CLOSED:
                return
            case State.AWAITING_VERDICT:
                self.refuse(reason, text)
                return
            case State.OPEN:
                self._write_disconnect(reason, text)
            case _:
                pass
        self._enter(Cause.CLOSE)

    def _write_disconnect(self, reason: int, text: str) -> None:
        if self.version == V3:
            return  # only a client says DISCONNECT there
        if reason not in DISCONNECT_REASONS or reason == Reason.DISCONNECT_WITH_WILL:
            reason = Reason.UNSPECIFIED_ERROR
        worded = encode(Disconnect(reason, DisconnectProperties(reason_string=text or None)), V5)
        if len(worded) > self._send_max_bytes:  # MQTT-3.14.2-3
            worded = encode(Disconnect(reason), V5)
        self._out.append(worded)


# Looking a member up in its enumeration costs more than all else that `publish_encoded` does with it.
_OPEN, _PUBACK, _PUBREC = State.OPEN, Awaits.PUBACK, Awaits.PUBREC


class _Gathered:
    """Packets of a kind that came one after another, to be told as one event."""

    __slots__ = ("acked", "completed", "events", "kind", "messages", "not_received", "received", "refused", "released")

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.kind = PacketType.PUBLISH
        self._empty()

    def _empty(self) -> None:
        self.messages: list[Message] = []
        self.acked: list[int] = []
        self.refused: list[tuple[int, int]] = []
        self.received: list[int] = []
        self.not_received: list[tuple[int, int]] = []
        self.released: list[int] = []
        self.completed: list[int] = []

    def turn(self, kind: PacketType) -> None:
        """Packets of another kind follow. PUBLISH and PUBACK may be told in any order: their ids are not the same."""
        if kind is not self.kind:
            if {kind, self.kind} != {PacketType.PUBLISH, PacketType.PUBACK}:
                self.flush()
            self.kind = kind

    def flush(self) -> None:
        before = len(self.events)
        if self.messages:
            self.events.append(Publishes(self.messages))
        if self.acked:
            self.events.append(Acked(self.acked, self.refused))
        if self.received or self.not_received:
            self.events.append(Received(self.received, self.not_received))
        if self.released:
            self.events.append(Released(self.released))
        if self.completed:
            self.events.append(Completed(self.completed))
        if len(self.events) > before:
            self._empty()


def _varint_at(section: bytes) -> tuple[int, int]:
    """(value, where what follows begins) of a property section's length, which we wrote ourselves."""
    value = shift = at = 0
    while True:
        byte = section[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
