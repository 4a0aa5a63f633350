"""Two engines back to back, without sockets: each test is a trace of what one does and the other sees."""

from __future__ import annotations

import gc
import math
import struct
from typing import Any, TypeVar

import proton
import pytest

from gateway.amqp import raw
from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import (
    DECODE_ERROR,
    MESSAGE_SIZE_EXCEEDED,
    NOT_ALLOWED,
    NOT_IMPLEMENTED,
    RESOURCE_LIMIT_EXCEEDED,
    TRANSFER_LIMIT_EXCEEDED,
    Authenticated,
    Credit,
    Deliveries,
    Event,
    Failed,
    LinkAttached,
    LinkClosed,
    Opened,
    Outcome,
    OutcomeKind,
    RemoteClosed,
    Role,
    SessionClosed,
    Settled,
    SettleMode,
)
from gateway.amqp.sasl import AMQP_HEADER, SaslClient, SaslServer
from gateway.amqp.termini import Durability, Expiry, Terminus
from tests import attacks

NOW = 100.0
E = TypeVar("E")


class Pair:
    """A client and a server engine and everything they were told."""

    def __init__(self, client: Engine | None = None, server: Engine | None = None) -> None:
        self.client = client or Engine(server=False, container="loco")
        self.server = server or Engine(server=True, container="depot")
        self.heard: dict[Engine, list[Event]] = {self.client: [], self.server: []}

    def run(self, now: float = NOW) -> None:
        """Carry bytes until both are silent."""
        for _ in range(10_000):
            up, down = self.client.data_to_send(), self.server.data_to_send()
            self.heard[self.client] += self.client.take_events()
            self.heard[self.server] += self.server.take_events()
            if not up and not down:
                return
            if up:
                self.heard[self.server] += self.server.receive(up, now)
            if down:
                self.heard[self.client] += self.client.receive(down, now)
        raise AssertionError("the engines never fall silent")

    def events(self, engine: Engine, kind: type[E]) -> list[E]:
        """Take the events of one kind that this engine gave so far; all the others are forgotten."""
        events, self.heard[engine] = self.heard[engine], []
        return [event for event in events if isinstance(event, kind)]

    def open(self) -> None:
        self.client.open()
        self.run()
        self.server.open()
        self.run()

    def link_to_server(self, credit: int = 100, max_message_bytes: int = 0) -> tuple[Sender, Receiver]:
        """A link on which the client sends."""
        self.open()
        sender = self.client.sender(self.client.session(), "alarms", Terminus("edge.alarms"))
        self.run()
        receiver = self.events(self.server, LinkAttached)[0].link
        assert isinstance(receiver, Receiver)
        receiver.confirm(max_message_bytes=max_message_bytes)
        receiver.topup(credit)
        self.run()
        return sender, receiver

    def received(self) -> list[tuple[int, bytes]]:
        return [pair for event in self.events(self.server, Deliveries) for pair in event.batch]


def test_open_tells_each_side_about_the_other() -> None:
    pair = Pair(
        Engine(server=False, container="loco", hostname="hub.example", properties={"product": "lineside"}),
        Engine(server=True, container="depot", offered_capabilities=["ANONYMOUS-RELAY", "x"], idle_timeout_s=20),
    )
    pair.open()
    [opened] = pair.events(pair.server, Opened)
    assert (opened.container, opened.hostname) == ("loco", "hub.example")
    assert opened.properties == {"product": "lineside"}
    [opened] = pair.events(pair.client, Opened)
    assert opened.container == "depot"
    assert opened.capabilities == ("ANONYMOUS-RELAY", "x")
    assert opened.idle_timeout_s == 10


def test_ten_thousand_messages_arrive_in_order_and_are_settled_in_order() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server(credit=500)
    seq, got, settled = 0, [], []
    while len(got) < 10_000:
        batch = [(seq + i, b"%d" % (seq + i)) for i in range(min(sender.capacity, 10_000 - seq))]
        seq += len(batch)
        sender.send(batch)
        pair.run()
        arrived = pair.received()
        got += [body for _, body in arrived]
        receiver.accept([handle for handle, _ in arrived])
        receiver.topup(500)
        pair.run()
        settled += sender.take_outcomes()
    assert got == [b"%d" % i for i in range(10_000)]
    assert all(outcome.kind is OutcomeKind.ACCEPTED for outcome in settled)
    assert sum(outcome.count for outcome in settled) == 10_000
    assert settled[-1].seq == 9_999
    assert sender.unsettled == receiver.unsettled == 0


