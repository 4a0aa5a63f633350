"""The daemon's listeners on a loop that lives by its own processor time, for what one client's work costs the others.

The clock of the loop is the processor time that it has used; where it waits, the clock jumps to what comes next. What
clients and the disk do costs it nothing. So nothing of a rate that is measured here depends on what else the machine
does, as it does with real processes; sockets, TLS and the interpreter's lock are not in it. Journal, committer, broker
and listeners are the real ones.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway.amqp.listener import AmqpListener
from gateway.broker import Broker
from gateway.committer import Committer
from gateway.config import loads
from gateway.mqtt.connection import Limits
from gateway.mqtt.listener import MqttListener
from gateway.mqtt.websocket import Rules
from gateway.mqtt.websocket_driver import WebSocketProtocol
from gateway.transports import Handshakes
from gateway.turns import Turns
from storeforward.batch import Batch
from storeforward.errors import JournalError
from storeforward.journal import Journal
from tests import attacks

EPOCH_S = 1000.0
COMMIT_S = 0.0005  # what the disk takes for a commit, besides what SQLite computes
REACTS_S = 0.00015  # an ordinary app, from its answers to its next messages
WINDOW = 50
PAYLOAD = bytes(100)
READ_BYTES = 256 << 10  # asyncio hands over so many at once
KERNEL_BYTES = 1 << 20  # of what a client sends and nobody has read yet
WRITE_HIGH_BYTES = 256 << 10

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:1"]
retained_max = 1000
[amqp]
listen = ["127.0.0.1:2"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
max_bytes = "8GiB"
max_messages = 50000000
[[inbound]]
stream = "commands"
hub = "depot"
address = "commands"
topic = "commands/{{subject}}"
"""


class _Jump(selectors.SelectSelector):
    loop: OwnTime

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is left that could ever happen"
        self.loop.jumped_s += max(0.0, timeout)
        return []


