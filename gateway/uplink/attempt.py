"""One connection attempt to a hub: TCP, TLS, SASL and open, each with its deadline; once open, what the line carries.

Decides nothing about other attempts, about when to dial again or what to send: that is its owner's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import FAILED_TO_OPEN, Engine
from gateway.amqp.events import (
    CONTAINER_ID,
    INVALID_FIELD,
    UNAUTHORIZED,
    Authenticated,
    Event,
    Failed,
    Opened,
    RemoteClosed,
)
from gateway.amqp.sasl import SaslClient
from gateway.config import Hub, HubUrl
from gateway.uplink.pace import Bucket, Gauge, on_the_wire
from gateway.uplink.state import Failure
from gateway.uplink.tcp import discard, look, silent_ms

if TYPE_CHECKING:
    from security.tls import Stamp


_TLS_CUT = "TLS: the connection ended in the handshake"
# Alerts of RFC 8446, 6.2 that a hub answers our certificate with, or the want of one.
_NOT_OURS = (
    "access denied",
    "bad certificate",
    "certificate expired",
    "certificate required",
    "certificate revoked",
    "certificate unknown",
    "unknown ca",
    "unsupported certificate",
)


def _unreached(error: OSError) -> str:
    """Why there is no connection; asyncio's own text for it names a call."""
    reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
    return f"no connection: {reason or error}"


def _tls_fault(error: ssl.SSLError) -> tuple[str, Failure]:
    """What went wrong, for people, and what that means for the next attempt."""
    reason = (error.reason or str(error)).replace("_", " ").lower()
    _, alerted, alert = reason.partition(" alert ")
    if alerted and alert in _NOT_OURS:
        return f"the hub refuses our certificate, or the want of one: {alert}", Failure.AUTHENTICATION
    if reason == "wrong version number":
        return "TLS: what answers there speaks no TLS", Failure.HANDSHAKE
    return f"TLS: {reason}", Failure.HANDSHAKE


_LOGIN = "; see user, password_file, cert and sasl of this hub"


class Owner(Protocol):
    """Who dials. Of `opened`, then `lost`, or else `attempt_failed`, an attempt that is not aborted calls each once."""

    def clock_doubt(self) -> str | None:
        """Why this machine's clock may be wrong, if it may."""

    def opened(self, attempt: Attempt) -> bool:
        """The hub is there; whether this connection is the one to use."""

    def on_events(self, events: list[Event]) -> None:
        """What came over the connection since `opened`, that event included."""

    def lost(self, attempt: Attempt, error: str, failure: Failure) -> None:
        """An open connection is over."""

    def attempt_failed(self, attempt: Attempt, failure: Failure, error: str, waited_s: float) -> None:
        """It never was open. `waited_s`: the deadline that passed while the hub was connected and silent, else 0."""


