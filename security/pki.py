"""A private certificate authority's values: keys, certificates, requests, revocation lists. Values in, values out.

One authority signs everything itself (path length 0). A certificate is for one kind of holder, and can be used for
nothing else: a gateway's key, taken from its cabinet, is no hub's. RFC 5280 throughout. Knows nothing of files (see
`pki_store`), nor of who asks; the time is an argument.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAME_MAX: Final = 64  # ub-common-name, RFC 5280 appendix A
NAMES_MAX: Final = 100  # DNS names and addresses of one certificate
DAYS_MAX: Final = 50 * 365
BACKDATE_DAYS_MAX: Final = 50 * 365
RSA_BITS_MIN: Final = 2048
# A box without a battery starts with the time of its last shutdown, or of its image.
BACKDATE_DEFAULT: Final = timedelta(days=7)

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_UTC_TIME_BEGINS = datetime(1950, 1, 1, tzinfo=UTC)  # RFC 5280 §4.1.2.5.1; older dates do not exist for OpenSSL
_GENERALIZED_TIME_ENDS = datetime(9999, 12, 31, tzinfo=UTC)

Algorithm: TypeAlias = Literal["p256", "ed25519"]
PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class PkiError(ValueError):
    """What was asked for can't be issued, or a file is not what it should be; the text says what to do."""


class Kind(enum.Enum):
    """Whose certificate it is, and so what it is good for."""

    GATEWAY = "gateway"  # dials hubs; with names of its own, local apps may also dial it over TLS
    HUB = "hub"  # is dialled
    APP = "app"  # dials


REASONS: Final = {
    "unspecified": x509.ReasonFlags.unspecified,
    "key-compromise": x509.ReasonFlags.key_compromise,
    "affiliation-changed": x509.ReasonFlags.affiliation_changed,
    "superseded": x509.ReasonFlags.superseded,
    "cessation-of-operation": x509.ReasonFlags.cessation_of_operation,
}


@dataclass(frozen=True, slots=True)
class Names:
    """What a peer may dial to reach the holder."""

    dns: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.dns or self.addresses)

    def __str__(self) -> str:
        return ", ".join([*self.dns, *map(str, self.addresses)])


@dataclass(frozen=True, slots=True)
class Constraints:
    """Names an authority may sign for (RFC 5280 §4.2.1.10). Where one kind is listed, the other kind is closed."""

    dns: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.dns or self.networks)


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: PrivateKey


@dataclass(frozen=True, slots=True)
class Request:
    """A certificate signing request whose signature is good: who asks, for which names, with which key."""

    name: str
    names: Names
    public_key: PublicKey


@dataclass(frozen=True, slots=True)
class Validity:
    begins: datetime
    ends: datetime

    @classmethod
    def of(cls, now: datetime, days: int, backdate: timedelta = BACKDATE_DEFAULT) -> Validity:
        """`days` from now, begun already. Raises PkiError."""
        if not 1 <= days <= DAYS_MAX:
            raise PkiError(f"a validity of {days} days; give 1 to {DAYS_MAX}")
        if not timedelta() <= backdate <= timedelta(days=BACKDATE_DAYS_MAX):
            raise PkiError(f"dated back by {backdate.days} days; give 0 to {BACKDATE_DAYS_MAX}")
        now = now.replace(microsecond=0)
        ends = now + timedelta(days=days)
        if not _UTC_TIME_BEGINS <= now - backdate <= ends < _GENERALIZED_TIME_ENDS:
            raise PkiError(f"this machine's clock says {now:%Y-%m-%d}: set it first")
        return cls(now - backdate, ends)


@dataclass(frozen=True, slots=True)
class Revoked:
    serial: int
    when: datetime
    reason: str


# ---------------------------------------------------------------------- what a person types


def parse_name(text: str) -> str:
    """A name that can be a common name, a file's name and a part of an address. Raises PkiError."""
    if len(text) > NAME_MAX or not _NAME.fullmatch(text):
        raise PkiError(
            f"{text!r} is no name for a certificate: up to {NAME_MAX} letters, digits, '.', '_' and '-', beginning and "
            "ending with a letter or digit"
        )
    return text


