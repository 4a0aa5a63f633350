"""Model clients that do exactly what the standard demands of a client, and what they must have been given in the end.

Knows the packets and nothing of the gateway's inside. A client keeps what it sent until it is acknowledged, sends it
again with DUP after a reconnect, and stores the ids of QoS 2 messages until their PUBREL (MQTT 5.0 §4.3.3, method A).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.mqtt.packets import (
    V5,
    Connack,
    Connect,
    ConnectProperties,
    Disconnect,
    Packet,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
    WillProperties,
)
from gateway.wills import RESTART_GRACE_S
from tests.simulation.mqtt_world import RECEIVE_MAXIMUM, SEND_WINDOW, Wire, World


@dataclass(eq=False)
class Sent:
    """An application message. Times are steps of the simulation."""

    publisher: str
    number: int
    topic: str
    qos: int
    retain: bool
    payload: bytes
    first_at: int
    times: int = 1
    released: bool = False
    acked_at: int | None = None
    refused: bool = False
    unsure: bool = False  # its publisher lost its session, or it was of QoS 0


@dataclass(eq=False)
class Held:
    """A subscription as its client knows it."""

    filter: str
    qos: int
    epoch: int
    since: int | None = None
    until: int | None = None

    @property
    def shared(self) -> bool:
        return self.filter.startswith("$share/")

    @property
    def inner(self) -> str:
        return self.filter.split("/", 2)[2] if self.shared else self.filter


@dataclass(eq=False)
class LastWill:
    payload: bytes
    delay_s: int
    wire: Wire
    connection: int
    accepted: bool = False
    goodbye: bool = False
    lost_at_s: float | None = None
    crashed_at_s: float | None = None  # it was connected then
    fate: str | None = None  # "must", "not", "either"


@dataclass(frozen=True)
class Got:
    payload: bytes
    topic: str
    qos: int
    retain: bool
    epoch: int
    connection: int


def takes(filter_: str, topic: str) -> bool:
    """The standard's own words (§4.7), level by level."""
    wanted, have = filter_.split("/"), topic.split("/")
    for n, level in enumerate(wanted):
        if level == "#":
            return True
        if n >= len(have) or level not in ("+", have[n]):
            return False
    return len(wanted) == len(have)


