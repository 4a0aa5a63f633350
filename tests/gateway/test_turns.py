"""Whose turn it is, on a loop and a processor that the test turns itself."""

from __future__ import annotations

import pytest

from gateway.turns import (
    BURST_S,
    DEBT_S_MAX,
    PATIENCE_S,
    PORTION_S,
    SHARE_MIN,
    WINDOW_S,
    Account,
    Denied,
    Share,
    Turns,
)
from tests.hand_loop import HandLoop


class Client:
    """Has so many portions of work."""

    def __init__(self, bench: Bench, name: str, portions: int = 10**9, account: Account | None = None) -> None:
        self.bench = bench
        self.name = name
        self.portions = portions
        self.account = Account() if account is None else account
        self.aborted = False

    def ask(self) -> Client:
        self.bench.turns.enter(self)
        return self

    def turn(self) -> None:
        self.bench.served.append(self.name)
        self.bench.loop.work(PORTION_S)
        self.portions -= 1
        if self.portions > 0:
            self.bench.turns.enter(self)

    def abort(self) -> None:
        self.aborted = True


class Bench:
    def __init__(self) -> None:
        self.loop = HandLoop()
        self.served: list[str] = []
        self.turns = Turns(self.loop, lambda: self.loop.cpu_s, lambda: 0.0)  # type: ignore[arg-type]

    def publish(self, seconds: float, busy: float = 0.5) -> None:
        """Messages take that part of the time, a tenth of a millisecond each time."""
        step_s = 0.0001
        end = self.loop.now + seconds
        while self.loop.now < end:
            self.loop.work(step_s)
            self.turns.messages(step_s, staged=True)
            self.loop.live(step_s / busy - step_s)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ------------------------------------------------------------------------------------------------------------ shares


def test_alone_dear_work_has_all_there_is(bench: Bench) -> None:
    Client(bench, "a").ask()
    bench.loop.live(1.0)
    assert bench.loop.cpu_s > 0.9


@pytest.mark.parametrize("floods", [1, 30])
def test_beside_messages_all_of_it_together_has_its_share(bench: Bench, floods: int) -> None:
    for n in range(floods):
        Client(bench, f"{n}").ask()
    bench.publish(1.0)
    dear_s = len(bench.served) * PORTION_S
    assert SHARE_MIN * 0.9 < dear_s < SHARE_MIN * 1.3 + BURST_S


def test_it_has_more_where_messages_want_little(bench: Bench) -> None:
    Client(bench, "a").ask()
    bench.publish(1.0, busy=0.02)
    assert len(bench.served) * PORTION_S > 0.5


def test_it_waits_for_messages_to_go_with_them_and_not_for_ever(bench: Bench) -> None:
    bench.publish(0.2)
    Client(bench, "a", portions=3).ask()
    before = len(bench.served)
    bench.loop.live(PATIENCE_S / 2)
    assert len(bench.served) == before
    bench.turns.messages(0.0001, staged=True)
    assert len(bench.served) == before + 1
    bench.loop.live(3 * PATIENCE_S)
    assert len(bench.served) == before + 3


def test_nothing_is_done_at_once_while_somebody_waits_or_there_is_no_credit(bench: Bench) -> None:
    assert bench.turns.ready
    bench.turns.spent(Account(), 2 * BURST_S)
    assert not bench.turns.ready
    bench.loop.live(3 * BURST_S)
    assert bench.turns.ready
    Client(bench, "a", portions=1).ask()
    assert not bench.turns.ready
    assert len(bench.turns) == 1
    bench.loop.live(0.001)
    assert bench.turns.ready


def test_debts_are_paid_and_have_an_end() -> None:
    share = Share(0.0)
    share.spend(50.0)
    share.refresh(0.5)
    assert share.due_s() == pytest.approx(0.5)
    share.refresh(DEBT_S_MAX + 0.1)
    assert share.credit_s > 0
    share.refresh(1000.0)
    assert share.credit_s == BURST_S


def test_the_share_falls_at_once_and_comes_back_slowly() -> None:
    share = Share(0.0)
    share.messages_s = WINDOW_S / 2
    share.refresh(WINDOW_S)
    assert share.share == SHARE_MIN
    share.refresh(4 * WINDOW_S)
    assert share.share == SHARE_MIN
    share.refresh(5.0)
    share.refresh(5.1)
    assert share.share > 0.99


