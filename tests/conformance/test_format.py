"""Strings, integers, header flags and packet identifiers: MQTT 3.1.1 and 5.0, chapters 1 and 2."""

from __future__ import annotations

import struct

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, fresh
from tests.conformance.conftest import Connector, Dial

ILL_FORMED = {
    "a surrogate": b"a\xed\xa0\x80b",
    "the last surrogate": b"a\xed\xbf\xbfb",
    "an overlong slash": b"a\xc0\xafb",
    "a cut sequence": b"ab\xe2\x82",
    "a stray continuation": b"a\x80b",
    "beyond U+10FFFF": b"a\xf4\x90\x80\x80b",
    "a byte no UTF-8 has": b"a\xffb",
}
bad_strings = pytest.mark.parametrize("bad", ILL_FORMED.values(), ids=ILL_FORMED.keys())


def in_connect(version: int, bad: bytes) -> list[bytes]:
    return [
        mqtt.connect(version, bad),
        mqtt.connect(version, fresh(), will=mqtt.Will(bad)),
        mqtt.connect(version, fresh(), username=bad),
    ]


def in_others(version: int, bad: bytes) -> list[bytes]:
    packets = [
        mqtt.publish(version, bad),
        mqtt.publish(version, bad, b"x", 2, 9),
        mqtt.subscribe(version, 9, (bad, 0)),
        mqtt.unsubscribe(version, 9, bad),
    ]
    if version == V5:
        packets += [
            mqtt.publish(version, "t", props=[(mqtt.CONTENT_TYPE, bad)]),
            mqtt.publish(version, "t", props=[(mqtt.RESPONSE_TOPIC, bad)]),
            mqtt.disconnect(version, 0, [(mqtt.REASON_STRING, bad)]),
        ]
    return packets


@bad_strings
def test_ill_formed_utf8_closes_the_connection(version: int, bad: bytes, dial: Dial, join: Connector) -> None:
    for packet in in_connect(version, bad):
        client = dial(version)
        client.say(packet)
        client.expect_close(0x81, 0x85, 0x90, 0x86)
    for packet in in_others(version, bad):
        client = join(version)
        client.say(packet)
        client.expect_close(0x81, 0x8F, 0x90)


def test_u0000_in_a_string_closes_the_connection(version: int, dial: Dial, join: Connector) -> None:
    for packet in in_connect(version, b"a\0b"):
        client = dial(version)
        client.say(packet)
        client.expect_close(0x81, 0x85, 0x90, 0x86)
    for packet in in_others(version, b"a\0b"):
        client = join(version)
        client.say(packet)
        client.expect_close(0x81, 0x8F, 0x90)


@bad_strings
def test_both_strings_of_a_user_property_are_checked(bad: bytes, join: Connector) -> None:
    for pair in (mqtt.text(bad) + mqtt.text("v"), mqtt.text("k") + mqtt.text(bad)):
        client = join(V5)
        section = b"\x26" + pair
        client.say(mqtt.packet(0x30, mqtt.text("t"), mqtt.varint(len(section)), section, b"x"))
        client.expect_close(0x81)


def test_a_byte_order_mark_in_a_topic_is_a_character_like_any_other(version: int, join: Connector) -> None:
    plain = fresh("bom/")
    marked = "\ufeff" + plain
    listener, speaker = join(version), join(version)
    listener.subscribe(marked, qos=1)
    speaker.publish(plain, b"without", 1)
    speaker.publish(marked, b"with", 1)
    assert listener.message(b"with").topic == marked


def test_an_integer_of_more_bytes_than_it_needs_is_malformed(join: Connector) -> None:
    for packet in (
        b"\xc0\x80\x00",  # PINGREQ, its length 0 in two bytes
        mqtt.packet(0x30, mqtt.text("t"), b"\x80\x00", b"x"),  # a property length of 0 in two bytes
        mqtt.packet(0x82, b"\0\1", b"\x03\x0b\x81\x00", mqtt.text("t"), b"\0"),  # subscription identifier 1
    ):
        client = join(V5)
        client.say(packet)
        client.expect_close(0x81)


def test_an_integer_of_five_bytes_is_malformed(version: int, join: Connector) -> None:
    client = join(version)
    client.say(b"\x30\xff\xff\xff\xff\x01")
    client.expect_close(0x81, 0x95)


FLAGGED = {
    "CONNACK": b"\x20\x02\x00\x00",
    "SUBACK": b"\x90\x03\x00\x01\x00",
    "UNSUBACK": b"\xb0\x02\x00\x01",
    "PINGRESP": b"\xd0\x00",
    "type 0": b"\x00\x00",
    "PUBACK": b"\x41\x02\x00\x01",
    "PUBREC": b"\x51\x02\x00\x01",
    "PUBCOMP": b"\x71\x02\x00\x01",
    "PINGREQ": b"\xc1\x00",
}


