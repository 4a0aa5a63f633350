"""Sessions as cursors: what a client that was away gets, and what it costs others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.amqp.message import ANNOTATION_RETAIN, Template, encode
from gateway.broker import Broker
from gateway.config import loads
from gateway.mqtt.delivery import Delivery
from gateway.mqtt.packets import Connect, PublishProperties, Reason, Will, WillProperties
from gateway.routing import filters_overlap
from gateway.sessions import PUMP_ROWS_MAX, Session
from storeforward.journal import Journal

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
session_max_messages = 100
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[inbound]]
stream = "commands"
hub = "depot"
address = "c"
topic = "commands/{{subject}}"
"""


@dataclass(frozen=True)
class Got:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int
    identifiers: tuple[int, ...]


class Outlet:
    """A client that takes what it is given, within its window."""

    def __init__(self, window: int = 1000, size_max: int = 1 << 20) -> None:
        self.window = window
        self.size_max = size_max
        self.got: list[Got] = []
        self.unacked: list[int] = []
        self.released: list[int] = []
        self.taken: set[int] = set()
        self.congested = False
        self.turns_owed = 0
        self.session: Session

    @property
    def window_left(self) -> int:
        return self.window - len(self.unacked)

    @property
    def payloads(self) -> list[bytes]:
        return [g.payload for g in self.got]

    def takes(self, delivery: Delivery, qos: int, identifiers: tuple[int, ...]) -> bool:
        return len(delivery.payload) <= self.size_max

    def in_use(self, packet_ids: Iterable[int]) -> None:
        self.taken.update(packet_ids)

    def reserve(self, qos: int, packet_id: int | None = None) -> int | None:
        if self.window_left <= 0:
            return None
        if packet_id is None:
            packet_id = next(n for n in range(1, 65536) if n not in self.taken)
        self.taken.add(packet_id)
        self.unacked.append(packet_id)
        return packet_id

    def deliver(
        self,
        delivery: Delivery,
        qos: int,
        retain: bool,
        identifiers: tuple[int, ...],
        dup: bool = False,
        packet_id: int | None = None,
    ) -> int | None:
        if qos and packet_id is None:
            packet_id = self.reserve(qos)
            if packet_id is None:
                return None
        self.got.append(Got(delivery.topic, delivery.payload, qos, retain, dup, packet_id or 0, identifiers))
        return packet_id or 0

    def pubrel(self, packet_ids: Iterable[int]) -> None:
        self.released.extend(packet_ids)

    def flush(self) -> None:
        pass

    def come_back(self) -> None:
        self.turns_owed += 1

    def owes(self) -> None:
        self.session.pump_due(1000)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.open(tmp_path)
    yield journal
    journal.close()


def broker_on(journal: Journal) -> Broker:
    return Broker(loads(CONFIG.format(state=journal.state_dir)), journal)


def commit(broker: Broker) -> None:
    """As the committer does it."""
    journal = broker.journal
    while journal.pending:
        journal.begin()
        journal.commit()
        broker.committed(journal.committed())


def come(
    broker: Broker,
    name: str,
    outlet: Outlet,
    *,
    clean: bool = False,
    expiry_s: int | None = None,
    will: Will | None = None,
) -> tuple[Session, bool]:
    """A client connects and is told so."""
    session, present, _ = broker.connect(Connect(5, name, clean, will=will), name, expiry_s, outlet)
    outlet.session = session
    commit(broker)
    broker.attach(session, outlet)
    commit(broker)
    return session, present


def subscribe_all(
    broker: Broker, session: Session, requests: list[tuple[str, int, int, int | None]]
) -> tuple[list[int], list[str]]:
    return broker.subscribe(session, requests, broker.starts(session, [filter_ for filter_, *_ in requests]))


def subscribe(
    broker: Broker, session: Session, filter_: str, qos: int = 1, options: int = 0, identifier: int | None = None
) -> list[int]:
    codes, retained = subscribe_all(broker, session, [(filter_, qos, options, identifier)])
    commit(broker)
    list(broker.owing(session, retained))
    commit(broker)
    broker.pump(session)
    commit(broker)
    return codes


