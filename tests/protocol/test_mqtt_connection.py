"""The server's end of an MQTT connection as playbooks: bytes in, events and bytes out.

Run as a program, it measures the intake: `python tests/protocol/test_mqtt_connection.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from gateway.mqtt.codec import FILTERS_MAX, decode, encode, encode_properties, remaining_length
from gateway.mqtt.connection import (
    NO_LIMIT,
    RECEIVABLE,
    RETURN_CODE_3,
    TRANSITIONS,
    Cause,
    Limits,
    ServerConnection,
    State,
    TooLargeForPeer,
)
from gateway.mqtt.events import (
    Acked,
    Completed,
    Connected,
    Disconnected,
    Event,
    Failed,
    Message,
    Publishes,
    Received,
    Released,
    Subscribed,
    Unsubscribed,
)
from gateway.mqtt.packets import (
    V3,
    V5,
    AckProperties,
    Connack,
    ConnackProperties,
    Connect,
    ConnectProperties,
    Disconnect,
    DisconnectProperties,
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
    Will,
    WillProperties,
)

BOTH = pytest.mark.parametrize("version", [V3, V5], ids=["3.1.1", "5.0"])


def wire(version: int, *packets: Packet) -> bytes:
    return b"".join(encode(packet, version) for packet in packets)


def sent(conn: ServerConnection) -> list[Packet]:
    """The packets the connection wants to write."""
    data = conn.data_to_send()
    packets = []
    while data:
        framed = remaining_length(data, 0)
        assert framed is not None
        size = sum(framed)
        packets.append(decode(data[:size], conn.version))
        data = data[size:]
    return packets


def opened(version: int, limits: Limits | None = None, connect: Connect | None = None) -> ServerConnection:
    conn = ServerConnection(limits or Limits())
    asked = connect or Connect(version, "c")
    assert conn.receive(wire(version, asked), 0.0) == [Connected(asked)]
    assert conn.accept(False) == []
    conn.data_to_send()
    assert conn.state is State.OPEN
    return conn


def messages(events: list[Event]) -> list[Message]:
    return [message for event in events if isinstance(event, Publishes) for message in event.messages]


def failure(events: list[Event]) -> Reason:
    assert isinstance(events[-1], Failed)
    return events[-1].error.reason


# ------------------------------------------------------------------------------------------- connecting
def test_a_3_1_1_client_connects_publishes_and_leaves() -> None:
    conn = ServerConnection(Limits())
    connect = Connect(V3, "loco", False, 30, "driver", b"pw", Will("w/t", b"gone", 1, True))
    assert conn.receive(wire(V3, connect), 1.0) == [Connected(connect)]
    assert (conn.state, conn.version, conn.client_id) == (State.AWAITING_VERDICT, V3, "loco")
    assert conn.data_to_send() == b""
    assert conn.accept(True) == []
    assert conn.data_to_send() == b"\x20\x02\x01\x00"
    events = conn.receive(wire(V3, Publish("a", b"x", 1, False, False, 258), Publish("b", b"", 0, True)), 2.0)
    assert events == [
        Publishes([("a", 1, False, False, b"\x01\x02", b"x", None), ("b", 0, True, False, b"", b"", None)])
    ]
    assert conn.data_to_send() == b""
    conn.puback([b"\x01\x02"])
    assert conn.data_to_send() == b"\x40\x02\x01\x02"
    assert conn.receive(wire(V3, Disconnect()), 3.0) == [
        Disconnected(Disconnect(), True, "the client disconnected, reason 0x00")
    ]
    assert conn.closing
    assert conn.data_to_send() == b""


def test_a_5_0_client_is_told_every_limit() -> None:
    limits = Limits(packet_max_bytes=5000, receive_maximum=20, keep_alive_max_s=60, topic_alias_max=4)
    conn = ServerConnection(limits)
    will = Will("w", b"", properties=WillProperties(will_delay_interval=3))
    connect = Connect(V5, "", True, 0, None, b"token", will, ConnectProperties(session_expiry_interval=10))
    assert conn.receive(wire(V5, connect), 0.0) == [Connected(connect)]
    conn.accept(False, assigned_client_id="auto-1", session_expiry_s=5)
    assert conn.client_id == "auto-1"
    assert sent(conn) == [
        Connack(
            False,
            0,
            ConnackProperties(
                session_expiry_interval=5,
                receive_maximum=20,
                maximum_packet_size=5000,
                assigned_client_identifier="auto-1",
                topic_alias_maximum=4,
                server_keep_alive=60,
            ),
        )
    ]
    assert conn.keep_alive_s == 60


@BOTH
def test_what_stands_behind_connect_is_held_until_the_verdict(version: int) -> None:
    conn = ServerConnection(Limits())
    connect = Connect(version, "c")
    behind = wire(version, Publish("a", b"1", 1, packet_id=1), Pingreq(), Publish("a", b"2", 1, packet_id=2))
    assert conn.receive(wire(version, connect) + behind[:9], 0.0) == [Connected(connect)]
    assert conn.receive(behind[9:], 0.1) == []
    assert conn.data_to_send() == b""
    assert [message[5] for message in messages(conn.accept(False))] == [b"1", b"2"]
    assert sent(conn)[1:] == [Pingresp()]


@BOTH
def test_what_is_held_is_bounded(version: int) -> None:
    conn = ServerConnection(Limits(held_max_bytes=100))
    conn.receive(wire(version, Connect(version, "c")), 0.0)
    assert conn.receive(bytes(100), 0.0) == []
    assert failure(conn.receive(b"\0", 0.0)) is Reason.QUOTA_EXCEEDED
    assert conn.closing
    assert conn.accept(False) == []
    (connack,) = sent(conn)
    assert isinstance(connack, Connack)
    assert connack.reason == (RETURN_CODE_3[0x97] if version == V3 else 0x97)


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason >= 0x80])
def test_a_refusal_is_said_in_the_words_of_the_version(reason: Reason) -> None:
    conn = ServerConnection(Limits())
    conn.receive(wire(V3, Connect(V3, "c")), 0.0)
    conn.refuse(reason, "no")
    assert conn.data_to_send() == (bytes((0x20, 2, 0, RETURN_CODE_3[reason])) if reason in RETURN_CODE_3 else b"")
    assert conn.closing
    conn = ServerConnection(Limits())
    conn.receive(wire(V5, Connect(V5, "c")), 0.0)
    conn.refuse(reason, "no")
    (connack,) = sent(conn)
    assert isinstance(connack, Connack)
    assert connack.reason in (reason, Reason.UNSPECIFIED_ERROR)
    assert connack.properties.reason_string == "no"


@pytest.mark.parametrize(
    ("data", "answer", "reason"),
    [
        (b"\x10\x0e\x00\x06MQIsdp\x02\x02\x00\x00\x00\x00", b"\x20\x02\x00\x01", 0x84),
        (b"\x10\x0e\x00\x06MQIsdp\x83\x02\x00\x00\x00\x00", b"\x20\x02\x00\x01", 0x84),
        (b"\x10\x0e\x00\x06MQIsdp\x03\x00\x00\x00\x00\x00", b"\x20\x02\x00\x02", 0x85),
        (b"\x10\x0c\x00\x04MQTT\x03\x02\x00\x00\x00\x00", b"\x20\x02\x00\x01", 0x84),
        (b"\x10\x0c\x00\x04HTTP\x04\x02\x00\x00\x00\x00", b"", 0x84),
        (b"\x10\x0c\x00\x04MQTT\x04\x00\x00\x00\x00\x00", b"\x20\x02\x00\x02", 0x85),
        (b"\x10\x0c\x00\x04MQTT\x04\x03\x00\x00\x00\x00", b"", 0x81),
        (b"GET / HTTP/1.1\r\n\r\n", b"", 0x81),
        (b"\x16\x03\x01\x02\x00\x01\x00", b"", 0x81),
        (b"\xc0\x00", b"", 0x82),
        (b"\x30\x03\x00\x01a", b"", 0x82),
        (b"\x10\xff\xff\xff\x7f", b"", 0x95),
    ],
)
def test_a_first_packet_that_is_no_connect_for_us_ends_it(data: bytes, answer: bytes, reason: int) -> None:
    conn = ServerConnection(Limits())
    assert failure(conn.receive(data, 0.0)) == reason
    assert conn.data_to_send() == answer
    assert conn.closing
    assert conn.receive(wire(V3, Connect(V3, "c")), 0.0) == []


@pytest.mark.parametrize(
    ("connect", "limits", "reason"),
    [
        (Connect(V5, "c", properties=ConnectProperties(authentication_method="X")), Limits(), 0x8C),
        (Connect(V5, "c", will=Will("w", b"", 2)), Limits(maximum_qos=1), 0x9B),
        (Connect(V5, "c", will=Will("w", b"", 0, True)), Limits(retain_available=False), 0x9A),
        (Connect(V5, "c" * 300), Limits(connect_max_bytes=200), 0x95),
    ],
)
def test_a_connect_that_asks_too_much_is_refused_with_the_reason(connect: Connect, limits: Limits, reason: int) -> None:
    conn = ServerConnection(limits)
    assert failure(conn.receive(wire(V5, connect), 0.0)) == reason
    answers = sent(conn)
    assert all(isinstance(answer, Connack) and answer.reason == reason for answer in answers)
    assert bool(answers) == (reason != 0x95)


def test_a_malformed_5_0_connect_is_answered_in_5_0() -> None:
    conn = ServerConnection(Limits())
    assert failure(conn.receive(wire(V5, Connect(V5, "c"))[:-1].replace(b"\x10\x0e", b"\x10\x0d"), 0.0)) == 0x81
    (connack,) = sent(conn)
    assert isinstance(connack, Connack)
    assert connack.reason == 0x81


@BOTH
def test_a_second_connect_and_auth_are_protocol_errors(version: int) -> None:
    conn = opened(version)
    assert failure(conn.receive(wire(version, Connect(version, "c")), 0.0)) is Reason.PROTOCOL_ERROR
    conn = opened(version)
    assert failure(conn.receive(b"\xf0\x00", 0.0)) in (Reason.PROTOCOL_ERROR, Reason.MALFORMED_PACKET)
    assert conn.data_to_send()[:1] == (b"\xe0" if version == V5 else b"")


# -------------------------------------------------------------------------------------------------- time
@BOTH
def test_silence_for_one_and_a_half_keep_alives_ends_the_connection(version: int) -> None:
    conn = opened(version, connect=Connect(version, "c", keep_alive=10))
    assert conn.deadline(0.0) == 15.0
    assert conn.tick(14.9) == []
    conn.receive(b"\xc0", 14.0)  # half a packet is a sign of life, too
    assert conn.deadline(14.0) == 29.0
    assert conn.tick(15.0) == []
    assert failure(conn.tick(29.0)) is Reason.KEEP_ALIVE_TIMEOUT
    assert conn.closing
    assert conn.deadline(29.0) is None
    assert conn.tick(99.0) == []
    assert conn.data_to_send()[:1] == (b"\xe0" if version == V5 else b"")


def test_a_client_that_never_connects_is_dropped_in_time_however_it_dribbles() -> None:
    conn = ServerConnection(Limits(connect_timeout_s=5.0))
    assert conn.deadline(100.0) == 105.0
    conn.receive(b"\x10", 104.0)
    assert conn.deadline(104.0) == 105.0
    assert failure(conn.tick(105.0)) is Reason.KEEP_ALIVE_TIMEOUT
    assert conn.data_to_send() == b""


def test_no_clock_runs_without_keep_alive_or_while_we_decide() -> None:
    conn = opened(V3)
    assert conn.deadline(1e9) is None
    conn = ServerConnection(Limits())
    conn.receive(wire(V3, Connect(V3, "c", keep_alive=1)), 0.0)
    assert conn.deadline(1e9) is None


# ------------------------------------------------------------------------------------------------ intake
@BOTH
def test_dup_retain_and_size_reach_the_owner(version: int) -> None:
    conn = opened(version)
    packets = [
        Publish("t", bytes(size), qos, retain, dup, 7 if qos else 0)
        for size in (0, 1, 120, 130, 16_300, 16_500, 100_000)
        for qos, retain, dup in ((0, False, False), (0, True, False), (1, False, True), (1, True, True))
    ]
    got = messages(conn.receive(wire(version, *packets), 0.0))
    assert got == [(p.topic, p.qos, p.retain, p.dup, b"\x00\x07" if p.qos else b"", p.payload, None) for p in packets]


def test_properties_reach_the_owner_and_aliases_do_not() -> None:
    conn = opened(V5, Limits(topic_alias_max=2))
    text = PublishProperties(content_type="text/plain", user_property=(("a", "b"),))
    long = PublishProperties(content_type="t" * 200)
    aliased = PublishProperties(topic_alias=2)
    both = PublishProperties(topic_alias=1, content_type="x")
    data = wire(
        V5,
        Publish("a", b"0", properties=text),
        Publish("a", b"1", properties=long),
        Publish("b", b"2", properties=aliased),
        Publish("", b"3", 1, packet_id=1, properties=aliased),
        Publish("c", b"4", properties=both),
        Publish("", b"5", properties=both),
        Publish("d", b"6", properties=aliased),
        Publish("", b"7", properties=aliased),
    )
    assert [(m[0], m[5], m[6]) for m in messages(conn.receive(data, 0.0))] == [
        ("a", b"0", text),
        ("a", b"1", long),
        ("b", b"2", None),
        ("b", b"3", None),
        ("c", b"4", PublishProperties(content_type="x")),
        ("c", b"5", PublishProperties(content_type="x")),
        ("d", b"6", None),
        ("d", b"7", None),
    ]


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (Publish("a", b"", properties=PublishProperties(topic_alias=3)), 0x94),
        (Publish("", b"", properties=PublishProperties(topic_alias=1)), 0x82),
        (Publish("", b""), 0x82),
        (Publish("a/#", b""), 0x90),
        (Publish("a", b"", properties=PublishProperties(subscription_identifier=(1,))), 0x82),
        (
            Publish("a", b"", properties=PublishProperties(content_type="t" * 200, subscription_identifier=(1,))),
            0x82,
        ),
        (Publish("a", bytes(5000), 1, packet_id=1), 0x95),
        (Publish("a", b"", 1), 0x82),
        (Subscribe(1, (Subscription(""),)), 0x8F),
        (Suback(1, (0,)), 0x82),
        (Pingresp(), 0x82),
        (Disconnect(0, DisconnectProperties(session_expiry_interval=5)), 0x82),
    ],
)
def test_a_broken_rule_closes_with_its_reason_after_what_came_before(packet: Packet, reason: int) -> None:
    conn = opened(V5, Limits(packet_max_bytes=4000, topic_alias_max=2))
    good = Publish("good", b"", 1, packet_id=9)
    events = conn.receive(wire(V5, good, packet, good), 0.0)
    assert [message[0] for message in messages(events)] == ["good"]
    assert failure(events) == reason
    (last,) = sent(conn)
    assert isinstance(last, Disconnect)
    assert last.reason == reason
    assert last.properties.reason_string
    conn.puback([b"\x00\x09"])  # committed meanwhile; nothing may follow our DISCONNECT
    conn.suback(Subscribe(1, (Subscription("a"),)), [0])
    assert conn.publish("a", b"", 1) is None
    assert conn.data_to_send() == b""
    assert conn.receive(b"anything", 1.0) == []
    assert conn.eof() == []


@BOTH
def test_an_oversized_packet_is_refused_on_its_length_alone(version: int) -> None:
    conn = opened(version, Limits(packet_max_bytes=100))
    assert messages(conn.receive(wire(version, Publish("a", bytes(94 if version == V5 else 95))), 0.0))
    assert conn.receive(b"\x32\x62", 0.0) == []  # 98 bytes and a header of 2
    conn = opened(version, Limits(packet_max_bytes=100))
    assert conn.receive(b"\x32", 0.0) == []
    assert failure(conn.receive(b"\x80\x80\x80\x01", 0.0)) is Reason.PACKET_TOO_LARGE


def test_the_packet_maximum_counts_the_whole_packet() -> None:
    at_limit = wire(V3, Publish("a", bytes(95)))
    assert len(at_limit) == 100
    assert messages(opened(V3, Limits(packet_max_bytes=100)).receive(at_limit, 0.0))
    assert failure(opened(V3, Limits(packet_max_bytes=99)).receive(at_limit, 0.0)) is Reason.PACKET_TOO_LARGE


def test_the_receive_maximum_is_enforced_and_opened_again_by_acknowledging() -> None:
    conn = opened(V5, Limits(receive_maximum=3))
    one = Publish("a", b"", 1, packet_id=1)
    plain = Publish("a", b"")
    assert len(messages(conn.receive(wire(V5, one, plain, one, plain, one, plain), 0.0))) == 6
    assert conn.unacknowledged == 3
    conn.puback([b"\x00\x01"] * 2)
    assert conn.unacknowledged == 1
    assert len(messages(conn.receive(wire(V5, one, one), 0.0))) == 2
    assert failure(conn.receive(wire(V5, one), 0.0)) is Reason.RECEIVE_MAXIMUM_EXCEEDED


def test_3_1_1_knows_no_receive_maximum_but_the_owner_sees_what_is_owed() -> None:
    conn = opened(V3, Limits(receive_maximum=3))
    conn.receive(wire(V3, *[Publish("a", b"", 1, packet_id=n) for n in range(1, 11)]), 0.0)
    assert conn.unacknowledged == 10
    conn.puback([b"\x00\x01"] * 10)
    assert conn.unacknowledged == 0


def test_acknowledgements_carry_a_reason_in_5_0_and_never_lie_in_3_1_1() -> None:
    conn = opened(V5)
    conn.receive(wire(V5, Publish("a", b"", 1, packet_id=1), Publish("a", b"", 1, packet_id=2)), 0.0)
    conn.puback([b"\x00\x01", b"\x00\x02"], 0x97)
    assert sent(conn) == [Puback(1, 0x97), Puback(2, 0x97)]
    conn = opened(V3)
    conn.receive(wire(V3, Publish("a", b"", 1, packet_id=1)), 0.0)
    conn.puback([b"\x00\x01"], 0x97)
    assert conn.data_to_send() == b""
    assert conn.closing


def test_qos_2_and_retain_switched_off_leave_the_shortcut_for_the_checks() -> None:
    conn = opened(V5, Limits(retain_available=False))
    assert messages(conn.receive(wire(V5, Publish("a", b"", 1, packet_id=1)), 0.0))
    assert failure(conn.receive(wire(V5, Publish("a", b"", 0, True)), 0.0)) is Reason.RETAIN_NOT_SUPPORTED
    conn = opened(V5, Limits(maximum_qos=0))
    assert messages(conn.receive(wire(V5, Publish("a", b"")), 0.0))
    assert failure(conn.receive(wire(V5, Publish("a", b"", 1, packet_id=1)), 0.0)) is Reason.QOS_NOT_SUPPORTED


@BOTH
def test_qos_2_that_was_never_begun_is_answered_as_not_found(version: int) -> None:
    conn = opened(version)
    assert conn.receive(wire(version, Pubrec(6), Pubcomp(7)), 0.0) == []
    reason = 0x92 if version == V5 else 0
    assert sent(conn) == [Pubrel(6, reason)]
    assert conn.receive(wire(version, Pubrel(5)), 0.0) == [Released([5])]
    conn.pubcomp([5], 0x92)
    assert sent(conn) == [Pubcomp(5, reason)]
    number = conn.publish("a", b"", 1)
    assert number is not None
    assert failure(conn.receive(wire(version, Pubrec(number)), 0.0)) is Reason.PROTOCOL_ERROR


@BOTH
def test_a_message_of_qos_2_comes_once_is_released_and_leaves_its_place_in_the_window(version: int) -> None:
    conn = opened(version, Limits(receive_maximum=2))
    publish = Publish("a", b"x", 2, packet_id=7)
    assert [m[:5] for m in messages(conn.receive(wire(version, publish), 0.0))] == [("a", 2, False, False, b"\x00\x07")]
    conn.pubrec([b"\x00\x07"])
    assert sent(conn) == [Pubrec(7)]
    # Sent again it is told again: whether it is new only the owner knows. Its place is counted once.
    again = wire(version, Publish("a", b"x", 2, dup=True, packet_id=7), Publish("a", b"y", 1, packet_id=8))
    assert [m[1:4:2] for m in messages(conn.receive(again, 0.0))] == [(2, True), (1, False)]
    assert conn.receive(wire(version, Pubrel(7)), 0.0) == [Released([7])]
    conn.pubcomp([7])
    assert sent(conn) == [Pubcomp(7)]
    assert messages(conn.receive(wire(version, Publish("a", b"z", 2, packet_id=7)), 0.0))


def test_a_refused_message_of_qos_2_is_over_and_there_is_room_for_the_next() -> None:
    conn = opened(V5, Limits(receive_maximum=1))
    conn.receive(wire(V5, Publish("a", b"", 2, packet_id=1)), 0.0)
    conn.pubrec([b"\x00\x01"], 0x97)
    assert sent(conn) == [Pubrec(1, 0x97)]
    assert messages(conn.receive(wire(V5, Publish("a", b"", 2, packet_id=2)), 0.0))
    assert failure(conn.receive(wire(V5, Publish("a", b"", 2, packet_id=3)), 0.0)) is Reason.RECEIVE_MAXIMUM_EXCEEDED


@BOTH
def test_our_message_of_qos_2_goes_through_its_four_packets(version: int) -> None:
    conn = opened(version, Limits(send_window_max=1))
    assert conn.publish("a", b"x", 2) == 1
    assert sent(conn) == [Publish("a", b"x", 2, packet_id=1)]
    assert conn.receive(wire(version, Pubrec(1)), 0.0) == [Received([1], [])]
    assert conn.window_left == 0
    conn.pubrel([1])
    assert sent(conn) == [Pubrel(1)]
    assert conn.receive(wire(version, Pubrec(1)), 0.0) == []
    assert conn.receive(wire(version, Pubcomp(1), Pubcomp(1)), 0.0) == [Completed([1])]
    assert conn.window_left == 1


def test_a_pubrec_that_refuses_ends_the_exchange() -> None:
    conn = opened(V5, Limits(send_window_max=1))
    conn.publish("a", b"x", 2)
    assert conn.receive(wire(V5, Pubrec(1, 0x97)), 0.0) == [Received([], [(1, 0x97)])]
    assert conn.window_left == 1


@pytest.mark.parametrize("answer", [Puback(1), Pubcomp(1)])
def test_a_message_of_qos_2_is_not_finished_by_the_answer_to_another_question(answer: Packet) -> None:
    conn = opened(V3)
    conn.publish("a", b"x", 2)
    assert failure(conn.receive(wire(V3, answer), 0.0)) is Reason.PROTOCOL_ERROR


def test_what_an_earlier_connection_left_to_release_takes_its_place_in_the_window() -> None:
    conn = opened(V5, Limits(send_window_max=2))
    conn.in_use([1, 2])
    conn.pubrel([1])
    assert sent(conn) == [Pubrel(1)]
    assert conn.publish("a", b"", 1) == 3  # 2 belongs to a message that will be sent again
    assert conn.publish("a", b"", 1) is None
    assert conn.receive(wire(V5, Pubcomp(1)), 0.0) == [Completed([1])]
    assert conn.reserve(1, 2) == 2


@BOTH
def test_packets_of_different_kinds_are_told_in_the_order_they_came(version: int) -> None:
    conn = opened(version)
    stream = wire(
        version,
        Publish("a", b"1", 2, packet_id=1),
        Pubrel(1),
        Publish("a", b"2", 1, packet_id=2),
        Publish("a", b"3", 2, packet_id=1),
        Pubrel(1),
        Pubrel(4),
    )
    events = conn.receive(stream, 0.0)
    assert [type(e) for e in events] == [Publishes, Released, Publishes, Released]
    assert events[3] == Released([1, 4])


def test_a_topic_that_comes_often_is_sent_as_the_alias_the_client_allows() -> None:
    properties = ConnectProperties(topic_alias_maximum=2)
    conn = opened(V5, connect=Connect(V5, "c", properties=properties))
    for topic in ("train/speed", "train/speed", "train/doors", "train/brakes", "train/speed", "abc"):
        conn.publish(topic, b"", 0)
    told = [(p.topic, p.properties.topic_alias) for p in sent(conn) if isinstance(p, Publish)]
    assert told == [
        ("train/speed", 1),
        ("", 1),
        ("train/doors", 2),
        ("train/brakes", 1),  # in place of the one least lately used
        ("train/speed", 2),
        ("abc", None),
    ]


# --------------------------------------------------------------------------------------------- subscribing
@BOTH
def test_subscribing_and_unsubscribing(version: int) -> None:
    conn = opened(version)
    subscribe = Subscribe(3, (Subscription("a/#", 1), Subscription("b", 2)))
    unsubscribe = Unsubscribe(4, ("a/#", "c"))
    data = wire(version, Publish("x", b""), subscribe, Publish("y", b""), unsubscribe, Pingreq())
    events = conn.receive(data, 0.0)
    assert [type(event) for event in events] == [Publishes, Subscribed, Publishes, Unsubscribed]
    assert (events[1], events[3]) == (Subscribed(subscribe), Unsubscribed(unsubscribe))
    conn.data_to_send()
    conn.suback(subscribe, [1, 0x87])
    conn.unsuback(unsubscribe, [0, 0x11])
    if version == V5:
        assert sent(conn) == [Suback(3, (1, 0x87)), Unsuback(4, (0, 0x11))]
    else:
        assert sent(conn) == [Suback(3, (1, 0x80)), Unsuback(4)]


def test_subscription_identifiers_are_refused_where_not_available() -> None:
    packet = Subscribe(1, (Subscription("a"),), SubscribeProperties(5))
    assert opened(V5).receive(wire(V5, packet), 0.0) == [Subscribed(packet)]
    conn = opened(V5, Limits(subscription_identifiers_available=False))
    assert failure(conn.receive(wire(V5, packet), 0.0)) == 0xA1


# ------------------------------------------------------------------------------------------------- sending
@BOTH
def test_messages_go_out_within_the_window_and_ids_come_back(version: int) -> None:
    conn = opened(version, Limits(send_window_max=3))
    assert conn.window_left == 3
    assert [conn.publish("a", b"x", 1) for _ in range(4)] == [1, 2, 3, None]
    assert conn.publish("a", b"x", 0, retain=True) == 0
    assert conn.window_left == 0
    assert sent(conn) == [
        *(Publish("a", b"x", 1, packet_id=n) for n in (1, 2, 3)),
        Publish("a", b"x", 0, True),
    ]
    acks = wire(version, Puback(2), Puback(1), Puback(9), Puback(1))
    assert conn.receive(acks, 0.0) == [Acked([2, 1], [])]
    assert conn.window_left == 2
    assert conn.reserve(1, 2) == 2
    assert conn.publish("a", b"x", 1, dup=True, packet_id=2) == 2
    assert [conn.publish("a", b"x", 1), conn.publish("a", b"x", 1)] == [4, None]
    conn.receive(wire(version, Puback(3)), 0.0)
    with pytest.raises(AssertionError):
        conn.reserve(1, 4)  # still in use


def test_the_client_s_receive_maximum_bounds_the_window() -> None:
    connect = Connect(V5, "c", properties=ConnectProperties(receive_maximum=2))
    assert opened(V5, connect=connect).window_left == 2


def test_packet_ids_wrap_around_past_those_in_use() -> None:
    conn = opened(V3, Limits(send_window_max=2))
    assert conn.publish("a", b"", 1) == 1
    for expected in [*range(2, 65_536), 2, 3]:
        assert conn.publish("a", b"", 1) == expected
        conn.receive(wire(V3, Puback(expected)), 0.0)
        conn.data_to_send()


def test_a_refused_message_is_told_apart() -> None:
    conn = opened(V5)
    assert [conn.publish("a", b"", 1) for _ in range(3)] == [1, 2, 3]
    data = wire(V5, Puback(1), Puback(2, 0x97, AckProperties("full")), Puback(3, 0x10))
    assert conn.receive(data, 0.0) == [Acked([1, 2, 3], [(2, 0x97)])]


def test_a_message_too_large_for_the_client_is_not_sent() -> None:
    conn = opened(V5, connect=Connect(V5, "c", properties=ConnectProperties(maximum_packet_size=50)))
    with pytest.raises(TooLargeForPeer):
        conn.publish("a", bytes(50), 1)
    assert conn.window_left == Limits().send_window_max
    assert conn.publish("a", bytes(42), 1) == 1  # 2 header, 3 topic, 2 id, 1 properties, 42: exactly 50
    assert len(conn.data_to_send()) == 50
    conn.disconnect(Reason.SERVER_SHUTTING_DOWN, "x" * 100)
    assert sent(conn) == [Disconnect(0x8B)]


def test_properties_go_out_as_values_or_as_bytes_and_never_to_3_1_1() -> None:
    properties = PublishProperties(response_topic="r", correlation_data=b"1", subscription_identifier=(1, 2))
    for given in (properties, encode_properties(properties)):
        conn = opened(V5)
        conn.publish("a", b"x", 1, properties=given)
        assert sent(conn) == [Publish("a", b"x", 1, packet_id=1, properties=properties)]
        conn = opened(V3)
        conn.publish("a", b"x", 1, properties=given)
        assert sent(conn) == [Publish("a", b"x", 1, packet_id=1)]


# ------------------------------------------------------------------------------------------------ ending
@BOTH
def test_tcp_that_just_ends_is_not_clean(version: int) -> None:
    conn = opened(version)
    (event,) = conn.eof()
    assert isinstance(event, Disconnected)
    assert (event.packet, event.clean) == (None, False)
    assert conn.eof() == []


def test_a_5_0_client_may_leave_and_still_want_its_will() -> None:
    (event,) = opened(V5).receive(wire(V5, Disconnect(4)), 0.0)
    assert isinstance(event, Disconnected)
    assert not event.clean


@BOTH
def test_nothing_after_disconnect_is_read(version: int) -> None:
    conn = opened(version)
    events = conn.receive(wire(version, Disconnect(), Publish("a", b""), Pingreq()), 0.0)
    assert [type(event) for event in events] == [Disconnected]
    assert conn.data_to_send() == b""


@BOTH
def test_the_owner_may_close_in_any_state(version: int) -> None:
    conn = ServerConnection(Limits())
    conn.disconnect(Reason.SERVER_SHUTTING_DOWN)
    assert conn.closing
    assert conn.data_to_send() == b""
    conn = ServerConnection(Limits())
    conn.receive(wire(version, Connect(version, "c")), 0.0)
    conn.disconnect(Reason.SERVER_BUSY)
    assert conn.closing
    assert sent(conn) == [Connack(False, 0x89 if version == V5 else 3)]
    conn = opened(version)
    conn.disconnect(Reason.SESSION_TAKEN_OVER, "elsewhere")
    conn.disconnect(Reason.SESSION_TAKEN_OVER, "elsewhere")
    expected = [Disconnect(0x8E, DisconnectProperties(reason_string="elsewhere"))] if version == V5 else []
    assert sent(conn) == expected
    assert conn.accept(False) == []
    conn.refuse(Reason.SERVER_BUSY)
    assert conn.data_to_send() == b""


@pytest.mark.parametrize(
    "misuse",
    [
        lambda conn: conn.accept(False),
        lambda conn: conn.refuse(0x87),
        lambda conn: conn.puback([b"\x00\x01"]),
        lambda conn: conn.suback(Subscribe(1, (Subscription("a"),)), []),
        lambda conn: conn.publish("a", b"", 1, packet_id=9),
        lambda conn: conn.publish("a", b"", 0, dup=True),
    ],
)
def test_our_own_mistakes_raise(misuse: Callable[[ServerConnection], object]) -> None:
    with pytest.raises(AssertionError):
        misuse(opened(V5))


def test_every_way_out_of_the_table_leads_somewhere_and_closed_is_the_end() -> None:
    assert not [state for state, _ in TRANSITIONS if state is State.CLOSED]
    for state in State:
        if state is not State.CLOSED:
            assert TRANSITIONS[state, Cause.EOF] is State.CLOSED
            assert TRANSITIONS[state, Cause.FAIL] is State.CLOSED
        assert state in RECEIVABLE
    assert set(TRANSITIONS.values()) == {State.AWAITING_VERDICT, State.OPEN, State.CLOSED}


# ------------------------------------------------------------------------------------------------ splitting
@BOTH
def test_bytes_may_come_in_any_split(version: int) -> None:
    traffic = wire(
        version,
        Publish("a/b", b"x" * 300, 1, packet_id=1),
        Pingreq(),
        Publish("a/b", b"", 0),
        Subscribe(2, (Subscription("#"),)),
        Puback(7),
        Publish("a/b", b"y" * 20, 1, True, True, 3),
        Disconnect(),
    )

    def play(step: int) -> tuple[list[Message], list[Event], bytes]:
        conn = opened(version)
        events: list[Event] = []
        for at in range(0, len(traffic), step):
            events += conn.receive(traffic[at : at + step], 0.0)
        rest: list[Event] = [event for event in events if not isinstance(event, Publishes)]
        return messages(events), rest, conn.data_to_send()

    whole = play(len(traffic))
    assert len(whole[0]) == 3
    for step in range(1, 40):
        assert play(step) == whole


@BOTH
def test_messages_that_look_alike_are_read_as_they_are_one_by_one(version: int) -> None:
    """What is known of the last message helps to read the next; here both ways, of topics and aliases in turns."""
    chance = random.Random(version)
    for _ in range(300):
        packets: list[Packet] = []
        for number in range(1, chance.randint(3, 12)):
            topic, alias, words = chance.choice("aab"), chance.choice([None, None, None, 1]), ()
            if version == V5:
                words = chance.choice([(), (), (("unit", "kPa"),)])
            else:
                alias = None
            if alias and any(isinstance(each, Publish) and each.properties.topic_alias for each in packets):
                topic = chance.choice(["", "a", "b"])
            properties = PublishProperties(topic_alias=alias, user_property=words)
            qos = chance.choice([0, 1, 1, 1])
            payload = chance.choice([b"22.5", b"22.5", b"9"])
            flags = chance.choice([(False, False)] * 3 + [(True, True)]) if qos else (False, False)
            packets.append(Publish(topic, payload, qos, *flags, qos * number, properties=properties))
            if chance.random() < 0.1:
                packets.append(Pingreq())
        single, together = (opened(version, Limits(topic_alias_max=3, receive_maximum=100)) for _ in range(2))
        expected = [each for packet in packets for each in messages(single.receive(wire(version, packet), 0.0))]
        assert len(expected) == sum(isinstance(packet, Publish) for packet in packets)
        assert messages(together.receive(wire(version, *packets), 0.0)) == expected


def test_a_packet_id_of_zero_and_too_many_are_refused_also_among_messages_that_look_alike() -> None:
    alike = [Publish("a", b"x", 1, packet_id=number) for number in range(1, 6)]
    data = wire(V5, *alike)
    size = len(data) // 5
    id_at = size - len(b"x") - 3
    conn = opened(V5)
    wrong = data[: 4 * size + id_at] + b"\0\0" + data[4 * size + id_at + 2 :]
    events = conn.receive(wrong, 0.0)
    assert failure(events) is Reason.PROTOCOL_ERROR
    assert len(messages(events)) == 4
    conn = opened(V5, Limits(receive_maximum=4))
    events = conn.receive(data, 0.0)
    assert failure(events) is Reason.RECEIVE_MAXIMUM_EXCEEDED
    assert len(messages(events)) == 4


def test_a_large_packet_in_small_pieces_costs_no_more_than_its_size() -> None:
    conn = opened(V3, Limits(packet_max_bytes=20 << 20))
    data = wire(V3, Publish("a", bytes(16 << 20), 1, packet_id=1))
    begun = time.perf_counter()
    events: list[Event] = []
    for at in range(0, len(data), 1400):
        events += conn.receive(data[at : at + 1400], 0.0)
    assert len(messages(events)[0][5]) == 16 << 20
    assert time.perf_counter() - begun < 10.0  # joined at every piece it would be 100 GB of copying


# ----------------------------------------------------------------------------------------------- measuring
def measure(version: int, properties: PublishProperties, qos: int = 1, payload_bytes: int = 100) -> float:
    """Messages a second through receive, puback and data_to_send, 2000 pipelined; the best of five."""
    packets = [
        Publish("train/4711/sensor/1", bytes(payload_bytes), qos, packet_id=n * qos, properties=properties)
        for n in range(1, 2001)
    ]
    data = wire(version, *packets)
    conn = opened(version, Limits(receive_maximum=65_535))
    best = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(50):
            (event,) = conn.receive(data, 1.0)
            assert isinstance(event, Publishes)
            conn.puback([message[4] for message in event.messages if message[1]])
            conn.data_to_send()
        best = max(best, 50 * len(packets) / (time.perf_counter() - begun))
    return best


if __name__ == "__main__":
    none = PublishProperties()
    worded = PublishProperties(content_type="text/plain", user_property=(("unit", "kPa"),))
    for name, rate in (
        ("3.1.1 QoS 1", measure(V3, none)),
        ("3.1.1 QoS 0", measure(V3, none, qos=0)),
        ("3.1.1 QoS 1, 1 kB", measure(V3, none, payload_bytes=1000)),
        ("5.0 QoS 1, no properties", measure(V5, none)),
        ("5.0 QoS 1, the same properties", measure(V5, worded)),
        ("5.0 QoS 1, topic alias", measure(V5, PublishProperties(topic_alias=1))),
    ):
        print(f"{name:32} {rate:12,.0f} messages/s")


def test_a_message_too_large_leaves_the_aliases_as_they_were() -> None:
    properties = ConnectProperties(maximum_packet_size=60, topic_alias_maximum=2)
    conn = opened(V5, Limits(topic_alias_send_max=2), Connect(V5, "c", properties=properties))
    conn.data_to_send()
    for topic in ("first", "second"):
        conn.publish(topic, b"", 0)
    with pytest.raises(TooLargeForPeer):
        conn.publish("third", bytes(60), 0)
    for topic in ("fourth", "second", "fourth"):
        conn.publish(topic, b"", 0)
    known: dict[int, str] = {}
    heard = []
    for packet in sent(conn):
        assert isinstance(packet, Publish)
        alias = packet.properties.topic_alias
        assert alias is not None
        if packet.topic:
            known[alias] = packet.topic
        heard.append(known[alias])
    assert heard == ["first", "second", "fourth", "second", "fourth"]


def test_an_alias_is_left_out_of_a_packet_that_it_would_make_too_large() -> None:
    size = len(wire(V5, Publish("topic", bytes(30))))
    properties = ConnectProperties(maximum_packet_size=size, topic_alias_maximum=2)
    conn = opened(V5, Limits(topic_alias_send_max=2), Connect(V5, "c", properties=properties))
    conn.data_to_send()
    conn.publish("topic", bytes(30), 0)
    assert sent(conn) == [Publish("topic", bytes(30))]


def test_a_refusal_keeps_to_the_clients_packet_size() -> None:
    conn = ServerConnection(Limits())
    asked = ConnectProperties(maximum_packet_size=30, authentication_method="SCRAM-SHA-1")
    conn.receive(wire(V5, Connect(V5, "me", properties=asked)), 0.0)
    assert sent(conn) == [Connack(False, Reason.BAD_AUTHENTICATION_METHOD)]


# --------------------------------------------------------------------------------------------- what waits for its turn
def opened_with(version: int, dear: int, limits: Limits | None = None) -> ServerConnection:
    conn = opened(version, limits)
    conn.dear_left = dear
    return conn


@BOTH
def test_messages_are_taken_at_once_and_what_is_dear_waits_with_all_that_follows(version: int) -> None:
    conn = opened_with(version, 1)
    asked = Subscribe(7, (Subscription("a", 1),))
    data = wire(version, Publish("t", b"1"), Pingreq(), Publish("t", b"2"), asked, Publish("t", b"3"))
    events = conn.receive(data, 1.0)
    assert [m[5] for m in messages(events)] == [b"1", b"2"]
    assert sent(conn) == [Pingresp()]
    assert conn.waiting
    assert conn.receive(wire(version, Publish("t", b"4")), 2.0) == []
    events = conn.go_on(5, 3.0)
    assert events[0] == Subscribed(asked)
    assert [m[5] for m in messages(events)] == [b"3", b"4"]
    assert not conn.waiting


@BOTH
def test_a_message_to_be_retained_is_dear_and_keeps_its_place(version: int) -> None:
    conn = opened_with(version, 1)
    data = wire(version, *[Publish("t", b"%d" % n, 0, n % 2 == 1) for n in range(6)])
    assert [m[5] for m in messages(conn.receive(data, 1.0))] == [b"0", b"1", b"2"]
    assert [m[5] for m in messages(conn.go_on(1, 1.0))] == [b"3", b"4"]
    assert [(m[2], m[5]) for m in messages(conn.go_on(1, 1.0))] == [(True, b"5")]
    assert not conn.waiting


@BOTH
def test_a_subscribe_of_many_filters_is_read_in_several_turns_and_told_once(version: int) -> None:
    conn = opened_with(version, 2, Limits(packet_max_bytes=1 << 20))
    asked = Subscribe(7, tuple(Subscription(f"f/{n}") for n in range(100)))
    told = conn.receive(wire(version, asked, Publish("t", b"behind")), 1.0)
    turns = 0
    while not told:
        assert conn.waiting
        told = conn.go_on(2, 1.0)
        turns += 1
    assert turns >= 2
    assert told == [Subscribed(asked)]
    # What it asks for is done before anything behind it is taken.
    assert conn.waiting
    assert [m[5] for m in messages(conn.go_on(2, 1.0))] == [b"behind"]


@BOTH
def test_filters_beyond_what_a_session_may_have_are_refused_and_take_no_memory(version: int) -> None:
    conn = opened_with(version, NO_LIMIT, Limits(packet_max_bytes=1 << 20))
    asked = Subscribe(7, tuple(Subscription(f"{n}") for n in range(FILTERS_MAX + 5)))
    (told,) = conn.receive(wire(version, asked), 1.0)
    assert isinstance(told, Subscribed)
    assert (told.packet.subscriptions, told.packet.surplus) == (asked.subscriptions[:FILTERS_MAX], 5)
    conn.suback(told.packet, [0] * FILTERS_MAX)
    (answer,) = sent(conn)
    assert isinstance(answer, Suback)
    refused = Reason.QUOTA_EXCEEDED if version == V5 else 0x80
    assert answer.reasons == (0,) * FILTERS_MAX + (refused,) * 5


@BOTH
def test_an_ill_formed_filter_far_behind_closes_the_connection_and_nothing_was_subscribed(version: int) -> None:
    conn = opened_with(version, 1, Limits(packet_max_bytes=1 << 20))
    body = wire(version, Subscribe(7, tuple(Subscription(f"f/{n}") for n in range(100))))
    assert conn.receive(body[:-1] + b"\x03", 1.0) == []  # QoS 3
    told: list[Event] = []
    while conn.waiting:
        told += conn.go_on(1, 1.0)
    assert failure(told) is Reason.MALFORMED_PACKET
    assert len(told) == 1


@BOTH
def test_who_waits_is_not_silent(version: int) -> None:
    conn = opened(version, connect=Connect(version, "c", keep_alive=10))
    conn.dear_left = 0
    conn.receive(wire(version, Pingreq()), 1.0)
    assert conn.deadline(100.0) is None
    assert conn.tick(100.0) == []
    conn.go_on(1, 100.0)
    assert sent(conn) == [Pingresp()]
    assert conn.deadline(100.0) == 115.0


def test_connect_waits_for_its_turn_too() -> None:
    conn = ServerConnection(Limits())
    conn.dear_left = 0
    asked = Connect(V5, "c")
    assert conn.receive(wire(V5, asked, Pingreq()), 1.0) == []
    assert conn.waiting
    assert conn.go_on(1, 2.0) == [Connected(asked)]
    assert conn.accept(False) == []
    assert conn.waiting
    conn.go_on(1, 3.0)
    assert sent(conn)[1:] == [Pingresp()]


@BOTH
def test_nothing_waits_any_more_once_the_connection_is_over(version: int) -> None:
    conn = opened_with(version, 0)
    conn.receive(wire(version, Pingreq(), Publish("t", b"lost")), 1.0)
    conn.disconnect(Reason.SERVER_SHUTTING_DOWN)
    assert not conn.waiting
    assert conn.go_on(10, 1.0) == []
