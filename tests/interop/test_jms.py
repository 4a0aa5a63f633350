"""MQTT app → Lineside → Artemis → JMS consumer, and the reverse, through three tunnels, every property looked at.

20,000 messages each way; LINESIDE_JMS_MESSAGES=100000 for the long run. Prints its figures (pytest -s shows them).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus
from uuid import UUID

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proton import (
    Data,
    Message,
    byte,
    char,
    float32,
    int32,
    short,
    symbol,
    timestamp,
    ubyte,
    uint,
    ulong,
    ushort,
)

from gateway.faultlink import Line
from tests import parts
from tests.conftest import require
from tests.interop import harness
from tests.pki import Pki

MESSAGES = int(os.environ.get("LINESIDE_JMS_MESSAGES", "20000"))
TIMEOUT_S = 120 + MESSAGES // 200
TUNNELS = 3
DARK_S = 1.0
ENDS = Path(__file__).resolve().parent / "jms" / "Ends.java"

CONFIG = """
[gateway]
id = "loco-4711"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
[amqp]
listen = ["127.0.0.1:{amqp}"]
[[hub]]
name = "centre"
urls = ["amqps://127.0.0.1:{line}"]
kind = "artemis"
ca = "{ca}"
cert = "{cert}"
key = "{key}"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "centre"
address = "jms.{number}.telemetry"
[[inbound]]
stream = "commands"
hub = "centre"
address = "jms.{number}.commands"
topic = "commands/{{subject}}"
"""

_numbers = itertools.count()


class Ends:
    """One run of Ends.java; what it tells of each message as a dict."""

    def __init__(self, port: int, what: str, queue: str, count: int) -> None:
        command = [
            "java",
            "-XX:+UseSerialGC",
            "-cp",
            f"{parts.qpid_jms_lib()}/*",
            str(ENDS),
            f"amqp://127.0.0.1:{port}",
        ]
        self.lines: list[str] = []
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            [*command, what, queue, str(count)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()

    def attached(self) -> Ends:
        with self._more:
            assert self._more.wait_for(lambda: bool(self.lines), 60), "nothing from Java within 60 s"
        assert self.lines[0] == "attached", self.lines
        return self

    def told(self, timeout_s: float) -> list[dict[str, str]]:
        status = self.process.wait(timeout_s)
        self._reader.join(60)
        assert status == 0, self.lines[-20:]
        assert self.lines[-1] == "ended", self.lines[-20:]
        return [_fields(line) for line in self.lines if line not in ("attached", "ended")]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(60)


def _fields(line: str) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in line.split(" "))
    return {unquote_plus(name): unquote_plus(value) for name, _, value in pairs}


class Rig:
    """Artemis, a line to it, a gateway that has just started; `number` keeps one test's addresses from another's."""

    def __init__(self, artemis: parts.Artemis, pki: Pki, directory: Path) -> None:
        assert artemis.tls_port is not None
        self.artemis = artemis
        number = next(_numbers)
        self.out, self.into = f"jms.{number}.telemetry", f"jms.{number}.commands"
        self.loop = harness.Loop()
        self.line = harness.BrokenLine(self.loop, artemis.tls_port)
        self.mqtt_port, self.amqp_port = parts.free_port(), parts.free_port()
        self.daemon = harness.Daemon(
            directory,
            CONFIG.format(
                state=directory / "state",
                mqtt=self.mqtt_port,
                amqp=self.amqp_port,
                line=self.line.port,
                ca=pki.ca,
                cert=pki.client.cert,
                key=pki.client.key,
                number=number,
            ),
        )
        self.ends: list[Ends] = []

    def start(self) -> None:
        self.daemon.start()
        harness.wait_until(lambda: self.daemon.hub_state() == "up", 20, "the link to the hub")

    def run(self, what: str, queue: str, count: int, port: int | None = None) -> Ends:
        ends = Ends(port or self.artemis.port, what, queue, count)
        self.ends.append(ends)
        return ends

    def through_tunnels(self, every_bytes: int, unfinished: Callable[[], bool]) -> None:
        """Three of them, the second in the middle of a frame; nobody sends a FIN."""
        for number in range(TUNNELS):
            until = self.line.forwarded_bytes + every_bytes
            harness.wait_until(lambda until=until: self.line.forwarded_bytes >= until, 60, "messages on the line")  # type: ignore[misc]
            if number == 1:
                self.line.cut_mid_frame(777)
            else:
                self.line.cut(Line.TUNNEL)
            time.sleep(DARK_S)
            self.line.restore()
            assert unfinished(), "the tunnel came too late to prove anything"

    def close(self) -> None:
        for ends in self.ends:
            ends.close()
        self.daemon.stop()
        self.line.close()
        self.loop.close()


@pytest.fixture
def rig(artemis: parts.Artemis, pki: Pki, tmp_path: Path) -> Iterator[Rig]:
    require("qpid-jms")
    rig = Rig(artemis, pki, tmp_path)
    try:
        rig.start()
        yield rig
    finally:
        rig.close()


# ------------------------------------------------------------------ MQTT to JMS


def _string(text: bytes) -> bytes:
    return struct.pack("!H", len(text)) + text


class Publisher(harness.Publisher):
    """As the harness's, with MQTT 5 and properties that follow from the number."""

    def _session(self) -> None:
        with socket.create_connection((harness.HOST, self._port), 5) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"\x10\x17\0\x04MQTT\x05\0\x02\x58\0" + _string(b"publisher5"))
            kind, size = sock.recv(2, socket.MSG_WAITALL)
            connack = sock.recv(size, socket.MSG_WAITALL)
            assert (kind, connack[1]) == (0x20, 0)
            self.reconnects += 1
            self._publish(sock)

    def _encoded(self, number: int) -> bytes:
        properties = (
            b"\x03" + _string(b"text/plain")
            + b"\x08" + _string(b"answers/%d" % number)
            + b"\x09" + _string(number.to_bytes(8, "big"))
            + b"\x26" + _string(b"number") + _string(b"%d" % number)
            + b"\x26" + _string(b"text") + _string("ä€".encode())
        )  # fmt: skip
        again = 8 if number < self._sent_ever else 0
        head = _string(self._topic) + struct.pack("!H", number % harness.PACKET_IDS + 1)
        assert len(properties) < 128
        body = head + bytes((len(properties),)) + properties + b"%d" % number
        assert len(body) < 16384
        size = bytes((len(body) & 127 | 128, len(body) >> 7)) if len(body) > 127 else bytes((len(body),))
        return bytes((0x32 | again,)) + size + body


