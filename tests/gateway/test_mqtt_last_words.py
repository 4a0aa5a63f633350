"""A client that goes on sending after its mistake still hears what it was, and of one that is back at once all counts.

Closed on unread bytes, TCP would reset, and what the client has not read by then is lost to it.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from gateway.mqtt.codec import encode
from gateway.mqtt.packets import (
    V5,
    Connect,
    ConnectProperties,
    Disconnect,
    Packet,
    Publish,
    Subscribe,
    Subscription,
    Will,
)
from gateway.slices import LINGER_S
from tests.bench.abuse import Yard
from tests.daemon import WAIT_S, read_to_the_end
from tests.pki import Pki
from tests.websocket import BINARY, CLOSE, frame, request

HELLO = encode(Connect(V5, "rash"), V5)
TOO_LARGE = b"\x32\xff\xff\xff\x7f"  # 256 MB are announced
MORE = bytes(8 << 20)
PACKET_TOO_LARGE = 0x95


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Yard]:
    yard = Yard(tmp_path_factory.mktemp("daemon"), pki)
    yield yard
    yard.end()


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)


def is_told(data: bytes) -> bool:
    size = data[1]
    return data[0] == 0xE0 and data[2] == PACKET_TOO_LARGE and len(data) >= size + 2


def after_connack(sock: socket.socket) -> None:
    sock.sendall(HELLO)
    answer = b""
    while len(answer) < 2 or len(answer) < answer[1] + 2:
        answer += sock.recv(4096)
    assert answer[0] == 0x20


def test_over_tcp(yard: Yard) -> None:
    for _ in range(5):
        with dial(yard.port) as sock:
            after_connack(sock)
            sock.sendall(TOO_LARGE + MORE)
            assert is_told(read_to_the_end(sock))


def test_who_never_stops_is_cut_off(yard: Yard) -> None:
    with dial(yard.port) as sock:
        after_connack(sock)
        sock.sendall(TOO_LARGE)
        assert is_told(read_to_the_end(sock))
        end = time.monotonic() + LINGER_S + WAIT_S

        def go_on() -> None:
            while time.monotonic() < end:
                sock.sendall(MORE)

        with pytest.raises(ConnectionError):
            go_on()


def test_over_tls(yard: Yard, pki: Pki) -> None:
    context = ssl.create_default_context(cafile=str(pki.ca))
    for _ in range(5):
        with context.wrap_socket(dial(yard.tls), server_hostname="localhost") as sock:
            after_connack(sock)
            sock.sendall(TOO_LARGE + MORE)
            assert is_told(sock.recv(1 << 16))


def upgraded(yard: Yard) -> socket.socket:
    sock = dial(yard.ws)
    sock.sendall(request("/mqtt"))
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101")
    return sock


def test_over_a_websocket(yard: Yard) -> None:
    with upgraded(yard) as sock:
        sock.sendall(frame(BINARY, HELLO) + frame(BINARY, TOO_LARGE + MORE[: 1 << 20]) * 4 + frame(CLOSE, b"\x03\xe8"))
        heard = read_to_the_end(sock)
        assert bytes((PACKET_TOO_LARGE,)) in heard
        assert heard[heard.index(b"\x88") + 1] == 2


def test_a_websocket_that_broke_its_own_protocol(yard: Yard) -> None:
    for _ in range(5):
        with upgraded(yard) as sock:
            sock.sendall(frame(0x3, b"reserved") + MORE)
            heard = read_to_the_end(sock)
            assert heard[:1] == bytes((0x80 | CLOSE,))
            assert int.from_bytes(heard[2:4], "big") == 1002


def said(*packets: Packet) -> bytes:
    return b"".join(encode(packet, V5) for packet in packets)


def test_who_hangs_up_and_is_back_at_once_has_said_goodbye_and_lost_nothing(yard: Yard) -> None:
    """It does not wait for its CONNACK, which waits for the disk; meanwhile it is not read from."""
    lasts = ConnectProperties(session_expiry_interval=100)
    with dial(yard.port) as watcher:
        watcher.sendall(said(Connect(V5, "watcher"), Subscribe(1, (Subscription("will/#"), Subscription("said/#")))))
        heard = b""
        while b"\x90\x05\x00\x01" not in heard:
            heard += watcher.recv(4096)
        for n in range(50):
            with dial(yard.port) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(said(Connect(V5, "hasty", properties=lasts, will=Will(f"will/{n:02}", b"x"))))
                sock.sendall(said(Publish(f"said/{n:02}", b"x")))
                sock.sendall(said(Disconnect()))
        with dial(yard.port) as sock:
            sock.sendall(said(Connect(V5, "hasty", True)))
            assert sock.recv(1) == b"\x20"
        watcher.sendall(said(Publish("said/last", b"x")))
        while b"said/last" not in heard:
            heard += watcher.recv(1 << 16)
    assert re.findall(rb"said/\d\d", heard) == [b"said/%02d" % n for n in range(50)]
    assert b"will/" not in heard
