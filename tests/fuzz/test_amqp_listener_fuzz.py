"""Any bytes at all into the listener, SASL and AMQP: a connection ends at most, and what it left behind is tidy."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.amqp import driver
from gateway.amqp.engine import Engine
from gateway.amqp.listener import AmqpListener
from gateway.amqp.message import encode
from gateway.amqp.sasl import AMQP_HEADER, SASL_HEADER, SaslClient
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.broker import Broker
from gateway.config import loads
from storeforward.journal import Journal

CONFIG = """
[gateway]
id = "loco"
[[address]]
name = "jobs/#"
kind = "queue"
"""


class Wire(asyncio.Transport):
    """A transport to nowhere."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_reading(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Serving:
    """One journal and broker for all examples; each example is a listener's connection of its own."""

    mistakes: ClassVar[list[str]] = []

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def _hear(self, pieces: list[bytes]) -> bytes:
        journal = self.journal
        broker = Broker(loads(CONFIG), journal)
        listener = AmqpListener(
            broker,
            lambda: None,
            container="loco",
            connections_max=10,
            message_max_bytes=10_000,
            idle_timeout_s=30,
            window=10,
        )
        protocol, wire = listener.protocol(), Wire()
        protocol.connection_made(wire)
        for piece in pieces:
            if not wire.closed:
                protocol.data_received(piece)
            await asyncio.sleep(0)
            if journal.pending:
                journal.begin()
                journal.commit()
                listener.committed(journal.committed())
            await asyncio.sleep(0)
        listener.housekeeping()
        protocol.connection_lost(None)
        if journal.pending:
            journal.commit_now()
        assert not listener.peers
        assert not listener.holders
        assert not listener._outgoing
        assert not [c for s in journal.streams.values() for c in s.cursors.values() if c.volatile]
        return wire.written

    def hear(self, *pieces: bytes) -> bytes:
        self.mistakes.clear()
        written = asyncio.run(self._hear(list(pieces)))
        assert not self.mistakes
        return written


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    journal = Journal.open(tmp_path_factory.mktemp("state"), synchronous="OFF")
    serving = Serving(journal)

    class Mistakes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            serving.mistakes.append(record.getMessage() + str(record.exc_info))

    handler = Mistakes(logging.ERROR)
    driver.log.addHandler(handler)
    yield serving
    driver.log.removeHandler(handler)
    journal.close()


def conversation(directory: str) -> list[bytes]:
    """A well-behaved app: SASL, links of every kind, messages both ways, answers, close. One piece a step."""
    said: list[bytes] = []
    journal = Journal.open(Path(directory), synchronous="OFF")

    async def talk() -> None:
        broker = Broker(loads(CONFIG), journal)
        listener = AmqpListener(
            broker,
            lambda: None,
            container="loco",
            connections_max=10,
            message_max_bytes=10_000,
            idle_timeout_s=30,
            window=10,
        )
        protocol, wire = listener.protocol(), Wire()
        protocol.connection_made(wire)
        client = Engine(server=False, container="app", sasl=SaslClient(["ANONYMOUS"]))
        client.open()

        async def turn() -> None:
            for _ in range(6):
                data = client.data_to_send()
                if data:
                    said.append(data)
                    protocol.data_received(data)
                await asyncio.sleep(0)
                if journal.pending:
                    journal.begin()
                    journal.commit()
                    listener.committed(journal.committed())
                await asyncio.sleep(0)
                written, wire.written = wire.written, b""
                for event in client.receive(written, 1.0) if written else []:
                    if type(event).__name__ == "Deliveries":
                        event.receiver.accept([handle for handle, _ in event.batch])  # type: ignore[union-attr]

        await turn()
        session = client.session()
        client.receiver(session, "dynamic", Terminus(dynamic=True), credit=5)
        client.receiver(session, "queue", Terminus("jobs/a", capabilities=("queue",)), credit=5)
        durable = Terminus("cab/+", durability=Durability.UNSETTLED_STATE, expiry=Expiry.NEVER)
        sub = client.receiver(session, "sub", durable, credit=5)
        fixed, anywhere = client.sender(session, "fixed", Terminus("cab/a")), client.sender(session, "any", Terminus())
        await turn()
        fixed.send([(n, encode(b"x" * n, message_id=n, ttl_ms=1000)) for n in range(3)])
        anywhere.send([(n, encode(b"y", to=to)) for n, to in enumerate(("jobs/a", "cab/b", "a/#", None))])
        await turn()
        sub.close(detach=True)
        client.close()
        await turn()
        protocol.connection_lost(None)

    asyncio.run(talk())
    assert journal.streams["local"].next_seq == 6  # three and two, the other two mean nothing
    journal.close()
    return said


with TemporaryDirectory() as directory:
    GOOD = conversation(directory)
ALL = b"".join(GOOD)
shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
cuts = st.lists(st.integers(0, len(ALL)), max_size=6)


def pieces_of(data: bytes, where: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in where)})
    return [data[a:b] for a, b in pairwise(at)]


@given(cuts)
@settings(shared, max_examples=60)
def test_however_the_steps_of_a_conversation_are_cut_all_of_it_is_heard(serving: Serving, where: list[int]) -> None:
    before = serving.journal.stream("local", "local").next_seq
    heard = serving.hear(*(piece for step in GOOD for piece in pieces_of(step, where)))
    assert serving.journal.streams["local"].next_seq == before + 5
    assert b"amqp:connection" not in heard
    assert b"amqp:session" not in heard


@given(st.binary(max_size=300), st.sampled_from([b"", SASL_HEADER, AMQP_HEADER, ALL[:60]]), cuts)
@settings(shared, max_examples=150)
def test_random_bytes_end_a_connection_at_most(serving: Serving, junk: bytes, before: bytes, where: list[int]) -> None:
    serving.hear(*pieces_of(before + junk, where))


@given(
    st.lists(st.tuples(st.integers(0, len(ALL) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(ALL)),
    cuts,
)
@settings(shared, max_examples=300)
def test_a_damaged_conversation_ends_a_connection_at_most(
    serving: Serving, damage: list[tuple[int, int]], end: int, where: list[int]
) -> None:
    data = bytearray(ALL)
    for at, value in damage:
        data[at] = value
    serving.hear(*pieces_of(bytes(data[:end] or data), where))


@given(st.lists(st.integers(0, len(GOOD) - 1), max_size=8), st.integers(1, len(GOOD)))
@settings(shared, max_examples=150)
def test_steps_repeated_or_out_of_turn_end_a_connection_at_most(serving: Serving, more: list[int], good: int) -> None:
    serving.hear(*GOOD[:good], *(GOOD[at] for at in more))


@given(st.integers(0x10, 0x18), st.lists(st.binary(min_size=1, max_size=12), max_size=6), st.integers(0, 2))
@settings(shared, max_examples=200)
def test_performatives_with_random_fields_end_a_connection_at_most(
    serving: Serving, code: int, fields: list[bytes], channel: int
) -> None:
    body = b"".join(fields)
    performative = b"\x00\x53" + bytes([code]) + b"\xd0" + struct.pack(">II", len(body) + 4, len(fields)) + body
    frame = struct.pack(">IBBH", len(performative) + 8, 2, 0, channel) + performative
    serving.hear(*GOOD[:4], frame, frame)