def say(
    broker: Broker,
    topic: str,
    payload: bytes,
    qos: int = 1,
    *,
    retain: bool = False,
    source: Session | None = None,
    expiry_s: int | None = None,
) -> None:
    properties = None if expiry_s is None else PublishProperties(message_expiry_interval=expiry_s)
    broker.publish(topic, qos, retain, payload, properties, broker.journal.age_us(), source)
    commit(broker)


def answer(broker: Broker, session: Session, packet_ids: Iterable[int]) -> None:
    """PUBACK."""
    outlet = session.outlet
    assert isinstance(outlet, Outlet)
    ids = list(packet_ids)
    for packet_id in ids:
        outlet.unacked.remove(packet_id)
        outlet.taken.discard(packet_id)
    session.acked(ids)
    broker.answered(session)
    commit(broker)


def arrive(broker: Broker, first: int, count: int) -> None:
    journal = broker.journal
    for n in range(first, first + count):
        route = broker.router.route("commands/x", 1)
        journal.append(journal.streams["commands"], "commands/x", route.encode, b"%d" % n)
    commit(broker)


def test_a_durable_session_gets_what_came_while_it_was_away_and_what_it_did_not_acknowledge_again_in_order(
    journal: Journal,
) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, present = come(broker, "app", outlet)
    assert not present
    subscribe(broker, session, "commands/#")
    arrive(broker, 0, 10)
    answer(broker, session, outlet.unacked[:4])
    broker.disconnect(session, outlet)
    arrive(broker, 10, 5)

    again = Outlet()
    session, present = come(broker, "app", again)
    assert present
    assert [int(p) for p in again.payloads] == list(range(4, 15))
    assert [g.dup for g in again.got] == [True] * 6 + [False] * 5


def test_a_session_and_its_place_survive_a_restart(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "commands/#")
    arrive(broker, 0, 10)
    answer(broker, session, outlet.unacked[:7])
    journal.close()

    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    session, present = come(broker, "app", outlet)
    assert present
    assert [int(p) for p in outlet.payloads] == [7, 8, 9]
    journal.close()


def test_a_slow_subscriber_holds_up_nobody_else(journal: Journal) -> None:
    broker = broker_on(journal)
    slow, quick = Outlet(window=1), Outlet(window=10_000)
    for name, outlet in (("slow", slow), ("quick", quick)):
        session, _ = come(broker, name, outlet, clean=True, expiry_s=0)
        subscribe(broker, session, "commands/#")
    arrive(broker, 0, 500)
    assert (len(slow.got), len(quick.got)) == (1, 500)


def test_a_session_away_for_too_many_messages_is_moved_on_and_the_ledger_tells_which(journal: Journal) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "commands/#")
    broker.disconnect(session, outlet)
    arrive(broker, 0, 130)
    broker.trim_sessions()
    journal.commit_now()
    assert [seq for (seq,) in journal.query("SELECT seq FROM loss WHERE reason = 'session-limit'")] == list(
        range(1, 31)
    )
    session, _ = come(broker, "app", outlet)
    assert [int(p) for p in outlet.payloads] == list(range(30, 130))


def test_a_session_that_ends_lets_go_of_what_only_it_held(journal: Journal) -> None:
    broker = broker_on(journal)
    keeper, away = Outlet(10_000), Outlet()
    session, _ = come(broker, "keeper", keeper)
    subscribe(broker, session, "commands/#")
    other, _ = come(broker, "away", away)
    subscribe(broker, other, "commands/#")
    broker.disconnect(other, away)
    arrive(broker, 0, 300)
    answer(broker, session, list(keeper.unacked))
    journal.commit_now()
    assert journal.streams["commands"].rows == 300
    broker.end(other)
    journal.commit_now()
    assert journal.streams["commands"].rows == 0


# ------------------------------------------------------------------------------------------------ QoS 2


