"""How long a line's return takes to be felt: cuts of a line in use, and the next message settled after each."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.bench import load
from gateway.bench.daemon import Daemon, issue
from gateway.bench.filling import fill
from gateway.bench.receiver import Far, judge
from gateway.faultlink import FaultLink

TRAFFIC_S = 0.02
SETTLE_S = 0.3
RESUME_S_MAX = 10.0
BACKLOG_S_MAX = 300.0
ALARM = b"fire in the engine room"
ALARMS = """
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge.{gateway}.alarms"
class = "urgent"
"""


class _Traffic(asyncio.Protocol):
    """A light QoS 1 publisher: one numbered message every TRAFFIC_S."""

    def __init__(self) -> None:
        self.published = 0
        self.acknowledged = 0
        self._transport: asyncio.WriteTransport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self.acknowledged += data.count(b"\x40\x02")

    def _send(self) -> None:
        packet_id = struct.pack("!H", self.published % load.PACKET_IDS + 1)
        body = b"\0\x07bench/0" + packet_id + b"0 %09d ." % self.published
        self._transport.write(b"\x32" + bytes((len(body),)) + body)
        self.published += 1
        self._timer = asyncio.get_running_loop().call_later(TRAFFIC_S, self._send)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def resume(directory: Path, *, cuts: int = 50, tunnel_s: float = 0.3, seed: int = 4711) -> dict[str, Any]:
    """Seconds from the line's return to the next message settled at the far end, with traffic all the while."""
    return asyncio.run(_resume(directory, cuts, tunnel_s, random.Random(seed)))


def backlog(directory: Path, *, messages: int = 100_000) -> dict[str, Any]:
    """Seconds from the end of a tunnel until the last of what was published in it is settled at the far end."""
    return asyncio.run(_backlog(directory, messages))


def alarm(
    directory: Path, *, rows: int = 1_000_000, cuts: int = 20, tunnel_s: float = 1.0, seed: int = 4711
) -> dict[str, Any]:
    """Seconds from a line's return until the far end has an alarm said in the tunnel, with `rows` queued."""
    return asyncio.run(_alarm(directory, rows, cuts, tunnel_s, random.Random(seed)))


@dataclass(frozen=True, slots=True)
class _Route:
    """A daemon, its line, and the far end; `traffic` runs from the first message that arrived."""

    daemon: Daemon
    line: FaultLink
    far: Far
    traffic: _Traffic


@contextlib.asynccontextmanager
async def _in_use(directory: Path) -> AsyncIterator[_Route]:
    async with _started(directory) as (daemon, line, far):
        sock, _ = await asyncio.to_thread(load.connect, "127.0.0.1", daemon.port, "train")
        sock.setblocking(False)
        _, traffic = await asyncio.get_running_loop().create_connection(_Traffic, sock=sock)
        await _next_message(far)
        yield _Route(daemon, line, far, traffic)
        sock.close()


@contextlib.asynccontextmanager
async def _started(directory: Path, **options: Any) -> AsyncIterator[tuple[Daemon, FaultLink, Far]]:
    pki = issue(directory / "pki")
    far = Far(0, pki.server.cert, pki.server.key, pki.ca)
    line = FaultLink(await far.start())
    await line.start()
    daemon = Daemon(pki, line.port, directory / "resume", **options)
    try:
        await asyncio.to_thread(daemon.start)
        yield daemon, line, far
    finally:
        await asyncio.to_thread(daemon.close)
        await line.stop()
        await far.stop()


async def _resume(directory: Path, cuts: int, tunnel_s: float, chance: random.Random) -> dict[str, Any]:
    async with _in_use(directory) as route:
        taken: list[float] = []
        for _ in range(cuts):
            # Not in step with the daemon's own timers.
            await asyncio.sleep(SETTLE_S * (0.5 + chance.random()))
            route.line.cut()
            await asyncio.sleep(tunnel_s)
            route.line.restore()
            restored = time.perf_counter()
            taken.append(await _next_message(route.far) - restored)
        route.traffic.stop()
        await _emptied(route.daemon)
        repeated = _all_there(route, route.traffic.acknowledged)
    taken.sort()
    return {
        "cuts": cuts,
        "tunnel_s": tunnel_s,
        "p50_s": round(quantile_of(taken, 0.5), 3),
        "p99_s": round(quantile_of(taken, 0.99), 3),
        "max_s": round(taken[-1], 3),
        "messages": route.traffic.acknowledged,
        "repeated": repeated,
    }


