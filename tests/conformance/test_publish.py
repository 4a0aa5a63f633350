"""PUBLISH both ways, its properties, aliases, windows and sizes: §3.3, §3.4, §4.3.1, §4.3.2, §4.6, §4.9 of both."""

from __future__ import annotations

import random
import time

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, Client, fresh
from tests.conformance.conftest import RECEIVE_MAXIMUM, Connector, Dial

LASTING = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}


def pair(version: int, join: Connector, stem: str, qos: int = 2) -> tuple[Client, Client, str]:
    """A listener that subscribed to a topic, a speaker, and the topic."""
    listener, speaker, topic = join(version), join(version), fresh(stem)
    listener.subscribe(topic, qos=qos)
    return listener, speaker, topic


# --------------------------------------------------------------------------------------------- QoS and DUP
@pytest.mark.parametrize("granted", [0, 1, 2])
@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_message_comes_with_the_lower_of_both_qos(
    version: int, published: int, granted: int, join: Connector
) -> None:
    listener, speaker, topic = pair(version, join, "min/", granted)
    speaker.publish(topic, b"x", published)
    listener.message(b"x", qos=min(published, granted), dup=False, retain=False)


def test_each_qos_gets_its_own_answer(version: int, join: Connector) -> None:
    client, topic = join(version), fresh("answer/")
    client.say(mqtt.publish(version, topic, b"x", 0))
    assert client.silence() == []
    client.say(mqtt.publish(version, topic, b"x", 1, 11))
    client.expect(mqtt.PUBACK, packet_id=11)
    client.say(mqtt.publish(version, topic, b"x", 2, 12))
    client.expect(mqtt.PUBREC, packet_id=12)


def test_dup_is_not_handed_on(version: int, join: Connector) -> None:
    listener, speaker, topic = pair(version, join, "dup/")
    for qos in (1, 2):
        speaker.publish(topic, b"again", qos, dup=True)
        listener.message(b"again", qos=qos, dup=False)


def test_after_puback_the_same_identifier_is_a_new_message(version: int, join: Connector) -> None:
    listener, speaker, topic = pair(version, join, "reuse/", 1)
    for n, dup in enumerate((False, True, False)):
        speaker.say(mqtt.publish(version, topic, b"%d" % n, 1, 9, dup=dup))
        speaker.expect(mqtt.PUBACK, packet_id=9)
        listener.message(b"%d" % n)


def test_a_message_at_qos_1_is_unacknowledged_until_its_puback(version: int, join: Connector) -> None:
    name, topic = fresh("unacked"), fresh("unacked/")
    client, speaker = join(version, name, **LASTING), join(version)
    client.subscribe(topic, qos=1)
    speaker.publish(topic, b"x", 1)
    first = client.expect(mqtt.PUBLISH, payload=b"x", dup=False)
    assert client.silence() == []  # not sent again while the connection stands
    client.drop()
    client = join(version, name, **LASTING)
    client.message(b"x", packet_id=first.packet_id, dup=True)
    client.end()
    client = join(version, name, **LASTING)
    assert client.silence() == []


def test_pubacks_come_in_the_order_of_their_messages(version: int, join: Connector) -> None:
    client, topic = join(version), fresh("order/")
    ids = list(range(1, RECEIVE_MAXIMUM))
    client.say(*[mqtt.publish(version, topic, b"x", 1, number) for number in ids])
    assert [client.expect(mqtt.PUBACK).packet_id for _ in ids] == ids


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_messages_of_a_topic_arrive_in_the_order_they_were_published(version: int, qos: int, join: Connector) -> None:
    listener, speaker, topic = pair(version, join, "order/")
    for n in range(40):
        speaker.publish(topic, b"%d" % n, qos)
    for n in range(40):
        listener.message(b"%d" % n, qos=qos)


def test_two_subscribers_get_one_copy_each(version: int, join: Connector) -> None:
    topic, speaker = fresh("two/"), join(version)
    listeners = [join(version), join(V5 if version == V3 else V3)]
    for listener in listeners:
        listener.subscribe(topic, qos=1)
    speaker.publish(topic, b"x", 1)
    for listener in listeners:
        listener.message(b"x", topic=topic)
        assert listener.silence() == []


