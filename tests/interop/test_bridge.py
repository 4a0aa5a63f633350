"""The bridge against a real Mosquitto: what its apps publish is journaled, what the hub sends reaches them.

The seed of what is random is part of every assertion's message.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from gateway.amqp.message import Message, decode
from security.tls import server_context
from storeforward.journal import Journal
from tests.conftest import require
from tests.daemon import HUB_CONFIG, WAIT_S, Client, Daemon, free_port, wait_until
from tests.parts import Mosquitto
from tests.pki import Pki

MESSAGES = 5000
WINDOW = 50
PUBLISHER_WINDOW = 100
KILLS = 4
RESTARTS = 2
BROKER = "allow_anonymous true\npersistence true\nmax_queued_messages 0\n"
# 3.1.1 has no receive maximum: there the window is the broker's to set.
BROKER_OF = {"5.0": BROKER + "max_inflight_messages 1000\n", "3.1.1": BROKER + f"max_inflight_messages {WINDOW}\n"}
VERSIONS = pytest.mark.parametrize("version", ["5.0", "3.1.1"])

CONFIG = """
[gateway]
id = "loco"
state_dir = "{{state}}"
[bridge]
url = "{url}"
version = "{version}"
window = {window}
{more}
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{{hub_port}}"]
kind = "lineside"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
{limits}
[[inbound]]
stream = "commands"
hub = "depot"
address = "down"
topic = "commands/{{{{subject}}}}"
"""


def config_of(url: str, version: str = "5.0", *, more: str = "", limits: str = "", window: int = WINDOW) -> str:
    return CONFIG.format(url=url, version=version, more=more, limits=limits, window=window)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons, each in a directory of its own, and ends them."""
    running: list[Daemon] = []
    number = itertools.count()

    def begin(config: str, hub_port: int = 1) -> Daemon:
        directory = tmp_path / f"daemon-{next(number)}"
        directory.mkdir()
        running.append(Daemon(directory, config, hub_port))
        return running[-1]

    yield begin
    for daemon in running:
        daemon.end()


@pytest.fixture(scope="module", autouse=True)
def _mosquitto_is_here() -> None:
    require("mosquitto")


def bridge(daemon: Daemon) -> dict[str, Any]:
    found = daemon.status()["bridge"]
    assert isinstance(found, dict)
    return found


def wait_up(daemon: Daemon) -> None:
    wait_until(lambda: bridge(daemon)["state"] == "up", what=daemon.log.read_text)


def told(daemon: Daemon, seed: int) -> Callable[[], str]:
    return lambda: f"seed {seed}: {daemon.status()}\n{daemon.log.read_text()}"


class App:
    """A client of Mosquitto's, as an app is one: it comes back by itself and sends what was not acknowledged.

    What is published between paho's CONNECT and its CONNACK overtakes what it then repeats: `publish` waits that out,
    and for room, as paho repeats whatever it holds at once.
    """

    def __init__(self, port: int, name: str = "app", *, version: str = "3.1.1", reads: str | None = None) -> None:
        five = version == "5.0"
        self.got: list[paho.MQTTMessage] = []
        self.acknowledged = 0
        self._there = False
        self._turn = threading.Condition()
        self._room = threading.Semaphore(PUBLISHER_WINDOW)
        self._reads = reads
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            clean_session=None if five else False,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
        )
        client.max_inflight_messages_set(PUBLISHER_WINDOW)
        client.on_publish = self._published
        client.on_message = lambda _client, _data, message: self.got.append(message)
        client.on_connect = self._connected
        client.on_unsubscribe = lambda *_: self._is_there(True)
        client.on_disconnect = lambda *_: self._is_there(False)
        client.connect("127.0.0.1", port)
        client.loop_start()
        with self._turn:
            assert self._turn.wait_for(lambda: self._there, WAIT_S)

    def publish(self, topic: str, payload: bytes) -> None:
        assert self._room.acquire(timeout=WAIT_S)
        with self._turn:
            assert self._turn.wait_for(lambda: self._there, WAIT_S)
            self.client.publish(topic, payload, qos=1)

    def _connected(self, client: paho.Client, *_: object) -> None:
        if self._reads is not None:
            client.subscribe(self._reads, qos=1)
        client.unsubscribe("nothing")  # answered once paho has begun to repeat, and the broker has subscribed us

    def _is_there(self, there: bool) -> None:
        with self._turn:
            self._there = there
            self._turn.notify_all()

    def _published(self, *_: object) -> None:
        self.acknowledged += 1
        self._room.release()

    def values(self) -> list[int]:
        return [int(message.payload) for message in self.got]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def journaled(daemon: Daemon, stream: str = "telemetry") -> list[Message]:
    """What a stream holds. Ends the daemon, in order: what it has counted may still be on its way to the disk."""
    daemon.process.terminate()
    daemon.process.wait(WAIT_S)
    journal = Journal.open(daemon.state)
    try:
        found = journal.streams[stream]
        return [decode(row.body) for row in journal.read_range(found, found.first_seq, found.committed)]
    finally:
        journal.close()


