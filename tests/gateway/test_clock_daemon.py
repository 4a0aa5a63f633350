"""A real daemon whose clocks are stepped, stopped, lost and found: only time that surely passed expires anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from click.testing import CliRunner
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from gateway.certificates import LOOK_S
from gateway.cli.main import cli
from storeforward.inspection import Inspection
from tests.clocks import Clocks
from tests.daemon import CONFIG, HUB_CONFIG, WAIT_S, Client, Daemon, Reader, free_port, wait_until
from tests.gateway.test_certificates import TLS_GATEWAY, TLS_HUB
from tests.pki import Pki

HOUR_S = 3600
YEAR_S = 365 * 86_400
COUNT = 200
STEPS_S = (50 * YEAR_S, -50 * YEAR_S, -time.time(), -1, 1, 0)
EXPIRING = CONFIG + 'ttl = "1h"\n'
TLS_EXPIRING = TLS_GATEWAY + 'ttl = "1h"\n'


class Box:
    """A gateway with clocks of its own, and a hub with the right time that is started when it is wanted."""

    def __init__(self, path: Path, config: str, hub_config: str) -> None:
        self.path = path
        self.hub_port = free_port()
        self.clocks = Clocks(path)
        self.hub_config = hub_config
        self.daemons: list[Daemon] = []
        for name in ("hub", "gateway"):
            (path / name).mkdir()
        self.config = config

    def start(self) -> Daemon:
        self.gateway = Daemon(self.path / "gateway", self.config, self.hub_port, **self.clocks.environment)
        self.daemons.append(self.gateway)
        self.gateway.status()
        return self.gateway

    def start_hub(self) -> Reader:
        with self.gateway.paused():  # a topic keeps nothing of what comes before its reader
            hub = Daemon(self.path / "hub", self.hub_config, self.hub_port)
            self.daemons.append(hub)
            hub.status()
            return Reader(hub)

    def reasons(self) -> dict[str, int]:
        """The ledger: how many of each reason."""
        found: dict[str, int] = {}
        with Inspection(self.gateway.state) as seen:
            for loss in seen.losses(10 * COUNT):
                found[loss.reason] = found.get(loss.reason, 0) + 1
        return found

    def end(self) -> None:
        for daemon in self.daemons:
            daemon.end()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path, EXPIRING, HUB_CONFIG)
    yield box
    box.end()


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Box]:
    pki = Pki(tmp_path / "pki")
    files = {"{ca}": pki.ca, "{cert}": pki.client.cert, "{key}": pki.client.key}
    hub_files = {"{ca}": pki.ca, "{cert}": pki.server.cert, "{key}": pki.server.key}
    box = Box(tmp_path, filled(TLS_EXPIRING, files), filled(TLS_HUB, hub_files))
    yield box
    box.end()


def filled(text: str, files: dict[str, Path]) -> str:
    for name, path in files.items():
        text = text.replace(name, str(path))
    return text


def leave_a_session(port: int, expiry_s: int) -> None:
    """An MQTT 5 client with a session that outlives it by so long, then goes."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="guest", protocol=MQTTProtocolVersion.MQTTv5)
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = expiry_s
    granted: list[int] = []
    client.on_subscribe = lambda *_: granted.append(1)
    client.connect("127.0.0.1", port, clean_start=True, properties=properties)
    client.loop_start()
    client.subscribe("train/#", qos=1)
    wait_until(lambda: granted)
    client.disconnect()
    client.loop_stop()


def session_is_there(port: int) -> bool:
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="guest", protocol=MQTTProtocolVersion.MQTTv5)
    present: list[bool] = []
    client.on_connect = lambda _c, _d, flags, *_: present.append(flags.session_present)
    client.connect("127.0.0.1", port, clean_start=False)
    client.loop_start()
    wait_until(lambda: present)
    client.disconnect()
    client.loop_stop()
    return present[0]


