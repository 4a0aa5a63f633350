"""MQTT 3.1.1 and 5.0 control packets: bytes to values (`packets`) and back, strictly. Knows no connection and no state.

`decode` checks everything one packet says of itself: header flags, lengths, UTF-8, topic names and filters, which
property may stand where and how often, reason codes, trailing bytes. What depends on an earlier packet (aliases,
windows, what the server advertised) is the connection's. What a peer got wrong raises `MqttError`; asking to encode
what no packet can hold is our own mistake and raises `ValueError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from enum import Enum
from typing import Any, TypeVar

from gateway.mqtt.packets import (
    V3,
    V5,
    Ack,
    AckProperties,
    AnyProperties,
    Auth,
    AuthProperties,
    Connack,
    ConnackProperties,
    Connect,
    ConnectProperties,
    Disconnect,
    DisconnectProperties,
    MqttError,
    Packet,
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
    SubscribeProperties,
    Subscription,
    Unsuback,
    Unsubscribe,
    UnsubscribeProperties,
    Will,
    WillProperties,
)
from gateway.mqtt.topics import check_filter, check_topic

REMAINING_LENGTH_MAX = 268_435_455
TEXT_MAX_BYTES = 65_535
# Kept of one SUBSCRIBE: as many as a session may have. Those beyond are read and counted, and take no memory.
FILTERS_MAX = 10_000


def _malformed(text: str) -> MqttError:
    return MqttError(Reason.MALFORMED_PACKET, text)


def _protocol(text: str) -> MqttError:
    return MqttError(Reason.PROTOCOL_ERROR, text)


# ---------------------------------------------------------------------------------------------- properties
class _Kind(Enum):
    BIT = "a byte, 0 or 1"
    U16 = "two byte integer"
    U32 = "four byte integer"
    VARINT = "variable byte integer"
    TEXT = "UTF-8 string"
    BINARY = "binary data"
    PAIR = "UTF-8 string pair"


# MQTT 5.0 §2.2.2.2. Which packet may carry which property is said by the fields of the classes in `packets`.
_PROPERTIES: dict[int, tuple[str, _Kind]] = {
    0x01: ("payload_format_indicator", _Kind.BIT),
    0x02: ("message_expiry_interval", _Kind.U32),
    0x03: ("content_type", _Kind.TEXT),
    0x08: ("response_topic", _Kind.TEXT),
    0x09: ("correlation_data", _Kind.BINARY),
    0x0B: ("subscription_identifier", _Kind.VARINT),
    0x11: ("session_expiry_interval", _Kind.U32),
    0x12: ("assigned_client_identifier", _Kind.TEXT),
    0x13: ("server_keep_alive", _Kind.U16),
    0x15: ("authentication_method", _Kind.TEXT),
    0x16: ("authentication_data", _Kind.BINARY),
    0x17: ("request_problem_information", _Kind.BIT),
    0x18: ("will_delay_interval", _Kind.U32),
    0x19: ("request_response_information", _Kind.BIT),
    0x1A: ("response_information", _Kind.TEXT),
    0x1C: ("server_reference", _Kind.TEXT),
    0x1F: ("reason_string", _Kind.TEXT),
    0x21: ("receive_maximum", _Kind.U16),
    0x22: ("topic_alias_maximum", _Kind.U16),
    0x23: ("topic_alias", _Kind.U16),
    0x24: ("maximum_qos", _Kind.BIT),
    0x25: ("retain_available", _Kind.BIT),
    0x26: ("user_property", _Kind.PAIR),
    0x27: ("maximum_packet_size", _Kind.U32),
    0x28: ("wildcard_subscription_available", _Kind.BIT),
    0x29: ("subscription_identifier_available", _Kind.BIT),
    0x2A: ("shared_subscription_available", _Kind.BIT),
}
_ID_OF = {name: number for number, (name, _) in _PROPERTIES.items()}
_NEVER_ZERO = {
    "subscription_identifier": Reason.PROTOCOL_ERROR,
    "receive_maximum": Reason.PROTOCOL_ERROR,
    "maximum_packet_size": Reason.PROTOCOL_ERROR,
    "topic_alias": Reason.TOPIC_ALIAS_INVALID,
}

_P = TypeVar("_P", bound=AnyProperties)
_ALLOWED: dict[type[Any], frozenset[str]] = {
    kind: frozenset(field.name for field in fields(kind)) for kind in AnyProperties.__args__
}

# Which reason codes a packet may carry, MQTT 5.0 §2.4 table 2-6 and the packets' own tables.
_PUBACK_REASONS = frozenset({0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99})
_PUBREL_REASONS = frozenset({0x00, 0x92})
_SUBACK_REASONS = frozenset({0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2})
_UNSUBACK_REASONS = frozenset({0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91})
_AUTH_REASONS = frozenset({0x00, 0x18, 0x19})
CONNACK_REASONS = frozenset({0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, *range(0x9A, 0x9E), 0x9F})
DISCONNECT_REASONS = frozenset(
    {0x00, 0x04, *range(0x80, 0x84), 0x87, 0x89, 0x8B, *range(0x8D, 0x91), *range(0x93, 0xA3)}
)
_SUBACK_REASONS_V3 = frozenset({0x00, 0x01, 0x02, 0x80})


# ------------------------------------------------------------------------------------------------- reading
class _Reader:
    """A place in one packet's body. Every read beyond its end is a malformed packet."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int = 0, end: int | None = None) -> None:
        self.data = data
        self.at = at
        self.end = len(data) if end is None else end

    def take(self, size: int) -> bytes:
        at = self.at
        if at + size > self.end:
            raise _malformed("the packet ends inside a field")
        self.at = at + size
        return self.data[at : at + size]

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def varint(self) -> int:  # MQTT 5.0 §1.5.5
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.u8()
            value |= (byte & 127) << shift
            if byte < 128:
                if shift and not byte:
                    raise _malformed("a variable byte integer takes more bytes than it needs")
                return value
        raise _malformed("a variable byte integer has more than four bytes")

    def binary(self) -> bytes:
        return self.take(self.u16())

    def text(self) -> str:
        return _text(self.binary())

    def packet_id(self) -> int:
        packet_id = self.u16()
        if not packet_id:
            raise _protocol("a packet identifier is not 0")  # MQTT-2.2.1-3
        return packet_id

    def rest(self) -> bytes:
        return self.take(self.end - self.at)


