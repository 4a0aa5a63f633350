"""Local apps over AMQP 1.0, with proton's own client against a real daemon, and MQTT apps at its other side."""

from __future__ import annotations

import signal
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proton import Condition, Delivery, Described, Message, Terminus, Timeout, symbol
from proton.reactor import AtMostOnce, DurableSubscription, Filter, LinkOption, ReceiverOption, Selector
from proton.utils import (
    BlockingConnection,
    BlockingReceiver,
    LinkDetached,
    SendException,
    SyncRequestResponse,
)

from gateway.amqp.message import ANNOTATION_ID, decode
from tests.amqp_apps import Gateway
from tests.daemon import WAIT_S


class Capability(LinkOption):
    def __init__(self, name: str) -> None:
        self.name = name

    def apply(self, link: Any) -> None:
        (link.source if link.is_receiver else link.target).capabilities.put_object(symbol(self.name))


TEMPORARY_TOPIC = Capability("temporary-topic")


class Browse(ReceiverOption):
    def apply(self, receiver: Any) -> None:
        receiver.source.distribution_mode = Terminus.DIST_MODE_COPY


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    try:
        yield gateway
    finally:
        gateway.close()


def bodies(receiver: BlockingReceiver, count: int, accept: bool = True) -> list[Any]:
    out = []
    for _ in range(count):
        message = receiver.receive(timeout=WAIT_S)
        out.append(bytes(message.body) if isinstance(message.body, memoryview) else message.body)
        if accept:
            receiver.accept()
    return out


def nothing_comes(receiver: BlockingReceiver, wait_s: float = 0.3) -> bool:
    try:
        receiver.receive(timeout=wait_s)
    except Timeout:
        return True
    return False


def send_all(app: BlockingConnection, address: str, payloads: Any, **fields: Any) -> None:
    sender = app.create_sender(address)
    for payload in payloads:
        sender.send(Message(body=payload, **fields), timeout=WAIT_S)
    sender.close()


def sync(app: BlockingConnection) -> None:
    """See that everything the app has said so far is heard: its client speaks only while it waits for something."""
    app.create_sender("sync").close()


def test_what_an_amqp_app_sends_another_receives_byte_for_byte_but_for_the_identity(gateway: Gateway) -> None:
    receiver = gateway.app().create_receiver("cab/door", credit=10)
    sent = Message(
        id=uuid.uuid4(),
        body={"a": [1, 2.5, None, True], symbol("s"): uuid.uuid4(), "b": b"\0\xff"},
        address="cab/door",
        subject="s",
        reply_to="cab/answer",
        correlation_id=17,
        content_type="application/x",
        properties={"n": 1, "t": "text", "f": 1.5, "u": uuid.uuid4()},
        annotations={symbol("x-opt-app"): "mine"},
        priority=7,
        durable=True,
        user_id=b"me",
        group_id="g",
        group_sequence=3,
        creation_time=12.0,
    )
    gateway.app().create_sender("cab/door").send(sent, timeout=WAIT_S)
    got = receiver.receive(timeout=WAIT_S)
    receiver.accept()
    for name in ("id", "address", "subject", "reply_to", "correlation_id", "content_type", "creation_time", "user_id"):
        assert getattr(got, name) == getattr(sent, name), name
    for name in ("body", "properties", "priority", "durable", "group_id", "group_sequence"):
        assert getattr(got, name) == getattr(sent, name), name
    annotations = dict(got.annotations)
    assert annotations.pop(ANNOTATION_ID).startswith("loco:")
    assert annotations == sent.annotations


def test_mqtt_and_amqp_apps_hear_one_another(gateway: Gateway) -> None:
    amqp, mqtt = gateway.app(), gateway.mqtt().subscribe("cab/#")
    receiver = amqp.create_receiver("cab/+", credit=10)
    amqp.create_sender("cab/door").send(
        Message(body="open", properties={"n": 5}, content_type="text/plain", ttl=60), timeout=WAIT_S
    )
    mqtt.publish("cab/light", b"on", UserProperty=[("k", "v")], ContentType="text/x", CorrelationData=b"\1\2")
    [first, second] = mqtt.wait(2)
    assert (first.topic, first.payload, first.properties.ContentType) == ("cab/door", b"open", "text/plain")
    assert first.properties.UserProperty == [("n", "5")]
    assert (second.topic, second.payload) == ("cab/light", b"on")
    got = receiver.receive(timeout=WAIT_S)
    assert got.body == "open"
    assert 59 < got.ttl <= 60
    receiver.accept()
    got = receiver.receive(timeout=WAIT_S)
    assert (bytes(got.body), got.address, got.properties) == (b"on", "cab/light", {"k": "v"})
    assert (bytes(got.correlation_id), got.content_type) == (b"\1\2", "text/x")


