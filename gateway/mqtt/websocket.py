"""The server's end of a WebSocket (RFC 6455) that carries MQTT (MQTT 5.0 §6), sans-IO.

HTTP by h11, frames by wsproto; the rules of the handshake are here. MQTT packets and frames are not aligned
([MQTT-6.0.0-2], and clients in browsers do put many packets into one frame), so payload is handed on as it comes, also
that of an unfinished frame: however long a frame says it is, no more is held here than one HTTP request or one control
frame. Extensions are never agreed to, so permessage-deflate is off. Knows no socket, no clock and no MQTT packet.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import h11
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import generate_accept_token

from gateway.config_values import is_loopback

SUBPROTOCOL: Final = "mqtt"
VERSION: Final = b"13"
HANDSHAKE_BYTES_MAX: Final = 16 << 10
HANDSHAKE_S: Final = 10.0
CLOSE_WAIT_S: Final = 2.0
REASON_CHARACTERS_MAX: Final = 200


class State(Enum):
    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"  # our Close is sent, the peer's is awaited
    CLOSED = "closed"  # nothing more is taken; when what there is to send has gone, so may the connection


@dataclass(frozen=True, slots=True)
class Rules:
    """What is asked of a handshake.

    `origins`: pages that may connect besides those from the host that the client itself calls us by; "*" is any.
    `loopback`: whether we are reached from this machine only.
    """

    path: str
    origins: frozenset[str] = frozenset()
    loopback: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """The handshake is done. `origin` is the page that connects, None for a program."""

    origin: str | None


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes of MQTT."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """There will be no WebSocket: the HTTP status that was answered, and why."""

    status: int
    why: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The WebSocket is over. `clean` if the peer closed it or answered our Close, else it broke the protocol."""

    code: int
    reason: str
    clean: bool


Event = Opened | Received | Refused | Closed


class _Refusal(Exception):
    def __init__(self, status: int, why: str, *headers: tuple[str, str]) -> None:
        super().__init__(why)
        self.status = status
        self.why = why
        self.headers = headers


