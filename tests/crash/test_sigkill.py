"""Gateway and hub killed at random moments while messages go both ways: held against the clients' own records."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from gateway.control_client import request
from tests.daemon import CONFIG, HUB_CONFIG, Daemon, free_port

KILLS = int(os.environ.get("LINESIDE_KILLS", "10"))
SEED = int(os.environ.get("LINESIDE_SEED", "2"))
WINDOW = 50
SETTLE_S_MAX = 30.0

GATEWAY_CONFIG = (
    CONFIG
    + """
[[inbound]]
stream = "commands"
hub = "depot"
address = "down"
topic = "commands/all"
"""
)


def client(name: str, port: int, **callbacks: Callable[..., Any]) -> paho.Client:
    """A durable 5.0 client that comes back by itself, with at most WINDOW messages unacknowledged each way."""
    each = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
    each.max_inflight_messages_set(WINDOW)
    each.reconnect_delay_set(1, 1)
    for callback, function in callbacks.items():
        setattr(each, callback, function)
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600
    properties.ReceiveMaximum = WINDOW
    each.connect("127.0.0.1", port, clean_start=False, properties=properties)
    return each


class Producer:
    """Counts upwards, as fast as it is acknowledged."""

    def __init__(self, name: str, port: int, topic: str) -> None:
        self.acknowledged: set[int] = set()
        self.refused = 0
        self.waiting: deque[tuple[int, paho.MQTTMessageInfo]] = deque()
        self._topic = topic
        self._stop = threading.Event()
        self.client = client(name, port, on_publish=self._published)
        self.client.loop_start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _published(self, _client: Any, _data: Any, _mid: int, reason: Any, _properties: Any) -> None:
        self.refused += reason.is_failure

    def _run(self) -> None:
        n = 0
        while not self._stop.is_set():
            while len(self.waiting) < 2 * WINDOW:
                self.waiting.append((n, self.client.publish(self._topic, b"%d" % n, qos=1)))
                n += 1
            self.take_answers()
            time.sleep(0.002)

    def take_answers(self) -> None:
        # is_published() raises where publish() had no connection, though the message goes out later.
        while self.waiting and self.waiting[0][1]._published:
            self.acknowledged.add(self.waiting.popleft()[0])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(SETTLE_S_MAX)

    def close(self) -> None:
        self.stop()
        self.client.disconnect()
        self.client.loop_stop()


class Consumer:
    def __init__(self, name: str, port: int, topic: str) -> None:
        self.arrived: list[int] = []
        self.subscribed = threading.Event()
        self.client = client(
            name,
            port,
            on_message=lambda _c, _d, message: self.arrived.append(int(message.payload)),
            on_subscribe=lambda *_: self.subscribed.set(),
        )
        self.client.loop_start()
        self.client.subscribe(topic, qos=1)
        assert self.subscribed.wait(SETTLE_S_MAX)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def check(direction: str, producer: Producer, consumer: Consumer, kills: int) -> None:
    end = time.monotonic() + SETTLE_S_MAX
    while True:
        producer.take_answers()  # what is acknowledged only now, after the last restart, counts as well
        missing = producer.acknowledged - set(consumer.arrived)
        if not missing and not producer.waiting:
            break
        assert time.monotonic() < end, (
            f"{direction}: {len(producer.waiting)} not answered, {len(missing)} of {len(producer.acknowledged)} lost: "
            f"{sorted(missing)[:20]}"
        )
        time.sleep(0.05)
    assert not producer.refused
    first = list(dict.fromkeys(consumer.arrived))
    assert first == sorted(first), f"{direction}: out of order"
    again = len(consumer.arrived) - len(first)
    # One window of the producer's, and one of the consumer's; between gateway and hub identities keep repeats out.
    assert again <= kills * 2 * WINDOW, f"{direction}: {again} duplicates after {kills} kills"
    assert len(first) > kills * WINDOW, f"{direction}: too little went through to prove anything"


@pytest.mark.timeout(60 + 10 * KILLS)
def test_killed_at_random_moments_nothing_acknowledged_is_lost_or_reordered_either_way(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    hub_port = free_port()
    (tmp_path / "hub").mkdir()
    hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
    gateway = Daemon(tmp_path, GATEWAY_CONFIG, hub_port)
    clients: list[Producer | Consumer] = []
    try:
        hub.status()
        gateway.status()
        clients += [
            up := Consumer("up-consumer", hub.port, "edge"),
            down := Consumer("down-consumer", gateway.port, "commands/#"),
        ]
        wait_for_reader(hub)
        clients += [
            sent_up := Producer("up-producer", gateway.port, "train/speed"),
            sent_down := Producer("down-producer", hub.port, "down"),
        ]
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.05, 1.5))
            victim = rng.choice([gateway, gateway, hub])
            victim.process.kill()
            victim.process.wait()
            victim.start()
            victim.status()
        time.sleep(1.5)
        sent_up.stop()
        sent_down.stop()
        check("outbound", sent_up, up, KILLS)
        check("inbound", sent_down, down, KILLS)
    finally:
        for each in clients:
            each.close()
        gateway.end()
        hub.end()


def wait_for_reader(hub: Daemon) -> None:
    """Until the gateway reads at the hub: before, the hub's local stream is nobody's and not kept for it."""
    end = time.monotonic() + SETTLE_S_MAX
    while "loco" not in str(request(hub.state, "clients")):
        assert time.monotonic() < end
        time.sleep(0.05)
