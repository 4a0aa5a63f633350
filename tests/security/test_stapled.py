"""A hub that staples, before every setting of `ocsp`: who is let in, who is refused and in which words.

The servers are real ones on loopback, pyOpenSSL's and `openssl s_server`; the responses are real ones, too.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from OpenSSL.crypto import X509

from security.ocsp import AGE_MAX, RESPONSE_BYTES_MAX, StapleError, judge
from security.stapled import StapledContext
from security.tls import TLSFileError, client_context, server_context
from tests.daemon import free_port
from tests.pki import DAY, Pki
from tests.security.test_tls import handshake
from tests.stapling import HOUR, LyingServer, Signer, StaplingServer, answer, authority, read

WAIT_S = 40.0
HOSTNAME_MISMATCH, ADDRESS_MISMATCH = 62, 64  # X509_V_ERR_ of OpenSSL
SETTINGS = ("off", "if-stapled", "require")
MINUTE = datetime.timedelta(minutes=1)
OCSP_SIGNING = ExtendedKeyUsageOID.OCSP_SIGNING
MUST_STAPLE = x509.TLSFeature([x509.TLSFeatureType.status_request])


class World:
    """Two authorities of the same name, the hub's certificate, and responders of every kind."""

    def __init__(self, directory: Path) -> None:
        self.pki = Pki(directory / "one")
        self.other = Pki(directory / "other")
        self.hub = self.pki.server
        self.leaf, self.leaf_key = read(self.hub)
        self.issuer = self.pki.authority
        self.sibling = read(self.pki.issue("sibling", server=True))[0]
        self.responder = read(self.pki.issue("responder", purposes=[OCSP_SIGNING]))
        self.plain = read(self.pki.issue("plain"))
        self.stranger = read(self.other.issue("stranger", purposes=[OCSP_SIGNING]))
        self.namesake = read(self.other.issue("responder", purposes=[OCSP_SIGNING]))
        self.retired = read(self.pki.issue("retired", purposes=[OCSP_SIGNING], begins=-9 * DAY, ends=-DAY))
        how = {"status": ocsp.OCSPCertStatus.REVOKED, "embedded": [self.responder[0]], "by_name": True}
        self.revoked = self.says(self.responder, **how)
        self.crl = directory / "crl.pem"
        self._revoke(self.responder[0])

    def _revoke(self, certificate: x509.Certificate) -> None:
        now = datetime.datetime.now(datetime.UTC)
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.issuer.subject)
            .last_update(now - DAY)
            .next_update(now + DAY)
            .add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(certificate.serial_number)
                .revocation_date(now - HOUR)
                .build()
            )
            .sign(self.pki.authority_key, hashes.SHA256())
        )
        self.crl.write_bytes(crl.public_bytes(serialization.Encoding.PEM))

    def says(self, signer: Signer | None = None, **how: object) -> bytes:
        return answer(self.leaf, self.issuer, signer or authority(self.pki), **how)  # type: ignore[arg-type]

    def context(self, setting: str, **more: object) -> ssl.SSLContext:
        """What the hub link makes of the setting."""
        files = self.pki.ca, self.pki.client.cert, self.pki.client.key
        if setting == "off":
            return client_context(*files)
        wall = more.pop("wall", time.time)
        return StapledContext(setting == "require", wall, *files, **more)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def dial(context: ssl.SSLContext, port: int, payload: bytes = b"hello") -> bytes:
    """What comes back over a connection as asyncio makes it; raises what the handshake raises."""

    async def talk() -> bytes:
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            writer.write(payload)
            back = await reader.readexactly(len(payload))
            writer.close()
            await writer.wait_closed()
            return back

    return asyncio.run(talk())


def changed(response: bytes) -> bytes:
    """The last bit of a response without certificates is the signature's."""
    return response[:-1] + bytes([response[-1] ^ 1])


