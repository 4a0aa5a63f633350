"""A stream's way out as a trace: what the hub answers, and what is sent, kept or buried because of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.amqp.message import decode, encode
from gateway.uplink.drain import RESEND_S_MAX, RESEND_S_MIN, WINDOW_BYTES_MAX, WORKED_OFF_S, Drain
from storeforward.journal import Journal
from storeforward.streams import Cursor, Stream
from tests.wire import NOW, Wire


class Bench:
    """A journal with one outbound stream, its drain, and a hub at the other end of the wire."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.boottime_s = 1000.0
        self.wire = Wire()
        self.open()

    def open(self) -> None:
        self.journal = Journal.open(self.path, clock=lambda: self.boottime_s)
        self.stream: Stream = self.journal.stream("alarms", "outbound")
        self.cursor: Cursor = self.journal.cursor(self.stream, "uplink", "uplink")

    def attach(
        self,
        credit: int = 100,
        window: int = 100,
        max_message_bytes: int = 0,
        *,
        shared: bool = False,
        gently: bool = False,
    ) -> Bench:
        self.wire.attach(credit, max_message_bytes)
        self.drain = Drain(self.journal, self.stream, self.cursor, window, shared=shared, gently=gently)
        self.drain.attached(self.wire.sender, NOW)
        return self

    def put(self, *payloads: str, expires_in_s: float | None = None) -> None:
        expires = None if expires_in_s is None else self.journal.age_us() + int(expires_in_s * 1e6)
        ttl_ms = None if expires_in_s is None else int(expires_in_s * 1000)
        for payload in payloads:
            self.journal.append(
                self.stream, "a/b", lambda seq, body: encode(body, ttl_ms=ttl_ms), payload.encode(), expires
            )
        self.journal.commit_now()

    def fail(self, *payloads: str) -> None:
        """The disk does not take these; their seqs are spent."""
        for payload in payloads:
            self.journal.append(self.stream, "a/b", lambda seq, body: encode(body), payload.encode())
        self.journal.begin()
        error = sqlite3.OperationalError("simulated")
        error.sqlite_errorname = "SQLITE_IOERR"
        self.journal.failed(error)
        self.journal.recover()

    def wake(self, now: float = NOW) -> list[tuple[int, str]]:
        """Let the drain act; (handle, payload) of what the hub got."""
        self.wire.run()
        self.drain.wake(now)
        return [(handle, decode(body).body.decode()) for handle, body in self.wire.take()]

    def sent(self, now: float = NOW) -> str:
        return "".join(payload for _, payload in self.wake(now))

    def accept(self, *handles: int) -> None:
        self.wire.receiver.accept(handles)

    def rows(self, table: str, columns: str) -> list[tuple[object, ...]]:
        if self.journal.pending:
            self.journal.commit_now()
        return self.journal.query(f"SELECT {columns} FROM {table} ORDER BY id")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def test_the_cursor_moves_only_over_what_is_accepted_without_a_gap(bench: Bench) -> None:
    bench.attach().put(*"abcd")
    (a, _), (b, _), (c, _), (d, _) = bench.wake()
    bench.accept(b, d)
    bench.wake()
    assert bench.cursor.position == 1
    bench.accept(a)
    bench.wake()
    assert bench.cursor.position == 3
    bench.accept(c)
    bench.wake()
    assert bench.cursor.position == 5
    assert bench.cursor.durable == 1, "not on disk before the commit"
    bench.journal.write_cursors()
    bench.journal.commit_now()
    assert bench.cursor.durable == 5


@pytest.mark.parametrize("shared", [False, True])
def test_a_hub_that_wants_its_credit_back_is_answered_though_a_backlog_waits(bench: Bench, shared: bool) -> None:
    bench.attach(credit=0, shared=shared).put(*"abc")
    bench.wire.receiver._link.drain(0)
    bench.wire.run()
    assert bench.wire.sender.draining
    bench.wake()
    bench.drain.send(NOW, 1000)
    assert not bench.wire.sender.draining


