"""MQTT packets: what is accepted, what is refused with which reason, and what an independent codec says of them."""

from __future__ import annotations

import pytest

from gateway.mqtt.codec import (
    PropertiesCache,
    TopicCache,
    decode,
    encode,
    encode_properties,
    encode_text,
    encode_varint,
)
from gateway.mqtt.packets import (
    V3,
    V5,
    AckProperties,
    Auth,
    AuthProperties,
    Connack,
    ConnackProperties,
    Connect,
    ConnectProperties,
    Disconnect,
    DisconnectProperties,
    MqttError,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    PublishProperties,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    SubscribeProperties,
    Subscription,
    Unsuback,
    Unsubscribe,
    UnsubscribeProperties,
    Will,
    WillProperties,
)
from gateway.mqtt.topics import check_filter, check_topic, filter_matches, split_shared

USER = (("a", "1"), ("a", "2"), ("", ""))
EVERY_PACKET_V5: list[Packet] = [
    Connect(
        V5,
        "loco",
        False,
        60,
        "driver",
        b"\x00\xff",
        Will("will/t", b"gone", 1, True, WillProperties(5, 1, 60, "text/plain", "re/ply", b"\x00", USER)),
        ConnectProperties(1, 2, 3, 4, 1, 0, USER, "SCRAM", b"x"),
    ),
    Connect(V5, "", password=b"token"),
    Connack(
        True,
        0,
        ConnackProperties(1, 2, 1, 0, 5, "id", 7, "why", USER, 0, 1, 0, 13, "info", "other", "M", b"d"),
    ),
    Connack(False, 0x97),
    Publish("a/b", b"x" * 300, 1, True, True, 7, PublishProperties(1, 2, 3, "r", b"c", USER, (1, 268435455), "t")),
    Publish("", b"", properties=PublishProperties(topic_alias=9)),
    Puback(1),
    Puback(65535, 0x10),
    Puback(2, 0x87, AckProperties("no", USER)),
    Pubrec(3, 0x97),
    Pubrel(4, 0x92),
    Pubcomp(5, 0, AckProperties(user_property=USER)),
    Subscribe(6, (Subscription("a/+/#", 1, True, True, 2), Subscription("b")), SubscribeProperties(7, USER)),
    Suback(6, (0, 1, 2, 0x8F), AckProperties("why")),
    Unsubscribe(8, ("a", "b/#"), UnsubscribeProperties(USER)),
    Unsuback(8, (0, 0x11)),
    Pingreq(),
    Pingresp(),
    Disconnect(),
    Disconnect(0x04),
    Disconnect(0x8E, DisconnectProperties(5, "why", USER, "there")),
    Auth(),
    Auth(0x18, AuthProperties("M", b"d", "why", USER)),
]
EVERY_PACKET_V3: list[Packet] = [
    Connect(V3, "loco", True, 60, "driver", b"secret", Will("will/t", b"", 1)),
    Connack(False, 5),
    Publish("a/b", b"x", 1, False, True, 7),
    Publish("a/b", b""),
    Puback(1),
    Pubrec(2),
    Pubrel(3),
    Pubcomp(4),
    Subscribe(5, (Subscription("#", 2),)),
    Suback(5, (0, 0x80)),
    Unsubscribe(6, ("#",)),
    Unsuback(6),
    Pingreq(),
    Pingresp(),
    Disconnect(),
]


@pytest.mark.parametrize("packet", EVERY_PACKET_V5, ids=lambda p: type(p).__name__)
def test_every_packet_of_5_0_survives_the_round_trip(packet: Packet) -> None:
    assert decode(encode(packet, V5), V5) == packet


@pytest.mark.parametrize("packet", EVERY_PACKET_V3, ids=lambda p: type(p).__name__)
def test_every_packet_of_3_1_1_survives_the_round_trip(packet: Packet) -> None:
    assert decode(encode(packet, V3), V3) == packet


@pytest.mark.parametrize(
    ("packet", "version"),
    [(packet, V5) for packet in EVERY_PACKET_V5] + [(packet, V3) for packet in EVERY_PACKET_V3],
    ids=lambda value: type(value).__name__,
)
def test_a_packet_cut_short_anywhere_is_malformed(packet: Packet, version: int) -> None:
    data = encode(packet, version)
    for size in range(len(data)):
        with pytest.raises(MqttError) as caught:
            decode(data[:size], version)
        assert caught.value.reason is Reason.MALFORMED_PACKET


def test_every_property_of_the_standard_was_in_the_round_trip() -> None:
    from gateway.mqtt import codec

    assert len(codec._PROPERTIES) == 27
    seen = {name for kind in codec._ALLOWED.values() for name in kind}
    assert seen == {name for name, _ in codec._PROPERTIES.values()}


