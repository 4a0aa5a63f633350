"""Who sends next, on a line of so many bytes a second and a clock that only the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config_values import Shares, parse_shares
from gateway.uplink.fair import LIVE_S, Class, Fair, Queue

QUANTUM = 1000
ROOM = 1 << 40


@dataclass
class Source:
    """A stream that always has more, in messages of one size."""

    queue: Queue
    message: int
    sent: int = 0


@dataclass
class Line:
    """Carries one turn after the other."""

    fair: Fair
    rate: float = 100_000.0
    now: float = 0.0
    sources: list[Source] = field(default_factory=list)

    def source(self, class_: Class, message: int = 300) -> Source:
        source = Source(self.fair.add(class_), message)
        self.sources.append(source)
        self.fair.wake(source.queue)
        return source

    def turn(self) -> Source:
        turn = self.fair.next(self.now, ROOM)
        assert turn is not None
        source = next(each for each in self.sources if each.queue is turn.queue)
        # Whole messages as the drain sends them, or a part of one that is larger than the turn.
        size = min(turn.size_bytes, QUANTUM)
        size = size - size % source.message if source.message <= size else size
        source.sent += size
        self.now += size / self.rate
        self.fair.sent(turn.queue, size, self.now)
        return source

    def run(self, turns: int) -> int:
        before = sum(each.sent for each in self.sources)
        for _ in range(turns):
            self.turn()
        return sum(each.sent for each in self.sources) - before


def sent(line: Line, class_: Class) -> int:
    return sum(each.sent for each in line.sources if each.queue.class_ is class_)


sources = st.lists(st.tuples(st.sampled_from(Class), st.integers(50, 5000)), min_size=1, max_size=8)
shares = st.tuples(st.integers(1, 97), st.integers(1, 97), st.integers(1, 98)).map(
    lambda t: (lambda urgent, normal: Shares(urgent, normal, 100 - urgent - normal, t[2]))(
        max(1, t[0] * 98 // 195), max(1, t[1] * 98 // 195)
    )
)


@given(sources, shares)
@settings(max_examples=60, deadline=None)
def test_every_class_that_waits_keeps_its_share_and_every_stream_of_a_class_the_same(
    wanted: list[tuple[Class, int]], shares: Shares
) -> None:
    line = Line(Fair(shares, QUANTUM))
    for class_, message in wanted:
        line.source(class_, message)
    total = line.run(1200)
    for class_ in {each for each, _ in wanted}:
        assert sent(line, class_) >= total * shares.of(class_.value) / 100 - 8 * QUANTUM
        streams = [each.sent for each in line.sources if each.queue.class_ is class_]
        assert max(streams) - min(streams) <= 2 * QUANTUM


@given(sources.filter(lambda each: len(each) > 1), shares, st.data())
@settings(max_examples=60, deadline=None)
def test_an_alarm_after_a_pause_goes_next_whatever_waits(
    wanted: list[tuple[Class, int]], shares: Shares, data: st.DataObject
) -> None:
    line = Line(Fair(shares, QUANTUM))
    alarm = line.source(Class.URGENT, 100)
    line.fair.rest(alarm.queue)
    for class_, message in wanted:
        line.source(Class.BULK if class_ is Class.URGENT else class_, message)
    for _ in range(5):
        line.run(data.draw(st.integers(1, 300)))
        line.fair.wake(alarm.queue)
        assert line.turn() is alarm
        line.fair.rest(alarm.queue)


@given(st.lists(st.tuples(st.sampled_from(Class), st.booleans()), min_size=2, max_size=8), shares)
@settings(max_examples=60, deadline=None)
def test_nobody_waits_for_ever_and_those_who_keep_up_and_those_behind_have_their_shares_of_a_class(
    wanted: list[tuple[Class, bool]], shares: Shares
) -> None:
    line = Line(Fair(shares, QUANTUM))
    live: set[int] = set()
    for class_, keeps_up in wanted:
        source = line.source(class_)
        if keeps_up:
            source.queue.emptied()
            live.add(id(source))
    line.run(1500)
    for class_ in {each for each, _ in wanted}:
        group = [each for each in line.sources if each.queue.class_ is class_]
        ahead = [each.sent for each in group if id(each) in live]
        behind = [each.sent for each in group if id(each) not in live]
        if ahead and behind:
            total = sum(ahead) + sum(behind)
            assert sum(ahead) >= total * shares.live / 100 - 8 * QUANTUM
            assert sum(behind) >= total * (100 - shares.live) / 100 - 8 * QUANTUM
    slowest = 100 * 100 / (min(shares.urgent, shares.normal, shares.bulk) * min(shares.live, 100 - shares.live))
    if slowest < 400:
        assert all(each.sent > 0 for each in line.sources)


def test_a_stream_keeps_up_while_it_is_emptied_now_and_then_and_not_for_long_after() -> None:
    queue = Queue(Class.NORMAL)
    assert not queue.live(0.0), "what it has when the line comes is backlog"
    queue.emptied()
    assert queue.live(1000.0)
    queue.filled(1000.0)
    assert queue.live(1000.0 + LIVE_S - 0.1)
    assert not queue.live(1000.0 + LIVE_S)
    queue.emptied()
    queue.cut()
    assert not queue.live(1001.0), "after a cut, too"


def test_without_room_only_urgent_streams_go_on_and_only_into_the_reserve() -> None:
    line = Line(Fair(Shares(), QUANTUM))
    bulk = line.source(Class.BULK)
    assert line.fair.next(0.0, 0, 500) is None
    alarm = line.source(Class.URGENT)
    turn = line.fair.next(0.0, 0, 500)
    assert turn is not None
    assert (turn.queue, turn.size_bytes) == (alarm.queue, 500)
    assert line.fair.next(0.0, -500, 500) is None
    line.fair.rest(alarm.queue)
    turn = line.fair.next(0.0, 700)
    assert turn is not None
    assert (turn.queue, turn.size_bytes) == (bulk.queue, 700)


def test_a_flood_of_urgent_messages_does_not_keep_the_room_from_those_it_owes() -> None:
    line = Line(Fair(Shares(), QUANTUM))
    alarm = line.source(Class.URGENT)
    line.source(Class.BULK)
    while line.fair.next(0.0, 0, 500) is not None:
        line.fair.sent(alarm.queue, 500, 0.0)
    turn = line.fair.next(0.0, 1, 500)
    assert turn is not None
    assert turn.queue.class_ is Class.BULK, "the line empties, and then it is their turn"


def test_the_bulk_of_one_stream_hardly_delays_another_of_its_class_that_has_little() -> None:
    line = Line(Fair(Shares(), QUANTUM))
    heavy = line.source(Class.NORMAL)
    light = line.source(Class.NORMAL)
    for _ in range(50):
        line.fair.rest(light.queue)
        line.run(20)
        line.fair.wake(light.queue)
        assert line.turn() is light or line.turn() is light
    assert heavy.sent > 10 * light.sent


def test_a_share_that_is_not_given_is_the_usual_one() -> None:
    assert parse_shares({"urgent": 60, "normal": 30}) == Shares(60, 30, 10)


@pytest.mark.parametrize(
    "given",
    [
        {"urgent": 80},
        {"urgent": 99, "normal": 1, "bulk": 0},
        {"live": 100},
        {"urgent": 70.0},
        {"urgent": True},
        {"slow": 3},
        [70, 20, 10],
    ],
)
def test_shares_that_are_no_per_cent_or_not_together_a_hundred_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="per cent"):
        parse_shares(given)
