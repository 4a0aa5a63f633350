"""Whole lives of a gateway between apps and hubs, moved at random; then the books are checked (P1 to P4, P6).

Each run is one seed, and everything in it is nothing but what the seed says. Here the same seeds of every kind of life
are lived each time; `python -m tests.simulation.campaign` lives through others, thousands a minute. One that fails
prints what happened in it, and the command that lives it again. With `-s` a run tells what it lived through.

A seed that failed goes into KEPT with a line of why, and is run every time. What a seed does changes whenever the lives
do: where a gateway was at fault, what happened is also told as a story of its own, in the tests of the part that was.
That the checker can fail at all is shown in test_mutants.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.brief import brief_crowded_life, brief_life
from tests.simulation.lives import Make, any_life, crowded_life, hours_life, live, name_of
from tests.simulation.seeds import memory_dir

# A killed process leaves what it had begun to dial.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

SEEDS = [
    (brief_life, range(150)),
    (any_life, range(20)),
    (brief_crowded_life, range(6)),
    (crowded_life, range(2)),
    (hours_life, range(3, 4)),
]

KEPT: list[tuple[Make, int, str]] = [
    (any_life, 32, "what the hub may have seen was refused where the disk failed, and came as another message"),
    (any_life, 60, "dead letters stand twice after a crash, as P3 allows; the checker did not know how often"),
    (any_life, 120, "seqs were left out behind what was held again, and what came next was lost"),
    (any_life, 30555, "an old connection brought what had expired; the checker took it for out of order"),
    (any_life, 30581, "apps that go on sending outlast an orderly stop's patience; the world had none for that"),
    (any_life, 30810, "the model hub, waiting for what had expired, took a message out of turn"),
    (any_life, 1006161, "a checkpoint came back when the stop had closed the journal"),
    (any_life, 934177067298, "what was accepted behind an open message came again after a power cut, as P3 allows"),
    (crowded_life, 184, "closed amid a large message, a link did not take what the hub answered then"),
    (brief_life, 320, "65,533 seqs without messages left no room in the window for what was given back before them"),
    (brief_life, 436, "a stop finished the commit of an earlier life, which a crash had ended"),
    (brief_life, 5023, "what a power cut made younger came behind what had passed it by; the checker did not know"),
    (brief_life, 6924, "a timer that was called a nanosecond early was not set again, and no more was given out"),
    (brief_life, 5009688, "the checker counted what died unwritten with its gateway to the window of the next"),
]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with memory_dir(tmp_path) as path:
        yield path


@pytest.mark.parametrize(("make", "seeds"), SEEDS, ids=lambda each: name_of(each) if callable(each) else None)
def test_nothing_is_lost_reordered_or_repeated_beyond_the_window(make: Make, seeds: range, memory: Path) -> None:
    began, hours = time.monotonic(), 0.0
    told: Counter[str] = Counter()
    for seed in seeds:
        world = live(make, seed, memory / "state")
        hours += world.hours
        told += world.told
    minute = len(seeds) / (time.monotonic() - began) * 60
    print(f"{name_of(make)}: {len(seeds)} worlds, {minute:.0f} a minute, {hours:.2f} simulated hours")
    print(", ".join(f"{kind} {count}" for kind, count in told.most_common()))


@pytest.mark.parametrize(("make", "seed", "why"), KEPT)
def test_a_seed_that_failed_once_holds(make: Make, seed: int, why: str, memory: Path) -> None:
    live(make, seed, memory / "state")