# ------------------------------------------------------------------------------------------ the oracle
mqtt5 = pytest.importorskip("mqtt5")


def _reread(packet: Packet) -> object:
    data = encode(packet, V5)
    other, used = mqtt5.read(memoryview(data))
    assert used == len(data)
    return other


# The oracle does not know that an AUTH of success may have no body at all (MQTT 5.0 §3.15.2.1).
@pytest.mark.parametrize("packet", [each for each in EVERY_PACKET_V5 if each != Auth()], ids=lambda p: type(p).__name__)
def test_an_independent_codec_reads_what_we_write_and_writes_what_we_read(packet: Packet) -> None:
    other = _reread(packet)
    again = decode(other.write(), V5)  # type: ignore[attr-defined]
    assert type(again) is type(packet)
    reread = _reread(again)
    names = [name for name in dir(other) if not name.startswith("_") and name not in ("write", "will", "topic_filters")]
    assert [getattr(other, name) for name in names] == [getattr(reread, name) for name in names]


def test_an_independent_codec_sees_the_same_publish() -> None:
    ours = Publish("a/b", b"\x00x", 1, True, True, 513, PublishProperties(1, 60, None, "r", b"c", USER, (), "t"))
    other = _reread(ours)
    theirs = mqtt5.PublishPacket(
        "a/b",
        b"\x00x",
        qos=mqtt5.QoS.AT_LEAST_ONCE,
        retain=True,
        packet_id=513,
        duplicate=True,
        payload_format_indicator=1,
        message_expiry_interval=60,
        content_type="t",
        response_topic="r",
        correlation_data=b"c",
        user_properties=list(USER),
    )
    assert decode(theirs.write(), V5) == ours
    for name in (
        "topic",
        "payload",
        "qos",
        "retain",
        "packet_id",
        "duplicate",
        "content_type",
        "user_properties",
    ):
        assert getattr(other, name) == getattr(theirs, name)


def test_an_independent_codec_sees_the_same_connect() -> None:
    theirs = mqtt5.ConnectPacket(
        "loco",
        username="driver",
        password=b"pw",
        clean_start=True,
        keep_alive=30,
        session_expiry_interval=3600,
        receive_max=20,
        will=mqtt5.Will("w/t", payload=b"gone", qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True, will_delay_interval=5),
    )
    ours = decode(theirs.write(), V5)
    assert isinstance(ours, Connect)
    assert (ours.client_id, ours.username, ours.password, ours.clean_start) == ("loco", "driver", b"pw", True)
    assert (ours.keep_alive, ours.properties.session_expiry_interval, ours.properties.receive_maximum) == (
        30,
        3600,
        20,
    )
    assert ours.will is not None
    assert (ours.will.topic, ours.will.payload, ours.will.qos, ours.will.retain) == ("w/t", b"gone", 1, True)
    assert ours.will.properties.will_delay_interval == 5


def test_an_independent_codec_sees_the_same_subscribe() -> None:
    theirs = mqtt5.SubscribePacket(
        3,
        [
            mqtt5.TopicFilter(
                "a/#",
                max_qos=mqtt5.QoS.AT_LEAST_ONCE,
                no_local=True,
                retain_as_published=False,
                retain_handling=mqtt5.RetainHandling.SEND_NEVER,
            )
        ],
        subscription_id=9,
    )
    ours = Subscribe(3, (Subscription("a/#", 1, True, False, 2),), SubscribeProperties(9))
    assert decode(theirs.write(), V5) == ours
    assert encode(ours, V5) == theirs.write()


# ---------------------------------------------------------------------------------------- what is refused
def raw(first: int, *pieces: bytes) -> bytes:
    body = b"".join(pieces)
    return bytes((first,)) + encode_varint(len(body)) + body


def props(*pieces: bytes) -> bytes:
    body = b"".join(pieces)
    return encode_varint(len(body)) + body


T = encode_text
ID = b"\x00\x01"
V5_HEAD = b"\x00\x04MQTT\x05"
V3_HEAD = b"\x00\x04MQTT\x04"
NO = b"\x00"
M, P = Reason.MALFORMED_PACKET, Reason.PROTOCOL_ERROR

