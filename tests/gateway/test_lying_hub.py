"""Hubs that lie, stall or break off at every stage: one clear error each, and nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import gateway.transports  # noqa: F401 - with it, asyncio's servers send alerts
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import Credit, Deliveries, Event, LinkAttached, Opened, Settled
from gateway.amqp.message import decode, encode
from gateway.amqp.sasl import SaslServer
from gateway.committer import Committer
from gateway.config import loads
from gateway.uplink.attempt import Attempt
from gateway.uplink.hub import HubLink
from gateway.uplink.state import ATTEMPTS_MAX, STAGGER_S, Failure
from gateway.uplink.tcp import discard
from storeforward.journal import Journal
from storeforward.streams import StreamLimits
from tests.pki import Pki

WAIT_S = 40.0
SASL = b"AMQP\x03\x01\x00\x00"
MECHANISMS = bytes.fromhex("00000000 02010000 005340c00f01e00c01a309") + b"ANONYMOUS"
MECHANISMS = len(MECHANISMS).to_bytes(4, "big") + MECHANISMS[4:]
OUTCOME_OK = bytes.fromhex("0000001002010000005344c003015000")
OUTCOME_AUTH = bytes.fromhex("0000001002010000005344c003015001")

CONFIG = """
[gateway]
id = "loco"
[[hub]]
name = "depot"
urls = ["{scheme}://127.0.0.1:{port}"]
{extra}
connect_timeout = "{connect_timeout}"
sasl_timeout = "200ms"
open_timeout = "200ms"
attach_timeout = "200ms"
settle_timeout = "300ms"
retry_min = "10ms"
retry_max = "20ms"
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge"
"""


SECOND_STREAM = """
[[outbound]]
stream = "logs"
topics = ["log/#"]
hub = "depot"
address = "full"
"""


INBOUND = """
[[inbound]]
stream = "maps"
hub = "depot"
address = "maps"
topic = "maps/x"
"""


class Hub:
    """A hub in earnest; `settle` decides what becomes of each batch, `refuse` of each attach."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.receivers: list[Receiver] = []
        self.refuse = False
        self.open = True
        self.credit = 100
        self.sessions_max = 64
        self.settle: Callable[[Receiver, list[int]], None] = lambda link, handles: link.accept(handles)

    def protocol(self) -> AmqpProtocol:
        return AmqpProtocol(lambda _: self.engine(), self, self.ready)

    def engine(self) -> Engine:
        sasl = SaslServer(["ANONYMOUS"])
        return Engine(server=True, container="depot", sasl=sasl, sessions_max=self.sessions_max)

    def ready(self, protocol: AmqpProtocol) -> None:
        pass

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Opened() if self.open:
                    engine.open()
                case LinkAttached(link, True):
                    assert isinstance(link, Receiver)
                    if self.refuse:
                        link.refuse("amqp:not-found", "no such address")
                    else:
                        self.receivers.append(link)
                        link.confirm()
                        link.topup(self.credit)
                case Deliveries(receiver, batch):
                    self.got += [decode(body).body.decode() for _, body in batch]
                    self.settle(receiver, [handle for handle, _ in batch])
                case _:
                    pass

    def on_lost(self, error: Exception | None) -> None:
        pass


class Script(asyncio.Protocol):
    """Says its lines, one after each thing it hears, then hangs up or falls silent."""

    def __init__(self, lines: list[bytes], hang_up: bool) -> None:
        self.lines = list(lines)
        self.hang_up = hang_up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if not self.lines and self.hang_up:
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self.lines:
            self.transport.write(self.lines.pop(0))
        if not self.lines and self.hang_up:
            self.transport.close()


