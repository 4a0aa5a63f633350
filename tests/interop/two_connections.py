"""Does Artemis keep the order of a sender that comes back before its last connection is worked off? Not by itself.

`python -m tests.interop.two_connections --frozen [--rounds 100] [--first few]`: a connection sends a window of durable
messages, each with its `_AMQ_DUPL_ID`, and is dropped with all of them unanswered; a second one sends the same from the
start, as AMQP senders do after a cut. Then the queue is read. Told are the rounds in which it is not in order, or holds
a message twice. Nothing of Lineside's uplink takes part, only its AMQP engine; `--first few` sends as `Drain` does.

A campaign to run by hand: a finding about a hub is no failure of ours, and one round in ten is no test.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Sender
from gateway.amqp.events import Credit, Deliveries, Event, LinkAttached, LinkClosed, OutcomeKind, Settled
from gateway.amqp.message import decode, encode
from gateway.amqp.sasl import SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus
from tests import parts

WINDOW = 1000
TIMEOUT_S = 60.0
QUIET_S = 0.3


@dataclass(frozen=True, slots=True)
class Arrived:
    number: int
    over: str


@dataclass(frozen=True, slots=True)
class Found:
    """What one queue held."""

    lost: int
    twice: int
    reordered: list[tuple[Arrived, Arrived]]  # neighbours of which the second should have been first
    old: int  # how many came over the connection that was dropped

    @classmethod
    def of(cls, arrived: list[Arrived]) -> Found:
        seen: dict[int, Arrived] = {}
        for each in arrived:
            seen.setdefault(each.number, each)
        firsts = list(seen.values())
        return cls(
            lost=WINDOW - len(firsts),
            twice=len(arrived) - len(firsts),
            reordered=[(a, b) for a, b in itertools.pairwise(firsts) if b.number < a.number],
            old=sum(each.over == "old" for each in arrived),
        )


class Connection:
    """One AMQP connection with one link."""

    def __init__(self) -> None:
        self.attached = asyncio.Event()
        self.progress = asyncio.Event()
        self.accepted = 0
        self.arrived: list[Arrived] = []
        self.gone = asyncio.Event()
        self.protocol: AmqpProtocol
        self.sender: Sender

    async def connect(self, port: int, container: str) -> Engine:
        def engine(_: asyncio.Transport) -> Engine:
            return Engine(server=False, container=container, hostname=parts.HOST, sasl=SaslClient(["ANONYMOUS"]))

        _, self.protocol = await asyncio.get_running_loop().create_connection(
            lambda: AmqpProtocol(engine, self, lambda protocol: protocol.engine.open()), parts.HOST, port
        )
        return self.protocol.engine

    async def send_to(self, port: int, address: str) -> None:
        """Attach, with credit for a whole window."""
        engine = await self.connect(port, "loco")
        self.sender = engine.sender(engine.session(), "loco:telemetry", _terminus(address))
        await self.until(lambda: self.attached.is_set() and self.sender.capacity >= WINDOW)

    async def until(self, done: object) -> None:
        assert callable(done)
        async with asyncio.timeout(TIMEOUT_S):
            while not done():
                self.progress.clear()
                await self.progress.wait()

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case LinkAttached():
                    self.attached.set()
                case Settled(sender) | Credit(sender):
                    for outcome in sender.take_outcomes():
                        assert outcome.kind is OutcomeKind.ACCEPTED, outcome
                        self.accepted += outcome.count
                case Deliveries(receiver, batch):
                    messages = [decode(body) for _, body in batch]
                    self.arrived += [Arrived(int(m.body), str(m.subject)) for m in messages]
                    receiver.accept([handle for handle, _ in batch])
                    receiver.topup(WINDOW)
                case LinkClosed(_, condition, description):
                    raise AssertionError(f"{condition}: {description}")
                case _:
                    pass
        self.progress.set()

    def on_lost(self, error: Exception | None) -> None:
        self.gone.set()


def _terminus(address: str) -> Terminus:
    return Terminus(address=address, durability=Durability.NONE, expiry=Expiry.SESSION_END, capabilities=("queue",))


def _window(round_: str, over: str, ids: bool) -> list[tuple[int, bytes]]:
    def properties(number: int) -> dict[str, str]:
        return {"_AMQ_DUPL_ID": f"{round_}-{number:06d}"} if ids else {}

    return [(n, encode(b"%d" % n, subject=over, application_properties=properties(n))) for n in range(WINDOW)]


async def one(hub: parts.Artemis, address: str, options: argparse.Namespace) -> Found:
    """One window over a connection that is dropped, and over the next one; what the queue holds then."""
    port, dial = hub.port, options.dial
    old, new = Connection(), Connection()
    await old.send_to(port, address)
    if not dial:
        await new.send_to(port, address)
    if options.frozen:
        os.kill(hub.pid, signal.SIGSTOP)
    old.sender.send(_window(address, "old", options.ids))
    await asyncio.sleep(0)  # the flush
    while old.protocol.waiting_bytes:  # noqa: ASYNC110 (nobody tells when the kernel has taken all)
        await asyncio.sleep(0)
    old.protocol.abort()
    if options.wait:
        await asyncio.sleep(options.wait)
    if dial:
        await new.send_to(port, address)
    batch = _window(address, "new", options.ids)
    size = 1 if options.first else WINDOW
    while batch:
        new.sender.send(batch[:size])
        batch = batch[size:]
        if options.frozen and size >= new.sender.unsettled:
            await asyncio.sleep(0.01)
            os.kill(hub.pid, signal.SIGCONT)
        await new.until(lambda: not new.sender.unsettled)
        size = WINDOW if options.first == "oldest" else size * options.growth
    new.protocol.close()

    reader = Connection()
    engine = await reader.connect(port, "reader")
    receiver = engine.receiver(engine.session(), "reader", _terminus(address), credit=WINDOW)
    receiver.whole_windows = True
    had, since = -1, time.monotonic()
    while len({each.number for each in reader.arrived}) < WINDOW or time.monotonic() - since < QUIET_S:
        if len(reader.arrived) != had:
            had, since = len(reader.arrived), time.monotonic()
        elif time.monotonic() - since > TIMEOUT_S:
            break
        await asyncio.sleep(0.02)
    reader.protocol.close()
    return Found.of(reader.arrived)


def _busy() -> None:
    while True:
        pass


async def campaign(hub: parts.Artemis, options: argparse.Namespace) -> int:
    told: Counter[str] = Counter()
    until = time.monotonic() + options.minutes * 60
    for number in range(options.rounds):
        if time.monotonic() > until:
            break
        found = await one(hub, f"two.{number}", options)
        told["rounds"] += 1
        told["rounds where the old connection brought some"] += 0 < found.old < WINDOW
        told["rounds where the old connection brought all"] += found.old >= WINDOW
        told["rounds out of order"] += bool(found.reordered)
        told["messages out of order"] += len(found.reordered)
        told["rounds with messages twice"] += bool(found.twice)
        told["messages twice"] += found.twice
        told["lost"] += found.lost
        if found.reordered:
            before, after = found.reordered[0]
            print(
                f"round {number}: {len(found.reordered)} out of order; {after.number} ({after.over}) behind "
                f"{before.number} ({before.over}); {found.old} came over the old connection, {found.twice} twice",
                flush=True,
            )
    for what, count in told.items():
        print(f"{count:6d} {what}")
    return 1 if told["rounds out of order"] or told["lost"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--no-ids", dest="ids", action="store_false", help="without _AMQ_DUPL_ID, as kind = generic")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    parser.add_argument("--starved", action="store_true", help="Artemis on one CPU, beside three busy loops")
    parser.add_argument("--dial", action="store_true", help="the second connection is made only after the cut")
    parser.add_argument("--first", choices=["oldest", "few"], help="wait for the oldest one's outcome; of ever more")
    parser.add_argument("--growth", type=int, default=2, help="by how much: 2 as Drain does")
    parser.add_argument("--frozen", action="store_true", help="Artemis is stopped until both have sent")
    parser.add_argument("--loops", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds after the cut")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, parts.Artemis(directory=Path(directory)) as hub:
        loops = (
            [multiprocessing.Process(target=_pinned, daemon=True) for _ in range(options.loops)]
            if options.starved
            else []
        )
        if options.starved:
            for thread in Path(f"/proc/{hub.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {0})
        for loop in loops:
            loop.start()
        try:
            return asyncio.run(campaign(hub, options))
        finally:
            for loop in loops:
                loop.kill()


def _pinned() -> None:
    os.sched_setaffinity(0, {0})
    _busy()


if __name__ == "__main__":
    raise SystemExit(main())