def parse_names(dns: Iterable[str], addresses: Iterable[str]) -> Names:
    """Raises PkiError."""
    names = Names(
        tuple(dict.fromkeys(_parse_dns(each) for each in dns)),
        tuple(dict.fromkeys(_parse_address(each) for each in addresses)),
    )
    if len(names.dns) + len(names.addresses) > NAMES_MAX:
        raise PkiError(f"more than {NAMES_MAX} names in one certificate: issue several")
    return names


def parse_constraints(dns: Iterable[str], networks: Iterable[str]) -> Constraints:
    """Raises PkiError."""
    found: list[Network] = []
    for each in networks:
        try:
            found.append(ipaddress.ip_network(each))
        except ValueError as error:
            raise PkiError(f"{each!r} is no network like 10.20.0.0/16: {error}") from None
    return Constraints(tuple(dict.fromkeys(_parse_dns(each.removeprefix(".")) for each in dns)), tuple(found))


def _parse_dns(text: str) -> str:
    name = text.lower().removesuffix(".")
    if "*" in name:
        raise PkiError(f"{text!r}: no wildcards; give every name, so that one stolen key is one lost host")
    if _tried_address(name) is not None:
        raise PkiError(f"{text!r} is an address, not a DNS name: use --ip {text}")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise PkiError(f"{text!r} is no DNS name (an international one is written as xn--...)")
    return name


def _parse_address(text: str) -> Address:
    address = _tried_address(text)
    if address is None or getattr(address, "scope_id", None):
        raise PkiError(f"{text!r} is no IP address; a name goes with --dns")
    return address


def _tried_address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


# ---------------------------------------------------------------------- keys


def new_key(algorithm: Algorithm) -> PrivateKey:
    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """PKCS #8."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        how = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def key_from_pem(pem: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """Raises PkiError."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError as error:  # one has a password and the other needs none
        if passphrase is None:
            raise PkiError("the key is encrypted: give its passphrase with --passphrase-file") from error
        raise PkiError("the key is not encrypted: leave --passphrase-file out") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        why = "the passphrase is wrong, or the key is damaged" if passphrase else "no private key in PEM form"
        raise PkiError(why) from error
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return key
    raise PkiError("a key that is neither P-256 nor Ed25519")


def _digest(key: PrivateKey) -> hashes.SHA256 | None:
    """Ed25519 hashes by itself (RFC 8410)."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


# ---------------------------------------------------------------------- the authority


def new_authority(name: str, key: PrivateKey, validity: Validity, constraints: Constraints) -> x509.Certificate:
    """A certificate that signs certificates for holders, and none for other authorities. Raises PkiError."""
    if not 1 <= len(name) <= NAME_MAX or not name.isprintable():
        raise PkiError(f"an authority's name has 1 to {NAME_MAX} printable characters")
    subject = _common_name(name)
    builder = (
        _builder(subject, subject, key.public_key(), validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if constraints:
        builder = builder.add_extension(_name_constraints(constraints), critical=True)
    return builder.sign(key, _digest(key))


def renew_authority(old: x509.Certificate, key: PrivateKey, validity: Validity) -> x509.Certificate:
    """The same name, key and rules with a later end: what was issued before stays good under either."""
    builder = _builder(old.subject, old.subject, key.public_key(), validity)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, _digest(key))


def check_authority(authority: Authority) -> None:
    """Raises PkiError where the key is not the certificate's, or the certificate signs none."""
    if not same_key(authority.key, authority.certificate):
        raise PkiError("the authority's key and certificate do not belong together")
    try:
        basic = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise PkiError("the authority's certificate is not one of an authority") from None
    if not basic.ca:
        raise PkiError("the authority's certificate is not one of an authority")


def _name_constraints(constraints: Constraints) -> x509.NameConstraints:
    permitted: list[x509.GeneralName] = [x509.DNSName(each) for each in constraints.dns]
    permitted += [x509.IPAddress(each) for each in constraints.networks]
    # A kind of name that is not listed is not limited (RFC 5280 §4.2.1.10), which nobody means who lists the other.
    excluded: list[x509.GeneralName] = []
    if not constraints.networks:
        excluded = [x509.IPAddress(ipaddress.ip_network(each)) for each in ("0.0.0.0/0", "::/0")]
    if not constraints.dns:
        excluded = [x509.DNSName("")]  # every name
    return x509.NameConstraints(permitted or None, excluded or None)


