"""Brief lives of a gateway: a handful of messages and one to three faults, each of one family. Most of a campaign.

What is wrong with a gateway shows as a rule with two messages and one cut, if it is the right cut: so many brief lives
find it sooner than a few long ones, and say it with a trace that can be read. `lives` has the long ones.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.simulation import newborn
from tests.simulation.gateway_world import World
from tests.simulation.lives import COMMIT_S_SLOW, KINDS, Life, crowd, happens
from tests.simulation.peers import Habits, Temper
from tests.simulation.setting import CLASSES, Setting

MESSAGES = 6
FAULTS = 3
# Before each of them: a message needs some milliseconds from an app to the hub and back. Or until something happens.
WAITS_S = (0.0, 0.003, 0.03, 0.3, 2.0)
MOMENT_SHARE = 0.5
MOMENT_S_MAX = 2.0
MOMENTS_LATER_S = (0.0, 0.0, 0.002, 0.02)
TTLS_S = (None, 0.05, 2.0, 86400.0)
# Of its faults, how many are of the family; the others can be any, so that families meet.
OWN_SHARE = 0.75
# How many gateways make their journal themselves. The others find it made.
FIRST_START_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Family:
    """What such a life is about. kinds: its faults, as `happens` knows them; the rest says how likely something is.

    answers: that the hub is moody; back: that it has messages for the apps; picky: that the apps are moody, too;
    lingers: that streams wait for hub or disk; slow: that the disk is slow from the start; ttl: that messages have one;
    hubs: that there are two. faults: how many, at least. paces_s: how long apps wait between two messages, at most;
    delays_s: the hub before it answers, from and to; moments: when a fault strikes, where no time is given for it.
    """

    kinds: tuple[str, ...]
    weight: int
    answers: float = 0.3
    back: float = 0.4
    picky: float = 0.2
    lingers: float = 0.25
    slow: float = 0.2
    ttl: float = 0.1
    hubs: float = 0.2
    faults: int = 1
    paces_s: tuple[float, ...] = (0.0, 0.0, 0.005, 0.1)
    delays_s: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.0, 0.02), (0.0, 0.5))
    moments: tuple[str, ...] = ("commit begins", "commit ends", "arrival", "accepted", "letter")


FAMILIES = {
    "line": Family(("cut", "cut one way", "half-open", "hold", "refuse", "network"), 4),
    "hub": Family(("hub restart", "hub silent", "cut"), 2, hubs=0.6),
    "answers": Family(("cut", "crash", "hub restart"), 3, answers=1.0),
    "ends": Family(("crash", "crash", "power cut", "stop", "reload"), 4),
    "disk": Family(("commit fails", "commit fails", "disk full", "slow disk", "crash"), 3, slow=0.4),
    # What the hub has, and the disk has not: it strikes when the hub has got something.
    "hub or disk": Family(
        ("crash", "crash", "commit fails", "commit fails", "commit fails", "cut", "stop"),
        5,
        lingers=1.0,
        slow=0.6,
        paces_s=(0.005, 0.02, 0.1),
        delays_s=((0.0, 0.02), (0.0, 0.1), (0.0, 0.5)),
        moments=("arrival", "arrival", "commit begins"),
    ),
    "way back": Family(("app cut", "crash", "cut", "hub restart", "stop"), 3, back=1.0, picky=0.6),
    "clock": Family(("clock", "power cut", "hold", "crash"), 2, ttl=1.0),
    # One takes it, the next put it in the journal's place; and something has to be sent after that.
    "copy": Family(("copy",), 2, faults=FAULTS, paces_s=(0.1, 1.0)),
}


def brief_life(seed: int, directory: Path) -> Life:
    world = World(seed, directory)
    random = world.random
    chance = random.random
    if chance() >= FIRST_START_SHARE:
        newborn.lay(directory)
    name = random.choices(list(FAMILIES), [family.weight for family in FAMILIES.values()])[0]
    family = FAMILIES[name]
    streams = tuple(random.sample(list(CLASSES), random.choice([1, 1, 2])))
    back = chance() < family.back
    readers = random.choice([("s0",), ("q0",), ("s0", "q0"), ("q0", "q1")]) if back else ()
    setting = Setting(
        window=random.choice([1, 2, 5]),
        local_window=random.choice([1, 3]),
        settle_timeout_s=random.choice([2, 10]),
        credit=random.choice([1, 4]),
        shows=chance() < 0.5,
        hubs=2 if chance() < family.hubs else 1,
        linger_ms=tuple((stream, random.choice([5, 5, 250, 2000])) for stream in streams)
        if chance() < family.lingers
        else (),
        streams=streams,
        queue="q0" in readers,
    )
    temper = Temper(delay_s=random.choice(family.delays_s), ordered=chance() < 0.6)
    temper.consistent = chance() < 0.6
    if chance() < family.answers:
        _moody(temper, random)
    local = Temper(delay_s=random.choice([(0.0, 0.0), (0.0, 0.1)]), ordered=chance() < 0.6)
    local.bars = random.choice([0.0, 0.5, 1.0])
    if chance() < family.picky:
        local.releases, local.modifies, local.forgets = (random.choice([0.0, 0.3]) for _ in range(3))
    ttls = tuple(random.sample(TTLS_S, 2)) if chance() < family.ttl else (None,)
    habits = {
        f"p{n}": (stream, Habits(random.randint(1, MESSAGES), random.choice(family.paces_s), (0, 0), ttls))
        for n, stream in enumerate([*streams, streams[0]][: random.choice([1, 2, 2])])
    }
    world.build(setting, habits, random.randint(1, MESSAGES) if back else 0, temper, local, readers)

    async def story(world: World) -> None:
        world.tell(f"family, {name}")
        await _few_faults(world, family)

    return world, story


def _moody(temper: Temper, random: Random) -> None:
    """Few messages have to meet it: so one mood or two, and each often."""
    for mood in random.sample(["rejects", "releases", "modifies", "forgets"], random.choice([1, 1, 2])):
        setattr(temper, mood, random.choice([0.1, 0.4]))


async def _few_faults(world: World, family: Family) -> None:
    random = world.random
    for line in world.uplinks:
        line.delay_s = random.choice([(0.0, 0.001), (0.0, 0.001), (0.0, 0.05), (0.3, 0.6)])
    if random.random() < family.slow:
        world.disk.commit_s = COMMIT_S_SLOW[1]
    for _ in range(random.randint(family.faults, FAULTS)):
        for _ in range(random.randint(0, 3)):
            if len(world.store.outbox) < world.letters:
                world.post()
        await _a_while(world, family)
        if random.random() < OWN_SHARE:
            kind = random.choice(family.kinds)
        else:
            (kind,) = random.choices(list(KINDS), list(KINDS.values()))
        await happens(world, kind)
    await asyncio.sleep(random.choice(WAITS_S) * random.random())


async def _a_while(world: World, family: Family) -> None:
    """Some time, or until something is under way: what goes wrong between two steps has to strike there."""
    random = world.random
    if random.random() < MOMENT_SHARE:
        moment = random.choice(family.moments)
        for _ in range(random.randint(1, 3)):
            await world.moment(moment, MOMENT_S_MAX)
        world.tell(f"moment, {moment}")
        await asyncio.sleep(random.choice(MOMENTS_LATER_S) * random.random())
    else:
        await asyncio.sleep(random.choice(WAITS_S) * random.random())


# In less than that nobody whose share is a third has waited too long yet.
CALM_BYTES = 40_000


def brief_crowded_life(seed: int, directory: Path) -> Life:
    """More to send than the line carries, after one tunnel and for one calm span."""
    return crowd(seed, directory, 1, CALM_BYTES, (4000, 8000), ((34, 33, 33), (50, 30, 20)))
