"""AMQP apps that misbehave are closed or bounded, each in its way, while another app keeps its rate."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.amqp import raw
from gateway.amqp.driver import CLOSE_WAIT_S
from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import Deliveries, Event, LinkAttached, LinkClosed, RemoteClosed
from gateway.amqp.message import encode
from gateway.amqp.sasl import AMQP_HEADER, SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.control_client import request
from tests import attacks
from tests.daemon import WAIT_S, Daemon, free_port, read_to_the_end

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}"]
[amqp]
listen = ["127.0.0.1:{hub_port}"]
message_max = "8MiB"
window = 100
idle_timeout = "4s"
[[address]]
name = "jobs"
kind = "queue"
[local]
max_messages = 1000
when_full = "drop-oldest"
"""
BODY = encode(b"x" * 100)
RSS_GROWTH_BYTES_MAX = 150 << 20


class App:
    """A blocking AMQP client on our own engine, which lets one do what proton's client does not."""

    def __init__(self, port: int, container: str = "app") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(0.05)
        sasl = SaslClient(["ANONYMOUS"])
        self.engine = Engine(server=False, container=container, sasl=sasl, sessions_max=1000, links_max=100_000)
        self.engine.open()
        self.session = self.engine.session()
        self.events: list[Event] = []
        self.over = False

    def turn(self) -> None:
        """Send what there is, a heartbeat if need be, and read what came."""
        self.engine.tick(time.monotonic())
        while data := self.engine.data_to_send():
            try:
                self.socket.settimeout(WAIT_S)
                self.socket.sendall(data)
            except OSError:
                self.over = True
                return
        try:
            self.socket.settimeout(0.02)
            data = self.socket.recv(1 << 18)
            self.over = not data
            self.events += self.engine.receive(data, time.monotonic()) if data else []
        except TimeoutError:
            return
        except OSError:
            self.over = True

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, self.events
            self.turn()

    def attached(self, link: Sender | Receiver) -> None:
        self.until(lambda: any(isinstance(e, LinkAttached) and e.link is link for e in self.events))

    def sender(self, address: str) -> Sender:
        sender = self.engine.sender(self.session, f"to-{address}-{len(self.engine.links)}", Terminus(address))
        self.attached(sender)
        return sender

    def receiver(self, address: str, credit: int, **source: object) -> Receiver:
        name = f"from-{address}-{len(self.engine.links)}"
        receiver = self.engine.receiver(self.session, name, Terminus(address, **source), credit=credit)  # type: ignore[arg-type]
        self.attached(receiver)
        return receiver

    def send(self, sender: Sender, count: int) -> float:
        """Send so many and wait until all are accepted: how long it took."""
        start, sent, accepted = time.monotonic(), 0, 0
        while accepted < count:
            assert time.monotonic() - start < WAIT_S
            room = min(sender.capacity, count - sent)
            sender.send([(sent + n, BODY) for n in range(room)])
            sent += room
            self.turn()
            accepted += sum(outcome.count for outcome in sender.take_outcomes())
        return time.monotonic() - start

    def received(self) -> list[tuple[int, bytes]]:
        return [pair for event in self.events if isinstance(event, Deliveries) for pair in event.batch]

    def condition(self) -> str | None:
        """What the gateway closed the connection with."""
        return next((e.condition for e in self.events if isinstance(e, RemoteClosed)), None)

    def close(self) -> None:
        self.engine.lost()
        self.socket.close()


class Gateway(Daemon):
    def __init__(self, directory: Path) -> None:
        self.amqp_port = free_port()
        super().__init__(directory, CONFIG, self.amqp_port)
        self.status()
        self.good = App(self.amqp_port, "good")
        self.sender = self.good.sender("good")
        self.usual_s = min(self.good.send(self.sender, 500) for _ in range(3))
        self.rss_bytes = int(str(self.status()["rss_bytes"]))

    def others_keep_their_rate(self) -> None:
        assert min(self.good.send(self.sender, 500) for _ in range(3)) < 3 * self.usual_s + 0.5
        assert int(str(self.status()["rss_bytes"])) < self.rss_bytes + RSS_GROWTH_BYTES_MAX


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    try:
        yield gateway
        assert gateway.process.poll() is None
        log = gateway.log.read_text()
        assert "Traceback" not in log, log
    finally:
        gateway.good.close()
        gateway.end()