def test_outcomes_come_in_order_and_only_accepted_ones_are_collapsed() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.send([(seq, b"m") for seq in range(10, 18)])
    pair.run()
    handles = [handle for handle, _ in pair.received()]
    # The last first: nothing may be reported before what was sent earlier.
    receiver.accept([handles[7]])
    receiver.modify(handles[5], delivery_failed=True, undeliverable_here=True)
    receiver.release(handles[4])
    pair.run()
    assert sender.take_outcomes() == []
    receiver.reject(handles[3], "amqp:precondition-failed", "too blue")
    receiver.accept(handles[:3])
    receiver.accept([handles[6]])
    pair.run()
    assert sender.take_outcomes() == [
        Outcome(OutcomeKind.ACCEPTED, 12, 3),
        Outcome(OutcomeKind.REJECTED, 13, 1, "amqp:precondition-failed", "too blue"),
        Outcome(OutcomeKind.RELEASED, 14),
        Outcome(OutcomeKind.MODIFIED, 15, delivery_failed=True, undeliverable_here=True),
        Outcome(OutcomeKind.ACCEPTED, 17, 2),
    ]
    assert pair.events(pair.client, Settled)


def test_in_any_order_no_outcome_waits_for_another() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.any_order()
    sender.send([(seq, b"m") for seq in range(10, 18)])
    pair.run()
    handles = [handle for handle, _ in pair.received()]
    receiver.accept([handles[7]])
    receiver.modify(handles[5], delivery_failed=True)
    pair.run()
    assert sender.take_outcomes() == [
        Outcome(OutcomeKind.MODIFIED, 15, 1, None, None, True),
        Outcome(OutcomeKind.ACCEPTED, 17),
    ]
    assert sender.unsettled == 6
    receiver.accept([handles[0], handles[1], handles[3]])
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 11, 2), Outcome(OutcomeKind.ACCEPTED, 13)]
    receiver.accept([handles[2], handles[4], handles[6]])
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 16, 3)]
    assert sender.unsettled == 0
    sender.send([(18, b"m")])
    pair.run()
    assert len(pair.received()) == 1


def test_the_credit_bounds_what_may_be_sent() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server(credit=3)
    assert [event.sender for event in pair.events(pair.client, Credit)] == [sender]
    assert sender.capacity == 3
    with pytest.raises(AssertionError):
        sender.send([(seq, b"m") for seq in range(4)])
    sender.send([(seq, b"m") for seq in range(3)])
    assert sender.capacity == 0
    pair.run()
    handles = [handle for handle, _ in pair.received()]
    receiver.topup(3)  # three are still unsettled: no more
    pair.run()
    assert sender.capacity == 0
    receiver.accept(handles)
    receiver.topup(3)
    pair.run()
    assert sender.capacity == 3


def test_a_message_of_eight_megabytes_passes_and_keeps_its_place() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    big = bytes(range(256)) * 32768
    sender.send([(1, b"before"), (2, big), (3, b"after")])
    assert sender.unsettled == 3
    pair.run()
    arrived = pair.received()
    assert [len(body) for _, body in arrived] == [6, 8 << 20, 5]
    assert arrived[1][1] == big
    receiver.accept([handle for handle, _ in arrived])
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 3, 3)]


def test_output_is_given_in_bounded_pieces() -> None:
    pair = Pair()
    sender, _ = pair.link_to_server()
    sender.send([(1, bytes(8 << 20))])
    piece = pair.client.data_to_send(100_000)
    assert 0 < len(piece) < 300_000


def test_a_message_beyond_our_limit_detaches_the_link_and_no_other() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server(max_message_bytes=1000)
    assert sender.peer_max_message_bytes == 1000
    sender.send([(1, b"x" * 1000), (2, b"x" * 1001), (3, b"x")])
    pair.run()
    assert [event.condition for event in pair.events(pair.client, LinkClosed)] == [MESSAGE_SIZE_EXCEEDED]
    heard = pair.heard[pair.server]
    assert [len(body) for event in heard if isinstance(event, Deliveries) for _, body in event.batch] == [1000]
    assert [event.link for event in heard if isinstance(event, LinkClosed)] == [receiver]
    other = pair.client.sender(pair.client.session(), "other", Terminus("q"))
    pair.run()
    assert other.alive
    assert pair.events(pair.server, LinkAttached)[0].name == "other"


def test_answers_are_taken_after_a_close_in_the_middle_of_a_large_message() -> None:
    """Asked for the rest of it, the link has none to give; what the peer still settles is no surprise."""
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.send([(1, b"small")])
    assert sender.send_part(2, b"x" * 3000, 1000) == 1000
    pair.run()
    [(handle, body)] = pair.received()
    assert body == b"small"
    pair.client.close()
    assert sender.feed(1000) == 0
    assert (sender.feeding, sender.unsettled) == (False, 2)
    receiver.accept([handle])
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 1)]


def test_a_large_message_beyond_our_limit_is_cut_off_early() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server(max_message_bytes=100_000)
    sender.send([(1, bytes(8 << 20))])
    pair.run()
    assert not receiver.alive
    assert not sender.alive
    assert [event.condition for event in pair.events(pair.client, LinkClosed)] == [MESSAGE_SIZE_EXCEEDED]


