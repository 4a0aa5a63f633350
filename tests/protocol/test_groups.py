"""Competing consumers as a trace: who is handed what, what goes back, and how far the shared cursor moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway import groups
from gateway.groups import Group
from storeforward.journal import Journal
from storeforward.streams import Row, StreamLimits


def unspoilt(row: Row) -> bool:
    return row.topic != "other"


class Bench:
    """A journal with one stream and one group on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.boottime_s = 1000.0
        self.open()

    def open(self) -> None:
        self.journal = Journal.open(self.path, clock=lambda: self.boottime_s)
        self.stream = self.journal.stream("local", "local")
        self.cursor = self.journal.cursor(self.stream, "queue:jobs", "amqp")
        self.group = Group(self.journal, self.stream, self.cursor, unspoilt)

    def put(self, payloads: str, topic: str = "jobs", expires_in_s: float | None = None) -> None:
        expires = None if expires_in_s is None else self.journal.age_us() + int(expires_in_s * 1e6)
        for payload in payloads:
            self.journal.append(self.stream, topic, lambda seq, body: body, payload.encode(), expires)
        self.journal.commit_now()

    def take(self, member: str, rows_max: int = 100) -> str:
        """Payloads in the order handed out; those handed out before in capitals."""
        taken = self.group.take(member, rows_max)
        return "".join(row.body.decode().upper() if again else row.body.decode() for row, again in taken)

    def losses(self) -> list[tuple[object, ...]]:
        if self.journal.pending:
            self.journal.commit_now()
        return self.journal.query("SELECT seq, reason FROM loss ORDER BY id")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def test_each_row_goes_to_one_member_and_the_cursor_moves_over_what_is_finished_without_a_gap(bench: Bench) -> None:
    bench.put("abcd")
    bench.group.join("x")
    bench.group.join("y")
    assert bench.take("x", 2) == "ab"
    assert bench.take("y", 1) == "c"
    assert bench.take("x") == "d"
    assert bench.group.done("y", 3)
    assert bench.cursor.position == 1
    assert bench.group.done("x", 1)
    assert bench.cursor.position == 2
    assert bench.group.done("x", 2)
    assert bench.cursor.position == 4
    assert bench.group.done("x", 4)
    assert bench.cursor.position == 5
    assert bench.take("y") == ""


def test_what_a_leaving_member_held_goes_to_the_others_in_order_before_newer_rows_and_marked(bench: Bench) -> None:
    bench.put("abcd")
    bench.group.join("x")
    bench.group.join("y")
    assert bench.take("x", 3) == "abc"
    bench.group.done("x", 2)
    bench.group.leave("x")
    assert bench.take("y") == "ACd"


def test_without_members_everything_waits_for_the_next_one(bench: Bench) -> None:
    bench.put("abc")
    bench.group.join("x")
    assert bench.take("x") == "abc"
    bench.group.leave("x")
    assert bench.cursor.position == 1
    bench.group.join("x")
    assert bench.take("x", 2) == "AB"
    assert bench.take("x") == "C"


def test_a_released_row_comes_again_before_newer_ones_also_to_the_member_that_released_it(bench: Bench) -> None:
    bench.put("abc")
    bench.group.join("x")
    assert bench.take("x", 2) == "ab"
    assert bench.group.release("x", 1)
    assert bench.take("x") == "Ac"


def test_a_barred_row_waits_for_another_member_and_holds_up_nobody(bench: Bench) -> None:
    bench.put("abc")
    bench.group.join("x")
    assert bench.take("x", 1) == "a"
    bench.group.release("x", 1, barred=True)
    assert bench.take("x") == "bc"
    bench.group.join("y")
    assert bench.take("y") == "A"
    bench.group.release("y", 1, barred=True)
    assert bench.take("x") == bench.take("y") == ""
    bench.group.leave("x")  # whoever comes under that name again has refused nothing yet
    bench.group.join("x")
    assert bench.take("x") == "ABC"


def test_an_answer_about_a_row_that_is_no_longer_the_members_changes_nothing(bench: Bench) -> None:
    bench.put("a")
    bench.group.join("x")
    bench.group.join("y")
    bench.take("x")
    bench.group.release("x", 1)
    assert bench.take("y") == "A"
    assert not bench.group.done("x", 1)
    assert not bench.group.release("x", 1)
    assert bench.cursor.position == 1
    assert bench.group.done("y", 1)
    assert not bench.group.done("y", 1)


