"""TLS of a side that dials and asks its peer to staple an OCSP response, on the very connection of the data.

Python's `ssl` cannot ask. pyOpenSSL can; its connection is wrapped here so that asyncio takes it for an `SSLObject`:
`StapledContext.wrap_bio` stands where `ssl.SSLContext.wrap_bio` stands. Trust, names, lists and versions are those of
`security.tls.client_context`, which reads the files first and says which one is at fault. The handshake is not over
before the staple is judged (`security.ocsp`): no byte of data goes either way. Knows nothing of sockets.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509Store, X509StoreContext, X509StoreContextError, X509StoreFlags
from OpenSSL.crypto import Error as CryptoError

from security import ocsp, tls_faults, tls_raw
from security.ocsp import StapleError
from security.tls import StrPath, TLSFileError, client_context

_MOVED_BYTES: Final = 64 << 10
_CRL_END: Final = b"-----END X509 CRL-----"


class StapledContext:
    """What `client_context` makes, for connections on which a staple is asked for. Files are read once, here.

    `require`: a peer that staples nothing is refused; without, only one whose certificate says that it staples
    (RFC 7633). `wall`: seconds since 1970. Other arguments as in `client_context`. Raises TLSFileError.
    """

    def __init__(
        self,
        require: bool,
        wall: Callable[[], float],
        ca: StrPath | None = None,
        cert: StrPath | None = None,
        key: StrPath | None = None,
        crl: StrPath | None = None,
        key_password: StrPath | None = None,
    ) -> None:
        same = client_context(ca, cert, key, crl, key_password)
        self.require = require
        self.wall = wall
        context = self._context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
        context.set_verify(SSL.VERIFY_PEER)
        ciphers = [each["name"] for each in same.get_ciphers() if each["protocol"] != "TLSv1.3"]
        try:
            context.set_cipher_list(":".join(ciphers).encode())
        except SSL.Error as error:
            raise ssl.SSLError(f"none of Python's ciphers is one of pyOpenSSL's: {_reason(error)}") from error
        store = context.get_cert_store()
        assert store is not None
        self._issuers = X509Store()
        for each in (store, self._issuers):
            each.set_flags(X509StoreFlags.PARTIAL_CHAIN)
            _trust(each, None if ca is None else Path(ca))
        self.lists: list[x509.CertificateRevocationList] = []
        if crl is not None:
            _load(store, Path(crl))
            store.set_flags(X509StoreFlags.CRL_CHECK)
            self.lists = _lists(Path(crl))
        if cert is not None:
            _present(context, Path(cert), Path(cert if key is None else key), key_password)

    def issuer(self, chain: Sequence[X509]) -> x509.Certificate | None:
        """Who issued the first of a verified chain, if that one is trusted, too.

        Where the first is trusted by itself, OpenSSL shows behind it whatever the peer has sent.
        """
        if len(chain) < 2:
            return None
        try:
            X509StoreContext(self._issuers, chain[1], chain[2:]).verify_certificate()
        except X509StoreContextError:
            return None
        return _readable(chain[1])

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
    ) -> StapledObject:
        """As `ssl.SSLContext.wrap_bio`. Raises ValueError for a name that no certificate can hold."""
        assert not server_side
        assert isinstance(server_hostname, str), "a hub is told by its name"
        return StapledObject(self, SSL.Connection(self._context, None), incoming, outgoing, server_hostname)


class StapledObject:
    """One connection: the part of `ssl.SSLObject` that asyncio uses, with the same results and errors.

    A peer that is refused for its staple is one whose certificate does not verify: SSLCertVerificationError.
    """

    def __init__(
        self,
        context: StapledContext,
        connection: SSL.Connection,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        name: str,
    ) -> None:
        self._context = context
        self._connection = connection
        self._incoming = incoming
        self._outgoing = outgoing
        self._name = name
        self._verified = False
        tls_raw.expect_name(connection, name)
        connection.set_connect_state()
        connection.request_ocsp()

    def do_handshake(self) -> None:
        self._take_in()
        try:
            self._connection.do_handshake()
            self._judge()
        except StapleError as error:
            raise _not_verified(str(error)) from None  # our end of the handshake stays unsent
        except SSL.Error as error:
            self._give_out()
            self._raise(error)
        self._give_out()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; empty once the peer has said that there are no more."""
        assert self._verified
        self._take_in()
        try:
            return self._connection.recv(size)
        except SSL.ZeroReturnError:
            return b""
        except SSL.Error as error:
            self._give_out()
            self._raise(error)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """All of it."""
        assert self._verified
        self._take_in()
        try:
            self._connection.sendall(data)
        except SSL.Error as error:
            self._raise(error)
        finally:
            self._give_out()
        return len(data)

    def unwrap(self) -> None:
        """Say that there is no more; done when the peer has said so, too."""
        self._take_in()
        try:
            if not self._connection.shutdown() and not self._connection.shutdown():
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the peer has not said its part")
        except SSL.Error as error:
            self._raise(error)
        finally:
            self._give_out()

    def getpeercert(self) -> None:
        """asyncio keeps the answer for who asks the transport; nobody asks for a hub's."""

    def cipher(self) -> tuple[str, str, int] | None:
        found = self._connection
        name, version, bits = found.get_cipher_name(), found.get_cipher_version(), found.get_cipher_bits()
        return None if name is None or version is None or bits is None else (name, version, bits)

    def compression(self) -> None:
        """None is ever used."""

    def version(self) -> str:
        return self._connection.get_protocol_version_name()

    # ------------------------------------------------------------------ within

    def _judge(self) -> None:
        """The handshake is done on OpenSSL's side; on ours only if this returns."""
        chain = self._connection.get_verified_chain()
        assert chain
        leaf = _readable(chain[0])
        response = tls_raw.staple(self._connection)
        if response:
            ocsp.judge(response, leaf, self._context.issuer(chain), self._context.wall(), self._context.lists)
        elif self._context.require:
            raise StapleError('no OCSP response is stapled to it, which ocsp = "require" asks for')
        elif ocsp.must_staple(leaf):
            raise StapleError("no OCSP response is stapled to it, which it says its holder does (RFC 7633)")
        self._verified = True

    def _take_in(self) -> None:
        data = self._incoming.read()
        if data:
            self._connection.bio_write(data)

    def _give_out(self) -> None:
        while True:
            try:
                data = self._connection.bio_read(_MOVED_BYTES)
            except SSL.WantReadError:
                return
            self._outgoing.write(data)

    def _raise(self, error: SSL.Error) -> NoReturn:
        if isinstance(error, SSL.WantReadError):
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "more is to come") from None
        if isinstance(error, SSL.SysCallError):
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol") from error
        if isinstance(error, SSL.ZeroReturnError):
            raise ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "the peer has ended TLS") from error
        code, fault = tls_raw.verify_fault(self._connection)
        if code and not self._verified:
            if "mismatch" in fault:
                fault += f", certificate is not valid for '{self._name}'"
            raise _not_verified(fault, code) from None
        if "bad certificate status response" in _reason(error):  # newer ones than OpenSSL 3.5 look into it, too
            raise _not_verified("the stapled OCSP response cannot be read") from error
        told = ssl.SSLError(ssl.SSL_ERROR_SSL, _reason(error))
        told.reason = _reason(error)
        raise told from error