def test_a_peer_that_sends_beyond_its_credit_loses_the_link() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server(credit=1)
    raw.send(sender._pointer, [(seq, b"m") for seq in range(5)], sender._window)
    # proton itself keeps to the credit, so pretend that less was given.
    receiver._granted = 0
    pair.run()
    assert [event.condition for event in pair.events(pair.client, LinkClosed)] == [TRANSFER_LIMIT_EXCEEDED]
    assert pair.received() == []


def test_presettled_messages_count_as_accepted_when_sent() -> None:
    pair = Pair()
    pair.open()
    sender = pair.client.sender(pair.client.session(), "fast", Terminus("q"), settle_mode=SettleMode.SETTLED)
    pair.run()
    receiver = pair.events(pair.server, LinkAttached)[0].link
    assert isinstance(receiver, Receiver)
    receiver.confirm()
    receiver.topup(10)
    pair.run()
    sender.send([(1, b"a"), (2, b"b")])
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 2, 2)]
    pair.run()
    arrived = pair.received()
    assert [body for _, body in arrived] == [b"a", b"b"]
    receiver.accept([handle for handle, _ in arrived])
    pair.run()
    assert sender.unsettled == receiver.unsettled == 0


def test_a_receiver_that_settles_second_is_told_so_and_hears_the_settlement() -> None:
    pair = Pair()
    pair.open()
    receiver = pair.client.receiver(pair.client.session(), "commands", Terminus("edge.commands"), credit=10)
    receiver._link.rcv_settle_mode = proton.Link.RCV_SECOND
    pair.run()
    sender = pair.events(pair.server, LinkAttached)[0].link
    assert isinstance(sender, Sender)
    sender.confirm()
    pair.run()
    assert receiver._link.remote_rcv_settle_mode == proton.Link.RCV_SECOND
    sender.send([(1, b"one"), (2, b"two")])
    pair.run()
    first, second = receiver._pending.values()
    for delivery in (first, second):
        raw.lib.pn_delivery_update(delivery, raw.ACCEPTED)
        pair.client._produced()
        assert not raw.settled(delivery)
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 2, 2)]
    assert raw.settled(first)
    assert raw.settled(second)
    assert sender.unsettled == 0


def test_as_a_receiver_we_settle_first_whatever_is_asked_for() -> None:
    pair = Pair()
    pair.open()
    sender = pair.client.sender(pair.client.session(), "alarms", Terminus("edge.alarms"))
    sender._link.rcv_settle_mode = proton.Link.RCV_SECOND
    pair.run()
    pair.events(pair.server, LinkAttached)[0].link.confirm()
    pair.run()
    assert sender._link.remote_rcv_settle_mode == proton.Link.RCV_FIRST


def test_settled_without_an_outcome_is_unknown() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.send([(7, b"m")])
    pair.run()
    [(handle, _)] = pair.received()
    raw.settle(receiver._pending.pop(handle))
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.UNKNOWN, 7)]


def test_drain_is_answered_by_giving_the_credit_back() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server(credit=0)
    receiver._link.drain(5)
    receiver._granted = 5
    pair.run()
    assert sender.draining
    assert pair.events(pair.client, Credit)
    sender.send([(1, b"last")])
    assert sender.drained() == 4
    pair.run()
    assert sender.capacity == 0
    assert len(pair.received()) == 1


def test_termini_arrive_as_they_were_asked_for() -> None:
    pair = Pair()
    pair.open()
    asked = Terminus("telemetry", Durability.UNSETTLED_STATE, Expiry.NEVER, 3600, capabilities=("queue", "x"))
    receiver = pair.client.receiver(pair.client.session(), "sub-1", asked, credit=5)
    pair.run()
    [attached] = pair.events(pair.server, LinkAttached)
    assert (attached.by_peer, attached.name, attached.role) == (True, "sub-1", Role.SENDER)
    assert attached.source == asked
    attached.link.confirm()
    pair.run()
    [confirmed] = pair.events(pair.client, LinkAttached)
    assert confirmed.link is receiver
    assert confirmed.source == asked
    assert isinstance(attached.link, Sender)
    assert attached.link.capacity == 5


def test_a_dynamic_source_gets_the_address_that_the_server_made() -> None:
    pair = Pair()
    pair.open()
    pair.client.receiver(pair.client.session(), "reply", Terminus(dynamic=True))
    pair.run()
    [attached] = pair.events(pair.server, LinkAttached)
    assert attached.source is not None
    assert attached.source.dynamic
    attached.link.confirm(source=Terminus("made-up-1", dynamic=True))
    pair.run()
    [confirmed] = pair.events(pair.client, LinkAttached)
    assert confirmed.source is not None
    assert confirmed.source.address == "made-up-1"