def test_a_message_of_qos_2_is_sent_only_once_its_packet_id_is_on_disk(journal: Journal) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a/#", 2)
    broker.publish("a/1", 2, False, b"x", None, 0)
    journal.begin()
    journal.commit()
    broker.committed(journal.committed())
    assert outlet.got == []
    assert outlet.unacked == [1]
    commit(broker)
    assert [(g.qos, g.packet_id) for g in outlet.got] == [(2, 1)]
    assert journal.query("SELECT packet_id, state FROM mqtt_outgoing") == [(1, 1)]


def test_qos_0_and_1_do_not_overtake_a_message_of_qos_2_that_waits_for_its_commit(journal: Journal) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a/#", 2)
    for n, qos in enumerate((1, 2, 0, 1, 2)):
        broker.publish("a/1", qos, False, b"%d" % n, None, 0)
    commit(broker)
    assert [(g.payload, g.qos) for g in outlet.got] == [(b"0", 1), (b"1", 2), (b"2", 0), (b"3", 1), (b"4", 2)]


@pytest.mark.parametrize("restart", [False, True], ids=["client comes back", "gateway restarts"])
@pytest.mark.parametrize("cut", ["before PUBREC", "after PUBREC", "after PUBCOMP"])
def test_a_message_of_qos_2_is_delivered_once_whatever_was_cut(tmp_path: Path, cut: str, restart: bool) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a/#", 2)
    say(broker, "a/1", b"first", 1)
    say(broker, "a/1", b"exact", 2)
    (held, exact) = outlet.got
    if cut != "before PUBREC":
        session.received([exact.packet_id])
        assert outlet.released == []
        commit(broker)
        assert outlet.released == [exact.packet_id]
    if cut == "after PUBCOMP":
        answer(broker, session, [exact.packet_id])  # the first one holds the cursor back all the same
    if restart:
        journal.close()
        journal = Journal.open(tmp_path)
        broker = broker_on(journal)
    else:
        broker.disconnect(session, outlet)
    again = Outlet()
    session, present = come(broker, "app", again)
    assert present
    sent_again = [(g.payload, g.dup) for g in again.got if g.payload == b"exact"]
    if cut == "before PUBREC":
        assert sent_again == [(b"exact", True)]
        assert [g.packet_id for g in again.got if g.payload == b"exact"] == [exact.packet_id]
    else:
        assert sent_again == []
    assert again.released == ([exact.packet_id] if cut == "after PUBREC" else [])
    assert [g.payload for g in again.got if g.qos == 1] == [held.payload]
    # When all is answered nothing of it is left.
    if cut == "before PUBREC":
        session.received([exact.packet_id])
        commit(broker)
    if cut != "after PUBCOMP":
        session.acked([exact.packet_id])
    session.acked([g.packet_id for g in again.got if g.qos == 1])
    commit(broker)
    assert journal.query("SELECT * FROM mqtt_outgoing") == []
    assert session.feeds[broker.local].cursor.position == broker.local.next_seq
    journal.close()


def test_ids_of_qos_2_that_came_in_are_remembered_with_their_message_and_forgotten_when_released(
    tmp_path: Path,
) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    session, _ = come(broker, "app", Outlet())
    assert session.take_in(7, 1)
    assert not session.take_in(7, 1)
    assert session.repeats(7, 2, dup=True)
    assert session.repeats(7, 1, dup=False)  # some clients forget DUP
    assert not session.repeats(7, 2, dup=False)
    commit(broker)
    journal.close()
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    session, _ = come(broker, "app", Outlet())
    assert session.repeats(7, 1, dup=True)
    assert not session.repeats(7, 1, dup=False)
    assert not session.take_in(7, 1)
    assert session.let_go(7)
    assert not session.let_go(7)
    commit(broker)
    assert journal.query("SELECT * FROM mqtt_incoming") == []
    journal.close()


# ------------------------------------------------------------------------------------------------ retained


