"""The gateway's neighbours as models: hubs, apps that send, apps that receive. Each does little, and writes it down.

They speak AMQP by the same engine as the gateway, but decide for themselves; what they saw is in a History.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from gateway.amqp import raw
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import (
    Credit,
    Deliveries,
    Event,
    Failed,
    LinkAttached,
    LinkClosed,
    Opened,
    OutcomeKind,
    Settled,
)
from gateway.amqp.sasl import SaslClient, SaslServer
from gateway.amqp.termini import Durability, Expiry, Terminus
from tests.simulation.history import Arrival, History, Place, Reader, Sent, read, written
from tests.simulation.virtual import Net, Process, VirtualLoop

CONDITIONS = ("amqp:precondition-failed", "x:no-such-place", "amqp:decode-error")
BARRED = "undeliverable-here"


@dataclass(slots=True)
class Temper:
    """How a receiver answers: chances of each answer; the rest is accepted. delay_s: until it does, from and to.

    consistent: what comes behind a message that was given back is given back, too, until that one is there again; and
    who has refused a message for good refuses it again.
    """

    rejects: float = 0.0
    releases: float = 0.0
    modifies: float = 0.0
    forgets: float = 0.0  # settles without an outcome
    bars: float = 0.3  # of the modified ones, how many with undeliverable-here
    final_bars: bool = False  # whether that is the last word on a message
    delay_s: tuple[float, float] = (0.0, 0.01)
    ordered: bool = True
    consistent: bool = True
    silent_until: float = 0.0


class Answering:
    """Takes messages from a receiver link, and answers them as its temper has it."""

    def __init__(
        self,
        loop: VirtualLoop,
        random: Random,
        temper: Temper,
        history: History,
        arrivals: list[Arrival],
        link: int,
        credit: int,
        refused: dict[str, str],
    ) -> None:
        """`refused`: payloads that were rejected or barred, and with which condition; shared by all of one mind."""
        self.loop = loop
        self.history = history
        self.random = random
        self.temper = temper
        self.arrivals = arrivals
        self.link = link
        self.credit = credit
        self.refused = refused
        self.waiting_for: str | None = None
        self._behind: deque[str] = deque()  # given back since, because it must come first
        self._latest = 0.0
        self._moments = itertools.count()

    def take(self, receiver: Receiver, batch: list[tuple[int, bytes]], flush: Callable[[], None]) -> None:
        for handle, body in batch:
            letter = read(body)
            payload = letter.payload
            place = None if letter.identity is None else Place.of(letter.identity)
            arrival = Arrival(self.link, self.history.life, place, payload, self._answer(payload), False)
            arrival.at, arrival.ttl_s, arrival.came = self.loop.now, letter.ttl_s, next(self._moments)
            self.arrivals.append(arrival)
            self.history.stir("arrival")
            failed = False
            match arrival.answer:
                case "accepted":
                    arrival.stored = True
                case "unknown":
                    arrival.stored = self.random.random() < 0.5
                case "rejected":
                    arrival.condition = self.refused.setdefault(payload, self.random.choice(CONDITIONS))
                case "modified":
                    failed = self.random.random() < 0.5
                case "barred":
                    self.refused[payload] = BARRED
            self._soon(receiver, handle, arrival, failed, flush)

    def _over(self, payload: str) -> bool:
        sent = self.history.sent.get(payload)
        return sent is not None and sent.over(self.loop.now)

    def _answer(self, payload: str) -> str:
        temper = self.temper
        before = self.refused.get(payload) if temper.consistent else None
        while self.waiting_for is not None and self._over(self.waiting_for):
            # It need not come any more; the next that was given back comes then.
            self.waiting_for = self._behind.popleft() if self._behind else None
        if self.waiting_for is not None:
            if payload != self.waiting_for:
                if before == BARRED:
                    return "barred"
                self._behind.append(payload)
                return self.random.choice(["released", "modified"])
            self.waiting_for = None
        self._behind.clear()
        if before is not None:
            return "barred" if before == BARRED else "rejected"
        chance = self.random.random()
        for share, answer in (
            (temper.rejects, "rejected"),
            (temper.releases, "released"),
            (temper.modifies, "modified"),
            (temper.forgets, "unknown"),
        ):
            if chance < share:
                if answer == "modified" and temper.final_bars and self.random.random() < temper.bars:
                    return "barred"
                if answer != "rejected" and temper.consistent:
                    self.waiting_for = payload
                return answer
            chance -= share
        return "accepted"

    def _soon(self, receiver: Receiver, handle: int, arrival: Arrival, failed: bool, flush: Callable[[], None]) -> None:
        at = max(self.loop.now + self.random.uniform(*self.temper.delay_s), self.temper.silent_until)
        if self.temper.ordered:
            at = self._latest = max(at, self._latest)
        if at <= self.loop.now:
            self._settle(receiver, handle, arrival, failed, flush)
        else:
            self.loop.call_at(at, self._settle, receiver, handle, arrival, failed, flush)

    def _settle(
        self, receiver: Receiver, handle: int, arrival: Arrival, failed: bool, flush: Callable[[], None]
    ) -> None:
        if not receiver.alive:
            return
        arrival.answered = next(self._moments)
        match arrival.answer:
            case "accepted":
                receiver.accept([handle])
            case "rejected":
                receiver.reject(handle, arrival.condition, "the model says so")
            case "released":
                receiver.release(handle)
            case "modified":
                here = not self.temper.final_bars and self.random.random() < self.temper.bars
                receiver.modify(handle, delivery_failed=failed, undeliverable_here=here)
            case "barred":
                receiver.modify(handle, delivery_failed=failed, undeliverable_here=True)
            case "unknown":
                delivery = receiver._pending.pop(handle, None)
                if delivery is not None:
                    raw.settle(delivery)
        receiver.topup(self.credit)
        flush()


def _only_silent(event: Failed) -> None:
    """A line may fall silent; whatever else a connection fails for, the gateway broke the protocol."""
    assert event.description is not None, f"the gateway broke the protocol: {event}"
    assert "idle-timeout" in event.description, f"the gateway broke the protocol: {event}"


# ------------------------------------------------------------------------------------------------ the hub


@dataclass(eq=False, slots=True)
class _Letter:
    payload: str
    body: bytes
    settled: bool = False


@dataclass(slots=True)
class Store:
    """What a cluster of hubs holds together: one outbox for the gateway, and who reads it now."""

    outbox: list[_Letter] = field(default_factory=list)
    first: int = 0
    reader: HubConnection | None = None
    links: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, payload: str, body: bytes) -> None:
        self.outbox.append(_Letter(payload, body))
        if self.reader is not None:
            self.reader.feed()

    @property
    def empty(self) -> bool:
        return self.first >= len(self.outbox)


class Hub:
    """A hub process on one address. Its messages survive it; its connections do not."""

    def __init__(self, net: Net, random: Random, history: History, store: Store, temper: Temper, address: str) -> None:
        self.net = net
        self.loop = net.loop
        self.random = random
        self.history = history
        self.store = store
        self.temper = temper
        self.address = address
        self.credit = random.choice([1, 3, 10, 40])
        self.process: Process
        self.start()

    def start(self) -> None:
        self.process = Process(self.address)
        self.net.listen(self.address, self.process, self._protocol)

    def _protocol(self) -> AmqpProtocol:
        connection = HubConnection(self)
        return AmqpProtocol(
            lambda transport: Engine(server=True, container="hub", sasl=SaslServer(["ANONYMOUS"]), idle_timeout_s=20.0),
            connection,
            connection.ready,
        )

    def restart(self) -> None:
        self.net.kill(self.process, told=True)
        if self.store.reader is not None and self.store.reader.hub is self:
            self.store.reader = None
        self.start()


class HubConnection:
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.protocol: AmqpProtocol
        self._answering: dict[Receiver, Answering] = {}
        self._sender: Sender | None = None
        self._sent: dict[int, _Letter] = {}
        self._next = 0

    def ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol

    def on_lost(self, error: Exception | None) -> None:
        if self.hub.store.reader is self:
            self.hub.store.reader = None

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Opened():
                    engine.open()
                case LinkAttached(link):
                    self._attached(link)
                case Deliveries(receiver, batch):
                    if receiver in self._answering:
                        self._answering[receiver].take(receiver, batch, self.protocol.schedule_flush)
                case Settled(sender):
                    self._answers(sender)
                    self.feed()
                case Credit():
                    self.feed()
                case Failed():
                    _only_silent(event)
                case _:
                    pass

    def _attached(self, link: Sender | Receiver) -> None:
        hub, store = self.hub, self.hub.store
        link.confirm()
        if isinstance(link, Receiver):
            store.links += 1
            self._answering[link] = Answering(
                hub.loop, hub.random, hub.temper, hub.history, hub.history.hub, store.links, hub.credit, store.refused
            )
            link.topup(hub.credit)
        else:
            old = store.reader
            if old is not None and old._sender is not None:
                old._sender = None  # a stale connection reads no more
            store.reader = self
            self._sender = link
            self._next = store.first
            self.feed()

    def feed(self) -> None:
        store, sender = self.hub.store, self._sender
        if sender is None or store.reader is not self:
            return
        while self._next < len(store.outbox) and sender.capacity > 0:
            letter = store.outbox[self._next]
            if not letter.settled:
                sender.send([(self._next, letter.body)])
                self.hub.history.stir("letter")
                if letter.payload not in self.hub.history.to_gateway:
                    self.hub.history.to_gateway.append(letter.payload)
            self._next += 1
        self.protocol.schedule_flush()

    def _answers(self, sender: Sender) -> None:
        store = self.hub.store
        if sender is not self._sender or store.reader is not self:
            sender.take_outcomes()
            return
        back: int | None = None
        for outcome in sender.take_outcomes():
            if outcome.kind is OutcomeKind.ACCEPTED:
                for at in range(outcome.seq - outcome.count + 1, outcome.seq + 1):
                    letter = store.outbox[at]
                    letter.settled = True
                    self.hub.history.taken.add(letter.payload)
            else:
                assert outcome.kind is OutcomeKind.RELEASED, f"the gateway answered {outcome}"
                back = outcome.seq if back is None else min(back, outcome.seq)
        while store.first < len(store.outbox) and store.outbox[store.first].settled:
            store.first += 1
        if back is not None:
            self._next = min(self._next, back)


# ------------------------------------------------------------------------------------------------ apps


class App:
    """An app at the gateway's AMQP port, which comes back when it is cut off, until `stop`."""

    def __init__(self, net: Net, random: Random, name: str, address: str) -> None:
        self.net = net
        self.loop = net.loop
        self.random = random
        self.name = name
        self.address = address
        self.process = Process(name)
        self.line = net.line(name, address)
        self.protocol: AmqpProtocol | None = None
        self._ended = asyncio.Event()

    def start(self) -> None:
        self.process.run(self._start)

    def _start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        host, port = self.address.split(":")
        while True:
            self._ended.clear()
            try:
                await self.loop.create_connection(lambda: AmqpProtocol(self._engine, self, self._ready), host, port)
                await self._ended.wait()
            except OSError:
                pass
            await asyncio.sleep(self.random.uniform(0.05, 0.5))

    def _engine(self, transport: Any) -> Engine:
        return Engine(server=False, container=self.name, sasl=SaslClient(["ANONYMOUS"]))

    def _ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol
        protocol.engine.open()
        self.connected(protocol.engine)

    def on_lost(self, error: Exception | None) -> None:
        self.protocol = None
        self.disconnected()
        self._ended.set()

    def flush(self) -> None:
        if self.protocol is not None:
            self.protocol.schedule_flush()

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                _only_silent(event)
            self.event(event)

    def connected(self, engine: Engine) -> None:
        raise NotImplementedError

    def disconnected(self) -> None: ...

    def event(self, event: Event) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Habits:
    """How an app sends: how many, how long between two (at most, in seconds), how large, and with which ttl.

    ttls_s: of each message one of these; None: none.
    """

    count: int
    pace_s: float = 0.0
    padding_bytes: tuple[int, int] = (0, 0)
    ttls_s: tuple[float | None, ...] = (None,)


