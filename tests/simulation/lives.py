"""Lives that a gateway can have in the simulation, each made of nothing but its seed. `live` runs one.

`any_life`: a short one in which everything may fail. `hours_life`: hours with hubs that reject, release and modify at
random places of the window, while the line is cut and the gateway restarts. `crowded_life`: more to send than the line
carries, so that classes and shares decide.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from tests.simulation.gateway_world import World, virtual_modules
from tests.simulation.peers import Habits, Temper
from tests.simulation.seeds import again
from tests.simulation.setting import CLASSES, Setting
from tests.simulation.turns import Turns

MESSAGES = 30
# Longer than any of these worlds lives; and so short that some messages expire.
TTL_LONG_S = 86400.0
TTLS_SHORT_S = (2.0, 20.0)
COMMIT_S_SLOW = ((0.0002, 0.003), (0.02, 0.5), (1.0, 2.0))

Story = Callable[[World], Coroutine[Any, Any, None]]
Life = tuple[World, Story]
Make = Callable[[int, Path], Life]


def name_of(make: Make) -> str:
    """What the campaign calls it."""
    return make.__name__.removesuffix("_life").replace("_", "-")


def live(make: Make, seed: int, directory: Path) -> World:
    """One seed, from birth to judgement. Raises with its trace printed and the way to repeat it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    world, story = make(seed, directory)
    try:
        with virtual_modules(lambda: world.loop), _heard(world):
            world.run(story)
    except BaseException as error:
        for line in world.trace:
            print(line)
        error.add_note(f"seed {seed} of {name_of(make)}; {again(name_of(make), seed)} runs it again")
        raise
    return world


class _Ear(logging.Handler):
    """An exception that only closes a connection, and is logged, is somebody's mistake all the same."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            self._world.loop.troubles.append(f"{record.getMessage()}: {self.format(record)}")


@contextmanager
def _heard(world: World) -> Iterator[None]:
    """What is logged goes nowhere, for a thousand worlds a minute have much to say, but for exceptions."""
    ear, before = _Ear(world), logging.root.manager.disable
    logging.disable(logging.WARNING)
    logging.root.addHandler(ear)
    try:
        yield
    finally:
        logging.root.removeHandler(ear)
        logging.disable(before)


# ------------------------------------------------------------------------------------------------ anything


def any_life(seed: int, directory: Path) -> Life:
    world = World(seed, directory)
    random = world.random
    chance = random.random
    rate = random.choice([2000, 10_000, 100_000]) if chance() < 0.2 else None
    setting = Setting(
        window=random.choice([1, 2, 5, 8, 20]),
        local_window=random.choice([1, 3, 8]),
        # A line that is slow by order must not be taken for a hub that does not answer.
        settle_timeout_s=10 if rate is not None else random.choice([2, 10]),
        credit=random.choice([1, 4, 10]),
        shares=random.choice([(70, 20, 10), (34, 33, 33), (98, 1, 1), (1, 1, 98)]),
        live=random.choice([80, 50, 98, 1]),
        rate=rate,
        line_rate=random.choice([3000, 20_000]) if chance() < 0.15 else None,
        shows=chance() < 0.5,
        linger_ms=tuple((s, random.choice([5, 50, 250, 2000])) for s in CLASSES if chance() < 0.5)
        if chance() < 0.5
        else (),
    )
    temper = Temper(delay_s=random.choice([(0.0, 0.0), (0.0, 0.02), (0.0, 1.0)]), ordered=chance() < 0.6)
    temper.consistent = chance() < 0.6
    if chance() < 0.5:
        temper.rejects, temper.releases, temper.modifies, temper.forgets = (
            random.choice([0.0, 0.05, 0.2]) for _ in range(4)
        )
    local = Temper(delay_s=random.choice([(0.0, 0.0), (0.0, 0.1)]), ordered=chance() < 0.6)
    if chance() < 0.3:
        local.releases, local.modifies, local.forgets = (random.choice([0.0, 0.1]) for _ in range(3))
    if chance() < 0.5:
        local.bars = 0.0
    ttls: tuple[float | None, ...] = (None,)
    if chance() < 0.3:
        ttls = random.choice([(None, TTL_LONG_S), (TTL_LONG_S,), (None, TTL_LONG_S, *TTLS_SHORT_S)])
    apps = [("p0", "up"), ("p1", "up"), ("p2", "alarms"), ("p3", "state"), ("p4", "logs")]
    habits = {
        name: (
            stream,
            Habits(
                random.randint(1, MESSAGES),
                random.choice([0.0, 0.0, 0.02, 0.3]),
                random.choice([(0, 0), (0, 0), (0, 3000)]),
                ttls,
            ),
        )
        for name, stream in apps
    }
    world.build(setting, habits, random.randint(1, MESSAGES), temper, local)
    return world, _anything


async def _anything(world: World) -> None:
    """Random faults for a while; which kinds are possible is the seed's, too."""
    random = world.random
    kinds = {kind: weight for kind, weight in KINDS.items() if random.random() < KIND_SHARE}
    if random.random() < 0.06:
        kinds["copy"] = 3
    for line in world.uplinks:
        line.delay_s = random.choice([(0.0, 0.001), (0.0, 0.05), (0.3, 0.6)])
    for _ in range(random.randint(2, 14)):
        await asyncio.sleep(random.choice([0.0, 0.01, 0.1, 1.0, 5.0]) * random.random())
        for _ in range(random.randint(0, 4)):
            if len(world.store.outbox) < world.letters:
                world.post()
        if kinds:
            (kind,) = random.choices(list(kinds), list(kinds.values()))
            await happens(world, kind)


