"""`ack = "disk-or-hub"` from outside: what apps are told, what is written, with a hub that does as each test says."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proton import Message
from proton.utils import BlockingConnection

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Receiver
from gateway.config import loads
from gateway.config_explain import explain
from tests.daemon import WAIT_S, Daemon, free_port
from tests.gateway.test_lying_hub import Hub

CONFIG = """
[gateway]
id = "loco"
state_dir = "{{state}}"
[mqtt]
listen = ["127.0.0.1:{{port}}"]
[amqp]
listen = ["127.0.0.1:{amqp_port}"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{{hub_port}}"]
kind = "{kind}"
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge"
ack = "disk-or-hub"
linger = "{linger}"
"""


class LateHub(Hub):
    """May answer outside of an event, too."""

    connection: AmqpProtocol

    def ready(self, protocol: AmqpProtocol) -> None:
        self.connection = protocol


class Site:
    """A hub in this process, a gateway in its own, one MQTT app."""

    def __init__(self, gateway: Daemon, hub: LateHub, amqp_port: int) -> None:
        self.gateway, self.hub, self.amqp_port = gateway, hub, amqp_port
        self.app = paho.Client(CallbackAPIVersion.VERSION2, client_id="app", protocol=MQTTProtocolVersion.MQTTv5)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self.app.connect("127.0.0.1", gateway.port, properties=properties)
        self.app.loop_start()

    async def publish(self, body: str, qos: int = 1, **more: Any) -> None:
        """Returns when it is acknowledged."""
        info = self.app.publish("alarm/x", body, qos, **more)
        await asyncio.to_thread(info.wait_for_publish, WAIT_S)
        assert info.is_published()

    async def figures(self) -> dict[str, int]:
        return await asyncio.to_thread(self.gateway.stream, "alarms")

    async def until(self, true: Callable[[dict[str, int]], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true(await self.figures()):  # noqa: ASYNC110 - another process' state, which has no event
                await asyncio.sleep(0.02)

    async def until_held(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not (await self.figures())["never_written"]:
                await self.publish("first")
        await self.until(lambda figures: not figures["rows"])
        self.hub.got.clear()

    def stored(self, statement: str) -> list[tuple[Any, ...]]:
        journal = sqlite3.connect(f"file:{self.gateway.state}/journal.db?mode=ro", uri=True)
        try:
            return journal.execute(statement).fetchall()
        finally:
            journal.close()


@asynccontextmanager
async def site_at(path: Path, linger: str = "5s") -> AsyncIterator[Site]:
    hub, amqp_port = LateHub(), free_port()
    server = await asyncio.get_running_loop().create_server(hub.protocol, "127.0.0.1", 0)
    config = CONFIG.format(amqp_port=amqp_port, kind="lineside", linger=linger)
    gateway = Daemon(path, config, server.sockets[0].getsockname()[1])
    site: Site | None = None
    try:
        await asyncio.to_thread(gateway.status)
        site = Site(gateway, hub, amqp_port)
        yield site
    finally:
        if site is not None:
            site.app.disconnect()
            site.app.loop_stop()
        gateway.end()
        server.close()


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(4 * WAIT_S):
            await work

    asyncio.run(limited())


def test_every_quality_of_service_and_amqp_is_answered_in_order_and_only_qos_2_is_written(tmp_path: Path) -> None:
    async def story() -> None:
        async with site_at(tmp_path) as site:
            await site.until_held()
            before = (await site.figures())["never_written"]
            await site.publish("a", 0)
            await site.publish("b", 1)
            await site.publish("c", 1)
            await site.until(lambda figures: figures["never_written"] == before + 3)
            await site.publish("d", 2)
            await site.publish("e", 1)

            def send() -> None:
                connection = BlockingConnection(f"amqp://127.0.0.1:{site.amqp_port}", timeout=WAIT_S)
                sender = connection.create_sender("alarm/y")
                for body in (b"f", b"g"):
                    sender.send(Message(body=body, durable=True))
                connection.close()

            await asyncio.to_thread(send)
            await site.until(lambda figures: figures["waiting"] == 0)
            assert site.hub.got == list("abcdefg")
            figures = await site.figures()
            # "d" is, with its packet id, which outlives the connection; what comes while that goes on may be, too.
            assert before + 3 <= figures["never_written"] <= before + 6
            assert site.stored("SELECT count(*) FROM loss") == [(0,)]

    run(story())


def test_a_hub_that_does_not_answer_in_time_only_delays_the_acknowledgement(tmp_path: Path) -> None:
    async def story() -> None:
        async with site_at(tmp_path, linger="100ms") as site:
            await site.until_held()
            owed: list[tuple[Receiver, list[int]]] = []
            site.hub.settle = lambda link, handles: owed.append((link, handles))
            await site.publish("a")
            assert site.stored("SELECT count(*) FROM message") == [(1,)], "on disk before it was acknowledged"
            await site.publish("b")
            for link, handles in owed:
                link.accept(handles)
            site.hub.connection.schedule_flush()
            site.hub.settle = lambda link, handles: link.accept(handles)
            await site.until(lambda figures: figures["rows"] == 0)
            assert site.hub.got == ["a", "b"], "and neither is sent twice"

    run(story())


def test_what_the_hub_refuses_is_acknowledged_when_it_is_a_dead_letter_on_disk(tmp_path: Path) -> None:
    async def story() -> None:
        async with site_at(tmp_path) as site:
            await site.until_held()

            def refuse(link: Receiver, handles: list[int]) -> None:
                for handle in handles:
                    link.reject(handle, "amqp:decode-error", "no")

            site.hub.settle = refuse
            await site.publish("bad")
            assert site.stored("SELECT stream, condition FROM dead") == [("alarms", "amqp:decode-error")]
            assert site.stored("SELECT stream, reason FROM loss") == [("alarms", "dead-letter")]
            site.hub.settle = lambda link, handles: link.accept(handles)
            await site.publish("good")
            await site.until(lambda figures: figures["rows"] == 0)
            assert site.hub.got == ["bad", "good"]

    run(story())


def test_a_retained_message_is_written_with_what_it_replaces(tmp_path: Path) -> None:
    async def story() -> None:
        async with site_at(tmp_path) as site:
            await site.until_held()
            before = (await site.figures())["never_written"]
            await site.publish("kept", 1, retain=True)
            await site.until(lambda figures: figures["rows"] == 0)
            assert (await site.figures())["never_written"] == before
            assert site.stored("SELECT topic FROM retained") == [("alarm/x",)]

    run(story())


@pytest.mark.parametrize("kind", ["artemis", "rabbitmq"])
def test_check_says_what_an_acknowledgement_means(kind: str) -> None:
    text = CONFIG.format(amqp_port=5672, kind=kind, linger="300ms").format(state="/s", port=1883, hub_port=5673)
    told = "\n".join(explain(loads(text)))
    assert "on disk, or accepted by depot" in told
    assert "what it has not accepted within 300ms is written" in told
    assert ("RabbitMQ accepts messages that no queue takes" in told) == (kind == "rabbitmq")
