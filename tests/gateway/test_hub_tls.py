"""The uplink's TLS context: made once, and again when one of its files is another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gateway.config import loads
from gateway.config_values import parse_hub_url
from gateway.uplink.attempt import HubTls
from tests.pki import Pki

URL = parse_hub_url("amqps://hub.example")
FILES = "ca", "cert", "key"


@pytest.fixture
def files(tmp_path: Path, pki: Pki) -> dict[str, Path]:
    """Copies, renewed as `mv` does it: another inode under the same name."""
    found = {"ca": pki.ca, "cert": pki.client.cert, "key": pki.client.key}
    return {name: Path(shutil.copy(path, tmp_path / f"{name}.pem")) for name, path in found.items()}


def tls_of(files: dict[str, Path], ocsp: str = "off") -> HubTls:
    lines = "".join(f'{name} = "{path}"\n' for name, path in files.items()) + f'ocsp = "{ocsp}"\n'
    config = loads(f'[gateway]\nid = "loco"\n[[hub]]\nname = "depot"\nurls = ["{URL}"]\n{lines}')
    return HubTls(config.hubs[0])


def replace(path: Path, text: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(text)
    os.replace(fresh, path)


@pytest.mark.parametrize("ocsp", ["off", "if-stapled", "require"])
def test_attempts_share_a_context_until_a_file_is_renewed(files: dict[str, Path], ocsp: str) -> None:
    tls = tls_of(files, ocsp)
    first = tls.context(URL)
    assert first is not None
    assert tls.context(URL) is first
    for name in FILES:
        replace(files[name], files[name].read_bytes())
        renewed = tls.context(URL)
        assert renewed is not first, name
        assert tls.context(URL) is renewed
        first = renewed


def test_a_file_that_is_damaged_is_told_with_every_attempt_until_it_is_good_again(files: dict[str, Path]) -> None:
    tls = tls_of(files)
    good = files["cert"].read_bytes()
    assert tls.context(URL) is not None
    replace(files["cert"], b"nothing")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cert\.pem"):
            tls.context(URL)
    replace(files["cert"], good)
    assert tls.context(URL) is not None


def test_without_tls_there_is_none_and_without_a_ca_the_system_says_whom_to_trust(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = tls_of({})
    assert tls.context(parse_hub_url("amqp://hub.example")) is None
    paths: Any = type("Paths", (), {"cafile": str(files["ca"])})
    monkeypatch.setattr("ssl.get_default_verify_paths", lambda: paths)
    first = tls.context(URL)
    assert tls.context(URL) is first
    replace(files["ca"], files["ca"].read_bytes())
    assert tls.context(URL) is not first
