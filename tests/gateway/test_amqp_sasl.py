"""The SASL layer as a script: what one side sends, the other reads; no sockets."""

from __future__ import annotations

import pytest

from gateway.amqp.sasl import AHEAD_BYTES_MAX, AMQP_HEADER, SASL_HEADER, Outcome, SaslClient, SaslServer


def talk(client: SaslClient, server: SaslServer, step_bytes: int = 1 << 20) -> None:
    """Carry bytes both ways, step_bytes at a time, until neither has any."""
    while True:
        up, down = client.take_output(), server.take_output()
        if not up and not down:
            return
        for at in range(0, len(up), step_bytes):
            server.feed(up[at : at + step_bytes])
        for at in range(0, len(down), step_bytes):
            client.feed(down[at : at + step_bytes])


def knows_alice(user: str, password: str) -> bool:
    return (user, password) == ("alice", "wönder")


@pytest.mark.parametrize("step_bytes", [1, 7, 1 << 20])
def test_plain_with_the_right_password_gives_the_server_the_user(step_bytes: int) -> None:
    client = SaslClient(["EXTERNAL", "PLAIN"], "alice", "wönder", "hub.example")
    server = SaslServer(["EXTERNAL", "PLAIN", "ANONYMOUS"], knows_alice)
    talk(client, server, step_bytes)
    assert client.done
    assert server.done
    assert (server.identity, server.mechanism) == ("alice", "PLAIN")
    assert client.identity == "alice"


@pytest.mark.parametrize(("user", "password"), [("alice", "wrong"), ("bob", "wönder"), ("", ""), ("alice", "")])
def test_plain_with_wrong_credentials_fails_on_both_sides_as_authentication(user: str, password: str) -> None:
    client, server = SaslClient(["PLAIN"], user, password), SaslServer(["PLAIN"], knows_alice)
    talk(client, server)
    assert not client.done
    assert not server.done
    assert server.identity is None
    assert client.error is not None
    assert client.error.auth
    assert server.error is not None
    assert server.error.auth


def test_the_password_is_in_no_error() -> None:
    client, server = SaslClient(["PLAIN"], "alice", "s3cret"), SaslServer(["PLAIN"], knows_alice)
    talk(client, server)
    assert "s3cret" not in f"{client.error}{server.error}"


def test_plain_may_not_act_for_somebody_else() -> None:
    server = SaslServer(["PLAIN"], lambda user, password: True)
    response = b"root\0alice\0x"
    init = (
        b"\x00\x53\x41\xc0" + bytes([9 + len(response), 2]) + b"\xa3\x05PLAIN\xa0" + bytes([len(response)]) + response
    )
    server.feed(SASL_HEADER + (len(init) + 8).to_bytes(4, "big") + b"\x02\x01\x00\x00" + init)
    assert server.error is not None
    assert not server.done


def test_external_takes_the_identity_of_the_certificate() -> None:
    client, server = SaslClient(["EXTERNAL", "ANONYMOUS"]), SaslServer(["EXTERNAL"], None, "loco-4711")
    talk(client, server)
    assert (server.identity, client.mechanism) == ("loco-4711", "EXTERNAL")


def test_external_is_not_offered_without_a_certificate() -> None:
    client, server = SaslClient(["EXTERNAL"]), SaslServer(["EXTERNAL", "ANONYMOUS"])
    talk(client, server)
    assert client.error is not None
    assert client.error.auth
    assert "ANONYMOUS" in str(client.error)


def test_a_mechanism_that_was_not_offered_is_refused_even_if_the_client_insists() -> None:
    server = SaslServer(["PLAIN"], knows_alice)
    init = b"\x00\x53\x41\xc0" + bytes([12, 1]) + b"\xa3\x09ANONYMOUS"
    server.feed(SASL_HEADER + (len(init) + 8).to_bytes(4, "big") + b"\x02\x01\x00\x00" + init)
    assert server.error is not None
    assert server.error.auth


def test_anonymous_leaves_no_identity() -> None:
    client, server = SaslClient(["ANONYMOUS"]), SaslServer(["ANONYMOUS"])
    talk(client, server)
    assert server.done
    assert server.identity is None


