"""The few frames of AMQP 1.0 that we read or write ourselves, as proton does not tell or write what is in them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import proton

from gateway.amqp.sasl import AMQP_HEADER

ATTACH, FLOW = 0x12, 0x13
FLOW_MARK: Final = bytes((0x53, FLOW))  # in every flow of the usual encoding, and by chance in something else

_HEAD = struct.Struct(">IBBH")  # size, data offset, type, channel (part 2.3.1)
_NULL, _UINT, _TRUE, _LIST32 = b"\x40", b"\x70", b"\x41", b"\xd0"


def links(data: bytes) -> Iterator[tuple[int, int, list[Any]]]:
    """The channel, performative and fields of each attach and flow, in whole frames that proton has written."""
    at = len(AMQP_HEADER) if data.startswith(AMQP_HEADER) else 0
    while at < len(data):
        size, _, _, channel = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + size]
        if body[:2] == b"\x00\x53" and body[2] in (ATTACH, FLOW):
            performative: Any = proton.Data()
            performative.decode(body)
            performative.next()
            yield channel, body[2], performative.get_py_described().value
        at += size


def drained(channel: int, fields: list[int | None]) -> bytes:
    """A flow with these first seven fields, of a link that drains (part 2.7.4)."""
    values = [_NULL if field is None else _UINT + field.to_bytes(4, "big") for field in fields]
    values += [_NULL, _TRUE]  # available: not said; drain
    encoded = b"".join(values)
    body = b"\x00\x53%c" % FLOW + _LIST32 + struct.pack(">II", len(encoded) + 4, len(values)) + encoded
    return _HEAD.pack(_HEAD.size + len(body), 2, 0, channel) + body
