"""An AMQP 1.0 sender for benchmarks: durable messages, at least once, a window in flight on each of a few connections.

Counts what is settled as accepted and insists on nothing else. The same client for every broker. Speaks through our own
engine, which spends about as little as a client in C; knows nothing of who answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Sender
from gateway.amqp.events import Credit, Event, Failed, LinkAttached, LinkClosed, OutcomeKind, RemoteClosed, Settled
from gateway.amqp.message import encode
from gateway.amqp.sasl import SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.bench.load import CONNECT_S_MAX, SAMPLES_MAX, STALL_S_MAX, LoadError, Result, percentiles_ms


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: `warm_s`, and then `seconds` that count."""

    port: int
    address: str = "bench"
    connections: int = 4
    window: int = 500
    size_bytes: int = 100
    seconds: float = 3.0
    warm_s: float = 0.5
    host: str = "127.0.0.1"


class _App:
    """One connection with one link."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._number = number
        self._body = encode((b"%d " % number + b"." * load.size_bytes)[: load.size_bytes])
        self._sent = 0
        self.accepted = 0
        self.samples: list[float] = []
        self._sampled = 0
        self._sampled_at = 0.0
        self.attached = asyncio.Event()
        self._sender: Sender | None = None
        self._begun = False
        self.fault: str | None = None
        self.protocol: AmqpProtocol | None = None

    async def connect(self) -> None:
        def engine(_: asyncio.Transport) -> Engine:
            sasl = SaslClient(["ANONYMOUS"])
            return Engine(server=False, container=f"bench-{self._number}", hostname=self._load.host, sasl=sasl)

        _, self.protocol = await asyncio.get_running_loop().create_connection(
            lambda: AmqpProtocol(engine, self, self._attach), self._load.host, self._load.port
        )

    def _attach(self, protocol: AmqpProtocol) -> None:
        engine = protocol.engine
        engine.open()
        # Durable and a queue: the one is what RabbitMQ's queues take their durability from, the other Artemis' routing.
        target = Terminus(self._load.address, Durability.UNSETTLED_STATE, Expiry.NEVER, capabilities=("queue",))
        engine.sender(engine.session(), f"bench-{self._number}", target)

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Credit(sender) | Settled(sender):
                    self._push(sender)
                case LinkAttached(sender) if isinstance(sender, Sender):
                    self._sender = sender
                    self.attached.set()
                case Failed(condition, description) | RemoteClosed(condition, description):
                    self._failed(f"{condition}: {description}")
                case LinkClosed(_, condition, description):
                    self._failed(f"link closed: {condition}: {description}")
                case _:
                    pass

    def on_lost(self, error: Exception | None) -> None:
        self._failed(f"the connection ended: {error}")

    def _failed(self, why: str) -> None:
        self.fault = self.fault or why
        self.attached.set()

    def begin(self) -> None:
        """Send from now on: not while others still attach, who would wait for a machine that is busy with these."""
        self._begun = True
        if self._sender is not None and self.protocol is not None:
            self._push(self._sender)
            self.protocol.schedule_flush()

    def _push(self, sender: Sender) -> None:
        if not self._begun:
            return
        for outcome in sender.take_outcomes():
            if outcome.kind is not OutcomeKind.ACCEPTED:
                self._failed(f"a message was {outcome.kind.value}: {outcome.condition}")
            self.accepted += outcome.count
        if self._sampled and self.accepted >= self._sampled:
            if len(self.samples) < SAMPLES_MAX:
                self.samples.append(time.perf_counter() - self._sampled_at)
            self._sampled = 0
        room = min(sender.capacity, self._load.window - sender.unsettled)
        if room > 0:
            body, first = self._body, self._sent
            if not self._sampled:
                self._sampled, self._sampled_at = first + 1, time.perf_counter()
            sender.send([(seq, body) for seq in range(first, first + room)])
            self._sent = first + room


async def run(load: Load) -> Result:
    """Send as `load` says. Raises LoadError; a broker that is silent for 20 s is one."""
    apps = [_App(load, number) for number in range(load.connections)]
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            for app in apps:
                await app.connect()
                await app.attached.wait()
        for app in apps:
            app.begin()
        await _watched(apps, load.warm_s)
        began, cpu, before = time.perf_counter(), time.process_time(), sum(a.accepted for a in apps)
        for app in apps:
            app.samples.clear()
        await _watched(apps, load.seconds)
        elapsed = time.perf_counter() - began
        in_all = sum(a.accepted for a in apps)
        cores = (time.process_time() - cpu) / elapsed
        p50_ms, p99_ms = percentiles_ms([each for app in apps for each in app.samples])
        return Result(in_all - before, in_all, elapsed, (in_all - before) / elapsed, cores, p50_ms, p99_ms)
    except TimeoutError:
        raise LoadError(f"no link within {CONNECT_S_MAX:g} s") from None
    finally:
        for app in apps:
            if app.protocol is not None:
                app.protocol.abort()


async def _watched(apps: list[_App], seconds: float) -> None:
    """Let them run; raises LoadError where one failed or none gets on."""
    until = time.perf_counter() + seconds
    had, since = -1, time.perf_counter()
    while (now := time.perf_counter()) < until:
        await asyncio.sleep(min(0.1, until - now))
        fault = next((a.fault for a in apps if a.fault), None)
        if fault is not None:
            raise LoadError(fault)
        count = sum(a.accepted for a in apps)
        if count != had:
            had, since = count, now
        elif now - since > STALL_S_MAX:
            raise LoadError(f"the broker was silent for {STALL_S_MAX:g} s")


def main() -> None:
    default = Load(port=0)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--address", default=default.address)
    parser.add_argument("--connections", type=int, default=default.connections)
    parser.add_argument("--window", type=int, default=default.window, help="messages in flight a connection")
    parser.add_argument("--size-bytes", type=int, default=default.size_bytes, help="of the payload")
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--warm-s", type=float, default=default.warm_s)
    print(json.dumps(asdict(asyncio.run(run(Load(**vars(parser.parse_args())))))))


if __name__ == "__main__":
    main()
