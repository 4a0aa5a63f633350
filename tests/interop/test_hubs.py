"""The promises, against hubs that are not ours: nothing lost, nothing reordered, duplicates within the window.

Each test runs the daemon against a real broker over a line that is cut while messages are on it, or kills one of the
two, and then asks the broker, or a local subscriber, what has arrived.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.amqp.message import encode
from gateway.faultlink import Line
from tests import parts
from tests.interop import harness
from tests.pki import Pki

OUTBOUND, INBOUND, KILLED = 20_000, 10_000, 10_000
WINDOW, MQTT_WINDOW = 1000, 200
CUTS = 3
DARK_S = 0.7
MAPS = 300
RSS_BYTES_MAX = 120 << 20

CONFIG = """
[gateway]
id = "loco-4711"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
[[hub]]
name = "centre"
urls = ["amqps://127.0.0.1:{line}"]
kind = "{kind}"
ca = "{ca}"
cert = "{cert}"
key = "{key}"
window = {window}
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "centre"
address = "{out}"
[[inbound]]
stream = "commands"
hub = "centre"
address = "{into}"
topic = "commands/{{subject}}"
[[inbound]]
stream = "maps"
hub = "centre"
address = "{into}.maps"
topic = "maps/{{subject}}"
max_bytes = "1MiB"
"""

_numbers = itertools.count()


@dataclass
class Rig:
    """One broker, a line to it, and a daemon that has just started."""

    hub: parts.Artemis | parts.RabbitMQ
    loop: harness.Loop
    line: harness.BrokenLine
    daemon: harness.Daemon
    mqtt_port: int
    out: str
    into: str
    # Of each cut, what may have gone a second time over the next connection, as its first number.
    repeated_from: list[int] = field(default_factory=list)

    @property
    def durable(self) -> bool:
        """RabbitMQ's queues last as long as the terminus that declares them."""
        return isinstance(self.hub, parts.RabbitMQ)

    @property
    def remembers(self) -> bool:
        """Artemis drops what it has had already."""
        return isinstance(self.hub, parts.Artemis)

    def arrived(self, count: int) -> tuple[harness.Tally, list[str]]:
        """What arrived, and of what did not come in its turn, where it came and which connections may have sent it."""
        numbers = self.loop.run(harness.consume(self.hub.port, self.out, count, durable=self.durable))
        return harness.Tally.of(numbers, count), [
            f"{after} behind {before}: {self._over(after)}, {self._over(before)}"
            for before, after in harness.out_of_turn(numbers)
        ]

    def _over(self, number: int) -> str:
        if not self.repeated_from:
            return str(number)  # it was not the line that broke
        again = [n for n, first in enumerate(self.repeated_from, 1) if first <= number < first + WINDOW]
        if again:
            return f"{number} perhaps over the connections before and after cut {again}"
        return f"{number} over connection {1 + sum(first + WINDOW <= number for first in self.repeated_from)} only"

    def fill(self, count: int) -> None:
        self.loop.run(harness.produce(self.hub.port, self.into, count, durable=self.durable))

    def kill(self) -> None:
        """RabbitMQ 3.10 forgets the queue declared last in this, with what it has accepted (see test_parts)."""
        if isinstance(self.hub, parts.RabbitMQ):
            self.loop.run(harness.put(self.hub.port, f"{self.into}.later", [encode(b"later")], durable=True))
        self.hub.kill()

    def dark(self, cut: Callable[[], None]) -> None:
        cut()
        time.sleep(DARK_S)
        stream = next(s for s in self.daemon.status()["streams"] if s["name"] == "telemetry")
        self.repeated_from.append(stream["next_seq"] - 1 - stream["waiting"])
        self.line.restore()

    def cut_thrice(self, every_bytes: int, unfinished: Callable[[], bool]) -> None:
        """A FIN, a silent tunnel, a cut in the middle of a frame, each after so many more bytes."""
        cuts: list[Callable[[], None]] = [
            lambda: self.line.cut(Line.CLOSED),
            lambda: self.line.cut(Line.TUNNEL),
            lambda: self.line.cut_mid_frame(777),
        ]
        assert len(cuts) == CUTS
        for cut in cuts:
            self.after_bytes(every_bytes)
            self.dark(cut)
            assert unfinished(), "the cut came too late to prove anything"

    def after_bytes(self, count: int) -> None:
        until = self.line.forwarded_bytes + count
        harness.wait_until(lambda: self.line.forwarded_bytes >= until, 30, f"{count} bytes on the line")

    def drained(self) -> None:
        harness.wait_until(lambda: self.daemon.waiting("telemetry") == 0, 80, "an empty stream")


@pytest.fixture(params=["artemis", "rabbitmq"])
def rig(request: pytest.FixtureRequest, pki: Pki, tmp_path: Path) -> Iterator[Rig]:
    kind: str = request.param
    hub: parts.Artemis | parts.RabbitMQ = request.getfixturevalue(kind)
    assert hub.tls_port is not None
    number = next(_numbers)
    prefix = "/queue/" if kind == "rabbitmq" else ""
    out, into = f"{prefix}hubs.{number}.telemetry", f"{prefix}hubs.{number}.commands"
    loop = harness.Loop()
    line = harness.BrokenLine(loop, hub.tls_port)
    mqtt_port = parts.free_port()
    daemon = harness.Daemon(
        tmp_path,
        CONFIG.format(
            state=tmp_path / "state",
            mqtt=mqtt_port,
            line=line.port,
            kind=kind,
            ca=pki.ca,
            cert=pki.client.cert,
            key=pki.client.key,
            window=WINDOW,
            out=out,
            into=into,
        ),
    )
    with harness.closing(daemon, line, loop):
        daemon.start()
        harness.wait_until(lambda: daemon.hub_state() == "up", 20, "the link to the hub")
        yield Rig(hub, loop, line, daemon, mqtt_port, out, into)


