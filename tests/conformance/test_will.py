"""Wills: MQTT 3.1.1 and 5.0, §3.1.2.5 to §3.1.2.7, §3.1.3.2, §3.14.4."""

from __future__ import annotations

import time

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, Client, Will, fresh
from tests.conformance.conftest import Connector, Dial


def listening(version: int, join: Connector) -> tuple[Client, str]:
    listener, topic = join(version), fresh("will/")
    listener.subscribe(topic, qos=2)
    return listener, topic


def nothing_before(marker: bytes, listener: Client, topic: str, join: Connector) -> None:
    join(listener.version).publish(topic, marker, 1)
    listener.message(marker)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_lost_connection_publishes_the_will_once(version: int, qos: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    join(version, will=Will(topic, b"lost", qos)).drop()
    listener.message(b"lost", topic=topic, qos=qos, retain=False, dup=False)
    nothing_before(b"marker", listener, topic, join)


def test_a_connection_closed_without_disconnect_publishes_the_will(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    join(version, will=Will(topic, b"closed")).stream.close()  # in good order, but without a word
    listener.message(b"closed")


def test_disconnect_deletes_the_will(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    join(version, will=Will(topic, b"no")).end()
    nothing_before(b"marker", listener, topic, join)


@pytest.mark.parametrize("reason", [0x04, 0x80, 0x81])
def test_disconnect_with_another_reason_publishes_the_will(reason: int, join: Connector) -> None:
    listener, topic = listening(V5, join)
    join(V5, will=Will(topic, b"asked for")).end(reason)
    listener.message(b"asked for")


def test_a_protocol_error_publishes_the_will(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    client = join(version, will=Will(topic, b"error"))
    client.say(b"\x00\x00")
    client.expect_close()
    listener.message(b"error")


def test_a_takeover_publishes_the_will_of_the_old_connection(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    name = fresh("taken")
    join(version, name, will=Will(topic, b"taken"))
    new = join(version, name)
    listener.message(b"taken")
    assert new.silence() == []


def test_no_will_no_message(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    client = join(version)
    client.publish(topic, b"only this", 1)
    client.drop()
    listener.message(b"only this")
    nothing_before(b"marker", listener, topic, join)


def test_a_refused_connection_leaves_no_will(version: int, dial: Dial, join: Connector) -> None:
    listener, topic = listening(version, join)
    client = dial(version)
    if version == V3:
        client.say(mqtt.connect(V3, "", clean=False, will=Will(topic)))
    else:
        client.say(mqtt.connect(V5, fresh(), will=Will(topic), props=[(mqtt.AUTH_METHOD, "no such method")]))
    client.expect_close()
    nothing_before(b"marker", listener, topic, join)


def test_a_will_is_gone_once_it_is_published(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    name = fresh("once")
    lasting = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}
    join(version, name, will=Will(topic, b"once"), **lasting).drop()
    listener.message(b"once")
    join(version, name, **lasting).drop()
    nothing_before(b"marker", listener, topic, join)


def test_a_new_connection_replaces_the_will(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    name = fresh("replace")
    lasting = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}
    join(version, name, will=Will(topic, b"old"), **lasting).end()
    join(version, name, will=Will(topic, b"new"), **lasting).drop()
    listener.message(b"new")
    nothing_before(b"marker", listener, topic, join)


@pytest.mark.parametrize("retain", [False, True])
def test_will_retain_decides_whether_the_will_is_kept(version: int, retain: bool, join: Connector) -> None:
    listener, topic = listening(version, join)
    join(version, will=Will(topic, b"kept?", 1, retain)).drop()
    listener.message(b"kept?", retain=False)
    late, marker = join(version), fresh("marker/")
    late.say(mqtt.subscribe(version, 1, (topic, 0), (marker, 0)))
    late.say(mqtt.publish(version, marker, b"marker"))
    heard = []
    while (got := late.hear()).payload != b"marker":
        heard.append(got)
    late.silence()
    assert [(each.payload, each.retain) for each in heard if each.kind == mqtt.PUBLISH] == [(b"kept?", True)] * retain


def test_a_will_may_be_empty_and_binary(version: int, join: Connector) -> None:
    listener, topic = listening(version, join)
    for payload in (b"", b"\x00\xff\xfe"):
        join(version, will=Will(topic, payload)).drop()
        listener.message(payload)


def test_a_will_to_a_wildcard_is_refused(version: int, dial: Dial) -> None:
    for topic in ("a/+", "#", ""):
        client = dial(version)
        client.say(mqtt.connect(version, fresh(), will=Will(topic)))
        heard = client.expect_close(0x81, 0x82, 0x90)
        assert all(each.reason for each in heard)


def test_a_will_carries_its_properties_in_their_order(join: Connector) -> None:
    listener, topic = listening(V5, join)
    props: tuple[mqtt.Property, ...] = (
        (mqtt.PAYLOAD_FORMAT, 1),
        (mqtt.CONTENT_TYPE, "text"),
        (mqtt.RESPONSE_TOPIC, "answer"),
        (mqtt.CORRELATION, b"\0\xff"),
        (mqtt.USER_PROPERTY, ("z", "1")),
        (mqtt.USER_PROPERTY, ("a", "2")),
        (mqtt.USER_PROPERTY, ("z", "1")),
    )
    join(V5, will=Will(topic, b"text", 1, props=(*props, (mqtt.MESSAGE_EXPIRY, 500)))).drop()
    got = listener.message(b"text")
    expiry = got.get(mqtt.MESSAGE_EXPIRY)
    assert isinstance(expiry, int)
    assert 498 <= expiry <= 500
    assert sorted(each for each in got.props if each[0] != mqtt.MESSAGE_EXPIRY) == sorted(props)
    assert got.all(mqtt.USER_PROPERTY) == [("z", "1"), ("a", "2"), ("z", "1")]


# ---------------------------------------------------------------------------------------------- will delay
def delayed(join: Connector, topic: str, delay_s: int, expiry_s: int, name: str | None = None) -> Client:
    will = Will(topic, b"late", props=((mqtt.WILL_DELAY, delay_s),))
    return join(V5, name, will=will, props=[(mqtt.SESSION_EXPIRY, expiry_s)])


def test_a_will_waits_for_its_delay(join: Connector) -> None:
    listener, topic = listening(V5, join)
    delayed(join, topic, 1, 100).drop()
    began = time.monotonic()
    nothing_before(b"marker", listener, topic, join)
    listener.message(b"late")
    assert 0.8 < time.monotonic() - began < 15


def test_the_end_of_the_session_ends_the_delay(join: Connector) -> None:
    listener, topic = listening(V5, join)
    delayed(join, topic, 100, 0).drop()
    began = time.monotonic()
    listener.message(b"late")
    assert time.monotonic() - began < 15
    delayed(join, topic, 100, 1).drop()
    nothing_before(b"marker", listener, topic, join)
    listener.message(b"late")
    assert 0.8 < time.monotonic() - began < 15


def test_a_new_connection_within_the_delay_cancels_the_will(join: Connector) -> None:
    listener, topic = listening(V5, join)
    name = fresh("back")
    delayed(join, topic, 1, 100, name).drop()
    back = join(V5, name, clean=False, props=[(mqtt.SESSION_EXPIRY, 100)])
    time.sleep(1.3)
    nothing_before(b"marker", listener, topic, join)
    assert back.silence() == []


def test_a_clean_start_within_the_delay_publishes_the_will(join: Connector) -> None:
    listener, topic = listening(V5, join)
    name = fresh("anew")
    delayed(join, topic, 100, 100, name).drop()
    join(V5, name)  # ends the old session, and with it the delay
    listener.message(b"late")


def test_a_takeover_within_the_delay_publishes_no_will(join: Connector) -> None:
    listener, topic = listening(V5, join)
    name = fresh("taken")
    old = delayed(join, topic, 1, 100, name)
    new = join(V5, name, clean=False, props=[(mqtt.SESSION_EXPIRY, 100)])
    old.expect_close(0x8E)
    time.sleep(1.3)
    nothing_before(b"marker", listener, topic, join)
    assert new.silence() == []