def test_steps_of_fifty_years_1970_and_a_leap_second_expire_end_and_reorder_nothing(plain: Box) -> None:
    gateway = plain.start()
    leave_a_session(gateway.port, HOUR_S)
    app = Client(gateway.port)
    for number, offset_s in enumerate(STEPS_S):
        plain.clocks.wall(offset_s)
        for n in range(COUNT):
            app.client.publish("train/speed", b"%d" % (number * COUNT + n), qos=1)
        wait_until(lambda number=number: app.acknowledged == (number + 1) * COUNT)
    plain.clocks.wall(-50 * YEAR_S)
    assert not app.disconnected.is_set(), "a step cuts nobody off"
    reader = plain.start_hub()
    wait_until(lambda: len(reader.got) >= COUNT * len(STEPS_S))
    assert reader.got == list(range(COUNT * len(STEPS_S)))
    assert "session expired" not in gateway.log.read_text()
    assert session_is_there(gateway.port)
    assert plain.reasons() == {}
    app.close()
    reader.client.close()


def test_sleep_counts_for_messages_and_sessions_though_no_timer_saw_it(plain: Box) -> None:
    gateway = plain.start()
    leave_a_session(gateway.port, HOUR_S)
    app = Client(gateway.port)
    app.publish(COUNT)
    plain.clocks.suspended(2 * HOUR_S)
    app.client.publish("train/speed", b"%d" % COUNT, qos=1).wait_for_publish(WAIT_S)
    reader = plain.start_hub()
    wait_until(lambda: reader.got)
    assert reader.got == [COUNT], "what came after the sleep is young, the rest is over"
    wait_until(lambda: plain.reasons() == {"expired": COUNT})
    gateway.wait_for_log("session expired")
    assert not session_is_there(gateway.port)
    app.close()
    reader.client.close()


def test_a_box_that_boots_in_1970_says_so_takes_everything_and_sends_it_once_the_clock_is_set(secured: Box) -> None:
    secured.clocks.wall(-time.time())
    gateway = secured.start()
    reader = secured.start_hub()
    app = Client(gateway.port)
    app.publish(COUNT)
    gateway.wait_for_log("clock not set: it says 1970")
    assert "hub not reached" in gateway.log.read_text()
    shown = CliRunner().invoke(cli, ["status", "--config", str(gateway.config)])
    assert "NOT SET" in shown.output
    assert "expired" not in shown.output
    assert reader.got == []
    secured.clocks.wall(0)
    secured.clocks.kept_right(True)
    wait_until(lambda: len(reader.got) >= COUNT, 2 * LOOK_S + WAIT_S)
    assert reader.got == list(range(COUNT))
    gateway.wait_for_log("clock set")
    assert secured.reasons() == {}
    app.close()
    reader.client.close()


@pytest.mark.parametrize("kept_right", [True, False], ids=["kept right before", "never kept right"])
def test_a_night_without_power_counts_an_hour_after_a_boot_in_1970_only_if_both_ends_of_it_are_known(
    plain: Box, kept_right: bool
) -> None:
    plain.clocks.kept_right(kept_right)
    gateway = plain.start()
    app = Client(gateway.port)
    app.publish(COUNT)
    app.close()
    gateway.process.terminate()
    gateway.process.wait(WAIT_S)
    plain.clocks.booted()
    plain.clocks.kept_right(False)
    plain.clocks.wall(-time.time())
    gateway.start()
    assert gateway.rows() == COUNT
    app = Client(gateway.port)
    app.client.publish("train/speed", b"%d" % COUNT, qos=1).wait_for_publish(WAIT_S)
    assert plain.reasons() == {}, "nothing is thrown away on a guess"
    plain.clocks.wall(8 * HOUR_S)
    plain.clocks.kept_right(True)
    if kept_right:
        gateway.wait_for_log("the time off counts for what was here before")
    reader = plain.start_hub()
    expected = [COUNT] if kept_right else list(range(COUNT + 1))
    wait_until(lambda: len(reader.got) >= len(expected))
    assert reader.got[-1] == COUNT
    assert len(reader.got) == len(expected)
    app.close()
    reader.client.close()
