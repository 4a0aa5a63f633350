"""An MQTT client for tests that says exactly what it is told to, and believes nothing.

Its codec is its own and shares nothing with the gateway's. `decode` is strict: whatever a server may not send (reserved
bits, a property in the wrong packet, a reason code the packet does not have, a length that is not minimal, ill-formed
UTF-8, trailing bytes) fails the test that received it, so every test here also proves the form of every packet it saw.

Encoders take whatever bytes a test wants to send; none of them checks anything.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

WAIT_S = 20.0  # the broker answers in milliseconds; this is what a very busy machine may take
V3, V5 = 4, 5

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE = 1, 2, 3, 4, 5, 6, 7, 8
SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = 9, 10, 11, 12, 13, 14, 15
PINGREQ_BYTES = b"\xc0\x00"

# Property: (identifier, kind, packets that may carry it when a server sends them).
PAYLOAD_FORMAT, MESSAGE_EXPIRY, CONTENT_TYPE, RESPONSE_TOPIC, CORRELATION = 0x01, 0x02, 0x03, 0x08, 0x09
SUBSCRIPTION_ID, SESSION_EXPIRY, ASSIGNED_ID, SERVER_KEEP_ALIVE = 0x0B, 0x11, 0x12, 0x13
AUTH_METHOD, AUTH_DATA, REQUEST_PROBLEM, WILL_DELAY, REQUEST_RESPONSE = 0x15, 0x16, 0x17, 0x18, 0x19
RESPONSE_INFO, SERVER_REFERENCE, REASON_STRING, RECEIVE_MAXIMUM = 0x1A, 0x1C, 0x1F, 0x21
ALIAS_MAXIMUM, TOPIC_ALIAS, MAXIMUM_QOS, RETAIN_AVAILABLE, USER_PROPERTY = 0x22, 0x23, 0x24, 0x25, 0x26
MAXIMUM_PACKET, WILDCARDS_AVAILABLE, SUBSCRIPTION_IDS_AVAILABLE, SHARED_AVAILABLE = 0x27, 0x28, 0x29, 0x2A

_KIND = {
    **dict.fromkeys((PAYLOAD_FORMAT, REQUEST_PROBLEM, REQUEST_RESPONSE, MAXIMUM_QOS, RETAIN_AVAILABLE), "B"),
    **dict.fromkeys((WILDCARDS_AVAILABLE, SUBSCRIPTION_IDS_AVAILABLE, SHARED_AVAILABLE), "B"),
    **dict.fromkeys((SERVER_KEEP_ALIVE, RECEIVE_MAXIMUM, ALIAS_MAXIMUM, TOPIC_ALIAS), "H"),
    **dict.fromkeys((MESSAGE_EXPIRY, SESSION_EXPIRY, WILL_DELAY, MAXIMUM_PACKET), "I"),
    **dict.fromkeys((CONTENT_TYPE, RESPONSE_TOPIC, ASSIGNED_ID, AUTH_METHOD), "text"),
    **dict.fromkeys((RESPONSE_INFO, SERVER_REFERENCE, REASON_STRING), "text"),
    **dict.fromkeys((CORRELATION, AUTH_DATA), "binary"),
    SUBSCRIPTION_ID: "varint",
    USER_PROPERTY: "pair",
}
_ACK_PROPERTIES = {REASON_STRING, USER_PROPERTY}
_MAY_CARRY = {
    CONNACK: {SESSION_EXPIRY, ASSIGNED_ID, SERVER_KEEP_ALIVE, AUTH_METHOD, AUTH_DATA, RESPONSE_INFO, SERVER_REFERENCE}
    | {REASON_STRING, RECEIVE_MAXIMUM, ALIAS_MAXIMUM, MAXIMUM_QOS, RETAIN_AVAILABLE, USER_PROPERTY, MAXIMUM_PACKET}
    | {WILDCARDS_AVAILABLE, SUBSCRIPTION_IDS_AVAILABLE, SHARED_AVAILABLE},
    PUBLISH: {PAYLOAD_FORMAT, MESSAGE_EXPIRY, CONTENT_TYPE, RESPONSE_TOPIC, CORRELATION, SUBSCRIPTION_ID}
    | {TOPIC_ALIAS, USER_PROPERTY},
    **dict.fromkeys((PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK), _ACK_PROPERTIES),
    DISCONNECT: {REASON_STRING, USER_PROPERTY, SERVER_REFERENCE},  # a server sends no session expiry: 3.14.2-2
    AUTH: {AUTH_METHOD, AUTH_DATA, REASON_STRING, USER_PROPERTY},
}
_ERRORS = set(range(0x80, 0xA3))
_MAY_SAY = {
    CONNACK: {0} | set(range(0x80, 0x8B)) | {0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F},
    PUBACK: {0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99},
    PUBREC: {0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99},
    PUBREL: {0, 0x92},
    PUBCOMP: {0, 0x92},
    SUBACK: {0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2},
    UNSUBACK: {0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91},
    DISCONNECT: ({0} | _ERRORS) - {0x84, 0x85, 0x86, 0x88, 0x8A, 0x8C, 0x91, 0x92},
    AUTH: {0, 0x18, 0x19},
}
Value = int | str | bytes | tuple[str, str]
Property = tuple[int, Value]


# ------------------------------------------------------------------------------------------------- encoding
def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = divmod(value, 128)
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def binary(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def text(value: str | bytes) -> bytes:
    return binary(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)


def properties(*pairs: Property) -> bytes:
    body = b""
    for number, value in pairs:
        kind = _KIND[number]
        if isinstance(value, tuple):
            coded = text(value[0]) + text(value[1])
        elif isinstance(value, int):
            coded = varint(value) if kind == "varint" else struct.pack(">" + kind, value)
        else:
            coded = text(value)
        body += bytes((number,)) + coded
    return varint(len(body)) + body


def packet(first: int, *pieces: bytes) -> bytes:
    body = b"".join(pieces)
    return bytes((first,)) + varint(len(body)) + body


@dataclass(frozen=True)
class Will:
    topic: str | bytes
    payload: bytes = b"gone"
    qos: int = 0
    retain: bool = False
    props: tuple[Property, ...] = ()


def connect(
    version: int,
    client_id: str | bytes,
    *,
    clean: bool = True,
    keep_alive: int = 0,
    will: Will | None = None,
    username: str | bytes | None = None,
    password: bytes | None = None,
    props: Sequence[Property] = (),
    protocol: str = "MQTT",
    flags: int | None = None,
    level: int | None = None,
) -> bytes:
    bits = clean << 1 | (username is not None) << 7 | (password is not None) << 6
    if will is not None:
        bits |= 4 | will.qos << 3 | will.retain << 5
    bits = bits if flags is None else flags
    out = text(protocol) + struct.pack(">BBH", version if level is None else level, bits, keep_alive)
    if version == V5:
        out += properties(*props)
    out += text(client_id)
    if will is not None:
        out += (properties(*will.props) if version == V5 else b"") + text(will.topic) + binary(will.payload)
    out += b"" if username is None else text(username)
    out += b"" if password is None else binary(password)
    return packet(0x10, out)


def publish(
    version: int,
    topic: str | bytes,
    payload: bytes = b"",
    qos: int = 0,
    packet_id: int = 0,
    *,
    retain: bool = False,
    dup: bool = False,
    props: Sequence[Property] = (),
) -> bytes:
    number = struct.pack(">H", packet_id) if qos else b""
    section = properties(*props) if version == V5 else b""
    return packet(0x30 | dup << 3 | qos << 1 | retain, text(topic), number, section, payload)


def ack(kind: int, packet_id: int, reason: int = 0, props: Sequence[Property] = ()) -> bytes:
    """PUBACK, PUBREC, PUBREL or PUBCOMP; a reason and properties only if there are any, so it suits 3.1.1, too."""
    tail = bytes((reason,)) if reason or props else b""
    tail += properties(*props) if props else b""
    return packet(kind << 4 | (2 if kind == PUBREL else 0), struct.pack(">H", packet_id), tail)


Filter = tuple[str | bytes, int]  # the filter, and its options byte (on 3.1.1 its QoS)


def subscribe(version: int, packet_id: int, *filters: Filter, props: Sequence[Property] = ()) -> bytes:
    section = properties(*props) if version == V5 else b""
    body = b"".join(text(name) + bytes((options,)) for name, options in filters)
    return packet(0x82, struct.pack(">H", packet_id), section, body)


def unsubscribe(version: int, packet_id: int, *filters: str | bytes, props: Sequence[Property] = ()) -> bytes:
    section = properties(*props) if version == V5 else b""
    return packet(0xA2, struct.pack(">H", packet_id), section, b"".join(text(each) for each in filters))


def disconnect(version: int, reason: int = 0, props: Sequence[Property] = ()) -> bytes:
    if version == V3 or (not reason and not props):
        return b"\xe0\x00"
    return packet(0xE0, bytes((reason,)), properties(*props) if props else b"")


# ------------------------------------------------------------------------------------------------- decoding
@dataclass
class Packet:
    """What a server sent. `reasons`: of SUBACK and UNSUBACK; `reason`: of the others that have one."""

    kind: int
    flags: int
    raw: bytes
    packet_id: int = 0
    reason: int = 0
    reasons: tuple[int, ...] = ()
    session_present: bool = False
    topic: str = ""
    payload: bytes = b""
    props: list[Property] = field(default_factory=list)

    @property
    def qos(self) -> int:
        return self.flags >> 1 & 3

    @property
    def retain(self) -> bool:
        return bool(self.flags & 1)

    @property
    def dup(self) -> bool:
        return bool(self.flags & 8)

    def all(self, number: int) -> list[Value]:
        return [value for each, value in self.props if each == number]

    def get(self, number: int) -> Value | None:
        values = self.all(number)
        assert len(values) < 2, "a property that may stand once stands twice"
        return values[0] if values else None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> bytes:
        assert len(self.data) >= size, "a packet ends inside a field"
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def varint(self) -> int:
        value = 0
        for place in range(4):
            byte = self.number(1)
            value |= (byte & 127) << 7 * place
            if byte < 128:
                assert byte or not place, "a variable byte integer is longer than it need be"
                return value
        raise AssertionError("a variable byte integer of five bytes")

    def text(self) -> str:
        value = self.take(self.number(2)).decode("utf-8")  # strict: raises for surrogates, too
        assert "\0" not in value, "a string holds U+0000"
        return value

    def properties(self, kind: int) -> list[Property]:
        size = self.varint()
        section, found = _Reader(self.take(size)), list[Property]()
        while section.data:
            number = section.varint()
            assert number in _MAY_CARRY[kind], f"property 0x{number:02x} in a packet of type {kind}"
            value: Value
            match _KIND[number]:
                case "B":
                    value = section.number(1)
                    assert value < 2, "a property that is 0 or 1 is neither"
                case "H":
                    value = section.number(2)
                case "I":
                    value = section.number(4)
                case "varint":
                    value = section.varint()
                case "text":
                    value = section.text()
                case "binary":
                    value = section.take(section.number(2))
                case _:
                    value = (section.text(), section.text())
            again = number in (USER_PROPERTY, SUBSCRIPTION_ID)
            assert again or number not in dict(found), f"property 0x{number:02x} stands twice"
            found.append((number, value))
        return found


def decode(first: int, raw: bytes, body: bytes, version: int) -> Packet:
    """One packet as a server may send it; fails on any other."""
    kind, flags, reader, v5 = first >> 4, first & 15, _Reader(body), version == V5
    got = Packet(kind, flags, raw)
    assert kind == PUBLISH or flags == (2 if kind == PUBREL else 0), "reserved header flags are set"
    if kind == CONNACK:
        acknowledge = reader.number(1)
        assert acknowledge < 2, "reserved CONNACK flags are set"
        got.session_present, got.reason = bool(acknowledge), reader.number(1)
        assert not (got.reason and got.session_present), "a refusal says that a session is present"
        got.props = reader.properties(CONNACK) if v5 else []
        assert got.reason in _MAY_SAY[CONNACK] if v5 else got.reason <= 5
    elif kind == PUBLISH:
        assert got.qos < 3, "QoS 3"
        assert got.qos or not got.dup, "DUP at QoS 0"
        got.topic = reader.text()
        assert "+" not in got.topic, "a wildcard in a topic name"
        assert "#" not in got.topic, "a wildcard in a topic name"
        if got.qos:
            got.packet_id = reader.number(2)
            assert got.packet_id, "packet identifier 0"
        got.props = reader.properties(PUBLISH) if v5 else []
        assert got.topic or got.get(TOPIC_ALIAS), "neither topic nor alias"
        assert got.get(TOPIC_ALIAS) != 0, "topic alias 0"
        got.payload = reader.take(len(reader.data))
    elif kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
        got.packet_id = reader.number(2)
        if v5 and reader.data:
            got.reason = reader.number(1)
            got.props = reader.properties(kind) if reader.data else []
        assert got.reason in _MAY_SAY[kind], f"reason 0x{got.reason:02x} in a packet of type {kind}"
    elif kind in (SUBACK, UNSUBACK):
        got.packet_id = reader.number(2)
        got.props = reader.properties(kind) if v5 else []
        if v5 or kind == SUBACK:
            got.reasons = tuple(reader.take(len(reader.data)))
            allowed = _MAY_SAY[kind] if v5 else {0, 1, 2, 0x80}
            assert got.reasons, "no reason code"
            assert allowed.issuperset(got.reasons), f"reasons {got.reasons}"
    elif kind == DISCONNECT:
        assert v5, "a server of 3.1.1 has no DISCONNECT"
        got.reason = reader.number(1) if reader.data else 0
        got.props = reader.properties(DISCONNECT) if reader.data else []
        assert got.reason in _MAY_SAY[DISCONNECT], f"reason 0x{got.reason:02x} in DISCONNECT"
    else:
        assert kind == PINGRESP, f"a packet of type {kind} from a server"
    assert not reader.data, "bytes follow the packet's last field"
    return got


class Closed(AssertionError):
    """The server ended the connection where the test expected a packet."""


class Stream(Protocol):
    """What carries the bytes: a TCP socket, or the tests' WebSocket."""

    def sendall(self, data: bytes) -> None: ...
    def recv(self, size: int) -> bytes: ...
    def settimeout(self, timeout: float | None) -> None: ...
    def close(self) -> None: ...


