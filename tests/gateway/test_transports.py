"""Real clients over every transport of a real daemon; strangers, garbage, and certificates that change under it."""

from __future__ import annotations

import queue
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from gateway.control_client import request as control
from gateway.mqtt import codec
from gateway.mqtt.packets import V5, Connack, Connect, Disconnect
from security.tls import client_context
from tests.daemon import CONFIG as GATEWAY_CONFIG
from tests.daemon import HUB_CONFIG, WAIT_S, Client, Daemon, free_port
from tests.pki import Certificate, Pki
from tests.websocket import BINARY, CLOSE, TEXT, Frame, frame, frames, request

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = [
    "127.0.0.1:{port}",
    "mqtts://127.0.0.1:MQTTS",
    "ws://127.0.0.1:WS",
    "wss://127.0.0.1:WSS/live",
    "unix:UNIX",
]
cert = "CERT/live.pem"
key = "CERT/live.key"
client_ca = "CERT/ca.pem"
ws_origins = ["https://hmi.example"]
"""


@dataclass
class Train:
    """One daemon with a listener of each kind, and the certificate it shows in files of its own."""

    directory: Path
    pki: Pki
    mqtts: int = field(default_factory=free_port)
    ws: int = field(default_factory=free_port)
    wss: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        shutil.copy(self.pki.ca, self.directory / "ca.pem")
        self.show(self.pki.server)
        self.unix = self.directory / "mqtt.sock"
        places = {"MQTTS": self.mqtts, "WSS": self.wss, "WS": self.ws, "UNIX": self.unix, "CERT": self.directory}
        config = CONFIG
        for name, value in places.items():
            config = config.replace(name, str(value))
        self.daemon = Daemon(self.directory, config)

    def show(self, certificate: Certificate) -> None:
        """Replace certificate and key as an operator does: each file by renaming a new one over it."""
        for source, target in ((certificate.cert, "live.pem"), (certificate.key, "live.key")):
            shutil.copy(source, self.directory / "new")
            (self.directory / "new").rename(self.directory / target)

    def shown(self) -> int:
        """The serial number of the certificate that a new connection is shown."""
        context = client_context(self.pki.ca, self.pki.client.cert, self.pki.client.key)
        with (
            socket.create_connection(("127.0.0.1", self.mqtts), WAIT_S) as sock,
            context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
        ):
            der = tls.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number

    def clients(self) -> list[dict[str, object]]:
        found = control(self.daemon.state, "clients")["clients"]
        assert isinstance(found, list)
        return found

    def failures(self) -> list[str]:
        return [line for line in self.daemon.log.read_text().splitlines() if "tls handshake failed" in line]


@pytest.fixture
def train(tmp_path: Path, pki: Pki) -> Iterator[Train]:
    train = Train(tmp_path, pki)
    try:
        train.daemon.status()
        yield train
    finally:
        train.daemon.end()


class App:
    """paho over one of the transports."""

    def __init__(self, train: Train, transport: str, identity: Certificate | None = None, name: str = "app") -> None:
        self.heard: queue.Queue[bytes] = queue.Queue()
        self.disconnected = threading.Event()
        kind = {"mqtts": "tcp", "unix": "unix"}.get(transport, "websockets")
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=MQTTProtocolVersion.MQTTv5,
            transport=kind,  # type: ignore[arg-type]
            reconnect_on_failure=False,
        )
        if transport in ("mqtts", "wss"):
            who = identity or train.pki.client
            self.client.tls_set(str(train.pki.ca), str(who.cert), str(who.key))
        if transport == "wss":
            self.client.ws_set_options("/live")
        subscribed = threading.Event()
        self.client.on_connect = lambda client, *_: client.subscribe("t/#", 1)
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.on_message = lambda _client, _data, message: self.heard.put(message.payload)
        self.client.on_disconnect = lambda *_: self.disconnected.set()
        host = str(train.unix) if transport == "unix" else "127.0.0.1"
        self.client.connect(host, {"mqtts": train.mqtts, "ws": train.ws, "wss": train.wss, "unix": 1}[transport])
        self.client.loop_start()
        assert subscribed.wait(WAIT_S), train.daemon.log.read_text()

    def talk(self, *bodies: bytes) -> None:
        """Publish, and hear it all back in order."""
        for body in bodies:
            self.client.publish("t/x", body, qos=1)
        for body in bodies:
            assert self.heard.get(timeout=WAIT_S) == body

    def close(self) -> None:
        self.client.disconnect()
        assert self.disconnected.wait(WAIT_S)
        self.client.loop_stop()


@pytest.mark.parametrize("transport", ["mqtts", "ws", "wss", "unix"])
def test_messages_go_there_and_back(train: Train, transport: str) -> None:
    app = App(train, transport)
    app.talk(*(b"%d" % n for n in range(300)))
    app.talk(bytes(700_000), b"", bytes(1000))
    (told,) = train.clients()
    assert told["certificate"] == ("CN=loco-4711" if transport in ("mqtts", "wss") else None)
    app.close()
    assert "warning" not in train.daemon.log.read_text()


@pytest.mark.parametrize("transport", ["mqtts", "wss"])
def test_strangers_get_one_log_line_each_and_disturb_nobody(train: Train, other_pki: Pki, transport: str) -> None:
    app = App(train, "mqtts")
    port = train.mqtts if transport == "mqtts" else train.wss
    ca, stranger = train.pki.ca, other_pki.client
    told = []
    for context, why in (
        (client_context(ca, stranger.cert, stranger.key), "certificate is not accepted: unable to get local issuer"),
        (client_context(ca), "showed no certificate"),
    ):
        told.append((_turned_away(context, port), why))
    for garbage, why in (
        (b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00", "spoke no TLS"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "spoke HTTP"),
        (b"", "closed the connection"),
    ):
        with socket.create_connection(("127.0.0.1", port), WAIT_S) as sock:
            peer = f"peer=127.0.0.1:{sock.getsockname()[1]}"
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            assert _read_all(sock) == b""
        told.append((peer, why))
    for peer, _ in told:
        train.daemon.wait_for_log(peer)
    lines = train.failures()
    assert len(lines) == len(told)
    for (peer, why), line in zip(told, lines, strict=True):
        assert peer in line
        assert why in line
        assert f"address={transport}://127.0.0.1:{port}" in line
    assert "Traceback" not in train.daemon.log.read_text()
    app.talk(b"still here")
    app.close()


def _turned_away(context: ssl.SSLContext, port: int) -> str:
    """Connect, and hear nothing; returns how the daemon's log calls us."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as sock:
        peer = f"peer=127.0.0.1:{sock.getsockname()[1]}"
        try:
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
                # TLS 1.3 lets a client believe that all is well until it reads.
                assert tls.recv(1) == b""
        except (ssl.SSLError, ConnectionResetError):
            pass
    return peer