def judge(values: Sequence[int], count: int, repeats_max: int, breaks_max: int, seed: int) -> None:
    """Nothing lost, in order; repeats are a run each time, and no longer than the windows allow."""
    assert list(dict.fromkeys(values)) == list(range(count)), seed
    assert len(values) - count <= repeats_max, seed
    breaks = sum(later != earlier + 1 for earlier, later in itertools.pairwise(values))
    assert breaks <= breaks_max, seed


@VERSIONS
def test_nothing_apps_publish_is_lost_or_reordered_whether_the_daemon_is_killed_or_the_broker_restarted(
    version: str, tmp_path: Path, start: Callable[..., Daemon]
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    with Mosquitto(BROKER_OF[version], directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url, version))
        wait_up(daemon)
        app = App(broker.port)
        faults = ["kill"] * KILLS + ["restart"] * RESTARTS
        chance.shuffle(faults)
        at = dict(zip(sorted(chance.sample(range(100, MESSAGES - 100), len(faults))), faults, strict=True))
        for n in range(MESSAGES):
            app.publish("train/speed", b"%d" % n)
            match at.get(n):
                case "kill":
                    wait_up(daemon)
                    time.sleep(chance.uniform(0, 0.1))  # somewhere in the backlog that it has just begun to read
                    daemon.end()
                    daemon.start()
                case "restart":
                    broker.restart(gently=True)
        wait_until(lambda: app.acknowledged == MESSAGES, 2 * WAIT_S)
        wait_until(lambda: daemon.rows() >= MESSAGES and not bridge(daemon)["unacknowledged"], what=told(daemon, seed))
        app.close()
        assert daemon.status()["losses"] == 0
        assert bridge(daemon)["sessions_lost"] == 0
        messages = journaled(daemon)
    assert len({m.message_id.split(":")[1] for m in messages if isinstance(m.message_id, str)}) > 2, "kills hit nothing"
    repeats_max = (KILLS + RESTARTS) * WINDOW + RESTARTS * PUBLISHER_WINDOW
    # A broker that restarts makes two runs of repeats: its own to us, and its publisher's to it; each has an end, too.
    judge([int(m.body) for m in messages], MESSAGES, repeats_max, 2 * KILLS + 4 * RESTARTS, seed)