def test_an_amqp_app_may_have_a_message_retained_for_mqtt_apps_to_come(gateway: Gateway) -> None:
    retained = {symbol("x-opt-retain-message"): True}
    send_all(gateway.app(), "cab/state", ["on", "off"], annotations=retained)
    [message] = gateway.mqtt().subscribe("cab/#").wait(1)
    assert (message.payload, message.retain) == (b"off", True)


def test_an_amqp_request_is_answered_by_an_mqtt_app_and_its_correlation_keeps_its_type(gateway: Gateway) -> None:
    def answer(client: paho.Client, message: paho.MQTTMessage) -> None:
        packed = Properties(PacketTypes.PUBLISH)
        packed.CorrelationData = message.properties.CorrelationData
        client.publish(message.properties.ResponseTopic, message.payload.upper(), qos=1, properties=packed)

    mqtt = gateway.mqtt("service").subscribe("service/upper")
    mqtt.answer = answer
    requests = SyncRequestResponse(gateway.app(), "service/upper")
    for text in ("one", "two", "three"):
        # proton gives its requests a correlation-id that is text, and takes no answer with another one
        assert bytes(requests.call(Message(body=text)).body) == text.upper().encode()
    assert requests.reply_to.startswith("$lineside/reply/")
    receiver = gateway.app().create_receiver(None, dynamic=True)
    app, reply_to = gateway.app(), receiver.remote_source.address
    for correlation_id in (7, uuid.uuid4(), b"\0\xff"):
        send_all(app, "service/upper", ["x"], id="ID:1", correlation_id=correlation_id, reply_to=reply_to)
        assert receiver.receive(timeout=WAIT_S).correlation_id == correlation_id
    send_all(app, "service/upper", ["x"], id="ID:7", reply_to=reply_to)  # then the request's own id is the answer's
    assert receiver.receive(timeout=WAIT_S).correlation_id == "ID:7"


def test_an_mqtt_request_is_answered_by_an_amqp_app_through_the_anonymous_terminus(gateway: Gateway) -> None:
    app = gateway.app()
    receiver, anywhere = app.create_receiver("service/lower", credit=1), app.create_sender(None)
    mqtt = gateway.mqtt("asks").subscribe("asks/answers")
    mqtt.publish("service/lower", b"ABC", ResponseTopic="asks/answers", CorrelationData=b"\0\xff")
    asked = receiver.receive(timeout=WAIT_S)
    receiver.accept()
    anywhere.send(
        Message(address=asked.reply_to, correlation_id=bytes(asked.correlation_id), body=bytes(asked.body).lower()),
        timeout=WAIT_S,
    )
    [answered] = mqtt.wait(1)
    assert (answered.payload, answered.properties.CorrelationData) == (b"abc", b"\0\xff")


def test_each_message_on_the_anonymous_terminus_is_judged_by_its_own_address(gateway: Gateway) -> None:
    app = gateway.app()
    receiver, anywhere = app.create_receiver("a", credit=10), app.create_sender(None)
    for address in (None, "", "a/#", "amqp://host", "$lineside/reply/nobody"):
        with pytest.raises(SendException) as refused:
            anywhere.send(Message(address=address, body="x"), timeout=WAIT_S)
        assert refused.value.state == Delivery.REJECTED
    for address in ("a", "topic://a", "amqp://host/a"):
        anywhere.send(Message(address=address, body=address), timeout=WAIT_S)
    assert bodies(receiver, 3) == ["a", "topic://a", "amqp://host/a"]


def test_a_message_to_an_outbound_address_is_in_its_stream_before_it_is_accepted(gateway: Gateway) -> None:
    send_all(gateway.app(), "alarm/axle", ["hot"], id="own-id", ttl=5)
    gateway.process.kill()
    gateway.process.wait()
    with closing(sqlite3.connect(gateway.state / "journal.db")) as journal:
        [(topic, expires_age_us, body)] = journal.execute("SELECT topic, expires_age_us, body FROM messages")
    message = decode(body)
    assert (topic, message.message_id, message.ttl_ms) == ("alarm/axle", "own-id", 5000)
    assert expires_age_us is not None
    # the hub is an Artemis: it looks for duplicates in this property
    assert message.application_properties["_AMQ_DUPL_ID"] == message.annotations[ANNOTATION_ID]


