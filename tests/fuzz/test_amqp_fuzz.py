"""Any bytes at all into the AMQP side: the engine answers with events, the message reader with MessageError."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import proton
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.amqp.engine import Engine, Receiver
from gateway.amqp.events import Deliveries, Event, Failed, LinkAttached
from gateway.amqp.message import MessageError, Template, annotate, decode, encode, identity, patch_ttl
from gateway.amqp.sasl import AMQP_HEADER, SASL_HEADER, SaslClient, SaslServer
from gateway.amqp.termini import Terminus

NOW = 100.0


def conversation() -> tuple[bytes, bytes]:
    """What a well-behaved client says: open, begin, attach; then, with credit, some transfers and close."""
    client, server = Engine(server=False, container="loco"), Engine(server=True, container="hub")
    client.open()
    sender = client.sender(client.session(), "link", Terminus("q", capabilities=("queue",)))
    data = client.data_to_send()
    before = data
    for event in server.receive(data, NOW):
        server.open()
        if isinstance(event, LinkAttached):
            event.link.confirm()
            assert isinstance(event.link, Receiver)
            event.link.topup(100)
    client.receive(server.data_to_send(), NOW)
    template = Template("loco", 1, "s", "q", "t", 1000, user_properties=[("a", "b")])
    sender.send([(seq, template.encode(seq, b"payload" * seq)) for seq in range(20)])
    after = client.data_to_send()
    client.close()
    return before, after + client.data_to_send()


BEFORE, AFTER = conversation()
GOOD = BEFORE + AFTER
MESSAGE = Template("g", 1, "s", "a", "t", 5, user_properties=[("k", "v")], qos=2).encode(1, b"payload")


def listen(engine: Engine, pieces: list[bytes]) -> list[Event]:
    """Feed a server engine that accepts whatever it is asked."""
    heard: list[Event] = []
    for piece in pieces:
        engine.open()
        for event in engine.receive(piece, NOW):
            heard.append(event)
            if isinstance(event, LinkAttached):
                event.link.confirm()
                if isinstance(event.link, Receiver):
                    event.link.topup(50)
            elif isinstance(event, Deliveries):
                event.receiver.accept([handle for handle, _ in event.batch])
        for _ in range(100):
            if not engine.data_to_send():
                break
        heard += engine.take_events()
    engine.tick(NOW)
    engine.lost()
    return heard


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(at)]


cuts = st.lists(st.integers(0, 10_000), max_size=8)


@given(cuts, cuts)
@settings(max_examples=100, deadline=None)
def test_however_a_conversation_is_cut_it_says_the_same(early: list[int], late: list[int]) -> None:
    heard = listen(Engine(server=True, container="hub"), pieces_of(BEFORE, early) + pieces_of(AFTER, late))
    bodies = [body for event in heard if isinstance(event, Deliveries) for _, body in event.batch]
    assert [decode(body).body for body in bodies] == [b"payload" * seq for seq in range(20)]
    assert not [event for event in heard if isinstance(event, Failed)]


@given(st.binary(max_size=400), cuts, st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_raise(junk: bytes, where: list[int], header: bool) -> None:
    listen(Engine(server=True, container="hub"), pieces_of((AMQP_HEADER if header else b"") + junk, where))


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(GOOD)),
    cuts,
)
@settings(max_examples=500, deadline=None)
def test_a_damaged_conversation_never_raises(damage: list[tuple[int, int]], end: int, where: list[int]) -> None:
    data = bytearray(GOOD)
    for at, value in damage:
        data[at] = value
    listen(Engine(server=True, container="hub"), pieces_of(bytes(data[:end] or data), where))


@given(st.integers(0x10, 0x18), st.lists(st.binary(min_size=1, max_size=12), max_size=6), st.integers(0, 2))
@settings(max_examples=500, deadline=None)
def test_performatives_with_random_fields_never_raise(code: int, fields: list[bytes], channel: int) -> None:
    body = b"".join(fields)
    performative = b"\x00\x53" + bytes([code]) + b"\xd0" + struct.pack(">II", len(body) + 4, len(fields)) + body
    frame = struct.pack(">IBBH", len(performative) + 8, 2, 0, channel) + performative
    listen(Engine(server=True, container="hub"), [AMQP_HEADER + frame])
    listen(Engine(server=True, container="hub"), [BEFORE, frame, frame])


@given(st.binary(max_size=200), st.booleans(), cuts)
@settings(max_examples=300, deadline=None)
def test_no_bytes_open_the_sasl_layer_without_the_password(junk: bytes, header: bool, where: list[int]) -> None:
    data = (SASL_HEADER if header else b"") + junk
    server = SaslServer(["PLAIN"], lambda user, password: False)
    client = SaslClient(["PLAIN"], "u", "p")
    for piece in pieces_of(data, where):
        server.feed(piece)
        client.feed(piece)
    assert not server.done
    assert server.identity is None


def only_message_error(body: bytes) -> None:
    for read in (decode, identity, lambda data: patch_ttl(data, 5), lambda data: annotate(data, {"x": 1})):
        try:
            read(body)
        except MessageError:
            continue


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_as_a_message_raise_message_error_or_nothing(junk: bytes) -> None:
    only_message_error(junk)
    only_message_error(b"\x00\x53\x77" + junk)


@given(
    st.lists(st.tuples(st.integers(0, len(MESSAGE) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(1, len(MESSAGE)),
)
@settings(max_examples=500, deadline=None)
def test_a_damaged_message_raises_message_error_or_nothing(damage: list[tuple[int, int]], end: int) -> None:
    data = bytearray(MESSAGE)
    for at, value in damage:
        data[at] = value
    only_message_error(bytes(data))
    only_message_error(bytes(data[:end]))


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300)
simple = st.one_of(text, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none(), st.binary(max_size=300))


@given(
    st.binary(max_size=600),
    text,
    text,
    st.dictionaries(text, simple, max_size=4),
    st.none() | st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_what_we_encode_proton_and_we_read_alike(
    payload: bytes, to: str, subject: str, properties: dict[str, Any], ttl_ms: int | None
) -> None:
    body = encode(payload, message_id="id", to=to, subject=subject, ttl_ms=ttl_ms, application_properties=properties)
    ours, theirs = decode(body), proton.Message()
    theirs.decode(body)
    assert (ours.to, ours.subject) == (to, subject) == (theirs.address, theirs.subject)
    assert ours.body == payload == bytes(theirs.body)
    assert ours.application_properties == properties
    assert ours.application_properties == {
        key: bytes(value) if isinstance(value, memoryview) else value
        for key, value in (theirs.properties or {}).items()
    }


nested = st.recursive(simple, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3))


@given(
    nested,
    st.dictionaries(text, simple, max_size=3),
    st.none() | text | st.uuids() | st.integers(0, 2**64 - 1),
)
@settings(max_examples=200, deadline=None)
def test_what_proton_encodes_we_read(value: Any, properties: dict[str, Any], message_id: Any) -> None:
    body = bytes(proton.Message(body=value, properties=properties, id=message_id).encode())
    ours = decode(body)
    assert ours.message_id == message_id
    assert ours.application_properties == properties
    assert (identity(body) is None) == (message_id is None)
