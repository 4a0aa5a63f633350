"""Lives of MQTT sessions, moved at random: cuts, take-overs, failed commits, crashes; then the books are checked.

Each is nothing but what its seed says. `LONG`: four clients and whatever comes of it; `BRIEF`: one or two, who begin
connected and subscribed, and everything that may go wrong more often.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.groups import GROUP_AHEAD_MAX
from gateway.mqtt.packets import V3, V5
from gateway.sessions import AHEAD_ROWS_MAX
from tests.simulation import newborn
from tests.simulation.mqtt_model import Client, Sent, takes
from tests.simulation.mqtt_world import BEGIN_S, STEPS_MAX, World
from tests.simulation.seeds import again

TRACE_LINES = 60  # of one that failed
FILTERS = ["a/#", "a/+/x", "a/c0/x", "s/#", "up/#", "r/#", "#", "$share/g/s/#", "$share/g/a/#"]
TABLES = [
    "mqtt_session",
    "mqtt_subscription",
    "mqtt_outgoing",
    "mqtt_incoming",
    "mqtt_retained_due",
    "mqtt_will",
    "cursor",
]


# How likely each step is, of those below.
STEPS = {
    "flow": 24,
    "arrive": 10,
    "read": 10,
    "answer": 12,
    "publish": 12,
    "connect": 8,
    "subscribe": 5,
    "unsubscribe": 1,
    "begin": 8,
    "finish": 12,
    "fail": 2,
    "house": 3,
    "time": 3,
    "cut": 3,
    "goodbye": 1,
    "zombie": 2,
    "crash": 1,
    "congestion": 2,
    "uplink": 2,
}


@dataclass(frozen=True, slots=True)
class Focus:
    """What clients are inclined to: the share of messages retained, of connections with a will, and which QoS.

    steps: which are likelier, or less likely, than they are otherwise.
    """

    retain: float = 0.15
    will: float = 0.4
    publish_qos: tuple[int, ...] = (0, 1, 1, 2, 2)
    subscribe_qos: tuple[int, ...] = (0, 1, 2, 2)
    filters: tuple[str, ...] = tuple(FILTERS)
    steps: dict[str, int] = field(default_factory=dict)


ANYTHING = Focus()
FOCI = {
    "anything": ANYTHING,
    "QoS 2": Focus(0.05, 0.1, (1, 2, 2, 2), (1, 2, 2, 2), ("#", "a/#", "s/#", "up/#")),
    "retained": Focus(0.7, 0.1, filters=("#", "r/#", "up/#")),
    # Who comes back at once has its will back.
    "wills": Focus(will=0.9, steps={"connect": 8, "time": 12, "house": 12, "publish": 2}),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """clients: from and to; eager: they begin connected and subscribed; steps: how many of which weight.

    foci: of which each seed has one; crashes: how likely it is that the gateway may crash.
    """

    name: str
    length: int
    clients: tuple[int, int]
    steps: dict[str, int]
    crashes: float = 0.5
    eager: bool = False
    foci: tuple[str, ...] = ("anything",)


LONG = Shape("mqtt", 250, (4, 4), STEPS)
BRIEF = Shape(
    "mqtt-brief",
    50,
    (1, 2),
    STEPS | {"flow": 10, "publish": 18, "connect": 24, "fail": 6, "cut": 6, "zombie": 4, "crash": 4},
    0.8,
    True,
    tuple(FOCI),
)


class Simulation:
    def __init__(self, seed: int, state_dir: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape = LONG) -> None:
        self.seed = seed
        self.shape = shape
        self.random = random.Random(seed)
        self.step_number = 0
        self.trace: list[str] = []
        self.told: Counter[str] = Counter()
        self.world = World(state_dir, monkeypatch)
        chance = self.random.random
        # What may go wrong in this run.
        self.crashes = chance() < shape.crashes
        self.failing = chance() < 0.3
        self.cuts = chance() < 0.9
        self.ordered = chance() < 0.5
        self.messages: list[Sent] = []
        self.zombies: list[object] = []
        self.will_count = 0
        self.focus, few, most = ANYTHING, *shape.clients
        if shape.eager:
            name = self.random.choice(shape.foci)
            self.trace.append(f"0 {name}")
            self.focus, few = FOCI[name], self.random.randint(few, most)
        self.clients = [self._client(f"c{n}") for n in range(few)]
        self.eye = Client("eye", V5, True, 100_000, 1000, 0, self.world, lambda: self.step_number)
        self.everybody = [*self.clients, self.eye]
        self._open_eye()

    def _client(self, name: str) -> Client:
        rng = self.random
        version = rng.choice([V3, V5])
        durable = rng.random() < 0.75
        expiry_s = 30 * 86400 if version == V3 else rng.choice([30, 1000])
        return Client(
            name,
            version,
            durable,
            expiry_s,
            rng.choice([1, 2, 5, 100]),
            rng.choice([0, 0, 2]),
            self.world,
            lambda: self.step_number,
        )

    def _open_eye(self) -> None:
        self.eye.connect(clean=False)
        self.exchange()
        self.eye.subscribe([("w/#", 2)])
        self.exchange()
        assert self.eye.held[0].since is not None

    # ------------------------------------------------------------------ steps

    def run(self) -> None:
        if self.shape.eager:
            self._begin()
        steps: dict[str, Callable[[], str | None]] = {
            "flow": self.step_flow,
            "arrive": self.step_arrive,
            "read": self.step_read,
            "answer": self.step_answer,
            "publish": self.step_publish,
            "connect": self.step_connect,
            "subscribe": self.step_subscribe,
            "unsubscribe": self.step_unsubscribe,
            "begin": self.step_begin,
            "finish": self.step_finish,
            "fail": self.step_fail,
            "house": self.step_house,
            "time": self.step_time,
            "cut": self.step_cut,
            "goodbye": self.step_goodbye,
            "zombie": self.step_zombie,
            "crash": self.step_crash,
            "congestion": self.step_congestion,
            "uplink": self.step_uplink,
        }
        chosen = self.shape.steps | self.focus.steps
        names, weights = list(chosen), list(chosen.values())
        for _ in range(self.shape.length):
            self.step_number += 1
            (name,) = self.random.choices(names, weights)
            told = steps[name]()
            if told is not None:
                self.told[name] += 1
                self.trace.append(f"{self.step_number} {told}")
            self.after_step()
        self.quiesce()
        self.check()
        self.end_all()

    def _begin(self) -> None:
        """Everybody is connected, and subscribed to something."""
        for client in self.clients:
            told = self._connect(client, clean=False)
            self.exchange()
            self.trace.append(f"0 {told}, {self._subscribe(client)}")
            self.exchange()

    @property
    def hours(self) -> float:
        """How much time has passed in it."""
        return (self.world.now - BEGIN_S) / 3600

    def account(self) -> list[str]:
        """All that happened, and what everybody got: of two runs of a seed, the same."""
        return [*self.trace, *(repr(got) for client in self.everybody for got in client.log)]

    def after_step(self) -> None:
        self.world.loop.run()
        for client in self.everybody:
            client.look_after_wills()
        broker = self.world.broker
        for session in broker.sessions.values():
            assert len(session.sent) <= 20, f"{session.client_id}: {len(session.sent)} under way"
            for feed in session.feeds.values():
                assert len(feed.order) <= AHEAD_ROWS_MAX + 20
        for share in broker.shares.values():
            for group in share.feeds.values():
                assert group.ahead <= GROUP_AHEAD_MAX

    def pick(self, *, up: bool = True) -> Client | None:
        among = [c for c in self.everybody if c.wire is not None and not c.wire.closing and (c.up or not up)]
        return self.random.choice(among) if among else None

    def step_flow(self) -> str | None:
        """Everything goes well for a client for a while."""
        client = self.pick(up=False)
        if client is None or client.wire is None:
            return None
        for _ in range(2):
            client.wire.arrive(100)
            self.world.begin()
            self.world.finish()
            self.world.loop.run()
            client.read(100)
            if self.random.random() < 0.7:
                client.answer(lambda n: 0, 100)
        return f"all is well for {client.name}"

    def step_arrive(self) -> str | None:
        client = self.pick(up=False)
        if client is None or client.wire is None or not client.wire.to_gateway:
            return None
        count = self.random.randint(1, 4)
        client.wire.arrive(count)
        return f"{client.name}: {count} packets arrive"

    def step_read(self) -> str | None:
        client = self.pick(up=False)
        if client is None:
            return None
        count = client.read(self.random.randint(1, 6))
        return f"{client.name} reads {count}" if count else None

    def step_answer(self) -> str | None:
        client = self.pick()
        if client is None or not client.answers:
            return None
        count = self.random.randint(1, 4)
        in_order = self.ordered or self.random.random() < 0.7
        client.answer((lambda n: 0) if in_order else self.random.randrange, count)
        return f"{client.name} answers {count}, {'in order' if in_order else 'in any order'}"

    def step_publish(self) -> str | None:
        client = self.pick()
        if client is None or client is self.eye:
            return None
        topic = self.random.choice(
            [f"a/{client.name}/x", f"a/{client.name}/y", f"s/{client.name}", f"up/{client.name}"]
        )
        retain = self.random.random() < self.focus.retain
        if retain:
            topic = self.random.choice([f"r/{client.name}/a", f"up/r/{client.name}"])
        told = f"{client.name} publishes"
        for _ in range(self.random.randint(1, 3)):
            qos = self.random.choice(self.focus.publish_qos)
            empty = retain and self.random.random() < 0.2
            message = client.publish(topic, qos, retain, empty=empty)
            if message is not None:
                self.messages.append(message)
                told += f" {message.payload!r} on {topic} at QoS {qos}{' retained' if retain else ''}"
        return told

    def step_connect(self) -> str | None:
        among = [c for c in self.everybody if c.wire is None or c.wire.closing or self.random.random() < 0.08]
        if not among:
            return None
        client = self.random.choice(among)
        if client.wire is not None:
            self.leave_behind(client)
        return self._connect(client, clean=client is not self.eye and self.random.random() < 0.1)

    def _connect(self, client: Client, *, clean: bool) -> str:
        will = None
        if client is not self.eye and self.random.random() < self.focus.will:
            self.will_count += 1
            will = (b"will:%d" % self.will_count, 2, self.random.choice([0, 0, 5]), False)
        client.connect(clean=clean, will=will)
        return f"{client.name} connects{' clean' if client.clean else ''}{f' with {will[0]!r}' if will else ''}"

    def leave_behind(self, client: Client) -> None:
        """Its connection stays open a while for all that the gateway knows."""
        assert client.wire is not None
        client.wire.arrive(self.random.randint(0, 4))
        client.wire.to_gateway.clear()
        self.zombies.append(client.wire)
        client.forget_connection()

    def step_subscribe(self) -> str | None:
        client = self.pick()
        if client is None or client is self.eye:
            return None
        return self._subscribe(client)

    def _subscribe(self, client: Client) -> str | None:
        filters = [
            (self.random.choice(self.focus.filters), self.random.choice(self.focus.subscribe_qos))
            for _ in range(self.random.randint(1, 2))
        ]
        if client.version == V3:
            filters = [each for each in filters if not each[0].startswith("$share")]
        if not filters:
            return None
        client.subscribe(filters)
        return f"{client.name} subscribes to {filters}"

    def step_unsubscribe(self) -> str | None:
        client = self.pick()
        if client is None or client is self.eye:
            return None
        filters = [sub.filter for sub in client.held if sub.until is None]
        if not filters:
            return None
        filter_ = self.random.choice(filters)
        client.unsubscribe(filter_)
        return f"{client.name} unsubscribes from {filter_}"

    def step_begin(self) -> str | None:
        if self.world.committing or not self.world.journal.pending:
            return None
        self.world.begin()
        return "a commit begins"

    def step_finish(self) -> str | None:
        if not self.world.committing:
            return None
        self.world.finish()
        return "the commit is done"

    def step_fail(self) -> str | None:
        if not self.failing or not self.world.committing:
            self.world.recover()
            return None
        no_space = self.random.random() < 0.5
        self.world.fail(no_space=no_space)
        return f"the commit fails{', no space' if no_space else ''}"

    def step_house(self) -> str:
        self.world.recover()
        self.world.write_cursors()
        self.world.keep_house()
        return "housekeeping"

    def step_time(self) -> str:
        seconds = self.random.choice([0.3, 1.0, 4.0, 20.0])
        self.world.advance(seconds)
        return f"{seconds} s pass"

    def step_cut(self) -> str | None:
        client = self.pick(up=False)
        if client is None or not self.cuts:
            return None
        assert client.wire is not None
        client.wire.arrive(self.random.randint(0, 6))
        client.read(self.random.randint(0, 6))
        client.wire.to_gateway.clear()
        if self.random.random() < 0.6:
            client.wire.lose()
        else:
            self.zombies.append(client.wire)
        client.forget_connection()
        return f"{client.name} is cut off"

    def step_zombie(self) -> str | None:
        if not self.zombies:
            return None
        wire = self.zombies.pop(self.random.randrange(len(self.zombies)))
        wire.lose()  # type: ignore[attr-defined]
        return "an old connection ends"

    def step_goodbye(self) -> str | None:
        client = self.pick()
        if client is None:
            return None
        assert client.wire is not None
        client.goodbye()
        client.wire.arrive(100)
        self.zombies.append(client.wire)
        client.forget_connection()
        return f"{client.name} says goodbye"

    def step_congestion(self) -> str | None:
        client = self.pick()
        if client is None:
            return None
        assert client.wire is not None
        if client.wire.closing:
            return None
        if client.wire.client._congested:
            client.wire.client.resume_writing()
            return f"{client.name} takes more"
        client.wire.client.pause_writing()
        return f"{client.name} is congested"

    def step_uplink(self) -> str:
        stream = self.world.journal.streams["up"]
        cursor = stream.cursors["uplink"]
        position = self.random.randint(cursor.position, stream.committed)
        self.world.journal.advance(stream, cursor, position)
        return f"the hub settles up to {position}"

    def step_crash(self) -> str | None:
        if not self.crashes or self.random.random() < 0.3:
            return None
        committed = self.random.random() < 0.5
        self.world.crash(committed=committed)
        self.zombies.clear()
        told = {got.payload for got in self.eye.log}
        for client in self.everybody:
            client.crashed()
            for will in client.wills:
                # Its publication may not have been committed; after a restart the client has time to come back.
                # Nor may its goodbye: nothing acknowledges a DISCONNECT.
                untold = will.fate == "must" and will.payload not in told
                if untold or (will.fate == "not" and will.goodbye):
                    will.fate = "either"
        return f"CRASH{', the commit was on disk' if committed else ''}"

    # ------------------------------------------------------------------ until nothing moves

    def exchange(self) -> None:
        """Everything that there is to say is said."""
        world = self.world
        for _ in range(STEPS_MAX):
            world.loop.run()
            moved = bool(world.journal.pending)
            world.commit_all()
            for client in self.everybody:
                if client.wire is not None:
                    if client.wire.client._congested and not client.wire.closing:
                        client.wire.client.resume_writing()
                    moved = moved or bool(client.wire.to_gateway and not client.wire.closing and not client.wire.paused)
                    client.wire.arrive(1000)
                    moved = bool(client.read(1000)) or moved
                    moved = moved or bool(client.answers)
                    client.answer(lambda n: 0, 1000)
            if not moved:
                return
        raise AssertionError("it goes on for ever")

    def quiesce(self) -> None:
        self.trace.append("quiesce")
        world = self.world
        world.commit_all()
        while self.zombies:
            self.step_zombie()
        self.after_step()
        if self.shape.eager and self.random.random() < 0.5:
            # Whoever is away stays away for a while, as wills have it.
            world.advance(20.0)
            world.keep_house()
        for round_ in range(6):
            for client in self.everybody:
                if client.wire is None or client.wire.closing:
                    client.forget_connection()
                    client.connect(clean=False)
            self.exchange()
            world.advance(1.0)  # who was held tries again
            self.exchange()
            if round_ == 2:
                world.advance(40.0)
            world.write_cursors()
            world.keep_house()
            self.exchange()
            for client in self.everybody:
                client.look_after_wills()
        stream = world.journal.streams["up"]
        world.journal.advance(stream, stream.cursors["uplink"], stream.committed)
        for _ in range(3):
            world.write_cursors()
            world.keep_house()
            self.exchange()

    # ------------------------------------------------------------------ the books

    def check(self) -> None:
        for client in self.everybody:
            assert client.up
            assert not client.out, f"{client.name} has unfinished messages: {client.out}"
            assert not client.store, f"{client.name} was not told to release {client.store}"
            self.check_subscriber(client)
        self.check_shared()
        self.check_retained()
        self.check_wills()
        self.check_journal()

    def check_subscriber(self, client: Client) -> None:
        topics = {message.payload: message.topic for message in self.messages if message.payload}
        for heard in client.log:
            assert heard.topic == topics.get(heard.payload, heard.topic), f"{client.name} got {heard} on a wrong topic"
        for epoch in range(client.epoch + 1):
            got = client.counts(epoch)
            asked = [sub for sub in client.held if sub.epoch == epoch]
            plain = [sub for sub in asked if not sub.shared]
            connections = {g.connection for g in client.log if g.epoch == epoch}
            for message in self.messages:
                if not message.payload:
                    continue
                matching = [sub for sub in asked if takes(sub.inner, message.topic)]
                count = got[message.payload]
                about = f"{client.name} got {message.payload!r} (QoS {message.qos}) {count} times"
                if not matching:
                    assert not count, about
                    continue
                if any(sub.shared for sub in matching):
                    continue  # what members have among them is counted elsewhere
                qos = max(sub.qos for sub in matching)
                if message.qos == 0 or qos == 0:
                    most = message.times * (1 + self.world.crashes)
                elif message.qos == 2 and min(sub.qos for sub in matching) == 2:
                    most = 1
                else:
                    most = message.times * (len(connections) + self.world.crashes)
                    if message.qos == 2:
                        most = len(connections)
                assert count <= most, f"{about}, at most {most}"
                must = [
                    sub
                    for sub in plain
                    if sub in matching
                    and sub.until is None
                    and sub.qos
                    and sub.since is not None
                    and sub.since < message.first_at
                ]
                if epoch == client.epoch and client.durable and must and message.acked_at and message.qos:
                    assert count, f"{about}, subscribed since {must[0].since}, published at {message.first_at}"
            if not self.failing:
                self.check_order(client, epoch)

    def check_order(self, client: Client, epoch: int) -> None:
        """First deliveries, by publisher and topic: nothing is overtaken (MQTT-4.6.0-6)."""
        known = {message.payload: message for message in self.messages if message.payload}
        shared = [sub.inner for sub in client.held if sub.epoch == epoch and sub.shared]
        newest: dict[tuple[str, str], int] = {}
        seen: set[bytes] = set()
        for got in client.log:
            message = known.get(got.payload)
            if got.epoch != epoch or got.retain or message is None or got.payload in seen:
                continue
            if any(takes(filter_, got.topic) for filter_ in shared):
                continue
            seen.add(got.payload)
            if not got.qos and (self.world.crashes or message.times > 1):
                continue  # what was sent twice comes twice, perhaps as news: the first one was of QoS 0 and got lost
            held = [sub for sub in client.held if sub.epoch == epoch and takes(sub.inner, got.topic)]
            begun = min((sub.since for sub in held if sub.since is not None), default=0)
            unsure = any(sub.since is None for sub in held)  # its client never heard whether it was subscribed
            if message.times > 1 and (message.first_at <= begun or unsure):
                continue  # the first one came before the subscription, and the repeat is not the gateway's
            key = message.publisher, message.topic
            assert message.number > newest.get(key, 0), (
                f"{client.name} got {message.payload!r} after {newest[key]} of {key}"
            )
            newest[key] = message.number

    def check_shared(self) -> None:
        """A group that was never without a subscription of a durable client got everything, whoever of it did."""
        for filter_ in [f for f in FILTERS if f.startswith("$share")]:
            members = [(c, sub) for c in self.everybody for sub in c.held if sub.filter == filter_]
            lasting = [
                sub
                for c, sub in members
                if c.durable and sub.until is None and sub.since is not None and sub.qos and sub.epoch == c.epoch
            ]
            if not lasting:
                continue
            since = min(sub.since or 0 for sub in lasting)
            got: Counter[bytes] = Counter()
            for client in self.everybody:
                got.update(g.payload for g in client.log if not g.retain)
            others = {c.name for c in self.everybody for sub in c.held if not sub.shared}
            ends = sum(c.connections for c in self.everybody) + self.world.crashes * 10
            for message in self.messages:
                if not takes(filter_.split("/", 2)[2], message.topic) or not message.acked_at or not message.payload:
                    continue
                # A member of QoS 0 may have been given it and cut off.
                if message.first_at > since and not any(sub.qos == 0 for _, sub in members):
                    assert got[message.payload], f"nobody of {filter_} got {message.payload!r}"
                if not others:
                    groups = sum(takes(f.split("/", 2)[2], message.topic) for f in FILTERS if f.startswith("$share"))
                    assert got[message.payload] <= (message.times + ends) * groups

    def check_retained(self) -> None:
        if self.failing:
            return
        expected: dict[str, set[bytes]] = {}
        for message in self.messages:
            if message.retain:
                among = expected.setdefault(message.topic, {b""})
                if message.acked_at is not None and not message.unsure:
                    among.clear()
                among.add(message.payload)
                # Sent again after something of QoS 0 that followed it, it is the newest again.
        (other,) = [Client("late", V5, False, 0, 100, 0, self.world, lambda: self.step_number)]
        self.everybody.append(other)
        other.connect(clean=True)
        self.exchange()
        other.subscribe([("#", 1)])
        self.exchange()
        found = {g.topic: g.payload for g in other.log}
        assert len(found) == len(other.log)
        assert all(g.retain for g in other.log)
        for topic in expected.keys() | found.keys():
            candidates = expected.get(topic, set()) | {
                m.payload for m in self.messages if m.topic == topic and m.retain and (m.times > 1 or m.unsure)
            }
            assert found.get(topic, b"") in candidates, f"{topic}: {found.get(topic)!r} retained, not of {candidates}"
        self.everybody.remove(other)
        other.goodbye()
        assert other.wire is not None
        other.wire.arrive(10)
        self.exchange()

    def check_wills(self) -> None:
        got = Counter(g.payload for g in self.eye.log)
        for client in self.clients:
            for will in client.wills:
                count = got[will.payload]
                fate = will.fate
                if fate is None:
                    if will.wire is client.wire:
                        fate = "not"
                    else:
                        fate = "must" if will.lost_at_s is not None else "either"
                about = f"{client.name}: {will.payload!r} was published {count} times: {fate}"
                if fate == "must" and not self.failing:
                    assert count == 1, about
                elif fate == "not":
                    assert count == 0, about
                else:
                    assert count <= 1, about

    def check_journal(self) -> None:
        journal = self.world.journal
        for stream in journal.streams.values():
            for cursor in stream.cursors.values():
                assert cursor.position >= stream.committed, f"{cursor} in {stream.name} is not at {stream.committed}"
                assert cursor.durable >= stream.committed
        assert journal.query("SELECT count(*) FROM message") == [(0,)]
        for table in ("mqtt_outgoing", "mqtt_incoming", "mqtt_retained_due"):
            assert not journal.query(f"SELECT * FROM {table}"), table
        for session in self.world.broker.sessions.values():
            assert not session.sent
            assert not session.incoming
            assert not session.due
            assert not any(feed.order or feed.again for feed in session.feeds.values())
            assert not session._due_sent
            assert not session._due_again
        for client in self.everybody:
            assert client.wire is not None
            conn = client.wire.client._conn
            assert not conn._in_flight
            assert not conn._unreleased
            assert conn.unacknowledged == 0 or conn.version == V3

    def end_all(self) -> None:
        """Sessions leave nothing behind."""
        for client in self.everybody:
            client.goodbye()
            assert client.wire is not None
            client.wire.arrive(10)
            client.forget_connection()
            client.durable = False
            client.connect(clean=True)
        self.exchange()
        for client in self.everybody:
            client.goodbye()
            assert client.wire is not None
            client.wire.arrive(10)
            client.forget_connection()
        self.world.advance(60.0)
        self.world.keep_house()
        self.exchange()
        broker = self.world.broker
        assert not broker.sessions
        assert not broker.shares
        assert not len(broker._tree)
        assert len(broker.wills._by_client) == 0
        for table in TABLES:
            rows = self.world.journal.query(f"SELECT * FROM {table}")
            assert len(rows) == (1 if table == "cursor" else 0), f"{table}: {rows}"
        assert all(not wire.client.session for wire in self.world.wires)


def live(shape: Shape, seed: int, directory: Path) -> Simulation:
    """One seed, from birth to judgement, in `directory`, which is its own. Raises with its last steps printed."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        newborn.lay(directory)
        simulation = Simulation(seed, directory, patch, shape)
        try:
            simulation.run()
        except BaseException as error:
            for line in simulation.trace[-TRACE_LINES:]:
                print(line)
            error.add_note(f"seed {seed} of {shape.name}; {again(shape.name, seed)} runs it again")
            raise
        finally:
            simulation.world.close()
    return simulation