@VERSIONS
def test_nothing_the_hub_sends_is_lost_or_reordered_on_its_way_to_the_apps(
    version: str, tmp_path: Path, start: Callable[..., Daemon]
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    hub_port = free_port()
    hub = start(HUB_CONFIG, hub_port)
    hub.status()
    with Mosquitto(BROKER_OF[version], directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url, version), hub_port)
        wait_up(daemon)
        app = App(broker.port, reads="commands/#")
        wait_until(lambda: hub.status() and "lineside%3Aloco%3Acommands" in str(cursors(hub)))
        sender = Client(hub.port)
        faults = ["kill"] * KILLS + ["restart"] * RESTARTS
        chance.shuffle(faults)
        sent = 0
        for fault in faults:
            for _ in range(MESSAGES // len(faults)):
                sender.client.publish("down", b"%d" % sent, qos=1)
                sent += 1
            enough = len(app.got) + chance.randrange(400)
            wait_until(lambda enough=enough: len(app.got) > enough)  # type: ignore[misc]
            if fault == "kill":
                daemon.end()
                daemon.start()
            else:
                broker.restart(gently=True)
        wait_until(lambda: len(set(app.values())) == sent, 3 * WAIT_S, told(daemon, seed))
        wait_until(lambda: daemon.stream("commands")["waiting"] == 0)
        sender.close()
        app.close()
        repeats_max = (KILLS + RESTARTS) * WINDOW + RESTARTS * 1000
        judge(app.values(), sent, repeats_max, 2 * KILLS + 4 * RESTARTS, seed)
        assert daemon.status()["losses"] == 0
        assert app.got[0].topic == "commands/down"


def cursors(daemon: Daemon) -> list[object]:
    from storeforward.inspection import Inspection

    with Inspection(daemon.state) as journal:
        return list(journal.cursors())


@VERSIONS
def test_a_full_stream_leaves_the_rest_with_the_broker_until_there_is_room(
    version: str, tmp_path: Path, start: Callable[..., Daemon]
) -> None:
    hub_port = free_port()
    with Mosquitto(BROKER_OF[version], directory=tmp_path / "mosquitto") as broker:
        limits = 'when_full = "refuse"\nmax_messages = 100'
        # Who reads at the hub is known there before anything comes: what nobody reads a topic does not keep.
        hub = start(HUB_CONFIG, hub_port)
        hub.status()
        reader = App(hub.port, reads="edge")
        hub.end()
        daemon = start(config_of(broker.url, version, limits=limits), hub_port)
        wait_up(daemon)
        app = App(broker.port)
        for n in range(1000):
            app.publish("train/speed", b"%d" % n)
        wait_until(lambda: app.acknowledged == 1000 and bridge(daemon)["held"])
        status = bridge(daemon)
        assert status["acknowledged"] == daemon.rows() == 100
        assert 0 < status["unacknowledged"] <= 1000 - 100
        app.client.publish("train/speed", b"not promised", qos=0).wait_for_publish(WAIT_S)
        wait_until(lambda: daemon.status()["losses"] == 1)
        hub.start()
        hub.status()
        wait_until(lambda: len(reader.got) == 1000, what=daemon.log.read_text)
        wait_until(lambda: daemon.rows() == 0)
        assert not bridge(daemon)["held"]
        assert bridge(daemon)["state"] == "up"
        app.close()
        reader.close()
        assert reader.values() == list(range(1000))
        assert daemon.status()["losses"] == 1


def test_properties_cross_the_bridge_both_ways(tmp_path: Path, start: Callable[..., Daemon]) -> None:
    hub_port = free_port()
    hub = start(HUB_CONFIG, hub_port)
    hub.status()
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url), hub_port)
        wait_up(daemon)
        wait_until(lambda: "lineside%3Aloco%3Acommands" in str(cursors(hub)))
        app = App(broker.port, version="5.0", reads="commands/#")
        properties = Properties(PacketTypes.PUBLISH)
        properties.ContentType = "text/plain"
        properties.ResponseTopic = "answers/here"
        properties.CorrelationData = b"\x00\x01"
        properties.MessageExpiryInterval = 600
        properties.PayloadFormatIndicator = 1
        properties.UserProperty = [("a", "1"), ("a", "2")]
        sender = Client(hub.port, MQTTProtocolVersion.MQTTv5)
        sender.client.publish("down", b"go", qos=1, properties=properties)
        wait_until(lambda: app.got)
        got = app.got[0]
        assert (got.topic, got.payload, got.qos) == ("commands/down", b"go", 1)
        found = got.properties
        assert found is not None
        assert (found.ContentType, found.ResponseTopic, found.CorrelationData) == (
            "text/plain",
            "answers/here",
            b"\x00\x01",
        )
        assert found.UserProperty == [("a", "1"), ("a", "2")]
        assert found.PayloadFormatIndicator == 1
        hub.end()
        app.client.publish("train/door", b"shut", qos=1, properties=properties)
        wait_until(lambda: daemon.rows() == 1)
        app.close()
        sender.close()
        (message,) = journaled(daemon)
    assert (message.body, message.content_type, message.reply_to) == (b"shut", "text/plain", "answers/here")
    assert message.correlation_id == b"\x00\x01"
    assert message.annotations["x-opt-lineside-user-properties"] == ["a", "1", "a", "2"]
    assert message.annotations["x-opt-lineside-payload-format"] == 1
    assert message.ttl_ms is not None
    assert 590_000 < message.ttl_ms <= 600_000


