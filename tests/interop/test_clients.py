"""The examples in deploy/examples, each against a real gateway: proton (Python), rhea (Node) and Qpid JMS (Java)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests import parts
from tests.amqp_apps import Gateway
from tests.conftest import require

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "deploy" / "examples"
WAIT_S = 60.0
CLIENTS = ("proton", "rhea", "qpid-jms")


class App:
    """One run of an example."""

    def __init__(self, client: str, port: int, what: str, address: str, count: int, *names: str) -> None:
        environment = dict(os.environ)
        if client == "proton":
            command = [sys.executable, str(EXAMPLES / "proton" / "apps.py"), str(port)]
        elif client == "rhea":
            command = ["node", str(EXAMPLES / "rhea" / "apps.js"), str(port)]
            environment["NODE_PATH"] = str(parts.rhea_modules())
        else:
            url = f"amqp://127.0.0.1:{port}"
            command = ["java", "-cp", f"{parts.qpid_jms_lib()}/*", str(EXAMPLES / "jms" / "Apps.java"), url]
            address = f"{'queue' if address.startswith('jobs') or what in ('request', 'answer') else 'topic'}:{address}"
        self.lines: list[str] = []
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            [*command, what, address, str(count), *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self.lines.append("ended")
            self._more.notify_all()

    def wait(self, line: str) -> App:
        with self._more:
            assert self._more.wait_for(lambda: line in self.lines or "ended" in self.lines, WAIT_S), self.lines
            assert line in self.lines, self.lines
        return self

    def got(self) -> list[str]:
        """What it had received when it ended, as it should."""
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert status == 0, self.lines
        return [line for line in self.lines if line not in ("connected", "attached", "ended")]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(WAIT_S)


class Apps:
    def __init__(self, gateway: Gateway, client: str) -> None:
        self.gateway = gateway
        self.client = client
        self.runs: list[App] = []

    def run(self, what: str, address: str, count: int, *names: str) -> App:
        app = App(self.client, self.gateway.amqp_port, what, address, count, *names)
        self.runs.append(app)
        return app

    def texts(self, count: int) -> list[str]:
        word = self.client.removeprefix("qpid-")
        return [f"{word} {n}" for n in range(count)]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    try:
        yield gateway
    finally:
        gateway.close()


@pytest.fixture(params=CLIENTS)
def apps(gateway: Gateway, request: pytest.FixtureRequest) -> Iterator[Apps]:
    if request.param != "proton":
        require(request.param)
    apps = Apps(gateway, request.param)
    try:
        yield apps
    finally:
        for run in apps.runs:
            run.close()


def test_what_one_app_sends_to_a_topic_all_receive_in_order_and_an_mqtt_app_too(apps: Apps) -> None:
    mqtt = apps.gateway.mqtt().subscribe("news/#")
    receivers = [apps.run("receive", "news/today", 50).wait("attached") for _ in range(2)]
    apps.run("send", "news/today", 50).got()
    assert [receiver.got() for receiver in receivers] == [apps.texts(50)] * 2
    assert [m.payload.decode() for m in mqtt.wait(50)] == apps.texts(50)
    assert dict(mqtt.got[7].properties.UserProperty)["number"] == "7"


def test_a_queue_waits_for_its_receiver_and_each_message_goes_to_one(apps: Apps) -> None:
    apps.run("send", "jobs/print", 20).got()
    first = apps.run("receive", "jobs/print", 5).got()
    rest = apps.run("receive", "jobs/print", 15).got()
    assert first + rest == apps.texts(20)


def test_a_durable_subscriber_goes_on_at_the_next_message(apps: Apps) -> None:
    mqtt = apps.gateway.mqtt()
    early = apps.run("durable", "news/today", 3, "reader", "sub").wait("attached")
    for n in range(10):
        mqtt.publish("news/today", b"%d" % n)
    assert early.got() == ["0", "1", "2"]
    assert apps.gateway.clients()["away"][0]["client"] == "reader"
    assert apps.run("durable", "news/today", 7, "reader", "sub").got() == [str(n) for n in range(3, 10)]


def test_jms_unsubscribe_ends_a_durable_subscription(gateway: Gateway) -> None:
    require("qpid-jms")
    apps = Apps(gateway, "qpid-jms")
    apps.run("durable", "news/today", 0, "reader", "sub").got()
    assert len(gateway.clients()["away"]) == 1
    apps.run("unsubscribe", "-", 0, "reader", "sub").got()
    assert gateway.clients()["away"] == []


def test_jms_hears_that_its_client_id_is_in_use_and_nobody_else_is_disturbed(gateway: Gateway) -> None:
    require("qpid-jms")
    apps = Apps(gateway, "qpid-jms")
    first = apps.run("durable", "news/today", 2, "reader", "sub").wait("attached")
    second = apps.run("durable", "news/today", 2, "reader", "sub")
    assert second.process.wait(WAIT_S) != 0
    second.wait("ended")
    assert any("InvalidClientIDException" in line and "in use" in line for line in second.lines), second.lines
    mqtt = gateway.mqtt()
    for n in range(2):
        mqtt.publish("news/today", b"%d" % n)
    assert first.got() == ["0", "1"]
    assert len(gateway.clients()["away"]) == 1


def test_an_mqtt_app_answers_requests(apps: Apps) -> None:
    def answer(client: paho.Client, message: paho.MQTTMessage) -> None:
        packed = Properties(PacketTypes.PUBLISH)
        packed.CorrelationData = message.properties.CorrelationData
        client.publish(message.properties.ResponseTopic, message.payload.upper(), qos=1, properties=packed)

    service = apps.gateway.mqtt("service").subscribe("service/upper")
    service.answer = answer
    assert apps.run("request", "service/upper", 5).got() == [text.upper() for text in apps.texts(5)]


def test_an_app_answers_an_mqtt_apps_requests_and_its_own_kind(apps: Apps) -> None:
    service = apps.run("answer", "service/upper", 6).wait("attached")
    mqtt = apps.gateway.mqtt("asks").subscribe("asks/answers")
    for n in range(3):
        mqtt.publish("service/upper", b"abc", ResponseTopic="asks/answers", CorrelationData=b"\0\xff%d" % n)
    answers = mqtt.wait(3)
    assert [(m.payload, m.properties.CorrelationData) for m in answers] == [(b"ABC", b"\0\xff%d" % n) for n in range(3)]
    assert apps.run("request", "service/upper", 3).got() == [text.upper() for text in apps.texts(3)]
    service.got()
