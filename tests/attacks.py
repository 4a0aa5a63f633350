"""Clients that ask for as much as they can, in a process of their own; `python -m tests.attacks NAME PORTS...`.

Each attack goes on until its standard input ends, and then says how much it got rid of. The other end takes its bytes
as it likes: an attack waits for that, never breaks the protocol by it, and needs next to no answer. So the same traffic
can go to a daemon, or to `swallow`, a process that takes whatever comes and does nothing with it: what the one costs
others beyond the other is the daemon's own doing.
"""

from __future__ import annotations

import argparse
import json
import select
import selectors
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

CONNECTIONS = 1000
WAIT_S = 0.05
BATCH_S = 0.002
CONNACK = b"\x20\x02\x00\x00"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the victim listens; or the swallower."""

    mqtt: int
    tls: int
    ws: int
    amqp: int


# An attack yields what it got rid of since the last time, 0 where it had to wait.
Attack = Callable[[Ports], Iterator[int]]


# ---------------------------------------------------------------------------------------------------- MQTT, by hand


def string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def packet(kind: int, body: bytes) -> bytes:
    size, out = len(body), bytearray([kind])
    while True:
        size, rest = divmod(size, 128)
        out.append(rest | (128 if size else 0))
        if not size:
            return bytes(out) + body


def connect(name: bytes, will: bytes = b"", *, clean: bool = True) -> bytes:
    flags = (2 if clean else 0) | (4 if will else 0)
    tail = string(b"train/will") + string(will) if will else b""
    return packet(0x10, string(b"MQTT") + bytes([4, flags]) + (60).to_bytes(2, "big") + string(name) + tail)


def publish(topic: bytes, payload: bytes, *, retain: bool = False) -> bytes:
    return packet(0x31 if retain else 0x30, string(topic) + payload)


def subscribe(filters: list[bytes]) -> bytes:
    return packet(0x82, b"\x00\x01" + b"".join(string(f) + b"\x01" for f in filters))


# ---------------------------------------------------------------------------------------------------- AMQP, by hand

SASL = b"AMQP\x03\x01\x00\x00"
AMQP = b"AMQP\x00\x01\x00\x00"
OPEN, BEGIN, ATTACH, FLOW, TRANSFER, DETACH, END = 0x10, 0x11, 0x12, 0x13, 0x14, 0x16, 0x17
NULL, TRUE, FALSE = b"\x40", b"\x41", b"\x42"
MANY = 0x7FFFFFFF


def uint(value: int) -> bytes:
    return b"\x70" + value.to_bytes(4, "big")


def text(value: str) -> bytes:
    data = value.encode()
    return b"\xa1" + bytes((len(data),)) + data


def described(code: int, *fields: bytes) -> bytes:
    body = b"".join(fields)
    return b"\x00\x53%c\xd0" % code + (len(body) + 4).to_bytes(4, "big") + len(fields).to_bytes(4, "big") + body


def frame(code: int, *fields: bytes, channel: int = 0, payload: bytes = b"", kind: int = 0) -> bytes:
    body = described(code, *fields) + payload
    return (len(body) + 8).to_bytes(4, "big") + b"\x02%c" % kind + channel.to_bytes(2, "big") + body


EMPTY_FRAME = b"\x00\x00\x00\x08\x02\x00\x00\x00"
INIT = frame(0x41, b"\xa3\x09ANONYMOUS", kind=1)
OUTCOME = frame(0x44, b"\x50\x00", kind=1)
MECHANISMS = frame(0x40, b"\xa3\x09ANONYMOUS", kind=1)


def open_frame(name: str) -> bytes:
    return frame(OPEN, text(name), NULL, uint(65536), b"\x60\x00\x3f")


def begin(channel: int = 0, remote: bytes = NULL) -> bytes:
    return frame(BEGIN, remote, uint(0), uint(MANY), uint(MANY), channel=channel)


def attach(handle: int, name: str, *, receiver: bool) -> bytes:
    ends = described(0x28, text("other/1")), described(0x29, text("other/1"))
    return frame(
        ATTACH, text(name), uint(handle), TRUE if receiver else FALSE, NULL, NULL, *ends, NULL, NULL, uint(0)
    )  # fmt: skip


def detach(handle: int) -> bytes:
    return frame(DETACH, uint(handle), TRUE)


def flow(*, echo: bool, link_credit: int | None = None) -> bytes:
    link = [NULL] * 3 if link_credit is None else [uint(0), uint(0), uint(link_credit)]
    return frame(FLOW, uint(0), uint(MANY), uint(0), uint(MANY), *link, NULL, NULL, TRUE if echo else FALSE)


def transfer(number: int, payload: bytes) -> bytes:
    """Settled already, so that it needs no answer."""
    tag = b"\xa0\x04" + number.to_bytes(4, "big")
    return frame(TRANSFER, uint(0), uint(number), tag, uint(0), TRUE, FALSE, payload=payload)


def credit_of(data: bytes) -> int | None:
    """The delivery-count up to which a flow frame's link may send; None where it speaks of no link."""
    at, values = 8 + (12 if data[11] == 0xD0 else 6 if data[11] == 0xC0 else 4), list[int | None]()
    while at < len(data) and len(values) < 7:
        code = data[at]
        size = {0x70: 4, 0x52: 1, 0x53: 1, 0x80: 8}.get(code, 0)
        values.append(None if code == 0x40 else int.from_bytes(data[at + 1 : at + 1 + size], "big"))
        at += 1 + size
    if len(values) < 7 or values[6] is None:
        return None
    return (values[5] or 0) + values[6]


