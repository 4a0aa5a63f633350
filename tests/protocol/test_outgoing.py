"""A receiver's link as a trace: what it is sent, and what its answers do to rows, cursors and other receivers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import groups
from gateway.amqp import directory as directory_module
from gateway.amqp.addresses import Kind, Rule
from gateway.amqp.directory import QUEUE_IDLE_S, Directory, Source, TooMany
from gateway.amqp.message import decode, encode
from gateway.amqp.outgoing import RESEND_S_MIN, STUCK_S_MAX, Outgoing
from gateway.groups import Group
from gateway.routing import filters_overlap
from storeforward.journal import Journal
from storeforward.streams import COLUMNS
from tests.wire import NOW, Wire

FILTERS = {"local": "#", "alarms": "alarm/#"}


class Bench:
    """A journal with two streams, the directory over them, and receivers at the ends of wires."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.boottime_s = 1000.0
        self.open()

    def open(self) -> None:
        journal = self.journal = Journal.open(self.path, clock=lambda: self.boottime_s)
        self.streams = {"local": journal.stream("local", "local"), "alarms": journal.stream("alarms", "outbound")}
        self.changes = 0
        self.directory = Directory(
            journal,
            lambda f: [self.streams[n] for n, each in FILTERS.items() if filters_overlap(f, each)],
            self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    def put(self, payloads: str, topic: str = "cab", stream: str = "local", expires_in_s: float | None = None) -> None:
        expires = None if expires_in_s is None else self.journal.age_us() + int(expires_in_s * 1e6)
        ttl_ms = None if expires_in_s is None else int(expires_in_s * 1000)
        for payload in payloads:
            self.journal.append(
                self.streams[stream], topic, lambda seq, body: encode(body, ttl_ms=ttl_ms), payload.encode(), expires
            )
        self.commit()

    def commit(self) -> None:
        if self.journal.pending:
            self.journal.begin()
            self.journal.commit()
            batch = self.journal.committed()
            for stream, appended in batch.appended.items():
                self.directory.committed(stream, set(appended.columns[3::COLUMNS]))

    def rows(self, table: str, columns: str) -> list[tuple[object, ...]]:
        self.commit()
        return self.journal.query(f"SELECT {columns} FROM {table} ORDER BY id")


class App:
    """One receiver: `got` takes (handle, payload) pairs, handles being what it answers with."""

    def __init__(self, bench: Bench, source: Source, credit: int = 100, window: int = 100, size_max: int = 0) -> None:
        self.wire = Wire().attach(credit, size_max)
        self.given_back: list[Group] = []
        self.writable = True
        self.out = Outgoing(
            bench.journal,
            self.wire.sender,
            source,
            window,
            NOW,
            self.given_back.append,
            lambda: self.writable,
        )

    def take(self, now: float = NOW) -> list[tuple[int, str, int]]:
        """(handle, payload, delivery-count) of what came."""
        self.wire.run()
        self.out.wake(now)
        got = [(handle, decode(body)) for handle, body in self.wire.take()]
        return [(handle, message.body.decode(), message.delivery_count) for handle, message in got]

    def text(self, now: float = NOW) -> str:
        return "".join(payload for _, payload, _ in self.take(now))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def test_a_topics_receiver_gets_every_stream_that_its_filter_reads_each_in_order(bench: Bench) -> None:
    app = App(bench, bench.directory.volatile("#", "app", "link"))
    bench.put("abc")
    bench.put("123", "alarm/x", "alarms")
    got = app.text()
    assert [c for c in got if c.isalpha()] == ["a", "b", "c"]
    assert [c for c in got if c.isdigit()] == ["1", "2", "3"]


def test_no_streams_backlog_keeps_another_stream_waiting(bench: Bench) -> None:
    app = App(bench, bench.directory.volatile("#", "app", "link"), credit=4)
    bench.put("abcdefgh")
    bench.put("12345678", "alarm/x", "alarms")
    first = app.take()
    app.wire.receiver.accept([handle for handle, *_ in first])
    app.wire.receiver.topup(4)
    assert {c.isdigit() for _, c, _ in first + app.take()} == {True, False}


def test_a_drain_is_answered_though_messages_wait_where_no_credit_or_no_room_is_left(bench: Bench) -> None:
    bench.directory.configure((Rule("jobs", Kind.QUEUE),))
    bench.put("abc", "jobs")
    without = App(bench, bench.directory.queue("jobs"), credit=0)
    without.wire.receiver._link.drain(0)
    without.wire.run()
    assert without.wire.sender.draining
    without.out.wake(NOW)
    assert not without.wire.sender.draining
    slow = App(bench, bench.directory.queue("jobs"), credit=10, window=2)
    assert slow.text() == "ab"
    slow.wire.receiver._link.drain(0)
    slow.wire.run()
    slow.out.wake(NOW)
    slow.wire.run()
    assert slow.wire.receiver._link.credit == 0


def test_accepted_moves_the_durable_cursor_over_what_has_no_gap(bench: Bench) -> None:
    source = bench.directory.subscribe("app", "sub", None, "cab").source
    app = App(bench, source)
    bench.put("abc")
    (a, *_), (_, *_), (c, *_) = app.take()
    [group] = source.groups.values()
    app.wire.receiver.accept([c])
    app.take()
    assert group.cursor.position == 1
    app.wire.receiver.accept([a])
    app.take()
    assert group.cursor.position == 2


def test_after_a_release_the_window_empties_and_what_was_not_accepted_comes_again_in_order(bench: Bench) -> None:
    app = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("abcd")
    (a, *_), (b, *_), (c, *_), (d, *_) = app.take()
    app.wire.receiver.release(a)
    app.wire.receiver.accept([b])
    bench.put("e")
    assert app.text() == ""
    app.wire.receiver.modify(c, delivery_failed=True)
    assert app.text(NOW + RESEND_S_MIN) == ""  # d has no answer yet
    app.wire.receiver.accept([d])
    again = app.take(NOW + 3 * RESEND_S_MIN)
    assert [(payload, count) for _, payload, count in again] == [("a", 0), ("c", 1), ("e", 0)]


def test_the_clock_has_nothing_to_say_while_an_answer_has_to_come_first(bench: Bench) -> None:
    """Its owner would look again and again, a thousand times a second, for as long as the app keeps a message."""
    app = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("ab")
    (a, *_), (b, *_) = app.take()
    app.wire.receiver.release(a)
    assert app.text(NOW) == ""
    assert app.out.resend_at is None
    app.wire.receiver.accept([b])
    assert app.text(NOW) == ""
    assert app.out.resend_at == NOW + RESEND_S_MIN
    assert app.text(app.out.resend_at) == "a"
    assert app.out.resend_at is None


def test_a_queues_released_message_is_offered_to_the_others_at_once(bench: Bench) -> None:
    queue = bench.directory.queue("cab")
    one, other = App(bench, queue, credit=2), App(bench, queue)
    bench.put("ab")
    (a, *_), (_, *_) = one.take()
    one.wire.receiver.release(a)
    assert one.text() == ""
    assert one.given_back == list(queue.groups.values())
    assert other.text() == "a"


@pytest.mark.parametrize("answer_while_attached", [True, False])
def test_what_was_accepted_behind_a_message_without_an_answer_is_not_handed_out_again(
    bench: Bench, answer_while_attached: bool
) -> None:
    queue = bench.directory.queue("cab")
    app = App(bench, queue)
    bench.put("abcdef")
    (a, *_), (b, *_), (_, *_), (d, *_), (e, *_), (_, *_) = app.take()
    app.wire.receiver.accept([a, b])
    app.wire.receiver.accept([e, d])
    if answer_while_attached:
        app.take()
        assert app.wire.sender.unsettled == 2
    app.wire.receiver.close()
    app.wire.run()
    app.out.end()
    assert app.out.settled == 4
    assert App(bench, queue).text() == "cf"


def test_each_answer_is_about_the_message_it_names_in_whatever_order_they_come(bench: Bench) -> None:
    queue = bench.directory.queue("cab")
    app = App(bench, queue)
    bench.put("abcdef")
    (a, *_), (b, *_), (c, *_), (d, *_), (e, *_), (f, *_) = app.take()
    app.wire.receiver.reject(d, "app:odd", "no idea")
    app.take()
    assert bench.rows("dead", "seq, condition") == [(4, "app:odd")]
    app.wire.receiver.accept([f, b])
    app.take()
    app.wire.receiver.modify(e, delivery_failed=True)
    app.take()
    app.wire.receiver.accept([a])
    assert [(payload, count) for _, payload, count in app.take(NOW + RESEND_S_MIN)] == [("e", 1)]
    app.wire.receiver.accept([c])
    app.take()
    [group] = queue.groups.values()
    assert group.cursor.position == 5


def test_one_message_without_an_answer_does_not_end_the_window_for_the_others(bench: Bench) -> None:
    app = App(bench, bench.directory.queue("cab"), credit=2, window=2)
    bench.put("abcdef")
    [_, (b, *_)] = app.take()
    app.wire.receiver.accept([b])
    app.wire.receiver.topup(2)
    got = []
    for _ in range(4):
        [(handle, payload, _)] = app.take()
        got.append(payload)
        app.wire.receiver.accept([handle])
        app.wire.receiver.topup(2)
    assert got == ["c", "d", "e", "f"]


def test_a_receiver_with_a_place_of_its_own_may_keep_a_message_as_long_as_it_likes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "GROUP_AHEAD_MAX", 3)
    app = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("abcd")
    assert app.text() == "abc"
    assert not app.out.stuck(NOW + 2 * STUCK_S_MAX)


