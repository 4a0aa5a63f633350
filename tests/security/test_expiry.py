"""When a certificate ends, what is said of it, and when nothing can be said because the clock is not set."""

from __future__ import annotations

import datetime
import json
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from security.expiry import RELEASED_S, Judgement, Validity, clock_not_set, iso, judge, notice, read
from tests.pki import Pki

DAY_S = 86400.0
END = RELEASED_S + 365 * DAY_S
CERTIFICATE = Validity("c.pem", "CN=loco", RELEASED_S, END)


@pytest.mark.parametrize(
    ("days_left", "judgement", "said"),
    [
        (200, Judgement.GOOD, None),
        (30.01, Judgement.GOOD, None),
        (30, Judgement.ENDS_SOON, 30),
        (7.01, Judgement.ENDS_SOON, 30),
        (7, Judgement.ENDS_SOON, 7),
        (1, Judgement.ENDS_SOON, 1),
        (0.001, Judgement.ENDS_SOON, 1),
        (0, Judgement.EXPIRED, 0),
        (-30, Judgement.EXPIRED, 0),
        (366, Judgement.NOT_YET, None),
    ],
)
def test_what_is_said_this_long_before_the_end(days_left: float, judgement: Judgement, said: int | None) -> None:
    now = END - days_left * DAY_S
    assert judge(CERTIFICATE, now, True) is judgement
    assert notice(CERTIFICATE, now) == said
    assert judge(CERTIFICATE, now, False) is Judgement.CLOCK


@pytest.mark.parametrize(
    ("now", "synchronised", "not_set"),
    [
        (0.0, False, True),
        (RELEASED_S - 1, False, True),
        (RELEASED_S + 1, False, True),  # before the machine's own certificate began
        (RELEASED_S + 11 * DAY_S, False, False),
        (-70 * 365 * DAY_S, False, True),
        (0.0, True, False),
        (RELEASED_S + 50 * 365 * DAY_S, False, False),
    ],
)
def test_a_clock_is_not_set_that_is_before_this_software_or_its_own_certificates(
    now: float, synchronised: bool, not_set: bool
) -> None:
    assert clock_not_set(now, synchronised, [RELEASED_S + 10 * DAY_S]) is not_set


@pytest.mark.parametrize("seconds", [0.0, -1e12, 1e18, 9.2e18])
def test_any_time_can_be_said(seconds: float) -> None:
    assert iso(seconds)


def test_files_are_read_in_a_process_of_their_own_each_with_its_answer(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    crl = tmp_path / "crl.pem"
    pem = b""
    for days in (40, 20):
        made = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.Name([]))
            .last_update(now)
            .next_update(now + datetime.timedelta(days=days))
            .sign(key, hashes.SHA256())
        )
        pem += made.public_bytes(serialization.Encoding.PEM)
    crl.write_bytes(pem)
    (tmp_path / "bad.pem").write_text("no")
    # Of no version that there is: OpenSSL takes it all the same, and the files after it must be told of.
    der = x509.load_pem_x509_certificate(pki.client.cert.read_bytes()).public_bytes(serialization.Encoding.DER)
    odd = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)
    (tmp_path / "odd.pem").write_text(ssl.DER_cert_to_PEM_cert(odd))
    files = [tmp_path / "odd.pem", pki.client.cert, crl, tmp_path / "bad.pem", tmp_path / "missing.pem"]
    done = subprocess.run([sys.executable, "-m", "security.expiry", *map(str, files)], capture_output=True, check=True)
    strange, cert, lists, bad, missing = (json.loads(line) for line in done.stdout.splitlines())
    assert Validity(**cert) == read(pki.client.cert)
    assert cert["subject"] == "CN=loco-4711"
    assert cert["not_after_s"] - now.timestamp() == pytest.approx(60 * DAY_S, abs=120)
    assert lists["is_list"]
    assert lists["not_after_s"] == (now + datetime.timedelta(days=20)).timestamp(), "the list that ends first"
    assert "version" in strange["error"]
    assert bad["error"]
    assert missing["error"]
