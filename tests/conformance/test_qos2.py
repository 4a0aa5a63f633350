"""Exactly once, both ways: MQTT 3.1.1 and 5.0, §3.5, §3.6, §3.7, §4.3.3, §4.4."""

from __future__ import annotations

import random
import time

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, Client, fresh
from tests.conformance.conftest import Connector
from tests.daemon import Daemon

LASTING = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}


def listening(version: int, join: Connector, stem: str) -> tuple[Client, str]:
    listener, topic = join(version), fresh(stem)
    listener.subscribe(topic, qos=2)
    return listener, topic


# ---------------------------------------------------------------------------------------- as the receiver
def test_a_message_sent_twice_before_its_pubrel_is_delivered_once(version: int, join: Connector) -> None:
    (listener, topic), speaker = listening(version, join, "once/"), join(version)
    for dup in (False, True, True):
        speaker.say(mqtt.publish(version, topic, b"once", 2, 5, dup=dup))
        assert speaker.expect(mqtt.PUBREC, packet_id=5).reason < 0x80
    speaker.say(mqtt.ack(mqtt.PUBREL, 5))
    speaker.expect(mqtt.PUBCOMP, packet_id=5, reason=0)
    speaker.publish(topic, b"marker", 1)
    listener.message(b"once", dup=False)
    listener.message(b"marker")


def test_a_message_sent_twice_whose_pubrel_follows_at_once_is_acknowledged_both_times(
    version: int, join: Connector
) -> None:
    """As from a client that sends again after some time, just when the first PUBREC is on its way to it."""
    (listener, topic), speaker = listening(version, join, "late/"), join(version)
    speaker.say(mqtt.publish(version, topic, b"once", 2, 5))
    speaker.expect(mqtt.PUBREC, packet_id=5, reason=0)
    speaker.say(mqtt.publish(version, topic, b"once", 2, 5, dup=True), mqtt.ack(mqtt.PUBREL, 5))
    speaker.expect(mqtt.PUBREC, packet_id=5, reason=0)
    speaker.expect(mqtt.PUBCOMP, packet_id=5, reason=0)
    speaker.publish(topic, b"marker", 1)
    listener.message(b"once")
    listener.message(b"marker")


def test_after_pubcomp_the_same_identifier_is_a_new_message(version: int, join: Connector) -> None:
    (listener, topic), speaker = listening(version, join, "reuse/"), join(version)
    for n, dup in enumerate((False, False, True)):
        speaker.say(mqtt.publish(version, topic, b"%d" % n, 2, 5, dup=dup))
        speaker.expect(mqtt.PUBREC, packet_id=5)
        speaker.say(mqtt.ack(mqtt.PUBREL, 5))
        speaker.expect(mqtt.PUBCOMP, packet_id=5, reason=0)
        listener.message(b"%d" % n)


def test_after_a_pubrec_of_refusal_the_same_identifier_is_a_new_message(join: Connector) -> None:
    (listener, topic), speaker = listening(V5, join, "reuse/"), join(V5)
    speaker.say(mqtt.publish(V5, "$SYS/forbidden", b"x", 2, 5))
    if speaker.expect(mqtt.PUBREC, packet_id=5).reason < 0x80:
        pytest.fail("a publish to $SYS was expected to be refused")
    speaker.say(mqtt.publish(V5, topic, b"new", 2, 5))
    speaker.expect(mqtt.PUBREC, packet_id=5, reason=0)
    speaker.say(mqtt.ack(mqtt.PUBREL, 5))
    speaker.expect(mqtt.PUBCOMP, packet_id=5, reason=0)
    listener.message(b"new")


def test_pubrel_of_an_unknown_identifier_is_answered(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.ack(mqtt.PUBREL, 99))
    client.expect(mqtt.PUBCOMP, packet_id=99, reason=0x92 if version == V5 else 0)