@pytest.mark.parametrize("sending", [True, False])
def test_a_refused_link_is_never_reported_as_attached(sending: bool) -> None:
    pair = Pair()
    pair.open()
    session = pair.client.session()
    make = pair.client.sender if sending else pair.client.receiver
    link = make(session, "alarms", Terminus("secret"))
    pair.run()
    pair.events(pair.server, LinkAttached)[0].link.refuse("amqp:unauthorized-access", "not yours")
    pair.run()
    heard = pair.heard[pair.client]
    assert not [event for event in heard if isinstance(event, LinkAttached)]
    [closed] = [event for event in heard if isinstance(event, LinkClosed)]
    assert closed == LinkClosed(link, "amqp:unauthorized-access", "not yours", False, True)


def test_a_transaction_coordinator_is_refused_without_asking() -> None:
    pair = Pair()
    pair.open()
    link = pair.client.sender(pair.client.session(), "txn", Terminus())
    link._link.target.type = 3
    pair.run()
    assert pair.events(pair.server, LinkAttached) == []
    [closed] = pair.events(pair.client, LinkClosed)
    assert closed.condition == NOT_IMPLEMENTED


def test_outcomes_known_before_a_link_closes_are_still_told_and_the_rest_is_forgotten() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.send([(1, b"a"), (2, b"b")])
    pair.run()
    handles = [handle for handle, _ in pair.received()]
    receiver.accept(handles[:1])
    receiver.close("amqp:resource-deleted", "gone")
    pair.run()
    heard = pair.heard[pair.client]
    kinds = [type(event) for event in heard if isinstance(event, Settled | LinkClosed)]
    assert kinds == [Settled, LinkClosed]
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 1)]
    assert sender.unsettled == 0
    assert not sender.alive


def test_a_detached_link_says_that_its_terminus_stays() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    receiver.close(detach=True)
    pair.run()
    assert [event.detached for event in pair.events(pair.client, LinkClosed)] == [True]
    again = pair.client.sender(pair.client.session(), sender.name, Terminus("edge.alarms"))
    pair.run()
    assert again.alive


def test_a_session_that_ends_takes_its_links_along_but_not_the_connection() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    receiver.session.close()
    pair.run()
    kinds = [type(event) for event in pair.heard[pair.client] if isinstance(event, LinkClosed | SessionClosed)]
    assert kinds == [LinkClosed, SessionClosed]
    assert not sender.alive
    assert not receiver.alive
    sender.send([(1, b"into the void")])
    assert not pair.client.closing


def test_both_sides_are_finished_once_both_closes_are_exchanged() -> None:
    pair = Pair()
    pair.open()
    pair.client.close("amqp:connection:forced", "maintenance")
    assert not pair.client.finished
    pair.run()
    assert pair.events(pair.server, RemoteClosed) == [RemoteClosed("amqp:connection:forced", "maintenance")]
    assert pair.client.finished
    assert pair.server.finished


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (
            {proton.symbol("port"): proton.uint(5671), proton.symbol("network-host"): "b.example"},
            "not here (network-host: b.example, port: 5671)",
        ),
        ({proton.symbol("network-host"): "b" * 1000}, f"not here (network-host: {'b' * 486})"),
        ({}, "not here"),
        (None, "not here"),
    ],
)
def test_where_a_peer_redirects_us_to_stands_in_its_words(info: dict[object, object] | None, told: str) -> None:
    pair = Pair()
    sender, _ = pair.link_to_server()
    receiver = pair.server.links[0]
    receiver._link.condition = proton.Condition("amqp:link:redirect", "not here", info)
    receiver._link.close()
    pair.run()
    assert pair.events(pair.client, LinkClosed) == [LinkClosed(sender, "amqp:link:redirect", told)]
    pair.server._connection.condition = proton.Condition("amqp:connection:redirect", "not here", info)
    pair.server._connection.close()
    pair.run()
    assert pair.events(pair.client, RemoteClosed) == [RemoteClosed("amqp:connection:redirect", told)]


def test_handles_and_links_are_harmless_after_the_connection_is_gone() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.send([(seq, b"m") for seq in range(50)])
    pair.run()
    handles = [handle for handle, _ in pair.received()]
    session = sender.session
    pair.server.lost()
    pair.client.lost()
    gc.collect()
    receiver.accept(handles)
    receiver.reject(handles[0], "amqp:internal-error")
    receiver.release(handles[0])
    receiver.modify(handles[0])
    receiver.topup(10)
    receiver.close()
    sender.send([(99, b"m")])
    sender.close()
    sender.drained()
    session.close()
    pair.client.close()
    assert sender.capacity == sender.credit == sender.unsettled == receiver.credit == 0
    assert sender.take_outcomes() == []
    assert pair.client.data_to_send() == b""
    assert pair.client.receive(b"late", NOW) == []
    assert math.isinf(pair.client.tick(NOW))
    assert pair.client.finished


