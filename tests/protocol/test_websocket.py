"""MQTT over WebSocket as traces: bytes in, events and bytes out. No socket."""

from __future__ import annotations

import tracemalloc

import pytest

from gateway.mqtt.websocket import (
    CLOSE_WAIT_S,
    HANDSHAKE_BYTES_MAX,
    HANDSHAKE_S,
    Closed,
    Event,
    Opened,
    Received,
    Refused,
    Rules,
    State,
    WebSocketServer,
    origin_allowed,
)
from tests.websocket import ACCEPT, BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Frame, frame, frames, request

NOW = 50.0
RULES = Rules("/mqtt")


def opened(rules: Rules = RULES) -> WebSocketServer:
    server = WebSocketServer(rules, NOW)
    assert server.receive(request(), NOW) == [Opened(None)]
    assert server.data_to_send().startswith(b"HTTP/1.1 101 ")
    return server


def refused(data: bytes, rules: Rules = RULES) -> tuple[int, str]:
    """Feed a handshake that must fail; returns the status of the answer, and the whole of it."""
    server = WebSocketServer(rules, NOW)
    (event,) = server.receive(data, NOW)
    assert isinstance(event, Refused), event
    assert server.state is State.CLOSED
    answer = server.data_to_send().decode("ascii")
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {event.status} ")
    assert f"content-length: {len(body)}" in head.lower()
    assert "connection: close" in head.lower()
    assert event.why in body or not event.why.isascii()
    return event.status, answer


def test_a_handshake_is_answered_with_the_accept_key_and_the_subprotocol_mqtt() -> None:
    server = WebSocketServer(RULES, NOW)
    whole = request(sec_websocket_protocol="chat, mqtt", sec_websocket_extensions="permessage-deflate", origin=None)
    for n in range(len(whole) - 1):
        assert server.receive(whole[n : n + 1], NOW) == []
    assert server.receive(whole[-1:], NOW) == [Opened(None)]
    head = server.data_to_send().decode("ascii").lower()
    assert head.startswith("http/1.1 101 switching protocols\r\n")
    assert f"sec-websocket-accept: {ACCEPT.lower()}\r\n" in head
    assert "sec-websocket-protocol: mqtt\r\n" in head
    assert "sec-websocket-extensions" not in head
    assert server.deadline is None


def test_what_comes_behind_the_handshake_in_the_same_bytes_is_not_lost() -> None:
    server = WebSocketServer(RULES, NOW)
    assert server.receive(request() + frame(BINARY, b"early"), NOW) == [Opened(None), Received(b"early")]