# ------------------------------------------------------------------------------------------------------- connections


class Frames:
    """What an AMQP attack has heard: how many frames of each performative, and what its link may send."""

    def __init__(self) -> None:
        self.credit = 0  # up to which delivery-count
        self._counts: dict[int, int] = {}
        self._rest = b""

    def count(self, code: int) -> int:
        return self._counts.get(code, 0)

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        while len(data) - at >= 8:
            if data[at : at + 4] == b"AMQP":
                at += 8
                continue
            size = int.from_bytes(data[at : at + 4], "big")
            if len(data) - at < size:
                break
            if size > 10 and data[at + 5] == 0:
                code = data[at + 10]
                self._counts[code] = self.count(code) + 1
                if code == FLOW:
                    credit = credit_of(data[at : at + size])
                    self.credit = self.credit if credit is None else credit
            at += size
        self._rest = data[at:]


class Line:
    """One connection of an attacker. What it sends waits where the other end does not take it; what comes is counted.

    `reads`: whether it takes answers at all.
    """

    def __init__(self, port: int, *, reads: bool = True) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.sock.setblocking(False)
        self.reads = reads
        self.heard_bytes = 0
        self.frames: Frames | None = None  # of AMQP

    def send(self, data: bytes) -> Iterator[int]:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                yield from self.wait(writable=True)
        if self.reads:
            self.read()

    def wait(self, *, writable: bool = False) -> Iterator[int]:
        """Until something can be read, or written, or for a moment."""
        reading = [self.sock] if self.reads else []
        ready, _, _ = select.select(reading, [self.sock] if writable else [], [], WAIT_S)
        if ready:
            self.read()
        yield 0

    def read(self) -> None:
        with suppress(BlockingIOError):
            while data := self.sock.recv(1 << 18):
                self.heard_bytes += len(data)
                if self.frames is not None:
                    self.frames.feed(data)
            raise ConnectionResetError("the other end closed the connection")

    def heard(self, code: int) -> int:
        assert self.frames is not None
        return self.frames.count(code)

    @property
    def credit(self) -> int:
        assert self.frames is not None
        return self.frames.credit

    def close(self) -> None:
        self.sock.close()

    @classmethod
    def mqtt(cls, port: int, hello: bytes, *, reads: bool = True) -> Self:
        """A connection that has its CONNACK."""
        line = cls(port, reads=reads)
        line.sock.settimeout(10)
        line.sock.sendall(hello)
        if line.sock.recv(4)[:1] != b"\x20":
            raise ConnectionResetError("refused")
        line.sock.setblocking(False)
        return line

    @classmethod
    def amqp(cls, port: int, *, reads: bool = True) -> Self:
        """A connection with one session on channel 0, all said in one breath."""
        line = cls(port, reads=reads)
        line.frames = Frames()
        line.sock.settimeout(10)
        line.sock.sendall(SASL + INIT)
        heard = b""
        while OUTCOME[-12:] not in heard and b"\x00\x53\x44" not in heard:
            heard += line.sock.recv(4096)
        line.sock.sendall(AMQP + open_frame("attacker") + begin())
        line.sock.setblocking(False)
        return line