class Producer(App):
    """Sends numbered messages in order; what was not accepted goes again, in a new round, when all answers are in."""

    def __init__(
        self,
        net: Net,
        random: Random,
        name: str,
        address: str,
        topic: str,
        stream: str,
        habits: Habits,
        history: History,
    ) -> None:
        super().__init__(net, random, name, address)
        self.topic = topic
        self.stream = stream
        self.habits = habits
        self.history = history
        self.todo: deque[int] = deque(range(1, habits.count + 1))
        self.round = 0
        self._given_back: list[int] = []
        self._out: dict[int, tuple[int, str]] = {}
        self._tag = 0
        self._sender: Sender | None = None
        self._planned = False

    @property
    def done(self) -> bool:
        return not self.todo and not self._out and not self._given_back

    def connected(self, engine: Engine) -> None:
        self.round += 1
        self._sender = engine.sender(engine.session(), self.name, Terminus(self.topic))

    def disconnected(self) -> None:
        self._sender = None
        self._again()

    def _again(self) -> None:
        """What has no acceptance goes again, before anything newer."""
        again = sorted([*self._given_back, *(number for number, _ in self._out.values())])
        self._given_back = []
        self._out.clear()
        self.todo.extendleft(reversed(again))

    def event(self, event: Event) -> None:
        match event:
            case LinkClosed(_, condition, description):
                raise AssertionError(f"{self.name}: the gateway closed the link: {condition} {description}")
            case Settled(sender):
                self._answers(sender)
                self._go_on()
            case Credit():
                self._go_on()
            case _:
                pass

    def _go_on(self) -> None:
        if not self._planned:
            self._send()

    def _answers(self, sender: Sender) -> None:
        for outcome in sender.take_outcomes():
            for tag in range(outcome.seq - outcome.count + 1, outcome.seq + 1):
                number, payload = self._out.pop(tag)
                if outcome.kind is OutcomeKind.ACCEPTED:
                    self.history.acked.add(payload)
                    self.history.stir("accepted")
                else:
                    assert outcome.kind is OutcomeKind.RELEASED, f"{self.name}: the gateway answered {outcome}"
                    self._given_back.append(number)
        if self._given_back and not self._out:
            self.round += 1
            self._again()

    def _send(self) -> None:
        self._planned = False
        while self._sender is not None and self.todo and not self._given_back and self._sender.capacity > 0:
            number = self.todo.popleft()
            payload = f"{self.name}:{self.round}:{number}"
            self._tag += 1
            self._out[self._tag] = number, payload
            habits, random = self.habits, self.random
            ttl_s = random.choice(habits.ttls_s)
            body = written(payload, ttl_s=ttl_s, padding_bytes=random.randint(*habits.padding_bytes))
            self.history.sent[payload] = Sent(self.stream, self.loop.now, len(body), ttl_s)
            self._sender.send([(self._tag, body)])
            self.flush()
            if habits.pace_s:
                self._planned = True
                self.process.run(self.loop.call_later, random.uniform(0, habits.pace_s), self._send)
                return


