"""Sessions across connections and restarts: MQTT 3.1.1 and 5.0, §3.1.2.4, §3.1.2.11.2, §3.2.2.1, §4.1, §4.4, §4.5."""

from __future__ import annotations

import time

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, Client, Will, fresh
from tests.conformance.conftest import Connector, Dial
from tests.daemon import Daemon

EXPIRY = mqtt.SESSION_EXPIRY


def lasting(expiry_s: int = 100, *, clean: bool = False) -> dict[str, object]:
    """Options for a session that outlives its connection, on either version."""
    return {"clean": clean, "props": [(EXPIRY, expiry_s)]}


def test_a_new_session_is_not_present_and_a_kept_one_is(version: int, dial: Dial) -> None:
    name = fresh("present")
    for present in (False, True, True):
        client = dial(version)
        assert client.connect(name, **lasting()).session_present is present
        client.end()


def test_a_clean_start_discards_the_session(version: int, dial: Dial, join: Connector) -> None:
    name, topic, marker = fresh("clean"), fresh("clean/"), fresh("clean/")
    client, speaker = join(version, name, **lasting()), join(version)
    client.subscribe(topic, qos=1)
    client.end()
    speaker.publish(topic, b"waiting", 1)
    client = dial(version)
    assert not client.connect(name, **lasting(clean=True) if version == V5 else {}).session_present
    speaker.publish(topic, b"nobody listens", 1)
    client.subscribe(marker, qos=1)
    speaker.publish(marker, b"marker", 1)
    client.message(b"marker")


def test_a_clean_session_of_3_1_1_ends_with_its_connection(dial: Dial, join: Connector) -> None:
    name, topic = fresh("clean"), fresh("clean/")
    client = join(V3, name)
    client.subscribe(topic, qos=1)
    client.end()
    client = dial(V3)
    assert not client.connect(name, clean=False).session_present
    join(V3).publish(topic, b"x", 1)
    assert client.silence() == []


@pytest.mark.parametrize("props", [[], [(EXPIRY, 0)]], ids=["absent", "0"])
def test_without_session_expiry_the_session_ends_with_its_connection(
    props: list[mqtt.Property], dial: Dial, join: Connector
) -> None:
    name = fresh("zero")
    join(V5, name, props=props).end()
    assert not dial(V5).connect(name, clean=False).session_present


def test_a_session_ends_when_its_expiry_has_passed(dial: Dial, join: Connector) -> None:
    name, topic = fresh("expiry"), fresh("expiry/")
    client = join(V5, name, **lasting(1))
    client.subscribe(topic, qos=1)
    time.sleep(1.2)  # an expiry runs only while there is no connection
    assert client.silence() == []
    client.end()
    client = dial(V5)
    assert client.connect(name, **lasting(1)).session_present
    client.end()
    join(V5).publish(topic, b"x", 1)
    time.sleep(1.3)
    client = dial(V5)
    assert not client.connect(name, **lasting(1)).session_present
    assert client.silence() == []


def test_disconnect_can_change_the_session_expiry(dial: Dial, join: Connector) -> None:
    name = fresh("change")
    join(V5, name, **lasting(100)).end(props=[(EXPIRY, 0)])
    assert not dial(V5).connect(name, clean=False).session_present
    name = fresh("change")
    join(V5, name, **lasting(1)).end(props=[(EXPIRY, 100)])
    time.sleep(1.3)
    assert dial(V5).connect(name, clean=False).session_present
    name = fresh("change")
    join(V5, name, **lasting(1)).end(props=[(EXPIRY, 0xFFFFFFFF)])
    assert dial(V5).connect(name, clean=False).session_present


def test_disconnect_cannot_revive_a_session_without_expiry(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.disconnect(V5, 0, [(EXPIRY, 10)]))
    client.expect_close(0x82)


def test_the_latest_connect_decides_the_session_expiry(dial: Dial, join: Connector) -> None:
    name = fresh("latest")
    join(V5, name, **lasting(100)).end()
    join(V5, name, **lasting(0)).end()
    assert not dial(V5).connect(name, clean=False).session_present


def test_subscriptions_and_messages_outlive_the_connection(version: int, join: Connector) -> None:
    name, topic = fresh("keep"), fresh("keep/")
    client, speaker = join(version, name, **lasting()), join(version)
    client.subscribe(f"{topic}/#", qos=2)
    client.end()
    for n in range(6):
        speaker.publish(f"{topic}/{n}", b"%d" % n, 1 + n % 2)
    client = join(version, name, **lasting())
    for n in range(6):
        client.message(b"%d" % n, topic=f"{topic}/{n}", qos=1 + n % 2, dup=False)
    speaker.publish(f"{topic}/live", b"live", 0)
    client.message(b"live")


def test_a_session_is_its_client_identifiers(version: int, join: Connector) -> None:
    one, two, topic = fresh("one"), fresh("two"), fresh("own/")
    first = join(version, one, **lasting())
    first.subscribe(topic, qos=1)
    first.end()
    join(version).publish(topic, b"for one", 1)
    other = join(version, two, **lasting())
    assert other.silence() == []
    join(version, one, **lasting()).message(b"for one")


def test_a_session_stays_while_its_connection_stands(join: Connector) -> None:
    topic = fresh("stand/")
    client = join(V5, **lasting(0))
    client.subscribe(topic, qos=1)
    time.sleep(1.1)
    join(V5).publish(topic, b"x", 1)
    client.message(b"x")