def test_after_a_release_the_window_empties_and_what_was_not_accepted_goes_again_in_order(bench: Bench) -> None:
    bench.attach().put(*"abcdef")
    (a, _), (b, _), (c, _), (d, _), (e, _), (f, _) = bench.wake()
    bench.accept(a)
    bench.wire.receiver.release(b)
    assert bench.sent(NOW + 1) == ""
    bench.put("g")
    assert bench.sent(NOW + 1) == "", "nothing new while the window empties"
    bench.accept(c)
    bench.wire.receiver.modify(d)
    bench.accept(e)
    assert bench.sent(NOW + 1) == ""
    assert bench.cursor.position == 2
    bench.accept(f)
    assert bench.sent(NOW) == "", "not before the delay is over"
    again = bench.wake(NOW + 60)
    assert "".join(payload for _, payload in again) == "bdg"
    bench.accept(*(handle for handle, _ in again))
    bench.wake(NOW + 61)
    assert bench.cursor.position == 8


def test_what_was_accepted_behind_a_release_is_not_sent_again_however_often_it_is_released(bench: Bench) -> None:
    bench.attach().put(*"ab")
    (a, _), (b, _) = bench.wake()
    bench.wire.receiver.release(a)
    bench.accept(b)
    now = NOW
    for _ in range(4):
        bench.wake(now)
        now += 60
        [(handle, payload)] = bench.wake(now)
        assert payload == "a"
        bench.wire.receiver.release(handle)
    bench.wake(now)
    bench.wire.attach()
    bench.drain.attached(bench.wire.sender, now)
    assert bench.sent(now) == "a"


def test_what_was_accepted_in_one_run_with_gaps_behind_a_release_is_not_sent_again(bench: Bench) -> None:
    """Found by simulation: the run a, d, e was taken for the last three seqs, so that one of it went twice."""
    bench.attach(window=6).put(*"abcdef")
    sent = dict((payload, handle) for handle, payload in bench.wake())
    for payload in "af":
        bench.wire.receiver.release(sent[payload])
    bench.accept(*(sent[payload] for payload in "cde"))
    bench.wire.receiver.release(sent["b"])
    bench.wake()
    again = dict((payload, handle) for handle, payload in bench.wake(NOW + 60))
    assert list(again) == ["a", "b", "f"]
    bench.wire.receiver.release(again["a"])
    bench.accept(again["b"], again["f"])
    bench.wake(NOW + 60)
    assert bench.sent(NOW + 120) == "a"


@pytest.mark.parametrize("read", ["with what follows", "alone", "in two pieces"])
def test_seqs_that_are_no_messages_take_no_room_in_the_window(bench: Bench, read: str) -> None:
    """Found by simulation: a crash had left 65,533 of them, and what was given back before them never went again."""
    bench.attach(window=5).put(*"ab")
    (a, _), (b, _) = bench.wake()
    for _ in range(3 if read == "in two pieces" else 1):
        bench.fail(*"xxxxxx")
        if read != "with what follows":
            assert bench.sent() == ""
    bench.put("c", "d")
    (c, _), (d, _) = bench.wake()
    bench.wire.receiver.release(a)
    bench.accept(b, c)
    bench.wire.receiver.release(d)
    bench.wake()
    again = dict((payload, handle) for handle, payload in bench.wake(NOW + 60))
    assert list(again) == ["a", "d"]
    bench.accept(*again.values())
    bench.wake(NOW + 60)
    assert bench.cursor.position == bench.stream.committed
    assert bench.drain._gaps == {}


def test_what_is_accepted_behind_a_message_that_is_given_back_for_ever_stays_within_the_window(bench: Bench) -> None:
    """After a crash all of it goes again."""
    bench.attach(window=3).put(*"abcdefghijkl")
    accepted: set[str] = set()
    now = NOW
    for _ in range(8):
        for handle, payload in bench.wake(now):
            if payload == "a":
                bench.wire.receiver.release(handle)
            else:
                accepted.add(payload)
                bench.accept(handle)
        bench.wake(now)
        now += 60
    assert accepted == {"b", "c"}


