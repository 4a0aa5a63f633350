"""Bytes written to the disk a message; `python -m tests.bench.written [--device] [--json] [--full]`.

Flash wears out by what is written, not by what is stored. Each row is one run of the real daemon: `offline` (no hub,
the backlog grows), `online` (a hub takes it while it comes in) and, where the stream says `ack = "disk-or-hub"`,
`hub`; at full load (4 clients with 200 messages outstanding each) and at a steady rate of single messages, each of
which is a commit of its own, so that whole pages are written for it. `drained`: what it costs to send a backlog and to
delete it, by message.

Two figures stand side by side: what the process had the kernel write (`write_bytes` of /proc/PID/io, in the kernel's
pages), and, with `--device` and as root, what reached a block device that holds nothing but the journal's own ext4 (a
loop device; its journal and its metadata counted). The hub keeps its files in memory, so that it is not measured.

`stages` takes the same apart without a daemon: commits, checkpoints, deletions, each by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.bench import load
from storeforward.journal import Journal
from storeforward.streams import StreamLimits
from tests.daemon import HUB_CONFIG, Daemon, free_port

SIZES = (100, 1024, 16384)
WARM_MESSAGES = 2000
SETTLE_S = 1.5  # until cursors and deletions of the warm-up are written
DEVICE_BYTES = 2 << 30
DRAIN_S_MAX = 120.0
CONFIG = """
[gateway]
id = "loco"
state_dir = "{{state}}"
log_level = "warning"
[mqtt]
listen = ["127.0.0.1:{{port}}"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{{hub_port}}"]
kind = "lineside"
[[outbound]]
stream = "telemetry"
topics = ["bench/#"]
hub = "depot"
address = "edge"
max_bytes = "8GiB"
max_messages = 10000000
{ack}
"""


@dataclass(frozen=True, slots=True)
class Written:
    """One run. `process`, `device`: bytes written by payload byte; `device` is None where there was none to watch."""

    what: str
    size_bytes: int
    rate_per_s: float | None
    messages: int
    process: float
    device: float | None


class Meter:
    """What has been written since it was made."""

    def __init__(self, pid: int, directory: Path, device: str | None) -> None:
        self._pid, self._directory, self._device = pid, directory, device
        self._process, self._sectors = self._read()

    def _read(self) -> tuple[int, int]:
        subprocess.run(["sync", "-f", self._directory], check=True)
        return written_by(self._pid), 0 if self._device is None else device_bytes(self._device)

    def since(self) -> tuple[int, int | None]:
        process, device = self._read()
        return process - self._process, None if self._device is None else device - self._sectors


def written_by(pid: int) -> int:
    """`write_bytes` of /proc/PID/io: what this process caused to be sent to the storage layer."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "write_bytes":
            return int(value)
    raise RuntimeError("/proc/PID/io has no write_bytes")


def device_bytes(name: str) -> int:
    """Sectors of 512 bytes written, by /proc/diskstats (the kernel's Documentation/admin-guide/iostats.rst)."""
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if fields[2] == name:
            return int(fields[9]) * 512
    raise RuntimeError(f"no device {name} in /proc/diskstats")


@contextlib.contextmanager
def place(*, device: bool) -> Iterator[tuple[Path, str | None]]:
    """A directory for the journal, and the name of the block device that holds nothing else, if asked for."""
    directory = Path(tempfile.mkdtemp(prefix="lineside-written-"))
    try:
        if not device:
            yield directory, None
            return
        image, mount = directory / "image", directory / "mount"
        with image.open("wb") as file:
            file.truncate(DEVICE_BYTES)
        mount.mkdir()
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        subprocess.run(["mkfs.ext4", "-q", "-E", options, image], check=True)
        found = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True)
        loop = found.stdout.strip()
        try:
            subprocess.run(["mount", loop, mount], check=True)
            try:
                yield mount, Path(loop).name
            finally:
                subprocess.run(["umount", mount], check=True)
        finally:
            subprocess.run(["losetup", "-d", loop], check=True)
    finally:
        shutil.rmtree(directory)


def publish_slowly(port: int, size: int, rate: float, count: int) -> None:
    """`count` messages of QoS 1, one every 1/`rate` s, each waiting for its PUBACK."""
    sock, _ = load.connect("127.0.0.1", port, "slow")
    with sock:
        topic = b"\0\x06bench/"
        due = time.monotonic()
        for n in range(count):
            body = topic + struct.pack("!H", n % 65535 + 1) + b"." * size
            head, rest = b"\x32", len(body)
            while rest:
                rest, digit = divmod(rest, 128)
                head += bytes((digit | (128 if rest else 0),))
            sock.sendall(head + body)
            _exactly(sock, 4)
            due += 1 / rate
            time.sleep(max(0.0, due - time.monotonic()))
        sock.sendall(b"\xe0\0")


def _exactly(sock: socket.socket, count: int) -> None:
    while count:
        data = sock.recv(count)
        if not data:
            raise load.LoadError("the broker closed the connection")
        count -= len(data)