REFUSED: list[tuple[str, int, bytes, Reason]] = [
    ("packet type 0", V5, b"\x00\x00", M),
    ("AUTH does not exist in 3.1.1", V3, b"\xf0\x00", M),
    ("header flags of PINGREQ", V5, b"\xc1\x00", M),
    ("header flags of SUBSCRIBE", V5, raw(0x80, ID, NO, T("a"), b"\x00"), M),
    ("header flags of PUBREL", V5, raw(0x60, ID), M),
    ("header flags of CONNECT", V5, b"\x11\x00", M),
    ("five length bytes", V5, b"\x30\xff\xff\xff\xff\x01", M),
    ("padded length", V5, b"\xc0\x80\x00", M),
    ("PINGREQ with a body", V5, b"\xc0\x01\x00", M),
    ("QoS 3", V5, raw(0x36, T("a"), ID, NO), M),
    ("DUP at QoS 0", V5, raw(0x38, T("a"), NO), M),
    ("packet id 0", V5, raw(0x32, T("a"), b"\x00\x00", NO), P),
    ("topic longer than its packet", V5, raw(0x30, b"\x00\x09a"), M),
    ("topic not UTF-8", V5, raw(0x30, b"\x00\x01\xff", NO), M),
    ("topic with an overlong form", V5, raw(0x30, b"\x00\x02\xc0\xaf", NO), M),
    ("topic with a surrogate", V5, raw(0x30, b"\x00\x03\xed\xa0\x80", NO), M),
    ("topic with U+0000", V5, raw(0x30, b"\x00\x02a\x00", NO), M),
    ("topic with a wildcard", V5, raw(0x30, T("a/+"), NO), Reason.TOPIC_NAME_INVALID),
    ("topic with a wildcard, 3.1.1", V3, raw(0x30, T("a/#")), Reason.TOPIC_NAME_INVALID),
    ("no topic", V3, raw(0x30, T("")), Reason.TOPIC_NAME_INVALID),
    ("no topic and no alias", V5, raw(0x30, T(""), NO), P),
    ("no property length", V5, raw(0x30, T("a")), M),
    ("properties beyond the packet", V5, raw(0x30, T("a"), b"\x05\x01"), M),
    ("property unknown", V5, raw(0x30, T("a"), props(b"\x7f\x00")), M),
    ("property of another packet", V5, raw(0x30, T("a"), props(b"\x11\x00\x00\x00\x01")), P),
    ("property twice", V5, raw(0x30, T("a"), props(b"\x01\x00\x01\x00")), P),
    ("property cut short", V5, raw(0x30, T("a"), props(b"\x02\x00\x00")), M),
    ("property cut short before a payload", V5, raw(0x30, T("a"), props(b"\x02\x00"), b"payload"), M),
    ("format indicator 2", V5, raw(0x30, T("a"), props(b"\x01\x02")), P),
    ("topic alias 0", V5, raw(0x30, T("a"), props(b"\x23\x00\x00")), Reason.TOPIC_ALIAS_INVALID),
    (
        "response topic with a wildcard",
        V5,
        raw(0x30, T("a"), props(b"\x08", T("#"))),
        Reason.TOPIC_NAME_INVALID,
    ),
    ("content type not UTF-8", V5, raw(0x30, T("a"), props(b"\x03\x00\x01\xff")), M),
    ("padded subscription identifier", V5, raw(0x82, ID, props(b"\x0b\x81\x00"), T("a"), b"\x00"), M),
    ("subscription identifier 0", V5, raw(0x82, ID, props(b"\x0b\x00"), T("a"), b"\x00"), P),
    ("subscription identifier twice", V5, raw(0x82, ID, props(b"\x0b\x01\x0b\x01"), T("a"), b"\x00"), P),
    ("SUBSCRIBE to nothing", V5, raw(0x82, ID, NO), P),
    ("SUBSCRIBE id 0", V5, raw(0x82, b"\x00\x00", NO, T("a"), b"\x00"), P),
    ("SUBSCRIBE without options", V5, raw(0x82, ID, NO, T("a")), M),
    ("SUBSCRIBE at QoS 3", V5, raw(0x82, ID, NO, T("a"), b"\x03"), M),
    ("SUBSCRIBE with reserved bits", V5, raw(0x82, ID, NO, T("a"), b"\x40"), M),
    ("SUBSCRIBE with reserved bits, 3.1.1", V3, raw(0x82, ID, T("a"), b"\x04"), M),
    ("retain handling 3", V5, raw(0x82, ID, NO, T("a"), b"\x30"), P),
    ("shared with No Local", V5, raw(0x82, ID, NO, T("$share/g/a"), b"\x05"), P),
    ("filter a/#/b", V3, raw(0x82, ID, T("a/#/b"), b"\x00"), Reason.TOPIC_FILTER_INVALID),
    ("filter a+", V3, raw(0x82, ID, T("a+"), b"\x00"), Reason.TOPIC_FILTER_INVALID),
    ("empty filter", V3, raw(0xA2, ID, T("")), Reason.TOPIC_FILTER_INVALID),
    ("filter #a", V3, raw(0xA2, ID, T("#a")), Reason.TOPIC_FILTER_INVALID),
    ("UNSUBSCRIBE from nothing", V3, raw(0xA2, ID), P),
    ("PUBACK with another's reason", V5, raw(0x40, ID, b"\x92"), P),
    ("PUBACK with a reason, 3.1.1", V3, raw(0x40, ID, b"\x00"), M),
    ("PUBACK with trailing bytes", V5, raw(0x40, ID, b"\x00\x00\x00"), M),
    ("DISCONNECT with another's reason", V5, raw(0xE0, b"\x10"), P),
    ("DISCONNECT with a body, 3.1.1", V3, raw(0xE0, b"\x00"), M),
    ("AUTH without a method", V5, raw(0xF0, b"\x18", NO), P),
    ("another protocol", V5, raw(0x10, b"\x00\x04HTTP\x05\x00\x00\x00"), Reason.UNSUPPORTED_PROTOCOL_VERSION),
    (
        "before MQTT 3.1",
        V5,
        raw(0x10, b"\x00\x06MQIsdp\x02\x02\x00\x00", T("c")),
        Reason.UNSUPPORTED_PROTOCOL_VERSION,
    ),
    (
        "MQTT 3.1 of a bridge",
        V5,
        raw(0x10, b"\x00\x06MQIsdp\x83\x02\x00\x00", T("c")),
        Reason.UNSUPPORTED_PROTOCOL_VERSION,
    ),
    ("MQTT 6", V5, raw(0x10, b"\x00\x04MQTT\x06\x02\x00\x00", T("c")), Reason.UNSUPPORTED_PROTOCOL_VERSION),
    ("reserved connect flag", V5, raw(0x10, V5_HEAD, b"\x01\x00\x00", NO, T("c")), M),
    ("will QoS 3", V5, raw(0x10, V5_HEAD, b"\x1c\x00\x00", NO, T("c"), NO, T("w"), T("")), M),
    ("will QoS without a will", V5, raw(0x10, V5_HEAD, b"\x08\x00\x00", NO, T("c")), M),
    ("will retain without a will", V3, raw(0x10, V3_HEAD, b"\x20\x00\x00", T("c")), M),
    ("password alone, 3.1.1", V3, raw(0x10, V3_HEAD, b"\x40\x00\x00", T("c"), T("p")), M),
    (
        "will to a filter",
        V3,
        raw(0x10, V3_HEAD, b"\x04\x00\x00", T("c"), T("#"), T("")),
        Reason.TOPIC_NAME_INVALID,
    ),
    ("CONNECT with trailing bytes", V3, raw(0x10, V3_HEAD, b"\x02\x00\x00", T("c"), b"x"), M),
    ("receive maximum 0", V5, raw(0x10, V5_HEAD, b"\x02\x00\x00", props(b"\x21\x00\x00"), T("c")), P),
    ("maximum packet size 0", V5, raw(0x10, V5_HEAD, b"\x02\x00\x00", props(b"\x27" + bytes(4)), T("c")), P),
    ("auth data alone", V5, raw(0x10, V5_HEAD, b"\x02\x00\x00", props(b"\x16", T("d")), T("c")), P),
    ("CONNACK flags", V5, raw(0x20, b"\x02\x00", NO), M),
    ("CONNACK refused with a session", V5, raw(0x20, b"\x01\x87", NO), P),
    ("SUBACK of nothing", V5, raw(0x90, ID, NO), P),
    ("SUBACK with a reason it lacks", V3, raw(0x90, ID, b"\x8f"), P),
    ("UNSUBACK with reasons, 3.1.1", V3, raw(0xB0, ID, b"\x00"), M),
    ("bytes after the packet", V5, b"\xc0\x00\x00", M),
]