def test_a_durable_subscription_goes_on_at_the_next_message_after_detach_close_and_restart(gateway: Gateway) -> None:
    def attach() -> tuple[BlockingConnection, BlockingReceiver]:
        app = gateway.app("reader")
        return app, app.create_receiver("cab/+", name="sub", options=[DurableSubscription()], credit=1)

    writer = gateway.app()
    app, receiver = attach()
    send_all(writer, "cab/a", [1, 2, 3])
    assert bodies(receiver, 1) == [1]
    sync(app)
    receiver.link.detach()
    sync(app)
    app.close()
    send_all(writer, "cab/b", [4])
    [away] = gateway.clients()["away"]
    assert (away["client"], away["subscriptions"]) == ("reader", ["cab/+"])
    app, receiver = attach()
    assert bodies(receiver, 2) == [2, 3]
    sync(app)
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.wait(WAIT_S)
    gateway.start()
    gateway.status()
    app, receiver = attach()
    assert bodies(receiver, 1) == [4]


def test_a_closing_detach_ends_a_durable_subscription(gateway: Gateway) -> None:
    app = gateway.app("reader")
    receiver = app.create_receiver("cab/a", name="sub", options=[DurableSubscription()])
    receiver.close()
    assert gateway.clients()["away"] == []
    send_all(gateway.app(), "cab/a", ["unheard"])
    receiver = app.create_receiver("cab/a", name="sub", options=[DurableSubscription()])
    send_all(gateway.app(), "cab/a", ["heard"])
    assert bodies(receiver, 1) == ["heard"]


def test_a_durable_subscription_to_another_address_begins_anew(gateway: Gateway) -> None:
    app = gateway.app("reader")
    app.create_receiver("cab/a", name="sub", options=[DurableSubscription()])
    app.close()
    send_all(gateway.app(), "cab/a", ["old"])
    receiver = gateway.app("reader").create_receiver("cab/+", name="sub", options=[DurableSubscription()])
    send_all(gateway.app(), "cab/a", ["new"])
    assert bodies(receiver, 1) == ["new"]


def test_the_same_subscription_attached_again_takes_the_link_from_the_first(gateway: Gateway) -> None:
    first = gateway.app("reader").create_receiver("cab/a", name="sub", options=[DurableSubscription()], credit=5)
    second = gateway.app("reader").create_receiver("cab/a", name="sub", options=[DurableSubscription()], credit=5)
    send_all(gateway.app(), "cab/a", [1, 2])
    assert bodies(second, 2) == [1, 2]
    first.connection.wait(lambda: first.link.remote_condition is not None, timeout=WAIT_S)
    assert first.link.remote_condition.name == "amqp:link:stolen"
    first.connection.close()
    sync(second.connection)
    assert len(gateway.clients()["away"]) == 0


def test_receivers_of_a_queue_share_its_messages_and_those_of_a_topic_all_get_them(gateway: Gateway) -> None:
    queue = [gateway.app().create_receiver("jobs/print", credit=2) for _ in range(2)]
    topic = [gateway.app().create_receiver("news/today", credit=10) for _ in range(2)]
    send_all(gateway.app(), "jobs/print", range(4))
    send_all(gateway.app(), "news/today", range(4))
    got = [sorted(bodies(receiver, 2, accept=False)) for receiver in queue]
    assert sorted(got[0] + got[1]) == [0, 1, 2, 3]
    assert [bodies(receiver, 4) for receiver in topic] == [[0, 1, 2, 3]] * 2


def test_prefix_and_capability_make_a_queue_too_and_a_contradiction_is_refused(gateway: Gateway) -> None:
    app = gateway.app()
    by_prefix = app.create_receiver("queue://a/b", credit=1)
    by_capability = gateway.app().create_receiver("a/b", credit=1, options=[Capability("queue")])
    send_all(gateway.app(), "a/b", ["x", "y"])
    assert sorted(bodies(by_prefix, 1) + bodies(by_capability, 1)) == ["x", "y"]
    with pytest.raises(LinkDetached) as refused:
        app.create_receiver("topic://jobs/x")
    assert refused.value.condition == "amqp:invalid-field"


def test_a_queue_holds_messages_before_its_first_receiver_comes(gateway: Gateway) -> None:
    gateway.mqtt().publish("orders", b"1")  # a queue by its name in the configuration
    gateway.mqtt("other").publish("jobs/new", b"2")  # and one that a filter there makes of it
    send_all(gateway.app(), "queue://made/by/sender", ["3"])
    app = gateway.app()
    assert bodies(app.create_receiver("orders"), 1) == [b"1"]
    assert bodies(app.create_receiver("jobs/new"), 1) == [b"2"]
    assert bodies(app.create_receiver("queue://made/by/sender"), 1) == ["3"]