def test_pubrel_sent_again_for_a_lost_pubcomp_is_answered_as_done(version: int, join: Connector) -> None:
    """Clients report 0x92 to their app as a failed publish; here nothing failed."""
    (listener, topic), name = listening(version, join, "done/"), fresh("done")
    client = join(version, name, **LASTING)
    client.say(mqtt.publish(version, topic, b"x", 2, 8))
    client.expect(mqtt.PUBREC, packet_id=8)
    client.say(mqtt.ack(mqtt.PUBREL, 8))
    client.expect(mqtt.PUBCOMP, packet_id=8)
    client.drop()
    client = join(version, name, **LASTING)
    client.say(mqtt.ack(mqtt.PUBREL, 8))
    client.expect(mqtt.PUBCOMP, packet_id=8, reason=0)
    listener.message(b"x")


def test_pubrel_sent_twice_is_answered_twice(version: int, join: Connector) -> None:
    (listener, topic), speaker = listening(version, join, "twice/"), join(version)
    speaker.publish(topic, b"x", 2)
    speaker.say(mqtt.ack(mqtt.PUBREL, speaker.next_id - 1))
    speaker.expect(mqtt.PUBCOMP, packet_id=speaker.next_id - 1)
    speaker.publish(topic, b"marker", 2)
    listener.message(b"x")
    listener.message(b"marker")


def test_pubrecs_come_in_the_order_of_their_messages(version: int, join: Connector) -> None:
    client, topic = join(version), fresh("order/")
    client.say(*[mqtt.publish(version, topic, b"x", 2, number) for number in range(1, 15)])
    assert [client.expect(mqtt.PUBREC).packet_id for _ in range(14)] == list(range(1, 15))
    client.say(*[mqtt.ack(mqtt.PUBREL, number) for number in range(1, 15)])
    assert [client.expect(mqtt.PUBCOMP).packet_id for _ in range(14)] == list(range(1, 15))


@pytest.mark.parametrize("dup", [True, False])
def test_an_unfinished_message_of_a_client_is_finished_on_its_next_connection(
    version: int, dup: bool, join: Connector
) -> None:
    """Its PUBREC was lost, it thinks. Some do not mark what they send again (rumqttc)."""
    listener, topic = listening(version, join, "resume/")
    name = fresh("resume")
    client = join(version, name, **LASTING)
    client.say(mqtt.publish(version, topic, b"once", 2, 8))
    client.expect(mqtt.PUBREC, packet_id=8)
    client.drop()
    client = join(version, name, **LASTING)
    client.say(mqtt.publish(version, topic, b"once", 2, 8, dup=dup))
    assert client.expect(mqtt.PUBREC, packet_id=8).reason < 0x80
    client.say(mqtt.ack(mqtt.PUBREL, 8))
    client.expect(mqtt.PUBCOMP, packet_id=8, reason=0)
    client.publish(topic, b"marker", 1)
    listener.message(b"once")
    listener.message(b"marker")


def test_a_new_message_under_an_identifier_that_an_earlier_connection_left_unfinished_is_not_lost(
    version: int, join: Connector
) -> None:
    """Without DUP and with other content it is none sent again (MQTT-3.3.1-1): its client was restarted and forgot."""
    listener, topic = listening(version, join, "forgot/")
    name = fresh("forgot")
    client = join(version, name, **LASTING)
    client.say(mqtt.publish(version, topic, b"before", 2, 8))
    client.expect(mqtt.PUBREC, packet_id=8)
    client.drop()
    client = join(version, name, **LASTING)
    client.say(mqtt.publish(version, topic, b"after", 2, 8))
    assert client.expect(mqtt.PUBREC, packet_id=8).reason < 0x80
    client.say(mqtt.publish(version, topic, b"after", 2, 8, dup=True))
    assert client.expect(mqtt.PUBREC, packet_id=8).reason < 0x80
    client.say(mqtt.ack(mqtt.PUBREL, 8))
    client.expect(mqtt.PUBCOMP, packet_id=8, reason=0)
    client.publish(topic, b"marker", 1)
    got = listener.message().payload
    if got == b"before":  # whether an unreleased message is handed on is the server's choice (§4.3.3)
        got = listener.message().payload
    assert got == b"after"
    listener.message(b"marker")