@pytest.fixture
def bad(gateway: Gateway) -> Iterator[App]:
    app = App(gateway.amqp_port, "bad")
    yield app
    app.close()


def after_sasl(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.settimeout(WAIT_S)
    sasl = SaslClient(["ANONYMOUS"])
    while not sasl.done:
        sock.sendall(sasl.take_output())
        sasl.feed(sock.recv(4096))
    return sock


@pytest.mark.parametrize("header", [b"", AMQP_HEADER])
def test_garbage_after_sasl_ends_that_connection(gateway: Gateway, header: bytes) -> None:
    with after_sasl(gateway.amqp_port) as sock:
        sock.sendall(header + os.urandom(64) + bytes(64))
        read_to_the_end(sock)
    gateway.others_keep_their_rate()


def test_a_giant_frame_ends_that_connection_before_it_is_read(gateway: Gateway) -> None:
    with after_sasl(gateway.amqp_port) as sock:
        sock.sendall(AMQP_HEADER + b"\x7f\xff\xff\xff\x02\x00\x00\x00")
        assert b"amqp:connection:framing-error" in read_to_the_end(sock)
    gateway.others_keep_their_rate()


def test_who_goes_on_sending_after_its_mistake_hears_of_it_all_the_same(gateway: Gateway) -> None:
    """Closed on unread bytes, TCP would reset, and the reason be lost to a peer that has not read it yet."""
    for _ in range(5):
        with after_sasl(gateway.amqp_port) as sock:
            sock.sendall(AMQP_HEADER + b"\x7f\xff\xff\xff\x02\x00\x00\x00" + bytes(8 << 20))
            assert b"amqp:connection:framing-error" in read_to_the_end(sock)
    with after_sasl(gateway.amqp_port) as sock:  # and one that never ends is cut off
        sock.sendall(AMQP_HEADER + b"\x7f\xff\xff\xff\x02\x00\x00\x00")
        read_to_the_end(sock)
        reset = select.poll()
        reset.register(sock, 0)
        end = time.monotonic() + CLOSE_WAIT_S + WAIT_S
        while not reset.poll(50):
            assert time.monotonic() < end
            sock.send(b"\0")  # TCP tells only who sends
    gateway.others_keep_their_rate()


def test_a_message_without_an_end_ends_its_link_at_the_limit(gateway: Gateway, bad: App) -> None:
    sender = bad.sender("endless")
    assert sender.peer_max_message_bytes == 8 << 20
    raw.send_begin(sender._pointer, 1)
    chunk = bytes(256 << 10)
    for _ in range(40):
        if sender.alive:
            raw.send_chunk(sender._pointer, chunk, 0, len(chunk))
        bad.turn()
    closed = next(e for e in bad.events if isinstance(e, LinkClosed))
    assert closed.condition == "amqp:link:message-size-exceeded"
    gateway.others_keep_their_rate()


def test_messages_without_an_end_on_many_links_end_the_connection_at_their_common_limit(
    gateway: Gateway, bad: App
) -> None:
    senders = [bad.sender(f"endless/{n}") for n in range(8)]
    chunk = bytes(1 << 20)
    for _ in range(7):
        for sender in senders:
            if not bad.over and sender.alive and not bad.condition():
                raw.send_begin(sender._pointer, 1) if sender.context is None else None
                sender.context = True
                raw.send_chunk(sender._pointer, chunk, 0, len(chunk))
                bad.turn()
    bad.until(lambda: bad.over)
    assert bad.condition() == "amqp:resource-limit-exceeded"
    gateway.others_keep_their_rate()


def test_thousands_of_links_end_the_connection(gateway: Gateway, bad: App) -> None:
    bad.sender("one")
    for n in range(3000):
        bad.engine.sender(bad.session, f"link-{n}", Terminus("many"))
    bad.until(lambda: bad.over)
    assert bad.condition() == "amqp:resource-limit-exceeded"
    gateway.others_keep_their_rate()


def test_more_sessions_than_channels_end_the_connection(gateway: Gateway, bad: App) -> None:
    bad.sender("one")
    frame = bytes.fromhex(
        "00000021 02 00 0fff 0053 11 d0 0000000d 00000004 40 52 00 70 000003e8 70 000003e8".replace(" ", "")
    )
    bad.turn()
    bad.socket.sendall(len(frame).to_bytes(4, "big") + frame[4:])
    bad.until(lambda: bad.over)
    gateway.others_keep_their_rate()


def test_who_begins_and_ends_sessions_and_reads_nothing_is_ended(gateway: Gateway) -> None:
    line = attacks.Line.amqp(gateway.amqp_port, reads=False)
    many = b"".join(attacks.begin(n) + attacks.frame(attacks.END, channel=n) for n in range(1, 51))

    def go_on() -> None:
        for _ in range(20_000):
            list(line.send(many))

    with pytest.raises(ConnectionError):
        go_on()
    line.close()
    gateway.others_keep_their_rate()


def test_who_attaches_and_detaches_and_reads_nothing_is_not_read_any_more(gateway: Gateway) -> None:
    line = attacks.Line.amqp(gateway.amqp_port, reads=False)
    many = b"".join(attacks.attach(n, f"link-{n}", receiver=True) + attacks.detach(n) for n in range(50))
    end = time.monotonic() + 2
    blocked = 0
    while time.monotonic() < end:
        for _ in line.send(many):
            blocked += 1
            if time.monotonic() > end:
                break
    assert blocked > 5
    gateway.others_keep_their_rate()
    line.close()


def test_a_receiver_that_never_grants_credit_holds_up_nobody(gateway: Gateway, bad: App) -> None:
    durable = {"durability": Durability.UNSETTLED_STATE, "expiry": Expiry.NEVER}
    bad.receiver("good", credit=0)
    bad.receiver("good", credit=0, **durable)
    reader = gateway.good.receiver("good", credit=100)
    # More than the stream holds: who reads nothing is moved on, and the ledger says what that cost.
    gateway.others_keep_their_rate()
    gateway.good.until(lambda: _accept(gateway.good, reader, 1000))
    assert int(str(gateway.status()["losses"])) > 0


def _accept(app: App, reader: Receiver, count: int) -> bool:
    got = app.received()
    reader.accept([handle for handle, _ in got])
    reader.topup(100)
    return len(got) >= count


def test_a_receiver_that_never_settles_gets_its_window_and_holds_up_nobody(gateway: Gateway, bad: App) -> None:
    bad.receiver("jobs", credit=5000)
    bad.receiver("good", credit=5000)
    reader = gateway.good.receiver("jobs", credit=100)
    jobs = gateway.good.sender("jobs")
    gateway.good.send(jobs, 300)
    bad.until(lambda: len(bad.received()) >= 100)
    gateway.good.until(lambda: _accept(gateway.good, reader, 200))
    gateway.others_keep_their_rate()
    bad.until(lambda: len(bad.received()) >= 200)
    gateway.others_keep_their_rate()
    bad.turn()
    assert len(bad.received()) == 200  # a window on each link, and no more
    [listed] = [c for c in request(gateway.state, "clients")["clients"] if c["client"] == "bad"]
    assert listed["addresses"] == ["receives from queue jobs", "receives from topic good"]


def test_a_client_that_falls_silent_is_closed_after_the_idle_timeout(gateway: Gateway, bad: App) -> None:
    bad.sender("one")
    start = time.monotonic()
    bad.socket.settimeout(WAIT_S)
    assert b"local-idle-timeout expired" in read_to_the_end(bad.socket)
    assert 2 < time.monotonic() - start < 10


def test_a_client_that_reads_nothing_is_bounded(gateway: Gateway, bad: App) -> None:
    bad.receiver("good", credit=100_000)
    bad.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    gateway.others_keep_their_rate()
