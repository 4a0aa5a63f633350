"""A real daemon and a real client of it, for tests: started here, ended here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from gateway.control_client import ControlError, DaemonStopped, request

WAIT_S = 45.0  # for what comes at once on a machine with nothing else to do

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{hub_port}"]
kind = "lineside"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
"""

HUB_CONFIG = """
[gateway]
id = "depot"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}"]
[amqp]
listen = ["127.0.0.1:{hub_port}"]
[local]
when_full = "refuse"
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def read_to_the_end(sock: socket.socket) -> bytes:
    """However it ends."""
    data = b""
    try:
        while piece := sock.recv(1 << 16):
            data += piece
    except ConnectionError:
        pass
    return data


def wait_until(
    condition: Callable[[], object], within_s: float = WAIT_S, what: Callable[[], str] | None = None
) -> None:
    """For what has no event here, such as another process' state; `what` is asked when it is too late."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, what() if what else f"not within {within_s:g} s"
        time.sleep(0.02)


class Daemon:
    """`hub_port`: where its hub is, or, with HUB_CONFIG, where it listens as one; 1 is nobody."""

    def __init__(
        self, directory: Path, config: str = CONFIG, hub_port: int = 1, state: Path | None = None, **environment: str
    ) -> None:
        self.port = free_port()
        self.state = state or directory / "state"
        self.config = directory / "lineside.toml"
        self.config.write_text(config.format(state=self.state, port=self.port, hub_port=hub_port))
        self.log = directory / "log"
        self.environment = environment
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | self.environment,
            )
        return self.process

    def status(self) -> dict[str, object]:
        end = time.monotonic() + WAIT_S
        while True:
            try:
                return request(self.state, "status")
            except (DaemonStopped, ControlError):
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.02)

    def stream(self, name: str = "telemetry") -> dict[str, int]:
        streams = self.status()["streams"]
        assert isinstance(streams, list)
        return next(dict(s) for s in streams if s["name"] == name)

    def rows(self) -> int:
        return self.stream()["rows"]

    def wait_for_log(self, text: str) -> None:
        wait_until(lambda: text in self.log.read_text(), what=self.log.read_text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It stands still: who is to hear of something from the start can be made ready meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Client:
    def __init__(self, port: int, version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311) -> None:
        self.acknowledged = 0
        self.acknowledged_ids: list[int] = []  # packet ids, which stand for messages as long as none comes again
        self.refused = 0
        self.disconnected = threading.Event()
        client = self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="app", protocol=version)
        client.max_inflight_messages_set(500)
        client.on_publish = self._count
        client.on_disconnect = lambda *_: self.disconnected.set()
        client.connect("127.0.0.1", port)
        client.loop_start()

    def _count(self, _client: object, _data: object, packet_id: int, reason: ReasonCode, _properties: object) -> None:
        if reason.is_failure:
            self.refused += 1
        else:
            self.acknowledged += 1
            self.acknowledged_ids.append(packet_id)

    def publish(self, count: int) -> None:
        infos = [self.client.publish("train/speed", b"%d" % n, qos=1) for n in range(count)]
        infos[-1].wait_for_publish(WAIT_S)
        assert infos[-1].is_published(), f"{self.acknowledged} acknowledged, {self.refused} refused"

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Reader:
    """What a hub was sent, in the order it came; known there before anything comes."""

    def __init__(self, hub: Daemon) -> None:
        self.got: list[int] = []
        self.client = Client(hub.port)
        self.client.client.on_message = lambda _c, _d, message: self.got.append(int(message.payload))
        granted: list[int] = []
        self.client.client.on_subscribe = lambda *_: granted.append(1)
        self.client.client.subscribe("edge", qos=1)
        wait_until(lambda: granted)
