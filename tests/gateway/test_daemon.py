"""The daemon as its operator meets it: signals, readiness, reload, a second one, a damaged journal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from storeforward import schema
from tests.daemon import WAIT_S, Client, Daemon


def test_what_was_acknowledged_is_there_after_sigkill(daemon: Daemon) -> None:
    client = Client(daemon.port)
    infos = [client.client.publish("train/speed", b"%d" % n, qos=1) for n in range(3000)]
    end = time.monotonic() + WAIT_S
    while client.acknowledged < 1000 and time.monotonic() < end:
        infos[999].wait_for_publish(0.01)
    daemon.process.kill()
    daemon.process.wait()
    assert client.disconnected.wait(WAIT_S)
    acknowledged = client.acknowledged
    client.client.loop_stop()
    assert acknowledged >= 1000
    daemon.start()
    assert daemon.rows() >= acknowledged


def test_sigterm_ends_it_cleanly_within_five_seconds(daemon: Daemon) -> None:
    client = Client(daemon.port)
    client.publish(500)
    start = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(WAIT_S) == 0
    assert time.monotonic() - start < 5
    assert client.disconnected.wait(WAIT_S)
    client.client.loop_stop()
    assert client.acknowledged == 500
    assert not (daemon.state / "control.sock").exists()
    daemon.start()
    assert daemon.rows() == 500


def test_sighup_takes_a_new_configuration_and_drops_no_client(daemon: Daemon) -> None:
    client = Client(daemon.port)
    client.publish(10)
    daemon.config.write_text(
        daemon.config.read_text() + '\n[[outbound]]\nstream = "alarms"\ntopics = ["alarm/#"]\n'
        'hub = "depot"\naddress = "alarms"\n'
    )
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_log("configuration reloaded")
    streams = daemon.status()["streams"]
    assert isinstance(streams, list)
    assert {s["name"] for s in streams} == {"telemetry", "alarms", "local"}
    client.publish(10)
    assert not client.disconnected.is_set()
    assert daemon.rows() == 20
    client.close()


def test_an_invalid_configuration_is_refused_and_the_old_one_stays(daemon: Daemon) -> None:
    client = Client(daemon.port)
    daemon.config.write_text(daemon.config.read_text().replace("topics", "topcis"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_log("the old one stays")
    assert "topcis" in daemon.log.read_text()
    client.publish(5)
    assert daemon.rows() == 5
    client.close()


def test_a_second_daemon_on_the_same_state_is_refused_in_one_line(daemon: Daemon) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gateway", "run", "--config", str(daemon.config)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert result.returncode == 1
    assert f"in use by another lineside (pid {daemon.process.pid})" in result.stderr
    assert "Traceback" not in result.stderr
    assert daemon.rows() == 0


def test_it_tells_its_supervisor_when_it_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(WAIT_S)
        daemon = Daemon(tmp_path, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="400000")
        try:
            heard = ""
            while "READY=1" not in heard or "WATCHDOG=1" not in heard:
                heard += sock.recv(4096).decode() + "\n"
            daemon.process.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in heard:
                heard += sock.recv(4096).decode() + "\n"
            assert daemon.process.wait(WAIT_S) == 0
        finally:
            daemon.end()


def test_a_damaged_journal_is_set_aside_salvaged_and_the_daemon_starts(daemon: Daemon) -> None:
    client = Client(daemon.port)
    client.publish(2000)
    client.close()
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.wait(WAIT_S)
    path = daemon.state / "journal.db"
    data = bytearray(path.read_bytes())
    start = (len(data) // schema.PAGE_SIZE_BYTES // 2) * schema.PAGE_SIZE_BYTES
    data[start : start + schema.PAGE_SIZE_BYTES] = os.urandom(schema.PAGE_SIZE_BYTES)
    path.write_bytes(data)
    (daemon.state / "journal.suspect").write_text("said by an earlier run\n")
    daemon.start()
    rows = daemon.rows()
    losses = daemon.status()["losses"]
    assert isinstance(losses, int)
    assert rows + losses == 2000
    assert rows > 1500
    assert (daemon.state / "quarantine" / "0001" / "journal.db").read_bytes() == bytes(data)
    assert "salvaged" in daemon.log.read_text()


def test_the_demo_keeps_every_promise_and_prints_one_json_object() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gateway", "demo", "--json", "--seconds", "8"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    verdict = json.loads(result.stdout)
    assert set(verdict) == {"outbound", "inbound", "tunnels", "resume_s_max", "drain_s"}
    for way in ("outbound", "inbound"):
        assert verdict[way]["published"] == verdict[way]["delivered"] > 100
        assert verdict[way]["lost"] == verdict[way]["reordered"] == 0
    assert verdict["tunnels"] == 3


def test_a_journal_removed_while_in_use_ends_the_daemon_before_anything_more_is_acknowledged(daemon: Daemon) -> None:
    client = Client(daemon.port)
    client.publish(10)
    shutil.rmtree(daemon.state)
    client.client.publish("train/speed", b"late", qos=1)
    assert daemon.process.wait(WAIT_S) == 1
    assert client.disconnected.wait(WAIT_S)
    client.client.loop_stop()
    assert client.acknowledged == 10
    assert "journal.db: No such file or directory, while it is in use" in daemon.log.read_text()


def test_what_was_acknowledged_outlives_the_removal_of_its_wal(daemon: Daemon) -> None:
    client = Client(daemon.port)
    client.publish(100)
    (daemon.state / "journal.db-wal").unlink()
    infos = [client.client.publish("train/speed", b"late", qos=1) for _ in range(10)]
    assert daemon.process.wait(WAIT_S) == 1
    assert client.disconnected.wait(WAIT_S)
    client.client.loop_stop()
    assert (client.acknowledged, len(infos)) == (100, 10)
    daemon.start()
    assert daemon.rows() == 100


def test_started_without_standard_streams_it_runs_and_nothing_of_ours_takes_their_place(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait()
    command = [sys.executable, "-m", "gateway", "run", "--config", str(daemon.config)]
    daemon.process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
    assert daemon.status()["gateway"] == "loco"
    files = Path(f"/proc/{daemon.process.pid}/fd")
    assert {os.readlink(files / str(number)) for number in range(3)} == {os.devnull}
