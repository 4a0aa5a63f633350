"""A crowd of MQTT subscribers for benchmarks: one publisher, everybody gets everything, at QoS 1, in one process.

Each message carries when it was sent, so that every delivery is timed; each is acknowledged, and counted in order.
Knows nothing of who answers.
"""

from __future__ import annotations

import argparse
import json
import resource
import select
import socket
import struct
import time
from dataclasses import asdict, dataclass

from gateway.bench.load import LoadError, _packet, _string, connect, subscribed

TOPIC = b"fan/out"
STAMP = struct.Struct("!dI")
READ_BYTES = 1 << 16
DRAIN_S_MAX = 10.0
FILES_SPARE = 100


@dataclass(frozen=True, slots=True)
class Fan:
    port: int
    sessions: int = 1000
    per_s: float = 50.0
    seconds: float = 10.0
    size_bytes: int = 100
    version: int = 4
    durable: bool = False
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Result:
    """Latencies are from just before the publisher's write to the subscriber's read, in milliseconds."""

    published: int
    delivered: int
    lost: int
    repeated: int
    reordered: int
    delivered_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    client_cores: float


class _Subscriber:
    def __init__(self, fan: Fan, number: int, packet_bytes: int) -> None:
        name = f"fan-{number}"
        self.sock = subscribed(fan.host, fan.port, name, TOPIC.decode(), fan.version, durable=fan.durable)
        self.sock.setblocking(False)
        self.next = 0
        self.repeated = self.reordered = 0
        self._rest = b""
        self._size = packet_bytes
        # Fixed header of two bytes, topic, packet id, 5.0's empty properties, payload.
        self._id_at = 2 + 2 + len(TOPIC)
        self._stamp_at = self._id_at + 2 + (fan.version == 5)

    def pull(self, now: float, latencies: list[float]) -> int:
        """Take what came, acknowledge it; return how many messages that were."""
        try:
            data = self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            raise LoadError("the broker closed a subscriber's connection")
        if self._rest:
            data = self._rest + data
        size, id_at, stamp_at = self._size, self._id_at, self._stamp_at
        count = len(data) // size
        acks = []
        for at in range(0, count * size, size):
            if data[at] & 0xF7 != 0x32 or data[at + 1] != size - 2:
                raise LoadError(f"a packet of type {data[at]:#x} and {data[at + 1]} bytes among the messages")
            sent_at, number = STAMP.unpack_from(data, at + stamp_at)
            latencies.append(now - sent_at)
            if number == self.next:
                self.next += 1
            elif number < self.next:
                self.repeated += 1
            else:
                self.reordered += 1
                self.next = number + 1
            acks.append(data[at + id_at : at + id_at + 2])
        self._rest = data[count * size :]
        if acks:
            self.sock.send(b"\x40\x02" + b"\x40\x02".join(acks))
        return count


def run(fan: Fan) -> Result:
    """Publish for `seconds`, wait for the last delivery. Raises LoadError."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, fan.sessions + FILES_SPARE), hard))
    fill = b"." * (fan.size_bytes - STAMP.size)
    properties = b"\0" if fan.version == 5 else b""
    packet_bytes = len(_packet(0x32, _string(TOPIC) + b"\0\1" + properties + bytes(STAMP.size) + fill))
    poll = select.epoll()
    subscribers: dict[int, _Subscriber] = {}
    publisher, _ = connect(fan.host, fan.port, "fan-publisher", fan.version)
    try:
        for number in range(fan.sessions):
            one = _Subscriber(fan, number, packet_bytes)
            subscribers[one.sock.fileno()] = one
            poll.register(one.sock, select.EPOLLIN)
        publisher.setblocking(False)
        poll.register(publisher, select.EPOLLIN)
        return _drive(fan, poll, publisher, subscribers, properties, fill)
    finally:
        publisher.close()
        for one in subscribers.values():
            one.sock.close()
        poll.close()


def _drive(
    fan: Fan,
    poll: select.epoll,
    publisher: socket.socket,
    subscribers: dict[int, _Subscriber],
    properties: bytes,
    fill: bytes,
) -> Result:
    count = int(fan.per_s * fan.seconds)
    due = count * len(subscribers)
    published = delivered = 0
    latencies: list[float] = []
    publisher_fd = publisher.fileno()
    began = time.monotonic()
    cpu = time.process_time()
    last = began
    while delivered < due:
        now = time.monotonic()
        next_at = began + published / fan.per_s
        if published < count and now >= next_at:
            packet_id = struct.pack("!H", published % 65535 + 1)
            stamp = STAMP.pack(time.monotonic(), published)
            publisher.sendall(_packet(0x32, _string(TOPIC) + packet_id + properties + stamp + fill))
            published += 1
            continue
        if published == count and now - last > DRAIN_S_MAX:
            break
        for fd, event in poll.poll(max(0.0, next_at - now) if published < count else DRAIN_S_MAX, 256):
            if fd == publisher_fd:
                if not publisher.recv(READ_BYTES):
                    raise LoadError("the broker closed the publisher's connection")
            elif event & select.EPOLLIN:
                last = time.monotonic()
                delivered += subscribers[fd].pull(last, latencies)
            else:
                raise LoadError("the broker closed a subscriber's connection")
    elapsed = last - began
    latencies.sort()
    seen = sum(s.next for s in subscribers.values())
    return Result(
        published,
        delivered,
        due - seen,
        sum(s.repeated for s in subscribers.values()),
        sum(s.reordered for s in subscribers.values()),
        round(delivered / elapsed),
        round(latencies[len(latencies) // 2] * 1000, 2),
        round(latencies[int(len(latencies) * 0.99)] * 1000, 2),
        round(latencies[-1] * 1000, 2),
        round((time.process_time() - cpu) / elapsed, 2),
    )


def main() -> None:
    default = Fan(port=0)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--sessions", type=int, default=default.sessions)
    parser.add_argument("--per-s", type=float, default=default.per_s, help="messages published a second")
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--size-bytes", type=int, default=default.size_bytes, help="of the payload")
    parser.add_argument("--version", type=int, choices=(4, 5), default=default.version, help="4 is MQTT 3.1.1")
    parser.add_argument("--durable", action="store_true", help="sessions that outlive their connections")
    print(json.dumps(asdict(run(Fan(**vars(parser.parse_args()))))))


if __name__ == "__main__":
    main()
