"""Shared subscriptions: MQTT 5.0 §4.8.2."""

from __future__ import annotations

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V5, Client, fresh
from tests.conformance.conftest import Connector

LASTING = {"clean": False, "props": [(mqtt.SESSION_EXPIRY, 100)]}


def group(join: Connector, members: int, qos: int = 1, **options: object) -> tuple[list[Client], str]:
    """Members of one fresh group, and its topic. Each also hears `<topic>/end` on its own."""
    topic, share = fresh("shared/"), fresh("group")
    clients = [join(V5, fresh("member"), **options) for _ in range(members)]
    for client in clients:
        assert client.subscribe((f"$share/{share}/{topic}", qos), (f"{topic}/end", 0)) == (qos, 0)
    return clients, topic


def until_end(client: Client) -> list[mqtt.Packet]:
    heard = []
    while (got := client.message()).payload != b"end":
        heard.append(got)
    return heard


def test_a_shared_subscription_is_granted_qos_1_at_most(join: Connector) -> None:
    """A server may grant less than it is asked (§3.8.4): a group's messages go to another member when one leaves."""
    client = join(V5)
    share = f"$share/{fresh('g')}/{fresh('t/')}"
    assert client.subscribe((share, 0), (share, 1), (share, 2)) == (0, 1, 1)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_each_message_goes_to_one_member(qos: int, join: Connector) -> None:
    clients, topic = group(join, 3)
    other, speaker = join(V5), join(V5)
    other.subscribe(topic, qos=2)
    for n in range(12):
        speaker.publish(topic, b"%d" % n, qos)
        other.message(b"%d" % n)
    speaker.publish(f"{topic}/end", b"end")
    got = [each.payload for client in clients for each in until_end(client)]
    assert sorted(got) == sorted(b"%d" % n for n in range(12))


def test_two_groups_get_a_copy_each(join: Connector) -> None:
    topic = fresh("shared/")
    one, two, speaker = join(V5), join(V5), join(V5)
    one.subscribe(f"$share/{fresh('g')}/{topic}", qos=1)
    two.subscribe(f"$share/{fresh('g')}/{topic}", qos=1)
    speaker.publish(topic, b"x", 1)
    one.message(b"x")
    two.message(b"x")


def test_a_client_may_subscribe_shared_and_plain_at_once(join: Connector) -> None:
    topic, client = fresh("shared/"), join(V5)
    client.subscribe(topic, qos=1)
    client.subscribe(f"$share/{fresh('g')}/{topic}", qos=1)
    join(V5).publish(topic, b"x", 1)
    client.message(b"x", topic=topic)
    client.message(b"x", topic=topic)
    assert client.silence() == []


def test_wildcards_work_in_a_shared_filter(join: Connector) -> None:
    stem, client, speaker = fresh("shared/"), join(V5), join(V5)
    client.subscribe(f"$share/{fresh('g')}/{stem}/+/x", qos=0)
    speaker.publish(f"{stem}/a/y", b"no")
    speaker.publish(f"{stem}/a/x", b"yes")
    client.message(b"yes", topic=f"{stem}/a/x")


@pytest.mark.parametrize("filter", ["$share/", "$share/name", "$share//t", "$share/na+me/t", "$share/na#me/t"])
def test_an_ill_formed_shared_filter_is_refused(filter: str, join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, (filter, 0)))
    got = client.hear()
    if got.kind == mqtt.SUBACK:
        assert got.reasons[0] >= 0x80
    else:
        assert got.kind == mqtt.DISCONNECT
        assert got.reason in (0x81, 0x82, 0x8F)
        client.expect_close()


def test_a_share_name_with_nothing_behind_it_is_refused(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, ("$share/name/", 0)))
    got = client.hear()
    assert got.kind in (mqtt.SUBACK, mqtt.DISCONNECT)
    assert (got.reasons or (got.reason,))[0] >= 0x80


