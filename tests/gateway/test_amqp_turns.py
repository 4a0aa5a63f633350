"""What an AMQP app sends before its connection ends is taken, though it has to wait for its turn."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.slices import Slices
from gateway.turns import Turns, Waiting
from tests import attacks
from tests.own_time import Gateway, Pipe

BODY = b"\x00\x53\x75\xa0\x01x"
COUNT = 500


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    gateway.amqp.directory.queue("other/1")  # who keeps what is sent there
    yield gateway
    gateway.close()


def transfers(count: int) -> bytes:
    return b"".join(attacks.transfer(n, BODY) for n in range(count))


def journaled(gateway: Gateway) -> int:
    gateway.live(0.1)
    return sum(1 for _ in gateway.journal.read(gateway.broker.local, 1, 10_000))


class Turned:
    """Whoever has to wait for a turn has it when the test says so; each turn is as short as it may be."""

    def __init__(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[Waiting] = []
        self._gateway = gateway
        monkeypatch.setattr(Turns, "ready", False)
        monkeypatch.setattr(Turns, "over", True)
        monkeypatch.setattr(gateway.turns, "enter", self.waiting.append)

    def all(self, but: Waiting | None = None) -> None:
        self._gateway.live(0.01)
        while ready := [each for each in self.waiting if each is not but]:
            self.waiting.remove(ready[0])
            ready[0].turn()
            self._gateway.live(0.01)


def open_app(gateway: Gateway, name: str, *, reads: bool = True) -> tuple[Pipe, attacks.Frames]:
    frames = attacks.Frames()
    pipe = gateway.connect(amqp=True, heard=frames.feed, reads=reads)
    pipe.send(attacks.SASL + attacks.INIT + attacks.AMQP + attacks.open_frame(name) + attacks.begin())
    for _ in range(1000):
        gateway.live(0.01)
        if frames.count(attacks.BEGIN) or not reads:
            break
    return pipe, frames


def open_sender(gateway: Gateway, name: str) -> Pipe:
    pipe, frames = open_app(gateway, name)
    pipe.send(attacks.attach(0, name, receiver=False))
    for _ in range(1000):
        gateway.live(0.01)
        if frames.credit >= COUNT:
            return pipe
    pytest.fail("it is given no credit")


def test_what_an_app_sent_before_it_hung_up_is_taken_by_turns(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is settled already: nobody sends it again."""
    pipe = open_sender(gateway, "brief")
    turned = Turned(gateway, monkeypatch)
    pipe.send(attacks.EMPTY_FRAME * 1000 + transfers(COUNT))
    gateway.live(0.01)
    assert turned.waiting
    pipe.close()
    gateway.live(0.01)
    assert not journaled(gateway)
    assert len(gateway.amqp.peers) == 1  # it counts among those that are allowed
    turned.all()
    assert journaled(gateway) == COUNT
    assert not gateway.amqp.peers


def test_nothing_is_sent_to_an_app_that_is_gone(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its receiver takes messages from a queue, settled when they are sent: they would be lost."""
    sender = open_sender(gateway, "sender")
    sender.send(transfers(5))
    assert journaled(gateway) == 5
    pipe, _ = open_app(gateway, "gone")
    turned = Turned(gateway, monkeypatch)
    pipe.send(attacks.attach(0, "gone", receiver=True) + attacks.flow(echo=False, link_credit=10))
    gateway.live(0.01)
    assert turned.waiting
    pipe.close()
    turned.all()
    assert len(gateway.amqp.peers) == 1
    (group,) = gateway.amqp.directory.queue("other/1").groups.values()
    assert group.cursor.position == 1


def test_ten_thousand_short_connections_leave_nothing_behind_though_no_commit_comes(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears what comes over MQTT, and what comes over AMQP is no message."""
    alive = weakref.WeakSet[Slices]()
    made = Slices.__init__

    def make(slices: Slices, *args: Any, **more: Any) -> None:
        made(slices, *args, **more)
        alive.add(slices)

    monkeypatch.setattr(Slices, "__init__", make)
    for _ in range(9000):
        pipe = gateway.connect()
        pipe.send(attacks.connect(b"brief") + attacks.publish(b"unheard", b"x") + attacks.packet(0xE0, b""))
        gateway.live(0.001)
        pipe.close()
        gateway.live(0.001)
        gateway.pipes.clear()
    gateway.committer.kick()
    gateway.live(0.01)
    commits = len(gateway.committer.durations_s)
    refused = attacks.frame(
        attacks.TRANSFER, attacks.uint(0), attacks.uint(0), b"\xa0\x01x", attacks.uint(0), payload=b"no message"
    )
    for _ in range(1000):
        pipe = open_sender(gateway, "brief")
        pipe.send(refused)
        gateway.live(0.01)
        pipe.close()
        gateway.live(0.01)
        gateway.pipes.clear()
    assert len(gateway.committer.durations_s) == commits
    del pipe
    gateway.live(10.0)  # for what their transports are given to end
    gc.collect()
    assert not alive


def sole(name: str) -> bytes:
    """An open that wants the container id for itself."""
    wanted = b"sole-connection-for-container"
    capability = b"\xa3%c" % len(wanted) + wanted
    return attacks.frame(attacks.OPEN, attacks.text(name), *[attacks.NULL] * 7, capability)


def attach_durable(name: str) -> bytes:
    source = attacks.described(0x28, attacks.text("topic://other/2"), attacks.uint(2), b"\xa3\x05never")
    ends = source, attacks.described(0x29)
    return attacks.frame(
        attacks.ATTACH, attacks.text(name), attacks.uint(0), attacks.TRUE, attacks.NULL, attacks.NULL, *ends
    )


def test_an_app_that_is_back_before_its_old_connection_had_its_turn_is_let_in_and_keeps_its_subscription(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "open_frame", sole)
    old, _ = open_app(gateway, "app")
    turned = Turned(gateway, monkeypatch)
    old.send(attach_durable("mine"))
    gateway.live(0.01)
    (late,) = turned.waiting
    old.close()
    frames = attacks.Frames()
    new = gateway.connect(amqp=True, heard=frames.feed)
    new.send(attacks.SASL + attacks.INIT + attacks.AMQP + sole("app") + attacks.begin() + attach_durable("mine"))
    turned.all(but=late)
    assert frames.count(attacks.ATTACH) == 1
    assert len(gateway.amqp.peers) == 2
    turned.all()
    assert len(gateway.amqp.peers) == 1
    assert len(gateway.amqp.holders) == 1
    assert not frames.count(attacks.DETACH)
    assert not frames.count(0x18)  # close


def test_an_app_that_reads_no_answers_and_is_gone_ends(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = open_app(gateway, "deaf", reads=False)
    pipe.send(b"".join(attacks.attach(n % 50, f"{n}", receiver=True) + attacks.detach(n % 50) for n in range(20_000)))
    for _ in range(100):
        gateway.live(0.1)
        if not pipe.is_reading() and pipe._protocol.write_paused:  # type: ignore[attr-defined]
            break
    else:
        pytest.fail("it is read on and on")
    turned = Turned(gateway, monkeypatch)
    pipe.close()
    turned.all()
    assert not gateway.amqp.peers
