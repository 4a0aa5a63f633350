"""What stands in a row beside its message: a checksum of all of it, and, if the journal is encrypted, no plain text.

A sealed row has bytes where a plain one has text, its topic; the body keeps its length. So nobody has to be asked
whether a row is sealed, plain and sealed ones mix, and sizes are told without a key. Knows no cipher: whoever seals is
an object from outside, and `security.atrest.Keyring` is one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Protocol
from zlib import crc32

from storeforward.schema import SEQ_BITS

# In `crc`, above the 32 bits of the checksum. Rows of schema 3 and before have none: their CRC is of the body only; and
# those of schema 4 are not OFEXPIRY. FOLLOWS: when the row was written, the row of the seq before it was there; where
# neither that is nor anybody has deleted it, it has vanished.
OF_ROW = 1 << 32
SEALED = 1 << 33
OFEXPIRY = 1 << 34
FOLLOWS = 1 << 35
PLAIN = OF_ROW | OFEXPIRY
CRC_MASK = (1 << 32) - 1
# A stream's number times this goes into its rows' checksums: two rows in one another's place match neither.
SPREAD = 0x9E3779B1
HEAD_BYTES = 25
META = "atrest "  # and a key's id: rows under that key may be in this file
HIDDEN = "(encrypted)"
_ID = struct.Struct(">BQ")
EXPIRY = struct.Struct(">q")


class Seal(Protocol):
    """Whoever encrypts. What is sealed begins with a format byte and the 4 bytes of its key's id.

    `about`: what it is bound to; opened in any other place it is refused. Opening raises ValueError where the text was
    changed or is another place's, LookupError where there is no such key.
    """

    @property
    def ids(self) -> Sequence[str]:
        """The keys' ids; the first one seals."""

    def seal_row(self, about: bytes, topic: str, body: bytes) -> tuple[bytes, bytes]: ...
    def open_row(self, about: bytes, topic: bytes, body: bytes) -> tuple[str, bytes]: ...
    def name(self, topic: str) -> list[bytes]:
        """The topic as the key of a row: the same each time, under each key, that of the first key first."""


def about_row(id_: int) -> bytes:
    """What a message's row is bound to."""
    return _ID.pack(1, id_)


def about_dead(stream: str, seq: int) -> bytes:
    """What a dead letter is bound to."""
    return _ID.pack(2, seq) + stream.encode()


def about(table: str, key: str) -> bytes:
    """What a value of one of the small tables is bound to."""
    return f"{table}\0{key}".encode()


def key_id(sealed: bytes) -> str:
    """Under which key something was sealed."""
    return sealed[1:5].hex()


def is_sealed(value: object) -> bool:
    """Whether a column that is text holds something sealed."""
    return type(value) is bytes and len(value) >= HEAD_BYTES - 4 and value[0] == 1


def checksum(id_: int, topic: str | bytes, body: bytes, expires_age_us: int | None = None) -> int:
    """The `crc` of a row: CRC-32 of the body, begun with topic, stream, the low 32 bits of the seq, and the expiry."""
    crc = _of_row(id_, topic, body if expires_age_us is None else EXPIRY.pack(expires_age_us) + body)
    return crc | (PLAIN | SEALED if isinstance(topic, bytes) else PLAIN)


def _of_row(id_: int, topic: str | bytes, body: bytes) -> int:
    begin = crc32(topic if isinstance(topic, bytes) else topic.encode())
    begin ^= (id_ >> SEQ_BITS) * SPREAD ^ id_
    return crc32(body, begin & CRC_MASK)


def intact(id_: int, topic: Any, crc: Any, body: Any, expires_age_us: Any = None) -> bool:
    """Whether a row is as it was written. Also of types that only damage makes."""
    if type(crc) is not int or type(body) is not bytes or type(topic) not in (str, bytes):
        return False
    if expires_age_us is not None and type(expires_age_us) is not int:
        return False
    if not crc >> 32:
        return type(topic) is str and crc32(body) == crc
    crc &= ~FOLLOWS
    if crc & OFEXPIRY:
        return bool(checksum(id_, topic, body, expires_age_us) == crc)
    return bool(_of_row(id_, topic, body) | (OF_ROW | SEALED if isinstance(topic, bytes) else OF_ROW) == crc)


def pack(*parts: bytes | None) -> bytes:
    """Several values as one, to be sealed together."""
    return b"".join(
        struct.pack(">I", 0xFFFFFFFF) if part is None else struct.pack(">I", len(part)) + part for part in parts
    )


def unpack(packed: bytes) -> list[bytes | None]:
    """What `pack` was given."""
    out: list[bytes | None] = []
    at = 0
    while at < len(packed):
        (size,) = struct.unpack_from(">I", packed, at)
        at += 4
        if size == 0xFFFFFFFF:
            out.append(None)
            continue
        out.append(packed[at : at + size])
        at += size
    return out
