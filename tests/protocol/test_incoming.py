"""A sender's link as a trace: what the app sends, what is journaled, and what it is told when."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.amqp import incoming as incoming_module
from gateway.amqp.events import Outcome, OutcomeKind
from gateway.amqp.incoming import Incoming, Refused
from gateway.amqp.message import ANNOTATION_ID, Stamp, decode, encode
from gateway.routing import Route
from storeforward.journal import Journal
from storeforward.streams import StreamLimits
from tests.wire import Wire


def never(seq: int, body: bytes) -> bytes:
    raise AssertionError("a template is for MQTT")


class Bench:
    """A journal, and an app at the other end of the wire: `near` is the app, `far` is us."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal.open(path, clock=lambda: 1000.0)
        self.stream = self.journal.stream("local", "local")
        self.wire = Wire().attach(0)
        self.ttl_us: int | None = None
        self.duplicate_property: str | None = None
        self.asked: list[str] = []
        self.number = 0
        self.incoming = Incoming(self.journal, self.wire.receiver, 100, "cab", self._resolve, lambda: None)
        self.wire.run()

    def _resolve(self, topic: str) -> tuple[Route, Stamp]:
        self.asked.append(topic)
        if topic == "closed":
            raise Refused("amqp:unauthorized-access", "not you")
        stamp = Stamp("loco", "1.abcdef", "local", duplicate_property=self.duplicate_property)
        return Route(self.stream, topic, never, self.ttl_us, topic, self.duplicate_property, True), stamp

    def send(self, *bodies: bytes) -> None:
        """The app sends, and what it sends is taken in."""
        self.wire.sender.send([(self.number + n, body) for n, body in enumerate(bodies)])
        self.number += len(bodies)
        self.incoming.deliveries(self.wire.take())

    def commit(self) -> None:
        if self.journal.pending:
            self.journal.commit_now()

    def told(self) -> list[tuple[int, str]]:
        """(number, outcome or condition) of what the app was told since the last call."""
        self.wire.run()
        out: list[tuple[int, str]] = []
        for outcome in self.wire.sender.take_outcomes():
            first = outcome.seq - outcome.count + 1
            out += [(seq, _word(outcome)) for seq in range(first, outcome.seq + 1)]
        return out

    def stored(self) -> list[tuple[str, bytes]]:
        return [(row.topic, row.body) for row in self.journal.read(self.stream, 1, 100)]

    def losses(self) -> list[tuple[object, ...]]:
        self.commit()
        return self.journal.query("SELECT reason, size, detail FROM loss ORDER BY id")

    def lost(self) -> int:
        """How many messages the ledger tells of."""
        self.commit()
        return sum(count for (count,) in self.journal.query("SELECT messages FROM loss_total"))


def _word(outcome: Outcome) -> str:
    return outcome.condition or outcome.kind.value


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def test_accepted_leaves_only_after_the_commit_and_in_order(bench: Bench) -> None:
    bench.send(encode(b"a"), encode(b"b"))
    assert bench.told() == []
    bench.journal.begin()
    bench.send(encode(b"c"))
    bench.journal.commit()
    assert bench.told() == []
    bench.journal.committed()
    assert bench.told() == [(0, "accepted"), (1, "accepted")]
    bench.commit()
    assert bench.told() == [(2, "accepted")]
    assert [decode(body).body for _, body in bench.stored()] == [b"a", b"b", b"c"]


def test_a_message_without_any_address_is_told_so(bench: Bench) -> None:
    bench.incoming.topic = None
    bench.send(encode(b"a"))
    bench.wire.run()
    [outcome] = bench.wire.sender.take_outcomes()
    assert (outcome.condition, outcome.description) == (
        "amqp:not-found",
        "the link has no address, and neither has the message (`to`)",
    )


