"""Makes `ssl.SSLContext`s from certificate files, and says which file is at fault.

TLS 1.2 and newer. A client always verifies the server's chain and name; a server with a `client_ca` asks for a
certificate that it issued, and unless told otherwise takes nobody without. Knows nothing of who connects to whom, nor
of what an identity may do.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final, Literal, TypeAlias

from security import tls_faults
from security.tls_faults import FILE_BYTES_MAX, Stamp, StrPath, TLSFileError, file_stamp, read

__all__ = [
    "FILE_BYTES_MAX",
    "ClientCert",
    "Stamp",
    "StrPath",
    "TLSFileError",
    "client_context",
    "file_stamp",
    "server_context",
]

MINIMUM_VERSION: Final = ssl.TLSVersion.TLSv1_2
_CERTIFICATE_MARK: Final = b"-----BEGIN CERTIFICATE-----"
_CRL_MARK: Final = b"-----BEGIN X509 CRL-----"

ClientCert: TypeAlias = Literal["none", "optional", "required"]

_VERIFY_MODE: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


def client_context(
    ca: StrPath | None = None,
    cert: StrPath | None = None,
    key: StrPath | None = None,
    crl: StrPath | None = None,
    key_password: StrPath | None = None,
) -> ssl.SSLContext:
    """The context of a side that dials.

    `ca`: PEM file of the authorities to trust, None for the system's. `cert` and `key`: PEM files of our own
    chain, leaf first, and its key; None to show no certificate, `key` None if it is in `cert`. `key_password`: file
    with the password of an encrypted key.
    `crl`: PEM file of revocation lists; with it, a peer is refused that is in one of them, and so is one whose issuer
    has no list there that is in its time. Raises TLSFileError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, Path(ca))
    if crl is not None:
        _heed(context, Path(crl))
    if cert is not None:
        _present(context, Path(cert), Path(cert if key is None else key), key_password)
    elif key is not None:
        raise TLSFileError(Path(key), "a key without a certificate")
    return context


def server_context(
    cert: StrPath,
    key: StrPath | None = None,
    client_ca: StrPath | None = None,
    client_cert: ClientCert = "required",
    crl: StrPath | None = None,
    key_password: StrPath | None = None,
) -> ssl.SSLContext:
    """The context of a side that listens.

    `client_cert` says what becomes of a client without a certificate from `client_ca`: with "required" there is no
    connection, with "optional" there is one without an identity (a certificate that is shown must still be good),
    with "none" nobody is asked for one. Without `client_ca` nobody is asked either. Shapes and errors as in
    `client_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _present(context, Path(cert), Path(cert if key is None else key), key_password)
    if client_ca is not None:
        _trust(context, Path(client_ca))
        context.verify_mode = _VERIFY_MODE[client_cert]
        if crl is not None:
            _heed(context, Path(crl))
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = MINIMUM_VERSION
    # A peer could have us compute a handshake as often as it likes (TLS 1.2 only; 1.3 has no renegotiation).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # An intermediate in `ca` is a trust anchor, too: what the operator lists is what is trusted.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _trust(context: ssl.SSLContext, path: Path) -> None:
    marks = read(path).count(_CERTIFICATE_MARK)
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        tls_faults.check_certificates(path)
        raise TLSFileError(path, f"OpenSSL does not take it: {_why(error)}") from error
    if context.cert_store_stats()["x509"] < marks:  # one stands there twice, or one does not read
        tls_faults.check_certificates(path)


def _heed(context: ssl.SSLContext, path: Path) -> None:
    """Refuse whom the revocation lists of this file name (RFC 5280 §6.3). Leaves only: what `ca` holds is trusted."""
    marks = read(path).count(_CRL_MARK)
    if not marks:
        raise TLSFileError(path, "holds no revocation list in PEM form")
    before = context.cert_store_stats()["crl"]
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise TLSFileError(path, f"OpenSSL does not take it: {_why(error)}") from error
    if context.cert_store_stats()["crl"] - before < marks:
        raise TLSFileError(path, "holds a damaged revocation list, or one twice")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _present(context: ssl.SSLContext, cert: Path, key: Path, key_password: StrPath | None) -> None:
    read(cert)
    read(key)
    # Without any, OpenSSL would ask the terminal.
    password = b"" if key_password is None else tls_faults.password(Path(key_password))
    try:
        context.load_cert_chain(cert, key, password=password)
    except (OSError, ssl.SSLError, ValueError) as error:
        tls_faults.check_pair(cert, key, None if key_password is None else Path(key_password))
        raise TLSFileError(cert, f"OpenSSL does not take it: {_why(error)}") from error


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
