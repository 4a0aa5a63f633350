"""The client's end of a WebSocket in bytes (RFC 6455 §5.2), written from the standard alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # what RFC 6455 §1.3 says the answer to KEY is


def request(path: str = "/mqtt", *, method: str = "GET", version: str = "1.1", **headers: str | None) -> bytes:
    """A handshake; `headers` replace a header (with _ for -), or with None leave it out."""
    found: dict[str, str | None] = {
        "host": "127.0.0.1:8080",
        "upgrade": "websocket",
        "connection": "keep-alive, Upgrade",
        "sec-websocket-key": KEY,
        "sec-websocket-version": "13",
        "sec-websocket-protocol": "mqtt",
    }
    found |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [
        f"{method} {path} HTTP/{version}",
        *(f"{name}: {value}" for name, value in found.items() if value is not None),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes | None = MASK) -> bytes:
    head = bytes([fin << 7 | rsv << 4 | opcode])
    masked = 0x80 if mask else 0
    if len(payload) < 126:
        head += bytes([masked | len(payload)])
    elif len(payload) < 1 << 16:
        head += struct.pack("!BH", masked | 126, len(payload))
    else:
        head += struct.pack("!BQ", masked | 127, len(payload))
    if not mask:
        return head + payload
    return head + mask + bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))


@dataclass(frozen=True, slots=True)
class Frame:
    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """A Close's."""
        return int.from_bytes(self.payload[:2])


def frames(data: bytes) -> list[Frame]:
    """What a server sent: whole, final, unmasked frames."""
    found = []
    while data:
        assert data[0] & 0x80, "final"
        assert not data[0] & 0x70, "no extension"
        length, at = data[1], 2
        assert length < 128, "unmasked"
        if length == 126:
            length, at = int.from_bytes(data[2:4]), 4
        elif length == 127:
            length, at = int.from_bytes(data[2:10]), 10
        assert len(data) >= at + length
        found.append(Frame(data[0] & 0xF, data[at : at + length]))
        data = data[at + length :]
    return found