def _text(raw: bytes) -> str:
    """MQTT 5.0 §1.5.4: well-formed UTF-8 (so no surrogates), without U+0000."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("a string is not UTF-8") from None
    if "\0" in text:
        raise _malformed("a string holds U+0000")
    return text


def _topic(text: str) -> str:
    try:
        check_topic(text)
    except ValueError as error:
        raise MqttError(Reason.TOPIC_NAME_INVALID, str(error)) from None
    return text


def _filter(text: str, version: int) -> str:
    """5.0 answers each filter by itself, so an ill-formed one is the owner's to refuse with 0x8F (§3.9.3, §3.11.3)."""
    if version == V5 and text:
        return text
    try:
        check_filter(text, shared=version == V5)
    except ValueError as error:
        raise MqttError(Reason.TOPIC_FILTER_INVALID, str(error)) from None
    return text


def _bit(reader: _Reader) -> int:
    value = reader.u8()
    if value > 1:
        raise _protocol("a property that is 0 or 1 has another value")
    return value


def _pair(reader: _Reader) -> tuple[str, str]:
    return reader.text(), reader.text()


_READ: dict[_Kind, Callable[[_Reader], Any]] = {
    _Kind.BIT: _bit,
    _Kind.U16: _Reader.u16,
    _Kind.U32: _Reader.u32,
    _Kind.VARINT: _Reader.varint,
    _Kind.TEXT: _Reader.text,
    _Kind.BINARY: _Reader.binary,
    _Kind.PAIR: _pair,
}