def test_what_a_queues_receiver_leaves_behind_another_gets_in_order_and_counted_as_failed(gateway: Gateway) -> None:
    send_all(gateway.app(), "jobs/a", range(4))
    app = gateway.app()
    leaving = app.create_receiver("jobs/a", credit=3)
    assert bodies(leaving, 3, accept=False) == [0, 1, 2]
    app.close()
    other = gateway.app().create_receiver("jobs/a", credit=10)
    got = [other.receive(timeout=WAIT_S) for _ in range(4)]
    assert [(m.body, m.delivery_count) for m in got] == [(0, 1), (1, 1), (2, 1), (3, 0)]


def test_browsing_a_queue_takes_nothing_from_it(gateway: Gateway) -> None:
    send_all(gateway.app(), "jobs/a", range(3))
    browser = gateway.app().create_receiver("jobs/a", credit=10, options=[Browse()])
    assert bodies(browser, 3) == [0, 1, 2]
    assert bodies(gateway.app().create_receiver("jobs/a", credit=10), 3) == [0, 1, 2]


def test_released_and_modified_messages_come_again_in_order_with_their_failures_counted(gateway: Gateway) -> None:
    receiver = gateway.app().create_receiver("cab/a", credit=10)
    send_all(gateway.app(), "cab/a", range(3))
    got = [receiver.receive(timeout=WAIT_S) for _ in range(3)]
    assert [m.body for m in got] == [0, 1, 2]
    receiver.settle(Delivery.RELEASED)  # the oldest first
    receiver.fetcher.unsettled[0].local.failed = True
    receiver.settle(Delivery.MODIFIED)
    receiver.settle(Delivery.ACCEPTED)
    receiver.flow(10)
    again = [receiver.receive(timeout=WAIT_S) for _ in range(2)]
    assert [(m.body, m.delivery_count) for m in again] == [(0, 0), (1, 1)]


def test_a_rejected_message_is_a_dead_letter_and_the_rest_goes_on(gateway: Gateway) -> None:
    receiver = gateway.app().create_receiver("cab/a", credit=10)
    send_all(gateway.app(), "cab/a", ["bad", "good"])
    receiver.receive(timeout=WAIT_S)
    receiver.fetcher.unsettled[0].local.condition = Condition("app:too-odd", "no idea")
    receiver.reject()
    assert bodies(receiver, 1) == ["good"]
    sync(receiver.connection)
    end = time.monotonic() + WAIT_S
    while gateway.status()["dead"] != 1:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_presettled_deliveries_are_at_most_once(gateway: Gateway) -> None:
    app = gateway.app("reader")
    receiver = app.create_receiver("cab/a", name="sub", credit=10, options=[DurableSubscription(), AtMostOnce()])
    sender = gateway.app().create_sender("cab/a", options=[AtMostOnce()])
    for n in range(3):
        sender.send(Message(body=n), timeout=WAIT_S)
    sync(sender.connection)
    assert bodies(receiver, 3, accept=False) == [0, 1, 2]
    app.close()
    receiver = gateway.app("reader").create_receiver("cab/a", name="sub", options=[DurableSubscription()])
    assert nothing_comes(receiver)


def test_a_drain_gives_credit_back_once_nothing_is_left(gateway: Gateway) -> None:
    send_all(gateway.app(), "jobs/a", range(3))
    app = gateway.app()
    receiver = app.create_receiver("jobs/a", credit=0)
    receiver.link.drain(10)
    app.wait(lambda: receiver.link.credit == 0 and len(receiver.fetcher.incoming) == 3, timeout=WAIT_S)


