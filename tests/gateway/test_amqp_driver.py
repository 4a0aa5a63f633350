"""The asyncio side over real loopback sockets: bytes move, timers act, and one bad handler harms nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.amqp import driver
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import Credit, Deliveries, Event, LinkAttached, Opened, OutcomeKind, Settled
from gateway.amqp.termini import Terminus


class Hub:
    """Accepts everything; counts what it got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.lost: list[Exception | None] = []
        self.gone = asyncio.Event()
        self.fail_on: type | None = None

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            if self.fail_on is not None and isinstance(event, self.fail_on):
                raise RuntimeError("a mistake of ours")
            match event:
                case Opened():
                    engine.open()
                case LinkAttached(link=link):
                    link.confirm()
                    assert isinstance(link, Receiver)
                    link.topup(200)
                case Deliveries(receiver=receiver, batch=batch):
                    self.bodies += [body for _, body in batch]
                    receiver.accept([handle for handle, _ in batch])
                    receiver.topup(200)

    def on_lost(self, error: Exception | None) -> None:
        self.lost.append(error)
        self.gone.set()


class App:
    """Sends `count` messages of `size` bytes on one link."""

    def __init__(self, count: int, size: int = 100) -> None:
        self.count, self.size, self.seq, self.accepted = count, size, 0, 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ready(self, protocol: AmqpProtocol) -> None:
        protocol.engine.open()
        protocol.engine.sender(protocol.engine.session(), "app", Terminus("q"))

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Credit(sender=sender):
                    self.pump(sender)
                case Settled(sender=sender):
                    for outcome in sender.take_outcomes():
                        assert outcome.kind is OutcomeKind.ACCEPTED
                        self.accepted += outcome.count
                    self.pump(sender)
                    if self.accepted == self.count and not self.done.done():
                        self.done.set_result(None)

    def pump(self, sender: Sender) -> None:
        batch = [(self.seq + i, bytes(self.size)) for i in range(min(sender.capacity, self.count - self.seq))]
        self.seq += len(batch)
        sender.send(batch)

    def on_lost(self, error: Exception | None) -> None:
        self.lost.set_result(None)


async def serve(hub: Hub) -> tuple[asyncio.Server, int, list[AmqpProtocol]]:
    protocols: list[AmqpProtocol] = []

    def make() -> AmqpProtocol:
        protocols.append(AmqpProtocol(lambda transport: Engine(server=True, container="hub", idle_timeout_s=5), hub))
        return protocols[-1]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1], protocols


async def dial(port: int, app: App) -> AmqpProtocol:
    _, protocol = await asyncio.get_running_loop().create_connection(
        lambda: AmqpProtocol(lambda transport: Engine(server=False, container="app"), app, app.ready),
        "127.0.0.1",
        port,
    )
    return protocol


def run(test: Callable[[], object]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()  # type: ignore[misc]

    asyncio.run(limited())


@pytest.mark.parametrize(("count", "size"), [(5000, 100), (20, 400_000), (2, 9_000_000)])
def test_messages_cross_a_socket_and_are_settled(count: int, size: int) -> None:
    async def script() -> None:
        hub, app = Hub(), App(count, size)
        server, port, _ = await serve(hub)
        protocol = await dial(port, app)
        await app.done
        assert len(hub.bodies) == count
        assert all(len(body) == size for body in hub.bodies)
        protocol.close()
        await app.lost
        await hub.gone.wait()
        assert hub.lost == [None]
        server.close()

    run(script)


def test_a_handler_that_raises_loses_its_connection_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def script() -> None:
        hub = Hub()
        server, port, _ = await serve(hub)
        good = App(3)
        protocol = await dial(port, good)
        await good.done
        hub.fail_on = Opened
        bad = App(1)
        await dial(port, bad)
        await bad.lost
        assert len(hub.lost) == 1
        good.count, good.done = 6, asyncio.get_running_loop().create_future()
        good.pump(protocol.engine.links[0])  # type: ignore[arg-type]
        await good.done
        protocol.abort()
        await good.lost
        server.close()

    run(script)
    assert "a mistake of ours" in caplog.text


def test_a_peer_that_never_answers_the_close_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "CLOSE_WAIT_S", 0.1)

    async def script() -> None:
        begun = asyncio.Event()

        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            begun.set()
            await reader.read(-1)
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        app = App(1)
        protocol = await dial(server.sockets[0].getsockname()[1], app)
        await begun.wait()
        protocol.close()
        await app.lost
        server.close()

    run(script)


def test_garbage_closes_the_connection() -> None:
    async def script() -> None:
        hub = Hub()
        server, port, _ = await serve(hub)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        answer = await reader.read(-1)
        assert answer.startswith(b"AMQP\x00\x01\x00\x00")
        writer.close()
        await hub.gone.wait()
        assert len(hub.lost) == 1
        server.close()

    run(script)
