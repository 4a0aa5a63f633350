"""What the kernel knows about the line under a TCP connection."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
from dataclasses import dataclass

# struct tcp_info of linux/tcp.h: eight bytes, then 32-bit words.
_WORDS = struct.Struct("=8x24I")
_UNACKED, _LAST_ACK_RECV = 4, 12
# Further down: tcpi_bytes_acked, 8 bytes on tcpi_segs_out, and 8 bytes on tcpi_min_rtt in microseconds.
_COUNTS = struct.Struct("=120xQ8xI8xI")
_RTT_UNKNOWN = 0xFFFFFFFF
_RTT_S_MAX = 10.0
SIOCOUTQ = 0x5411  # linux/sockios.h: bytes in the send queue, those on their way included
_INT = struct.Struct("=i")


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes that the peer's kernel has acknowledged, bytes handed to ours that it has not, and the least round trip.

    segments: all that were sent, those included that only acknowledge.
    """

    acked_bytes: int
    queued_bytes: int
    segments: int
    rtt_s: float


def look(sock: socket.socket) -> Line | None:
    """What a connection holds; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS.size)
        (queued,) = _INT.unpack(fcntl.ioctl(sock.fileno(), SIOCOUTQ, b"\0" * _INT.size))
    except OSError:
        return None
    if len(info) < _COUNTS.size:
        return None
    acked, segments, rtt_us = _COUNTS.unpack(info)
    return Line(acked, queued, segments, 0.0 if rtt_us == _RTT_UNKNOWN else min(_RTT_S_MAX, rtt_us / 1e6))


def discard(sock: socket.socket) -> None:
    """From now on, closing resets the connection, and what is queued is thrown away.

    Otherwise the kernel goes on sending it for minutes: when the line is back, it would reach the peer behind what the
    next connection has sent by then.
    """
    with contextlib.suppress(OSError):  # gone already, and the queue with it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent_ms(sock: socket.socket) -> int:
    """How long the peer's kernel has not acknowledged what we sent; 0 when nothing is outstanding or unknown.

    A slow line keeps acknowledging, so this tells a tunnel from a narrow radio, which no time-out above TCP can.
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _WORDS.size)
    except OSError:
        return 0
    if len(info) < _WORDS.size:
        return 0
    words = _WORDS.unpack(info)
    return int(words[_LAST_ACK_RECV]) if words[_UNACKED] else 0
