"""Retained messages, wills, requests and what sessions are owed, as the rows of an encrypted journal have them.

Each pair of functions turns the plain values of one table's columns into the stored ones and back; without a seal they
are the same. Knows no SQL and no cipher.
"""

from __future__ import annotations

from storeforward.errors import JournalError
from storeforward.sealing import Seal, about, checksum, intact, key_id, pack, unpack


def open_sealed(seal: Seal | None, where: bytes, topic: bytes, body: bytes) -> tuple[str, bytes]:
    """As `Seal.open_row`. Raises JournalError where nobody has the key."""
    try:
        if seal is None:
            raise LookupError
        return seal.open_row(where, topic, body)
    except LookupError:
        raise JournalError(
            f"encrypted under key {key_id(topic)}, which is not among encryption_keys of [gateway]; name its file there"
        ) from None


def seal_retained(seal: Seal | None, topic: str, body: bytes) -> tuple[str | bytes, int, bytes]:
    """A retained message's key, checksum and body."""
    if seal is None:
        return topic, checksum(0, topic, body), body
    name = seal.name(topic)[0]
    body = pack(*seal.seal_row(about("retained", name.hex()), topic, body))
    return name, checksum(0, name, body), body


def open_retained(seal: Seal | None, name: str | bytes, crc: int, body: bytes) -> tuple[str, bytes] | None:
    """The topic and the message; None where it does not read."""
    if not intact(0, name, crc, body):
        return None
    if isinstance(name, str):
        return name, body
    topic, text = unpack(body)
    assert topic is not None
    assert text is not None
    try:
        return open_sealed(seal, about("retained", name.hex()), topic, text)
    except ValueError:
        return None


def seal_will(
    seal: Seal | None, client_id: str, topic: str, payload: bytes, section: bytes | None
) -> tuple[str | bytes, bytes, bytes | None]:
    """A will's topic, payload and properties."""
    if seal is None:
        return topic, payload, section
    return *seal.seal_row(about("will", client_id), topic, pack(payload, section)), None


def open_will(
    seal: Seal | None, client_id: str, topic: str | bytes, payload: bytes, section: bytes | None
) -> tuple[str, bytes, bytes | None]:
    """The reverse. Raises ValueError, JournalError."""
    if isinstance(topic, str):
        return topic, payload, section
    text, packed = open_sealed(seal, about("will", client_id), topic, payload)
    plain, section = unpack(packed)
    return text, plain or b"", section


def seal_request(
    seal: Seal | None, message_id: str, topic: str, correlation: bytes | None
) -> tuple[str | bytes, bytes | None]:
    """A request's response topic and correlation data."""
    if seal is None:
        return topic, correlation
    sealed, text = seal.seal_row(about("request", message_id), topic, correlation or b"")
    return sealed, None if correlation is None else text


def open_request(
    seal: Seal | None, message_id: str, topic: str | bytes, correlation: bytes | None
) -> tuple[str, bytes | None]:
    """The reverse. Raises ValueError, JournalError."""
    if isinstance(topic, str):
        return topic, correlation
    text, plain = open_sealed(seal, about("request", message_id), topic, correlation or b"")
    return text, None if correlation is None else plain


def seal_due(seal: Seal | None, client_id: str, n: int, topic: str) -> str | bytes:
    """The topic of a retained message that a session is owed."""
    return topic if seal is None else seal.seal_row(about(f"due {n}", client_id), topic, b"")[0]


def open_due(seal: Seal | None, client_id: str, n: int, topic: str | bytes) -> str:
    """The reverse. Raises ValueError, JournalError."""
    return topic if isinstance(topic, str) else open_sealed(seal, about(f"due {n}", client_id), topic, b"")[0]
