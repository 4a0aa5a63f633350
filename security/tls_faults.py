"""What is wrong with a certificate or key file that OpenSSL does not take, in words that name the file.

Asked only after something failed: the library that can tell is 8 MB of memory that a daemon whose files are good need
not spend.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    import ssl

    from cryptography import x509

FILE_BYTES_MAX: Final = 4 << 20  # a system's whole CA bundle is a quarter of a megabyte
# What pkcs11-provider, and OpenSSL with it, reads like a private key.
TOKEN_MARK: Final = b"-----BEGIN PKCS#11 PROVIDER URI-----"

# X509_V_ERR_ of OpenSSL: self-signed, self-signed in the chain, no issuer found, no more than the certificate itself.
UNKNOWN_AUTHORITY: Final = (18, 19, 20, 21)

StrPath: TypeAlias = str | os.PathLike[str]
Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]


class TLSFileError(ValueError):
    """A certificate or key file can't be used. `path` is the one at fault; the text names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def distrust(error: ssl.SSLCertVerificationError) -> str:
    """Why a peer's certificate is not trusted."""
    text = str(error.verify_message)
    return f"{text}: no authority in ca has signed it" if error.verify_code in UNKNOWN_AUTHORITY else text


def password(path: Path) -> bytes:
    """What a file holds that is nothing but a password, without the end of its line. Raises TLSFileError."""
    found = read(path).rstrip(b"\r\n")
    if not found:
        raise TLSFileError(path, "holds no password")
    return found


def check_pair(cert: Path, key: Path, key_password: Path | None = None) -> None:
    """Raise TLSFileError if the key can't be read, or is not that of the first certificate."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    leaf = check_certificates(cert)[0]
    pem = read(key)
    if TOKEN_MARK in pem:
        where = "key_password_file" if key_password is None else str(key_password)
        raise TLSFileError(
            key,
            "names a key in a PKCS #11 token that OpenSSL does not get at: its configuration (OPENSSL_CONF) has no "
            f"provider for it, the token is away or has no such key, {where} does not hold its PIN, or it is not the "
            f"key of the first certificate in {cert}",
        )
    try:
        private = load_pem_private_key(pem, password=None if key_password is None else password(key_password))
    except TypeError as error:  # cryptography's word for "needs a password", or needs none
        if key_password is not None:
            raise TLSFileError(
                key, f"the key is not encrypted; leave key_password_file ({key_password}) out"
            ) from error
        raise TLSFileError(key, "the key is encrypted; name a file with its password as key_password_file") from error
    except UnsupportedAlgorithm as error:
        raise TLSFileError(key, f"a kind of key that is not supported: {error}") from error
    except ValueError as error:
        if key_password is not None and b"ENCRYPTED" in pem:
            raise TLSFileError(key_password, f"not the password of {key}") from error
        raise TLSFileError(key, "holds no private key in PEM form") from error
    ours, theirs = (
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for public in (private.public_key(), leaf.public_key())
    )
    if ours != theirs:
        raise TLSFileError(key, f"not the key of the first certificate in {cert}")


def check_certificates(path: Path) -> list[x509.Certificate]:
    """At least one, in the file's order. Raises TLSFileError."""
    from cryptography import x509

    pem = read(path)
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise TLSFileError(path, "holds no certificate in PEM form, or a damaged one") from error


def read(path: Path) -> bytes:
    """The file, bounded. Raises TLSFileError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise TLSFileError(path, (error.strerror or str(error)).lower()) from error
    if len(data) > FILE_BYTES_MAX:
        raise TLSFileError(path, f"larger than {FILE_BYTES_MAX} bytes: not a certificate or key file")
    return data


def file_stamp(*paths: StrPath | None) -> Stamp:
    """What tells one state of these files from another: for each its inode, size and mtime, None if there is none."""
    return tuple(_stamp(path) for path in paths)


def _stamp(path: StrPath | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