def test_a_clean_start_forgets_the_unfinished_messages_of_a_client(version: int, join: Connector) -> None:
    listener, topic = listening(version, join, "forget/")
    name = fresh("forget")
    client = join(version, name, **LASTING)
    client.say(mqtt.publish(version, topic, b"1", 2, 8))
    client.expect(mqtt.PUBREC, packet_id=8)
    client.drop()
    client = join(version, name)
    client.say(mqtt.publish(version, topic, b"2", 2, 8))
    client.expect(mqtt.PUBREC, packet_id=8)
    client.say(mqtt.ack(mqtt.PUBREL, 8))
    client.expect(mqtt.PUBCOMP, packet_id=8)
    got = listener.message().payload
    if got == b"1":  # whether an unreleased message is handed on is the server's choice (§4.3.3)
        got = listener.message().payload
    assert got == b"2"


def test_the_exchange_goes_on_after_the_message_expired(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.publish(V5, fresh("expired/"), b"x", 2, 8, props=[(mqtt.MESSAGE_EXPIRY, 1)]))
    client.expect(mqtt.PUBREC, packet_id=8)
    time.sleep(1.2)
    client.say(mqtt.ack(mqtt.PUBREL, 8))
    client.expect(mqtt.PUBCOMP, packet_id=8, reason=0)


# ------------------------------------------------------------------------------------------ as the sender
def test_pubrel_follows_pubrec_with_the_same_identifier(version: int, join: Connector) -> None:
    (listener, topic), speaker = listening(version, join, "send/"), join(version)
    speaker.publish(topic, b"x", 2)
    got = listener.expect(mqtt.PUBLISH, payload=b"x", qos=2, dup=False)
    listener.say(mqtt.ack(mqtt.PUBREC, got.packet_id))
    listener.expect(mqtt.PUBREL, packet_id=got.packet_id, reason=0)
    listener.say(mqtt.ack(mqtt.PUBREC, got.packet_id))  # said again: answered again, or not at all, but never PUBLISH
    listener.say(mqtt.ack(mqtt.PUBCOMP, got.packet_id))
    assert all(each.kind == mqtt.PUBREL for each in listener.silence())


def test_pubrels_come_in_the_order_of_the_pubrecs(version: int, join: Connector) -> None:
    (listener, topic), speaker = listening(version, join, "order/"), join(version)
    for n in range(10):
        speaker.publish(topic, b"%d" % n, 2)
    ids = [listener.expect(mqtt.PUBLISH).packet_id for _ in range(10)]
    ids = ids[5:] + ids[:5]
    listener.say(*[mqtt.ack(mqtt.PUBREC, number) for number in ids])
    assert [listener.expect(mqtt.PUBREL).packet_id for _ in ids] == ids


def test_a_message_without_pubrec_is_sent_again_with_dup_on_reconnect(version: int, join: Connector) -> None:
    name, topic = fresh("again"), fresh("again/")
    client, speaker = join(version, name, **LASTING), join(version)
    client.subscribe(topic, qos=2)
    speaker.publish(topic, b"x", 2)
    first = client.expect(mqtt.PUBLISH, payload=b"x", dup=False)
    assert client.silence() == []
    client.drop()
    client = join(version, name, **LASTING)
    client.message(b"x", qos=2, dup=True, packet_id=first.packet_id)
    assert client.silence() == []


def test_after_pubrec_only_pubrel_is_sent_again_on_reconnect(version: int, join: Connector) -> None:
    name, topic = fresh("again"), fresh("again/")
    client, speaker = join(version, name, **LASTING), join(version)
    client.subscribe(topic, qos=2)
    speaker.publish(topic, b"x", 2)
    number = client.expect(mqtt.PUBLISH, payload=b"x").packet_id
    client.say(mqtt.ack(mqtt.PUBREC, number))
    client.expect(mqtt.PUBREL, packet_id=number)
    for _ in range(2):
        client.drop()
        client = join(version, name, **LASTING)
        client.expect(mqtt.PUBREL, packet_id=number, reason=0)
        assert client.silence() == []
    client.say(mqtt.ack(mqtt.PUBCOMP, number))
    client.end()
    client = join(version, name, **LASTING)
    assert client.silence() == []