GOOD: dict[str, Callable[[World], bytes]] = {
    "good, by the issuer": lambda w: w.says(),
    "good, the issuer named": lambda w: w.says(by_name=True),
    "good, the certificate named by SHA-256": lambda w: w.says(id_digest=hashes.SHA256()),
    "good, by a responder of the issuer": lambda w: w.says(w.responder, embedded=[w.responder[0]]),
    "good, by a responder among other certificates": lambda w: w.says(
        w.responder, embedded=[w.plain[0], w.stranger[0], w.responder[0]], by_name=True
    ),
    "good, without an end, of an hour ago": lambda w: w.says(ends=None),
    "good, by a clock that is a little ahead": lambda w: w.says(begins=4 * MINUTE),
    "good, by a clock that is a little late": lambda w: w.says(ends=-4 * MINUTE),
}
BAD: dict[str, tuple[Callable[[World], bytes], str]] = {
    "revoked": (lambda w: w.says(status=ocsp.OCSPCertStatus.REVOKED), "it is revoked since 20.*Z \\(keyCompromise\\)"),
    "revoked, in an old response": (
        lambda w: w.says(status=ocsp.OCSPCertStatus.REVOKED, begins=-9 * HOUR, ends=-8 * HOUR),
        "it is revoked",
    ),
    "unknown": (lambda w: w.says(status=ocsp.OCSPCertStatus.UNKNOWN), "does not know it \\(status unknown\\)"),
    "expired": (lambda w: w.says(begins=-9 * HOUR, ends=-HOUR), "ended at 20.*Z; the clock says 20.*Z"),
    "not yet valid": (lambda w: w.says(begins=HOUR, ends=2 * HOUR), "not valid before 20.*Z; the clock says 20.*Z"),
    "without an end, of two days ago": (lambda w: w.says(begins=-(AGE_MAX + HOUR), ends=None), "too old"),
    "by another authority": (lambda w: w.says(authority(w.other)), "signed by neither the issuer nor a responder"),
    "by the wrong key, in the issuer's name": (
        lambda w: w.says(authority(w.other), by_name=True),
        "not signed by the certificate's issuer, as it says",
    ),
    "about another serial number": (
        lambda w: answer(w.sibling, w.issuer, authority(w.pki)),
        "about another certificate",
    ),
    "about the same serial number of another authority": (
        lambda w: answer(w.leaf, w.other.authority, authority(w.pki)),
        "about another certificate",
    ),
    "by a responder without the extended key usage": (
        lambda w: w.says(w.plain, embedded=[w.plain[0]]),
        "no id-kp-OCSPSigning",
    ),
    "by the hub itself": (
        lambda w: w.says((w.leaf, w.leaf_key), embedded=[w.leaf]),
        "no id-kp-OCSPSigning",
    ),
    "by a responder of another authority": (
        lambda w: w.says(w.stranger, embedded=[w.stranger[0]]),
        "is not issued by the issuer",
    ),
    "by a responder whose certificate ended": (
        lambda w: w.says(w.retired, embedded=[w.retired[0]]),
        "responder \\(CN=retired\\) is valid from",
    ),
    "by a responder that it does not show": (
        lambda w: w.says(w.responder),
        "signed by neither the issuer nor a responder",
    ),
    "by another key than the responder's": (
        lambda w: w.says(w.namesake, embedded=[w.responder[0]], by_name=True),
        "not signed by the responder that it names",
    ),
    # ecdsa-with-SHA256 made ecdsa-with-SHA224: what is weaker is not even looked at
    "signed with a weak digest": (
        lambda w: w.says().replace(bytes.fromhex("2a8648ce3d040302"), bytes.fromhex("2a8648ce3d040301")),
        "signed with sha224",
    ),
    "with a critical extension that nobody knows": (
        lambda w: w.says(extension=x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")),
        "critical extension 1.2.3.4",
    ),
    "cut short": (lambda w: w.says()[:-1], "cannot be read"),
    "changed in one bit": (lambda w: changed(w.says()), "not signed by the certificate's issuer"),
    "garbage": (lambda w: b"garbage", "cannot be read"),
    "an error of the responder's": (
        lambda w: ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER).public_bytes(
            serialization.Encoding.DER
        ),
        "an error of the responder's: try later",
    ),
}


