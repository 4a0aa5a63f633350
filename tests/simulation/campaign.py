"""Many seeds on all cores: `python -m tests.simulation.campaign [--minutes 10 | --seeds 20000] [--first N]`.

Most are brief lives, some are long ones, as MIX has it: what a seed lives is drawn from the seed itself. A seed that
breaks a promise is told at once, with its story and the one command that lives it again; the exit status is then 1.

    --life NAME        seeds of one life only; given several times, of each in turn
    --seed N           one seed, with its whole story; without --life, of the life that MIX has for it
    --fingerprints     what every seed came to, so that two runs can be compared

Each core has a process of its own, which lives seed after seed. One that dies or hangs takes the campaign's verdict
with it, and nothing else: the seed it was at is told, and another process goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import multiprocessing
import os
import random
import resource
import secrets
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.simulation import lives, mqtt_lives
from tests.simulation.brief import brief_crowded_life, brief_life
from tests.simulation.lives import Make, any_life, crowded_life, hours_life, name_of
from tests.simulation.mqtt_lives import BRIEF, LONG, Shape
from tests.simulation.seeds import again, memory_dir

MINUTES = 10.0
FAILURES_MAX = 10
HUNG_S = 300.0
PROGRESS_S = 10.0
CHUNK = 20  # seeds that are given to a process at once


@dataclass(frozen=True, slots=True)
class Lived:
    """What a seed came to: what happened how often, how many hours passed in it, and all of it in one number."""

    told: Counter[str]
    hours: float
    fingerprint: str


def _of_gateway(make: Make) -> Callable[[int, Path], Lived]:
    def run(seed: int, directory: Path) -> Lived:
        world = lives.live(make, seed, directory)
        return Lived(world.told, world.hours, _fingerprint(world.account()))

    return run


def _of_mqtt(shape: Shape) -> Callable[[int, Path], Lived]:
    def run(seed: int, directory: Path) -> Lived:
        simulation = mqtt_lives.live(shape, seed, directory)
        return Lived(simulation.told, simulation.hours, _fingerprint(simulation.account()))

    return run


def _fingerprint(account: list[str]) -> str:
    return hashlib.sha256("\n".join(account).encode()).hexdigest()[:16]


MAKES = (brief_life, brief_crowded_life, any_life, crowded_life, hours_life)
LIVES: dict[str, Callable[[int, Path], Lived]] = {
    **{name_of(make): _of_gateway(make) for make in MAKES},
    **{shape.name: _of_mqtt(shape) for shape in (BRIEF, LONG)},
}
# Of a thousand seeds. Long lives have a fifth of the time so.
MIX = {"brief": 560, "mqtt-brief": 400, "brief-crowded": 15, "any": 15, "mqtt": 8, "crowded": 1, "hours": 1}


def life_of(seed: int) -> str:
    return random.Random(f"life {seed}").choices(list(MIX), list(MIX.values()))[0]


# ------------------------------------------------------------------------------------------------ one process


@dataclass(frozen=True, slots=True)
class Result:
    life: str
    seed: int
    cpu_s: float
    lived: Lived | None
    failure: str = ""


def live(life: str, seed: int, directory: Path) -> Result:
    """One seed; what it printed and why it failed is in the result."""
    began, said = time.process_time(), io.StringIO()
    lived, failure = None, ""
    try:
        with contextlib.redirect_stdout(said):
            lived = LIVES[life](seed, directory)
    except Exception:  # noqa: BLE001 - whatever it is, it is what a campaign looks for
        failure = said.getvalue() + traceback.format_exc()
    return Result(life, seed, time.process_time() - began, lived, failure)


def _work(pipe: Connection, directory: Path) -> None:
    """Live what is asked for until nothing is. A seed is named before it is lived."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever began it ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _settle_down()
    directory.mkdir()
    while (chunk := pipe.recv()) is not None:
        for life, seed in chunk:
            pipe.send((life, seed))
            pipe.send(live(life, seed, directory / "state"))
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _settle_down() -> None:
    # A killed process leaves what it had begun to dial.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    # What is loaded stays; the collector need not look at it in every world.
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------------------ all of them


@dataclass(slots=True)
class Worker:
    """left: what it was given and has not lived yet; at: where it is, `since` when."""

    process: BaseProcess
    pipe: Connection
    left: deque[tuple[str, int]] = field(default_factory=deque)
    at: tuple[str, int] | None = None
    since: float = 0.0