def _read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_a_replaced_certificate_is_shown_to_the_next_client_and_the_old_connection_lives_on(train: Train) -> None:
    app = App(train, "mqtts")
    first = train.shown()
    train.show(train.pki.issue("localhost", server=True))
    second = train.shown()
    assert second != first
    app.talk(b"on the old connection")
    late = App(train, "wss", name="late")
    late.talk(b"on a new one")
    late.close()
    app.close()
    assert "certificate read again" in train.daemon.log.read_text()


def test_a_certificate_without_its_key_yet_is_not_taken_and_the_old_one_stays(train: Train) -> None:
    first = train.shown()
    fresh = train.pki.issue("localhost", server=True)
    shutil.copy(fresh.cert, train.directory / "live.pem")
    assert train.shown() == first
    assert train.shown() == first
    log = train.daemon.log.read_text()
    assert log.count("certificate not taken; the old one stays") == 1
    assert "not the key of the first certificate" in log
    shutil.copy(fresh.key, train.directory / "live.key")
    assert train.shown() != first


def test_sighup_reads_the_certificate_again(train: Train) -> None:
    first = train.shown()
    train.show(train.pki.issue("localhost", server=True))
    train.daemon.process.send_signal(signal.SIGHUP)
    train.daemon.wait_for_log("configuration reloaded")
    assert train.daemon.log.read_text().count("certificate read again") == 1
    assert train.shown() != first