@pytest.mark.parametrize(("version", "data", "reason"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_the_standard_forbids_is_refused_with_its_reason(version: int, data: bytes, reason: Reason) -> None:
    with pytest.raises(MqttError) as caught:
        decode(data, version)
    assert caught.value.reason is reason
    assert str(caught.value)


def test_what_looks_odd_but_is_allowed_is_accepted() -> None:
    assert decode(raw(0x30, T("\ufeffa"), NO), V5) == Publish("\ufeffa", b"")  # a BOM is a character, §1.5.4
    assert decode(raw(0x40, ID, b"\x10"), V5) == Puback(1, 0x10)  # properties left out, §3.4.2.2.1
    assert decode(raw(0x40, ID, b"\x00\x00"), V5) == Puback(1)
    assert decode(raw(0xE0, b"\x04"), V5) == Disconnect(4)
    assert decode(raw(0x82, ID, T("$share/g"), b"\x00"), V3) == Subscribe(1, (Subscription("$share/g"),))
    # 5.0 refuses an ill-formed filter in its own place of the SUBACK, §3.9.3
    assert decode(raw(0x82, ID, NO, T("a/#/b"), b"\x00"), V5) == Subscribe(1, (Subscription("a/#/b"),))
    assert decode(raw(0x10, V3_HEAD, b"\x02\x00\x00", T("")), V3) == Connect(V3, "")
    assert decode(raw(0x10, b"\x00\x06MQIsdp\x03\x02\x00\x00", T("c")), V3) == Connect(V3, "c", legacy=True)


def test_the_error_and_the_connect_show_no_secret() -> None:
    connect = Connect(V5, "c", username="u", password=b"hunter2", will=Will("w", b"hunter2"))
    assert "hunter2" not in repr(connect)
    with pytest.raises(MqttError) as caught:
        decode(raw(0x30, T("secret/+"), NO), V5)
    assert "secret" not in str(caught.value)


def test_encoding_what_no_packet_can_hold_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="65535"):
        encode_text("x" * 65_536)
    with pytest.raises(ValueError, match="U\\+0000"):
        encode_text("a\0")
    with pytest.raises(ValueError, match="268435455"):
        encode_varint(1 << 28)


def test_the_caches_stay_bounded_and_keep_no_long_entry() -> None:
    topics = TopicCache(entries_max=3, topic_max_bytes=4)
    assert [topics[b"t%d" % i] for i in range(10)] == [f"t{i}" for i in range(10)]
    assert len(topics) <= 3
    assert topics[b"a/long/topic"] == "a/long/topic"
    assert b"a/long/topic" not in topics
    with pytest.raises(MqttError):
        topics[b"a/#"]
    sections = PropertiesCache(entries_max=2, section_max_bytes=8)
    for alias in range(1, 6):
        assert sections[encode_properties(PublishProperties(topic_alias=alias))] == (None, alias)
    assert len(sections) <= 2
    long = PublishProperties(content_type="a content type")
    assert sections[encode_properties(long)] == (long, 0)
    assert encode_properties(long) not in sections


# ------------------------------------------------------------------------------------------------ topics
@pytest.mark.parametrize(
    ("filter", "topic", "matches"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", "a/b", False),
        ("a/b", "a", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "/", True),
        ("+", "a", True),
        ("+", "/a", False),
        ("+/+", "/a", True),
        ("/+", "/a", True),
        ("a/+/c", "a//c", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/+/#", "a/b", True),
        ("a/+/#", "a", False),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("$SYS/+", "$SYS/x", True),
        ("a/#", "a/$x", True),
        ("A", "a", False),
        ("a/b/", "a/b", False),
    ],
)
def test_a_filter_takes_the_topics_the_standard_says(filter: str, topic: str, matches: bool) -> None:
    check_filter(filter)
    check_topic(topic)
    assert filter_matches(filter, topic) is matches


@pytest.mark.parametrize("topic", ["", "a+", "#", "a/#", "a\0", "x" * 65_536, "é" * 32_768, "\ud800"])
def test_an_ill_formed_topic_is_refused(topic: str) -> None:
    with pytest.raises(ValueError, match="a topic name"):
        check_topic(topic)


@pytest.mark.parametrize(
    "filter",
    [
        "",
        "a#",
        "#/a",
        "a/#/b",
        "+a",
        "a/b+/c",
        "\0",
        "x" * 65_536,
        "$share",
        "$share/",
        "$share/g",
        "$share/g/",
    ],
)
def test_an_ill_formed_filter_is_refused(filter: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_filter(filter)


@pytest.mark.parametrize("filter", ["$share/+/a", "$share/g#/a", "$share//a", "$share/g/a#", "$share/g/#/a"])
def test_an_ill_formed_shared_subscription_is_refused_in_5_0_only(filter: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_filter(filter)


def test_a_shared_subscription_is_split() -> None:
    check_filter("$share/g/a/+/#")
    assert split_shared("$share/g/a/#") == ("g", "a/#")
    assert split_shared("$share/g//a") == ("g", "/a")
    assert split_shared("a/b") == (None, "a/b")
    assert split_shared("$shared/g/a") == (None, "$shared/g/a")
    check_filter("$shared/g/a")
    check_filter("$share/+/a", shared=False)
