"""`lineside pki`: what a person types, what it leaves on disk, and that everybody it is for can use it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from click.testing import CliRunner, Result
from paho.mqtt.enums import CallbackAPIVersion

from gateway.cli.main import cli
from gateway.cli.pki import KINDS, REASONS
from security import pki, pki_store
from security.ocsp import StapleError, judge
from security.tls import client_context, server_context
from tests import parts
from tests.conftest import require
from tests.daemon import WAIT_S, Client, Daemon, wait_until
from tests.pki import Certificate
from tests.security.test_tls import handshake


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["pki", *(str(word) for word in words)])


def done(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.output


def told(*words: object) -> str:
    """The one line that says why not."""
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("lineside: ")
    return result.output.removeprefix("lineside: ").strip()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    done("init", tmp_path / "ca")
    return tmp_path / "ca"


def issued(ca: Path, name: str) -> Certificate:
    at = ca / "issued"
    return Certificate(name, at / f"{name}.pem", at / f"{name}.key", at / f"{name}.none", at / f"{name}.p12")


# ------------------------------------------------------------------------------------------------ what is on disk


def test_keys_are_the_owner_s_alone_and_so_is_their_directory(ca: Path) -> None:
    before = os.umask(0)
    try:
        done("init", ca.parent / "other")
        done("issue", ca.parent / "other", "loco", "--kind", "gateway")
        done("csr", ca.parent / "gw", "loco")
    finally:
        os.umask(before)
    other = ca.parent / "other"
    assert [mode(p) for p in (other, other / "issued", ca.parent / "gw")] == [0o700] * 3
    keys = [other / "ca.key", other / "issued" / "loco.key", ca.parent / "gw" / "loco.key", other / "index.json"]
    assert [mode(p) for p in keys] == [0o600] * 4
    assert [mode(other / name) for name in ("ca.pem", "crl.pem", "issued/loco.pem")] == [0o644] * 3


def test_an_authority_is_never_overwritten(ca: Path) -> None:
    before = {path: path.read_bytes() for path in ca.iterdir() if path.is_file()}
    assert "exists: an authority is never overwritten" in told("init", ca)
    assert {path: path.read_bytes() for path in ca.iterdir() if path.is_file()} == before


def test_a_key_is_overwritten_only_when_told(ca: Path) -> None:
    done("issue", ca, "loco", "--kind", "gateway")
    key = issued(ca, "loco").key.read_bytes()
    assert "use `renew`, or --replace" in told("issue", ca, "loco", "--kind", "gateway")
    assert issued(ca, "loco").key.read_bytes() == key
    done("issue", ca, "loco", "--kind", "gateway", "--replace")
    assert issued(ca, "loco").key.read_bytes() != key

    gw = ca.parent / "gw"
    done("csr", gw, "loco")
    key = (gw / "loco.key").read_bytes()
    assert "use --keep-key for a request with it, or --replace" in told("csr", gw, "loco")
    done("csr", gw, "loco", "--keep-key")
    assert (gw / "loco.key").read_bytes() == key
    done("csr", gw, "loco", "--replace")
    assert (gw / "loco.key").read_bytes() != key


def test_a_directory_that_others_can_enter_is_refused(ca: Path) -> None:
    ca.chmod(0o750)
    assert told("issue", ca, "loco", "--kind", "app").endswith(f"chmod 700 {ca}")
    ca.chmod(0o700)
    (ca / "ca.key").chmod(0o640)
    assert told("issue", ca, "loco", "--kind", "app").endswith(f"chmod 600 {ca / 'ca.key'}")


def test_two_at_once_are_one_and_a_word_to_the_other(ca: Path) -> None:
    descriptor = os.open(ca, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another `lineside pki` works in" in told("issue", ca, "loco", "--kind", "app")
        assert not issued(ca, "loco").cert.exists()
        done("show", ca)  # looking is no work
    finally:
        os.close(descriptor)
    done("issue", ca, "loco", "--kind", "app")


def test_what_is_signed_can_be_revoked_even_if_its_file_was_never_written(
    ca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pki_store.write

    def fail(path: Path, data: bytes, mode: int) -> None:
        if path.name == "loco.pem":
            raise OSError(28, "No space left on device", str(path))
        write(path, data, mode)

    monkeypatch.setattr(pki_store, "write", fail)
    assert "No space left on device" in told("issue", ca, "loco", "--kind", "app")
    monkeypatch.undo()
    done("revoke", ca, "loco")
    assert [path.name for path in ca.rglob(".*")] == []


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "crl.pem"
    pki_store.write(path, b"old", 0o644)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        pki_store.write(path, b"new", 0o644)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("crl.pem", b"old")]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ('{"version": 2}', "version 2 is from another Lineside"),
        ("{", "is damaged"),
        ('{"version": 1, "crl_number": 1, "issued": [{"names": 1}]}', "is damaged"),
    ],
)
def test_a_damaged_index_is_named(ca: Path, damage: str, says: str) -> None:
    (ca / "index.json").write_text(damage)
    line = told("show", ca)
    assert line.startswith(str(ca / "index.json"))
    assert says in line


def test_a_directory_without_an_authority_is_told_how_to_get_one(tmp_path: Path) -> None:
    assert f"lineside pki init {tmp_path}" in told("crl", tmp_path)
    assert f"lineside pki init {tmp_path / 'x'}" in told("crl", tmp_path / "x")


def test_an_encrypted_authority_signs_with_its_passphrase_alone(tmp_path: Path) -> None:
    good, bad, empty = (tmp_path / name for name in ("good", "bad", "empty"))
    good.write_text("correct horse\n")
    bad.write_text("wrong\n")
    empty.write_text("\n")
    ca = tmp_path / "ca"
    done("init", ca, "--passphrase-file", good)
    assert b"ENCRYPTED" in (ca / "ca.key").read_bytes()
    wish = ("issue", ca, "loco", "--kind", "app")
    assert told(*wish) == f"{ca / 'ca.key'}: the key is encrypted: give its passphrase with --passphrase-file"
    assert "passphrase is wrong" in told(*wish, "--passphrase-file", bad)
    assert "1 to 1024 bytes" in told(*wish, "--passphrase-file", empty)
    done(*wish, "--passphrase-file", good)
    done("show", ca)


# ------------------------------------------------------------------------------------------------ what happens to one


def test_a_request_gets_a_certificate_for_its_key_and_only_the_names_typed_here(ca: Path) -> None:
    gw = ca.parent / "gw"
    out = done("csr", gw, "loco", "--dns", "loco.example", "--algorithm", "ed25519")
    assert "lineside pki issue DIR loco --kind gateway --dns loco.example --csr loco.csr" in out
    wish = ("issue", ca, "loco", "--kind", "gateway", "--csr", gw / "loco.csr")
    assert told(*wish).endswith("if it is right to have them, add --dns loco.example")
    other = told("issue", ca, "hub", "--kind", "hub", "--dns", "loco.example", "--csr", gw / "loco.csr")
    assert other.endswith("was made for loco, not for hub")
    done(*wish, "--dns", "loco.example")
    assert not issued(ca, "loco").key.exists()
    server_context(issued(ca, "loco").cert, gw / "loco.key")
    done("renew", ca, "loco")
    server_context(issued(ca, "loco").cert, gw / "loco.key")
    assert "make a request where it is" in told("renew", ca, "loco", "--new-key", "p256")


def test_renewal_keeps_kind_names_and_key_and_a_revoked_one_stays_so(ca: Path) -> None:
    done("issue", ca, "hub", "--kind", "hub", "--ip", "127.0.0.1", "--days", "10")
    done("issue", ca, "hmi", "--kind", "app")
    before = json.loads(done("show", ca, "--json"))["issued"][0]
    key = issued(ca, "hub").key.read_bytes()
    [after] = json.loads(done("renew", ca, "--expiring", "30", "--json"))
    assert {k: after[k] for k in ("name", "kind", "dns", "ip")} == {k: before[k] for k in ("name", "kind", "dns", "ip")}
    assert after["serial"] != before["serial"]
    assert after["ends"] > before["ends"]
    assert issued(ca, "hub").key.read_bytes() == key
    assert done("renew", ca, "--expiring", "30") == "nothing to renew\n"
    done("renew", ca, "hub", "--new-key", "ed25519")
    assert issued(ca, "hub").key.read_bytes() != key
    server_context(issued(ca, "hub").cert, issued(ca, "hub").key)
    done("revoke", ca, "hub")
    assert "was revoked on" in told("renew", ca, "hub")
    assert "has issued nothing to nobody" in told("renew", ca, "hmi", "nobody")
    assert len([e for e in json.loads(done("show", ca, "--json"))["issued"] if e["name"] == "hmi"]) == 1


def test_a_name_revoked_is_all_its_certificates_and_a_serial_is_one(ca: Path) -> None:
    done("issue", ca, "loco", "--kind", "app")
    done("renew", ca, "loco")
    done("renew", ca, "loco")
    serials = [each["serial"] for each in json.loads(done("show", ca, "--json"))["issued"]]

    def listed() -> list[str]:
        crl = pki.revocation_list_from_pem((ca / "crl.pem").read_bytes())
        return [f"{each.serial_number:x}" for each in crl]

    assert listed() == []
    done("revoke", ca, serials[1].upper())
    assert listed() == [serials[1]]
    done("revoke", ca, "loco", "--reason", "superseded")
    assert sorted(listed()) == sorted(serials)
    assert "is revoked already" in told("revoke", ca, "loco")
    assert "has issued nothing to nobody" in told("revoke", ca, "nobody")
    done("crl", ca, "--crl-days", "30")
    assert sorted(listed()) == sorted(serials)


def test_show_tells_files_and_ends_to_people_and_programs(ca: Path) -> None:
    done("issue", ca, "hub", "--kind", "hub", "--dns", "hub.example", "--days", "20")
    done("issue", ca, "hmi", "--kind", "app")
    done("revoke", ca, "hmi")
    text = done("show", ca)
    assert "hub.example" in text
    assert "ends in 19 d" in text
    assert "revoked: 1, in" in text
    found = json.loads(done("show", ca, "--json"))
    assert found["ca"]["key_here"] is True
    assert found["crl"]["revoked"] == 1
    hub, hmi = found["issued"]
    assert (hub["cert"], hub["key"], hub["p12"]) == (str(issued(ca, "hub").cert), str(issued(ca, "hub").key), None)
    assert hmi["state"].startswith("revoked ")
    # A gateway has the files alone.
    gw = ca.parent / "gw"
    gw.mkdir()
    for path in (ca / "ca.pem", ca / "crl.pem", issued(ca, "hub").cert):
        shutil.copy(path, gw)
    files = json.loads(done("show", gw, "--json"))
    assert [Path(each["file"]).name for each in files] == ["ca.pem", "crl.pem", "hub.pem"]
    assert [each["what"] for each in files] == ["certificate", "revocation list", "certificate"]
    assert "holds neither" in told("show", issued(ca, "hub").key)


def test_the_authority_renewed_is_trusted_with_what_it_signed_before(ca: Path) -> None:
    done("issue", ca, "hub", "--kind", "hub", "--ip", "127.0.0.1")
    before = (ca / "ca.pem").read_bytes()
    done("renew", ca, "--ca", "--days", "5000")
    assert (ca / "ca.pem").read_bytes() != before
    assert verify(ca, "hub") == "OK"


def test_usage_that_says_two_things_is_refused(ca: Path) -> None:
    assert "a validity of 0 days" in told("renew", ca, "--ca", "--days", "0")
    for words in (("renew", ca), ("renew", ca, "x", "--ca"), ("csr", ca, "x", "--keep-key", "--replace")):
        assert run(*words).exit_code == 2


def test_the_options_name_every_kind_and_reason() -> None:
    assert set(KINDS) == {kind.value for kind in pki.Kind}
    assert set(REASONS) == set(pki.REASONS)


def test_no_command_pays_for_cryptography_until_it_signs() -> None:
    script = (
        "import sys; from gateway.cli.main import cli; import gateway.cli.inspect, gateway.cli.pki\n"
        "cli(['pki', 'issue', '--help'], standalone_mode=False)\n"
        "sys.exit('cryptography' in sys.modules or 'ssl' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ who can use it


def verify(ca: Path, name: str, *options: str) -> str:
    """What the program openssl says: "OK", or why not."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    trust = ["-CAfile", str(ca / "ca.pem"), "-CRLfile", str(ca / "crl.pem"), "-crl_check", "-x509_strict"]
    command = [openssl, "verify", *trust, *options, str(issued(ca, name).cert)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return "OK" if result.returncode == 0 else result.stderr


@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_openssl_takes_each_kind_for_what_it_is_and_nobody_revoked(tmp_path: Path, algorithm: str) -> None:
    ca = tmp_path / "ca"
    done("init", ca, "--algorithm", algorithm, "--permit-dns", "example", "--permit-ip", "127.0.0.0/8")
    done("issue", ca, "hub", "--kind", "hub", "--dns", "hub.example", "--algorithm", algorithm)
    done("issue", ca, "loco.4711", "--kind", "gateway")
    done("issue", ca, "hmi", "--kind", "app")
    assert verify(ca, "hub", "-purpose", "sslserver", "-verify_hostname", "hub.example") == "OK"
    assert "purpose" in verify(ca, "hub", "-purpose", "sslclient")
    assert verify(ca, "hmi", "-purpose", "sslclient") == "OK"
    assert "purpose" in verify(ca, "hmi", "-purpose", "sslserver")
    done("revoke", ca, "hmi")
    assert "certificate revoked" in verify(ca, "hmi")
    assert verify(ca, "hub") == "OK"


@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_openssl_and_a_gateway_believe_the_response_that_a_hub_staples(tmp_path: Path, algorithm: str) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    ca = tmp_path / "ca"
    done("init", ca, "--algorithm", algorithm)
    done("issue", ca, "depot", "--kind", "hub", "--dns", "localhost")
    staple = ca / "issued" / "depot.ocsp"

    def says() -> str:
        told = json.loads(done("ocsp", ca, "depot", "--days", "3", "--json"))
        assert told["ocsp"] == str(staple)
        files = ["-issuer", ca / "ca.pem", "-CAfile", ca / "ca.pem", "-cert", issued(ca, "depot").cert]
        command = [openssl, "ocsp", "-respin", staple, "-no_nonce", *files]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert "Response verify OK" in result.stderr
        leaf, issuer = (
            pki.certificate_from_pem(path.read_bytes()) for path in (issued(ca, "depot").cert, ca / "ca.pem")
        )
        late_s = time.time() - 5 * 86400  # a box without a battery
        for now_s in (time.time(), late_s):
            if told["status"] == "good":
                judge(staple.read_bytes(), leaf, issuer, now_s)
            else:
                with pytest.raises(StapleError, match=r"revoked since .* \(keyCompromise\)"):
                    judge(staple.read_bytes(), leaf, issuer, now_s)
        with pytest.raises(StapleError):
            judge(staple.read_bytes(), leaf, issuer, time.time() + 4 * 86400)
        return result.stdout

    assert ": good" in says()
    done("revoke", ca, "depot", "--reason", "key-compromise")
    assert ": revoked" in says()
    done("issue", ca, "depot", "--kind", "hub", "--dns", "localhost", "--replace")
    assert ": good" in says()
    assert mode(staple) == 0o644


def test_a_response_is_about_the_last_certificate_and_no_other(ca: Path) -> None:
    done("issue", ca, "depot", "--kind", "hub", "--dns", "localhost")
    old = issued(ca, "depot").cert.read_bytes()
    done("renew", ca, "depot")
    issued(ca, "depot").cert.write_bytes(old)
    assert "is not the last certificate of depot" in told("ocsp", ca, "depot")
    assert "has issued nothing to nobody" in told("ocsp", ca, "nobody")


def test_java_reads_the_keystore_and_the_truststore(ca: Path) -> None:
    keytool = shutil.which("keytool")
    if keytool is None:
        pytest.skip("no keytool here")
    (ca.parent / "password").write_text("correct-horse\n")
    done("issue", ca, "hub", "--kind", "hub", "--ip", "127.0.0.1")
    done("export", ca, "hub", "--password-file", ca.parent / "password")
    for path, entry in ((issued(ca, "hub").p12, "PrivateKeyEntry"), (ca / "truststore.p12", "trustedCertEntry")):
        command = [keytool, "-list", "-keystore", str(path), "-storetype", "PKCS12", "-storepass", "correct-horse"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout
        assert entry in result.stdout
    assert mode(issued(ca, "hub").p12) == 0o600


def test_mosquitto_takes_an_app_and_no_revoked_one(ca: Path) -> None:
    require("mosquitto")
    done("issue", ca, "broker", "--kind", "hub", "--ip", "127.0.0.1")
    done("issue", ca, "hmi", "--kind", "app", "--algorithm", "ed25519")
    done("issue", ca, "stolen", "--kind", "app")
    done("revoke", ca, "stolen")
    broker = issued(ca, "broker")
    lines = [
        f"cafile {ca / 'ca.pem'}",
        f"certfile {broker.cert}",
        f"keyfile {broker.key}",
        f"crlfile {ca / 'crl.pem'}",
        "require_certificate true",
        "use_identity_as_username true",
    ]
    with parts.Mosquitto(tls="\n".join(lines)) as mosquitto:
        assert mosquitto.tls_port is not None
        assert greeted(mosquitto.tls_port, ca, issued(ca, "hmi"))
        assert not greeted(mosquitto.tls_port, ca, issued(ca, "stolen"))


def greeted(port: int, ca: Path, holder: Certificate) -> bool:
    """Whether an MQTT server lets the holder of a certificate in."""
    up, over = threading.Event(), threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=holder.name)
    client.tls_set_context(client_context(ca / "ca.pem", holder.cert, holder.key))

    def connected(_c: Any, _d: Any, _f: Any, reason: Any, _p: Any) -> None:
        if not reason.is_failure:
            up.set()
        over.set()

    client.on_connect = connected
    client.on_disconnect = lambda *_: over.set()
    try:
        client.connect("127.0.0.1", port)
    except (ssl.SSLError, ConnectionError):
        return False
    client.loop_start()
    try:
        assert over.wait(WAIT_S)
        return up.is_set()
    finally:
        client.disconnect()
        client.loop_stop()


# ------------------------------------------------------------------------------------------------ Lineside itself

HUB = """
[gateway]
id = "depot"
state_dir = "{{state}}"
[mqtt]
listen = ["127.0.0.1:{{port}}"]
[amqp]
listen = ["amqps://127.0.0.1:{{hub_port}}"]
cert = "{ca}/issued/hub.pem"
key = "{ca}/issued/hub.key"
client_ca = "{ca}/ca.pem"
crl = "{ca}/crl.pem"
[local]
when_full = "refuse"
[[address]]
name = "edge"
kind = "queue"
[[access]]
who = "cn:loco-*"
publish = ["edge"]
"""

GATEWAY = """
[gateway]
id = "{name}"
state_dir = "{{state}}"
[mqtt]
listen = ["127.0.0.1:{{port}}"]
[[hub]]
name = "depot"
kind = "lineside"
urls = ["amqps://127.0.0.1:{{hub_port}}"]
ca = "{ca}/ca.pem"
cert = "{own}/issued/{name}.pem"
key = "{own}/issued/{name}.key"
crl = "{ca}/crl.pem"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
"""


@pytest.fixture
def fleet(ca: Path) -> Iterator[Fleet]:
    fleet = Fleet(ca)
    try:
        yield fleet
    finally:
        for daemon in fleet.daemons:
            daemon.end()


class Fleet:
    """A hub, and gateways that dial it, with certificates of an authority made by the command."""

    def __init__(self, ca: Path) -> None:
        self.ca = ca
        self.daemons: list[Daemon] = []
        done("issue", ca, "hub", "--kind", "hub", "--ip", "127.0.0.1")
        done("issue", ca, "loco-1", "--kind", "gateway")
        self.hub_port = parts.free_port()
        self.hub = self._daemon("hub", HUB.format(ca=ca))
        self.hub.status()

    def gateway(self, name: str, own: Path | None = None) -> Daemon:
        return self._daemon(name, GATEWAY.format(ca=self.ca, own=own or self.ca, name=name))

    def _daemon(self, name: str, config: str) -> Daemon:
        directory = self.ca.parent / f"daemon-{name}"
        directory.mkdir()
        self.daemons.append(Daemon(directory, config, self.hub_port))
        return self.daemons[-1]


def send(gateway: Daemon, count: int) -> None:
    gateway.status()
    client = Client(gateway.port)
    try:
        client.publish(count)
    finally:
        client.close()


def drained(gateway: Daemon) -> None:
    wait_until(lambda: not gateway.stream()["waiting"], what=gateway.log.read_text)


def test_a_gateway_and_a_hub_trust_each_other_and_nobody_of_another_authority(fleet: Fleet) -> None:
    loco = fleet.gateway("loco-1")
    send(loco, 20)
    drained(loco)

    other = fleet.ca.parent / "other"
    done("init", other)
    done("issue", other, "loco-2", "--kind", "gateway")
    stranger = fleet.gateway("loco-2", own=other)
    send(stranger, 5)
    fleet.hub.wait_for_log("the client's certificate is not accepted")
    assert stranger.stream()["waiting"] == 5


def test_a_gateway_that_is_revoked_is_refused_and_with_a_new_certificate_loses_nothing(fleet: Fleet) -> None:
    loco = fleet.gateway("loco-1")
    send(loco, 5)
    drained(loco)
    loco.process.terminate()  # in order: killed, it would send some of what has just gone once more
    assert loco.process.wait(20) == 0
    done("revoke", fleet.ca, "loco-1", "--reason", "key-compromise")  # the hub runs on, and reads the list again
    loco.start()
    send(loco, 7)
    fleet.hub.wait_for_log("the client's certificate is not accepted: certificate revoked")
    assert loco.stream()["waiting"] == 7
    done("issue", fleet.ca, "loco-1", "--kind", "gateway", "--replace")
    drained(loco)


def test_a_hub_that_is_revoked_is_refused_by_the_gateway(fleet: Fleet) -> None:
    done("revoke", fleet.ca, "hub")
    loco = fleet.gateway("loco-1")
    send(loco, 3)
    loco.wait_for_log("certificate revoked")
    assert loco.stream()["waiting"] == 3


def test_check_explains_the_list_and_says_what_is_wrong_with_it(fleet: Fleet) -> None:
    def check() -> Result:
        return CliRunner().invoke(cli, ["check", "--config", str(fleet.hub.config)])

    good = check()
    assert good.exit_code == 0, good.output
    assert f"clients are refused if revoked in {fleet.ca}/crl.pem" in good.output
    text = fleet.hub.config.read_text()
    fleet.hub.config.write_text(text.replace("/crl.pem", "/ca.pem"))
    bad = check()
    assert bad.exit_code == 2
    assert "a revocation list in PEM form" in bad.output
    fleet.hub.config.write_text(text.replace("client_ca =", "# client_ca ="))
    assert "amqp.client_ca" in check().output


def test_a_list_for_a_hub_goes_with_the_authority_it_is_of(ca: Path, tmp_path: Path) -> None:
    done("issue", ca, "loco-1", "--kind", "gateway")
    config = tmp_path / "lineside.toml"
    text = GATEWAY.format(ca=ca, own=ca, name="loco-1").format(state=tmp_path, port=1, hub_port=2)
    config.write_text(text)
    good = CliRunner().invoke(cli, ["check", "--config", str(config)])
    assert f"hub depot is refused if revoked in {ca}/crl.pem" in good.output
    config.write_text(text.replace("ca = ", "# ca = ", 1))
    bad = CliRunner().invoke(cli, ["check", "--config", str(config)])
    assert bad.exit_code == 2
    assert "hub[0].ca" in bad.output


# ------------------------------------------------------------------------------------------------ the list in TLS


def test_a_list_whose_time_is_over_or_of_another_authority_lets_nobody_in(ca: Path) -> None:
    done("issue", ca, "hub", "--kind", "hub", "--ip", "127.0.0.1")
    done("issue", ca, "hmi", "--kind", "app")
    done("init", ca.parent / "other")
    hub, hmi = issued(ca, "hub"), issued(ca, "hmi")
    client = client_context(ca / "ca.pem", hmi.cert, hmi.key, ca / "crl.pem")
    handshake(client, server_context(hub.cert, hub.key, ca / "ca.pem", crl=ca / "crl.pem"), "127.0.0.1")
    with pki_store.opened(ca) as store:
        long_ago = pki.Validity.of(datetime.now(UTC) - timedelta(days=30), 10)
        crl = pki.revocation_list(store.authority(None), (), 1, long_ago)
    (ca / "old.pem").write_bytes(pki.revocation_list_to_pem(crl))
    for path, fault in ((ca / "old.pem", "CRL has expired"), (ca.parent / "other" / "crl.pem", "unable to get")):
        with pytest.raises(ssl.SSLCertVerificationError, match=fault):
            handshake(client, server_context(hub.cert, hub.key, ca / "ca.pem", crl=path), "127.0.0.1")
