"""Group commit on a loop: what an end waits for."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.committer import Committer
from storeforward.batch import Batch
from storeforward.errors import JournalError
from storeforward.journal import Journal

WAIT_S = 40.0


class Bench:
    """A journal with an app that publishes the next message whenever one is on the disk, for ever."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal.open(path)
        self.stream = self.journal.stream("telemetry", "outbound")
        self.fatal: list[JournalError] = []
        self.committer = Committer(self.journal, asyncio.get_running_loop(), self.committed, self.fatal.append)

    def publish(self) -> int:
        seq = self.journal.append(self.stream, "t", lambda seq, body: body, b"x")
        self.committer.kick()
        return seq

    def committed(self, batch: Batch) -> None:
        if batch.appended:
            self.publish()

    def close(self) -> None:
        self.committer.stop()
        self.journal.close()


def test_a_flush_waits_for_what_is_staged_and_not_for_what_apps_go_on_to_publish(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        bench.publish()
        await bench.committer.flush()
        last = bench.publish()
        async with asyncio.timeout(WAIT_S):
            await bench.committer.flush()
        assert bench.stream.committed > last
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await bench.committer.drain()  # for when nobody is left who publishes
        bench.close()

    asyncio.run(story())


def test_a_flush_does_not_wait_for_a_journal_that_failed(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        bench.publish()
        flush = asyncio.create_task(bench.committer.flush())
        await asyncio.sleep(0)
        bench.committer._fatal(JournalError("gone"))
        async with asyncio.timeout(WAIT_S):
            await flush
        assert bench.fatal
        bench.close()

    asyncio.run(story())


def test_nobody_waits_for_a_commit_after_the_last_one(tmp_path: Path) -> None:
    async def story() -> None:
        for name in ("failed", "stopped"):
            directory = tmp_path / name
            directory.mkdir()
            bench = Bench(directory)
            bench.publish()
            waiting = [asyncio.create_task(w) for w in (bench.committer.flush(), bench.committer.drain())]
            await asyncio.sleep(0)
            if name == "failed":
                bench.committer._fatal(JournalError("gone"))
            else:
                bench.committer.stop()
            bench.publish()
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*waiting, bench.committer.flush(), bench.committer.drain())
            bench.close()

    asyncio.run(story())


@pytest.mark.parametrize("step", ["begin", "commit", "committed", "checkpoint", "recover"])
def test_an_error_that_nobody_expected_ends_the_daemon_and_does_not_just_stop_intake(tmp_path: Path, step: str) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        failed = asyncio.Event()
        bench.committer._on_fatal = lambda error: (bench.fatal.append(error), failed.set())[1]

        def wrong(*args: object) -> None:
            raise OSError("nobody thought of this")

        setattr(bench.journal, step, wrong)
        if step == "checkpoint":
            bench.journal.checkpoint_due = lambda: True  # type: ignore[method-assign]
        if step == "recover":
            bench.journal.disk_full = True
            bench.committer._recover()
        else:
            bench.publish()
        async with asyncio.timeout(WAIT_S):
            await failed.wait()
        assert "nobody thought of this" in str(bench.fatal[0])
        bench.committer._executor.shutdown()

    asyncio.run(story())


class Pair:
    """Two apps that publish whenever they are answered, the second of them a little later; the sizes of the batches."""

    def __init__(self, path: Path, sync_s: float, apart: bool = False) -> None:
        self.apart = apart
        path.mkdir(exist_ok=True)
        self.journal = Journal.open(path)
        self.stream = self.journal.stream("telemetry", "outbound")
        self.sync_s = sync_s
        self.loop = asyncio.get_running_loop()
        self.committer = Committer(self.journal, self.loop, self.committed, lambda error: None)
        self.sizes: list[int] = []
        self.enough = asyncio.Event()
        commit = self.journal.commit
        self.journal.commit = lambda: (time.sleep(sync_s), commit())[1]  # type: ignore[method-assign]

    def publish(self) -> None:
        self.journal.append(self.stream, "t", lambda seq, body: body, b"x")
        self.committer.kick()

    def committed(self, batch: Batch) -> None:
        self.sizes.append(batch.messages)
        if len(self.sizes) >= 6:
            self.enough.set()
            return
        self.loop.call_later(self.sync_s / 40, self.publish)
        if batch.messages == 2:
            self.loop.call_later(self.sync_s / 20, self.publish)

    async def run(self) -> None:
        self.publish()
        if self.apart:  # the one answered first would find the other's message staged already, for ever
            await asyncio.sleep(self.sync_s / 2)
        self.publish()
        async with asyncio.timeout(WAIT_S):
            await self.enough.wait()
        await self.committer.drain()
        self.committer.stop()
        self.journal.close()


def test_after_a_slow_commit_those_it_answered_are_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        pair = Pair(tmp_path / "together", 0.1)
        await pair.run()
        assert pair.sizes[:6] == [2] * 6
        pair = Pair(tmp_path / "apart", 0.1, apart=True)
        await pair.run()
        assert pair.sizes[:6] == [1] + [2] * 5

    asyncio.run(story())


def test_one_who_falls_silent_holds_up_the_others_for_a_moment_only(tmp_path: Path) -> None:
    async def story() -> None:
        pair = Pair(tmp_path, 0.1)
        began: list[float] = []
        begin = pair.journal.begin
        pair.journal.begin = lambda: (began.append(pair.loop.time()), begin())[1]  # type: ignore[method-assign]
        committed, ends = pair.committed, list[float]()

        def only_one_goes_on(batch: Batch) -> None:
            ends.append(pair.loop.time())
            committed(replace(batch, appended={}) if batch.messages == 2 else batch)

        pair.committer._on_commit = only_one_goes_on
        await pair.run()
        assert began[1] - ends[0] >= 0.005  # for the one that does not come
        assert began[1] - ends[0] < 0.1

    asyncio.run(story())