def test_what_the_bridge_publishes_does_not_come_back_to_it(tmp_path: Path, start: Callable[..., Daemon]) -> None:
    hub_port = free_port()
    hub = start(HUB_CONFIG, hub_port)
    hub.status()
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto") as broker:
        both = config_of(broker.url).replace('["train/#"]', '["train/#", "commands/#"]')
        daemon = start(both, hub_port)
        wait_up(daemon)
        wait_until(lambda: "lineside%3Aloco%3Acommands" in str(cursors(hub)))
        app = App(broker.port, reads="commands/#")
        sender = Client(hub.port)
        sender.client.publish("down", b"1", qos=1)
        wait_until(lambda: app.got)
        hub.end()
        app.publish("train/speed", b"2")
        wait_until(lambda: daemon.rows())
        assert daemon.stream()["next_seq"] == 2
        assert bridge(daemon)["published"] == 1
        sender.close()
        app.close()
        assert [m.body for m in journaled(daemon)] == [b"2"]


@VERSIONS
def test_retained_messages_are_read_once_and_not_at_every_connection(
    version: str, tmp_path: Path, start: Callable[..., Daemon]
) -> None:
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto") as broker:
        app = App(broker.port)
        app.client.publish("train/name", b"loco", qos=1, retain=True)
        wait_until(lambda: app.acknowledged)
        daemon = start(config_of(broker.url, version))
        wait_until(lambda: daemon.rows() == 1)
        daemon.process.terminate()  # in order: a kill might have the broker repeat it for want of an answer
        assert daemon.process.wait(WAIT_S) == 0
        daemon.start()
        wait_up(daemon)
        app.publish("train/speed", b"1")
        wait_until(lambda: daemon.rows() >= 2)
        app.close()
        assert [m.body for m in journaled(daemon)] == [b"loco", b"1"]


def test_a_topic_taken_out_of_the_configuration_is_no_longer_read(tmp_path: Path, start: Callable[..., Daemon]) -> None:
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url, more='topics = ["train/#", "other/#"]'))
        wait_up(daemon)
        text = daemon.config.read_text()
        daemon.config.write_text(
            text.replace(', "other/#"', "").replace('"train/#"]\nhub', '"train/#", "other/#"]\nhub')
        )
        daemon.process.send_signal(1)
        daemon.wait_for_log("configuration reloaded")
        wait_until(lambda: daemon.log.read_text().count("bridge up") == 2, what=daemon.log.read_text)
        app = App(broker.port)
        app.publish("other/speed", b"0")
        app.publish("train/speed", b"1")
        wait_until(lambda: daemon.rows())
        app.close()
        assert [m.body for m in journaled(daemon)] == [b"1"]


# ---------------------------------------------------------------------------------------- what does not work at once


