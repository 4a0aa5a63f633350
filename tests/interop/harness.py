"""What the tests against real hubs are made of: a daemon, a line to break, apps that count, and ends at the hub.

The daemon is its own process; the line, and the ends at the hub, live on one event loop in a thread; publishers are
threads with a raw socket. Messages are numbered 0, 1, 2, ... in their payload, so a `Tally` can tell what became of
them. Knows nothing of any one broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Sender
from gateway.amqp.events import (
    Credit,
    Deliveries,
    Event,
    Failed,
    LinkAttached,
    LinkClosed,
    OutcomeKind,
    RemoteClosed,
    Settled,
)
from gateway.amqp.message import decode, encode
from gateway.amqp.sasl import SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.control_client import ControlError, DaemonStopped, request
from gateway.faultlink import FaultLink, Line

HOST = "127.0.0.1"
START_S_MAX = 60.0
STEP_S = 0.005
CREDIT = 1000
PACKET_IDS = 65535
T = TypeVar("T")
Login = tuple[str, str]


def wait_until(done: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(STEP_S)


def out_of_turn(arrived: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours, by their first arrival, of which the second should have come before the first."""
    return [(a, b) for a, b in itertools.pairwise(dict.fromkeys(arrived)) if b < a]


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of messages 0 .. count-1, given the numbers that arrived, in the order they did."""

    lost: int
    reordered: int
    duplicates: int

    @classmethod
    def of(cls, arrived: Sequence[int], count: int) -> Tally:
        firsts = list(dict.fromkeys(arrived))
        return cls(
            lost=len(set(range(count)) - set(firsts)),
            reordered=len(out_of_turn(arrived)),
            duplicates=len(arrived) - len(firsts),
        )


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class BrokenLine:
    """A FaultLink for tests that are not asynchronous."""

    def __init__(self, loop: Loop, target_port: int) -> None:
        self._loop = loop
        self.link = FaultLink(target_port)
        loop.run(self.link.start())

    @property
    def port(self) -> int:
        return self.link.port

    @property
    def forwarded_bytes(self) -> int:
        return self.link.forwarded_bytes

    def cut(self, kind: Line) -> None:
        async def cut() -> None:
            self.link.cut(kind)

        self._loop.run(cut())

    def cut_mid_frame(self, after_bytes: int) -> None:
        """Return when exactly so many more bytes have passed and the line has fallen silent."""

        async def arm() -> None:
            self.link.cut_after_bytes = after_bytes

        self._loop.run(arm())
        wait_until(lambda: self.link.line is Line.TUNNEL, 30, "a cut after so many bytes")

    def restore(self) -> None:
        async def restore() -> None:
            self.link.restore()

        self._loop.run(restore())

    def close(self) -> None:
        self._loop.run(self.link.stop())


class Daemon:
    """One `gateway run` in a directory of its own."""

    def __init__(self, directory: Path, config: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(exist_ok=True)
        self._log = directory / "daemon.log"
        self._config = directory / "lineside.toml"
        self._config.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
        with self._log.open("ab") as log:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "run", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )

        def answers() -> bool:
            assert process.poll() is None, f"the daemon ended (status {process.returncode}): {self.log[-3000:]}"
            with contextlib.suppress(DaemonStopped, ControlError):
                self.status()
                return True
            return False

        wait_until(answers, START_S_MAX, "the daemon's start")

    def status(self) -> dict[str, Any]:
        return request(self.state, "status", timeout_s=5.0)

    def waiting(self, stream: str) -> int:
        return int(next(s for s in self.status()["streams"] if s["name"] == stream)["waiting"])

    def hub_state(self) -> str:
        return str(self.status()["hubs"][0]["state"])

    def notes(self) -> list[str]:
        return [str(note) for note in self.status()["hubs"][0]["notes"]]

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait(10)

    def stop(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self.kill()


# ------------------------------------------------------------------ MQTT apps


def _packet(kind: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes((kind, len(body))) + body


class Publisher(threading.Thread):
    """Publishes 0 .. count-1 at QoS 1 in order, a window at a time; what has no PUBACK goes again when reconnected."""

    def __init__(self, port: int, topic: str, count: int, *, window: int = 200, per_s: float | None = None) -> None:
        super().__init__(daemon=True)
        self.acknowledged = 0
        self.reconnects = -1
        self.failure: Exception | None = None
        self._port, self._topic, self._count, self._window = port, topic.encode(), count, window
        self._per_s = per_s
        self._over = threading.Event()
        self._sent_ever = 0

    def run(self) -> None:
        try:
            while self.acknowledged < self._count and not self._over.is_set():
                with contextlib.suppress(OSError):
                    self._session()
                time.sleep(0.02)
        except (AssertionError, ValueError) as error:  # told to the test by `finish`
            self.failure = error

    def reaches(self, acknowledged: int) -> None:
        wait_until(lambda: self.acknowledged >= acknowledged, 30, f"{acknowledged} acknowledged")

    def finish(self, timeout_s: float = 60.0) -> None:
        self.join(timeout_s)
        if self.failure is not None:
            raise self.failure
        assert self.acknowledged == self._count, f"{self.acknowledged} of {self._count} acknowledged"

    def close(self) -> None:
        self._over.set()
        self.join(10)

    def _session(self) -> None:
        with socket.create_connection((HOST, self._port), 5) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_packet(0x10, b"\0\x04MQTT\x04\0\x02\x58\0\x09publisher"))
            if sock.recv(4, socket.MSG_WAITALL)[:2] != b"\x20\x02":
                return
            self.reconnects += 1
            self._publish(sock)

    def _publish(self, sock: socket.socket) -> None:
        sent = self.acknowledged
        unread = b""
        sock.settimeout(0.2)
        while self.acknowledged < self._count and not self._over.is_set():
            end = min(self._count, self.acknowledged + self._window)
            if sent < end:
                sock.sendall(b"".join(map(self._encoded, range(sent, end))))
                sent = end
                self._sent_ever = max(sent, self._sent_ever)
            try:
                data = sock.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            unread += data
            whole = len(unread) // 4 * 4
            for at in range(0, whole, 4):
                packet_id = self.acknowledged % PACKET_IDS + 1
                assert unread[at : at + 4] == struct.pack("!BBH", 0x40, 2, packet_id), "a PUBACK out of order"
                self.acknowledged += 1
            if self._per_s:
                time.sleep(whole // 4 / self._per_s)
            unread = unread[whole:]

    def _encoded(self, number: int) -> bytes:
        again = 8 if number < self._sent_ever else 0
        head = struct.pack("!H", len(self._topic)) + self._topic + struct.pack("!H", number % PACKET_IDS + 1)
        return _packet(0x32 | again, head + b"%d" % number)


class Subscriber:
    """A paho client with a durable session at QoS 1 that notes the numbers that come."""

    def __init__(self, port: int, filter_: str) -> None:
        self.arrived: list[int] = []
        subscribed = threading.Event()
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="subscriber", clean_session=False, protocol=paho.MQTTv311
        )
        client.on_connect = lambda *_: self._subscribe(filter_)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _client, _data, message: self.arrived.append(int(message.payload))
        client.connect(HOST, port)
        client.loop_start()
        assert subscribed.wait(10), "no subscription within 10 s"

    def _subscribe(self, filter_: str) -> None:
        self._client.subscribe(filter_, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


# ------------------------------------------------------------------ at the hub


class _End:
    """One AMQP connection straight to the hub."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.protocol: AmqpProtocol | None = None

    async def connect(self, port: int, login: Login | None = None) -> Engine:
        """`login`: user and password; without, anonymously."""

        def engine(_: asyncio.Transport) -> Engine:
            sasl = SaslClient(["ANONYMOUS"]) if login is None else SaslClient(["PLAIN"], *login)
            return Engine(server=False, container="centre", hostname=HOST, sasl=sasl)

        loop = asyncio.get_running_loop()
        _, self.protocol = await loop.create_connection(
            lambda: AmqpProtocol(engine, self, lambda protocol: protocol.engine.open()), HOST, port
        )
        return self.protocol.engine

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Failed(condition, description) | RemoteClosed(condition, description):
                    self.fault = f"{condition}: {description}"
                case LinkClosed(_, condition, description):
                    self.fault = f"link closed: {condition}: {description}"
                case _:
                    self.on_event(event)

    def on_event(self, event: Event) -> None: ...

    def on_lost(self, error: Exception | None) -> None:
        self.fault = self.fault or f"the connection ended: {error}"

    async def close(self) -> None:
        if self.protocol is not None:
            self.protocol.close()
            await asyncio.sleep(0.1)
            self.protocol.abort()


