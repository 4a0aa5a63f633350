"""Gateways that are broken on purpose, each in one small way: the checker has to notice, or it could not fail.

A mutant is what a careless change could make of the gateway. Each says within how many seeds it has to be found, and
what the checker then complains of. They are found by brief lives, as most of a campaign's are, each within 450 seeds:
half a minute of a campaign. Those of MQTT are in test_mqtt_sessions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.amqp.events import Outcome, OutcomeKind
from gateway.amqp.outgoing import Outgoing
from gateway.uplink import fair
from gateway.uplink.drain import Drain
from gateway.uplink.fair import Fair
from gateway.uplink.pace import Bucket
from storeforward.batch import Waiter
from storeforward.journal import Journal
from storeforward.streams import Row, Stream
from storeforward.unwritten import SEQS_RESERVED
from tests.simulation.brief import brief_crowded_life, brief_life
from tests.simulation.gateway_world import World
from tests.simulation.lives import Make, live
from tests.simulation.seeds import memory_dir

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

Patch = pytest.MonkeyPatch
MUTANTS: list[Mutant] = []
GIVEN_BACK = (OutcomeKind.RELEASED, OutcomeKind.MODIFIED, OutcomeKind.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Mutant:
    """says: what the checker complains of, one of several where a seed may show it in several ways.

    first: the seed that is tried first. The lives before it do not show this mutant, and need not be lived each time.
    """

    breaks: Callable[[Patch], None]
    says: str
    first: int
    seeds: int
    make: Make


def mutant(
    says: str, *, first: int = 0, seeds: int = 200, make: Make = brief_life
) -> Callable[[Callable[[Patch], None]], None]:
    def add(breaks: Callable[[Patch], None]) -> None:
        MUTANTS.append(Mutant(breaks, says, first, seeds, make))

    return add


# ------------------------------------------------------------------------------------------------ P1: on disk


@mutant("acknowledged, and gone", first=8)
def acknowledges_before_the_commit(patch: Patch) -> None:
    patch.setattr(Journal, "wait", lambda self, waiter, token: waiter.committed([token]))


@mutant("acknowledged, and gone", first=242)
def acknowledges_what_it_only_holds_for_the_hub(patch: Patch) -> None:
    wait = Journal._wait_for_hub

    def eager(self: Journal, waiter: Waiter, token: Any) -> bool:
        stream = self._held_for
        if stream is not None and stream.unwritten is not None and stream.unwritten.rows and not self._staged:
            self.intake()
            waiter.committed([token])
            return True
        return wait(self, waiter, token)

    patch.setattr(Journal, "_wait_for_hub", eager)


@mutant("acknowledged, and gone|the cursor is at")
def moves_its_cursor_over_what_it_only_sent(patch: Patch) -> None:
    patch.setattr(Drain, "_move_cursor", lambda self, link: self._move_to(self._next))


# ------------------------------------------------------------------------------------------------ P2: order


@mutant("acknowledged, and gone|given back, and is passed by|the cursor is at", first=6)
def does_not_send_again_what_was_given_back(patch: Patch) -> None:
    judge = Drain._judge

    def forgetful(self: Drain, outcome: Outcome, now: float) -> bool:
        return judge(self, replace(outcome, kind=OutcomeKind.ACCEPTED), now)

    patch.setattr(Drain, "_judge", forgetful)


@mutant("out of order|given back, and is passed by|is kept after|the cursor is at", first=6)
def sends_what_was_given_back_behind_everything_else(patch: Patch) -> None:
    judge = Drain._judge

    def at_the_end(self: Drain, outcome: Outcome, now: float) -> bool:
        row = self.journal.find(self.stream, outcome.seq) if outcome.kind in GIVEN_BACK else None
        if row is None:
            return judge(self, outcome, now)
        self.journal.append(self.stream, row.topic, lambda seq, body: body, row.body, row.expires_age_us)
        return judge(self, replace(outcome, kind=OutcomeKind.ACCEPTED), now)

    patch.setattr(Drain, "_judge", at_the_end)


@mutant("on this very link|out of order|given back, and is passed by", first=91)
def sends_again_before_the_window_is_empty(patch: Patch) -> None:
    wake = Drain.wake

    def hasty(self: Drain, now: float) -> bool:
        moved = wake(self, now)
        if self._resend_from is not None:
            self._next, self._resend_from = self._resend_from, None
        return moved

    patch.setattr(Drain, "wake", hasty)


@mutant("given back, and is passed by|out of order|the cursor is at|acknowledged, and gone", first=19)
def leaves_out_the_first_when_it_sends_again(patch: Patch) -> None:
    wake = Drain.wake

    def skips(self: Drain, now: float) -> bool:
        before = self._resend_from
        moved = wake(self, now)
        if before is not None and self._resend_from is None and self._next == before:
            self._next += 1
        return moved

    patch.setattr(Drain, "wake", skips)


# ------------------------------------------------------------------------------------------------ P3: duplicates


@mutant("finished after it, the window is", first=150)
def forgets_that_what_is_not_on_disk_would_go_again(patch: Patch) -> None:
    """The window counts what is unsettled, and not what is settled but not yet durably so."""
    patch.setattr(Drain, "_room", lambda self, link: min(link.capacity, self.window - link.unsettled))


@mutant("^seq .* is .* and ", first=177)
def gives_seqs_out_again_after_a_crash(patch: Patch) -> None:
    """Seqs of messages that are only held are reserved in memory, and the file knows nothing of it."""

    def in_memory(self: Journal, stream: Stream) -> None:
        stream.reserved = stream.next_seq + SEQS_RESERVED

    patch.setattr(Journal, "_reserve", in_memory)


@mutant("^loco:.* is .* and ", first=390)
def names_messages_as_before_after_a_restore(patch: Patch) -> None:
    """The epoch has no random part."""
    patch.setattr(World, "token", lambda self, size: "00" * size)


@mutant("^p.* is .* and ", first=195)
def names_a_message_twice_where_the_disk_fails(patch: Patch) -> None:
    """What the hub may have seen is refused with a commit that failed, and comes again as another message."""
    patch.setattr(Journal, "_hold_again", lambda self, stream, offered, batch: None)


@mutant("out of order|on this very link|were finished after it", first=18)
def forgets_at_a_restart_what_the_hub_has_sent_before(patch: Patch) -> None:
    remember = Journal._remember

    def in_memory(self: Journal, stream: Stream, appended: Any) -> None:
        remember(self, stream, appended)
        self._w.execute("DELETE FROM seen")

    patch.setattr(Journal, "_remember", in_memory)


@mutant("were finished after it", first=153)
def hands_an_app_more_than_its_window(patch: Patch) -> None:
    init = Outgoing.__init__

    def wide(self: Outgoing, *arguments: Any) -> None:
        init(self, *arguments)
        self.window *= 4

    patch.setattr(Outgoing, "__init__", wide)


@mutant("on this very link|in the same life|rejected in . lives, dead . times", first=35)
def sends_again_what_was_rejected(patch: Patch) -> None:
    judge = Drain._judge

    def forgetful(self: Drain, outcome: Outcome, now: float) -> bool:
        moved = judge(self, outcome, now)
        self._done.discard(outcome.seq)
        return moved

    patch.setattr(Drain, "_judge", forgetful)


# ------------------------------------------------------------------------------------------------ P4: nothing vanishes


@mutant("acknowledged, and gone|neither a dead letter nor|ledger tells of", first=56)
def drops_what_the_hub_rejects(patch: Patch) -> None:
    def lose(self: Journal, stream: Stream, row: Row, condition: str, description: str) -> None:
        self.lose(stream.name, row.seq, "dead-letter", len(row.body), condition)

    patch.setattr(Journal, "bury", lose)


@mutant("ledger tells of|the cursor is at", first=56)
def does_not_enter_dead_letters_in_the_ledger(patch: Patch) -> None:
    lose = Journal.lose

    def silent(self: Journal, stream: str, seq: int, reason: str, size: int, detail: str = "") -> None:
        if reason != "dead-letter":
            lose(self, stream, seq, reason, size, detail)

    patch.setattr(Journal, "lose", silent)


@mutant("and the ledger has|the cursor is at", first=19)
def does_not_enter_what_expired_in_the_ledger(patch: Patch) -> None:
    lose = Journal.lose

    def silent(self: Journal, stream: str, seq: int, reason: str, size: int, detail: str = "") -> None:
        if reason != "expired":
            lose(self, stream, seq, reason, size, detail)

    patch.setattr(Journal, "lose", silent)


@mutant("taken from the hub, and", first=444)
def drops_what_its_only_receiver_bars(patch: Patch) -> None:
    patch.setattr(Outgoing, "_bury", lambda self, group, seq, condition, description: group.done(self, seq))


# ------------------------------------------------------------------------------------------------ P6: the clock


@mutant("are left of|acknowledged, and gone|as expired", first=68)
def expires_by_the_wall_clock(patch: Patch) -> None:
    patch.setattr(Journal, "age_us", lambda self: self._wall_us())


# ------------------------------------------------------------------------------------------------ shares of a line


@mutant("waited|had .* of", first=2, seeds=8, make=brief_crowded_life)
def starves_whoever_is_not_preferred(patch: Patch) -> None:
    patch.setattr(fair._Choice, "second", lambda self, first, second, quantum: second and not first)


@mutant("waited|had .* of", first=2, seeds=8, make=brief_crowded_life)
def sends_as_long_as_a_stream_has_something(patch: Patch) -> None:
    patch.setattr(Fair, "_choose", lambda self, ready, now: ready[0])


@mutant("bytes too many|^alarms: .* waited", seeds=8, make=brief_crowded_life)
def sends_more_than_its_rate(patch: Patch) -> None:
    patch.setattr(Bucket, "level", lambda self, now: 1 << 20)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with memory_dir(tmp_path) as path:
        yield path


def complaint(make: Make, seed: int, directory: Path) -> str | None:
    try:
        live(make, seed, directory / "state")
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.breaks.__name__)
def test_the_checker_finds_a_gateway_that(mutant: Mutant, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.breaks(monkeypatch)
    for seed in range(mutant.first, mutant.first + mutant.seeds):
        said = complaint(mutant.make, seed, memory)
        if said is not None:
            assert re.search(mutant.says, said), f"seed {seed} complains of something else: {said}"
            print(f"seed {seed} shows it")
            return
    raise AssertionError(f"{mutant.seeds} seeds, and nobody noticed")


def test_the_same_seeds_find_nothing_where_nothing_is_broken(memory: Path) -> None:
    for mutant in MUTANTS:
        live(mutant.make, mutant.first, memory / "state")
