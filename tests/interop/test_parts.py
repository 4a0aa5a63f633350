"""The brokers that other tests rely on do what those tests assume, seen through Proton's own client."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from proton import SSL, ConnectionException, Link, Message, SSLDomain, Terminus
from proton.reactor import LinkOption
from proton.utils import BlockingConnection, SendException

from tests import parts
from tests.conftest import require
from tests.pki import Certificate, Pki

TIMEOUT_S = 40

needs_proton_tls = pytest.mark.skipif(not SSL.present(), reason="this build of Proton has no TLS")


class Durable(LinkOption):
    """Ask for a durable node at the far end; RabbitMQ declares its queue after this."""

    def apply(self, link: Link) -> None:
        (link.target if link.is_sender else link.source).durability = Terminus.DELIVERIES


def tls_domain(pki: Pki, certificate: Certificate | None) -> SSLDomain:
    domain = SSLDomain(SSLDomain.MODE_CLIENT)
    domain.set_trusted_ca_db(str(pki.ca))
    domain.set_peer_authentication(SSLDomain.VERIFY_PEER)
    if certificate:
        domain.set_credentials(str(certificate.cert), str(certificate.key), None)
    return domain


@contextmanager
def connected(url: str, domain: SSLDomain | None = None, mechanisms: str = "ANONYMOUS") -> Iterator[BlockingConnection]:
    connection = BlockingConnection(url, timeout=TIMEOUT_S, ssl_domain=domain, allowed_mechs=mechanisms)
    try:
        yield connection
    finally:
        connection.close()


def send(connection: BlockingConnection, address: str, text: str) -> None:
    """Returns once the broker has accepted it. Closes no link: RabbitMQ 3.10 answers with a mere detach."""
    sender = connection.create_sender(address, options=Durable())
    sender.send(Message(body=text, durable=True), timeout=TIMEOUT_S)


def receive(connection: BlockingConnection, address: str) -> str:
    receiver = connection.create_receiver(address, options=Durable())
    body = receiver.receive(timeout=TIMEOUT_S).body
    receiver.accept()
    assert isinstance(body, str)
    return body


def test_artemis_passes_a_message_and_tells_a_wrong_password(artemis: parts.Artemis) -> None:
    with connected(artemis.url) as connection:
        send(connection, "parts.plain", "hello")
        assert receive(connection, "parts.plain") == "hello"
    with_password = artemis.url.replace("//", f"//{artemis.USER}:{artemis.PASSWORD}@")
    with connected(with_password, mechanisms="PLAIN") as connection:
        send(connection, "parts.plain", "with a password")
    with (
        pytest.raises(ConnectionException, match=r"(?i)auth"),
        connected(with_password.replace(artemis.PASSWORD, "wrong"), mechanisms="PLAIN"),
    ):
        pass


@needs_proton_tls
def test_artemis_takes_a_client_certificate_over_tls_and_refuses_without(artemis: parts.Artemis, pki: Pki) -> None:
    with connected(artemis.tls_url, tls_domain(pki, pki.client), "EXTERNAL") as connection:
        send(connection, "parts.tls", "hello")
        assert receive(connection, "parts.tls") == "hello"
    with pytest.raises(ConnectionException), connected(artemis.tls_url, tls_domain(pki, None)):
        pass


def test_artemis_keeps_an_accepted_message_over_sigkill(artemis: parts.Artemis) -> None:
    with connected(artemis.url) as connection:
        send(connection, "parts.kept", "kept")
    artemis.restart()
    with connected(artemis.url) as connection:
        assert receive(connection, "parts.kept") == "kept"


def test_artemis_gives_each_subscriber_of_a_topic_its_copy(artemis: parts.Artemis) -> None:
    with connected(artemis.url) as one, connected(artemis.url) as two:
        receivers = [connection.create_receiver("topic.parts") for connection in (one, two)]
        send(one, "topic.parts", "to all")
        for receiver in receivers:
            assert receiver.receive(timeout=TIMEOUT_S).body == "to all"
            receiver.accept()


def test_artemis_refuses_at_a_full_address(artemis: parts.Artemis) -> None:
    with connected(artemis.url) as connection:
        sender = connection.create_sender("full.parts")
        message = Message(body="x" * 4096, durable=True)
        taken = 0
        with contextlib.suppress(SendException):
            while taken < 50:
                sender.send(message, timeout=TIMEOUT_S)
                taken += 1
        assert 0 < taken < 50


def test_rabbitmq_passes_a_message(rabbitmq: parts.RabbitMQ) -> None:
    with connected(rabbitmq.url) as connection:
        send(connection, "/queue/parts.plain", "hello")
        assert receive(connection, "/queue/parts.plain") == "hello"


@needs_proton_tls
def test_rabbitmq_takes_a_client_certificate_over_tls_and_refuses_without(rabbitmq: parts.RabbitMQ, pki: Pki) -> None:
    with connected(rabbitmq.tls_url, tls_domain(pki, pki.client), "EXTERNAL") as connection:
        send(connection, "/queue/parts.tls", "hello")
        assert receive(connection, "/queue/parts.tls") == "hello"
    with pytest.raises(ConnectionException), connected(rabbitmq.tls_url, tls_domain(pki, None)):
        pass


def test_rabbitmq_keeps_an_accepted_message_over_sigkill(rabbitmq: parts.RabbitMQ) -> None:
    with connected(rabbitmq.url) as connection:
        send(connection, "/queue/parts.kept", "kept")
        # That a queue was declared is on the disk of 3.10 once another was, or after two seconds. Before that a kill
        # undoes it, and what the queue has accepted is gone.
        send(connection, "/queue/parts.later", "later")
    rabbitmq.restart()
    with connected(rabbitmq.url) as connection:
        assert receive(connection, "/queue/parts.kept") == "kept"


def mqtt_echo(port: int, topic: str, payload: bytes) -> bytes:
    """Publish to oneself at QoS 1; returns what came back."""
    got: list[bytes] = []
    subscribed: list[int] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="parts")
    client.on_message = lambda _client, _data, message: got.append(bytes(message.payload))
    client.on_subscribe = lambda *arguments: subscribed.append(1)
    client.connect(parts.HOST, port)
    client.loop_start()
    try:
        client.subscribe(topic, qos=1)
        deadline = time.monotonic() + TIMEOUT_S
        while not subscribed and time.monotonic() < deadline:
            time.sleep(0.01)
        client.publish(topic, payload, qos=1).wait_for_publish(TIMEOUT_S)
        while not got and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        client.disconnect()
        client.loop_stop()
    return b"".join(got)


def test_mosquitto_and_rabbitmq_pass_mqtt(mosquitto: parts.Mosquitto, rabbitmq: parts.RabbitMQ) -> None:
    assert mqtt_echo(mosquitto.port, "parts/echo", b"hello") == b"hello"
    assert mqtt_echo(rabbitmq.mqtt_port, "parts/echo", b"hello") == b"hello"


def test_a_toxiproxy_link_goes_down_and_comes_back(toxiproxy: parts.Toxiproxy) -> None:
    upstream = f"http://{parts.HOST}:{toxiproxy.port}/version"
    proxy = toxiproxy.client.create(name="parts", upstream=f"{parts.HOST}:{toxiproxy.port}")
    through = upstream.replace(f"{parts.HOST}:{toxiproxy.port}", proxy.listen)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answer() -> int:
        with opener.open(through, timeout=TIMEOUT_S) as reply:
            return int(reply.status)

    try:
        assert answer() == 200
        with proxy.down(), pytest.raises(OSError, match="refused"):
            answer()
        assert answer() == 200
    finally:
        proxy.destroy()


def test_a_part_that_cannot_start_says_why_with_its_log(tmp_path: Path) -> None:
    require("mosquitto")
    with (
        pytest.raises(parts.PartError, match=r"ended at once\n(?s:.*)no_such_option"),
        parts.Mosquitto("no_such_option true\n", directory=tmp_path),
    ):
        pass


def test_a_part_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    require("mosquitto")
    script = (
        "import os, pathlib, signal, sys\n"
        f"sys.path[:0] = {[str(Path(parts.__file__).parent.parent)]!r}\n"
        "from tests import parts\n"
        "part = parts.Mosquitto(directory=pathlib.Path(sys.argv[1]))\n"
        "part.start()\n"
        "print(part.port, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    port = int(child.stdout)
    deadline = time.monotonic() + TIMEOUT_S
    while not port_is_free(port):
        assert time.monotonic() < deadline, "mosquitto outlived its parent"
        time.sleep(0.02)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((parts.HOST, port)) != 0