def test_the_delay_between_resends_doubles_within_its_bounds(bench: Bench) -> None:
    bench.attach().put("a")
    now, delays = NOW, []
    for _ in range(8):
        [(handle, _)] = bench.wake(now)
        bench.wire.receiver.release(handle)
        bench.wake(now)
        due = bench.drain.resend_at()
        assert due is not None
        delays.append(due - now)
        now = due
    assert delays[0] == pytest.approx(RESEND_S_MIN)
    assert delays[1] == pytest.approx(2 * RESEND_S_MIN)
    assert delays[-1] == pytest.approx(RESEND_S_MAX)


def test_how_often_the_peer_gives_messages_back_is_counted_until_it_takes_one(bench: Bench) -> None:
    bench.attach().put(*"ab")
    now = NOW
    for count in (1, 2, 3):
        (a, _), (b, _) = bench.wake(now)
        bench.wire.receiver.release(a)
        bench.wire.receiver.release(b)
        bench.wake(now)
        assert (bench.drain.given_back, bench.drain.given_back_seq) == (count, 1)
        now += 60
    (a, _), _ = bench.wake(now)
    bench.accept(a)
    bench.wake(now)
    assert bench.drain.given_back == 0


def test_a_rejected_message_is_dead_lettered_with_its_condition_and_the_rest_goes_on(bench: Bench) -> None:
    bench.attach().put(*"abc")
    (a, _), (b, _), (c, _) = bench.wake()
    bench.accept(a)
    bench.wire.receiver.reject(b, "amqp:not-allowed", "no")
    bench.accept(c)
    bench.wake()
    assert bench.cursor.position == 4
    [(seq, condition, description, body)] = bench.rows("dead", "seq, condition, description, body")
    assert (seq, condition, description) == (2, "amqp:not-allowed", "no")
    assert isinstance(body, bytes)
    assert decode(body).body == b"b"
    assert bench.rows("loss", "stream, seq, reason") == [("alarms", 2, "dead-letter")]


def test_a_rejection_behind_a_release_is_not_sent_again(bench: Bench) -> None:
    bench.attach().put(*"abc")
    (a, _), (b, _), (c, _) = bench.wake()
    bench.wire.receiver.release(a)
    bench.wire.receiver.reject(b, "amqp:not-allowed")
    bench.accept(c)
    bench.wake()
    assert bench.sent(NOW + 60) == "a"
    assert bench.rows("dead", "seq") == [(2,)]


def test_a_message_larger_than_the_peer_takes_is_dead_lettered_unsent(bench: Bench) -> None:
    bench.attach(max_message_bytes=500).put("a", "x" * 600, "c")
    assert bench.sent() == "ac"
    assert bench.rows("dead", "seq, condition") == [(2, "amqp:link:message-size-exceeded")]


def test_a_message_expires_on_the_age_clock_and_leaves_a_ledger_row(bench: Bench) -> None:
    bench.attach()
    bench.put("a", expires_in_s=10)
    bench.put("b", expires_in_s=100)
    bench.boottime_s += 11
    got = bench.wake()
    assert [payload for _, payload in got] == ["b"]
    assert bench.rows("loss", "seq, reason") == [(1, "expired")]


def test_the_ttl_that_goes_out_is_what_is_left_of_it(bench: Bench) -> None:
    bench.attach()
    bench.put("a", expires_in_s=100)
    bench.boottime_s += 40
    bench.drain.wake(NOW)
    [(_, body)] = bench.wire.take()
    assert decode(body).ttl_ms == pytest.approx(60_000, abs=2)


def test_nothing_is_sent_beyond_credit_and_new_credit_is_used_in_order(bench: Bench) -> None:
    bench.attach(credit=2).put(*"abcde")
    first = bench.wake()
    assert "".join(p for _, p in first) == "ab"
    assert bench.sent() == ""
    bench.accept(*(handle for handle, _ in first))
    bench.wire.run()
    bench.drain.wake(NOW)
    bench.wire.receiver.topup(3)
    assert bench.sent() == "cde"


def test_the_window_counts_what_is_settled_but_not_yet_durably_so(bench: Bench) -> None:
    bench.attach(window=3).put(*"abcdefg")
    got = bench.wake()
    assert "".join(p for _, p in got) == "abc"
    bench.accept(*(handle for handle, _ in got))
    assert bench.sent() == "", "a crash now would send a, b and c again: the window is full of them"
    bench.journal.commit_now()
    assert bench.sent() == "def"


