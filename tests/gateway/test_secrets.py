"""Secrets: where they may come from, and that nothing ever shows one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from gateway.cli.main import cli
from gateway.config import ConfigErrors, loads
from security import passwords
from tests.daemon import Client, Daemon, free_port
from tests.pki import Pki

MARKS = {
    "hub-password": "HUB-hunter2-MARK",
    "key-password": "KEY-hunter2-MARK",
    "bridge-password": "BRIDGE-hunter2-MARK",
    "user-password": "USER-hunter2-MARK",
}

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
log_level = "debug"
[mqtt]
listen = ["127.0.0.1:{port}", "mqtts://127.0.0.1:{tls}"]
cert = "{cert}"
key = "credential:key"
key_password_file = "credential:key-password"
password_file = "credential:users"
allow_anonymous = true
[[hub]]
name = "depot"
urls = ["amqps://127.0.0.1:{hub_port}"]
ca = "{ca}"
cert = "{cert}"
key = "credential:key"
key_password_file = "credential:key-password"
sasl = "plain"
user = "loco"
password_file = "credential:hub-password"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
[bridge]
url = "mqtts://127.0.0.1:{hub_port}"
ca = "{ca}"
user = "loco"
password_file = "credential:bridge-password"
"""


@pytest.fixture
def credentials(tmp_path: Path, pki: Pki) -> Path:
    """A directory as systemd makes it for a service."""
    directory = tmp_path / "credentials"
    directory.mkdir()
    for name, mark in MARKS.items():
        (directory / name).write_text(f"{mark}\n")
    key = load_pem_private_key(pki.server.key.read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(MARKS["key-password"].encode())
    )
    (directory / "key").write_bytes(key)
    passwords.update(directory / "users", "anna", passwords.hash_password(MARKS["user-password"].encode()))
    return directory


def test_a_daemon_runs_on_credentials_of_the_service_and_shows_no_secret_anywhere(
    tmp_path: Path, pki: Pki, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    text = CONFIG.replace("{cert}", str(pki.server.cert)).replace("{ca}", str(pki.ca))
    daemon = Daemon(tmp_path, text.replace("{tls}", str(free_port())), hub_port=free_port())
    try:
        daemon.status()
        app = Client(daemon.port)
        app.publish(10)
        app.close()
        app = Client.__new__(Client)
        import paho.mqtt.client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        for password in (MARKS["user-password"], "WRONG-hunter2-MARK"):
            client = paho.Client(CallbackAPIVersion.VERSION2, client_id="anna")
            client.username_pw_set("anna", password)
            client.connect("127.0.0.1", daemon.port)
            client.loop_start()
            client.loop_stop()
        daemon.wait_for_log("hub not reached")
        shown = daemon.log.read_text() + json.dumps(daemon.status())
        for command in (["status"], ["status", "--json"], ["check"], ["check", "--json"], ["clients"], ["backlog"]):
            result = CliRunner().invoke(cli, [*command, "--config", str(daemon.config)])
            assert result.exit_code == 0, result.output
            shown += result.output
        shown += repr(loads(daemon.config.read_text(), check_files=False))
        assert "telemetry" in shown
        assert "hunter2" not in shown
        assert "PRIVATE KEY" not in shown
    finally:
        daemon.end()


def test_a_wrong_password_of_a_key_is_told_without_the_password(
    tmp_path: Path, pki: Pki, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    (credentials / "key-password").write_text("WRONG-hunter2-MARK")
    text = CONFIG.replace("{cert}", str(pki.server.cert)).replace("{ca}", str(pki.ca))
    path = tmp_path / "lineside.toml"
    path.write_text(text.format(state=tmp_path / "state", port=1883, tls=8883, hub_port=5671))
    result = CliRunner().invoke(cli, ["check", "--config", str(path)])
    assert result.exit_code == 2
    assert "mqtt.key_password_file" in result.output
    assert "not the password of" in result.output
    assert "hunter2" not in result.output


def test_without_the_service_credentials_are_looked_for_where_systemd_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    config = loads('[gateway]\nid = "a"\n[mqtt]\npassword_file = "credential:users"\n', check_files=False)
    assert config.mqtt is not None
    assert str(config.mqtt.password_file) == "/run/credentials/lineside.service/users"
    with pytest.raises(ConfigErrors, match="the name of a credential"):
        loads('[gateway]\nid = "a"\n[mqtt]\npassword_file = "credential:../../etc/shadow"\n', check_files=False)
