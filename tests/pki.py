"""A small certificate authority for tests. Knows nothing of the product's own `lineside pki`."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PASSWORD = "lineside-tests"
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of one issued certificate: PEM, PEM key (PKCS #8), both in one PEM, and both in PKCS #12."""

    name: str
    cert: Path
    key: Path
    bundle: Path
    p12: Path


class Pki:
    """One authority in one directory; `server` is for localhost and 127.0.0.1, `client` for the gateway."""

    def __init__(self, directory: Path, name: str = "Lineside test CA", begins: datetime.timedelta = -DAY) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.authority_key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = _usage(sign_certificates=True)
        self.authority = (
            _builder(self._subject, self._subject, self.authority_key.public_key(), begins, 365 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.authority_key.public_key()), critical=False)
            .sign(self.authority_key, hashes.SHA256())
        )
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(self.authority.public_bytes(serialization.Encoding.PEM))
        self.server = self.issue("localhost", server=True)
        self.client = self.issue("loco-4711")

    def issue(
        self,
        name: str,
        *,
        server: bool = False,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 60 * DAY,
        purposes: Sequence[x509.ObjectIdentifier] | None = None,
        more: Sequence[x509.ExtensionType] = (),
    ) -> Certificate:
        """Issue for common name `name`, valid between now+begins and now+ends.

        `purposes`: extended key usages other than a server's or a client's; `more`: extensions beside the usual.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        names: list[x509.GeneralName] = [x509.DNSName(name)]
        if server:
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = (
            _builder(subject, self._subject, key.public_key(), begins, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes or [purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority_key.public_key()), critical=False
            )
        )
        for extension in more:
            builder = builder.add_extension(extension, critical=False)
        certificate = builder.sign(self.authority_key, hashes.SHA256())
        cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        stem = self.directory / name
        issued = Certificate(
            name=name,
            cert=stem.with_suffix(".pem"),
            key=stem.with_suffix(".key"),
            bundle=stem.with_suffix(".bundle.pem"),
            p12=stem.with_suffix(".p12"),
        )
        issued.cert.write_bytes(cert_pem)
        issued.key.write_bytes(key_pem)
        issued.key.chmod(0o600)
        issued.bundle.write_bytes(key_pem + cert_pem)
        issued.p12.write_bytes(
            pkcs12.serialize_key_and_certificates(
                name.encode(),
                key,
                certificate,
                [self.authority],
                serialization.BestAvailableEncryption(PASSWORD.encode()),
            )
        )
        return issued


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    begins: datetime.timedelta,
    ends: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
