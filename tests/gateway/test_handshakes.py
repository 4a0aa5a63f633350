"""Between accept and protocol, on a loop of our own: what is bounded, what is told, and that writing can be paused."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from gateway import accepting, transports
from gateway.accepting import open_server
from gateway.config_values import Listen
from gateway.mqtt.websocket import Rules
from gateway.mqtt.websocket_driver import WebSocketProtocol
from gateway.transports import Handshakes, ServerTls, TlsFiles
from gateway.turns import Account, Turns
from security.tls import client_context
from tests.pki import Pki
from tests.websocket import BINARY, CLOSE, frame, frames, request

WAIT_S = 30.0
WSS = Listen("127.0.0.1", 0, scheme="wss", url_path="/mqtt")
WS = Listen("127.0.0.1", 0, scheme="ws", url_path="/mqtt")


class Inner(asyncio.Protocol):
    """Echoes, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.paused = asyncio.Event()
        self.resumed = asyncio.Event()
        self.lost = asyncio.Event()
        self.account = Account()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.paused.set()

    def resume_writing(self) -> None:
        self.resumed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")
        self.lost.set()


class Bench:
    def __init__(self, server: asyncio.Server, handshakes: Handshakes, inners: list[Inner]) -> None:
        self.port: int = server.sockets[0].getsockname()[1]
        self.handshakes = handshakes
        self.inners = inners

    async def dial(self, context: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name = "127.0.0.1" if context else None
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name)


@asynccontextmanager
async def bench(listen: Listen, tls: ServerTls | None = None, handshakes_max: int = 10) -> AsyncIterator[Bench]:
    handshakes, inners = Handshakes(handshakes_max), list[Inner]()

    def inner() -> Inner:
        inners.append(Inner())
        return inners[-1]

    def websocket() -> WebSocketProtocol:
        return WebSocketProtocol(inner, Rules(listen.url_path), handshakes)

    async with asyncio.timeout(WAIT_S):
        server = await open_server(websocket, listen, handshakes, tls)
        try:
            yield Bench(server, handshakes, inners)
        finally:
            server.close()
            handshakes.stop()
            for each in inners:
                each.transport.abort()


@pytest.fixture
def tls(pki: Pki) -> ServerTls:
    return ServerTls(TlsFiles(pki.server.cert, pki.server.key))


