"""Hears from the kernel that a carrier, an address or a route changed, so that nobody waits in backoff after a tunnel.

Linux only; elsewhere `open_socket` returns None and the backoff alone decides. See rtnetlink(7).
"""

from __future__ import annotations

import socket
import struct
import sys

RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400
GROUPS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE
RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE = 16, 20, 24
_HEADER = struct.Struct("=LHHLL")
_IFINFO = struct.Struct("=BxHiII")
IFF_RUNNING = 0x40
READ_BYTES = 65536


def open_socket() -> socket.socket | None:
    """A socket that reads as ready when something changed; None where the system has no rtnetlink."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    except OSError:
        return None
    try:
        sock.bind((0, GROUPS))
    except OSError:
        sock.close()
        return None
    return sock


def better(data: bytes) -> bool:
    """Whether these netlink messages tell of something that came, rather than of something that went."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if size < _HEADER.size or at + size > len(data):
            return False
        if kind in (RTM_NEWADDR, RTM_NEWROUTE):
            return True
        if kind == RTM_NEWLINK and size >= _HEADER.size + _IFINFO.size:
            flags = _IFINFO.unpack_from(data, at + _HEADER.size)[3]
            if flags & IFF_RUNNING:
                return True
        at += (size + 3) & ~3
    return False


def drain(sock: socket.socket) -> bool:
    """Read all that is there; True if any of it may mean that the line is back. An overrun counts as news."""
    news = False
    for _ in range(64):
        try:
            data = sock.recv(READ_BYTES)
        except BlockingIOError:
            return news
        except OSError:
            return True
        news = better(data) or news
    return news