def test_a_new_subscriber_is_given_what_is_retained_and_the_newest_only(journal: Journal) -> None:
    broker = broker_on(journal)
    for payload in (b"old", b"new"):
        say(broker, "state/door", payload, retain=True)
    say(broker, "state/light", b"on", qos=0, retain=True)
    say(broker, "state/gone", b"x", retain=True)
    say(broker, "state/gone", b"", retain=True)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet, clean=True, expiry_s=0)
    subscribe(broker, session, "state/+")
    assert [(g.topic, g.payload, g.qos, g.retain) for g in outlet.got] == [
        ("state/door", b"new", 1, True),
        ("state/light", b"on", 0, True),
    ]
    say(broker, "state/door", b"live", retain=True)
    assert [(g.payload, g.retain) for g in outlet.got[2:]] == [(b"live", False)]


@pytest.mark.parametrize("expiry_s", [0, None])
def test_what_is_retained_on_a_hubs_stream_is_given_to_who_begins_to_read_it(
    journal: Journal, expiry_s: int | None
) -> None:
    broker = broker_on(journal)
    first = Outlet()
    session, _ = come(broker, "first", first, expiry_s=expiry_s)
    subscribe(broker, session, "commands/#")
    stream = journal.streams["commands"]
    template = Template("depot", 1, "s", None, "x", annotations={ANNOTATION_RETAIN: True})
    seq = journal.append(stream, "commands/x", template.encode, b"kept")
    broker.retain_received(stream, seq, "commands/x", template.encode(seq, b"kept"), None)
    commit(broker)
    assert first.payloads == [b"kept"]
    late = Outlet()
    session, _ = come(broker, "late", late, expiry_s=expiry_s)
    subscribe(broker, session, "commands/#")
    arrive(broker, 0, 1)
    assert [(g.payload, g.retain) for g in late.got] == [(b"kept", True), (b"0", False)]


def test_what_is_held_for_a_first_reader_comes_once_though_it_is_retained_too(journal: Journal) -> None:
    broker = broker_on(journal)
    stream = journal.streams["commands"]
    template = Template("depot", 1, "s", None, "x", annotations={ANNOTATION_RETAIN: True})
    seq = journal.append(stream, "commands/x", template.encode, b"kept")
    broker.retain_received(stream, seq, "commands/x", template.encode(seq, b"kept"), None)
    commit(broker)
    first = Outlet()
    session, _ = come(broker, "first", first)
    subscribe(broker, session, "commands/#")
    assert first.payloads == [b"kept"]


def test_retained_messages_survive_a_restart_and_expire_in_their_time(tmp_path: Path) -> None:
    now = 1000.0
    journal = Journal.open(tmp_path, clock=lambda: now)
    broker = broker_on(journal)
    say(broker, "a", b"stays", retain=True)
    say(broker, "b", b"goes", retain=True, expiry_s=10)
    journal.close()
    journal = Journal.open(tmp_path, clock=lambda: now)
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "#")
    assert outlet.payloads == [b"stays", b"goes"]
    now += 11
    assert broker.retained.expire(journal.age_us()) == 1
    later = Outlet()
    other, _ = come(broker, "other", later)
    subscribe(broker, other, "#")
    assert later.payloads == [b"stays"]
    journal.close()


def test_one_retained_message_too_many_is_in_the_ledger_whoever_sent_it(journal: Journal) -> None:
    broker = broker_on(journal)
    broker.retained.messages_max = 1
    say(broker, "a", b"kept", retain=True)
    say(broker, "b", b"local", retain=True)
    body = encode(b"hub", message_id="1", annotations={ANNOTATION_RETAIN: True})
    stream = journal.streams["commands"]
    seq = journal.append(stream, "commands/x", lambda seq, payload: payload, body)
    broker.retain_received(stream, seq, "commands/x", body, None)
    commit(broker)
    assert journal.query("SELECT stream, reason, detail FROM loss ORDER BY id") == [
        ("local", "retained-full", "b"),
        ("commands", "retained-full", "commands/x"),
    ]
    assert [m.topic for some in broker.retained.matching("#", journal.age_us()) for m in some] == ["a"]


@pytest.mark.parametrize(("handling", "first", "second"), [(0, 1, 1), (1, 1, 0), (2, 0, 0)])
def test_retain_handling_decides_what_a_subscription_is_given(
    journal: Journal, handling: int, first: int, second: int
) -> None:
    broker = broker_on(journal)
    say(broker, "a", b"x", retain=True)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a", options=handling << 2)
    assert len(outlet.got) == first
    subscribe(broker, session, "a", options=handling << 2)
    assert len(outlet.got) == first + second


