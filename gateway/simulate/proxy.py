"""Finds or starts the Toxiproxy that a simulation breaks its line with, and drives it through toxiproxy-python.

Three ways, in this order: one that runs, by its URL; `toxiproxy-server` on the PATH or among the fetched parts; our own
server of the same interface (`gateway.simulate.toxics`). Knows what a step of a scenario means in toxics.

The line is two proxies in a row, near (the gateways dial it) and far (it dials the hub): a half-open connection is one
whose far half has ended while the near one has not heard of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway.config_values import is_loopback
from gateway.errors import ConfigError, LinesideError
from gateway.simulate.scenario import Step

HOST = "127.0.0.1"
START_S_MAX = 15.0
POLL_S = 0.02
# Longer than any step: how long a half-open connection's end stays unheard of.
UNHEARD_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class ToxicSpec:
    """One toxic on the near proxy."""

    type: str
    stream: str
    attributes: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return f"{self.type}_{self.stream}"


@dataclass(frozen=True, slots=True)
class LineState:
    """What the proxies have to be like. `sever`: the far half of every connection ends now, unheard of."""

    toxics: tuple[ToxicSpec, ...] = ()
    enabled: bool = True
    sever: bool = False


def _both(type: str, **attributes: int) -> tuple[ToxicSpec, ...]:
    return tuple(ToxicSpec(type, stream, tuple(attributes.items())) for stream in ("upstream", "downstream"))


def line_state(step: Step, *, closed: bool = False) -> LineState:
    """A step in toxics. `closed`: the half of a flapping line's time in which it is down."""
    link = "tunnel-fin" if closed else step.link
    shape: tuple[ToxicSpec, ...] = ()
    if step.latency_s and link != "hub-slow":
        half_ms, jitter_ms = round(step.latency_s * 500), round(step.jitter_s * 500)  # each way takes its half
        shape += _both("latency", latency=half_ms, jitter=jitter_ms)
    if step.bandwidth_bit_s is not None:
        shape += _both("bandwidth", rate=max(1, round(step.bandwidth_bit_s / 8000)))
    match link:
        case "tunnel":
            return LineState(_both("timeout", timeout=0))
        case "tunnel-fin":
            return LineState(enabled=False)
        case "reset":
            return LineState(_both("reset_peer", timeout=0))
        case "acks-lost":
            return LineState((*shape, ToxicSpec("timeout", "downstream", (("timeout", 0),))))
        case "stall":
            return LineState(_both("latency", latency=round(step.for_s * 1000) + 60_000, jitter=0))
        case "hub-slow":
            late = (("latency", round(step.latency_s * 1000)), ("jitter", round(step.jitter_s * 1000)))
            return LineState((*shape, ToxicSpec("latency", "downstream", late)))
        case "half-open":
            unheard = ToxicSpec("slow_close", "downstream", (("delay", UNHEARD_MS),))
            return LineState((*shape, unheard), sever=True)
    return LineState(shape)


@dataclass(frozen=True, slots=True)
class Server:
    """A Toxiproxy that answers, and what it is."""

    host: str
    port: int
    what: str


@contextlib.asynccontextmanager
async def server(url: str | None, directory: Path) -> AsyncIterator[Server]:
    """A Toxiproxy for as long as the context lasts; its log goes to `directory`. Raises LinesideError."""
    if url is not None:
        found = _by_url(url)
        await _answers(found, None, None)
        yield found
        return
    binary = toxiproxy_binary()
    command = [str(binary)] if binary else [sys.executable, "-m", "gateway.simulate.toxics"]
    what = "Toxiproxy" if binary else "the built-in proxy"
    found = Server(HOST, free_ports(1)[0], what)
    log_path = directory / "proxy.log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            *("-host", HOST, "-port", str(found.port)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"LOG_LEVEL": "error"},
        )
    try:
        await _answers(found, process, log_path)
        yield found
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()


def _by_url(url: str) -> Server:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or 8474
    except ValueError:
        raise ConfigError(f"{url}: the port is no number; write http://127.0.0.1:8474") from None
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"{url} is no URL of a Toxiproxy; write http://127.0.0.1:8474")
    if not is_loopback(parts.hostname):
        raise ConfigError(f"{url}: the Toxiproxy has to run on this machine, as gateways and hub do")
    return Server(parts.hostname, port, f"the Toxiproxy at {url}")


