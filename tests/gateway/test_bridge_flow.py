"""What the bridge decides, without a broker: what is answered, held, sent again, and in which order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.amqp.message import Message, decode, encode
from gateway.bridge_flow import CURSOR, HELD_BYTES_MAX, Inflow, Outflow, Taken, release
from gateway.broker import Broker
from gateway.config import loads
from gateway.mqtt.packets import PublishProperties
from storeforward.journal import Journal
from storeforward.streams import Stream

CONFIG = """
[gateway]
id = "loco"
state_dir = "/nowhere"
[bridge]
url = "mqtt://127.0.0.1:1883"
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
max_messages = 10
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "alarms"
max_bytes = "64KiB"
[[inbound]]
stream = "commands"
hub = "depot"
address = "c"
topic = "commands/{subject}"
[[inbound]]
stream = "tables"
hub = "depot"
address = "t"
topic = "tables/{subject}"
"""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.open(tmp_path)
    yield journal
    journal.close()


@pytest.fixture
def broker(journal: Journal) -> Broker:
    broker = Broker(loads(CONFIG, check_files=False), journal)
    journal.commit_now()
    return broker


def taken(n: int, topic: str = "train/speed", qos: int = 1, *, dup: bool = False, size: int = 0) -> Taken:
    return Taken(topic, qos, n if qos else 0, dup, b"%d" % n if not size else bytes(size), None)


class Near:
    """An inflow with what it answered."""

    def __init__(self, journal: Journal, broker: Broker, window: int = 1000) -> None:
        self.answered: list[int] = []
        self.journal = journal
        self.flow = Inflow(journal, lambda: broker.router, window, self._answer)
        self.flow.connected()

    def _answer(self, messages: list[Taken]) -> None:
        self.answered += [message.packet_id for message in messages]

    def receive(self, *messages: Taken) -> None:
        for message in messages:
            self.flow.receive(message)
        self.flow.stage()

    def stored(self, name: str = "telemetry") -> list[bytes]:
        stream = self.journal.streams[name]
        rows = self.journal.read_range(stream, stream.first_seq, stream.committed)
        return [decode(row.body).body for row in rows]


@pytest.fixture
def near(journal: Journal, broker: Broker) -> Near:
    return Near(journal, broker)


def test_nothing_is_answered_before_the_commit_that_holds_it(near: Near, journal: Journal) -> None:
    near.receive(taken(1), taken(2))
    journal.begin()
    journal.commit()
    assert near.answered == []
    journal.committed()
    assert near.answered == [1, 2]
    assert near.stored() == [b"1", b"2"]


def test_what_comes_while_a_batch_is_written_waits_and_follows_it(near: Near, journal: Journal) -> None:
    near.receive(taken(1))
    journal.begin()
    near.receive(taken(2), taken(3))
    assert (near.flow.staged, near.flow.held) == (1, 2)
    journal.commit()
    journal.committed()
    assert (near.flow.staged, near.flow.held) == (2, 0)
    journal.commit_now()
    assert near.answered == [1, 2, 3]
    assert near.stored() == [b"1", b"2", b"3"]


def test_a_batch_that_the_disk_refuses_goes_again_before_what_came_after_it(near: Near, journal: Journal) -> None:
    near.receive(taken(1), taken(2))
    journal.begin()
    near.receive(taken(3))
    journal.failed(sqlite3.OperationalError("disk I/O error"))
    assert near.flow.blocked
    assert near.answered == []
    near.receive(taken(4))
    journal.commit_now()
    assert near.answered == [1, 2, 3, 4]
    assert near.stored() == [b"1", b"2", b"3", b"4"]


def test_a_full_stream_holds_everything_behind_it_and_the_order_is_kept(near: Near, journal: Journal) -> None:
    near.receive(*(taken(n) for n in range(1, 16)), taken(16, "alarm/fire"))
    journal.commit_now()
    assert near.answered == list(range(1, 11))
    assert near.flow.blocked
    assert near.stored("alarms") == []
    stream = journal.streams["telemetry"]
    journal.advance(stream, stream.cursors["uplink"], 11)
    journal.commit_now()
    near.flow.stage()
    journal.commit_now()
    assert near.answered == list(range(1, 17))
    assert not near.flow.blocked


def test_qos_0_for_a_full_stream_is_lost_and_in_the_ledger_as_the_listener_has_it(near: Near, journal: Journal) -> None:
    near.receive(*(taken(n) for n in range(1, 12)))
    near.receive(taken(0, qos=0), taken(0, "alarm/fire", qos=0))
    journal.commit_now()
    assert journal.query("SELECT stream, reason, messages FROM loss_total") == [("telemetry", "refused-qos-0", 1)]
    assert near.flow.held == 2


def test_a_message_larger_than_its_stream_can_ever_be_is_in_the_ledger_and_does_not_block(
    near: Near, journal: Journal
) -> None:
    near.receive(taken(1, "alarm/fire", size=1 << 16), taken(2, "alarm/fire", size=(1 << 16) - 10), taken(3, "alarm/x"))
    journal.commit_now()
    assert near.answered == [1, 2, 3]
    assert near.stored("alarms") == [b"3"]
    assert journal.query("SELECT reason, messages FROM loss_total") == [("larger-than-the-stream", 2)]


def test_an_answer_never_goes_to_another_connection_than_the_message_came_by(near: Near, journal: Journal) -> None:
    near.receive(taken(1))
    journal.begin()
    near.flow.connected()
    near.receive(taken(1, dup=True))
    journal.commit()
    journal.committed()
    assert near.answered == []
    journal.commit_now()
    assert near.answered == [1]


def test_a_repeat_is_journaled_with_a_mark(near: Near, journal: Journal) -> None:
    near.receive(taken(1), taken(2, dup=True))
    journal.commit_now()
    stream = journal.streams["telemetry"]
    marks = [decode(row.body).annotations for row in journal.read_range(stream, 1, 3)]
    assert marks == [{}, {"x-opt-lineside-repeated": True}]
    assert near.flow.repeated == 1


def test_a_message_known_or_wanted_by_nobody_is_answered_and_not_stored(near: Near, journal: Journal) -> None:
    near.receive(taken(1, "nobody/reads"), taken(2)._replace(known=True), taken(3))
    journal.commit_now()
    assert near.answered == [1, 2, 3]
    assert near.stored() == [b"3"]
    assert journal.loss_count == 0


def test_a_topic_that_is_not_utf_8_is_answered_and_in_the_ledger(near: Near, journal: Journal) -> None:
    near.receive(taken(1, ""))
    journal.commit_now()
    assert near.answered == [1]
    assert journal.query("SELECT reason FROM loss") == [("topic-not-utf-8",)]


def test_properties_and_expiry_are_stored_as_the_listener_stores_them(near: Near, journal: Journal) -> None:
    properties = PublishProperties(
        message_expiry_interval=60, content_type="text/plain", response_topic="r", user_property=(("a", "1"),)
    )
    near.receive(taken(1)._replace(properties=properties))
    journal.commit_now()
    (row,) = journal.read(journal.streams["telemetry"], 1, 10)
    message = decode(row.body)
    assert (message.content_type, message.reply_to, message.ttl_ms) == ("text/plain", "r", 60_000)
    assert message.application_properties == {"a": "1"}
    assert row.expires_age_us is not None


def test_who_sends_without_a_window_is_no_longer_read_at_a_bound(near: Near, journal: Journal) -> None:
    size = 1 << 20
    near.receive(*(taken(n) for n in range(1, 11)))
    journal.commit_now()
    n = 11
    while not near.flow.full:
        near.receive(taken(n, size=size))
        n += 1
        assert n < 100
    assert near.flow.held * size <= HELD_BYTES_MAX + size
    near.flow.connected()
    assert not near.flow.full


def test_no_more_is_journaled_than_the_window_before_the_broker_proves_what_it_has_read(
    journal: Journal, broker: Broker
) -> None:
    near = Near(journal, broker, window=4)
    near.receive(*(taken(n) for n in range(1, 11)))
    assert near.flow.staged == 4
    assert not near.flow.ask()
    journal.commit_now()
    assert near.answered == [1, 2, 3, 4]
    near.flow.stage()
    assert near.flow.staged == 0
    assert near.flow.ask()
    assert not near.flow.ask()
    near.flow.stage()
    assert near.flow.staged == 0
    near.flow.proven()
    near.flow.stage()
    assert near.flow.staged == 4
    journal.commit_now()
    near.flow.connected()
    near.receive(taken(9, dup=True))
    assert near.flow.staged == 1


def test_after_closing_nothing_more_is_stored(near: Near, journal: Journal) -> None:
    near.receive(taken(1))
    journal.begin()
    near.receive(taken(2))
    near.flow.close()
    near.receive(taken(3))
    journal.commit()
    journal.committed()
    assert near.answered == [1]
    assert not near.flow.staged


# ------------------------------------------------------------------------------------------------------ outflow


class Far:
    """A broker that takes what it is given and answers when told to."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes, int | None]] = []
        self.refuses: set[bytes] = set()
        self.away = False

    def __call__(self, topic: str, message: Message, expiry_s: int | None) -> int | None:
        if message.body in self.refuses:
            raise ValueError("too large")
        if self.away:
            return None
        self.got.append((topic, message.body, expiry_s))
        return len(self.got)

    def bodies(self) -> list[bytes]:
        return [body for _, body, _ in self.got]