def not_up(daemon: Daemon) -> int:
    return daemon.log.read_text().count("bridge not up")


@VERSIONS
def test_a_wrong_password_is_told_once_and_tried_again_until_it_is_right(
    version: str, tmp_path: Path, start: Callable[..., Daemon]
) -> None:
    directory = tmp_path / "mosquitto"
    directory.mkdir()
    subprocess.run(
        ["mosquitto_passwd", "-b", "-c", str(directory / "passwd"), "lineside", "right"], check=True, timeout=WAIT_S
    )
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    secret.chmod(0o600)
    config = f"allow_anonymous false\npassword_file {directory}/passwd\n"
    with Mosquitto(config, directory=directory) as broker:
        daemon = start(config_of(broker.url, version, more=f'user = "lineside"\npassword_file = "{secret}"'))
        wait_until(lambda: bridge(daemon)["state"] == "backoff", what=daemon.log.read_text)
        status = bridge(daemon)
        assert "the broker refuses the connection" in status["error"]
        assert "uthori" in status["error"]
        assert status["retry_in_s"] is not None
        assert not_up(daemon) == 1
        secret.write_text("right\n")
        wait_up(daemon)
        assert not_up(daemon) == 1
        assert bridge(daemon)["error"] is None
        assert "right" not in daemon.log.read_text()


def test_over_tls_large_messages_pass_and_a_stranger_is_refused_in_words(
    tmp_path: Path, pki: Pki, other_pki: Pki, start: Callable[..., Daemon]
) -> None:
    tls = (
        f"cafile {pki.ca}\ncertfile {pki.server.cert}\nkeyfile {pki.server.key}\n"
        "require_certificate true\nallow_anonymous true"
    )
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto", tls=tls) as broker:
        url = f"mqtts://localhost:{broker.tls_port}"
        ours = f'cert = "{pki.client.cert}"\nkey = "{pki.client.key}"'
        good = start(config_of(url, more=f'ca = "{pki.ca}"\n{ours}'))
        wait_up(good)
        app = App(broker.port)
        payloads = [bytes([n]) * (300_000 if n % 10 == 0 else 10) for n in range(100)]
        for payload in payloads:
            app.publish("train/camera", payload)
        wait_until(lambda: good.rows() == 100)
        app.close()
        assert [m.body for m in journaled(good)] == payloads

        trusting_another = start(config_of(url, more=f'ca = "{other_pki.ca}"'))
        showing_nothing = start(config_of(url, more=f'ca = "{pki.ca}"'))
        for daemon, told in ((trusting_another, "no authority in ca has signed it"), (showing_nothing, "ertificate")):
            wait_until(lambda d=daemon: bridge(d)["error"], what=daemon.log.read_text)  # type: ignore[misc]
            assert told in bridge(daemon)["error"]
        wait_until(lambda: broker.log.count("error") >= 6)
        for daemon in (trusting_another, showing_nothing):
            assert not_up(daemon) == 1, daemon.log.read_text()
            assert bridge(daemon)["state"] in ("backoff", "connecting")


def test_what_tls_has_read_ahead_is_not_left_lying(pki: Pki, start: Callable[..., Daemon]) -> None:
    """Many messages in one TLS record, then silence: the socket is never readable again."""
    count = 300
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=one_record, args=(listening, pki, count), daemon=True)
        server.start()
        url = f"mqtts://localhost:{listening.getsockname()[1]}"  # which answers no UNSUBSCRIBE: a window it never fills
        daemon = start(config_of(url, "3.1.1", more=f'ca = "{pki.ca}"', window=1000))
        wait_until(lambda: daemon.rows() == count, what=daemon.log.read_text)
        daemon.end()
        server.join(WAIT_S)
        assert not server.is_alive()