async def _answers(found: Server, process: asyncio.subprocess.Process | None, log: Path | None) -> None:
    end = time.monotonic() + START_S_MAX
    while True:
        try:
            _, writer = await asyncio.open_connection(found.host, found.port)
        except OSError as error:
            if process is None:
                raise LinesideError(f"{found.what} does not answer: {error.strerror or error}") from None
        else:
            writer.close()
            return
        if process is not None and (process.returncode is not None or time.monotonic() > end):
            text = _tail(log) if log else ""
            raise LinesideError(f"{found.what} did not start: {text or 'it said nothing'}")
        await asyncio.sleep(POLL_S)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1000:]


def toxiproxy_binary() -> Path | None:
    """`toxiproxy-server` on the PATH, or among the parts that deploy/parts.py fetched."""
    on_path = shutil.which("toxiproxy-server")
    if on_path:
        return Path(on_path)
    checkout = Path(__file__).resolve().parent.parent.parent / ".parts"
    parts = Path(os.environ["LINESIDE_PARTS"]) if os.environ.get("LINESIDE_PARTS") else checkout
    return next(iter(sorted(parts.glob("toxiproxy-*/toxiproxy-server"), reverse=True)), None)


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind((HOST, 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


class FaultyLine:
    """The two proxies of one simulation, and the state they are in. Every call blocks: use a thread.

    toxiproxy-python keeps the server's address in a global: one FaultyLine a process at a time.
    """

    def __init__(self, found: Server, hub: str) -> None:
        """`hub`: where the far proxy leads to, host:port."""
        from toxiproxy import Toxiproxy

        self._client = Toxiproxy()
        self._client.update_api_consumer(found.host, found.port)
        mark = f"lineside-{os.getpid()}-{secrets.token_hex(3)}"
        self._state = LineState()
        self._chain: list[str] = []  # in the order in which Toxiproxy has them
        self._far: Any = self._client.create(upstream=hub, name=f"{mark}-far", listen=f"{HOST}:0")
        try:
            self._near: Any = self._client.create(upstream=self._far.listen, name=f"{mark}-near", listen=f"{HOST}:0")
        except BaseException:
            self._far.destroy()
            raise

    @property
    def port(self) -> int:
        """Where gateways dial the hub."""
        return int(self._near.listen.rpartition(":")[2])

    def apply(self, state: LineState) -> None:
        """Make the line so. What stays as it was is not touched: a connection may live on it.

        New toxics come first and stand last in Toxiproxy's chain, so that what was on its way at a tunnel's entrance
        is swallowed, not let go. Old ones are then changed or taken away, last first: a toxic that waits for the next
        one to take something hears of nothing before, and behind a narrow bandwidth that is as long as a radio takes.
        """
        before = {spec.name: spec for spec in self._state.toxics}
        after = {spec.name: spec for spec in state.toxics}
        old = list(reversed(self._chain))
        for name, spec in after.items():
            if name not in before:
                self._near.add_toxic(
                    name=name, type=spec.type, stream=spec.stream, attributes=dict(spec.attributes), toxicity=1.0
                )
                self._chain.append(name)
        for name in old:
            if name not in after:
                self._near.destroy_toxic(name)
                self._chain.remove(name)
            elif before[name] != after[name]:
                self._update(name, after[name])
        if state.enabled != self._state.enabled:
            _switch(self._near, state.enabled)
        if state.sever:
            _switch(self._far, False)
            _switch(self._far, True)
        self._state = state

    def _update(self, name: str, spec: ToxicSpec) -> None:
        """The client has no word for it; its consumer of the interface has."""
        from toxiproxy.api import APIConsumer

        APIConsumer.post(f"/proxies/{self._near.name}/toxics/{name}", json={"attributes": dict(spec.attributes)})

    def close(self) -> None:
        for proxy in (self._near, self._far):
            proxy.destroy()


def _switch(proxy: Any, enabled: bool) -> None:
    proxy.enable() if enabled else proxy.disable()
