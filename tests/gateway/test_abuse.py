"""One app misbehaves as badly as it can: another one keeps publishing, and the daemon's memory stays bounded.

The rate during an attack is compared with the one before, in one run; generously, as attacker and daemon share two
cores with whatever else runs. A daemon that let itself be stopped would show none at all.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon import Daemon, free_port
from tests.pki import Pki

SHARE_MIN = 0.05
GROWTH_BYTES_MAX = 192 << 20  # a thousand handshakes of 64 KB buffers, and OpenSSL's own
ATTACK_S = 1.2
CONNECTIONS = 1000

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}", "mqtts://127.0.0.1:@TLS@", "ws://127.0.0.1:@WS@/mqtt", "unix:@UNIX@"]
cert = "@CERT@"
key = "@KEY@"
retained_max = 1000
[amqp]
listen = ["127.0.0.1:@AMQP@"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{hub_port}"]
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
max_bytes = "512MiB"
"""


def string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def packet(kind: int, body: bytes) -> bytes:
    size, out = len(body), bytearray([kind])
    while True:
        size, rest = divmod(size, 128)
        out.append(rest | (128 if size else 0))
        if not size:
            return bytes(out) + body


def connect(name: bytes, will: bytes = b"") -> bytes:
    flags = 2 | (4 if will else 0)
    tail = string(b"train/will") + string(will) if will else b""
    return packet(0x10, string(b"MQTT") + bytes([4, flags]) + (60).to_bytes(2, "big") + string(name) + tail)