def test_a_narrower_window_does_not_wait_for_what_was_settled_in_the_wider_one(bench: Bench) -> None:
    bench.attach().put(*"abcdefg")
    bench.accept(*[handle for handle, _ in bench.wake()])
    bench.sent()
    bench.put("h", "i")
    bench.drain.narrow(1)
    assert bench.sent() == "", "seven are settled, and not durably so"
    bench.journal.commit_now()
    assert bench.sent() == "h"


def test_a_crash_between_settling_and_the_durable_cursor_repeats_no_more_than_the_window(
    bench: Bench, tmp_path: Path
) -> None:
    bench.attach(window=3).put(*"abcdefg")
    got = bench.wake()
    bench.accept(*(handle for handle, _ in got))
    bench.wake()
    bench.journal._lock.release()  # as the kernel does when the process dies: what was pending is gone
    bench.journal._w.close()
    bench.open()
    bench.attach(window=3)
    assert bench.sent() == "abc"


def test_a_lost_connection_sends_the_unsettled_again_under_the_same_bytes(bench: Bench) -> None:
    bench.attach().put(*"abc")
    bench.drain.wake(NOW)
    before = bench.wire.take()
    bench.accept(before[0][0])
    bench.wake()
    bench.drain.detached()
    assert bench.drain.wake(NOW) is False
    bench.wire.attach()
    bench.drain.attached(bench.wire.sender, NOW)
    bench.drain.wake(NOW)
    assert [body for _, body in bench.wire.take()] == [body for _, body in before[1:]]


@pytest.mark.parametrize("goodbye", ["detach", "close", "end"])
def test_answers_in_the_same_breath_as_the_goodbye_count(bench: Bench, goodbye: str) -> None:
    bench.attach().put(*"abcde")
    (a, _), (b, _), (c, _), _, _ = bench.wake()
    bench.accept(a)
    bench.wire.receiver.reject(b, "amqp:not-allowed")
    bench.accept(c)
    match goodbye:
        case "detach":
            bench.wire.receiver.close(detach=True)
        case "close":
            bench.wire.receiver.close("amqp:resource-deleted")
        case "end":
            bench.wire.receiver.session.close()
    bench.wire.run()
    assert not bench.wire.sender.alive
    assert bench.drain.wake(NOW), "that the peer settled something"
    bench.drain.detached()
    assert bench.cursor.position == 4, "d and e have no answer"
    bench.wire.attach()
    bench.drain.attached(bench.wire.sender, NOW)
    assert bench.sent() == "de"
    assert bench.rows("dead", "seq") == [(2,)]


def test_answers_to_a_link_that_is_gone_count_though_nobody_asked_before_it_was_dropped(bench: Bench) -> None:
    bench.attach().put(*"abc")
    (a, _), (b, _), (c, _) = bench.wake()
    bench.accept(a)
    bench.wire.receiver.release(b)
    bench.accept(c)
    bench.wire.receiver.close(detach=True)
    bench.wire.run()
    bench.drain.detached()
    assert bench.cursor.position == 2
    bench.wire.attach()
    bench.drain.attached(bench.wire.sender, NOW)
    assert bench.sent() == "b"


def test_a_paused_drain_takes_answers_but_sends_nothing(bench: Bench) -> None:
    bench.attach().put("a")
    [(a, _)] = bench.wake()
    bench.drain.paused = True
    bench.put("b")
    bench.accept(a)
    assert bench.sent() == ""
    assert (bench.cursor.position, bench.drain.in_flight) == (2, 0)


def test_a_peer_that_owes_an_answer_is_seen_and_one_that_owes_none_is_not(bench: Bench) -> None:
    bench.attach()
    assert bench.drain.stalled_since() is None
    bench.put("a")
    [(a, _)] = bench.wake(NOW + 500)
    assert bench.drain.stalled_since() == NOW + 500, "idle time is not the peer's fault"
    bench.accept(a)
    bench.wake(NOW + 501)
    assert bench.drain.stalled_since() is None