@pytest.mark.timeout(240)
def test_what_was_acknowledged_reaches_the_hub_through_three_cuts(rig: Rig) -> None:
    publisher = harness.Publisher(rig.mqtt_port, "train/speed", OUTBOUND)
    with harness.closing(publisher):
        publisher.start()
        rig.cut_thrice(OUTBOUND * 30, lambda: rig.daemon.waiting("telemetry") > 0)
        publisher.finish()
    rig.drained()
    tally, where = rig.arrived(OUTBOUND)
    assert (tally.lost, tally.reordered) == (0, 0), (tally, where)
    assert tally.duplicates <= (0 if rig.remembers else CUTS * WINDOW), tally


@pytest.mark.timeout(240)
def test_what_the_hub_holds_reaches_a_local_subscriber_once_through_three_cuts(rig: Rig) -> None:
    subscriber = harness.Subscriber(rig.mqtt_port, "commands/#")
    with harness.closing(subscriber):
        rig.line.cut(Line.CLOSED)
        rig.fill(INBOUND)
        rig.line.restore()
        rig.cut_thrice(INBOUND * 20, lambda: len(subscriber.arrived) < INBOUND)
        harness.wait_until(lambda: len(subscriber.arrived) >= INBOUND, 80, "all commands")
        time.sleep(0.5)
    assert harness.Tally.of(subscriber.arrived, INBOUND) == harness.Tally(0, 0, 0)


@pytest.mark.timeout(240)
def test_more_than_a_stream_has_room_for_stays_at_the_hub_and_comes_once_in_order_when_there_is(rig: Rig) -> None:
    maps = [encode(b"%-250000d" % n, message_id=f"map-{n}", subject="line") for n in range(MAPS)]
    rig.loop.run(harness.put(rig.hub.port, f"{rig.into}.maps", maps, durable=rig.durable))
    harness.wait_until(
        lambda: any("no room for stream maps" in note for note in rig.daemon.notes()), 60, "word of the full stream"
    )
    rss = rig.daemon.status()["rss_bytes"]
    assert rss < RSS_BYTES_MAX, "of what the hub may send ahead, no more is held than is said"
    rig.fill(10)
    subscriber = harness.Subscriber(rig.mqtt_port, "maps/#")
    with harness.closing(subscriber):
        harness.wait_until(lambda: len(subscriber.arrived) >= MAPS, 80, "all maps")
        time.sleep(0.5)
    assert harness.Tally.of(subscriber.arrived, MAPS) == harness.Tally(0, 0, 0)
    assert rig.daemon.waiting("commands") == 10, "the other streams had nothing of it"
    assert not rig.daemon.notes()


@pytest.mark.timeout(240)
def test_a_hub_that_is_killed_and_comes_back_has_everything(rig: Rig) -> None:
    publisher = harness.Publisher(rig.mqtt_port, "train/speed", INBOUND)
    with harness.closing(publisher):
        publisher.start()
        rig.after_bytes(INBOUND * 60)
        rig.kill()
        time.sleep(0.2)
        assert rig.daemon.waiting("telemetry") > 0 or publisher.acknowledged < INBOUND
        rig.hub.start()
        publisher.finish()
    rig.drained()
    tally, where = rig.arrived(INBOUND)
    assert (tally.lost, tally.reordered) == (0, 0), (tally, where)
    assert tally.duplicates <= (0 if rig.remembers else WINDOW), tally


@pytest.mark.timeout(240)
def test_what_a_hub_held_when_it_was_killed_still_comes_once_and_in_order(rig: Rig) -> None:
    subscriber = harness.Subscriber(rig.mqtt_port, "commands/#")
    with harness.closing(subscriber):
        rig.line.cut(Line.CLOSED)
        rig.fill(KILLED)
        rig.line.restore()
        harness.wait_until(lambda: len(subscriber.arrived) >= KILLED // 10, 30, "the first commands")
        rig.kill()
        time.sleep(0.2)
        assert len(subscriber.arrived) < KILLED, "the kill came too late to prove anything"
        rig.hub.start()
        harness.wait_until(lambda: len(subscriber.arrived) >= KILLED, 40, "all commands")
        time.sleep(0.5)
    assert harness.Tally.of(subscriber.arrived, KILLED) == harness.Tally(0, 0, 0)


@pytest.mark.timeout(240)
def test_a_daemon_killed_three_times_loses_nothing_it_acknowledged(rig: Rig) -> None:
    seed = random.randrange(1 << 32)
    points = sorted(random.Random(seed).sample(range(500, KILLED - 500), CUTS))
    publisher = harness.Publisher(rig.mqtt_port, "train/speed", KILLED, per_s=5000)
    with harness.closing(publisher):
        publisher.start()
        for point in points:
            publisher.reaches(point)
            rig.daemon.kill()
            rig.daemon.start()
        publisher.finish()
    rig.drained()
    tally, where = rig.arrived(KILLED)
    assert (tally.lost, tally.reordered) == (0, 0), (tally, where, seed)
    # What was journaled but not yet acknowledged comes from the publisher a second time, as another message.
    assert tally.duplicates <= CUTS * (MQTT_WINDOW + (0 if rig.remembers else WINDOW)), (tally, seed)