ID = re.compile(r"(?:ID:AMQP_NO_PREFIX:)?(loco-4711:[0-9a-f]+\.[0-9a-f]{6}:telemetry:([0-9a-f]{12}))")


def _wanted_at_jms(number: int) -> dict[str, str]:
    return {
        "body": f"text:{number}",  # by its content type
        "type": "train/speed",
        "correlation": f"ID:AMQP_BINARY:{number.to_bytes(8, 'big').hex().upper()}",
        "reply-to": f"answers/{number}",
        "priority": "4",
        "durable": "true",
        "expires": "0",
        "created": "0",
        "p:number": f"String:{number}",
        "p:text": "String:ä€",
        "p:JMSXDeliveryCount": "Integer:1",
    }


@pytest.mark.timeout(TIMEOUT_S)
def test_what_mqtt_apps_publish_reaches_a_jms_consumer_whole_and_in_order_through_three_tunnels(rig: Rig) -> None:
    consumer = rig.run("consume", rig.out, MESSAGES).attached()
    publisher = Publisher(rig.mqtt_port, "train/speed", MESSAGES)
    began = time.monotonic()
    with harness.closing(publisher):
        publisher.start()
        rig.through_tunnels(MESSAGES * 50, lambda: rig.daemon.waiting("telemetry") > 0)
        publisher.finish(TIMEOUT_S)
    told = consumer.told(TIMEOUT_S)
    took_s = time.monotonic() - began
    tally = harness.Tally.of([int(m["body"].removeprefix("text:")) for m in told], MESSAGES)
    print(f"\nMQTT → JMS: {MESSAGES} messages, {TUNNELS} tunnels, {took_s:.1f} s: {tally}")
    # Artemis drops what it has had already.
    assert tally == harness.Tally(lost=0, reordered=0, duplicates=0)
    for number, message in enumerate(told):
        found = ID.fullmatch(message.pop("id"))
        assert found is not None
        assert int(found[2], 16) == number + 1
        assert message.pop("p:_AMQ_DUPL_ID") == f"String:{found[1]}"
        assert message == _wanted_at_jms(number)