# ----------------------------------------------------------------------------------------------------------- attacks


def half_open_tls(ports: Ports) -> Iterator[int]:
    """A thousand connections to the TLS port that say nothing."""
    held = []
    for _ in range(CONNECTIONS):
        held.append(socket.create_connection(("127.0.0.1", ports.tls), timeout=5))
        yield 1
    while held:
        time.sleep(WAIT_S)
        yield 0


def tls_hellos(ports: Ports) -> Iterator[int]:
    """One ClientHello after another: the server signs, the client goes."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    hello = outgoing.read()
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", ports.tls), timeout=1) as sock:
            sock.sendall(hello)
            sock.recv(1)
        yield 1


def connect_and_leave(ports: Ports) -> Iterator[int]:
    while True:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", ports.mqtt), timeout=1).close()
        yield 1


def sessions(ports: Ports) -> Iterator[int]:
    """Durable sessions, one after another: each is on the disk before its CONNACK."""
    n = 0
    while True:
        with suppress(OSError):
            Line.mqtt(ports.mqtt, connect(b"session-%d" % (n % 500), clean=False)).close()
        n += 1
        yield 1


def slowloris(ports: Ports) -> Iterator[int]:
    where = (ports.mqtt, ports.ws, ports.amqp)
    held = [socket.create_connection(("127.0.0.1", where[n % 3]), timeout=5) for n in range(90)]
    while True:
        time.sleep(WAIT_S)
        for n, sock in enumerate(held):
            with suppress(OSError):
                sock.send((b"\x10", b"G", b"A")[n % 3])
        yield len(held)


def subscribes(ports: Ports) -> Iterator[int]:
    """Five hundred filters a packet, all of them new."""
    line = Line.mqtt(ports.mqtt, connect(b"subscriber"))
    n = 0
    while True:
        yield from line.send(subscribe([b"other/%d/+/#" % (n + i) for i in range(500)]))
        n += 500
        yield 1


def small_subscribes(ports: Ports) -> Iterator[int]:
    """One filter a packet, always the same ones, on ten connections."""
    lines = [Line.mqtt(ports.mqtt, connect(b"small-%d" % n)) for n in range(10)]
    many = b"".join(subscribe([b"other/%d" % i]) for i in range(50))
    while True:
        for line in lines:
            yield from line.send(many)
            yield 50


def huge_subscribes(ports: Ports) -> Iterator[int]:
    """A quarter of a million filters in one packet."""
    line = Line.mqtt(ports.mqtt, connect(b"huge"))
    packet = subscribe([b"%x" % (n % 256) for n in range(200_000)])
    while True:
        yield from line.send(packet)
        yield 1


def unsubscribes(ports: Ports) -> Iterator[int]:
    """With as many subscriptions as one may have, one filter more and less again and again."""
    line = Line.mqtt(ports.mqtt, connect(b"fickle"))
    for n in range(0, 10_000, 500):
        yield from line.send(subscribe([b"other/%d" % (n + i) for i in range(500)]))
    off = packet(0xA2, b"\x00\x01" + string(b"other/1"))
    many = (off + subscribe([b"other/1"])) * 50
    while True:
        yield from line.send(many)
        yield 100


def retained_reads(ports: Ports) -> Iterator[int]:
    """Subscribe to five hundred retained messages, again and again, and read them."""
    line = Line.mqtt(ports.mqtt, connect(b"collector"))
    for n in range(500):
        yield from line.send(publish(b"kept/%d" % n, bytes(1000), retain=True))
    many = b"".join(subscribe([b"kept/#"]) for _ in range(5))
    while True:
        yield from line.send(many)
        yield 5


def pings(ports: Ports) -> Iterator[int]:
    """Never reads an answer."""
    line = Line.mqtt(ports.mqtt, connect(b"pinger"), reads=False)
    while True:
        yield from line.send(b"\xc0\x00" * 512)
        yield 512


def pings_heard(ports: Ports) -> Iterator[int]:
    line = Line.mqtt(ports.mqtt, connect(b"pinger"))
    while True:
        yield from line.send(b"\xc0\x00" * 512)
        yield 512


def publishes(ports: Ports) -> Iterator[int]:
    """Messages of QoS 0, as fast as they go."""
    line = Line.mqtt(ports.mqtt, connect(b"talker"))
    many = publish(b"train/talk", bytes(100)) * 200
    while True:
        yield from line.send(many)
        yield 200


def retained(ports: Ports) -> Iterator[int]:
    """Each under a topic of its own, beyond what is retained."""
    line = Line.mqtt(ports.mqtt, connect(b"retainer"))
    n = 0
    while True:
        many = b"".join(publish(b"other/%d" % (n + i), bytes(1000), retain=True) for i in range(50))
        yield from line.send(many)
        n += 50
        yield 50


def wills(ports: Ports) -> Iterator[int]:
    for n in range(300):
        Line.mqtt(ports.mqtt, connect(b"willing-%d" % n, bytes(10_000))).close()
        yield 1
    while True:
        time.sleep(WAIT_S)
        yield 0


def websocket_frames(ports: Ports) -> Iterator[int]:
    """WebSocket frames with nothing in them."""
    line = Line(ports.ws)
    line.sock.settimeout(10)
    line.sock.sendall(
        b"GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
    )
    line.sock.recv(4096)
    line.sock.setblocking(False)
    hello = connect(b"framer")
    yield from line.send(b"\x82" + bytes((0x80 | len(hello),)) + bytes(4) + hello)
    while True:
        yield from line.send(b"\x82\x80\0\0\0\0" * 512)
        yield 512


def amqp_links(ports: Ports) -> Iterator[int]:
    """Attach and detach, a receiver each time."""
    line = Line.amqp(ports.amqp)
    sent = 0
    while True:
        many = b"".join(attach(n, f"link-{sent + n}", receiver=True) + detach(n) for n in range(50))
        yield from line.send(many)
        sent += 50
        while line.heard(DETACH) < sent:
            yield from line.wait()
        yield 50


def amqp_sessions(ports: Ports) -> Iterator[int]:
    line = Line.amqp(ports.amqp)
    sent = 0
    many = b"".join(begin(channel) + frame(END, channel=channel) for channel in range(1, 51))
    while True:
        yield from line.send(many)
        sent += 50
        while line.heard(END) < sent:
            yield from line.wait()
        yield 50


def amqp_sessions_unread(ports: Ports) -> Iterator[int]:
    line = Line.amqp(ports.amqp, reads=False)
    many = b"".join(begin(channel) + frame(END, channel=channel) for channel in range(1, 51))
    while True:
        yield from line.send(many)
        yield 50


def amqp_transfers(ports: Ports) -> Iterator[int]:
    """Messages of a few bytes, as many as credit allows, which nobody reads."""
    line = Line.amqp(ports.amqp)
    yield from line.send(attach(0, "tiny", receiver=False))
    sent = 0
    body = b"\x00\x53\x75\xa0\x01x"
    while True:
        while line.credit <= sent:
            yield from line.wait()
        count = min(200, line.credit - sent)
        yield from line.send(b"".join(transfer(sent + n, body) for n in range(count)))
        sent += count
        yield count


def amqp_flows(ports: Ports) -> Iterator[int]:
    """Each asks for an answer."""
    line = Line.amqp(ports.amqp)
    many = flow(echo=True) * 100
    while True:
        yield from line.send(many)
        yield 100


def amqp_empty(ports: Ports) -> Iterator[int]:
    line = Line.amqp(ports.amqp)
    while True:
        yield from line.send(EMPTY_FRAME * 512)
        yield 512


ATTACKS: dict[str, Attack] = {
    each.__name__: each
    for each in (
        half_open_tls, tls_hellos, connect_and_leave, sessions, slowloris, subscribes, small_subscribes, retained_reads,
        publishes, pings, pings_heard, retained, wills, huge_subscribes, unsubscribes, websocket_frames,
        amqp_links, amqp_sessions, amqp_sessions_unread, amqp_transfers, amqp_flows, amqp_empty,
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- processes


def attack(name: str, ports: Ports, per_s: float | None = None) -> dict[str, object]:
    """Until standard input ends. `per_s`: no more than so many units a second. An empty line says that it is at it."""
    began = checked = time.monotonic()
    done, cut_off = 0, False
    cpu = time.process_time()
    try:
        for units in ATTACKS[name](ports):
            if units and not done:
                print(flush=True)
            done += units
            now = time.monotonic()
            if per_s is not None and units:
                ahead_s = began + done / per_s - now
                if ahead_s > BATCH_S:
                    time.sleep(ahead_s)
            if now - checked > WAIT_S:
                checked = now
                if select.select([sys.stdin], [], [], 0)[0]:
                    break
    except OSError as error:
        cut_off = True  # that is an answer, too
        print(error, file=sys.stderr)
        if not done:
            print(flush=True)
        sys.stdin.read()
    took = time.monotonic() - began
    return {"units": done, "seconds": took, "cut_off": cut_off, "cores": (time.process_time() - cpu) / took}


def swallow() -> None:
    """Take what comes on four ports, answer as little as an attack needs to go on, until standard input ends."""
    chooser = selectors.DefaultSelector()
    handshake = SASL + MECHANISMS + OUTCOME + AMQP + open_frame("swallower") + begin(remote=b"\x60\x00\x00")
    first = {
        "mqtt": CONNACK,
        "tls": b"\x16",
        "ws": b"HTTP/1.1 101",
        "amqp": handshake + flow(echo=False, link_credit=MANY),
    }
    servers = {}
    for name, answer in first.items():
        server = socket.create_server(("127.0.0.1", 0), backlog=1024)
        server.setblocking(False)
        servers[name] = server.getsockname()[1]
        chooser.register(server, selectors.EVENT_READ, (name, answer))
    chooser.register(sys.stdin, selectors.EVENT_READ)
    print(json.dumps(servers), flush=True)
    answers: dict[socket.socket, bytes] = {}
    while True:
        for key, _ in chooser.select():
            sock = key.fileobj
            if not isinstance(sock, socket.socket):
                return
            if key.data is not None and len(key.data) == 2:
                accepted, _ = sock.accept()
                accepted.setblocking(False)
                answers[accepted] = key.data[1]
                chooser.register(accepted, selectors.EVENT_READ, (key.data[0],))
                continue
            with suppress(OSError):
                data = sock.recv(1 << 18)
                if data:
                    answer = answers.pop(sock, b"")
                    # An AMQP attack counts what it ended in what comes back, so it gets back what it said.
                    sock.send(answer or (data if key.data[0] == "amqp" else b""))
                    continue
            chooser.unregister(sock)
            answers.pop(sock, None)
            sock.close()


class Swallower:
    """The process that only swallows."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.attacks", "swallow"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.ports = Ports(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


class Attacker:
    """An attack in its own process, under way until `end`."""

    def __init__(self, name: str, ports: Ports, per_s: float | None = None) -> None:
        command = [sys.executable, "-m", "tests.attacks", name]
        command += map(str, (ports.mqtt, ports.tls, ports.ws, ports.amqp))
        command += [] if per_s is None else ["--per-s", str(per_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def begun(self) -> None:
        """Returns once it got rid of something, or was cut off."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"\n"

    def end(self) -> dict[str, float]:
        """What it got rid of, in how many seconds, and how much of a core it used itself."""
        out, _ = self.process.communicate(timeout=60)
        result: dict[str, float] = json.loads(out)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("name", choices=[*ATTACKS, "swallow"])
    parser.add_argument("ports", type=int, nargs="*", help="MQTT, MQTT over TLS, MQTT over WebSockets, AMQP")
    parser.add_argument("--per-s", type=float)
    arguments = parser.parse_args()
    if arguments.name == "swallow":
        swallow()
    else:
        print(json.dumps(attack(arguments.name, Ports(*arguments.ports), arguments.per_s)))


if __name__ == "__main__":
    main()
