"""Requests that go out and replies that come in: which finds which, for how long, and what is remembered of it."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.amqp.message import Message, decode, encode
from gateway.broker import Broker
from gateway.config import loads
from gateway.mqtt.delivery import Delivery
from gateway.mqtt.packets import PublishProperties
from gateway.replies import Inlet, Requests
from gateway.uplink.intake import Intake
from storeforward.journal import Journal
from storeforward.streams import Row
from tests.wire import Wire

CONFIG = """
[gateway]
id = "loco"
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
kind = "artemis"
[[outbound]]
stream = "requests"
topics = ["ask/#"]
hub = "depot"
address = "edge.requests"
reply_to = "edge.{gateway}.replies"
reply_timeout = "1m"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge.telemetry"
[[outbound]]
stream = "answers"
topics = ["reply/depot/#"]
hub = "depot"
address = "{requester}"
[[inbound]]
stream = "replies"
hub = "depot"
address = "edge.{gateway}.replies"
topic = "replies/{subject}"
[[inbound]]
stream = "commands"
hub = "depot"
address = "edge.{gateway}.commands"
topic = "commands/{subject}"
"""
ASKED = PublishProperties(response_topic="app/1/answers", correlation_data=b"\x00\xff")


class Gateway:
    """A gateway without listeners or links: what is published is journaled, what the hub sends comes over a wire."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: str | None = "reply/depot/"
        self.boottime_s = 1000.0
        self.sent = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal.open(self.path, clock=lambda: self.boottime_s)
        self.broker = Broker(loads(CONFIG), self.journal)
        self.journal.commit_now()

    def restart(self) -> None:
        """As after a power cut: nothing is said or written before it."""
        self.journal._w.close()
        self.journal._r.close()
        self.journal._lock.release()
        self.open()

    def publish(self, topic: str = "ask/time", properties: PublishProperties = ASKED) -> Message:
        """What the hub is sent for it."""
        self.broker.publish(topic, 1, False, b"?", properties, self.journal.age_us())
        self.journal.commit_now()
        return decode(self.rows("requests" if topic.startswith("ask/") else "telemetry")[-1].body)

    def rows(self, stream: str) -> list[Row]:
        return self.journal.read(self.journal.streams[stream], 1, 1000)

    def receive(self, *bodies: bytes, stream: str = "replies") -> None:
        wire = Wire().attach(credit=0)
        home = self.journal.streams[stream]

        def place(message: Message) -> tuple[Any, str]:
            return home, f"{stream}/{message.subject or ''}"

        inlet = Inlet(self.broker.requests, "loco", home, self.answers)
        intake = Intake(self.journal, wire.receiver, 100, place, lambda: None, inlet=inlet)
        wire.run()
        wire.sender.send([(self.sent + n, body) for n, body in enumerate(bodies)])
        self.sent += len(bodies)
        intake.deliveries(wire.take())
        self.journal.commit_now()

    def delivered(self, stream: str = "replies") -> list[tuple[str, bytes | None]]:
        """Topic and correlation data of what apps are given, in order."""
        found = []
        for row in self.rows(stream):
            properties = self.broker.delivery(self.journal.streams[stream], row).properties
            found.append((row.topic, None if properties is None else properties.correlation_data))
        return found

    def losses(self) -> list[tuple[Any, ...]]:
        return self.journal.query("SELECT stream, seq, reason, detail FROM loss")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.journal.close()


def reply(correlation: Any, **fields: Any) -> bytes:
    return encode(b"!", correlation_id=correlation, **fields)


def test_a_request_asks_for_its_reply_at_an_address_the_hub_knows(gateway: Gateway) -> None:
    sent = gateway.publish()
    assert sent.reply_to == "edge.loco.replies"
    assert sent.correlation_id == sent.message_id == sent.application_properties["_AMQ_DUPL_ID"]


def test_a_reply_finds_the_response_topic_and_the_correlation_data_of_its_request(gateway: Gateway) -> None:
    sent = gateway.publish()
    assert isinstance(sent.message_id, str)
    # By correlation-id or, as in JMS, by message-id it is the same name; as bytes where an MQTT app at the hub answers.
    gateway.receive(reply(sent.correlation_id), reply(sent.message_id.encode()))
    assert gateway.delivered() == [("app/1/answers", b"\x00\xff")] * 2


@pytest.mark.parametrize("correlation", [None, b"", b"x" * 65535])
def test_correlation_data_come_back_as_they_were(gateway: Gateway, correlation: bytes | None) -> None:
    sent = gateway.publish(properties=PublishProperties(response_topic="a", correlation_data=correlation))
    gateway.receive(reply(sent.correlation_id))
    assert gateway.delivered() == [("a", correlation)]