def test_a_handle_settles_once_and_then_means_nothing() -> None:
    pair = Pair()
    sender, receiver = pair.link_to_server()
    sender.send([(1, b"m")])
    pair.run()
    [(handle, _)] = pair.received()
    receiver.accept([handle, handle])
    receiver.reject(handle, "amqp:internal-error")
    receiver.accept([handle, 12345])
    pair.run()
    assert sender.take_outcomes() == [Outcome(OutcomeKind.ACCEPTED, 1)]


def test_a_message_cut_off_in_the_middle_is_never_delivered() -> None:
    pair = Pair()
    sender, _ = pair.link_to_server()
    sender.send([(1, b"x" * 300_000)])
    data = pair.client.data_to_send()
    events = pair.server.receive(data[: len(data) - 10], NOW)
    pair.server.lost()
    assert not [event for event in events if isinstance(event, Deliveries)]


def test_bytes_may_come_one_at_a_time() -> None:
    pair = Pair()
    sender, _ = pair.link_to_server()
    sender.send([(1, b"hello"), (2, b"x" * 70_000)])
    data, got = pair.client.data_to_send(), []
    for at in range(0, 400):
        got += pair.server.receive(data[at : at + 1], NOW)
    got += pair.server.receive(data[400:], NOW)
    assert [len(body) for event in got if isinstance(event, Deliveries) for _, body in event.batch] == [
        5,
        70_000,
    ]


@pytest.mark.parametrize("junk", [b"HTTP/1.1 400 Bad Request\r\n", b"AMQP\x03\x01\x00\x00", b"\x00" * 32])
def test_anything_but_amqp_fails_the_connection_with_an_event(junk: bytes) -> None:
    for server in (False, True):
        engine = Engine(server=server, container="x")
        [failed] = engine.receive(junk, NOW)
        assert isinstance(failed, Failed)
        assert not failed.auth
        while engine.data_to_send():
            pass
        assert engine.finished
        assert engine.receive(b"more", NOW) == []


def test_a_link_that_broke_before_anybody_could_confirm_it_may_be_confirmed_in_vain() -> None:
    pair = Pair()
    sender, _ = pair.link_to_server()
    early = Engine(server=False, container="rude")
    early.open()
    rude = early.sender(early.session(), "rude", Terminus("q"))
    raw.send(rude._pointer, [(1, b"m")], rude._window)
    server = Engine(server=True, container="depot")
    server.receive(early.data_to_send(), NOW)
    server.open()
    for link in server.links:
        link.close()
        link.confirm()
        link.refuse("amqp:not-found")
    assert sender.alive


def test_garbage_after_the_open_fails_with_an_event() -> None:
    pair = Pair()
    pair.open()
    events = pair.server.receive(b"\x00\x00\x00\x0a\x02\x00\x00\x00\xff\xff", NOW)
    assert [type(event) for event in events] == [Failed]
    while pair.server.data_to_send():
        pass
    assert pair.server.finished


def test_a_name_that_is_not_utf8_fails_the_connection_with_an_event() -> None:
    pair = Pair()
    pair.client.open()
    data = pair.client.data_to_send().replace(b"loco", b"lo\xff\xfe")
    events = pair.server.receive(data, NOW)
    assert [event.condition for event in events if isinstance(event, Failed)] == [DECODE_ERROR]


def test_deep_nesting_in_properties_is_survived() -> None:
    """An open whose properties are lists in lists in lists."""
    value = b"\x45"
    while len(value) < 60_000:
        value = b"\xd0" + struct.pack(">II", len(value) + 4, 1) + value
    fields = b"\xa1\x01x" + b"\x40" * 8 + b"\xd1" + struct.pack(">II", len(value) + 7, 2) + b"\xa3\x01k" + value
    performative = b"\x00\x53\x10\xd0" + struct.pack(">II", len(fields) + 4, 10) + fields
    frame = struct.pack(">IBBH", len(performative) + 8, 2, 0, 0) + performative
    engine = Engine(server=True, container="x")
    events = engine.receive(AMQP_HEADER + frame, NOW)
    assert len(events) == 1


def test_a_damaged_array_in_an_attach_is_not_sent_back() -> None:
    """proton crashed on this one: an array that says it has ten million items and has one."""
    pair = Pair()
    pair.open()
    pair.client.sender(pair.client.session(), "link", Terminus("q", capabilities=("queue",)))
    data = pair.client.data_to_send()
    good = b"\xf0\x00\x00\x00\x0e\x00\x00\x00\x01\xb3"
    assert good in data
    for event in pair.server.receive(data.replace(good, b"\xf0\x00\x00\x00\x0e\x00\x9c\x00\x01\xb3"), NOW):
        if isinstance(event, LinkAttached):
            event.link.confirm()
    pair.run()


def test_a_peer_that_begins_without_an_open_fails_the_connection() -> None:
    pair = Pair()
    events = pair.server.receive(AMQP_HEADER + b"\x00\x00\x00\x0c\x02\x00\x00\x00\x00\x53\x11\x45", NOW)
    assert [event.condition for event in events if isinstance(event, Failed)] == [NOT_ALLOWED]