def test_the_machine_being_busy_with_others_makes_no_share_larger() -> None:
    """Half of the time this thread has no processor: it is not there to be given away."""
    loop = HandLoop()
    denied_s = 0.0
    turns = Turns(loop, lambda: loop.cpu_s, lambda: denied_s)  # type: ignore[arg-type]
    turns.spent(Account(), BURST_S + 0.1)
    loop.live(0.15)
    denied_s = 0.075
    assert not turns.ready
    loop.live(0.15)
    denied_s = 0.15
    assert turns.ready


def test_what_linux_says_of_time_without_a_processor_is_read() -> None:
    denied = Denied()
    assert 0 <= denied() <= denied()


# -------------------------------------------------------------------------------------------------------- whose turn


def test_those_who_wait_take_turns(bench: Bench) -> None:
    for name in "abc":
        Client(bench, name, portions=3).ask()
    bench.loop.live(1.0)
    assert [sorted(bench.served[n : n + 3]) for n in (0, 3, 6)] == [["a", "b", "c"]] * 3


def test_who_comes_after_a_rest_goes_before_those_who_keep_asking(bench: Bench) -> None:
    for n in range(20):
        Client(bench, f"flood-{n}").ask()
    bench.loop.live(0.2)
    bench.served.clear()
    Client(bench, "modest", portions=1).ask()
    bench.loop.live(0.1)
    assert bench.served.index("modest") <= 1


def test_connections_of_one_address_are_one_among_the_others(bench: Bench) -> None:
    account = bench.turns.account("192.0.2.1")
    assert bench.turns.account("192.0.2.1") is account
    for n in range(9):
        Client(bench, f"there-{n}", account=account).ask()
    Client(bench, "here").ask()
    bench.loop.live(0.5)
    here = bench.served.count("here")
    assert 0.4 < here / len(bench.served) < 0.6
    assert len({name for name in bench.served if name.startswith("there")}) == 9


def test_what_is_charged_outside_a_turn_counts_too(bench: Bench) -> None:
    heavy = Client(bench, "heavy")
    bench.turns.spent(heavy.account, 0.1)
    heavy.ask()
    Client(bench, "light").ask()
    bench.loop.live(0.15)
    assert bench.served.index("heavy") == 4  # however much it was: it is not kept waiting for ever


def test_a_turn_that_fails_costs_its_own_connection_only(bench: Bench) -> None:
    bad = Client(bench, "bad")

    def fail() -> None:
        raise ValueError("our own mistake")

    bad.turn = fail  # type: ignore[method-assign]
    bad.ask()
    Client(bench, "good", portions=2).ask()
    bench.loop.live(0.1)
    assert bad.aborted
    assert bench.served == ["good", "good"]
    assert bench.turns.serving is None
    assert len(bench.turns) == 0


def test_one_whose_end_fails_as_well_keeps_nobody_from_its_turn(bench: Bench) -> None:
    bad = Client(bench, "bad")

    def fail() -> None:
        raise ValueError("our own mistake")

    bad.turn = bad.abort = fail  # type: ignore[method-assign]
    bad.ask()
    Client(bench, "behind", portions=2, account=bad.account).ask()
    Client(bench, "good", portions=2).ask()
    with pytest.raises(ValueError, match="our own mistake"):  # asyncio's loop would log it
        bench.loop.live(0.1)
    bench.loop.live(0.1)
    assert sorted(bench.served) == ["behind", "behind", "good", "good"]
    assert len(bench.turns) == 0


def test_addresses_are_forgotten_when_there_are_too_many(bench: Bench) -> None:
    first = bench.turns.account("first")
    for n in range(5000):
        bench.turns.account(f"{n}")
    assert bench.turns.account("first") is not first


def test_nobody_has_a_turn_once_it_is_stopped(bench: Bench) -> None:
    Client(bench, "a").ask()
    bench.turns.stop()
    Client(bench, "b").ask()
    bench.loop.live(1.0)
    assert not bench.served
    bench.turns.messages(0.001, staged=True)
    assert not bench.served
