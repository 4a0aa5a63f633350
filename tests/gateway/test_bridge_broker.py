"""The bridge with a broker that is a script: what it makes of answers that a real one gives only now and then."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.mqtt import codec
from gateway.mqtt.packets import Connack, Connect, Packet, Publish, Suback, Subscribe
from tests.daemon import WAIT_S, Daemon, wait_until

CONFIG = """
[gateway]
id = "loco"
state_dir = "{{state}}"
[bridge]
url = "mqtt://127.0.0.1:{broker}"
version = "{version}"
topics = ["train/#", "alarm/#", "door/#"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "telemetry"
topics = ["train/#", "alarm/#", "door/#"]
hub = "depot"
address = "edge"
"""
IN_USE, NOT_AUTHORIZED, UNSPECIFIED = 0x91, 0x87, 0x80


class Broker:
    def __init__(self, version: int) -> None:
        self.version = version
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_S)
        self.port = int(self._listener.getsockname()[1])
        self._socket: socket.socket | None = None
        self._bytes = b""

    def accept(self) -> None:
        """Take a connection, and its CONNECT."""
        self._socket, _ = self._listener.accept()
        self._socket.settimeout(WAIT_S)
        assert isinstance(self._hear(), Connect)
        self.say(Connack(True))

    def say(self, packet: Packet) -> None:
        assert self._socket is not None
        self._socket.sendall(codec.encode(packet, self.version))

    def subscribe(self) -> Subscribe:
        """The next SUBSCRIBE; whatever comes before it is of no interest here."""
        while not isinstance(packet := self._hear(), Subscribe):
            pass
        return packet

    def _hear(self) -> Packet:
        head = self._exactly(2)
        while head[-1] & 0x80:
            head += self._exactly(1)
        length = sum((byte & 0x7F) << 7 * n for n, byte in enumerate(head[1:]))
        return codec.decode(head + self._exactly(length), self.version)

    def _exactly(self, size: int) -> bytes:
        assert self._socket is not None
        while len(self._bytes) < size:
            data = self._socket.recv(1 << 16)
            assert data, "the bridge hung up"
            self._bytes += data
        taken, self._bytes = self._bytes[:size], self._bytes[size:]
        return taken

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()


@pytest.fixture(params=["5.0", "3.1.1"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def broker(version: str) -> Iterator[Broker]:
    broker = Broker(5 if version == "5.0" else 4)
    yield broker
    broker.close()


@pytest.fixture
def daemon(tmp_path: Path, broker: Broker, version: str) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, CONFIG.format(broker=broker.port, version=version))
    yield daemon
    daemon.end()


def error_of(daemon: Daemon) -> Callable[[], Any]:
    def error() -> Any:
        bridge = daemon.status()["bridge"]
        assert isinstance(bridge, dict)
        return bridge["error"]

    return error


def filters(packet: Subscribe) -> list[str]:
    return [each.filter for each in packet.subscriptions]


def test_what_the_broker_refuses_is_asked_for_again_and_nothing_else_until_it_is_granted(
    daemon: Daemon, broker: Broker, version: str
) -> None:
    broker.accept()
    error = error_of(daemon)
    first = broker.subscribe()
    assert filters(first) == ["train/#", "alarm/#", "door/#"]
    refusal = IN_USE if version == "5.0" else UNSPECIFIED
    broker.say(Suback(first.packet_id, (1, refusal, refusal)))
    wait_until(error)
    again = broker.subscribe()
    assert filters(again) == ["alarm/#", "door/#"]
    assert again.packet_id != first.packet_id
    broker.say(Suback(again.packet_id, (refusal, 1)))
    third = broker.subscribe()
    assert filters(third) == ["alarm/#"]
    broker.say(Suback(third.packet_id, (1,)))
    wait_until(lambda: error() is None)
    broker.say(Publish("alarm/door", b"open", qos=1, packet_id=1))
    wait_until(lambda: daemon.rows() == 1)
    assert daemon.log.read_text().count("bridge subscribed in part") == 2
    daemon.wait_for_log('lineside.bridge "bridge subscribed"')


@pytest.mark.parametrize("version", ["5.0"])
@pytest.mark.parametrize(
    ("reason", "told"), [(NOT_AUTHORIZED, "allow it in its access rules"), (IN_USE, "Packet identifier in use")]
)
def test_the_brokers_reason_for_a_refusal_is_told(daemon: Daemon, broker: Broker, reason: int, told: str) -> None:
    broker.accept()
    broker.say(Suback(broker.subscribe().packet_id, (1, 1, reason)))
    error = error_of(daemon)
    wait_until(error)
    assert error() == f"the broker does not let us read door/#: {told}"
