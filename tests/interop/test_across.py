"""Properties, types and replies across the line: an MQTT app on one side, an AMQP app on the other, a hub between.

The hub is Artemis, RabbitMQ or a second Lineside; the AMQP app is proton's own client, the MQTT app is paho. What is
compared is what each app sees with the other one's eyes: every property of an MQTT 5.0 PUBLISH, every section of an
AMQP message.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import proton
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proton.reactor import LinkOption
from proton.utils import BlockingConnection, BlockingReceiver, BlockingSender

from gateway.amqp.message import correlation_data
from gateway.faultlink import Line
from tests import parts
from tests.interop import harness

WAIT_S = 45.0

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
[[hub]]
name = "centre"
urls = ["amqp://127.0.0.1:{line}"]
kind = "{kind}"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "centre"
address = "{prefix}telemetry"
[[outbound]]
stream = "fixed"
topics = ["{prefix}fixed"]
hub = "centre"
address = "{prefix}fixed"
[[outbound]]
stream = "requests"
topics = ["ask/#"]
hub = "centre"
address = "{prefix}requests"
reply_to = "{prefix}replies"
[[inbound]]
stream = "replies"
hub = "centre"
address = "{prefix}replies"
topic = "unmatched/{{subject}}"
[[inbound]]
stream = "commands"
hub = "centre"
address = "{prefix}commands"
topic = "commands/{{subject}}"
"""

HUB = """
[gateway]
id = "centre"
state_dir = "{state}"
[amqp]
listen = ["127.0.0.1:{port}"]
"""

ANSWERS = """
[[outbound]]
stream = "answers"
topics = ["reply/centre/#"]
hub = "centre"
address = "{requester}"
"""

_numbers = itertools.count()


class Kept(LinkOption):
    """A terminus that lasts: RabbitMQ's queues are as durable as the terminus that declares them."""

    def __init__(self, durable: bool) -> None:
        self._durable = durable

    def apply(self, link: proton.Link) -> None:
        if self._durable:
            terminus = link.target if link.is_sender else link.source
            terminus.durability = proton.Terminus.DELIVERIES
            terminus.expiry_policy = proton.Terminus.EXPIRE_NEVER


class App:
    """An AMQP app at the hub."""

    def __init__(self, port: int, durable: bool) -> None:
        self._durable = durable
        self._senders: dict[str, BlockingSender] = {}
        self.connection = BlockingConnection(f"amqp://127.0.0.1:{port}", timeout=WAIT_S, allowed_mechs="ANONYMOUS")

    def receiver(self, address: str) -> BlockingReceiver:
        return self.connection.create_receiver(address, credit=100, options=Kept(self._durable))

    def send(self, address: str, *messages: proton.Message) -> None:
        sender = self._senders.get(address)  # kept open: RabbitMQ 3.10 leaves a sender's detach unanswered
        if sender is None:
            sender = self._senders[address] = self.connection.create_sender(address, options=Kept(self._durable))
        for message in messages:
            sender.send(message)

    def take(self, receiver: BlockingReceiver) -> proton.Message:
        message = receiver.receive(timeout=WAIT_S)
        receiver.accept()
        return message

    def close(self) -> None:
        self.connection.close()