@pytest.mark.parametrize("version", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION], ids=["tls1.2", "tls1.3"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", GOOD)
def test_a_hub_that_staples_that_it_is_good_is_let_in(world: World, case: str, setting: str, version: int) -> None:
    with StaplingServer(world.hub, world.pki, GOOD[case](world), version=version) as server:
        assert dial(world.context(setting), server.port) == b"hello"


@pytest.mark.parametrize("version", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION], ids=["tls1.2", "tls1.3"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", BAD)
def test_a_hub_that_staples_anything_else_is_refused_before_a_byte_is_sent(
    world: World, case: str, setting: str, version: int
) -> None:
    make, words = BAD[case]
    with LyingServer(world.hub, world.pki, make(world), version=version) as server:
        if setting == "off":
            assert dial(world.context(setting), server.port) == b"hello"
            return
        with pytest.raises(ssl.SSLCertVerificationError) as raised:
            dial(world.context(setting), server.port)
    assert [raised.match(words), raised.value.verify_message in str(raised.value)] == [True, True]
    assert server.heard == b""


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_hub_that_staples_nothing_is_refused_where_that_is_required(world: World, setting: str) -> None:
    with StaplingServer(world.hub, world.pki) as server:
        if setting != "require":
            assert dial(world.context(setting), server.port) == b"hello"
            return
        with pytest.raises(ssl.SSLCertVerificationError, match=r'no OCSP response is stapled.*ocsp = "require"'):
            dial(world.context(setting), server.port)
    assert server.heard == b""


def test_a_certificate_may_itself_require_its_holder_to_staple(tmp_path: Path) -> None:
    world = World(tmp_path)
    hub = world.pki.issue("localhost", server=True, more=[MUST_STAPLE])
    leaf, _ = read(hub)
    with StaplingServer(hub, world.pki) as server:
        assert dial(world.context("off"), server.port) == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError, match="which it says its holder does"):
            dial(world.context("if-stapled"), server.port)
        server.staple = answer(leaf, world.issuer, authority(world.pki))
        assert dial(world.context("if-stapled"), server.port) == b"hello"


def test_a_responder_in_the_revocation_list_is_none(world: World) -> None:
    staple = world.says(world.responder, embedded=[world.responder[0]])
    with StaplingServer(world.hub, world.pki, staple) as server:
        assert dial(world.context("require"), server.port) == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError, match="responder \\(CN=responder\\) is revoked in `crl`"):
            dial(world.context("require", crl=world.crl), server.port)
        server.staple = world.says()
        assert dial(world.context("require", crl=world.crl), server.port) == b"hello"


# ---------------------------------------------------------------------- judged without a connection


def test_the_clock_that_judges_is_the_one_that_is_given(world: World) -> None:
    def refused(now_s: float) -> str:
        with pytest.raises(StapleError) as raised:
            judge(world.says(), world.leaf, world.issuer, now_s)
        return str(raised.value)

    now_s = time.time()
    judge(world.says(), world.leaf, world.issuer, now_s)
    for wrong_s in (0.0, -1e18, now_s - 86400):
        assert "not valid before" in refused(wrong_s)
    for wrong_s in (1e18, now_s + 2 * 86400):
        assert "ended at" in refused(wrong_s)
    assert "1970-01-01T00:00:00Z" in refused(0.0)


def test_a_revoked_certificate_is_refused_whatever_the_clock_says(world: World) -> None:
    staple = world.says(status=ocsp.OCSPCertStatus.REVOKED)
    for now_s in (0.0, time.time(), 1e12):
        with pytest.raises(StapleError, match="it is revoked since"):
            judge(staple, world.leaf, world.issuer, now_s)


def test_without_its_issuer_or_with_too_many_bytes_nothing_is_proved(world: World) -> None:
    with pytest.raises(StapleError, match=r"not among the trusted ones \(`ca`\)"):
        judge(world.says(), world.leaf, None, time.time())
    with pytest.raises(StapleError, match="larger than"):
        judge(world.says() + bytes(RESPONSE_BYTES_MAX), world.leaf, world.issuer, time.time())


def self_signed(key: CertificateIssuerPrivateKeyTypes) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - DAY, now + DAY)
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())