SHAPES: list[tuple[str, bytes, dict[str, Any], dict[str, str]]] = [
    ("train/plain", b"plain", {}, {"body": "bytes:706c61696e"}),
    ("train/empty", b"", {}, {"body": "bytes:"}),
    ("train/ä €/🚂", bytes(range(256)), {}, {"body": f"bytes:{bytes(range(256)).hex()}"}),
    ("train/large", b"x" * 300_000, {}, {"body": f"bytes:{'78' * 300_000}"}),
    ("train/json", b"{}", {"ContentType": "application/json"}, {"body": "text:{}"}),
    (
        "train/all",
        b"all",
        {
            "ContentType": "application/octet-stream",
            "CorrelationData": b"\0\xff",
            "ResponseTopic": "answers/all",
            "MessageExpiryInterval": 3600,
            "UserProperty": [("a", "1"), ("a-b", "ä€🚂"), ("empty", "")],
        },
        {
            "body": "bytes:616c6c",
            "correlation": "ID:AMQP_BINARY:00FF",
            "reply-to": "answers/all",
            "p:a": "String:1",
            "p:a-b": "String:ä€🚂",
            "p:empty": "String:",
        },
    ),
]


def test_every_shape_of_mqtt_message_is_at_a_jms_consumer_what_it_was(rig: Rig) -> None:
    consumer = rig.run("consume", rig.out, len(SHAPES)).attached()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="shapes", protocol=MQTTProtocolVersion.MQTTv5)
    client.connect("127.0.0.1", rig.mqtt_port)
    client.loop_start()
    for topic, payload, properties, _ in SHAPES:
        packed = Properties(PacketTypes.PUBLISH)
        for name, value in properties.items():
            setattr(packed, name, value)
        client.publish(topic, payload, qos=1, properties=packed).wait_for_publish(20)
    now_ms = time.time() * 1000
    client.disconnect()
    client.loop_stop()
    told = consumer.told(90)
    assert len(told) == len(SHAPES)
    for message, (topic, _, properties, wanted) in zip(told, SHAPES, strict=True):
        assert ID.fullmatch(message.pop("id"))
        assert message.pop("p:_AMQ_DUPL_ID")
        ttl_ms = 1000 * properties.get("MessageExpiryInterval", 0)
        expires = int(message.pop("expires"))
        assert abs(expires - (now_ms + ttl_ms)) < 30_000 if ttl_ms else expires == 0
        rest = {"type": topic, "priority": "4", "durable": "true", "created": "0", "p:JMSXDeliveryCount": "Integer:1"}
        assert message == rest | wanted


# ------------------------------------------------------------------ JMS to MQTT


