"""A connection to a hub that is given up: what it had not delivered must never arrive, real sockets."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine
from gateway.amqp.sasl import SaslClient
from gateway.config import Hub, HubUrl
from gateway.uplink.attempt import Attempt, HubTls
from gateway.uplink.state import Failure
from gateway.uplink.tcp import discard, look

HOST = "127.0.0.1"
PIECE = b"x" * (1 << 20)


def _listener() -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.bind((HOST, 0))
    server.listen()
    return server


def _read_all(peer: socket.socket) -> int:
    size = 0
    peer.settimeout(60)
    while data := peer.recv(1 << 16):
        size += len(data)
    return size


@pytest.mark.parametrize("discarded", [False, True])
def test_what_the_kernel_still_holds_goes_only_where_it_is_not_discarded(discarded: bool) -> None:
    with _listener() as server, socket.create_connection(server.getsockname()) as sock:
        peer, _ = server.accept()
        with peer:
            sock.setblocking(False)
            taken = sock.send(PIECE)
            line = look(sock)
            assert line is not None
            assert line.queued_bytes, "all of it has arrived already"
            if discarded:
                discard(sock)
            sock.close()
            if discarded:
                with pytest.raises(ConnectionResetError):
                    _read_all(peer)
            else:
                assert _read_all(peer) == taken, "a closed connection goes on sending: this is what has to be kept away"


def test_a_connection_that_the_uplink_gives_up_is_reset() -> None:
    failed: list[str] = []
    owner = SimpleNamespace(attempt_failed=lambda attempt, failure, error, waited_s: failed.append(error))

    async def story() -> None:
        with _listener() as server:
            port = server.getsockname()[1]
            hub = SimpleNamespace(connect_timeout_s=30.0)
            attempt = Attempt(cast(Any, owner), cast(Hub, hub), cast(HubTls, None), cast(HubUrl, None), "edge")
            engine = Engine(server=False, container="edge", hostname=HOST, sasl=SaslClient(["ANONYMOUS"]))
            transport, protocol = await asyncio.get_running_loop().create_connection(
                lambda: AmqpProtocol(lambda _: engine, attempt), HOST, port
            )
            attempt.protocol = protocol
            peer, _ = server.accept()
            with peer:
                transport.write(PIECE)
                attempt.fail("the line is silent", Failure.UNREACHABLE)
                await asyncio.sleep(0)  # asyncio closes the socket in its next turn
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(_read_all, peer)

    asyncio.run(story())
    assert failed == ["the line is silent"]
