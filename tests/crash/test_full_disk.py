"""A file system that is really full: intake is refused, draining goes on, and intake resumes by itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.daemon import HUB_CONFIG, WAIT_S, Client, Daemon, free_port

SIZE = "12M"
MESSAGES = 12_000
PAYLOAD = b"x" * 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount the small file system this test fills")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.xfail(
    strict=False, reason="drained rows are deleted too slowly on a full 12 MB file system in some runs: open"
)
def test_a_full_disk_refuses_intake_keeps_draining_and_takes_messages_again(tmp_path: Path, small_disk: Path) -> None:
    hub_port = free_port()
    (tmp_path / "hub").mkdir()
    daemon = Daemon(tmp_path, hub_port=hub_port, state=small_disk / "state")
    hub = None
    try:
        daemon.status()
        client = Client(daemon.port, MQTTProtocolVersion.MQTTv5)
        for _ in range(MESSAGES):
            client.client.publish("train/speed", PAYLOAD, qos=1)
        wait_until(lambda: client.acknowledged + client.refused == MESSAGES)
        assert client.refused > 0
        stored = daemon.rows()
        assert stored == client.acknowledged > 1000
        assert daemon.status()["disk_full"]

        hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
        wait_until(lambda: daemon.rows() == 0)
        assert hub.stream("local")["next_seq"] - 1 == stored
        wait_until(lambda: not daemon.status()["disk_full"])
        before = client.acknowledged
        client.publish(100)
        wait_until(lambda: client.acknowledged == before + 100)
        client.close()
    finally:
        daemon.end()
        if hub is not None:
            hub.end()


def wait_until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 2 * WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
