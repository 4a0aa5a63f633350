"""`lineside verify`: the promises, tried on the user's own machine and disk.

A real gateway and a real hub in a directory of their own; a producer at the one, a consumer at the other; and in every
cycle a SIGKILL or a cut of the line while messages are on their way. What counts is an independent record: every
number that was acknowledged to the producer, and every number the consumer got, synced to a file before it is believed
(the consumer acknowledges only after that). So a run that a real power cut ended goes on with `--resume`, and what was
acknowledged before the cut is still held against what arrived.

Knows nothing of how the result is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from gateway.control_client import ControlError, DaemonStopped
from gateway.errors import ConfigError, LinesideError
from gateway.faultlink import FaultLink, Line
from gateway.simulate import cutdisk, cutmount, disk
from gateway.simulate.fleet import HUB, SUBSCRIBE_S_MAX, Daemon, Daemons, address, attached, hub_config, leave, toml_of
from gateway.simulate.proxy import free_ports

STATE_FILE = "verify.json"
RECORD_FILE = "record"
GATEWAY = "verify"
FORGETFUL = "forgetful"
STREAM = "numbers"
TOPIC = "verify/numbers"
WINDOW = 50
RUN_S_MIN, RUN_S_MAX = 0.2, 1.2  # of undisturbed traffic before each blow
AWAY_S_MIN, AWAY_S_MAX = 0.2, 1.0  # how long a cut line stays cut
SETTLE_S_MAX = 60.0
POLL_S = 0.02
PACE_S = 0.002
WRITE_S = 0.01
MISSING_SHOWN = 10
# The hub sends a client at most so many unacknowledged messages ([mqtt] send_window); so many go again when it dies,
HUB_WINDOW = 100
# and those that the client acknowledged and the hub had not yet written: 64 ask for a commit, and at this pace no more
# than so many come while a disk takes half a second for it.
HUB_UNWRITTEN = 64 + int(0.5 / PACE_S)
DUPLICATES_MAX = WINDOW + HUB_WINDOW + HUB_UNWRITTEN  # of one cycle
# Numbers that a run published just before it ended, and of which nothing was recorded, may still be under way: the
# next run stays clear of them.
RESUME_GAP = 1_000_000


class Blow(Enum):
    """What a cycle does."""

    KILL_GATEWAY = "gateway killed"
    KILL_HUB = "hub killed"
    CUT = "line cut, silent"
    CLOSE = "line cut, with a FIN"
    POWER = "power cut"


WEIGHTS = {Blow.KILL_GATEWAY: 4, Blow.KILL_HUB: 2, Blow.CUT: 2, Blow.CLOSE: 1}
KILLS = {Blow.KILL_GATEWAY, Blow.KILL_HUB}


@dataclass
class Tried:
    """What has been found so far; stored after every cycle, so that it survives whatever ends the run."""

    seed: int
    cycles: int = 0
    next: int = 0  # the first number of the cycle that is next or under way
    acknowledged: int = 0
    delivered: int = 0
    unacknowledged: int = 0
    lost: int = 0
    duplicates: int = 0
    duplicates_max: int = 0  # in one cycle
    reordered: int = 0
    unaccounted: int = 0
    power_cuts: int = 0  # of the cycles, those after which the disk had forgotten what was not synced
    no_power_cuts: str | None = None  # why there were none
    interrupted: int = 0  # cycles that the end of a run cut short; their record was judged on resuming
    blows: dict[str, int] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)  # the first few, for whoever looks into it

    @property
    def kept(self) -> bool:
        return self.delivered > 0 and not any(
            (
                self.unacknowledged,
                self.lost,
                self.reordered,
                self.unaccounted,
                self.duplicates_max > DUPLICATES_MAX,
            )
        )


class Record:
    """The independent record of one cycle: lines `a NUMBER` (acknowledged) and `d NUMBER` (delivered), synced.

    `add` is called from the clients' threads; a thread of its own writes, syncs, and only then calls `done`.
    """

    def __init__(self, path: Path, done: Callable[[list[tuple[str, int]]], None]) -> None:
        self._done = done
        self._file = path.open("ab")
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, int]] = []
        self._stop = threading.Event()
        self._writing = False
        self.lines: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, kind: str, number: int) -> None:
        with self._lock:
            self._waiting.append((kind, number))

    def _run(self) -> None:
        while not self._stop.wait(WRITE_S):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, []
            self._writing = bool(taken)
        if not taken:
            return
        self._file.write(b"".join(b"%s %d\n" % (kind.encode(), number) for kind, number in taken))
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._done(taken)
        with self._lock:
            self.lines += taken
            self._writing = False

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._file.close()

    def clear(self) -> None:
        """The cycle has been judged, and what was found is stored elsewhere."""
        with self._lock:
            self.lines = []
        self._file.truncate(0)
        os.fdatasync(self._file.fileno())

    @property
    def idle(self) -> bool:
        """Whether everything added so far is on the disk and in `lines`."""
        with self._lock:
            return not self._waiting and not self._writing


def read_record(path: Path) -> list[tuple[str, int]]:
    """What an earlier run left; a torn last line was never believed by anybody."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind(b"\n") + 1]
    return [(line[:1].decode(), int(line[2:])) for line in whole.splitlines()]