def test_an_answer_in_the_same_breath_as_the_detach_counts(bench: Bench) -> None:
    source = bench.directory.subscribe("app", "sub", None, "cab").source
    app = App(bench, source)
    bench.put("abc")
    (a, *_), (b, *_), _ = app.take()
    app.wire.receiver.accept([a, b])
    app.wire.receiver.close(detach=True)
    app.wire.run()
    assert not app.wire.sender.alive
    app.out.end()
    [group] = source.groups.values()
    assert group.cursor.position == 3
    assert [(payload, count) for _, payload, count in App(bench, source).take()] == [("c", 1)]


def test_a_rejected_message_is_a_dead_letter_with_its_condition(bench: Bench) -> None:
    app = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("ab")
    (a, *_), (b, *_) = app.take()
    app.wire.receiver.reject(a, "app:odd", "no idea")
    app.wire.receiver.accept([b])
    app.take()
    assert bench.rows("dead", "seq, condition, description") == [(1, "app:odd", "no idea")]
    assert bench.rows("loss", "seq, reason") == [(1, "dead-letter")]


def test_undeliverable_here_is_for_another_receiver_or_if_there_can_be_none_a_dead_letter(bench: Bench) -> None:
    queue = bench.directory.queue("cab")
    one, other = App(bench, queue, credit=1), App(bench, queue)
    alone = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("a")
    [(a, *_)] = one.take()
    one.wire.receiver.modify(a, undeliverable_here=True)
    one.wire.receiver.topup(10)
    assert one.text() == one.text(NOW + 60) == ""
    assert [(payload, count) for _, payload, count in other.take()] == [("a", 1)]
    [(a, *_)] = alone.take()
    alone.wire.receiver.modify(a, undeliverable_here=True)
    assert alone.text(NOW + 60) == ""
    assert bench.rows("dead", "seq, condition") == [(1, "undeliverable-here")]