class WebSocketServer:
    """One connection. Feed `receive` and `tick`, act on the events, send `data_to_send` after every call."""

    def __init__(self, rules: Rules, now: float) -> None:
        self.state = State.CONNECTING
        self.deadline: float | None = now + HANDSHAKE_S
        self._rules = rules
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HANDSHAKE_BYTES_MAX)
        self._frames: Connection
        self._out = bytearray()
        self._pong: bytes | bytearray | None = None
        self.frames = 0  # that came so far

    # -------- the peer's side

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the peer. Raises nothing; at most one Received, as one call's payload is joined."""
        match self.state:
            case State.CONNECTING:
                return self._receive_http(data, now)
            case State.OPEN | State.CLOSING:
                self._frames.receive_data(data)
                return self._receive_frames()
            case State.CLOSED:
                return []

    def tick(self, now: float) -> list[Event]:
        """What a passed deadline leads to."""
        if self.deadline is None or now < self.deadline:
            return []
        if self.state is State.CONNECTING:
            return [self._refuse(_Refusal(408, f"no handshake within {HANDSHAKE_S:g} s"))]
        self._over()
        return [Closed(CloseReason.ABNORMAL_CLOSURE, "our close was not answered", False)]

    # -------- our side

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send as one binary frame ([MQTT-6.0.0-1]). Only while open."""
        assert self.state is State.OPEN
        self._out += self._frames.send(BytesMessage(data=bytes(data)))

    def close(self, now: float, code: int = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        """Begin the closing handshake (RFC 6455 §7.1.2); before the opening one, just end."""
        if self.state is State.OPEN:
            self._out += self._frames.send(CloseConnection(code=code, reason=reason or None))
            self.state = State.CLOSING
            self.deadline = now + CLOSE_WAIT_S
        elif self.state is State.CONNECTING:
            self._over()

    def data_to_send(self, *, congested: bool = False) -> bytes:
        """Return what is to be sent, once.

        While `congested`, a Pong waits: only the latest Ping need be answered (RFC 6455 §5.5.3), so a peer that
        sends Pings and reads nothing costs one of them.
        """
        if self._pong is not None and not congested:
            if self.state is State.OPEN:
                self._out += self._frames.send(Pong(payload=bytes(self._pong)))
            self._pong = None
        out = bytes(self._out)
        self._out.clear()
        return out

    # -------- the handshake

    def _receive_http(self, data: bytes, now: float) -> list[Event]:
        try:
            self._http.receive_data(data)
            request = self._http.next_event()
            if request is h11.NEED_DATA:
                return []
            if not isinstance(request, h11.Request):
                raise _Refusal(400, "no HTTP request")
            after = self._http.next_event()
            origin, accept = _check(request, self._rules)
            if not isinstance(after, h11.EndOfMessage):
                raise _Refusal(400, "a WebSocket handshake has no body")
        except h11.RemoteProtocolError as error:
            return [self._refuse(_Refusal(error.error_status_hint, f"not HTTP as a WebSocket needs it: {error}"))]
        except _Refusal as refusal:
            return [self._refuse(refusal)]
        headers = [
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", accept),
            ("Sec-WebSocket-Protocol", SUBPROTOCOL),
        ]
        response = h11.InformationalResponse(status_code=101, headers=headers, reason=b"Switching Protocols")
        self._out += self._http.send(response) or b""
        early, _ = self._http.trailing_data
        self._frames = Connection(ConnectionType.SERVER, trailing_data=bytes(early))
        self.state = State.OPEN
        self.deadline = None
        return [Opened(origin), *self._receive_frames()]

    def _refuse(self, refusal: _Refusal) -> Refused:
        body = f"{refusal.why}\n".encode("ascii", "backslashreplace")
        headers = [
            ("Content-Type", "text/plain; charset=us-ascii"),
            ("Content-Length", str(len(body))),
            ("Connection", "close, Upgrade" if refusal.status == HTTPStatus.UPGRADE_REQUIRED else "close"),
            *refusal.headers,
        ]
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(
                status_code=refusal.status, headers=headers, reason=HTTPStatus(refusal.status).phrase.encode()
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self._out += self._http.send(event) or b""
        self._over()
        return Refused(refusal.status, refusal.why)

    # -------- frames

    def _receive_frames(self) -> list[Event]:
        payload: list[bytes | bytearray] = []
        ending: Closed | None = None
        for event in self._frames.events():
            self.frames += 1
            if isinstance(event, BytesMessage):
                payload.append(event.data)
            elif isinstance(event, Ping):
                self._pong = event.payload
            elif isinstance(event, TextMessage):
                # [MQTT-6.0.0-1]: any other type of data frame ends the connection.
                ending = self._fail(CloseReason.UNSUPPORTED_DATA, "MQTT travels in binary frames")
                break
            elif isinstance(event, CloseConnection):
                ending = self._closed_by_peer(event)
                break
        events: list[Event] = []
        if payload and self.state is not State.CLOSING:
            events.append(Received(b"".join(payload)))
        if ending is not None:
            events.append(ending)
        return events

    def _closed_by_peer(self, event: CloseConnection) -> Closed:
        """wsproto has one event for a Close and for what is no frame; its state tells which it was."""
        code, reason = int(event.code), _shortened(event.reason or "")
        if self._frames.state.name not in ("REMOTE_CLOSING", "CLOSED"):
            return self._fail(code, reason)
        if self.state is State.OPEN:
            self._out += self._frames.send(event.response())
        self._over()
        return Closed(code, reason, True)

    def _fail(self, code: int, reason: str) -> Closed:
        """RFC 6455 §7.1.7: say why, and end without waiting for an answer."""
        if self.state is State.OPEN:
            self._out += self._frames.send(CloseConnection(code=code, reason=reason))
        self._over()
        return Closed(code, reason, False)

    def _over(self) -> None:
        self.state = State.CLOSED
        self.deadline = None
        self._pong = None


def _check(request: h11.Request, rules: Rules) -> tuple[str | None, str]:
    """RFC 6455 §4.2.1, and who may connect. Returns the origin and the Sec-WebSocket-Accept. Raises _Refusal."""
    headers: dict[str, list[str]] = {}
    for name, value in request.headers:
        headers.setdefault(name.decode("ascii").lower(), []).append(value.decode("latin-1"))
    if request.method != b"GET":
        raise _Refusal(405, "a WebSocket begins with GET", ("Allow", "GET"))
    if request.target.decode("ascii").partition("?")[0] != rules.path:
        raise _Refusal(404, f"nothing is here; MQTT over WebSocket is at {rules.path}")
    if "websocket" not in _tokens(headers.get("upgrade")) or "upgrade" not in _tokens(headers.get("connection")):
        text = f'this is MQTT over WebSocket: connect an MQTT client, with the subprotocol "{SUBPROTOCOL}"'
        raise _Refusal(426, text, ("Upgrade", "websocket"), ("Sec-WebSocket-Version", VERSION.decode()))
    if request.http_version != b"1.1":
        raise _Refusal(505, "a WebSocket needs HTTP/1.1")
    if headers.get("sec-websocket-version") != [VERSION.decode()]:
        raise _Refusal(426, "only version 13 of WebSocket is spoken", ("Sec-WebSocket-Version", VERSION.decode()))
    key = _only(headers, "sec-websocket-key")
    try:
        nonce = base64.b64decode(key or "", validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if key is None or len(nonce) != 16:
        raise _Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    origins, hosts = headers.get("origin", []), headers.get("host", [])
    if len(origins) > 1 or len(hosts) != 1:
        raise _Refusal(400, "one Host header, and at most one Origin")
    origin = origins[0] if origins else None
    if origin is not None and not origin_allowed(origin, hosts[0], rules):
        raise _Refusal(403, f"pages from {_shortened(origin)} may not connect; ws_origins in [mqtt] lists who may")
    # [MQTT-6.0.0-3] and [MQTT-6.0.0-4]: the client offers "mqtt", and that is what is chosen.
    if SUBPROTOCOL not in _tokens(headers.get("sec-websocket-protocol"), lower=False):
        raise _Refusal(400, f'the subprotocol "{SUBPROTOCOL}" must be offered (Sec-WebSocket-Protocol)')
    return origin, generate_accept_token(key.encode("ascii")).decode("ascii")


def origin_allowed(origin: str, host: str, rules: Rules) -> bool:
    """Whether a page may connect: one that is listed, or one that came from the host it now calls (the Host header).

    Where only this machine can reach us, that host must also be called by a loopback name: a page could otherwise have
    its own name lead here (DNS rebinding).
    """
    if "*" in rules.origins or origin.lower() in rules.origins:
        return True
    page, here = _host_name(origin), _host_name(f"//{host}")
    return page is not None and page == here and (not rules.loopback or is_loopback(page))


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _tokens(values: Iterable[str] | None, *, lower: bool = True) -> list[str]:
    found = [token.strip() for value in values or () for token in value.split(",")]
    return [token.lower() for token in found] if lower else found


def _only(headers: dict[str, list[str]], name: str) -> str | None:
    values = headers.get(name, [])
    return values[0] if len(values) == 1 else None


def _shortened(text: str) -> str:
    return text if len(text) <= REASON_CHARACTERS_MAX else text[:REASON_CHARACTERS_MAX] + "..."