class Bench:
    """A journal, its committer, one hub link, and a port where the listener can be changed."""

    def __init__(self, path: Path, extra: str, scheme: str, more: str = "") -> None:
        self.path, self.extra, self.scheme, self.more = path, extra, scheme, more
        self.connect_timeout = "1s"
        self.good = Hub()
        self.factory: Callable[[], asyncio.BaseProtocol] = self.good.protocol
        self.context: ssl.SSLContext | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: self.factory(), "127.0.0.1", 0, ssl=self.context)
        port = self.server.sockets[0].getsockname()[1]
        config = loads(
            CONFIG.format(port=port, extra=self.extra, scheme=self.scheme, connect_timeout=self.connect_timeout)
            + self.more
        )
        self.journal = Journal.open(self.path)
        self.stream = self.journal.stream("alarms", "outbound")
        self.cursor = self.journal.cursor(self.stream, "uplink", "uplink")
        if config.outbound[1:]:
            self.second = self.journal.stream("logs", "outbound")
            self.journal.cursor(self.second, "uplink", "uplink")
        for inbound in config.inbound:
            maps = self.journal.stream(inbound.stream, "inbound", StreamLimits(1000, 20))
            self.journal.cursor(maps, "somebody", "mqtt")
        self.faults: list[Exception] = []
        self.committer = Committer(self.journal, loop, lambda batch: self.link.committed(), self.faults.append)
        self.link = HubLink(config.hubs[0], "loco", config.outbound, config.inbound, self.journal, self.committer.kick)

    def put(self, *payloads: str) -> None:
        for payload in payloads:
            self.journal.append(self.stream, "alarm/x", lambda seq, body: encode(body), payload.encode())
        self.committer.kick()

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():  # noqa: ASYNC110 - what is waited for is the peer's state, which has no event
                await asyncio.sleep(0.005)

    async def error(self, text: str) -> None:
        """Until the link's one error says this."""
        try:
            await self.until(lambda: text in (self.link.describe()["error"] or ""))
        except TimeoutError:
            raise AssertionError(f"expected {text!r}, found {self.link.describe()}") from None

    async def drained(self, expected: str) -> None:
        """The next good connection takes everything, in order."""
        self.factory = self.good.protocol
        self.link.network_changed()
        await self.until(lambda: self.cursor.position > len(expected))
        self.journal.write_cursors()  # as the daemon does a few times a second
        self.committer.kick()
        await self.until(lambda: self.cursor.durable > len(expected))
        assert "".join(dict.fromkeys(self.good.got)) == expected
        assert not self.faults
        assert self.journal.loss_count == self.journal.dead_count == 0


@asynccontextmanager
async def bench_at(
    path: Path,
    extra: str = "",
    scheme: str = "amqp",
    context: ssl.SSLContext | None = None,
    connect_timeout: str = "1s",
    more: str = "",
) -> Any:
    bench = Bench(path, extra, scheme, more)
    bench.context = context
    bench.connect_timeout = connect_timeout
    await bench.start()
    try:
        yield bench
    finally:
        bench.link.stop()
        bench.server.close()
        await asyncio.sleep(0)
        await bench.committer.drain()
        bench.committer.stop()
        bench.journal.close()


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(2 * WAIT_S):
            await work

    asyncio.run(limited())


OPEN_STAGES = {
    "after TCP": [],
    "after the SASL header": [SASL],
    "after the mechanisms": [SASL + MECHANISMS],
    "after the outcome": [SASL + MECHANISMS, OUTCOME_OK],
}


@pytest.mark.parametrize("lines", OPEN_STAGES.values(), ids=OPEN_STAGES)
@pytest.mark.parametrize("hang_up", [True, False], ids=["hangs up", "falls silent"])
def test_a_hub_that_ends_or_stalls_the_handshake(tmp_path: Path, lines: list[bytes], hang_up: bool) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.factory = lambda: Script(lines, hang_up)
            bench.put(*"abc")
            bench.link.start()
            before = "" if lines else " before it said anything: it may want TLS (amqps://)"
            await bench.error(f"the hub ended the connection{before}" if hang_up else "no answer within")
            await bench.drained("abc")

    run(story())


