"""How much each may put into one commit; with whole listeners it is measured in test_fairness."""

from __future__ import annotations

import math

import pytest

from gateway.helpings import ABOUT_S, HELPING_S, LOST_S, REMEMBERED, SMALL_S, Helpings
from tests.hand_loop import HandLoop

COMMIT_S = 0.0003
EAGER, PATIENT, OTHER = "eager", "patient", "other"


class Journal:
    under_way: object | None = None


class Bench:
    def __init__(self) -> None:
        self.loop = HandLoop()
        self.journal = Journal()
        self.helpings = Helpings(self.loop)  # type: ignore[arg-type]
        self.helpings.journal = self.journal
        self.called: list[str] = []

    def took(self, who: str, seconds: float) -> None:
        self.helpings.took(who, seconds)

    def begin(self) -> None:
        self.journal.under_way = object()

    def end(self, commit_s: float = COMMIT_S) -> None:
        self.loop.live(commit_s)
        self.journal.under_way = None
        self.helpings.committed(commit_s)

    def commit(self, commit_s: float = COMMIT_S) -> None:
        self.begin()
        self.end(commit_s)

    def wait(self, who: str) -> None:
        self.helpings.wait(who, lambda: self.called.append(who))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_alone_everybody_takes_what_there_is(bench: Bench) -> None:
    for _ in range(10):
        bench.took(EAGER, 5.0)
        assert bench.helpings.left_s(EAGER) == math.inf
        assert not bench.helpings.others(EAGER)
        bench.commit()


def test_beside_an_app_that_waits_nobody_takes_more_than_twice_of_what_it_needs(bench: Bench) -> None:
    for _ in range(3):
        bench.took(PATIENT, 0.001)
        bench.took(EAGER, 0.002)
        bench.commit()
    assert bench.helpings.left_s(EAGER) == pytest.approx(0.002)
    bench.took(EAGER, 0.0012)
    assert bench.helpings.left_s(EAGER) == pytest.approx(0.0008)
    bench.took(EAGER, 0.0005)
    assert bench.helpings.left_s(EAGER) == 0.0  # crumbs are not worth a turn


def test_what_is_more_than_that_does_not_fit_and_a_trifle_always_does(bench: Bench) -> None:
    assert bench.helpings.fits(EAGER, 5.0)
    for _ in range(3):
        bench.took(PATIENT, 0.001)
        bench.took(EAGER, 0.002)
        bench.commit()
    assert bench.helpings.fits(EAGER, 0.002)
    assert not bench.helpings.fits(EAGER, 0.0021)
    bench.took(EAGER, 0.0015)
    assert not bench.helpings.fits(EAGER, 0.001)
    assert bench.helpings.fits(EAGER, SMALL_S)


def test_those_who_take_alike_never_meet_the_limit(bench: Bench) -> None:
    """Also where each is in every other commit only."""
    for n in range(20):
        pair = ("a", "b") if n % 2 else ("c", "d")
        for who in pair:
            assert bench.helpings.left_s(who) >= 0.0007 or n < 4
            bench.took(who, 0.0007)
        bench.commit()


def test_a_helping_is_never_less_than_it_has_to_be_and_half_of_a_slow_commit(bench: Bench) -> None:
    bench.took(PATIENT, 0.000001)
    bench.commit()
    assert bench.helpings.left_s(EAGER) == HELPING_S
    bench.took(PATIENT, 0.000001)
    bench.commit(0.02)
    assert bench.helpings.left_s(EAGER) == pytest.approx(0.01)


def test_what_is_taken_while_a_commit_is_under_way_counts_for_the_next(bench: Bench) -> None:
    bench.took(PATIENT, 0.0001)
    bench.took(EAGER, HELPING_S)
    assert bench.helpings.left_s(EAGER) == 0.0
    bench.begin()
    assert bench.helpings.left_s(EAGER) == HELPING_S
    bench.took(EAGER, HELPING_S)
    assert bench.helpings.left_s(EAGER) == 0.0
    bench.end()
    assert bench.helpings.left_s(EAGER) == 0.0


def test_the_next_helping_comes_when_somebody_else_sends(bench: Bench) -> None:
    bench.took(PATIENT, 0.0001)
    bench.took(EAGER, HELPING_S)
    bench.wait(EAGER)
    bench.commit()
    bench.took(EAGER, 0.0)
    assert not bench.called
    bench.took(PATIENT, 0.0001)
    assert bench.called == [EAGER]


def test_who_had_its_helping_already_does_not_get_another_one_by_that(bench: Bench) -> None:
    bench.took(EAGER, HELPING_S)
    bench.wait(EAGER)
    bench.took(PATIENT, 0.0001)
    assert not bench.called


def test_it_comes_without_others_after_a_while(bench: Bench) -> None:
    bench.took(PATIENT, 0.0001)
    bench.took(EAGER, HELPING_S)
    bench.wait(EAGER)
    bench.commit()
    bench.loop.live(ABOUT_S * 0.9)
    assert not bench.called
    bench.loop.live(ABOUT_S * 0.2)
    assert bench.called == [EAGER]


def test_it_comes_at_once_where_nobody_else_was_answered(bench: Bench) -> None:
    bench.took(EAGER, HELPING_S)
    bench.wait(EAGER)
    bench.commit()
    bench.loop.live(0.0)
    assert bench.called == [EAGER]


def test_it_comes_though_no_commit_does(bench: Bench) -> None:
    bench.took(PATIENT, 0.0001)
    bench.took(EAGER, HELPING_S)
    bench.wait(EAGER)
    bench.loop.live(LOST_S * 1.1)
    assert bench.called == [EAGER]
    assert bench.helpings.left_s(EAGER) > 0


def test_two_that_take_all_they_can_do_not_raise_one_anothers_helpings(bench: Bench) -> None:
    for _ in range(50):
        bench.took(PATIENT, 0.0001)
        for who in (EAGER, OTHER):
            bench.took(who, bench.helpings.left_s(who) if bench.helpings.left_s(who) < 1 else 0.01)
        bench.commit()
    assert bench.helpings.left_s(EAGER) == HELPING_S


def test_who_is_gone_is_forgotten_at_once_also_where_no_commit_comes(bench: Bench) -> None:
    bench.took(PATIENT, 0.0001)
    bench.took(EAGER, HELPING_S)
    assert bench.helpings.others(EAGER)
    bench.helpings.forget(PATIENT)
    assert not bench.helpings.others(EAGER)
    bench.took(PATIENT, 0.0001)
    bench.begin()
    bench.took(PATIENT, 0.0001)
    bench.end()
    assert bench.helpings.left_s(EAGER) == HELPING_S
    bench.helpings.forget(PATIENT)
    assert bench.helpings.left_s(EAGER) == math.inf
    bench.commit()
    assert not bench.helpings.others(EAGER)


def test_who_falls_silent_is_forgotten(bench: Bench) -> None:
    bench.took(PATIENT, 0.0001)
    for _ in range(2 * REMEMBERED + 1):
        bench.took(EAGER, HELPING_S)
        bench.commit()
    assert bench.helpings.left_s(EAGER) == math.inf
