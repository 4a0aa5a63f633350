"""TLS contexts: a trusted pair speaks TLS 1.2 or newer, nobody else does, and a bad file is named."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from security.identity import certificate_identity
from security.tls import FILE_BYTES_MAX, TLSFileError, client_context, file_stamp, server_context
from tests.pki import Pki

ROUNDS_MAX = 20
REASONS = {"absent": "no such file or directory", "directory": "is a directory"}


def handshake(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Run a handshake in memory, then one byte each way; raises what the first side to object raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialler = client.wrap_bio(to_client, to_server, server_hostname=name)
    listener = server.wrap_bio(to_server, to_client, server_side=True)
    steps: list[Callable[[], object]] = [dialler.do_handshake, listener.do_handshake]
    for _ in range(ROUNDS_MAX):
        steps = [step for step in steps if not _done(step)]
        if not steps:
            # TLS 1.3 tells a client only now that its certificate was refused.
            dialler.write(b"?")
            assert listener.read(1) == b"?"
            listener.write(b"!")
            assert dialler.read(1) == b"!"
            return dialler, listener
    raise AssertionError("the handshake does not end")


def _done(step: Callable[[], object]) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def mutual(pki: Pki) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return (
        client_context(pki.ca, pki.client.cert, pki.client.key),
        server_context(pki.server.cert, pki.server.key, pki.ca),
    )


def test_a_trusted_pair_meets_and_the_server_knows_the_client_by_name(pki: Pki) -> None:
    dialler, listener = handshake(*mutual(pki))
    assert dialler.version() == "TLSv1.3"
    peer = listener.getpeercert()
    assert peer is not None
    assert peer["subject"] == ((("commonName", "loco-4711"),),)


def test_tls_1_2_is_taken_and_1_1_is_not(pki: Pki) -> None:
    client, server = mutual(pki)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(client, server)[0].version() == "TLSv1.2"
    for context in mutual(pki):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        handshake(old, server_context(pki.server.cert, pki.server.key))


def test_a_client_refuses_another_authority_and_another_name(pki: Pki, other_pki: Pki) -> None:
    server = server_context(pki.server.cert, pki.server.key)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(client_context(other_pki.ca), server)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(client_context(pki.ca), server, name="hub.example")
    handshake(client_context(pki.ca), server, name="127.0.0.1")


def test_a_client_that_trusts_the_system_refuses_a_private_authority(pki: Pki) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client_context(), server_context(pki.server.cert, pki.server.key))


def test_a_client_refuses_an_expired_server_and_one_with_a_client_s_certificate(pki: Pki) -> None:
    past = datetime.timedelta(days=-1)
    expired = pki.issue("expired", server=True, begins=2 * past, ends=past)
    for certificate, reason in ((expired, "expired"), (pki.issue("wrong-purpose"), "purpose")):
        server = server_context(certificate.cert, certificate.key)
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            handshake(client_context(pki.ca), server, name=certificate.name)


def test_a_server_with_a_client_authority_refuses_strangers(pki: Pki, other_pki: Pki) -> None:
    server = server_context(pki.server.cert, pki.server.key, pki.ca)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(client_context(pki.ca), server)
    stranger = client_context(pki.ca, other_pki.client.cert, other_pki.client.key)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stranger, server)


def test_a_server_may_ask_for_a_certificate_without_insisting(pki: Pki, other_pki: Pki) -> None:
    server = server_context(pki.server.cert, pki.server.key, pki.ca, "optional")
    _, listener = handshake(client_context(pki.ca), server)
    assert certificate_identity(listener.getpeercert()) is None
    _, listener = handshake(client_context(pki.ca, pki.client.cert, pki.client.key), server)
    assert certificate_identity(listener.getpeercert()) is not None
    with pytest.raises(ssl.SSLCertVerificationError):  # one that is shown has to be good
        handshake(client_context(pki.ca, other_pki.client.cert, other_pki.client.key), server)


def test_a_server_that_asks_for_nothing_takes_nobody_s_word(pki: Pki, other_pki: Pki) -> None:
    server = server_context(pki.server.cert, pki.server.key, pki.ca, "none")
    _, listener = handshake(client_context(pki.ca, other_pki.client.cert, other_pki.client.key), server)
    assert certificate_identity(listener.getpeercert()) is None


def test_a_file_s_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert file_stamp(path, None) == (None, None)
    path.write_text("a")
    first = file_stamp(path)
    assert first == file_stamp(path)
    (tmp_path / "b").write_text("b")
    (tmp_path / "b").rename(path)  # same size, and perhaps the same time: another file all the same
    assert file_stamp(path) != first


def test_a_key_in_the_certificate_s_own_file_will_do(pki: Pki) -> None:
    handshake(client_context(pki.ca, pki.client.bundle), server_context(pki.server.bundle, client_ca=pki.ca))


def damaged(pki: Pki, directory: Path) -> dict[str, Path]:
    encrypted = directory / "encrypted.key"
    encrypted.write_bytes(
        load_pem_private_key(pki.client.key.read_bytes(), None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        )
    )
    files = {
        "absent": directory / "absent.pem",
        "empty": directory / "empty.pem",
        "junk": directory / "junk.pem",
        "broken": directory / "broken.pem",
        "huge": directory / "huge.pem",
        "directory": directory,
        "encrypted": encrypted,
    }
    files["empty"].touch()
    files["junk"].write_text("junk")
    files["broken"].write_text("-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n")
    with files["huge"].open("wb") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    return files


@pytest.mark.parametrize("fault", ["absent", "empty", "junk", "broken", "huge", "directory"])
def test_a_file_that_cannot_be_used_is_named_whatever_it_is_for(fault: str, pki: Pki, tmp_path: Path) -> None:
    bad = damaged(pki, tmp_path)[fault]
    client, server = pki.client, pki.server
    attempts: list[Callable[[], ssl.SSLContext]] = [
        lambda: client_context(bad, client.cert, client.key),
        lambda: client_context(pki.ca, bad, client.key),
        lambda: client_context(pki.ca, client.cert, bad),
        lambda: server_context(bad, server.key, pki.ca),
        lambda: server_context(server.cert, bad, pki.ca),
        lambda: server_context(server.cert, server.key, bad),
    ]
    for attempt in attempts:
        with pytest.raises(TLSFileError) as caught:
            attempt()
        assert caught.value.path == bad
        assert str(caught.value) == f"{bad}: {caught.value.reason}"
        if fault in REASONS:
            assert caught.value.reason == REASONS[fault]


def test_keys_that_do_not_fit_are_told_apart(pki: Pki, other_pki: Pki, tmp_path: Path) -> None:
    encrypted = damaged(pki, tmp_path)["encrypted"]
    for key, reason in (
        (other_pki.client.key, "not the key of the first certificate"),
        (encrypted, "encrypted"),
        (pki.client.cert, "no private key"),
    ):
        with pytest.raises(TLSFileError, match=reason) as caught:
            client_context(pki.ca, pki.client.cert, key)
        assert caught.value.path == key
    with pytest.raises(TLSFileError, match="without a certificate"):
        client_context(pki.ca, None, pki.client.key)


def test_an_encrypted_key_opens_with_the_password_of_a_file_and_the_file_at_fault_is_named(
    pki: Pki, tmp_path: Path
) -> None:
    encrypted = damaged(pki, tmp_path)["encrypted"]
    right, wrong, empty = tmp_path / "right", tmp_path / "wrong", tmp_path / "none"
    right.write_text("secret\n")
    wrong.write_text("guess\n")
    empty.write_text("\n")
    _, server = mutual(pki)
    handshake(client_context(pki.ca, pki.client.cert, encrypted, key_password=right), server)
    for password, key, at_fault, what in (
        (wrong, encrypted, wrong, "not the password of"),
        (empty, encrypted, empty, "no password"),
        (tmp_path / "absent", encrypted, tmp_path / "absent", "no such file"),
        (None, encrypted, encrypted, "key_password_file"),
    ):
        with pytest.raises(TLSFileError, match=what) as caught:
            client_context(pki.ca, pki.client.cert, key, key_password=password)
        assert caught.value.path == at_fault
        assert "guess" not in str(caught.value)