def test_retained_messages_owed_to_a_durable_session_survive_a_restart(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    for n in range(3):
        say(broker, f"s/{n}", b"%d" % n, retain=True)
    outlet = Outlet(window=1)
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "s/#")
    assert outlet.payloads == [b"0"]
    journal.close()
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    again = Outlet()
    come(broker, "app", again)
    assert again.payloads == [b"0", b"1", b"2"]
    assert all(g.retain for g in again.got)
    journal.close()


def test_retain_as_published_and_no_local(journal: Journal) -> None:
    broker = broker_on(journal)
    plain, kept = Outlet(), Outlet()
    one, _ = come(broker, "one", plain)
    two, _ = come(broker, "two", kept)
    subscribe(broker, one, "a")
    subscribe(broker, two, "a", options=2 | 1)
    say(broker, "a", b"x", retain=True, source=one)
    say(broker, "a", b"own", source=two)
    assert [(g.payload, g.retain) for g in plain.got] == [(b"x", False), (b"own", False)]
    assert [(g.payload, g.retain) for g in kept.got] == [(b"x", True)]


# ------------------------------------------------------------------------------------------------ wills


def test_a_will_is_published_after_its_delay_unless_the_client_is_back_or_said_goodbye(tmp_path: Path) -> None:
    now = 1000.0
    journal = Journal.open(tmp_path, clock=lambda: now)
    broker = broker_on(journal)
    asked: list[float] = []
    broker.schedule = asked.append
    watch = Outlet()
    watcher, _ = come(broker, "watcher", watch)
    subscribe(broker, watcher, "will/#")
    will = Will("will/a", b"gone", 1, properties=WillProperties(will_delay_interval=5))
    outlet = Outlet()
    session, _ = come(broker, "a", outlet, will=will)
    broker.disconnect(session, outlet)
    assert asked[-1] == pytest.approx(5)
    session, present = come(broker, "a", outlet, will=will)
    assert present
    now += 10
    broker.run_due()
    commit(broker)
    assert watch.got == []  # it was back in time
    broker.disconnect(session, outlet, clean=True)
    now += 10
    broker.run_due()
    commit(broker)
    assert watch.got == []  # it said goodbye
    session, _ = come(broker, "a", outlet, will=will)
    broker.disconnect(session, outlet)
    now += 4
    broker.run_due()
    commit(broker)
    assert watch.got == []
    now += 2
    broker.run_due()
    commit(broker)
    assert watch.payloads == [b"gone"]
    journal.close()


def test_a_will_is_published_after_a_restart_when_the_power_went_out_under_its_client(tmp_path: Path) -> None:
    now = 1000.0
    journal = Journal.open(tmp_path, clock=lambda: now)
    broker = broker_on(journal)
    come(broker, "a", Outlet(), clean=True, expiry_s=0, will=Will("will/a", b"gone", 1, True))
    watcher, _ = come(broker, "watcher", Outlet())
    subscribe(broker, watcher, "will/#")
    journal.close()
    journal = Journal.open(tmp_path, clock=lambda: now)
    broker = broker_on(journal)
    watch = Outlet()
    come(broker, "watcher", watch)
    now += 3.1
    broker.run_due()
    commit(broker)
    assert watch.payloads == [b"gone"]
    assert broker.retained.get("will/a") is not None
    assert journal.query("SELECT * FROM mqtt_will") == []
    journal.close()


def test_a_will_does_not_wait_longer_than_its_session(journal: Journal) -> None:
    broker = broker_on(journal)
    watch = Outlet()
    watcher, _ = come(broker, "watcher", watch)
    subscribe(broker, watcher, "will/#")
    will = Will("will/a", b"gone", 1, properties=WillProperties(will_delay_interval=1000))
    outlet = Outlet()
    session, _ = come(broker, "a", outlet, clean=True, expiry_s=0, will=will)
    broker.disconnect(session, outlet)
    commit(broker)
    assert watch.payloads == [b"gone"]


