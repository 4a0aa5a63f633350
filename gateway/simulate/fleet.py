"""Daemons and apps of a demo or a simulation: real processes, started and ended here, and real MQTT clients.

Writes their configurations, starts them, and counts what their apps sent, what was acknowledged, and what came out at
the far end. Knows nothing of the line between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from gateway.control_client import ControlError, DaemonStopped, request
from gateway.errors import LinesideError

if TYPE_CHECKING:
    from gateway.config_values import HubUrl
    from gateway.simulate.scenario import Scenario

TICK_S = 0.05
START_S_MAX = 30.0
IN_FLIGHT_MAX = 20_000
CLIENT_WINDOW = 200
LATENCIES_MAX = 20_000
SUBSCRIBE_S_MAX = 10.0
HUB = "depot"
CENTRE = "control-centre"


# ---------------------------------------------------------------------- configurations


def toml_of(tables: Mapping[str, Any]) -> str:
    """Tables, and arrays of tables, of plain values as TOML. JSON's strings, numbers and arrays are TOML's."""
    lines: list[str] = []
    for name, value in tables.items():
        for table in value if isinstance(value, list) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(each)}" for key, each in table.items()]
    return "\n".join(lines) + "\n"


def hub_config(state: str, mqtt: int, amqp: int) -> str:
    """A Lineside that other gateways dial."""
    return toml_of(
        {
            "gateway": {"id": HUB, "state_dir": state, "log_level": "warning"},
            "mqtt": {"listen": [f"127.0.0.1:{mqtt}"]},
            "amqp": {"listen": [f"127.0.0.1:{amqp}"]},
            "local": {"when_full": "refuse", "max_bytes": "4GiB", "max_messages": 10_000_000},
        }
    )


def address(gateway: str, stream: str) -> str:
    """Where a gateway's stream is at the hub."""
    return f"edge.{gateway}.{stream}"


def gateway_config(scenario: Scenario, name: str, state: str, mqtt: int, hub: HubUrl | None, line: int) -> str:
    """One gateway of a scenario; it dials `line` on this machine, whatever hub is behind it."""
    tables: dict[str, Any] = {
        "gateway": {"id": name, "state_dir": state, "log_level": "warning"},
        "mqtt": {"listen": [f"127.0.0.1:{mqtt}"]},
        "hub": [_hub(scenario, f"{'amqps' if hub is not None and hub.tls else 'amqp'}://127.0.0.1:{line}")],
        "outbound": [],
        "inbound": [],
    }
    for app in scenario.apps:
        stream = app.stream_name
        if app.direction == "up":
            known = next((each for each in tables["outbound"] if each["stream"] == stream), None)
            if known is None:
                known = _outbound(stream, address(name, stream), app.class_)
                tables["outbound"].append(known)
            known["topics"].append(app.topic_name)
        elif all(each["stream"] != stream for each in tables["inbound"]):
            tables["inbound"].append(_inbound(stream, address(name, stream), app.topic_name))
    for table, overrides in scenario.gateways.config.items():
        found = tables.setdefault(table, {})
        for each in found if isinstance(found, list) else [found]:
            each.update(overrides)
    return toml_of({name: table for name, table in tables.items() if table != []})


def centre_config(scenario: Scenario, state: str, mqtt: int, hub: HubUrl) -> str:
    """The gateway at the far end of a hub that is not ours: it reads and writes there for the apps of the centre."""
    outbound: list[dict[str, Any]] = []
    inbound: list[dict[str, Any]] = []
    for name in scenario.gateways.names:
        for app in scenario.apps:
            where = address(name, app.stream_name)
            if app.direction == "up" and all(each["stream"] != where for each in inbound):
                inbound.append(_inbound(where, where, where))
            elif app.direction == "down" and all(each["stream"] != where for each in outbound):
                outbound.append(_outbound(where, where, app.class_) | {"topics": [where]})
    tables = {
        "gateway": {"id": CENTRE, "state_dir": state, "log_level": "warning"},
        "mqtt": {"listen": [f"127.0.0.1:{mqtt}"]},
        "hub": [_hub(scenario, str(hub))],
        "outbound": outbound,
        "inbound": inbound,
        "local": {"when_full": "refuse", "max_bytes": "4GiB", "max_messages": 10_000_000},
    }
    return toml_of({name: table for name, table in tables.items() if table != []})


