"""`lineside demo`: a hub, a gateway, a line with tunnels and apps at both ends, and a verdict on the promises.

Hub and gateway are two real daemons, started as their own processes; the apps are paho clients; only the line between
the two is ours to break. Everything is on loopback and in a temporary directory, and gone afterwards.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.control_client import ControlError, DaemonStopped
from gateway.faultlink import FaultLink, Line
from gateway.simulate.fleet import (
    CENTRE,
    TICK_S,
    Acknowledgements,
    App,
    Daemons,
    Publisher,
    Tally,
    address,
    attached,
    hub_config,
)
from gateway.simulate.proxy import free_ports

GATEWAY = "loco-4711"
OUT_PER_S, IN_PER_S = 400, 60
DRAIN_S_MAX = 30.0

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
        self._daemons = Daemons(self._directory)

    async def run(self) -> dict[str, Any]:
        try:
            return await self._run()
        finally:
            await self._daemons.stop()
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _run(self) -> dict[str, Any]:
        ports = free_ports(3)
        config = hub_config(str(self._directory / "hub"), ports[0], ports[1])
        hub = await self._daemons.start("hub", config)
        link = FaultLink(ports[1])
        await link.start()
        config = GATEWAY_CONFIG.format(
            gateway=GATEWAY, state=self._directory / "gateway", mqtt=ports[2], line=link.port
        )
        self._gateway = await self._daemons.start("gateway", config)
        far = App(CENTRE, ports[0], [address(GATEWAY, "telemetry")], self._far_arrived)
        near = App("train-computer", ports[2], ["commands/#"], self._near_arrived)
        train = Publisher(Acknowledgements(near.client), "train/speed", self.outbound, _body)
        centre = Publisher(Acknowledgements(far.client), address(GATEWAY, "commands"), self.inbound, _body)
        try:
            for app in (far, near):
                await app.ready()
            await attached(hub, {GATEWAY: 2})
            await self._drive(link, train, centre)
        finally:
            for app in (near, far):
                app.close()
            await link.stop()
        return self._verdict()

    def _near_arrived(self, _topic: str, body: bytes) -> None:
        self.inbound.arrived(_number(body))

    def _far_arrived(self, _topic: str, body: bytes) -> None:
        self.outbound.arrived(_number(body))
        self._resumed(time.monotonic())

    # ------------------------------------------------------------------ the journey

    async def _drive(self, link: FaultLink, train: Publisher, centre: Publisher) -> None:
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
            status = await self._gateway.ask("status", timeout_s=2.0)
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


def _body(number: int) -> bytes:
    return b"%d speed=%d km/h" % (number, random.randint(0, 230))


def _number(body: bytes) -> int:
    return int(body.partition(b" ")[0])


def kept(verdict: dict[str, Any]) -> bool:
    """Whether every promise held."""
    return all(verdict[way]["lost"] == 0 and verdict[way]["reordered"] == 0 for way in ("outbound", "inbound")) and (
        verdict["outbound"]["published"] > 0 and verdict["inbound"]["published"] > 0
    )


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