@pytest.mark.parametrize("packet", FLAGGED.values(), ids=FLAGGED.keys())
def test_reserved_flags_and_packets_of_a_server_close_the_connection(
    version: int, packet: bytes, join: Connector
) -> None:
    client = join(version)
    client.say(packet)
    client.expect_close(0x81, 0x82)


def test_connect_with_reserved_header_flags_is_refused(version: int, dial: Dial) -> None:
    client = dial(version)
    client.say(b"\x11" + mqtt.connect(version, fresh())[1:])
    client.expect_close(0x81)


def test_pubrel_with_other_header_flags_than_0010_is_malformed(version: int, join: Connector) -> None:
    for first in (0x60, 0x61, 0x63, 0x66, 0x6A):
        client = join(version)
        client.say(bytes((first, 2, 0, 1)))
        client.expect_close(0x81)


def test_subscribe_with_other_header_flags_than_0010_is_malformed(version: int, join: Connector) -> None:
    for flags in (0, 1, 3, 6, 10):
        client = join(version)
        client.say(bytes((0x80 | flags,)) + mqtt.subscribe(version, 1, ("t", 0))[1:])
        client.expect_close(0x81)


def test_unsubscribe_with_other_header_flags_than_0010_is_malformed(version: int, join: Connector) -> None:
    for flags in (0, 1, 3, 6, 10):
        client = join(version)
        client.say(bytes((0xA0 | flags,)) + mqtt.unsubscribe(version, 1, "t")[1:])
        client.expect_close(0x81)


def test_disconnect_with_reserved_header_flags_is_malformed(version: int, join: Connector) -> None:
    client = join(version)
    client.say(b"\xe1\x00")
    heard = client.expect_close(0x81)
    assert version == V3 or [each.reason for each in heard] == [0x81]


def test_auth_with_reserved_header_flags_is_malformed(join: Connector) -> None:
    client = join(V5)
    client.say(b"\xf1\x00")
    client.expect_close(0x81)


def test_packet_identifier_0_is_refused(version: int, join: Connector) -> None:
    for packet in (
        mqtt.publish(version, "t", b"x", 1, 0),
        mqtt.publish(version, "t", b"x", 2, 0),
        mqtt.subscribe(version, 0, ("t", 0)),
        mqtt.unsubscribe(version, 0, "t"),
    ):
        client = join(version)
        client.say(packet)
        client.expect_close(0x81, 0x82)