@dataclass(slots=True)
class Campaign:
    """`seeds`: life and seed, as many as there are; `until`: on the monotonic clock, when no more are begun."""

    seeds: Iterator[tuple[str, int]]
    until: float
    processes: int
    directory: Path
    fingerprints: bool = False
    hired: int = 0
    cpu_s: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    hours: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, int]] = field(default_factory=list)
    rss_kb: int = 0
    began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        context = multiprocessing.get_context("fork")
        workers = [self._hire(context) for _ in range(self.processes)]
        told_at = time.monotonic()
        try:
            while workers:
                for worker in self._with_news(workers):
                    if not self._hear(worker):
                        workers.remove(worker)
                        if worker.at is not None:  # it died there
                            self.seeds = chain(worker.left, self.seeds)
                            workers.append(self._hire(context))
                now = time.monotonic()
                for worker in workers:
                    if worker.at is not None and now - worker.since > HUNG_S:
                        worker.process.kill()  # its pipe then ends, which is heard above
                if now - told_at >= PROGRESS_S:
                    told_at = now
                    self._say_progress()
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()

    def _hire(self, context: multiprocessing.context.ForkContext) -> Worker:
        here, there = context.Pipe()
        self.hired += 1
        process = context.Process(target=_work, args=(there, self.directory / str(self.hired)), daemon=True)
        process.start()
        there.close()
        worker = Worker(process, here)
        self._give(worker)
        return worker

    def _give(self, worker: Worker) -> None:
        """The next seeds, or the end of it."""
        if time.monotonic() < self.until and len(self.failures) < FAILURES_MAX:
            worker.left.extend(islice(self.seeds, CHUNK))
        worker.pipe.send(list(worker.left) or None)

    @staticmethod
    def _with_news(workers: list[Worker]) -> list[Worker]:
        ready = wait([worker.pipe for worker in workers], timeout=1.0)
        return [worker for worker in workers if worker.pipe in ready]

    def _hear(self, worker: Worker) -> bool:
        """What a process says; False when it says no more."""
        try:
            said = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            if worker.at is None:
                assert not worker.process.exitcode, f"a process ended with {worker.process.exitcode} between two seeds"
            else:
                life, seed = worker.at
                why = f"its process ended with {worker.process.exitcode} after {time.monotonic() - worker.since:.0f} s"
                self._count(Result(life, seed, 0.0, None, why))
            return False
        if isinstance(said, Result):
            worker.at = None
            self._count(said)
        elif isinstance(said, tuple):
            worker.at, worker.since = said, time.monotonic()
            worker.left.popleft()
        else:
            self.rss_kb = max(self.rss_kb, said)
            self._give(worker)
        return True

    def _count(self, result: Result) -> None:
        self.counts[result.life] += 1
        self.cpu_s[result.life] += result.cpu_s
        if result.lived is not None:
            self.told += result.lived.told
            self.hours[result.life] += result.lived.hours
            if self.fingerprints:
                print(f"{result.life} {result.seed} {result.lived.fingerprint}")
            return
        self.failures.append((result.life, result.seed))
        print(f"\n{result.failure}\nFAILED: seed {result.seed} of {result.life}; this lives it again:")
        print(f"    {again(result.life, result.seed)}", flush=True)

    # ------------------------------------------------------------------ what is said of it

    @property
    def a_minute(self) -> float:
        return self.counts.total() / (time.monotonic() - self.began) * 60

    def _say_progress(self) -> None:
        done, bad = self.counts.total(), len(self.failures)
        print(f"{done} seeds, {self.a_minute:.0f} a minute, {bad} failed", file=sys.stderr, flush=True)

    def say(self) -> None:
        took = time.monotonic() - self.began
        print(f"{'life':14}{'seeds':>8}{'CPU, ms a seed':>16}{'simulated hours':>18}")
        for life in sorted(self.counts, key=list(LIVES).index):
            count = self.counts[life]
            print(f"{life:14}{count:8}{self.cpu_s[life] / count * 1000:16.1f}{self.hours[life]:18.2f}")
        print(
            f"{self.counts.total()} seeds in {took:.0f} s by {self.processes} processes: {self.a_minute:.0f} a minute; "
            f"at most {self.rss_kb >> 10} MiB each"
        )
        print(", ".join(f"{kind} {count}" for kind, count in self.told.most_common()))
        if self.failures:
            print(f"FAILED: {len(self.failures)}")
            for life, seed in self.failures:
                print(f"    {again(life, seed)}")


@contextlib.contextmanager
def _memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as otherwise, memory_dir(Path(otherwise)) as directory:
        yield directory


def _drawn(first: int, count: int | None, chosen: list[str]) -> Iterator[tuple[str, int]]:
    seed = first
    while count is None or seed < first + count:
        yield chosen[seed % len(chosen)] if chosen else life_of(seed), seed
        seed += 1


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all promises held, 1 one was broken, 2 usage."""
    about = (__doc__ or "").partition(":")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.campaign", description=about)
    parser.add_argument("--minutes", type=float, help=f"how long; {MINUTES:g} where --seeds is not given")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--first", type=int, help="the first seed; drawn, and told, where it is not given")
    parser.add_argument("--life", action="append", choices=list(LIVES), default=[])
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fingerprints", action="store_true")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _one(options.life[0] if options.life else life_of(options.seed), options.seed)
    first = secrets.randbelow(1 << 40) if options.first is None else options.first
    minutes = MINUTES if options.minutes is None and options.seeds is None else options.minutes
    until = float("inf") if minutes is None else time.monotonic() + minutes * 60
    print(f"seeds from {first} on", flush=True)
    with _memory() as directory:
        seeds = _drawn(first, options.seeds, options.life)
        campaign = Campaign(seeds, until, options.processes, directory, options.fingerprints)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as when somebody presses Ctrl-C
        try:
            campaign.run()
        except KeyboardInterrupt:
            print("stopped before its time")
        finally:
            signal.signal(signal.SIGTERM, before)
    campaign.say()
    return 1 if campaign.failures else 0


def _one(life: str, seed: int) -> int:
    """In this very process, where a debugger can be."""
    _settle_down()
    with _memory() as directory:
        result = live(life, seed, directory / "state")
    if result.lived is None:
        print(f"{result.failure}\nFAILED: seed {seed} of {life}")
        return 1
    print(f"seed {seed} of {life}: all promises held; {result.lived.fingerprint}, {result.cpu_s * 1000:.0f} ms of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