# Of all that can happen, how much is possible in one life; what that is, and how often.
KIND_SHARE = 0.6
KINDS = {
    "cut": 6,
    "cut one way": 3,
    "half-open": 3,
    "hold": 4,
    "refuse": 2,
    "app cut": 4,
    "hub restart": 2,
    "hub silent": 2,
    "crash": 3,
    "power cut": 1,
    "stop": 1,
    "reload": 1,
    "slow disk": 2,
    "disk full": 1,
    "commit fails": 2,
    "clock": 2,
    "look": 2,
    "network": 1,
}


async def happens(world: World, kind: str) -> None:
    random, net = world.random, world.net
    world.tell(kind)
    line = random.choice(world.uplinks)
    match kind:
        case "cut":
            net.cut(line, to_server=random.choice([0, 1, random.random()]), to_client=random.choice([0, 1, 0.5]))
        case "cut one way":
            net.cut(line, to_server=1.0, to_client=0.0)
        case "half-open":
            net.cut(line, to_server=random.random(), to_client=0.0, tell_client=False)
        case "hold":
            way = random.choice([(True, True), (False, True), (True, False)])
            net.hold(line, to_server=way[0], to_client=way[1])
            await asyncio.sleep(random.choice([0.1, 2.0, 20.0]))
            net.hold(line, to_server=False, to_client=False)
        case "refuse":
            line.refuses = not line.refuses
        case "app cut":
            app = random.choice([*world.producers, *world.consumers])
            net.cut(app.line, to_server=random.choice([0, 1, 0.5]), to_client=random.choice([0, 1, 0.5]))
        case "hub restart":
            random.choice(world.hubs).restart()
        case "hub silent":
            world.temper.silent_until = world.loop.now + random.choice([0.5, 3.0, 15.0])
        case "crash" | "power cut":
            world.crash(committed=random.random() < 0.5, told=kind == "crash" and random.random() < 0.5)
            await asyncio.sleep(random.choice([0.0, 0.3, 3.0]))
            if kind == "power cut":
                world.reboot()
            world.restart()
        case "stop":
            world.disk.full, world.disk.failing = False, 0
            await world.stop()
            await asyncio.sleep(random.choice([0.0, 0.3, 3.0]))
            world.restart()
        case "reload":
            world.gateway.process.run(world.gateway.reload)
        case "slow disk":
            world.disk.commit_s = random.choice(COMMIT_S_SLOW)
        case "disk full":
            world.disk.full = not world.disk.full
        case "commit fails":
            world.disk.failing = random.randint(1, 3)
        case "clock":
            world.set_clock()
        case "look":
            world.look()
        case "copy":
            if world.copy is None:
                world.take_copy()
            else:
                world.restore()
        case "network":
            world.gateway.process.run(world.gateway.hub.network_changed)
        case _:
            raise AssertionError(f"nobody knows what {kind} is")


# ------------------------------------------------------------------------------------------------ hours

HOURS = 2.0
HOURS_KINDS = {
    kind: KINDS[kind]
    for kind in ("cut", "cut one way", "half-open", "hold", "refuse", "hub restart", "crash", "power cut", "stop")
} | {"moods": 25, "commit fails": 1, "clock": 1, "app cut": 1}
PERIOD_S = (0.0, 60.0)


def hours_life(seed: int, directory: Path) -> Life:
    world = World(seed, directory)
    random = world.random
    setting = Setting(
        window=random.choice([2, 5, 20, 100]),
        local_window=8,
        linger_ms=tuple((stream, 250) for stream in CLASSES if random.random() < 0.3),
    )
    temper = Temper(delay_s=random.choice([(0.0, 0.02), (0.0, 0.3)]), ordered=random.random() < 0.6)
    temper.consistent = random.random() < 0.7
    pace_s = random.choice([15.0, 30.0, 60.0])
    habits = {
        f"p{n}": (stream, Habits(int(HOURS * 3600 * 2 / pace_s), pace_s))
        for n, stream in enumerate(("up", "up", "alarms", "state", "logs"))
    }
    world.build(setting, habits, 100, temper, Temper())
    return world, _hours


