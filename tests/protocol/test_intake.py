"""What a hub sends as a trace: what is stored, and when and how it is settled."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.amqp.events import OutcomeKind
from gateway.amqp.message import Message, decode, encode
from gateway.errors import PeerError
from gateway.uplink.intake import Intake
from storeforward.journal import Journal
from storeforward.streams import Stream, StreamLimits
from tests.wire import Wire

ACCEPTED, REJECTED, RELEASED = OutcomeKind.ACCEPTED, OutcomeKind.REJECTED, OutcomeKind.RELEASED


class Bench:
    """A hub that sends over the wire, and an intake that journals what comes into one stream."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = 0
        self.open()

    def open(self, credit: int = 20, **limits: int) -> None:
        self.journal = Journal.open(self.path)
        self.stream = self.journal.stream("commands", "inbound", StreamLimits(**limits))
        self.attach(credit)

    def attach(self, credit: int = 20) -> None:
        self.wire = Wire().attach(credit=0)
        self.intake = Intake(self.journal, self.wire.receiver, credit, self.place, lambda: None)
        self.wire.run()

    def place(self, message: Message) -> tuple[Stream, str]:
        if message.subject == "#":
            raise PeerError("no topic")
        return self.stream, f"commands/{message.subject}"

    def send(self, *bodies: bytes) -> None:
        self.wire.sender.send([(self.next + n, body) for n, body in enumerate(bodies)])
        self.next += len(bodies)
        batch = self.wire.take()
        if batch:
            self.intake.deliveries(batch)

    def outcomes(self) -> list[tuple[OutcomeKind, int]]:
        """What the hub hears: one pair a message, in the order sent."""
        self.wire.run()
        return [
            (o.kind, seq) for o in self.wire.sender.take_outcomes() for seq in range(o.seq - o.count + 1, o.seq + 1)
        ]

    def stored(self) -> list[str]:
        return [decode(row.body).body.decode() for row in self.journal.read(self.stream, 1, 1000)]


def message(name: str, identity: str | None = None, subject: str = "go") -> bytes:
    return encode(name.encode(), message_id=identity, subject=subject)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def test_the_larger_messages_are_the_fewer_may_be_on_their_way(bench: Bench) -> None:
    def arrives(*bodies: bytes) -> int:
        bench.send(*bodies)
        bench.journal.commit_now()
        bench.outcomes()
        return bench.wire.sender.credit

    large = encode(bytes(2 << 20), subject="go")
    assert bench.wire.sender.credit == 20
    assert arrives(large) == 19, "what was granted stands, and nothing is added to it"
    assert arrives(*[large] * 19) == 7
    credit = 7
    for _ in range(100):
        credit = arrives(*[message("small")] * credit)
    assert credit == 20


def test_a_full_stream_that_was_sent_too_much_at_once_is_overfull(bench: Bench) -> None:
    bench.journal.close()
    bench.open(bytes_max=1 << 20)
    large = encode(bytes(1000 << 10), subject="go")
    bench.send(large)
    assert bench.intake.staged
    bench.journal.commit_now()
    assert not bench.intake.staged
    bench.send(*[large] * 16)
    assert not bench.intake.overfull
    bench.send(large)
    assert bench.intake.overfull
    assert len(bench.outcomes()) == 1, "the rest is the peer's"


def test_nothing_is_settled_before_the_commit_and_all_in_order_after_it(bench: Bench) -> None:
    bench.send(message("a", "1"), message("b", "2"), message("c"))
    assert bench.outcomes() == []
    bench.journal.begin()
    bench.journal.commit()
    assert bench.outcomes() == []
    bench.journal.committed()
    assert bench.outcomes() == [(ACCEPTED, 0), (ACCEPTED, 1), (ACCEPTED, 2)]
    assert bench.stored() == ["a", "b", "c"]
    [row, *_] = bench.journal.read(bench.stream, 1, 1)
    assert (row.topic, row.body) == ("commands/go", message("a", "1")), "the bytes as they came"


def test_a_repeat_is_settled_without_a_second_row(bench: Bench) -> None:
    bench.send(message("a", "1"), message("a", "1"))
    bench.journal.commit_now()
    bench.send(message("a", "1"), message("b", "2"))
    bench.journal.commit_now()
    assert [kind for kind, _ in bench.outcomes()] == [ACCEPTED] * 4
    assert bench.stored() == ["a", "b"]
    assert (bench.intake.received, bench.intake.repeated) == (2, 2)


def test_a_repeat_is_known_after_a_restart(bench: Bench) -> None:
    bench.send(message("a", "1"))
    bench.journal.commit_now()
    bench.journal.close()
    bench.open()
    bench.send(message("a", "1"), message("b", "2"))
    bench.journal.commit_now()
    assert bench.stored() == ["a", "b"]


