"""Apps that publish through power cuts and keep a record of their own: MQTT at QoS 1 and 2, and AMQP 1.0.

Each counts upwards, `NAME NUMBER` a message, at most WINDOW of them unanswered; it comes back by itself as soon as the
gateway does, and then sends what was not answered again, in order, as its protocol has it.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque

from gateway.amqp.engine import Engine, Sender
from gateway.amqp.events import OutcomeKind
from gateway.amqp.message import encode
from gateway.amqp.sasl import SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus

WINDOW = 50
RECONNECT_S = 0.03
CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, DUP = 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x08
PAD = b" " + b"." * 120


class App:
    """`acknowledged`: numbers that the gateway answered for. `heard` is set at each answer."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.acknowledged: set[int] = set()
        self.refused = 0
        self.next = 0
        self.heard = threading.Event()
        self.pausing = threading.Event()
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def payload(self, number: int) -> bytes:
        return b"%s %d" % (self.name.encode(), number) + PAD

    def _answered(self, number: int) -> None:
        self.acknowledged.add(number)
        self.heard.set()

    @property
    def unanswered(self) -> int:
        return self.next - len(self.acknowledged)

    def _run(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        self.stopped.set()
        self._thread.join(10)


class MqttPublisher(App):
    """MQTT 3.1.1 by hand over a blocking socket: paho forgets at a second failed reconnect that it has sent a PUBREL,
    publishes again, and so makes duplicates of its own at QoS 2 (4.4: the PUBREL is what is to be sent again).

    `_flying`: number by packet id, in the order of sending; `_released`: those whose PUBREC came.
    """

    def __init__(self, name: str, port: int, topic: str, qos: int) -> None:
        super().__init__(name, port)
        self._topic, self._qos = topic.encode(), qos
        self._flying: dict[int, int] = {}
        self._released: set[int] = set()

    def _run(self) -> None:
        while not self.stopped.wait(RECONNECT_S):
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                    self._talk(connection)
            except OSError:
                continue

    def _talk(self, connection: socket.socket) -> None:
        name = self.name.encode()
        connection.sendall(b"\x10%c\x00\x04MQTT\x04\x00\x00\x3c\x00%c%b" % (12 + len(name), len(name), name))
        assert _exactly(connection, 4)[0] == CONNACK
        again = [
            struct.pack("!BBH", PUBREL | 2, 2, packet_id) if packet_id in self._released
            else self._publish(packet_id, number, DUP)
            for packet_id, number in self._flying.items()
        ]  # fmt: skip
        connection.sendall(b"".join(again))
        connection.settimeout(0.005)
        received = b""
        while not self.stopped.is_set():
            new = []
            while len(self._flying) < WINDOW and not self.pausing.is_set():
                packet_id = self.next % 65535 + 1
                self._flying[packet_id] = self.next
                new.append(self._publish(packet_id, self.next, 0))
                self.next += 1
            connection.sendall(b"".join(new))
            try:
                data = connection.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            received += data
            released = []
            for at in range(0, len(received) - 3, 4):
                kind, _, packet_id = struct.unpack_from("!BBH", received, at)
                if kind == PUBREC:
                    self._released.add(packet_id)
                    released.append(struct.pack("!BBH", PUBREL | 2, 2, packet_id))
                else:
                    assert kind == (PUBCOMP if self._qos == 2 else PUBACK), kind
                    self._released.discard(packet_id)
                    self._answered(self._flying.pop(packet_id))
            received = received[len(received) // 4 * 4 :]
            connection.sendall(b"".join(released))

    def _publish(self, packet_id: int, number: int, dup: int) -> bytes:
        payload = self.payload(number)
        size = 2 + len(self._topic) + 2 + len(payload)
        assert 128 <= size < 16384
        head = struct.pack("!BBBH", PUBLISH | dup | self._qos << 1, size & 127 | 128, size >> 7, len(self._topic))
        return head + self._topic + struct.pack("!H", packet_id) + payload


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("closed")
        data += piece
    return data


class AmqpPublisher(App):
    """Over our own engine and a blocking socket; what was not settled is sent again on the next connection."""

    def __init__(self, name: str, port: int, address: str) -> None:
        super().__init__(name, port)
        self._address = address
        self._unsettled: dict[int, bytes] = {}

    def _run(self) -> None:
        while not self.stopped.wait(RECONNECT_S):
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                    connection.settimeout(0.005)
                    self._talk(connection)
            except OSError:
                continue

    def _talk(self, connection: socket.socket) -> None:
        engine = Engine(server=False, container=self.name, hostname="127.0.0.1", sasl=SaslClient(["ANONYMOUS"]))
        engine.open()
        sender = engine.sender(
            engine.session(), self.name, Terminus(self._address, Durability.UNSETTLED_STATE, Expiry.NEVER)
        )
        waiting = deque(self._unsettled.items())
        while not self.stopped.is_set():
            if out := engine.data_to_send():
                connection.sendall(out)
            try:
                data = connection.recv(65536)
            except TimeoutError:
                data = None
            if data == b"":
                return
            if data:
                engine.receive(data, time.monotonic())
                engine.take_events()
            self._settle(sender)
            batch = []
            for _ in range(max(0, min(sender.capacity, WINDOW - sender.unsettled))):
                if waiting:
                    batch.append(waiting.popleft())
                elif not self.pausing.is_set():
                    number = self.next
                    self.next += 1
                    self._unsettled[number] = encode(self.payload(number))
                    batch.append((number, self._unsettled[number]))
            sender.send(batch)

    def _settle(self, sender: Sender) -> None:
        for outcome in sender.take_outcomes():
            settled = [n for n in self._unsettled if n <= outcome.seq][: outcome.count]
            for number in settled:
                if outcome.kind is OutcomeKind.ACCEPTED:
                    self._answered(number)
                else:
                    self.refused += 1
                del self._unsettled[number]