def test_apps_with_the_same_correlation_data_each_get_their_own_reply(gateway: Gateway) -> None:
    one = gateway.publish(properties=PublishProperties(response_topic="one", correlation_data=b"1"))
    two = gateway.publish(properties=PublishProperties(response_topic="two", correlation_data=b"1"))
    gateway.receive(reply(two.correlation_id), reply(one.correlation_id))
    assert gateway.delivered() == [("two", b"1"), ("one", b"1")]


def test_local_readers_of_a_request_are_given_what_its_requester_wrote(gateway: Gateway) -> None:
    gateway.publish()
    (row,) = gateway.rows("requests")
    here = gateway.broker.delivery(gateway.journal.streams["requests"], row).properties
    assert here is not None
    assert (here.response_topic, here.correlation_data) == ("app/1/answers", b"\x00\xff")
    elsewhere = Delivery.of(row.topic, row.body, None, "depot").properties
    assert elsewhere is not None
    assert elsewhere.response_topic == "edge.loco.replies"


def test_a_reply_may_itself_ask_for_one(gateway: Gateway) -> None:
    sent = gateway.publish()
    gateway.receive(reply(sent.correlation_id, reply_to="centre/7"))
    (row,) = gateway.rows("replies")
    properties = gateway.broker.delivery(gateway.journal.streams["replies"], row).properties
    topic = "reply/depot/centre/7"
    assert properties == PublishProperties(response_topic=topic, correlation_data=b"\x00\xff")


@pytest.mark.parametrize("correlation", [None, "loco:9:requests:1", b"\xff", 7, uuid.UUID(int=7)])
def test_what_answers_nothing_goes_to_the_ordinary_topic(gateway: Gateway, correlation: Any) -> None:
    gateway.publish()
    gateway.receive(reply(correlation, subject="x"))
    assert [topic for topic, _ in gateway.delivered()] == ["replies/x"]


def test_a_reply_on_another_stream_answers_nothing(gateway: Gateway) -> None:
    sent = gateway.publish()
    gateway.receive(reply(sent.correlation_id, subject="x"), stream="commands")
    assert [topic for topic, _ in gateway.delivered("commands")] == ["commands/x"]


def test_without_reply_to_the_response_topic_travels_as_it_is(gateway: Gateway) -> None:
    sent = gateway.publish("train/x")
    assert (sent.reply_to, sent.correlation_id) == ("app/1/answers", b"\x00\xff")
    assert len(gateway.broker.requests) == 0


def test_what_asks_for_nothing_is_not_remembered(gateway: Gateway) -> None:
    sent = gateway.publish(properties=PublishProperties(correlation_data=b"1"))
    assert (sent.reply_to, sent.correlation_id) == (None, b"1")
    assert len(gateway.broker.requests) == 0


@pytest.mark.parametrize(
    ("expiry_s", "answered_after_s", "topic"),
    [(None, 59, "app/1/answers"), (None, 61, "replies/"), (5, 4, "app/1/answers"), (5, 6, "replies/")],
)
def test_a_reply_finds_back_until_its_request_expires(
    gateway: Gateway, expiry_s: int | None, answered_after_s: int, topic: str
) -> None:
    asked = PublishProperties(response_topic="app/1/answers", message_expiry_interval=expiry_s)
    sent = gateway.publish(properties=asked)
    gateway.boottime_s += answered_after_s
    gateway.receive(reply(sent.correlation_id))
    assert [t for t, _ in gateway.delivered()] == [topic]


def test_expired_requests_are_forgotten_also_in_the_journal(gateway: Gateway) -> None:
    gateway.publish()
    gateway.boottime_s += 61
    gateway.broker.run_due()
    gateway.journal.commit_now()
    assert gateway.journal.query("SELECT * FROM request") == []
    assert len(gateway.broker.requests) == 0
    assert gateway.losses() == []


def test_open_requests_survive_a_power_cut_and_so_does_their_expiry(gateway: Gateway) -> None:
    first = gateway.publish()
    second = gateway.publish(properties=PublishProperties(response_topic="b", message_expiry_interval=1000))
    gateway.restart()
    gateway.receive(reply(first.correlation_id))
    gateway.restart()
    assert len(gateway.broker.requests) == 2
    gateway.boottime_s += 100
    gateway.receive(reply(second.correlation_id), reply(first.correlation_id, subject="late"))
    assert gateway.delivered() == [
        ("app/1/answers", b"\x00\xff"),
        ("b", None),
        ("replies/late", str(first.message_id).encode()),
    ]


def test_a_request_that_was_not_stored_is_not_waited_for(gateway: Gateway) -> None:
    gateway.broker.publish("ask/time", 1, False, b"?", ASKED, gateway.journal.age_us())
    gateway.journal.begin()
    gateway.journal.failed(sqlite3.OperationalError("disk I/O error"))
    assert len(gateway.broker.requests) == 0
    gateway.journal.commit_now()
    assert gateway.journal.query("SELECT * FROM request") == []


def open_many(gateway: Gateway, count: int) -> list[Message]:
    return [gateway.publish(properties=PublishProperties(response_topic=f"a/{n}")) for n in range(count)]


