"""What the kernel knows about the line under a TCP connection."""

from __future__ import annotations

import socket
import struct
import sys

# struct tcp_info of linux/tcp.h: eight bytes, then 32-bit words.
_WORDS = struct.Struct("=8x24I")
_UNACKED, _LAST_ACK_RECV = 4, 12


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