def daemon_row(
    what: str, size: int, messages: int, rate: float | None = None, *, device: bool = False, seconds: float = 0
) -> list[Written]:
    """One run of the daemon; `offline` at full load adds a row `drained`."""
    hub: Daemon | None = None
    # Hub and load share the machine with the gateway: a linger that a busy moment does not use up.
    ack = 'ack = "disk-or-hub"\nlinger = "3s"' if what == "hub" else ""
    with place(device=device) as (directory, block), tempfile.TemporaryDirectory(dir=_memory()) as memory:
        hub_port = free_port()
        gateway = Daemon(directory, CONFIG.format(ack=ack), hub_port)
        try:
            gateway.status()
            if what != "offline":
                hub = _hub(Path(memory), hub_port)
                _until_up(gateway)
            if rate is None:
                load.run(load.Load(port=gateway.port, size_bytes=size, messages=WARM_MESSAGES))
            else:
                publish_slowly(gateway.port, size, rate, 3)
            time.sleep(SETTLE_S)
            meter = Meter(gateway.process.pid, directory, block)
            if rate is None:
                load.run(load.Load(port=gateway.port, size_bytes=size, messages=messages))
            else:
                publish_slowly(gateway.port, size, rate, messages)
            if what != "offline":
                _until_drained(gateway)
            rows = [_row(what, size, rate, messages, meter)]
            if what == "offline" and rate is None:
                meter = Meter(gateway.process.pid, directory, block)
                hub = _hub(Path(memory), hub_port)
                _until_drained(gateway)
                rows.append(_row("drained", size, None, messages + WARM_MESSAGES, meter))
            return rows
        finally:
            gateway.end()
            if hub is not None:
                hub.end()


def _row(what: str, size: int, rate: float | None, messages: int, meter: Meter) -> Written:
    process, device = meter.since()
    payload = size * messages
    return Written(what, size, rate, messages, process / payload, None if device is None else device / payload)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _hub(directory: Path, port: int) -> Daemon:
    hub = Daemon(directory, HUB_CONFIG, port)
    hub.status()
    return hub


def _until_up(gateway: Daemon) -> None:
    end = time.monotonic() + DRAIN_S_MAX
    while '"up"' not in json.dumps(gateway.status()["hubs"]):
        if time.monotonic() > end:
            raise RuntimeError(f"no link: {gateway.status()['hubs']}")
        time.sleep(0.05)
    time.sleep(0.2)


def _until_drained(gateway: Daemon) -> None:
    end = time.monotonic() + DRAIN_S_MAX
    while gateway.stream()["rows"]:
        if time.monotonic() > end:
            raise RuntimeError(f"not drained: {gateway.stream()}")
        time.sleep(0.1)


def stages(size: int = 1024, batch: int = 400, batches: int = 40) -> dict[str, float]:
    """Bytes written by payload byte, stage by stage, of one journal in this process."""
    out: dict[str, float] = {}
    pid, payload = os.getpid(), size * batch * batches
    with place(device=False) as (directory, _):
        journal = Journal.open(directory)
        stream = journal.stream("bench", "outbound", StreamLimits(bytes_max=8 << 30))
        cursor = journal.cursor(stream, "uplink", "uplink")
        journal.commit_now()
        journal.checkpoint()
        before = written_by(pid)

        def stage(name: str) -> None:
            nonlocal before
            subprocess.run(["sync", "-f", directory], check=True)
            now = written_by(pid)
            out[name] = round((now - before) / payload, 4)
            before = now

        for _ in range(batches):
            journal.append_run(stream, "bench/0", lambda seq, payload: payload, [b"." * size] * batch)
            journal.commit_now()
        stage("commits")
        journal.checkpoint()
        stage("checkpoint")
        journal.advance(stream, cursor, stream.next_seq)
        while journal.pending:
            journal.commit_now()
        stage("cursor and deletion")
        journal.checkpoint()
        stage("checkpoint after it")
        journal.close()
        stage("close")
    return out


def table(rows: list[Written]) -> str:
    lines = [f"{'':10} {'bytes':>6} {'rate':>8} {'messages':>9} {'process':>9} {'device':>9}   (by payload byte)"]
    for row in rows:
        rate = "full" if row.rate_per_s is None else f"{row.rate_per_s:g}/s"
        device = "-" if row.device is None else f"{row.device:.3f}"
        line = f"{row.what:10} {row.size_bytes:>6} {rate:>8} {row.messages:>9} {row.process:>9.3f} {device:>9}"
        lines.append(line)
    return "\n".join(lines)


def measure(
    *, device: bool = False, whats: tuple[str, ...] = ("offline", "online", "hub"), full: bool = False
) -> list[Written]:
    """All rows. `full`: as many messages as the figures in the documentation were taken with."""
    bulk = (256 << 20) if full else (48 << 20)
    rows: list[Written] = []
    for what in whats:
        for size in SIZES:
            rows += daemon_row(what, size, min(bulk // size, 300_000), device=device)
        for size in SIZES[:2]:
            rows += daemon_row(what, size, 200 if full else 60, 20.0, device=device)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", action="store_true", help="watch a loop device, too (root)")
    parser.add_argument("--full", action="store_true", help="five times as many messages")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--what", action="append", choices=("offline", "online", "hub"))
    parser.add_argument("--stages", action="store_true", help="commit, checkpoint and deletion by themselves")
    arguments = parser.parse_args()
    if arguments.stages:
        print(json.dumps({size: stages(size) for size in SIZES}, indent=2))
        return
    whats = tuple(arguments.what or ("offline", "online", "hub"))
    rows = measure(device=arguments.device, whats=whats, full=arguments.full)
    print(json.dumps([asdict(r) for r in rows]) if arguments.json else table(rows))


if __name__ == "__main__":
    main()
