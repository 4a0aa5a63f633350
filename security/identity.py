"""Who a verified TLS certificate says its holder is. Values in, values out.

Reads what `ssl` hands out after it has verified the chain; verifies nothing itself, and knows nothing of what an
identity may do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The attribute types of RFC 4514 §3, by the names OpenSSL gives them; others keep OpenSSL's name.
_SHORT = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
_ESCAPED = frozenset(',+"\\<>;')


@dataclass(frozen=True, slots=True)
class CertificateIdentity:
    """The holder of a verified certificate.

    `common_name` is empty where the subject has none, or several: a rule must not hang on which of them is meant.
    `subject` is the distinguished name in the form of RFC 4514, most specific part first.
    """

    common_name: str
    dns_names: tuple[str, ...]
    uris: tuple[str, ...]
    emails: tuple[str, ...]
    subject: str

    def __str__(self) -> str:
        return self.subject


def certificate_identity(peercert: Mapping[str, Any] | None) -> CertificateIdentity | None:
    """The identity in the answer of `ssl_object.getpeercert()`.

    None where the peer showed no certificate, or one that nobody asked for and so nobody verified (`ssl` then gives
    an empty dict).
    """
    if not peercert:
        return None
    rdns: tuple[tuple[tuple[str, str], ...], ...] = peercert.get("subject", ())
    names = [value for rdn in rdns for kind, value in rdn if kind == "commonName"]
    alternatives: tuple[tuple[str, str], ...] = peercert.get("subjectAltName", ())

    def of_kind(kind: str) -> tuple[str, ...]:
        return tuple(value for found, value in alternatives if found == kind)

    return CertificateIdentity(
        common_name=names[0] if len(names) == 1 else "",
        dns_names=of_kind("DNS"),
        uris=of_kind("URI"),
        emails=of_kind("email"),
        subject=",".join(
            "+".join(f"{_SHORT.get(kind, kind)}={_escape(value)}" for kind, value in rdn) for rdn in reversed(rdns)
        ),
    )


def _escape(value: str) -> str:
    """RFC 4514 §2.4."""
    out = "".join("\\00" if char == "\0" else f"\\{char}" if char in _ESCAPED else char for char in value)
    if out.endswith(" "):
        out = out[:-1] + "\\ "
    return "\\" + out if out[:1] in ("#", " ") and not out.startswith("\\") else out