# ------------------------------------------------------------------------------------------------ subscriptions


def test_overlapping_subscriptions_give_one_delivery_at_the_highest_qos_with_every_identifier(
    journal: Journal,
) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a/#", 0, identifier=3)
    subscribe(broker, session, "a/+", 2, identifier=9)
    subscribe(broker, session, "b", 1, identifier=4)
    say(broker, "a/x", b"1", 2)
    assert [(g.qos, sorted(g.identifiers)) for g in outlet.got] == [(2, [3, 9])]


def test_what_was_said_before_a_subscription_is_not_for_it(journal: Journal) -> None:
    broker = broker_on(journal)
    first, second = Outlet(), Outlet()
    one, _ = come(broker, "one", first, clean=True, expiry_s=0)
    subscribe(broker, one, "a")
    say(broker, "a", b"before")
    broker.end(one)
    commit(broker)
    two, _ = come(broker, "two", second, clean=True, expiry_s=0)
    subscribe(broker, two, "a")
    say(broker, "a", b"after")
    assert second.payloads == [b"after"]


def test_a_message_under_way_is_finished_although_its_subscription_is_gone(journal: Journal) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a", 1)
    say(broker, "a", b"x", 1)
    broker.unsubscribe(session, ["a"])
    commit(broker)
    broker.disconnect(session, outlet)
    again = Outlet()
    come(broker, "app", again)
    assert [(g.payload, g.dup) for g in again.got] == [(b"x", True)]


def test_members_of_a_shared_subscription_share_and_what_one_leaves_the_others_get(journal: Journal) -> None:
    broker = broker_on(journal)
    outlets = [Outlet(), Outlet()]
    sessions = []
    for n, outlet in enumerate(outlets):
        session, _ = come(broker, f"worker-{n}", outlet)
        assert subscribe(broker, session, "$share/crew/jobs/#", 2) == [1]
        sessions.append(session)
    for n in range(100):
        say(broker, "jobs/x", b"%d" % n)
    shares = [{int(p) for p in o.payloads} for o in outlets]
    assert shares[0] | shares[1] == set(range(100))
    assert not shares[0] & shares[1]
    assert min(map(len, shares)) > 20
    answer(broker, sessions[1], list(outlets[1].unacked))
    broker.disconnect(sessions[0], outlets[0])
    commit(broker)
    assert {int(p) for p in outlets[1].payloads} == set(range(100))
    answer(broker, sessions[1], list(outlets[1].unacked))
    (cursor,) = [c for c in broker.local.cursors.values() if c.name.startswith("share:")]
    assert cursor.position == broker.local.next_seq


def test_a_shared_subscription_keeps_what_comes_while_nobody_is_there(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "worker", outlet)
    subscribe(broker, session, "$share/crew/jobs/#")
    broker.disconnect(session, outlet)
    say(broker, "jobs/x", b"1")
    journal.close()
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    again = Outlet()
    come(broker, "worker", again)
    assert again.payloads == [b"1"]
    journal.close()


def test_a_message_the_client_does_not_take_is_passed_over_and_in_the_ledger(journal: Journal) -> None:
    broker = broker_on(journal)
    outlet = Outlet(size_max=10)
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "a")
    say(broker, "a", bytes(11))
    say(broker, "a", b"small")
    assert outlet.payloads == [b"small"]
    assert journal.query("SELECT reason FROM loss") == [("larger-than-client-takes",)]
    answer(broker, session, outlet.unacked.copy())
    assert session.feeds[broker.local].cursor.position == broker.local.next_seq


def test_sessions_that_want_nothing_of_it_do_not_hold_a_stream(journal: Journal) -> None:
    broker = broker_on(journal)
    reader, idle, away = Outlet(100_000), Outlet(), Outlet()
    session, _ = come(broker, "reader", reader)
    subscribe(broker, session, "busy/#")
    other, _ = come(broker, "idle", idle)
    subscribe(broker, other, "quiet/#")
    gone, _ = come(broker, "away", away)
    subscribe(broker, gone, "silent/#")
    broker.disconnect(gone, away)
    for n in range(600):
        broker.publish("busy/x", 1, False, b"%d" % n, None, 0)
    commit(broker)
    answer(broker, session, reader.unacked.copy())
    broker.caught_up()
    journal.write_cursors()
    commit(broker)
    assert broker.local.rows == 0