# ------------------------------------------------------------------------------------------------- topics
@pytest.mark.parametrize("topic", ["a/+", "+", "#", "a/#", "a+b", "a#"])
def test_a_topic_name_with_a_wildcard_is_refused(version: int, topic: str, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.publish(version, topic, b"x"))
    client.expect_close(0x81, 0x82, 0x90)


def test_a_topic_name_has_at_least_one_character(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.publish(version, "", b"x"))
    client.expect_close(0x81, 0x82, 0x90)


def test_a_topic_name_of_65535_bytes_is_carried_whole(version: int, join: Connector) -> None:
    listener, speaker = join(version), join(version)
    stem = fresh("long/")
    topic = stem + "x" * (65535 - len(stem))
    listener.subscribe(topic, qos=1)
    speaker.publish(topic, b"x", 1)
    listener.message(b"x", topic=topic)


def test_an_empty_payload_is_a_message(version: int, join: Connector) -> None:
    listener, speaker, topic = pair(version, join, "empty/")
    for qos in (0, 1, 2):
        speaker.publish(topic, b"", qos)
        listener.message(b"", qos=qos, topic=topic)


def test_publishing_to_a_dollar_topic_is_answered_and_reaches_no_wildcard(version: int, join: Connector) -> None:
    stem = fresh()
    listener, speaker = join(version), join(version)
    listener.subscribe("#", f"+/{stem}", qos=1)
    for topic in (f"$SYS/{stem}", f"${stem}", f"$other/{stem}"):
        speaker.publish(topic, b"dollar", 1)
    speaker.publish(f"end/{stem}", b"marker", 1)
    while (got := listener.message()).payload != b"marker":
        assert not got.topic.startswith("$"), got


# -------------------------------------------------------------------------------------------- properties
ALL_PROPERTIES: list[mqtt.Property] = [
    (mqtt.PAYLOAD_FORMAT, 1),
    (mqtt.CONTENT_TYPE, "text/größe"),
    (mqtt.RESPONSE_TOPIC, "answers/here"),
    (mqtt.CORRELATION, b"\x00\xff\x01"),
    (mqtt.USER_PROPERTY, ("b", "2")),
    (mqtt.USER_PROPERTY, ("a", "1")),
    (mqtt.USER_PROPERTY, ("b", "2")),
    (mqtt.USER_PROPERTY, ("", "")),
]


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize(
    "number",
    [mqtt.PAYLOAD_FORMAT, mqtt.CONTENT_TYPE, mqtt.RESPONSE_TOPIC, mqtt.CORRELATION],
    ids=["payload format", "content type", "response topic", "correlation data"],
)
def test_a_property_reaches_the_subscriber_unaltered(number: int, qos: int, join: Connector) -> None:
    listener, speaker, topic = pair(V5, join, "props/")
    for value in [value for each, value in ALL_PROPERTIES if each == number]:
        speaker.publish(topic, b"text", qos, props=[(number, value)])
        assert listener.message(b"text").props == [(number, value)]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_user_properties_reach_the_subscriber_in_their_order(qos: int, join: Connector) -> None:
    listener, speaker, topic = pair(V5, join, "props/")
    sent = [each for each in ALL_PROPERTIES if each[0] == mqtt.USER_PROPERTY]
    speaker.publish(topic, b"x", qos, props=sent)
    assert listener.message(b"x").props == sent


def test_all_properties_together_survive_the_wait_for_an_absent_subscriber(join: Connector) -> None:
    name, topic = fresh("absent"), fresh("props/")
    client = join(V5, name, **LASTING)
    client.subscribe(topic, qos=1)
    client.end()
    join(V5).publish(topic, b"text", 1, props=ALL_PROPERTIES)
    got = join(V5, name, **LASTING).message(b"text")
    assert sorted(got.props, key=str) == sorted(ALL_PROPERTIES, key=str)
    assert got.all(mqtt.USER_PROPERTY) == [value for each, value in ALL_PROPERTIES if each == mqtt.USER_PROPERTY]


