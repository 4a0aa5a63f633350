"""What is held for the hub, and the journal that holds it: who is answered when, and what reaches the disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storeforward.batch import Appended
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.streams import Cursor, Stream, StreamLimits, WhenFull
from storeforward.unwritten import REST_S_MIN, ROWS_MAX, SEQS_RESERVED, Unwritten

LINGER_S = 0.25


@dataclass(eq=False)
class Sender:
    """A waiter that writes down what it is told."""

    answered: list[Any] = field(default_factory=list)
    refused: list[Any] = field(default_factory=list)

    def committed(self, tokens: list[Any]) -> None:
        self.answered += tokens

    def failed(self, tokens: list[Any], error: JournalFull) -> None:
        self.refused += tokens


class Bench:
    """A journal with one stream that holds, and its uplink played by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.open()

    def open(self, **limits: Any) -> None:
        self.journal = Journal.open(self.path)
        self.stream = self.new("alarms", **limits)
        self.disk = self.journal.stream("disk", "outbound", StreamLimits())
        self.journal.cursor(self.disk, "uplink", "uplink")
        self.sender = Sender()
        self.journal.commit_now()

    def new(self, name: str, **limits: Any) -> Stream:
        stream = self.journal.stream(name, "outbound", StreamLimits(linger_s=LINGER_S, **limits))
        self.journal.cursor(stream, "uplink", "uplink")
        return stream

    def up(self, stream: Stream | None = None) -> None:
        """The link is up; the first message is still written, and seqs are reserved with it."""
        stream = stream or self.stream
        self.journal.hold(stream, True, self.now)
        self.journal.append(stream, "t", _body, b"first")
        self.journal.commit_now()
        self.settle(stream.next_seq, stream)
        self.journal.write_cursors()
        self.journal.reclaim()
        self.journal.commit_now()
        assert stream.rows == 0
        assert stream.cursors["uplink"].durable == stream.next_seq

    def put(self, *tokens: Any, stream: Stream | None = None, sender: Sender | None = None, **more: Any) -> None:
        for token in tokens:
            self.journal.intake()
            self.journal.append(stream or self.stream, "t", _body, b"%s" % str(token).encode(), **more)
            self.journal.wait(sender or self.sender, token)

    def turn(self, after_s: float = 0.0) -> bool:
        self.now += after_s
        return self.journal.turn(self.now)

    def settle(self, before: int, stream: Stream | None = None) -> None:
        stream = stream or self.stream
        self.journal.advance(stream, stream.cursors["uplink"], before, lazily=True)

    def bodies(self, stream: Stream | None = None) -> list[bytes]:
        """What the disk holds, whatever memory says."""
        stream = stream or self.stream
        span = stream.base, stream.base + (1 << 48)
        return [b for (b,) in self.journal.query("SELECT body FROM message WHERE id >= ? AND id < ? ORDER BY id", span)]

    @property
    def cursor(self) -> Cursor:
        return self.stream.cursors["uplink"]

    def crash(self, **limits: Any) -> None:
        """As SIGKILL: nothing more is written."""
        journal = self.journal
        journal._r.close()
        journal._w.close()
        journal._lock.release()
        self.open(**limits)


def _body(seq: int, payload: bytes) -> bytes:
    return payload


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def held(bench: Bench) -> Unwritten:
    assert bench.stream.unwritten is not None
    return bench.stream.unwritten


# ------------------------------------------------------------------ held messages alone


def fill(unwritten: Unwritten, seq: int, *bodies: bytes) -> None:
    if not unwritten.rows:
        unwritten.begin(seq)
    if unwritten.fresh is None:
        unwritten.fresh = Appended(seq)
    for n, body in enumerate(bodies):
        unwritten.fresh.columns += (seq + n, 0, None, "t", 0, body)
        unwritten.fresh.size_bytes += len(body)


def test_what_is_settled_is_forgotten_to_the_byte_within_and_across_offers() -> None:
    unwritten = Unwritten(LINGER_S)
    fill(unwritten, 7, b"a", b"bb", b"ccc")
    assert unwritten.offer(1.0, blocked=False) == 10
    fill(unwritten, 10, b"dddd", b"eeeee")
    assert (unwritten.rows, unwritten.size_bytes) == (5, 15)
    assert unwritten.settle(9) == (2, 3)
    assert unwritten.settle(9) == (0, 0)
    assert unwritten.offer(2.0, blocked=False) == 12
    assert unwritten.settle(11) == (2, 7)
    assert (unwritten.rows, unwritten.size_bytes, unwritten.first) == (1, 5, 11)
    assert unwritten.take()[:3] == (11, [11, 0, None, "t", 0, b"eeeee"], 5)
    assert (unwritten.rows, unwritten.size_bytes) == (0, 0)