class Attempt:
    """One connection, from dialling on. Reports to its owner once how it ended."""

    def __init__(self, owner: Owner, hub: Hub, tls: HubTls, url: HubUrl, gateway: str) -> None:
        self._owner = owner
        self._hub = hub
        self._tls = tls
        self._gateway = gateway
        self.url = url
        self.protocol: AmqpProtocol | None = None
        self._reached = False
        self._open = False
        self.peer: Mapping[str, object] = {}
        self._over = False
        self._reason: tuple[str, Failure] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._outstanding_since: float | None = None
        self._waited_s = 0.0
        self.handed_bytes = 0  # of messages, to the engine, ever
        self._wrote = self._writes = self._segments = 0
        self._carried = 0

    async def run(self) -> None:
        hub, url = self._hub, self.url
        self._task = asyncio.current_task()
        try:
            context = self._tls.context(url)
            password = _password(hub.password_file)
        except (OSError, ValueError) as error:
            self._end(str(error), Failure.AUTHENTICATION)
            return
        try:
            async with asyncio.timeout(hub.connect_timeout_s):
                # An engine costs a third of an attempt, and most attempts in a tunnel reach nobody.
                await self._connect(
                    context,
                    lambda: AmqpProtocol(lambda _: _engine(hub, url, self._gateway, password), self, self._ready),
                )
        except ssl.SSLCertVerificationError as error:
            doubt = self._owner.clock_doubt()
            from security.tls_faults import distrust

            text = f"the hub's certificate: {distrust(error)}"
            self._end(f"{doubt}; {text}" if doubt else text, Failure.AUTHENTICATION)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._end(_TLS_CUT, Failure.UNREACHABLE)
        except ssl.SSLError as error:
            self._end(*_tls_fault(error))
        except TimeoutError:
            if self._waited_s:
                self._end(f"no answer within {self._waited_s:g} s (TLS)", Failure.HANDSHAKE)
            else:
                self._end(f"no connection within {hub.connect_timeout_s:g} s", Failure.UNREACHABLE)
        except OSError as error:
            self._end(_TLS_CUT if self._reached else _unreached(error), Failure.UNREACHABLE)

    @property
    def reached(self) -> bool:
        """Whether somebody took the connection: the hub, or a proxy on the way to it."""
        return self._reached or self.protocol is not None

    async def _connect(self, context: ssl.SSLContext | None, make: Callable[[], AmqpProtocol]) -> None:
        url = self.url
        if context is None:
            await self._loop.create_connection(make, url.host, url.port)
            return
        sock = await self._reach()
        self._reached = True
        with sock.dup() as watched:  # asyncio closes its own before we hear why
            try:
                timeout_s = self._hub.connect_timeout_s
                await self._loop.create_connection(
                    make, sock=sock, ssl=context, server_hostname=url.host, ssl_handshake_timeout=timeout_s
                )
            except asyncio.CancelledError:
                if not silent_ms(watched):  # the line carries what we say: it is the hub that has no time for us
                    self._waited_s = timeout_s
                raise

    async def _reach(self) -> socket.socket:
        """A TCP connection to the first address of the name that takes one. Raises OSError."""
        url, refused = self.url, OSError("the name has no address")
        for family, kind, protocol, _, address in await _addresses(self._loop, url):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                await self._loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                refused = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise refused

    def _ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol
        if self._over:
            protocol.abort()
            return
        protocol.engine.open()
        self._stage("SASL", self._hub.sasl_timeout_s)

    def _stage(self, what: str, timeout_s: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.call_later(
            timeout_s, self._unanswered, f"no answer within {timeout_s:g} s ({what})", timeout_s
        )

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Authenticated():
                    self._stage("open", self._hub.open_timeout_s)
                case Opened(properties=properties) if not self._open:
                    if properties.get(FAILED_TO_OPEN) or any(isinstance(each, RemoteClosed) for each in events):
                        continue  # it refuses us, and says why in its close; the deadline of the open stands
                    self.peer = properties
                    if self._deadline is not None:
                        self._deadline.cancel()
                    self._open = True
                    if not self._owner.opened(self):
                        self._over = True
                        self.abort()
                        return
                case Failed(condition, description, auth):
                    failure = Failure.AUTHENTICATION if auth else Failure.HANDSHAKE
                    self._reason = (f"{condition}: {description}{_LOGIN if auth else ''}", failure)
                case RemoteClosed(condition, description):
                    text = f"the hub closed: {condition or 'no condition'} {description or ''}".rstrip()
                    if condition == INVALID_FIELD and CONTAINER_ID in (description or ""):
                        text += f"; another connection is {self._gateway!r} there: give each gateway an id of its own"
                    refused = condition == UNAUTHORIZED
                    self._reason = (text, Failure.AUTHENTICATION if refused else Failure.HANDSHAKE)
                case _:
                    pass
        if self._open and not self._over:
            self._owner.on_events(events)

    def on_lost(self, error: Exception | None) -> None:
        # Closed before it said a word, that was not the hub but something on the way to it (a proxy, a carrier's NAT).
        # It was the hub where it has shown its certificate: the JVM's TLS hangs up like that where it wants one of us.
        heard, tls = self.protocol is not None and self.protocol.heard, self.url.tls
        silently = Failure.DROPPED if self._open else Failure.HANDSHAKE if heard or tls else Failure.UNREACHABLE
        text, failure = f"the connection ended: {error}" if error else "the hub ended the connection", silently
        if not heard and (error is None or isinstance(error, ConnectionError)):
            text = f"the hub ended the connection before it said anything: {self._hint()}"
        if isinstance(error, ssl.SSLError):  # with TLS 1.3 the hub looks at our certificate when we are through
            text, failure = _tls_fault(error)
        text, failure = self._reason or (text, failure)
        self._end(text, failure)

    def _hint(self) -> str:
        if not self.url.tls:
            return "it may want TLS (amqps://)"
        return "it may not want our certificate" if self._hub.cert else "it may want a certificate (cert, key)"

    def _unanswered(self, error: str, waited_s: float) -> None:
        self._waited_s = waited_s
        self.fail(error, Failure.HANDSHAKE)

    def fail(self, error: str, failure: Failure) -> None:
        """We give this connection up, without waiting for anybody, and what it has not delivered yet."""
        if self.protocol is not None and self.protocol.socket is not None:
            discard(self.protocol.socket)
        self._reason = error, failure
        self._end(error, failure)
        self.abort()

    def leave(self) -> None:
        """Say goodbye; what comes after is nobody's concern."""
        self._over = True
        if self.protocol is not None:
            self.protocol.close()

    def abort(self) -> None:
        self._over = True
        if self._deadline is not None:
            self._deadline.cancel()
        if self.protocol is not None:
            self.protocol.abort()
        elif self._task is not None:
            self._task.cancel()

    def observe(self, gauge: Gauge, bucket: Bucket | None, now: float) -> None:
        """Tell the two what has become of what was handed over."""
        protocol = self.protocol
        assert protocol is not None
        line = None if protocol.socket is None else look(protocol.socket)
        waiting = protocol.waiting_bytes
        if bucket is not None:
            wrote, writes, segments = protocol.written_bytes, protocol.writes, None if line is None else line.segments
            bucket.level(now)
            more = None if segments is None else segments - self._segments
            bucket.wrote(on_the_wire(wrote - self._wrote, writes - self._writes, more, self.url.tls))
            self._wrote, self._writes, self._segments = wrote, writes, segments or 0
        if line is None:
            gauge.observe(now, protocol.written_bytes, waiting, 0.0)
        else:
            gauge.observe(now, line.acked_bytes, line.queued_bytes + waiting, line.rtt_s)

    def carried(self) -> tuple[int, bool]:
        """How much of handed_bytes has arrived at the peer's kernel, and whether anything has since the last call."""
        protocol = self.protocol
        assert protocol is not None
        line = None if protocol.socket is None else look(protocol.socket)
        acked = protocol.written_bytes if line is None else line.acked_bytes
        moving, self._carried = acked != self._carried, acked
        return self.handed_bytes - protocol.waiting_bytes - (0 if line is None else line.queued_bytes), moving

    def silent_ms(self) -> int:
        """How long something was outstanding and nothing was acknowledged: a pause with nothing to send is none."""
        ms = silent_ms(self.protocol.socket) if self.protocol is not None and self.protocol.socket else 0
        now = self._loop.time()
        if not ms:
            self._outstanding_since = None
            return 0
        if self._outstanding_since is None:
            self._outstanding_since = now
        return min(ms, int((now - self._outstanding_since) * 1000))

    def _end(self, error: str, failure: Failure) -> None:
        if self._over:
            return
        self._over = True
        if self._deadline is not None:
            self._deadline.cancel()
        if self._open:
            self._owner.lost(self, error, failure)
        else:
            self._owner.attempt_failed(self, failure, error, self._waited_s)


async def _addresses(loop: asyncio.AbstractEventLoop, url: HubUrl) -> list[Any]:
    """Of a name; an address stands for itself, and is not worth a thread with every attempt. Raises OSError."""
    try:
        return socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)


