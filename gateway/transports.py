"""How an accepted connection gets to its protocol: through TLS, with fresh certificates, its handshake as dear work.

Knows nothing of what is spoken on top.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from asyncio import sslproto
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from gateway.config_values import Listen
from gateway.turns import Account, Turns
from security.admission import Admission, Reports
from security.tls import ClientCert, TLSFileError, file_stamp, server_context

log = logging.getLogger("lineside.listen")

HANDSHAKE_S: Final = 10.0
CLOSE_S: Final = 2.0
# asyncio keeps a buffer of this size for every TLS connection from its first byte on, 256 KB by itself: a thousand that
# only began a handshake would be a quarter of a gigabyte.
TLS_BUFFER_BYTES: Final = 64 << 10
sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
EARLY_BYTES_MAX: Final = 1 << 20

_ssl_protocol: Any = sslproto.SSLProtocol
_fatal_error = _ssl_protocol._fatal_error


def _say_why(self: Any, error: BaseException, message: str = "Fatal error on transport") -> None:
    """Send the alert that OpenSSL has made (RFC 8446, 6.2) before the connection goes: asyncio leaves it in its buffer.

    Without, the other end only sees that it ended, and its operator not what is wrong with a certificate.
    """
    if isinstance(error, ssl.SSLError) and self._transport is not None:
        self._transport.write(self._outgoing.read())
    _fatal_error(self, error, message)


_ssl_protocol._fatal_error = _say_why


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a listener's certificate is, and whom of its clients it asks for theirs."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    client_cert: ClientCert = "none"
    crl: Path | None = None
    key_password: Path | None = None


class ServerTls:
    """The TLS context of a listener's next handshake. Raises TLSFileError if there is none to begin with.

    Whenever the files have changed they are read again; while they can't be used (a certificate is replaced before its
    key, say) the last good ones stay. Connections that are up keep what they began with.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamp()
        self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """The one to use now. A few `stat` calls, unless something has changed."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            self.renew()
        return self._context

    def renew(self) -> None:
        """Read the files again, or keep what there is and say why."""
        try:
            self._context = self._read()
        except TLSFileError as error:
            log.error("certificate not taken; the old one stays", extra={"error": str(error)})
        else:
            log.info("certificate read again", extra={"file": str(self._files.cert)})

    def _stamp(self) -> tuple[object, ...]:
        files = self._files
        return file_stamp(files.cert, files.key, files.client_ca, files.crl, files.key_password)

    def _read(self) -> ssl.SSLContext:
        files = self._files
        context = server_context(
            files.cert, files.key, files.client_ca, files.client_cert, files.crl, files.key_password
        )
        context.sslobject_class = _Metered
        return context


class Handshakes:
    """The connections that have not got to their protocol yet: how many there may be, and their end at a stop."""

    def __init__(self, handshakes_max: int, admission: Admission | None = None, turns: Turns | None = None) -> None:
        self.handshakes_max = handshakes_max
        self._pending: set[asyncio.Transport] = set()
        loop = asyncio.get_running_loop()
        self.admission = Admission(loop.time()) if admission is None else admission
        self.turns = Turns(loop) if turns is None else turns
        self._reports = Reports()

    def __len__(self) -> int:
        return len(self._pending)

    def begin(self, transport: asyncio.Transport, peer: str) -> bool:
        """Count one more; False, and the connection is gone, where that is one too many."""
        if len(self._pending) >= self.handshakes_max:
            self.report("connection refused: too many handshakes", peer)
            transport.abort()
            return False
        self._pending.add(transport)
        return True

    def report(self, text: str, peer: str, **fields: object) -> None:
        """A warning about a peer, of equal ones only as many as a log can bear."""
        left_out = self._reports.due(text, source_of(peer)[0], asyncio.get_running_loop().time())
        if left_out is not None:
            more: dict[str, object] = {"left_out": left_out} if left_out else {}
            log.warning(text, extra={"peer": peer} | fields | more)

    def end(self, transport: asyncio.Transport) -> None:
        self._pending.discard(transport)

    def stop(self) -> None:
        for transport in list(self._pending):
            transport.abort()


# What a handshake takes with all that asyncio does around it, by what OpenSSL takes of that.
AROUND: Final = 2.0
# Whose handshake is under way, and who is to know what it costs.
_shaking: ContextVar[tuple[Turns, Account] | None] = ContextVar("shaking", default=None)


class _Metered(ssl.SSLObject):
    """TLS on a server's side. asyncio has its handshake done by callbacks of its own, so it is charged here."""

    def do_handshake(self) -> None:
        shaking = _shaking.get()
        if shaking is None:
            super().do_handshake()
            return
        turns, account = shaking
        began_s = turns.cpu()
        try:
            super().do_handshake()
        finally:
            turns.spent(account, (turns.cpu() - began_s) * AROUND)