def _properties(kind: type[_P], reader: _Reader) -> _P:
    """The property section at the reader: its length, then properties that `kind` has fields for (§2.2.2)."""
    size = reader.varint()
    end = reader.at + size
    if end > reader.end:
        raise _malformed("the properties run beyond the packet")
    if not size:
        return kind()
    inner = _Reader(reader.data, reader.at, end)
    reader.at = end
    values: dict[str, Any] = {}
    while inner.at < end:
        number = inner.varint()
        if number not in _PROPERTIES:
            raise _malformed("a property identifier is unknown")
        name, form = _PROPERTIES[number]
        if name not in _ALLOWED[kind]:
            raise _protocol(f"{name} is not a property of this packet")
        value = _READ[form](inner)
        if not value and name in _NEVER_ZERO:
            raise MqttError(_NEVER_ZERO[name], f"{name} is not 0")
        if name == "user_property" or (name == "subscription_identifier" and kind is PublishProperties):
            values.setdefault(name, []).append(value)
        elif name in values:
            raise _protocol(f"{name} stands there twice")
        else:
            values[name] = value
    for name in ("user_property", "subscription_identifier"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    if "response_topic" in values:
        _topic(values["response_topic"])  # MQTT-3.3.2-14
    if "authentication_data" in values and "authentication_method" not in values:
        raise _protocol("authentication data needs an authentication method")
    return kind(**values)


def decode_publish_properties(section: bytes) -> PublishProperties:
    """A PUBLISH's property section, its length in front."""
    reader = _Reader(section)
    properties = _properties(PublishProperties, reader)
    _end(reader)
    return properties


def _end(reader: _Reader) -> None:
    if reader.at != reader.end:
        raise _malformed("bytes follow the last field of the packet")


def _reason(reader: _Reader, allowed: frozenset[int]) -> int:
    reason = reader.u8()
    if reason not in allowed:
        raise _protocol("a reason code this packet does not have")
    return reason


ONLY = "only MQTT 3.1.1 and 5.0 are spoken here"
_LEGACY = b"\x00\x06MQIsdp\x03"


def protocol_level(body: bytes) -> int | None:
    """The protocol level a CONNECT's body claims, None if it isn't MQTT's. Whatever else it holds may be wrong."""
    if body[:6] == b"\x00\x04MQTT" and len(body) > 6:
        return body[6]
    if body[:8] == _LEGACY[:8]:
        return 3
    return None


def _read_connect(first: int, reader: _Reader, version: int) -> Connect:
    level = protocol_level(reader.data)
    legacy = reader.data[: len(_LEGACY)] == _LEGACY
    if level is None:
        raise MqttError(Reason.UNSUPPORTED_PROTOCOL_VERSION, "the protocol name is not MQTT")
    if legacy:
        level = V3
    if level not in (V3, V5):
        raise MqttError(Reason.UNSUPPORTED_PROTOCOL_VERSION, ONLY)
    reader.take(len(_LEGACY) if legacy else 7)
    flags = reader.u8()
    if flags & 1:
        raise _malformed("CONNECT's reserved flag is set")  # MQTT-3.1.2-3
    will_qos = flags >> 3 & 3
    if will_qos == 3 or (flags & 0x38 and not flags & 4):
        raise _malformed("CONNECT's will flags contradict each other")  # MQTT-3.1.2-11..13
    if level == V3 and flags & 0x40 and not flags & 0x80:
        raise _malformed("CONNECT has a password without a user name")  # 3.1.1, MQTT-3.1.2-22
    keep_alive = reader.u16()
    properties = _properties(ConnectProperties, reader) if level == V5 else ConnectProperties()
    client_id = reader.text()
    will = None
    if flags & 4:
        will_properties = _properties(WillProperties, reader) if level == V5 else WillProperties()
        topic = _topic(reader.text())
        will = Will(topic, reader.binary(), will_qos, bool(flags & 0x20), will_properties)
    username = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    _end(reader)
    return Connect(level, client_id, bool(flags & 2), keep_alive, username, password, will, properties, legacy)


def _read_connack(first: int, reader: _Reader, version: int) -> Connack:
    flags = reader.u8()
    if flags > 1:
        raise _malformed("CONNACK's reserved flags are set")
    if version == V3:
        reason = _reason(reader, frozenset(range(6)))
        properties = ConnackProperties()
    else:
        reason = _reason(reader, CONNACK_REASONS)
        properties = _properties(ConnackProperties, reader)
    if flags and reason:
        raise _protocol("a refused connection has no session")  # MQTT-3.2.2-6
    _end(reader)
    return Connack(bool(flags), reason, properties)


def _read_publish(first: int, reader: _Reader, version: int) -> Publish:
    qos = first >> 1 & 3
    if qos == 3:
        raise _malformed("PUBLISH has QoS 3")  # MQTT-3.3.1-4
    if first & 8 and not qos:
        raise _malformed("PUBLISH at QoS 0 has DUP set")  # MQTT-3.3.1-2
    topic = reader.text()
    packet_id = reader.packet_id() if qos else 0
    properties = _properties(PublishProperties, reader) if version == V5 else PublishProperties()
    if topic:
        _topic(topic)
    elif version == V3:
        raise MqttError(Reason.TOPIC_NAME_INVALID, "a topic name has at least one character")
    elif properties.topic_alias is None:
        raise _protocol("PUBLISH has neither a topic nor a topic alias")  # §3.3.2.1
    return Publish(topic, reader.rest(), qos, bool(first & 1), bool(first & 8), packet_id, properties)


def _read_ack(kind: Callable[[int, int, AckProperties], Packet], allowed: frozenset[int]) -> Callable[..., Packet]:
    def read(first: int, reader: _Reader, version: int) -> Packet:
        packet_id = reader.packet_id()
        reason = 0
        properties = AckProperties()
        if version == V5 and reader.at < reader.end:  # both may be left out, §3.4.2.1
            reason = _reason(reader, allowed)
            if reader.at < reader.end:
                properties = _properties(AckProperties, reader)
        _end(reader)
        return kind(packet_id, reason, properties)

    return read


class FilterReader:
    """A SUBSCRIBE or UNSUBSCRIBE, read piece by piece: one of a megabyte holds a quarter of a million filters."""

    def __init__(self, first: int, body: bytes, version: int) -> None:
        self._subscribes = first >> 4 == PacketType.SUBSCRIBE
        self._version = version
        self._reader = reader = _Reader(body)
        self._packet_id = reader.packet_id()
        kind = SubscribeProperties if self._subscribes else UnsubscribeProperties
        self._properties: Any = _properties(kind, reader) if version == V5 else kind()
        self._subscriptions: list[Subscription] = []
        self._filters: list[str] = []
        self._surplus = 0
        if reader.at == reader.end:  # MQTT-3.8.3-2, MQTT-3.10.3-2
            raise _protocol(f"{'SUBSCRIBE' if self._subscribes else 'UNSUBSCRIBE'} has no topic filter")

    @property
    def done(self) -> bool:
        return self._reader.at == self._reader.end

    def read(self, count: int) -> int:
        """Read so many filters more, or what there is; return how many that were. Raises MqttError."""
        reader, version = self._reader, self._version
        done = 0
        while done < count and reader.at < reader.end:
            if not self._subscribes:
                self._filters.append(_filter(reader.text(), version))
            elif len(self._subscriptions) < FILTERS_MAX:
                self._subscriptions.append(_subscription(reader, version))
            else:
                _subscription(reader, version)
                self._surplus += 1
            done += 1
        return done

    def packet(self) -> Subscribe | Unsubscribe:
        """Once `done`."""
        assert self.done
        if self._subscribes:
            return Subscribe(self._packet_id, tuple(self._subscriptions), self._properties, self._surplus)
        return Unsubscribe(self._packet_id, tuple(self._filters), self._properties)


def _subscription(reader: _Reader, version: int) -> Subscription:
    filter = _filter(reader.text(), version)
    options = reader.u8()
    if options & 3 == 3 or options & (0xC0 if version == V5 else 0xFC):
        raise _malformed("a subscription's reserved option bits are set")  # MQTT-3.8.3-5
    handling = options >> 4 & 3
    if handling == 3:
        raise _protocol("a subscription has retain handling 3")
    if options & 4 and filter.startswith("$share/"):
        raise _protocol("a shared subscription has No Local set")  # MQTT-3.8.3-4
    return Subscription(filter, options & 3, bool(options & 4), bool(options & 8), handling)


def _read_filters(first: int, reader: _Reader, version: int) -> Subscribe | Unsubscribe:
    filters = FilterReader(first, reader.rest(), version)
    filters.read(REMAINING_LENGTH_MAX)
    return filters.packet()


def _read_suback(first: int, reader: _Reader, version: int) -> Suback:
    packet_id = reader.packet_id()
    properties = _properties(AckProperties, reader) if version == V5 else AckProperties()
    reasons = tuple(reader.rest())
    if not reasons or not (_SUBACK_REASONS if version == V5 else _SUBACK_REASONS_V3).issuperset(reasons):
        raise _protocol("SUBACK has a reason code it does not have, or none")
    return Suback(packet_id, reasons, properties)


def _read_unsuback(first: int, reader: _Reader, version: int) -> Unsuback:
    packet_id = reader.packet_id()
    if version == V3:
        _end(reader)
        return Unsuback(packet_id)
    properties = _properties(AckProperties, reader)
    reasons = tuple(reader.rest())
    if not reasons or not _UNSUBACK_REASONS.issuperset(reasons):
        raise _protocol("UNSUBACK has a reason code it does not have, or none")
    return Unsuback(packet_id, reasons, properties)


def _read_pingreq(first: int, reader: _Reader, version: int) -> Pingreq:
    _end(reader)
    return Pingreq()


def _read_pingresp(first: int, reader: _Reader, version: int) -> Pingresp:
    _end(reader)
    return Pingresp()


def _read_disconnect(first: int, reader: _Reader, version: int) -> Disconnect:
    reason = 0
    properties = DisconnectProperties()
    if version == V5 and reader.at < reader.end:  # both may be left out, §3.14.2.1
        reason = _reason(reader, DISCONNECT_REASONS)
        if reader.at < reader.end:
            properties = _properties(DisconnectProperties, reader)
    _end(reader)
    return Disconnect(reason, properties)


def _read_auth(first: int, reader: _Reader, version: int) -> Auth:
    if reader.at == reader.end:  # §3.15.2.1
        return Auth()
    reason = _reason(reader, _AUTH_REASONS)
    properties = _properties(AuthProperties, reader)
    if properties.authentication_method is None:
        raise _protocol("AUTH names no authentication method")
    _end(reader)
    return Auth(reason, properties)


_READERS: dict[PacketType, Callable[[int, _Reader, int], Packet]] = {
    PacketType.CONNECT: _read_connect,
    PacketType.CONNACK: _read_connack,
    PacketType.PUBLISH: _read_publish,
    PacketType.PUBACK: _read_ack(Puback, _PUBACK_REASONS),
    PacketType.PUBREC: _read_ack(Pubrec, _PUBACK_REASONS),
    PacketType.PUBREL: _read_ack(Pubrel, _PUBREL_REASONS),
    PacketType.PUBCOMP: _read_ack(Pubcomp, _PUBREL_REASONS),
    PacketType.SUBSCRIBE: _read_filters,
    PacketType.SUBACK: _read_suback,
    PacketType.UNSUBSCRIBE: _read_filters,
    PacketType.UNSUBACK: _read_unsuback,
    PacketType.PINGREQ: _read_pingreq,
    PacketType.PINGRESP: _read_pingresp,
    PacketType.DISCONNECT: _read_disconnect,
    PacketType.AUTH: _read_auth,
}
_FLAGS_2 = frozenset({PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE})


def check_first_byte(first: int, version: int) -> PacketType:
    """The packet's type, if its fixed header's first byte is one this version has (§2.1.2, §2.1.3)."""
    number = first >> 4
    if number == 0 or (number == PacketType.AUTH and version == V3):
        raise _malformed("a packet type that is reserved")
    kind = PacketType(number)
    if kind is PacketType.PUBLISH:
        if first & 6 == 6:
            raise _malformed("PUBLISH has QoS 3")
        if first & 14 == 8:
            raise _malformed("PUBLISH at QoS 0 has DUP set")
    elif first & 15 != (2 if kind in _FLAGS_2 else 0):
        raise _malformed(f"{kind.name} has reserved header flags set")
    return kind


def remaining_length(data: bytes, at: int, *, strict: bool = True) -> tuple[int, int] | None:
    """(remaining length, where the body begins) of the packet that begins at `at`; None while bytes are missing.

    `strict` refuses more length bytes than needed, as 5.0 does and 3.1.1 does not (MQTT-1.5.5-1).
    """
    value = 0
    for place in range(4):
        i = at + 1 + place
        if i >= len(data):
            return None
        byte = data[i]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            if strict and place and not byte:
                raise _malformed("the remaining length takes more bytes than it needs")
            return value, i + 1
    raise _malformed("the remaining length has more than four bytes")


def decode_body(first: int, body: bytes, version: int) -> Packet:
    """One packet from its first byte and everything after its remaining length. A CONNECT brings its own version."""
    kind = check_first_byte(first, version)
    return _READERS[kind](first, _Reader(body), version)


def decode(data: bytes, version: int) -> Packet:
    """Exactly one whole packet."""
    framed = remaining_length(data, 0) if data else None
    if framed is None or framed[1] + framed[0] > len(data):
        raise _malformed("the packet is cut short")
    size, at = framed
    if at + size < len(data):
        raise _malformed("bytes follow the packet")
    return decode_body(data[0], data[at:], version)


class TopicCache(dict[bytes, str]):
    """Valid topic names by their bytes. Forgets everything when full, so its memory is bounded."""

    def __init__(self, entries_max: int = 4096, topic_max_bytes: int = 1024) -> None:
        super().__init__()
        self.entries_max = entries_max
        self.topic_max_bytes = topic_max_bytes

    def __missing__(self, raw: bytes) -> str:
        topic = _topic(_text(raw))
        if len(raw) <= self.topic_max_bytes:
            if len(self) >= self.entries_max:
                self.clear()
            self[raw] = topic
        return topic


class PropertiesCache(dict[bytes, tuple[PublishProperties | None, int]]):
    """A client's PUBLISH property sections, decoded, by their bytes (length in front). Bounded as `TopicCache` is.

    The topic alias, 0 for none, stands beside the other properties (None if there are no others): it means
    something to one connection, they to everyone.
    """

    def __init__(self, entries_max: int = 1024, section_max_bytes: int = 128) -> None:
        super().__init__()
        self.entries_max = entries_max
        self.section_max_bytes = section_max_bytes

    def __missing__(self, section: bytes) -> tuple[PublishProperties | None, int]:
        split = split_alias(decode_publish_properties(section))
        if len(section) <= self.section_max_bytes:
            if len(self) >= self.entries_max:
                self.clear()
            self[section] = split
        return split


def split_alias(properties: PublishProperties) -> tuple[PublishProperties | None, int]:
    """What a client's PUBLISH says to everyone (None: nothing), and its topic alias (0: none)."""
    if properties.subscription_identifier:  # MQTT-3.3.4-6
        raise _protocol("PUBLISH from a client has a subscription identifier")
    alias = properties.topic_alias or 0
    if alias:
        properties = replace(properties, topic_alias=None)
    return (None if properties == _NO_PROPERTIES else properties), alias


_NO_PROPERTIES = PublishProperties()


# ------------------------------------------------------------------------------------------------- writing
def encode_varint(value: int) -> bytes:
    if not 0 <= value <= REMAINING_LENGTH_MAX:
        raise ValueError("a variable byte integer is 0 to 268435455")
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_text(text: str) -> bytes:
    if "\0" in text:
        raise ValueError("a string holds no U+0000")
    return encode_binary(text.encode())


def encode_binary(data: bytes) -> bytes:
    if len(data) > TEXT_MAX_BYTES:
        raise ValueError("a string has at most 65535 bytes")
    return len(data).to_bytes(2, "big") + data


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


_WRITE: dict[_Kind, Callable[[Any], bytes]] = {
    _Kind.BIT: lambda value: bytes((int(value),)),
    _Kind.U16: _u16,
    _Kind.U32: lambda value: int(value).to_bytes(4, "big"),
    _Kind.VARINT: encode_varint,
    _Kind.TEXT: encode_text,
    _Kind.BINARY: encode_binary,
    _Kind.PAIR: lambda pair: encode_text(pair[0]) + encode_text(pair[1]),
}


def encode_properties(properties: AnyProperties) -> bytes:
    """A property section, its length in front: what `ServerConnection.publish` also takes, to encode once for many."""
    out = []
    for field in fields(properties):
        value = getattr(properties, field.name)
        if value is None or value == ():
            continue
        number = _ID_OF[field.name]
        write = _WRITE[_PROPERTIES[number][1]]
        for each in value if isinstance(value, tuple) else (value,):
            out.append(bytes((number,)) + write(each))
    body = b"".join(out)
    return encode_varint(len(body)) + body


def frame(first: int, *pieces: bytes) -> bytes:
    body = b"".join(pieces)
    return bytes((first,)) + encode_varint(len(body)) + body


def _write_connect(packet: Connect) -> bytes:
    v5 = packet.version == V5
    will = packet.will
    flags = packet.clean_start << 1 | (packet.username is not None) << 7 | (packet.password is not None) << 6
    if will is not None:
        flags |= 4 | will.qos << 3 | will.retain << 5
    head = _LEGACY if packet.legacy else b"\x00\x04MQTT" + bytes((packet.version,))
    out = [head, bytes((flags,)), _u16(packet.keep_alive)]
    if v5:
        out.append(encode_properties(packet.properties))
    out.append(encode_text(packet.client_id))
    if will is not None:
        if v5:
            out.append(encode_properties(will.properties))
        out += [encode_text(will.topic), encode_binary(will.payload)]
    if packet.username is not None:
        out.append(encode_text(packet.username))
    if packet.password is not None:
        out.append(encode_binary(packet.password))
    return frame(0x10, *out)


def _write_publish(packet: Publish, version: int) -> bytes:
    first = 0x30 | packet.dup << 3 | packet.qos << 1 | packet.retain
    packet_id = _u16(packet.packet_id) if packet.qos else b""
    section = encode_properties(packet.properties) if version == V5 else b""
    return frame(first, encode_text(packet.topic), packet_id, section, packet.payload)


def _write_ack(first: int, packet: Ack, version: int) -> bytes:
    tail = b""
    if version == V5 and packet.properties != AckProperties():
        tail = bytes((packet.reason,)) + encode_properties(packet.properties)
    elif version == V5 and packet.reason:
        tail = bytes((packet.reason,))
    return frame(first, _u16(packet.packet_id), tail)


def _write_subscribe(packet: Subscribe, version: int) -> bytes:
    out = [_u16(packet.packet_id)]
    if version == V5:
        out.append(encode_properties(packet.properties))
    for each in packet.subscriptions:
        options = each.qos
        if version == V5:
            options |= each.no_local << 2 | each.retain_as_published << 3 | each.retain_handling << 4
        out += [encode_text(each.filter), bytes((options,))]
    return frame(0x82, *out)


def _write_disconnect(packet: Disconnect, version: int) -> bytes:
    if version == V3 or packet == Disconnect():
        return b"\xe0\x00"
    if packet.properties == DisconnectProperties():
        return bytes((0xE0, 1, packet.reason))
    return frame(0xE0, bytes((packet.reason,)), encode_properties(packet.properties))


def encode(packet: Packet, version: int) -> bytes:
    """One packet as bytes. On 3.1.1 properties and what else that version has no place for are left out."""
    v5 = version == V5
    match packet:
        case Connect():
            return _write_connect(packet)
        case Connack():
            section = encode_properties(packet.properties) if v5 else b""
            return frame(0x20, bytes((packet.session_present, packet.reason)), section)
        case Publish():
            return _write_publish(packet, version)
        case Puback():
            return _write_ack(0x40, packet, version)
        case Pubrec():
            return _write_ack(0x50, packet, version)
        case Pubrel():
            return _write_ack(0x62, packet, version)
        case Pubcomp():
            return _write_ack(0x70, packet, version)
        case Subscribe():
            return _write_subscribe(packet, version)
        case Suback():
            section = encode_properties(packet.properties) if v5 else b""
            return frame(0x90, _u16(packet.packet_id), section, bytes(packet.reasons))
        case Unsubscribe():
            section = encode_properties(packet.properties) if v5 else b""
            return frame(0xA2, _u16(packet.packet_id), section, *map(encode_text, packet.filters))
        case Unsuback():
            tail = encode_properties(packet.properties) + bytes(packet.reasons) if v5 else b""
            return frame(0xB0, _u16(packet.packet_id), tail)
        case Pingreq():
            return b"\xc0\x00"
        case Pingresp():
            return b"\xd0\x00"
        case Disconnect():
            return _write_disconnect(packet, version)
        case Auth():
            if packet == Auth():
                return b"\xf0\x00"
            return frame(0xF0, bytes((packet.reason,)), encode_properties(packet.properties))
