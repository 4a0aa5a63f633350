"""Runs a scenario: daemons, apps and a line that follows its timetable; counts what comes of it.

Everything is a process or a client of its own, on loopback and in one directory. Knows how a scenario is carried out;
what a step does to bytes is `proxy`'s, what a count means is `verdict`'s.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.control_client import ControlError, DaemonStopped
from gateway.errors import LinesideError
from gateway.simulate import proxy
from gateway.simulate.fleet import (
    CENTRE,
    HUB,
    START_S_MAX,
    TICK_S,
    Acknowledgements,
    App,
    Daemon,
    Daemons,
    Publisher,
    Tally,
    address,
    attached,
    centre_config,
    gateway_config,
    hub_config,
)
from gateway.simulate.scenario import AppTable, Scenario, Step
from gateway.simulate.verdict import Cut, Judgement, Measured, Way, judge, quantile

SAMPLE_S_MIN = 0.25
SAMPLES_MAX = 4000
STARTS_AT_ONCE = 4
ASKS_AT_ONCE = 8
RESERVOIR_MAX = 100_000
INTERVAL_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Sample:
    """How everything stood at one moment, `at_s` seconds after the timetable began."""

    at_s: float
    link: str
    phase: str
    backlog: int
    in_flight: int
    published: int
    delivered: int
    links_up: int
    latency_p50_s: float | None
    latency_p99_s: float | None


@dataclass(frozen=True, slots=True)
class Mark:
    """From `at_s` on the line was `link`."""

    at_s: float
    link: str


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a scenario."""

    scenario: Scenario
    name: str
    scale: float
    proxy: str
    seconds: float
    cuts: int
    measured: Measured
    verdict: tuple[Judgement, ...]
    samples: tuple[Sample, ...]
    marks: tuple[Mark, ...]

    @property
    def kept(self) -> bool:
        return all(judgement.kept for judgement in self.verdict)


class Latencies:
    """Times on the way: those of the last interval, and a fair sample of all."""

    def __init__(self) -> None:
        self._interval: deque[float] = deque(maxlen=INTERVAL_MAX)
        self._all: list[float] = []
        self._count = 0

    def add(self, latency_s: float) -> None:
        self._interval.append(latency_s)
        self._count += 1
        if len(self._all) < RESERVOIR_MAX:
            self._all.append(latency_s)
        elif (slot := random.randrange(self._count)) < RESERVOIR_MAX:
            self._all[slot] = latency_s

    def interval(self) -> list[float]:
        taken = list(self._interval)
        self._interval.clear()
        return taken

    @property
    def p99(self) -> float | None:
        return quantile(self._all, 0.99)


@dataclass
class _Return:
    """The line came back to one gateway: what it waits for."""

    at: float
    marks: dict[Tally, int]  # the last number that waited, by tally
    resumed: bool = False
    resume_s: float | None = None
    drain_s: float | None = None

    def arrived(self, now: float) -> bool:
        """One more message of this gateway's arrived; true when nothing is waited for any more."""
        if self.resume_s is None:
            self.resume_s = now - self.at
        if self.drain_s is None and all(tally.highest >= mark for tally, mark in self.marks.items()):
            self.drain_s = now - self.at
        return self.drain_s is not None


@dataclass
class Returns:
    """The cuts of a run, and what came after each. Called from the loop and from the apps' threads."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[str, _Return] = field(default_factory=dict)
    _cuts: list[tuple[bool, list[_Return]]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self._cuts)

    def cut(self) -> None:
        """The line is gone; what was still awaited from before can't be told from what this cut delays."""
        with self._lock:
            self._open.clear()
            self._cuts.append((True, []))

    def restored(self, now: float, gateways: dict[str, list[Tally]], *, resumes: bool = True) -> None:
        """The line is back. Only gateways with something waiting are watched. `resumes`: whether resuming counts."""
        with self._lock:
            if not self._cuts:
                return
            self._cuts[-1] = resumes, self._cuts[-1][1]
            for name, tallies in gateways.items():
                marks = {tally: tally.published - 1 for tally in tallies if tally.lost}
                if marks:
                    self._open[name] = found = _Return(now, marks)
                    self._cuts[-1][1].append(found)

    def arrived(self, gateway: str, now: float) -> None:
        with self._lock:
            found = self._open.get(gateway)
            if found is not None and found.arrived(now):
                del self._open[gateway]

    def cuts(self) -> tuple[Cut, ...]:
        with self._lock:
            return tuple(
                Cut(
                    tuple(each.resume_s for each in returns if each.resume_s is not None and resumes),
                    tuple(each.drain_s for each in returns if each.drain_s is not None),
                )
                for resumes, returns in self._cuts
            )


