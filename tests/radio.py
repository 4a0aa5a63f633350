"""A radio made of the kernel's own parts: two network namespaces, a pair of interfaces, and a queue that lets so many
bits a second through from the gateway's side to the hub's. What stands in that queue is what a real modem would hold.

Needs root, iproute2 and util-linux; a test is skipped where the machine gives no namespaces.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Receiver
from gateway.amqp.events import Deliveries, Event, LinkAttached, Opened
from gateway.amqp.message import decode, encode
from gateway.amqp.sasl import SaslServer
from gateway.control_client import request
from storeforward.journal import Journal
from storeforward.streams import StreamLimits

GATEWAY, HUB = "10.77.0.1", "10.77.0.2"
HUB_PORT = 5672
CLONE_NEWNET = 0x40000000
MODEM_BYTES = 200_000  # what stands before the air at most: too much, as in most modems
WAIT_S = 30.0


def awaited(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


class Radio:
    """Use as a context: `command` runs on the gateway's side, `listen` makes a socket on the hub's."""

    def __enter__(self) -> Radio:
        if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
            pytest.skip("needs root, unshare, nsenter, ip and tc to make network namespaces of its own")
        self._holders = [
            subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        try:
            for holder in self._holders:
                self._wait_for_namespace(holder)
            near, far = self._holders
            self.ip(near, "link", "add", "radio", "type", "veth", "peer", "name", "mast", "netns", str(far.pid))
            for holder, name, address in ((near, "radio", GATEWAY), (far, "mast", HUB)):
                self.ip(holder, "link", "set", "lo", "up")
                self.ip(holder, "addr", "add", f"{address}/24", "dev", name)
                self.ip(holder, "link", "set", "dev", name, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait(10)

    @staticmethod
    def _wait_for_namespace(holder: subprocess.Popen[bytes]) -> None:
        own = os.readlink("/proc/self/ns/net")
        until = time.monotonic() + 10
        while os.readlink(f"/proc/{holder.pid}/ns/net") == own:
            if holder.poll() is not None:
                assert holder.stderr is not None
                pytest.skip(f"no network namespace to be had: {holder.stderr.read().decode().strip()}")
            assert time.monotonic() < until
            time.sleep(0.01)

    @staticmethod
    def inside(holder: subprocess.Popen[bytes], *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{holder.pid}/ns/net", *command]

    def ip(self, holder: subprocess.Popen[bytes], *arguments: str) -> None:
        subprocess.run(self.inside(holder, "ip", *arguments), check=True, timeout=10)

    def command(self, *command: str) -> list[str]:
        return self.inside(self._holders[0], *command)

    def rate(self, bits_s: int) -> None:
        queue = ["tbf", "rate", f"{bits_s}bit", "burst", "1600", "limit", str(MODEM_BYTES)]
        subprocess.run(self.command("tc", "qdisc", "replace", "dev", "radio", "root", *queue), check=True, timeout=10)

    def down(self) -> None:
        self.ip(self._holders[0], "link", "set", "dev", "radio", "down")

    def up(self) -> None:
        self.ip(self._holders[0], "link", "set", "dev", "radio", "up")

    def listen(self) -> socket.socket:
        made: list[socket.socket] = []

        def make() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/proc/{self._holders[1].pid}/ns/net") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_server((HUB, HUB_PORT)))

        thread = threading.Thread(target=make)  # the namespace is a thread's own, and goes with it
        thread.start()
        thread.join(10)
        return made[0]


@dataclass
class Arrival:
    at: float
    stream: str
    payload: bytes


@dataclass
class Mast:
    """The hub: takes whatever comes, and writes down when. `settles`: whether it answers."""

    credit: int = 1000
    settles: bool = True
    arrivals: list[Arrival] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    protocols: list[AmqpProtocol] = field(default_factory=list)

    async def start(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: AmqpProtocol(self._engine, self, self.protocols.append), sock=sock
        )

    def stop(self) -> None:
        self._server.close()
        for protocol in self.protocols:
            protocol.abort()

    def _engine(self, transport: asyncio.Transport) -> Engine:
        return Engine(server=True, container="mast", sasl=SaslServer(["ANONYMOUS"]), idle_timeout_s=60)

    def on_lost(self, error: Exception | None) -> None:
        pass

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Opened():
                    self.opened.append(time.monotonic())
                    engine.open()
                case LinkAttached(Receiver() as link, True):
                    link.confirm()
                    link.topup(self.credit)
                case Deliveries(receiver, batch):
                    now = time.monotonic()
                    address = receiver.target.address if receiver.target else None
                    self.arrivals += [Arrival(now, address or "", decode(body).body) for _, body in batch]
                    if self.settles:
                        receiver.accept([handle for handle, _ in batch])
                        receiver.topup(self.credit)
                    self.heard.set()
                case _:
                    pass

    async def wait_for(self, found: Callable[[Arrival], bool], timeout_s: float = WAIT_S) -> Arrival:
        seen = 0
        async with asyncio.timeout(timeout_s):
            while True:
                self.heard.clear()
                for arrival in self.arrivals[seen:]:
                    if found(arrival):
                        return arrival
                seen = len(self.arrivals)
                await self.heard.wait()


CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["unix:{socket}"]
packet_max = "16MiB"
[[hub]]
name = "depot"
urls = ["amqp://{hub}:{port}"]
allow_plaintext = "yes, without TLS"
{more}
[[outbound]]
stream = "logs"
topics = ["logs/#"]
hub = "depot"
address = "logs"
class = "bulk"
max_bytes = "4GiB"
[[outbound]]
stream = "telemetry"
topics = ["telemetry/#"]
hub = "depot"
address = "telemetry"
[[outbound]]
stream = "live"
topics = ["live/#"]
hub = "depot"
address = "live"
[[outbound]]
stream = "alarms"
topics = ["alarms/#"]
hub = "depot"
address = "alarms"
class = "urgent"
"""