def test_properties_are_left_out_for_a_subscriber_of_3_1_1(join: Connector) -> None:
    listener, speaker, topic = join(V3), join(V5), fresh("props/")
    listener.subscribe(topic, qos=1)
    speaker.publish(topic, b"text", 1, props=ALL_PROPERTIES)
    assert listener.expect(mqtt.PUBLISH).raw[4:] == topic.encode() + b"\0\1text"


def test_a_response_topic_with_a_wildcard_is_refused(join: Connector) -> None:
    for topic in ("answers/+", "#", ""):
        client = join(V5)
        client.say(mqtt.publish(V5, "t", b"x", props=[(mqtt.RESPONSE_TOPIC, topic)]))
        client.expect_close(0x81, 0x82, 0x90)


def test_a_subscription_identifier_from_a_client_is_a_protocol_error(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.publish(V5, "t", b"x", props=[(mqtt.SUBSCRIPTION_ID, 1)]))
    client.expect_close(0x82)


def test_puback_and_pubrec_say_one_of_their_reasons(join: Connector) -> None:
    client = join(V5)
    for qos in (1, 2):
        for topic in (fresh("nobody/"), "$SYS/forbidden"):
            answer = client.publish(topic, b"x", qos)
            assert answer is not None  # the decoder has checked the reason
    client.publish(fresh("nobody/"), b"x", 1)


# ----------------------------------------------------------------------------------------- message expiry
def test_message_expiry_counts_down_and_then_deletes(join: Connector) -> None:
    name, topic = fresh("expiry"), fresh("expiry/")
    client, speaker = join(V5, name, **LASTING), join(V5)
    client.subscribe(topic, qos=2)
    client.end()
    for qos in (1, 2):
        speaker.publish(topic, b"short", qos, props=[(mqtt.MESSAGE_EXPIRY, 1)])
        speaker.publish(topic, b"long", qos, props=[(mqtt.MESSAGE_EXPIRY, 60)])
    speaker.publish(topic, b"endless", 1)
    time.sleep(2.1)
    client = join(V5, name, **LASTING)
    for _ in range(2):
        left = client.message(b"long").get(mqtt.MESSAGE_EXPIRY)
        assert isinstance(left, int)
        assert 50 < left <= 58
    assert client.message(b"endless").all(mqtt.MESSAGE_EXPIRY) == []


def test_message_expiry_is_sent_on(join: Connector) -> None:
    listener, speaker, topic = pair(V5, join, "expiry/")
    for qos in (0, 1, 2):
        speaker.publish(topic, b"x", qos, props=[(mqtt.MESSAGE_EXPIRY, 1000)])
        left = listener.message(b"x").get(mqtt.MESSAGE_EXPIRY)
        assert isinstance(left, int)
        assert 998 <= left <= 1000


# ----------------------------------------------------------------------------------------- topic aliases
def test_an_alias_stands_for_its_topic_and_can_be_set_anew(join: Connector) -> None:
    first, second = fresh("alias/"), fresh("alias/")
    listener, speaker = join(V5), join(V5)
    listener.subscribe(first, second, qos=2)
    one = [(mqtt.TOPIC_ALIAS, 1)]
    for topic, payload, meant in (
        (first, b"set", first),
        ("", b"used", first),
        ("", b"used again", first),
        (second, b"set anew", second),
        ("", b"used anew", second),
    ):
        for qos in (0, 1, 2):
            speaker.publish(topic, payload, qos, props=one)
            listener.message(payload, topic=meant)


def test_every_alias_up_to_the_servers_maximum_is_taken(dial: Dial, join: Connector) -> None:
    listener, speaker, stem = join(V5), dial(V5), fresh("alias/")
    listener.subscribe(f"{stem}/+", qos=0)
    maximum = speaker.connect().get(mqtt.ALIAS_MAXIMUM)
    assert isinstance(maximum, int)
    for alias in range(1, maximum + 1):
        speaker.publish(f"{stem}/{alias}", b"set", props=[(mqtt.TOPIC_ALIAS, alias)])
        listener.message(b"set")
    for alias in range(maximum, 0, -1):
        speaker.publish("", b"used", props=[(mqtt.TOPIC_ALIAS, alias)])
        listener.message(b"used", topic=f"{stem}/{alias}")