async def _hours(world: World) -> None:
    random = world.random
    for line in world.uplinks:
        line.delay_s = random.choice([(0.0, 0.01), (0.05, 0.2)])
    while not all(producer.done for producer in world.producers):
        await asyncio.sleep(random.uniform(*PERIOD_S) * random.random())
        if random.random() < 0.05 and len(world.store.outbox) < world.letters:
            world.post()
        (kind,) = random.choices(list(HOURS_KINDS), list(HOURS_KINDS.values()))
        if kind == "moods":
            _moods(world, random)
        elif kind == "refuse":
            world.tell(kind)
            for line in world.uplinks:
                line.refuses = random.random() < 0.3
        else:
            await happens(world, kind)


def _moods(world: World, random: Random) -> None:
    """The hub is different from now on: mostly well, else with one answer or all of them at random places."""
    temper = world.temper
    temper.rejects = temper.releases = temper.modifies = temper.forgets = 0.0
    temper.bars = random.choice([0.0, 0.3, 1.0])
    mood = random.choice(["well", "well", "rejects", "releases", "modifies", "forgets", "all"])
    share = random.choice([0.02, 0.2, 0.6])
    world.tell(f"hub, {mood} {share}")
    for name in ("rejects", "releases", "modifies", "forgets"):
        if mood in (name, "all"):
            setattr(temper, name, share / 4 if mood == "all" else share)


# ------------------------------------------------------------------------------------------------ a crowded line

CALMS = 3  # of a long life
CALM_BYTES = 60_000  # what the line carries in a calm span, at least
CALM_S = 5.0
RAMP_S = 2.0


def crowded_life(seed: int, directory: Path) -> Life:
    shares = ((70, 20, 10), (50, 30, 20), (34, 33, 33))
    return crowd(seed, directory, CALMS, CALM_BYTES, (2000, 8000, 20_000), shares)


def crowd(
    seed: int,
    directory: Path,
    calms: int,
    calm_bytes: int,
    line_rates: tuple[int, ...],
    shares: tuple[tuple[int, int, int], ...],
) -> Life:
    """`calms`: how many calm spans, in each of which a line of one of these rates carries so much, at least."""
    world = World(seed, directory)
    random = world.random
    line_rate = random.choice(line_rates)
    delay_s = random.choice([(0.001, 0.002), (0.05, 0.1), (0.3, 0.4)])
    limited = random.random() < 0.4
    setting = Setting(
        window=1000,
        local_window=8,
        settle_timeout_s=30,
        shares=random.choice(shares),
        live=random.choice([80, 50]),
        rate=line_rate * 8 // 10 if limited else None,
        line_rate=line_rate,
        shows=not limited or random.random() < 0.5,
        hubs=1,
        linger_ms=tuple((stream, 250) for stream in CLASSES if random.random() < 0.3),
    )
    turns = world.turns = Turns(setting, delay_s, max(CALM_S, calm_bytes / line_rate))
    life_s = calms * (turns.calm_s + RAMP_S + 8 * turns.rtt_s)
    flood = random.random() < 0.3  # alarms, too, are more than the line carries
    logs = random.choice([(100, 900), (1000, 6000)])

    def crowd(padding_bytes: tuple[int, int], share: float) -> Habits:
        return Habits(int(life_s * line_rate * share * 2 / sum(padding_bytes)), padding_bytes=padding_bytes)

    def few(padding_bytes: tuple[int, int]) -> Habits:
        return Habits(100, 2 * life_s / 100, padding_bytes)

    habits = {
        "p0": ("up", crowd((100, 900), 0.7)),
        "p1": ("state", few((50, 200))),
        "p2": ("alarms", crowd((100, 300), 0.8) if flood else few((0, 100))),
        "p3": ("logs", crowd(logs, 0.7)),
    }
    temper = Temper(delay_s=random.choice([(0.0, 0.0), (0.0, 0.02)]))
    world.build(setting, habits, 1, temper, Temper())
    for hub in world.hubs:
        hub.credit = 1000
    for line in world.uplinks:
        line.delay_s = delay_s
        line.tap = lambda size: turns.written.append((world.loop.now, size))
    return world, lambda world: _crowded(world, calms)


async def _crowded(world: World, calms: int) -> None:
    """A tunnel, so that there is a backlog; then calm spans, and something between them."""
    random, turns = world.random, world.turns
    assert turns is not None
    kind = "hold"
    for _ in range(calms):
        await happens(world, kind)
        for line in world.uplinks:
            if kind == "hold":  # what the tunnel kept would be news of the time before it
                world.net.cut(line, to_server=0.0, to_client=0.0)
        seen = len(world.history.hub)
        await world.until(lambda seen=seen: len(world.history.hub) > seen, "the line is back")  # type: ignore[misc]
        await asyncio.sleep(RAMP_S + 4 * turns.rtt_s)
        start = world.loop.now
        await asyncio.sleep(turns.calm_s)
        turns.calms.append((start, world.loop.now))
        world.tell("calm")
        kind = random.choice(["cut", "hold", "hub restart", "crash", "stop", "reload", "network"])
