"""A gateway between its apps and its hubs, all in one thread and on one virtual clock, with everything that can fail.

The gateway is the real one from the journal to the AMQP driver, put together as the daemon does it; the apps and hubs
are models (`peers`), the network is `virtual`, what they saw is judged by `history`. The disk is SQLite's own files in
memory, with commits that take as long, fail or are cut off by a crash as the simulation says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gateway import committer
from gateway.amqp.listener import AmqpListener
from gateway.app import STOP_S_MAX
from gateway.broker import Broker
from gateway.committer import Committer
from gateway.config import Config
from gateway.uplink import attempt
from gateway.uplink.hub import HubLink
from storeforward import journal as journal_module
from storeforward import space
from storeforward.batch import Batch
from storeforward.errors import JournalError
from storeforward.journal import Journal
from tests.simulation.history import Books, History, Reader, written
from tests.simulation.peers import Consumer, Habits, Hub, Producer, Store, Temper
from tests.simulation.setting import GATEWAY, HUBS, Setting, configured
from tests.simulation.virtual import EPOCH_S, Line, Net, Process, VirtualLoop

if TYPE_CHECKING:
    from tests.simulation.turns import Turns

# Two durable subscriptions, and a queue's two receivers.
READERS = ("s0", "s1", "q0", "q1")
HOUSEKEEPING_S = 5.0
CURSORS_S = 0.25
FREE_BYTES = 1 << 40
SETTLED_S_MAX = 1800.0
BOOT_S = 7.0  # what the boot-time clock shows when the daemon starts
YEAR_S = 365 * 86400.0
WALL_S = 1e9


@contextlib.contextmanager
def virtual_modules(loop_of: Callable[[], VirtualLoop]) -> Iterator[None]:
    """What the gateway asks of the machine is answered by the simulation."""
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(perf_counter=lambda: loop_of().now, monotonic=lambda: loop_of().now)
        patch.setattr(committer, "time", clock)
        patch.setattr(committer, "ThreadPoolExecutor", lambda **_: None)
        patch.setattr(attempt, "look", lambda end: end.look())
        patch.setattr(attempt, "silent_ms", lambda end: end.silent_ms())
        patch.setattr(attempt, "discard", lambda end: None)  # the harder case: it still arrives, and late
        patch.setattr(space, "RESERVE_BYTES_MAX", space.RESERVE_BYTES_MIN)
        patch.setattr(space.Space, "free_bytes", lambda self: FREE_BYTES)
        yield


class Disk:
    """How the disk takes what it is given. `full`: nothing fits; `fails`: so many commits from now on do not come."""

    def __init__(self, loop: VirtualLoop, random: Random, stir: Callable[[str], None]) -> None:
        self.loop = loop
        self.random = random
        self.stir = stir
        self.commit_s = (0.0002, 0.003)
        self.full = False
        self.failing = 0
        self._at_work: tuple[Callable[[], Any], Future[Any]] | None = None

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """The committer's executor."""
        future: Future[Any] = Future()
        self._at_work = work, future
        self.loop.call_later(self.random.uniform(*self.commit_s), self._do, work, future)
        self.stir("commit begins")
        return future

    def forget(self) -> None:
        """Who had asked for it is dead."""
        self._at_work = None

    def shutdown(self, wait: bool) -> None:
        """What is at work is waited for, though the loop does not turn any more."""
        if self._at_work is not None:
            self._do(*self._at_work)

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        if future.done():
            return
        self._at_work = None
        try:
            if work.__name__ == "_commit" and (self.full or self.failing):
                self.failing = max(0, self.failing - 1)
                error = sqlite3.OperationalError("simulated")
                error.sqlite_errorname = "SQLITE_FULL" if self.full else "SQLITE_IOERR"
                raise error
            result = work()
        except Exception as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        else:
            self.stir("commit ends")
            future.set_result(result)