class Train:
    """An MQTT 5.0 app with a durable session."""

    def __init__(self, port: int, name: str = "train", *filters: str) -> None:
        self.got: queue.Queue[paho.MQTTMessage] = queue.Queue()
        ready = threading.Event()
        client = self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
        client.on_message = lambda _client, _data, message: self.got.put(message)
        client.on_subscribe = lambda *_: ready.set()
        options = paho.SubscribeOptions(1, retainAsPublished=True)
        client.on_connect = lambda *_: client.subscribe([(each, options) for each in filters])
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600
        client.connect("127.0.0.1", port, clean_start=False, properties=session)
        client.loop_start()
        assert ready.wait(WAIT_S)

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False, **properties: Any) -> None:
        info = self.client.publish(topic, payload, 1, retain, publish_properties(**properties))
        info.wait_for_publish(WAIT_S)
        assert info.is_published()

    def take(self) -> paho.MQTTMessage:
        return self.got.get(timeout=WAIT_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def publish_properties(**values: Any) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def said(message: paho.MQTTMessage) -> dict[str, Any]:
    """The properties a PUBLISH came with, by name."""
    return dict(message.properties.json()) | {
        name: getattr(message.properties, name)
        for name in ("CorrelationData", "UserProperty")
        if hasattr(message.properties, name)
    }


@dataclass
class Rig:
    kind: str
    prefix: str
    mqtt_port: int
    hub_port: int
    daemon: harness.Daemon
    line: harness.BrokenLine
    close_later: list[Any]

    def app(self) -> App:
        app = App(self.hub_port, self.kind == "rabbitmq")
        self.close_later.append(app)
        return app

    def train(self, *filters: str, name: str = "train") -> Train:
        train = Train(self.mqtt_port, name, *filters)
        self.close_later.append(train)
        return train

    def up(self) -> None:
        harness.wait_until(lambda: self.daemon.hub_state() == "up", WAIT_S, "the link to the hub")


@pytest.fixture
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    kind: str = request.param
    if kind != "lineside":
        yield kind, request.getfixturevalue(kind).port
        return
    port = parts.free_port()
    daemon = harness.Daemon(tmp_path / "hub", HUB.format(state=tmp_path / "hub" / "state", port=port))
    with harness.closing(daemon):
        daemon.start()
        yield kind, port


@contextlib.contextmanager
def rigged(hub: tuple[str, int], tmp_path: Path, more: str = "") -> Iterator[Rig]:
    kind, port = hub
    prefix = f"{'/queue/' if kind == 'rabbitmq' else ''}across.{next(_numbers)}."
    loop = harness.Loop()
    line = harness.BrokenLine(loop, port)
    mqtt = parts.free_port()
    config = CONFIG.format(state=tmp_path / "state", mqtt=mqtt, line=line.port, kind=kind, prefix=prefix)
    daemon = harness.Daemon(tmp_path, config + more)
    rig = Rig(kind, prefix, mqtt, port, daemon, line, [])
    with harness.closing(daemon, line, loop):
        daemon.start()
        rig.up()
        try:
            yield rig
        finally:
            for each in reversed(rig.close_later):
                each.close()


@pytest.fixture
def rig(hub: tuple[str, int], tmp_path: Path) -> Iterator[Rig]:
    with rigged(hub, tmp_path) as rig:
        yield rig


@pytest.fixture
def answering(hub: tuple[str, int], tmp_path: Path) -> Iterator[Rig]:
    """A rig whose apps answer the hub's requests."""
    with rigged(hub, tmp_path, ANSWERS) as rig:
        yield rig


HUBS = pytest.mark.parametrize("hub", ["lineside", "artemis", "rabbitmq"], indirect=True)

NOT_ASCII = "text/plain; größe=ü"
# What an MQTT app says, and what an AMQP app then sees (None: nothing there).
OUT: list[tuple[dict[str, Any], Callable[[proton.Message], Any], Any]] = [
    ({"ContentType": "application/json"}, lambda m: m.content_type, "application/json"),
    ({"ContentType": NOT_ASCII}, lambda m: m.annotations["x-opt-lineside-content-type"], NOT_ASCII),
    ({"ContentType": ""}, lambda m: m.annotations["x-opt-lineside-content-type"], ""),
    ({"CorrelationData": b"\x00\xff\x80"}, lambda m: bytes(m.correlation_id), b"\x00\xff\x80"),
    ({"CorrelationData": b""}, lambda m: bytes(m.correlation_id), b""),
    ({"ResponseTopic": "app/1/answers"}, lambda m: m.reply_to, "app/1/answers"),
    ({"UserProperty": [("a", "1"), ("b", ""), ("", "c")]}, lambda m: user(m), {"a": "1", "b": "", "": "c"}),
    ({"UserProperty": [("ü", "ß" * 300)]}, lambda m: user(m), {"ü": "ß" * 300}),
    ({"UserProperty": [("b", "1"), ("a", "2"), ("b", "3")]}, lambda m: user(m), {"b": "3", "a": "2"}),
    ({"PayloadFormatIndicator": 1}, lambda m: m.annotations["x-opt-lineside-payload-format"], 1),
    ({"MessageExpiryInterval": 90}, lambda m: 80 < m.ttl <= 90, True),
    ({}, lambda m: m.ttl, 0),
]


def user(message: proton.Message) -> dict[str, Any]:
    return {k: v for k, v in (message.properties or {}).items() if k != "_AMQ_DUPL_ID"}


@HUBS
def test_every_property_of_mqtt_reaches_an_amqp_app_and_comes_back_as_it_was(rig: Rig) -> None:
    app, train = rig.app(), rig.train("commands/#")
    receiver = app.receiver(rig.prefix + "telemetry")
    for number, (properties, _, _) in enumerate(OUT):
        train.publish(f"train/{number}", b"%d" % number, **properties)
    back: list[proton.Message] = []
    for number, (_, see, expected) in enumerate(OUT):
        message = app.take(receiver)
        assert (message.subject, bytes(message.body)) == (f"train/{number}", b"%d" % number)
        assert message.durable
        assert see(message) == expected, OUT[number]
        back.append(message)
    for message in back:
        message.id = None  # another message with the same properties
        message.properties = user(message)
    app.send(rig.prefix + "commands", *back)
    for number, (properties, _, _) in enumerate(OUT):
        message = train.take()
        assert (message.topic, message.payload) == (f"commands/train/{number}", b"%d" % number)
        came = said(message)
        expiry = came.pop("MessageExpiryInterval", None)
        asked = properties.get("MessageExpiryInterval")
        assert (expiry is None) == (asked is None)
        assert expiry is None or 60 < expiry <= asked
        assert came == {k: v for k, v in properties.items() if k != "MessageExpiryInterval"}


# What an AMQP app says, and what an MQTT 5.0 app is told.
IN: list[tuple[proton.Message, bytes, dict[str, Any]]] = [
    (proton.Message(body=b"\x00\xff", inferred=True), b"\x00\xff", {}),
    (proton.Message(body="größe"), "größe".encode(), {}),
    (proton.Message(body=b"bytes in a value"), b"bytes in a value", {}),
    (proton.Message(body={"a": 1, "b": [True, None]}), b'{"a":1,"b":[true,null]}', {}),
    (proton.Message(body=None), b"", {}),
    (proton.Message(correlation_id="text"), b"", {"CorrelationData": b"text"}),
    (proton.Message(correlation_id=b"\x00\xff"), b"", {"CorrelationData": b"\x00\xff"}),
    (proton.Message(correlation_id=b""), b"", {"CorrelationData": b""}),
    (proton.Message(correlation_id=proton.ulong(2**63)), b"", {"CorrelationData": b"9223372036854775808"}),
    (
        proton.Message(correlation_id=uuid.UUID(int=1)),
        b"",
        {"CorrelationData": b"00000000-0000-0000-0000-000000000001"},
    ),
    (proton.Message(correlation_id="x" * 70_000), b"", {}),
    (
        proton.Message(reply_to="centre.answers"),
        b"",
        {"ResponseTopic": "centre.answers", "CorrelationData": correlation_data("11")},
    ),
    (proton.Message(reply_to="no+topic/#", correlation_id=b"1"), b"", {"CorrelationData": b"1"}),
    (proton.Message(content_type="text/plain"), b"", {"ContentType": "text/plain"}),
    (
        proton.Message(
            properties={
                "text": "ü",
                "empty": "",
                "bool": True,
                "int": proton.int32(-5),
                "ulong": proton.ulong(2**63),
                "double": 1.5,
                "float": proton.float32(0.5),
                "null": None,
                "bytes": b"\x01",
                "uuid": uuid.UUID(int=2),
                "time": proton.timestamp(1_700_000_000_000),
                "char": proton.char("c"),
                "symbol": proton.symbol("s"),
                "nul": "a\0b",
                "long": "x" * 70_000,
            }
        ),
        b"",
        {
            "UserProperty": [
                ("text", "ü"),
                ("empty", ""),
                ("bool", "true"),
                ("int", "-5"),
                ("ulong", "9223372036854775808"),
                ("double", "1.5"),
                ("float", "0.5"),
                ("null", ""),
                ("bytes", "\x01"),
                ("uuid", '"00000000-0000-0000-0000-000000000002"'),
                ("time", "1700000000000"),
                ("char", "c"),
                ("symbol", "s"),
                ("nul", "a\ufffdb"),
            ]
        },
    ),
]


@HUBS
def test_every_type_of_amqp_reaches_an_mqtt_app_and_none_harms_it(rig: Rig) -> None:
    app, train = rig.app(), rig.train("commands/#")
    ids: list[Any] = ["id", b"\x00\xff", uuid.UUID(int=3), proton.ulong(7), None]
    for number, (message, _, _) in enumerate(IN):
        message.id, message.subject, message.durable = ids[number % len(ids)], f"{number}", True
        if number >= len(ids) and message.id is not None:
            message.id = f"{number}"  # else it is the same message again
    app.send(rig.prefix + "commands", *(message for message, _, _ in IN))
    for number, (_, body, properties) in enumerate(IN):
        message = train.take()
        assert (message.topic, message.payload) == (f"commands/{number}", body), IN[number]
        assert said(message) == properties, IN[number]


@HUBS
def test_the_retain_flag_crosses_both_ways(rig: Rig) -> None:
    app, train = rig.app(), rig.train("commands/#")
    receiver = app.receiver(rig.prefix + "telemetry")
    train.publish("train/kept", b"kept", retain=True)
    train.publish("train/not", b"not")
    kept, plain = app.take(receiver), app.take(receiver)
    assert [(m.annotations or {}).get("x-opt-retain-message") for m in (kept, plain)] == [True, None]
    kept.id, plain.id, kept.properties, plain.properties = "k", "p", None, None
    app.send(rig.prefix + "commands", kept, plain)
    assert [train.take().retain for _ in range(2)] == [True, False]
    late = rig.train("commands/#", name="late")
    message = late.take()
    assert (message.topic, message.payload, message.retain) == ("commands/train/kept", b"kept", True)


@HUBS
def test_an_expiry_counts_down_in_the_tunnel_and_on_board(rig: Rig) -> None:
    app = rig.app()
    receiver = app.receiver(rig.prefix + "telemetry")
    train = rig.train("none")
    rig.line.cut(Line.CLOSED)
    harness.wait_until(lambda: rig.daemon.hub_state() != "up", WAIT_S, "the cut noticed")
    train.publish("train/short", b"short", MessageExpiryInterval=1)
    train.publish("train/long", b"long", MessageExpiryInterval=60)
    time.sleep(2.1)  # the tunnel is as long as that
    rig.line.restore()
    message = app.take(receiver)
    assert bytes(message.body) == b"long"
    assert 50 < message.ttl <= 58
    message.id, message.properties = "back", None
    app.send(rig.prefix + "commands", message)
    harness.wait_until(lambda: stored(rig, "commands") > 0, WAIT_S, "the message on board")
    time.sleep(1.1)
    late = rig.train("commands/#", name="late")
    assert 0 < late.take().properties.MessageExpiryInterval <= 57


def stored(rig: Rig, stream: str) -> int:
    return int(next(s for s in rig.daemon.status()["streams"] if s["name"] == stream)["rows"])


# ------------------------------------------------------------------ a request from the train


def answer(app: App, request: proton.Message, by_message_id: bool, body: bytes = b"12:00") -> None:
    name = request.id if by_message_id else request.correlation_id
    reply = proton.Message(body=body, inferred=True, correlation_id=name, durable=True, id=f"reply to {request.id}")
    app.send(request.reply_to, reply)


@HUBS
@pytest.mark.parametrize("by_message_id", [False, True], ids=["by correlation-id", "by message-id"])
def test_an_amqp_app_answers_a_request_of_an_mqtt_app(rig: Rig, by_message_id: bool) -> None:
    app, train = rig.app(), rig.train("app/1/#", "unmatched/#")
    receiver = app.receiver(rig.prefix + "requests")
    train.publish("ask/time", b"?", ResponseTopic="app/1/answers", CorrelationData=b"\x00\xff")
    request = app.take(receiver)
    assert request.reply_to == rig.prefix + "replies"
    answer(app, request, by_message_id)
    message = train.take()
    assert (message.topic, message.payload) == ("app/1/answers", b"12:00")
    assert said(message) == {"CorrelationData": b"\x00\xff"}


@HUBS
def test_a_reply_finds_back_after_a_power_cut_between_request_and_reply(rig: Rig) -> None:
    app, train = rig.app(), rig.train("app/1/#")
    receiver = app.receiver(rig.prefix + "requests")
    train.publish("ask/time", b"?", ResponseTopic="app/1/answers", CorrelationData=b"1")
    request = app.take(receiver)
    rig.daemon.kill()
    answer(app, request, False)
    rig.daemon.start()
    message = train.take()
    assert (message.topic, said(message)) == ("app/1/answers", {"CorrelationData": b"1"})


@HUBS
def test_a_request_that_expires_in_the_tunnel_is_not_sent_and_a_late_reply_is_an_ordinary_message(rig: Rig) -> None:
    app, train = rig.app(), rig.train("app/1/#", "unmatched/#")
    receiver = app.receiver(rig.prefix + "requests")
    ask = {"ResponseTopic": "app/1/answers", "CorrelationData": b"1"}
    train.publish("ask/late", b"?", MessageExpiryInterval=3, **ask)
    late = app.take(receiver)
    harness.wait_until(lambda: rig.daemon.waiting("requests") == 0, WAIT_S, "the request settled by the hub")
    rig.line.cut(Line.CLOSED)
    harness.wait_until(lambda: rig.daemon.hub_state() != "up", WAIT_S, "the cut noticed")
    train.publish("ask/lost", b"?", MessageExpiryInterval=1, **ask)
    train.publish("ask/kept", b"?", **ask)
    answer(app, late, False, b"too late")
    time.sleep(3.1)  # the tunnel is as long as that
    rig.line.restore()
    kept = app.take(receiver)
    assert kept.subject == "ask/kept"
    answer(app, kept, False, b"in time")
    got = [(m.topic, m.payload) for m in (train.take(), train.take())]
    assert got == [("unmatched/", b"too late"), ("app/1/answers", b"in time")]
    assert rig.daemon.status()["losses"] == 1


# ------------------------------------------------------------------ a request from the hub


@pytest.mark.parametrize("hub", ["lineside", "artemis"], indirect=True)
@pytest.mark.parametrize("dynamic", [False, True], ids=["a queue", "a dynamic address"])
def test_an_mqtt_app_answers_requests_of_an_amqp_app(answering: Rig, dynamic: bool) -> None:
    rig = answering
    app, train = rig.app(), rig.train("commands/#")
    if dynamic:
        receiver = app.connection.create_receiver(None, credit=100, dynamic=True)
        address = receiver.link.remote_source.address
    else:
        address = rig.prefix + "answers 100%"
        receiver = app.receiver(address)
    # Each: what the request names itself by, and what its answer has to name.
    names: list[tuple[dict[str, Any], Any]] = [
        ({"id": "text"}, "text"),
        ({"id": "an id", "correlation_id": "text"}, "text"),
        ({"id": uuid.UUID(int=5)}, uuid.UUID(int=5)),
        ({"id": proton.ulong(7)}, 7),
        ({"id": b"\x00\xff"}, b"\x00\xff"),
    ]
    for fields, _ in names:
        request = proton.Message(body=b"?", inferred=True, subject="state", reply_to=address, durable=True, **fields)
        app.send(rig.prefix + "commands", request)
    requests = [train.take() for _ in names]
    assert {request.topic for request in requests} == {"commands/state"}
    # Nothing has to be remembered between request and answer.
    rig.daemon.kill()
    rig.line.cut(Line.CLOSED)
    rig.daemon.start()
    harness.wait_until(train.client.is_connected, WAIT_S, "the app back")
    for number, request in enumerate(requests):
        asked = request.properties
        train.publish(asked.ResponseTopic, b"answer %d" % number, CorrelationData=asked.CorrelationData)
    rig.line.restore()
    for number, (_, name) in enumerate(names):
        message = app.take(receiver)
        correlation = message.correlation_id
        assert bytes(message.body) == b"answer %d" % number
        assert (bytes(correlation) if isinstance(name, bytes) else correlation) == name


@pytest.mark.parametrize("hub", ["lineside", "artemis"], indirect=True)
def test_an_answer_to_an_address_that_is_gone_holds_up_no_other(answering: Rig) -> None:
    rig = answering
    app, train = rig.app(), rig.train("commands/#")
    receiver = app.connection.create_receiver(None, credit=100, dynamic=True)
    address = receiver.link.remote_source.address
    gone = app.connection.create_receiver(None, credit=1, dynamic=True)
    nowhere = gone.link.remote_source.address
    gone.close()
    for reply_to in (nowhere, address):
        app.send(rig.prefix + "commands", proton.Message(id=reply_to, reply_to=reply_to, subject="x", durable=True))
    for _ in range(2):
        request = train.take().properties
        train.publish(request.ResponseTopic, b"!", CorrelationData=request.CorrelationData)
    assert app.take(receiver).correlation_id == address
    harness.wait_until(lambda: rig.daemon.waiting("answers") == 0, WAIT_S, "both settled")


@HUBS
def test_a_reply_address_that_is_known_beforehand_needs_no_more_than_a_stream(rig: Rig) -> None:
    """The way that is left with RabbitMQ before 4.0, which has no anonymous terminus."""
    app, train = rig.app(), rig.train("commands/#")
    address = rig.prefix + "fixed"
    receiver = app.receiver(address)
    request = proton.Message(id="1", correlation_id=b"7", reply_to=address, subject="x", durable=True)
    app.send(rig.prefix + "commands", request)
    asked = train.take().properties
    train.publish(asked.ResponseTopic, b"!", CorrelationData=asked.CorrelationData)
    assert bytes(app.take(receiver).correlation_id) == b"7"
