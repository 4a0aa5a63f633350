"""The link to a hub as a trace: what happened, and when the next attempt is due."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from gateway.uplink.state import (
    AUTH_BACKOFF_S_MAX,
    AUTH_BACKOFF_S_MIN,
    BACKOFF_S_MAX,
    BACKOFF_S_MIN,
    DROPPED_BACKOFF_S_MAX,
    FAIL_BACK_S,
    STAGGER_S,
    STAGGER_S_MAX,
    TRANSITIONS,
    UNREACHABLE_BACKOFF_S_MAX,
    Event,
    Failure,
    LinkState,
    State,
)

A, B = "amqps://a", "amqps://b"


def link(*urls: str, seed: int = 1) -> LinkState:
    return LinkState(list(urls or (A,)), Random(seed), 0.0)


def fail(state: LinkState, now: float, failure: Failure = Failure.HANDSHAKE) -> float:
    """One attempt that fails at once: how long until the next one."""
    state.dial(now)
    state.attempt_failed(now, failure, "no")
    assert state.state is State.BACKOFF
    due = state.due()
    assert due is not None
    return due - now


def test_a_link_that_comes_up_is_lost_and_dialled_again() -> None:
    state = link()
    assert (state.state, state.due()) == (State.DOWN, 0.0)
    assert state.dial(0.0) == A
    assert state.state is State.CONNECTING
    state.opened(1.0, A)
    assert (state.state, state.since, state.due()) == (State.UP, 1.0, None)
    state.lost(5.0, "gone")
    assert (state.state, state.status().error) == (State.BACKOFF, "gone")
    assert 5.0 <= (state.due() or 0.0) <= 5.0 + BACKOFF_S_MIN
    state.stop(6.0)
    assert (state.state, state.due()) == (State.STOPPED, None)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_what_is_not_in_the_table_raises_and_changes_nothing(state: State, event: Event) -> None:
    subject = link()
    subject.state = state
    acts = {
        Event.DIAL: lambda: subject.dial(9.0),
        Event.OPENED: lambda: subject.opened(9.0, A),
        Event.FAILED: lambda: subject.attempt_failed(9.0, Failure.HANDSHAKE, "no"),
        Event.LOST: lambda: subject.lost(9.0, "no"),
        Event.STOP: lambda: subject.stop(9.0),
    }
    if (state, event) in TRANSITIONS:
        acts[event]()
        assert subject.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(KeyError):
            acts[event]()
        assert subject.state is state


def test_stopped_is_the_end() -> None:
    assert {event for state, event in TRANSITIONS if state is State.STOPPED} == {Event.STOP}


@pytest.mark.parametrize("seed", range(20))
def test_backoff_doubles_its_bound_from_the_least_to_the_most(seed: int) -> None:
    state, now = link(seed=seed), 0.0
    for n in range(40):
        delay_s = fail(state, now)
        assert 0 <= delay_s <= min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2**n)
        now += delay_s


def test_backoff_uses_its_whole_range() -> None:
    delays = []
    for seed in range(200):
        state = link(seed=seed)
        delays.append([fail(state, 0.0) for _ in range(12)][-1])
    assert min(delays) < 0.1 * BACKOFF_S_MAX
    assert max(delays) > 0.9 * BACKOFF_S_MAX


def test_only_a_settled_message_forgets_earlier_failures() -> None:
    def worst_after_open(settle: bool) -> float:
        worst = 0.0
        for seed in range(100):
            state = link(seed=seed)
            for _ in range(12):
                fail(state, 0.0)
            state.dial(0.0)
            state.opened(0.0, A)
            if settle:
                state.settled()
            state.lost(0.0, "gone")
            worst = max(worst, state.due() or 0.0)
        return worst

    assert worst_after_open(settle=True) <= BACKOFF_S_MIN
    assert worst_after_open(settle=False) > BACKOFF_S_MAX / 2


@pytest.mark.parametrize("seed", range(20))
def test_a_line_that_flaps_faster_than_a_message_is_settled_is_tried_every_second_on_average(seed: int) -> None:
    state, now, delays = link(seed=seed), 0.0, []
    for _ in range(40):
        state.dial(now)
        state.opened(now, A)
        state.lost(now, "gone", Failure.DROPPED)
        delays.append((state.due() or 0.0) - now)
        now += delays[-1]
    assert delays[0] <= BACKOFF_S_MIN
    assert max(delays) <= DROPPED_BACKOFF_S_MAX
    assert sum(delays[8:]) / len(delays[8:]) > DROPPED_BACKOFF_S_MAX / 4, "a hub that crashes is not hammered"
    state.dial(now)
    state.opened(now, A)
    state.settled()
    state.lost(now, "gone", Failure.DROPPED)
    assert (state.due() or 0.0) - now <= BACKOFF_S_MIN


@pytest.mark.parametrize("seed", range(20))
def test_a_line_that_is_down_is_tried_at_the_pace_of_the_one_second_promise(seed: int) -> None:
    state, now = link(seed=seed), 0.0
    for _ in range(30):
        delay_s = fail(state, now, Failure.UNREACHABLE)
        assert BACKOFF_S_MIN <= delay_s <= UNREACHABLE_BACKOFF_S_MAX
        now += delay_s


@pytest.mark.parametrize("seed", range(20))
def test_refused_credentials_are_tried_again_much_more_slowly(seed: int) -> None:
    state, now = link(seed=seed), 0.0
    for n in range(12):
        delay_s = fail(state, now, Failure.AUTHENTICATION)
        assert AUTH_BACKOFF_S_MIN <= delay_s <= min(AUTH_BACKOFF_S_MAX, AUTH_BACKOFF_S_MIN * 2**n)
        now += delay_s


def test_attempts_overlap_and_the_link_backs_off_only_with_the_last() -> None:
    state = link()
    state.dial(0.0)
    assert state.due() == STAGGER_S
    state.dial(STAGGER_S)
    assert state.due() == 2 * STAGGER_S
    state.attempt_failed(1.0, Failure.UNREACHABLE, "first")
    assert state.state is State.CONNECTING
    state.attempt_failed(1.1, Failure.UNREACHABLE, "second")
    assert (state.state, state.error) == (State.BACKOFF, "second")


def test_on_a_slow_line_attempts_overlap_later() -> None:
    state = LinkState([A], Random(1), 0.0, stagger_s=3.0)
    state.dial(0.0)
    assert state.due() == 3.0


def test_an_address_that_only_is_silent_gets_four_attempts_and_then_it_is_the_next_ones_turn() -> None:
    state, now, dialled = link(A, B), 0.0, []
    for _ in range(12):
        dialled.append(state.dial(now))
        state.attempt_replaced()
        now = state.due() or 0.0
    assert dialled == [A] * 4 + [B] * 4 + [A] * 4
    state.dial(now)
    state.opened(now, A)
    state.lost(now, "gone", Failure.UNREACHABLE)
    assert [state.dial(now) for _ in range(5)] == [B] * 4 + [A]


def test_a_hub_that_takes_connections_and_does_not_answer_is_dialled_less_and_less_until_it_does() -> None:
    state, now, dials, waiting = link(), 0.0, [], []
    while now < 300:
        state.dial(now)
        dials.append(now)
        waiting.append(now + 10)
        due = state.due()
        assert due is not None
        while waiting and waiting[0] <= due:
            state.attempt_failed(waiting.pop(0), Failure.HANDSHAKE, "no answer", 10.0)
        now = due
    gaps = [b - a for a, b in itertools.pairwise(dials)]
    assert gaps[:14] == pytest.approx([STAGGER_S] * 14)
    assert sum(1 for dial in dials if dial > 60) <= 240 / STAGGER_S_MAX + 10
    state.network_changed(now)
    assert state.due() == now, "news of the line is acted upon at once"
    state.dial(now)
    assert (state.due() or 0.0) - now == pytest.approx(STAGGER_S)


def test_an_attempt_that_gave_way_is_not_waited_for() -> None:
    state = link()
    state.dial(0.0)
    state.attempt_replaced()
    state.dial(0.7)
    state.attempt_failed(1.0, Failure.UNREACHABLE, "no")
    assert state.state is State.BACKOFF


def test_a_network_change_ends_the_backoff_at_once_and_begins_with_the_first_address() -> None:
    state = link(A, B)
    fail(state, 0.0, Failure.AUTHENTICATION)
    assert state.url == B
    state.network_changed(1.0)
    assert (state.due(), state.url) == (1.0, A)


def test_a_network_change_while_connecting_begins_another_attempt_at_once() -> None:
    state = link()
    state.dial(0.0)
    state.network_changed(0.1)
    assert state.due() == 0.1
    assert state.state is State.CONNECTING


def test_a_network_change_leaves_a_link_that_is_up_alone() -> None:
    state = link()
    state.dial(0.0)
    state.opened(0.0, A)
    state.network_changed(1.0)
    assert (state.state, state.due()) == (State.UP, None)


def test_addresses_are_tried_in_order_and_round() -> None:
    state = link(A, B)
    tried = []
    for _ in range(4):
        tried.append(state.dial(0.0))
        state.attempt_failed(0.0, Failure.HANDSHAKE, "no")
    assert tried == [A, B, A, B]


def test_on_the_second_address_the_first_is_looked_for_and_gone_back_to() -> None:
    state = link(A, B)
    fail(state, 0.0)
    state.dial(1.0)
    state.opened(1.0, B)
    assert state.due() == 1.0 + FAIL_BACK_S
    state.failed_back_later(31.0)
    assert state.due() == 31.0 + FAIL_BACK_S
    state.fail_back(61.0)
    assert (state.state, state.due(), state.dial(61.0)) == (State.BACKOFF, 61.0, A)
    state.opened(62.0, A)
    assert state.due() is None
