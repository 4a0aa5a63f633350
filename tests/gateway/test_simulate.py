"""`lineside simulate` and `lineside verify` end to end: one short scenario for each way a line can fail."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli.main import cli
from gateway.faultlink import FaultLink
from gateway.simulate import disk, verify
from gateway.simulate.fleet import Daemon
from gateway.simulate.proxy import free_ports
from gateway.simulate.report import render
from gateway.simulate.runner import Result, Sample, Simulation
from gateway.simulate.scenario import loads
from gateway.simulate.verify import STATE_FILE, count, read_record
from tests.conftest import require_fuse
from tests.daemon import HUB_CONFIG
from tests.daemon import Daemon as Hub

SHORT = """\
title = "Short"
settle = "20s"

[gateways.config.hub]
idle_timeout = "1s"
settle_timeout = "1s"

[[app]]
name = "telemetry"
rate = 200
size = "100B"

[[app]]
name = "orders"
direction = "down"
rate = 20
size = "60B"

[[step]]
link = "up"
for = "300ms"

[[step]]
{fault}

[[step]]
link = "up"
for = "300ms"

[limits]
duplicates_per_cut = 400
resume_p99 = "8s"
drain = "10s"
"""

FAULTS = {
    "tunnel": 'link = "tunnel"\nfor = "700ms"',
    "tunnel-fin": 'link = "tunnel-fin"\nfor = "500ms"',
    "reset": 'link = "reset"\nfor = "500ms"',
    "slow": 'link = "up"\nfor = "800ms"\nlatency = "300ms"\njitter = "50ms"\nbandwidth = "256kbit/s"',
    "half-open": 'link = "half-open"\nfor = "2500ms"',
    "flapping": 'link = "flapping"\nevery = "400ms"\nfor = "1600ms"',
    "stall": 'link = "stall"\nfor = "500ms"',
    "acks-lost": 'link = "acks-lost"\nfor = "1500ms"',
    "hub-restart": 'link = "hub-restart"\nfor = "300ms"',
    "hub-kill": 'link = "hub-restart"\nkill = true\nfor = "300ms"',
    "hub-slow": 'link = "hub-slow"\nlatency = "300ms"\nfor = "800ms"',
}
CUTS = {"slow": 0, "stall": 0, "hub-slow": 0, "flapping": 2}


def simulate(text: str, directory: Path) -> Result:
    samples: list[Sample] = []
    result = asyncio.run(Simulation(loads(text), "short", directory, samples.append).run())
    assert list(result.samples) == samples
    return result


@pytest.mark.parametrize("fault", FAULTS)
def test_every_promise_holds_through(fault: str, tmp_path: Path) -> None:
    result = simulate(SHORT.format(fault=FAULTS[fault]), tmp_path)
    assert result.kept, result.verdict
    assert result.cuts == CUTS.get(fault, 1)
    up, down = result.measured.ways
    assert up.delivered == up.published > 150
    assert down.delivered == down.published > 15


def test_the_built_in_proxy_does_where_toxiproxy_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LINESIDE_PARTS", str(tmp_path))
    result = simulate(SHORT.format(fault=FAULTS["tunnel"]), tmp_path)
    assert result.proxy == "the built-in proxy"
    assert result.kept, result.verdict
    assert result.measured.cuts[0].resume_s
    page = render(result)
    assert "https:" not in page
    assert "<script" not in page
    assert page.count("<svg") == 5
    assert 'fill="#4a4a55"><title>tunnel, ' in page
    assert not re.search(r"(nan|inf)[,\"]", page)


def test_a_hub_that_runs_already_is_used_by_its_url(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub", HUB_CONFIG, port)
    try:
        hub.status()
        text = SHORT.format(fault=FAULTS["tunnel"])
        (tmp_path / "run").mkdir()
        result = simulate(
            text.replace("[[app]]", f'[hub]\nurl = "amqp://127.0.0.1:{port}"\n[[app]]', 1), tmp_path / "run"
        )
    finally:
        hub.end()
    assert result.kept, result.verdict
    assert result.measured.cuts[0].resume_s


def lineside(*words: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *words], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=ENV
    )


ROOT = Path(__file__).resolve().parent.parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def test_an_impossible_limit_ends_with_status_1_and_names_itself(tmp_path: Path) -> None:
    text = SHORT.format(fault=FAULTS["tunnel-fin"]).replace('drain = "10s"', 'drain = "1ms"')
    (tmp_path / "hard.toml").write_text(text)
    done = lineside("simulate", "hard.toml", "--json", "--report", "hard.html", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert not said["kept"]
    assert [each["what"] for each in said["verdict"] if not each["kept"]] == ["backlog delivered after"]
    assert "A promise broke" in (tmp_path / "hard.html").read_text()


def test_a_wrong_scenario_ends_with_status_2_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text('title = "x"\n[[step]]\nlink = "tunnle"\n')
    done = lineside("simulate", "wrong.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert 'wrong.toml:3: step[0].link: found "tunnle"' in done.stderr
    assert lineside("simulate", "no-such-thing", cwd=tmp_path).returncode == 2
    assert lineside("simulate", cwd=tmp_path).returncode == 2


def test_the_list_names_every_shipped_scenario(tmp_path: Path) -> None:
    listed = json.loads(lineside("simulate", "--list", "--json", cwd=tmp_path).stdout)
    assert {"base-tunnel", "suburban-line", "satellite", "branch-dsl", "yard"} <= {each["scenario"] for each in listed}


# ---------------------------------------------------------------------- verify


def test_verify_keeps_every_promise_for_two_cycles_and_leaves_nothing_behind(tmp_path: Path) -> None:
    require_fuse()
    done = lineside("verify", "--cycles", "2", "--power-cuts", "2", "--directory", "try", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["cycles"], said["power_cuts"], said["no_power_cuts"]) == (4, 2, None)
    assert said["blows"]["power cut"] == 2
    assert said["delivered"] == said["acknowledged"] > 100
    assert said["disk"]["syncs"]["median_s"] > 0
    assert said["disk"]["pragmas"]["journal_mode"] == "wal"
    assert not (tmp_path / "try").exists()


def test_an_interrupted_verify_stops_its_daemons_and_is_resumed_with_its_record(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "verify", "--cycles", "500", "--power-cuts", "0", "--directory", "try"],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    state, record = tmp_path / "try" / STATE_FILE, tmp_path / "try" / "record"

    def within_a_cycle() -> bool:
        """At least one has ended, and what the record holds is of the next: it is emptied after the state is stored."""
        if not state.exists():
            return False
        tried = json.loads(state.read_text())
        return tried["cycles"] >= 1 and sum(number >= tried["next"] for _, number in read_record(record)) > 20

    end = time.monotonic() + 60
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        if within_a_cycle():
            process.send_signal(signal.SIGSTOP)  # it may have gone on since
            if within_a_cycle():
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # SIGINT takes the same way
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "go on with `lineside verify --resume" in errors
    before = json.loads(state.read_text())["cycles"]
    done = lineside(
        *("verify", "--cycles", str(before + 1), "--power-cuts", "0", "--directory", "try", "--resume", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout)
    assert said["cycles"] == before + 1
    assert said["interrupted"] == 1
    assert said["lost"] == 0


async def grown(daemon: Daemon, messages: int) -> None:
    """Until so many more wait than at the first look, when some may have been delivered and not yet crossed off."""
    first: int | None = None
    while True:
        status = await daemon.ask("status")
        now = next(each for each in status["streams"] if each["direction"] == "outbound")["waiting"]
        first = now if first is None else first
        if now >= first + messages:
            return
        await asyncio.sleep(0.02)


def test_verify_sees_a_gateway_that_forgets_what_it_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = Daemon.kill
    lines: list[FaultLink] = []

    def line(port: int) -> FaultLink:
        lines.append(FaultLink(port))
        return lines[-1]

    async def kill_and_lose(daemon: Daemon) -> None:
        lines[0].cut()
        async with asyncio.timeout(20):
            await grown(daemon, 10)
        await kill(daemon)
        for path in daemon.state.glob("journal.db*"):
            path.unlink()
        lines[0].restore()

    monkeypatch.setattr(verify, "FaultLink", line)
    monkeypatch.setattr(Daemon, "kill", kill_and_lose)
    monkeypatch.setattr(verify, "WEIGHTS", {verify.Blow.KILL_GATEWAY: 1})
    monkeypatch.setattr(verify, "SETTLE_S_MAX", 5.0)
    run = verify.Verify(tmp_path / "try", 1, False, lambda tried, blow: None)
    asyncio.run(run.run())
    assert run.tried.lost > 0
    assert run.tried.unaccounted > 0
    assert run.tried.missing
    assert not run.tried.kept


def test_where_no_forgetful_disk_can_be_mounted_verify_says_so_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.cutmount, "missing", lambda: "there is no /dev/fuse")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["verify", "--cycles", "1", "--directory", "try"])
    assert done.exit_code == 0, done.output
    assert "No power cuts were tried: there is no /dev/fuse" in done.output


def test_verify_never_touches_a_directory_that_holds_anything(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "journal.db").write_text("mine")
    for words in ((), ("--resume",)):
        done = lineside("verify", "--directory", "state", *words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["journal.db"]
        assert (tmp_path / "state" / "journal.db").read_text() == "mine"


def test_a_record_counts_what_is_missing_twice_and_out_of_order() -> None:
    lines = [("a", 1), ("a", 2), ("a", 3), ("d", 2), ("d", 1), ("d", 1)]
    found = count(lines)
    assert (found.missing, found.duplicates, found.reordered, found.delivered) == ([3], 1, 1, 2)


def test_a_torn_last_line_of_a_record_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(b"a 1\nd 1\na 23")
    assert read_record(tmp_path / "record") == [("a", 1), ("d", 1)]


MOUNTS = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,nobarrier
22 21 0:30 / /tmp rw - tmpfs tmpfs rw,size=1g
23 21 0:31 / /srv/data rw - nfs4 host:/data rw,vers=4.2
"""


