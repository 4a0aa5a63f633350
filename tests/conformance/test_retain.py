"""Retained messages: MQTT 3.1.1 §3.3.1.3, MQTT 5.0 §3.3.1.3 and §3.8.3.1."""

from __future__ import annotations

import time

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V5, Client, fresh
from tests.conformance.conftest import Connector

AS_PUBLISHED, IF_NEW, NEVER = 8, 16, 32


def retain(version: int, join: Connector, topic: str, payload: bytes, qos: int = 1, **options: object) -> Client:
    speaker = join(version)
    speaker.publish(topic, payload, qos, retain=True, **options)
    speaker.silence()  # also at QoS 0 it has been read now
    return speaker


def kept(version: int, join: Connector, topic: str, *, options: int = 2) -> list[mqtt.Packet]:
    """What a new subscriber of `topic` gets."""
    listener, marker = join(version), fresh("marker/")
    number = listener.number()
    listener.say(mqtt.subscribe(version, number, (topic, options), (marker, 0)))
    got: list[mqtt.Packet] = []
    heard = listener.hear()
    while heard.kind != mqtt.SUBACK:  # retained messages may come before it
        got.append(heard)
        heard = listener.hear()
    join(version).publish(marker, b"marker")
    while (heard := listener.expect(mqtt.PUBLISH)).topic != marker:
        got.append(heard)
        if heard.qos == 1:
            listener.say(mqtt.ack(mqtt.PUBACK, heard.packet_id))
        elif heard.qos == 2:
            listener.finish(heard.packet_id)
    listener.end()
    return got


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_retained_message_reaches_a_later_subscriber_marked_and_with_its_qos(
    version: int, qos: int, join: Connector
) -> None:
    topic = fresh("retain/")
    retain(version, join, topic, b"state", qos)
    (got,) = kept(version, join, topic)
    assert (got.topic, got.payload, got.retain, got.qos, got.dup) == (topic, b"state", True, qos, False)


