"""The whole daemon on a loop, met by raw MQTT sockets: bad clients, full streams, takeovers, restarts."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.app import App
from gateway.config import load
from gateway.mqtt import codec
from gateway.mqtt.listener import WRITE_BUFFER_BYTES
from gateway.mqtt.packets import (
    V3,
    V5,
    Connack,
    Connect,
    ConnectProperties,
    Disconnect,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    PublishProperties,
    Reason,
    Suback,
    Subscribe,
    Subscription,
)
from gateway.notify import Notifier
from tests.mqtt_peer import WAIT_S, MqttPeer

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}"]
packet_max = "4KiB"
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "tele"
topics = ["train/#"]
hub = "depot"
address = "edge"
max_messages = 3
"""


class Peer(MqttPeer):
    async def silent(self, for_s: float) -> bool:
        """Whether nothing at all comes for a while: a negative that only time can show."""
        try:
            async with asyncio.timeout(for_s):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    def publish(self, packet_id: int, payload: str, topic: str = "app/x") -> None:
        self.say(Publish(topic, payload.encode(), 1, False, False, packet_id))

    async def acknowledged(self, packet_id: int) -> int:
        packet = await self.hear()
        assert isinstance(packet, Puback), packet
        assert packet.packet_id == packet_id
        return packet.reason