def _terminus(address: str, durable: bool) -> Terminus:
    return Terminus(
        address=address,
        durability=Durability.UNSETTLED_STATE if durable else Durability.NONE,
        expiry=Expiry.NEVER if durable else Expiry.SESSION_END,
        capabilities=() if durable else ("queue",),
    )


class _Consumer(_End):
    def __init__(self) -> None:
        super().__init__()
        self.arrived: list[int] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, Deliveries):
            self.arrived += [int(decode(body).body) for _, body in event.batch]
            event.receiver.accept([handle for handle, _ in event.batch])
            event.receiver.topup(CREDIT)


async def consume(
    port: int,
    address: str,
    count: int,
    *,
    durable: bool,
    login: Login | None = None,
    timeout_s: float = 80.0,
    quiet_s: float = 1.0,
) -> list[int]:
    """The numbers that are, or arrive, in a queue, until `count` different ones came and then none for `quiet_s`."""
    end = _Consumer()
    try:
        engine = await end.connect(port, login)
        receiver = engine.receiver(engine.session(), "consumer", _terminus(address, durable), credit=CREDIT)
        receiver.whole_windows = True
        deadline = time.monotonic() + timeout_s
        had, since = 0, time.monotonic()
        while time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            assert end.fault is None, end.fault
            if len(end.arrived) != had:
                had, since = len(end.arrived), time.monotonic()
            elif time.monotonic() - since > quiet_s and len(set(end.arrived)) >= count:
                break
        return end.arrived
    finally:
        await end.close()


