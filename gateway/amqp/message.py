"""Messages as AMQP 1.0 bytes (part 3.2): made once at intake, read at the edges, patched where a ttl changes.

Knows the encoding of the sections and what of MQTT is carried in which field. Knows nothing of links, journals or
topics' meaning. Everything that reads bytes is bounded and strict: what is malformed raises MessageError.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from typing import Any
from uuid import UUID

from gateway.errors import PeerError
from storeforward.streams import SENDER_BYTES

ANNOTATION_QOS = "x-opt-lineside-qos"
ANNOTATION_RETAIN = "x-opt-retain-message"
# The identity of a message whose own message-id belongs to the app that sent it.
ANNOTATION_ID = "x-opt-lineside-id"
# MQTT user properties in full, where a name occurs twice and a map cannot hold them: [name, value, name, value, ...].
ANNOTATION_USER_PROPERTIES = "x-opt-lineside-user-properties"
# [gateway, response topic, correlation data]: what that gateway's MQTT apps are given in place of reply-to and
# correlation-id, which belong to the hub's apps.
ANNOTATION_REQUEST = "x-opt-lineside-request"

# What stands before a correlation-id that is no binary while it travels as an MQTT app's correlation data.
CORRELATION_MARK = b"\0amqp-"
_OWN_ID = re.compile(r"[^:]{1,64}:[0-9a-f]+\.[0-9a-f]{6}:[^:]{1,64}:[0-9a-f]{12}")

DEPTH_MAX = 16
TTL_MS_MAX = 0xFFFFFFFF
IDENTITY_BYTES = 16

HEADER, DELIVERY_ANNOTATIONS, MESSAGE_ANNOTATIONS, PROPERTIES, APPLICATION_PROPERTIES = range(0x70, 0x75)
DATA, SEQUENCE, VALUE, FOOTER = range(0x75, 0x79)

_SYMBOLIC = {
    b"amqp:header:list": HEADER,
    b"amqp:delivery-annotations:map": DELIVERY_ANNOTATIONS,
    b"amqp:message-annotations:map": MESSAGE_ANNOTATIONS,
    b"amqp:properties:list": PROPERTIES,
    b"amqp:application-properties:map": APPLICATION_PROPERTIES,
    b"amqp:data:binary": DATA,
    b"amqp:amqp-sequence:list": SEQUENCE,
    b"amqp:amqp-value:*": VALUE,
    b"amqp:footer:map": FOOTER,
}

# durable=true, priority=null, ttl as a fixed four-byte uint, which patch_ttl() overwrites in place.
_HEADER_DURABLE = b"\x00\x53\x70\xc0\x02\x01\x41"
_HEADER_TTL = b"\x00\x53\x70\xc0\x08\x03\x41\x40\x70"
_HEADER_TTL_BYTES = len(_HEADER_TTL) + 4


class MessageError(PeerError):
    """The bytes are not an AMQP 1.0 message; whoever sent them has to be told `amqp:decode-error`."""


class BodyKind(Enum):
    NONE = "none"
    DATA = "data"
    SEQUENCE = "sequence"
    VALUE = "value"


MessageId = str | int | UUID | bytes | None


@dataclass(slots=True)
class Message:
    """One message, decoded. Times are milliseconds; symbols are str; body is what an MQTT app would be given."""

    durable: bool = False
    priority: int = 4
    ttl_ms: int | None = None
    delivery_count: int = 0
    message_id: MessageId = None
    to: str | None = None
    subject: str | None = None
    reply_to: str | None = None
    correlation_id: MessageId = None
    content_type: str | None = None
    content_encoding: str | None = None
    absolute_expiry_ms: int | None = None
    creation_time_ms: int | None = None
    application_properties: dict[str, Any] = field(default_factory=dict)
    annotations: dict[Any, Any] = field(default_factory=dict)
    body: bytes = b""
    body_kind: BodyKind = BodyKind.NONE


# ------------------------------------------------------------------------------------------------ encoding


def _str(text: str) -> bytes:
    raw = text.encode("utf-8")
    if len(raw) < 256:
        return b"\xa1%c%b" % (len(raw), raw)
    return b"\xb1%b%b" % (len(raw).to_bytes(4, "big"), raw)


def _sym(text: str) -> bytes:
    raw = text.encode("ascii")
    if len(raw) < 256:
        return b"\xa3%c%b" % (len(raw), raw)
    return b"\xb3%b%b" % (len(raw).to_bytes(4, "big"), raw)


def _bin(raw: bytes) -> bytes:
    if len(raw) < 256:
        return b"\xa0%c%b" % (len(raw), raw)
    return b"\xb0%b%b" % (len(raw).to_bytes(4, "big"), raw)


def _compound(code8: int, code32: int, count: int, items: bytes) -> bytes:
    if count < 256 and len(items) < 255:
        return b"%c%c%c%b" % (code8, len(items) + 1, count, items)
    return b"%c%b%b%b" % (code32, (len(items) + 4).to_bytes(4, "big"), count.to_bytes(4, "big"), items)


def _any(value: Any) -> bytes:
    """The AMQP encoding of a plain Python value. Raises TypeError for what has none."""
    if value is None:
        return b"\x40"
    if isinstance(value, bool):
        return b"\x41" if value else b"\x42"
    if isinstance(value, str):
        return _str(value)
    if isinstance(value, bytes):
        return _bin(value)
    if isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            return (
                b"\x55" + value.to_bytes(1, "big", signed=True)
                if -128 <= value < 128
                else b"\x81" + (value.to_bytes(8, "big", signed=True))
            )
        return b"\x80" + value.to_bytes(8, "big")
    if isinstance(value, float):
        return b"\x82" + struct.pack(">d", value)
    if isinstance(value, UUID):
        return b"\x98" + value.bytes
    if isinstance(value, list | tuple):
        return _compound(0xC0, 0xD0, len(value), b"".join(map(_any, value)))
    if isinstance(value, Mapping):
        return _compound(0xC1, 0xD1, 2 * len(value), b"".join(_any(k) + _any(v) for k, v in value.items()))
    raise TypeError(f"no AMQP encoding for {type(value).__name__}")


def _id(value: MessageId) -> bytes:
    """message-id and correlation-id: ulong, uuid, binary or string (AMQP 1.0 part 3.2.11 to 3.2.14)."""
    if isinstance(value, int):
        return b"\x80" + value.to_bytes(8, "big")
    return _any(value)


def _header(ttl_ms: int | None) -> bytes:
    if ttl_ms is None:
        return _HEADER_DURABLE
    return _HEADER_TTL + min(max(ttl_ms, 0), TTL_MS_MAX).to_bytes(4, "big")


def _annotations(items: Mapping[str, Any]) -> bytes:
    if not items:
        return b""
    body = b"".join(_sym(key) + _any(value) for key, value in items.items())
    return b"\x00\x53\x72" + _compound(0xC1, 0xD1, 2 * len(items), body)


def _properties(
    message_id: bytes,
    to: str | None,
    subject: str | None,
    reply_to: str | None,
    correlation_id: MessageId,
    content_type: str | None,
) -> bytes:
    """The properties section; message_id is given encoded, so that a template may leave a gap in it."""
    items = [message_id, b"\x40"]
    items += [b"\x40" if text is None else _str(text) for text in (to, subject, reply_to)]
    items.append(_id(correlation_id))
    # content-type is a symbol, thus ASCII; MQTT allows UTF-8 there, which we can only drop.
    items.append(_sym(content_type) if content_type and content_type.isascii() else b"\x40")
    while items[-1] == b"\x40" and len(items) > 1:
        items.pop()
    return b"\x00\x53\x73" + _compound(0xC0, 0xD0, len(items), b"".join(items))


def _user_properties(items: Iterable[tuple[str, Any]]) -> bytes:
    pairs = dict(items)
    body = b"".join(_str(key) + _any(value) for key, value in pairs.items())
    return b"\x00\x53\x74" + _compound(0xC1, 0xD1, 2 * len(pairs), body) if pairs else b""


def message_id(gateway: str, epoch: int | str, stream: int | str, seq: int) -> str:
    """The identity that a message of ours carries; what `Template` writes as its message-id."""
    return f"{gateway}:{epoch}:{stream}:{seq:012x}"


class Template:
    """Encodes the messages of one topic: all but seq and payload is laid out beforehand.

    Costs about 0.4 µs a message (tests/gateway/test_amqp_message.py times it). message-id is the string
    `<gateway>:<epoch>:<stream>:<seq as 12 hex digits>`. `duplicate_property` names an application property that
    carries the same string, for hubs that look there. ttl_ms may be patched later. qos is noted unless it is 1.
    """

    __slots__ = ("_big", "_dup", "_small")

    def __init__(
        self,
        gateway: str,
        epoch: int | str,
        stream: int | str,
        address: str | None,
        topic: str | None,
        ttl_ms: int | None = None,
        *,
        content_type: str | None = None,
        reply_to: str | None = None,
        correlation_id: MessageId = None,
        user_properties: Sequence[tuple[str, str]] = (),
        annotations: Mapping[str, Any] | None = None,
        duplicate_property: str | None = None,
        qos: int = 1,
    ) -> None:
        gap = "\0" * 12
        mid = f"{gateway}:{epoch}:{stream}:{gap}"
        assert "\0" not in mid[:-12]
        notes = dict(annotations or {})
        if qos != 1:
            notes[ANNOTATION_QOS] = qos
        if len({key for key, _ in user_properties}) != len(user_properties):
            notes[ANNOTATION_USER_PROPERTIES] = [text for pair in user_properties for text in pair]
        properties = _properties(_str(mid), address, topic, reply_to, correlation_id, content_type)
        items: list[tuple[str, Any]] = [pair for pair in user_properties if pair[0] != duplicate_property]
        if duplicate_property:
            # First, so that its gap is the second one in the bytes whatever the user's properties hold.
            items.insert(0, (duplicate_property, mid))
        head, tail = properties.split(b"\0" * 12, 1)
        parts = [_header(ttl_ms) + _annotations(notes) + head]
        application = _user_properties(items)
        if duplicate_property:
            between, application = application.split(b"\0" * 12, 1)
            parts.append(tail + between)
            tail = b""
        parts.append(tail + application + b"\x00\x53\x75")
        shape = b"%012x".join(part.replace(b"%", b"%%") for part in parts)
        self._dup = bool(duplicate_property)
        self._small = shape + b"\xa0%c%b"
        self._big = shape + b"\xb0%b%b"

    def encode(self, seq: int, payload: bytes) -> bytes:
        """The message with this seq (0 .. 2**48-1) and payload, ready for the journal and the wire."""
        size = len(payload)
        if size < 256:
            if self._dup:
                return self._small % (seq, seq, size, payload)
            return self._small % (seq, size, payload)
        if self._dup:
            return self._big % (seq, seq, size.to_bytes(4, "big"), payload)
        return self._big % (seq, size.to_bytes(4, "big"), payload)


def encode(
    payload: bytes,
    *,
    message_id: MessageId = None,
    to: str | None = None,
    subject: str | None = None,
    reply_to: str | None = None,
    correlation_id: MessageId = None,
    content_type: str | None = None,
    ttl_ms: int | None = None,
    application_properties: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    annotations: Mapping[str, Any] | None = None,
) -> bytes:
    """Any durable message, for the rare ones that no template fits."""
    pairs = application_properties.items() if isinstance(application_properties, Mapping) else application_properties
    return b"".join(
        (
            _header(ttl_ms),
            _annotations(annotations or {}),
            _properties(_id(message_id), to, subject, reply_to, correlation_id, content_type),
            _user_properties(pairs),
            b"\x00\x53\x75",
            _bin(payload),
        )
    )


# ------------------------------------------------------------------------------------------------ values

_u16 = struct.Struct(">H").unpack_from
_u32 = struct.Struct(">I").unpack_from
_u64 = struct.Struct(">Q").unpack_from
_i16 = struct.Struct(">h").unpack_from
_i32 = struct.Struct(">i").unpack_from
_i64 = struct.Struct(">q").unpack_from
_f32 = struct.Struct(">f").unpack_from
_f64 = struct.Struct(">d").unpack_from


def _char(b: bytes, o: int) -> str:
    point = _u32(b, o)[0]
    if point > 0x10FFFF or 0xD800 <= point < 0xE000:
        raise MessageError(f"char U+{point:x} does not exist")
    return chr(point)


# constructor -> (width in bytes, reader); AMQP 1.0 part 1.6.
_FIXED: dict[int, tuple[int, Callable[[bytes, int], Any]]] = {
    0x40: (0, lambda b, o: None),
    0x41: (0, lambda b, o: True),
    0x42: (0, lambda b, o: False),
    0x43: (0, lambda b, o: 0),
    0x44: (0, lambda b, o: 0),
    0x45: (0, lambda b, o: []),
    0x50: (1, lambda b, o: b[o]),
    0x51: (1, lambda b, o: b[o] - 256 if b[o] > 127 else b[o]),
    0x52: (1, lambda b, o: b[o]),
    0x53: (1, lambda b, o: b[o]),
    0x54: (1, lambda b, o: b[o] - 256 if b[o] > 127 else b[o]),
    0x55: (1, lambda b, o: b[o] - 256 if b[o] > 127 else b[o]),
    0x56: (1, lambda b, o: b[o] != 0),
    0x60: (2, lambda b, o: _u16(b, o)[0]),
    0x61: (2, lambda b, o: _i16(b, o)[0]),
    0x70: (4, lambda b, o: _u32(b, o)[0]),
    0x71: (4, lambda b, o: _i32(b, o)[0]),
    0x72: (4, lambda b, o: _f32(b, o)[0]),
    0x73: (4, _char),
    0x74: (4, lambda b, o: bytes(b[o : o + 4])),
    0x80: (8, lambda b, o: _u64(b, o)[0]),
    0x81: (8, lambda b, o: _i64(b, o)[0]),
    0x82: (8, lambda b, o: _f64(b, o)[0]),
    0x83: (8, lambda b, o: _i64(b, o)[0]),
    0x84: (8, lambda b, o: bytes(b[o : o + 8])),
    0x94: (16, lambda b, o: bytes(b[o : o + 16])),
    0x98: (16, lambda b, o: UUID(bytes=bytes(b[o : o + 16]))),
}


def _read(code: int, b: bytes, o: int, end: int, depth: int) -> tuple[Any, int]:
    """The value behind constructor `code` whose data starts at o and may not pass `end`: (value, offset after it)."""
    if code == 0xA1 or code == 0xA3 or code == 0xA0:
        stop = o + 1 + b[o]
        o += 1
    elif code == 0xB1 or code == 0xB3 or code == 0xB0:
        stop = o + 4 + _u32(b, o)[0]
        o += 4
    else:
        fixed = _FIXED.get(code)
        if fixed is not None:
            width, reader = fixed
            if o + width > end:
                raise MessageError("a value runs past its end")
            return reader(b, o), o + width
        return _read_compound(code, b, o, end, depth)
    if stop > end:
        raise MessageError("a value runs past its end")
    raw = b[o:stop]
    if code == 0xA1 or code == 0xB1:
        return raw.decode(), stop
    if code == 0xA3 or code == 0xB3:
        return raw.decode("ascii"), stop
    return raw, stop


def _value(b: bytes, o: int, end: int, depth: int = 0) -> tuple[Any, int]:
    """One value with its constructor at o. A described value is its value: descriptors carry nothing we use."""
    if o >= end:
        raise MessageError("a value is missing")
    code = b[o]
    if code:
        return _read(code, b, o + 1, end, depth)
    if depth >= DEPTH_MAX:
        raise MessageError(f"nested deeper than {DEPTH_MAX}")
    _, o = _value(b, o + 1, end, depth + 1)
    return _value(b, o, end, depth + 1)


def _bounds(code: int, b: bytes, o: int, end: int) -> tuple[int, int, int]:
    """Of a list, map or array whose size field stands at o: (count, offset of the first item, offset of its end)."""
    if code & 0xF0 in (0xC0, 0xE0):
        stop, count, first = o + 1 + b[o], b[o + 1], o + 2
    else:
        stop, count, first = o + 4 + _u32(b, o)[0], _u32(b, o + 4)[0], o + 8
    # Every item takes a byte at least, except in arrays of null or the like, which nobody sends but attackers.
    if stop > end or first > stop or count > stop - first:
        raise MessageError("a compound value runs past its end")
    return count, first, stop


def _read_compound(code: int, b: bytes, o: int, end: int, depth: int) -> tuple[Any, int]:
    if code not in (0xC0, 0xC1, 0xD0, 0xD1, 0xE0, 0xF0):
        raise MessageError(f"unknown type 0x{code:02x}")
    if depth >= DEPTH_MAX:
        raise MessageError(f"nested deeper than {DEPTH_MAX}")
    count, o, stop = _bounds(code, b, o, end)
    items: list[Any] = []
    if code in (0xE0, 0xF0):
        inner = b[o]
        o += 1
        if inner == 0:
            raise MessageError("arrays of described values are not supported")
        for _ in range(count):
            item, o = _read(inner, b, o, stop, depth + 1)
            items.append(item)
    else:
        for _ in range(count):
            item, o = _value(b, o, stop, depth + 1)
            items.append(item)
    if o != stop:
        raise MessageError("a compound value is longer than its items")
    if code in (0xC1, 0xD1):
        return _pairs(items), stop
    return items, stop


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise MessageError("a map with a key and no value")
    try:
        return dict(zip(items[::2], items[1::2], strict=True))
    except TypeError as unhashable:
        raise MessageError("a map with a compound key") from unhashable


# ------------------------------------------------------------------------------------------------ sections


def _section(b: bytes, o: int, end: int) -> tuple[int, int]:
    """The descriptor at o: (section code, offset of the section's value). Raises MessageError."""
    if b[o]:
        raise MessageError("a section without a descriptor")
    form = b[o + 1]
    if form == 0x53:
        code, o = b[o + 2], o + 3
    elif form == 0x80:
        code, o = _u64(b, o + 2)[0], o + 10
    elif form == 0xA3 or form == 0xB3:
        name, o = _read(form, b, o + 2, end, 0)
        code = _SYMBOLIC.get(name.encode("ascii"), 0)
    else:
        raise MessageError("a section with an unknown descriptor")
    if not HEADER <= code <= FOOTER:
        raise MessageError(f"unknown section 0x{code:x}")
    return code, o


def _skip(b: bytes, o: int, end: int) -> int:
    """The offset after the value at o, without reading it. Only for values of a section (never described)."""
    code = b[o]
    kind = code >> 4
    if kind in (0xA, 0xC, 0xE):
        stop = o + 2 + b[o + 1]
    elif kind in (0xB, 0xD, 0xF):
        stop = int(o + 5 + _u32(b, o + 1)[0])
    elif code in _FIXED:
        stop = o + 1 + _FIXED[code][0]
    else:
        stop = _value(b, o, end)[1]
    if stop > end:
        raise MessageError("a section runs past the end")
    return stop


def decode(body: bytes) -> Message:
    """Read a whole message. Raises MessageError. Bounded: no deeper than DEPTH_MAX, no larger than its bytes."""
    try:
        return _decode(body)
    except (IndexError, struct.error) as short:
        raise MessageError("truncated") from short
    except UnicodeError as bad:
        raise MessageError("a string is not UTF-8") from bad


# Where each field of the properties section goes (part 3.2.4); user-id and the group fields are passed over.
_PROPERTY_FIELDS = (
    ("message_id", (str, int, UUID, bytes)),
    (None, (bytes,)),
    ("to", (str,)),
    ("subject", (str,)),
    ("reply_to", (str,)),
    ("correlation_id", (str, int, UUID, bytes)),
    ("content_type", (str,)),
    ("content_encoding", (str,)),
    ("absolute_expiry_ms", (int,)),
    ("creation_time_ms", (int,)),
    (None, (str,)),
    (None, (int,)),
    (None, (str,)),
)
_HEADER_FIELDS = (
    ("durable", (bool,)),
    ("priority", (int,)),
    ("ttl_ms", (int,)),
    (None, (bool,)),
    ("delivery_count", (int,)),
)
_Fields = tuple[tuple[str | None, tuple[type, ...]], ...]


def _fields(message: Message, names: _Fields, b: bytes, o: int, end: int) -> int:
    """Read a section that is a list into the message's fields: the offset after it."""
    code = b[o]
    if code == 0x45:
        return o + 1
    if code == 0xC0:
        stop, count, o = o + 2 + b[o + 1], b[o + 2], o + 3
    elif code == 0xD0:
        stop, count, o = o + 5 + _u32(b, o + 1)[0], _u32(b, o + 5)[0], o + 9
    else:
        raise MessageError("a section that should be a list is not")
    if stop > end or count > len(names):
        raise MessageError("a section's list is too long")
    for index in range(count):
        code = b[o]
        if code == 0x40:
            o += 1
            continue
        if code == 0xA1:  # the usual case, by hand
            first = o + 2
            o = first + b[o + 1]
            if o > stop:
                raise MessageError("a value runs past its end")
            value: Any = b[first:o].decode()
        else:
            value, o = _value(b, o, stop)
        name, types = names[index]
        if type(value) not in types:
            raise MessageError(f"field {index} ({name}) has the wrong type")
        if name is not None:
            setattr(message, name, value)
    if o != stop:
        raise MessageError("a section's list is longer than its items")
    return stop


def _map(b: bytes, o: int, end: int) -> tuple[dict[Any, Any], int]:
    value, o = _value(b, o, end)
    if not isinstance(value, dict):
        raise MessageError("a section that should be a map is not")
    return value, o


def _decode(b: bytes) -> Message:
    message = Message()
    o, end, last = 0, len(b), 0
    chunks: list[bytes] = []
    while o < end:
        if b[o] == 0 and b[o + 1] == 0x53:
            code = b[o + 2]
            o += 3
        else:
            code, o = _section(b, o, end)
        # Part 3.2: the sections in this order; only data and sequence may repeat.
        if code < last or (code == last and code not in (DATA, SEQUENCE)):
            raise MessageError(f"section 0x{code:02x} after 0x{last:02x}")
        if last in (DATA, SEQUENCE, VALUE) and code != last and code != FOOTER:
            raise MessageError("two kinds of body")
        last = code
        if code == DATA:
            if b[o] not in (0xA0, 0xB0):
                raise MessageError("a data section that is not binary")
            raw, o = _read(b[o], b, o + 1, end, 0)
            chunks.append(raw)
            message.body_kind = BodyKind.DATA
        elif code == PROPERTIES:
            o = _fields(message, _PROPERTY_FIELDS, b, o, end)
        elif code == HEADER:
            o = _fields(message, _HEADER_FIELDS, b, o, end)
        elif code == APPLICATION_PROPERTIES:
            message.application_properties, o = _map(b, o, end)
            if not all(type(key) is str for key in message.application_properties):
                raise MessageError("an application property whose name is not a string")
        elif code == MESSAGE_ANNOTATIONS:
            message.annotations, o = _map(b, o, end)
        elif code == VALUE:
            value, o = _value(b, o, end)
            chunks.append(_text(value))
            message.body_kind = BodyKind.VALUE
        elif code == SEQUENCE:
            value, o = _value(b, o, end)
            if not isinstance(value, list):
                raise MessageError("a sequence section that is not a list")
            chunks.append(_text(value))
            message.body_kind = BodyKind.SEQUENCE
        elif code in (DELIVERY_ANNOTATIONS, FOOTER):
            _, o = _map(b, o, end)
        else:
            raise MessageError(f"unknown section 0x{code:02x}")
    joiner = b"\n" if message.body_kind is BodyKind.SEQUENCE else b""
    message.body = chunks[0] if len(chunks) == 1 else joiner.join(chunks)
    return message


def _text(value: Any) -> bytes:
    """An amqp-value as an MQTT payload: text and bytes as they are, nothing for null, JSON for the rest."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    """What JSON can say of a value: bytes as text or else base64, uuids as text, not-a-number as null."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def user_properties(message: Message, without: str | None = None) -> list[tuple[str, str]]:
    """The MQTT user properties of a message: names may repeat; every value as text. `without`: a name to leave out."""
    full = message.annotations.get(ANNOTATION_USER_PROPERTIES)
    if isinstance(full, list) and len(full) % 2 == 0 and all(type(text) is str for text in full):
        return list(zip(full[::2], full[1::2], strict=True))
    return [
        (name, _text(value).decode("utf-8", "replace"))
        for name, value in message.application_properties.items()
        if name != without
    ]


def correlation_data(correlation_id: MessageId) -> bytes | None:
    """A correlation-id as an MQTT app's correlation data, which it hands back unread (MQTT 5.0 §3.3.2.3.6).

    Its AMQP type has to come back, too, or who asked would not know the answer: all but binary is marked.
    """
    if correlation_id is None or isinstance(correlation_id, bytes):
        return correlation_id
    if isinstance(correlation_id, str):
        return CORRELATION_MARK + b"s" + correlation_id.encode()
    if isinstance(correlation_id, UUID):
        return CORRELATION_MARK + b"U" + correlation_id.bytes
    return CORRELATION_MARK + b"u%d" % correlation_id


def answer_to(message: Message, *, can_be_answered: bool) -> bytes | None:
    """The correlation data that an MQTT app is given with a message.

    With a request it is what the answer is to bring back, type and all; a request without a correlation-id is answered
    by its message-id, as AMQP apps have it. What can't be answered is given as it reads.
    """
    asked = message.correlation_id
    if not can_be_answered:
        return None if asked is None else asked if isinstance(asked, bytes) else str(asked).encode()
    if asked is None and not is_own_id(message.message_id):
        asked = message.message_id
    return correlation_data(asked)


def is_own_id(message_id: MessageId) -> bool:
    """Whether a gateway gave this id."""
    return isinstance(message_id, str) and _OWN_ID.fullmatch(message_id) is not None


def correlation_id(data: bytes | None) -> MessageId:
    """The reverse of `correlation_data`; what an MQTT app made up itself is binary."""
    if data is None or not data.startswith(CORRELATION_MARK):
        return data
    kind, value = data[len(CORRELATION_MARK) :][:1], data[len(CORRELATION_MARK) + 1 :]
    try:
        if kind == b"s":
            return value.decode()
        if kind == b"U" and len(value) == 16:
            return UUID(bytes=value)
        if kind == b"u" and value.isdigit() and len(value) <= 20 and int(value) < 1 << 64:
            return int(value)
    except UnicodeDecodeError:
        return data
    return data


# ------------------------------------------------------------------------------------------------ without decoding


def _typed_id(b: bytes, o: int, end: int) -> bytes | None:
    """The id at o as type letter and bytes, the same for every encoding of the same value; None if there is none."""
    value, _ = _value(b, o, end)
    if type(value) is str:
        return b"s" + value.encode()
    if type(value) is bytes:
        return b"b" + value
    if type(value) is int:
        return b"u%d" % value
    if type(value) is UUID:
        return b"U" + value.bytes
    return None


_ID_KEY = b"\xa3%c%b" % (len(ANNOTATION_ID), ANNOTATION_ID.encode())


def _find_id(b: bytes) -> bytes | None:
    o, end = 0, len(b)
    while o < end:
        code, o = _section(b, o, end)
        if code > PROPERTIES:
            return None
        if code == MESSAGE_ANNOTATIONS:
            at = b.find(_ID_KEY, o, _skip(b, o, end))
            if at >= 0:
                typed = _map(b, o, end)[0].get(ANNOTATION_ID)
                if isinstance(typed, str):
                    return b"s" + typed.encode()
        elif code == PROPERTIES:
            constructor = b[o]
            if constructor == 0xC0 and b[o + 2]:
                return _typed_id(b, o + 3, end)
            if constructor == 0xD0 and _u32(b, o + 5)[0]:
                return _typed_id(b, o + 9, end)
            return None
        o = _skip(b, o, end)
    return None


def identity(body: bytes) -> bytes | None:
    """16 bytes that stand for the message's identity, None if it has none. Raises MessageError.

    That is the gateway's own identity in the annotations if present, else the message-id with its type. The first
    SENDER_BYTES stand for who sent it: what is remembered of one sender must not push out another's.
    """
    try:
        found = _find_id(body)
    except (IndexError, struct.error) as short:
        raise MessageError("truncated") from short
    except UnicodeError as bad:
        raise MessageError("a string is not UTF-8") from bad
    return None if found is None else _digest(found)


def _digest(typed_id: bytes) -> bytes:
    parts = typed_id.split(b":")
    # <gateway>:<epoch>:<stream>:<seq>: across epochs it is the same sender. All others are taken for one.
    sender = parts[0] + b":" + parts[2] if len(parts) == 4 and len(parts[3]) == 12 else b""
    return _sender_digest(sender) + blake2b(typed_id, digest_size=IDENTITY_BYTES - SENDER_BYTES).digest()


@lru_cache(maxsize=1024)
def _sender_digest(sender: bytes) -> bytes:
    return blake2b(sender, digest_size=SENDER_BYTES).digest()


def lineside_identity(message: Message) -> bytes | None:
    """As `identity`, but only for ids that a gateway gave: an app may use its own message-ids as often as it likes."""
    given = given_id(message)
    return None if given is None else _digest(b"s" + given.encode())


def given_id(message: Message) -> str | None:
    """The id that a gateway gave the message, None where none did."""
    given = message.annotations.get(ANNOTATION_ID)
    if not isinstance(given, str):
        given = message.message_id
    return given if isinstance(given, str) and is_own_id(given) else None


def patch_ttl(body: bytes, ttl_ms: int) -> bytes:
    """The same message with this ttl in its header; all other bytes as they were. Raises MessageError."""
    if body.startswith(_HEADER_TTL) and len(body) > _HEADER_TTL_BYTES:
        return b"%b%b%b" % (_HEADER_TTL, _ttl(ttl_ms), body[_HEADER_TTL_BYTES:])
    return patch_header(body, ttl_ms=ttl_ms)


def _ttl(ttl_ms: int) -> bytes:
    return min(max(ttl_ms, 0), TTL_MS_MAX).to_bytes(4, "big")


def patch_header(body: bytes, *, ttl_ms: int | None = None, failures: int = 0) -> bytes:
    """The same message with this ttl, and with `failures` added to its delivery-count (part 3.2.1).

    All other bytes stay as they were. Raises MessageError.
    """
    try:
        end = len(body)
        code, o = _section(body, 0, end)
        fields, rest = _value(body, o, end) if code == HEADER else ([], 0)
        if not isinstance(fields, list) or len(fields) > 5:
            raise MessageError("the header is not a list")
        fields += [None] * (5 - len(fields))
        durable, priority, old_ttl_ms, first, count = fields
        if ttl_ms is None:
            ttl_ms = old_ttl_ms
        if failures:
            count = min((count or 0) + failures, 0xFFFFFFFF)
        items = [
            _any(durable),
            b"\x40" if priority is None else b"\x50" + bytes([priority]),
            b"\x40" if ttl_ms is None else b"\x70" + _ttl(ttl_ms),
            _any(first),
            b"\x40" if count is None else b"\x70" + count.to_bytes(4, "big"),
        ]
    except (IndexError, struct.error) as short:
        raise MessageError("truncated") from short
    except (TypeError, ValueError, OverflowError, AttributeError) as wrong:
        raise MessageError("a field of the header has the wrong type") from wrong
    return b"\x00\x53\x70" + _compound(0xC0, 0xD0, 5, b"".join(items)) + body[rest:]


def annotate(body: bytes, annotations: Mapping[str, Any]) -> bytes:
    """The same message with these message annotations added; all other bytes as they were. Raises MessageError.

    An annotation already there under one of these names is left to the later of the two, which is ours.
    """
    added = b"".join(_sym(key) + _any(value) for key, value in annotations.items())
    try:
        o, end = 0, len(body)
        while o < end:
            start = o
            code, o = _section(body, o, end)
            if code > MESSAGE_ANNOTATIONS:
                o = start
                break
            if code == MESSAGE_ANNOTATIONS:
                return body[:start] + _merged(body, o, end, annotations, added) + body[_skip(body, o, end) :]
            o = _skip(body, o, end)
    except (IndexError, struct.error) as short:
        raise MessageError("truncated") from short
    except UnicodeError as bad:
        raise MessageError("a string is not UTF-8") from bad
    section = b"\x00\x53\x72" + _compound(0xC1, 0xD1, 2 * len(annotations), added)
    return body[:o] + section + body[o:]


def _merged(b: bytes, o: int, end: int, annotations: Mapping[str, Any], added: bytes) -> bytes:
    """A message-annotations section: the map at o without the names we set, and ours."""
    constructor = b[o]
    if constructor not in (0xC1, 0xD1):
        raise MessageError("the message annotations are not a map")
    count, at, stop = _bounds(constructor, b, o + 1, end)
    kept, pairs = [added], len(annotations)
    for _ in range(count // 2):
        start = at
        key, at = _value(b, at, stop)
        _, at = _value(b, at, stop)
        if not isinstance(key, str) or key not in annotations:
            kept.append(b[start:at])
            pairs += 1
    if at != stop or count % 2:
        raise MessageError("the message annotations are not a map")
    return b"\x00\x53\x72" + _compound(0xC1, 0xD1, 2 * pairs, b"".join(kept))


class Stamp:
    """Gives an app's messages their identity at intake: an annotation, all other sections byte for byte as they came.

    `duplicate_property`: an application property that carries the same string where the app has not set it itself;
    for hubs that look for duplicates there and nowhere else.
    """

    __slots__ = ("_duplicate_property", "_mid", "_section")

    def __init__(
        self, gateway: str, epoch: int | str, stream: int | str, *, duplicate_property: str | None = None
    ) -> None:
        self._mid = f"{gateway}:{epoch}:{stream}:"
        self._duplicate_property = duplicate_property
        pair = _sym(ANNOTATION_ID) + _str(self._mid + "\0" * 12)
        head, tail = (b"\x00\x53\x72" + _compound(0xC1, 0xD1, 2, pair)).split(b"\0" * 12, 1)
        assert not tail
        self._section = head.replace(b"%", b"%%") + b"%012x"

    def encode(self, seq: int, body: bytes) -> bytes:
        """The message with the identity of this seq. Raises MessageError."""
        if self._duplicate_property is not None:
            body = _with_property(body, self._duplicate_property, f"{self._mid}{seq:012x}")
        # The usual message has no annotations and at most a short header, and needs no looking at beyond that.
        at = _short_header(body)
        if body[at : at + 3] in _AFTER_ANNOTATIONS:
            return b"%b%b%b" % (body[:at], self._section % seq, body[at:])
        return annotate(body, {ANNOTATION_ID: f"{self._mid}{seq:012x}"})

    def carry(self, given: str, body: bytes) -> bytes:
        """A message that has its identity from another gateway, for a hub that looks for duplicates elsewhere."""
        return body if self._duplicate_property is None else _with_property(body, self._duplicate_property, given)


def _short_header(body: bytes) -> int:
    """Where a header in one of its two usual encodings ends; 0 for another one, or none."""
    if body[:4] == b"\x00\x53\x70\xc0" and len(body) > 4:
        return 5 + body[4]
    return 4 if body[:4] == b"\x00\x53\x70\x45" else 0


_AFTER_ANNOTATIONS = frozenset(b"\x00\x53%c" % code for code in range(PROPERTIES, FOOTER + 1))


def _with_property(body: bytes, name: str, value: str) -> bytes:
    """The message with one more application property; as it is where it has one of that name. Raises MessageError."""
    pair = _str(name) + _str(value)
    try:
        o, end = 0, len(body)
        while o < end:
            start = o
            code, o = _section(body, o, end)
            if code > APPLICATION_PROPERTIES:
                o = start
                break
            rest = _skip(body, o, end)
            if code == APPLICATION_PROPERTIES:
                constructor = body[o]
                if constructor not in (0xC1, 0xD1):
                    raise MessageError("the application properties are not a map")
                if name in _map(body, o, end)[0]:
                    return body
                count, first, stop = _bounds(constructor, body, o + 1, end)
                section = b"\x00\x53\x74" + _compound(0xC1, 0xD1, count + 2, body[first:stop] + pair)
                return body[:start] + section + body[rest:]
            o = rest
    except (IndexError, struct.error) as short:
        raise MessageError("truncated") from short
    except UnicodeError as bad:
        raise MessageError("a string is not UTF-8") from bad
    return body[:o] + b"\x00\x53\x74" + _compound(0xC1, 0xD1, 2, pair) + body[o:]
