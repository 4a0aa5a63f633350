"""`lineside demo`: a hub, a gateway, a line with tunnels and apps at both ends, and a verdict on the promises.

Hub and gateway are two real daemons, started as their own processes; the apps are paho clients; only the line between
the two is ours to break. Everything is on loopback and in a temporary directory, and gone afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from gateway.control_client import ControlError, DaemonStopped, request
from gateway.errors import LinesideError
from gateway.faultlink import FaultLink, Line

GATEWAY = "loco-4711"
OUT_PER_S, IN_PER_S = 400, 60
TICK_S = 0.05
START_S_MAX = 15.0
DRAIN_S_MAX = 30.0
IN_FLIGHT_MAX = 20_000

HUB_CONFIG = """
[gateway]
id = "depot"
state_dir = "{state}"
log_level = "warning"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
[amqp]
listen = ["127.0.0.1:{amqp}"]
[local]
when_full = "refuse"
max_bytes = "1GiB"
max_messages = 10000000
"""

GATEWAY_CONFIG = """
[gateway]
id = "{gateway}"
state_dir = "{state}"
log_level = "warning"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{line}"]
kind = "lineside"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge.{{gateway}}.telemetry"
[[inbound]]
stream = "commands"
hub = "depot"
address = "edge.{{gateway}}.commands"
topic = "commands/{{subject}}"
"""


@dataclass
class Tally:
    """One direction: what was acknowledged to the sender, and what came out at the far end."""

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


class App:
    """A paho client with a durable session that counts what arrives on one filter."""

    def __init__(self, name: str, port: int, tally: Tally, filter_: str) -> None:
        self.subscribed = threading.Event()
        self.arrived: Callable[[float], None] = lambda now: None
        self._tally = tally
        self._filter = filter_
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=name, clean_session=False, protocol=paho.MQTTv311
        )
        client.max_inflight_messages_set(200)
        client.on_connect = self._connected
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.on_message = self._message
        client.connect("127.0.0.1", port)
        client.loop_start()

    def _connected(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(self._filter, qos=1)

    def _message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        self._tally.arrived(int(message.payload.split(b" ", 1)[0]))
        self.arrived(time.monotonic())

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@dataclass
class Snapshot:
    """What the view shows."""

    clock_s: float
    line: Line
    hub_state: str
    backlog: int
    in_flight: int
    outbound: Tally
    inbound: Tally
    rate_in: float
    rate_out: float
    phase: str


class Demo:
    """One run. `show` is called with every Snapshot."""

    def __init__(self, seconds: float, show: Callable[[Snapshot], None]) -> None:
        self.seconds = seconds
        self.show = show
        self.outbound, self.inbound = Tally(), Tally()
        self.tunnels = 0
        self.resumes_s: list[float] = []
        self.drain_s = 0.0
        self._restored: float | None = None
        self._backlog: tuple[float, int] | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="lineside-demo-"))
        self._processes: list[asyncio.subprocess.Process] = []

    async def run(self) -> dict[str, Any]:
        try:
            return await self._run()
        finally:
            for process in reversed(self._processes):
                if process.returncode is None:
                    process.terminate()
            for process in self._processes:
                try:
                    await asyncio.wait_for(process.wait(), 5)
                except TimeoutError:
                    process.kill()
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _run(self) -> dict[str, Any]:
        ports = _free_ports(3)
        await self._start("hub", HUB_CONFIG.format(state=self._directory / "hub", mqtt=ports[0], amqp=ports[1]))
        link = FaultLink(ports[1])
        await link.start()
        config = GATEWAY_CONFIG.format(
            gateway=GATEWAY, state=self._directory / "gateway", mqtt=ports[2], line=link.port
        )
        await self._start("gateway", config)
        far = App("control-centre", ports[0], self.outbound, f"edge.{GATEWAY}.telemetry")
        near = App("train-computer", ports[2], self.inbound, "commands/#")
        train = _Publisher(near.client, "train/speed", self.outbound)
        centre = _Publisher(far.client, f"edge.{GATEWAY}.commands", self.inbound)
        far.arrived = self._resumed
        try:
            for app in (far, near):
                if not await asyncio.to_thread(app.subscribed.wait, 10):
                    raise LinesideError("an app could not subscribe within 10 s")
            await self._attached()
            await self._drive(link, train, centre)
        finally:
            for app in (near, far):
                app.close()
            await link.stop()
        return self._verdict()

    async def _start(self, name: str, config: str) -> None:
        state = self._directory / name
        state.mkdir()
        path = self._directory / f"{name}.toml"
        path.write_text(config)
        environment = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            "run",
            "--config",
            str(path),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=(self._directory / f"{name}.log").open("wb"),
            env=environment,
        )
        self._processes.append(process)
        end = time.monotonic() + START_S_MAX
        while time.monotonic() < end:
            if process.returncode is not None:
                log = (self._directory / f"{name}.log").read_text(errors="replace").strip()
                raise LinesideError(f"the {name} ended at its start (status {process.returncode}): {log[-2000:]}")
            with contextlib.suppress(DaemonStopped, ControlError):
                await asyncio.to_thread(request, state, "status")
                return
            await asyncio.sleep(TICK_S)
        raise LinesideError(f"the {name} did not start within {START_S_MAX:g} s")

    async def _attached(self) -> None:
        """Until the gateway has its two links at the hub: before that nobody there reads what is sent to it."""
        end = time.monotonic() + START_S_MAX
        while time.monotonic() < end:
            reply = await asyncio.to_thread(request, self._directory / "hub", "clients")
            if any(c["client"] == GATEWAY and c["links"] == 2 for c in reply["clients"]):
                return
            await asyncio.sleep(TICK_S)
        raise LinesideError(f"the gateway did not attach to the hub within {START_S_MAX:g} s")

    # ------------------------------------------------------------------ the journey

    async def _drive(self, link: FaultLink, train: _Publisher, centre: _Publisher) -> None:
        began = time.monotonic()
        tunnels = self._timetable()
        now = 0.0
        while now < self.seconds:
            now = time.monotonic() - began
            inside = any(start <= now < end for start, end, _ in tunnels)
            if inside and link.line is Line.UP:
                self.tunnels += 1
                link.cut(next(kind for start, end, kind in tunnels if start <= now < end))
            elif not inside and link.line is not Line.UP:
                self._restore(link)
            train.keep_up(now * OUT_PER_S)
            centre.keep_up(now * IN_PER_S)
            await self._look(now, link, "in the tunnel" if inside else "on the line")
            await asyncio.sleep(TICK_S)
        if link.line is not Line.UP:
            self._restore(link)
        await self._drain(began, link)

    def _timetable(self) -> list[tuple[float, float, Line]]:
        """Three tunnels within the first four fifths: silent, with a FIN, silent and longer."""
        s = self.seconds
        return [
            (s * 0.12, s * 0.24, Line.TUNNEL),
            (s * 0.36, s * 0.44, Line.CLOSED),
            (s * 0.55, s * 0.80, Line.TUNNEL),
        ]

    def _restore(self, link: FaultLink) -> None:
        link.restore()
        self._restored = time.monotonic()
        self._backlog = self._restored, self.outbound.published - 1

    def _resumed(self, now: float) -> None:
        """A message reached the far end: the first after a tunnel, perhaps, or the last that waited in it."""
        restored = self._restored
        if restored is not None:
            self._restored = None
            self.resumes_s.append(now - restored)
        if self._backlog is not None and self.outbound.highest >= self._backlog[1]:
            self.drain_s = now - self._backlog[0]
            self._backlog = None

    async def _drain(self, began: float, link: FaultLink) -> None:
        start = time.monotonic()
        while time.monotonic() - start < DRAIN_S_MAX:
            await self._look(time.monotonic() - began, link, "arriving")
            if not self.outbound.lost and not self.inbound.lost:
                break
            await asyncio.sleep(TICK_S)
        if self._backlog is not None:
            self.drain_s = time.monotonic() - self._backlog[0]
        await self._look(time.monotonic() - began, link, "arrived")

    async def _look(self, clock_s: float, link: FaultLink, phase: str) -> None:
        try:
            status = await asyncio.to_thread(request, self._directory / "gateway", "status", timeout_s=2.0)
        except (DaemonStopped, ControlError):
            return
        out = next(s for s in status["streams"] if s["name"] == "telemetry")
        self.show(
            Snapshot(
                clock_s,
                link.line,
                status["hubs"][0]["state"],
                out["waiting"],
                out["in_flight"],
                self.outbound,
                self.inbound,
                status["rates"]["in_per_s"],
                status["rates"]["out_per_s"],
                phase,
            )
        )

    def _verdict(self) -> dict[str, Any]:
        return {
            "outbound": self.outbound.report(),
            "inbound": self.inbound.report(),
            "tunnels": self.tunnels,
            "resume_s_max": round(max(self.resumes_s, default=0.0), 3),
            "drain_s": round(self.drain_s, 3),
        }


class _Publisher:
    """Publishes numbered messages at a rate, through a client whose acknowledgements it counts."""

    def __init__(self, client: paho.Client, topic: str, tally: Tally) -> None:
        self._client = client
        self._topic = topic
        self._tally = tally
        client.on_publish = self._acknowledged

    def _acknowledged(self, *_: Any) -> None:
        self._tally.acknowledged += 1

    def keep_up(self, target: float) -> None:
        tally = self._tally
        while tally.published < target and tally.published - tally.acknowledged < IN_FLIGHT_MAX:
            body = f"{tally.published} speed={random.randint(0, 230)} km/h"
            self._client.publish(self._topic, body, qos=1)
            tally.published += 1


def kept(verdict: dict[str, Any]) -> bool:
    """Whether every promise held."""
    return all(verdict[way]["lost"] == 0 and verdict[way]["reordered"] == 0 for way in ("outbound", "inbound")) and (
        verdict["outbound"]["published"] > 0 and verdict["inbound"]["published"] > 0
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def run_demo(seconds: float, as_json: bool) -> int:
    """Run the demo; print the verdict; 0 when every promise held, 1 when one broke."""
    if as_json:
        verdict = asyncio.run(Demo(seconds, lambda snapshot: None).run())
        print(json.dumps(verdict))
        return 0 if kept(verdict) else 1
    from gateway.demo_view import View

    with View(seconds) as view:
        verdict = asyncio.run(Demo(seconds, view.show).run())
    view.verdict(verdict, kept(verdict))
    return 0 if kept(verdict) else 1