def test_no_sasl_layer_counts_as_anonymous_if_that_is_allowed() -> None:
    server = SaslServer(["ANONYMOUS"])
    server.feed(AMQP_HEADER[:3])
    assert not server.done
    server.feed(AMQP_HEADER[3:] + b"open")
    assert server.done
    assert server.rest == AMQP_HEADER + b"open"
    assert server.take_output() == b""


def test_no_sasl_layer_is_refused_with_our_header_if_anonymous_is_not_allowed() -> None:
    server = SaslServer(["PLAIN"], knows_alice)
    server.feed(AMQP_HEADER)
    assert server.error is not None
    assert server.error.auth
    assert server.take_output() == SASL_HEADER


def test_bytes_behind_the_exchange_come_out_as_rest() -> None:
    client, server = SaslClient(["ANONYMOUS"]), SaslServer(["ANONYMOUS"])
    server.feed(client.take_output())
    client.feed(server.take_output())
    server.feed(client.take_output() + AMQP_HEADER + b"\0\0")
    assert server.rest == AMQP_HEADER + b"\0\0"


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"AMQP\x00\x00\x09\x01"])
def test_another_protocol_is_refused_and_told_ours(junk: bytes) -> None:
    server = SaslServer(["ANONYMOUS"])
    server.feed(junk)
    assert server.error is not None
    assert not server.error.auth
    assert server.take_output() == SASL_HEADER


def test_a_frame_beyond_the_limit_is_refused_before_it_is_buffered() -> None:
    server = SaslServer(["ANONYMOUS"])
    server.feed(SASL_HEADER + (1 << 24).to_bytes(4, "big"))
    assert server.error is not None
    assert not server._buffer


@pytest.mark.parametrize(("code", "auth"), [(1, True), (2, False), (3, True), (4, False), (9, False)])
def test_an_outcome_says_whether_trying_again_soon_is_useless(code: int, auth: bool) -> None:
    client = SaslClient(["ANONYMOUS"])
    server = SaslServer(["ANONYMOUS"])
    server.feed(client.take_output())
    client.feed(server.take_output())
    body = b"\x00\x53\x44\xc0\x03\x01\x50" + bytes([code])
    client.feed((len(body) + 8).to_bytes(4, "big") + b"\x02\x01\x00\x00" + body)
    assert client.error is not None
    assert client.error.auth is auth


def test_an_outcome_out_of_turn_never_lets_a_client_in() -> None:
    client = SaslClient(["ANONYMOUS"])
    body = b"\x00\x53\x44\xc0\x03\x01\x50\x00"
    client.feed(SASL_HEADER + (len(body) + 8).to_bytes(4, "big") + b"\x02\x01\x00\x00" + body)
    assert not client.done
    assert client.error is not None


def waiting_server(ahead: bytes = b"") -> SaslServer:
    """A server whose password check takes its time."""
    server, client = SaslServer(["PLAIN"], lambda user, password: None), SaslClient(["PLAIN"], "anna", "secret")
    server.feed(client.take_output())
    client.feed(server.take_output())
    server.feed(client.take_output() + ahead)
    assert server.waiting
    assert not server.done
    assert server.take_output() == b""
    return server


def test_a_password_may_be_judged_later_and_what_came_ahead_is_kept() -> None:
    server = waiting_server(AMQP_HEADER[:4])
    server.feed(AMQP_HEADER[4:])
    assert not server.done
    server.answer(True)
    assert (server.done, server.identity, server.rest) == (True, "anna", AMQP_HEADER)
    assert server.take_output()[-1] == Outcome.OK


@pytest.mark.parametrize("refusal", [Outcome.AUTH, Outcome.SYS_TEMP])
def test_a_password_judged_wrong_later_lets_nobody_in(refusal: Outcome) -> None:
    server = waiting_server(AMQP_HEADER)
    server.answer(False, refusal)
    assert not server.done
    assert server.identity is None
    assert server.error is not None
    assert server.take_output()[-1] == refusal


def test_whoever_does_not_wait_for_the_outcome_is_bounded() -> None:
    server = waiting_server()
    server.feed(bytes(AHEAD_BYTES_MAX + 1))
    assert server.error is not None
    assert not server._buffer
