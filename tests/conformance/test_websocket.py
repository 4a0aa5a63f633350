"""MQTT over WebSocket: chapter 6 of 3.1.1 and 5.0."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tests import websocket as ws
from tests.conformance import client as mqtt
from tests.conformance.client import Client, fresh
from tests.daemon import Daemon, free_port

CONFIG = """
[gateway]
id = "conformance"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}", "ws://127.0.0.1:WS"]
"""


class WebSocket:
    """A stream of bytes over a WebSocket: one binary frame for each `sendall`, whatever frames come back."""

    def __init__(self, port: int, **headers: str | None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), mqtt.WAIT_S)
        self.socket.sendall(ws.request(**headers))
        self.raw = b""
        while b"\r\n\r\n" not in self.raw:
            more = self.socket.recv(4096)
            if not more:
                break
            self.raw += more
        head, _, self.raw = self.raw.partition(b"\r\n\r\n")
        self.status, *lines = head.decode("latin-1").split("\r\n")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.closed_with: int | None = None

    def sendall(self, data: bytes) -> None:
        self.socket.sendall(ws.frame(ws.BINARY, data, mask=os.urandom(4)))

    def _frame(self) -> ws.Frame | None:
        while True:
            if len(self.raw) >= 2:
                length, at = self.raw[1] & 127, 2
                if length >= 126:
                    at = 4 if length == 126 else 10
                    length = int.from_bytes(self.raw[2:at])
                if len(self.raw) >= at + length:
                    (found,) = ws.frames(self.raw[: at + length])
                    self.raw = self.raw[at + length :]
                    return found
            more = self.socket.recv(65536)
            if not more:
                return None
            self.raw += more

    def recv(self, size: int) -> bytes:
        while (got := self._frame()) is not None:
            if got.opcode == ws.CLOSE:
                self.closed_with = got.code
                self.socket.sendall(ws.frame(ws.CLOSE, got.payload[:2]))
            elif got.opcode != ws.PONG:
                assert got.opcode in (ws.BINARY, ws.CONTINUATION), f"an MQTT server sent a frame of type {got.opcode}"
                return got.payload
        return b""

    def settimeout(self, timeout: float | None) -> None:
        self.socket.settimeout(timeout)

    def close(self) -> None:
        self.socket.close()


Open = Callable[..., WebSocket]


@pytest.fixture(scope="module")
def ws_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    daemon = Daemon(tmp_path_factory.mktemp("websocket"), CONFIG.replace("WS", str(port)))
    try:
        daemon.status()
        yield port
    finally:
        daemon.end()


@pytest.fixture
def opened(ws_port: int) -> Iterator[Open]:
    opened: list[WebSocket] = []

    def open_one(**headers: str | None) -> WebSocket:
        opened.append(WebSocket(ws_port, **headers))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def test_the_subprotocol_mqtt_is_selected(opened: Open) -> None:
    for offered in ("mqtt", "mqttv3.1, mqtt", "mqtt, other"):
        stream = opened(sec_websocket_protocol=offered)
        assert stream.status.startswith("HTTP/1.1 101")
        assert stream.headers["sec-websocket-protocol"] == "mqtt"
        assert stream.headers["sec-websocket-accept"] == ws.ACCEPT


def test_without_the_subprotocol_mqtt_there_is_no_connection(opened: Open) -> None:
    for offered in (None, "chat"):
        assert not opened(sec_websocket_protocol=offered).status.startswith("HTTP/1.1 101")


def test_packets_and_frames_need_not_align(version: int, opened: Open) -> None:
    stream = opened()
    client, topic = Client(0, version, stream), fresh("frames/")
    for byte in mqtt.connect(version, fresh()):
        client.say(bytes((byte,)))
    client.expect(mqtt.CONNACK, reason=0)
    whole = mqtt.subscribe(version, 1, (topic, 1)) + mqtt.publish(version, topic, bytes(70_000)) + mqtt.PINGREQ_BYTES
    client.say(whole[:5])
    client.say(b"")
    client.say(whole[5:])
    heard = [client.hear() for _ in range(3)]
    assert {each.kind for each in heard} == {mqtt.SUBACK, mqtt.PUBLISH, mqtt.PINGRESP}
    assert [each.payload for each in heard if each.kind == mqtt.PUBLISH] == [bytes(70_000)]


def test_a_message_of_many_frames_is_one_stream_of_bytes(version: int, opened: Open) -> None:
    stream = opened()
    client = Client(0, version, stream)
    packet = mqtt.connect(version, fresh())
    stream.socket.sendall(ws.frame(ws.BINARY, packet[:3], fin=False))
    stream.socket.sendall(ws.frame(ws.PING, b"still here?"))
    stream.socket.sendall(ws.frame(ws.CONTINUATION, packet[3:]))
    client.expect(mqtt.CONNACK, reason=0)


def test_a_text_frame_closes_the_connection(version: int, opened: Open) -> None:
    for payload in (b"hello", mqtt.PINGREQ_BYTES):
        stream = opened()
        client = Client(0, version, stream)
        assert client.connect().reason == 0
        stream.socket.sendall(ws.frame(ws.TEXT, payload))
        assert all(each.kind == mqtt.DISCONNECT for each in client.expect_close())
        assert stream.closed_with in (1003, 1002, 1007, None)


def test_a_whole_exchange_over_websocket(version: int, opened: Open) -> None:
    listener, speaker = Client(0, version, opened()), Client(0, version, opened())
    listener.connect()
    speaker.connect()
    topic = fresh("ws/")
    listener.subscribe(topic, qos=2)
    for qos in (0, 1, 2):
        speaker.publish(topic, b"x", qos)
        listener.message(b"x", qos=qos, topic=topic)
    speaker.say(b"\xe0\x00")
    assert speaker.expect_close() == []
