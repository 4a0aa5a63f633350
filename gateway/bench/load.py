"""An MQTT QoS 1 publisher for benchmarks: raw sockets, packets encoded beforehand, one epoll loop in one process.

Each connection keeps a fixed window of publishes in flight, counts the PUBACKs and insists that they come in the order
of the publishes (MQTT 3.1.1 and 5.0, clause 4.6). Spends so little itself that the broker is what is measured. Speaks
3.1.1 and 5.0; knows nothing of who answers.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import struct
import time
from dataclasses import asdict, dataclass

PACKET_IDS = 65535
READ_BYTES = 1 << 18
CONNECT_S_MAX = 10.0
STALL_S_MAX = 20.0
RING_BYTES_MAX = 64 << 20  # of all connections' encoded packets together, where two windows need no more
SAMPLES_MAX = 200_000
# 5.0: content type and one user property, what an app that uses properties sends (clause 3.3.2.3).
PROPERTIES = b"\x03\x00\x10application/json" + b"\x26\x00\x05train\x00\x0424/7"
RECEIVE_MAXIMUM = 0x21


class LoadError(Exception):
    """The broker refused, closed, went silent, or acknowledged something else than what was due."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to publish. With `messages` exactly that many, otherwise `warm_s` and then `seconds` that count."""

    port: int
    connections: int = 4
    window: int = 200
    size_bytes: int = 100
    version: int = 4
    topic: str = "bench"
    properties: bool = False
    messages: int | None = None
    seconds: float = 3.0
    warm_s: float = 0.5
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Result:
    """What was acknowledged in the time that counts; latencies from write to acknowledgement, one message at a time."""

    acknowledged: int
    acknowledged_in_all: int
    seconds: float
    per_s: float
    client_cores: float
    p50_ms: float | None = None
    p99_ms: float | None = None