class Simulation:
    """One run of one scenario in an empty directory. `show` is called with every Sample."""

    def __init__(
        self,
        scenario: Scenario,
        name: str,
        directory: Path,
        show: Callable[[Sample], None],
        *,
        scale: float = 1.0,
        toxiproxy: str | None = None,
    ) -> None:
        self.scenario = scenario
        self._name = name
        self._directory = directory
        self._show = show
        self._scale = scale
        self._toxiproxy = toxiproxy
        self._daemons = Daemons(directory)
        self._gateways: dict[str, Daemon] = {}
        self._far_end: Daemon | None = None  # our own hub, or the gateway beyond somebody else's
        self._apps: list[App] = []
        self._acknowledgements: list[Acknowledgements] = []
        self._tallies: dict[tuple[str, int], Tally] = {
            (name, number): Tally() for name in scenario.gateways.names for number in range(len(scenario.apps))
        }
        self._publishers: list[tuple[Publisher, float]] = []
        self._returns = Returns()
        self._latencies = Latencies()
        self._urgent = Latencies()
        self._back_at = 0.0  # when the line last came back
        self._samples: list[Sample] = []
        self._marks: list[Mark] = []
        self._began = 0.0
        self._memory_bytes = 0
        self._connections = 0
        self._ledger = 0

    async def run(self) -> Result:
        try:
            async with proxy.server(self._toxiproxy, self._directory) as found:
                return await self._run(found)
        finally:
            for app in self._apps:
                app.close()
            await self._daemons.stop()

    async def _run(self, found: proxy.Server) -> Result:
        hub = self.scenario.hub.url
        far_port = await self._start_far_end()
        where = f"127.0.0.1:{self._hub_port}" if hub is None else f"{hub.host}:{hub.port}"
        line = await asyncio.to_thread(proxy.FaultyLine, found, where)
        try:
            await self._start_gateways(line.port)
            await self._start_apps(far_port)
            await self._attached()
            await self._drive(line)
        finally:
            await asyncio.to_thread(line.close)
        return self._result(found)

    # ------------------------------------------------------------------ up

    async def _start_far_end(self) -> int:
        """Start what the centre's apps speak to; return its MQTT port."""
        hub = self.scenario.hub.url
        mqtt, self._hub_port = proxy.free_ports(2)
        if hub is None:
            config = hub_config(str(self._directory / HUB), mqtt, self._hub_port)
            self._far_end = await self._daemons.start(HUB, config)
        else:
            config = centre_config(self.scenario, str(self._directory / CENTRE), mqtt, hub)
            self._far_end = await self._daemons.start(CENTRE, config)
        return mqtt

    async def _start_gateways(self, line: int) -> None:
        names = self.scenario.gateways.names
        ports = dict(zip(names, proxy.free_ports(len(names)), strict=True))
        turn = asyncio.Semaphore(STARTS_AT_ONCE)

        async def start(name: str) -> None:
            async with turn:
                state = str(self._directory / name)
                config = gateway_config(self.scenario, name, state, ports[name], self.scenario.hub.url, line)
                self._gateways[name] = await self._daemons.start(name, config)

        await asyncio.gather(*(start(name) for name in names))
        self._ports = ports

    async def _start_apps(self, far_port: int) -> None:
        scenario = self.scenario
        up = {address(name, app.stream_name): name for name in scenario.gateways.names for app in scenario.ways("up")}
        self._gateway_of = up
        far = await self._app(CENTRE + "-apps", far_port, list(up), self._far_arrived)
        far_acks = Acknowledgements(far.client)
        self._acknowledgements.append(far_acks)
        down = sorted({app.topic_name for app in scenario.ways("down")})
        for name in scenario.gateways.names:
            near = await self._app(f"apps-of-{name}", self._ports[name], down, self._near_arrived(name))
            acks = Acknowledgements(near.client)
            self._acknowledgements.append(acks)
            for number, app in enumerate(scenario.apps):
                is_up = app.direction == "up"
                topic = app.topic_name if is_up else address(name, app.stream_name)
                tally = self._tallies[name, number]
                publisher = Publisher(acks if is_up else far_acks, topic, tally, _bodies(number, app), app.qos)
                self._publishers.append((publisher, app.rate))

    async def _app(self, name: str, port: int, filters: list[str], arrived: Callable[[str, bytes], None]) -> App:
        app = await asyncio.to_thread(App, name, port, filters, arrived)
        self._apps.append(app)
        await app.ready()
        return app

    async def _attached(self) -> None:
        """Until every link is up, so that what is lost later is lost by the line."""
        assert self._far_end is not None
        if self.scenario.hub.url is None:
            links = len({app.stream_name for app in self.scenario.apps})
            await attached(self._far_end, dict.fromkeys(self._gateways, links))
            return
        end = time.monotonic() + START_S_MAX
        waiting = [self._far_end, *self._gateways.values()]
        while waiting:
            daemon = waiting[-1]
            hub = (await daemon.ask("status"))["hubs"][0]
            if hub["state"] == "up":
                waiting.pop()
            elif time.monotonic() > end:
                raise LinesideError(f"{daemon.name} has no link to the hub after {START_S_MAX:g} s: {hub}")
            else:
                await asyncio.sleep(TICK_S)

    # ------------------------------------------------------------------ messages

    def _far_arrived(self, topic: str, body: bytes) -> None:
        name = self._gateway_of.get(topic)
        if name is not None:
            self._arrived(name, body, up=True)

    def _near_arrived(self, name: str) -> Callable[[str, bytes], None]:
        return lambda _topic, body: self._arrived(name, body, up=False)

    def _arrived(self, name: str, body: bytes, *, up: bool) -> None:
        now = time.monotonic()
        number, count, sent_us = (int(each) for each in body.split(b" ", 3)[:3])
        self._tallies[name, number].arrived(count)
        if up:
            self._latencies.add(now - sent_us / 1e6)
            if self.scenario.apps[number].class_ == "urgent":
                self._urgent.add(now - max(self._back_at, sent_us / 1e6))
            self._returns.arrived(name, now)

    # ------------------------------------------------------------------ the timetable

    async def _drive(self, line: proxy.FaultyLine) -> None:
        self._began = time.monotonic()
        watching = asyncio.create_task(self._watch())
        publishing = asyncio.create_task(self._publish())
        try:
            await self._follow(line)
            publishing.cancel()
            await self._settle()
        finally:
            for task in (publishing, watching):
                task.cancel()
            failures = await asyncio.gather(publishing, watching, return_exceptions=True)
        for failure in failures:
            if isinstance(failure, Exception):
                raise failure
        await self._look("arrived")

    async def _publish(self) -> None:
        while True:
            elapsed_s = min(time.monotonic() - self._began, self.scenario.duration_s(self._scale))
            for publisher, rate in self._publishers:
                publisher.keep_up(elapsed_s * rate)
            await asyncio.sleep(TICK_S)

    async def _follow(self, line: proxy.FaultyLine) -> None:
        """Take the line through its steps, each at its own time."""
        down = False
        for start_s, end_s, step in self.scenario.timetable(self._scale):
            await self._until(start_s)
            if step.link == "flapping":
                down = await self._flap(line, step, end_s, down)
                continue
            back = down and not step.is_cut
            if back:
                self._restored()
            if step.is_cut and not down:
                self._returns.cut()
            down = step.is_cut
            self._mark(step.label)
            await asyncio.to_thread(line.apply, proxy.line_state(step))
            if back:
                await self._signal()
            if step.link == "half-open":
                self._restored()  # whoever dials anew gets through: the rest is up to the gateway
                down = False
            elif step.link == "hub-restart":
                await self._restart_hub(step, end_s)
                down = False
        await self._until(self.scenario.duration_s(self._scale))
        if down:
            self._restored()
        self._mark("up")
        await asyncio.to_thread(line.apply, proxy.LineState())
        if down:
            await self._signal()

    async def _signal(self) -> None:
        """What the kernel of a machine with a radio would tell: the line is back. A proxy's end is no news to it."""
        if self.scenario.gateways.signal:
            asked = (daemon.ask("network-changed", timeout_s=5.0) for daemon in self._gateways.values())
            for answer in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(answer, Exception) and not isinstance(answer, (DaemonStopped, ControlError)):
                    raise answer

    async def _flap(self, line: proxy.FaultyLine, step: Step, end_s: float, down: bool) -> bool:
        """Open and closed in turn, beginning closed. Returns whether the line is down at the end."""
        assert step.every_s is not None
        every_s = max(step.every_s * self._scale, TICK_S)
        while (now_s := time.monotonic() - self._began) < end_s:
            down = not down
            if down:
                self._returns.cut()
            else:
                self._restored()
            self._mark("flapping: closed" if down else "flapping: open")
            await asyncio.to_thread(line.apply, proxy.line_state(step, closed=down))
            if not down:
                await self._signal()
            await self._until(min(now_s + every_s, end_s))
        return down

    async def _restart_hub(self, step: Step, end_s: float) -> None:
        """The hub is away until the step ends. Its own apps take up to a second to notice: resuming is not judged."""
        assert self._far_end is not None
        if step.kill:
            await self._far_end.kill()
        else:
            await self._far_end.stop()
        await self._until(end_s)
        await self._far_end.start()
        self._restored(resumes=False)

    def _restored(self, *, resumes: bool = True) -> None:
        apps = self.scenario.apps
        up = {
            name: [self._tallies[name, n] for n, app in enumerate(apps) if app.direction == "up" and app.qos]
            for name in self._gateways
        }
        self._back_at = time.monotonic()
        self._returns.restored(self._back_at, up, resumes=resumes)

    def _mark(self, link: str) -> None:
        self._marks.append(Mark(time.monotonic() - self._began, link))

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - (time.monotonic() - self._began)))

    async def _settle(self) -> None:
        """Until everything has arrived, or the scenario's patience is at its end."""
        end = time.monotonic() + self.scenario.settle_s
        tallies = [(self.scenario.apps[number], tally) for (_, number), tally in self._tallies.items()]
        while time.monotonic() < end:
            if not any(tally.lost or tally.acknowledged < tally.published for app, tally in tallies if app.qos):
                return
            await asyncio.sleep(TICK_S)

    # ------------------------------------------------------------------ watching

    async def _watch(self) -> None:
        every_s = max(SAMPLE_S_MIN, (self.scenario.duration_s(self._scale) + self.scenario.settle_s) / SAMPLES_MAX)
        while True:
            await self._look("running")
            await asyncio.sleep(every_s)

    async def _look(self, phase: str) -> None:
        turn = asyncio.Semaphore(ASKS_AT_ONCE)

        async def ask(daemon: Daemon) -> dict[str, Any] | None:
            async with turn:
                try:
                    return await daemon.ask("status", timeout_s=5.0)
                except (DaemonStopped, ControlError):
                    return None

        everyone = [*self._gateways.values(), *([self._far_end] if self._far_end else [])]
        statuses = await asyncio.gather(*(ask(daemon) for daemon in everyone))
        gateways = [status for status in statuses[: len(self._gateways)] if status is not None]
        outbound = [s for status in gateways for s in status["streams"] if s["direction"] == "outbound"]
        self._memory_bytes = max([self._memory_bytes, *(status["rss_bytes"] for status in gateways)])
        self._connections = max([self._connections, *(status["hubs"][0]["connected"] for status in gateways)])
        self._ledger = sum(status["losses"] + status["dead"] for status in statuses if status is not None)
        interval = self._latencies.interval()
        sample = Sample(
            time.monotonic() - self._began,
            self._marks[-1].link if self._marks else "up",
            phase,
            sum(s["waiting"] for s in outbound),
            sum(s["in_flight"] for s in outbound),
            sum(tally.published for tally in self._tallies.values()),
            sum(len(tally.seen) for tally in self._tallies.values()),
            sum(status["hubs"][0]["state"] == "up" for status in gateways),
            quantile(interval, 0.5),
            quantile(interval, 0.99),
        )
        self._samples.append(sample)
        self._show(sample)

    def _result(self, found: proxy.Server) -> Result:
        acks = [each for acknowledgements in self._acknowledgements for each in acknowledgements.durations_s]
        measured = Measured(
            tuple(self._way(number, app) for number, app in enumerate(self.scenario.apps)),
            self._returns.cuts(),
            self._ledger,
            quantile(acks, 0.99),
            self._latencies.p99,
            self._memory_bytes,
            connections=self._connections,
            urgent_p99_s=self._urgent.p99,
        )
        return Result(
            self.scenario,
            self._name,
            self._scale,
            found.what,
            round(time.monotonic() - self._began, 3),
            self._returns.count,
            measured,
            judge(measured, self.scenario.limits),
            tuple(self._samples),
            tuple(self._marks),
        )

    def _way(self, number: int, app: AppTable) -> Way:
        tallies = [tally for (_, each), tally in self._tallies.items() if each == number]
        return Way(
            app.name,
            app.direction,
            app.qos,
            sum(tally.published for tally in tallies),
            sum(tally.acknowledged for tally in tallies) if app.qos else 0,
            sum(len(tally.seen) for tally in tallies),
            sum(tally.received - len(tally.seen) for tally in tallies),
            sum(tally.reordered for tally in tallies),
        )


def _bodies(number: int, app: AppTable) -> Callable[[int], bytes]:
    """Messages that say which app's they are, their number and when they were sent, and are as long as asked for."""
    size = app.size_bytes

    def body(count: int) -> bytes:
        return (b"%d %d %d " % (number, count, time.monotonic_ns() // 1000)).ljust(size, b".")

    return body