class _Taker(_End):
    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []
        self.attached = threading.Event()

    def on_event(self, event: Event) -> None:
        if isinstance(event, LinkAttached):
            self.attached.set()
        elif isinstance(event, Deliveries):
            self.bodies += [body for _, body in event.batch]
            event.receiver.accept([handle for handle, _ in event.batch])
            event.receiver.topup(CREDIT)


async def take(
    port: int, address: str, count: int, timeout_s: float = 80.0, attached: threading.Event | None = None
) -> list[bytes]:
    """`count` messages as the bytes that came; `attached` is set as soon as none can be missed."""
    end = _Taker()
    end.attached = attached or end.attached
    try:
        engine = await end.connect(port)
        engine.receiver(engine.session(), "taker", _terminus(address, False), credit=CREDIT)
        deadline = time.monotonic() + timeout_s
        while len(end.bodies) < count:
            await asyncio.sleep(0.02)
            assert end.fault is None, end.fault
            assert time.monotonic() < deadline, f"only {len(end.bodies)} of {count} came"
        return end.bodies
    finally:
        await end.close()


class _Producer(_End):
    def __init__(self, count: int, encoded: Callable[[int], bytes]) -> None:
        super().__init__()
        self.sent = self.accepted = 0
        self._count = count
        self._encoded = encoded

    def on_event(self, event: Event) -> None:
        if isinstance(event, Credit | Settled):
            sender: Sender = event.sender
            for outcome in sender.take_outcomes():
                assert outcome.kind is OutcomeKind.ACCEPTED, outcome
                self.accepted += outcome.count
            room = min(sender.capacity, CREDIT - sender.unsettled, self._count - self.sent)
            if room > 0:
                numbers = range(self.sent, self.sent + room)
                sender.send([(n, self._encoded(n)) for n in numbers])
                self.sent += room


def _command(number: int) -> bytes:
    return encode(b"%d" % number, message_id=f"command-{number}", subject="go")


async def produce(port: int, address: str, count: int, *, durable: bool, timeout_s: float = 80.0) -> None:
    """Put 0 .. count-1 into a queue; returns once the hub has accepted them all."""
    await _produce(port, _terminus(address, durable), _Producer(count, _command), count, timeout_s)


async def put(
    port: int,
    address: str,
    bodies: Sequence[bytes],
    *,
    durable: bool = False,
    login: Login | None = None,
    timeout_s: float = 80.0,
) -> None:
    """As `produce`, these very bytes."""
    end = _Producer(len(bodies), lambda number: bodies[number])
    await _produce(port, _terminus(address, durable), end, len(bodies), timeout_s, login)


async def _produce(
    port: int, terminus: Terminus, end: _Producer, count: int, timeout_s: float, login: Login | None = None
) -> None:
    try:
        engine = await end.connect(port, login)
        engine.sender(engine.session(), "producer", terminus)
        deadline = time.monotonic() + timeout_s
        while end.accepted < count:
            await asyncio.sleep(0.02)
            assert end.fault is None, end.fault
            assert time.monotonic() < deadline, f"only {end.accepted} of {count} accepted"
    finally:
        await end.close()


@contextmanager
def closing(*things: Any) -> Iterator[None]:
    """Close these in turn, the first first, however the block ends."""
    with contextlib.ExitStack() as stack:
        for thing in reversed(things):
            stack.callback(thing.close if hasattr(thing, "close") else thing.stop)
        yield