def test_what_is_too_large_for_a_receiver_waits_for_another_or_is_a_dead_letter(bench: Bench) -> None:
    queue = bench.directory.queue("cab")
    small, large = App(bench, queue, size_max=20), App(bench, queue)
    alone = App(bench, bench.directory.volatile("cab", "app", "link"), size_max=20)
    bench.journal.append(bench.streams["local"], "cab", lambda seq, body: encode(body), b"x" * 100)
    bench.put("y")
    assert small.text() == alone.text() == "y"
    assert large.text() == "x" * 100
    assert bench.rows("dead", "seq, condition") == [(1, "amqp:link:message-size-exceeded")]


def test_the_ttl_that_goes_out_is_what_is_left_and_an_expired_message_is_in_the_ledger(bench: Bench) -> None:
    app = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("a", expires_in_s=10)
    bench.put("b", expires_in_s=100)
    bench.boottime_s += 30
    app.out.wake(NOW)
    [(_, body)] = app.wire.take()
    assert decode(body).ttl_ms == 70_000
    assert bench.rows("loss", "seq, reason") == [(1, "expired")]


def test_the_window_counts_what_is_accepted_but_not_yet_durably_so(bench: Bench) -> None:
    app = App(bench, bench.directory.subscribe("app", "sub", None, "cab").source, window=2)
    bench.put("abcd")
    got = app.take()
    assert [payload for _, payload, _ in got] == ["a", "b"]
    app.wire.receiver.accept([handle for handle, *_ in got])
    assert app.text() == ""
    assert app.out.lagging
    bench.commit()
    assert app.text() == "cd"


def test_nothing_is_sent_while_the_connection_takes_no_more(bench: Bench) -> None:
    app = App(bench, bench.directory.volatile("cab", "app", "link"))
    bench.put("a")
    app.writable = False
    assert app.text() == ""
    app.writable = True
    assert app.text() == "a"


def test_a_receiver_is_stuck_only_while_others_wait_for_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUP_AHEAD_MAX", 3)
    queue = bench.directory.queue("cab")
    slow, other = App(bench, queue, credit=1), App(bench, queue)
    bench.put("ab")
    assert slow.text() == "a"
    assert other.text() == "b"
    assert not slow.out.stuck(NOW + 2 * STUCK_S_MAX)
    bench.put("cd")
    assert other.text() == "c"
    assert not slow.out.stuck(NOW + STUCK_S_MAX)
    assert slow.out.stuck(NOW + STUCK_S_MAX + 1)
    assert not other.out.stuck(NOW + STUCK_S_MAX + 1)
    slow.out.end()
    assert [(payload, count) for _, payload, count in other.take()] == [("a", 1)]


# ------------------------------------------------------------------ the directory


