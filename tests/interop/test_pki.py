"""Real brokers run on what `lineside pki` made, and a gateway reaches them with its certificate."""

from __future__ import annotations

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli.main import cli
from tests import parts
from tests.conftest import require
from tests.daemon import WAIT_S, Client, Daemon, wait_until
from tests.pki import Certificate

PASSWORD = "battery-staple"

GATEWAY = """
[gateway]
id = "{name}"
state_dir = "{{state}}"
[mqtt]
listen = ["127.0.0.1:{{port}}"]
[[hub]]
name = "depot"
kind = "{kind}"
urls = ["{url}"]
ca = "{ca}/ca.pem"
cert = "{ca}/issued/{name}.pem"
key = "{ca}/issued/{name}.key"
crl = "{ca}/crl.pem"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "{address}"
"""


def pki(*words: object) -> None:
    result = CliRunner().invoke(cli, ["pki", *(str(word) for word in words)])
    assert result.exit_code == 0, result.output


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """An authority with a hub, a gateway, and a gateway that was stolen."""
    ca = tmp_path / "ca"
    pki("init", ca, "--permit-ip", "127.0.0.0/8")
    pki("issue", ca, "broker", "--kind", "hub", "--ip", "127.0.0.1")
    for name in ("loco-1", "stolen"):
        pki("issue", ca, name, "--kind", "gateway")
    pki("revoke", ca, "stolen", "--reason", "key-compromise")
    (tmp_path / "password").write_text(PASSWORD)
    pki("export", ca, "broker", "--password-file", tmp_path / "password")
    return ca


def issued(ca: Path, name: str) -> Certificate:
    at = ca / "issued"
    # No bundle: a part that read one would fail.
    return Certificate(name, at / f"{name}.pem", at / f"{name}.key", at / f"{name}.none", at / f"{name}.p12")


def waiting_after(ca: Path, name: str, kind: str, url: str, address: str, refused: str | None = None) -> int:
    """Send ten messages as gateway `name`; what still waits once they went out, or once the log tells of `refused`."""
    directory = ca.parent / name
    directory.mkdir()
    daemon = Daemon(directory, GATEWAY.format(name=name, kind=kind, url=url, ca=ca, address=address))
    try:
        daemon.status()
        client = Client(daemon.port)
        try:
            client.publish(10)
        finally:
            client.close()
        if refused is not None:
            daemon.wait_for_log(refused)
            return daemon.stream()["waiting"]
        wait_until(lambda: not daemon.stream()["waiting"], what=daemon.log.read_text)
        return 0
    finally:
        daemon.end()


def test_artemis_runs_on_the_keystore_and_truststore_and_refuses_whom_the_list_names(ca: Path) -> None:
    require("artemis")
    stores = (
        f";keyStoreType=PKCS12;keyStorePath={issued(ca, 'broker').p12};keyStorePassword={PASSWORD}"
        f";trustStoreType=PKCS12;trustStorePath={ca / 'truststore.p12'};trustStorePassword={PASSWORD}"
        f";crlPath={ca / 'crl.pem'}"
    )
    with parts.Artemis(ca=ca / "ca.pem", server=issued(ca, "broker"), acceptor=stores) as artemis:
        assert waiting_after(ca, "loco-1", "artemis", artemis.tls_url, "edge.pki") == 0
        assert waiting_after(ca, "stolen", "artemis", artemis.tls_url, "edge.pki", refused="hub not reached") == 10


class Responder(BaseHTTPRequestHandler):
    """Answers whatever it is asked with the file of its server."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert isinstance(self.server, Answers)
        answer = self.server.response.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "application/ocsp-response")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Not to the terminal."""


class Answers(ThreadingHTTPServer):
    """An OCSP responder with one answer, DER."""

    def __init__(self, response: Path) -> None:
        super().__init__(("127.0.0.1", 0), Responder)
        self.response = response
        self._thread = threading.Thread(target=self.serve_forever)

    def __enter__(self) -> Answers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class StaplingArtemis(parts.Artemis):
    """With the JVM's properties of deploy/hubs/artemis.md, and a cache that does not outlive the test."""

    responder = 0

    def command(self) -> list[str]:
        java, *rest = super().command()
        return [
            java,
            "-Djdk.tls.server.enableStatusRequestExtension=true",
            f"-Djdk.tls.stapling.responderURI=http://127.0.0.1:{self.responder}",
            "-Djdk.tls.stapling.cacheLifetime=1",
            *rest,
        ]


def test_artemis_staples_what_a_responder_tells_it_and_a_gateway_heeds_that(ca: Path) -> None:
    require("artemis")
    good, revoked = ca / "good.ocsp", ca / "issued" / "broker.ocsp"
    pki("ocsp", ca, "broker")
    shutil.copy(revoked, good)
    pki("revoke", ca, "broker")
    pki("ocsp", ca, "broker")
    keys = f";keyStoreType=PKCS12;keyStorePath={issued(ca, 'broker').p12};keyStorePassword={PASSWORD}"
    with Answers(revoked) as answers:
        artemis = StaplingArtemis(ca=ca / "ca.pem", server=issued(ca, "broker"), acceptor=keys)
        artemis.responder = answers.server_port
        with artemis:
            url = {"name": "loco-1", "kind": "artemis", "url": artemis.tls_url, "address": "edge.pki", "ca": ca}
            config = GATEWAY.format(**url).replace(f'crl = "{ca}/crl.pem"', 'ocsp = "require"')
            directory = ca.parent / "loco-1"
            directory.mkdir()
            daemon = Daemon(directory, config)
            try:
                daemon.status()
                client = Client(daemon.port)
                client.publish(10)
                client.close()
                daemon.wait_for_log("it is revoked since")
                assert daemon.stream()["waiting"] == 10
                answers.response = good
                wait_until(lambda: not daemon.stream()["waiting"], 2 * WAIT_S)
            finally:
                daemon.end()


def test_rabbitmq_runs_on_the_pem_files_and_knows_a_gateway_by_its_name(ca: Path) -> None:
    require("rabbitmq")
    with parts.RabbitMQ(ca=ca / "ca.pem", server=issued(ca, "broker"), client=issued(ca, "loco-1")) as rabbitmq:
        assert waiting_after(ca, "loco-1", "rabbitmq", rabbitmq.tls_url, "/queue/pki") == 0