def one_record(listening: socket.socket, pki: Pki, count: int) -> None:
    """A broker of MQTT 3.1.1 that takes one client, sends it everything at once and says no more."""
    sock, _ = listening.accept()
    context = server_context(pki.server.cert, pki.server.key)
    with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as tls:
        assert tls.recv(4096)[0] == 0x10
        tls.sendall(b"\x20\x02\x00\x00")
        subscribe = tls.recv(4096)
        assert subscribe[0] == 0x82
        suback = b"\x90\x03" + subscribe[2:4] + b"\x01"
        publish = b"".join(
            b"\x32%c\x00\x0btrain/speed%b%04d" % (19, n.to_bytes(2, "big"), n) for n in range(1, count + 1)
        )
        assert len(suback + publish) < 16384
        tls.sendall(suback + publish)
        while tls.recv(4096):
            pass


def test_an_absent_broker_is_told_once_and_found_within_a_second_of_its_coming(
    tmp_path: Path, start: Callable[..., Daemon]
) -> None:
    broker = Mosquitto(BROKER, directory=tmp_path / "mosquitto")
    daemon = start(config_of(broker.url))
    wait_until(lambda: bridge(daemon)["error"])
    assert bridge(daemon)["error"] == "Connection refused"
    time.sleep(2.0)  # several attempts: what is proved is that they are silent
    assert not_up(daemon) == 1
    with broker:
        began = time.monotonic()
        wait_up(daemon)
        assert time.monotonic() - began < 1.5
        assert bridge(daemon)["error"] is None
    wait_until(lambda: bridge(daemon)["state"] != "up")
    daemon.wait_for_log("bridge lost")


def test_a_clean_stop_leaves_nothing_to_send_again(tmp_path: Path, start: Callable[..., Daemon]) -> None:
    with Mosquitto(BROKER_OF["5.0"], directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url))
        wait_up(daemon)
        app = App(broker.port)
        for n in range(2000):
            app.publish("train/speed", b"%d" % n)
        daemon.process.terminate()
        assert daemon.process.wait(WAIT_S) == 0
        wait_until(lambda: app.acknowledged == 2000)
        daemon.start()
        wait_until(lambda: daemon.rows() >= 2000)
        app.close()
        assert bridge(daemon)["sessions_lost"] == 0
        assert [int(m.body) for m in journaled(daemon)] == list(range(2000))


