"""Sessions as cursors: what a client that was away gets, and what it costs others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.amqp.message import Message
from gateway.broker import Broker
from gateway.config import loads
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


class Outlet:
    """A client that takes what it is given, within its window."""

    def __init__(self, window: int = 1000) -> None:
        self.window = window
        self.got: list[tuple[str, bytes, int, bool]] = []
        self.unacked: list[int] = []
        self.congested = False

    @property
    def window_left(self) -> int:
        return self.window - len(self.unacked)

    def publish(self, topic: str, message: Message, qos: int, dup: bool) -> int | None:
        self.got.append((topic, message.body, qos, dup))
        if not qos:
            return 0
        self.unacked.append(len(self.got))
        return len(self.got)

    def flush(self) -> None:
        pass


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.open(tmp_path)
    yield journal
    journal.close()


def broker_on(journal: Journal) -> Broker:
    return Broker(loads(CONFIG.format(state=journal.state_dir)), journal)


def arrive(broker: Broker, first: int, count: int) -> None:
    journal = broker.journal
    for n in range(first, first + count):
        route = broker.router.route("commands/x", 1)
        journal.append(journal.streams["commands"], "commands/x", route.encode, b"%d" % n)
    journal.begin()
    journal.commit()
    broker.committed(journal.committed())


def test_a_durable_session_gets_what_came_while_it_was_away_and_what_it_did_not_acknowledge_again_in_order(
    journal: Journal,
) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, present = broker.connect("app", False, None, outlet)
    assert not present
    broker.subscribe(session, [("commands/#", 1, 0, None)])
    arrive(broker, 0, 10)
    broker.acked(session, outlet.unacked[:4])
    broker.disconnect(session, outlet)
    arrive(broker, 10, 5)

    again = Outlet()
    session, present = broker.connect("app", False, None, again)
    assert present
    broker.pump(session)
    assert [int(body) for _, body, _, _ in again.got] == list(range(4, 15))
    assert [dup for *_, dup in again.got] == [True] * 6 + [False] * 5


def test_a_session_and_its_place_survive_a_restart(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = broker.connect("app", False, None, outlet)
    broker.subscribe(session, [("commands/#", 1, 0, None)])
    arrive(broker, 0, 10)
    broker.acked(session, outlet.unacked[:7])
    journal.close()

    journal = Journal.open(tmp_path)
    broker = broker_on(journal)
    outlet = Outlet()
    session, present = broker.connect("app", False, None, outlet)
    broker.pump(session)
    assert present
    assert [int(body) for _, body, _, _ in outlet.got] == [7, 8, 9]
    journal.close()


def test_a_slow_subscriber_holds_up_nobody_else(journal: Journal) -> None:
    broker = broker_on(journal)
    slow, quick = Outlet(window=1), Outlet(window=10_000)
    for name, outlet in (("slow", slow), ("quick", quick)):
        session, _ = broker.connect(name, True, 0, outlet)
        broker.subscribe(session, [("commands/#", 1, 0, None)])
    arrive(broker, 0, 500)
    assert (len(slow.got), len(quick.got)) == (1, 500)


def test_a_session_away_for_too_many_messages_is_moved_on_and_the_ledger_tells_which(journal: Journal) -> None:
    broker = broker_on(journal)
    outlet = Outlet()
    session, _ = broker.connect("app", False, None, outlet)
    broker.subscribe(session, [("commands/#", 1, 0, None)])
    broker.disconnect(session, outlet)
    arrive(broker, 0, 130)
    broker.trim_sessions()
    journal.commit_now()
    assert [seq for (seq,) in journal.query("SELECT seq FROM loss WHERE reason = 'session-limit'")] == list(
        range(1, 31)
    )
    session, _ = broker.connect("app", False, None, outlet)
    broker.pump(session)
    assert [int(body) for _, body, _, _ in outlet.got] == list(range(30, 130))


def test_a_session_that_ends_lets_go_of_what_only_it_held(journal: Journal) -> None:
    broker = broker_on(journal)
    keeper, away = Outlet(10_000), Outlet()
    session, _ = broker.connect("keeper", False, None, keeper)
    broker.subscribe(session, [("commands/#", 1, 0, None)])
    other, _ = broker.connect("away", False, None, away)
    broker.subscribe(other, [("commands/#", 1, 0, None)])
    broker.disconnect(other, away)
    arrive(broker, 0, 300)
    broker.acked(session, list(keeper.unacked))
    journal.commit_now()
    assert journal.streams["commands"].rows == 300
    broker.end(other)
    journal.commit_now()
    assert journal.streams["commands"].rows == 0