def test_a_corrupt_row_costs_itself_only_also_when_there_is_room_for_one(bench: Bench) -> None:
    bench.put(*"abc")
    bench.journal.close()
    database = sqlite3.connect(bench.path / "journal.db")
    database.execute("UPDATE message SET body = ? WHERE id & 0xffff = 1", (b"spoilt",))
    database.commit()
    database.close()
    bench.open()
    bench.attach(credit=1)
    assert bench.sent() == "b"
    assert bench.rows("loss", "seq, reason") == [(1, "corrupt")]


def test_what_was_buried_or_expired_behind_a_release_is_entered_once_only(bench: Bench) -> None:
    bench.attach(max_message_bytes=500)
    bench.put("a", "x" * 600)
    bench.put("b", expires_in_s=1)
    bench.put("c")
    bench.boottime_s += 2
    (a, _), (c, _) = bench.wake()
    bench.wire.receiver.release(a)
    bench.accept(c)
    bench.wake()
    assert bench.sent(NOW + 60) == "a"
    assert bench.rows("loss", "seq, reason") == [(2, "dead-letter"), (3, "expired")]
    assert bench.rows("dead", "seq") == [(2,)]


# ---------------------------------------------------------------------- on a line shared with others


def turn(bench: Bench, bytes_max: int, position: int = 0) -> tuple[int, str]:
    """One turn of the drain: how many bytes it was, and what of it the hub has whole."""
    bench.wire.run()
    size = bench.drain.send(NOW, bytes_max, position)
    return size, "".join(decode(body).body.decode()[:1] for _, body in bench.wire.take())


def test_on_a_shared_line_nothing_goes_before_its_turn_and_then_about_as_much_as_asked_for(bench: Bench) -> None:
    bench.attach(shared=True).put(*(letter * 100 for letter in "abcdef"))
    assert bench.sent() == ""
    assert bench.drain.has_more
    size = len(bench.journal.read(bench.stream, 1, 1)[0].body)
    assert turn(bench, 2 * size) == (2 * size, "ab")
    assert bench.drain.in_flight_bytes == 2 * size
    assert turn(bench, 10 * size) == (4 * size, "cdef")
    assert bench.drain.caught_up
    assert not bench.drain.has_more
    assert turn(bench, size) == (0, "")


def test_a_message_larger_than_its_turn_goes_in_parts_and_others_keep_their_order_behind_it(bench: Bench) -> None:
    bench.attach(shared=True).put("a" * 10, "b" * 3000, "c" * 10)
    bodies = [len(row.body) for row in bench.journal.read(bench.stream, 1, 3)]
    assert turn(bench, 1000) == (1000, "a"), "and the beginning of the next one"
    assert bench.drain.oldest_end == bodies[0], "the first is not answered for yet"
    assert bench.drain.feeding
    bench.accept(0)
    bench.wake()
    assert bench.drain.oldest_end == 1000
    assert turn(bench, 1000, 7000) == (1000, "")
    assert bench.drain.oldest_end == 8000, "it ends where its last part does"
    assert not bench.drain.caught_up
    left = bodies[0] + bodies[1] - 2000
    assert turn(bench, 5000, 9000) == (left, "b")
    assert turn(bench, 5000) == (bodies[2], "c")
    bench.accept(1, 2)
    bench.wake()
    assert (bench.cursor.position, bench.drain.in_flight_bytes, bench.drain.oldest_end) == (4, 0, None)


def test_a_message_cut_in_the_middle_goes_again_from_its_beginning(bench: Bench) -> None:
    bench.attach(shared=True).put("b" * 3000, "c" * 10)
    assert turn(bench, 1000) == (1000, "")
    bench.drain.detached()
    assert bench.drain.in_flight_bytes == 0
    bench.wire.attach()
    bench.drain.attached(bench.wire.sender, NOW)
    size = len(bench.journal.read(bench.stream, 1, 1)[0].body)
    assert turn(bench, size) == (size, "b")


def test_a_message_that_the_hub_rejects_before_its_end_is_buried_and_the_next_one_goes(bench: Bench) -> None:
    bench.attach(max_message_bytes=0, shared=True).put("b" * 3000, "c" * 10)
    bench.wire.receiver.max_message_bytes = 500
    assert turn(bench, 1000) == (1000, "")
    bench.drain.wake(NOW)
    assert bench.drain.in_flight == 0, "the hub has closed the link: nothing of it is in flight"
    assert bench.cursor.position == 1, "and nothing is known of the message"