@pytest.mark.parametrize(
    ("data", "status", "word"),
    [
        (request("/"), 404, "/mqtt"),
        (request("/mqtt/"), 404, "/mqtt"),
        (request(method="POST", content_length="0"), 405, "Allow: GET"),
        (request(upgrade=None, connection=None), 426, "MQTT client"),
        (request(upgrade="h2c"), 426, "Upgrade: websocket"),
        (request(version="1.0"), 505, "HTTP/1.1"),
        (request(sec_websocket_version="8"), 426, "Sec-WebSocket-Version: 13"),
        (request(sec_websocket_version=None), 426, "13"),
        (request(sec_websocket_key=None), 400, "Sec-WebSocket-Key"),
        (request(sec_websocket_key="c2hvcnQ="), 400, "Sec-WebSocket-Key"),
        (request(sec_websocket_key="\xff" * 24), 400, "Sec-WebSocket-Key"),
        (request(sec_websocket_protocol=None), 400, "mqtt"),
        (request(sec_websocket_protocol="mqttv3.1, MQTT"), 400, "mqtt"),
        (request(host=None), 400, "Host"),
        (request(content_length="5"), 400, "body"),
        (request(origin="http://evil.example"), 403, "ws_origins"),
        (request(origin="http://\xfcbel.example"), 403, "ws_origins"),
        (b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00", 400, "not HTTP"),
        (b"\x16\x03\x01\x02\x00", 400, "not HTTP"),
        (b"GET /" + b"x" * HANDSHAKE_BYTES_MAX, 431, "not HTTP"),
    ],
)  # fmt: skip
def test_each_wrong_handshake_gets_its_status_and_a_sentence(data: bytes, status: int, word: str) -> None:
    found, answer = refused(data)
    assert found == status
    assert word.lower() in answer.lower()


def test_a_query_behind_the_path_is_no_other_path() -> None:
    assert WebSocketServer(RULES, NOW).receive(request("/mqtt?token=1"), NOW) == [Opened(None)]


def test_a_handshake_is_bounded_in_time() -> None:
    server = WebSocketServer(RULES, NOW)
    assert server.deadline == NOW + HANDSHAKE_S
    server.receive(request()[:-1], NOW)
    assert server.tick(NOW + HANDSHAKE_S - 0.1) == []
    (event,) = server.tick(NOW + HANDSHAKE_S)
    assert isinstance(event, Refused)
    assert event.status == 408
    assert server.data_to_send().startswith(b"HTTP/1.1 408 ")
    assert server.receive(b"\n", NOW + HANDSHAKE_S) == []


@pytest.mark.parametrize(
    ("origin", "host", "rules", "allowed"),
    [
        ("http://127.0.0.1:3000", "127.0.0.1:8080", RULES, True),
        ("http://LOCALHOST", "localhost:8080", RULES, True),
        ("http://[::1]:3000", "[::1]:8080", RULES, True),
        ("http://127.0.0.1.evil.example", "127.0.0.1:8080", RULES, False),
        ("http://evil.example", "evil.example:8080", RULES, False),  # DNS rebinding: its own name leads here
        ("http://train.example", "train.example:8080", Rules("/mqtt", loopback=False), True),
        ("http://evil.example", "train.example:8080", Rules("/mqtt", loopback=False), False),
        ("https://hmi.example", "127.0.0.1:8080", Rules("/mqtt", frozenset({"https://hmi.example"})), True),
        ("http://hmi.example", "127.0.0.1:8080", Rules("/mqtt", frozenset({"https://hmi.example"})), False),
        ("https://hmi.example:8443", "127.0.0.1", Rules("/mqtt", frozenset({"https://hmi.example"})), False),
        ("null", "127.0.0.1:8080", RULES, False),
        ("null", "null", RULES, False),
        ("null", "127.0.0.1:8080", Rules("/mqtt", frozenset({"null"})), True),
        ("http://evil.example", "127.0.0.1", Rules("/mqtt", frozenset({"*"})), True),
        ("http://[", "[", RULES, False),
        ("", "", RULES, False),
    ],
)
def test_a_page_connects_if_it_comes_from_this_host_or_is_listed(
    origin: str, host: str, rules: Rules, allowed: bool
) -> None:
    assert origin_allowed(origin, host, rules) is allowed


def test_packets_and_frames_need_not_be_aligned() -> None:  # [MQTT-6.0.0-2]
    server = opened()
    data = (
        frame(BINARY, b"ab", fin=False)
        + frame(PING, b"in between")
        + frame(CONTINUATION, b"cd", fin=False)
        + frame(CONTINUATION, b"")
        + frame(BINARY, b"ef")
    )
    assert server.receive(data, NOW) == [Received(b"abcdef")]
    assert frames(server.data_to_send()) == [Frame(PONG, b"in between")]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 300_000])
def test_any_size_goes_both_ways_and_in_any_pieces(size: int) -> None:
    server, body = opened(), bytes(n & 0xFF for n in range(size))
    whole, got = frame(BINARY, body), b""
    for start in range(0, len(whole), 1009):
        for event in server.receive(whole[start : start + 1009], NOW):
            assert isinstance(event, Received)
            got += event.data
    assert got == body
    server.send(body)
    assert frames(server.data_to_send()) == [Frame(BINARY, body)]