@pytest.mark.parametrize("kind", ["rsa", "short rsa", "p384", "ed25519"])
def test_every_kind_of_key_that_an_authority_has_may_sign_but_a_short_one(world: World, kind: str) -> None:
    digest: hashes.HashAlgorithm | None = None if kind == "ed25519" else hashes.SHA384()
    key: CertificateIssuerPrivateKeyTypes = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "short rsa": lambda: rsa.generate_private_key(65537, 1024),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }[kind]()
    issuer = self_signed(key)
    staple = answer(world.leaf, issuer, (issuer, key), digest=digest)
    if kind == "short rsa":
        with pytest.raises(StapleError, match="not signed"):
            judge(staple, world.leaf, issuer, time.time())
    else:
        judge(staple, world.leaf, issuer, time.time())
        with pytest.raises(StapleError, match="not signed"):
            judge(changed(staple), world.leaf, issuer, time.time())


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_no_bytes_bring_anything_but_a_refusal_and_none_make_a_revoked_certificate_good(
    world: World, data: st.DataObject
) -> None:
    staple = bytearray(world.revoked)
    for _ in range(data.draw(st.integers(1, 4))):
        staple[data.draw(st.integers(0, len(staple) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(staple)))
    for each in (bytes(staple), bytes(staple[:cut]), bytes(staple[cut:])):
        with pytest.raises(StapleError):
            judge(each, world.leaf, world.issuer, time.time())


# ---------------------------------------------------------------------- as Python's own TLS otherwise


def test_the_same_peers_and_names_are_trusted_as_without_ocsp(world: World, tmp_path: Path) -> None:
    many = Pki(tmp_path / "many")
    names = ["localhost", "127.0.0.1", "127.0.0.2", "hub.example", "a.hub.example", "a.b.hub.example", "ahub.example"]
    names += ["xn--bcher-kva.example", "bücher.example", "LOCALHOST"]
    servers = [many.issue("localhost", server=True), many.issue("*.hub.example", server=True)]
    servers += [many.issue("xn--bcher-kva.example", server=True), many.issue("a*.hub.example", server=True)]
    servers += [many.issue("late", server=True, ends=-HOUR), many.issue("client-only")]
    servers += [world.other.issue("localhost", server=True)]
    verdicts = set()
    for server in servers:
        listener = server_context(server.cert, server.key)
        for name in names:
            told, codes = [], []
            for context in (client_context(many.ca), StapledContext(False, time.time, many.ca)):
                try:
                    handshake(context, listener, name)  # type: ignore[arg-type]
                except ssl.SSLCertVerificationError as error:
                    told.append(error.verify_message.lower().partition(",")[0])
                    codes.append(HOSTNAME_MISMATCH if error.verify_code == ADDRESS_MISMATCH else error.verify_code)
                else:
                    told.append("good")
            assert told[0].replace("ip address", "hostname") == told[1].replace("ip address", "hostname"), (
                server,
                name,
            )
            assert len(set(codes)) <= 1, (server, name)
            verdicts.add(told[0])
    assert len(verdicts) >= 5, verdicts


def test_versions_and_ciphers_are_those_of_python_s_own_tls(world: World) -> None:
    listener = server_context(world.hub.cert, world.hub.key)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        listener.maximum_version = version
        dialler, _ = handshake(world.context("if-stapled"), listener)
        assert dialler.version() == version.name.replace("v1_", "v1.")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        listener.minimum_version = listener.maximum_version = ssl.TLSVersion.TLSv1_1
    listener.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(world.context("if-stapled"), listener)
    listener = server_context(world.hub.cert, world.hub.key)
    listener.maximum_version = ssl.TLSVersion.TLSv1_2
    listener.set_ciphers("ECDHE-ECDSA-AES128-SHA")  # SHA-1, which Python leaves out
    with pytest.raises(ssl.SSLError, match=r"(?i)no.shared.cipher|handshake.failure"):
        handshake(world.context("if-stapled"), listener)


def test_a_revoked_hub_is_refused_by_the_list_as_without_ocsp(tmp_path: Path) -> None:
    world = World(tmp_path)
    world._revoke(world.leaf)
    with StaplingServer(world.hub, world.pki, world.says()) as server:
        for context in (
            client_context(world.pki.ca, world.pki.client.cert, world.pki.client.key, world.crl),
            world.context("if-stapled", crl=world.crl),
        ):
            with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
                dial(context, server.port)


def test_a_hub_that_is_trusted_by_its_own_certificate_alone_can_staple_nothing_that_proves_it(
    world: World, tmp_path: Path
) -> None:
    pinned = StapledContext(False, time.time, world.hub.cert)
    with StaplingServer(world.hub, world.pki) as server:
        assert dial(pinned, server.port) == b"hello"  # type: ignore[arg-type]
        server.staple = world.says()
        with pytest.raises(ssl.SSLCertVerificationError, match="not among the trusted ones"):
            dial(pinned, server.port)  # type: ignore[arg-type]
        both = tmp_path / "both.pem"
        both.write_bytes(world.hub.cert.read_bytes() + world.pki.ca.read_bytes())
        assert dial(StapledContext(True, time.time, both), server.port) == b"hello"  # type: ignore[arg-type]


def test_without_ca_it_is_the_system_s_authorities_that_are_trusted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    with StaplingServer(world.hub, world.pki, world.says()) as server:
        for name, trusted in ((str(world.other.ca), False), (str(world.pki.ca), True)):
            monkeypatch.setenv("SSL_CERT_FILE", name)
            system = StapledContext(True, time.time)
            if trusted:
                assert dial(system, server.port) == b"hello"  # type: ignore[arg-type]
            else:
                with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|self.signed"):
                    dial(system, server.port)  # type: ignore[arg-type]


def test_a_certificate_that_cannot_be_read_is_refused_like_one_that_is_not_trusted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(certificate: X509) -> None:
        raise ValueError("invalid version")

    monkeypatch.setattr(X509, "to_cryptography", strict)
    told = pytest.raises(ssl.SSLCertVerificationError, match="cannot be read: invalid version")
    with StaplingServer(world.hub, world.pki, world.says()) as server, told:
        dial(world.context("require"), server.port)


@pytest.mark.parametrize("size", [0, 1, 16384, 5_000_001])
def test_whatever_is_written_arrives_and_the_end_is_told(world: World, size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with StaplingServer(world.hub, world.pki, world.says()) as server:
        assert dial(world.context("require"), server.port, payload) == payload


def test_files_that_cannot_be_used_are_named(world: World, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for wrong in ({"ca": absent}, {"cert": absent, "key": world.pki.client.key}, {"ca": world.pki.ca, "crl": absent}):
        with pytest.raises(TLSFileError, match="absent: no such file"):
            StapledContext(True, time.time, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TLSFileError, match="not the key of the first certificate"):
        StapledContext(True, time.time, world.pki.ca, world.pki.client.cert, world.hub.key)


def test_an_encrypted_key_opens_with_its_password(world: World, tmp_path: Path) -> None:
    key, password = tmp_path / "key", tmp_path / "password"
    encryption = serialization.BestAvailableEncryption(b"secret")
    _, private = read(world.pki.client)
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    password.write_text("secret\n")
    context = StapledContext(True, time.time, world.pki.ca, world.pki.client.cert, key, key_password=password)
    listener = server_context(world.hub.cert, world.hub.key, world.pki.ca)
    context.require = False
    _, known = handshake(context, listener)  # type: ignore[arg-type]
    assert known.getpeercert()["subject"] == ((("commonName", "loco-4711"),),)


# ---------------------------------------------------------------------- other people's TLS, and the service's limits


@pytest.fixture
def s_server(world: World, tmp_path: Path) -> Iterator[Callable[[bytes, str], int]]:
    """Starts OpenSSL's own server with a staple; gives its port."""
    running: list[subprocess.Popen[bytes]] = []

    def start(staple: bytes, version: str) -> int:
        file, port = tmp_path / "staple.der", free_port()
        file.write_bytes(staple)
        words = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", world.hub.cert, "-key", world.hub.key]
        words += ["-status_file", file, "-rev", version]
        running.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
        assert running[-1].stdout is not None
        while b"ACCEPT" not in (line := running[-1].stdout.readline()):
            assert line, "openssl s_server ended"
        return port

    yield start
    for each in running:
        each.kill()
        each.wait()
        assert each.stdout is not None
        each.stdout.close()


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_s_own_server_is_let_in_and_refused_by_what_it_staples(
    world: World, s_server: Callable[[bytes, str], int], version: str
) -> None:
    good = s_server(world.says(world.responder, embedded=[world.responder[0]]), version)
    assert dial(world.context("require"), good, b"hello\n") == b"olleh\n"  # -rev answers in reverse
    revoked = s_server(world.says(status=ocsp.OCSPCertStatus.REVOKED), version)
    for setting in ("if-stapled", "require"):
        with pytest.raises(ssl.SSLCertVerificationError, match="it is revoked"):
            dial(world.context(setting), revoked, b"hello\n")
    assert dial(world.context("off"), revoked, b"hello\n") == b"olleh\n"


UNDER_MDWE = """
import ctypes, mmap, sys, time
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
assert ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    pass
else:
    raise AssertionError("memory may be written and executed")
from security.stapled import StapledContext
from tests.security.test_stapled import dial
ca, cert, key, port = sys.argv[1:]
print(dial(StapledContext(True, time.time, ca, cert, key), int(port)).decode())
"""


def test_it_works_where_the_service_may_not_execute_what_it_has_written(world: World) -> None:
    """As systemd's MemoryDenyWriteExecute has it, under which a callback of pyOpenSSL's could not be made."""
    release = tuple(int(each) for each in os.uname().release.split(".")[:2])
    if release < (6, 3):
        pytest.skip("needs PR_SET_MDWE, of Linux 6.3")
    with StaplingServer(world.hub, world.pki, world.says()) as server:
        words = [world.pki.ca, world.pki.client.cert, world.pki.client.key, server.port]
        done = subprocess.run(
            [sys.executable, "-c", UNDER_MDWE, *map(str, words)], capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