def test_who_wants_nothing_of_what_there_is_holds_nothing_up_and_misses_nothing(bench: Bench) -> None:
    away = bench.directory.subscribe("app", "sub", None, "cab").source
    [group] = away.groups.values()
    bench.put("x" * 10, "other")
    bench.put("x" * 10, "other")
    bench.directory.housekeeping(NOW)
    assert group.cursor.position == bench.streams["local"].committed
    bench.put("a")
    bench.put("x" * 10, "other")
    bench.directory.housekeeping(NOW)
    assert group.cursor.position == 21
    assert App(bench, away).text() == "a"


def test_subscriptions_and_queues_are_there_again_after_a_restart_at_their_place(bench: Bench) -> None:
    sub = bench.directory.subscribe("app:1", "sub%", "anna", "#").source
    queue = bench.directory.queue("cab")
    reader, worker = App(bench, sub), App(bench, queue)
    bench.put("ab")
    for app in (reader, worker):
        (first, *_), _ = app.take()
        app.wire.receiver.accept([first])
        app.take()
    bench.commit()
    bench.journal.close()
    bench.open()
    found = bench.directory.subscription("app:1", "sub%")
    assert found is not None
    assert (found.owner, found.source.filter) == ("anna", "#")
    assert App(bench, found.source).text() == App(bench, bench.directory.queues["cab"]).text() == "b"


def test_the_names_of_subscriptions_never_run_into_one_another(bench: Bench) -> None:
    names = {bench.directory.subscription_name(*pair) for pair in (("a:b", "c"), ("a", "b:c"), ("a%3Ab", "c"))}
    assert len(names) == 3


def test_a_subscription_that_ends_lets_go_of_what_only_it_held(bench: Bench) -> None:
    sub = bench.directory.subscribe("app", "sub", None, "cab")
    bench.put("abc")
    bench.directory.unsubscribe(sub)
    bench.commit()
    bench.commit()
    assert bench.streams["local"].cursors == {}
    assert bench.directory.subscription("app", "sub") is None
    assert bench.journal.query("SELECT key FROM meta WHERE key LIKE 'amqp%'") == []


def test_a_queue_by_configuration_stays_and_any_other_goes_once_it_is_long_empty_and_unused(bench: Bench) -> None:
    bench.directory.configure((Rule("orders", Kind.QUEUE), Rule("jobs/#", Kind.QUEUE), Rule("x/+", Kind.TOPIC)))
    assert bench.directory.expects("jobs/a")
    assert not bench.directory.expects("x/a")
    assert not bench.directory.expects("y")
    assert set(bench.directory.queues) == {"orders", "jobs/a"}
    bench.put("a", "jobs/a")
    bench.directory.housekeeping(NOW)
    bench.directory.housekeeping(NOW + QUEUE_IDLE_S)
    assert set(bench.directory.queues) == {"orders", "jobs/a"}  # it holds a message
    app = App(bench, bench.directory.queue("jobs/a"))
    [(a, *_)] = app.take()
    app.wire.receiver.accept([a])
    app.take()
    app.out.end()
    bench.directory.housekeeping(NOW + 2 * QUEUE_IDLE_S)
    assert "jobs/a" in bench.directory.queues
    bench.directory.housekeeping(NOW + 3 * QUEUE_IDLE_S)
    assert set(bench.directory.queues) == {"orders"}
    assert set(bench.streams["local"].cursors) == {"queue:orders"}


def test_the_directorys_limits_say_which_they_are(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUEUES_MAX", "SUBSCRIPTIONS_MAX", "REPLIES_A_CONNECTION_MAX"):
        monkeypatch.setattr(directory_module, name, 1)
    bench.directory.configure((Rule("jobs/#", Kind.QUEUE),))
    bench.directory.queue("a")
    bench.directory.queue("a")
    with pytest.raises(TooMany, match="1 queues"):
        bench.directory.queue("b")
    assert not bench.directory.expects("jobs/a")
    bench.directory.subscribe("app", "a", None, "x")
    with pytest.raises(TooMany, match="1 durable subscriptions"):
        bench.directory.subscribe("app", "b", None, "x")
    bench.directory.open_reply("one", "t1")
    bench.directory.open_reply("two", "t2")
    with pytest.raises(TooMany, match="1 dynamic addresses"):
        bench.directory.open_reply("one", "t3")


def test_a_reply_address_ends_with_its_cursor(bench: Bench) -> None:
    reply = bench.directory.open_reply("me", "token")
    assert bench.directory.reply("$lineside/reply/token") is reply
    assert reply.owner == "me"
    assert set(bench.streams["local"].cursors) == {"reply:token"}
    bench.directory.close_reply(reply.topic)
    assert bench.directory.reply(reply.topic) is None
    assert bench.streams["local"].cursors == {}