def fill(state: Path, streams: Mapping[str, Sequence[bytes]]) -> None:
    """A journal as a daemon leaves it that had no line for hours."""
    state.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(state)
    try:
        for name, payloads in streams.items():
            stream = journal.stream(name, "outbound", StreamLimits(bytes_max=4 << 30))
            journal.cursor(stream, "uplink", "uplink")
            held = 0
            for payload in payloads:
                body = encode(payload)
                journal.append(stream, f"{name}/x", lambda seq, _, body=body: body, payload, None)
                held += len(body)
                if held > 4 << 20:
                    journal.commit_now()
                    held = 0
            journal.commit_now()
    finally:
        journal.close()


class Train:
    """A daemon behind a radio, an app of its, and the hub at the other end."""

    def __init__(self, radio: Radio, directory: Path, streams: Mapping[str, Sequence[bytes]], more: str = "") -> None:
        self.radio = radio
        self.mast = Mast()
        self.config = directory / "lineside.toml"
        self.log = directory / "log"
        self._socket = directory / "mqtt"
        state = directory / "state"
        fill(state, streams)
        self.config.write_text(CONFIG.format(state=state, socket=self._socket, hub=HUB, port=HUB_PORT, more=more))
        self._numbers = itertools.count()

    async def __aenter__(self) -> Train:
        await self.mast.start(self.radio.listen())
        self._start()
        there = [self._socket, self.config.parent / "state" / "control.sock"]
        await self.until(lambda: all(each.exists() for each in there) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        self._app = paho.Client(CallbackAPIVersion.VERSION2, client_id="app", transport="unix")
        self._app.connect(str(self._socket))
        self._app.loop_start()
        return self

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.radio.command(sys.executable, "-m", "gateway", "run", "--config", str(self.config)),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    async def until(self, true: Callable[[], bool], within_s: float = WAIT_S) -> None:
        """Wait for what tells nobody."""

        def look() -> None:
            end = time.monotonic() + within_s
            while not true():
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.02)

        await asyncio.to_thread(look)

    async def __aexit__(self, *_: object) -> None:
        self._app.disconnect()
        self._app.loop_stop()
        self.process.kill()
        self.process.wait()
        self.mast.stop()
        await asyncio.sleep(0)

    def publish(self, stream: str, size: int = 100) -> bytes:
        """Say something new; returns what."""
        payload = f"{stream} {next(self._numbers)} ".encode().ljust(size, b".")
        self._app.publish(f"{stream}/x", payload, qos=1)
        return payload

    async def delay_s(self, stream: str, size: int = 100) -> float:
        """How long something new takes to the hub."""
        began = time.monotonic()
        payload = self.publish(stream, size)
        return (await self.mast.wait_for(lambda arrival: arrival.payload == payload)).at - began

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = request(self.config.parent / "state", "status")
        return told

    def sent_bytes(self, stream: str) -> int:
        return int(next(each["sent_bytes"] for each in self.status()["streams"] if each["name"] == stream))
