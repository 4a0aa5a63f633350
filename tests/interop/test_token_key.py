"""A key that stays in a PKCS #11 token, by the recipe of deploy/OPERATING.md as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from security.tls import TLSFileError, client_context
from tests.daemon import Client, Daemon, Reader, free_port, wait_until
from tests.gateway.test_certificates import TLS_GATEWAY, TLS_HUB

RECIPE = Path(__file__).parents[2] / "deploy" / "OPERATING.md"
SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "271828"
COUNT = 100


def provider() -> Path | None:
    """Where OpenSSL finds pkcs11-provider."""
    named = os.environ.get("OPENSSL_MODULES")
    folders = [Path(named)] if named else list(Path("/usr/lib").glob("*/ossl-modules"))
    return next((each for folder in folders if (each := folder / "pkcs11.so").exists()), None)


def blocks(heading: str) -> list[str]:
    """The indented blocks of a section, without their indentation."""
    section = RECIPE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"(?:^(?:    .*)?\n)+", section, re.M)
    return [re.sub("^    ", "", each, flags=re.M).strip("\n") for each in found if each.strip()]


class Token:
    """A SoftHSM token with the recipe's key in it, and the recipe's authority."""

    def __init__(self, path: Path) -> None:
        self.pki = path / "lineside" / "pki"
        self.pki.mkdir(parents=True)
        (path / "tokens").mkdir()
        (path / "softhsm2.conf").write_text(f"directories.tokendir = {path / 'tokens'}\nobjectstore.backend = file\n")
        (self.pki / "pin").write_text(f"{PIN}\n")
        self.ca = path / "fleet-ca"
        config, commands = (
            each.replace("/etc/lineside", str(path / "lineside")).replace("/root/fleet-ca", str(self.ca))
            for each in blocks("A key in a token")[:2]
        )
        assert config.startswith("# ")
        (path / "lineside" / "openssl.cnf").write_text(config)
        self.environment = {
            "SOFTHSM2_CONF": str(path / "softhsm2.conf"),
            "OPENSSL_CONF": str(path / "lineside" / "openssl.cnf"),
        }
        (path / "bin").mkdir()
        lineside = path / "bin" / "lineside"
        lineside.write_text(f'#!/bin/sh\nexec env -u OPENSSL_CONF {sys.executable} -m gateway "$@"\n')
        lineside.chmod(0o755)
        made = ["lineside", "pki", "init", str(self.ca)]
        self._run(path, *made)
        self._run(path, "lineside", "pki", "issue", str(self.ca), "depot", "--kind", "hub", "--dns", "localhost")
        self._run(path, "softhsm2-util", *f"--init-token --free --label lineside --so-pin {PIN} --pin {PIN}".split())
        self._run(path, "bash", "-euxc", f"cd {path}\n{commands}")
        self.key = self.pki / "loco-4711.key"
        self.cert = self.ca / "issued" / "loco-4711.pem"

    def _run(self, path: Path, *words: str) -> None:
        search = {"PATH": f"{path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
        environment = os.environ | self.environment | search
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def token(tmp_path: Path) -> Token:
    if not SOFTHSM.exists() or shutil.which("softhsm2-util") is None:
        pytest.skip("no SoftHSM here (Debian: softhsm2)")
    if provider() is None:
        pytest.skip("no pkcs11-provider here (a package from Debian 13 on)")
    return Token(tmp_path)


def test_a_gateway_proves_itself_with_a_key_that_is_in_its_token(token: Token, tmp_path: Path) -> None:
    assert "PRIVATE KEY" not in token.key.read_text()
    hub_port = free_port()
    for name in ("hub", "gateway"):
        (tmp_path / name).mkdir()
    theirs = {"cert": token.ca / "issued" / "depot.pem", "key": token.ca / "issued" / "depot.key"}
    texts = []
    for text, files in ((TLS_HUB, theirs), (TLS_GATEWAY, {"cert": token.cert, "key": token.key})):
        for name, path in (files | {"ca": token.ca / "ca.pem"}).items():
            text = text.replace(f"{{{name}}}", str(path))
        texts.append(text)
    pin = f'key_password_file = "{token.pki / "pin"}"'
    daemons = [Daemon(tmp_path / "hub", texts[0], hub_port)]
    try:
        daemons[0].status()
        reader = Reader(daemons[0])
        config = texts[1].replace('kind = "lineside"', f'kind = "lineside"\nsasl = "external"\n{pin}')
        gateway = Daemon(tmp_path / "gateway", config, hub_port, **token.environment)
        daemons.append(gateway)
        gateway.status()
        app = Client(gateway.port)
        app.publish(COUNT)
        wait_until(lambda: len(reader.got) == COUNT)
        assert reader.got == list(range(COUNT))
        app.close()
        reader.client.close()
    finally:
        for daemon in daemons:
            daemon.end()
    assert daemons[1].process.returncode == -9  # killed by us, and by nothing before


def test_check_says_that_ocsp_does_without_a_token(token: Token, tmp_path: Path) -> None:
    ca = token.ca / "ca.pem"
    config = TLS_GATEWAY.replace("{ca}", str(ca)).replace("{cert}", str(token.cert)).replace("{key}", str(token.key))
    file = tmp_path / "lineside.toml"
    file.write_text(config.format(state=tmp_path / "state", port=1883, hub_port=5671))
    words = [sys.executable, "-m", "gateway", "check", "--config", str(file)]
    assert subprocess.run(words, capture_output=True, timeout=60).returncode == 0
    file.write_text(file.read_text().replace('kind = "lineside"', 'kind = "lineside"\nocsp = "require"'))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "names one in a token, which ocsp does without" in done.stdout + done.stderr


def test_a_key_that_names_a_token_nobody_has_is_told_as_such(tmp_path: Path) -> None:
    """Needs no token."""
    from tests.pki import Pki

    pki = Pki(tmp_path)
    key = tmp_path / "key"
    key.write_text("-----BEGIN PKCS#11 PROVIDER URI-----\nMAA=\n-----END PKCS#11 PROVIDER URI-----\n")
    with pytest.raises(TLSFileError, match=r"names a key in a PKCS #11 token.*OPENSSL_CONF.*PIN") as raised:
        client_context(pki.ca, pki.client.cert, key)
    assert raised.value.path == key