class Gateway:
    """One life of the daemon, composed as gateway.app does it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loop = world.loop
        self.process = Process("gateway")
        self.stopping = False
        world.history.life += 1
        with pytest.MonkeyPatch.context() as patch:
            # The random part of identities must not make two runs of a seed differ.
            patch.setattr(journal_module, "secrets", SimpleNamespace(token_hex=world.token))
            patch.setattr(journal_module, "boot_id", lambda: f"boot-{world.history.boots}")
            self.process.run(self._start)

    def _start(self) -> None:
        world, loop = self.world, self.loop
        config = world.config
        self.journal = journal = Journal.open(
            world.state_dir,
            synchronous="OFF",
            clock=lambda: loop.now - world.booted_at,
            wall=world.wall,
            synchronised=lambda: False,
        )
        assert journal.salvaged is None, journal.salvaged
        self.broker = Broker(config, journal)
        self.committer = Committer(journal, loop, self._committed, self._fatal)
        self.committer._executor = world.disk  # type: ignore[assignment]
        assert config.amqp is not None
        self.amqp = AmqpListener(
            self.broker,
            self.committer.kick,
            container="loco",
            connections_max=100,
            message_max_bytes=1 << 20,
            idle_timeout_s=60.0,
            window=config.amqp.window,
        )
        world.net.listen(GATEWAY, self.process, self.amqp.protocol)
        self.hub = self._link()
        self.committer.on_offered = lambda: self.hub.committed()
        self.committer.kick()
        self.broker.schedule = lambda delay_s: None
        self._housekeeping()
        self._write_cursors()

    def _link(self) -> HubLink:
        config = self.world.config
        (hub,) = config.hubs
        link = HubLink(
            hub,
            "loco",
            config.outbound,
            config.inbound,
            self.journal,
            self.committer.kick,
            self.broker.retain_received,
            self.broker.requests,
        )
        link.state._random = self.world.random
        link.start()
        return link

    def reload(self) -> None:
        """As gateway.app does it where the tables of hubs or streams have changed."""
        self.broker.reload(self.world.config)
        self.amqp.reload()
        self.hub.stop()
        self.world.history.life += 1  # its links are made anew, and know what the journal knows
        self.hub = self._link()
        self.committer.kick()

    async def stop(self) -> None:
        """As gateway.app does it: what waits for an answer gets it, as far as time allows; then all ends in order."""
        self.stopping = True
        self.journal.stop_holding()
        await self._drain()
        self.amqp.stop()
        self.hub.stop()
        await asyncio.sleep(0)
        await self._drain()
        self.committer.stop()
        self.journal.close()

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S_MAX / 2):
                await self.committer.drain()

    def _committed(self, batch: Batch) -> None:
        self.broker.committed(batch)
        self.hub.committed()
        self.amqp.committed(batch)

    def _fatal(self, error: JournalError) -> None:
        raise AssertionError(f"the journal gave up: {error}")

    def _housekeeping(self) -> None:
        if self.stopping:
            return
        self.broker.run_due()
        self.amqp.housekeeping()
        self.journal.reclaim()
        if self.journal.pending:
            self.committer.kick()
        self.loop.call_later(HOUSEKEEPING_S, self._housekeeping)

    def _write_cursors(self) -> None:
        if self.stopping:
            return
        self.broker.caught_up()
        self.journal.write_cursors()
        if self.journal.pending:
            self.committer.kick()
        self.loop.call_later(CURSORS_S, self._write_cursors)

    def die(self, *, committed: bool, told: bool) -> None:
        """`committed`: the commit under way had reached the disk, and nobody was told."""
        journal = self.journal
        self.world.net.kill(self.process, told=told)
        self.world.disk.forget()
        if committed and journal.under_way is not None:
            journal.commit()
        for connection in (journal._r, journal._w):
            connection.close()  # what was not committed is rolled back
        os.close(journal._index_fd)
        journal._lock.release()


class World:
    """`run` lives one seed through; `history` and the journal's books are checked at every crash and in the end."""

    def __init__(self, seed: int, state_dir: Path) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.state_dir = state_dir
        self.trace: list[str] = []
        self.told: Counter[str] = Counter()
        self.loop = VirtualLoop()
        self.net = Net(self.loop, Random(random.random()))
        self.disk = Disk(self.loop, Random(random.random()), self.stir)
        self.store = Store()
        self.booted_at = self.loop.now - BOOT_S
        self.wall_off_s = WALL_S
        self.copy: Path | None = None
        self.config: Config
        self.history: History
        self.turns: Turns | None = None
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}

    async def moment(self, what: str, most_s: float) -> None:
        """Wait until this happens, whoever it happens to, but not for ever."""
        future = self.loop.create_future()
        self._awaited.setdefault(what, []).append(future)
        await asyncio.wait([future], timeout=most_s)
        future.cancel()

    def stir(self, what: str) -> None:
        """Something that may be waited for has happened."""
        for future in self._awaited.pop(what, ()):
            if not future.done():
                future.set_result(None)

    def token(self, size: int) -> str:
        return self.random.randbytes(size).hex()

    def wall(self) -> float:
        return self.loop.now + self.wall_off_s

    def build(
        self,
        setting: Setting,
        habits: dict[str, tuple[str, Habits]],
        letters: int,
        temper: Temper,
        local_temper: Temper,
        readers: tuple[str, ...] = READERS,
    ) -> None:
        """`habits`: of the apps that send, by name, with the stream they send to. `readers`: of READERS."""
        random, net = self.random, self.net
        self.setting = setting
        self.config = configured(setting)
        self.history = history = History(
            setting.window, setting.local_window, temper.consistent, setting.streams, self.loop.time
        )
        history.stir = self.stir
        history.lingering = tuple(dict(setting.linger_ms))
        self.temper = temper
        self.hubs = [
            Hub(net, Random(random.random()), history, self.store, temper, each) for each in HUBS[: setting.hubs]
        ]
        for line in self.uplinks:
            line.rate, line.shows = setting.line_rate, setting.shows
        self.producers = [
            Producer(net, Random(random.random()), name, GATEWAY, f"{stream}/{name}", stream, each, history)
            for name, (stream, each) in habits.items()
        ]
        self.local_temper = replace(local_temper, final_bars=True)
        self.queue_temper = replace(local_temper, bars=0.0, consistent=False)  # what it waits for the other may get
        self.consumers = []
        queue = Reader("queue", False)
        for name in readers:
            reader = queue if name in ("q0", "q1") else Reader(name, True)
            address, mind = ("cmd/#", self.local_temper) if reader.exclusive else ("cmd/x", self.queue_temper)
            if reader not in history.readers:
                history.readers.append(reader)
            self.consumers.append(Consumer(net, Random(random.random()), name, GATEWAY, address, reader, mind, history))
        self.letters = letters

    def post(self) -> None:
        """The hub has something for the gateway's apps."""
        n = len(self.store.outbox) + 1
        self.store.add(f"h:1:{n}", written(f"h:1:{n}", f"hub-message-{n}", "x"))

    # ------------------------------------------------------------------ what can happen

    @property
    def uplinks(self) -> list[Line]:
        return [self.net.line("gateway", each.address) for each in self.hubs]

    @property
    def hours(self) -> float:
        """How much time has passed in it."""
        return (self.loop.now - EPOCH_S) / 3600

    def account(self) -> list[str]:
        """All that happened, and what everybody got: of two runs of a seed, the same."""
        arrivals = [*self.history.hub, *(a for reader in self.history.readers for a in reader.arrivals)]
        return [*self.trace, *map(repr, arrivals)]

    def tell(self, text: str) -> None:
        self.trace.append(f"{self.loop.now - EPOCH_S:9.3f} {text}")
        self.told[text.partition(",")[0]] += 1

    def crash(self, *, committed: bool, told: bool) -> None:
        self.gateway.die(committed=committed, told=told)
        self.tell(f"crash, commit {'kept' if committed else 'lost'}, {'reset' if told else 'silent'}")
        self.look()

    def look(self) -> Books:
        return self.history.look(self.state_dir / "journal.db")

    async def stop(self) -> None:
        """An orderly end, as systemctl asks for it."""
        gateway = self.gateway
        task = gateway.process.run(self.loop.create_task, gateway.stop())
        await task
        self.net.kill(gateway.process, told=True)
        self.tell("stopped")
        self.look()

    def reboot(self) -> None:
        """The gateway is down: the boot-time clock begins again, and the wall clock is whatever it is then."""
        self.history.boots += 1
        self.booted_at = self.loop.now - BOOT_S
        self.set_clock()

    def set_clock(self) -> None:
        """Somebody, or nobody, has set the wall clock."""
        random, now = self.random, self.loop.now
        self.wall_off_s = random.choice([WALL_S, -now, 50 * YEAR_S, -50 * YEAR_S, WALL_S + random.uniform(-5, 5)])
        self.tell(f"wall clock, {self.wall():.0f}")

    def restart(self) -> None:
        self.gateway = Gateway(self)
        self.tell(f"start, epoch {self.gateway.journal.epoch}")

    def take_copy(self) -> bool:
        """A backup of the state directory, between two commits."""
        if self.gateway.journal.under_way is not None or not self.gateway.process.alive:
            return False
        self.copy = self.state_dir.with_name(self.state_dir.name + "-copy")
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.state_dir, self.copy)
        return True

    def restore(self) -> None:
        """The daemon is stopped, and started on an old copy. What only the newer one knew is excused, and no more."""
        assert self.copy is not None
        self.gateway.die(committed=True, told=True)
        now = Books.read(self.state_dir / "journal.db")
        shutil.rmtree(self.state_dir)
        shutil.copytree(self.copy, self.state_dir)
        then = Books.read(self.state_dir / "journal.db")
        history = self.history
        history.restored = True
        history.positions = {}
        # Journaled and acknowledged since: gone with the newer file, unless the hub has them.
        for stream, rows in now.rows.items():
            history.excused |= {payload for seq, payload in rows.items() if seq not in then.rows[stream]}
        history.excused |= history.acked & set(now.dead_payloads) - set(then.dead_payloads)
        history.excused |= history.taken - set(then.rows["cmd"].values())
        self.tell("restored an older copy")
        self.restart()

    # ------------------------------------------------------------------ a life

    def run(self, story: Callable[[World], Any]) -> None:
        """Live through `story`, a coroutine function, then let everything heal and check."""
        asyncio.set_event_loop(None)
        try:
            self.loop.run_until_complete(self._live(story))
        finally:
            if hasattr(self, "gateway") and self.gateway.process.alive:
                self.gateway.die(committed=False, told=False)
            self._end()

    def _end(self) -> None:
        # Pending tasks of a thousand worlds would only be found by the collector, each with a complaint.
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.loop.close()

    async def _live(self, story: Callable[[World], Any]) -> None:
        self.gateway = Gateway(self)
        for app in self.consumers:
            app.start()
        await self.until(lambda: all(app.attached for app in self.consumers), "the receivers attach")
        await self.until(lambda: not self.gateway.journal.pending, "subscriptions are stored")
        for producer in self.producers:
            producer.start()
        await story(self)
        self.heal()
        while len(self.store.outbox) < self.letters:
            self.post()
        await self.until(self.settled, "everything is settled")
        assert not self.loop.troubles, self.loop.troubles
        self.tell("settled")
        self.gateway.die(committed=False, told=False)
        self.history.check(self.look())
        if self.turns is not None:
            self.turns.check(self.history)

    def heal(self) -> None:
        self.tell("heal")
        self.disk.full, self.disk.failing = False, 0
        self.disk.commit_s = (0.0002, 0.003)
        for line in self.uplinks:
            line.refuses = False
            line.delay_s = (0.0, 0.005)
            self.net.hold(line, to_server=False, to_client=False)
        for temper in (self.temper, self.local_temper, self.queue_temper):
            temper.rejects = temper.releases = temper.modifies = temper.forgets = 0.0
            temper.delay_s = (0.0, 0.01)
            temper.silent_until = 0.0
        if not self.gateway.process.alive:
            self.restart()

    def settled(self) -> bool:
        journal = self.gateway.journal
        if not (all(p.done for p in self.producers) and self.store.empty):
            return False
        if journal.pending or journal.under_way is not None:
            return False
        return all(
            cursor.durable >= stream.committed
            for stream in journal.streams.values()
            for cursor in stream.cursors.values()
        )

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        end = self.loop.now + SETTLED_S_MAX
        while not condition():
            assert self.loop.now < end, f"it never comes to this: {what}; {self._state()}"
            assert not self.loop.troubles, self.loop.troubles
            await asyncio.sleep(0.05)

    def _state(self) -> dict[str, Any]:
        journal = self.gateway.journal
        return {
            "hub": self.gateway.hub.describe(),
            "disk_full": journal.disk_full,
            "todo": [(len(p.todo), len(p._out), p._given_back) for p in self.producers],
            "streams": [
                (s.name, s.committed, [(c.name, c.position, c.durable) for c in s.cursors.values()])
                for s in journal.streams.values()
            ],
            "outbox": (self.store.first, len(self.store.outbox)),
        }