def test_everything_unfinished_is_sent_again_in_its_order(version: int, join: Connector) -> None:
    name, topic = fresh("again"), fresh("again/")
    client, speaker = join(version, name, **LASTING), join(version)
    client.subscribe(topic, qos=2)
    for n in range(8):
        speaker.publish(topic, b"%d" % n, 1 + n % 2)
    sent = [client.expect(mqtt.PUBLISH, payload=b"%d" % n) for n in range(8)]
    client.say(mqtt.ack(mqtt.PUBACK, sent[2].packet_id))
    client.silence()
    client.drop()
    client = join(version, name, **LASTING)
    for n in (0, 1, 3, 4, 5, 6, 7):
        client.expect(mqtt.PUBLISH, payload=b"%d" % n, dup=True, qos=1 + n % 2, packet_id=sent[n].packet_id)
    assert client.silence() == []


def test_a_message_once_sent_does_not_expire(join: Connector) -> None:
    name, topic = fresh("expiry"), fresh("expiry/")
    client, speaker = join(V5, name, **LASTING), join(V5)
    client.subscribe(topic, qos=2)
    speaker.publish(topic, b"sent", 2, props=[(mqtt.MESSAGE_EXPIRY, 1)])
    number = client.expect(mqtt.PUBLISH, payload=b"sent").packet_id
    client.drop()
    time.sleep(1.3)
    client = join(V5, name, **LASTING)
    client.message(b"sent", packet_id=number, dup=True)


def test_pubrec_of_an_unknown_identifier_is_answered_with_not_found(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.ack(mqtt.PUBREC, 99))
    client.expect(mqtt.PUBREL, packet_id=99, reason=0x92)


def test_pubcomp_and_puback_of_an_unknown_identifier_disturb_nothing(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.ack(mqtt.PUBCOMP, 99), mqtt.ack(mqtt.PUBACK, 98))
    assert client.silence() == []


@pytest.mark.parametrize("kind", [mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBREL, mqtt.PUBCOMP])
def test_the_long_form_of_an_acknowledgement_is_understood(kind: int, join: Connector) -> None:
    (listener, topic), speaker = listening(V5, join, "long/"), join(V5)
    explain: list[mqtt.Property] = [(mqtt.REASON_STRING, "fine"), (mqtt.USER_PROPERTY, ("a", "b"))]
    if kind == mqtt.PUBREL:
        speaker.say(mqtt.publish(V5, topic, b"x", 2, 5))
        speaker.expect(mqtt.PUBREC, packet_id=5)
        speaker.say(mqtt.ack(mqtt.PUBREL, 5, 0, explain))
        speaker.expect(mqtt.PUBCOMP, packet_id=5, reason=0)
        return
    speaker.publish(topic, b"x", 1 if kind == mqtt.PUBACK else 2)
    number = listener.expect(mqtt.PUBLISH).packet_id
    if kind == mqtt.PUBCOMP:
        listener.say(mqtt.ack(mqtt.PUBREC, number))
        listener.expect(mqtt.PUBREL)
    listener.say(mqtt.ack(kind, number, 0, explain))
    if kind == mqtt.PUBREC:
        listener.expect(mqtt.PUBREL, packet_id=number, reason=0)
    assert listener.silence() == []


def test_a_wrong_reason_in_an_acknowledgement_closes_the_connection(join: Connector) -> None:
    for kind in (mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBREL, mqtt.PUBCOMP):
        client = join(V5)
        client.say(mqtt.ack(kind, 1, 0x42))
        client.expect_close(0x81, 0x82)


def test_versions_do_not_mix_their_words(join: Connector) -> None:
    (listener, topic), speaker = listening(V3, join, "mix/"), join(V5)
    speaker.publish(topic, b"x", 2, props=[(mqtt.USER_PROPERTY, ("a", "b"))])
    listener.message(b"x", qos=2)
    (listener, topic), speaker = listening(V5, join, "mix/"), join(V3)
    speaker.publish(topic, b"x", 2)
    assert listener.message(b"x", qos=2).props == []