async def _backlog(directory: Path, messages: int) -> dict[str, Any]:
    async with _in_use(directory) as route:
        route.traffic.stop()
        await _emptied(route.daemon)
        route.line.cut()
        before = len(route.far.bodies)
        want = load.Load(port=route.daemon.port, topic="bench/tunnel", messages=messages)
        await asyncio.to_thread(load.run, want)
        route.line.restore()
        restored = time.perf_counter()
        first = await _next_message(route.far)
        async with asyncio.timeout(BACKLOG_S_MAX):
            while len(route.far.bodies) - before < messages:
                last = await _next_message(route.far)
        del route.far.bodies[:before]
        repeated = _all_there(route, messages)
    return {
        "messages": messages,
        "resumed_s": round(first - restored, 3),
        "drained_s": round(last - restored, 3),
        "repeated": repeated,
    }


async def _alarm(directory: Path, rows: int, cuts: int, tunnel_s: float, chance: random.Random) -> dict[str, Any]:
    state = directory / "state"
    await asyncio.to_thread(fill, state, rows)
    taken: list[float] = []
    async with _started(directory, state_dir=state, more=ALARMS) as (daemon, line, far):
        await _next_message(far)
        for number in range(cuts):
            await asyncio.sleep(SETTLE_S * (0.5 + chance.random()))
            line.cut()
            mark = b"%s %d" % (ALARM, number)
            await asyncio.to_thread(_publish_alarm, daemon.port, mark)
            await asyncio.sleep(tunnel_s * (0.5 + chance.random()))
            came = _Came(far, mark)
            line.restore()
            restored = time.perf_counter()
            taken.append(await _next_message(far, came) - restored)
        left = await asyncio.to_thread(daemon.waiting)
    if not left:
        raise AssertionError(f"{rows} rows were not enough for {cuts} cuts: the last alarms had no backlog")
    taken.sort()
    return {
        "rows": rows,
        "left": left,
        "cuts": cuts,
        "p50_s": round(quantile_of(taken, 0.5), 3),
        "p99_s": round(quantile_of(taken, 0.99), 3),
        "max_s": round(taken[-1], 3),
    }


class _Came:
    """Whether a message with these bytes in it arrived at the far end since."""

    def __init__(self, far: Far, mark: bytes) -> None:
        self._far, self._mark = far, mark
        self._seen = len(far.bodies)

    def __call__(self) -> bool:
        new = self._far.bodies[self._seen :]
        self._seen += len(new)
        return any(self._mark in body for body in new)


def _publish_alarm(port: int, body: bytes) -> None:
    sock, _ = load.connect("127.0.0.1", port, "watchman")
    with sock:
        topic = b"\0\x0aalarm/fire"
        sock.sendall(b"\x32" + bytes((len(topic) + 2 + len(body),)) + topic + b"\0\1" + body)
        answer = sock.recv(4)
    if answer != b"\x40\x02\0\1":
        raise load.LoadError(f"the alarm was answered with {answer.hex()}")


def _all_there(route: _Route, expected: int) -> int:
    """How many came twice. Raises AssertionError unless all arrived, in order."""
    missing, repeated, reordered = judge(route.far.bodies, expected)
    if missing > 0 or reordered:
        raise AssertionError(f"a promise broke: of {expected} messages {missing} missing, {reordered} reordered")
    return repeated


async def _emptied(daemon: Daemon) -> None:
    for _ in range(100):
        if not await asyncio.to_thread(daemon.waiting):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{daemon.waiting()} messages still wait, 5 s after the last one was published")


async def _next_message(far: Far, wanted: Callable[[], bool] = lambda: True) -> float:
    """When the next batch was accepted after which it is so."""
    arrived: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def settle(now: float) -> None:
        if not arrived.done() and wanted():
            arrived.set_result(now)

    far.arrived = settle
    async with asyncio.timeout(RESUME_S_MAX):
        return await arrived


def quantile_of(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]