class Apps:
    """The producer at the gateway and the consumer at the hub."""

    def __init__(self, gateway_port: int, hub_port: int, record_path: Path, first: int) -> None:
        self.record = Record(record_path, self._believe)
        self.running = False
        self._next = first
        self._lock = threading.Lock()
        self._numbers: dict[int, int] = {}  # packet identifier to number
        self._mids: dict[int, list[tuple[int, int]]] = {}
        self._early: set[int] = set()
        self._stop = threading.Event()
        self.subscribed = threading.Event()
        self._producer = self._client("verify-producer", gateway_port, on_publish=self._acknowledged)
        self._consumer = self._client(
            "verify-consumer",
            hub_port,
            manual_ack=True,
            on_connect=self._subscribe,
            on_subscribe=lambda *_: self.subscribed.set(),
            on_message=self._delivered,
        )
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def _client(self, name: str, port: int, manual_ack: bool = False, **callbacks: Callable[..., Any]) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            clean_session=False,
            protocol=paho.MQTTv311,
            manual_ack=manual_ack,
        )
        client.max_inflight_messages_set(WINDOW)
        client.reconnect_delay_set(1, 1)
        for callback, function in callbacks.items():
            setattr(client, callback, function)
        client.connect("127.0.0.1", port)
        client.loop_start()
        return client

    def _subscribe(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(address(GATEWAY, STREAM), qos=1)

    def _produce(self) -> None:
        """Count upwards as fast as it is acknowledged."""
        while not self._stop.wait(PACE_S):
            while self.running and self.unanswered < WINDOW:
                number = self._next
                self._next += 1
                mid = self._producer.publish(TOPIC, b"%d" % number, qos=1).mid
                with self._lock:
                    if mid in self._early:
                        self._early.discard(mid)
                        self.record.add("a", number)
                    else:
                        self._numbers[mid] = number

    @property
    def unanswered(self) -> int:
        return len(self._numbers)

    @property
    def published(self) -> int:
        """The number after the last one published."""
        return self._next

    def _acknowledged(self, _client: Any, _data: Any, mid: int, *_: Any) -> None:
        with self._lock:
            number = self._numbers.pop(mid, None)
            if number is None:
                self._early.add(mid)
            else:
                self.record.add("a", number)

    def _delivered(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        number = int(message.payload)
        with self._lock:
            self._mids.setdefault(number, []).append((message.mid, message.qos))
        self.record.add("d", number)

    def _believe(self, written: list[tuple[str, int]]) -> None:
        """On the disk: now the hub may forget it."""
        for kind, number in written:
            if kind == "d":
                with self._lock:
                    mids = self._mids.pop(number, [])
                for mid, qos in mids:
                    self._consumer.ack(mid, qos)

    def close(self) -> None:
        self.running = False
        self._stop.set()
        self._thread.join()
        for client in (self._producer, self._consumer):
            leave(client)
        self.record.close()


class Verify:
    """One run in `directory`. `show(tried, blow)` is called before each blow and after each cycle (blow None).

    After `cycles` on the disk itself come `power_cuts` on one that forgets, where one can be mounted: the real one can
    only be believed or unplugged.
    """

    def __init__(
        self,
        directory: Path,
        cycles: int,
        resume: bool,
        show: Callable[[Tried, Blow | None], None],
        power_cuts: int = 0,
    ) -> None:
        self.directory = directory.absolute()  # a relative state_dir would be taken from the configuration's directory
        self.cycles = cycles
        self.power_cuts = power_cuts
        self._show = show
        self.tried = self._claim(resume)
        self._ports: list[int] = []
        self._daemons = Daemons(directory)

    def _claim(self, resume: bool) -> Tried:
        """Make the directory ours, or take up the run that is in it. Raises ConfigError."""
        state = self.directory / STATE_FILE
        if resume:
            if not state.is_file():
                raise ConfigError(f"{self.directory}: no run of `lineside verify` to resume; leave --resume out")
            try:
                return Tried(**json.loads(state.read_bytes()))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{state} cannot be read ({error}); begin anew in another directory") from None
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            what = "is a run of `lineside verify`; go on with --resume or" if state.is_file() else "is not empty;"
            raise ConfigError(f"{self.directory} {what} name another --directory")
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"{self.directory}: {error.strerror}; name another --directory") from None
        return Tried(seed=random.randrange(1 << 32))

    async def run(self) -> disk.Disk:
        """Measure, then the cycles. What was tried is in `tried`, also where this raises."""
        try:
            syncs = await asyncio.to_thread(disk.measure_syncs, self.directory)
        except OSError as error:
            raise LinesideError(f"{self.directory}: {error.strerror or error}") from None
        self._store()
        link: FaultLink | None = None
        apps: Apps | None = None
        mqtt_hub, amqp, mqtt = free_ports(3)
        left = read_record(self.directory / RECORD_FILE)
        try:
            hub = await self._daemons.start(HUB, hub_config(str(self.directory / HUB), mqtt_hub, amqp))
            link = FaultLink(amqp)
            await link.start()
            gateway = await self._daemons.start(GATEWAY, _config(str(self.directory / GATEWAY), mqtt, link.port))
            await attached(hub, {GATEWAY: 1})
            first = max([self.tried.next, *(number + RESUME_GAP for _, number in left)])
            apps = await asyncio.to_thread(Apps, mqtt, mqtt_hub, self.directory / RECORD_FILE, first)
            if not await asyncio.to_thread(apps.subscribed.wait, SUBSCRIBE_S_MAX):
                raise LinesideError(f"the consumer could not subscribe within {SUBSCRIBE_S_MAX:g} s")
            if left:
                await self._finish_interrupted(left, apps, gateway, hub)
            while self.tried.cycles - self.tried.power_cuts < self.cycles:
                await self._cycle(apps, gateway, hub, link)
            state = str(self.directory / FORGETFUL / "disk" / "state")
            await self._cut_power(apps, gateway, hub, _config(state, mqtt, link.port))
            pragmas = await asyncio.to_thread(disk.read_pragmas, self.directory / GATEWAY / "journal.db")
        finally:
            if apps is not None:
                await asyncio.to_thread(apps.close)
            await self._daemons.stop()
            if link is not None:
                await link.stop()
        return await asyncio.to_thread(disk.examine, self.directory, syncs, pragmas)

    async def _cut_power(self, apps: Apps, gateway: Daemon, hub: Daemon, config: str) -> None:
        """The gateway once more, on a disk that forgets what was not synced."""
        tried = self.tried
        if tried.power_cuts >= self.power_cuts:
            return
        tried.no_power_cuts = cutmount.missing()
        if tried.no_power_cuts is not None:
            return
        await gateway.stop()
        forgetful = await asyncio.to_thread(cutmount.CutMount, self.directory / FORGETFUL)
        try:
            gateway = await self._daemons.start(f"{GATEWAY}-power", config, forgetful.path / "state")
            while tried.power_cuts < self.power_cuts:
                chance = random.Random(f"{tried.seed}/{tried.cycles}")
                self._show(tried, Blow.POWER)
                apps.running = True
                await asyncio.sleep(chance.uniform(RUN_S_MIN, RUN_S_MAX))
                await gateway.kill()
                keep = chance.choice(list(cutdisk.Keep)).value
                await asyncio.to_thread(forgetful.ask, "cut", keep=keep, seed=chance.randrange(1 << 32))
                await gateway.start()
                tried.power_cuts += 1
                await self._end_cycle(Blow.POWER, apps, gateway, hub)
            await gateway.stop()
        finally:
            await gateway.kill()  # before its files go
            await asyncio.to_thread(forgetful.stop)

    async def _finish_interrupted(self, left: list[tuple[str, int]], apps: Apps, gateway: Daemon, hub: Daemon) -> None:
        """Hold the record of a cycle that never ended against what arrived before and arrives now."""
        self.tried.interrupted += 1
        await self._judge(apps, gateway, hub, left)
        apps.record.clear()

    async def _cycle(self, apps: Apps, gateway: Daemon, hub: Daemon, link: FaultLink) -> None:
        chance = random.Random(f"{self.tried.seed}/{self.tried.cycles}")
        blow = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        self._show(self.tried, blow)
        apps.running = True
        await asyncio.sleep(chance.uniform(RUN_S_MIN, RUN_S_MAX))
        if blow in KILLS:
            victim = gateway if blow is Blow.KILL_GATEWAY else hub
            await victim.kill()
            await victim.start()
        else:
            link.cut(Line.TUNNEL if blow is Blow.CUT else Line.CLOSED)
            await asyncio.sleep(chance.uniform(AWAY_S_MIN, AWAY_S_MAX))
            link.restore()
        await self._end_cycle(blow, apps, gateway, hub)

    async def _end_cycle(self, blow: Blow, apps: Apps, gateway: Daemon, hub: Daemon) -> None:
        apps.running = False
        self.tried.blows[blow.value] = self.tried.blows.get(blow.value, 0) + 1
        await self._judge(apps, gateway, hub, [])
        self.tried.cycles += 1
        self._store()
        apps.record.clear()
        self._show(self.tried, None)

    async def _judge(self, apps: Apps, gateway: Daemon, hub: Daemon, before: list[tuple[str, int]]) -> None:
        """Wait until all is answered and here, or patience ends; then count."""
        end = time.monotonic() + SETTLE_S_MAX
        while time.monotonic() < end:
            if not apps.unanswered and apps.record.idle and not count(before + apps.record.lines).missing:
                break
            await asyncio.sleep(POLL_S)
        lines = before + apps.record.lines
        found = count(lines)
        tried = self.tried
        tried.unacknowledged += apps.unanswered
        tried.acknowledged += found.acknowledged
        tried.delivered += found.delivered
        tried.lost += len(found.missing)
        tried.duplicates += found.duplicates
        tried.duplicates_max = max(tried.duplicates_max, found.duplicates)
        tried.reordered += found.reordered
        tried.missing = (tried.missing + found.missing)[:MISSING_SHOWN]
        if found.missing:
            tried.unaccounted += max(0, len(found.missing) - await _ledger(gateway, hub))
        tried.next = apps.published
        self._store()

    def _store(self) -> None:
        """Replace the state file whole: a cut leaves the old one or the new one."""
        path = self.directory / STATE_FILE
        fresh = path.with_suffix(".new")
        with fresh.open("w") as file:
            json.dump(asdict(self.tried), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        descriptor = os.open(self.directory, os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Take away what this run made, and nothing else."""
        for name in (GATEWAY, HUB, FORGETFUL):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in (GATEWAY, HUB, f"{GATEWAY}-power"):
            for suffix in ("toml", "log"):
                (self.directory / f"{name}.{suffix}").unlink(missing_ok=True)
        for name in (RECORD_FILE, STATE_FILE):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put a file of theirs there: it stays
            self.directory.rmdir()


@dataclass(frozen=True, slots=True)
class Counted:
    """What a record says."""

    acknowledged: int
    delivered: int
    duplicates: int
    reordered: int
    missing: list[int]


def count(lines: list[tuple[str, int]]) -> Counted:
    """Judge one record: lines are in the order in which they became known."""
    acknowledged = {number for kind, number in lines if kind == "a"}
    arrived = [number for kind, number in lines if kind == "d"]
    first = list(dict.fromkeys(arrived))
    reordered, highest = 0, -1
    for number in first:
        reordered += number < highest
        highest = max(highest, number)
    return Counted(
        len(acknowledged), len(first), len(arrived) - len(first), reordered, sorted(acknowledged - set(first))
    )


async def _ledger(*daemons: Daemon) -> int:
    """How many messages the ledgers and dead letters own up to."""
    total = 0
    for daemon in daemons:
        with contextlib.suppress(DaemonStopped, ControlError):
            status = await daemon.ask("status")
            total += status["losses"] + status["dead"]
    return total


def _config(state: str, mqtt: int, line: int) -> str:
    return toml_of(
        {
            "gateway": {"id": GATEWAY, "state_dir": state, "log_level": "warning"},
            "mqtt": {"listen": [f"127.0.0.1:{mqtt}"]},
            "hub": [{"name": HUB, "urls": [f"amqp://127.0.0.1:{line}"], "kind": "lineside"}],
            "outbound": [{"stream": STREAM, "topics": ["verify/#"], "hub": HUB, "address": address(GATEWAY, STREAM)}],
        }
    )