def test_rows_nobody_wants_are_passed_over_and_do_not_hold_the_cursor(bench: Bench) -> None:
    bench.put("xy", topic="other")
    bench.put("a")
    bench.put("z", topic="other")
    bench.group.join("x")
    assert bench.take("x") == "a"
    assert bench.cursor.position == 3
    bench.group.done("x", 3)
    assert bench.cursor.position == 5


def test_an_expired_row_is_in_the_ledger_once_wherever_it_expired(bench: Bench) -> None:
    bench.put("a", expires_in_s=5)
    bench.put("b", expires_in_s=50)
    bench.put("c")
    bench.group.join("x")
    bench.boottime_s += 10
    assert bench.take("x") == "bc"
    bench.group.release("x", 2)
    bench.boottime_s += 100
    assert bench.take("x") == ""
    assert bench.losses() == [(1, "expired"), (2, "expired")]
    assert bench.cursor.position == 3
    bench.group.done("x", 3)
    assert bench.cursor.position == 4


def test_one_stuck_member_lets_the_others_run_ahead_so_far_and_no_further(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "GROUP_AHEAD_MAX", 4)
    bench.put("a")
    bench.put("-" * 50, topic="other")  # what nobody wants does not count
    bench.put("bcdefg")
    bench.group.join("stuck")
    bench.group.join("x")
    assert bench.take("stuck", 1) == "a"
    assert bench.take("x") == "bcd"
    for seq in (52, 53, 54):
        bench.group.done("x", seq)
    assert bench.take("x") == ""
    assert bench.group.ahead == 4
    assert not bench.group.behind
    bench.group.leave("stuck")
    assert bench.take("x") == "A"
    bench.group.done("x", 1)
    assert bench.take("x") == "efg"


def test_a_long_stretch_that_nobody_wants_is_passed_over_in_pieces(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "SCAN_ROWS_MAX", 256)
    bench.put("-" * 600, topic="other")
    bench.put("a")
    bench.group.join("x")
    assert [bench.take("x"), bench.take("x"), bench.take("x")] == ["", "", "a"]
    assert not bench.group.behind


def test_after_a_crash_everything_above_the_cursor_comes_again_in_order(bench: Bench) -> None:
    bench.put("abcd")
    bench.group.join("x")
    bench.take("x")
    bench.group.done("x", 1)
    bench.group.done("x", 3)
    bench.journal.commit_now()
    bench.journal.close()
    bench.open()
    bench.group.join("x")
    assert bench.take("x") == "bcd"


def test_a_cursor_moved_on_from_outside_ends_what_it_passed_and_nothing_else(bench: Bench) -> None:
    bench.put("abcdef")
    bench.group.join("x")
    bench.group.join("y")
    bench.take("x", 2)
    bench.take("y", 3)
    bench.group.release("x", 2)
    bench.journal.advance(bench.stream, bench.cursor, 4)
    assert bench.take("x") == "f"
    assert not bench.group.done("x", 1)
    bench.group.leave("y")
    assert bench.take("x") == "DE"
    for seq in (4, 5, 6):
        assert bench.group.done("x", seq)
    assert bench.cursor.position == 7


def test_rows_that_were_dropped_for_room_are_not_waited_for(bench: Bench) -> None:
    bench.stream.limits = StreamLimits(messages_max=10)
    bench.put("abc")
    bench.group.join("x")
    bench.take("x")
    bench.group.release("x", 1)
    bench.journal.drop_before(bench.stream, 3, "drop-oldest")
    bench.journal.commit_now()
    assert bench.take("x") == ""
    assert bench.group.held("x") == 1
    bench.group.done("x", 3)
    assert bench.cursor.position == 4


def test_failures_are_counted_where_a_row_was_left_behind_or_given_back_as_failed(bench: Bench) -> None:
    bench.put("ab")
    bench.group.join("x")
    bench.take("x")
    bench.group.release("x", 1)
    bench.group.release("x", 2, failed=True)
    bench.take("x")
    assert [bench.group.failures(seq) for seq in (1, 2, 3)] == [0, 1, 0]
    bench.group.leave("x")
    assert [bench.group.failures(seq) for seq in (1, 2)] == [1, 2]