def fill(journal: Journal, name: str, count: int, expires_age_us: int | None = None) -> Stream:
    stream = journal.streams[name]
    for n in range(count):
        body = encode(b"%s %d" % (name.encode(), n))
        journal.append(stream, f"{name}/x", lambda _seq, body: body, body, expires_age_us)
    journal.commit_now()
    return stream


@pytest.fixture
def out(journal: Journal, broker: Broker) -> Outflow:
    flow = Outflow(journal, [journal.streams["commands"], journal.streams["tables"]], 10)
    journal.commit_now()
    return flow


def position(stream: Stream) -> int:
    return stream.cursors[CURSOR].position


def test_a_cursor_moves_only_over_what_was_acknowledged_in_a_row(out: Outflow, journal: Journal) -> None:
    stream, far = fill(journal, "commands", 3), Far()
    out.pump(far, 65535)
    out.acked(2, None)
    assert position(stream) == 1
    out.acked(1, None)
    assert position(stream) == 3
    out.acked(3, None)
    assert position(stream) == 4
    assert out.published == 3


def test_no_more_than_the_window_is_out_counting_what_is_not_durably_acknowledged(
    out: Outflow, journal: Journal
) -> None:
    fill(journal, "commands", 100)
    far = Far()
    out.pump(far, 65535)
    assert len(far.got) == out.in_flight == 10
    for packet_id in range(1, 6):
        out.acked(packet_id, None)
    out.pump(far, 65535)
    assert len(far.got) == 10
    journal.commit_now()
    out.pump(far, 65535)
    assert len(far.got) == 15