def percentiles_ms(samples: list[float]) -> tuple[float | None, float | None]:
    """Median and 99th percentile of seconds, in milliseconds."""
    if not samples:
        return None, None
    samples.sort()
    return samples[len(samples) // 2] * 1000, samples[min(len(samples) - 1, int(len(samples) * 0.99))] * 1000


def _string(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value


def _packet(kind: int, body: bytes) -> bytes:
    """Fixed header and body; the remaining length is a variable byte integer (clause 2.2.3, in 5.0 1.5.5)."""
    length, rest = b"", len(body)
    while True:
        rest, digit = divmod(rest, 128)
        length += bytes((digit | (128 if rest else 0),))
        if not rest:
            return bytes((kind,)) + length + body


def _read_packet(sock: socket.socket) -> tuple[int, bytes]:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = sock.recv(count - len(data))
            if not more:
                raise LoadError("the broker closed the connection")
            data += more
        return data

    kind = exactly(1)[0]
    size = shift = 0
    while True:
        digit = exactly(1)[0]
        size |= (digit & 127) << shift
        shift += 7
        if digit < 128:
            return kind, exactly(size)


def connect(
    host: str, port: int, client_id: str, version: int = 4, *, durable: bool = False
) -> tuple[socket.socket, int]:
    """A connected session and how many publishes the broker takes at once (65535 where it says nothing).

    `durable`: the session outlives its connection.
    """
    sock = socket.create_connection((host, port), timeout=CONNECT_S_MAX)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    flags = 0 if durable else 2
    properties = b""
    if version == 5:
        expiry = b"\x11" + struct.pack("!I", 3600) if durable else b""
        properties = bytes((len(expiry),)) + expiry
    head = _string(b"MQTT") + bytes((version, flags)) + struct.pack("!H", 600) + properties
    sock.sendall(_packet(0x10, head + _string(client_id.encode())))
    kind, body = _read_packet(sock)
    if kind != 0x20 or body[1] != 0:
        raise LoadError(f"refused: packet type {kind >> 4}, reason code {body[1]}")
    return sock, _receive_maximum(body[3:]) if version == 5 else 65535


def _receive_maximum(properties: bytes) -> int:
    """From a CONNACK's properties (5.0, clause 3.2.2.3). Up to it, only fixed sizes are expected."""
    sizes = {0x11: 4, RECEIVE_MAXIMUM: 2, 0x24: 1, 0x25: 1, 0x27: 4, 0x22: 2, 0x28: 1, 0x29: 1, 0x2A: 1, 0x13: 2}
    at = 0
    while at < len(properties):
        kind = properties[at]
        if kind == RECEIVE_MAXIMUM:
            return int(struct.unpack_from("!H", properties, at + 1)[0])
        if kind in (0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F):
            at += 3 + int(struct.unpack_from("!H", properties, at + 1)[0])
        elif kind in sizes:
            at += 1 + sizes[kind]
        else:
            break
    return 65535


def offline_session(host: str, port: int, client_id: str, topic_filter: str, version: int = 4) -> None:
    """Leave a durable session behind that has subscribed with QoS 1 and is away: the broker queues for it."""
    with subscribed(host, port, client_id, topic_filter, version) as sock:
        sock.sendall(b"\xe0\0")


def subscribed(
    host: str, port: int, client_id: str, topic_filter: str, version: int = 4, *, durable: bool = True
) -> socket.socket:
    """A connected session with one subscription, QoS 1."""
    sock, _ = connect(host, port, client_id, version, durable=durable)
    properties = b"\0" if version == 5 else b""
    sock.sendall(_packet(0x82, b"\0\1" + properties + _string(topic_filter.encode()) + b"\1"))
    kind, body = _read_packet(sock)
    if kind != 0x90 or body[-1] != 1:
        sock.close()
        raise LoadError(f"subscription refused: packet type {kind >> 4}, reason code {body[-1]}")
    return sock


class _Publisher:
    """One connection: a ring of encoded packets, and how far it is sent and acknowledged."""

    def __init__(self, load: Load, number: int, count: int | None) -> None:
        self.sock, window = connect(load.host, load.port, f"bench-{os.getpid()}-{number}", load.version)
        self.sock.setblocking(False)
        self.window = min(load.window, window)
        self.count = count
        self.acked = 0
        self.blocked = False
        self.samples: list[float] = []
        self._sampled = 0  # the message whose acknowledgement is timed, counted from 1; 0 is none
        self._sampled_at = 0.0
        self._sent_bytes = 0
        self._rest = b""
        ids = PACKET_IDS if count is None else max(1, min(PACKET_IDS, count))
        ids = min(ids, max(2 * self.window, RING_BYTES_MAX // load.connections // (load.size_bytes + 30)))
        head = _string(f"{load.topic}/{number}".encode())
        properties = b""
        if load.version == 5:
            properties = bytes((len(PROPERTIES),)) + PROPERTIES if load.properties else b"\0"
        fill = b"." * load.size_bytes
        packets = [
            _packet(
                0x32,
                head + struct.pack("!H", i + 1) + properties + (b"%d %09d " % (number, i) + fill)[: load.size_bytes],
            )
            for i in range(ids)
        ]
        self._ids = ids
        self._packet_bytes = len(packets[0])
        self._ring = memoryview(b"".join(packets))
        acks = b"".join(b"\x40\x02" + struct.pack("!H", i + 1) for i in range(ids))
        self._acks = acks + acks

    @property
    def done(self) -> bool:
        return self.count is not None and self.acked >= self.count

    def push(self) -> None:
        """Send what the window has room for."""
        until = self.acked + self.window
        if self.count is not None:
            until = min(until, self.count)
        ring = self._ring
        left = until * self._packet_bytes - self._sent_bytes
        self.blocked = False
        if left > 0 and not self._sampled:
            # The first of these: what waits in front of it in the window is part of what an app waits for.
            self._sampled, self._sampled_at = self._sent_bytes // self._packet_bytes + 1, time.perf_counter()
        while left > 0:
            at = self._sent_bytes % len(ring)
            size = min(left, len(ring) - at)
            try:
                sent = self.sock.send(ring[at : at + size])
            except BlockingIOError:
                sent = 0
            self._sent_bytes += sent
            left -= sent
            if sent < size:
                self.blocked = True
                return

    def pull(self) -> None:
        """Take PUBACKs. Raises LoadError unless they are exactly the next ones."""
        data = self.sock.recv(READ_BYTES)
        if not data:
            raise LoadError("the broker closed the connection")
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % 4
        at = self.acked % self._ids * 4
        if whole <= len(self._acks) - at and data[:whole] == self._acks[at : at + whole]:
            self.acked += whole // 4
            self._rest = data[whole:]
        else:
            self._pull_each(data)
        if self._sampled and self.acked >= self._sampled:
            if len(self.samples) < SAMPLES_MAX:
                self.samples.append(time.perf_counter() - self._sampled_at)
            self._sampled = 0

    def _pull_each(self, data: bytes) -> None:
        """As pull, for PUBACKs that spell their reason code out (5.0, clause 3.4.2)."""
        at = 0
        while len(data) - at >= 4 and len(data) - at >= 2 + data[at + 1]:
            size = data[at + 1]
            packet_id = int(struct.unpack_from("!H", data, at + 2)[0])
            due = self.acked % self._ids + 1
            if data[at] != 0x40 or packet_id != due:
                raise LoadError(f"PUBACK {due} was due; the broker sent packet type {data[at] >> 4}, id {packet_id}")
            if size > 2 and data[at + 4] >= 0x80:
                raise LoadError(f"publish {due} was refused: reason code {data[at + 4]:#x}")
            self.acked += 1
            at += 2 + size
        self._rest = data[at:]

    def close(self) -> None:
        try:
            self.sock.setblocking(True)
            self.sock.settimeout(CONNECT_S_MAX)
            self.sock.sendall(b"\xe0\0")
        except OSError:
            pass  # the run is over; what the broker thinks of it does not matter
        self.sock.close()


def run(load: Load) -> Result:
    """Publish as `load` says. Raises LoadError; a broker that is silent for 20 s is one."""
    counts: list[int | None] = [None] * load.connections
    if load.messages is not None:
        each, over = divmod(load.messages, load.connections)
        counts = [each + (n < over) for n in range(load.connections)]
    publishers: list[_Publisher] = []
    poll = select.epoll()
    try:
        for number, count in enumerate(counts):
            publishers.append(_Publisher(load, number, count))
            poll.register(publishers[-1].sock, select.EPOLLIN)
        return _drive(load, poll, publishers)
    finally:
        for publisher in publishers:
            publisher.close()
        poll.close()


def _drive(load: Load, poll: select.epoll, publishers: list[_Publisher]) -> Result:
    by_fd = {p.sock.fileno(): p for p in publishers}
    writing: set[int] = set()

    def push(publisher: _Publisher) -> None:
        publisher.push()
        fd = publisher.sock.fileno()
        if publisher.blocked != (fd in writing):
            (writing.add if publisher.blocked else writing.discard)(fd)
            poll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if publisher.blocked else 0))

    began = counted_from = time.perf_counter()
    cpu, before = time.process_time(), 0
    warm = load.messages is None
    for publisher in publishers:
        push(publisher)
    while True:
        now = time.perf_counter()
        if load.messages is not None:
            if all(p.done for p in publishers):
                break
        elif warm and now - began >= load.warm_s:
            warm, counted_from, cpu = False, now, time.process_time()
            before = sum(p.acked for p in publishers)
            for publisher in publishers:
                publisher.samples.clear()
        elif not warm and now - counted_from >= load.seconds:
            break
        events = poll.poll(STALL_S_MAX)
        if not events:
            raise LoadError(f"the broker was silent for {STALL_S_MAX:g} s")
        for fd, event in events:
            publisher = by_fd[fd]
            if event & ~select.EPOLLOUT:
                publisher.pull()
            push(publisher)
    elapsed = time.perf_counter() - counted_from
    in_all = sum(p.acked for p in publishers)
    acknowledged = in_all - before
    cores = (time.process_time() - cpu) / elapsed
    p50_ms, p99_ms = percentiles_ms([each for p in publishers for each in p.samples])
    return Result(acknowledged, in_all, elapsed, acknowledged / elapsed, cores, p50_ms, p99_ms)


def main() -> None:
    default = Load(port=0)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--connections", type=int, default=default.connections)
    parser.add_argument("--window", type=int, default=default.window, help="publishes in flight a connection")
    parser.add_argument("--size-bytes", type=int, default=default.size_bytes, help="of the payload")
    parser.add_argument("--version", type=int, choices=(4, 5), default=default.version, help="4 is MQTT 3.1.1")
    parser.add_argument("--topic", default=default.topic, help="the number of the connection comes after it")
    parser.add_argument("--properties", action="store_true", help="a content type and a user property (5.0)")
    parser.add_argument("--messages", type=int, help="publish so many, instead of for some time")
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--warm-s", type=float, default=default.warm_s)
    print(json.dumps(asdict(run(Load(**vars(parser.parse_args()))))))


if __name__ == "__main__":
    main()