def test_an_alias_of_0_or_above_the_maximum_or_never_set_closes_the_connection(dial: Dial) -> None:
    for topic, alias in (("t", 0), ("t", None), ("", 1)):
        client = dial(V5)
        maximum = client.connect().get(mqtt.ALIAS_MAXIMUM)
        assert isinstance(maximum, int)
        client.say(mqtt.publish(V5, topic, b"x", props=[(mqtt.TOPIC_ALIAS, maximum + 1 if alias is None else alias)]))
        heard = client.expect_close(*((0x82, 0x94) if not topic else (0x94,)))
        assert heard[-1].kind == mqtt.DISCONNECT


def test_aliases_do_not_outlive_their_connection(join: Connector) -> None:
    name = fresh("alias")
    client = join(V5, name, **LASTING)
    client.publish(fresh("alias/"), b"x", 1, props=[(mqtt.TOPIC_ALIAS, 1)])
    client.end()
    client = join(V5, name, **LASTING)
    client.say(mqtt.publish(V5, "", b"x", 1, 1, props=[(mqtt.TOPIC_ALIAS, 1)]))
    client.expect_close(0x82, 0x94)


def test_the_server_keeps_within_the_clients_alias_maximum(join: Connector) -> None:
    for maximum in (1, 3):
        stem = fresh("alias/")
        listener, speaker = join(V5, props=[(mqtt.ALIAS_MAXIMUM, maximum)]), join(V5)
        listener.subscribe(f"{stem}/#", qos=2)
        for n in range(30):
            topic, qos = f"{stem}/{n % 5}", n % 3
            speaker.publish(topic, b"%d" % n, qos)
            got = listener.message(b"%d" % n)
            assert got.topic == topic
            assert got.get(mqtt.TOPIC_ALIAS) in (None, *range(1, maximum + 1))


def test_the_first_topic_sent_sets_an_alias_and_the_next_uses_it(join: Connector) -> None:
    listener, speaker, topic = join(V5, props=[(mqtt.ALIAS_MAXIMUM, 1)]), join(V5), fresh("alias/")
    listener.subscribe(topic, qos=0)
    for _ in range(3):
        speaker.publish(topic, b"x", 0)
    sent = [listener.expect(mqtt.PUBLISH) for _ in range(3)]
    assert [each.get(mqtt.TOPIC_ALIAS) for each in sent] == [1, 1, 1]
    assert [each.topic for each in sent] == [topic, "", ""]


def test_no_aliases_for_a_client_that_takes_none(join: Connector) -> None:
    for props in ([], [(mqtt.ALIAS_MAXIMUM, 0)]):
        listener, speaker, topic = join(V5, props=props), join(V5), fresh("alias/")
        listener.subscribe(topic, qos=2)
        for qos in (0, 1, 2):
            speaker.publish(topic, b"x", qos)
            assert listener.message(b"x", topic=topic).all(mqtt.TOPIC_ALIAS) == []


def test_no_alias_of_an_earlier_connection_is_used_by_the_server(join: Connector) -> None:
    name, topic = fresh("alias"), fresh("alias/")
    props = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100), (mqtt.ALIAS_MAXIMUM, 5)]}
    client, speaker = join(V5, name, **props), join(V5)
    client.subscribe(topic, qos=1)
    speaker.publish(topic, b"1", 1)
    client.message(b"1", topic=topic)
    client.end()
    client = join(V5, name, **props)
    speaker.publish(topic, b"2", 1)
    assert client.expect(mqtt.PUBLISH, payload=b"2").topic == topic