def _hub(scenario: Scenario, url: str) -> dict[str, Any]:
    hub = scenario.hub
    table: dict[str, Any] = {"name": HUB, "urls": [url], "kind": hub.kind}
    for key in ("user", "password_file", "ca", "cert", "key"):
        if getattr(hub, key) is not None:
            table[key] = getattr(hub, key)
    return table


def _outbound(stream: str, where: str, class_: str) -> dict[str, Any]:
    return {
        "stream": stream,
        "topics": [],
        "hub": HUB,
        "address": where,
        "class": class_,
        "max_bytes": "4GiB",
        "max_messages": 10_000_000,
    }


def _inbound(stream: str, where: str, topic: str) -> dict[str, Any]:
    return {
        "stream": stream,
        "hub": HUB,
        "address": where,
        "topic": topic,
        "max_bytes": "4GiB",
        "max_messages": 10_000_000,
    }


# ---------------------------------------------------------------------- daemons


class Daemon:
    """One `lineside run`, as a process of its own. Its journal is in `directory`/`name`, or in `state`."""

    def __init__(self, directory: Path, name: str, config: str, state: Path | None = None) -> None:
        self.name = name
        self.state = state or directory / name
        self._config = directory / f"{name}.toml"
        self._log = directory / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._config.write_text(config)

    async def start(self) -> None:
        """Start, and return when it answers. Raises LinesideError with its log where it does not."""
        self.state.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
        with self._log.open("ab") as log:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway",
                "run",
                "--config",
                str(self._config),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us: we end it in order
            )
        end = time.monotonic() + START_S_MAX
        while time.monotonic() < end:
            if process.returncode is not None:
                log_text = self._log.read_text(errors="replace").strip()
                raise LinesideError(f"{self.name} ended at its start (status {process.returncode}): {log_text[-2000:]}")
            with contextlib.suppress(DaemonStopped, ControlError):
                await self.ask("status")
                return
            await asyncio.sleep(TICK_S)
        raise LinesideError(f"{self.name} did not start within {START_S_MAX:g} s")

    async def ask(self, do: str, timeout_s: float = 10.0) -> dict[str, Any]:
        """What the daemon says to one control command. Raises DaemonStopped, ControlError."""
        return await asyncio.to_thread(request, self.state, do, timeout_s=timeout_s)

    async def kill(self) -> None:
        """SIGKILL: what a power cut leaves of a process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def stop(self, timeout_s: float = 5.0) -> None:
        """SIGTERM, and SIGKILL for one that does not listen."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            await self.kill()


class Daemons:
    """Those of one run: whatever happens, none of them is left behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Daemon] = []

    async def start(self, name: str, config: str, state: Path | None = None) -> Daemon:
        daemon = Daemon(self._directory, name, config, state)
        self._started.append(daemon)
        await daemon.start()
        return daemon

    async def stop(self) -> None:
        await asyncio.gather(*(daemon.stop() for daemon in reversed(self._started)))


async def attached(hub: Daemon, links: Mapping[str, int], timeout_s: float = START_S_MAX) -> None:
    """Until each gateway has its links at our hub: before that nobody there reads what is sent to it."""
    end = time.monotonic() + timeout_s
    missing = set(links)
    while time.monotonic() < end:
        reply = await hub.ask("clients")
        missing -= {c["client"] for c in reply["clients"] if c.get("links", 0) >= links.get(c["client"], 1)}
        if not missing:
            return
        await asyncio.sleep(TICK_S)
    raise LinesideError(f"{', '.join(sorted(missing)[:5])} did not attach to the hub within {timeout_s:g} s")


# ---------------------------------------------------------------------- apps


@dataclass(eq=False)
class Tally:
    """One producer: what was sent and acknowledged, and what came out at the far end."""

    published: int = 0
    acknowledged: int = 0
    received: int = 0
    reordered: int = 0
    seen: set[int] = field(default_factory=set)
    highest: int = -1

    def arrived(self, number: int) -> None:
        self.received += 1
        if number in self.seen:
            return
        self.seen.add(number)
        if number < self.highest:
            self.reordered += 1
        self.highest = max(self.highest, number)

    @property
    def lost(self) -> int:
        return self.published - len(self.seen)

    def report(self) -> dict[str, int]:
        return {
            "published": self.published,
            "delivered": len(self.seen),
            "lost": self.lost,
            "duplicates": self.received - len(self.seen),
            "reordered": self.reordered,
        }


def leave(client: paho.Client) -> None:
    """Disconnect, and end the thread. paho's own `loop_stop` trips over a thread that has just ended by itself."""
    thread = client._thread
    client.disconnect()
    if thread is not None:
        thread.join()


