"""The asyncio side of MQTT over WebSocket: an MQTT protocol on top sees a plain transport, whatever is below.

Knows nothing of frames or of MQTT. Reads the loop's clock, as only drivers do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from gateway.mqtt.websocket import Closed, Event, Opened, Received, Refused, Rules, State, WebSocketServer
from gateway.slices import Looked, Slices
from gateway.transports import CLOSE_S, Handshakes, peer_name, source_of
from gateway.turns import Account

log = logging.getLogger("lineside.mqtt")

PACKET_BYTES = 4  # no message is smaller


class Inner(Protocol):
    """An asyncio.Protocol that says whom its connection costs."""

    @property
    def account(self) -> Account: ...
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...


class WebSocketProtocol(asyncio.Protocol):
    """One connection. `make_inner` is called after the handshake; its protocol lives as long as the connection."""

    def __init__(self, make_inner: Callable[[], Inner], rules: Rules, handshakes: Handshakes) -> None:
        self._make_inner = make_inner
        self._rules = rules
        self._handshakes = handshakes
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._inner: Inner | None = None
        self._outer: WebSocketTransport
        self._core: WebSocketServer
        self._congested = False
        self._broken = False  # the peer broke the protocol
        self._ending = False  # we have said all we had to say
        self._peer = "?"
        self._turns = handshakes.turns
        self._account: Account  # before the handshake
        self._slices: Slices

    @property
    def account(self) -> Account:
        return self._account if self._inner is None else self._inner.account

    # -------- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._peer = peer_name(transport)
        self._core = WebSocketServer(self._rules, self._loop.time())
        self._account = self._turns.account(source_of(self._peer)[0])
        self._slices = Slices(self._turns, self, transport, self._look)
        self._outer = WebSocketTransport(self, transport)
        if self._handshakes.begin(transport, self._peer):
            self._set_timer()

    def data_received(self, data: bytes) -> None:
        self._slices.feed(data)

    def _look(self, data: bytes) -> Looked:
        """The handshake is dear, and so are frames with hardly anything in them. The inner protocol sees to itself."""
        before = self._core.frames
        events = self._core.receive(data, self._loop.time())
        size = sum(len(event.data) for event in events if isinstance(event, Received))
        self._broken = any(isinstance(e, Refused) or (isinstance(e, Closed) and not e.clean) for e in events)
        began = self._turns.cpu()
        self._act(events)
        acting_s = self._turns.cpu() - began
        self._flush()
        dear = max(0, self._core.frames - before - size // PACKET_BYTES)
        if dear or not size:
            dear += 1
        return Looked(dear, size / PACKET_BYTES, False, acting_s)

    def pause_writing(self) -> None:
        self._congested = True
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._congested = False
        if self._inner is not None:
            self._inner.resume_writing()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handshakes.end(self._outer.below)
        if self._timer is not None:
            self._timer.cancel()
        self._slices.release()  # the inner protocol keeps what it does not want to look at yet
        self._slices.end(partial(self._gone, exc))

    def _gone(self, exc: Exception | None) -> None:
        if self._inner is not None:
            self._inner.connection_lost(exc)
        elif self._core.state is State.CONNECTING:
            log.info("client left", extra={"peer": self._peer, "reason": "the connection ended amid its HTTP request"})

    # -------- the inner protocol's side, through its transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._core.state is State.OPEN and data:
            self._core.send(data)
            self._flush()

    def hold(self) -> None:
        self._slices.hold()

    def release(self) -> None:
        self._slices.release()

    def close(self) -> None:
        """Say Close; the connection goes with the peer's answer, or without it at its deadline."""
        self._core.close(self._loop.time())
        self._set_timer()
        self._slices.release()  # the answer comes behind whatever the inner protocol did not want to read
        self._flush()

    @property
    def closing(self) -> bool:
        return self._core.state is not State.OPEN

    # -------- within

    def _act(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Received(data):
                    assert self._inner is not None
                    self._inner.data_received(data)
                case Opened():
                    self._handshakes.end(self._outer.below)
                    self._stop_timer()
                    self._inner = self._make_inner()
                    self._inner.connection_made(self._outer)
                    if self._congested:
                        self._inner.pause_writing()
                case Refused(status, why):
                    log.warning("websocket refused", extra={"peer": self._peer, "status": status, "error": why})
                case Closed(code, reason, clean):
                    if not clean:
                        log.warning("websocket failed", extra={"peer": self._peer, "code": code, "error": reason})

    def _flush(self) -> None:
        below = self._outer.below
        if below.is_closing() or self._ending:
            return
        data = self._core.data_to_send(congested=self._congested)
        if data:
            below.write(data)
        if self._core.state is State.CLOSED:
            self._ending = True
            self._stop_timer()
            if self._broken:
                self._slices.last_words()
            else:
                below.close()
                # What a peer that reads nothing has not taken by then is given up.
                self._timer = self._loop.call_later(CLOSE_S, below.abort)

    def _set_timer(self) -> None:
        self._stop_timer()
        if self._core.deadline is not None:
            self._timer = self._loop.call_at(self._core.deadline, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        self._act(self._core.tick(self._loop.time()))
        if self._core.state is not State.CLOSED:  # a timer may run a moment early
            self._set_timer()
        self._flush()


class WebSocketTransport(asyncio.Transport):
    """What the inner protocol writes to. `below` is the transport beneath, of TCP or TLS."""

    def __init__(self, protocol: WebSocketProtocol, below: asyncio.Transport) -> None:
        super().__init__()
        self._protocol = protocol
        self.below = below

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._protocol.write(data)

    def close(self) -> None:
        if not self.is_closing():
            self._protocol.close()

    def abort(self) -> None:
        self.below.abort()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Close says the same, and what the peer sends until it answers is thrown away (RFC 6455, 1.4)."""
        self.close()

    def is_closing(self) -> bool:
        return self._protocol.closing or self.below.is_closing()

    def is_reading(self) -> bool:
        return self.below.is_reading()

    def pause_reading(self) -> None:
        self._protocol.hold()

    def resume_reading(self) -> None:
        self._protocol.release()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.below.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self.below.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.below.get_extra_info(name, default)
