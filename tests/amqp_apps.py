"""A real gateway with AMQP and MQTT apps at it, for tests: the apps are proton's blocking client and paho's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proton.reactor import Container
from proton.utils import BlockingConnection

from gateway.control_client import request
from tests.daemon import WAIT_S, Daemon, free_port

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}"]
[amqp]
listen = ["127.0.0.1:{hub_port}"]
message_max = "8MiB"
window = 100
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
kind = "artemis"
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge"
ttl = "1h"
[[address]]
name = "jobs/#"
kind = "queue"
[[address]]
name = "orders"
kind = "queue"
[[address]]
name = "news/#"
kind = "topic"
[local]
when_full = "refuse"
"""


class Gateway(Daemon):
    """A daemon with apps."""

    def __init__(self, directory: Path) -> None:
        self.amqp_port = free_port()
        self.apps: list[BlockingConnection] = []
        self.mqtt_apps: list[MqttApp] = []
        super().__init__(directory, CONFIG, self.amqp_port)
        self.status()

    def app(self, container: str | None = None, **options: Any) -> BlockingConnection:
        app = (
            BlockingConnection(
                f"amqp://127.0.0.1:{self.amqp_port}",
                timeout=WAIT_S,
                container=None,
                allowed_mechs="ANONYMOUS",
                **options,
            )
            if container is None
            else named(self.amqp_port, container)
        )
        self.apps.append(app)
        return app

    def mqtt(self, client_id: str = "app") -> MqttApp:
        app = MqttApp(self.port, client_id)
        self.mqtt_apps.append(app)
        return app

    def clients(self) -> dict[str, Any]:
        return request(self.state, "clients")

    def close(self) -> None:
        for mqtt in self.mqtt_apps:
            mqtt.close()
        self.end()


def named(port: int, container: str) -> BlockingConnection:
    made = Container()
    made.container_id = container
    return BlockingConnection(f"amqp://127.0.0.1:{port}", timeout=WAIT_S, container=made, allowed_mechs="ANONYMOUS")


class MqttApp:
    """An MQTT 5 client that keeps what it gets."""

    def __init__(self, port: int, client_id: str) -> None:
        self.got: list[paho.MQTTMessage] = []
        self.more = threading.Condition()
        self.answer: Any = None
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5
        )
        client.on_message = self._message
        self.subscribed = threading.Event()
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.connect("127.0.0.1", port)
        client.loop_start()

    def _message(self, client: paho.Client, _: object, message: paho.MQTTMessage) -> None:
        if self.answer is not None:
            self.answer(client, message)
        with self.more:
            self.got.append(message)
            self.more.notify_all()

    def subscribe(self, filter_: str) -> MqttApp:
        self.subscribed.clear()
        self.client.subscribe(filter_, qos=1)
        assert self.subscribed.wait(WAIT_S)
        return self

    def publish(self, topic: str, payload: bytes, **properties: Any) -> None:
        packed = Properties(PacketTypes.PUBLISH)
        for name, value in properties.items():
            setattr(packed, name, value)
        info = self.client.publish(topic, payload, qos=1, properties=packed)
        info.wait_for_publish(WAIT_S)
        assert info.is_published()

    def wait(self, count: int) -> list[paho.MQTTMessage]:
        with self.more:
            assert self.more.wait_for(lambda: len(self.got) >= count, WAIT_S), self.got
        return self.got

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