def test_qos_0_has_no_packet_identifier_either_way(version: int, join: Connector) -> None:
    topic = fresh("q0/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, qos=2)
    speaker.publish(topic, b"\x00\x07payload", 0)  # the first two bytes would be the identifier
    assert listener.message(b"\x00\x07payload", qos=0, dup=False).packet_id == 0


def test_messages_in_flight_have_different_packet_identifiers(version: int, join: Connector) -> None:
    topic = fresh("ids/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, qos=2)
    for n in range(10):
        speaker.publish(topic, b"%d" % n, 1 + n % 2)
    ids = [listener.expect(mqtt.PUBLISH).packet_id for _ in range(10)]
    assert 0 not in ids
    assert len(set(ids)) == 10


def test_an_identifier_is_used_again_only_after_its_exchange(version: int, join: Connector) -> None:
    topic = fresh("ids/")
    listener, speaker = join(version), join(version)
    listener.subscribe(topic, qos=1)
    speaker.publish(topic, b"held", 1)
    held = listener.expect(mqtt.PUBLISH).packet_id
    for n in range(300):
        speaker.publish(topic, b"%d" % n, 1)
        got = listener.message(b"%d" % n)
        assert got.packet_id != held


def test_acknowledgements_carry_the_identifier_they_answer(version: int, join: Connector) -> None:
    client, topic = join(version), fresh("ids/")
    for number in (1, 0x0102, 0xFFFF):
        client.say(mqtt.publish(version, topic, b"x", 1, number))
        client.expect(mqtt.PUBACK, packet_id=number)
        client.say(mqtt.publish(version, topic, b"x", 2, number))
        client.expect(mqtt.PUBREC, packet_id=number)
        client.say(mqtt.ack(mqtt.PUBREL, number))
        client.expect(mqtt.PUBCOMP, packet_id=number, reason=0)
        client.say(mqtt.subscribe(version, number, (fresh("none/"), 0)))
        client.expect(mqtt.SUBACK, packet_id=number)
        client.say(mqtt.unsubscribe(version, number, "never"))
        client.expect(mqtt.UNSUBACK, packet_id=number)


def test_client_and_server_use_the_same_identifier_at_once(version: int, join: Connector) -> None:
    topic = fresh("ids/")
    client, speaker = join(version), join(version)
    client.subscribe(topic, qos=2)
    speaker.publish(topic, b"from the server", 2)
    got = client.expect(mqtt.PUBLISH, payload=b"from the server")
    client.say(mqtt.publish(version, fresh("other/"), b"x", 2, got.packet_id))
    client.expect(mqtt.PUBREC, packet_id=got.packet_id)
    client.say(mqtt.ack(mqtt.PUBREC, got.packet_id))
    client.expect(mqtt.PUBREL, packet_id=got.packet_id)
    client.say(mqtt.ack(mqtt.PUBREL, got.packet_id), mqtt.ack(mqtt.PUBCOMP, got.packet_id))
    client.expect(mqtt.PUBCOMP, packet_id=got.packet_id)
    assert not client.silence()


def test_no_properties_is_a_property_length_of_zero(join: Connector) -> None:
    topic = fresh("props/")
    listener, speaker = join(V5), join(V5)
    number = listener.number()
    listener.say(mqtt.subscribe(V5, number, (topic, 0)))
    assert listener.expect(mqtt.SUBACK).raw == b"\x90\x04" + struct.pack(">H", number) + b"\x00\x00"
    speaker.publish(topic, b"x")
    assert listener.expect(mqtt.PUBLISH).raw == mqtt.packet(0x30, mqtt.text(topic), b"\x00", b"x")


def test_a_packet_cut_inside_a_field_is_malformed(version: int, dial: Dial, join: Connector) -> None:
    whole = mqtt.connect(version, "abcdef", username="user", password=b"pass", will=mqtt.Will("w"))
    for size in range(2, len(whole) - 2):
        client = dial(version)
        client.say(mqtt.packet(0x10, whole[2 : 2 + size]))
        client.expect_close(0x81, 0x84)
    for whole in (mqtt.subscribe(version, 1, ("abc", 1)), mqtt.publish(version, "abc", b"", 1, 1)):
        for size in range(1, len(whole) - 3):
            client = join(version)
            client.say(mqtt.packet(whole[0], whole[2 : 2 + size]))
            client.expect_close(0x81, 0x82, 0x90)


def test_bytes_behind_the_last_field_are_malformed(version: int, join: Connector) -> None:
    for packet in (b"\xc0\x01\x00", mqtt.packet(0x62, b"\0\1\0\0x"), mqtt.packet(0xE0, b"\0\0x")):
        client = join(version)
        client.say(packet)
        client.expect_close(0x81)


PROPERTY_FAULTS = {
    "unknown": b"\x7f\x00",
    "of another packet": b"\x21\x00\x05",
    "of a will": b"\x18\x00\x00\x00\x05",
    "twice": b"\x01\x00\x01\x00",
    "neither 0 nor 1": b"\x01\x02",
    "cut": b"\x02\x00\x00",
}


@pytest.mark.parametrize("section", PROPERTY_FAULTS.values(), ids=PROPERTY_FAULTS.keys())
def test_a_property_that_may_not_stand_there_closes_the_connection(section: bytes, join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.packet(0x30, mqtt.text("t"), mqtt.varint(len(section)), section, b"x"))
    client.expect_close(0x81, 0x82)


def test_packets_may_come_byte_by_byte_and_many_at_once(version: int, dial: Dial) -> None:
    client, topic = dial(version), fresh("split/")
    everything = b"".join(
        [
            mqtt.connect(version, fresh()),
            mqtt.subscribe(version, 1, (topic, 1)),
            mqtt.PINGREQ_BYTES,
        ]
    )
    for byte in everything:
        client.say(bytes((byte,)))
    client.expect(mqtt.CONNACK, reason=0)
    assert {client.hear().kind, client.hear().kind} == {mqtt.SUBACK, mqtt.PINGRESP}
    burst = b"".join(mqtt.publish(version, topic, b"%d" % n) for n in range(50))
    client.say(burst + mqtt.PINGREQ_BYTES)
    heard = [client.hear() for _ in range(51)]
    assert [each.payload for each in heard if each.kind == mqtt.PUBLISH] == [b"%d" % n for n in range(50)]


def test_a_full_size_remaining_length_is_understood(version: int, join: Connector) -> None:
    listener, speaker, topic = join(version), join(version), fresh("large/")
    listener.subscribe(topic, qos=0)
    for size in (100, 127, 128, 16_200, 16_383, 16_384, 70_000):
        payload = bytes(size)
        speaker.publish(topic, payload)
        assert listener.message(payload).topic == topic


def test_a_qos_above_2_is_malformed(version: int, join: Connector) -> None:
    client = join(version)
    client.say(b"\x36" + mqtt.publish(version, "t", b"x", 2, 1)[1:])
    client.expect_close(0x81)


def test_dup_at_qos_0_is_malformed(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.publish(version, "t", b"x", dup=True))
    client.expect_close(0x81, 0x82)
