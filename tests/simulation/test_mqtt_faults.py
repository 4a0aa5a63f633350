"""What the simulation of MQTT sessions broke once: each as a short story, on the same hand-moved gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.mqtt.packets import V3, V5, Disconnect, DisconnectProperties, Publish, Pubrec
from gateway.sessions import AHEAD_ROWS_MAX, PUMP_ROWS_MAX
from tests.simulation.mqtt_model import Client
from tests.simulation.mqtt_world import World

EXPIRES_NOW = DisconnectProperties(session_expiry_interval=0)


class Story:
    def __init__(self, world: World) -> None:
        self.world = world
        self.clients: list[Client] = []

    def client(self, name: str, version: int = V5, *, durable: bool = True, window: int = 100) -> Client:
        client = Client(name, version, durable, 1000, window, 0, self.world, lambda: 1)
        self.clients.append(client)
        client.connect(clean=not durable)
        self.exchange()
        assert client.up
        return client

    def back(self, client: Client) -> None:
        client.connect(clean=False)
        self.exchange()

    def back_half(self, client: Client) -> None:
        """Connected, and what it sends again has come; nothing of that is committed."""
        client.connect(clean=False)
        arrive(client)
        self.world.commit_all()
        client.read(1)
        arrive(client)

    def cut(self, client: Client) -> None:
        assert client.wire is not None
        client.wire.lose()
        client.forget_connection()

    def exchange(self, *, answers: bool = True) -> None:
        moved = True
        while moved:
            self.world.loop.run()
            moved = bool(self.world.journal.pending)
            self.world.commit_all()
            for client in self.clients:
                if client.wire is not None:
                    moved = moved or bool(client.wire.to_gateway and not client.wire.closing)
                    client.wire.arrive(1000)
                    moved = bool(client.read(1000)) or moved
                    if answers:
                        moved = moved or bool(client.answers)
                        client.answer(lambda n: 0, 1000)

    def crash(self) -> None:
        self.world.crash(committed=False)
        for client in self.clients:
            client.crashed()

    def table(self, name: str) -> list[tuple[object, ...]]:
        return self.world.journal.query(f"SELECT * FROM {name}")


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    world = World(tmp_path, monkeypatch)
    yield Story(world)
    world.close()


def payloads(client: Client) -> list[bytes]:
    return [got.payload for got in client.log]


def arrive(client: Client) -> None:
    assert client.wire is not None
    client.wire.arrive(1000)


@pytest.mark.parametrize("ends", ["goodbye", "clean start"])
def test_a_session_that_ends_in_the_commit_of_its_own_qos_2_message_spoils_nothing(story: Story, ends: str) -> None:
    """The id belongs to the session that sent it: not to nobody, and not to the next session of that name."""
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    pub = story.client("pub")
    story.exchange()
    pub.publish("a/x", 2, False)
    arrive(pub)
    if ends == "goodbye":
        assert pub.wire is not None
        pub.wire.send(Disconnect(properties=EXPIRES_NOW))
    else:
        pub.connect(clean=True)
    arrive(pub)
    story.exchange()
    assert story.world.failures == 0
    assert payloads(sub) == [b"pub:1"]
    assert not story.table("mqtt_incoming")


@pytest.mark.parametrize("version", [V3, V5])
@pytest.mark.parametrize("back", ["after the commit failed", "before the commit failed"])
def test_a_qos_2_message_whose_commit_failed_is_not_taken_for_stored_when_it_comes_again(
    story: Story, version: int, back: str
) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 2)])
    pub = story.client("pub", version)
    story.exchange()
    messages = [pub.publish("a/x", 2, False) for _ in range(2)]
    arrive(pub)
    story.world.begin()
    story.cut(pub)
    if back.startswith("before"):
        pub.connect(clean=False)
        arrive(pub)
    story.world.fail(no_space=False)
    story.world.commit_all()
    pub.read(1)
    for _ in range(3):
        story.exchange()
        assert all(m is not None and (m.acked_at is None or m.payload in payloads(sub)) for m in messages)
        if pub.wire is None or pub.wire.closing:
            story.back(pub)
    for message in messages:
        assert message is not None
        assert message.refused or payloads(sub).count(message.payload) == 1


@pytest.mark.parametrize("version", [V3, V5])
def test_a_qos_2_message_that_is_stored_stays_so_when_the_commit_of_its_repeat_fails(
    story: Story, version: int
) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 2)])
    pub = story.client("pub", version)
    story.exchange()
    message = pub.publish("a/x", 2, False)
    arrive(pub)
    story.world.commit_all()
    story.cut(pub)  # its PUBREC is lost
    story.back_half(pub)
    story.world.begin()
    story.world.fail(no_space=False)
    for _ in range(3):
        story.exchange()
        if pub.wire is None or pub.wire.closing:
            story.back(pub)
    assert message is not None
    assert message.acked_at is not None
    assert payloads(sub) == [message.payload]


def test_a_repeat_of_a_qos_2_message_shares_the_fate_of_the_first_whose_commit_failed(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 2)])
    pub = story.client("pub")
    story.exchange()
    message = pub.publish("a/x", 2, False)
    assert message is not None
    [number] = pub.out
    arrive(pub)
    story.world.begin()
    assert pub.wire is not None
    pub.wire.send(Publish("a/x", message.payload, 2, False, True, number))
    arrive(pub)
    story.world.fail(no_space=False)
    story.world.commit_all()
    heard = [packet for packet in pub.wire.to_client if isinstance(packet, Pubrec)]
    assert [(each.packet_id, each.reason >= 0x80) for each in heard] == [(number, True), (number, True)]
    assert payloads(sub) == []


def test_what_is_committed_together_with_a_client_s_return_is_sent_to_it(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    pub = story.client("pub")
    story.exchange()
    story.cut(sub)
    pub.publish("a/x", 1, False)
    sub.connect(clean=False)
    arrive(pub)
    arrive(sub)
    story.exchange()
    assert payloads(sub) == [b"pub:1"]


@pytest.mark.parametrize("no_space", [False, True])
def test_a_will_whose_commit_failed_is_published_later(story: Story, no_space: bool) -> None:
    sub = story.client("sub")
    sub.subscribe([("w/#", 1)])
    story.exchange()
    willing = story.client("willing", durable=False)
    willing.connect(clean=True, will=(b"gone", 1, 0, False))
    story.exchange()
    story.cut(willing)
    story.world.begin()
    story.world.fail(no_space=no_space)
    story.exchange()
    story.world.advance(6)
    story.world.keep_house()
    story.exchange()
    assert payloads(sub) == [b"gone"]
    assert not story.table("mqtt_will")


def test_answers_of_several_kinds_in_one_piece_end_the_messages_they_are_for(story: Story) -> None:
    """The connection knows a packet id to be free before the session does: no new message may have it in between."""
    sub = story.client("sub", window=4)
    sub.subscribe([("a/#", 2)])
    pub = story.client("pub")
    story.exchange()
    for qos in (1, 2, 1, 1, 1, 1, 1, 1, 1):
        pub.publish("a/x", qos, False)
        arrive(pub)
        story.world.commit_all()
        pub.read(1)
    story.cut(sub)  # a new connection looks for free packet ids from 1 on
    story.back_half(sub)
    sub.read(4)
    sub.answer(lambda n: 0, 4)  # PUBACK, PUBREC, PUBACK, PUBACK
    arrive(sub)
    session = story.world.broker.sessions["sub"]
    assert sorted(sent.seq for sent in session.sent.values()) == [2, 5, 6, 7]
    story.exchange()
    assert payloads(sub) == [b"pub:%d" % n for n in range(1, 10)]
    assert not session.sent


@pytest.mark.parametrize("qos", [1, 2])
def test_a_cursor_of_what_was_unsubscribed_with_messages_under_way_holds_nothing_after_a_restart(
    story: Story, qos: int
) -> None:
    """At QoS 2 the message is finished first (MQTT-3.10.4-3)."""
    sub = story.client("sub")
    sub.subscribe([("up/#", qos)])
    pub = story.client("pub")
    story.exchange()
    pub.publish("up/x", 2, False)
    arrive(pub)
    story.world.commit_all()
    sub.unsubscribe("up/#")
    arrive(sub)
    story.world.commit_all()
    story.crash()
    story.back(pub)
    story.back(sub)
    pub.publish("up/x", 1, False)
    story.exchange()
    story.world.write_cursors()
    story.exchange()
    stream = story.world.journal.streams["up"]
    assert [c.position for c in stream.cursors.values() if c.kind == "mqtt"] == [stream.committed] * (qos - 1)
    assert payloads(sub) == [b"pub:1"] * (qos - 1)
    assert not story.table("mqtt_outgoing") or qos == 1


@pytest.mark.parametrize("topic", ["up/x", "a/x"])
def test_a_first_reader_of_a_stream_is_given_what_is_retained_in_it(story: Story, topic: str) -> None:
    pub = story.client("pub")
    pub.publish(topic, 1, True)
    story.exchange()
    sub = story.client("sub")
    sub.subscribe([(topic, 1)])
    story.exchange()
    assert [(got.payload, got.retain) for got in sub.log] == [(b"pub:1", True)]


def test_a_new_group_is_not_given_what_was_said_before_it(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    pub = story.client("pub")
    story.exchange()
    pub.publish("a/x", 1, False)
    arrive(pub)
    story.world.commit_all()
    sub.read(1)
    sub.answer(lambda n: 0, 1)
    sub.unsubscribe("a/#")
    sub.subscribe([("$share/g/a/#", 1)])
    story.exchange()
    assert payloads(sub) == [b"pub:1"]


def test_what_was_sent_at_qos_0_behind_an_unacknowledged_message_is_not_sent_again(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    pub = story.client("pub")
    story.exchange()
    for qos in (1, 0):
        pub.publish("a/x", qos, False)
    arrive(pub)
    story.world.commit_all()
    sub.read(2)
    story.cut(sub)
    story.back(sub)
    assert payloads(sub) == [b"pub:1", b"pub:2", b"pub:1"]


def test_a_client_that_was_away_gets_what_stands_behind_many_rows_that_it_does_not_want(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    other = story.client("other")
    other.subscribe([("b/#", 0)])
    shared = story.client("shared")
    shared.subscribe([("$share/g/a/#", 1)])
    story.exchange()
    story.cut(sub)
    story.cut(shared)
    broker = story.world.broker
    for topic, count in (("a/x", 1), ("b/x", 3 * PUMP_ROWS_MAX), ("a/x", 1)):
        for n in range(count):
            broker.publish(topic, 1, False, b"%d" % n, None, 0)
        story.world.commit_all()
    story.back(sub)
    story.back(shared)
    for _ in range(4):
        story.world.write_cursors()
        story.exchange()
    assert payloads(sub) == [b"0", b"0"]
    assert payloads(shared) == [b"0", b"0"]


def test_how_far_a_client_may_run_ahead_of_a_message_that_it_does_not_acknowledge_is_bounded(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    story.exchange()
    broker = story.world.broker
    for _ in range(3 * AHEAD_ROWS_MAX):
        broker.publish("a/x", 1, False, b"", None, 0)
    story.world.commit_all()
    (feed,) = broker.sessions["sub"].feeds.values()
    sub.read(1)
    first = sub.answers.pop()
    for _ in range(2 * AHEAD_ROWS_MAX):
        if not sub.read(1000):
            break
        sub.answer(lambda n: 0, 1000)
        arrive(sub)
    assert len(feed.order) == AHEAD_ROWS_MAX
    sub.answers.append(first)
    story.exchange()
    assert len(sub.log) == 3 * AHEAD_ROWS_MAX
    assert not feed.order


def test_a_cursor_moves_over_what_nobody_wants_although_its_client_came_and_went(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    other = story.client("other")
    other.subscribe([("b/#", 1)])
    story.exchange()
    other.publish("b/x", 1, False)
    story.exchange()
    story.cut(sub)
    story.back(sub)
    story.world.write_cursors()
    story.exchange()
    local = story.world.broker.local
    assert {c.position for c in local.cursors.values()} == {local.committed}


def test_a_message_of_qos_2_that_is_gone_is_released_before_its_id_is_used_again(story: Story) -> None:
    """A client that has the id would take the next message under it for a repeat."""
    sub = story.client("sub", window=1)
    sub.subscribe([("a/#", 2)])
    pub = story.client("pub")
    story.exchange()
    pub.publish("a/x", 2, False)
    arrive(pub)
    story.world.commit_all()
    story.world.commit_all()
    sub.read(1)
    assert sub.store
    story.cut(sub)
    journal = story.world.journal
    local = story.world.broker.local
    journal.drop_before(local, local.next_seq, "drop-oldest")
    story.world.commit_all()
    story.exchange()
    pub.publish("a/x", 2, False)
    story.exchange()
    story.back(sub)
    assert payloads(sub) == [b"pub:1", b"pub:2"]
    assert not sub.store
    assert not story.table("mqtt_outgoing")


def test_no_two_groups_share_a_cursor(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("$share/a:b/c", 1), ("$share/a/b:c", 1)])
    story.exchange()
    assert len([c for c in story.world.broker.local.cursors.values()]) == 2


def test_a_subscription_made_after_a_failed_commit_misses_nothing_after_a_restart(story: Story) -> None:
    sub = story.client("sub")
    sub.subscribe([("a/#", 1)])
    pub = story.client("pub")
    story.exchange()
    for _ in range(3):
        pub.publish("a/x", 1, False)
    arrive(pub)
    story.world.begin()
    story.world.fail(no_space=False)
    assert pub.read(3) == 3
    assert not pub.out
    sub.subscribe([("b/#", 1), ("$share/g/b/#", 1)])
    arrive(sub)
    story.world.commit_all()
    story.crash()
    story.back(pub)
    story.back(sub)
    pub.publish("b/x", 1, False)
    story.exchange()
    assert payloads(sub) == [b"pub:4", b"pub:4"]


def test_subscribing_again_and_again_without_reading_piles_nothing_up(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.sessions.DUE_MAX", 20)
    pub = story.client("pub")
    for n in range(10):
        pub.publish(f"r/{n}", 1, True)
        story.exchange()
    sub = story.client("sub", window=1)
    due = story.world.broker.sessions["sub"].due
    for qos in (1, 1, 2, 1, 2):
        sub.subscribe([("r/#", qos)])
        story.exchange(answers=False)
        assert len(due) <= 20
    assert len(due) == 20
    story.exchange()
    assert not due
    assert {got.topic for got in sub.log} == {f"r/{n}" for n in range(10)}
    assert not story.table("mqtt_retained_due")


def test_a_client_is_told_that_its_session_is_gone_when_it_would_be_after_a_crash(story: Story) -> None:
    """Also where an earlier connection had ended it, and that is not on the disk yet."""
    sub = story.client("sub", V3)
    sub.subscribe([("a/#", 1)])
    story.exchange()
    for _ in range(2):
        story.cut(sub)
        sub.connect(clean=True)
        arrive(sub)
        assert sub.wire is not None
        assert not sub.wire.to_client
    story.world.begin()
    story.world.fail(no_space=False)
    assert not sub.read(1)
    story.world.commit_all()
    assert sub.read(1)
    assert sub.up
    story.crash()
    assert not story.world.broker.sessions
    assert not story.table("mqtt_session")
