"""The only calls into OpenSSL that pyOpenSSL has no public name for, on the TLS connections that ask for a staple.

pyOpenSSL hands a stapled response to a callback, and a callback needs memory that is written and then executed, which
the service's unit forbids (MemoryDenyWriteExecute): so it is asked for after the handshake instead. Nor can pyOpenSSL
check a peer's name. Every function is looked up at import: a library without one fails there, not in a handshake.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.bindings.openssl.binding import Binding

if TYPE_CHECKING:
    from OpenSSL import SSL

_lib: Final[Any] = Binding.lib
_ffi: Final[Any] = Binding.ffi

_response: Final = _lib.SSL_get_tlsext_status_ocsp_resp
_verify_result: Final = _lib.SSL_get_verify_result
_error_string: Final = _lib.X509_verify_cert_error_string
_parameters: Final = _lib.SSL_get0_param
_set_host: Final = _lib.X509_VERIFY_PARAM_set1_host
_set_ip: Final = _lib.X509_VERIFY_PARAM_set1_ip
_set_host_flags: Final = _lib.X509_VERIFY_PARAM_set_hostflags

NO_PARTIAL_WILDCARDS: Final = 0x4  # x509v3.h: `*.hub.example`, but no `h*.example`; as Python's own ssl has it


def expect_name(connection: SSL.Connection, name: str) -> None:
    """Have the handshake fail unless the peer's certificate is for this host name or address. Before the handshake.

    A host name goes into the ClientHello, too (RFC 6066 §3: no addresses there). Raises ValueError.
    """
    parameters = _parameters(connection._ssl)
    try:
        packed = ipaddress.ip_address(name).packed
    except ValueError:
        host = name.encode("idna")
        if not host:
            raise ValueError("a hub without a name cannot be told by its certificate") from None
        _set_host_flags(parameters, NO_PARTIAL_WILDCARDS)
        done = _set_host(parameters, host, len(host))
        connection.set_tlsext_host_name(host)
    else:
        done = _set_ip(parameters, packed, len(packed))
    if done != 1:
        raise ValueError(f"OpenSSL does not take {name!r} as a name to look for in a certificate")


def staple(connection: SSL.Connection) -> bytes:
    """The OCSP response that the peer stapled (RFC 6066 §8), DER; empty if it stapled none. After the handshake."""
    place = _ffi.new("unsigned char **")
    size: int = _response(connection._ssl, place)
    return bytes(_ffi.buffer(place[0], size)) if size > 0 else b""


def verify_fault(connection: SSL.Connection) -> tuple[int, str]:
    """Why OpenSSL does not trust the peer's certificate, as its code and words; code 0: it found nothing against it."""
    code: int = _verify_result(connection._ssl)
    return code, bytes(_ffi.string(_error_string(code))).decode()
