"""What an MQTT client asks for while it has to wait for its turn: all of it is done, in order, also if it is gone."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from gateway.access import Access
from gateway.config import loads
from gateway.mqtt import listener
from gateway.mqtt.codec import FILTERS_MAX, decode_body, encode, remaining_length
from gateway.mqtt.packets import (
    V3,
    V5,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.sessions import Session
from gateway.turns import Turns, Waiting
from tests import attacks
from tests.gateway.test_fairness import filters, speaks
from tests.own_time import App, Gateway
from tests.websocket import BINARY, frame, request

FLOODS = 5


class Client:
    """Says packets of 5.0, and keeps what it hears."""

    def __init__(self, gateway: Gateway, connect: Connect) -> None:
        self.heard: list[Packet] = []
        self._rest = b""
        self.pipe = gateway.connect(heard=self._hear)
        self.say(connect)

    def say(self, *packets: Packet) -> None:
        self.pipe.send(b"".join(encode(packet, V5) for packet in packets))

    def _hear(self, data: bytes) -> None:
        data = self._rest + data
        while (framed := remaining_length(data, 0)) is not None and sum(framed) <= len(data):
            size, begin = framed
            self.heard.append(decode_body(data[0], data[begin : begin + size], V5))
            data = data[begin + size :]
        self._rest = data

    def of(self, kind: type[Packet]) -> list[Packet]:
        return [packet for packet in self.heard if isinstance(packet, kind)]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.close()


@pytest.fixture
def busy(gateway: Gateway) -> Gateway:
    """One app publishes all the time, and others ask for as many subscriptions as they can."""
    App(gateway)
    for n in range(FLOODS):
        speaks(b"flood-%d" % n, lambda n: attacks.subscribe(filters(n)))(gateway)
    gateway.live(0.3)
    assert len(gateway.turns)
    return gateway


def until(gateway: Gateway, condition: Callable[[], object], seconds_max: float = 10.0) -> None:
    end_s = gateway.loop.time() + seconds_max
    while not condition():
        assert gateway.loop.time() < end_s, "it never comes to this"
        gateway.live(0.01)


def watching(gateway: Gateway) -> Client:
    """Who hears of wills, and of what was said."""
    watcher = Client(gateway, Connect(V5, "watcher"))
    watcher.say(Subscribe(1, (Subscription("will/#", 1), Subscription("said/#", 1))))
    until(gateway, lambda: watcher.of(Suback))
    return watcher


def topics(watcher: Client) -> list[str]:
    return [p.topic for p in watcher.of(Publish) if isinstance(p, Publish)]


def test_all_of_a_large_subscribe_is_answered_and_none_beyond_the_limit_is_granted(gateway: Gateway) -> None:
    App(gateway)
    client = Client(gateway, Connect(V5, "many"))
    wanted = tuple(Subscription(f"many/{n}", n % 3) for n in range(FILTERS_MAX + 50))
    client.say(Subscribe(7, wanted), Publish("train/behind", b"x", 1, packet_id=9))
    until(gateway, lambda: client.of(Puback) and client.of(Suback), 10.0)
    (answer,) = client.of(Suback)
    assert isinstance(answer, Suback)
    assert answer.reasons == tuple(s.qos for s in wanted[:FILTERS_MAX]) + (0x97,) * 50
    assert len(gateway.broker.sessions["many"].subscriptions) == FILTERS_MAX


def test_what_is_said_in_one_breath_is_done_in_that_order(busy: Gateway) -> None:
    client = Client(busy, Connect(V5, "quick"))
    client.say(
        Subscribe(1, tuple(Subscription(f"quick/{n}", 1) for n in range(100))),
        Unsubscribe(2, tuple(f"quick/{n}" for n in range(99))),
        Publish("quick/0", b"not mine", 1, packet_id=3),
        Publish("quick/99", b"mine", 1, packet_id=4),
        Pingreq(),
    )
    until(busy, lambda: client.of(Pingresp) and client.of(Publish) and len(client.of(Puback)) == 2)
    assert len(client.of(Suback)) == len(client.of(Unsuback)) == 1
    assert [p.payload for p in client.of(Publish) if isinstance(p, Publish)] == [b"mine"]


def test_retained_messages_come_before_what_is_newer_each_once_and_in_order(busy: Gateway) -> None:
    speaker, reader = Client(busy, Connect(V5, "speaker")), Client(busy, Connect(V5, "reader"))
    speaker.say(*[Publish(f"kept/{n:03}", b"old", 1, True, packet_id=n + 1) for n in range(300)])
    until(busy, lambda: len(speaker.of(Puback)) == 300)
    reader.say(Subscribe(1, (Subscription("kept/#", 0),)))
    until(busy, lambda: reader.of(Suback))
    speaker.say(Publish("kept/new", b"new", 1, packet_id=999))
    until(busy, lambda: len(reader.of(Publish)) > 300)
    busy.live(0.1)
    got = [(p.topic, p.payload, p.retain) for p in reader.of(Publish) if isinstance(p, Publish)]
    assert got == [(f"kept/{n:03}", b"old", True) for n in range(300)] + [("kept/new", b"new", False)]


def test_who_subscribes_and_unsubscribes_is_answered_in_that_order(busy: Gateway) -> None:
    """However long it takes to find what is retained: the answer that comes last tells how things are."""
    speaker, reader = Client(busy, Connect(V5, "speaker")), Client(busy, Connect(V5, "reader"))
    speaker.say(*[Publish(f"kept/{n:03}", b"old", 1, True, packet_id=n + 1) for n in range(300)])
    until(busy, lambda: len(speaker.of(Puback)) == 300)
    reader.say(Subscribe(1, (Subscription("kept/#", 0),)), Unsubscribe(2, ("kept/#",)))
    until(busy, lambda: reader.of(Unsuback) and reader.of(Suback))
    assert [type(p) for p in reader.heard if isinstance(p, Suback | Unsuback)] == [Suback, Unsuback]
    busy.live(0.3)
    after = reader.heard.index(reader.of(Unsuback)[0])
    assert not [p for p in reader.heard[after:] if isinstance(p, Publish)]


@pytest.mark.parametrize("goodbye", [True, False])
def test_what_came_before_the_end_counts_and_so_does_a_goodbye(busy: Gateway, goodbye: bool) -> None:
    """The connection is gone while it waits; a client that said DISCONNECT has not died."""
    watcher = watching(busy)
    client = Client(busy, Connect(V5, "mortal", will=Will("will/mortal", b"dead", 1, False)))
    until(busy, lambda: "mortal" in busy.broker.wills)
    before = busy.mqtt.clients
    last = [Disconnect()] if goodbye else []
    client.say(Subscribe(1, tuple(Subscription(f"f/{n}") for n in range(300))), Publish("said/last", b"x"), *last)
    busy.live(0.001)
    client.pipe.close()
    until(busy, lambda: "mortal" not in busy.broker.sessions)
    until(busy, lambda: watcher.of(Publish))
    busy.live(0.1)
    assert client.pipe._protocol not in before
    assert topics(watcher) == (["said/last"] if goodbye else ["said/last", "will/mortal"])


@pytest.mark.parametrize("goodbye", [True, False])
def test_what_came_before_the_end_counts_though_the_same_client_is_back_before_its_turn(
    busy: Gateway, goodbye: bool
) -> None:
    watcher = watching(busy)
    first = Client(busy, Connect(V5, "mortal", will=Will("will/mortal", b"dead", 1, False)))
    until(busy, lambda: "mortal" in busy.broker.wills)
    old = busy.broker.sessions["mortal"]
    last = [Disconnect()] if goodbye else []
    first.say(Subscribe(1, tuple(Subscription(f"f/{n}") for n in range(300))), Publish("said/last", b"x"), *last)
    busy.live(0.001)
    first.pipe.close()
    second = Client(busy, Connect(V5, "mortal"))
    until(busy, lambda: second.heard)
    assert busy.broker.sessions["mortal"] is not old
    until(busy, lambda: watcher.of(Publish))
    busy.live(0.3)
    assert topics(watcher) == (["said/last"] if goodbye else ["said/last", "will/mortal"])


@pytest.mark.parametrize("goodbye", [True, False])
def test_what_was_said_behind_connect_counts_though_the_connection_ends_before_its_commit(
    gateway: Gateway, goodbye: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client need not wait for its CONNACK (MQTT 5.0 §3.1.4); that of one with a will waits for the disk."""
    watcher = watching(gateway)
    with monkeypatch.context() as slow:
        slow.setattr(gateway.committer, "kick", lambda: None)
        client = Client(gateway, Connect(V5, "brief", will=Will("will/brief", b"dead", 1, False)))
        client.say(Publish("said/brief", b"x"), *([Disconnect()] if goodbye else []))
        until(gateway, lambda: "brief" in gateway.broker.wills)
        client.pipe.close()
        gateway.live(0.01)
        assert not client.heard
    gateway.committer.kick()
    until(gateway, lambda: "brief" in gateway.broker.sessions)
    until(gateway, lambda: "brief" not in gateway.broker.sessions)
    gateway.live(0.1)
    assert topics(watcher) == (["said/brief"] if goodbye else ["said/brief", "will/brief"])
    assert len(gateway.mqtt.clients) == 1


