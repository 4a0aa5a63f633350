"""Clients that say anything at all: the server lives, serves the others, and whatever it says is well formed."""

from __future__ import annotations

import random

import pytest

from tests.conformance import client as mqtt
from tests.conformance.client import V3, V5, Client, Will
from tests.conformance.conftest import Connector
from tests.daemon import Daemon

CONNECTIONS = 400
TOPICS = ("any/a", "any/b", "")
FILTERS = ("any/a", "#", "any/+", "$share/g/any/#", "$SYS/#", "/", "a#", "$share/g")


class Babbler:
    """Well-formed packets in any order and mixture, some of them with bytes changed, lost or added."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def some(self, *properties: mqtt.Property) -> list[mqtt.Property]:
        return [each for each in properties if self.rng.random() < 0.3]

    def connect(self, version: int) -> bytes:
        rng = self.rng
        will = Will("any/a", b"will", rng.randrange(3), rng.random() < 0.3, ((mqtt.WILL_DELAY, rng.randrange(2)),))
        limits: list[mqtt.Property] = [
            (mqtt.SESSION_EXPIRY, rng.choice((0, 1, 1000))),
            (mqtt.RECEIVE_MAXIMUM, rng.choice((1, 5))),
            (mqtt.MAXIMUM_PACKET, rng.choice((30, 60, 400))),
            (mqtt.ALIAS_MAXIMUM, 3),
            (mqtt.REQUEST_PROBLEM, 0),
        ]
        return mqtt.connect(
            version,
            rng.choice(("any1", "any2", "any3", "")),
            clean=rng.random() < 0.5,
            keep_alive=rng.choice((0, 1, 10)),
            will=will if rng.random() < 0.4 else None,
            props=self.some(*limits),
        )

    def packet(self, version: int) -> bytes:
        rng, number = self.rng, self.rng.randrange(1, 9)
        match rng.randrange(7):
            case 0 | 1:
                section = self.some(
                    (mqtt.USER_PROPERTY, ("k", "v")),
                    (mqtt.MESSAGE_EXPIRY, 3),
                    (mqtt.TOPIC_ALIAS, 1),
                    (mqtt.PAYLOAD_FORMAT, 1),
                    (mqtt.RESPONSE_TOPIC, "any/b"),
                )
                qos, payload = rng.randrange(3), b"x" * rng.choice((0, 5, 300))
                flags = {"retain": rng.random() < 0.3, "dup": rng.random() < 0.1}
                return mqtt.publish(version, rng.choice(TOPICS), payload, qos, number, props=section, **flags)
            case 2:
                options = rng.choice((0, 1, 2, 6, 10, 17, 34)) if version == V5 else rng.randrange(3)
                section = self.some((mqtt.SUBSCRIPTION_ID, rng.choice((1, 200, 70_000))))
                return mqtt.subscribe(version, number, (rng.choice(FILTERS), options), props=section)
            case 3:
                return mqtt.unsubscribe(version, number, rng.choice(FILTERS))
            case 4 | 5:
                kind = rng.choice((mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBREL, mqtt.PUBCOMP))
                return mqtt.ack(kind, number, rng.choice((0, 0, 0x92, 0x80)) if version == V5 else 0)
            case _:
                expiry = self.some((mqtt.SESSION_EXPIRY, rng.choice((0, 5))))
                return rng.choice((mqtt.PINGREQ_BYTES, mqtt.disconnect(version, rng.choice((0, 4, 0x80)), expiry)))

    def garble(self, packet: bytes) -> bytes:
        garbled = bytearray(packet)
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            at = self.rng.randrange(len(garbled))
            match self.rng.randrange(3):
                case 0:
                    garbled[at] = self.rng.randrange(256)
                case 1 if len(garbled) > 1:
                    del garbled[at]
                case _:
                    garbled.insert(at, self.rng.randrange(256))
        return bytes(garbled)

    def meet(self, client: Client) -> None:
        """One connection: talk, hear and answer, vanish. The client's decoder judges everything that it hears."""
        rng = self.rng
        try:
            client.say(self.connect(client.version))
            for _ in range(rng.randrange(30)):
                packet = self.packet(client.version)
                client.say(self.garble(packet) if rng.random() < 0.1 else packet)
            for _ in range(rng.randrange(20)):
                heard = client.hear(0.02)
                if heard.kind == mqtt.PUBLISH and heard.qos and rng.random() < 0.8:
                    client.say(mqtt.ack(mqtt.PUBACK if heard.qos == 1 else mqtt.PUBREC, heard.packet_id))
                elif heard.kind == mqtt.PUBREL and rng.random() < 0.8:
                    client.say(mqtt.ack(mqtt.PUBCOMP, heard.packet_id))
        except (TimeoutError, mqtt.Closed, ConnectionError):
            pass  # the server had enough of it, or nothing to say
        (client.drop if rng.random() < 0.5 else client.stream.close)()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_clients_say_the_server_keeps_to_the_standard(seed: int, daemon: Daemon, join: Connector) -> None:
    babbler = Babbler(seed)
    listener, speaker = join(V5), join(V3)
    listener.subscribe("calm", qos=2)
    for n in range(CONNECTIONS):
        babbler.meet(Client(daemon.port, babbler.rng.choice((V3, V5))))
        if n % 20 == 0:
            speaker.publish("calm", b"%d" % n, n // 20 % 3)
            listener.message(b"%d" % n)
    log = daemon.log.read_text()
    assert "Traceback" not in log
    assert not [line for line in log.splitlines() if " error " in line]