def test_a_broker_that_speaks_3_1_1_only_is_told_of_with_what_to_set(start: Callable[..., Daemon]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        daemon = start(config_of(f"mqtt://127.0.0.1:{server.getsockname()[1]}"))
        server.settimeout(WAIT_S)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1)
            connection.sendall(b"\x20\x02\x00\x01")  # unacceptable protocol version (3.1.1 §3.2.2.3)
        wait_until(lambda: bridge(daemon)["error"], what=daemon.log.read_text)
        error = str(bridge(daemon)["error"])
        assert "Unsupported protocol version" in error
        assert 'set version = "3.1.1"' in error


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        ("mqtt", "the connection ended; the broker may want TLS (mqtts://)"),
        ("mqtts", "TLS: the connection ended in the handshake; what answers there may speak no TLS"),
    ],
)
def test_a_broker_that_hangs_up_at_our_first_words_is_told_of_with_what_it_may_want(
    scheme: str, told: str, start: Callable[..., Daemon]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        daemon = start(config_of(f"{scheme}://127.0.0.1:{server.getsockname()[1]}"))
        server.settimeout(WAIT_S)
        connection, _ = server.accept()
        assert connection.recv(1 << 16)
        connection.close()
        wait_until(lambda: bridge(daemon)["error"] == told, what=daemon.log.read_text)


class Forgetful(threading.Thread):
    """A broker of 3.1.1 that answers no PUBLISH of its first connection, and never one that is marked as repeated."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.got: list[list[bytes]] = []  # of each connection
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                connection, _ = self.server.accept()
                self.got.append([])
                with connection, connection.makefile("rb") as packets:
                    while head := packets.read(1):
                        connection.sendall(self.answer(head[0], packets.read(_length(packets))))

    def answer(self, head: int, body: bytes) -> bytes:
        kind = head >> 4
        if kind in (8, 10):
            return (b"\x90\x03%b\x01" if kind == 8 else b"\xb0\x02%b") % body[:2]
        if kind != 3:
            return {1: b"\x20\x02\x00\x00", 12: b"\xd0\x00"}[kind]
        end = 2 + int.from_bytes(body[:2], "big")
        self.got[-1].append(body[end + 2 :])
        return b"" if head & 8 or len(self.got) == 1 else b"\x40\x02" + body[end : end + 2]


def _length(packets: Any) -> int:
    size = shift = 0
    while True:
        byte = packets.read(1)[0]
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            return size
        shift += 7


def test_a_broker_that_answers_no_publish_is_told_of_and_hears_all_of_it_again_as_new(
    start: Callable[..., Daemon],
) -> None:
    hub_port = free_port()
    hub = start(HUB_CONFIG, hub_port)
    hub.status()
    broker = Forgetful()
    with broker.server:
        more = 'keep_alive = "1s"\nconnect_timeout = "1s"'
        daemon = start(config_of(f"mqtt://127.0.0.1:{broker.port}", "3.1.1", more=more), hub_port)
        wait_up(daemon)
        wait_until(lambda: hub.status() and "lineside%3Aloco%3Acommands" in str(cursors(hub)))
        sender = Client(hub.port)
        payloads = [b"%d" % n for n in range(10)]
        for payload in payloads:
            sender.client.publish("down", payload, qos=1)
        wait_until(lambda: len(broker.got) > 1 and broker.got[-1] == payloads, what=daemon.log.read_text)
        wait_until(lambda: daemon.stream("commands")["waiting"] == 0)
        sender.close()
        assert broker.got[0] == payloads
        assert "the broker does not answer PUBLISH" in daemon.log.read_text()


def test_another_client_of_the_same_name_is_told_of_and_not_fought_with(start: Callable[..., Daemon]) -> None:
    """Mosquitto 2.0 gives no reason when it lets one go for another, so another Lineside is the broker here."""
    broker = start(HUB_CONFIG, free_port())
    broker.status()
    daemon = start(config_of(f"mqtt://127.0.0.1:{broker.port}"))
    wait_up(daemon)
    other = App(broker.port, "lineside-loco", version="5.0")
    wait_until(lambda: bridge(daemon)["state"] == "backoff")
    status = bridge(daemon)
    assert "another client uses our client_id lineside-loco" in status["error"]
    assert status["retry_in_s"] > 3
    other.close()
    wait_up(daemon)


def test_a_broker_that_forgot_our_session_is_told_of(tmp_path: Path, start: Callable[..., Daemon]) -> None:
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url))
        wait_up(daemon)
        app = App(broker.port)
        app.publish("train/speed", b"1")
        wait_until(lambda: daemon.rows() == 1)
        broker.kill()
        (broker.directory / "mosquitto.db").unlink(missing_ok=True)
        broker.start()
        wait_until(lambda: bridge(daemon)["sessions_lost"] == 1)
        daemon.wait_for_log("the broker has forgotten our session")
        app.publish("train/speed", b"2")
        wait_until(lambda: daemon.rows() == 2)
        app.close()


def test_the_bridge_has_no_thread_of_its_own_once_it_is_up(tmp_path: Path, start: Callable[..., Daemon]) -> None:
    with Mosquitto(BROKER, directory=tmp_path / "mosquitto") as broker:
        daemon = start(config_of(broker.url))
        wait_up(daemon)
        names = [path.read_text().strip() for path in Path(f"/proc/{daemon.process.pid}/task").glob("*/comm")]
        threads = len(names)
        app = App(broker.port)
        for n in range(2000):
            app.publish("train/speed", b"%d" % n)
        wait_until(lambda: daemon.rows() == 2000)
        app.close()
        assert len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir())) == threads <= 2