class Yard:
    """The daemon, and where it listens."""

    def __init__(self, directory: Path, pki: Pki) -> None:
        self.tls, self.ws, self.amqp = free_port(), free_port(), free_port()
        self.unix = str(directory / "mqtt.sock")
        names = {"TLS": self.tls, "WS": self.ws, "AMQP": self.amqp, "UNIX": self.unix}
        text = CONFIG.replace("@CERT@", str(pki.server.cert)).replace("@KEY@", str(pki.server.key))
        for name, value in names.items():
            text = text.replace(f"@{name}@", str(value))
        self.daemon = Daemon(directory, text)
        self.daemon.status()

    def dial(self, port: int | None = None) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port or self.daemon.port), timeout=5)
        return sock

    def app(self, name: bytes, will: bytes = b"") -> socket.socket:
        sock = self.dial()
        sock.sendall(connect(name, will))
        assert sock.recv(4)[:1] == b"\x20"
        return sock

    def rss(self) -> int:
        pages = Path(f"/proc/{self.daemon.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    def clients(self) -> int:
        mqtt = self.daemon.status()["mqtt"]
        assert isinstance(mqtt, dict)
        return int(mqtt["clients"])

    def rate(self, seconds: float, attack: Callable[[], None] = lambda: None) -> float:
        """Messages a second that a well-behaved app gets acknowledged, which is connected when the attack begins."""
        there = self.clients()
        command = [sys.executable, "-m", "gateway.bench.load", str(self.daemon.port), "--connections", "1"]
        command += ["--window", "50", "--warm-s", "0.4", "--seconds", str(seconds), "--topic", "train/speed"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as app:
            end = time.monotonic() + 15
            while self.clients() <= there and app.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            attack()
            out, _ = app.communicate(timeout=60)
        assert app.returncode == 0
        return float(json.loads(out)["per_s"])


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    # One for each attack: together they would fill the stream, and a client of 3.1.1 is then held without a word.
    yard = Yard(tmp_path, Pki(tmp_path))
    yield yard
    yard.daemon.end()


Attack = Callable[[Yard, threading.Event, list[socket.socket]], None]


def half_open_tls(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    for _ in range(CONNECTIONS):
        held.append(yard.dial(yard.tls))
    over.wait(30)


def connect_and_leave(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    while not over.is_set():
        with suppress(OSError):
            yard.dial().close()


def slowloris(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    ports = (yard.daemon.port, yard.ws, yard.amqp)
    for n in range(90):
        held.append(yard.dial(ports[n % 3]))
    while not over.wait(0.05):
        for n, sock in enumerate(held):
            with suppress(OSError):
                sock.send((b"\x10", b"G", b"A")[n % 3])


def subscribe_flood(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    held.append(yard.app(b"subscriber"))
    held[0].settimeout(0.2)
    n = 0
    while not over.is_set():
        filters = b"".join(string(b"other/%d/+/#" % (n + i)) + b"\x01" for i in range(500))
        n += 500
        with suppress(TimeoutError):
            held[0].sendall(packet(0x82, b"\x00\x01" + filters))
        with suppress(TimeoutError):
            held[0].recv(1 << 16)


def tiny_frames(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    held.append(yard.app(b"pinger"))
    held[0].settimeout(0.2)
    while not over.is_set():  # and never reads an answer
        with suppress(TimeoutError):
            held[0].sendall(b"\xc0\x00" * 512)


def retained_flood(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    held.append(yard.app(b"retainer"))
    held[0].settimeout(0.2)
    n = 0
    while not over.is_set():
        many = b"".join(packet(0x31, string(b"other/%d" % (n + i)) + bytes(1000)) for i in range(50))
        n += 50
        with suppress(TimeoutError):
            held[0].sendall(many)


def many_wills(yard: Yard, over: threading.Event, held: list[socket.socket]) -> None:
    n = 0
    while not over.is_set() and n < 300:
        yard.app(b"willing-%d" % n, bytes(10_000)).close()
        n += 1


ATTACKS: list[Attack] = [
    half_open_tls,
    connect_and_leave,
    slowloris,
    subscribe_flood,
    tiny_frames,
    retained_flood,
    many_wills,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_others_keep_publishing_and_memory_stays_bounded(yard: Yard, attack: Attack) -> None:
    before, memory = yard.rate(0.6), yard.rss()
    over, held, broken = threading.Event(), list[socket.socket](), list[BaseException]()

    def run() -> None:
        try:
            attack(yard, over, held)
        except OSError as error:
            broken.append(error)  # cut off: that is an answer, too

    thread = threading.Thread(target=run)
    try:
        during = yard.rate(ATTACK_S, thread.start)
        # What it floods with is written, too: the disk is shared.
        least = SHARE_MIN / 5 if attack is retained_flood else SHARE_MIN
        assert during > least * before, f"{during:.0f} of {before:.0f} messages a second"
        assert yard.rss() - memory < GROWTH_BYTES_MAX
    finally:
        over.set()
        thread.join(30)
        for sock in held:
            sock.close()
    assert yard.daemon.process.poll() is None, yard.daemon.log.read_text()[-2000:]
    if attack is retained_flood:
        assert yard.daemon.log.stat().st_size < 32 << 20


def test_who_connects_too_fast_is_refused_and_the_log_does_not_grow_with_it(tmp_path: Path) -> None:
    import asyncio
    import logging

    from gateway.config_values import Listen
    from gateway.transports import Handshakes, open_server
    from security.admission import REPORTS_MAX, Admission, Rate

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lineside.listen").addHandler(handler)
    begun = 0

    class Silent(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal begun
            begun += 1
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"in")

    async def run(listen: Listen) -> list[bytes]:
        now = asyncio.get_running_loop().time()
        few = Rate(0.001, 3.0)
        handshakes = Handshakes(100, Admission(now, few, few))
        server = await open_server(Silent, listen, handshakes)
        heard = []
        for _ in range(20):
            if listen.path:
                reader, writer = await asyncio.open_unix_connection(listen.path)
            else:
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            try:
                heard.append(await asyncio.wait_for(reader.read(2), 10))
            except ConnectionResetError:
                heard.append(b"")
            writer.close()
        server.close()
        return heard

    try:
        for listen in (Listen("127.0.0.1", 0), Listen("", 0, path=str(tmp_path / "sock"))):
            begun, lines[:] = 0, []
            assert asyncio.run(run(listen)) == [b"in"] * 3 + [b""] * 17
            assert begun == 3
            assert lines == ["connection refused: too many from there in too little time"] * REPORTS_MAX
    finally:
        logging.getLogger("lineside.listen").removeHandler(handler)