def test_the_linger_counts_from_when_a_message_came_even_if_it_could_not_be_offered() -> None:
    unwritten = Unwritten(LINGER_S)
    unwritten.allow(True, 1.0)
    fill(unwritten, 1, b"a")
    assert unwritten.offer(1.0, blocked=True) is None
    assert unwritten.offer(1.2, blocked=False) == 2
    assert unwritten.due() == 1.0 + LINGER_S
    assert not unwritten.lingered(1.24)
    assert unwritten.lingered(1.25)


def test_after_a_linger_in_vain_nothing_is_held_for_longer_and_longer_until_the_hub_answers_in_time_again() -> None:
    unwritten = Unwritten(LINGER_S)
    now, rests = 0.0, []
    for _ in range(3):
        unwritten.allow(True, now)
        assert unwritten.flows
        fill(unwritten, 1, b"a")
        unwritten.offer(now, blocked=False)
        now += LINGER_S
        assert unwritten.lingered(now)
        unwritten.take()
        rest = 0.0
        while not unwritten.flows:
            rest += REST_S_MIN / 2
            unwritten.allow(True, now + rest)
        rests.append(rest)
        now += rest
    assert rests == [REST_S_MIN, 2 * REST_S_MIN, 4 * REST_S_MIN]
    fill(unwritten, 1, b"a")
    unwritten.offer(now, blocked=False)
    unwritten.settle(2)
    fill(unwritten, 2, b"a")
    unwritten.offer(now, blocked=False)
    assert unwritten.lingered(now + LINGER_S)
    unwritten.allow(True, now + LINGER_S + REST_S_MIN)
    assert unwritten.flows


# ------------------------------------------------------------------ the journal: on disk or accepted by the hub


def test_what_the_hub_settles_in_time_is_acknowledged_and_never_written(bench: Bench) -> None:
    bench.up()
    bench.put("a", "b", "c")
    assert bench.turn()
    assert [r.body for r in bench.journal.read(bench.stream, bench.cursor.position, 10)] == [b"a", b"b", b"c"]
    assert (bench.stream.rows, bench.stream.waiting, bench.stream.size_bytes) == (3, 3, 3)
    assert bench.sender.answered == []
    bench.settle(bench.cursor.position + 2)
    bench.turn()
    assert bench.sender.answered == ["a", "b"]
    assert (bench.stream.rows, bench.stream.waiting) == (1, 1)
    bench.settle(bench.stream.next_seq)
    bench.turn()
    assert bench.sender.answered == ["a", "b", "c"]
    assert not bench.journal.pending, "nothing is written, not even a cursor"
    assert (bench.stream.rows, bench.stream.waiting, bench.stream.size_bytes) == (0, 0, 0)


def test_what_the_hub_does_not_settle_within_the_linger_is_written_and_then_acknowledged(bench: Bench) -> None:
    bench.up()
    bench.put("a", "b")
    bench.turn()
    bench.settle(bench.cursor.position + 1)
    bench.turn(LINGER_S)
    assert bench.sender.answered == ["a"]
    assert bench.journal.pending.appended
    assert bench.bodies() == []
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b"]
    assert bench.bodies() == [b"b"]
    assert (bench.stream.rows, bench.stream.waiting) == (1, 1)
    bench.put("c")
    bench.journal.commit_now()
    assert bench.bodies() == [b"b", b"c"], "the hub is slow: for a while all is written at once"


@pytest.mark.parametrize(
    "why", ["the link is lost", "the daemon stops", "a reader comes", "the option goes", "another hub"]
)
def test_what_is_held_is_written_when(bench: Bench, why: str) -> None:
    bench.up()
    bench.put("a")
    bench.turn()
    bench.put("b")  # not offered yet
    match why:
        case "the link is lost":
            bench.journal.hold(bench.stream, False, bench.now)
        case "the daemon stops":
            bench.journal.stop_holding()
        case "a reader comes":
            reader = bench.journal.cursor(bench.stream, "mqtt:app", "mqtt")
            assert reader.position == bench.stream.next_seq
        case "the option goes":
            bench.journal.stream("alarms", "outbound", StreamLimits())
        case "another hub":
            bench.journal.hold(bench.stream, False, bench.now)
            bench.journal.hold(bench.stream, True, bench.now)
    bench.put("c")
    assert bench.sender.answered == []
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b", "c"]
    assert bench.bodies() == [b"a", b"b", b"c"]


