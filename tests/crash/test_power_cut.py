"""Power cut while apps publish: a real daemon on the disk that forgets, held against what its apps were told.

LINESIDE_POWER_CUTS=1000 is the campaign (about ten minutes); LINESIDE_SEED repeats one.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from gateway.amqp.message import decode
from gateway.simulate.cutmount import CutMount
from storeforward.schema import SEQ_MASK
from tests.conftest import require_fuse
from tests.cut_apps import WINDOW, AmqpPublisher, App, MqttPublisher
from tests.daemon import HUB_CONFIG, Daemon, free_port

CYCLES = int(os.environ.get("LINESIDE_POWER_CUTS", "50"))
SEED = int(os.environ.get("LINESIDE_SEED", "5"))
# The lane without a hub keeps all it takes: beyond so many its stream would be full, and its apps rightly held.
ROUND_MAX = 100
KEEPS = ("nothing", "nothing", "torn", "some")
SETTLE_S_MAX = 60.0
RUN_S_MAX = 0.2
DEAD_S_MAX = 0.5
QUIET_S = 6.0  # longer than a hub is backed off

WEAK = """
synchronous = "OFF"
accept_loss = "i accept that acknowledged messages may be lost"
"""

CONFIG = """
[gateway]
id = "{name}"
state_dir = "{{state}}"
log_level = "warning"
{extra}
[mqtt]
listen = ["127.0.0.1:{{port}}"]
[amqp]
listen = ["127.0.0.1:{amqp_port}"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{{hub_port}}"]
kind = "lineside"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge.{name}"
max_bytes = "180MiB"
"""


@dataclass
class Found:
    """What was counted in one lane, and what went wrong in it."""

    acknowledged: int = 0
    duplicates: int = 0
    cycles: int = 0
    wrong: list[str] = field(default_factory=list)


class Consumer:
    """What arrives at the hub, in order."""

    def __init__(self, port: int, topic: str) -> None:
        self.arrived: list[bytes] = []
        self.last_s = time.monotonic()
        self.subscribed = threading.Event()
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"reads-{topic}", clean_session=False, protocol=paho.MQTTv311
        )
        client.on_message = self._arrived
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.connect("127.0.0.1", port)
        client.loop_start()
        client.subscribe(topic, qos=1)
        assert self.subscribed.wait(SETTLE_S_MAX)

    def _arrived(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        self.last_s = time.monotonic()
        self.arrived.append(bytes(message.payload))

    def wait(self, count: int) -> list[bytes]:
        """What has arrived when so many different ones have, or when nothing comes any more."""
        self.last_s = time.monotonic()
        while len(set(self.arrived)) < count and time.monotonic() < self.last_s + QUIET_S:
            time.sleep(0.02)
        return list(self.arrived)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Lane:
    """One gateway with its apps on a disk of its own. Without a hub, everything has to be in the journal."""

    def __init__(self, directory: Path, name: str, hub: Daemon | None, hub_port: int, extra: str, seed: int) -> None:
        directory.mkdir()
        self.rng = random.Random(seed)
        self.disk = CutMount(directory / "cut", size=512 << 20)
        self.hub = hub
        self.name = name
        self.weak = extra == WEAK
        self.found = Found()
        self.seqs: dict[int, bytes] = {}
        self.rows_seen = 0
        amqp_port = free_port()
        config = CONFIG.format(name=name, amqp_port=amqp_port, extra=extra)
        self.daemon = Daemon(directory, config, hub_port, state=self.disk.path / "state")
        self.daemon.status()
        self.consumer = Consumer(hub.port, f"edge.{name}") if hub else None
        port = self.daemon.port
        self.apps: list[App] = [
            MqttPublisher("qos1", port, "train/a", 1),
            MqttPublisher("qos2", port, "train/b", 2),
            AmqpPublisher("amqp", amqp_port, "train/c"),
        ]
        for app in self.apps:
            app.start()

    def cycle(self) -> None:
        """Let them publish, cut the power, start again."""
        for app in self.apps:
            app.heard.clear()
        for app in self.apps:
            assert app.heard.wait(SETTLE_S_MAX), f"{app.name}: no answer; {self.daemon.log.read_text()[-2000:]}"
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0, RUN_S_MAX))
        else:
            # Dead at a change of the disk's own, and only then killed: amid a commit, a checkpoint, a sync.
            self.disk.ask("dead-at", change=self.rng.randint(1, 60))
            end = time.monotonic() + DEAD_S_MAX
            while not self.disk.ask("state")["dead"] and time.monotonic() < end:
                time.sleep(0.002)
        self.daemon.process.kill()
        self.daemon.process.wait()
        keep, seed = self.rng.choice(KEEPS), self.rng.randrange(1 << 32)
        self.disk.ask("cut", keep=keep, seed=seed)
        self.disk.ask("clear")
        told = {app.name: set(app.acknowledged) for app in self.apps}
        self.daemon.start()
        try:
            self.daemon.status()
        except AssertionError:
            if not self.weak or "malformed" not in self.daemon.log.read_text():
                raise
            # What was never synced may leave a file that does not read either.
            self.found.wrong.append(f"cycle {self.found.cycles}: acknowledged and lost, with a journal that is damaged")
            self.daemon.start()
            self.daemon.status()
        self.found.cycles += 1
        if self.hub is None:
            self.check_journal(told, f"cycle {self.found.cycles}, {keep} kept, seed {seed}")

    def check_journal(self, told: dict[str, set[int]], what: str) -> None:
        """Everything that was answered for is a row, under the seq it had."""
        db = sqlite3.connect(f"file:{self.daemon.state / 'journal.db'}?mode=ro", uri=True, timeout=10)
        try:
            rows = db.execute("SELECT id, body FROM message WHERE id > ? ORDER BY id", (self.rows_seen,)).fetchall()
        finally:
            db.close()
        for id_, body in rows:
            payload = bytes(decode(body).body)
            if self.seqs.setdefault(id_ & SEQ_MASK, payload) != payload:
                self.found.wrong.append(f"{what}: seq {id_ & SEQ_MASK} was given twice")
        # What is there after a cut is durable, and is not read again.
        self.rows_seen = max([self.rows_seen, *(id_ for id_, _ in rows)])
        have: dict[str, set[int]] = {}
        for payload in self.seqs.values():
            name, number = payload.split()[:2]
            have.setdefault(name.decode(), set()).add(int(number))
        for name, numbers in told.items():
            if lost := numbers - have.get(name, set()):
                self.found.wrong.append(f"{what}: {name}: {len(lost)} acknowledged and lost: {sorted(lost)[:5]}")

    def finish(self) -> None:
        """Until all is answered and, with a hub, there; then count."""
        for app in self.apps:
            app.pausing.set()
        end = time.monotonic() + SETTLE_S_MAX
        while any(app.unanswered for app in self.apps):
            assert time.monotonic() < end, [(app.name, app.unanswered) for app in self.apps]
            time.sleep(0.02)
        told = {app.name: set(app.acknowledged) for app in self.apps}
        if self.consumer is None:
            self.check_journal(told, "at the end")
            arrived = [self.seqs[seq] for seq in sorted(self.seqs)]
        else:
            arrived = self.consumer.wait(sum(map(len, told.values())))
        for name, numbers in told.items():
            mine = [int(p.split()[1]) for p in arrived if p.split()[0].decode() == name]
            first = list(dict.fromkeys(mine))
            again = len(mine) - len(first)
            self.found.acknowledged += len(numbers)
            self.found.duplicates += again
            if lost := numbers - set(first):
                self.found.wrong.append(f"{name}: {len(lost)} acknowledged and lost: {sorted(lost)[:5]}")
            if first != sorted(first):
                self.found.wrong.append(f"{name}: out of order")
            if again > self.found.cycles * WINDOW:
                self.found.wrong.append(f"{name}: {again} duplicates, more than a window a cut")
            if name == "qos2" and again:
                twice = [n for n, count in Counter(mine).items() if count > 1]
                self.found.wrong.append(f"QoS 2: {again} duplicates: {twice[:10]}")

    def close(self) -> None:
        for app in self.apps:
            app.stop()
        if self.consumer:
            self.consumer.close()
        self.daemon.end()
        self.disk.stop()


def run(directory: Path, cycles: int, extra: str = "", seed: int = SEED) -> list[Found]:
    """Two lanes at once, one with a hub and one without, each half of the cycles."""
    require_fuse()
    hub_port = free_port()
    (directory / "hub").mkdir(parents=True)
    hub = Daemon(directory / "hub", HUB_CONFIG.replace("[local]", '[local]\nmax_bytes = "1GiB"'), hub_port)
    lanes: list[Lane] = []
    try:
        hub.status()
        lanes.append(Lane(directory / "on", "on", hub, hub_port, extra, seed))
        lanes.append(Lane(directory / "off", "off", None, 1, extra, seed + 1))

        def drive(lane: Lane) -> Found:
            for _ in range(cycles // len(lanes)):
                lane.cycle()
            lane.finish()
            return lane.found

        with ThreadPoolExecutor(len(lanes)) as pool:
            return list(pool.map(drive, lanes))
    finally:
        for lane in lanes:
            lane.close()
        hub.end()


@pytest.mark.timeout(120 + 3 * CYCLES)
def test_cut_off_while_apps_publish_nothing_acknowledged_is_lost_reordered_or_given_another_seq(
    tmp_path: Path,
) -> None:
    done, rounds = 0, 0
    while done < CYCLES:
        cycles = min(ROUND_MAX, CYCLES - done)
        directory, seed = tmp_path / f"round-{rounds}", SEED + 2 * rounds
        lanes = run(directory, cycles, seed=seed)
        done, rounds = done + cycles, rounds + 1
        for name, found in zip(("with a hub", "without"), lanes, strict=True):
            print(
                f"{done} of {CYCLES}, seed {seed}, {name}: {found.cycles} cuts, {found.acknowledged} acknowledged, "
                f"{found.duplicates} duplicates",
                flush=True,
            )
        assert not [wrong for found in lanes for wrong in found.wrong]
        assert all(found.acknowledged > found.cycles * WINDOW for found in lanes), "too little went through"
        shutil.rmtree(directory)  # a thousand cuts' journals would fill a small disk


def test_the_same_finds_losses_where_the_configuration_asks_for_synchronous_off(tmp_path: Path) -> None:
    lanes = run(tmp_path, 6, WEAK)
    assert any("acknowledged and lost" in wrong for found in lanes for wrong in found.wrong)