# ------------------------------------------------------------------------------------------- cuts at any point
class Exchange:
    """A publisher and a subscriber at QoS 2 that lose their connections, or their server, at random points.

    Both go on as the standard has them do. `got`: what the subscriber took; `begun`: by packet id, what it took and
    was not released yet.
    """

    def __init__(self, version: int, seed: int, daemon: Daemon, kill_chance: float) -> None:
        self.version, self.daemon, self.kill_chance = version, daemon, kill_chance
        self.rng = random.Random(seed)
        self.topic, self.names = fresh("cuts/"), (fresh("cut"), fresh("cut"))
        self.got: list[bytes] = []
        self.begun: dict[int, bytes] = {}
        self.speaker, self.listener = self.join(self.names[0]), self.join(self.names[1])
        self.listener.subscribe(self.topic, qos=2)

    def join(self, name: str) -> Client:
        client = Client(self.daemon.port, self.version)
        client.connect(name, **LASTING)
        return client

    def kill(self) -> None:
        self.daemon.process.kill()
        self.daemon.process.wait()
        self.daemon.start()
        self.daemon.status()

    def publish(self, number: int) -> None:
        """One message through its whole exchange, begun again as often as it takes."""
        released = dup = False
        while True:
            try:
                if released:
                    self.speaker.say(mqtt.ack(mqtt.PUBREL, number))
                else:
                    self.speaker.say(mqtt.publish(self.version, self.topic, b"%d" % number, 2, number, dup=dup))
                chance = self.rng.random()
                if chance < self.kill_chance:
                    self.kill()
                elif chance < self.kill_chance + 0.15:
                    self.speaker.drop()  # the answer is lost
                answer = self.speaker.hear()
            except (mqtt.Closed, OSError):
                self.speaker = self.join(self.names[0])
                dup = True
                continue
            assert (answer.kind, answer.packet_id) == (mqtt.PUBCOMP if released else mqtt.PUBREC, number)
            if released:
                return
            released = True

    def listen(self) -> None:
        """Answer one packet, and now and then vanish before or after answering."""
        try:
            heard = self.listener.hear(0.05)
            cut = self.rng.random()
            if cut > 0.1:
                self.answer(heard)
            if cut < 0.2:
                self.listener.drop()
                self.listener = self.join(self.names[1])
        except TimeoutError:
            return
        except (mqtt.Closed, OSError):
            self.listener = self.join(self.names[1])

    def answer(self, heard: mqtt.Packet) -> None:
        if heard.kind == mqtt.PUBREL:
            self.begun.pop(heard.packet_id, None)
            self.listener.say(mqtt.ack(mqtt.PUBCOMP, heard.packet_id))
            return
        assert heard.kind == mqtt.PUBLISH, heard
        if heard.packet_id not in self.begun:
            self.begun[heard.packet_id] = heard.payload
            self.got.append(heard.payload)
        assert self.begun[heard.packet_id] == heard.payload, "an identifier stands for two messages"
        self.listener.say(mqtt.ack(mqtt.PUBREC, heard.packet_id))

    def run(self, count: int) -> None:
        for number in range(1, count + 1):
            self.publish(number)
            self.listen()
        end = time.monotonic() + 20
        while (len(self.got) < count or self.begun) and time.monotonic() < end:
            self.listen()
        assert self.got == [b"%d" % number for number in range(1, count + 1)]
        assert not self.begun
        self.speaker.stream.close()
        self.listener.stream.close()


@pytest.mark.parametrize("seed", range(4))
def test_each_message_arrives_once_and_in_order_whatever_is_cut(version: int, seed: int, daemon: Daemon) -> None:
    Exchange(version, seed, daemon, kill_chance=0).run(30)


@pytest.mark.parametrize("seed", [7])
def test_each_message_arrives_once_and_in_order_though_the_server_is_killed(
    version: int, seed: int, daemon: Daemon
) -> None:
    Exchange(version, seed, daemon, kill_chance=0.06).run(20)