# ------------------------------------------------------------------------------------- windows and sizes
@pytest.mark.parametrize("qos", [1, 2])
def test_the_server_keeps_within_the_clients_receive_maximum(qos: int, join: Connector) -> None:
    listener, speaker, topic = join(V5, props=[(mqtt.RECEIVE_MAXIMUM, 2)]), join(V5), fresh("window/")
    listener.subscribe(topic, qos=2)
    for n in range(5):
        speaker.publish(topic, b"%d" % n, qos)
    held = [listener.expect(mqtt.PUBLISH, payload=b"%d" % n) for n in range(2)]
    assert listener.silence() == []
    for n in range(2, 5):  # each that is finished makes room for one
        number = held[n - 2].packet_id
        listener.say(mqtt.ack(mqtt.PUBACK if qos == 1 else mqtt.PUBREC, number))
        if qos == 2:
            listener.expect(mqtt.PUBREL, packet_id=number)
            assert listener.silence() == []  # PUBREC alone makes no room
            listener.say(mqtt.ack(mqtt.PUBCOMP, number))
        held.append(listener.expect(mqtt.PUBLISH, payload=b"%d" % n))
        assert listener.silence() == []


def test_a_refused_message_makes_room_in_the_window(join: Connector) -> None:
    listener, speaker, topic = join(V5, props=[(mqtt.RECEIVE_MAXIMUM, 1)]), join(V5), fresh("window/")
    listener.subscribe(topic, qos=2)
    for n, (qos, kind) in enumerate(((2, mqtt.PUBREC), (1, mqtt.PUBACK), (2, mqtt.PUBREC))):
        speaker.publish(topic, b"%d" % n, qos)
        got = listener.expect(mqtt.PUBLISH, payload=b"%d" % n)
        listener.say(mqtt.ack(kind, got.packet_id, 0x83))
        assert listener.silence() == []  # no PUBREL for it


def test_other_packets_are_answered_while_the_window_is_full(join: Connector) -> None:
    listener, speaker, topic = join(V5, props=[(mqtt.RECEIVE_MAXIMUM, 1)]), join(V5), fresh("window/")
    listener.subscribe(topic, qos=1)
    for n in range(3):
        speaker.publish(topic, b"%d" % n, 1)
    held = listener.expect(mqtt.PUBLISH, payload=b"0")
    assert listener.silence() == []
    assert listener.subscribe(fresh("other/"), qos=1) == (1,)
    assert listener.unsubscribe(fresh("other/")) == (0x11,)
    assert listener.publish(fresh("other/"), b"x", 1) is not None
    assert listener.publish(fresh("other/"), b"x", 2) is not None
    listener.say(mqtt.ack(mqtt.PUBACK, held.packet_id))
    listener.message(b"1")
    listener.message(b"2")


def test_more_than_the_servers_receive_maximum_closes_the_connection(join: Connector) -> None:
    client, topic = join(V5), fresh("window/")
    for number in range(1, RECEIVE_MAXIMUM + 1):
        client.say(mqtt.publish(V5, topic, b"x", 2, number))
        client.expect(mqtt.PUBREC, packet_id=number)
    client.say(mqtt.publish(V5, topic, b"x", 2, RECEIVE_MAXIMUM + 1))
    heard = client.expect_close(0x93)
    assert [each.reason for each in heard if each.kind == mqtt.DISCONNECT] == [0x93]


def test_a_full_window_of_the_servers_is_taken_again_and_again(join: Connector) -> None:
    client, topic = join(V5), fresh("window/")
    for _ in range(3):
        numbers = range(1, RECEIVE_MAXIMUM + 1)
        client.say(*[mqtt.publish(V5, topic, b"x", 2, number) for number in numbers])
        for number in numbers:
            client.expect(mqtt.PUBREC, packet_id=number)
        client.say(*[mqtt.ack(mqtt.PUBREL, number) for number in numbers])
        for number in numbers:
            client.expect(mqtt.PUBCOMP, packet_id=number)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_too_large_for_its_client_is_dropped_as_if_sent(qos: int, join: Connector) -> None:
    listener = join(V5, props=[(mqtt.MAXIMUM_PACKET, 100), (mqtt.RECEIVE_MAXIMUM, 1)])
    other, speaker, topic = join(V5), join(V5), fresh("size/")
    listener.subscribe(topic, qos=2)
    other.subscribe(topic, qos=2)
    for _ in range(3):
        speaker.publish(topic, bytes(100), qos)
        speaker.publish(topic, b"small", qos)
        assert len(listener.message(b"small").raw) <= 100
        other.message(bytes(100))
        other.message(b"small")


