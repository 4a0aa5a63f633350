"""OCSP responses of every kind, and a TLS server that staples them. Knows nothing of who judges them."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import select
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import ocsp
from OpenSSL import SSL

from tests.pki import Certificate, Pki

HOUR = datetime.timedelta(hours=1)
CHUNK_BYTES = 64 << 10

Signer = tuple[x509.Certificate, CertificateIssuerPrivateKeyTypes]


def read(issued: Certificate) -> Signer:
    key = load_pem_private_key(issued.key.read_bytes(), None)
    return x509.load_pem_x509_certificate(issued.cert.read_bytes()), key  # type: ignore[return-value]


def authority(pki: Pki) -> Signer:
    return pki.authority, pki.authority_key


def answer(
    about: x509.Certificate,
    issuer: x509.Certificate,
    signer: Signer,
    *,
    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD,
    begins: datetime.timedelta = -HOUR,
    ends: datetime.timedelta | None = 24 * HOUR,
    embedded: Sequence[x509.Certificate] = (),
    id_digest: hashes.HashAlgorithm | None = None,
    by_name: bool = False,
    digest: hashes.HashAlgorithm | None = hashes.SHA256(),  # noqa: B008  a value without state
    extension: x509.UnrecognizedExtension | None = None,
) -> bytes:
    """A response about one certificate, DER; by SHA-1 unless told, it names the certificate, as responders do."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    revoked = status is ocsp.OCSPCertStatus.REVOKED
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=about,
            issuer=issuer,
            algorithm=id_digest or hashes.SHA1(),
            cert_status=status,
            this_update=now + begins,
            next_update=None if ends is None else now + ends,
            revocation_time=now - 2 * HOUR if revoked else None,
            revocation_reason=x509.ReasonFlags.key_compromise if revoked else None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.NAME if by_name else ocsp.OCSPResponderEncoding.HASH, signer[0])
    )
    if embedded:
        builder = builder.certificates(list(embedded))
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(signer[1], digest).public_bytes(Encoding.DER)


class StaplingServer:
    """TLS on loopback that staples what `staple` holds, nothing if that is empty, and echoes, or forwards to `target`.

    `done` counts handshakes that ended well on this side; `heard` is what came through them.
    """

    def __init__(
        self,
        server: Certificate,
        ca: Pki,
        staple: bytes = b"",
        target: int | None = None,
        version: int = SSL.TLS1_3_VERSION,
    ) -> None:
        self.staple = staple
        self.done = 0
        self.heard = bytearray()
        self._target = target
        self._files = server.cert, server.key
        self._version = version
        context = self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.use_certificate_chain_file(str(server.cert))
        context.use_privatekey_file(str(server.key))
        context.load_verify_locations(str(ca.ca))
        context.set_verify(SSL.VERIFY_PEER)
        context.set_session_id(b"stapling")
        context.set_ocsp_server_callback(lambda connection, data: self.staple)
        context.set_max_proto_version(version)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        # Readable once it is over: every thread looks at it beside its own sockets.
        self._over, self._ender = socket.socketpair()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> StaplingServer:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ender.close()
        for thread in self._threads:
            thread.join()
        self._listening.close()
        self._over.close()

    def _accept(self) -> None:
        while self._over not in select.select([self._listening, self._over], [], [])[0]:
            sock, _ = self._listening.accept()
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            beyond = None
            if self._target is not None:
                beyond = stack.enter_context(socket.create_connection(("127.0.0.1", self._target)))
            # A client that hangs up, or refuses, ends its connection and nothing else.
            stack.enter_context(contextlib.suppress(SSL.Error, ConnectionError))
            self._relay(sock, beyond)

    def _relay(self, sock: socket.socket, beyond: socket.socket | None) -> None:
        tls = SSL.Connection(self._context, None)
        tls.set_accept_state()
        shaken = False
        watched = [each for each in (sock, beyond, self._over) if each is not None]
        while self._over not in (ready := select.select(watched, [], [])[0]):
            if beyond in ready and beyond is not None:
                data = beyond.recv(CHUNK_BYTES)
                if not data:
                    return
                tls.sendall(data)
            if sock in ready:
                data = sock.recv(CHUNK_BYTES)
                if not data:
                    return
                tls.bio_write(data)
                with contextlib.suppress(SSL.WantReadError):
                    if not shaken:
                        tls.do_handshake()
                        shaken = True
                        self.done += 1
                    while True:
                        heard = tls.recv(CHUNK_BYTES)
                        self.heard += heard
                        if beyond is None:
                            tls.sendall(heard)
                        else:
                            beyond.sendall(heard)
            with contextlib.suppress(SSL.WantReadError):
                while True:
                    sock.sendall(tls.bio_read(CHUNK_BYTES))