@pytest.mark.parametrize(
    "garbage",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 64, SASL + b"\xff" * 64, SASL + MECHANISMS + b"\x00\x00\x00\x01"],
    ids=["http", "zeros", "a bad frame", "a short frame"],
)
def test_garbage_is_one_error_and_costs_nothing(tmp_path: Path, garbage: bytes) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.factory = lambda: Script([garbage], False)
            bench.put(*"abc")
            bench.link.start()
            await bench.error("amqp:")
            await bench.drained("abc")

    run(story())


def test_refused_credentials_say_so_and_are_retried_slowly(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.factory = lambda: Script([SASL + MECHANISMS, OUTCOME_AUTH], False)
            bench.put("a")
            bench.link.start()
            await bench.until(lambda: bench.link.describe()["state"] == "backoff")
            told = bench.link.describe()
            assert told["error"] == (
                "amqp:unauthorized-access: sasl ANONYMOUS was refused: auth; "
                "see user, password_file, cert and sasl of this hub"
            )
            assert told["retry_in_s"] > 4, "much slower than the 20 ms of other failures"
            await bench.drained("a")

    run(story())


def test_a_hub_that_never_settles_is_as_dead_as_a_silent_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bad = Hub()
            bad.settle = lambda link, handles: None
            bench.factory = bad.protocol
            bench.put(*"abc")
            bench.link.start()
            await bench.until(lambda: len(bad.got) > 3)  # it was given up, and tried again
            bench.factory = lambda: Script([], True)
            await bench.until(lambda: bench.link.describe()["state"] != "up")
            assert bench.cursor.position == 1
            await bench.drained("abc")

    run(story())


def test_a_hub_that_never_settles_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bad = Hub()
            bad.settle = lambda link, handles: None
            bench.factory = bad.protocol
            bench.put("a")
            bench.link.start()
            named = lambda: [r for r in caplog.records if "nothing settled" in str(getattr(r, "error", ""))]
            await bench.until(named)
            await bench.drained("a")

    with caplog.at_level(logging.WARNING, "lineside.uplink"):
        run(story())


def test_a_hub_that_gives_no_credit_is_named_and_has_everything_once_it_does(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.good.credit = 2
            bench.put(*"abcde")
            bench.link.start()
            await bench.until(lambda: bench.link.describe()["notes"])
            assert bench.link.describe()["notes"] == [
                "edge: the hub gives no credit: no room there, or it holds senders up"
            ]
            assert bench.good.got == ["a", "b"]
            [receiver] = bench.good.receivers
            receiver.topup(100)
            await bench.drained("abcde")
            assert bench.link.describe()["notes"] == []

    run(story())


def test_a_look_at_the_first_address_that_outlives_its_connection_does_not_end_the_next_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            link = bench.link
            link.start()
            await bench.until(lambda: link.describe()["state"] == "up")
            look = asyncio.create_task(link._probe_first(link._active))
            await asyncio.sleep(0)
            assert not look.done()
            link._active.fail("the line is silent", Failure.UNREACHABLE)
            await look
            bench.put(*"abc")
            await bench.drained("abc")
            assert link.describe()["connected"] == 2

    run(story())


def test_nothing_is_held_for_a_link_that_was_stopped(tmp_path: Path) -> None:
    """Its connection may still bring answers, while the link that takes its place is on its way."""

    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            link = bench.link
            bench.put(*"abc")
            link.start()
            await bench.until(lambda: len(bench.good.got) == 3)
            [drain] = [way.drain for way in link._ways]
            await bench.until(lambda: drain.flows)
            link.stop()
            assert not drain.flows

    run(story())


def test_what_a_fault_means_does_not_depend_on_the_name_of_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(Hub):
        def on_events(self, engine: Engine, events: list[Event]) -> None:
            super().on_events(engine, [event for event in events if not isinstance(event, LinkAttached)])

    async def story() -> None:
        async with bench_at(tmp_path, more=SECOND_STREAM.replace("full", "silent")) as bench:
            bench.factory = Deaf().protocol
            ends: list[tuple[str, Failure]] = []
            lost = bench.link.lost

            def noted(attempt: Any, error: str, failure: Failure) -> None:
                ends.append((error, failure))
                lost(attempt, error, failure)

            monkeypatch.setattr(bench.link, "lost", noted)
            bench.link._ways.reverse()
            bench.link.start()
            await bench.until(lambda: ends)
            assert ends[0] == ("no answer to the attach of silent", Failure.HANDSHAKE)

    run(story())


def test_settling_out_of_order_moves_the_cursor_only_without_gaps(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            kept: list[tuple[Receiver, int]] = []

            def later_first(link: Receiver, handles: list[int]) -> None:
                kept.extend((link, handle) for handle in handles)
                while len(kept) > 1:
                    last_link, handle = kept.pop()
                    last_link.accept([handle])

            bench.good.settle = later_first
            bench.put(*"abcd")
            bench.link.start()
            await bench.until(lambda: len(bench.good.got) == 4)
            await asyncio.sleep(0.05)
            assert bench.cursor.position == 1
            bench.good.settle = lambda link, handles: link.accept(handles)
            await bench.drained("abcd")

    run(story())


def test_a_refused_attach_is_named_with_its_address_and_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.good.refuse = True
            bench.put(*"abc")
            bench.link.start()
            await bench.error("edge: amqp:not-found: no such address")
            assert bench.link.describe()["state"] == "up", "other links of this hub go on"
            bench.good.refuse = False
            await bench.drained("abc")

    run(story())


def test_a_link_that_is_refused_again_and_again_is_told_once_and_uses_up_no_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.uplink.hub.WATCH_S", 0.01)
    monkeypatch.setattr("gateway.uplink.hub.REATTACH_S_MIN", 0.01)
    monkeypatch.setattr("gateway.uplink.hub.REATTACH_S_MAX", 0.01)
    refused = 0

    class Refusing(Hub):
        def on_events(self, engine: Engine, events: list[Event]) -> None:
            nonlocal refused
            refused += sum(self.refuse and isinstance(event, LinkAttached) for event in events)
            super().on_events(engine, events)

    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            hub = Refusing()
            bench.good, bench.factory = hub, hub.protocol
            hub.refuse, hub.sessions_max = True, 3
            bench.put(*"abc")
            bench.link.start()
            await bench.until(lambda: refused > 10)
            hub.refuse = False
            await bench.drained("abc")
            assert bench.link.describe()["connected"] == 1

    with caplog.at_level(logging.WARNING, "lineside.uplink"):
        run(story())
    assert [record.message for record in caplog.records] == ["the hub closed a link"]


def test_a_hub_that_takes_fewer_sessions_than_there_are_links_has_them_share(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench_at(tmp_path, more=SECOND_STREAM) as bench:
            bench.good.sessions_max = 1
            bench.put(*"abc")
            bench.journal.append(bench.second, "log/x", lambda seq, body: encode(body), b"d")
            bench.link.start()
            await bench.until(lambda: len(bench.good.got) == 4)
            assert sorted(bench.good.got) == list("abcd")
            assert bench.link.describe()["connected"] == 1

    run(story())


def test_what_is_handed_back_with_a_session_takes_no_other_link_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.uplink.intake.HELD_BYTES_MAX", 3000)

    class Sending(Hub):
        def on_events(self, engine: Engine, events: list[Event]) -> None:
            for event in events:
                if isinstance(event, LinkAttached) and isinstance(event.link, Sender):
                    event.link.confirm()
                elif isinstance(event, Credit) and not event.sender.unsettled:
                    event.sender.send([(n, encode(b"m" * 900)) for n in range(min(8, event.sender.capacity))])
            super().on_events(engine, [e for e in events if not isinstance(getattr(e, "link", None), Sender)])

    async def story() -> None:
        async with bench_at(tmp_path, more=INBOUND) as bench:
            hub = Sending()
            hub.sessions_max = 1
            bench.good, bench.factory = hub, hub.protocol
            bench.link.start()
            await bench.until(lambda: "no room for stream maps" in "".join(bench.link.describe()["notes"]))
            bench.put(*"abc")
            await bench.drained("abc")
            assert bench.link.describe()["connected"] == 1
            assert "no room for stream maps" in "".join(bench.link.describe()["notes"])

    run(story())


def test_an_inbound_link_that_carried_something_before_the_hub_closed_it_is_back_soon_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.uplink.hub.WATCH_S", 0.01)
    monkeypatch.setattr("gateway.uplink.hub.REATTACH_S_MIN", 0.01)
    count = 15  # by then, twice as long each time would be minutes
    answered = 0

    class OneAtATime(Hub):
        def on_events(self, engine: Engine, events: list[Event]) -> None:
            nonlocal answered
            for event in events:
                if isinstance(event, LinkAttached) and isinstance(event.link, Sender):
                    event.link.confirm()
                elif isinstance(event, Credit) and not event.sender.unsettled:
                    event.sender.send([(answered, encode(b"", message_id=f"{answered}"))])
                elif isinstance(event, Settled):
                    answered += len(event.sender.take_outcomes())
                    event.sender.close("amqp:resource-deleted", "moved")
            super().on_events(engine, [e for e in events if not isinstance(getattr(e, "link", None), Sender)])

    async def story() -> None:
        async with bench_at(tmp_path, more=INBOUND) as bench:
            hub = OneAtATime()
            bench.good, bench.factory = hub, hub.protocol
            bench.link.start()
            await bench.until(lambda: answered >= count)
            assert bench.link.describe()["connected"] == 1

    run(story())


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (
            ("amqp:invalid-field", "Client: loco already connected", {"invalid-field": "container-id"}),
            "the hub closed: amqp:invalid-field Client: loco already connected (invalid-field: container-id); "
            "another connection is 'loco' there: give each gateway an id of its own",
        ),
        (
            ("amqp:connection:redirect", "not here", {"network-host": "b.example", "port": "5671"}),
            "the hub closed: amqp:connection:redirect not here (network-host: b.example, port: 5671)",
        ),
        (("amqp:not-found", "Unknown hostname", {}), "the hub closed: amqp:not-found Unknown hostname"),
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["in one breath", "later"])
def test_a_hub_that_refuses_us_in_its_open_was_never_up_and_says_why_once(
    tmp_path: Path,
    refusal: tuple[str, str, dict[str, str]],
    told: str,
    later: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing(Hub):
        def on_events(self, engine: Engine, events: list[Event]) -> None:
            if any(isinstance(event, Opened) for event in events):
                engine.refuse(*refusal)

    class Late(asyncio.Protocol):
        """Passes on what a hub says, the end of it as a second piece."""

        def __init__(self) -> None:
            self.engine = Refusing().engine()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            events = self.engine.receive(data, asyncio.get_running_loop().time())
            self.transport.write(self.engine.data_to_send())
            if any(isinstance(event, Opened) for event in events):
                self.engine.refuse(*refusal)
                said = self.engine.data_to_send()
                opened = int.from_bytes(said[8:12], "big") + 8
                self.transport.write(said[:opened])
                asyncio.get_running_loop().call_later(0.02, self.transport.write, said[opened:])

    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.factory = Late if later else Refusing().protocol
            bench.put(*"abc")
            bench.link.start()
            await bench.until(lambda: bench.link.describe()["dialled"] > 3)
            assert bench.link.describe()["error"] == told
            assert bench.link.describe()["connected"] == 0
            await bench.drained("abc")

    with caplog.at_level(logging.INFO, "lineside.uplink"):
        run(story())
    assert [record.message for record in caplog.records] == ["hub not reached", "hub link up"]


@pytest.mark.parametrize("stage", ["open", "attach"])
def test_a_hub_that_hangs_up_after_open_or_attach(tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture) -> None:
    class Rude(Hub):
        def __init__(self) -> None:
            super().__init__()
            self.live: list[AmqpProtocol] = []

        def ready(self, protocol: AmqpProtocol) -> None:
            self.live.append(protocol)

        def on_events(self, engine: Engine, events: list[Event]) -> None:
            super().on_events(engine, events)
            wanted = Opened if stage == "open" else LinkAttached
            if any(isinstance(event, wanted) for event in events):
                asyncio.get_running_loop().call_later(0.02, self.live[-1].abort)

    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            rude = Rude()
            rude.settle = lambda link, handles: None
            bench.factory = rude.protocol
            bench.put(*"abc")
            bench.link.start()
            await bench.until(lambda: any(r.message == "hub link lost" for r in caplog.records))
            await bench.drained("abc")

    with caplog.at_level(logging.WARNING, "lineside.uplink"):
        run(story())


def test_a_certificate_of_somebody_else_is_named_and_nothing_is_sent(tmp_path: Path, pki: Pki, other_pki: Pki) -> None:
    wrong = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    wrong.load_cert_chain(other_pki.server.cert, other_pki.server.key)

    async def story() -> None:
        async with bench_at(tmp_path, f'ca = "{pki.ca}"', "amqps", wrong) as bench:
            bench.put("a")
            bench.link.start()
            await bench.error("the hub's certificate: ")
            assert bench.link.describe()["error"].endswith(": no authority in ca has signed it")
            assert bench.good.got == []
            wrong.load_cert_chain(pki.server.cert, pki.server.key)
            await bench.drained("a")

    run(story())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("ours", ["none", "foreign"])
def test_a_hub_that_refuses_our_certificate_says_so_and_is_not_dialled_as_if_the_line_were_down(
    tmp_path: Path, pki: Pki, other_pki: Pki, version: ssl.TLSVersion, ours: str
) -> None:
    strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    strict.load_cert_chain(pki.server.cert, pki.server.key)
    strict.load_verify_locations(pki.ca)
    strict.verify_mode = ssl.CERT_REQUIRED
    strict.minimum_version = strict.maximum_version = version
    identity = f'cert = "{other_pki.client.cert}"\nkey = "{other_pki.client.key}"' if ours == "foreign" else ""
    alert = "unknown ca" if ours == "foreign" else "certificate required"
    expected = f"the hub refuses our certificate, or the want of one: {alert}"
    if ours == "none" and version is ssl.TLSVersion.TLSv1_2:
        expected = "TLS: sslv3 alert handshake failure"  # that version has no better word for it

    async def story() -> None:
        async with bench_at(tmp_path, f'ca = "{pki.ca}"\n{identity}', "amqps", strict) as bench:
            bench.put("a")
            bench.link.start()
            await bench.error(expected)
            assert bench.good.got == []
            assert bench.link.describe()["dialled"] <= 2
            strict.verify_mode = ssl.CERT_NONE
            await bench.drained("a")

    run(story())


@pytest.mark.parametrize("ours", [False, True], ids=["no certificate", "a certificate"])
def test_a_hub_that_hangs_up_without_a_word_once_tls_stands_is_dialled_ever_more_slowly(
    tmp_path: Path, pki: Pki, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qpid Broker-J does to whoever shows no certificate that it wants; it sends no alert."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server.cert, pki.server.key)
    identity = f'cert = "{pki.client.cert}"\nkey = "{pki.client.key}"' if ours else ""
    hint = "it may not want our certificate" if ours else "it may want a certificate (cert, key)"

    async def story() -> None:
        async with bench_at(tmp_path, f'ca = "{pki.ca}"\n{identity}', "amqps", context) as bench:
            bench.factory = lambda: Script([], True)
            bench.put("a")
            failures: set[Failure] = set()
            failed = bench.link.attempt_failed

            def note(attempt: Attempt, failure: Failure, error: str, waited_s: float) -> None:
                failures.add(failure)
                failed(attempt, failure, error, waited_s)

            monkeypatch.setattr(bench.link, "attempt_failed", note)
            bench.link.start()
            await bench.error(f"the hub ended the connection before it said anything: {hint}")
            assert failures == {Failure.HANDSHAKE}, "not as if the line were down"
            await bench.drained("a")

    run(story())


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_ends_in_the_tls_handshake_is_told_once_however_it_ends(
    tmp_path: Path, pki: Pki, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Ends(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            if reset:
                discard(transport.get_extra_info("socket"))
            transport.close()

    async def story() -> None:
        async with bench_at(tmp_path, f'ca = "{pki.ca}"', "amqps") as bench:
            bench.factory = Ends
            bench.link.start()
            await bench.until(lambda: bench.link.describe()["dialled"] > 3)
            assert bench.link.describe()["error"] == "TLS: the connection ended in the handshake"

    with caplog.at_level(logging.WARNING, "lineside.uplink"):
        run(story())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_a_hub_that_does_not_listen_is_told_of_in_the_kernels_words(tmp_path: Path, pki: Pki, scheme: str) -> None:
    async def story() -> None:
        async with bench_at(tmp_path, f'ca = "{pki.ca}"', scheme) as bench:
            bench.server.close()
            await bench.server.wait_closed()
            bench.link.start()
            await bench.error("no connection: Connection refused")

    run(story())


def test_a_port_that_speaks_no_tls_is_named(tmp_path: Path, pki: Pki) -> None:
    async def story() -> None:
        async with bench_at(tmp_path, f'ca = "{pki.ca}"', "amqps") as bench:
            bench.factory = lambda: Script([b"HTTP/1.1 400 Bad Request\r\n\r\n"], True)
            bench.link.start()
            await bench.error("TLS: what answers there speaks no TLS")

    run(story())


class FullQueue(Hub):
    """As Qpid Broker-J does: at a message too many it closes the link to `full`, and at the next the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attached: list[str | None] = []
        self.full = True

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        super().on_events(engine, events)
        for event in events:
            if isinstance(event, LinkAttached):
                assert event.target is not None
                self.attached.append(event.target.address)
                if event.target.address == "full":
                    event.link.context = "full"
                    assert isinstance(event.link, Receiver)
                    self.settle = self._settle

    def _settle(self, link: Receiver, handles: list[int]) -> None:
        if link.context != "full" or not self.full:
            link.accept(handles)
            return
        link.close("amqp:resource-limit-exceeded", "Maximum depth exceeded")
        link._engine.close("amqp:session:unattached-handle", "TRANSFER for link handle 0 which is not attached")


def test_a_full_queue_for_which_the_hub_ends_the_connection_does_not_hold_up_the_other_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.uplink.hub.REATTACH_S_MIN", 0.5)

    async def story() -> None:
        async with bench_at(tmp_path, more=SECOND_STREAM) as bench:
            hub = FullQueue()
            bench.good, bench.factory = hub, hub.protocol
            bench.journal.append(bench.second, "log/x", lambda seq, body: encode(body), b"too many")
            bench.committer.kick()
            bench.link.start()
            await bench.until(lambda: bench.link.describe()["connected"] == 2)
            bench.put("a")
            await bench.until(lambda: "a" in hub.got)
            assert hub.attached.count("full") == 1
            assert "Maximum depth exceeded" in bench.link.describe()["error"]
            await bench.until(lambda: hub.attached.count("full") == 2)  # tried again, with the same end
            await bench.until(lambda: bench.link.describe()["connected"] == 3)
            bench.put("b")
            await bench.until(lambda: "b" in hub.got)
            assert hub.attached.count("full") == 2
            hub.full = False
            await bench.until(lambda: bench.second.cursors["uplink"].position == 2)
            assert bench.link.describe()["connected"] == 3
            assert hub.got == ["too many", "a", "too many", "b", "too many"]

    run(story())


def test_a_queue_that_closes_its_link_at_a_window_too_large_for_it_gets_less_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qpid Broker-J with overflow policy REJECT: nothing of what came before the message too many was settled."""
    monkeypatch.setattr("gateway.uplink.hub.REATTACH_S_MIN", 0.05)
    monkeypatch.setattr("gateway.uplink.hub.REATTACH_S_MAX", 0.05)
    taken: list[int] = []

    def settle(link: Receiver, handles: list[int]) -> None:
        if len(handles) > 3:
            link.close("amqp:resource-limit-exceeded", "Maximum depth exceeded")
        else:
            link.accept(handles)
            taken.append(len(handles))

    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            bench.good.settle = settle
            bench.put(*"abcdefghijklmnopqrst")
            bench.link.start()
            await bench.until(lambda: bench.cursor.position > 20)
            assert bench.link.describe()["connected"] == 1

    run(story())
    assert sum(taken) == 20


class Pipe(asyncio.Protocol):
    """What comes in here goes out there."""

    def __init__(self, there: asyncio.Transport) -> None:
        self.there = there

    def data_received(self, data: bytes) -> None:
        self.there.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.there.close()


class Busy(asyncio.Protocol):
    """Takes connections, and has no time for their TLS handshakes before `after_s`; then `port` answers."""

    def __init__(self, port: int, after_s: float) -> None:
        self.port, self.after_s = port, after_s
        self.taken = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        self.taken += 1
        loop = asyncio.get_running_loop()
        loop.call_later(self.after_s, lambda: loop.create_task(self._pass_on(transport)))

    async def _pass_on(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        hub, _ = await loop.create_connection(lambda: Pipe(transport), "127.0.0.1", self.port)
        transport.set_protocol(Pipe(hub))
        transport.resume_reading()


@asynccontextmanager
async def busy_hub(path: Path, pki: Pki, after_s: float, connect_timeout: str) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server.cert, pki.server.key)
    async with bench_at(path, f'ca = "{pki.ca}"', "amqps", connect_timeout=connect_timeout) as bench:
        hub = await asyncio.get_running_loop().create_server(bench.good.protocol, "127.0.0.1", 0, ssl=context)
        busy = Busy(hub.sockets[0].getsockname()[1], after_s)
        bench.factory = lambda: busy
        try:
            yield bench, busy
        finally:
            hub.close()


def test_a_hub_that_is_slow_to_answer_a_tls_handshake_is_not_hung_up_on_before_it_does(
    tmp_path: Path, pki: Pki
) -> None:
    async def story() -> None:
        # Longer than it takes to begin five attempts: the first of them must still be there.
        async with busy_hub(tmp_path, pki, (ATTEMPTS_MAX + 1) * STAGGER_S, "8s") as (bench, busy):
            bench.put("a")
            bench.link.start()
            await bench.until(lambda: bench.good.got == ["a"])
            assert busy.taken <= ATTEMPTS_MAX + 3
            assert bench.link.describe()["connected"] == 1

    run(story())


def test_the_longer_a_hub_leaves_tls_handshakes_unanswered_the_further_apart_they_come(
    tmp_path: Path, pki: Pki
) -> None:
    async def story() -> None:
        async with busy_hub(tmp_path, pki, 60.0, "1s") as (bench, busy):
            bench.put("a")
            bench.link.start()
            await bench.error("no answer within 1 s (TLS)")
            await bench.until(lambda: bench.link.state._stagger_s > 2 * STAGGER_S)
            assert busy.taken < 12
            busy.after_s = 0.0
            bench.link.network_changed()
            await bench.until(lambda: bench.good.got == ["a"])

    run(story())


def test_the_first_message_after_a_quiet_hour_does_not_make_the_line_a_silent_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with bench_at(tmp_path) as bench:
            # What the kernel says between sending after a pause and the acknowledgement, one round trip later.
            monkeypatch.setattr("gateway.uplink.attempt.silent_ms", lambda sock: 3_600_000)
            bench.put("a")
            bench.link.start()
            await bench.drained("a")
            await asyncio.sleep(0.6)  # two looks of the watch
            assert bench.link.describe()["state"] == "up"

    run(story())
