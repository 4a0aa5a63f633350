"""A whole gateway without a socket, a thread or a clock: the real journal, broker and MQTT clients, moved by hand.

Time passes only in `World.advance`. A commit is begun, and then comes back, fails, or is cut off by a crash, when the
simulation says so. What was not committed at a crash is gone; what was is on disk, answered or not.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.broker import Broker
from gateway.config import loads
from gateway.mqtt import listener
from gateway.mqtt.codec import decode_body, encode, remaining_length
from gateway.mqtt.connection import Limits
from gateway.mqtt.packets import Packet
from gateway.turns import Turns
from storeforward import space
from storeforward.errors import JournalError, JournalFull
from storeforward.journal import Journal

CONFIG = """
[gateway]
id = "loco"
[mqtt]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "up"
topics = ["up/#"]
hub = "depot"
address = "up"
"""
CONFIGURED = loads(CONFIG)
RECEIVE_MAXIMUM = 5
SEND_WINDOW = 8
STEPS_MAX = 10_000
BEGIN_S = 1000.0
FREE_BYTES = 1 << 40


class Strict(logging.Handler):
    """The model clients keep to the protocol: whoever says that they do not is wrong."""

    def handle(self, record: logging.LogRecord) -> bool:
        error = record.__dict__.get("error", "")
        assert record.getMessage() != "client broke the protocol" or error == "no CONNECT came in time", error
        assert record.levelno < logging.ERROR, record.getMessage()
        return True


class Loop:
    """The few methods of an event loop that a `Client` uses."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._timers: list[tuple[float, int, Callable[..., object], tuple[Any, ...], asyncio.TimerHandle]] = []
        self._soon: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._count = 0

    def time(self) -> float:
        return self._world.now

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._soon.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self)  # type: ignore[arg-type]
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, callback, args, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Found when its time comes."""

    def run(self) -> None:
        for _ in range(STEPS_MAX):
            if self._soon:
                callback, args = self._soon.popleft()
            elif self._timers and self._timers[0][0] <= self.time():
                _, _, callback, args, handle = heapq.heappop(self._timers)
                if handle.cancelled():
                    continue
            else:
                return
            callback(*args)
        raise AssertionError("the loop does not come to rest")

    def next_timer(self) -> float | None:
        return self._timers[0][0] if self._timers else None


class Wire(asyncio.Transport):
    """One connection. `to_client`: packets the gateway wrote, judged by `tap` as they are; `to_gateway`: bytes."""

    def __init__(self, world: World, version: int, tap: Callable[[Packet], None]) -> None:
        super().__init__()
        self._world = world
        self._version = version
        self._tap = tap
        self._partial = b""
        self.to_client: deque[Packet] = deque()
        self.to_gateway: deque[bytes] = deque()
        self.paused = False
        self.closing = False
        self.lost = False
        self.client = listener.Client(world.listener)
        self.client.connection_made(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0  # the client's end takes everything at once

    def write(self, data: Any) -> None:
        assert not self.closing, "written to a transport that closes"
        data = self._partial + bytes(data)
        at = 0
        while at < len(data):
            framed = remaining_length(data, at)
            if framed is None or sum(framed) > len(data):
                break
            size, begin = framed
            packet = decode_body(data[at], data[begin : begin + size], self._version)
            at = begin + size
            self._tap(packet)
            self.to_client.append(packet)
        self._partial = data[at:]

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._world.loop.call_soon(self.lose)

    def abort(self) -> None:
        self.close()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """The client ends its side as soon as it hears that."""
        self.close()

    # the client's side

    def send(self, packet: Packet) -> None:
        self.to_gateway.append(encode(packet, self._version))

    def arrive(self, count: int) -> None:
        """The gateway reads so many of the packets that were sent, if it reads."""
        data = b""
        while count > 0 and self.to_gateway and not (self.paused or self.closing):
            data += self.to_gateway.popleft()
            count -= 1
        if data:
            self.client.data_received(data)

    def lose(self) -> None:
        """TCP ends, and the gateway learns of it."""
        self.closing = True
        if not self.lost:
            self.lost = True
            self.client.connection_lost(None)


class World:
    def __init__(self, state_dir: Path, monkeypatch: Any) -> None:
        self.state_dir = state_dir
        self.now = BEGIN_S
        self.kept_at = 0.0
        self.loop = Loop(self)
        monkeypatch.setattr(listener.asyncio, "get_running_loop", lambda: self.loop)
        # As much as there is on any machine, and no more of it taken than has to be.
        monkeypatch.setattr(space, "RESERVE_BYTES_MAX", space.RESERVE_BYTES_MIN)
        monkeypatch.setattr(space.Space, "free_bytes", lambda self: FREE_BYTES)
        self.wires: list[Wire] = []
        self.failures = 0
        self.crashes = 0
        self._strict = Strict()
        logging.getLogger("lineside").addHandler(self._strict)
        self._start()

    def _start(self) -> None:
        self.loop = Loop(self)
        self.wires = []
        self.journal = Journal.open(
            self.state_dir,
            synchronous="OFF",
            clock=lambda: self.now,
            wall=lambda: self.now + 1e9,
            synchronised=lambda: False,
        )
        self.broker = Broker(CONFIGURED, self.journal)
        self.broker.schedule = lambda delay_s: None if delay_s > 60 else self._due_in(delay_s)
        limits = Limits(receive_maximum=RECEIVE_MAXIMUM, send_window_max=SEND_WINDOW)
        turns = Turns(self.loop, lambda: 0.0, lambda: 0.0)  # type: ignore[arg-type]
        self.listener = listener.MqttListener(self.broker, self, limits, 100, 30 * 86400, turns)

    def _due_in(self, delay_s: float) -> None:
        self.loop.call_later(delay_s + 0.001, self.broker.run_due)

    def kick(self) -> None:
        """The committer's; commits are the simulation's to begin."""

    def connect(self, version: int, tap: Callable[[Packet], None]) -> Wire:
        wire = Wire(self, version, tap)
        self.wires.append(wire)
        return wire

    # ------------------------------------------------------------------ commits

    @property
    def committing(self) -> bool:
        return self.journal.under_way is not None

    def begin(self) -> None:
        if not self.committing and self.journal.pending:
            try:
                self.journal.begin()
            except JournalFull:
                assert self.journal.disk_full, "only a full disk may refuse"

    def finish(self) -> None:
        """The commit comes back."""
        if self.committing:
            self.journal.commit()
            self.broker.committed(self.journal.committed())

    def fail(self, *, no_space: bool) -> None:
        """The commit comes back, and was not taken."""
        if self.committing:
            self.failures += 1
            error = sqlite3.OperationalError("simulated")
            error.sqlite_errorname = "SQLITE_FULL" if no_space else "SQLITE_IOERR"
            result = self.journal.failed(error)
            assert isinstance(result, JournalFull), result

    def recover(self) -> None:
        if self.journal.disk_full and not self.committing:
            self.journal.recover()

    def commit_all(self) -> None:
        for _ in range(STEPS_MAX):
            self.finish()
            self.recover()
            if not self.journal.pending:
                return
            self.begin()
        raise AssertionError("what is pending never ends")

    # ------------------------------------------------------------------ time

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while (timer := self.loop.next_timer()) is not None and timer <= end:
            self.now = max(self.now, timer)
            self.loop.run()
        self.now = end
        self.loop.run()

    def write_cursors(self) -> None:
        self.broker.caught_up()
        self.journal.write_cursors()

    def keep_house(self) -> None:
        self.kept_at = self.now
        self.broker.run_due()
        self.broker.trim_sessions()
        self.broker.retained.expire(self.journal.age_us())
        self.journal.reclaim()

    # ------------------------------------------------------------------ ends

    def crash(self, *, committed: bool) -> None:
        """The process dies. `committed`: the commit under way had reached the disk, and nobody was told."""
        self.crashes += 1
        journal = self.journal
        if committed and journal.under_way is not None:
            journal.commit()
        self._drop()
        self._start()

    def _drop(self) -> None:
        journal = self.journal
        for connection in (journal._r, journal._w):
            connection.close()  # what was not committed is rolled back
        os.close(journal._index_fd)
        journal._lock.release()

    def close(self) -> None:
        logging.getLogger("lineside").removeHandler(self._strict)
        try:
            self.journal.close()
        except (JournalError, sqlite3.Error):
            self._drop()