class Consumer(App):
    """Receives from an address as a durable subscription, or as one of a queue's receivers."""

    def __init__(
        self,
        net: Net,
        random: Random,
        name: str,
        address: str,
        source: str,
        reader: Reader,
        temper: Temper,
        history: History,
    ) -> None:
        super().__init__(net, random, name, address)
        self.history = history
        self.source = source
        self.reader = reader
        self.temper = temper
        self.credit = random.choice([1, 3, 20])
        self.attached = False
        self._answering: Answering
        self._refused: dict[str, str] = {}

    def connected(self, engine: Engine) -> None:
        if self.reader.exclusive:
            source = Terminus(self.source, Durability.UNSETTLED_STATE, Expiry.NEVER, capabilities=("topic",))
        else:
            source = Terminus(self.source, capabilities=("queue",))
        link = max((a.link for a in self.reader.arrivals), default=0) + 1
        self._answering = Answering(
            self.loop,
            self.random,
            self.temper,
            self.history,
            self.reader.arrivals,
            link,
            self.credit,
            self._refused,
        )
        engine.receiver(engine.session(), self.name, source, credit=self.credit)

    def event(self, event: Event) -> None:
        match event:
            case LinkAttached():
                self.attached = True
            case LinkClosed():
                assert self.protocol is not None
                self.protocol.abort()
            case Deliveries(receiver, batch):
                self._answering.take(receiver, batch, self.flush)
            case _:
                pass