def test_a_frame_that_claims_a_terabyte_costs_no_more_memory_than_what_has_come() -> None:
    server = opened()
    head = bytes([0x82, 0xFF]) + (1 << 40).to_bytes(8) + b"\0\0\0\0"
    assert server.receive(head, NOW) == []
    tracemalloc.start()
    try:
        for _ in range(200):
            assert server.receive(b"x" * 50_000, NOW) == [Received(b"x" * 50_000)]
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"hello"), 1003),  # [MQTT-6.0.0-1]
        (frame(TEXT, b""), 1003),
        (frame(TEXT, b"\xff"), 1007),
        (frame(BINARY, b"x", mask=None), 1002),
        (frame(BINARY, b"x", rsv=4), 1002),  # permessage-deflate was not agreed on
        (frame(3, b"x"), 1002),
        (frame(CONTINUATION, b"x"), 1002),
        (frame(BINARY, b"x", fin=False) + frame(BINARY, b"y"), 1002),
        (frame(PING, b"x", fin=False), 1002),
        (frame(PING, b"x" * 126), 1002),
        (frame(CLOSE, b"x"), 1002),
        (frame(CLOSE, (1005).to_bytes(2)), 1002),
    ],
)
def test_what_is_no_frame_for_us_ends_the_connection_with_its_code(data: bytes, code: int) -> None:
    server = opened()
    events: list[Event] = [event for event in server.receive(data, NOW) if not isinstance(event, Received)]
    (event,) = events
    assert isinstance(event, Closed)
    assert (event.code, event.clean) == (code, False)
    (last,) = frames(server.data_to_send())
    assert (last.opcode, last.code) == (CLOSE, code)
    assert server.state is State.CLOSED
    assert server.receive(frame(BINARY, b"late"), NOW) == []


def test_what_came_before_a_fault_is_still_handed_on() -> None:
    first, last = opened().receive(frame(BINARY, b"good") + frame(TEXT, b"bad"), NOW)
    assert first == Received(b"good")
    assert isinstance(last, Closed)


@pytest.mark.parametrize("body", [b"", (1000).to_bytes(2), (1001).to_bytes(2) + b"going", (4321).to_bytes(2)])
def test_a_close_is_answered_in_kind_and_nothing_is_taken_after_it(body: bytes) -> None:
    server = opened()
    before, event = server.receive(frame(BINARY, b"last") + frame(CLOSE, body) + frame(BINARY, b"late"), NOW)
    assert before == Received(b"last")
    assert isinstance(event, Closed)
    assert event.clean
    (answer,) = frames(server.data_to_send())
    assert (answer.opcode, answer.payload[:2]) == (CLOSE, body[:2])
    assert server.state is State.CLOSED


def test_our_close_waits_for_the_answer_and_drops_what_still_comes() -> None:
    server = opened()
    server.send(b"last")
    server.close(NOW)
    sent = frames(server.data_to_send())
    assert [each.opcode for each in sent] == [BINARY, CLOSE]
    assert sent[1].code == 1000
    assert server.deadline == NOW + CLOSE_WAIT_S
    assert server.receive(frame(BINARY, b"crossing") + frame(PING), NOW) == []
    assert server.data_to_send() == b""
    assert server.receive(frame(CLOSE, (1000).to_bytes(2)), NOW) == [Closed(1000, "", True)]
    assert server.data_to_send() == b""
    assert server.state is State.CLOSED


def test_our_close_is_not_waited_for_for_ever() -> None:
    server = opened()
    server.close(NOW)
    assert server.tick(NOW + CLOSE_WAIT_S - 0.1) == []
    (event,) = server.tick(NOW + CLOSE_WAIT_S)
    assert isinstance(event, Closed)
    assert not event.clean
    assert server.state is State.CLOSED


def test_pings_of_a_peer_that_reads_nothing_cost_one_pong() -> None:  # RFC 6455 §5.5.3
    server = opened()
    for n in range(1000):
        assert server.receive(frame(PING, b"%d" % n), NOW) == []
        assert server.data_to_send(congested=True) == b""
    assert frames(server.data_to_send()) == [Frame(PONG, b"999")]
    assert server.receive(frame(PONG, b"unasked"), NOW) == []
    assert server.data_to_send() == b""
