"""Many gateways with full journals see their one hub again at the same moment; `python -m tests.bench.yard [--json]`.

Forty gateways of 25,000 messages, one Artemis, mutual TLS, a line that was silent until then. Measured from its
return: when each gateway's last message is settled, and how often it connected; then the hub's queues are read, and
held against what was published. `--hub receiver` has a receiver of our own there instead, which stores nothing and sees
the messages as they come, not as a queue gives them back. Takes some minutes and 2 GB of memory, nearly all of it for
forty daemons on one machine. Exits with 1 where a message is missing, repeated or out of order, the slowest gateway
took more than twice as long as the median, or one connected more than twice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proton import Message
from proton.handlers import MessagingHandler
from proton.reactor import Container

from gateway.amqp.message import decode
from gateway.bench import load, machine
from gateway.bench.brokers import FullArtemis
from gateway.bench.daemon import Certificates, Daemon
from gateway.bench.receiver import Far
from gateway.faultlink import FaultLink, Line
from tests.pki import Pki

SLOWEST_RATIO_MAX = 2.0
CONNECTIONS_MAX = 2
LOOK_S = 0.25
QUIET_S, SILENT_S_MAX = 5.0, 60.0  # what comes twice comes by then; and when to believe that the rest never will
CREDIT = 2000
SIZE_BYTES = 200


class Engine(Daemon):
    """One of the gateways, under a name of its own."""

    def __init__(self, number: int, pki: Certificates, hub_port: int, directory: Path) -> None:
        super().__init__(pki, hub_port, directory / f"engine-{number:02}", clients=10)
        self.id = f"engine-{number:02}"
        self.took_s = 0.0

    def configure(self) -> None:
        super().configure()
        file = self.directory / "lineside.toml"
        file.write_text(file.read_text().replace('id = "loco-4711"', f'id = "{self.id}"'))

    def hub(self) -> dict[str, Any]:
        found: dict[str, Any] = self.status()["hubs"][0]
        return found


class Reading(MessagingHandler):
    """Empties the hub's queues. `seqs`: by gateway, the journal's numbers as they came."""

    def __init__(self, url: str, gateways: list[str], expected: int) -> None:
        super().__init__(prefetch=0, auto_accept=True)
        self.seqs: dict[str, list[int]] = {gateway: [] for gateway in gateways}
        self._url = url
        self._left = expected
        self._timer: Any = None
        self._came = time.monotonic()

    def on_start(self, event: Any) -> None:
        connection = event.container.connect(self._url, reconnect=False)
        for gateway in self.seqs:
            event.container.create_receiver(connection, f"edge.{gateway}.bench").flow(CREDIT)
        event.container.schedule(QUIET_S, self)

    def on_message(self, event: Any) -> None:
        message: Message = event.message
        gateway, seq = _identity(message.id)
        self.seqs[gateway].append(seq)
        self._left -= 1
        self._came = time.monotonic()
        if event.receiver.credit < CREDIT // 2:
            event.receiver.flow(CREDIT - event.receiver.credit)

    def on_timer_task(self, event: Any) -> None:
        if time.monotonic() - self._came < (SILENT_S_MAX if self._left > 0 else QUIET_S):
            event.container.schedule(QUIET_S, self)
        else:
            event.container.stop()


def _found(gateway: str, seqs: list[int], expected: int, say: Callable[[str], None]) -> dict[str, int]:
    firsts = list(dict.fromkeys(seqs))
    back = [at for at, (a, b) in enumerate(itertools.pairwise(firsts), 1) if a > b]
    for at in back:
        say(f"{gateway}: message {at} in the queue: {firsts[max(0, at - 3) : at + 3]}")
    return {"missing": expected - len(firsts), "repeated": len(seqs) - len(firsts), "reordered": len(back)}


async def _drained(engines: list[Engine], since: float, timeout_s: float, say: Callable[[str], None]) -> None:
    left, told = list(engines), 0.0
    while left:
        for engine in list(left):
            if not await asyncio.to_thread(engine.waiting):
                engine.took_s = time.monotonic() - since
                left.remove(engine)
        now = time.monotonic()
        if now - since > timeout_s:
            raise TimeoutError(f"after {timeout_s:.0f} s, {len(left)} gateways still have messages: {left[0].hub()}")
        if now - told > 5:
            told = now
            say(f"{now - since:4.0f} s: {len(left)} of {len(engines)} have messages left")
        await asyncio.sleep(LOOK_S)


class _Roomy(FullArtemis):
    """With memory for all of it: where it begins to page, 2.40 puts a queue's messages out of their order."""

    def command(self) -> list[str]:
        return ["-Xmx6g" if option.startswith("-Xmx") else option for option in super().command()]


