"""SUBSCRIBE, UNSUBSCRIBE, topic filters: MQTT 3.1.1 and 5.0, §3.8 to §3.11, §3.3.4, §4.7."""

from __future__ import annotations

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, fresh
from tests.conformance.conftest import Connector

LASTING = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}
NO_LOCAL = 4


# --------------------------------------------------------------------------------------------- SUBSCRIBE
def test_suback_has_one_reason_for_each_filter_in_their_order(version: int, join: Connector) -> None:
    client, stem = join(version), fresh("many/")
    filters = [(f"{stem}/{n}", n % 3) for n in range(12)]
    assert client.subscribe(*filters) == tuple(qos for _, qos in filters)


def test_many_filters_are_taken_as_many_packets_would_be(version: int, join: Connector) -> None:
    topic, other = fresh("seq/"), fresh("seq/")
    listener, speaker = join(version), join(version)
    assert listener.subscribe((topic, 0), (other, 1), (topic, 2)) == (0, 1, 2)
    speaker.publish(topic, b"x", 2)
    listener.message(b"x", qos=2)  # the last word on a filter counts
    speaker.publish(other, b"y", 2)
    listener.message(b"y", qos=1)


@pytest.mark.parametrize("options", [0x03, 0x40, 0x80, 0xC1])
def test_reserved_bits_of_a_subscription_are_malformed(version: int, options: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.subscribe(version, 1, ("t", options)))
    client.expect_close(0x81, 0x82)


def test_options_of_5_0_are_reserved_bits_in_3_1_1(join: Connector) -> None:
    for options in (4, 8, 16, 32):
        client = join(V3)
        client.say(mqtt.subscribe(V3, 1, ("t", options)))
        client.expect_close()


def test_subscribe_without_a_filter_is_a_protocol_error(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.subscribe(version, 1))
    client.expect_close(0x81, 0x82)


def test_the_same_filter_again_replaces_the_subscription(version: int, join: Connector) -> None:
    topic = fresh("replace/")
    listener, speaker = join(version), join(version)
    for qos in (2, 0, 1):
        assert listener.subscribe(topic, qos=qos) == (qos,)
        speaker.publish(topic, b"%d" % qos, 2)
        listener.message(b"%d" % qos, qos=qos)
    assert listener.silence() == []


def test_no_message_is_lost_while_a_subscription_is_replaced(version: int, join: Connector) -> None:
    topic = fresh("replace/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, qos=1)
    got = []
    for n in range(30):
        speaker.publish(topic, b"%d" % n, 1)
        listener.say(mqtt.subscribe(version, 100 + n, (topic, 1)))
    while len(got) < 30:
        heard = listener.hear()
        if heard.kind == mqtt.PUBLISH:
            got.append(heard.payload)
            listener.say(mqtt.ack(mqtt.PUBACK, heard.packet_id))
    assert got == [b"%d" % n for n in range(30)]


def test_a_filter_may_have_65535_bytes(version: int, join: Connector) -> None:
    client = join(version)
    stem = fresh("wide/")
    assert client.subscribe(stem + "x" * (65535 - len(stem)), qos=1) == (1,)


def test_overlapping_filters_deliver_at_their_highest_qos(version: int, join: Connector) -> None:
    stem = fresh("overlap/")
    listener, speaker = join(version), join(version)
    listener.subscribe((f"{stem}/#", 2), (f"{stem}/+", 1), (f"{stem}/a", 0))
    speaker.publish(f"{stem}/a", b"x", 2)
    speaker.publish(f"{stem}", b"end", 2)  # only # matches it
    qos = []
    while (got := listener.message()).payload != b"end":
        qos.append(got.qos)
    assert max(qos) == 2
    assert len(qos) in (1, 3)  # one copy, or one for each subscription


def test_subscription_identifiers_tell_which_filters_matched(join: Connector) -> None:
    stem = fresh("ids/")
    listener, speaker = join(V5), join(V5)
    listener.subscribe(f"{stem}/#", qos=2, props=[(mqtt.SUBSCRIPTION_ID, 1)])
    listener.subscribe(f"{stem}/+", qos=1, props=[(mqtt.SUBSCRIPTION_ID, 268_435_455)])
    listener.subscribe(f"{stem}/a", qos=0)
    for topic, wanted in ((f"{stem}/a", {1, 268_435_455}), (f"{stem}/a/b", {1})):
        for qos in (0, 1, 2):
            speaker.publish(topic, b"x", qos)
            assert set(listener.message(b"x", qos=qos).all(mqtt.SUBSCRIPTION_ID)) == wanted


def test_a_subscription_identifier_goes_when_the_subscription_is_replaced(join: Connector) -> None:
    topic = fresh("ids/")
    listener, speaker = join(V5), join(V5)
    for props, wanted in (([(mqtt.SUBSCRIPTION_ID, 5)], [5]), ([(mqtt.SUBSCRIPTION_ID, 6)], [6]), ([], [])):
        listener.subscribe(topic, qos=1, props=props)
        speaker.publish(topic, b"x", 1)
        assert listener.message(b"x").all(mqtt.SUBSCRIPTION_ID) == wanted


def test_a_subscription_identifier_outlives_the_connection(join: Connector) -> None:
    name, topic = fresh("ids"), fresh("ids/")
    client = join(V5, name, **LASTING)
    client.subscribe(topic, qos=1, props=[(mqtt.SUBSCRIPTION_ID, 77)])
    client.end()
    join(V5).publish(topic, b"x", 1)
    assert join(V5, name, **LASTING).message(b"x").all(mqtt.SUBSCRIPTION_ID) == [77]


def test_subscription_identifier_0_is_a_protocol_error(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, ("t", 0), props=[(mqtt.SUBSCRIPTION_ID, 0)]))
    client.expect_close(0x82)


