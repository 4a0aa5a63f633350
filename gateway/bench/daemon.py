"""The real daemon for benchmarks, `python -m gateway run` in its own process, and certificates for mutual TLS.

With the defaults of its configuration except for limits. It ends with the process that started it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from gateway.bench.brokers import Part, free_port
from gateway.control_client import ControlError, DaemonStopped, request

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = """\
[gateway]
id = "loco-4711"
state_dir = "{state}"
{more_gateway}
log_level = "warning"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
clients_max = {clients}
{more_mqtt}
{amqp}
[[hub]]
name = "depot"
urls = ["amqps://127.0.0.1:{hub}"]
ca = "{pki.ca}"
cert = "{pki.client.cert}"
key = "{pki.client.key}"
[[outbound]]
stream = "bench"
topics = ["bench/#"]
hub = "depot"
address = "edge.{{gateway}}.bench"
max_bytes = "32GiB"
max_messages = 20000000
{more}
"""


class _Certificate(Protocol):
    @property
    def cert(self) -> Path: ...
    @property
    def key(self) -> Path: ...


class Certificates(Protocol):
    """One authority and what it issued: to a server at 127.0.0.1, and to the gateway."""

    @property
    def ca(self) -> Path: ...
    @property
    def server(self) -> _Certificate: ...
    @property
    def client(self) -> _Certificate: ...


@dataclass(frozen=True, slots=True)
class Files:
    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Issued:
    ca: Path
    server: Files
    client: Files


def issue(directory: Path) -> Issued:
    """An authority of a day, made for one run."""
    from security import pki

    directory.mkdir(parents=True, exist_ok=True)
    validity = pki.Validity.of(datetime.now(UTC), 2)
    key = pki.new_key("p256")
    authority = pki.Authority(pki.new_authority("Lineside bench", key, validity, pki.Constraints()), key)
    ca = directory / "ca.pem"
    ca.write_bytes(pki.certificate_to_pem(authority.certificate))

    def holder(name: str, kind: pki.Kind, names: pki.Names) -> Files:
        files = Files(directory / f"{name}.pem", directory / f"{name}.key")
        own = pki.new_key("p256")
        issued = pki.issue(authority, name, kind, names, own.public_key(), validity)
        files.cert.write_bytes(pki.certificate_to_pem(issued))
        files.key.touch(0o600)
        files.key.write_bytes(pki.key_to_pem(own))
        return files

    local = pki.Names(("localhost",), (ip_address("127.0.0.1"),))
    return Issued(ca, holder("localhost", pki.Kind.HUB, local), holder("loco-4711", pki.Kind.GATEWAY, pki.Names()))


def import_path(*more: Path) -> str:
    """PYTHONPATH for child processes that import the same Lineside as this one."""
    return os.pathsep.join(filter(None, (str(ROOT), *map(str, more), os.environ.get("PYTHONPATH"))))


class Daemon(Part):
    """The real daemon with one outbound stream for `bench/#` and a hub at `hub_port`, there or not."""

    name = "lineside"

    def __init__(
        self,
        pki: Certificates,
        hub_port: int,
        directory: Path | None = None,
        clients: int = 1000,
        *,
        amqp: bool = False,
        state_dir: Path | None = None,
        gateway: str = "",
        mqtt: str = "",
        more: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`amqp`: for AMQP apps, too, at `amqp_port`. `gateway` and `mqtt` go into those tables, `more` to the end."""
        super().__init__(directory)
        self.amqp_port = free_port() if amqp else None
        self._clients = clients
        self.port = free_port()
        self._hub_port = hub_port
        self._pki = pki
        self.state_dir = state_dir or self.directory / "state"
        self._gateway = gateway
        self._mqtt = mqtt
        self._more = more
        self._environment = environment or {}

    def configure(self) -> None:
        amqp = "" if self.amqp_port is None else f'[amqp]\nlisten = ["127.0.0.1:{self.amqp_port}"]'
        text = CONFIG.format(
            state=self.state_dir,
            mqtt=self.port,
            hub=self._hub_port,
            pki=self._pki,
            clients=self._clients,
            amqp=amqp,
            more_gateway=self._gateway,
            more_mqtt=self._mqtt,
            more=self._more,
        )
        (self.directory / "lineside.toml").write_text(text)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "gateway", "run", "--config", str(self.directory / "lineside.toml")]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": import_path(), "NOTIFY_SOCKET": "", "WATCHDOG_USEC": "", **self._environment}

    def ready(self) -> bool:
        try:
            self.status()
        except (DaemonStopped, ControlError):
            return False
        return True

    def status(self) -> dict[str, Any]:
        return request(self.state_dir, "status")

    def waiting(self) -> int:
        """How many messages the hub has not settled yet."""
        return int(next(s["waiting"] for s in self.status()["streams"] if s["name"] == "bench"))

    def memory_bytes(self, what: str = "VmRSS") -> int:
        """From /proc: VmRSS is resident now, VmHWM was resident at most."""
        return memory_bytes(self.pid, what)

    def cpu_s(self) -> float:
        return cpu_s(self.pid)


def memory_bytes(pid: int, what: str = "VmRSS") -> int:
    """A field of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


def cpu_s(pid: int) -> float:
    """User and system time of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def group(pid: int) -> list[int]:
    """The processes of this one's group: some brokers are started by a shell, or by a helper of their own."""
    wanted = os.getpgid(pid)
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                fields = (each / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if int(fields[2]) == wanted:
                found.append(int(each.name))
    return found


def exact_cpu_s(pid: int) -> float:
    """As group_cpu_s, by the scheduler's nanoseconds and not its ticks; without threads that have ended."""
    used_ns = 0
    for each in group(pid):
        for task in Path(f"/proc/{each}/task").glob("*/schedstat"):
            try:
                used_ns += int(task.read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
    return used_ns / 1e9


def group_cpu_s(pid: int) -> float:
    """As cpu_s, of all of the group that still run."""
    used_s = 0.0
    for each in group(pid):
        try:
            used_s += cpu_s(each)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return used_s