class Bench:
    def __init__(self, path: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.config = path / "lineside.toml"
        self.config.write_text(CONFIG.format(state=path / "state", port=self.port))

    async def start(self) -> None:
        self.app = App(self.config, load(self.config), Notifier(None))
        await self.app.start()

    async def stop(self) -> None:
        self.app._stop.set()
        assert await self.app.run() == 0

    async def raw(self, version: int = V5) -> Peer:
        return Peer(*await asyncio.open_connection("127.0.0.1", self.port), version)

    async def connect(
        self, name: str, version: int = V5, clean: bool = True, keep_alive_s: int = 0, expiry_s: int | None = None
    ) -> tuple[Peer, Connack]:
        peer = await self.raw(version)
        properties = ConnectProperties(session_expiry_interval=expiry_s)
        peer.say(Connect(version, name, clean, keep_alive_s, properties=properties))
        answer = await peer.hear()
        assert isinstance(answer, Connack)
        assert answer.reason == 0
        return peer, answer


def play(tmp_path: Path, story: Callable[[Bench], Awaitable[None]], *change: str) -> None:
    """`change`: a text of the configuration, and what stands there instead."""

    async def limited() -> None:
        bench = Bench(tmp_path)
        if change:
            bench.config.write_text(bench.config.read_text().replace(*change))
        await bench.start()
        try:
            async with asyncio.timeout(2 * WAIT_S):
                await story(bench)
        finally:
            await bench.stop()

    asyncio.run(limited())


BAD = {
    "garbage": (b"\xff\xff\xff\xff\xff", {Reason.MALFORMED_PACKET, Reason.PROTOCOL_ERROR}),
    "a reserved packet type": (b"\x00\x00", {Reason.MALFORMED_PACKET, Reason.PROTOCOL_ERROR}),
    "a packet shorter than its topic": (b"\x32\x03\x00\xff\x61", {Reason.MALFORMED_PACKET}),
    "a packet larger than the limit": (b"\x32\xff\xff\x7f" + bytes(64), {Reason.PACKET_TOO_LARGE}),
}


@pytest.mark.parametrize(("data", "reasons"), BAD.values(), ids=BAD)
def test_a_bad_packet_closes_its_own_client_with_the_reason_and_no_other(
    tmp_path: Path, data: bytes, reasons: set[int]
) -> None:
    async def story(bench: Bench) -> None:
        good, _ = await bench.connect("good")
        bad, _ = await bench.connect("bad")
        good.publish(1, "before")
        bad.writer.write(data)
        end = await bad.hear()
        assert isinstance(end, Disconnect), end
        assert end.reason in reasons
        assert await bad.hear() is None
        assert await good.acknowledged(1) in (0, Reason.NO_MATCHING_SUBSCRIBERS)
        good.publish(2, "after")
        assert await good.acknowledged(2) in (0, Reason.NO_MATCHING_SUBSCRIBERS)

    play(tmp_path, story)


def test_a_client_that_leaves_in_the_middle_of_a_packet_hurts_nobody(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        good, _ = await bench.connect("good")
        bad, _ = await bench.connect("bad")
        bad.writer.write(codec.encode(Publish("train/x", b"x" * 100, 1, False, False, 1), V5)[:50])
        await bad.writer.drain()
        bad.writer.transport.abort()
        good.publish(1, "a", "train/x")
        assert await good.acknowledged(1) == 0
        assert bench.app.journal.streams["tele"].rows == 1, "no half message"

    play(tmp_path, story)


def test_what_does_not_begin_with_connect_is_closed(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.raw()
        peer.say(Pingreq())
        assert not isinstance(await peer.hear(), Pingresp)
        assert await peer.reader.read() == b""

    play(tmp_path, story)


def test_the_same_client_identifier_takes_over_and_the_first_is_told(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        first, _ = await bench.connect("app", clean=False, expiry_s=100)
        second, answer = await bench.connect("app", clean=False, expiry_s=100)
        assert answer.session_present
        end = await first.hear()
        assert isinstance(end, Disconnect)
        assert end.reason == Reason.SESSION_TAKEN_OVER
        assert await first.hear() is None
        second.say(Pingreq())
        assert isinstance(await second.hear(), Pingresp)

    play(tmp_path, story)


@pytest.mark.parametrize(("version", "reason"), [(V3, 3), (V5, Reason.QUOTA_EXCEEDED)])
def test_a_client_too_many_is_told_so_and_the_next_has_the_place_that_comes_free(
    tmp_path: Path, version: int, reason: int
) -> None:
    async def story(bench: Bench) -> None:
        assert bench.app._mqtt is not None
        bench.app._mqtt.clients_max = 1
        first, _ = await bench.connect("first")
        second = await bench.raw(version)
        second.say(Connect(version, "second"))
        answer = await second.hear()
        assert isinstance(answer, Connack)
        assert answer.reason == reason
        assert await second.hear() is None
        second.writer.close()
        await second.writer.wait_closed()
        first.say(Disconnect())
        assert await first.hear() is None
        await bench.connect("third")
        assert not bench.app._mqtt.surplus  # the second's end came before

    play(tmp_path, story)


def test_a_subscriber_that_stops_reading_costs_a_bounded_buffer_and_nobody_else_waits(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        stuck, _ = await bench.connect("stuck")
        quick, _ = await bench.connect("quick")
        for peer in (stuck, quick):
            peer.say(Subscribe(1, (Subscription("news", 0),)))
            assert isinstance(await peer.hear(), Suback)
        transport = stuck.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        speaker, _ = await bench.connect("speaker")
        payload = bytes(4000)
        count = 5000  # 20 MB: more than the sockets' own buffers hold
        together = 20  # by one commit, and written in one go
        for at in range(1, count + 1, together):
            for number in range(at, at + together):
                speaker.say(Publish("news", payload, 1, packet_id=number))
            for _ in range(together):
                assert isinstance(await speaker.hear(), Puback)
                assert isinstance(await quick.hear(), Publish)
        assert bench.app._mqtt is not None
        (held,) = [c for c in bench.app._mqtt.clients if c._conn.client_id == "stuck"]
        assert held.congested
        assert held._transport is not None
        assert held._transport.get_write_buffer_size() <= WRITE_BUFFER_BYTES + together * (len(payload) + 16)

    play(tmp_path, story)


def test_what_the_configuration_switches_off_is_announced_and_refused(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer, answer = await bench.connect("app")
        assert (answer.properties.retain_available, answer.properties.wildcard_subscription_available) == (0, 0)
        peer.say(Subscribe(1, (Subscription("a/#", 1), Subscription("a/b", 1))))
        granted = await peer.hear()
        assert isinstance(granted, Suback)
        assert granted.reasons == (Reason.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED, 1)
        peer.say(Publish("a/b", b"x", 0, True))
        end = await peer.hear()
        assert isinstance(end, Disconnect)
        assert end.reason == Reason.RETAIN_NOT_SUPPORTED

    play(tmp_path, story, "[mqtt]", "[mqtt]\nretained = false\nwildcards = false")


def test_a_client_silent_for_one_and_a_half_keep_alives_is_closed(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer, _ = await bench.connect("app", keep_alive_s=1)
        begin = asyncio.get_running_loop().time()
        end = await peer.hear()
        assert isinstance(end, Disconnect)
        assert end.reason == Reason.KEEP_ALIVE_TIMEOUT
        assert 1.4 <= asyncio.get_running_loop().time() - begin <= 10

    play(tmp_path, story)


async def subscribe(peer: Peer, filter_: str) -> None:
    peer.say(Subscribe(1, (Subscription(filter_, 1),)))
    assert isinstance(await peer.hear(), Suback)


@pytest.mark.parametrize("version", [V3, V5], ids=["3.1.1", "5.0"])
def test_a_durable_session_outlives_a_restart_and_gets_the_rest_in_order(tmp_path: Path, version: int) -> None:
    async def story(bench: Bench) -> None:
        app, _ = await bench.connect("app", version, clean=False, expiry_s=1000)
        await subscribe(app, "app/#")
        source, _ = await bench.connect("source")
        for n in range(1, 5):
            source.publish(n, str(n))
            await source.acknowledged(n)
        got = [await app.hear() for _ in range(4)]
        assert [(p.payload, p.dup) for p in got if isinstance(p, Publish)] == [
            (b"1", False),
            (b"2", False),
            (b"3", False),
            (b"4", False),
        ]
        assert isinstance(got[0], Publish)
        app.say(Puback(got[0].packet_id))
        app.say(Pingreq())
        assert isinstance(await app.hear(), Pingresp)

        app.writer.transport.abort()
        app, answer = await bench.connect("app", version, clean=False, expiry_s=1000)
        assert answer.session_present
        again = [await app.hear() for _ in range(3)]
        assert [(p.payload, p.dup) for p in again if isinstance(p, Publish)] == [
            (b"2", True),
            (b"3", True),
            (b"4", True),
        ]

        await bench.stop()
        await bench.start()
        app, answer = await bench.connect("app", version, clean=False, expiry_s=1000)
        assert answer.session_present
        rest = [await app.hear() for _ in range(3)]
        assert [p.payload for p in rest if isinstance(p, Publish)] == [b"2", b"3", b"4"]

    play(tmp_path, story)


def test_on_5_0_a_full_stream_is_refused_with_quota_exceeded_in_turn(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer, _ = await bench.connect("app")
        for n in range(1, 6):
            peer.publish(n, str(n), "train/x")
        reasons = [await peer.acknowledged(n) for n in range(1, 6)]
        assert reasons == [0, 0, 0, Reason.QUOTA_EXCEEDED, Reason.QUOTA_EXCEEDED]
        assert bench.app.journal.streams["tele"].rows == 3

    play(tmp_path, story)


def test_on_3_1_1_a_full_stream_holds_the_client_and_goes_on_once_drained(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer, _ = await bench.connect("app", V3)
        other, _ = await bench.connect("other", V3)
        for n in range(1, 6):
            peer.publish(n, str(n), "train/x")
        for n in range(1, 4):
            assert await peer.acknowledged(n) == 0
        assert await peer.silent(0.3)
        other.publish(9, "elsewhere")
        await other.acknowledged(9)
        journal = bench.app.journal
        stream = journal.streams["tele"]
        journal.advance(stream, stream.cursors["uplink"], 4)  # as if the hub had taken them
        bench.app.committer.kick()
        assert await peer.acknowledged(4) == 0
        assert await peer.acknowledged(5) == 0
        assert [row.topic for row in journal.read(stream, 4, 9)] == ["train/x", "train/x"]

    play(tmp_path, story)


def test_no_puback_leaves_before_its_commit_is_back(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer, _ = await bench.connect("app")
        journal = bench.app.journal
        await bench.app.committer.drain()
        commit = journal.commit
        begun, go = threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            assert go.wait(WAIT_S)
            commit()

        journal.commit = slow  # type: ignore[method-assign]
        peer.publish(1, "a", "train/x")
        await asyncio.to_thread(begun.wait, WAIT_S)
        peer.say(Pingreq())
        answer: Any = await peer.hear()
        assert isinstance(answer, Pingresp), "the loop lives while the disk syncs, and has not acknowledged"
        go.set()
        assert await peer.acknowledged(1) == 0

    play(tmp_path, story)


def test_messages_with_the_same_properties_and_with_others_in_one_breath_each_keep_their_own(tmp_path: Path) -> None:
    text, mark = PublishProperties(content_type="text/plain"), PublishProperties(user_property=(("a", "1"), ("a", "2")))
    sent: list[tuple[str, PublishProperties, int]] = [
        ("x", text, 1),
        ("x", text, 1),
        ("x", mark, 1),
        ("y", mark, 1),
        ("y", mark, 0),
        ("y", PublishProperties(), 1),
        ("y", PublishProperties(response_topic="back", correlation_data=b"7"), 1),
        ("y", PublishProperties(payload_format_indicator=1), 1),
        ("y", text, 2),
        ("x", text, 1),
    ]

    async def story(bench: Bench) -> None:
        reader, _ = await bench.connect("reader")
        reader.say(Subscribe(1, (Subscription("#", 1),)))
        assert isinstance(await reader.hear(), Suback)
        peer, _ = await bench.connect("app")
        packets = [
            Publish(topic, b"%d" % n, qos, False, False, n + 1 if qos else 0, properties)
            for n, (topic, properties, qos) in enumerate(sent)
        ]
        peer.writer.write(b"".join(codec.encode(packet, V5) for packet in packets))
        heard = []
        for _ in sent:
            packet = await reader.hear()
            assert isinstance(packet, Publish)
            heard.append((packet.topic, packet.properties, packet.qos))
            assert packet.payload == b"%d" % (len(heard) - 1)
        assert heard == [(topic, properties, min(qos, 1)) for topic, properties, qos in sent]
        assert bench.app._mqtt is not None
        assert len(bench.app._mqtt.encoders) == 6, "by topic, QoS and properties"

    play(tmp_path, story)
