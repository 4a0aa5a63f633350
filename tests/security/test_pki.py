"""The authority's values: what a certificate is good for, whom it is issued to, and what is refused before signing."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from security import pki
from security.pki import Authority, Constraints, Kind, Names, PkiError, Validity

NOW = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
HERE = pki.parse_names(["hub.example"], ["127.0.0.1"])
NOBODY = Names()


def authority(
    algorithm: pki.Algorithm = "p256", constraints: Constraints | None = None, days: int = 3650, now: datetime = NOW
) -> Authority:
    key = pki.new_key(algorithm)
    return Authority(pki.new_authority("Fleet", key, Validity.of(now, days), constraints or Constraints()), key)


def leaf(ca: Authority, kind: Kind, names: Names = NOBODY, now: datetime = NOW, days: int = 100) -> x509.Certificate:
    return pki.issue(ca, "loco", kind, names, pki.new_key("p256").public_key(), Validity.of(now, days))


@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_an_authority_signs_holders_and_no_authorities(algorithm: pki.Algorithm) -> None:
    found = authority(algorithm).certificate
    basic = found.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = found.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    found.verify_directly_issued_by(found)


@pytest.mark.parametrize(
    ("kind", "names", "purposes"),
    [
        (Kind.GATEWAY, NOBODY, [CLIENT]),
        (Kind.GATEWAY, HERE, [CLIENT, SERVER]),
        (Kind.HUB, HERE, [SERVER]),
        (Kind.APP, NOBODY, [CLIENT]),
    ],
)
def test_a_certificate_is_good_for_its_kind_and_nothing_else(
    kind: Kind, names: Names, purposes: list[x509.ObjectIdentifier]
) -> None:
    ca = authority()
    found = leaf(ca, kind, names)
    found.verify_directly_issued_by(ca.certificate)
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == purposes
    basic = found.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    assert pki.names_of(found) == names
    assert pki.common_name(found.subject) == "loco"


def test_a_hub_needs_a_name_and_an_app_has_none() -> None:
    with pytest.raises(PkiError, match=r"give every --dns and --ip"):
        leaf(authority(), Kind.HUB)
    with pytest.raises(PkiError, match=r"an app is not dialled, so leave hub.example, 127.0.0.1 out"):
        leaf(authority(), Kind.APP, HERE)


def test_a_certificate_has_begun_a_week_ago_and_ends_to_the_day() -> None:
    found = leaf(authority(), Kind.APP, days=100)
    whole = NOW.replace(microsecond=0)
    assert (found.not_valid_before_utc, found.not_valid_after_utc) == (
        whole - timedelta(days=7),
        whole + timedelta(days=100),
    )


def test_serial_numbers_are_long_and_no_two_alike() -> None:
    ca = authority()
    serials = {leaf(ca, Kind.APP).serial_number for _ in range(50)}
    assert len(serials) == 50
    assert max(serial.bit_length() for serial in serials) in range(150, 160)


def test_no_certificate_outlives_the_authority() -> None:
    with pytest.raises(PkiError, match=r"ends on 2026-05-11, before .* 2026-08-09: .*renew DIR --ca"):
        leaf(authority(days=10), Kind.APP, days=100)


@pytest.mark.parametrize(("days", "backdate"), [(0, 7), (-1, 7), (10**6, 7), (10, -1), (10, 10**5)])
def test_a_validity_that_makes_no_sense_is_refused(days: int, backdate: int) -> None:
    with pytest.raises(PkiError, match="give"):
        Validity.of(NOW, days, timedelta(days=backdate))


def test_a_clock_before_certificates_exist_is_named() -> None:
    with pytest.raises(PkiError, match="clock says 1950-01-01: set it"):
        Validity.of(datetime(1950, 1, 1, tzinfo=UTC), 10)


@pytest.mark.parametrize(
    ("dns", "networks", "good", "bad"),
    [
        (["depot.example"], [], ["a.depot.example", "depot.example"], ["adepot.example", "10.0.0.1", "::1"]),
        ([".depot.example"], ["10.0.0.0/8"], ["a.depot.example", "10.1.2.3"], ["11.0.0.1", "example"]),
        ([], ["fd00::/8"], ["fd00::1"], ["a.example", "fe80::1"]),
    ],
)
def test_a_constrained_authority_signs_inside_and_openssl_agrees(
    dns: list[str], networks: list[str], good: list[str], bad: list[str], tmp_path: Path
) -> None:
    limits = pki.parse_constraints(dns, networks)
    now = datetime.now(UTC)
    ca = authority(constraints=limits, now=now)
    free = Authority(ca.certificate, ca.key)
    for each in [*good, *bad]:
        names = pki.parse_names([], [each]) if ":" in each or each[0] == "1" else pki.parse_names([each], [])
        unchecked = x509.CertificateBuilder(
            issuer_name=ca.certificate.subject,
            subject_name=x509.Name([]),
            public_key=ca.key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(days=1),
            not_valid_after=now + timedelta(days=1),
        ).add_extension(
            x509.SubjectAlternativeName([*map(x509.DNSName, names.dns), *map(x509.IPAddress, names.addresses)]), True
        )
        forged = unchecked.sign(ca.key, hashes.SHA256())
        assert _openssl_takes(tmp_path, ca.certificate, forged) == (each in good), each
        if each in good:
            assert _openssl_takes(tmp_path, ca.certificate, leaf(free, Kind.HUB, names, now))
        else:
            with pytest.raises(PkiError, match=f"{each} is outside what this authority may sign for"):
                leaf(free, Kind.HUB, names, now)


def _openssl_takes(directory: Path, ca: x509.Certificate, found: x509.Certificate) -> bool:
    (directory / "ca.pem").write_bytes(pki.certificate_to_pem(ca))
    (directory / "leaf.pem").write_bytes(pki.certificate_to_pem(found))
    command = ["openssl", "verify", "-CAfile", str(directory / "ca.pem"), str(directory / "leaf.pem")]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        pytest.skip("no openssl here")


def test_an_authority_renewed_keeps_name_key_and_limits_and_what_it_issued() -> None:
    ca = authority(constraints=pki.parse_constraints(["example"], ["127.0.0.0/8"]))
    found = leaf(ca, Kind.HUB, HERE)
    again = pki.renew_authority(ca.certificate, ca.key, Validity.of(NOW + timedelta(days=3000), 3650))
    assert again.serial_number != ca.certificate.serial_number
    assert again.not_valid_after_utc > ca.certificate.not_valid_after_utc
    assert [e.value for e in again.extensions] == [e.value for e in ca.certificate.extensions]
    found.verify_directly_issued_by(again)


@pytest.mark.parametrize(
    "name", ["", "../ca", "a/b", "a b", "-x", "x.", ".x", "a\n", "ü", "x" * 65, "a\0", "CN=x,O=y", "*"]
)
def test_a_name_that_could_be_another_file_or_subject_is_refused(name: str) -> None:
    with pytest.raises(PkiError, match="no name for a certificate"):
        pki.parse_name(name)


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", fullmatch=True))
def test_every_name_that_is_taken_is_the_name_of_a_file_in_its_directory(name: str) -> None:
    assert Path("issued", f"{pki.parse_name(name)}.pem").parent == Path("issued")


@pytest.mark.parametrize("dns", ["*.example", "10.0.0.1", "a..b", "", "-a.example", "ä.example", "a" * 64, "a b"])
def test_a_dns_name_that_is_none_is_refused(dns: str) -> None:
    with pytest.raises(PkiError):
        pki.parse_names([dns], [])


@pytest.mark.parametrize("address", ["hub.example", "10.0.0.256", "10.0.0.0/8", "fe80::1%eth0", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(PkiError, match="no IP address"):
        pki.parse_names([], [address])


def test_too_many_names_are_refused_and_the_same_twice_is_once() -> None:
    assert pki.parse_names(["A.example", "a.example."], ["::1", "0::1"]) == pki.parse_names(["a.example"], ["::1"])
    with pytest.raises(PkiError, match="more than 100"):
        pki.parse_names([f"h{n}.example" for n in range(101)], [])


def test_a_request_tells_name_names_and_key_and_a_changed_one_is_refused() -> None:
    key = pki.new_key("ed25519")
    pem = pki.request(key, "loco", HERE)
    found = pki.read_request(pem)
    assert (found.name, found.names) == ("loco", HERE)
    assert found.public_key.public_bytes_raw() == key.public_key().public_bytes_raw()  # type: ignore[union-attr]
    der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER).replace(b"hub.example", b"bad.example")
    with pytest.raises(PkiError, match="signature is wrong"):
        pki.read_request(x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(PkiError, match="no certificate signing request"):
        pki.read_request(b"-----BEGIN CERTIFICATE REQUEST-----\n")


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        (rsa.generate_private_key(65537, 1024), "too weak"),
        (ec.generate_private_key(ec.SECP192R1()), "use P-256"),
    ],
)
def test_a_request_with_a_weak_key_is_refused(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, fault: str) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loco")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    with pytest.raises(PkiError, match=fault):
        pki.read_request(csr.public_bytes(serialization.Encoding.PEM))


def test_a_key_comes_back_with_its_passphrase_only() -> None:
    key = pki.new_key("p256")
    locked, plain = pki.key_to_pem(key, b"open"), pki.key_to_pem(key)
    assert b"ENCRYPTED" in locked
    assert pki.key_to_pem(pki.key_from_pem(locked, b"open")) == plain
    for pem, passphrase, fault in (
        (locked, None, "--passphrase-file"),
        (locked, b"other", "passphrase is wrong"),
        (plain, b"open", "not encrypted"),
        (b"nothing", None, "no private key"),
    ):
        with pytest.raises(PkiError, match=fault):
            pki.key_from_pem(pem, passphrase)


def test_a_key_of_another_authority_is_not_taken_for_this_one_s() -> None:
    one, other = authority(), authority()
    pki.check_authority(one)
    with pytest.raises(PkiError, match="do not belong together"):
        pki.check_authority(Authority(one.certificate, other.key))
    key = pki.new_key("p256")
    holder = pki.issue(one, "loco", Kind.APP, NOBODY, key.public_key(), Validity.of(NOW, 10))
    with pytest.raises(PkiError, match="not one of an authority"):
        pki.check_authority(Authority(holder, key))


def test_a_revocation_list_names_serials_and_reasons_and_is_signed() -> None:
    ca = authority()
    revoked = [pki.Revoked(5, NOW, "key-compromise"), pki.Revoked(6, NOW, "unspecified")]
    crl = pki.revocation_list(ca, revoked, 9, Validity.of(NOW, 30))
    assert crl.is_signature_valid(ca.certificate.public_key())  # type: ignore[arg-type]
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 9
    assert crl.last_update_utc < NOW
    first, second = crl.get_revoked_certificate_by_serial_number(5), crl.get_revoked_certificate_by_serial_number(6)
    assert first is not None
    assert first.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.key_compromise
    assert second is not None
    assert not list(second.extensions)
    assert crl.get_revoked_certificate_by_serial_number(7) is None


def test_a_keystore_holds_key_and_chain_under_the_name() -> None:
    ca, key = authority(), pki.new_key("p256")
    found = pki.issue(ca, "hub", Kind.HUB, HERE, key.public_key(), Validity.of(NOW, 10))
    store = pkcs12.load_pkcs12(pki.keystore("hub", key, found, ca.certificate, b"secret"), b"secret")
    assert store.cert is not None
    assert (store.cert.friendly_name, store.cert.certificate) == (b"hub", found)
    assert [each.certificate for each in store.additional_certs] == [ca.certificate]
    with pytest.raises(ValueError, match="password"):
        pkcs12.load_pkcs12(pki.keystore("hub", key, found, ca.certificate, b"secret"), b"other")