def test_more_than_the_bounds_is_written_in_order(bench: Bench) -> None:
    bench.up()
    for _ in range(ROWS_MAX // 512):
        bench.journal.append_run(bench.stream, "t", _body, [b"x"] * 512)
    assert not bench.journal.pending
    assert held(bench).rows == ROWS_MAX
    bench.put("last")
    assert held(bench).rows == 0
    bench.journal.commit_now()
    assert bench.bodies() == [b"x"] * ROWS_MAX + [b"last"]


def test_a_later_message_is_never_on_disk_without_the_earlier_ones_that_were_held(bench: Bench) -> None:
    bench.up()
    bench.put("a", "b")
    bench.turn()
    bench.put("c", identity=b"loco-2:1:1")  # its identity has to be on disk, so it has, too
    bench.journal.commit_now()
    assert bench.bodies() == [b"a", b"b", b"c"]
    bench.crash()
    rows = bench.journal.read(bench.stream, bench.cursor.position, 10)
    assert [r.body for r in rows] == [b"a", b"b", b"c"]


def test_what_is_written_after_all_is_read_again_only_when_it_is_on_disk_and_under_the_same_seqs(bench: Bench) -> None:
    bench.up()
    bench.put("a", "b")
    bench.turn()
    before = bench.journal.read(bench.stream, bench.cursor.position, 10)
    bench.journal.hold(bench.stream, False, bench.now)
    assert bench.stream.committed == bench.cursor.position
    assert bench.journal.read(bench.stream, bench.cursor.position, 10) == []
    assert bench.journal.find(bench.stream, before[1].seq) == before[1], "a refusal that comes now finds its message"
    bench.journal.begin()
    assert bench.journal.find(bench.stream, before[1].seq) == before[1]
    bench.journal.commit()
    bench.journal.committed()
    assert bench.journal.read(bench.stream, bench.cursor.position, 10) == before


def test_what_is_held_behind_a_commit_under_way_is_offered_after_it(bench: Bench) -> None:
    bench.up()
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put("a")
    bench.journal.begin()
    bench.journal.hold(bench.stream, True, bench.now)
    bench.put("b")
    assert held(bench).rows == 1
    assert not bench.turn()
    assert bench.journal.read(bench.stream, bench.cursor.position, 10) == []
    bench.journal.commit()
    bench.journal.committed()
    assert bench.turn()
    first = bench.journal.read(bench.stream, bench.cursor.position, 10)
    assert [r.body for r in first] == [b"a"]
    assert [r.body for r in bench.journal.read(bench.stream, first[-1].seq + 1, 10)] == [b"b"]
    assert bench.stream.waiting == 2
    bench.settle(bench.stream.next_seq)
    bench.turn()
    assert bench.sender.answered == ["a", "b"]


# ------------------------------------------------------------------ who is answered in which order


def test_a_sender_to_both_kinds_of_stream_is_answered_in_its_order_and_all_of_it_is_written(bench: Bench) -> None:
    bench.up()
    bench.put("a")
    bench.turn()
    bench.put("b", stream=bench.disk)
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b"]
    assert (bench.bodies(), bench.bodies(bench.disk)) == ([b"a"], [b"b"])


def test_a_sender_to_two_streams_that_hold_is_answered_in_its_order(bench: Bench) -> None:
    other = bench.new("other")
    bench.journal.commit_now()
    bench.up()
    bench.up(other)
    bench.put("a")
    bench.put("b", stream=other)
    assert bench.turn() is False
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b"]
    for topic in (bench.stream, other):  # in one breath, answered by one token
        bench.journal.append(topic, "t", _body, b"c")
    bench.journal.wait(bench.sender, "c")
    bench.turn()
    bench.settle(other.next_seq, other)
    bench.turn()
    assert "c" not in bench.sender.answered
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b", "c"]


def test_others_go_on_being_held_while_somebody_writes(bench: Bench) -> None:
    bench.up()
    other = Sender()
    bench.put("a")
    bench.turn()
    bench.put("b", stream=bench.disk, sender=other)
    bench.put("c")
    bench.journal.commit_now()
    assert (bench.sender.answered, other.answered) == ([], ["b"])
    assert bench.bodies() == []
    bench.turn()
    bench.settle(bench.stream.next_seq)
    bench.turn()
    assert bench.sender.answered == ["a", "c"]


def test_an_answer_that_is_due_but_not_given_yet_comes_before_that_of_the_next_commit(bench: Bench) -> None:
    bench.up()
    bench.put("a")
    bench.turn()
    bench.settle(bench.stream.next_seq)  # due, and the loop has not come round to it
    bench.put("b", stream=bench.disk)
    bench.turn()
    assert bench.sender.answered == []
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b"]


def test_a_message_with_companions_in_the_file_is_written_with_them(bench: Bench) -> None:
    bench.up()
    bench.journal.intake()
    bench.journal.append(bench.stream, "t", _body, b"qos 2")
    bench.journal.execute_with_rows("INSERT INTO meta VALUES ('packet id', '7')")
    bench.journal.wait(bench.sender, "pubrec")
    assert held(bench).rows == 0
    bench.journal.commit_now()
    assert bench.bodies() == [b"qos 2"]
    assert bench.sender.answered == ["pubrec"]


def test_what_the_hub_refuses_is_a_dead_letter_on_disk_before_its_sender_is_answered(bench: Bench) -> None:
    bench.up()
    bench.put("a", "bad", "c")
    bench.turn()
    seq = bench.cursor.position + 1
    row = bench.journal.find(bench.stream, seq)
    assert row is not None
    bench.journal.bury(bench.stream, row, "amqp:decode-error", "no")
    bench.settle(bench.stream.next_seq)
    bench.turn()
    assert bench.sender.answered == []
    bench.journal.begin()
    bench.turn()
    assert bench.sender.answered == []
    bench.journal.commit()
    bench.journal.committed()
    assert bench.sender.answered == ["a", "bad", "c"]
    assert bench.bodies() == []
    assert bench.journal.query("SELECT seq, body FROM dead") == [(seq, b"bad")]
    assert bench.journal.query("SELECT seq, reason FROM loss") == [(seq, "dead-letter")]


# ------------------------------------------------------------------ crashes, limits, the full disk


def test_after_a_crash_no_seq_that_the_hub_may_have_seen_is_given_out_again(bench: Bench) -> None:
    bench.up()
    bench.put("a", "b")
    bench.turn()
    bench.settle(bench.stream.next_seq - 1)
    seen, epoch = bench.stream.next_seq, bench.journal.epoch_token
    bench.crash()
    assert bench.stream.next_seq >= seen
    assert bench.journal.epoch_token != epoch
    assert (bench.stream.rows, bench.stream.waiting) == (0, 0)
    assert bench.cursor.position == bench.stream.next_seq
    bench.put("again")
    bench.journal.commit_now()
    assert [r.body for r in bench.journal.read(bench.stream, bench.cursor.position, 10)] == [b"again"]
    assert bench.stream.waiting == 1


def test_an_orderly_end_gives_back_what_was_reserved(bench: Bench) -> None:
    bench.up()
    bench.put("a")
    used = bench.stream.next_seq
    bench.journal.close()
    bench.open()
    assert bench.stream.next_seq == used
    assert bench.bodies() == [b"a"]
    assert bench.journal.query("SELECT key FROM meta WHERE key LIKE 'reserved%' OR key LIKE 'holes%'") == []


def test_more_seqs_are_reserved_before_the_last_is_used_and_rarely(bench: Bench) -> None:
    bench.up()
    commits = 0
    for _ in range(3 * SEQS_RESERVED // 512):
        bench.journal.append_run(bench.stream, "t", _body, [b"x"] * 512)
        bench.turn()
        bench.settle(bench.stream.next_seq)
        bench.turn()
        if bench.journal.pending:
            commits += 1
            bench.journal.commit_now()
        ((on_disk,),) = bench.journal.query("SELECT next_seq FROM stream WHERE name = 'alarms'")
        assert bench.stream.next_seq <= on_disk
    assert 4 <= commits <= 8
    assert bench.bodies() == []


def test_a_full_stream_refuses_what_would_be_too_much_though_nothing_of_it_is_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.journal.stream("alarms", "outbound", StreamLimits(messages_max=3, linger_s=LINGER_S))
    bench.up()
    bench.put("a", "b", "c")
    bench.turn()
    with pytest.raises(JournalFull):
        bench.put("d")
    bench.settle(bench.stream.next_seq)
    bench.journal.commit_now()
    bench.turn()
    assert bench.sender.answered == ["a", "b", "c"]
    bench.journal.close()


def test_drop_oldest_enters_what_was_held_in_the_ledger(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    limits = StreamLimits(messages_max=4, when_full=WhenFull.DROP_OLDEST, linger_s=LINGER_S)
    bench.journal.stream("alarms", "outbound", limits)
    bench.up()
    bench.put("a", "b", "c", "d")
    bench.turn()
    with pytest.raises(JournalFull, match="being written this moment"):
        bench.put("e")
    bench.journal.commit_now()
    bench.put("e")
    bench.journal.commit_now()
    assert bench.bodies() == [b"b", b"c", b"d", b"e"]
    assert bench.journal.query("SELECT reason FROM loss") == [("drop-oldest",)]
    bench.journal.close()


def fail(bench: Bench) -> None:
    """The disk does not take the batch that is under way."""
    error = sqlite3.OperationalError("simulated")
    error.sqlite_errorname = "SQLITE_IOERR"
    assert isinstance(bench.journal.failed(error), JournalFull)


def test_a_commit_that_fails_refuses_what_no_hub_has_seen_and_keeps_the_figures_right(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.up()
    bench.put("a", "b")
    monkeypatch.setattr(bench.journal.space, "free_bytes", lambda: 0)
    monkeypatch.setattr(bench.journal._room, "room_bytes", lambda: 0)
    bench.journal.hold(bench.stream, False, bench.now)
    with pytest.raises(JournalFull):
        bench.journal.commit_now()
    assert bench.sender.refused == ["a", "b"]
    assert bench.sender.answered == []
    assert (bench.stream.rows, bench.stream.size_bytes, bench.stream.waiting) == (0, 0, 0)


def test_what_the_hub_may_have_seen_keeps_its_place_where_the_disk_does_not_take_it(bench: Bench) -> None:
    """Refused, its sender would send it again, and the hub have it twice, as two messages."""
    bench.up()
    first = bench.stream.next_seq
    bench.put("a", "b")
    bench.turn()
    bench.put("c")  # not offered yet
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put("d", stream=bench.disk)
    bench.journal.begin()
    fail(bench)
    assert bench.sender.refused == ["c", "d"]
    assert [(r.seq, r.body) for r in bench.journal.read(bench.stream, first, 10)] == [(first, b"a"), (first + 1, b"b")]
    assert (bench.stream.rows, bench.stream.size_bytes, bench.stream.committed) == (2, 2, first + 2)
    assert bench.journal.turn_due() is not None
    bench.turn(LINGER_S)
    bench.put("c")
    bench.journal.commit_now()
    assert bench.sender.answered == ["a", "b", "c"]
    assert bench.bodies() == [b"a", b"b", b"c"]
    rows = bench.journal.read(bench.stream, first, 10)
    assert [(row.seq, row.body) for row in rows] == [(first, b"a"), (first + 1, b"b"), (first + 2, b"c")]
    assert (bench.stream.rows, bench.stream.size_bytes) == (3, 3)


def test_what_the_hub_settles_while_the_disk_fails_is_answered_and_gone(bench: Bench) -> None:
    bench.up()
    first = bench.stream.next_seq
    bench.put("a", "b")
    bench.turn()
    bench.journal.hold(bench.stream, False, bench.now)
    bench.journal.begin()
    bench.settle(first + 1)
    fail(bench)
    bench.turn()
    assert bench.sender.answered == ["a"]
    assert bench.sender.refused == []
    assert bench.stream.rows == 1
    bench.settle(first + 2)
    bench.turn()
    assert bench.sender.answered == ["a", "b"]
    assert (bench.stream.rows, bench.stream.size_bytes, held(bench).rows) == (0, 0, 0)


def test_what_the_hub_has_settled_is_answered_though_the_commit_fails_that_was_to_say_so(bench: Bench) -> None:
    bench.up()
    first = bench.stream.next_seq
    bench.put("a", "b")
    bench.turn()
    bench.settle(first + 1)  # its answer is due, and comes before those of the next commit
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put("c", stream=bench.disk)
    bench.journal.begin()
    fail(bench)
    assert bench.sender.answered == ["a"]
    assert bench.sender.refused == ["c"]


def test_a_dead_letter_whose_commit_fails_is_answered_by_the_next_one(bench: Bench) -> None:
    bench.up()
    bench.put("a")
    bench.turn()
    row = bench.journal.find(bench.stream, bench.cursor.position)
    assert row is not None
    bench.journal.bury(bench.stream, row, "no", "no")
    bench.settle(bench.stream.next_seq)
    bench.turn()
    bench.put("b", stream=bench.disk)
    bench.journal.begin()
    fail(bench)
    assert (bench.sender.answered, bench.sender.refused) == ([], ["b"])
    bench.journal.commit_now()
    assert bench.sender.answered == ["a"]
    assert bench.journal.query("SELECT count(*) FROM dead") == [(1,)]


def test_what_is_held_behind_a_commit_that_fails_is_not_offered_before_what_that_refused(bench: Bench) -> None:
    bench.up()
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put("a")
    bench.journal.begin()
    bench.journal.hold(bench.stream, True, bench.now)
    bench.put("b")  # held, and waits for the commit
    fail(bench)
    assert bench.sender.refused == ["a", "b"]
    assert not bench.turn()
    assert (bench.stream.rows, held(bench).rows) == (0, 0)


def test_the_file_counts_what_it_holds_while_more_is_held(bench: Bench) -> None:
    bench.up()
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put("a")
    bench.journal.begin()
    bench.journal.hold(bench.stream, True, bench.now)
    bench.put("bb")
    bench.journal.commit()
    bench.journal.committed()
    bench.journal.pending.reserved[bench.stream] = bench.stream.next_seq + SEQS_RESERVED
    bench.journal.commit_now()
    assert bench.journal.query("SELECT rows, bytes FROM stream WHERE name = 'alarms'") == [(1, 1)]
    assert (bench.stream.rows, bench.stream.size_bytes, bench.stream.waiting) == (2, 3, 2)


def test_a_dead_letter_that_is_sent_again_is_written_in_the_commit_that_forgets_it(bench: Bench) -> None:
    bench.up()
    bench.put("a")
    bench.turn()
    row = bench.journal.find(bench.stream, bench.cursor.position)
    assert row is not None
    bench.journal.bury(bench.stream, row, "no", "no")
    bench.settle(bench.stream.next_seq)
    bench.journal.commit_now()
    assert bench.journal.revive(1, bench.stream, "t", b"again")
    assert held(bench).rows == 0
    bench.journal.commit_now()
    assert bench.bodies() == [b"again"]


def test_what_is_held_behind_a_commit_that_fails_is_taken_back_with_it(bench: Bench) -> None:
    bench.up()
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put(0)
    bench.journal.begin()
    bench.journal.hold(bench.stream, True, bench.now)
    bench.put(1, 2)
    assert not bench.turn(), "not before the one that is on its way to the disk"
    bench.journal.failed(sqlite3.OperationalError("disk I/O error"))
    assert bench.sender.refused == [0, 1, 2], "promise P2: later ones must not be taken without it"
    assert bench.sender.answered == []
    assert bench.stream.rows == 0
    bench.journal.hold(bench.stream, False, bench.now)
    bench.put(3)
    bench.journal.commit_now()
    assert bench.sender.answered == [3]
    assert [row.body for row in bench.journal.read(bench.stream, bench.stream.first_seq, 10)] == [b"3"]


def test_a_refusal_is_told_at_once_unless_something_before_it_is_owed(bench: Bench) -> None:
    bench.up()
    bench.journal.tell(bench.sender, "refused 1")
    assert bench.sender.answered == ["refused 1"]
    bench.put(0)
    bench.journal.tell(bench.sender, "refused 2")
    assert bench.sender.answered == ["refused 1"], "the hub owes an answer before it"
    bench.turn()
    bench.settle(bench.stream.next_seq)
    bench.turn()
    assert bench.sender.answered == ["refused 1", 0, "refused 2"]
    bench.put(1, stream=bench.disk)
    bench.journal.begin()
    bench.journal.tell(bench.sender, "refused 3")
    assert bench.sender.answered[3:] == [], "a commit is under way for it"
    bench.journal.commit()
    bench.journal.committed()
    assert bench.sender.answered[3:] == [1]
    bench.journal.commit_now()
    assert bench.sender.answered[3:] == [1, "refused 3"]
