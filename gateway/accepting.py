"""Listening sockets, and who is let in: each connection is accepted as dear work, and one too many goes at once.

asyncio's own servers accept as many as wait, in one go, and build a transport for each before anybody is asked. Knows
nothing of what is spoken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

from gateway.config_values import Listen
from gateway.transports import Handshakes, ServerTls, TlsGate, peer_of, source_of
from gateway.turns import Account

log = logging.getLogger("lineside.listen")

BACKLOG: Final = 1024
AT_ONCE: Final = 4  # connections that are accepted without looking at the clock
# What asyncio and the kernel do for a connection afterwards, until it has ended, takes so many times what accepting it
# does, and can't be measured where it is done. By `tests.bench.abuse sessions`: with 2.5 a publisher kept 0.79 of its
# rate, with 6 it is 0.86.
AFTERWARDS: Final = 6.0
# No descriptors or no memory are left, say: it is tried again after that long.
RETRY_S: Final = 1.0

Factory = Callable[[], asyncio.BaseProtocol]


class Acceptor:
    """One listening socket. `factory` makes the protocol of those that are let in."""

    def __init__(self, sock: socket.socket, factory: Factory, handshakes: Handshakes) -> None:
        self.sock = sock
        self.account = Account()
        self._factory = factory
        self._handshakes = handshakes
        self._turns = handshakes.turns
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[None]] = set()
        self._closed = False
        self._resting: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._resting is not None:
                self._resting.cancel()
            self._loop.remove_reader(self.sock)
            self.sock.close()

    def abort(self) -> None:
        """Its turn failed: whoever comes later is let in nevertheless."""
        if not self._closed and self._resting is None:
            self._rest()

    def _readable(self) -> None:
        if self._turns.ready:
            with self._turns.charging(self.account):
                self._accept()
        else:
            self._loop.remove_reader(self.sock)
            self._turns.enter(self)

    def turn(self) -> None:
        """Accept a few."""
        if self._closed:
            return
        more = self._accept()
        while more and not self._turns.over:
            more = self._accept()
        if more:
            self._turns.enter(self)
        elif not self._closed and self._resting is None:
            self._loop.add_reader(self.sock, self._readable)

    def _accept(self) -> bool:
        """Whether there may be more."""
        began_s = self._turns.cpu()
        try:
            return self._accept_few()
        finally:
            self._turns.spent(self.account, (self._turns.cpu() - began_s) * AFTERWARDS)

    def _accept_few(self) -> bool:
        for _ in range(AT_ONCE):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionAbortedError:
                continue  # gone while it waited
            except OSError as error:
                # As asyncio's own servers do it: see `gateway.descriptors` for what is made of that.
                context = {"message": "socket.accept() failed", "exception": error, "socket": self.sock}
                self._loop.call_exception_handler(context)
                self._rest()
                return False
            self._let_in(sock, peer_of(address))
        return True

    def _rest(self) -> None:
        self._loop.remove_reader(self.sock)
        self._resting = self._loop.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._resting = None
        self._turns.enter(self)

    def _let_in(self, sock: socket.socket, peer: str) -> None:
        handshakes = self._handshakes
        if not handshakes.admission.admit(*source_of(peer), self._loop.time()):
            handshakes.report("connection refused: too many from there in too little time", peer)
            sock.close()
            return
        task = self._loop.create_task(self._begin(sock))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, sock)
        except OSError as error:
            log.info("connection ended before it began", extra={"error": error.strerror})
            sock.close()


class Server:
    """The sockets of one address."""

    def __init__(self, acceptors: list[Acceptor]) -> None:
        self._acceptors = acceptors

    @property
    def sockets(self) -> list[socket.socket]:
        return [each.sock for each in self._acceptors]

    def close(self) -> None:
        for each in self._acceptors:
            each.close()


async def open_server(
    factory: Factory,
    listen: Listen,
    handshakes: Handshakes,
    tls: ServerTls | None = None,
    passed: socket.socket | None = None,
) -> Server:
    """Listen, and give every connection a protocol of `factory`, after TLS if `listen` asks for it. Raises OSError.

    `passed`: the socket that listens there already.
    """
    if listen.tls and not listen.path:
        assert tls is not None
        context, inner = tls, factory

        def gate() -> asyncio.BaseProtocol:
            return TlsGate(inner, context, listen, handshakes)

        factory = gate
    sockets = [passed] if passed is not None else await _bind(listen)
    return Server([Acceptor(sock, factory, handshakes) for sock in sockets])


async def _bind(listen: Listen) -> list[socket.socket]:
    """A socket for each of the host's addresses, or for the path. Raises OSError."""
    if listen.path:
        _clear_socket(listen.path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return [_bound(sock, listen.path)]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets.append(_bound(sock, address))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bound(sock: socket.socket, address: object) -> socket.socket:
    try:
        sock.bind(address)  # type: ignore[arg-type]
    except OSError:
        sock.close()
        raise
    return sock


def _clear_socket(path: str) -> None:
    """A Unix socket that a killed daemon left behind must not keep this one from starting; other files stay."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
