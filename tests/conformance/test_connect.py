"""CONNECT, CONNACK, keep-alive, PINGREQ, DISCONNECT, takeover: MQTT 3.1.1 and 5.0, §3.1, §3.2, §3.12, §3.14."""

from __future__ import annotations

import time

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, fresh
from tests.conformance.conftest import KEEP_ALIVE_MAX_S, PACKET_MAX_BYTES, Connector, Dial


# ------------------------------------------------------------------------------------------ what comes first
def test_the_first_packet_must_be_connect(version: int, dial: Dial) -> None:
    for packet in (
        mqtt.publish(version, "t", b"x"),
        mqtt.subscribe(version, 1, ("t", 0)),
        mqtt.PINGREQ_BYTES,
        b"\xe0\x00",
        b"\xf0\x00",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        client = dial(version)
        client.say(packet)
        assert client.expect_close() == []


def test_a_second_connect_closes_the_connection(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.connect(version, fresh()))
    client.expect_close(0x82)


def test_a_wrong_protocol_name_closes_the_connection(version: int, dial: Dial) -> None:
    for name in ("mqtt", "MQTX", "hj", "", "MQTTT"):
        client = dial(version)
        client.say(mqtt.connect(version, fresh(), protocol=name))
        heard = client.expect_close(0x84, 0x81)
        assert all(each.kind == mqtt.CONNACK and each.reason for each in heard)


@pytest.mark.parametrize("level", [0, 3, 6, 127, 132])
def test_an_unknown_protocol_level_is_refused_with_its_word(level: int, dial: Dial) -> None:
    client = dial(V5 if level > V5 else V3)
    client.say(mqtt.connect(client.version, fresh(), level=level))
    refused = client.expect(mqtt.CONNACK, session_present=False).reason
    assert refused == (0x84 if client.version == V5 else 0x01)
    assert client.expect_close() == []


def test_the_reserved_connect_flag_must_be_0(version: int, dial: Dial) -> None:
    client = dial(version)
    client.say(mqtt.connect(version, fresh(), flags=0x03))
    heard = client.expect_close(0x81)
    assert version == V5 or heard == []


# ------------------------------------------------------------------------------------ flags and their fields
CONTRADICTIONS = {
    "will QoS without will": 0x02 | 0x08,
    "will QoS 2 without will": 0x02 | 0x10,
    "will retain without will": 0x02 | 0x20,
    "will QoS 3": 0x02 | 0x04 | 0x18,
}


@pytest.mark.parametrize("flags", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_will_flags_that_contradict_each_other_are_refused(version: int, flags: int, dial: Dial) -> None:
    client = dial(version)
    client.say(mqtt.connect(version, fresh(), will=mqtt.Will("w") if flags & 4 else None, flags=flags))
    heard = client.expect_close(0x81, 0x9B)
    assert version == V5 or heard == []


def test_fields_the_flags_do_not_announce_are_refused(version: int, dial: Dial) -> None:
    for options in ({"username": "u"}, {"username": "u", "password": b"p"}, {"will": mqtt.Will("w")}):
        client = dial(version)
        client.say(mqtt.connect(version, fresh(), flags=0x02, **options))  # type: ignore[arg-type]
        client.expect_close(0x81)


def test_fields_the_flags_announce_must_be_there(version: int, dial: Dial) -> None:
    for flags in (0x02 | 0x80, 0x02 | 0x80 | 0x40, 0x02 | 0x04):
        client = dial(version)
        client.say(mqtt.connect(version, fresh(), flags=flags))
        client.expect_close(0x81)
    client = dial(version)
    client.say(mqtt.connect(version, fresh(), username="u", flags=0x02 | 0xC0))  # a password is announced, too
    client.expect_close(0x81)


def test_a_password_without_a_user_name_is_refused_on_3_1_1_only(version: int, dial: Dial) -> None:
    client = dial(version)
    client.say(mqtt.connect(version, fresh(), password=b"p"))
    if version == V3:
        assert client.expect_close() == []
    else:
        assert client.expect(mqtt.CONNACK).reason in (0, 0x86, 0x87)  # an identity may fail, the form may not


def test_every_field_of_connect_is_read_in_its_order(version: int, dial: Dial, join: Connector) -> None:
    topic = fresh("order/")
    listener, client = join(version), dial(version)
    listener.subscribe(topic, qos=0)
    will = mqtt.Will(topic, b"the will", props=((mqtt.CONTENT_TYPE, "text"),))
    assert client.connect(fresh(), will=will, username="user", password=b"\xff\x00").reason in (0, 4, 5, 0x86, 0x87)
    client.drop()
    got = listener.message(b"the will")
    assert version == V3 or got.get(mqtt.CONTENT_TYPE) == "text"


@pytest.mark.parametrize("client_id", ["a", "Z9", "0123456789abcdefghijklm", "NOPQRSTUVWXYZnopqrstuvw"])
def test_client_identifiers_every_server_must_take(version: int, client_id: str, join: Connector) -> None:
    join(version, client_id).end()


def test_longer_and_stranger_client_identifiers_are_taken_too(version: int, join: Connector) -> None:
    for client_id in ("x" * 200, "a/b+c#d $e", "größer-列車"):
        join(version, client_id + fresh()).end()


def test_an_empty_client_identifier_gets_one_of_the_server(dial: Dial) -> None:
    given = []
    for _ in range(3):
        client = dial(V5)
        connack = client.connect("")
        assert connack.reason == 0
        assert not connack.session_present
        given.append(connack.get(mqtt.ASSIGNED_ID))
    assert all(given)
    assert len(set(given)) == 3


def test_an_assigned_client_identifier_names_the_session(dial: Dial, join: Connector) -> None:
    client, topic = dial(V5), fresh("assigned/")
    given = client.connect("", props=[(mqtt.SESSION_EXPIRY, 100)]).get(mqtt.ASSIGNED_ID)
    client.subscribe(topic, qos=1)
    client.end()
    join(V5).publish(topic, b"waited", 1)
    again = dial(V5)
    assert again.connect(str(given), clean=False, props=[(mqtt.SESSION_EXPIRY, 100)]).session_present
    again.message(b"waited")
    again.end(props=[(mqtt.SESSION_EXPIRY, 0)])


def test_an_empty_client_identifier_needs_a_clean_session_on_3_1_1(dial: Dial) -> None:
    refused = dial(V3)
    assert refused.connect("", clean=False).reason == 2
    assert refused.expect_close() == []
    assert dial(V3).connect("", clean=True).reason == 0


def test_two_empty_client_identifiers_are_two_clients(version: int, dial: Dial) -> None:
    one, two = dial(version), dial(version)
    one.connect("")
    two.connect("")
    assert one.silence() == []
    assert two.silence() == []


CONNECT_PROPERTY_FAULTS = {
    "receive maximum 0": [(mqtt.RECEIVE_MAXIMUM, 0)],
    "maximum packet size 0": [(mqtt.MAXIMUM_PACKET, 0)],
    "session expiry twice": [(mqtt.SESSION_EXPIRY, 1), (mqtt.SESSION_EXPIRY, 1)],
    "request problem information 2": [(mqtt.REQUEST_PROBLEM, 2)],
    "request response information 2": [(mqtt.REQUEST_RESPONSE, 2)],
    "a topic alias": [(mqtt.TOPIC_ALIAS, 1)],
    "authentication data alone": [(mqtt.AUTH_DATA, b"x")],
}


@pytest.mark.parametrize("props", CONNECT_PROPERTY_FAULTS.values(), ids=CONNECT_PROPERTY_FAULTS.keys())
def test_connect_with_a_wrong_property_is_refused(props: list[mqtt.Property], dial: Dial) -> None:
    client = dial(V5)
    client.say(mqtt.connect(V5, fresh(), props=props))
    heard = client.expect_close(0x81, 0x82)
    assert all(each.kind == mqtt.CONNACK for each in heard)


# ------------------------------------------------------------------------------------------------- CONNACK
def test_connack_is_the_first_packet_and_comes_once(version: int, dial: Dial) -> None:
    client, topic = dial(version), fresh("first/")
    client.say(
        mqtt.connect(version, fresh()),
        mqtt.subscribe(version, 1, (topic, 0)),
        mqtt.publish(version, topic, b"x"),
        mqtt.PINGREQ_BYTES,
    )
    client.expect(mqtt.CONNACK, reason=0)
    assert {client.hear().kind for _ in range(3)} == {mqtt.SUBACK, mqtt.PUBLISH, mqtt.PINGRESP}
    assert client.silence() == []


def test_nothing_behind_a_refused_connect_is_processed(version: int, dial: Dial, join: Connector) -> None:
    topic = fresh("refused/")
    listener, client = join(version), dial(version)
    listener.subscribe(topic, qos=0)
    if version == V3:
        connect = mqtt.connect(V3, "", clean=False)
    else:
        connect = mqtt.connect(V5, fresh(), props=[(mqtt.AUTH_METHOD, "no such method")])
    client.say(connect, mqtt.publish(version, topic, b"smuggled"), mqtt.publish(version, topic, b"more", 1, 1))
    heard = client.expect_close(2, 0x8C, 0x87)
    assert [each.kind for each in heard] == [mqtt.CONNACK]
    assert heard[0].reason
    join(version).publish(topic, b"honest")
    listener.message(b"honest")


def test_an_unknown_authentication_method_is_refused(dial: Dial) -> None:
    client = dial(V5)
    assert client.connect(fresh(), props=[(mqtt.AUTH_METHOD, "SCRAM-SHA-1")]).reason == 0x8C
    assert client.expect_close() == []


def test_no_auth_packet_and_no_method_without_being_asked(join: Connector, dial: Dial) -> None:
    client = dial(V5)
    connack = client.connect()
    assert connack.all(mqtt.AUTH_METHOD) == []
    assert connack.all(mqtt.AUTH_DATA) == []
    assert client.silence() == []


def test_auth_from_a_client_without_a_method_is_a_protocol_error(join: Connector) -> None:
    for packet in (b"\xf0\x00", mqtt.packet(0xF0, b"\x19", mqtt.properties((mqtt.AUTH_METHOD, "x")))):
        client = join(V5)
        client.say(packet)
        client.expect_close(0x82)


def test_auth_does_not_exist_in_3_1_1(join: Connector) -> None:
    client = join(V3)
    client.say(b"\xf0\x00")
    client.expect_close()


def test_response_information_only_on_request(dial: Dial) -> None:
    for props in ([], [(mqtt.REQUEST_RESPONSE, 0)]):
        assert dial(V5).connect(props=props).all(mqtt.RESPONSE_INFO) == []
    told = dial(V5).connect(props=[(mqtt.REQUEST_RESPONSE, 1)]).get(mqtt.RESPONSE_INFO)
    assert told is None or isinstance(told, str)


def test_without_problem_information_only_connack_and_disconnect_explain(join: Connector) -> None:
    client = join(V5, props=[(mqtt.REQUEST_PROBLEM, 0)])
    client.say(
        mqtt.ack(mqtt.PUBREL, 77),
        mqtt.ack(mqtt.PUBREC, 78),
        mqtt.unsubscribe(V5, 1, "never"),
        mqtt.publish(V5, "$SYS/forbidden", b"x", 1, 2),
        mqtt.publish(V5, fresh("none/"), b"x", 2, 3),
    )
    for _ in range(5):
        got = client.hear()
        assert got.kind != mqtt.DISCONNECT
        assert got.props == []


def test_the_servers_limits_are_told(dial: Dial) -> None:
    connack = dial(V5).connect()
    assert connack.get(mqtt.RECEIVE_MAXIMUM) != 0
    assert connack.get(mqtt.MAXIMUM_PACKET) == PACKET_MAX_BYTES
    assert connack.all(mqtt.MAXIMUM_QOS) == []  # so QoS 2 is spoken
    for available in (
        mqtt.RETAIN_AVAILABLE,
        mqtt.WILDCARDS_AVAILABLE,
        mqtt.SUBSCRIPTION_IDS_AVAILABLE,
        mqtt.SHARED_AVAILABLE,
    ):
        assert connack.get(available) in (None, 1)


def test_a_refusal_or_goodbye_leaves_out_what_the_client_cannot_take(dial: Dial, join: Connector) -> None:
    tiny = (mqtt.MAXIMUM_PACKET, 12)  # less than any reason string
    client = dial(V5)
    client.say(mqtt.connect(V5, fresh(), props=[tiny, (mqtt.AUTH_METHOD, "no such method")]))
    refused = client.expect_close()
    assert all(len(each.raw) <= 12 for each in refused)
    client = dial(V5)
    client.say(mqtt.connect(V5, "c", props=[(mqtt.MAXIMUM_PACKET, 60)]))
    assert len(client.expect(mqtt.CONNACK, reason=0).raw) <= 60
    client.say(mqtt.connect(V5, fresh()))
    assert all(len(each.raw) <= 60 for each in client.expect_close(0x82))


def test_a_client_that_takes_no_connack_is_refused_within_its_limit_and_leaves_no_will(
    dial: Dial, join: Connector
) -> None:
    topic = fresh("tiny/")
    listener = join(V5)
    listener.subscribe(topic, qos=0)
    for limit, answers in ((1, 0), (4, 0), (5, 1), (8, 1)):
        client = dial(V5)
        client.say(mqtt.connect(V5, fresh(), will=mqtt.Will(topic), props=[(mqtt.MAXIMUM_PACKET, limit)]))
        heard = client.expect_close(0x95)
        assert len(heard) == answers
        assert all(len(each.raw) <= limit for each in heard)
    join(V5).publish(topic, b"marker")
    listener.message(b"marker")


@pytest.mark.parametrize("kind", [mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBCOMP, mqtt.SUBACK, mqtt.UNSUBACK])
def test_no_acknowledgement_exceeds_the_clients_packet_size(kind: int, join: Connector) -> None:
    limit = 64
    client = join(V5, props=[(mqtt.MAXIMUM_PACKET, limit)])
    asked = {
        mqtt.PUBACK: mqtt.publish(V5, "$SYS/forbidden", b"x", 1, 5),
        mqtt.PUBREC: mqtt.publish(V5, "$SYS/forbidden", b"x", 2, 5),
        mqtt.PUBCOMP: mqtt.ack(mqtt.PUBREL, 5),
        mqtt.SUBACK: mqtt.subscribe(V5, 5, ("x" * 40, 0)),
        mqtt.UNSUBACK: mqtt.unsubscribe(V5, 5, "x" * 40),
    }
    client.say(asked[kind])
    assert len(client.expect(kind, packet_id=5).raw) <= limit


# ------------------------------------------------------------------------------------------------ keep-alive
def test_silence_of_one_and_a_half_keep_alives_closes_the_connection_and_frees_the_will(
    dial: Dial, join: Connector
) -> None:
    topics = {V3: fresh("dead/"), V5: fresh("dead/")}
    listener = join(V5)
    listener.subscribe(*topics.values(), qos=0)
    began = time.monotonic()
    quiet = {}
    for version, topic in topics.items():
        quiet[version] = join(version, keep_alive=1, will=mqtt.Will(topic, b"silent"))
    for _ in range(4):  # a client that speaks lives on; so does one without a keep-alive
        for client in quiet.values():
            assert client.silence() == []
        time.sleep(0.4)
    said = time.monotonic() - 0.4
    assert said - began > 1.1
    for version, client in quiet.items():
        heard = client.expect_close(0x8D)
        assert version == V5 or heard == []
    assert 1.4 < time.monotonic() - said < 15
    assert {listener.message(b"silent").topic for _ in quiet} == set(topics.values())


def test_a_keep_alive_longer_than_the_server_allows_is_replaced(dial: Dial) -> None:
    assert dial(V5).connect(keep_alive=KEEP_ALIVE_MAX_S * 2).get(mqtt.SERVER_KEEP_ALIVE) == KEEP_ALIVE_MAX_S
    assert dial(V5).connect(keep_alive=KEEP_ALIVE_MAX_S - 1).get(mqtt.SERVER_KEEP_ALIVE) is None


def test_a_keep_alive_of_0_is_legal(version: int, join: Connector) -> None:
    client = join(version, keep_alive=0)
    assert client.silence() == []


def test_pingreq_is_answered(version: int, join: Connector) -> None:
    client = join(version)
    for _ in range(3):
        client.say(mqtt.PINGREQ_BYTES)
        assert client.expect(mqtt.PINGRESP).raw == b"\xd0\x00"
    client.say(mqtt.PINGREQ_BYTES * 3)
    for _ in range(3):
        client.expect(mqtt.PINGRESP)


# ---------------------------------------------------------------------------------------------- DISCONNECT
def test_after_disconnect_the_server_closes_and_says_nothing_more(version: int, join: Connector) -> None:
    client = join(version)
    client.say(b"\xe0\x00")
    assert client.expect_close() == []


def test_nothing_behind_a_disconnect_is_processed(version: int, join: Connector) -> None:
    topic = fresh("late/")
    listener, client, other = join(version), join(version), join(version)
    listener.subscribe(topic, qos=0)
    client.say(mqtt.publish(version, topic, b"before"), b"\xe0\x00", mqtt.publish(version, topic, b"after"))
    client.expect_close()
    listener.message(b"before")
    other.publish(topic, b"marker")
    listener.message(b"marker")


@pytest.mark.parametrize("reason", [0x04, 0x80, 0x81, 0x82, 0x83, 0x93, 0x94, 0x95, 0x97, 0x98])
def test_reasons_a_client_may_disconnect_with_are_taken(reason: int, join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.disconnect(V5, reason, [(mqtt.REASON_STRING, "because"), (mqtt.USER_PROPERTY, ("a", "b"))]))
    assert client.expect_close() == []


def test_a_reason_disconnect_does_not_have_is_refused(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.disconnect(V5, 0x03))
    client.expect_close(0x81, 0x82)


def test_no_disconnect_before_a_connack(version: int, dial: Dial) -> None:
    for packet in (b"\xe0\x00", mqtt.connect(version, fresh(), flags=0x03), b"\x10\x00", b"\x00\x00"):
        client = dial(version)
        client.say(packet)
        assert all(each.kind == mqtt.CONNACK for each in client.expect_close())


def test_after_a_protocol_error_the_server_says_its_reason_and_closes(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, ("t", 0x30)))  # retain handling 3
    heard = client.expect_close(0x82, 0x81)
    assert [each.kind for each in heard] == [mqtt.DISCONNECT]
    assert heard[0].reason >= 0x80
    assert heard[0].all(mqtt.SESSION_EXPIRY) == []


def test_a_protocol_error_disturbs_nobody_else(version: int, join: Connector) -> None:
    bystander, client = join(version), join(version)
    client.say(b"\x00\x00")
    client.expect_close()
    assert bystander.silence() == []


def test_a_packet_above_the_servers_maximum_is_refused(version: int, join: Connector) -> None:
    client = join(version)
    client.say(mqtt.publish(version, "t", bytes(PACKET_MAX_BYTES + 1)))
    heard = client.expect_close(0x95)
    assert version == V3 or [each.reason for each in heard] == [0x95]


# ------------------------------------------------------------------------------------------------ takeover
@pytest.mark.parametrize("newer", [V3, V5], ids=["by 3.1.1", "by 5.0"])
def test_a_client_identifier_in_use_takes_the_connection_over(version: int, newer: int, join: Connector) -> None:
    name = fresh("taken")
    old = join(version, name)
    new = join(newer, name)
    heard = old.expect_close(0x8E)
    assert [each.reason for each in heard] == ([0x8E] if version == V5 else [])
    assert new.silence() == []


def test_a_takeover_keeps_the_session(version: int, dial: Dial, join: Connector) -> None:
    name, topic = fresh("taken"), fresh("taken/")
    lasting = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}
    old, new = join(version, name, **lasting), dial(version)
    old.subscribe(topic, qos=1)
    assert new.connect(name, **lasting).session_present
    old.expect_close(0x8E)
    join(version).publish(topic, b"to the new one", 1)
    new.message(b"to the new one")
