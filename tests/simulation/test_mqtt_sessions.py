"""Whole lives of MQTT sessions, moved at random: cuts, take-overs, failed commits, crashes; then the books are checked.

Each run is one seed; `python -m tests.simulation.campaign` lives through many more. One that fails prints its last
steps, and the command that lives it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.broker import Broker
from gateway.config import Config
from storeforward.journal import Journal
from tests.simulation.mqtt_lives import BRIEF, LONG, Shape, live
from tests.simulation.seeds import memory_dir

SEEDS = [(BRIEF, 150), (LONG, 75)]
MUTANT_SEEDS = 200

# Seeds that broke something once. What a seed does changes with the steps, so what it broke is told again, as a story
# of its own, in test_mqtt_faults.py. 6111 and 32996 were the checker's: it took a client's repeat for one out of order,
# and one that a crash repeated for one too many.
KEPT = [(LONG, seed) for seed in (0, 20, 40, 150, 565, 608, 1169, 1322, 5519, 6111)]
KEPT += [(BRIEF, 6775), (BRIEF, 32996)]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with memory_dir(tmp_path) as path:
        yield path


@pytest.mark.parametrize(("shape", "seed"), KEPT, ids=lambda each: getattr(each, "name", None))
def test_what_broke_once_holds(shape: Shape, seed: int, memory: Path) -> None:
    live(shape, seed, memory / "state")


def _not_written(patch: pytest.MonkeyPatch, table: str) -> None:
    """What is kept in a table is kept in memory only."""
    for name in ("execute", "execute_with_rows"):
        execute = getattr(Journal, name)

        def forgetful(self: Journal, statement: str, parameters: tuple[object, ...] = (), execute=execute) -> None:  # type: ignore[no-untyped-def]
            if not statement.startswith(f"INSERT OR REPLACE INTO {table}"):
                execute(self, statement, parameters)

        patch.setattr(Journal, name, forgetful)


def forgets_at_a_restart_what_is_retained(patch: pytest.MonkeyPatch) -> None:
    init = Broker.__init__

    def forgetful(self: Broker, config: Config, journal: Journal) -> None:
        init(self, config, journal)
        self.retained._by_topic.clear()

    patch.setattr(Broker, "__init__", forgetful)


def forgets_at_a_restart_whose_will_it_has(patch: pytest.MonkeyPatch) -> None:
    _not_written(patch, "mqtt_will")


def forgets_at_a_restart_which_qos_2_messages_it_has(patch: pytest.MonkeyPatch) -> None:
    _not_written(patch, "mqtt_incoming")


def forgets_at_a_restart_which_qos_2_messages_it_has_sent(patch: pytest.MonkeyPatch) -> None:
    _not_written(patch, "mqtt_outgoing")


def acknowledges_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Journal, "wait", lambda self, waiter, token: waiter.committed([token]))


@pytest.mark.parametrize(
    ("mutant", "says", "first"),
    [
        (forgets_at_a_restart_what_is_retained, "retained, not of", 169),
        (forgets_at_a_restart_whose_will_it_has, "was published 0 times: must", 47),
        (forgets_at_a_restart_which_qos_2_messages_it_has, "at most 1", 157),
        (forgets_at_a_restart_which_qos_2_messages_it_has_sent, "at most 1|used again|not told to release", 102),
        (acknowledges_before_the_commit, "got .* 0 times, subscribed since|retained, not of|nobody of", 30),
    ],
)
def test_the_checker_finds_a_gateway_that(
    mutant: Callable[[pytest.MonkeyPatch], None], says: str, first: int, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """first: the seed that is tried first; those before it do not show it."""
    mutant(monkeypatch)
    for seed in range(first, first + MUTANT_SEEDS):
        complaint = _complaint(seed, memory)
        if complaint is not None:
            assert re.search(says, complaint), f"seed {seed} complains of something else: {complaint}"
            print(f"seed {seed} shows it")
            return
    raise AssertionError(f"{MUTANT_SEEDS} seeds, and nobody noticed")


def _complaint(seed: int, memory: Path) -> str | None:
    try:
        live(BRIEF, seed, memory / "state")
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("shape", "seeds"), SEEDS, ids=lambda each: getattr(each, "name", None))
def test_whatever_is_cut_nothing_acknowledged_is_lost_repeated_or_left_behind(
    shape: Shape, seeds: int, memory: Path
) -> None:
    for seed in range(seeds):
        live(shape, seed, memory / "state")