@pytest.mark.parametrize("goodbye", [True, False])
@pytest.mark.parametrize("how", ["noticed", "unnoticed", "unread"])
def test_what_was_said_behind_connect_counts_though_the_same_client_is_back_before_its_commit(
    gateway: Gateway, goodbye: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the old connection is not read from its end is not noticed, and part of it may still be in the socket."""
    watcher = watching(gateway)
    with monkeypatch.context() as slow:
        slow.setattr(gateway.committer, "kick", lambda: None)
        first = Client(gateway, Connect(V5, "brief", will=Will("will/brief", b"dead", 1, False)))
        said = [Publish("said/brief", b"x"), *([Disconnect()] if goodbye else [])]
        if how != "unread":
            first.say(*said)
        until(gateway, lambda: "brief" in gateway.broker.wills)
        if how == "unread":
            first.say(*said)
        if how == "noticed":
            first.pipe.close()
            gateway.live(0.01)
        second = Client(gateway, Connect(V5, "brief"))
        second.say(Pingreq())
        gateway.live(0.01)
        assert not second.heard
    gateway.committer.kick()
    until(gateway, lambda: second.of(Pingresp))
    gateway.live(0.1)
    assert topics(watcher) == (["said/brief"] if goodbye else ["said/brief", "will/brief"])
    until(gateway, lambda: len(gateway.mqtt.clients) == 2)
    assert gateway.broker.sessions["brief"].outlet is second.pipe._protocol


def test_who_is_gone_before_its_predecessor_is_done_is_let_in_all_the_same(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watching(gateway)
    with monkeypatch.context() as slow:
        slow.setattr(gateway.committer, "kick", lambda: None)
        for name in ("first", "second"):
            client = Client(gateway, Connect(V5, "brief", will=Will("will/brief", b"dead", 1, False)))
            client.say(Publish(f"said/{name}", b"x"), Disconnect())
            gateway.live(0.1)
            client.pipe.close()
            gateway.live(0.01)
        assert len(gateway.mqtt.clients) == 3
    gateway.committer.kick()
    until(gateway, lambda: len(gateway.mqtt.clients) == 1)
    gateway.live(0.1)
    assert topics(watcher) == ["said/first", "said/second"]
    assert "brief" not in gateway.broker.sessions


@pytest.mark.parametrize("goodbye", [True, False])
def test_what_a_client_said_and_nobody_did_yet_is_done_before_it_is_taken_over(busy: Gateway, goodbye: bool) -> None:
    """It may have hung up: who is not read from cannot tell us."""
    watcher = watching(busy)
    first = Client(busy, Connect(V5, "mortal", will=Will("will/mortal", b"dead", 1, False)))
    until(busy, lambda: "mortal" in busy.broker.wills)
    last = [Disconnect()] if goodbye else []
    first.say(Subscribe(1, tuple(Subscription(f"f/{n}") for n in range(300))), Publish("said/last", b"x"), *last)
    busy.live(0.001)
    second, third = Client(busy, Connect(V5, "mortal")), Client(busy, Connect(V5, "mortal"))
    until(busy, lambda: third.heard)
    until(busy, lambda: watcher.of(Publish))
    until(busy, lambda: first.pipe.closing)
    busy.live(0.3)
    assert topics(watcher) == (["said/last"] if goodbye else ["said/last", "will/mortal"])
    assert [p.reason for p in second.of(Disconnect) if isinstance(p, Disconnect)] == [0x8E]
    assert busy.broker.sessions["mortal"].outlet is third.pipe._protocol


def test_a_client_that_reads_nothing_does_not_keep_the_next_one_waiting(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("WRITE_BUFFER_BYTES", "ANSWERS_BYTES_MAX"):
        monkeypatch.setattr(listener, limit, 1000)
    old = gateway.connect(reads=False)
    old.send(encode(Connect(V5, "stuck"), V5) + encode(Pingreq(), V5) * 10_000)
    until(gateway, lambda: not old.is_reading() and old.get_write_buffer_size() > 1000)
    new = Client(gateway, Connect(V5, "stuck"))
    until(gateway, lambda: new.heard)
    assert gateway.broker.sessions["stuck"].outlet is new.pipe._protocol


def test_who_waits_for_its_turn_is_not_taken_for_silent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(gateway, Connect(V5, "brisk", keep_alive=1))
    until(gateway, lambda: client.heard)
    waiting: list[Waiting] = []
    monkeypatch.setattr(Turns, "ready", False)
    monkeypatch.setattr(Turns, "over", False)
    monkeypatch.setattr(gateway.turns, "enter", waiting.append)
    client.say(Subscribe(1, tuple(Subscription(f"brisk/{n}") for n in range(100))), Pingreq())
    gateway.live(10.0)
    while waiting:
        assert not client.of(Disconnect)
        waiting.pop(0).turn()
        gateway.live(2.0)
    assert [type(packet) for packet in client.heard[1:3]] in ([Suback, Pingresp], [Pingresp, Suback])
    gateway.live(2.0)
    assert client.of(Disconnect)  # now it was silent


def test_what_the_old_connection_still_waited_for_is_nothing_to_the_session_that_comes_after_it(busy: Gateway) -> None:
    first = Client(busy, Connect(V5, "twice"))
    first.say(Subscribe(1, tuple(Subscription(f"twice/{n}") for n in range(2000))))
    busy.live(0.001)
    second = Client(busy, Connect(V5, "twice"))
    second.say(Subscribe(2, (Subscription("only", 1),)))
    until(busy, lambda: second.of(Suback))
    busy.live(0.3)
    assert [p.reason for p in first.of(Disconnect) if isinstance(p, Disconnect)] == [0x8E]
    assert list(busy.broker.sessions["twice"].subscriptions) == ["only"]


def test_our_own_mistake_in_a_turn_ends_that_client_only_and_its_session_knows(
    busy: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = Client(busy, Connect(V5, "unlucky")), Client(busy, Connect(V5, "other"))
    until(busy, lambda: client.heard and other.heard)
    real = busy.broker.starts

    def starts(session: Session, filters: Iterable[str]) -> list[dict[str, int]]:
        if session.client_id == "unlucky":
            raise ValueError("our own mistake")
        return real(session, filters)

    monkeypatch.setattr(busy.broker, "starts", starts)
    for each in (client, other):
        each.say(Subscribe(1, tuple(Subscription(f"f/{n}") for n in range(100))))
    until(busy, lambda: other.of(Suback))
    until(busy, lambda: client.pipe.closing)
    until(busy, lambda: "unlucky" not in busy.broker.sessions)


RULES = """
[gateway]
id = "loco"
[[access]]
who = "*"
subscribe = ["{allowed}/#"]
"""


def test_rules_that_come_while_a_subscribe_waits_for_its_turn_count_for_the_rest_of_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Access] = []
    gateway._run(lambda: made.append(Access(loads(RULES.format(allowed="a")))))
    access = gateway.mqtt.access = made[0]
    client = Client(gateway, Connect(V5, "many"))
    until(gateway, lambda: client.heard)
    waiting: list[Waiting] = []
    steps = itertools.cycle([False, True])
    with monkeypatch.context() as forced:
        forced.setattr(Turns, "ready", False)
        forced.setattr(Turns, "over", property(lambda turns: next(steps)))
        forced.setattr(gateway.turns, "enter", waiting.append)
        client.say(Subscribe(1, tuple(Subscription(f"a/{n}") for n in range(100))))
        session = gateway.broker.sessions["many"]
        while not session.subscriptions:
            gateway.live(0.01)
            waiting.pop(0).turn()
        assert len(session.subscriptions) < 100
        access.reload(loads(RULES.format(allowed="b")))
        gateway.mqtt.rules_changed()
        while waiting:
            waiting.pop(0).turn()
            gateway.live(0.01)
    until(gateway, lambda: client.of(Suback))
    assert not session.subscriptions
    (answer,) = client.of(Suback)
    assert isinstance(answer, Suback)
    assert {answer.reasons[0], answer.reasons[-1]} == {0, 0x87}


def test_of_a_client_that_is_dropped_for_what_could_not_be_stored_nothing_later_is(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends all of that again when it is back: in between, the later messages would have gone before the earlier."""
    pipe = gateway.connect()
    pipe.send(encode(Connect(V3, "app"), V3))
    until(gateway, lambda: "app" in gateway.broker.sessions)
    gateway.live(0.1)
    before = gateway.journal.streams["telemetry"].next_seq
    (client,) = gateway.mqtt.clients
    monkeypatch.setattr(gateway.committer, "kick", lambda: None)
    pipe.send(encode(Publish("train/first", b"x", 1, packet_id=1), V3))
    gateway.live(0.01)
    gateway.journal.begin()
    client._slices.hold()
    client.data_received(encode(Publish("train/second", b"x", 1, packet_id=2), V3))
    gateway.journal.failed(sqlite3.OperationalError("database or disk is full"))
    gateway.journal.disk_full = False  # somebody has made room
    client._slices.release()
    gateway.live(0.1)
    assert pipe.closing
    assert client not in gateway.mqtt.clients
    assert gateway.journal.streams["telemetry"].next_seq == before + 1  # a number is never used again


def test_over_a_websocket_too_a_client_that_is_let_in_has_an_account_of_its_own(gateway: Gateway) -> None:
    """Else what one of them asks for would have the others from its address wait."""
    pipe = gateway.connect(websocket=True)
    pipe.send(request() + frame(BINARY, encode(Connect(V5, "framer"), V5)))
    until(gateway, lambda: gateway.mqtt.clients)
    until(gateway, lambda: "framer" in gateway.broker.sessions)
    (client,) = gateway.mqtt.clients
    address = gateway.turns.account("loopback")
    assert client.account is not address
    before = address.ran_s, client.account.ran_s
    pipe.send(frame(BINARY) * 5000)
    gateway.live(0.5)
    assert address.ran_s == before[0]
    assert client.account.ran_s > before[1]