def test_a_link_offered_just_before_the_connection_broke_may_be_confirmed_in_vain() -> None:
    pair = Pair()
    pair.client.open()
    pair.client.sender(pair.client.session(), "link", Terminus("q"))
    events = pair.server.receive(pair.client.data_to_send() + b"\xff" * 20, NOW)
    assert [type(event) for event in events] == [Opened, LinkAttached, Failed]
    pair.server.open()
    for event in events:
        if isinstance(event, LinkAttached):
            event.link.confirm()
            event.link.refuse("amqp:not-found")


def test_more_links_than_allowed_fail_the_connection() -> None:
    pair = Pair(server=Engine(server=True, container="depot", links_max=3))
    pair.open()
    session = pair.client.session()
    for number in range(4):
        pair.client.sender(session, f"link-{number}", Terminus("q"))
    pair.run()
    assert pair.events(pair.client, RemoteClosed)[0].condition == RESOURCE_LIMIT_EXCEEDED


def test_links_that_come_and_go_leave_nothing_behind() -> None:
    pair = Pair(server=Engine(server=True, container="depot", links_max=3))
    pair.open()
    for _ in range(50):
        session = pair.client.session()
        sender = pair.client.sender(session, "again", Terminus("q"))
        pair.run()
        link = pair.events(pair.server, LinkAttached)[0].link
        link.confirm()
        pair.run()
        sender.close()
        pair.run()
        assert not link.alive
        session.close()
        pair.run()
    assert pair.server.links == pair.client.links == ()
    assert not pair.server._sessions
    assert not pair.client._sessions


def test_the_peers_idle_timeout_is_kept_from_its_open_on() -> None:
    pair = Pair(server=Engine(server=True, container="depot", idle_timeout_s=10))
    assert math.isinf(pair.client.tick(NOW))
    pair.open()
    deadline = pair.client.tick(NOW)
    assert NOW < deadline <= NOW + 5
    pair.client.tick(deadline)
    assert pair.client.data_to_send() == b"\x00\x00\x00\x08\x02\x00\x00\x00"  # an empty frame


def test_a_silent_peer_fails_the_connection_at_our_idle_timeout() -> None:
    pair = Pair(server=Engine(server=True, container="depot", idle_timeout_s=10))
    pair.open()
    pair.server.take_events()
    now = NOW
    for _ in range(10):
        now, before = pair.server.tick(now), now
        if pair.server.closing:
            break
    assert [event.condition for event in pair.server.take_events() if isinstance(event, Failed)] == [
        "amqp:resource-limit-exceeded"
    ]
    assert NOW + 10 <= before <= NOW + 21


@pytest.mark.parametrize(
    ("client", "server", "identity"),
    [
        (SaslClient(["PLAIN"], "alice", "pw"), SaslServer(["PLAIN"], lambda u, p: p == "pw"), "alice"),
        (SaslClient(["EXTERNAL"]), SaslServer(["EXTERNAL"], None, "loco"), "loco"),
        (SaslClient(["ANONYMOUS"]), SaslServer(["ANONYMOUS"]), None),
        (None, SaslServer(["ANONYMOUS"]), None),
    ],
)
def test_an_engine_behind_sasl_knows_its_peer(
    client: SaslClient | None, server: SaslServer, identity: str | None
) -> None:
    pair = Pair(
        Engine(server=False, container="loco", sasl=client),
        Engine(server=True, container="depot", sasl=server),
    )
    pair.open()
    kinds = [type(event) for event in pair.heard[pair.server]]
    assert kinds[:2] == [Authenticated, Opened]
    assert pair.server.identity == identity
    assert pair.events(pair.client, Opened)


def test_bad_credentials_fail_both_engines_as_authentication() -> None:
    pair = Pair(
        Engine(server=False, container="loco", sasl=SaslClient(["PLAIN"], "alice", "no")),
        Engine(server=True, container="depot", sasl=SaslServer(["PLAIN"], lambda u, p: False)),
    )
    pair.client.open()
    pair.run()
    for engine in (pair.client, pair.server):
        [failed] = pair.events(engine, Failed)
        assert failed.auth
        assert engine.finished


def test_garbage_behind_sasl_fails_with_an_event() -> None:
    client, server = SaslClient(["ANONYMOUS"]), SaslServer(["ANONYMOUS"])
    pair = Pair(Engine(server=False, container="loco", sasl=client), Engine(server=True, container="d", sasl=server))
    pair.run()
    events = pair.server.receive(b"\xde\xad\xbe\xef" * 10, NOW)
    assert [type(event) for event in events] == [Failed]


