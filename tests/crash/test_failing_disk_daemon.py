"""The daemon on a disk that fails while apps publish and a hub drains: refused, or acknowledged and there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from gateway.simulate.cutmount import CutMount
from tests.daemon import CONFIG, HUB_CONFIG, WAIT_S, Client, Daemon, Reader, free_port, wait_until

SYNC_S = 0.5


class Bench:
    """A gateway whose journal is on the disk that fails, an app there, and a hub that is away until asked for."""

    def __init__(self, directory: Path, disk: CutMount, config: str = CONFIG) -> None:
        for name in ("gateway", "hub"):
            (directory / name).mkdir()
        self.disk = disk
        self._directory = directory
        self._hub_port = free_port()
        self.gateway = Daemon(directory / "gateway", config, self._hub_port, state=disk.path / "state")
        self.daemons = [self.gateway]
        self.gateway.status()
        self.app = Client(self.gateway.port, MQTTProtocolVersion.MQTTv5)
        self.number = 0
        self._numbers: dict[int, int] = {}  # by packet id

    def publish(self, count: int) -> None:
        for _ in range(count):
            packet_id = self.app.client.publish("train/speed", b"%d" % self.number, qos=1).mid
            assert self._numbers.setdefault(packet_id, self.number) == self.number
            self.number += 1

    def acknowledged(self) -> set[int]:
        """The numbers, not only how many: one that was refused may arrive, and must not stand for one that is lost."""
        return {self._numbers[packet_id] for packet_id in self.app.acknowledged_ids}

    def told(self) -> int:
        return self.app.acknowledged + self.app.refused

    def hub(self) -> Reader:
        with self.gateway.paused():  # a topic keeps nothing of what comes before its reader
            hub = Daemon(self._directory / "hub", HUB_CONFIG, self._hub_port)
            self.daemons.append(hub)
            hub.status()
            return Reader(hub)

    def end(self) -> None:
        self.app.client.disconnect()  # its thread would wait for what was never answered
        for daemon in self.daemons:
            daemon.end()


@pytest.fixture
def bench(tmp_path: Path, cut_disk: CutMount) -> Iterator[Bench]:
    bench = Bench(tmp_path, cut_disk)
    yield bench
    bench.end()


def arrived_in_order(reader: Reader, acknowledged: set[int]) -> None:
    wait_until(lambda: acknowledged <= set(reader.got), within_s=30)
    firsts = list(dict.fromkeys(reader.got))
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("fault", ["sync", "write", "read-only"])
def test_a_disk_that_takes_nothing_for_a_while_refuses_messages_and_takes_them_again_by_itself(
    bench: Bench, fault: str
) -> None:
    bench.publish(200)
    wait_until(lambda: bench.app.acknowledged == 200)
    if fault == "read-only":
        bench.disk.ask("read-only", on=True)
    else:
        bench.disk.ask("fault", op=fault, path="*-wal")
    bench.publish(50)
    wait_until(lambda: bench.app.refused > 0)
    bench.gateway.wait_for_log("the disk takes no messages")
    assert bench.app.acknowledged == 200, "what was acknowledged was before the fault"
    bench.disk.ask("clear")
    wait_until(lambda: bench.told() == 250)
    end = time.monotonic() + 30
    before = bench.app.acknowledged
    while bench.app.acknowledged == before:  # an app that tries again now and then
        assert time.monotonic() < end, bench.gateway.log.read_text()
        bench.publish(1)
        time.sleep(0.2)
    bench.publish(100)
    wait_until(lambda: bench.told() == bench.number)
    bench.disk.ask("cut")  # what was acknowledged since has to be on the disk, and not in the kernel only
    bench.gateway.process.kill()
    bench.gateway.process.wait(WAIT_S)
    bench.gateway.start()
    bench.gateway.status()
    reader = bench.hub()
    arrived_in_order(reader, bench.acknowledged())
    assert bench.gateway.process.poll() is None, "and it was never restarted by anybody else"
    reader.client.close()


def test_a_message_that_will_never_be_taken_is_refused_while_the_disk_takes_nothing(bench: Bench) -> None:
    bench.publish(20)
    wait_until(lambda: bench.app.acknowledged == 20)
    bench.disk.ask("read-only", on=True)
    bench.publish(1)
    wait_until(lambda: bench.app.refused == 1)
    bench.app.client.publish("$SYS/mine", b"", qos=1)  # the server's own topics
    wait_until(lambda: bench.app.refused == 2)
    assert bench.app.acknowledged == 20
    bench.disk.ask("clear")


def test_what_waits_drains_while_the_disk_takes_nothing(bench: Bench) -> None:
    bench.publish(300)
    wait_until(lambda: bench.app.acknowledged == 300)
    bench.disk.ask("read-only", on=True)
    bench.publish(1)
    wait_until(lambda: bench.told() == 301)
    reader = bench.hub()
    arrived_in_order(reader, set(range(300)))
    bench.disk.ask("clear")
    reader.client.close()


def test_syncs_of_half_a_second_cost_no_keep_alive_and_are_shared(bench: Bench) -> None:
    reader = bench.hub()
    bench.disk.ask("slow", sync_s=SYNC_S)
    commits = 6
    began = time.monotonic()
    while time.monotonic() - began < commits * SYNC_S:
        bench.publish(50)
        time.sleep(0.05)
    wait_until(lambda: bench.app.acknowledged == bench.number, within_s=60)
    took = time.monotonic() - began
    # One by one they would take a sync each; and the loop goes on meanwhile: `status` answers.
    assert took < bench.number * SYNC_S / 10
    asked = time.monotonic()
    bench.gateway.status()
    assert time.monotonic() - asked < 10 * SYNC_S
    assert not bench.app.disconnected.is_set()
    arrived_in_order(reader, set(range(bench.number)))
    bench.disk.ask("clear")
    reader.client.close()


def test_a_disk_that_takes_and_refuses_in_turns_is_told_of_twice_not_each_time(bench: Bench) -> None:
    for _ in range(5):
        bench.disk.ask("fault", op="sync", path="*-wal", times=1)
        told = bench.told()
        bench.publish(20)
        wait_until(lambda told=told: bench.told() >= told + 20)  # type: ignore[misc]
        refused_until = time.monotonic() + 20
        before = bench.app.acknowledged
        while bench.app.acknowledged == before:
            assert time.monotonic() < refused_until
            bench.publish(1)
            time.sleep(0.1)
    text = bench.gateway.log.read_text()
    assert text.count("the disk takes no messages") <= 2
    assert text.count("the disk takes messages again") <= 2