def test_eight_megabytes_go_through_in_many_transfers_both_ways(gateway: Gateway) -> None:
    receiver = gateway.app().create_receiver("cab/blob", credit=2)
    sender = gateway.app().create_sender("cab/blob")
    assert sender.link.remote_max_message_size == 8 << 20
    blob = bytes(range(256)) * ((8 << 20) // 256 - 4)
    sender.send(Message(body=blob), timeout=WAIT_S)
    assert bytes(receiver.receive(timeout=WAIT_S).body) == blob
    with pytest.raises(LinkDetached) as refused:
        sender.send(Message(body=blob + bytes(4096)), timeout=WAIT_S)
    assert refused.value.condition == "amqp:link:message-size-exceeded"


@pytest.mark.parametrize(
    ("filter_", "name"),
    [(Selector("n > 3"), "selector"), (Filter({symbol("no-local"): Described(symbol("x"), [])}), "no-local")],
)
def test_a_selector_is_refused_and_takes_nothing_from_a_queue(gateway: Gateway, filter_: Filter, name: str) -> None:
    app = gateway.app()
    send_all(app, "queue://jobs", ["a", "b"])
    with pytest.raises(LinkDetached, match=f"amqp:not-implemented.*no selectors and no filters: {name}"):
        app.create_receiver("queue://jobs", options=filter_)
    assert bodies(gateway.app().create_receiver("queue://jobs"), 2) == ["a", "b"]


def test_an_empty_set_of_filters_is_no_filter(gateway: Gateway) -> None:
    receiver = gateway.app().create_receiver("cab/door", options=Filter({}))
    send_all(gateway.app(), "cab/door", ["a"])
    assert bodies(receiver, 1) == ["a"]


@pytest.mark.parametrize(
    ("address", "condition"),
    [("", "amqp:not-found"), ("a/#/b", "amqp:invalid-field"), ("$lineside/reply/x", "amqp:not-found")],
)
def test_a_link_to_nowhere_is_refused_with_the_standards_condition(
    gateway: Gateway, address: str, condition: str
) -> None:
    app = gateway.app()
    with pytest.raises(LinkDetached) as refused:
        app.create_receiver(address)
    assert refused.value.condition == condition
    app.create_receiver("still/alive")


def test_a_dynamic_address_is_its_makers_and_lives_as_long_as_its_link(gateway: Gateway) -> None:
    app, other = gateway.app(), gateway.app()
    mine = app.create_receiver(None, dynamic=True)
    address = mine.remote_source.address
    send_all(other, address, ["answer"])
    assert bodies(mine, 1) == ["answer"]
    with pytest.raises(LinkDetached) as refused:
        other.create_receiver(address)
    assert refused.value.condition == "amqp:unauthorized-access"
    mine.close()
    with pytest.raises(LinkDetached) as gone:
        other.create_sender(address)
    assert gone.value.condition == "amqp:not-found"


def test_a_queues_receiver_may_settle_in_any_order_and_keeps_only_what_it_did_not(gateway: Gateway) -> None:
    app = gateway.app()
    send_all(app, "jobs/any", [str(n) for n in range(6)])
    worker = app.create_receiver("jobs/any", credit=6)
    assert bodies(worker, 6, accept=False) == [str(n) for n in range(6)]
    for delivery in list(worker.fetcher.unsettled)[1::2]:
        delivery.update(Delivery.ACCEPTED)
        delivery.settle()
    worker.close()
    assert bodies(app.create_receiver("jobs/any"), 3) == ["0", "2", "4"]


class DynamicTarget(LinkOption):
    def apply(self, link: Any) -> None:
        link.target.dynamic = True


def test_all_receivers_of_a_temporary_topic_get_every_message(gateway: Gateway) -> None:
    app, other = gateway.app(), gateway.app()
    maker = app.create_sender(None, options=[DynamicTarget(), TEMPORARY_TOPIC])
    address = maker.remote_target.address
    send_all(other, address, ["nobody receives yet"])
    receivers = [
        app.create_receiver(address, options=TEMPORARY_TOPIC, name="one"),
        app.create_receiver(address, name="two"),
    ]
    send_all(other, address, ["a", "b"])
    assert [bodies(receiver, 2) for receiver in receivers] == [["a", "b"], ["a", "b"]]
    receivers[0].close()
    send_all(other, address, ["c"])
    assert bodies(receivers[1], 1) == ["c"]
    with pytest.raises(LinkDetached) as refused:
        other.create_receiver(address)
    assert refused.value.condition == "amqp:unauthorized-access"
    maker.close()
    with pytest.raises(LinkDetached) as gone:
        other.create_sender(address)
    assert gone.value.condition == "amqp:not-found"


def test_a_receiver_that_asks_for_a_temporary_topic_shares_it_with_its_connections_others(gateway: Gateway) -> None:
    app = gateway.app()
    first = app.create_receiver(None, dynamic=True, options=TEMPORARY_TOPIC)
    address = first.remote_source.address
    second = app.create_receiver(address)
    send_all(gateway.app(), address, ["a", "b"])
    assert bodies(first, 2) == bodies(second, 2) == ["a", "b"]


def test_clients_lists_amqp_apps_with_their_links(gateway: Gateway) -> None:
    app = gateway.app("tool")
    app.create_receiver("jobs/a")
    app.create_receiver("cab/#", name="sub", options=[DurableSubscription()])
    app.create_sender("cab/door")
    [listed] = [c for c in gateway.clients()["clients"] if c["client"] == "tool"]
    assert listed["addresses"] == [
        "receives from durable topic cab/#",
        "receives from queue jobs/a",
        "sends to cab/door",
    ]
    assert listed["version"] == "AMQP 1.0"