class HubTls:
    """The TLS context for one hub; made anew when a file of it changed, so renewed ones are used without a restart.

    On a line that is down it is asked for with every attempt, and to parse the files each time would be the most
    expensive thing that an idle gateway does.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._made: tuple[Stamp, ssl.SSLContext] | None = None

    def context(self, url: HubUrl) -> ssl.SSLContext | None:
        """None for an address without TLS. Raises OSError, ValueError."""
        if not url.tls:
            return None
        from security.tls import client_context, file_stamp  # OpenSSL is memory that a link on loopback need not spend

        hub = self._hub
        files = hub.ca, hub.cert, hub.key, hub.crl, hub.key_password_file
        stamp = file_stamp(*files, None if hub.ca else ssl.get_default_verify_paths().cafile)
        if self._made is None or self._made[0] != stamp:
            self._made = stamp, client_context(*files) if hub.ocsp == "off" else _stapled(hub, *files)
        return self._made[1]


def _stapled(hub: Hub, *files: Path | None) -> ssl.SSLContext:
    from security.stapled import StapledContext

    # Of a context asyncio calls nothing but `wrap_bio`.
    return cast(ssl.SSLContext, StapledContext(hub.ocsp == "require", time.time, *files))


def _engine(hub: Hub, url: HubUrl, gateway: str, password: str | None) -> Engine:
    offered = {
        "external": ["EXTERNAL"],
        "plain": ["PLAIN"],
        "anonymous": ["ANONYMOUS"],
        "auto": ["EXTERNAL"] * bool(hub.cert and url.tls)
        + ["PLAIN"] * bool(hub.user and password is not None)
        + ["ANONYMOUS"] * (hub.user is None),
    }[hub.sasl]
    return Engine(
        server=False,
        container=gateway,
        hostname=url.host,
        sasl=SaslClient(offered, hub.user, password, url.host),
        idle_timeout_s=hub.idle_timeout_s,
    )


def _password(path: Path | None) -> str | None:
    return None if path is None else path.read_text(encoding="utf-8").rstrip("\r\n")
