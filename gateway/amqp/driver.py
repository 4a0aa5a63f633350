"""The thin asyncio side of an AMQP connection: moves bytes between a transport and an Engine, and keeps its timer.

Knows nothing of links or messages. A handler gets the events; what it raises closes this connection and no other.
Reads the clock (the loop's), as only drivers do.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from enum import Flag, auto
from functools import partial
from typing import Any, Protocol

from gateway.amqp.engine import Engine
from gateway.amqp.events import Credit, Deliveries, Event, Settled
from gateway.amqp.sasl import Outcome as Refusal
from gateway.slices import Looked, Slices
from gateway.transports import peer_name, source_of
from gateway.turns import Account, Turns

log = logging.getLogger(__name__)

# How long to wait for the peer's close before the TCP connection goes.
CLOSE_WAIT_S = 2.0
# A deadline in the past, or nearly, still lets the loop turn.
TICK_S_MIN = 0.001
PIECE_BYTES = 16 << 10  # of a message that has not ended yet: as much work as a small one


class Holds(Flag):
    """Why nothing is read from a peer."""

    OWNER = auto()
    UNREAD = auto()


class Handler(Protocol):
    """Who acts on a connection. Both are called on the loop; on_lost exactly once and last."""

    def on_events(self, engine: Engine, events: list[Event]) -> None: ...

    def on_lost(self, error: Exception | None) -> None: ...


class AmqpProtocol(asyncio.Protocol):
    """One connection. `make_engine` is called with the connected transport (after TLS), and may read its certificate.

    on_ready, if given, is called once with this protocol before any event: a client opens its engine there. `turns`, if
    given: what the peer asks for beyond messages waits for its turn, and is read slice by slice.
    """

    def __init__(
        self,
        make_engine: Callable[[asyncio.Transport], Engine],
        handler: Handler,
        on_ready: Callable[[AmqpProtocol], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns
        self._slices: Slices | None = None
        self.account = Account()  # whom this connection costs
        self._holds = Holds(0)
        self._make_engine = make_engine
        self._handler = handler
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._close_timer: asyncio.TimerHandle | None = None
        self._flush_scheduled = False
        self.gone = False  # the connection is
        self._over = False  # and what came by it is dealt with
        self._ending = False
        self.write_paused = False
        self.handed_bytes = 0  # of what the owner handed to the engine, how much it has not given out (see hand)
        self.written_bytes = 0  # to the transport, and
        self.writes = 0  # in how many writes
        self.heard = False  # whether the peer ever said anything
        self.on_resumed: Callable[[], None] = lambda: None  # the transport takes more again
        self.engine: Engine

    # -------- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.engine = self._make_engine(transport)
        self.engine.on_output = self.schedule_flush
        if self._turns is not None:
            self.account = self._turns.account(source_of(peer_name(transport))[0])
            self._slices = Slices(self._turns, self, transport, self._look)
        if self._on_ready is not None:
            self.guarded(self._on_ready, self)
        self._tick()
        self.schedule_flush()

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self.heard = True
        if self._slices is None:
            self._receive(data)
        else:
            self._slices.feed(data)

    def _receive(self, data: bytes) -> list[Event]:
        events = self.engine.receive(data, self._loop.time())
        self._deliver(events)
        if self.engine.deadline < self._timer_at:
            self._tick()
        self.schedule_flush()
        return events

    def _look(self, data: bytes) -> Looked:
        """Messages and answers to ours are plain; so are the pieces of a large one. All else is dear, silence, too."""
        before = self.engine.partial_bytes
        events = [] if self._over else self._receive(data)
        dear, plain, staged = 0, max(0, self.engine.partial_bytes - before) / PIECE_BYTES, False
        for event in events:
            match event:
                case Deliveries(_, batch):
                    plain += len(batch)
                    staged = True
                case Settled():
                    plain += 1
                case Credit():
                    pass
                case _:
                    dear += 1
        assert self._slices is not None
        if self.write_paused and self._slices.dear and not (plain or self.gone):
            self._hold(Holds.UNREAD)  # whoever asks and asks, and reads no answers, gets no more of them
        return Looked(dear if dear or plain else 1, plain, staged, 0.0)

    def eof_received(self) -> bool | None:
        return False

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self.guarded(self.on_resumed)
        self.schedule_flush()
        self._release(Holds.UNREAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = self.write_paused = True
        for timer in (self._timer, self._close_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._close_timer = None
        if self._slices is None:
            self._lost(exc)
        else:
            self._release(Holds.UNREAD)
            self._slices.end(partial(self._lost, exc))

    def _lost(self, exc: Exception | None) -> None:
        self._over = True
        self.engine.lost()
        try:
            self._handler.on_lost(exc)
        except Exception:  # a handler's mistake ends with its connection
            log.exception("amqp handler failed at the end of its connection")

    # -------- the owner's side

    def schedule_flush(self) -> None:
        """Send what the engine has, once in this turn of the loop however often this is called."""
        if not self._flush_scheduled and not self.gone:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def authenticated(self, granted: bool, refusal: Refusal = Refusal.AUTH) -> None:
        """Whether the password was right that the engine's SASL layer could not judge at once."""
        if self._over:
            return
        self._deliver(self.engine.authenticated(granted, self._loop.time(), refusal))
        if not self._over and self.engine.deadline < self._timer_at:
            self._tick()
        self.schedule_flush()

    def close(self, condition: str | None = None, description: str = "") -> None:
        """Say goodbye: TCP stays until the peer's close, or CLOSE_WAIT_S."""
        if self.gone or self._transport is None:
            return
        self.engine.close(condition, description)
        self._expect_end()
        self.schedule_flush()

    def abort(self) -> None:
        """Drop the connection now, and what came by it and is not looked at."""
        if self._transport is not None and not self._over:
            if self._slices is not None:
                self._slices.drop()
            self._transport.abort()

    def pause_reading(self) -> None:
        """Take no more from the peer until resume_reading(): intake is stopped, or slower than the peer."""
        if self._slices is not None:
            self._hold(Holds.OWNER)
        elif self._transport is not None and not self._transport.is_closing() and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._slices is not None:
            self._release(Holds.OWNER)
        elif self._transport is not None and not self._transport.is_closing() and not self._transport.is_reading():
            self._transport.resume_reading()

    def _hold(self, why: Holds) -> None:
        assert self._slices is not None
        self._holds |= why
        self._slices.hold()

    def _release(self, why: Holds) -> None:
        if self._slices is not None and self._holds & why:
            self._holds &= ~why
            if not self._holds:
                self._slices.release()

    @property
    def waiting_bytes(self) -> int:
        """What was handed to the engine and the kernel has not taken yet, as far as that is known here."""
        return self.handed_bytes + (0 if self._transport is None else self._transport.get_write_buffer_size())

    @property
    def socket(self) -> Any:
        """The socket beneath, for what the kernel knows of the line; None when there is none."""
        return None if self._transport is None else self._transport.get_extra_info("socket")

    # -------- within

    def guarded(self, call: Callable[..., None], *args: Any) -> None:
        """Call what concerns this connection and no other."""
        try:
            call(*args)
        except Exception:  # whatever a handler does wrong, only its connection pays
            log.exception("amqp handler failed; its connection is closed")
            self.abort()

    def _deliver(self, events: list[Event]) -> None:
        if events and not self._over:
            self.guarded(self._handler.on_events, self.engine, events)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._slices is not None and self._slices.dear:
            assert self._turns is not None
            with self._turns.charging(self.account):
                self._write()
        else:
            self._write()

    def _write(self) -> None:
        transport = self._transport
        if self.gone or transport is None or transport.is_closing():
            return
        engine = self.engine
        while not self.write_paused:
            data = engine.data_to_send()
            if not data:
                self.handed_bytes = 0
                break
            self.handed_bytes = max(0, self.handed_bytes - len(data))
            self.written_bytes += len(data)
            self.writes += 1
            transport.write(data)
        self._deliver(engine.take_events())
        if engine.finished:
            self._end(transport)
        elif engine.closing:
            self._expect_end()

    def _end(self, transport: asyncio.Transport) -> None:
        """All is said. Of a peer that broke the protocol the rest is thrown away (AMQP 1.0 §2.4.6, DISCARDING)."""
        if self._slices is None or not self.engine.failed:
            transport.close()
        elif not self._ending:
            self._ending = True
            self._slices.last_words()

    def _expect_end(self) -> None:
        if self._close_timer is None and not self.gone:
            self._close_timer = self._loop.call_later(CLOSE_WAIT_S, self.abort)

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = math.inf
        if self.gone:
            return
        now = self._loop.time()
        deadline = self.engine.tick(now)
        self._deliver(self.engine.take_events())
        self.schedule_flush()
        if not math.isinf(deadline):
            self._timer_at = deadline
            self._timer = self._loop.call_at(max(deadline, now + TICK_S_MIN), self._tick)