def test_a_retained_message_is_sent_at_the_lower_qos(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    retain(version, join, topic, b"state", 2)
    assert [each.qos for each in kept(version, join, topic, options=0)] == [0]
    assert [each.qos for each in kept(version, join, topic, options=1)] == [1]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_the_last_retained_message_replaces_the_one_before(version: int, qos: int, join: Connector) -> None:
    topic = fresh("retain/")
    speaker = retain(version, join, topic, b"1", 2)
    speaker.publish(topic, b"2", qos, retain=True)
    speaker.silence()
    assert [(each.payload, each.qos) for each in kept(version, join, topic)] == [(b"2", qos)]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_an_empty_retained_message_removes_the_one_kept(version: int, qos: int, join: Connector) -> None:
    topic = fresh("retain/")
    speaker = retain(version, join, topic, b"state")
    listener = join(version)
    listener.subscribe((topic + "/x", 0), (topic + "/+", 0))
    speaker.publish(topic, b"", qos, retain=True)
    speaker.silence()
    assert kept(version, join, topic) == []


def test_an_empty_retained_message_is_delivered_like_any_other(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    listener = join(version)
    listener.subscribe(topic, qos=1)
    retain(version, join, topic, b"")
    listener.message(b"", topic=topic, retain=False)
    assert kept(version, join, topic) == []


def test_a_message_without_retain_leaves_the_one_kept_alone(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    speaker = retain(version, join, topic, b"state")
    for payload in (b"live", b""):
        speaker.publish(topic, payload, 1)
    assert [each.payload for each in kept(version, join, topic)] == [b"state"]


def test_a_message_without_retain_is_not_kept(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    join(version).publish(topic, b"live", 1)
    assert kept(version, join, topic) == []


def test_an_established_subscription_gets_retained_messages_unmarked(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    listener = join(version)
    listener.subscribe(topic, qos=2)
    for qos in (0, 1, 2):
        retain(version, join, topic, b"live", qos)
        listener.message(b"live", retain=False, qos=qos)


def test_a_wildcard_gets_every_retained_message_it_matches(version: int, join: Connector) -> None:
    stem = fresh("retain/")
    for n in range(5):
        retain(version, join, f"{stem}/{n}", b"%d" % n)
    retain(version, join, f"{stem}/deep/er", b"deep")
    got = kept(version, join, f"{stem}/+")
    assert {each.topic: each.payload for each in got} == {f"{stem}/{n}": b"%d" % n for n in range(5)}
    assert len(kept(version, join, f"{stem}/#")) == 6
    assert all(each.retain for each in got)


def test_a_wildcard_in_front_gets_no_retained_dollar_topic(version: int, join: Connector) -> None:
    stem = fresh("kept")
    retain(version, join, f"a/{stem}", b"plain")
    retain(version, join, f"$dollar/{stem}", b"dollar")
    assert [each.payload for each in kept(version, join, f"+/{stem}")] == [b"plain"]


def test_subscribing_again_sends_retained_messages_again(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    retain(version, join, topic, b"state")
    listener = join(version)
    for _ in range(3):
        number = listener.number()
        listener.say(mqtt.subscribe(version, number, (topic, 1)))
        heard = [listener.hear(), listener.hear()]
        assert {each.kind for each in heard} == {mqtt.SUBACK, mqtt.PUBLISH}
        (got,) = [each for each in heard if each.kind == mqtt.PUBLISH]
        assert (got.payload, got.retain) == (b"state", True)
        listener.say(mqtt.ack(mqtt.PUBACK, got.packet_id))


def test_retained_messages_outlive_their_publishers_session(version: int, join: Connector) -> None:
    topic = fresh("retain/")
    retain(version, join, topic, b"state").end()
    assert [each.payload for each in kept(version, join, topic)] == [b"state"]


# ------------------------------------------------------------------------------------------ options of 5.0
def test_retain_handling_0_sends_them_at_every_subscribe(join: Connector) -> None:
    topic, listener = fresh("retain/"), join(V5)
    retain(V5, join, topic, b"state", 0)
    for _ in range(2):
        listener.say(mqtt.subscribe(V5, 1, (topic, 0)))
        assert {listener.hear().kind, listener.hear().kind} == {mqtt.SUBACK, mqtt.PUBLISH}


def test_retain_handling_1_sends_them_to_a_new_subscription_only(join: Connector) -> None:
    topic, listener, speaker = fresh("retain/"), join(V5), join(V5)
    retain(V5, join, topic, b"state", 0)
    listener.say(mqtt.subscribe(V5, 1, (topic, IF_NEW)))
    assert {listener.hear().kind, listener.hear().kind} == {mqtt.SUBACK, mqtt.PUBLISH}
    assert listener.subscribe((topic, IF_NEW)) == (0,)
    speaker.publish(topic, b"marker")
    listener.message(b"marker", retain=False)
    listener.unsubscribe(topic)
    listener.say(mqtt.subscribe(V5, 9, (topic, IF_NEW)))
    assert {listener.hear().kind, listener.hear().kind} == {mqtt.SUBACK, mqtt.PUBLISH}


def test_retain_handling_2_never_sends_them(join: Connector) -> None:
    topic = fresh("retain/")
    retain(V5, join, topic, b"state")
    assert kept(V5, join, topic, options=1 | NEVER) == []


def test_retain_as_published_decides_the_flag_of_live_messages(join: Connector) -> None:
    topic = fresh("retain/")
    plain, published = join(V5), join(V5)
    plain.subscribe((topic, 2))
    published.subscribe((topic, 2 | AS_PUBLISHED))
    for qos in (0, 1, 2):
        for flag in (True, False):
            join(V5).publish(topic, b"x", qos, retain=flag)
            plain.message(b"x", retain=False)
            published.message(b"x", retain=flag)


def test_retained_messages_are_marked_with_and_without_retain_as_published(join: Connector) -> None:
    topic = fresh("retain/")
    retain(V5, join, topic, b"state")
    for options in (1, 1 | AS_PUBLISHED):
        assert [each.retain for each in kept(V5, join, topic, options=options)] == [True]


def test_a_retained_message_keeps_its_properties_and_gets_the_subscription_identifier(join: Connector) -> None:
    topic, listener = fresh("retain/"), join(V5)
    props: list[mqtt.Property] = [
        (mqtt.CONTENT_TYPE, "text/plain"),
        (mqtt.USER_PROPERTY, ("b", "1")),
        (mqtt.USER_PROPERTY, ("a", "2")),
        (mqtt.RESPONSE_TOPIC, "answer"),
        (mqtt.CORRELATION, b"\0\1"),
        (mqtt.PAYLOAD_FORMAT, 1),
    ]
    retain(V5, join, topic, b"state", props=props)
    listener.say(mqtt.subscribe(V5, 1, (topic, 0), props=[(mqtt.SUBSCRIPTION_ID, 7)]))
    heard = [listener.hear(), listener.hear()]
    (got,) = [each for each in heard if each.kind == mqtt.PUBLISH]
    assert sorted(got.props, key=str) == sorted([*props, (mqtt.SUBSCRIPTION_ID, 7)], key=str)
    assert got.all(mqtt.USER_PROPERTY) == [("b", "1"), ("a", "2")]


def test_a_retained_message_expires(join: Connector) -> None:
    short, long = fresh("retain/"), fresh("retain/")
    retain(V5, join, short, b"state", props=[(mqtt.MESSAGE_EXPIRY, 1)])
    retain(V5, join, long, b"state", props=[(mqtt.MESSAGE_EXPIRY, 100)])
    time.sleep(1.2)
    assert kept(V5, join, short) == []
    (got,) = kept(V5, join, long)
    left = got.get(mqtt.MESSAGE_EXPIRY)
    assert isinstance(left, int)
    assert 95 <= left <= 99


def test_no_local_does_not_hide_a_retained_message_from_others(join: Connector) -> None:
    topic = fresh("retain/")
    retain(V5, join, topic, b"state")
    assert [each.payload for each in kept(V5, join, topic, options=1 | 4)] == [b"state"]


@pytest.mark.parametrize("filters", [1, 40])
def test_what_was_retained_before_comes_before_what_is_new(version: int, filters: int, join: Connector) -> None:
    """However long it takes to find: else a subscriber would take an old state for the newest."""
    topics = [fresh("retain/") for _ in range(filters)]
    for topic in topics:
        retain(version, join, topic, b"old")
    listener = join(version)
    listener.say(
        mqtt.subscribe(version, 1, *((topic, 0) for topic in topics)),
        *(mqtt.publish(version, topic, b"new") for topic in topics),
    )
    heard: dict[str, list[tuple[bytes, bool]]] = {topic: [] for topic in topics}
    for _ in range(2 * filters + 1):
        got = listener.hear()
        if got.kind == mqtt.PUBLISH:
            heard[got.topic].append((got.payload, got.retain))
    assert heard == {topic: [(b"old", True), (b"new", False)] for topic in topics}