class _Artemis:
    def __init__(self, directory: Path, pki: Pki) -> None:
        self._broker = _Roomy(directory=directory / "hub", ca=pki.ca, server=pki.server)

    async def start(self) -> int:
        await asyncio.to_thread(self._broker.start)
        assert self._broker.tls_port is not None
        return self._broker.tls_port

    async def seqs(self, gateways: list[str], expected: int) -> dict[str, list[int]]:
        reading = Reading(self._broker.url, gateways, expected)
        await asyncio.to_thread(Container(reading).run)
        return reading.seqs

    async def stop(self) -> None:
        await asyncio.to_thread(self._broker.close)


class _Receiver:
    def __init__(self, directory: Path, pki: Pki) -> None:
        self._far = Far(0, pki.server.cert, pki.server.key, pki.ca)

    async def start(self) -> int:
        return await self._far.start()

    async def seqs(self, gateways: list[str], expected: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {gateway: [] for gateway in gateways}
        for body in self._far.bodies:
            gateway, seq = _identity(decode(body).message_id)
            found[gateway].append(seq)
        return found

    async def stop(self) -> None:
        await self._far.stop()


HUBS: dict[str, Callable[[Path, Pki], _Artemis | _Receiver]] = {"artemis": _Artemis, "receiver": _Receiver}


def _identity(message_id: object) -> tuple[str, int]:
    """The gateway, and the number in its journal."""
    parts = str(message_id).split(":")
    return parts[0], int(parts[-1], 16)


async def _come_back(
    directory: Path, hub_name: str, gateways: int, messages: int, timeout_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    pki = Pki(directory / "pki")
    hub = HUBS[hub_name](directory, pki)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(hub.stop)
        line = FaultLink(await hub.start())
        await line.start()
        stack.push_async_callback(line.stop)
        line.cut(Line.TUNNEL)
        engines: list[Engine] = []
        for number in range(gateways):
            engine = Engine(number, pki, line.port, directory)
            await asyncio.to_thread(engine.start)
            stack.push_async_callback(asyncio.to_thread, engine.close)
            engines.append(engine)
            want = load.Load(port=engine.port, topic="bench", size_bytes=SIZE_BYTES, messages=messages)
            await asyncio.to_thread(load.run, want)
            say(f"{number + 1} of {gateways} filled")
        before = [engine.hub() for engine in engines]
        began = time.monotonic()
        line.restore()
        await _drained(engines, began, timeout_s, say)
        took = sorted(engine.took_s for engine in engines)
        hubs = [engine.hub() for engine in engines]
        say(f"all drained after {took[-1]:.1f} s; reading what the hub has")
        seqs = await hub.seqs([engine.id for engine in engines], gateways * messages)
    found = [_found(engine.id, seqs[engine.id], messages, say) for engine in engines]
    return {
        "hub": hub_name,
        "gateways": gateways,
        "messages": gateways * messages,
        "median_s": statistics.median(took),
        "slowest_s": took[-1],
        "slowest_ratio": took[-1] / statistics.median(took),
        "per_s": gateways * messages / took[-1],
        "connections_max": max(now["connected"] - then["connected"] for now, then in zip(hubs, before, strict=True)),
        "dialled_max": max(now["dialled"] - then["dialled"] for now, then in zip(hubs, before, strict=True)),
    } | {what: sum(each[what] for each in found) for what in ("missing", "repeated", "reordered")}


def come_back(
    directory: Path,
    *,
    hub: str = "artemis",
    gateways: int = 40,
    messages: int = 25_000,
    timeout_s: float = 900.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Seconds are from the line's return; `connections_max` and `dialled_max` are of one gateway since then."""
    return asyncio.run(_come_back(directory, hub, gateways, messages, timeout_s, say))


def wrong(result: dict[str, Any]) -> list[str]:
    """What of the result is not as promised."""
    out = [f"{result[what]} {what}" for what in ("missing", "repeated", "reordered") if result[what]]
    if result["slowest_ratio"] > SLOWEST_RATIO_MAX:
        out.append(f"the slowest took {result['slowest_ratio']:.2f} times the median, {SLOWEST_RATIO_MAX:g} at most")
    if result["connections_max"] > CONNECTIONS_MAX:
        out.append(f"a gateway connected {result['connections_max']} times, {CONNECTIONS_MAX} at most")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--hub", choices=HUBS, default="artemis")
    parser.add_argument("--gateways", type=int, default=40)
    parser.add_argument("--messages", type=int, default=25_000, help="that each of them has")
    parser.add_argument("--timeout-s", type=float, default=900.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lineside-yard-") as directory:
        result = come_back(
            Path(directory),
            hub=arguments.hub,
            gateways=arguments.gateways,
            messages=arguments.messages,
            timeout_s=arguments.timeout_s,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        result["machine"] = machine.describe(Path(directory))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:16} {value:.2f}" if isinstance(value, float) else f"{name:16} {value}")
    for each in wrong(result):
        print(f"not kept: {each}", file=sys.stderr)
    sys.exit(1 if wrong(result) else 0)


if __name__ == "__main__":
    main()