def test_messages_without_an_identity_are_never_taken_for_repeats(bench: Bench) -> None:
    bench.send(message("a"), message("a"))
    bench.journal.commit_now()
    assert bench.stored() == ["a", "a"]


def test_the_repeat_of_a_message_whose_commit_is_under_way_shares_its_fate(bench: Bench) -> None:
    bench.send(message("a", "1"))
    bench.journal.begin()
    bench.attach()  # the connection was lost meanwhile; the hub sends it again on the next one
    bench.send(message("a", "1"))
    bench.journal.failed(sqlite3.OperationalError("disk I/O error"))
    bench.intake.retry()
    bench.journal.commit_now()
    accepted = [kind for kind, _ in bench.outcomes()].count(ACCEPTED)
    assert len(bench.stored()) >= accepted, "accepted means on disk"


def test_what_a_commit_did_not_take_stays_unsettled_and_goes_in_before_anything_newer(bench: Bench) -> None:
    """Released, it would come again behind what the hub had sent meanwhile."""
    bench.send(message("a", "1"), message("b", "2"))
    bench.journal.begin()
    bench.send(message("c", "3"), message("a", "1"))
    bench.journal.failed(sqlite3.OperationalError("disk I/O error"))
    bench.send(message("d", "4"))
    assert bench.outcomes() == []
    bench.intake.retry()
    bench.journal.commit_now()
    assert bench.stored() == ["a", "b", "c", "d"]
    assert bench.outcomes() == [(ACCEPTED, n) for n in range(5)]


def test_a_full_stream_holds_back_unsettled_grants_no_credit_and_goes_on_in_order(bench: Bench) -> None:
    bench.journal.close()
    bench.open(credit=5, messages_max=2)
    cursor = bench.journal.cursor(bench.stream, "mqtt:app", "mqtt")
    bench.send(*(message(name) for name in "abcde"))
    bench.journal.commit_now()
    assert [seq for _, seq in bench.outcomes()] == [0, 1]
    assert bench.intake.held == 3
    assert bench.wire.sender.credit <= 2
    bench.journal.advance(bench.stream, cursor, 3)
    bench.intake.retry()
    bench.journal.commit_now()
    bench.intake.retry()
    bench.journal.commit_now()
    assert bench.outcomes()[:2] == [(ACCEPTED, 2), (ACCEPTED, 3)]
    assert [decode(r.body).body for r in bench.journal.read(bench.stream, 3, 9)] == [b"c", b"d"]


def test_what_can_not_be_read_is_rejected_and_in_the_ledger_and_the_rest_goes_on(bench: Bench) -> None:
    bench.send(message("a"), b"\xff\xff\xff", message("b", subject="#"), message("c"))
    bench.journal.commit_now()
    kinds = [kind for kind, _ in bench.outcomes()]
    assert kinds == [ACCEPTED, REJECTED, REJECTED, ACCEPTED]
    assert bench.stored() == ["a", "c"]
    losses = bench.journal.query("SELECT reason, size FROM loss ORDER BY id")
    assert losses[0] == ("malformed", 3)
    assert len(losses) == 2


def test_credit_comes_back_with_settlement(bench: Bench) -> None:
    bench.send(*(message(str(n)) for n in range(20)))
    assert bench.wire.sender.credit == 0
    bench.journal.commit_now()
    bench.wire.run()
    assert bench.wire.sender.credit == 20


def test_a_message_larger_than_its_stream_ever_holds_is_rejected_in_the_ledger_and_stops_nothing(bench: Bench) -> None:
    bench.journal.close()
    bench.open(bytes_max=1000)
    bench.send(message("a"), message("x" * 2000), message("b"))
    bench.journal.commit_now()
    assert bench.intake.held == 0
    bench.wire.run()
    outcomes = bench.wire.sender.take_outcomes()
    assert [o.kind for o in outcomes] == [ACCEPTED, REJECTED, ACCEPTED]
    assert outcomes[1].condition == "amqp:link:message-size-exceeded"
    assert outcomes[1].description is not None
    assert "max_bytes 1000" in outcomes[1].description
    assert bench.stored() == ["a", "b"]
    [(reason, size)] = bench.journal.query("SELECT reason, size FROM loss")
    assert (reason, size) == ("too-large", len(message("x" * 2000)))


def test_credit_comes_back_also_where_all_of_it_went_to_what_was_rejected(bench: Bench) -> None:
    bench.send(*[b"\xff\xff\xff"] * 20)
    bench.wire.run()
    assert [kind for kind, _ in bench.outcomes()] == [REJECTED] * 20
    assert bench.wire.sender.credit == 20
