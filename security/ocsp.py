"""Judges the OCSP response that a peer has stapled to its certificate (RFC 6960, RFC 6066 §8). Values in, values out.

Only a response that says "good", of this very certificate, in its time, signed by who may, is good: everything else
that is stapled is refused, under any setting. Knows nothing of TLS, of files, or of what a missing response means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

# Clocks differ a little; OpenSSL's own tool allows as much.
SKEW: Final = timedelta(minutes=5)
# RFC 6960 §4.2.2.1: without nextUpdate newer information is available all the time. So such a response is soon old.
AGE_MAX: Final = timedelta(days=1)
# A response with a responder's certificate is 2 KB; what OpenSSL lets through could be a hundred.
RESPONSE_BYTES_MAX: Final = 64 << 10
RSA_BITS_MIN: Final = 2048
_DIGESTS: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
# What the library raises for bytes that are no response or certificate, or one that it does not understand.
UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)


class StapleError(ValueError):
    """The stapled response does not say that the certificate is good. The text goes on after "the certificate: "."""


def judge(
    response: bytes,
    leaf: x509.Certificate,
    issuer: x509.Certificate | None,
    now_s: float,
    lists: Sequence[x509.CertificateRevocationList] = (),
) -> None:
    """Return if a stapled response, DER, proves that `leaf` is good at `now_s`, seconds since 1970. Raises StapleError.

    `issuer`: who issued `leaf`, of the chain that was verified; None if that chain ends before it. `lists`:
    revocation lists, of which those by `issuer` decide about a responder's own certificate.
    """
    if issuer is None:
        raise StapleError("its issuer is not among the trusted ones (`ca`), so that nobody can vouch for it by OCSP")
    if len(response) > RESPONSE_BYTES_MAX:
        raise StapleError(f"the stapled OCSP response is larger than {RESPONSE_BYTES_MAX} bytes")
    now = _time(now_s)
    try:
        _judge(response, leaf, issuer, now, lists)
    except UNREADABLE as error:
        if isinstance(error, StapleError):
            raise
        raise StapleError(f"the stapled OCSP response cannot be read: {error}") from error


def must_staple(leaf: x509.Certificate) -> bool:
    """Whether the certificate itself says that its holder staples (RFC 7633). Raises StapleError."""
    try:
        feature = leaf.extensions.get_extension_for_class(x509.TLSFeature).value
    except x509.ExtensionNotFound:
        return False
    except UNREADABLE as error:
        raise StapleError(f"it cannot be read: {error}") from error
    return x509.TLSFeatureType.status_request in feature


def _judge(
    der: bytes,
    leaf: x509.Certificate,
    issuer: x509.Certificate,
    now: datetime,
    lists: Sequence[x509.CertificateRevocationList],
) -> None:
    response = ocsp.load_der_ocsp_response(der)
    if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        name = response.response_status.name.replace("_", " ").lower()
        raise StapleError(f"the stapled OCSP response is an error of the responder's: {name}")
    single = _about(response.responses, leaf, issuer)
    _check_signature(response, issuer, now, lists)
    _check_understood(response.extensions)
    # What is revoked stays so (RFC 5280 §5.3.1, all but certificateHold), whatever the response's age and the clock.
    if single.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        reason = f" ({single.revocation_reason.value})" if single.revocation_reason is not None else ""
        when = "" if single.revocation_time_utc is None else f" since {_iso(single.revocation_time_utc)}"
        raise StapleError(f"it is revoked{when}{reason}, says the stapled OCSP response")
    begins, ends = single.this_update_utc, single.next_update_utc
    if begins - now > SKEW:
        raise StapleError(f"the stapled OCSP response is not valid before {_iso(begins)}; the clock says {_iso(now)}")
    if ends is None:
        if now - begins > AGE_MAX + SKEW:
            raise StapleError(f"the stapled OCSP response is of {_iso(begins)}, too old; the clock says {_iso(now)}")
    elif now - ends > SKEW:
        raise StapleError(f"the stapled OCSP response ended at {_iso(ends)}; the clock says {_iso(now)}")
    if single.certificate_status is not ocsp.OCSPCertStatus.GOOD:
        raise StapleError("the responder of the stapled OCSP response does not know it (status unknown)")


def _about(
    singles: Iterable[ocsp.OCSPSingleResponse], leaf: x509.Certificate, issuer: x509.Certificate
) -> ocsp.OCSPSingleResponse:
    """The part of a response that is about this certificate (RFC 6960 §3.2, first point)."""
    for single in singles:
        # RFC 6960 §4.1.1. SHA-1 names a certificate here, and proves nothing.
        request = ocsp.OCSPRequestBuilder().add_certificate(leaf, issuer, single.hash_algorithm).build()
        if (single.serial_number, single.issuer_name_hash, single.issuer_key_hash) == (
            request.serial_number,
            request.issuer_name_hash,
            request.issuer_key_hash,
        ):
            return single
    raise StapleError("the stapled OCSP response is about another certificate")


def _check_signature(
    response: ocsp.OCSPResponse,
    issuer: x509.Certificate,
    now: datetime,
    lists: Sequence[x509.CertificateRevocationList],
) -> None:
    """RFC 6960 §4.2.2.2: signed by who issued the certificate, or by a responder whom the same issuer made one."""
    digest = response.signature_hash_algorithm  # None with Ed25519 and Ed448, which have no other
    if digest is not None and not isinstance(digest, _DIGESTS):
        raise StapleError(f"the stapled OCSP response is signed with {digest.name}, which proves nothing any more")
    if _is_responder(response, issuer):
        if not _signed_by(response, issuer):
            raise StapleError("the stapled OCSP response is not signed by the certificate's issuer, as it says")
        return
    responder = next((each for each in response.certificates if _is_responder(response, each)), None)
    if responder is None:
        raise StapleError("the stapled OCSP response is signed by neither the issuer nor a responder of the issuer's")
    _check_responder(responder, issuer, now, lists)
    if not _signed_by(response, responder):
        raise StapleError("the stapled OCSP response is not signed by the responder that it names")


def _check_responder(
    responder: x509.Certificate,
    issuer: x509.Certificate,
    now: datetime,
    lists: Sequence[x509.CertificateRevocationList],
) -> None:
    whose = f"the certificate of the stapled OCSP response's responder ({responder.subject.rfc4514_string()})"
    try:
        responder.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise StapleError(f"{whose} is not issued by the issuer of the hub's") from None
    _check_understood(responder.extensions)
    if ExtendedKeyUsageOID.OCSP_SIGNING not in _usages(responder):
        raise StapleError(f"{whose} is not one for signing OCSP responses (no id-kp-OCSPSigning)")
    begins, ends = responder.not_valid_before_utc, responder.not_valid_after_utc
    if max(begins - now, now - ends) > SKEW:
        raise StapleError(f"{whose} is valid from {_iso(begins)} to {_iso(ends)}; the clock says {_iso(now)}")
    # RFC 6960 §4.2.2.2.1 leaves open how a responder is known to be revoked; here, by the list that is configured.
    for each in lists:
        serial = responder.serial_number
        if each.issuer == issuer.subject and each.get_revoked_certificate_by_serial_number(serial) is not None:
            raise StapleError(f"{whose} is revoked in `crl`")


def _usages(certificate: x509.Certificate) -> Sequence[x509.ObjectIdentifier]:
    """Extended key usages; none where the key usage does not let it sign (RFC 5280 §4.2.1.12: both must allow)."""
    extensions = certificate.extensions
    try:
        plain = extensions.get_extension_for_class(x509.KeyUsage).value
        if not plain.digital_signature and not plain.content_commitment:
            return ()
    except x509.ExtensionNotFound:
        pass
    try:
        return list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return ()


def _is_responder(response: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    """Whether a certificate is the one that the response names as its signer, by name or by its key's SHA-1."""
    if response.responder_name is not None:
        return response.responder_name == certificate.subject
    return response.responder_key_hash == x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest


def _signed_by(response: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    key, digest = certificate.public_key(), response.signature_hash_algorithm
    signature, signed = response.signature, response.tbs_response_bytes
    try:
        if isinstance(key, rsa.RSAPublicKey) and digest is not None and key.key_size >= RSA_BITS_MIN:
            key.verify(signature, signed, padding.PKCS1v15(), digest)
        elif isinstance(key, ec.EllipticCurvePublicKey) and digest is not None:
            key.verify(signature, signed, ec.ECDSA(digest))
        elif isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey) and digest is None:
            key.verify(signature, signed)
        else:
            return False
    except InvalidSignature:
        return False
    return True


def _check_understood(extensions: x509.Extensions) -> None:
    """RFC 5280 §4.2, which RFC 6960 §4.4 refers to: what is critical has to be understood."""
    for each in extensions:
        if each.critical and isinstance(each.value, x509.UnrecognizedExtension):
            raise StapleError(f"the stapled OCSP response has a critical extension {each.oid.dotted_string}: unknown")


def _time(seconds: float) -> datetime:
    """Of a clock that may say anything."""
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    except OverflowError:
        return (datetime.max if seconds > 0 else datetime.min).replace(tzinfo=UTC)


def _iso(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