_serial = itertools.count(1)


def fresh(stem: str = "x") -> str:
    """A client id or topic that no other test uses."""
    return f"{stem}{next(_serial)}"


class Client:
    """One connection. `say` sends bytes; `hear` and `expect` take the next packet; nothing is answered unasked."""

    def __init__(self, port: int, version: int, stream: Stream | None = None) -> None:
        self.port, self.version = port, version
        if stream is None:
            stream = socket.create_connection(("127.0.0.1", port), WAIT_S)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream: Stream = stream
        self.buffer = b""
        self.aside: list[Packet] = []  # heard while an exchange was being finished
        self.next_id = 1
        self.client_id = ""
        self.aliases: dict[int, str] = {}
        self.ended = False

    # --------------------------------------------------------------------------------------------- raw
    def say(self, *data: bytes) -> None:
        self.stream.sendall(b"".join(data))

    def _fill(self, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.stream.settimeout(left)
        try:
            data = self.stream.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.ended = True
            raise Closed("the server closed the connection")
        self.buffer += data

    def hear(self, within_s: float = WAIT_S) -> Packet:
        """The next packet. Raises Closed at the connection's end, TimeoutError if none comes."""
        return self.aside.pop(0) if self.aside else self._read(within_s)

    def _read(self, within_s: float) -> Packet:
        end = time.monotonic() + within_s
        while True:
            value, place = 0, 1
            while len(self.buffer) > place:
                byte = self.buffer[place]
                value |= (byte & 127) << 7 * (place - 1)
                place += 1
                if byte < 128:
                    assert byte or place == 2, "a remaining length is longer than it need be"
                    if len(self.buffer) < place + value:
                        break
                    raw, self.buffer = self.buffer[: place + value], self.buffer[place + value :]
                    return decode(raw[0], raw, raw[place:], self.version)
                assert place < 5, "a remaining length of five bytes"
            self._fill(end)

    def expect(self, kind: int, **fields: object) -> Packet:
        """The next packet is of this kind and has these fields."""
        got = self.hear()
        assert got.kind == kind, f"expected a packet of type {kind}, got {got}"
        for name, value in fields.items():
            assert getattr(got, name) == value, f"expected {name} = {value!r}, got {got}"
        return got

    def expect_close(self, *reasons: int, within_s: float = WAIT_S) -> list[Packet]:
        """The server closes the connection. What it said before is returned; a DISCONNECT says one of `reasons`."""
        heard: list[Packet] = []
        try:
            while True:
                heard.append(self.hear(within_s))
        except Closed:
            pass
        for got in heard:
            if reasons and (got.kind == DISCONNECT or (got.kind == CONNACK and got.reason)):
                assert got.reason in reasons, f"closed with 0x{got.reason:02x}, expected one of {reasons}"
        return heard

    def silence(self) -> list[Packet]:
        """A barrier: everything heard before the answer to a PINGREQ."""
        self.say(PINGREQ_BYTES)
        heard: list[Packet] = []
        while (got := self.hear()).kind != PINGRESP:
            heard.append(got)
        return heard

    # ----------------------------------------------------------------------------------------- comfort
    def connect(self, client_id: str | None = None, **options: object) -> Packet:
        self.client_id = fresh("client") if client_id is None else client_id
        self.say(connect(self.version, self.client_id, **options))  # type: ignore[arg-type]
        return self.expect(CONNACK)

    def number(self) -> int:
        number, self.next_id = self.next_id, self.next_id % 65535 + 1
        return number

    def subscribe(self, *filters: str | Filter, qos: int = 2, props: Sequence[Property] = ()) -> tuple[int, ...]:
        """Subscribe; the reasons. The SUBACK must be the next packet but for messages of these subscriptions."""
        number = self.number()
        pairs = [each if isinstance(each, tuple) else (each, qos) for each in filters]
        self.say(subscribe(self.version, number, *pairs, props=props))
        return self.expect(SUBACK, packet_id=number).reasons

    def unsubscribe(self, *filters: str) -> tuple[int, ...]:
        number = self.number()
        self.say(unsubscribe(self.version, number, *filters))
        return self.expect(UNSUBACK, packet_id=number).reasons

    def publish(self, topic: str, payload: bytes = b"", qos: int = 0, **options: object) -> Packet | None:
        """Publish and, at QoS 1 and 2, take the whole exchange; what comes first is the answer."""
        number = self.number() if qos else 0
        self.say(publish(self.version, topic, payload, qos, number, **options))  # type: ignore[arg-type]
        if not qos:
            return None
        first = self.expect(PUBACK if qos == 1 else PUBREC, packet_id=number)
        if qos == 2 and first.reason < 0x80:
            self.say(ack(PUBREL, number))
            self.expect(PUBCOMP, packet_id=number, reason=0)
        return first

    def message(self, payload: bytes | None = None, **fields: object) -> Packet:
        """The next packet is a message; its exchange is finished. An alias is resolved into `topic`.

        Other messages that come in between its PUBREC and the server's PUBREL keep their order.
        """
        got = self.expect(PUBLISH, **fields)
        alias = got.get(TOPIC_ALIAS)
        if isinstance(alias, int):
            if got.topic:
                self.aliases[alias] = got.topic
            got.topic = self.aliases[alias]
        if payload is not None:
            assert got.payload == payload, f"expected {payload!r}, got {got}"
        if got.qos == 1:
            self.say(ack(PUBACK, got.packet_id))
        elif got.qos == 2:
            self.finish(got.packet_id)
        return got

    def finish(self, packet_id: int) -> None:
        """Take the second half of a QoS 2 exchange, PUBREC to PUBCOMP."""
        self.say(ack(PUBREC, packet_id))
        between = self.aside
        self.aside = []
        while (heard := self._read(WAIT_S)).kind != PUBREL or heard.packet_id != packet_id:
            assert heard.kind == PUBLISH, f"expected PUBREL {packet_id}, got {heard}"
            between.append(heard)
        assert heard.reason == 0, heard
        self.aside = between
        self.say(ack(PUBCOMP, packet_id))

    def end(self, reason: int = 0, props: Sequence[Property] = ()) -> None:
        """DISCONNECT, and wait until the server has closed, too: its session is then at rest."""
        self.say(disconnect(self.version, reason, props))
        self.expect_close()
        self.stream.close()

    def drop(self) -> None:
        """End the connection without a word, by a reset that the server notices at once."""
        if isinstance(self.stream, socket.socket):
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.close()