class LyingServer(StaplingServer):
    """One that staples whatever bytes it is given, as no honest library does: pyOpenSSL's leaves out what does not fit.

    Made of the OpenSSL that Python itself uses, whose functions take them as they are. Echoes.
    """

    def _relay(self, sock: socket.socket, beyond: socket.socket | None) -> None:
        lib = _openssl()
        context = lib.SSL_CTX_new(lib.TLS_server_method())
        cert, key = (str(path).encode() for path in self._files)
        assert lib.SSL_CTX_use_certificate_chain_file(context, cert) == 1
        assert lib.SSL_CTX_use_PrivateKey_file(context, key, 1) == 1
        assert lib.SSL_CTX_set_cipher_list(context, b"DEFAULT") == 1
        lib.SSL_CTX_ctrl(context, SSL_CTRL_SET_MAX_PROTO_VERSION, self._version, None)

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        def staples(ssl: int, _argument: int) -> int:
            copy = lib.CRYPTO_malloc(len(self.staple), b"", 0)  # OpenSSL frees it
            ctypes.memmove(copy, self.staple, len(self.staple))
            lib.SSL_ctrl(ssl, SSL_CTRL_SET_TLSEXT_STATUS_REQ_OCSP_RESP, len(self.staple), copy)
            return 0  # SSL_TLSEXT_ERR_OK

        lib.SSL_CTX_callback_ctrl(context, SSL_CTRL_SET_TLSEXT_STATUS_REQ_CB, staples)
        ssl = lib.SSL_new(context)
        sock.settimeout(None)
        lib.SSL_set_fd(ssl, sock.fileno())
        if lib.SSL_accept(ssl) == 1:
            self.done += 1
            buffer = ctypes.create_string_buffer(CHUNK_BYTES)
            while (size := lib.SSL_read(ssl, buffer, CHUNK_BYTES)) > 0:
                self.heard += buffer.raw[:size]
                lib.SSL_write(ssl, buffer, size)
        lib.SSL_free(ssl)
        lib.SSL_CTX_free(context)


# openssl/ssl.h and tls1.h
SSL_CTRL_SET_TLSEXT_STATUS_REQ_CB = 63
SSL_CTRL_SET_TLSEXT_STATUS_REQ_OCSP_RESP = 71
SSL_CTRL_SET_MAX_PROTO_VERSION = 124


def _openssl() -> Any:
    lib = ctypes.CDLL("libssl.so.3")
    for name in ("TLS_server_method", "SSL_CTX_new", "SSL_new", "CRYPTO_malloc"):
        getattr(lib, name).restype = ctypes.c_void_p
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    lib.SSL_CTX_new.argtypes = lib.SSL_new.argtypes = lib.SSL_accept.argtypes = [pointer]
    lib.SSL_free.argtypes = lib.SSL_CTX_free.argtypes = [pointer]
    lib.SSL_CTX_use_certificate_chain_file.argtypes = lib.SSL_CTX_set_cipher_list.argtypes = [pointer, text]
    lib.SSL_CTX_use_PrivateKey_file.argtypes = [pointer, text, number]
    lib.SSL_ctrl.argtypes = lib.SSL_CTX_ctrl.argtypes = [pointer, number, ctypes.c_long, pointer]
    lib.SSL_CTX_callback_ctrl.argtypes = [pointer, number, pointer]
    lib.CRYPTO_malloc.argtypes = [ctypes.c_size_t, text, number]
    lib.SSL_set_fd.argtypes = [pointer, number]
    lib.SSL_read.argtypes = lib.SSL_write.argtypes = [pointer, pointer, number]
    return lib
