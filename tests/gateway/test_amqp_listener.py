"""Who may attach to the listener and to what: SASL by transport, access rules, a reload, an app that is stuck."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from proton import ConnectionException, Message, symbol
from proton.reactor import DurableSubscription
from proton.utils import BlockingConnection, LinkDetached, SendException

from gateway import groups
from gateway.access import Access
from gateway.amqp import outgoing
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine
from gateway.amqp.events import Event, LinkAttached, RemoteClosed
from gateway.amqp.listener import AmqpListener, mechanisms, owner_of
from gateway.amqp.sasl import SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.broker import Broker
from gateway.committer import Committer
from gateway.config import Config, loads
from security.passwords import Cost, hash_password
from security.rules import Identity
from security.tls import client_context, server_context
from storeforward.batch import Batch
from storeforward.errors import JournalError
from storeforward.journal import Journal
from tests.pki import Pki

WAIT_S = 40.0
PASSWORDS = 'password_file = "passwords"'
CONFIG = """
[gateway]
id = "loco"
[amqp]
{keys}
[[address]]
name = "jobs"
kind = "queue"
"""


def config_of(directory: Path, keys: str = "", rules: str = "") -> Config:
    """Users anna and bert, whose passwords are their names."""
    lines = [f"{user}:{hash_password(user.encode(), Cost(ln=10))}\n" for user in ("anna", "bert")]
    (directory / "passwords").write_text("".join(lines))
    return loads(CONFIG.format(keys=keys) + rules, base=directory)


def access_of(directory: Path, keys: str = "", rules: str = "") -> Access:
    return Access(config_of(directory, keys, rules))


HERE, THERE = ip_address("127.0.0.1"), ip_address("192.0.2.1")
CERTIFIED = Identity("amqp", cn="loco", names=("loco",), address=THERE)


@pytest.mark.parametrize(
    ("claim", "tls", "keys", "offered"),
    [
        (Identity("amqp", address=HERE), False, "", ["PLAIN", "ANONYMOUS"]),
        (Identity("amqp", address=HERE), False, PASSWORDS, ["PLAIN"]),
        (Identity("amqp", address=THERE), False, "", []),
        (Identity("amqp", address=THERE), False, "allow_anonymous = true", ["ANONYMOUS"]),
        (Identity("amqp", address=THERE), True, PASSWORDS, ["PLAIN"]),
        (Identity("amqp", uid=1000), False, PASSWORDS, ["PLAIN", "ANONYMOUS"]),
        (CERTIFIED, True, PASSWORDS, ["EXTERNAL", "PLAIN", "ANONYMOUS"]),
    ],
)
def test_a_password_is_asked_for_only_where_it_is_private_and_no_name_only_where_one_is_not_needed(
    tmp_path: Path, claim: Identity, tls: bool, keys: str, offered: list[str]
) -> None:
    async def story() -> None:
        assert mechanisms(claim, tls=tls, access=access_of(tmp_path, keys)) == offered

    asyncio.run(story())


def test_a_subscriptions_owner_is_what_vouches_for_the_app_not_what_it_says_of_itself() -> None:
    assert owner_of(Identity("amqp", client="reader", address=HERE)) is None
    assert owner_of(Identity("amqp", user="anna", cn="loco")) == "user:anna"
    assert owner_of(CERTIFIED) == "cn:loco"
    assert owner_of(Identity("amqp", uid=0)) == "uid:0"


class Gateway:
    """A broker and its AMQP listener on a loop, without the rest of the daemon."""

    listener: AmqpListener
    port: int

    def __init__(self, journal: Journal, config: Config) -> None:
        self.journal = journal
        self.access = Access(config)
        self.broker = Broker(config, journal)
        self.committer = Committer(journal, asyncio.get_running_loop(), self._committed, self._fatal)

    def _committed(self, batch: Batch) -> None:
        self.broker.committed(batch)
        self.listener.committed(batch)

    def _fatal(self, error: JournalError) -> None:
        raise error


@asynccontextmanager
async def serving(path: Path, keys: str = "", rules: str = "", tls: ssl.SSLContext | None = None) -> Any:
    (path / "state").mkdir()
    journal = Journal.open(path / "state")
    gateway = Gateway(journal, config_of(path, keys, rules))
    gateway.listener = AmqpListener(
        gateway.broker,
        gateway.committer.kick,
        container="loco",
        connections_max=10,
        message_max_bytes=1 << 20,
        idle_timeout_s=30,
        window=100,
        access=gateway.access,
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
        gateway.access.stop()
        journal.close()


def run(path: Path, script: Callable[[Gateway], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(path, **options) as gateway:
            await script(gateway)

    asyncio.run(main())


def connect(gateway: Gateway, **options: Any) -> BlockingConnection:
    scheme = "amqps" if "ssl_domain" in options else "amqp"
    return BlockingConnection(f"{scheme}://127.0.0.1:{gateway.port}", timeout=WAIT_S, **options)


def test_a_right_password_opens_and_a_wrong_one_or_none_does_not(tmp_path: Path) -> None:
    def apps(gateway: Gateway) -> None:
        for _ in range(2):  # the second time it is known already
            app = connect(gateway, user="anna", password="anna", allowed_mechs="PLAIN")
            assert {peer.describe()["user"] for peer in gateway.listener.peers} == {"user:anna"}
            app.close()
        for wrong in ({"user": "anna", "password": "bert"}, {"user": "nobody", "password": ""}, {}):
            with pytest.raises(ConnectionException):
                connect(gateway, **wrong)

    async def script(gateway: Gateway) -> None:
        await asyncio.to_thread(apps, gateway)

    run(tmp_path, script, keys=PASSWORDS)


def test_a_verified_certificate_is_an_identity_without_a_password(tmp_path: Path, pki: Pki) -> None:
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
        assert [peer.describe()["user"] for peer in gateway.listener.peers] == ["cn:loco-4711"]
        protocol.abort()

    tls = server_context(pki.server.cert, pki.server.key, pki.ca)
    rules = '[[access]]\nwho = "cn:loco-4711"\nsubscribe = "a"\n'
    run(tmp_path, script, keys="allow_anonymous = false", rules=rules, tls=tls)


ALLOWED = """
[[access]]
who = "*"
publish = "open/#"
subscribe = "open/#"
"""


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

    run(tmp_path, script, keys="allow_anonymous = true", rules=ALLOWED)


def test_a_reload_ends_the_links_that_new_rules_forbid(tmp_path: Path) -> None:
    def attach(gateway: Gateway) -> Any:
        app = connect(gateway)
        return app, app.create_receiver("open/a", credit=10), app.create_sender("open/a"), app.create_sender("open/b")

    def after(app: Any, receiver: Any, sender: Any, other: Any) -> None:
        app.wait(lambda: receiver.link.remote_condition and sender.link.remote_condition, timeout=WAIT_S)
        assert receiver.link.remote_condition.name == "amqp:unauthorized-access"
        assert sender.link.remote_condition.name == "amqp:unauthorized-access"
        other.send(Message(body="x"), timeout=WAIT_S)
        app.close()

    async def script(gateway: Gateway) -> None:
        links = await asyncio.to_thread(attach, gateway)
        gateway.access.reload(
            config_of(tmp_path, "allow_anonymous = true", ALLOWED.replace('publish = "open/#', 'publish = "open/b'))
        )
        gateway.listener.reload()
        assert len(gateway.listener.peers) == 1
        with pytest.raises(LinkDetached):
            await asyncio.to_thread(after, *links)

    run(tmp_path, script, keys="allow_anonymous = true", rules=ALLOWED)


def test_a_durable_subscription_is_its_owners_whatever_container_name_others_give(tmp_path: Path) -> None:
    def attach(gateway: Gateway, user: str) -> BlockingConnection:
        from proton.reactor import Container

        container = Container()
        container.container_id = "reader"
        app = connect(gateway, container=container, user=user, password=user, allowed_mechs="PLAIN")
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

    run(tmp_path, script, keys=PASSWORDS)


def test_a_container_id_is_its_only_connections_where_that_asks_for_it_until_it_goes(tmp_path: Path) -> None:
    from proton.reactor import Container

    def open_as(gateway: Gateway, user: str, container_id: str, *, sole: bool) -> BlockingConnection:
        container = Container()
        container.container_id = container_id
        more: dict[str, Any] = {"desired_capabilities": [symbol("sole-connection-for-container")]} if sole else {}
        return connect(gateway, container=container, user=user, password=user, allowed_mechs="PLAIN", **more)

    def refused(gateway: Gateway, *, sole: bool) -> None:
        with pytest.raises(ConnectionException) as error:
            open_as(gateway, "anna", "reader", sole=sole)
        assert "amqp:invalid-field" in str(error.value)

    def at_once(gateway: Gateway) -> None:
        """A client that does not wait for the answer to its open, as part 2.4.5 allows, with a durable subscription."""
        client = Engine(server=False, container="reader", sasl=SaslClient(["PLAIN"], "anna", "anna"))
        client.open()
        source = Terminus(address="cab/a", durability=Durability.UNSETTLED_STATE, expiry=Expiry.NEVER)
        client.receiver(client.session(), "sub", source, credit=1)
        heard: list[Event] = []
        with socket.create_connection(("127.0.0.1", gateway.port), WAIT_S) as sock:
            while not client.finished:
                while data := client.data_to_send():
                    sock.sendall(data)
                if client.finished or not (data := sock.recv(65536)):
                    break
                heard += client.receive(data, time.monotonic())
        closed = next(each for each in heard if isinstance(each, RemoteClosed))
        assert closed.condition == "amqp:invalid-field"
        assert not any(isinstance(each, LinkAttached) for each in heard)

    def apps(gateway: Gateway) -> None:
        first = open_as(gateway, "anna", "reader", sole=True)
        assert "sole-connection-for-container" in str(first.conn.remote_offered_capabilities)
        refused(gateway, sole=True)
        refused(gateway, sole=False)
        at_once(gateway)
        assert not gateway.listener.directory.subscriptions, "of one that is refused nothing is kept"
        others = [open_as(gateway, "bert", "reader", sole=True), open_as(gateway, "anna", "other", sole=True)]
        sender = first.create_sender("cab/a")
        sender.send(Message(body="x"), timeout=WAIT_S)  # whoever was refused disturbed nobody
        for _ in range(5):  # free from the close on, whenever the socket goes
            first.close()
            first = open_as(gateway, "anna", "reader", sole=True)
        for each in (first, *others):
            each.close()
        shared = [open_as(gateway, "anna", "reader", sole=False) for _ in range(2)]
        refused(gateway, sole=True)
        for each in shared:
            each.close()
        open_as(gateway, "anna", "reader", sole=True).close()

    async def script(gateway: Gateway) -> None:
        await asyncio.to_thread(apps, gateway)
        assert not gateway.listener._claims

    run(tmp_path, script, keys=PASSWORDS)


def test_an_app_that_only_connects_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.amqp.listener.HANDSHAKE_S_MAX", 0.1)

    async def script(gateway: Gateway) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert not gateway.listener.peers

    run(tmp_path, script)


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

    run(tmp_path, script)


RELOADED = """
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "alarms"
topics = ["cab/#"]
hub = "depot"
address = "edge"
"""


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
        gateway.broker.reload(config_of(tmp_path, rules=RELOADED))
        gateway.listener.reload()
        assert await asyncio.to_thread(go_on, receiver, sender) == ["before", "after"]
        assert gateway.journal.streams["alarms"].rows == 1
        await asyncio.to_thread(app.close)

    run(tmp_path, script)


def test_a_connection_too_many_is_refused_with_its_peer_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(gateway: Gateway) -> None:
        gateway.listener.connections_max = 0
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        host, port = writer.get_extra_info("sockname")
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        refused = next(r for r in caplog.records if r.getMessage() == "connection refused: too many")
        assert refused.__dict__["peer"] == f"{host}:{port}"

    run(tmp_path, script)