class TlsGate(asyncio.Protocol):
    """Takes an accepted connection through its TLS handshake, then hands it to the protocol of `factory`.

    Instead of `create_server(ssl=...)`, which says nothing of a handshake that fails, and keeps one context for ever.
    """

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], tls: ServerTls, listen: Listen, handshakes: Handshakes
    ) -> None:
        self._factory = factory
        self._tls = tls
        self._listen = listen
        self._handshakes = handshakes
        self._loop = asyncio.get_running_loop()
        self._turns = handshakes.turns
        self._early = bytearray()
        self._lost = False
        self._task: asyncio.Task[None] | None = None
        self._raw: asyncio.Transport
        self._peer = "?"
        self.account: Account

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # the first byte is for the handshake
        self._raw, self._peer = transport, peer_name(transport)
        self.account = self._turns.account(source_of(self._peer)[0])
        if self._handshakes.begin(transport, self._peer):
            self._turns.enter(self)

    def turn(self) -> None:
        """Begin the handshake. What it costs later is charged as it comes."""
        if self._lost or self._raw.is_closing():
            self._handshakes.end(self._raw)
            return
        self._task = self._loop.create_task(self._shake_hands(self._raw, self._peer))

    def abort(self) -> None:
        self._raw.abort()

    def data_received(self, data: bytes) -> None:
        """What came with the end of the handshake, before its news reached us."""
        self._early += data
        assert len(self._early) <= EARLY_BYTES_MAX

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._handshakes.end(self._raw)

    async def _shake_hands(self, raw: asyncio.Transport, peer: str) -> None:
        _shaking.set((self._turns, self.account))  # for the callbacks that `start_tls` makes
        try:
            tls = await self._loop.start_tls(
                raw,
                self,
                self._tls.context(),
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=CLOSE_S,
            )
        except OSError as error:  # ssl.SSLError is one
            where = {"address": str(self._listen), "error": _handshake_fault(error)}
            self._handshakes.report("tls handshake failed", peer, **where)
            raw.abort()
            return
        finally:
            self._handshakes.end(raw)
        if tls is None or self._lost:
            return
        try:
            self._hand_over(tls)
        except Exception:  # as asyncio does where a protocol's callback fails: only its connection pays
            log.exception("connection failed at its begin", extra={"peer": peer})
            tls.abort()

    def _hand_over(self, tls: asyncio.Transport) -> None:
        protocol = self._factory()
        tls.set_protocol(protocol)
        protocol.connection_made(tls)
        if self._early and isinstance(protocol, asyncio.Protocol) and not tls.is_closing():
            protocol.data_received(bytes(self._early))
        self._early.clear()


def _handshake_fault(error: OSError) -> str:
    """What went wrong, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return {
            "peer did not return a certificate": "the client showed no certificate, and client_cert asks for one",
            "http request": "the client spoke HTTP without TLS",
            "wrong version number": "the client spoke no TLS",
        }.get(reason, reason)
    if isinstance(error, ConnectionAbortedError):
        return f"no handshake within {HANDSHAKE_S:g} s"
    return error.strerror or "the client closed the connection"


def peer_name(transport: asyncio.BaseTransport) -> str:
    """The other end of a connection, for logs."""
    return peer_of(transport.get_extra_info("peername"))


def peer_of(address: object) -> str:
    """The same from a socket's address; that of a Unix socket says nothing."""
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unix"


def source_of(peer: str) -> tuple[str, bool]:
    """Whom connections are counted for, and whether that is this machine."""
    host = peer.rpartition(":")[0].partition("%")[0]
    return _source_of_host(host) if host else (peer, True)


@lru_cache(maxsize=1024)
def _source_of_host(host: str) -> tuple[str, bool]:
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return "loopback", True
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64))), False
    return str(address), False