class OwnTime(asyncio.SelectorEventLoop):
    """`outside` is what is not the daemon's doing."""

    def __init__(self) -> None:
        self.jumped_s = 0.0
        self._outside_s = 0.0
        self._within = True
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        return time.thread_time() - self._outside_s

    def time(self) -> float:
        return EPOCH_S + self.cpu() + self.jumped_s

    @contextmanager
    def outside(self) -> Iterator[None]:
        began = time.thread_time()
        was, self._within = self._within, False
        try:
            yield
        finally:
            self._within = was
            if was:
                self._outside_s += time.thread_time() - began

    def later(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Something outside happens."""

        def happen() -> None:
            with self.outside():
                call(*args)

        self.call_later(delay_s, happen)


class Disk:
    """The committer's executor. What it does is not the loop's time; its answer comes when it would have."""

    def __init__(self, loop: OwnTime) -> None:
        self._loop = loop

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._loop.outside():
            began = time.thread_time()
            result = work()
            took_s = time.thread_time() - began
        self._loop.call_later(COMMIT_S + took_s, future.set_result, COMMIT_S + took_s if result is not None else None)
        return future

    def shutdown(self, wait: bool) -> None:
        pass


class Pipe(asyncio.Transport):
    """A client's connection. `heard(data)` is called with what the daemon writes, `more()` for what to send next."""

    def __init__(
        self,
        loop: OwnTime,
        protocol: asyncio.Protocol,
        heard: Callable[[bytes], None] = lambda data: None,
        more: Callable[[], bytes] = bytes,
        *,
        reads: bool = True,
    ) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self._loop = loop
        self._protocol = protocol
        self._heard = heard
        self._more = more
        self._reads = reads
        self._sent = bytearray()
        self._paused = False
        self._due = False
        self._unread_bytes = 0
        self._high_bytes = WRITE_HIGH_BYTES
        self.closing = False
        self.taken_bytes = 0
        protocol.connection_made(self)
        self.wake()

    # the client's side

    def send(self, data: bytes) -> None:
        self._sent += data
        self.wake()

    def wake(self) -> None:
        """There may be more to send."""
        if not (self._due or self._paused or self.closing):
            self._due = True
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        """Once a turn of the loop, as a selector has it."""
        self._due = False
        with self._loop.outside():
            while len(self._sent) < READ_BYTES and (more := self._more()):
                self._sent += more
            data = bytes(self._sent[:READ_BYTES])
            del self._sent[:READ_BYTES]
        if data and not (self._paused or self.closing):
            self.taken_bytes += len(data)
            self._protocol.data_received(data)
            self.wake()
        elif data:
            self._sent[:0] = data

    # the daemon's side

    def write(self, data: Any) -> None:
        if not self._reads:
            self._unread_bytes += len(data)
            if self._unread_bytes > self._high_bytes:
                self._protocol.pause_writing()
            return
        with self._loop.outside():
            self._heard(bytes(data))

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        self.wake()

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return not self._paused

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = WRITE_HIGH_BYTES if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._unread_bytes


class Gateway:
    """What gateway.app composes, as far as local apps see it."""

    def __init__(self, state_dir: Path) -> None:
        self.loop = loop = OwnTime()
        asyncio.set_event_loop(loop)
        self.turns = Turns(loop, loop.cpu, lambda: 0.0)
        config = loads(CONFIG.format(state=state_dir))
        self.journal = Journal.open(state_dir, synchronous="OFF")
        self.broker = Broker(config, self.journal)
        self.committer = Committer(self.journal, loop, self._committed, self._fatal)
        self.committer._executor = Disk(loop)  # type: ignore[assignment]
        self.turns.helpings.journal = self.journal
        self.pipes: list[Pipe] = []
        self._run(self._listen)

    def _listen(self) -> None:
        self.handshakes = Handshakes(1000, turns=self.turns)
        self.mqtt = MqttListener(self.broker, self.committer, Limits(), 1000, 86400.0, self.turns)
        self.amqp = AmqpListener(
            self.broker,
            self.committer.kick,
            container="loco",
            connections_max=1000,
            message_max_bytes=1 << 20,
            idle_timeout_s=60.0,
            window=1000,
            turns=self.turns,
        )

    def _run(self, call: Callable[[], None]) -> None:
        async def run() -> None:
            call()

        self.loop.run_until_complete(run())

    def _committed(self, batch: Batch) -> None:
        began_s = self.loop.cpu()
        self.turns.helpings.committed(self.committer.durations_s[-1])
        self.broker.committed(batch)
        self.amqp.committed(batch)
        if batch.appended:
            self.turns.messages(self.loop.cpu() - began_s, staged=False)

    def _fatal(self, error: JournalError) -> None:
        raise AssertionError(f"the journal gave up: {error}")

    def settle(self) -> None:
        """As gateway.app has it: the collector need not look at what is there by now."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)

    def live(self, seconds: float) -> None:
        """On the loop's own clock."""
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def connect(self, **how: Any) -> Pipe:
        self._run(lambda: self.connect_within(**how))
        return self.pipes[-1]

    def connect_within(self, *, amqp: bool = False, websocket: bool = False, **how: Any) -> Pipe:
        """The same from what runs on the loop."""
        protocol: asyncio.Protocol
        if websocket:
            protocol = WebSocketProtocol(self.mqtt.protocol, Rules("/mqtt"), self.handshakes)
        else:
            protocol = self.amqp.protocol() if amqp else self.mqtt.protocol()
        self.pipes.append(Pipe(self.loop, protocol, **how))
        return self.pipes[-1]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.closing = True
        while self.journal.under_way is not None:
            self.live(COMMIT_S)
        self.journal.close()
        self.loop.close()


class App:
    """An ordinary one: publishes at QoS 1, and the next messages as soon as it has its answers."""

    def __init__(self, gateway: Gateway, name: str = "ordinary", window: int = WINDOW) -> None:
        self._loop = gateway.loop
        self.acknowledged = 0
        self._connected = False
        self._ready = 0
        self._packets = [
            attacks.packet(0x32, attacks.string(b"train/%b" % name.encode()) + n.to_bytes(2, "big") + PAYLOAD)
            for n in range(1, 65536)
        ]
        self._at = 0
        self._pipe = gateway.connect(heard=self._heard)
        self._pipe.send(attacks.connect(name.encode()))
        self._send(window)

    def _send(self, count: int) -> None:
        for _ in range(count):
            self._pipe.send(self._packets[self._at])
            self._at = (self._at + 1) % len(self._packets)

    def _heard(self, data: bytes) -> None:
        if not self._connected:
            assert data.startswith(attacks.CONNACK), data
            self._connected = True
            data = data[4:]
        assert len(data) % 4 == 0, data
        count = len(data) // 4
        self.acknowledged += count
        if not self._ready:
            self._loop.later(REACTS_S, self._react)
        self._ready += count

    def _react(self) -> None:
        count, self._ready = self._ready, 0
        self._send(count)
