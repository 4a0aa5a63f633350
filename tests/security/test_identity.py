"""Who a verified certificate is, from what `ssl` says of it."""

from __future__ import annotations

import pytest

from security.identity import CertificateIdentity, certificate_identity
from security.tls import client_context, server_context
from tests.pki import Pki
from tests.security.test_tls import handshake


def test_a_verified_client_is_known_by_name_and_subject(pki: Pki) -> None:
    client = client_context(pki.ca, pki.client.cert, pki.client.key)
    _, listener = handshake(client, server_context(pki.server.cert, pki.server.key, pki.ca))
    found = certificate_identity(listener.getpeercert())
    assert found == CertificateIdentity("loco-4711", ("loco-4711",), (), (), "CN=loco-4711")
    assert str(found) == "CN=loco-4711"


@pytest.mark.parametrize("peercert", [None, {}])
def test_who_showed_nothing_or_was_not_asked_has_no_identity(peercert: dict[str, object] | None) -> None:
    assert certificate_identity(peercert) is None


def test_alternative_names_are_told_apart_by_kind() -> None:
    found = certificate_identity(
        {
            "subject": ((("commonName", "a"),),),
            "subjectAltName": (
                ("DNS", "a.example"),
                ("IP Address", "127.0.0.1"),
                ("URI", "spiffe://x/a"),
                ("email", "a@x"),
                ("DNS", "b.example"),
            ),
        }
    )
    assert found is not None
    assert (found.dns_names, found.uris, found.emails) == (("a.example", "b.example"), ("spiffe://x/a",), ("a@x",))


def test_of_several_common_names_none_is_believed() -> None:
    several = certificate_identity({"subject": ((("commonName", "admin"),), (("commonName", "app"),))})
    none = certificate_identity({"subject": ((("organizationName", "x"),),)})
    assert several is not None
    assert none is not None
    assert several.common_name == none.common_name == ""
    assert several.subject == "CN=app,CN=admin"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('a,b+c"d\\e<f>g;h', 'a\\,b\\+c\\"d\\\\e\\<f\\>g\\;h'),
        ("#a", "\\#a"),
        (" a ", "\\ a\\ "),
        (" ", "\\ "),
        ("a\0b", "a\\00b"),
        ("", ""),
    ],
)
def test_a_value_cannot_pretend_to_be_another_part_of_the_subject(value: str, shown: str) -> None:  # RFC 4514 §2.4
    found = certificate_identity({"subject": ((("countryName", "DE"),), (("commonName", value), ("userId", "u")))})
    assert found is not None
    assert found.subject == f"CN={shown}+UID=u,C=DE"