def test_the_blocker_is_who_holds_the_oldest_row_while_the_others_cannot_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "GROUP_AHEAD_MAX", 2)
    bench.put("abc")
    bench.group.join("x")
    bench.group.join("y")
    bench.take("x", 1)
    assert bench.group.blocker is None
    bench.take("y")
    assert bench.group.blocker == "x"
    bench.group.done("x", 1)
    assert bench.group.blocker is None


MEMBERS = ("x", "y", "z")


class Groups(RuleBasedStateMachine):
    """Whatever members do, each wanted row is finished once, and the cursor never passes one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.bench = Bench(Path(self.directory.name))
        self.ahead_max, groups.GROUP_AHEAD_MAX = groups.GROUP_AHEAD_MAX, 6
        self.wanted: set[int] = set()
        self.finished: set[int] = set()
        self.held: dict[str, list[int]] = {}
        self.high: dict[str, int] = {}
        self.given_out: set[int] = set()

    @initialize()
    def start(self) -> None:
        self.bench.group.join("x")
        self.held["x"] = []

    @rule(count=st.integers(1, 5), wanted=st.booleans())
    def put(self, count: int, wanted: bool) -> None:
        first = self.bench.stream.next_seq
        self.bench.put("m" * count, "jobs" if wanted else "other")
        if wanted:
            self.wanted.update(range(first, first + count))

    @rule(member=st.sampled_from(MEMBERS))
    def come_or_go(self, member: str) -> None:
        if member in self.held:
            self.bench.group.leave(member)
            del self.held[member]
            self.high.pop(member, None)
        else:
            self.bench.group.join(member)
            self.held[member] = []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), rows_max=st.integers(1, 8))
    def take(self, data: st.DataObject, rows_max: int) -> None:
        member = data.draw(st.sampled_from(sorted(self.held)))
        taken = self.bench.group.take(member, rows_max)
        seqs = [row.seq for row, _ in taken]
        assert seqs == sorted(set(seqs))
        assert len(seqs) <= rows_max
        everywhere = {seq for held in self.held.values() for seq in held}
        for (_, again), seq in zip(taken, seqs, strict=True):
            assert seq in self.wanted
            assert seq not in self.finished | everywhere
            assert again == (seq in self.given_out)
            if not again:
                assert seq > self.high.get(member, 0)
                self.high[member] = seq
        self.given_out.update(seqs)
        self.held[member] += seqs

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), done=st.booleans())
    def answer(self, data: st.DataObject, done: bool) -> None:
        member = data.draw(st.sampled_from(sorted(m for m, held in self.held.items() if held)))
        seq = data.draw(st.sampled_from(self.held[member]))
        self.held[member].remove(seq)
        if done:
            assert self.bench.group.done(member, seq)
            self.finished.add(seq)
        else:
            assert self.bench.group.release(member, seq)

    @precondition(lambda self: not any(self.held.values()))
    @rule()
    def crash(self) -> None:
        """All that is promised then is the cursor: what is above it comes again."""
        self.bench.journal.commit_now()
        self.bench.journal.close()
        self.bench.open()
        self.finished = {seq for seq in self.finished if seq < self.bench.cursor.position}
        self.given_out = set(self.finished)
        self.held.clear()
        self.high.clear()

    @invariant()
    def nothing_unfinished_is_passed(self) -> None:
        unfinished = self.wanted - self.finished
        if unfinished:
            assert self.bench.cursor.position <= min(unfinished)

    @invariant()
    def bounded(self) -> None:
        assert self.bench.group.ahead <= groups.GROUP_AHEAD_MAX

    def teardown(self) -> None:
        try:
            for member in self.held:
                self.bench.group.leave(member)
            self.bench.group.join("last")
            while taken := self.bench.group.take("last", 100):
                for row, _ in taken:
                    assert row.seq not in self.finished
                    assert self.bench.group.done("last", row.seq)
                    self.finished.add(row.seq)
            assert self.finished == self.wanted
            assert self.bench.cursor.position == self.bench.stream.next_seq
        finally:
            groups.GROUP_AHEAD_MAX = self.ahead_max
            self.bench.journal.close()
            self.directory.cleanup()


Groups.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGroups = Groups.TestCase