def test_no_local_on_a_shared_subscription_is_a_protocol_error(join: Connector) -> None:
    client = join(V5)
    client.say(mqtt.subscribe(V5, 1, (f"$share/g/{fresh('t/')}", 4)))
    client.expect_close(0x82)


@pytest.mark.parametrize("granted", [0, 1])
def test_a_members_granted_qos_is_respected(granted: int, join: Connector) -> None:
    (client,), topic = group(join, 1, granted)
    for qos in (0, 1, 2):
        join(V5).publish(topic, b"x", qos)
        client.message(b"x", qos=min(qos, granted))


def test_members_keep_their_own_qos(join: Connector) -> None:
    topic, share = fresh("shared/"), fresh("group")
    members = {qos: join(V5) for qos in (0, 1)}
    for qos, client in members.items():
        client.subscribe((f"$share/{share}/{topic}", qos), (f"{topic}/end", 0))
    speaker = join(V5)
    for n in range(10):
        speaker.publish(topic, b"%d" % n, 2)
    speaker.publish(f"{topic}/end", b"end")
    got = {qos: until_end(client) for qos, client in members.items()}
    assert sum(map(len, got.values())) == 10
    assert all(each.qos == qos for qos, heard in got.items() for each in heard)


def test_a_shared_subscription_gets_no_retained_messages(join: Connector) -> None:
    topic, client, speaker = fresh("shared/"), join(V5), join(V5)
    speaker.publish(topic, b"state", 1, retain=True)
    assert client.subscribe(f"$share/{fresh('g')}/{topic}", qos=1) == (1,)
    speaker.publish(topic, b"live", 1)
    client.message(b"live")


def test_what_a_member_refuses_goes_to_nobody_else(join: Connector) -> None:
    (one, two), topic = group(join, 2)
    speaker = join(V5)
    speaker.publish(topic, b"poison", 1)
    speaker.publish(f"{topic}/end", b"end")
    refused = 0
    for client in (one, two):
        while (got := client.expect(mqtt.PUBLISH)).payload != b"end":
            client.say(mqtt.ack(mqtt.PUBACK, got.packet_id, 0x80))
            refused += 1
    assert refused == 1
    assert one.silence() == two.silence() == []
    speaker.publish(f"{topic}/end", b"end")
    assert until_end(one) == until_end(two) == []


def test_what_a_member_left_unfinished_goes_to_another(join: Connector) -> None:
    (one, two), topic = group(join, 2)
    speaker = join(V5)
    speaker.publish(topic, b"unfinished", 1)
    speaker.publish(f"{topic}/end", b"end")
    got = {}
    for client in (one, two):
        while (heard := client.expect(mqtt.PUBLISH)).payload != b"end":
            got[client] = heard
    ((chosen, _),) = got.items()
    other = two if chosen is one else one
    chosen.drop()
    other.message(b"unfinished")


def test_leaving_the_group_ends_delivery(join: Connector) -> None:
    topic, share = fresh("shared/"), fresh("group")
    one, two, speaker = join(V5), join(V5), join(V5)
    for client in (one, two):
        client.subscribe(f"$share/{share}/{topic}", qos=1)
    assert one.unsubscribe(f"$share/{share}/{topic}") == (0,)
    assert one.unsubscribe(f"$share/{share}/{topic}", topic) == (0x11, 0x11)
    for n in range(4):
        speaker.publish(topic, b"%d" % n, 1)
        two.message(b"%d" % n)
    assert one.silence() == []


def test_a_subscription_identifier_comes_with_shared_messages(join: Connector) -> None:
    topic, client = fresh("shared/"), join(V5)
    client.subscribe(f"$share/{fresh('g')}/{topic}", qos=1, props=[(mqtt.SUBSCRIPTION_ID, 9)])
    join(V5).publish(topic, b"x", 1)
    assert client.message(b"x").all(mqtt.SUBSCRIPTION_ID) == [9]