def test_a_client_of_another_authority_is_welcome_once_that_authority_is(train: Train, other_pki: Pki) -> None:
    (train.directory / "ca.pem").write_bytes(train.pki.ca.read_bytes() + other_pki.ca.read_bytes())
    app = App(train, "mqtts", other_pki.client)
    app.talk(b"hello")
    app.close()


def test_the_command_line_speaks_every_transport(train: Train) -> None:
    tls = ["--ca", str(train.pki.ca), "--cert", str(train.pki.client.cert), "--key", str(train.pki.client.key)]
    app = App(train, "unix")
    for target, options in (
        (f"mqtts://127.0.0.1:{train.mqtts}", tls),
        (f"wss://127.0.0.1:{train.wss}/live", tls),
        (f"ws://127.0.0.1:{train.ws}", []),
        (f"unix:{train.unix}", []),
    ):
        command = [sys.executable, "-m", "gateway", "publish", "t/x", "-m", target, "--to", target, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert app.heard.get(timeout=WAIT_S) == target.encode()
    app.close()


class Browser:
    """A WebSocket said byte by byte."""

    def __init__(self, train: Train, handshake: bytes) -> None:
        self.sock = socket.create_connection(("127.0.0.1", train.ws), WAIT_S)
        self.sock.sendall(handshake)
        self.head = b""
        while b"\r\n\r\n" not in self.head:
            piece = self.sock.recv(65536)
            assert piece
            self.head += piece

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def to_the_end(self) -> list[Frame]:
        with self.sock:
            return frames(_read_all(self.sock))


CONNECT = codec.encode(Connect(V5, "page", True, 0), V5)


def test_a_page_connects_disconnects_and_both_sides_say_close(train: Train) -> None:
    page = Browser(train, request(origin="https://hmi.example"))
    assert page.head.startswith(b"HTTP/1.1 101 ")
    page.say(frame(BINARY, CONNECT[:5]) + frame(BINARY, CONNECT[5:] + codec.encode(Disconnect(0), V5)))
    connack, close = page.to_the_end()
    assert connack.opcode == BINARY
    assert isinstance(codec.decode(connack.payload, V5), Connack)
    assert (close.opcode, close.code) == (CLOSE, 1000)
    train.daemon.wait_for_log("client left")
    page = Browser(train, request())
    page.say(frame(CLOSE, (1001).to_bytes(2)))
    assert page.to_the_end() == [Frame(CLOSE, (1001).to_bytes(2))]


def test_who_goes_amid_the_http_request_of_a_websocket_is_named_in_the_log(train: Train) -> None:
    with socket.create_connection(("127.0.0.1", train.ws)) as sock:
        peer = "{}:{}".format(*sock.getsockname())
        sock.sendall(b"\xff" * 20)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    train.daemon.wait_for_log(f'client left" peer={peer}')


def test_a_page_from_elsewhere_is_refused_and_told_why(train: Train) -> None:
    page = Browser(train, request(origin="https://evil.example"))
    with page.sock:
        assert page.head.startswith(b"HTTP/1.1 403 ")
        assert b"ws_origins" in page.head + _read_all(page.sock)
    train.daemon.wait_for_log("websocket refused")


def test_a_text_frame_ends_the_connection_with_1003(train: Train) -> None:  # [MQTT-6.0.0-1]
    page = Browser(train, request())
    page.say(frame(BINARY, CONNECT) + frame(TEXT, b"hello"))
    last = page.to_the_end()[-1]
    assert (last.opcode, last.code) == (CLOSE, 1003)
    train.daemon.wait_for_log("websocket failed")


def test_a_stop_says_goodbye_over_websocket_too(train: Train) -> None:
    page = Browser(train, request())
    page.say(frame(BINARY, CONNECT))
    train.daemon.wait_for_log("client connected")
    train.daemon.process.send_signal(signal.SIGTERM)
    connack, goodbye, close = page.to_the_end()
    assert isinstance(codec.decode(connack.payload, V5), Connack)
    assert isinstance(codec.decode(goodbye.payload, V5), Disconnect)
    assert close.opcode == CLOSE
    assert train.daemon.process.wait(WAIT_S) == 0


def test_a_hub_that_asks_for_certificates_over_amqps_gets_them(tmp_path: Path, pki: Pki) -> None:
    hub_port = free_port()
    (tmp_path / "hub").mkdir()
    (tmp_path / "loco").mkdir()
    tls = f'cert = "{pki.server.cert}"\nkey = "{pki.server.key}"\nclient_ca = "{pki.ca}"\n'
    hub = Daemon(
        tmp_path / "hub",
        HUB_CONFIG.replace('["127.0.0.1:{hub_port}"]\n', '["amqps://127.0.0.1:{hub_port}"]\n' + tls),
        hub_port=hub_port,
    )
    mine = f'ca = "{pki.ca}"\ncert = "{pki.client.cert}"\nkey = "{pki.client.key}"\nsasl = "anonymous"\n'
    config = GATEWAY_CONFIG.replace("amqp://", "amqps://").replace('kind = "lineside"\n', 'kind = "lineside"\n' + mine)
    gateway = Daemon(tmp_path / "loco", config, hub_port=hub_port)
    try:
        hub.status()
        heard: queue.Queue[bytes] = queue.Queue()
        subscribed = threading.Event()
        app = paho.Client(CallbackAPIVersion.VERSION2, client_id="depot-app")
        app.on_connect = lambda client, *_: client.subscribe("edge", 1)
        app.on_subscribe = lambda *_: subscribed.set()
        app.on_message = lambda _client, _data, message: heard.put(message.payload)
        app.connect("127.0.0.1", hub.port)
        app.loop_start()
        assert subscribed.wait(WAIT_S)
        gateway.status()
        client = Client(gateway.port)
        client.publish(3)
        assert [heard.get(timeout=WAIT_S) for _ in range(3)] == [b"0", b"1", b"2"]
        client.close()
        hub.wait_for_log(_turned_away(client_context(pki.ca), hub_port))
        assert "showed no certificate" in hub.log.read_text()
        app.disconnect()
        app.loop_stop()
    finally:
        gateway.end()
        hub.end()


@pytest.mark.parametrize(
    ("who", "versions", "ciphers", "alert"),
    [
        ("nobody", ssl.TLSVersion.TLSv1_3, None, "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
        ("nobody", ssl.TLSVersion.TLSv1_2, None, "SSLV3_ALERT_HANDSHAKE_FAILURE"),
        ("stranger", ssl.TLSVersion.TLSv1_3, None, "TLSV1_ALERT_UNKNOWN_CA"),
        ("client", ssl.TLSVersion.TLSv1_2, "AES128-SHA:@SECLEVEL=0", "SSLV3_ALERT_HANDSHAKE_FAILURE"),
    ],
)
def test_who_fails_the_handshake_is_told_why_by_the_standards_alert(
    train: Train, other_pki: Pki, who: str, versions: ssl.TLSVersion, ciphers: str | None, alert: str
) -> None:
    context = ssl.create_default_context(cafile=train.pki.ca)
    context.minimum_version = context.maximum_version = versions
    if ciphers is not None:
        context.set_ciphers(ciphers)
    if who != "nobody":
        certificate = train.pki.client if who == "client" else other_pki.client
        context.load_cert_chain(certificate.cert, certificate.key)
    with (
        pytest.raises(ssl.SSLError) as failed,
        socket.create_connection(("127.0.0.1", train.mqtts), WAIT_S) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        tls.recv(1)
    assert failed.value.reason == alert