def test_a_message_of_qos_2_goes_again_after_a_restart_as_its_subscription_asks(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    session, _ = come(broker, "app", Outlet())
    subscribe(broker, session, "a/#", 2, options=2, identifier=7)
    say(broker, "a/x", b"1", 2, retain=True)
    journal.close()
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    come(broker, "app", outlet)
    assert [(g.payload, g.qos, g.retain, g.dup, g.identifiers) for g in outlet.got] == [(b"1", 2, True, True, (7,))]
    journal.close()


def test_a_reader_with_much_to_pass_over_comes_back_until_it_has_what_it_wants(journal: Journal) -> None:
    """Its socket was full for a while; when it takes more again, nobody else would wake the session."""
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe(broker, session, "wanted")
    other, _ = come(broker, "other", Outlet(window=0))  # for it, what nobody else wants is kept
    subscribe(broker, other, "noise")
    outlet.congested = True
    say(broker, "wanted", b"1")
    for _ in range(3 * PUMP_ROWS_MAX):
        broker.publish("noise", 1, False, b"", None, journal.age_us(), None)
    say(broker, "wanted", b"2")
    outlet.congested = False
    broker.pump(session)
    turns = 0
    while outlet.turns_owed:
        outlet.turns_owed -= 1
        turns += 1
        broker.pump(session)
    assert outlet.payloads == [b"1", b"2"]
    assert turns < 20


def test_what_is_held_for_a_first_reader_is_there_for_every_filter_of_its_first_subscribe(journal: Journal) -> None:
    broker = broker_on(journal)
    for topic in ("commands/a", "commands/b"):
        journal.append(journal.streams["commands"], topic, broker.router.route(topic, 1).encode, topic.encode())
    commit(broker)
    outlet = Outlet()
    session, _ = come(broker, "app", outlet)
    subscribe_all(broker, session, [("commands/a", 1, 0, None), ("commands/b", 1, 0, None)])
    commit(broker)
    broker.pump(session)
    assert outlet.payloads == [b"commands/a", b"commands/b"]


def test_a_subscribe_with_a_thousand_filters_looks_at_each_filter_a_fixed_number_of_times(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0

    def counted(one: str, other: str) -> bool:
        nonlocal looked
        looked += 1
        return filters_overlap(one, other)

    monkeypatch.setattr("gateway.broker.filters_overlap", counted)
    broker = broker_on(journal)
    session, _ = come(broker, "app", Outlet())
    subscribe_all(broker, session, [(f"f/{n}", 1, 0, None) for n in range(1000)])
    assert looked <= 1000 * 2 * len(journal.streams)


def test_no_local_counts_as_long_as_one_subscription_asks_for_it(journal: Journal) -> None:
    broker = broker_on(journal)
    session, _ = come(broker, "app", Outlet())
    subscribe(broker, session, "x", options=1)
    subscribe(broker, session, "x", options=1)
    subscribe(broker, session, "y")
    assert session.no_local
    subscribe(broker, session, "x")
    assert not session.no_local
    subscribe(broker, session, "y", options=1)
    broker.unsubscribe(session, ["x", "y"])
    assert not session.no_local


def test_a_session_that_has_all_the_subscriptions_it_may_have_is_refused_new_ones_and_may_change_old_ones(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.broker.SUBSCRIPTIONS_MAX", 2)
    broker = broker_on(journal)
    session, _ = come(broker, "app", Outlet())
    codes, _ = subscribe_all(broker, session, [(name, 1, 0, None) for name in ("a", "b", "c")])
    assert codes == [1, 1, Reason.QUOTA_EXCEEDED]
    assert subscribe(broker, session, "a", 0) == [0]
    broker.unsubscribe(session, ["b"])
    assert subscribe(broker, session, "c") == [1]
    assert list(session.subscriptions) == ["a", "c"]