def test_the_brokers_receive_maximum_is_kept(out: Outflow, journal: Journal) -> None:
    fill(journal, "commands", 100)
    far = Far()
    out.pump(far, 3)
    assert out.in_flight == 3


def test_after_a_rewind_everything_unacknowledged_goes_again_in_order(out: Outflow, journal: Journal) -> None:
    fill(journal, "commands", 5)
    far = Far()
    out.pump(far, 65535)
    out.acked(1, None)
    out.rewind()
    far.got.clear()
    out.pump(far, 65535)
    assert far.bodies() == [b"commands %d" % n for n in range(1, 5)]


def test_no_streams_backlog_stands_before_anothers_messages_for_good(out: Outflow, journal: Journal) -> None:
    fill(journal, "commands", 100)
    fill(journal, "tables", 100)
    far = Far()
    for _ in range(4):
        out.pump(far, 65535)
        for packet_id in range(len(far.got) - 9, len(far.got) + 1):
            out.acked(packet_id, None)
        journal.commit_now()
    for name in (b"commands", b"tables"):
        mine = [body for body in far.bodies() if body.startswith(name)]
        assert mine == [b"%s %d" % (name, n) for n in range(20)]


def test_what_the_broker_refuses_is_a_dead_letter_and_the_next_goes_on(out: Outflow, journal: Journal) -> None:
    stream, far = fill(journal, "commands", 3), Far()
    far.refuses = {b"commands 0"}
    out.pump(far, 65535)
    out.acked(1, ("mqtt:0x87", "Not authorized"))
    out.acked(2, None)
    journal.commit_now()
    assert position(stream) == 4
    assert journal.query("SELECT seq, condition, description FROM dead ORDER BY seq") == [
        (1, "lineside:not-publishable", "too large"),
        (2, "mqtt:0x87", "Not authorized"),
    ]


def test_an_expired_message_is_in_the_ledger_and_the_rest_of_a_lifetime_is_told(out: Outflow, journal: Journal) -> None:
    fill(journal, "commands", 1, expires_age_us=1)
    stream, far = fill(journal, "commands", 1, expires_age_us=journal.age_us() + 60_500_000), Far()
    out.pump(far, 65535)
    assert [expiry_s for _, _, expiry_s in far.got] == [60]
    out.acked(1, None)
    journal.commit_now()
    assert position(stream) == 3
    assert journal.query("SELECT seq, reason FROM loss") == [(1, "expired")]


def test_a_broker_that_can_not_take_it_now_gets_it_later(out: Outflow, journal: Journal) -> None:
    stream, far = fill(journal, "commands", 1), Far()
    far.away = True
    out.pump(far, 65535)
    assert position(stream) == 1
    far.away = False
    out.pump(far, 65535)
    assert far.bodies() == [b"commands 0"]


def test_a_bridge_that_is_no_more_holds_no_messages(out: Outflow, journal: Journal) -> None:
    assert release(journal, frozenset({"commands"})) == ["tables"]
    assert release(journal) == ["commands"]
    assert not any(CURSOR in stream.cursors for stream in journal.streams.values())


def test_what_the_hub_settles_unwritten_is_answered_to_the_broker_in_turn(journal: Journal) -> None:
    text = CONFIG.replace('address = "edge"\n', 'address = "edge"\nack = "disk-or-hub"\n')
    broker = Broker(loads(text, check_files=False), journal)
    stream = journal.streams["telemetry"]
    journal.hold(stream, True, 1.0)
    near = Near(journal, broker)
    near.receive(taken(1))  # still written, and seqs are reserved with it
    journal.commit_now()
    journal.advance(stream, stream.cursors["uplink"], stream.next_seq)
    journal.commit_now()
    near.receive(taken(2), taken(3))
    journal.turn(1.0)
    assert near.answered == [1]
    assert not journal.pending
    journal.advance(stream, stream.cursors["uplink"], stream.next_seq)
    journal.turn(1.0)
    assert near.answered == [1, 2, 3]
    near.receive(taken(4), taken(5, "alarm/door"))  # one batch of the bridge's, two streams: written
    journal.turn(1.0)
    journal.commit_now()
    assert near.answered == [1, 2, 3, 4, 5]