def test_an_app_may_use_a_message_id_as_often_as_it_likes(bench: Bench) -> None:
    bench.send(encode(b"a", message_id="1"), encode(b"b", message_id="1"))
    bench.commit()
    stored = [decode(body) for _, body in bench.stored()]
    assert [(m.message_id, m.annotations[ANNOTATION_ID][-1]) for m in stored] == [("1", "1"), ("1", "2")]


def test_the_next_hub_is_told_another_gateways_identity_where_it_looks_for_it(bench: Bench) -> None:
    bench.duplicate_property = "_AMQ_DUPL_ID"
    given = "edge:7.abcdef:alarms:000000000001"
    bench.send(encode(b"a", message_id=given, subject="s", application_properties={"p": 1}), encode(b"b"))
    bench.commit()
    [first, second] = [decode(body) for _, body in bench.stored()]
    assert (first.message_id, first.subject, first.body) == (given, "s", b"a")
    assert first.application_properties == {"p": 1, "_AMQ_DUPL_ID": given}
    assert first.annotations == {}
    assert second.application_properties == {"_AMQ_DUPL_ID": second.annotations[ANNOTATION_ID]}


def test_what_another_gateway_repeats_is_stored_once_and_accepted_each_time(bench: Bench) -> None:
    body = encode(b"a", annotations={ANNOTATION_ID: "edge:7.abcdef:alarms:000000000001"})
    bench.send(body)
    bench.send(body)
    bench.commit()
    bench.send(body)
    assert bench.told() == [(0, "accepted"), (1, "accepted")]
    bench.commit()
    assert bench.told() == [(2, "accepted")]
    assert bench.stored() == [("cab", body)]


def test_the_shorter_of_the_messages_and_the_streams_ttl_counts(bench: Bench) -> None:
    bench.send(encode(b"a", ttl_ms=5), encode(b"b"))
    bench.ttl_us = 3000
    bench.send(encode(b"c", ttl_ms=5), encode(b"d"), encode(b"e", ttl_ms=1))
    bench.commit()
    now = bench.journal.age_us()
    expires = [row.expires_age_us for row in bench.journal.read(bench.stream, 1, 10)]
    assert [None if at is None else at - now for at in expires] == [5000, None, 3000, 3000, 1000]


def test_each_message_that_cannot_be_taken_is_told_why_and_the_others_go_on(bench: Bench) -> None:
    bench.incoming.topic = None
    bench.stream.limits = StreamLimits(bytes_max=1000)
    bench.send(
        encode(b"a", to="topic://x"),
        encode(b"b"),
        encode(b"c", to="a/#"),
        encode(b"d", to="closed"),
        b"\x00\x53\x77",
        encode(b"e" * 1000, to="x"),
        encode(b"f", to="y"),
    )
    bench.commit()
    assert bench.told() == [
        (0, "accepted"),
        (1, "amqp:not-found"),
        (2, "amqp:not-found"),
        (3, "amqp:unauthorized-access"),
        (4, "amqp:decode-error"),
        (5, "amqp:resource-limit-exceeded"),
        (6, "accepted"),
    ]
    assert [topic for topic, _ in bench.stored()] == ["x", "y"]
    assert bench.losses() == []


def test_a_full_stream_holds_a_little_grants_no_credit_and_goes_on_when_there_is_room(bench: Bench) -> None:
    bench.journal.cursor(bench.stream, "reader", "amqp")
    bench.stream.limits = StreamLimits(messages_max=1)
    bench.send(encode(b"a"), encode(b"b"))
    bench.send(encode(b"c"))
    bench.commit()
    assert bench.told() == [(0, "accepted")]
    assert bench.incoming.held == 2
    bench.incoming.retry()
    assert bench.incoming.held == 2
    bench.stream.limits = StreamLimits(messages_max=10)
    bench.incoming.retry()
    bench.commit()
    assert bench.told() == [(1, "accepted"), (2, "accepted")]
    assert [decode(body).body for _, body in bench.stored()] == [b"a", b"b", b"c"]