class App:
    """A paho client with a durable session that hands on what arrives on its filters."""

    def __init__(
        self,
        name: str,
        port: int,
        filters: Iterable[str],
        arrived: Callable[[str, bytes], None],
    ) -> None:
        self.subscribed = threading.Event()
        self._arrived = arrived
        self._filters = [(each, 1) for each in filters]
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=name, clean_session=False, protocol=paho.MQTTv311
        )
        client.max_inflight_messages_set(CLIENT_WINDOW)
        client.reconnect_delay_set(1, 1)
        client.on_connect = self._connected
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.on_message = self._message
        client.connect("127.0.0.1", port)
        client.loop_start()

    def _connected(self, client: paho.Client, *_: Any) -> None:
        if self._filters:
            client.subscribe(self._filters)
        else:
            self.subscribed.set()

    def _message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        self._arrived(message.topic, bytes(message.payload))

    async def ready(self) -> None:
        if not await asyncio.to_thread(self.subscribed.wait, SUBSCRIBE_S_MAX):
            raise LinesideError(f"an app could not subscribe within {SUBSCRIBE_S_MAX:g} s")

    def close(self) -> None:
        leave(self.client)


class Publisher:
    """Publishes numbered messages at a rate through a client, and counts and times the acknowledgements."""

    def __init__(self, acks: Acknowledgements, topic: str, tally: Tally, body: Callable[[int], bytes], qos: int = 1):
        self._acks = acks
        self._topic = topic
        self._tally = tally
        self._body = body
        self._qos = qos

    def keep_up(self, target: float) -> None:
        tally = self._tally
        while tally.published < target and self._acks.room:
            # Counted first: what arrives before `publish` returns must not be more than was published.
            number = tally.published
            tally.published += 1
            self._acks.publish(self._topic, self._body(number), self._qos, tally)


class Acknowledgements:
    """What one client has sent and not been answered for: its producers' tallies, by packet identifier."""

    def __init__(self, client: paho.Client) -> None:
        self.durations_s: deque[float] = deque(maxlen=LATENCIES_MAX)
        self._client = client
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Tally, float]] = {}
        self._early: set[int] = set()
        client.on_publish = self._acknowledged

    @property
    def room(self) -> bool:
        """Whether the client may be given more: its packet identifiers are 16 bits, and its queue is memory."""
        return len(self._waiting) < IN_FLIGHT_MAX

    def publish(self, topic: str, body: bytes, qos: int, tally: Tally) -> None:
        began = time.monotonic()
        mid = self._client.publish(topic, body, qos=qos).mid
        with self._lock:
            if mid in self._early:
                self._early.discard(mid)
                self._count(tally, began, qos)
            else:
                self._waiting[mid] = tally, began if qos else 0.0

    def _acknowledged(self, _client: Any, _data: Any, mid: int, *_: Any) -> None:
        with self._lock:
            found = self._waiting.pop(mid, None)
            if found is None:
                self._early.add(mid)
            else:
                self._count(found[0], found[1], 1 if found[1] else 0)

    def _count(self, tally: Tally, began: float, qos: int) -> None:
        tally.acknowledged += 1
        if qos:
            self.durations_s.append(time.monotonic() - began)