def test_unacknowledged_messages_are_sent_again_first_and_in_order(version: int, join: Connector) -> None:
    name, topic = fresh("again"), fresh("again/")
    client, speaker = join(version, name, **lasting()), join(version)
    client.subscribe(topic, qos=1)
    for n in range(4):
        speaker.publish(topic, b"%d" % n, 1)
    sent = [client.expect(mqtt.PUBLISH, payload=b"%d" % n, dup=False) for n in range(4)]
    client.drop()
    speaker.publish(topic, b"4", 1)
    client = join(version, name, **lasting())
    for n in range(4):
        client.message(b"%d" % n, dup=True, packet_id=sent[n].packet_id)
    client.message(b"4", dup=False)


def test_nothing_is_sent_again_while_the_connection_stands(version: int, join: Connector) -> None:
    topic = fresh("again/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, qos=2)
    speaker.publish(topic, b"1", 1)
    speaker.publish(topic, b"2", 2)
    listener.expect(mqtt.PUBLISH, payload=b"1")
    listener.expect(mqtt.PUBLISH, payload=b"2")
    time.sleep(0.5)
    assert listener.silence() == []


def test_a_client_may_change_its_version_and_keep_its_session(dial: Dial, join: Connector) -> None:
    name, topic = fresh("both"), fresh("both/")
    client = join(V3, name, clean=False)
    client.subscribe(topic, qos=1)
    client.end()
    join(V5).publish(topic, b"x", 1)
    client = dial(V5)
    assert client.connect(name, **lasting()).session_present
    client.message(b"x")


def test_a_session_may_end_behind_a_message_at_qos_2(daemon: Daemon, join: Connector) -> None:
    """The message is taken, the session forgets its identifier, and nobody else notices."""
    topic = fresh("end/")
    listener = join(V5)
    listener.subscribe(topic, qos=2)
    for n in range(20):
        client = join(V5, **lasting())
        client.say(mqtt.publish(V5, topic, b"%d" % n, 2, 9), mqtt.disconnect(V5, 0, [(EXPIRY, 0)]))
        client.expect_close()
        listener.message(b"%d" % n)
    for n in range(20):
        name = fresh("end")
        old = join(V3, name, clean=False)
        old.say(mqtt.publish(V3, topic, b"%d" % n, 2, 9))
        new = join(V3, name, clean=True)
        listener.message(b"%d" % n)
        assert new.silence() == []
    assert "the disk takes no messages" not in daemon.log.read_text()


# ------------------------------------------------------------------------------------------------ restarts
def test_sessions_exchanges_retained_messages_and_wills_survive_a_kill_of_the_server(
    version: int, daemon: Daemon, dial: Dial, join: Connector
) -> None:
    name, topic, kept, mourned = fresh("kill"), fresh("kill/"), fresh("kept/"), fresh("mourned/")
    client, speaker = join(version, name, **lasting()), join(version, name + "s", **lasting())
    watcher = join(version, name + "w", **lasting())
    watcher.subscribe(mourned, qos=1)
    client.subscribe(topic, qos=2)
    join(version, will=Will(mourned, b"it died with the server", 1))
    speaker.publish(kept, b"state", 1, retain=True)
    speaker.publish(topic, b"1", 1)
    speaker.publish(topic, b"2", 2)
    speaker.publish(topic, b"3", 2)
    sent = [client.expect(mqtt.PUBLISH, payload=b"%d" % n) for n in (1, 2, 3)]
    client.say(mqtt.ack(mqtt.PUBREC, sent[1].packet_id))
    client.expect(mqtt.PUBREL, packet_id=sent[1].packet_id)
    speaker.say(mqtt.publish(version, topic, b"4", 2, 40))
    speaker.expect(mqtt.PUBREC, packet_id=40)

    daemon.process.kill()
    daemon.process.wait()
    daemon.start()
    daemon.status()

    client = dial(version)
    assert client.connect(name, **lasting()).session_present
    heard = [client.hear() for _ in range(3)]
    released = [each for each in heard if each.kind == mqtt.PUBREL]
    again = [each for each in heard if each.kind == mqtt.PUBLISH]
    assert [each.packet_id for each in released] == [sent[1].packet_id]
    assert [(each.payload, each.qos) for each in again] == [(b"1", 1), (b"3", 2)]
    # At QoS 2 the exchange goes on; at QoS 1 a kill may cost the memory that it was sent, never the message.
    assert (again[1].packet_id, again[1].dup) == (sent[2].packet_id, True)
    speaker = dial(version)
    assert speaker.connect(name + "s", **lasting()).session_present
    speaker.say(mqtt.publish(version, topic, b"4", 2, 40, dup=True))
    assert speaker.expect(mqtt.PUBREC, packet_id=40).reason < 0x80
    speaker.say(mqtt.ack(mqtt.PUBREL, 40))
    speaker.expect(mqtt.PUBCOMP, packet_id=40, reason=0)
    speaker.publish(topic, b"marker", 1)
    client.message(b"4", qos=2)
    client.message(b"marker")
    late = join(version)
    late.say(mqtt.subscribe(version, 1, (kept, 0)))
    (got,) = [each for each in (late.hear(), late.hear()) if each.kind == mqtt.PUBLISH]
    assert (got.payload, got.retain) == (b"state", True)
    join(version, name + "w", **lasting()).message(b"it died with the server")


def test_session_present_is_not_claimed_for_a_session_the_restart_ended(
    daemon: Daemon, dial: Dial, join: Connector
) -> None:
    clients: list[Client] = [join(V3, fresh("gone")), join(V5, fresh("gone"))]
    names = [each.client_id for each in clients]
    daemon.process.kill()
    daemon.process.wait()
    daemon.start()
    daemon.status()
    for version, name in zip((V3, V5), names, strict=True):
        assert not dial(version).connect(name, clean=False).session_present
