"""`ack = "disk-or-hub"`: daemons killed and the line cut at random moments, held against the clients' own records."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.faultlink import FaultLink, Line
from tests.crash.test_sigkill import SETTLE_S_MAX, WINDOW, Consumer, Producer
from tests.daemon import CONFIG, HUB_CONFIG, Daemon, free_port

BLOWS = int(os.environ.get("LINESIDE_BLOWS", "6"))
SEED = int(os.environ.get("LINESIDE_SEED", "3"))
STATUS_S = 0.05

# Long enough that a busy machine does not make every hub a slow one, short enough to run out in a tunnel.
GATEWAY_CONFIG = CONFIG + 'ack = "disk-or-hub"\nlinger = "600ms"\n'


class BreakableLine:
    """A FaultLink on a loop and a thread of its own."""

    def __init__(self, target_port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._link = FaultLink(target_port)
        asyncio.run_coroutine_threadsafe(self._link.start(), self._loop).result(SETTLE_S_MAX)
        self.port = self._link.port

    def cut(self, line: Line) -> None:
        self._loop.call_soon_threadsafe(self._link.cut, line)

    def restore(self) -> None:
        self._loop.call_soon_threadsafe(self._link.restore)

    def end(self) -> None:
        asyncio.run_coroutine_threadsafe(self._link.stop(), self._loop).result(SETTLE_S_MAX)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SETTLE_S_MAX)
        self._loop.close()


class Site:
    """Hub, line, gateway."""

    def __init__(self, directory: Path) -> None:
        hub_port = free_port()
        (directory / "hub").mkdir()
        self.hub = Daemon(directory / "hub", HUB_CONFIG, hub_port)
        self.line = BreakableLine(hub_port)
        self.gateway = Daemon(directory, GATEWAY_CONFIG, self.line.port)
        self.hub.status()
        self.gateway.status()

    def never_written(self) -> int:
        return self.gateway.stream()["never_written"]

    def until_held(self) -> None:
        """The hub settles messages that were not written: before that, nothing of what is tested here goes on."""
        before, end = self.never_written(), time.monotonic() + SETTLE_S_MAX
        while self.never_written() == before:
            assert time.monotonic() < end, self.gateway.status()
            time.sleep(STATUS_S)

    def kill(self, victim: Daemon) -> None:
        victim.process.kill()
        victim.process.wait()
        victim.start()
        victim.status()

    def end(self) -> None:
        self.gateway.end()
        self.line.end()
        self.hub.end()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.end()


def settled(producer: Producer, consumer: Consumer) -> list[int]:
    """Once everything is answered and all that was acknowledged has arrived: what arrived, repeats left out."""
    producer.stop()
    end = time.monotonic() + SETTLE_S_MAX
    while True:
        producer.take_answers()
        missing = producer.acknowledged - set(consumer.arrived)
        if not missing and not producer.waiting:
            return list(dict.fromkeys(consumer.arrived))
        assert time.monotonic() < end, (
            f"{len(producer.waiting)} not answered, {len(missing)} of {len(producer.acknowledged)} lost: "
            f"{sorted(missing)[:20]}"
        )
        time.sleep(STATUS_S)


@pytest.mark.timeout(60 + 15 * BLOWS)
def test_killed_and_cut_at_random_moments_nothing_acknowledged_is_lost_though_much_is_never_written(site: Site) -> None:
    rng = random.Random(SEED)
    blows = ["gateway", "gateway", "hub", "tunnel", "closed", "cut and gateway"]
    consumer = Consumer("consumer", site.hub.port, "edge")
    producer = Producer("producer", site.gateway.port, "train/speed")
    never_written = 0
    try:
        for n in range(BLOWS):
            site.until_held()
            time.sleep(rng.uniform(0.0, 0.4))
            match blow := blows[n] if n < len(blows) else rng.choice(blows):
                case "gateway":
                    never_written += site.never_written()
                    site.kill(site.gateway)
                case "hub":
                    site.kill(site.hub)
                case _:
                    site.line.cut(Line.CLOSED if blow == "closed" else Line.TUNNEL)
                    time.sleep(rng.uniform(0.0, 0.5))
                    if blow == "cut and gateway":
                        never_written += site.never_written()
                        site.kill(site.gateway)
                    site.line.restore()
        site.until_held()
        first = settled(producer, consumer)
        never_written += site.never_written()
    finally:
        producer.close()
        consumer.close()
    assert not producer.refused
    assert first == sorted(first), "out of order"
    # A gateway that is killed has forgotten what it had sent and neither written nor acknowledged: the producer sends
    # that again, as at most its window, under another identity. Everything else repeats under the same one, which the
    # hub recognises; and the consumer's window may repeat when the hub is killed.
    again = len(consumer.arrived) - len(first)
    assert again <= BLOWS * WINDOW, f"{again} duplicates after {BLOWS} blows"
    assert len(first) > BLOWS * WINDOW, "too little went through to prove anything"
    assert never_written > BLOWS * WINDOW, f"only {never_written} of {len(first)} were never written"


def test_an_orderly_stop_writes_what_is_held_before_it_is_acknowledged(site: Site) -> None:
    consumer = Consumer("consumer", site.hub.port, "edge")
    producer = Producer("producer", site.gateway.port, "train/speed")
    try:
        site.until_held()
        site.line.cut(Line.TUNNEL)
        site.gateway.process.terminate()
        assert site.gateway.process.wait(SETTLE_S_MAX) == 0
        site.line.restore()
        site.gateway.start()
        site.until_held()
        first = settled(producer, consumer)
        assert first == sorted(first)
    finally:
        producer.close()
        consumer.close()


def test_while_a_local_app_reads_the_stream_it_gets_every_message_in_order(site: Site) -> None:
    producer = Producer("producer", site.gateway.port, "train/speed")
    reader: Consumer | None = None
    try:
        site.until_held()
        reader = Consumer("reader", site.gateway.port, "train/#")
        begins = max(producer.acknowledged, default=0)
        end = time.monotonic() + SETTLE_S_MAX
        while len(reader.arrived) < 4 * WINDOW:
            assert time.monotonic() < end
            time.sleep(STATUS_S)
        written = site.never_written()
        first = settled_from(producer, reader)
        assert first == list(range(first[0], first[-1] + 1))
        assert first[0] <= begins + 3 * WINDOW
        assert site.never_written() == written, "while somebody else reads, all is written"
    finally:
        producer.close()
        if reader is not None:
            reader.close()


def settled_from(producer: Producer, reader: Any) -> list[int]:
    """As `settled`, for a reader that came later."""
    producer.stop()
    end = time.monotonic() + SETTLE_S_MAX
    while producer.waiting or max(producer.acknowledged) > max(reader.arrived):
        producer.take_answers()
        assert time.monotonic() < end
        time.sleep(STATUS_S)
    return list(reader.arrived)