def test_the_address_may_be_missing_but_the_terminus_not() -> None:
    pair = Pair()
    pair.open()
    pair.client.sender(pair.client.session(), "relay", Terminus(None))
    pair.run()
    [attached] = pair.events(pair.server, LinkAttached)
    assert attached.target is not None
    assert attached.target.address is None


def test_the_end_of_a_session_leaves_its_termini_and_a_close_does_not() -> None:
    for end, detached in ((lambda link: link.session.close(), True), (lambda link: link.close(), False)):
        pair = Pair()
        _, receiver = pair.link_to_server()
        end(receiver)
        pair.run()
        [closed] = pair.events(pair.client, LinkClosed)
        assert closed.detached is detached


def test_a_detach_carries_its_condition() -> None:
    pair = Pair()
    _, receiver = pair.link_to_server()
    receiver.close("amqp:link:stolen", "by another", detach=True)
    pair.run()
    [closed] = pair.events(pair.client, LinkClosed)
    assert (closed.condition, closed.description, closed.detached) == ("amqp:link:stolen", "by another", True)


def test_messages_without_an_end_are_bounded_for_all_links_together() -> None:
    server = Engine(server=True, container="depot", partial_bytes_max=3000)
    pair = Pair(server=server)
    sender, _ = pair.link_to_server()
    others = [pair.client.sender(sender.session, f"other-{n}", Terminus("edge")) for n in range(2)]
    pair.run()
    for event in pair.events(pair.server, LinkAttached):
        event.link.confirm()
        assert isinstance(event.link, Receiver)
        event.link.topup(10)
    pair.run()
    for n, each in enumerate((sender, *others)):
        raw.send_begin(each._pointer, 1)
        raw.send_chunk(each._pointer, bytes(1400), 0, 1400)
        pair.run()
        failed = pair.events(pair.server, Failed)
        assert bool(failed) is (n == 2)
    assert failed[0].condition == "amqp:resource-limit-exceeded"


def test_a_message_that_ends_or_is_given_up_no_longer_counts_as_without_an_end() -> None:
    server = Engine(server=True, container="depot", partial_bytes_max=3000)
    pair = Pair(server=server)
    sender, _ = pair.link_to_server()
    for _ in range(3):
        raw.send_begin(sender._pointer, 1)
        raw.send_chunk(sender._pointer, bytes(2000), 0, 2000)
        pair.run()
        assert server._partial_bytes == 2000
        raw.send_end(sender._pointer)
        pair.run()
        assert server._partial_bytes == 0
    raw.send_begin(sender._pointer, 1)
    raw.send_chunk(sender._pointer, bytes(2000), 0, 2000)
    pair.run()
    sender.close()
    pair.run()
    assert server._partial_bytes == 0
    assert not pair.events(pair.server, Failed)


def test_sessions_that_end_before_anybody_reads_that_have_an_end_too() -> None:
    """Each holds its channel until its end is written. Without a free one proton falls silent, and goes on reading."""
    engine = Engine(server=True, container="depot", sessions_max=8)
    engine.receive(attacks.AMQP + attacks.open_frame("loco") + attacks.begin(), NOW)
    engine.open()
    engine.data_to_send()
    pair = attacks.begin(1) + attacks.frame(attacks.END, channel=1)
    for _ in range(3):  # as many as there are channels, and their ends are read each time
        events = engine.receive(pair * 7, NOW)
        assert [type(event) for event in events] == [SessionClosed] * 7
        heard = attacks.Frames()
        heard.feed(engine.data_to_send())
        assert heard.count(attacks.END) == 7
    events = engine.receive(pair * 1000, NOW)
    assert [type(event) for event in events] == [SessionClosed] * 7 + [Failed]
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert failed.condition == RESOURCE_LIMIT_EXCEEDED
    assert engine.receive(pair, NOW) == []
    while engine.data_to_send():
        pass
    assert engine.finished


class BareReceiver:
    """A receiver that speaks in frames and so may send flows that proton's receiver never would."""

    def __init__(self) -> None:
        self.engine = Engine(server=True, container="depot")
        opening = attacks.open_frame("app"), attacks.begin(), attacks.attach(3, "sub", receiver=True)
        [attached] = [event for event in self.hears(AMQP_HEADER, *opening) if isinstance(event, LinkAttached)]
        assert isinstance(attached.link, Sender)
        self.sender = attached.link
        self.engine.open()
        self.sender.confirm()
        self.flows()

    def hears(self, *frames: bytes) -> list[Event]:
        return self.engine.receive(b"".join(frames), NOW)

    def flow(self, link_credit: int, *, drain: bool, count: int = 0) -> list[Event]:
        session = [attacks.uint(n) for n in (0, 1000, 0, 1000)]
        link = [attacks.uint(n) for n in (3, count, link_credit)]
        return self.hears(attacks.frame(attacks.FLOW, *session, *link, attacks.NULL, b"\x41" if drain else b"\x42"))

    def flows(self, begun: bytes = b"") -> list[list[Any]]:
        """The fields of every flow of a link that was sent since the last call; `begun` was taken already."""
        out, sent = (begun + self.engine.data_to_send()).removeprefix(AMQP_HEADER), []
        while out:
            size = int.from_bytes(out[:4], "big")
            data = proton.Data()
            data.decode(out[8:size])  # what follows a transfer's performative is its message
            data.next()
            performative = data.get_py_described()
            if performative.descriptor == attacks.FLOW and len(performative.value) > 4:
                sent.append(performative.value)
            out = out[size:]
        return sent


