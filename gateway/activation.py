"""Listening sockets that systemd holds open across restarts (sd_listen_fds(3)), found by the address they are bound to.

Who connects while the daemon restarts waits in the kernel's queue instead of being refused. They come from a .socket
unit, or from the last run of the daemon, which left them in systemd's store. Knows nothing of what is spoken on them,
nor of the configuration: `take` is asked for one address after the other, `close_rest` ends it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, MutableMapping
from typing import Final

from gateway.config_values import Listen

log = logging.getLogger("lineside.listen")

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
SOCKETS_MAX: Final = 64
STORED: Final = "lineside "


class PassedSockets:
    """The sockets this process was started with, until somebody takes them."""

    def __init__(self, sockets: list[tuple[str, socket.socket]]) -> None:
        """`sockets`: each with the name it was passed under."""
        self._sockets = sockets

    @classmethod
    def from_environment(
        cls, environment: MutableMapping[str, str] = os.environ, pid: int | None = None, first_fd: int = FIRST_FD
    ) -> PassedSockets:
        """Read LISTEN_PID and LISTEN_FDS, and take them out: they are not for our children."""
        addressee = environment.pop("LISTEN_PID", "")
        count = environment.pop("LISTEN_FDS", "")
        names = environment.pop("LISTEN_FDNAMES", "").split(":")
        if addressee != str(os.getpid() if pid is None else pid) or not count.isdecimal():
            return cls([])
        sockets: list[tuple[str, socket.socket]] = []
        for fd in range(first_fd, first_fd + min(int(count), SOCKETS_MAX)):
            try:
                os.set_inheritable(fd, False)
                passed = socket.socket(fileno=fd)
            except OSError as error:
                log.warning("systemd passed something that is no socket", extra={"fd": fd, "error": str(error)})
                continue
            at = fd - first_fd
            sockets.append((names[at] if at < len(names) else "", passed))
        return cls(sockets)

    def take(self, listen: Listen) -> socket.socket | None:
        """The listening stream socket bound to this address, if there is one."""
        for named in self._sockets:
            passed = named[1]
            if _is_at(passed, listen):
                self._sockets.remove(named)
                passed.setblocking(False)
                return passed
        return None

    def close_rest(self, forget: Callable[[str], object]) -> None:
        """Nobody will accept on what is left: who connects there is refused rather than left waiting.

        `forget` is told the names of those that an earlier run had stored.
        """
        for name, passed in self._sockets:
            where = {"address": _address_of(passed)}
            if name.startswith(STORED):
                log.info("no longer listening", extra=where)
                forget(name)
            else:
                log.warning("a socket of the .socket unit is not in the configuration", extra=where)
            passed.close()
        self._sockets.clear()


def stored_name(listen: Listen) -> str:
    """The name to store a listener's socket under: no colons (sd_notify(3), FDNAME)."""
    return f"{STORED}{listen}".replace(":", ";")[:255]


def _is_at(passed: socket.socket, listen: Listen) -> bool:
    if passed.type != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    bound = passed.getsockname()
    if passed.family == socket.AF_UNIX:
        return bool(listen.path) and bound == listen.path
    if listen.path or passed.family not in (socket.AF_INET, socket.AF_INET6) or bound[1] != listen.port:
        return False
    try:
        wanted = ipaddress.ip_address("127.0.0.1" if listen.host.lower() == "localhost" else listen.host)
    except ValueError:
        return False  # a name: whoever resolves it binds it
    return ipaddress.ip_address(bound[0].partition("%")[0]) == wanted


def _address_of(passed: socket.socket) -> str:
    bound = passed.getsockname()
    if not isinstance(bound, tuple):
        return f"unix:{bound}"
    return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