class Subscriber:
    """An MQTT 5 app that keeps payload, topic and properties of all it gets."""

    def __init__(self, port: int, filter_: str) -> None:
        self.got: list[paho.MQTTMessage] = []
        subscribed = threading.Event()
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="subscriber", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.on_connect = lambda *_: client.subscribe(filter_, qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _client, _data, message: self.got.append(message)
        client.connect("127.0.0.1", port)
        client.loop_start()
        assert subscribed.wait(10), "no subscription within 10 s"

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def _properties(message: paho.MQTTMessage) -> dict[str, Any]:
    assert message.properties is not None
    return {
        k: v for k, v in vars(message.properties).items() if k not in ("packetType", "types", "names", "properties")
    }


@pytest.mark.timeout(TIMEOUT_S)
def test_what_jms_apps_send_reaches_an_mqtt_subscriber_whole_and_in_order_through_three_tunnels(rig: Rig) -> None:
    subscriber = Subscriber(rig.mqtt_port, "commands/#")
    began = time.monotonic()
    with harness.closing(subscriber):
        producer = rig.run("produce", rig.into, MESSAGES)
        rig.through_tunnels(MESSAGES * 40, lambda: len(subscriber.got) < MESSAGES)
        assert producer.told(TIMEOUT_S) == []
        harness.wait_until(lambda: len(subscriber.got) >= MESSAGES, TIMEOUT_S, "all commands")
        took_s = time.monotonic() - began
        time.sleep(0.5)
    tally = harness.Tally.of([int(m.payload) for m in subscriber.got], MESSAGES)
    print(f"\nJMS → MQTT: {MESSAGES} messages, {TUNNELS} tunnels, {took_s:.1f} s: {tally}")
    assert tally == harness.Tally(lost=0, reordered=0, duplicates=0)
    for number, message in enumerate(subscriber.got):
        assert (message.topic, message.qos, message.retain) == ("commands/go", 1, False)
        found = _properties(message)
        found["UserProperty"] = sorted(found["UserProperty"])
        assert found == {
            "CorrelationData": b"c-%d" % number,
            "UserProperty": [
                ("even", "true" if number % 2 == 0 else "false"),
                ("long", str(number << 32)),
                ("number", str(number)),
                ("text", f"ä€{number}"),
            ],
        }


def _compare(sent: list[dict[str, str]], told: list[dict[str, str]], *added: str) -> None:
    """Field by field; a consumer sees a delivery count, too, and what is in `added`."""
    assert [m["type"] for m in told] == [f"shape/{n}" for n in range(8)]
    for before, after in zip(sent, told, strict=True):
        assert after.pop("p:JMSXDeliveryCount") == "Integer:1"
        for name in added:
            after.pop(name)
        before.pop("p:JMSXDeliveryCount", None)
        assert after == before


def test_every_shape_of_jms_message_from_the_hub_is_at_a_local_jms_consumer_what_it_was(rig: Rig) -> None:
    consumer = rig.run("consume", "commands/#", 8, rig.amqp_port).attached()
    sent = rig.run("shapes", rig.into, 0).told(90)
    _compare(sent, consumer.told(90))


def test_every_shape_of_jms_message_from_a_local_app_is_at_the_hubs_jms_consumer_what_it_was(rig: Rig) -> None:
    consumer = rig.run("consume", rig.out, 8).attached()
    sent = rig.run("shapes", "train/shapes", 0, rig.amqp_port).told(90)
    # Each shape has a priority of its own, and Artemis hands out the higher one of two that wait.
    _compare(sent, sorted(consumer.told(90), key=lambda m: m["type"]), "p:_AMQ_DUPL_ID")


# ------------------------------------------------------------------ section by section

HEADER, DELIVERY, ANNOTATIONS, PROPERTIES, APPLICATION, FOOTER = 0x70, 0x71, 0x72, 0x73, 0x74, 0x78


def _section(code: int, fill: Callable[[Data], Any]) -> bytes:
    data = Data()
    data.put_described()
    data.enter()
    data.put_ulong(code)
    fill(data)
    data.exit()
    return bytes(data.encode())


def _value(value: Any) -> Callable[[Data], Any]:
    return lambda data: data.put_object(value)


def _list(*puts: Callable[[Data], Any]) -> Callable[[Data], Any]:
    def fill(data: Data) -> None:
        data.put_list()
        data.enter()
        for put in puts:
            put(data)
        data.exit()

    return fill


def _sections(body: bytes) -> list[tuple[int, bytes]]:
    found = []
    while body:
        data = Data()
        size = data.decode(body)
        data.rewind()
        data.next()
        data.enter()
        data.next()
        found.append((int(data.get_object()), body[:size]))
        body = body[size:]
    return found


def _map_of(section: bytes) -> dict[Any, Any]:
    data = Data()
    data.decode(section)
    data.rewind()
    data.next()
    found = data.get_object().value
    assert isinstance(found, dict)
    return found


_ALL_PROPERTIES = _list(
    lambda d: d.put_uuid(UUID("7b5a2bd0-7e0c-4b0e-9a39-0f5a2a4f7d11")),
    lambda d: d.put_binary(b"user"),
    lambda d: d.put_string("to/address"),
    lambda d: d.put_string("go"),
    lambda d: d.put_string("reply/to"),
    lambda d: d.put_ulong(2**64 - 1),
    lambda d: d.put_symbol("text/plain"),
    lambda d: d.put_symbol("gzip"),
    lambda d: d.put_timestamp(4_102_444_800_000),
    lambda d: d.put_timestamp(1_700_000_000_123),
    lambda d: d.put_string("group"),
    lambda d: d.put_uint(7),
    lambda d: d.put_string("reply group"),
)
_ALL_TYPES: dict[str, Any] = {
    "null": None, "true": True, "ubyte": ubyte(255), "ushort": ushort(65535), "uint": uint(2**32 - 1),
    "ulong": ulong(2**64 - 1), "byte": byte(-128), "short": short(-32768), "int": int32(-(2**31)), "long": -(2**63),
    "float": float32(1.5), "double": 0.1, "char": char("€"), "timestamp": timestamp(1_700_000_000_123),
    "uuid": UUID(int=5), "binary": b"\0\xff", "string": "ä€🚂", "symbol": symbol("sym"),
}  # fmt: skip
_DEEP: dict[str, Any] = {"list": [1, "two", [3.0, None]], "map": {"a": {"b": b"c"}}}

# What an app's message may look like: the sections of the bare message and its footer (part 3.2), as bytes.
BARE: list[list[bytes]] = [
    [_section(PROPERTIES, _ALL_PROPERTIES), _section(APPLICATION, _value(_ALL_TYPES)), _section(0x75, _value(b"data"))],
    [_section(PROPERTIES, _list(lambda d: d.put_binary(b"\0\1"), *[lambda d: d.put_null()] * 2,
                                lambda d: d.put_string("go"))), _section(0x77, _value(_DEEP))],
    [_section(PROPERTIES, _list(*[lambda d: d.put_null()] * 3, lambda d: d.put_string("go"))),
     _section(0x76, _value([1, "a"])), _section(0x76, _value([symbol("b"), None]))],
    [_section(PROPERTIES, _list(lambda d: d.put_string("id-4"), *[lambda d: d.put_null()] * 2,
                                lambda d: d.put_string("go"))),
     _section(0x75, _value(b"one")), _section(0x75, _value(b"two")),
     _section(FOOTER, _value({symbol("x-opt-sum"): uint(42)}))],
    [_section(PROPERTIES, _list(lambda d: d.put_ulong(5), *[lambda d: d.put_null()] * 2,
                                lambda d: d.put_string("go"))), _section(0x77, _value("x" * 300_000))],
]  # fmt: skip
_HEADER = _section(HEADER, _list(lambda d: d.put_bool(True), lambda d: d.put_ubyte(9)))
_NOTES = _section(ANNOTATIONS, _value({symbol("x-opt-mine"): "note", symbol("x-opt-list"): [1, 2]}))


def _judge(body: bytes, bare: list[bytes], *, stamped: bool) -> None:
    """`stamped`: from a local app, so that the gateway's identity was added where AMQP allows it."""
    sections = _sections(body)
    by_code = dict(sections)
    header = Message()
    header.decode(body)
    assert (header.durable, header.priority) == (True, 9)
    notes = _map_of(by_code[ANNOTATIONS])
    assert notes["x-opt-mine"] == "note"
    assert notes["x-opt-list"] == [1, 2]
    assert ("x-opt-lineside-id" in notes) == stamped
    got = [section for section in sections if section[0] not in (HEADER, DELIVERY, ANNOTATIONS)]
    wanted = [(code, raw) for part in bare for code, raw in _sections(part)]
    if stamped:
        properties = _map_of(by_code[APPLICATION])
        identity = properties.pop("_AMQ_DUPL_ID")
        assert identity == notes["x-opt-lineside-id"]
        sent = next((_map_of(raw) for code, raw in wanted if code == APPLICATION), {})
        assert properties == sent
        assert {k: type(v) for k, v in properties.items()} == {k: type(v) for k, v in sent.items()}
        got, wanted = ([s for s in each if s[0] != APPLICATION] for each in (got, wanted))
    assert got == wanted, "byte for byte"


def test_every_section_of_a_local_apps_message_is_at_the_hub_what_it_was(rig: Rig) -> None:
    rig.loop.run(harness.put(rig.amqp_port, "train/raw", [_HEADER + _NOTES + b"".join(bare) for bare in BARE]))
    bodies = rig.loop.run(harness.take(rig.artemis.port, rig.out, len(BARE)))
    for body, bare in zip(bodies, BARE, strict=True):
        _judge(body, bare, stamped=True)


def test_every_section_of_a_message_from_the_hub_is_at_a_local_app_what_it_was(rig: Rig) -> None:
    attached = threading.Event()
    taking = harness.take(rig.amqp_port, "commands/go", len(BARE), attached=attached)
    taken = asyncio.run_coroutine_threadsafe(taking, rig.loop.loop)
    assert attached.wait(20)
    rig.loop.run(harness.put(rig.artemis.port, rig.into, [_HEADER + _NOTES + b"".join(bare) for bare in BARE]))
    for body, bare in zip(taken.result(60), BARE, strict=True):
        _judge(body, bare, stamped=False)