def test_of_too_many_the_oldest_is_forgotten_and_in_the_ledger(gateway: Gateway) -> None:
    gateway.broker.requests._open_max = 3
    sent = open_many(gateway, 5)
    gateway.receive(*(reply(each.correlation_id) for each in sent))
    assert [t for t, _ in gateway.delivered()] == ["replies/", "replies/", "a/2", "a/3", "a/4"]
    assert gateway.losses() == [("requests", n, "request-forgotten", f"a/{n - 1}") for n in (1, 2)]
    gateway.restart()
    assert len(gateway.broker.requests) == 3


def test_what_was_answered_makes_room_first_and_is_no_loss(gateway: Gateway) -> None:
    gateway.broker.requests._open_max = 3
    sent = open_many(gateway, 3)
    gateway.receive(reply(sent[1].correlation_id))
    sent += open_many(gateway, 1)
    gateway.receive(*(reply(each.correlation_id) for each in sent))
    assert [t for t, _ in gateway.delivered()] == ["a/1", "a/0", "replies/", "a/2", "a/0"]
    assert gateway.losses() == []


def test_open_requests_are_bounded_in_bytes_too(gateway: Gateway) -> None:
    gateway.broker.requests._bytes_max = 200_000
    for n in range(4):
        gateway.publish(properties=PublishProperties(response_topic=f"a/{n}", correlation_data=b"x" * 60_000))
    assert len(gateway.broker.requests) == 3
    assert gateway.losses() == [("requests", 1, "request-forgotten", "a/0")]


def test_more_open_requests_in_the_journal_than_may_be_are_cut_at_the_start(gateway: Gateway) -> None:
    open_many(gateway, 4)
    requests = Requests(gateway.journal, open_max=2)
    assert len(requests) == 2
    gateway.journal.commit_now()
    assert [t for (t,) in gateway.journal.query("SELECT response_topic FROM request")] == ["a/2", "a/3"]


def test_a_reply_that_comes_twice_is_journaled_once(gateway: Gateway) -> None:
    sent = gateway.publish()
    answer = reply(sent.correlation_id, message_id="r-1")
    gateway.receive(answer)
    gateway.receive(answer)
    assert len(gateway.delivered()) == 1


# ------------------------------------------------------------------ requests from the hub


def asked(gateway: Gateway, **fields: Any) -> PublishProperties | None:
    """What an app here is given of a request."""
    gateway.receive(encode(b"?", subject="state", **fields), stream="commands")
    row = gateway.rows("commands")[-1]
    assert row.topic == "commands/state"
    return gateway.broker.delivery(gateway.journal.streams["commands"], row).properties


@pytest.mark.parametrize("name", ["text", b"\x00\xff", b"", uuid.UUID(int=5), 2**64 - 1, 0])
@pytest.mark.parametrize("address", ["answers", "/queue/a%2F+#/b", "temp://ü"])
def test_an_answer_goes_to_the_reply_to_and_names_its_request_as_that_does_itself(
    gateway: Gateway, name: Any, address: str
) -> None:
    for fields in ({"correlation_id": name, "message_id": "another"}, {"message_id": name}):
        request = asked(gateway, reply_to=address, **fields)
        assert request is not None
        assert request.response_topic is not None
        gateway.broker.publish(
            request.response_topic,
            1,
            False,
            b"!",
            PublishProperties(correlation_data=request.correlation_data),
            gateway.journal.age_us(),
        )
        gateway.journal.commit_now()
        answer = decode(gateway.rows("answers")[-1].body)
        assert (answer.to, answer.correlation_id) == (address, name)
        assert type(answer.correlation_id) is type(name)


@pytest.mark.parametrize("topic", ["reply/depot", "reply/depot/", "reply/other/a"])
def test_a_topic_that_is_no_way_back_stays_local(gateway: Gateway, topic: str) -> None:
    gateway.broker.publish(topic, 1, False, b"!", None, gateway.journal.age_us())
    assert gateway.rows("answers") == []
    assert gateway.broker.router.route(topic, 1).stream is gateway.broker.local


def test_without_such_a_stream_the_reply_to_is_the_response_topic(gateway: Gateway) -> None:
    gateway.answers = None
    assert asked(gateway, reply_to="answers", correlation_id=b"1") == PublishProperties(
        response_topic="answers", correlation_data=b"1"
    )


def test_what_mqtt_can_not_say_is_left_out_and_the_rest_arrives(gateway: Gateway) -> None:
    gateway.answers = None
    found = asked(
        gateway,
        reply_to="a/+/#",
        correlation_id="x" * 65536,
        content_type="text/plain",
        application_properties={"nul\0": "a\0b", "long": "x" * 65536, "wide": "ü" * 32768, "fits": "ü" * 32767},
    )
    pairs = (("nul\ufffd", "a\ufffdb"), ("fits", "ü" * 32767))
    assert found == PublishProperties(content_type="text/plain", user_property=pairs)
