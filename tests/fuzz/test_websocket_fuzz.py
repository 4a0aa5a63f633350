"""Any bytes into the server's end of a WebSocket: it may refuse, but never raises, and holds next to nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.mqtt.websocket import (
    HANDSHAKE_BYTES_MAX,
    Closed,
    Event,
    Opened,
    Received,
    Refused,
    Rules,
    State,
    WebSocketServer,
)
from tests.websocket import BINARY, CLOSE, CONTINUATION, PING, frame, frames, request

PAYLOAD = st.binary(max_size=300)
GOOD_FRAME = st.builds(frame, st.sampled_from([BINARY, CONTINUATION, PING]), PAYLOAD, fin=st.booleans())
ANY_FRAME = st.builds(
    frame,
    st.integers(0, 15),
    PAYLOAD,
    fin=st.booleans(),
    rsv=st.integers(0, 7),
    mask=st.none() | st.binary(min_size=4, max_size=4),
)
HEADER = st.sampled_from(["host", "upgrade", "connection", "sec_websocket_key", "sec_websocket_protocol", "origin"])
VALUE = st.none() | st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF), max_size=60)
HANDSHAKE = (
    st.just(request())
    | st.builds(lambda headers: request(**headers), st.dictionaries(HEADER, VALUE, max_size=3))
    | st.binary(max_size=200)
)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at, turn = [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        pieces.append(data[at : at + size])
        at, turn = at + size, turn + 1
    return pieces


def check(server: WebSocketServer, events: list[Event], pieces: list[bytes]) -> bytes:
    """Feed it; what it says must make sense in the state it is in. Returns the payload."""
    payload = b""
    for piece in pieces:
        over = server.state is State.CLOSED
        heard = server.receive(piece, 0.0)
        assert not (over and heard)
        for event in heard:
            assert isinstance(event, Received) or event not in events
            if isinstance(event, Received):
                assert len(event.data) <= HANDSHAKE_BYTES_MAX + len(piece)
                payload += event.data
        events += heard
    return payload


@settings(max_examples=300)
@given(
    HANDSHAKE,
    st.lists(GOOD_FRAME | ANY_FRAME | st.binary(max_size=40), max_size=12),
    st.lists(st.integers(1, 400), min_size=1, max_size=5),
)
def test_no_bytes_make_it_raise_and_its_answers_are_well_formed(
    handshake: bytes, parts: list[bytes], sizes: list[int]
) -> None:
    server = WebSocketServer(Rules("/mqtt"), 0.0)
    events: list[Event] = []
    check(server, events, cut(handshake + b"".join(parts), sizes))
    sent = server.data_to_send()
    assert sum(isinstance(event, Opened | Refused) for event in events) <= 1
    assert sum(isinstance(event, Closed | Refused) for event in events) == (server.state is State.CLOSED)
    if any(isinstance(event, Opened) for event in events):
        head, _, rest = sent.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        told = frames(rest)
        assert all(each.opcode != CLOSE for each in told[:-1])
        if server.state is State.CLOSED:
            assert told
            assert told[-1].opcode == CLOSE
    elif sent:
        assert sent.startswith(b"HTTP/1.1 4") or sent.startswith(b"HTTP/1.1 5")
    if server.state is State.OPEN:
        server.send(b"still there")
        server.close(0.0)
    assert server.tick(1e9) == [] or server.state is State.CLOSED


@given(
    st.lists(PAYLOAD, max_size=8),
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
)
def test_payload_arrives_whole_and_in_order_however_it_is_cut(
    bodies: list[bytes], pings: list[int], sizes: list[int]
) -> None:
    server = WebSocketServer(Rules("/mqtt"), 0.0)
    assert server.receive(request(), 0.0) == [Opened(None)]
    stream = b""
    for n, body in enumerate(bodies):
        half = len(body) // 2
        stream += frame(BINARY, body[:half], fin=False)
        stream += frame(PING, b"?") if n in pings else b""
        stream += frame(CONTINUATION, body[half:])
    assert check(server, [], cut(stream, sizes)) == b"".join(bodies)
    assert server.state is State.OPEN