def _not_verified(text: str, code: int = 0) -> ssl.SSLCertVerificationError:
    """As `ssl` itself raises it, with the attributes that its readers look at. `code`: 0 for a staple."""
    error = ssl.SSLCertVerificationError(ssl.SSL_ERROR_SSL, f"certificate verify failed: {text}")
    error.reason = "CERTIFICATE_VERIFY_FAILED"
    error.verify_message = text
    error.verify_code = code
    return error


def _readable(certificate: X509) -> x509.Certificate:
    """One that OpenSSL has read, and the stricter library may not. Raises StapleError."""
    try:
        return certificate.to_cryptography()
    except ocsp.UNREADABLE as error:
        raise StapleError(f"it, or its issuer's, cannot be read: {error}") from error


def _reason(error: SSL.Error | CryptoError) -> str:
    """The last of OpenSSL's reasons, as `ssl` gives it."""
    stack = error.args[0] if error.args else ()
    return str(stack[-1][2]) if stack else "unknown error"


def _trust(store: X509Store, ca: Path | None) -> None:
    """Raises TLSFileError."""
    if ca is not None:
        _load(store, ca)
        return
    # Whom Python's own TLS trusts: pyOpenSSL's library has no directory of certificates of its own.
    paths = ssl.get_default_verify_paths()
    for each in (paths.cafile, paths.capath):
        if each is not None:
            _load(store, Path(each))


def _load(store: X509Store, path: Path) -> None:
    """Certificates and lists of a file, or directory, that Python's TLS has taken before. Raises TLSFileError."""
    try:
        store.load_locations(*((None, path) if path.is_dir() else (path, None)))
    except CryptoError as error:
        raise TLSFileError(path, f"OpenSSL does not take it: {_reason(error)}") from error


def _lists(path: Path) -> list[x509.CertificateRevocationList]:
    """Raises TLSFileError."""
    pem = tls_faults.read(path)
    try:
        return [x509.load_pem_x509_crl(part + _CRL_END) for part in pem.split(_CRL_END)[:-1]]
    except ValueError as error:
        raise TLSFileError(path, f"holds a revocation list that cannot be read: {error}") from error


def _present(context: SSL.Context, cert: Path, key: Path, key_password: StrPath | None) -> None:
    """Our own chain and key. Raises TLSFileError."""
    password = None if key_password is None else tls_faults.password(Path(key_password))
    pem = tls_faults.read(key)
    try:
        # Not by pyOpenSSL's own reader: it asks for the password by a callback, which see tls_raw.
        private = load_pem_private_key(pem, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TLSFileError(key, f"cannot be used with ocsp, which needs the key itself in the file: {error}") from error
    try:
        context.use_certificate_chain_file(str(cert))
        context.use_privatekey(private)  # type: ignore[arg-type]  # what its TLS can't use, it refuses
        context.check_privatekey()
    except (SSL.Error, TypeError) as error:
        raise TLSFileError(cert, f"OpenSSL does not take it: {error}") from error