def test_two_subscription_identifiers_in_one_subscribe_are_a_protocol_error(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, ("t", 0), props=[(mqtt.SUBSCRIPTION_ID, 1), (mqtt.SUBSCRIPTION_ID, 2)]))
    client.expect_close(0x82)


def test_no_local_keeps_ones_own_messages_away(join: Connector) -> None:
    topic = fresh("local/")
    client, other = join(V5), join(V5)
    client.subscribe((topic, 2 | NO_LOCAL))
    other.subscribe((topic, 2 | NO_LOCAL))
    for qos in (0, 1, 2):
        client.publish(topic, b"mine", qos)
        other.message(b"mine")
    other.publish(topic, b"theirs", 1)
    client.message(b"theirs")


def test_without_no_local_ones_own_messages_come_back(version: int, join: Connector) -> None:
    topic, client = fresh("local/"), join(version)
    client.subscribe(topic, qos=0)
    client.publish(topic, b"echo", 0)
    client.message(b"echo")


def test_no_local_goes_by_the_client_not_the_connection(join: Connector) -> None:
    topic, name = fresh("local/"), fresh("local")
    client = join(V5, name, **LASTING)
    client.subscribe((topic, 1 | NO_LOCAL))
    client.publish(topic, b"mine", 1)
    client.end()
    client = join(V5, name, **LASTING)
    client.publish(topic, b"mine still", 1)
    join(V5).publish(topic, b"theirs", 1)
    client.message(b"theirs")


def test_retain_handling_3_is_a_protocol_error(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, ("t", 0x30)))
    client.expect_close(0x82, 0x81)