def test_a_packet_of_exactly_the_clients_maximum_is_sent(join: Connector) -> None:
    topic = fresh("size/")
    head = len(mqtt.publish(V5, topic, b"", 1, 1))
    listener, speaker = join(V5, props=[(mqtt.MAXIMUM_PACKET, head + 20)]), join(V5)
    listener.subscribe(topic, qos=1)
    speaker.publish(topic, bytes(21), 1)
    speaker.publish(topic, bytes(20), 1)
    assert len(listener.message(bytes(20)).raw) == head + 20


@pytest.mark.parametrize("kind", [mqtt.PUBACK, mqtt.PUBREC], ids=["PUBACK", "PUBREC"])
def test_a_message_its_client_refused_is_not_sent_again(kind: int, join: Connector) -> None:
    name, topic = fresh("refuse"), fresh("refuse/")
    client, speaker = join(V5, name, **LASTING), join(V5)
    client.subscribe(topic, qos=2)
    speaker.publish(topic, b"x", 1 if kind == mqtt.PUBACK else 2)
    got = client.expect(mqtt.PUBLISH, payload=b"x")
    client.say(mqtt.ack(kind, got.packet_id, 0x80))
    assert client.silence() == []
    client.drop()
    client = join(V5, name, **LASTING)
    speaker.publish(topic, b"marker", 1)
    client.message(b"marker")


# -------------------------------------------------------------------------------------- many in one write
def test_messages_in_one_write_keep_what_is_their_own(version: int, join: Connector) -> None:
    """QoS, RETAIN, topic and properties of each, however the server gathers what comes together."""
    stem, rng = fresh("burst/"), random.Random(7)
    listener, speaker = join(version), join(version)
    published = 8 if version == V5 else 0  # retain as published
    listener.subscribe((f"{stem}/+", 2 | published))
    for _ in range(30):
        sent = []
        for number in range(1, RECEIVE_MAXIMUM):
            props = [(mqtt.USER_PROPERTY, ("n", str(number)))] if version == V5 and rng.random() < 0.2 else []
            topic, qos, retain = f"{stem}/{rng.choice('aab')}", rng.choice((0, 1, 1, 1, 2)), rng.random() < 0.3
            sent.append((topic, b"%d" % rng.randrange(1000), qos, retain, props))
        speaker.say(
            *[
                mqtt.publish(version, topic, payload, qos, number, retain=retain, props=props)
                for number, (topic, payload, qos, retain, props) in enumerate(sent, 1)
            ]
        )
        speaker.say(*[mqtt.ack(mqtt.PUBREL, number) for number, each in enumerate(sent, 1) if each[2] == 2])
        answers = {mqtt.PUBACK: 0, mqtt.PUBREC: 0, mqtt.PUBCOMP: 0}
        for _ in range(sum((0, 1, 2)[each[2]] for each in sent)):
            answers[speaker.hear().kind] += 1
        twice = sum(each[2] == 2 for each in sent)
        assert list(answers.values()) == [sum(each[2] == 1 for each in sent), twice, twice]
        for topic, payload, qos, retain, props in sent:
            flag = retain and version == V5
            assert listener.message(payload, topic=topic, qos=qos, retain=flag).props == props
        for topic in {each[0] for each in sent if each[3]}:
            (kept,) = [each[:3] for each in sent if each[0] == topic and each[3]][-1:]
            late = join(version)
            late.say(mqtt.subscribe(version, 1, (topic, 2)))
            (got,) = [each for each in (late.hear(), late.hear()) if each.kind == mqtt.PUBLISH]
            assert (got.topic, got.payload, got.qos, got.retain) == (*kept, True)
            late.drop()