def test_who_never_begins_the_tls_handshake_is_cut_off_and_named(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transports, "HANDSHAKE_S", 0.2)

    async def run() -> None:
        async with bench(WSS, tls) as at:
            reader, writer = await at.dial()
            host, port = writer.get_extra_info("sockname")
            with caplog.at_level(logging.WARNING):
                assert await reader.read() == b""
            (record,) = caplog.records
            assert record.__dict__["peer"] == f"{host}:{port}"
            assert "no handshake within 0.2 s" in record.__dict__["error"]
            assert len(at.handshakes) == 0
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("listen", [WS, WSS])
def test_handshakes_are_bounded_in_number_and_make_room_when_they_end(
    tls: ServerTls, pki: Pki, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with bench(listen, tls, handshakes_max=2) as at:
            idle = [await at.dial() for _ in range(2)]
            reader, writer = await at.dial()
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            assert "too many handshakes" in caplog.text
            for reader, writer in idle:
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            assert len(at.handshakes) == 0
            reader, writer = await at.dial(client_context(pki.ca) if listen.tls else None)
            writer.write(request())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            assert len(at.handshakes) == 0  # an open connection is no handshake
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("listen", [WS, WSS])
def test_everything_said_in_one_breath_arrives(tls: ServerTls, pki: Pki, listen: Listen) -> None:
    async def run() -> None:
        async with bench(listen, tls) as at:
            reader, writer = await at.dial(client_context(pki.ca) if listen.tls else None)
            writer.write(request() + frame(BINARY, b"a") + frame(BINARY, b"b"))
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(4) == b"\x82\x02ab"
            writer.write(frame(CLOSE, (1000).to_bytes(2)))
            (answer,) = frames(await reader.read())
            assert answer.code == 1000
            (inner,) = at.inners
            await inner.lost.wait()
            assert inner.told == ["made", "lost"]
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("listen", [WS, WSS])
def test_a_client_that_reads_nothing_pauses_its_writer_until_it_reads(tls: ServerTls, pki: Pki, listen: Listen) -> None:
    async def run() -> None:
        async with bench(listen, tls) as at:
            reader, writer = await at.dial(client_context(pki.ca) if listen.tls else None)
            writer.write(request())
            await reader.readuntil(b"\r\n\r\n")
            (inner,) = at.inners
            inner.transport.set_write_buffer_limits(high=64 << 10)
            sent = 0
            while not inner.paused.is_set():
                inner.transport.write(bytes(16 << 10))
                sent += 1
                assert sent < 10_000
                await asyncio.sleep(0)
            assert not inner.resumed.is_set()
            whole = sent * (4 + (16 << 10))
            assert len(await reader.readexactly(whole)) == whole
            await inner.resumed.wait()
            writer.close()

    asyncio.run(run())


def test_our_close_says_so_and_ends_without_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.mqtt.websocket.CLOSE_WAIT_S", 0.2)

    async def run() -> None:
        async with bench(WS) as at:
            reader, writer = await at.dial()
            writer.write(request())
            await reader.readuntil(b"\r\n\r\n")
            (inner,) = at.inners
            inner.transport.write(b"last")
            inner.transport.close()
            assert inner.transport.is_closing()
            inner.transport.write(b"too late")
            last, close = frames(await reader.read())
            assert (last.payload, close.code) == (b"last", 1000)
            await inner.lost.wait()
            writer.close()

    asyncio.run(run())


def test_our_close_hears_the_answer_although_nobody_was_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.mqtt.websocket.CLOSE_WAIT_S", 10 * WAIT_S)  # only the answer can end it in time

    async def run() -> None:
        async with bench(WS) as at:
            reader, writer = await at.dial()
            writer.write(request())
            await reader.readuntil(b"\r\n\r\n")
            (inner,) = at.inners
            inner.transport.pause_reading()
            writer.write(frame(BINARY, b"unread") + frame(CLOSE, (1000).to_bytes(2)))
            inner.transport.close()
            (close,) = frames(await reader.read())
            assert close.code == 1000
            await inner.lost.wait()
            writer.close()

    asyncio.run(run())


def test_a_protocol_that_fails_at_its_begin_loses_its_connection_only(
    tls: ServerTls, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> asyncio.Protocol:
        raise RuntimeError("a mistake of ours")

    async def run() -> None:
        async with asyncio.timeout(WAIT_S):
            handshakes = Handshakes(1)
            server = await open_server(broken, Listen("127.0.0.1", 0, scheme="mqtts"), handshakes, tls)
            for _ in range(2):
                port = server.sockets[0].getsockname()[1]
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=client_context(pki.ca), server_hostname="127.0.0.1"
                )
                assert await reader.read() == b""
                writer.close()
            server.close()

    asyncio.run(run())
    assert caplog.text.count("connection failed at its begin") == 2


@pytest.mark.parametrize("ready", [True, False])
def test_a_connection_that_can_not_be_accepted_does_not_end_the_listening(
    ready: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """accept(2) hands over errors of the network and of firewalls, in a turn, too."""
    errors = [OSError(errno.EPERM, "not permitted"), OSError(errno.ENETDOWN, "the network is down")]
    accept = socket.socket.accept

    def failing(self: socket.socket) -> object:
        if errors:
            raise errors.pop()
        return accept(self)

    monkeypatch.setattr(accepting, "RETRY_S", 0.01)
    monkeypatch.setattr(Turns, "ready", ready)
    monkeypatch.setattr(socket.socket, "accept", failing)

    async def run() -> None:
        async with bench(WS) as at:
            reader, writer = await at.dial()
            writer.write(request("/mqtt"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 101")
            writer.close()

    asyncio.run(run())
    assert caplog.text.count("socket.accept() failed") == 2
