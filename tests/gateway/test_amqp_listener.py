"""Who may attach to the listener and to what: SASL by transport, access rules, a reload, an app that is stuck."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from proton import ConnectionException, Message
from proton.reactor import DurableSubscription
from proton.utils import BlockingConnection, LinkDetached, SendException

from gateway import groups
from gateway.amqp import outgoing
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Event, LinkAttached, Terminus
from gateway.amqp.listener import Access, AmqpListener, common_name, mechanisms
from gateway.amqp.sasl import SaslClient
from gateway.broker import Broker
from gateway.committer import Committer
from gateway.config import loads
from security.tls import client_context, server_context
from storeforward.errors import JournalError
from storeforward.journal import Batch, Journal
from tests.pki import Pki

WAIT_S = 10.0
CONFIG = """
[gateway]
id = "loco"
[[address]]
name = "jobs"
kind = "queue"
"""


@pytest.mark.parametrize(
    ("private", "certificate", "passwords", "anonymous", "offered"),
    [
        (True, True, True, True, ["EXTERNAL", "PLAIN", "ANONYMOUS"]),
        (True, False, True, False, ["PLAIN"]),
        (False, False, True, False, []),
        (False, False, True, True, ["ANONYMOUS"]),
        (True, False, False, True, ["ANONYMOUS"]),
        (True, True, False, False, ["EXTERNAL"]),
    ],
)
def test_a_password_is_asked_for_only_where_it_is_private(
    private: bool, certificate: bool, passwords: bool, anonymous: bool, offered: list[str]
) -> None:
    access = Access(authenticate=(lambda user, password: True) if passwords else None, anonymous=anonymous)
    assert mechanisms(private=private, certificate=certificate, access=access) == offered


def test_an_identity_is_the_certificates_common_name() -> None:
    certificate = {"subject": ((("organizationName", "x"),), (("commonName", "loco-4711"),))}
    assert common_name(certificate) == "loco-4711"
    assert common_name({}) is None


class Gateway:
    """A broker and its AMQP listener on a loop, without the rest of the daemon."""

    listener: AmqpListener
    port: int

    def __init__(self, journal: Journal, config: str) -> None:
        self.journal = journal
        self.broker = Broker(loads(config), journal)
        self.committer = Committer(journal, asyncio.get_running_loop(), self._committed, self._fatal)

    def _committed(self, batch: Batch) -> None:
        self.broker.committed(batch)
        self.listener.committed(batch)

    def _fatal(self, error: JournalError) -> None:
        raise error


@asynccontextmanager
async def serving(path: Path, access: Access, tls: ssl.SSLContext | None = None, config: str = CONFIG) -> Any:
    journal = Journal.open(path)
    gateway = Gateway(journal, config)
    gateway.listener = AmqpListener(
        gateway.broker,
        gateway.committer.kick,
        container="loco",
        connections_max=10,
        message_max_bytes=1 << 20,
        idle_timeout_s=30,
        window=100,
        access=access,
    )
    server = await asyncio.get_running_loop().create_server(gateway.listener.protocol, "127.0.0.1", 0, ssl=tls)
    gateway.port = server.sockets[0].getsockname()[1]
    try:
        yield gateway
    finally:
        server.close()
        gateway.listener.stop()
        await asyncio.sleep(0.05)
        await gateway.committer.drain()
        gateway.committer.stop()
        journal.close()


def run(path: Path, script: Callable[[Gateway], Awaitable[None]], access: Access, **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(path, access, **options) as gateway:
            await script(gateway)

    asyncio.run(main())


def connect(gateway: Gateway, **options: Any) -> BlockingConnection:
    scheme = "amqps" if "ssl_domain" in options else "amqp"
    return BlockingConnection(f"{scheme}://127.0.0.1:{gateway.port}", timeout=WAIT_S, **options)


RIGHT = Access(authenticate=lambda user, password: (user, password) == ("anna", "secret"), anonymous=False)


def test_a_right_password_opens_and_a_wrong_one_or_none_does_not(tmp_path: Path) -> None:
    def apps(gateway: Gateway) -> None:
        app = connect(gateway, user="anna", password="secret", allowed_mechs="PLAIN", sasl_enabled=True)
        assert {peer.describe()["user"] for peer in gateway.listener.peers} == {"anna"}
        app.close()
        for wrong in ({"user": "anna", "password": "guess"}, {"allowed_mechs": "ANONYMOUS"}):
            with pytest.raises(ConnectionException):
                connect(gateway, **wrong)

    async def script(gateway: Gateway) -> None:
        await asyncio.to_thread(apps, gateway)

    run(tmp_path, script, RIGHT)


def test_a_verified_certificate_is_an_identity_without_a_password(tmp_path: Path, pki: Pki) -> None:
    seen: list[tuple[str | None, str]] = []

    def may_subscribe(identity: str | None, filter_: str) -> bool:
        seen.append((identity, filter_))
        return True

    class App:
        def __init__(self) -> None:
            self.attached = asyncio.Event()

        def ready(self, protocol: AmqpProtocol) -> None:
            protocol.engine.open()
            protocol.engine.receiver(protocol.engine.session(), "link", Terminus("a"))

        def on_events(self, engine: Engine, events: list[Event]) -> None:
            if any(isinstance(event, LinkAttached) for event in events):
                self.attached.set()

        def on_lost(self, error: Exception | None) -> None: ...

    async def script(gateway: Gateway) -> None:
        app = App()
        _, protocol = await asyncio.get_running_loop().create_connection(
            lambda: AmqpProtocol(
                lambda _: Engine(server=False, container="app", sasl=SaslClient(["EXTERNAL"])), app, app.ready
            ),
            "127.0.0.1",
            gateway.port,
            ssl=client_context(pki.ca, pki.client.cert, pki.client.key),
            server_hostname="localhost",
        )
        await app.attached.wait()
        assert seen == [("loco-4711", "a")]
        assert [peer.describe()["user"] for peer in gateway.listener.peers] == ["loco-4711"]
        protocol.abort()

    tls = server_context(pki.server.cert, pki.server.key, pki.ca)
    run(tmp_path, script, Access(anonymous=False, may_subscribe=may_subscribe), tls=tls)


ALLOWED = Access(
    may_publish=lambda identity, topic: topic.startswith("open/"),
    may_subscribe=lambda identity, filter_: filter_.startswith("open/"),
)


def test_a_link_or_a_message_that_the_rules_forbid_is_refused_and_what_they_allow_goes_on(tmp_path: Path) -> None:
    def apps(gateway: Gateway) -> None:
        app = connect(gateway)
        for attach in (app.create_receiver, app.create_sender):
            with pytest.raises(LinkDetached) as refused:
                attach("closed/a")
            assert refused.value.condition == "amqp:unauthorized-access"
        receiver, anywhere = app.create_receiver("open/#", credit=10), app.create_sender(None)
        with pytest.raises(SendException):
            anywhere.send(Message(address="closed/a", body="x"), timeout=WAIT_S)
        anywhere.send(Message(address="open/a", body="y"), timeout=WAIT_S)
        assert receiver.receive(timeout=WAIT_S).body == "y"
        with pytest.raises(LinkDetached):  # a wildcard is asked about as such
            app.create_receiver("#")
        dynamic = app.create_receiver(None, dynamic=True, credit=1)  # replies need no rule: who knows the address may
        anywhere.send(Message(address=dynamic.remote_source.address, body="z"), timeout=WAIT_S)
        assert dynamic.receive(timeout=WAIT_S).body == "z"
        app.close()

    async def script(gateway: Gateway) -> None:
        await asyncio.to_thread(apps, gateway)

    run(tmp_path, script, ALLOWED)


def test_a_durable_subscription_is_its_owners_whatever_container_name_others_give(tmp_path: Path) -> None:
    access = Access(authenticate=lambda user, password: True, anonymous=False)

    def attach(gateway: Gateway, user: str) -> BlockingConnection:
        from proton.reactor import Container

        container = Container()
        container.container_id = "reader"
        app = connect(gateway, container=container, user=user, password="x", allowed_mechs="PLAIN")
        app.create_receiver("cab/a", name="sub", options=[DurableSubscription()])
        return app

    def apps(gateway: Gateway) -> None:
        attach(gateway, "anna").close()
        with pytest.raises(LinkDetached) as refused:
            attach(gateway, "bert")
        assert refused.value.condition == "amqp:unauthorized-access"
        attach(gateway, "anna").close()

    async def script(gateway: Gateway) -> None:
        await asyncio.to_thread(apps, gateway)

    run(tmp_path, script, access)


def test_an_app_that_only_connects_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.amqp.listener.HANDSHAKE_S_MAX", 0.1)

    async def script(gateway: Gateway) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert not gateway.listener.peers

    run(tmp_path, script, Access())


def test_a_receiver_that_holds_up_its_queue_is_thrown_out_and_its_messages_go_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "GROUP_AHEAD_MAX", 5)
    monkeypatch.setattr(outgoing, "STUCK_S_MAX", 0.0)

    def attach(gateway: Gateway) -> list[Any]:
        stuck = connect(gateway).create_receiver("jobs", credit=2)
        working = connect(gateway).create_receiver("jobs", credit=10)
        app = connect(gateway)
        sender = app.create_sender("jobs")
        for n in range(8):
            sender.send(Message(body=n), timeout=WAIT_S)
        return [stuck, working]

    def take(receiver: Any, count: int) -> list[int]:
        got = []
        for _ in range(count):
            got.append(receiver.receive(timeout=WAIT_S).body)
            receiver.accept()
        return got

    async def script(gateway: Gateway) -> None:
        stuck, working = await asyncio.to_thread(attach, gateway)
        assert await asyncio.to_thread(take, working, 3) == [2, 3, 4]
        gateway.listener.housekeeping()
        assert sorted(await asyncio.to_thread(take, working, 5)) == [0, 1, 5, 6, 7]
        for receiver in (stuck, working):
            await asyncio.to_thread(receiver.connection.close)

    run(tmp_path, script, Access())


RELOADED = (
    CONFIG
    + """
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "alarms"
topics = ["cab/#"]
hub = "depot"
address = "edge"
"""
)


def test_a_reload_moves_senders_and_receivers_to_the_new_streams(tmp_path: Path) -> None:
    def attach(gateway: Gateway) -> list[Any]:
        app = connect(gateway)
        receiver, sender = app.create_receiver("cab/a", credit=10), app.create_sender("cab/a")
        sender.send(Message(body="before"), timeout=WAIT_S)
        return [app, receiver, sender]

    def go_on(receiver: Any, sender: Any) -> list[str]:
        sender.send(Message(body="after"), timeout=WAIT_S)
        return [receiver.receive(timeout=WAIT_S).body for _ in range(2)]

    async def script(gateway: Gateway) -> None:
        app, receiver, sender = await asyncio.to_thread(attach, gateway)
        gateway.broker.reload(loads(RELOADED))
        gateway.listener.reload()
        assert await asyncio.to_thread(go_on, receiver, sender) == ["before", "after"]
        assert gateway.journal.streams["alarms"].rows == 1
        await asyncio.to_thread(app.close)

    run(tmp_path, script, Access())