def constraints_of(certificate: x509.Certificate) -> Constraints:
    try:
        found = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return Constraints()
    permitted = found.permitted_subtrees or []
    return Constraints(
        tuple(each.value for each in permitted if isinstance(each, x509.DNSName)),
        tuple(
            each.value
            for each in permitted
            if isinstance(each, x509.IPAddress)
            and isinstance(each.value, ipaddress.IPv4Network | ipaddress.IPv6Network)
        ),
    )


# ---------------------------------------------------------------------- what it issues


def issue(
    authority: Authority, name: str, kind: Kind, names: Names, public_key: PublicKey, validity: Validity
) -> x509.Certificate:
    """A certificate of one holder. Raises PkiError where it would be of no use, or of too much."""
    check_wanted(kind, names)
    _check_constraints(constraints_of(authority.certificate), names)
    _check_public_key(public_key)
    ends = authority.certificate.not_valid_after_utc
    if validity.ends > ends:
        raise PkiError(
            f"the authority itself ends on {ends:%Y-%m-%d}, before the certificate would on {validity.ends:%Y-%m-%d}: "
            "give fewer --days, or renew the authority with `lineside pki renew DIR --ca`"
        )
    builder = (
        _builder(_common_name(name), authority.certificate.subject, public_key, validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_purposes(kind, names)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    if names:
        builder = builder.add_extension(_alternative_names(names), critical=False)
    return builder.sign(authority.key, _digest(authority.key))


def check_wanted(kind: Kind, names: Names) -> None:
    """Raises PkiError where a kind and its names do not go together."""
    if kind is Kind.HUB and not names:
        raise PkiError("a hub is dialled by name: give every --dns and --ip that stands in a gateway's urls")
    if kind is Kind.APP and names:
        raise PkiError(f"an app is not dialled, so leave {names} out; who listens is a hub, or a gateway")


def _purposes(kind: Kind, names: Names) -> list[x509.ObjectIdentifier]:
    """RFC 5280 §4.2.1.12."""
    if kind is Kind.HUB:
        return [ExtendedKeyUsageOID.SERVER_AUTH]
    if kind is Kind.GATEWAY and names:
        return [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return [ExtendedKeyUsageOID.CLIENT_AUTH]


def _check_constraints(constraints: Constraints, names: Names) -> None:
    """Every peer would refuse such a certificate; the person who asks for it should hear that first."""
    if not constraints:
        return
    allowed = ", ".join([*constraints.dns, *map(str, constraints.networks)])
    for name in names.dns:
        if not any(name == each or name.endswith(f".{each}") for each in constraints.dns):
            raise PkiError(f"{name} is outside what this authority may sign for ({allowed})")
    for address in names.addresses:
        if not any(address in network for network in constraints.networks):
            raise PkiError(f"{address} is outside what this authority may sign for ({allowed})")


def _check_public_key(key: PublicKey) -> None:
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise PkiError(f"an RSA key of {key.key_size} bits is too weak: {RSA_BITS_MIN} at least, or better P-256")
    if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1
    ):
        raise PkiError(f"a key on the curve {key.curve.name}: use P-256")


def names_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Names:
    """DNS names and addresses; anything else is not ours and left out."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Names()
    return parse_names(
        found.get_values_for_type(x509.DNSName), [str(each) for each in found.get_values_for_type(x509.IPAddress)]
    )


def common_name(subject: x509.Name) -> str:
    """The one common name, or nothing."""
    found = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def public_key_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> PublicKey:
    """Raises PkiError."""
    try:
        key = certificate.public_key()
    except (UnsupportedAlgorithm, ValueError) as error:
        raise PkiError(f"a kind of key that is not supported: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        raise PkiError("a key that is neither P-256 nor Ed25519 nor RSA")
    _check_public_key(key)
    return key


def certificate_to_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_from_pem(pem: bytes) -> x509.Certificate:
    """The first of the file. Raises PkiError."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise PkiError("no certificate in PEM form") from error


# ---------------------------------------------------------------------- requests


def request(key: PrivateKey, name: str, names: Names) -> bytes:
    """A certificate signing request (RFC 2986), PEM."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_common_name(name))
    if names:
        builder = builder.add_extension(_alternative_names(names), critical=False)
    return builder.sign(key, _digest(key)).public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> Request:
    """Raises PkiError where it is none, or was not signed with the key it is for."""
    try:
        found = x509.load_pem_x509_csr(pem)
        good = found.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise PkiError("no certificate signing request in PEM form") from error
    if not good:
        raise PkiError("the request's signature is wrong: it was changed, or whoever made it has not the key")
    try:
        names = names_of(found)
    except ValueError as error:
        raise PkiError(f"the request's names can't be read: {error}") from None
    return Request(parse_name(common_name(found.subject)), names, public_key_of(found))


# ---------------------------------------------------------------------- revocation


def revocation_list(
    authority: Authority, revoked: Sequence[Revoked], number: int, validity: Validity
) -> x509.CertificateRevocationList:
    """RFC 5280 §5. It begins in the past like a certificate: a peer whose clock is late must not refuse everybody."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(validity.begins)
        .next_update(validity.ends)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    for each in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(each.serial).revocation_date(each.when)
        if each.reason != "unspecified":  # RFC 5280 §5.3.1: absent rather than unspecified
            entry = entry.add_extension(x509.CRLReason(REASONS[each.reason]), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority.key, _digest(authority.key))


def ocsp_response(
    authority: Authority, certificate: x509.Certificate, revoked: Revoked | None, validity: Validity
) -> bytes:
    """What its holder may staple (RFC 6960 §4.2), DER, signed by the authority itself. It begins in the past, too."""
    # RFC 5280 §5.3.1: absent rather than unspecified
    reason = REASONS[revoked.reason] if revoked is not None and revoked.reason != "unspecified" else None
    return (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=certificate,
            issuer=authority.certificate,
            algorithm=hashes.SHA1(),  # a name, and proof of nothing: the one that every peer knows (RFC 5019 §2.1.1)
            cert_status=ocsp.OCSPCertStatus.GOOD if revoked is None else ocsp.OCSPCertStatus.REVOKED,
            this_update=validity.begins,
            next_update=validity.ends,
            revocation_time=None if revoked is None else revoked.when,
            revocation_reason=reason,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, authority.certificate)
        .sign(authority.key, _digest(authority.key))
        .public_bytes(serialization.Encoding.DER)
    )


def revocation_list_to_pem(crl: x509.CertificateRevocationList) -> bytes:
    return crl.public_bytes(serialization.Encoding.PEM)


def revocation_list_from_pem(pem: bytes) -> x509.CertificateRevocationList:
    """Raises PkiError."""
    try:
        return x509.load_pem_x509_crl(pem)
    except ValueError as error:
        raise PkiError("no revocation list in PEM form") from error


# ---------------------------------------------------------------------- PKCS #12, for Java


def keystore(
    name: str, key: PrivateKey, certificate: x509.Certificate, authority: x509.Certificate, password: bytes
) -> bytes:
    """Key and chain under the alias `name` (RFC 7292)."""
    how = serialization.BestAvailableEncryption(password)
    return pkcs12.serialize_key_and_certificates(name.encode(), key, certificate, [authority], how)


def truststore(authority: x509.Certificate, password: bytes) -> bytes:
    """The authority alone, marked as trusted in Java's own way, without which Java sees an empty store."""
    entry = pkcs12.PKCS12Certificate(authority, b"lineside-ca")
    return pkcs12.serialize_java_truststore([entry], serialization.BestAvailableEncryption(password))


# ---------------------------------------------------------------------- parts


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative_names(names: Names) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([*map(x509.DNSName, names.dns), *map(x509.IPAddress, names.addresses)])


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey, validity: Validity) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits
        .not_valid_before(validity.begins)
        .not_valid_after(validity.ends)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    """RFC 5280 §4.2.1.3. Every cipher suite of TLS 1.3, and each of 1.2 worth having, wants signatures alone."""
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _spki(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def same_key(key: PrivateKey, certificate: x509.Certificate) -> bool:
    return _spki(key.public_key()) == _spki(public_key_of(certificate))