@dataclass(eq=False)
class Client:
    name: str
    version: int
    durable: bool
    expiry_s: int
    receive_maximum: int
    alias_maximum: int
    world: World
    now: Callable[[], int]
    wire: Wire | None = None
    up: bool = False
    clean: bool = False  # asked with the CONNECT that is under way
    must_be_clean: bool = False
    epoch: int = 0
    connections: int = 0
    _kept_at_s: float = 0.0  # when the gateway had last looked what was due, at the time of the CONNECT
    alive_until_s: float | None = None
    out: dict[int, Sent] = field(default_factory=dict)
    store: dict[int, bytes] = field(default_factory=dict)
    answers: list[Packet] = field(default_factory=list)
    log: list[Got] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    asked: dict[int, tuple[Held, ...]] = field(default_factory=dict)
    leaving: set[int] = field(default_factory=set)
    wills: list[LastWill] = field(default_factory=list)
    cleanly: set[int] = field(default_factory=set)
    next_id: int = 1
    count: int = 0
    topics: dict[int, str] = field(default_factory=dict)
    # what the gateway wrote on the connection there is
    opened: bool = False
    in_flight: set[int] = field(default_factory=set)
    sending: set[int] = field(default_factory=set)
    begun: dict[bytes, int] = field(default_factory=dict)  # payload to the connection it was written on first

    # ------------------------------------------------------------------ what the gateway writes, as it is written

    def judge(self, connection: int, packet: Packet) -> None:
        first = connection
        if isinstance(packet, Publish) and packet.qos:
            first = self.begun.setdefault(packet.payload, connection)
        if isinstance(packet, Connack) and packet.reason == 0:
            for will in self.wills:
                if will.connection == connection:
                    will.accepted = True
                elif will.connection < connection and will.fate is None:
                    self._decide(will, packet.session_present, connection)
        if connection != self.connections or self.wire is None:
            return  # left behind
        if not self.opened:
            assert isinstance(packet, Connack), f"{packet} before CONNACK"
            self.opened = True
            return
        assert not isinstance(packet, Connack), "a second CONNACK"
        if isinstance(packet, Pubrel):
            self.in_flight.add(packet.packet_id)
        if not isinstance(packet, Publish) or not packet.qos:
            return
        assert packet.packet_id not in self.in_flight, f"{self.name}: packet id {packet.packet_id} is in flight"
        self.in_flight.add(packet.packet_id)
        self.sending.add(packet.packet_id)
        most = min(SEND_WINDOW, self.receive_maximum if self.version == V5 else SEND_WINDOW)
        assert len(self.sending) <= most, f"{self.name}: {len(self.sending)} in flight, receive maximum {most}"
        # After a crash it can't tell what it had meant to send from what it sent.
        assert not packet.dup or first < connection or self.world.crashes, (
            f"{self.name}: DUP on a first delivery of {packet.payload!r}"
        )

    def _decide(self, will: LastWill, present: bool, connection: int) -> None:
        if will.crashed_at_s is not None:
            due_s = will.crashed_at_s + max(will.delay_s, RESTART_GRACE_S)
            late = connection == will.connection + 1 and self._kept_at_s > due_s
            will.fate = "must" if late else "either"
            return
        if will.lost_at_s is None:  # the connection it was for is being taken over
            will.lost_at_s = self.world.now
        left_s = will.lost_at_s + will.delay_s - self.world.now
        if will.delay_s and any(n not in self.cleanly for n in range(will.connection + 1, connection)):
            will.fate = "either"  # one that had no CONNACK may have been in time
        elif not present or not will.delay_s:
            will.fate = "must" if will.accepted else "either"
        elif left_s > 1 and will.accepted:
            will.fate = "not"
        else:
            will.fate = "either"

    # ------------------------------------------------------------------ connections

    def connect(self, *, clean: bool, will: tuple[bytes, int, int, bool] | None = None) -> None:
        """`will`: payload, QoS, delay, retain."""
        self.forget_connection()
        self._kept_at_s = self.world.kept_at
        self.connections += 1
        connection = self.connections
        # What may be over on the other side is begun anew: the CONNACK that says so may be lost, and the next does not.
        over = self.alive_until_s is not None and self.world.now >= self.alive_until_s - 5
        self.clean = clean or over or self.must_be_clean or not self.durable
        self.must_be_clean = self.must_be_clean or self.clean
        if self.clean or self.alive_until_s is None:
            self._lose_session()
        testament = None
        if will is not None:
            properties = WillProperties(will_delay_interval=will[2] or None) if self.version == V5 else WillProperties()
            testament = Will(f"w/{self.name}", will[0], will[1], will[3], properties)
        properties_ = ConnectProperties()
        if self.version == V5:
            properties_ = ConnectProperties(
                session_expiry_interval=self.expiry_s if self.durable else None,
                receive_maximum=self.receive_maximum,
                topic_alias_maximum=self.alias_maximum or None,
            )
        if self.clean:
            self.cleanly.add(connection)
        self.wire = self.world.connect(self.version, lambda packet: self.judge(connection, packet))
        if testament is not None:
            assert will is not None
            self.wills.append(
                LastWill(will[0], will[2] if self.version == V5 and self.durable else 0, self.wire, connection)
            )
        self.wire.send(Connect(self.version, self.name, self.clean, 0, will=testament, properties=properties_))

    def forget_connection(self) -> None:
        """What belongs to a connection goes with it; what belongs to the session stays."""
        if self.up and self.alive_until_s is not None:
            self.alive_until_s = self.world.now + self.expiry_s
        self.wire = None
        self.up = self.opened = False
        self.answers.clear()
        self.in_flight.clear()
        self.sending.clear()
        self.topics.clear()
        for subs in self.asked.values():
            for sub in subs:
                sub.until = self.now()  # nobody can say whether it is
        self.asked.clear()
        self.leaving.clear()

    def _lose_session(self) -> None:
        self.epoch += 1
        self.alive_until_s = None
        for message in self.out.values():
            message.unsure = True
        self.out.clear()
        self.store.clear()
        for sub in self.held:
            if sub.until is None:
                sub.until = self.now()

    @property
    def keeps(self) -> bool:
        """Whether the session that is there outlives the connection."""
        return self.durable and (self.version == V5 or not self.clean)

    # ------------------------------------------------------------------ reading

    def read(self, count: int) -> int:
        done = 0
        while done < count and self.wire is not None and self.wire.to_client:
            self._take(self.wire.to_client.popleft())
            done += 1
        return done

    def _take(self, packet: Packet) -> None:
        assert self.wire is not None
        match packet:
            case Connack():
                self._connected(packet)
            case Publish():
                self._published(packet)
            case Puback():
                message = self.out.pop(packet.packet_id)
                assert message.qos == 1
                self._stored(message, packet.reason)
            case Pubrec():
                message = self.out[packet.packet_id]
                assert message.qos == 2
                if packet.reason >= 0x80:
                    del self.out[packet.packet_id]
                    message.refused = True
                else:
                    self._stored(message, packet.reason)
                    message.released = True
                    self.answers.append(Pubrel(packet.packet_id))
            case Pubcomp():
                if packet.packet_id in self.out:
                    assert self.out[packet.packet_id].released, "PUBCOMP before PUBREC"
                    del self.out[packet.packet_id]
            case Pubrel():
                self.store.pop(packet.packet_id, None)
                self.answers.append(Pubcomp(packet.packet_id))
            case Suback():
                for sub, reason in zip(self.asked.pop(packet.packet_id), packet.reasons, strict=True):
                    assert reason <= sub.qos
                    sub.qos = reason
                    sub.since = self.now()
            case Unsuback():
                self.leaving.remove(packet.packet_id)
            case Disconnect():
                pass
            case _:
                raise AssertionError(f"{packet} to a client")

    def _connected(self, packet: Connack) -> None:
        assert packet.reason == 0, packet
        assert not (packet.session_present and self.clean)
        if self.alive_until_s is not None and not self.clean and self.world.now < self.alive_until_s - 5:
            assert packet.session_present, f"{self.name}: its session is gone"
        self.up = True
        self.must_be_clean = False
        if not packet.session_present and not self.clean:
            self._lose_session()
        # A clean session of 3.1.1 has to be begun anew without the flag to last.
        self.alive_until_s = float("inf") if self.keeps else None
        assert self.wire is not None
        for number, message in self.out.items():
            if message.released:
                self.wire.send(Pubrel(number))
            else:
                message.times += 1
                self.wire.send(Publish(message.topic, message.payload, message.qos, message.retain, True, number))

    def _stored(self, message: Sent, reason: int) -> None:
        if reason >= 0x80:
            message.refused = True
        elif message.acked_at is None:
            message.acked_at = self.now()

    def _published(self, packet: Publish) -> None:
        topic = packet.topic
        if packet.properties.topic_alias is not None:
            if topic:
                self.topics[packet.properties.topic_alias] = topic
            topic = self.topics[packet.properties.topic_alias]
        if packet.qos == 2:
            known = self.store.get(packet.packet_id)
            assert known in (None, packet.payload), (
                f"{self.name}: id {packet.packet_id} used again for {packet.payload!r} before {known!r} was released"
            )
            self.answers.append(Pubrec(packet.packet_id))
            if known is not None:
                return
            self.store[packet.packet_id] = packet.payload
        elif packet.qos:
            self.answers.append(Puback(packet.packet_id))
        self.log.append(Got(packet.payload, topic, packet.qos, packet.retain, self.epoch, self.connections))

    # ------------------------------------------------------------------ sending

    def answer(self, choose: Callable[[int], int], count: int) -> None:
        """Send some of the answers that are due, in the order `choose` takes them."""
        while count and self.answers and self.wire is not None:
            packet = self.answers.pop(choose(len(self.answers)))
            if isinstance(packet, Puback | Pubcomp):
                self.in_flight.discard(packet.packet_id)
                self.sending.discard(packet.packet_id)
            self.wire.send(packet)
            count -= 1

    def _id(self) -> int:
        while self.next_id in self.out or self.next_id in self.asked or self.next_id in self.leaving:
            self.next_id = self.next_id % 20 + 1  # so few that ids are used again soon
        number = self.next_id
        self.next_id = self.next_id % 20 + 1
        return number

    def publish(self, topic: str, qos: int, retain: bool, *, empty: bool = False) -> Sent | None:
        assert self.wire is not None
        assert self.up
        if qos and len(self.out) >= RECEIVE_MAXIMUM:
            return None
        self.count += 1
        payload = b"" if empty else b"%s:%d" % (self.name.encode(), self.count)
        message = Sent(self.name, self.count, topic, qos, retain, payload, self.now(), unsure=not qos)
        number = 0
        if qos:
            number = self._id()
            self.out[number] = message
        self.wire.send(Publish(topic, payload, qos, retain, False, number))
        return message

    def subscribe(self, filters: list[tuple[str, int]]) -> None:
        assert self.wire is not None
        assert self.up
        number = self._id()
        subs = []
        for filter_, qos in filters:
            for sub in self.held:
                if sub.filter == filter_ and sub.until is None:
                    sub.until = self.now()  # replaced
            subs.append(Held(filter_, qos, self.epoch))
            self.held.append(subs[-1])
        self.asked[number] = tuple(subs)
        self.wire.send(Subscribe(number, tuple(Subscription(filter_, qos) for filter_, qos in filters)))

    def unsubscribe(self, filter_: str) -> None:
        assert self.wire is not None
        assert self.up
        for sub in self.held:
            if sub.filter == filter_ and sub.until is None:
                sub.until = self.now()
        number = self._id()
        self.leaving.add(number)
        self.wire.send(Unsubscribe(number, (filter_,)))

    def goodbye(self) -> None:
        assert self.wire is not None
        for will in self.wills:
            if will.wire is self.wire:
                will.goodbye = True
        self.wire.send(Disconnect())

    def look_after_wills(self) -> None:
        """After each step: connections that the gateway knows to be over."""
        for will in self.wills:
            if will.fate is None and will.lost_at_s is None and will.wire.closing:
                will.lost_at_s = self.world.now
                if will.goodbye:
                    will.fate = "not" if not will.wire.to_gateway else "either"
                elif not will.accepted:
                    will.fate = "either"
                elif not will.delay_s:
                    will.fate = "must"

    def crashed(self) -> None:
        for will in self.wills:
            if will.fate is not None:
                continue
            connected = will.wire is self.wire and not will.wire.closing and will.lost_at_s is None
            if connected and will.accepted and not will.goodbye and self.keeps:
                will.crashed_at_s = self.world.now
            else:
                will.fate = "either"
        self.forget_connection()

    def counts(self, epoch: int, *, retained: bool = False) -> Counter[bytes]:
        return Counter(got.payload for got in self.log if got.epoch == epoch and got.retain is retained)