def test_bytes_without_an_answer_are_bounded_as_messages_are(bench: Bench) -> None:
    bench.attach(shared=True).put(*["x" * (4 << 20)] * 4)
    sent = 0
    while size := turn(bench, 1 << 20)[0]:
        sent += size
    assert WINDOW_BYTES_MAX <= sent < WINDOW_BYTES_MAX + (5 << 20)
    assert not bench.drain.has_more
    bench.accept(0)
    bench.wake()
    assert bench.drain.has_more


def test_after_a_release_a_shared_line_waits_and_goes_on_in_order_as_one_of_its_own_does(bench: Bench) -> None:
    bench.attach(shared=True).put(*"abc")
    assert turn(bench, 1 << 20)[1] == "abc"
    bench.wire.receiver.release(1)
    bench.accept(0, 2)
    bench.wake()
    assert turn(bench, 1 << 20)[1] == ""
    assert not bench.drain.has_more
    bench.wake(NOW + 60)
    assert bench.drain.has_more
    assert turn(bench, 1 << 20)[1] == "b"


def _all_sent(bench: Bench) -> list[str]:
    """What goes at a time while the hub accepts each time all of it."""
    batches = []
    while got := bench.wake():
        bench.journal.commit_now()
        batches.append("".join(payload for _, payload in got))
        bench.accept(*(handle for handle, _ in got))
    return batches


def test_a_hub_that_may_still_work_off_the_last_connection_gets_its_messages_again_by_and_by(bench: Bench) -> None:
    bench.attach(gently=True).put(*"abcdefg")
    got = bench.wake()
    assert "".join(p for _, p in got) == "abcdefg", "nothing was sent before"
    bench.accept(got[0][0])
    bench.wake()
    bench.put(*"hijkl")
    bench.wake()
    bench.drain.detached()
    bench.put(*"mnop")
    bench.wire.attach(100)
    bench.drain.attached(bench.wire.sender, NOW)
    first = bench.wake()
    assert [p for _, p in first] == ["b"]
    assert bench.sent() == "", "not before its outcome"
    bench.accept(first[0][0])
    assert _all_sent(bench) == ["cd", "efgh", "ijkl", "mnop"]
    bench.put(*"qrs")
    assert bench.sent() == "qrs", "settled, so nobody else sends it"


def test_so_it_does_from_the_start_when_that_connection_breaks_too(bench: Bench) -> None:
    bench.attach(gently=True).put(*"abcdefgh")
    bench.wake()
    for breaks in range(2):
        bench.drain.detached()
        bench.wire.attach(100)
        bench.drain.attached(bench.wire.sender, NOW)
        ((handle, _),) = bench.wake()
        bench.accept(handle)
        assert bench.sent() == ("bc", "cd")[breaks]
    bench.drain.detached()
    bench.wire.attach(100)
    bench.drain.attached(bench.wire.sender, NOW)
    assert _all_sent(bench) == ["c", "de", "fgh"]


def test_what_an_earlier_process_may_have_sent_goes_by_and_by_too(bench: Bench) -> None:
    bench.attach(window=6, gently=True).put(*"abcdefgh")
    bench.wake()
    bench.drain.detached()
    bench.attach(window=6, gently=True)
    assert _all_sent(bench) == ["a", "bc", "def", "gh"]


def test_a_hub_that_remembers_nothing_gets_a_window_at_once_after_a_cut(bench: Bench) -> None:
    bench.attach().put(*"abcdefg")
    bench.wake()
    bench.drain.detached()
    bench.wire.attach(100)
    bench.drain.attached(bench.wire.sender, NOW)
    assert bench.sent() == "abcdefg"


def test_so_it_does_where_the_hub_has_had_the_time_to_work_it_off(bench: Bench) -> None:
    bench.attach(gently=True).put(*"abcdefg")
    bench.wake()
    bench.drain.detached()
    bench.wire.attach(100)
    bench.drain.attached(bench.wire.sender, NOW + WORKED_OFF_S + 0.1)
    assert bench.sent(NOW + WORKED_OFF_S + 0.1) == "abcdefg"
