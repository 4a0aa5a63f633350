"""The far end for benchmarks: an AMQP receiver over mutual TLS on our own engine. Accepts everything and counts.

Keeps what it got, so that order and completeness are checked after the clock has stopped. `python -m
gateway.bench.receiver` is a process of its own that prints one JSON line when it has what it expects.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Receiver
from gateway.amqp.events import Deliveries, Event, LinkAttached, Opened
from gateway.amqp.message import decode
from gateway.amqp.sasl import SaslServer
from security.tls import server_context

CREDIT = 2000


@dataclass(frozen=True, slots=True)
class Report:
    """What arrived. `per_s` is from the first batch to the last message, the first batch itself not counted."""

    messages: int
    seconds: float
    per_s: float
    missing: int
    repeated: int
    reordered: int
    receiver_cores: float


class Far:
    """All connections' messages in one list; `arrived(now)` is called for each batch, when it is settled."""

    def __init__(self, port: int, cert: Path, key: Path, ca: Path) -> None:
        self._port = port
        self._context = server_context(cert, key, ca)
        self._server: asyncio.Server | None = None
        self._protocols: set[AmqpProtocol] = set()
        self.bodies: list[bytes] = []
        self.first: tuple[float, int] | None = None
        self.last = 0.0
        self.arrived: Callable[[float], None] = lambda now: None

    async def start(self) -> int:
        """Listen; returns the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, "127.0.0.1", self._port, ssl=self._context)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for protocol in list(self._protocols):
            protocol.abort()
        await asyncio.sleep(0)

    def _protocol(self) -> AmqpProtocol:
        protocol = AmqpProtocol(self._engine, self, self._protocols.add)
        return protocol

    def _engine(self, transport: asyncio.Transport) -> Engine:
        certificate = transport.get_extra_info("peercert")
        name = dict(pair for rdn in certificate["subject"] for pair in rdn)["commonName"]
        return Engine(server=True, container="far-end", sasl=SaslServer(["EXTERNAL"], external=name), idle_timeout_s=20)

    def on_lost(self, error: Exception | None) -> None:
        pass

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Opened():
                    engine.open()
                case LinkAttached(Receiver() as link, True):
                    link.confirm()
                    link.topup(CREDIT)
                case Deliveries(receiver, batch):
                    self.bodies += [body for _, body in batch]
                    receiver.accept([handle for handle, _ in batch])
                    receiver.topup(CREDIT)
                    self.last = time.perf_counter()
                    if self.first is None:
                        self.first = self.last, len(self.bodies)
                    self.arrived(self.last)
                case _:
                    pass


def seqs(bodies: Iterable[bytes]) -> list[int]:
    """Of each message its seq in the gateway's journal, from the message-id."""
    return [int(str(decode(body).message_id).rsplit(":", 1)[1], 16) for body in bodies]


def judge(bodies: list[bytes], expected: int) -> tuple[int, int, int]:
    """(missing, repeated, reordered) of `expected` messages, by journal seq and by each publisher's own numbers."""
    arrived = seqs(bodies)
    seen: set[int] = set()
    payloads: set[bytes] = set()
    highest = reordered = 0
    last: dict[bytes, int] = {}
    for seq, body in zip(arrived, bodies, strict=True):
        if seq in seen:
            continue
        seen.add(seq)
        publisher, number, _ = decode(body).body.split(b" ", 2)
        payloads.add(publisher + b" " + number)
        reordered += seq < highest or int(number) < last.get(publisher, -1)
        highest = max(highest, seq)
        last[publisher] = int(number)
    return expected - len(payloads), len(bodies) - len(seen), reordered


async def _serve(arguments: argparse.Namespace) -> Report:
    far = Far(arguments.port, arguments.cert, arguments.key, arguments.ca)
    done = asyncio.Event()
    cpu = 0.0

    def arrived(now: float) -> None:
        nonlocal cpu
        cpu = cpu or time.process_time()
        if len(far.bodies) >= arguments.expect:
            done.set()

    far.arrived = arrived
    await far.start()
    async with asyncio.timeout(arguments.timeout_s):
        await done.wait()
    cpu = time.process_time() - cpu
    await asyncio.sleep(0.2)  # the last acknowledgements leave; what comes twice shows
    await far.stop()
    assert far.first is not None
    seconds = far.last - far.first[0]
    missing, repeated, reordered = judge(far.bodies, arguments.expect)
    rate = (len(far.bodies) - far.first[1]) / seconds
    return Report(len(far.bodies), seconds, rate, missing, repeated, reordered, cpu / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--expect", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    for name in ("--cert", "--key", "--ca"):
        parser.add_argument(name, type=Path, required=True)
    try:
        report = asyncio.run(_serve(parser.parse_args()))
    except TimeoutError:
        sys.exit("not everything arrived in time")
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