def test_beyond_what_is_held_everything_goes_back_so_that_the_order_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming_module, "HELD_BYTES_MAX", 150)
    bench.stream.limits = StreamLimits(messages_max=1)
    bench.send(encode(b"a"), encode(b"b" * 60), encode(b"c" * 100), encode(b"d"))
    bench.commit()
    bench.stream.limits = StreamLimits(messages_max=10)
    bench.send(encode(b"e"))
    bench.incoming.retry()
    bench.send(encode(b"f"))
    bench.commit()
    assert sorted(bench.told()) == [
        (0, "accepted"),
        (1, "accepted"),
        (2, "released"),
        (3, "released"),
        (4, "released"),
        (5, "accepted"),
    ]


def test_what_a_commit_did_not_take_stays_unsettled_and_goes_in_before_anything_newer(bench: Bench) -> None:
    """Released, it would come again behind what the app had sent meanwhile."""
    bench.send(encode(b"a"), encode(b"b"))
    bench.journal.begin()
    bench.send(encode(b"c"))
    bench.journal.failed(sqlite3.OperationalError("disk I/O error"))
    bench.send(encode(b"d"))
    assert bench.told() == []
    bench.incoming.retry()
    bench.commit()
    assert [decode(body).body for _, body in bench.stored()] == [b"a", b"b", b"c", b"d"]
    assert bench.told() == [(n, "accepted") for n in range(4)]


def test_what_is_refused_though_its_sender_no_longer_listens_is_in_the_ledger(bench: Bench) -> None:
    bench.wire.sender.presettled = True
    bench.incoming.topic = None
    bench.send(encode(b"a"), encode(b"b", to="x"))
    bench.commit()
    [(reason, _, detail)] = bench.losses()
    assert (reason, detail) == ("refused-presettled", "amqp:not-found")
    assert [topic for topic, _ in bench.stored()] == ["x"]


@pytest.mark.parametrize("presettled", [True, False])
def test_what_waits_for_room_when_the_link_ends_is_in_the_ledger_if_its_sender_does_not_have_it_any_more(
    bench: Bench, presettled: bool
) -> None:
    bench.wire.sender.presettled = presettled
    bench.journal.cursor(bench.stream, "reader", "amqp")
    bench.stream.limits = StreamLimits(messages_max=1)
    bench.send(encode(b"a"), encode(b"b"), encode(b"c"))
    bench.commit()
    bench.wire.far.lost()
    bench.incoming.end()
    assert bench.lost() == 2 * presettled
    assert len(bench.stored()) == 1


def test_what_a_commit_did_not_take_is_in_the_ledger_where_its_link_is_gone(bench: Bench) -> None:
    bench.wire.sender.presettled = True
    bench.send(encode(b"a"), encode(b"b"))
    bench.journal.begin()
    bench.wire.far.lost()
    bench.incoming.end()
    bench.journal.failed(sqlite3.OperationalError("disk I/O error"))
    assert bench.lost() == 2


def test_what_is_refused_after_its_link_ended_is_in_the_ledger(bench: Bench) -> None:
    """The end may come with the same bytes as the message."""
    bench.wire.sender.presettled = True
    bench.incoming.topic = None
    bench.wire.sender.send([(0, encode(b"a"))])
    taken = bench.wire.take()
    bench.wire.far.lost()
    bench.incoming.deliveries(taken)
    assert bench.lost() == 1


def test_a_link_that_is_gone_before_the_commit_costs_nothing(bench: Bench) -> None:
    bench.send(encode(b"a"))
    bench.wire.far.lost()
    bench.commit()
    assert len(bench.stored()) == 1


def test_credit_is_kept_at_the_same_level_by_commits(bench: Bench) -> None:
    for n in range(30):
        bench.send(*(encode(b"%d" % n) for _ in range(10)))
        bench.commit()
        assert all(word == OutcomeKind.ACCEPTED.value for _, word in bench.told())
    assert bench.stream.next_seq == 301