# -------------------------------------------------------------------------------------------- UNSUBSCRIBE
def test_unsubscribing_ends_delivery(version: int, join: Connector) -> None:
    topic, other = fresh("un/"), fresh("un/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, other, qos=1)
    assert listener.unsubscribe(topic) == ((0,) if version == V5 else ())
    speaker.publish(topic, b"gone", 1)
    speaker.publish(other, b"marker", 1)
    listener.message(b"marker")


def test_unsubscribing_compares_filters_character_by_character(version: int, join: Connector) -> None:
    stem = fresh("un/")
    listener, speaker = join(version), join(version)
    listener.subscribe(f"{stem}/a", f"{stem}/+", qos=0)
    listener.unsubscribe(f"{stem}/#", f"{stem}/A", f"{stem}/b", f"{stem}/a/")
    speaker.publish(f"{stem}/b", b"still", 0)
    listener.message(b"still")
    listener.unsubscribe(f"{stem}/+")
    speaker.publish(f"{stem}/b", b"not now", 0)
    speaker.publish(f"{stem}/a", b"still", 0)
    listener.message(b"still", topic=f"{stem}/a")


def test_unsubscribing_from_nothing_is_answered(version: int, join: Connector) -> None:
    client = join(version)
    assert client.unsubscribe(fresh("never/")) == ((0x11,) if version == V5 else ())


def test_unsuback_has_one_reason_for_each_filter_in_their_order(version: int, join: Connector) -> None:
    client, stem = join(version), fresh("un/")
    client.subscribe(f"{stem}/a", f"{stem}/b", qos=1)
    reasons = client.unsubscribe(f"{stem}/x", f"{stem}/a", f"{stem}/y", f"{stem}/b", f"{stem}/a")
    assert reasons == ((0x11, 0, 0x11, 0, 0x11) if version == V5 else ())


def test_unsubscribe_without_a_filter_is_a_protocol_error(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.unsubscribe(version, 1))
    client.expect_close(0x81, 0x82)


def test_a_message_under_way_is_finished_after_unsubscribing(version: int, join: Connector) -> None:
    topic = fresh("un/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, qos=2)
    speaker.publish(topic, b"1", 1)
    speaker.publish(topic, b"2", 2)
    first, second = listener.expect(mqtt.PUBLISH, payload=b"1"), listener.expect(mqtt.PUBLISH, payload=b"2")
    listener.unsubscribe(topic)
    listener.say(mqtt.ack(mqtt.PUBACK, first.packet_id), mqtt.ack(mqtt.PUBREC, second.packet_id))
    listener.expect(mqtt.PUBREL, packet_id=second.packet_id, reason=0)
    listener.say(mqtt.ack(mqtt.PUBCOMP, second.packet_id))
    assert listener.silence() == []


def test_a_message_under_way_is_sent_again_after_unsubscribing_and_reconnecting(version: int, join: Connector) -> None:
    name, topic = fresh("un"), fresh("un/")
    client, speaker = join(version, name, **LASTING), join(version)
    client.subscribe(topic, qos=2)
    speaker.publish(topic, b"x", 2)
    number = client.expect(mqtt.PUBLISH, payload=b"x").packet_id
    client.unsubscribe(topic)
    client.drop()
    join(version, name, **LASTING).message(b"x", packet_id=number, dup=True)


# ------------------------------------------------------------------------------------------ topic filters
MATCHES = [
    ("a/b", "a/b", True),
    ("a/b", "a/B", False),
    ("a/b", "a/b/", False),
    ("a/b", "/a/b", False),
    ("a b/c d", "a b/c d", True),
    ("#", "x", True),
    ("#", "/", True),
    ("a/#", "a", True),
    ("a/#", "a/", True),
    ("a/#", "a/b/c/d", True),
    ("a/#", "ab", False),
    ("a/b/#", "a", False),
    ("+", "x", True),
    ("+", "/x", False),
    ("+/+", "/x", True),
    ("/+", "/x", True),
    ("a/+", "a/b", True),
    ("a/+", "a/", True),
    ("a/+", "a", False),
    ("a/+", "a/b/c", False),
    ("a/+/c", "a/b/c", True),
    ("a/+/c", "a//c", True),
    ("a/+/c", "a/b/d", False),
    ("+/b/#", "a/b", True),
    ("+/b/#", "a/b/c/d", True),
    ("a//b", "a//b", True),
    ("a//b", "a/b", False),
    ("/", "/", True),
    ("//", "//", True),
    ("+/+/+", "//", True),
    ("caf\u00e9", "cafe\u0301", False),
    ("\u00e9", "\u00e9", True),
    ("\U0001f682/x", "\U0001f682/x", True),
]


def test_filters_match_topics_level_by_level(version: int, join: Connector) -> None:
    """One client for each filter, kept apart by a prefix level: `<prefix>/<filter>`."""
    speaker, marker = join(version), fresh("marker/")
    for n, (filter, topic, matches) in enumerate(MATCHES):
        prefix = fresh("match")
        listener = join(version)
        assert listener.subscribe(f"{prefix}/{filter}", marker, qos=0) == (0, 0)
        speaker.publish(f"{prefix}/{topic}", b"%d" % n, 0)
        speaker.publish(marker, b"end", 0)
        heard = []
        while (got := listener.message()).payload != b"end":
            heard.append(got.topic)
        assert heard == ([f"{prefix}/{topic}"] if matches else []), (filter, topic)
        listener.end()


@pytest.mark.parametrize("filter", ["a/#/b", "a#", "#a", "a/b#", "##", "#/", "a+", "+a", "a/+b", "a/b+/c", "++"])
def test_an_ill_formed_filter_is_refused(version: int, filter: str, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.subscribe(version, 1, (filter, 0)))
    try:
        (reason,) = client.expect(mqtt.SUBACK, packet_id=1).reasons
        assert reason >= 0x80
    except mqtt.Closed:
        return
    except AssertionError:
        client.expect_close(0x8F)


def test_an_empty_filter_is_refused(version: int, join: Connector) -> None:
    for packet in (mqtt.subscribe(version, 1, ("", 0)), mqtt.unsubscribe(version, 1, "")):
        client = join(version)
        client.say(packet)
        client.expect_close(0x81, 0x82, 0x8F)


def test_a_wildcard_in_front_matches_no_dollar_topic(version: int, join: Connector) -> None:
    stem = fresh()
    listener, speaker = join(version), join(version)
    listener.subscribe("#", "+/monitor/#", f"+/{stem}", qos=0)
    speaker.publish(f"$SYS/{stem}", b"dollar", 0)
    speaker.publish(f"$x/monitor/{stem}", b"dollar", 0)
    speaker.publish(f"end/{stem}", b"marker", 0)
    while (got := listener.message()).payload != b"marker":
        assert not got.topic.startswith("$")


def test_dollar_sys_can_be_asked_for(version: int, join: Connector) -> None:
    assert join(version).subscribe("$SYS/#", qos=0) == (0,)


def test_what_is_delivered_matches_what_was_subscribed(version: int, join: Connector) -> None:
    stem = fresh("only/")
    listener, speaker = join(version), join(version)
    listener.subscribe(f"{stem}/+/in", qos=0)
    for topic in ("a/out", "a/in", "in", "b/in", "a/in/deep", "c/in"):
        speaker.publish(f"{stem}/{topic}", topic.encode(), 0)
    for wanted in ("a/in", "b/in", "c/in"):
        listener.message(wanted.encode(), topic=f"{stem}/{wanted}")