WINDOW = (
    2**31 - 1
)  # a flow's fields: next-incoming-id, this, next-outgoing-id, this, handle, delivery-count, link-credit, …


def test_a_drain_without_credit_is_answered_each_time_and_once() -> None:
    app = BareReceiver()
    for _ in range(2):
        assert Credit(app.sender) in app.flow(0, drain=True)
        assert app.sender.draining
        assert app.sender.drained() == 0
        assert app.flows() == [[0, WINDOW, 0, WINDOW, 0, 0, 0, None, True]]
        assert not app.sender.draining
        app.sender.drained()
        assert app.flows() == []
    app.flow(2, drain=False)
    assert app.sender.credit == 2
    app.sender.send([(1, b"m"), (2, b"m")])
    assert app.flows() == []
    assert app.sender.credit == 0
    assert not app.sender.draining


def test_a_drain_that_takes_back_credit_is_answered_and_later_credit_counts_from_there() -> None:
    app = BareReceiver()
    app.flow(10, drain=False)
    app.sender.send([(1, b"m")])
    assert app.flows() == []
    app.flow(0, drain=True, count=1)
    app.sender.drained()
    assert [flow[2:] for flow in app.flows()] == [[1, WINDOW, 0, 1, 0, None, True]]
    app.flow(3, drain=False, count=1)
    assert app.sender.credit == 3


def test_a_large_message_that_has_begun_ends_though_the_credit_is_taken_back_meanwhile() -> None:
    app = BareReceiver()
    app.flow(10, drain=False)
    app.sender.send([(1, b"m" * 1_000_000), (2, b"n")])
    begun = app.engine.data_to_send(10_000)
    assert len(begun) < 100_000
    assert app.sender.feeding
    app.flow(0, drain=True)
    app.sender.drained()
    assert not app.sender.feeding
    assert [flow[3:] for flow in app.flows(begun)] == [[WINDOW, 0, 2, 0, None, True]]


def test_the_answer_to_a_drain_speaks_of_the_link_that_asked() -> None:
    app = BareReceiver()
    more = [attacks.attach(handle, f"sub-{handle}", receiver=True) for handle in (7, 5)]
    senders = [event.link for event in app.hears(*more) if isinstance(event, LinkAttached)]
    for sender in senders:
        sender.confirm()
    app.flows()
    session = [attacks.uint(n) for n in (0, 1000, 0, 1000)]
    for handle, sender in zip((7, 5), senders, strict=True):
        link = [attacks.uint(n) for n in (handle, 0, 0)]
        app.hears(attacks.frame(attacks.FLOW, *session, *link, attacks.NULL, attacks.TRUE))
        assert isinstance(sender, Sender)
        sender.drained()
    assert [flow[4:] for flow in app.flows()] == [[1, 0, 0, None, True], [2, 0, 0, None, True]]


def test_what_was_sent_within_credit_that_is_taken_back_goes_before_the_answer() -> None:
    app = BareReceiver()
    app.flow(10, drain=False)
    app.sender.send([(n, b"m") for n in range(4)])
    app.flow(0, drain=True)
    app.sender.drained()
    assert [flow[2:] for flow in app.flows()] == [[4, WINDOW, 0, 4, 0, None, True]]
    app.flow(1, drain=False, count=4)
    assert app.sender.credit == 1


def test_a_drain_whose_credit_is_used_up_is_answered_behind_the_last_message() -> None:
    app = BareReceiver()
    app.flow(2, drain=True)
    app.sender.send([(1, b"m"), (2, b"m")])
    assert app.sender.drained() == 0
    assert [flow[2:] for flow in app.flows()] == [[2, WINDOW, 0, 2, 0, None, True]]
    app.flow(1, drain=False, count=2)
    assert app.sender.credit == 1


def test_an_answer_to_a_message_asks_for_no_second_end_of_a_drain() -> None:
    app = BareReceiver()
    app.flow(1, drain=True)
    app.sender.send([(1, b"m")])
    app.sender.drained()
    assert len(app.flows()) == 1
    app.hears(
        attacks.frame(0x15, attacks.TRUE, attacks.uint(0), attacks.uint(0), attacks.TRUE, attacks.described(0x24))
    )
    assert [outcome.seq for outcome in app.sender.take_outcomes()] == [1]
    assert not app.sender.draining
    assert app.sender.drained() == 0
    assert app.flows() == []