@pytest.mark.parametrize(
    ("path", "doubt"),
    [("/usr", "mounted with nobarrier"), ("/tmp", "is tmpfs: memory"), ("/srv/data", "is nfs4: SQLite's WAL needs")],
)
def test_a_mount_on_which_a_sync_means_little_is_told(path: str, doubt: str, tmp_path: Path) -> None:
    mount = disk.find_mount(Path(path), MOUNTS, tmp_path)
    found = disk.doubts(mount, disk.Syncs(10, 1e-3, 2e-3), {"journal_mode": "wal"}, "")
    assert any(doubt in each for each in found), found


def rotating(tmp_path: Path) -> disk.Mount:
    (tmp_path / "devices" / "sda" / "queue").mkdir(parents=True)
    (tmp_path / "devices" / "sda" / "queue" / "rotational").write_text("1\n")
    (tmp_path / "devices" / "sda" / "queue" / "write_cache").write_text("write back\n")
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sda").symlink_to(tmp_path / "devices" / "sda")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / "8:0").symlink_to(tmp_path / "devices" / "sda")
    return disk.find_mount(Path("/"), "21 1 8:0 / / rw - ext4 /dev/sda rw\n", tmp_path)


def test_a_rotating_disk_that_syncs_faster_than_it_turns_is_doubted(tmp_path: Path) -> None:
    mount = rotating(tmp_path)
    assert (mount.device, mount.rotating, mount.write_cache) == ("sda", True, "write back")
    wal = {"journal_mode": "wal"}
    assert "seems to say yes before it has written" in disk.doubts(mount, disk.Syncs(10, 1e-4, 1e-3), wal, "")[0]
    assert disk.doubts(mount, disk.Syncs(10, 8e-3, 2e-2), wal, "") == ()
    assert "volatile write cache" in disk.notes(mount)[0]
